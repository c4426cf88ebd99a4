from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench import spread as module
from bezel.bench.loss.measure import measure
from bezel.bench.loss.result import Measurement
from bezel.bench.loss.sensitivity import sensitivity
from bezel.bench.loss.subjects import Spec, parse_spec
from bezel.bench.spread import Cluster, Recipe, Spread, here
from bezel.bench.stress.stress import stress
from bezel.runtime.commands.main import main
from bezel.runtime.errors import BezelError, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from click.testing import CliRunner
from threadpoolctl import threadpool_limits
from tiny import TEXT, checkpoint_folder

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")
TINY = "gemma2-gqa"


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    """As many for NumPy as workers take, where the tests' processes have one."""
    with threadpool_limits(os.cpu_count(), "blas"):
        yield


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """A scheduler and two workers, each a process that a nanny starts again."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def cluster(workers: Any) -> Iterator[Cluster]:
    workers.wait_for_workers(2, timeout=120)  # where a nanny was too slow to start one again, it never comes
    with Cluster(workers.scheduler_address, warn) as cluster:
        yield cluster


def warn(said: str) -> None:
    raise AssertionError(said)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "tale.txt"
    path.write_text(TEXT.read_text("utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture
def run(gguf_of: Callable[..., Path], text: Path, tmp_path: Path) -> Callable[..., Measurement]:
    """Measures by three engines; into a folder for each name."""
    native = parse_spec(str(gguf_of(TINY, "q4_0")), Spec(Path()))
    numpy = parse_spec(f"{gguf_of(TINY, 'q4_0')}@engine=reference", Spec(Path()))
    exact = parse_spec(str(checkpoint_folder(TINY, tmp_path)), Spec(Path()))

    def call(states: str, spread: Spread = here, **options: Any) -> Measurement:
        called = {"chunk": 64, "limit": 6, "states": tmp_path / states, "spread": spread}
        return measure([native, numpy], exact, [text], **{**called, **options})

    return call


def kept(folder: Path) -> dict[str, bytes]:
    """Every record, by the hash of what it depends on and its number."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npz")}


class Waiting:
    """Says in a folder which process begins with an item, and which makes the work; all but 0 wait for `go`."""

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self.folder, self.files = folder, files
        (folder / f"made.{os.getpid()}.{time.monotonic_ns()}").touch()

    def __call__(self, item: int) -> int:
        (self.folder / f"{item}.{os.getpid()}").touch()
        while item and not (self.folder / "go").exists():
            time.sleep(0.01)
        return item * item

    def recipe(self) -> Recipe:
        return Recipe(Waiting, (self.folder, self.files), self.files)

    def begun(self) -> dict[int, list[int]]:
        """The processes that began with each item but 0."""
        found: dict[int, list[int]] = {}
        for path in self.folder.glob("[1-9]*.*"):
            item, pid = path.name.split(".")
            found.setdefault(int(item), []).append(int(pid))
        return found


def wait_for(what: Callable[[], Any]) -> None:
    for _ in range(6000):
        if what():
            return
        time.sleep(0.01)
    pytest.fail("waited for too long")


def test_a_measurement_has_the_bits_of_one_machines(
    run: Callable[..., Measurement], cluster: Cluster, tmp_path: Path
) -> None:
    there, alone = run("there", cluster, effects=True), run("alone", effects=True)
    assert vars(there) | {"time": ""} == vars(alone) | {"time": ""}
    assert kept(tmp_path / "there") == kept(tmp_path / "alone")
    assert len(kept(tmp_path / "there")) == 6 * (2 + 4)  # comparisons, and effects


@pytest.mark.parametrize(("by", "limit", "groups"), [("tensor", 1, 29), ("role", 3, 8)])
def test_a_sweep_has_the_bits_of_one_machines(
    by: str, limit: int, groups: int, cluster: Cluster, tmp_path: Path, text: Path
) -> None:
    folder = checkpoint_folder(TINY, tmp_path)

    def swept(states: str, spread: Spread) -> Any:
        options: dict[str, Any] = {"by": by, "chunk": 64, "limit": limit, "states": tmp_path / states}
        return sensitivity(folder, [text], ["q4_0"], spread=spread, **options)

    assert swept("there", cluster) == swept("alone", here)
    assert kept(tmp_path / "there") == kept(tmp_path / "alone")
    assert len(kept(tmp_path / "there")) == limit * groups


