"""The native core against NumPy.

Integer dot products are exact, so only the float32 scaling and summing can differ. The scalar kernels have
one order of operations, which NumPy repeats bit for bit; the others may sum in any order, and stay inside
the bound that this allows.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from bezel.quant.formats import FORMATS
from bezel.runtime import _native
from bezel.runtime._native import ThreadPool, gemv_q8_0

BLOCK, BLOCK_BYTES = 32, 34
EPS = float(np.finfo(np.float32).eps) / 2  # of one rounding


@pytest.fixture(scope="module")
def pool() -> ThreadPool:
    return ThreadPool(2)


def random_weights(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """Q8_0 with every int8, −128 included, and scales of either sign."""
    w = rng.integers(0, 256, (rows, n // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    w[:, :, :2] = rng.standard_normal((rows, n // BLOCK, 1)).astype("<f2").view(np.uint8)
    return w.reshape(rows, -1)


def unpack(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ scales float32 (rows, blocks), int8 values as int64 (rows, blocks, 32)."""
    blocks = w.reshape(len(w), -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
    return scales, blocks[:, :, 2:].view(np.int8).astype(np.int64)


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ scales float32 (blocks,), values int64 (blocks, 32); every operation in float32, as the kernel's."""
    x = x.reshape(-1, BLOCK)
    scales = np.abs(x).max(axis=1) / np.float32(127)
    assert scales.dtype == np.float32
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    return scales, np.rint(x * inverse[:, None]).astype(np.int64)


def gemv_in_scalar_order(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    dw, qw = unpack(w)
    dx, qx = quantize_activations(x)
    terms = (dw * dx) * (qw * qx).sum(axis=2).astype(np.float32)
    y = np.zeros(len(w), np.float32)
    for b in range(terms.shape[1]):
        y = y + terms[:, b]
    return y


def exact_gemv(w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and how far float32 may be from it in whatever order it is taken.

    Each product reaches the result through the rounding of the two scales' product, of its multiplication,
    and of at most as many additions as there are terms: one a block, and a few more where lanes are summed.
    """
    dw, qw = unpack(w)
    dx, qx = quantize_activations(x)
    scale = dw.astype(np.float64) * dx
    exact = (scale * (qw * qx).sum(axis=2)).sum(axis=1)
    magnitude = (np.abs(scale) * np.abs(qw * qx).sum(axis=2)).sum(axis=1)
    roundings = dw.shape[1] + 8
    return exact, magnitude * roundings * EPS / (1 - roundings * EPS)


def check(w: np.ndarray, x: np.ndarray, pool: ThreadPool) -> None:
    y = gemv_q8_0(w, x, pool)
    assert y.dtype == np.float32
    assert y.shape == (len(w),)
    exact, bound = exact_gemv(w, x)
    assert (np.abs(y - exact) <= bound).all()
    if _native.isa() == "scalar":
        assert y.tobytes() == gemv_in_scalar_order(w, x).tobytes()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 13, 64, 257])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 17, 72])
def test_gemv(rows: int, blocks: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(rows * 1000 + blocks)
    x = (rng.standard_normal(blocks * BLOCK) * 10).astype(np.float32)
    check(random_weights(rng, rows, blocks * BLOCK), x, pool)


def test_gemv_of_quantized_weights(pool: ThreadPool) -> None:
    """End to end: what the format wrote, times x, is the dequantized weights times the quantized x."""
    rng = np.random.default_rng(1)
    weights, x = (
        rng.standard_normal((33, 256)).astype(np.float32),
        rng.standard_normal(256).astype(np.float32),
    )
    q8_0 = FORMATS["q8_0"]
    packed = np.frombuffer(q8_0.quantize(weights), np.uint8).reshape(33, -1)
    dx, qx = quantize_activations(x)
    x_seen = (qx * dx[:, None].astype(np.float64)).reshape(-1)
    w_seen = q8_0.dequantize(packed).astype(np.float64)
    # On top of the kernel's own roundings, dequantizing rounds every product of scale and value once.
    slack = exact_gemv(packed, x)[1] + np.abs(w_seen) @ np.abs(x_seen) * EPS
    assert (np.abs(gemv_q8_0(packed, x, pool) - w_seen @ x_seen) <= slack).all()


def test_no_rows(pool: ThreadPool) -> None:
    assert gemv_q8_0(np.zeros((0, BLOCK_BYTES), np.uint8), np.zeros(BLOCK, np.float32), pool).shape == (0,)


@pytest.mark.parametrize("offset", range(1, 9))
def test_weights_may_start_at_any_byte_and_be_read_only(offset: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(offset)
    w, x = random_weights(rng, 5, 96), rng.standard_normal(96).astype(np.float32)
    moved = np.frombuffer(bytes(offset) + w.tobytes() + bytes(3), np.uint8, w.size, offset).reshape(w.shape)
    assert not moved.flags.writeable
    assert gemv_q8_0(moved, x, pool).tobytes() == gemv_q8_0(w, x, pool).tobytes()


@pytest.mark.parametrize("rows", [1, 31, 500])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    rng = np.random.default_rng(rows)
    w, x = random_weights(rng, rows, 2304), rng.standard_normal(2304).astype(np.float32)
    results = {gemv_q8_0(w, x, ThreadPool(threads)).tobytes() for threads in (1, 2, 3, 4) for _ in range(3)}
    assert len(results) == 1


def test_python_threads_share_a_pool() -> None:
    rng = np.random.default_rng(3)
    pools = [ThreadPool(3), ThreadPool(2)]
    w = random_weights(rng, 200, 512)
    xs = [rng.standard_normal(512).astype(np.float32) for _ in range(4)]
    expected = [gemv_q8_0(w, x, ThreadPool(1)).tobytes() for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for round_ in range(100):
            if gemv_q8_0(w, xs[i], pools[round_ % 2]).tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_float16_scale(pool: ThreadPool) -> None:
    """One product a row, so the result is exact: subnormals, both zeros, infinities and NaNs included."""
    halves = np.arange(1 << 16, dtype="<u2")
    w = np.zeros((len(halves), BLOCK_BYTES), np.uint8)
    w[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    w[:, 2] = 1
    x = np.zeros(BLOCK, np.float32)
    x[0] = 127
    with np.errstate(invalid="ignore"):
        expected = halves.view("<f2").astype(np.float32) * np.float32(127)
    np.testing.assert_array_equal(gemv_q8_0(w, x, pool), expected)


def identity() -> np.ndarray:
    """One block a row, with a one on the diagonal: gemv gives x as it was quantized."""
    w = np.zeros((BLOCK, BLOCK_BYTES), np.uint8)
    w[:, :2] = np.array([1], "<f2").view(np.uint8)
    w[range(BLOCK), range(2, BLOCK_BYTES)] = 1
    return w


def test_activations_round_to_the_nearest_even(pool: ThreadPool) -> None:
    x = np.zeros(BLOCK, np.float32)
    x[:7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    assert gemv_q8_0(identity(), x, pool)[:7].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_activations_are_multiplied_by_the_inverse_scale(pool: ThreadPool) -> None:
    """Not divided by the scale: next to a tie the two round to different integers."""
    rng = np.random.default_rng(6)
    differ = 0
    for _ in range(50):
        x = (rng.integers(-127, 127, BLOCK) + 0.5).astype(np.float32)
        x[0] = 127
        x *= np.float32(rng.uniform(0.1, 10))
        scales, values = quantize_activations(x)
        differ += (np.rint(x / scales) != values).any()
        assert gemv_q8_0(identity(), x, pool).tolist() == (values[0].astype(np.float32) * scales).tolist()
    assert differ > 0


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1, 31])
def test_damaged_activations_show(bad: float, position: int, pool: ThreadPool) -> None:
    x = np.ones(2 * BLOCK, np.float32)
    x[position] = bad
    assert np.isnan(gemv_q8_0(random_weights(np.random.default_rng(0), 9, 64), x, pool)).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1.4e-36, 1.5e-36, 1.6e-36, 1.0, 3e38])
def test_activations_of_any_size(magnitude: float, pool: ThreadPool) -> None:
    """Half a step off at most, and a few roundings; zero where the step would be no normal number."""
    x = np.linspace(-1, 1, BLOCK).astype(np.float32) * np.float32(magnitude)
    y = gemv_q8_0(identity(), x, pool).astype(np.float64)
    step = float(x.max()) / 127
    if step < np.finfo(np.float32).tiny:
        assert not y.any()
    else:
        assert (np.abs(y - x) <= step * (0.5 + 127 * 8 * EPS)).all()


W, X = np.zeros((3, 2 * BLOCK_BYTES), np.uint8), np.zeros(2 * BLOCK, np.float32)


@pytest.mark.parametrize(
    ("weights", "x", "message"),
    [
        (W.view(np.int8), X, r"weights: found int8 \(3, 68\), expected uint8 \(rows, row_bytes\)"),
        (W[0], X, r"weights: found uint8 \(68,\), expected"),
        (W[:, :-1], X, r"weights: uint8 \(3, 67\) is not C-contiguous"),
        (np.asfortranarray(W), X, "weights: .* is not C-contiguous"),
        (W[:, :BLOCK_BYTES].copy(), X, "weights: found rows of 34 bytes, expected 68"),
        (W, X.astype(np.float64), r"x: found float64 \(64,\), expected float32 \(n,\)"),
        (W, X.astype(np.complex64), r"x: found another type \(64,\)"),
        (W, X.reshape(2, -1), r"x: found float32 \(2, 32\)"),
        (W, np.zeros(4 * BLOCK, np.float32)[::2], "x: .* is not C-contiguous"),
        (W, X[:33], "x: found 33 elements, expected a positive multiple of 32"),
        (W, X[:0], "x: found 0 elements"),
        (W, np.frombuffer(bytes(257), np.uint8)[1:].view(np.float32), "x: .* is not aligned"),
    ],
)
def test_wrong_arrays_are_refused(weights: np.ndarray, x: np.ndarray, message: str, pool: ThreadPool) -> None:
    with pytest.raises(ValueError, match=message):
        gemv_q8_0(weights, x, pool)


def test_what_is_no_array_is_refused(pool: ThreadPool) -> None:
    with pytest.raises(TypeError):
        gemv_q8_0([[1]], X, pool)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        gemv_q8_0(W, X, None)  # type: ignore[arg-type]


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
    lambda: _native.gemv_q8_0(np.zeros((1, 34), np.uint8), np.zeros(32, np.float32), _native.ThreadPool(2)),
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


@pytest.mark.parametrize("isa", _native.isas())
def test_the_kernels_of_every_isa(isa: str) -> None:
    """Runs the tests above again in a process of that instruction set."""
    assert python(ASK, BEZEL_ISA=isa) == isa
    select = ["-k", "gemv or activations or float16 or start or bit", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *select],
        env=os.environ | {"BEZEL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout


def test_scalar_order_is_not_exact_order() -> None:
    """The two references differ, so agreeing with one says something that the other does not."""
    rng = np.random.default_rng(5)
    w, x = random_weights(rng, 64, 1024), rng.standard_normal(1024).astype(np.float32)
    exact, bound = exact_gemv(w, x)
    y = gemv_in_scalar_order(w, x)
    assert (y != exact.astype(np.float32)).any()
    assert (np.abs(y - exact) <= bound).all()
    assert math.isfinite(bound.max())
