"""The native core's thread pool and choice of instruction set, driven through `linear`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from bezel.runtime import _native
from bezel.runtime._native import Matrix, ThreadPool, linear

BLOCK, BLOCK_BYTES = 32, 34


def random_matrix(rng: np.random.Generator, rows: int, n: int) -> Matrix:
    """In Q8_0, with scales of either sign."""
    w = rng.integers(0, 256, (rows, n // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    w[:, :, :2] = rng.standard_normal((rows, n // BLOCK, 1)).astype("<f2").view(np.uint8)
    return Matrix(w.reshape(rows, -1), 8, n)


@pytest.mark.parametrize("rows", [1, 31, 500])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    rng = np.random.default_rng(rows)
    w = random_matrix(rng, rows, 2304)
    for n in (1, 5, 60):
        x = rng.standard_normal((n, 2304)).astype(np.float32)
        results = {linear(ThreadPool(threads), x, [w])[0].tobytes() for threads in (1, 2, 3, 4) for _ in range(3)}
        assert len(results) == 1


def test_python_threads_share_a_pool() -> None:
    rng = np.random.default_rng(3)
    pools = [ThreadPool(3), ThreadPool(2)]
    w = random_matrix(rng, 200, 512)
    xs = [rng.standard_normal((n, 512)).astype(np.float32) for n in (1, 1, 2, 20)]
    expected = [linear(ThreadPool(1), x, [w])[0].tobytes() for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for round_ in range(100):
            if linear(pools[round_ % 2], xs[i], [w])[0].tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pool_size() -> None:
    assert ThreadPool(3).threads == 3
    for threads in (-1, 0, 1025):
        with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 1024"):
            ThreadPool(threads)


def python(source: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_pool_that_cannot_start_its_threads_cleans_up() -> None:
    source = """
import resource, threading
from bezel.runtime._native import ThreadPool
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, -1))  # some of the 1023 stacks fit
try:
    ThreadPool(1024)
except RuntimeError:
    import os
    print(len(os.listdir("/proc/self/task")))
"""
    assert python(source, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1") == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("leave", ["sys.exit(int(not right))", "os._exit(int(not right))"])
def test_a_forked_process_goes_on_alone(leave: str) -> None:
    """With the parent's pool, asleep or at work for another thread, and with a new one; and it ends."""
    source = f"""
import os, sys, threading, time
import numpy as np
from bezel.runtime._native import Matrix, ThreadPool, linear
rng = np.random.default_rng(0)
data = rng.integers(0, 60, (256, 16 * 34), dtype=np.uint8)
w, x = Matrix(data, 8, 512), rng.standard_normal((1, 512)).astype(np.float32)
pool = ThreadPool(3)
expected = linear(pool, x, [w])[0].tobytes()
time.sleep(0.01)
def work():
    while busy:
        linear(pool, x, [w])
for busy in (False, True, True, True):
    thread = threading.Thread(target=work)
    thread.start()
    child = os.fork()
    if child == 0:
        pools = [pool, pool, ThreadPool(2)]
        right = all(linear(p, x, [w])[0].tobytes() == expected for p in pools)
        del pool, pools
        {leave}
    for _ in range(1000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
        sys.exit("the child hangs")
    assert status == 0, status
    assert linear(pool, x, [w])[0].tobytes() == expected
    busy = False
    thread.join()
"""
    python(source, PYTHONWARNINGS="ignore")


def test_default_threads() -> None:
    assert 1 <= _native.default_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity mask here")
def test_default_threads_respects_affinity() -> None:
    source = """
import os
from bezel.runtime._native import default_threads
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(default_threads())
"""
    assert python(source) == "1"


FLAGS = {  # as /proc/cpuinfo names them
    "avx2": "avx2 fma f16c",
    "avxvnni": "avx_vnni",
    "avx512vnni": "avx512f avx512bw avx512vl avx512dq avx512_vnni",
    "neon": "asimd",
    "neondot": "asimddp",
    "neoni8mm": "i8mm",
}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_isas_agree_with_the_kernel() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(x.split()) for x in lines if x.lower().startswith(("flags", "features"))), set())
    names = list(FLAGS)[:3] if platform.machine() in ("x86_64", "AMD64") else list(FLAGS)[3:]
    assert _native.isas() == ["scalar", *(name for name in names if flags.issuperset(FLAGS[name].split()))]


ASK = "from bezel.runtime import _native; print(_native.isa())"


def test_the_best_isa_is_the_default() -> None:
    assert python(ASK, BEZEL_ISA="") == _native.isas()[-1]


@pytest.mark.parametrize("wanted", ["avx1024", "Scalar", "neon" if "avx2" in _native.isas() else "avx2"])
def test_an_isa_that_cannot_run_is_an_error_each_time(wanted: str) -> None:
    source = """
import numpy as np
from bezel.runtime import _native
calls = [
    _native.isa,
    lambda: _native.linear(
        _native.ThreadPool(2), np.zeros((1, 32), np.float32), [_native.Matrix(np.zeros((1, 34), np.uint8), 8, 32)]
    ),
    _native.isa,
]
for call in calls:
    try:
        call()
    except ValueError as error:
        print(error)
"""
    lines = python(source, BEZEL_ISA=wanted).splitlines()
    usable = ", ".join(_native.isas())
    assert lines == [f"BEZEL_ISA is '{wanted}'; this machine can run: {usable}. Unset it to use the best."] * 3