def test_poses_have_the_bits_of_one_machines(
    gguf_of: Callable[..., Path], cluster: Cluster, tmp_path: Path, text: Path
) -> None:
    exact = parse_spec(str(checkpoint_folder(TINY, tmp_path)), Spec(Path()))
    rounded = parse_spec(str(gguf_of(TINY, "q4_0")), Spec(Path()))

    def stressed(states: str, spread: Spread) -> Any:
        options: dict[str, Any] = {"levels": {"typos": [0.1]}, "grid": None, "corners": 0, "chunk": 32, "limit": 6}
        return stress([rounded], exact, [text], states=tmp_path / states, spread=spread, **options)

    there, alone = stressed("there", cluster), stressed("alone", here)
    assert vars(there) | {"time": ""} == vars(alone) | {"time": ""}
    assert kept(tmp_path / "there") == kept(tmp_path / "alone")


def test_what_a_killed_worker_had_is_done_by_another(workers: Any, cluster: Cluster, tmp_path: Path) -> None:
    work = Waiting(tmp_path, {})
    results = cluster(work, {f"item {i}": i for i in range(6)})
    found = dict([next(results)])
    wait_for(lambda: len({pid for pids in work.begun().values() for pid in pids}) == 2)
    item, (pid,) = next(iter(work.begun().items()))
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    found |= dict(results)
    assert found == {f"item {i}": i * i for i in range(6)}
    assert len(work.begun()[item]) == 2
    workers.wait_for_workers(2, timeout=120)  # where a nanny was too slow to start one again, it never comes


def test_a_measurement_outlives_a_worker(run: Callable[..., Measurement], cluster: Cluster, tmp_path: Path) -> None:
    def kill(done: int, total: int, _: str) -> None:
        assert total == 6
        if done == 2:
            os.kill(next(iter(cluster._client.run(os.getpid).values())), signal.SIGKILL)

    run("there", cluster, progress=kill)
    run("alone")
    assert kept(tmp_path / "there") == kept(tmp_path / "alone")


def test_it_goes_on_where_it_was_stopped(
    run: Callable[..., Measurement], workers: Any, cluster: Cluster, tmp_path: Path
) -> None:
    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    asked, progress = [], []

    def counting(work: Any, items: Any) -> Iterator[Any]:
        asked.append(len(items))
        yield from cluster(work, items)

    with pytest.raises(KeyboardInterrupt), Cluster(workers.scheduler_address, warn) as stopped:
        run("there", stopped, progress=stop)
    assert len(kept(tmp_path / "there")) == 3 * 2
    run("there", counting, progress=lambda done, total, _: progress.append((done, total)))
    run("there", counting)
    assert asked == [3, 0]
    assert progress == [(done, 6) for done in range(3, 7)]
    run("alone")
    assert kept(tmp_path / "there") == kept(tmp_path / "alone")


def test_what_is_pending_is_cancelled(workers: Any, tmp_path: Path) -> None:
    work = Waiting(tmp_path, {})

    def stop() -> None:
        with Cluster(workers.scheduler_address, warn) as cluster:
            for _ in cluster(work, {i: i for i in range(40)}):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    wait_for(lambda: not workers.scheduler.tasks)
    (tmp_path / "go").touch()
    with Cluster(workers.scheduler_address, warn) as cluster:
        assert list(cluster(work, {100: 100})) == [(100, 10_000)]  # the last in the queue
    assert len(work.begun()) < 10


def test_a_worker_makes_the_work_once(cluster: Cluster, tmp_path: Path) -> None:
    work = Waiting(tmp_path, {})
    (tmp_path / "go").touch()
    for _ in range(2):
        assert sorted(cluster(work, {i: i for i in range(20)})) == [(i, i * i) for i in range(20)]
    assert 1 <= len(list(tmp_path.glob("made.*"))) - 1 <= 2  # here, and on each worker


def test_a_model_that_was_written_anew_is_opened_anew(
    gguf_of: Callable[..., Path], cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    """Its size is the same."""
    file, exact = tmp_path / "model.gguf", Spec(gguf_of(TINY), "native", "f32", "f32")
    raw = bytearray(gguf_of(TINY, "q4_0").read_bytes())

    def found(states: str, spread: Spread) -> Measurement:
        called: dict[str, Any] = {"chunk": 64, "limit": 2, "states": tmp_path / states}
        return measure([Spec(file, "native")], exact, [text], spread=spread, **called)

    file.write_bytes(raw)
    before = found("there", cluster)
    with GGUFModel(file) as gguf:
        offset = gguf.tensors["output_norm.weight"].offset
    raw[offset : offset + 4] = np.float32(3).tobytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(raw)
    other.rename(file)  # the worker still has the earlier one mapped
    after, alone = found("there", cluster), found("alone", here)
    assert after.candidates[0].metrics == alone.candidates[0].metrics != before.candidates[0].metrics


def test_an_error_of_a_model_names_the_worker(
    gguf_of: Callable[..., Path], cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    original = gguf_of(TINY)
    with GGUFModel(original) as gguf:
        offset = gguf.tensors["output_norm.weight"].offset
    raw = bytearray(original.read_bytes())
    raw[offset : offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "broken.gguf").write_bytes(raw)
    specs = [Spec(path, "native", "f32", "f32") for path in (tmp_path / "broken.gguf", original)]
    with pytest.raises(BezelError, match=r"^worker tcp://\S+ on \S+: /.*broken\.gguf: a logit that is not finite"):
        measure(specs[:1], specs[1], [text], chunk=64, states=tmp_path / "states", spread=cluster)


@pytest.mark.parametrize("late", [False, True])
def test_a_worker_that_cannot_do_the_work_is_named(
    late: bool, cluster: Cluster, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes when the others have been asked."""
    if late:
        monkeypatch.setattr(Cluster, "_meet", lambda *_: None)
    size, nowhere = text.stat().st_size, str(tmp_path / "nowhere.gguf")

    def refused(files: dict[str, int], why: str) -> None:
        with pytest.raises(BezelError, match=rf"^worker tcp://\S+ on {socket.gethostname()}: {why}"):
            list(cluster(Waiting(tmp_path, files), {0: 0}))

    refused({str(text): size, nowhere: 5}, f"{nowhere}: No such file or directory; share its folder, or copy it")
    refused({str(text): size + 1}, f"{text}: found {size} bytes, expected {size + 1}; copy it anew")
    monkeypatch.setattr(module._Build, "here", lambda: module._Build("0.0.1", "f00"))
    refused({}, r"found bezel .*, sources \w+, expected bezel 0\.0\.1, sources f00, which asks; install the same")


def test_a_worker_without_bezel_is_told(tmp_path: Path) -> None:
    hide = "import sys; sys.modules.update({name: None for name in [*sys.modules] if name.startswith('bezel')})"
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as bare:
        with distributed.Client(bare) as client:
            client.run(exec, f"import bezel.bench.spread; {hide}", {})
        with Cluster(bare.scheduler_address, warn) as cluster:
            results = cluster(Waiting(tmp_path, {}), {0: 0})
            with pytest.raises(BezelError, match=r"worker tcp://.*: cannot load what it is to do .* install the same"):
                next(results)


@contextmanager
def in_process(**options: Any) -> Iterator[Any]:
    """A scheduler whose workers are threads of this process."""
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": ":0"} | options
    with distributed.LocalCluster(**options) as cluster:
        yield cluster


def test_workers_that_do_several_things_at_a_time_are_refused(tmp_path: Path) -> None:
    said = r"found 2 tasks at a time, expected one.*: dask worker ADDRESS --nthreads 1"
    with in_process(n_workers=1, threads_per_worker=2) as several, Cluster(several.scheduler_address, warn) as cluster:
        results = cluster(Waiting(tmp_path, {}), {0: 0})
        with pytest.raises(BezelError, match=said):
            next(results)


def test_other_last_bits_are_told(workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "_last_bits", lambda: "others")
    with Cluster(workers.scheduler_address, said.append) as cluster:
        assert list(cluster(Waiting(tmp_path, {}), {0: 0})) == [(0, 0)]
    assert all("last digits may differ from those of one machine" in line for line in said)
    assert said


def test_a_scheduler_without_workers_is_told(tmp_path: Path) -> None:
    """And waited for: they may be in a queue."""
    said: list[str] = []
    with in_process(n_workers=0) as alone:

        def tell(line: str) -> None:
            said.append(line)
            alone.scale(1)

        with Cluster(alone.scheduler_address, tell) as cluster:
            assert list(cluster(Waiting(tmp_path, {}), {0: 0})) == [(0, 0)]
    start = "dask worker ADDRESS --nthreads 1 --memory-limit 0"
    assert said == [f"the scheduler has no worker yet, and waits for one: {start}"]


def test_a_scheduler_that_ends_is_told(tmp_path: Path) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}):  # it may come back for so long
        with in_process(n_workers=1) as ends:
            cluster = Cluster(ends.scheduler_address, warn)
            results = cluster(Waiting(tmp_path, {}), {0: 0, 1: 1})
            assert next(results) == (0, 0)
            (tmp_path / "go").touch()  # when the scheduler has stopped listening
        with cluster, pytest.raises(BezelError, match=r"the scheduler is gone.* the same command goes on"):
            next(results)


def test_a_killed_scheduler_is_told_without_a_traceback(tmp_path: Path) -> None:
    file, log = tmp_path / "scheduler.json", (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    killed = subprocess.Popen(
        [*command, "--no-dashboard", "--scheduler-file", str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )

    def kill_later(_: str) -> None:
        """It has no worker, which is told before the work is sent."""
        threading.Timer(1, killed.kill).start()

    records: list[logging.LogRecord] = []
    heard = logging.Handler()
    heard.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("distributed.client")
    logger.addHandler(heard)
    try:
        wait_for(lambda: file.is_file() and file.read_text())
        with Cluster(str(file), kill_later) as cluster, pytest.raises(BezelError, match="the scheduler is gone"):
            list(cluster(Waiting(tmp_path, {}), {0: 0}))
    finally:
        killed.kill()
        killed.wait()
        log.close()
        logger.removeHandler(heard)
    assert not any(record.exc_info for record in records)


def test_addresses_where_no_scheduler_is(text: Path, workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.5)
    other, empty = text.with_name("other.json"), text.with_name("empty.json")
    other.write_text("[1]")
    empty.write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        nobody = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        worker = next(iter(workers.scheduler.workers))
        for wrong in (nobody, worker, str(text), str(other), str(empty), "no://where", "nowhere.json"):
            with pytest.raises(InvalidRequest, match=f"--scheduler {wrong}: no dask scheduler answers there, and it"):
                Cluster(wrong, warn)


def test_results_may_come_in_any_order(run: Callable[..., Measurement]) -> None:
    def backwards(work: Any, items: Any) -> Iterator[Any]:
        yield from reversed(list(here(work, items)))

    assert vars(run("there", backwards)) | {"time": ""} == vars(run("alone")) | {"time": ""}


def test_the_commands(
    gguf_of: Callable[..., Path], text: Path, workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the scheduler's address, and by its file; where paths are relative, to another folder than the workers'."""
    monkeypatch.chdir(tmp_path)
    folder, file = checkpoint_folder(TINY, Path()), tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": workers.scheduler_address}))
    options = ["--text", str(text), "--chunk", "64", "--chunks", "2", "--json"]
    for command, scheduler in (
        (["measure", str(gguf_of(TINY, "q4_0")), "--reference", str(folder)], workers.scheduler_address),
        (["sensitivity", str(folder), "--formats", "q4_0", "--by", "role"], str(file)),
    ):
        shown = []
        for more in (["--scheduler", scheduler], []):
            states = ["--state", str(tmp_path / f"states{len(more)}")]
            shown.append(CliRunner().invoke(main, [*command, *options, *states, *more]))
            assert shown[-1].exit_code == 0, shown[-1].output
        there, alone = (json.loads(each.stdout) | {"time": "", "command": ""} for each in shown)
        assert there == alone
    assert kept(tmp_path / "states2") == kept(tmp_path / "states0")


def test_without_the_extra(gguf_of: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["measure", str(gguf_of(TINY)), "--reference", str(gguf_of(TINY)), "--text", str(text)]
    shown = CliRunner().invoke(main, [*command, "--scheduler", "tcp://127.0.0.1:8786"])
    assert shown.exit_code == 1
    assert "--scheduler needs the package distributed: pip install 'bezel-lm[cluster]'" in shown.output


def test_dask_is_not_imported_for_one_machine() -> None:
    source = "import sys, bezel.bench.commands.measure, bezel.bench.commands.sensitivity as _\n"
    source += "print({'dask', 'distributed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr
