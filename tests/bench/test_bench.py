"""`bezel bench`: who is measured when, what the figures are made of, and the command end to end on small models."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.loss.metrics import compare as compare_logits
from bezel.bench.pictures.race import race
from bezel.bench.speed import speed
from bezel.bench.speed.child import process_memory
from bezel.bench.speed.machine import Machine
from bezel.bench.speed.profiling import Timed, profile
from bezel.bench.speed.runner import NotMeasured
from bezel.bench.speed.speed import Race, Samples, TimesAsFast, TokenCost, compare, comparisons, figures
from bezel.bench.speed.worker import Worker
from bezel.bench.synthetic import SHAPES, write_gguf
from bezel.export.gguf.writer import plan_tensors
from bezel.export.recipe import find_recipe
from bezel.quant.recipes import PRESETS
from bezel.runtime import Model, _native, load
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.model.families.hf import read_hf_config
from bezel.runtime.model.tensors import tensor_specs
from click.testing import CliRunner
from signals import heed_interrupts

BEZEL = [sys.executable, "-c", "from bezel.runtime.commands.main import main; main(prog_name='bezel')"]


class Fake:
    """A program that takes a second a token of a prompt and 1 + held / 1000 for one that it decodes, times `slow`."""

    def __init__(self, name: str, log: list[str], slow: float = 1.0, fails_at: str = "") -> None:
        self.name, self.log, self.slow, self.fails_at = name, log, slow, fails_at
        self.held = 0

    def _note(self, what: str) -> None:
        self.log.append(f"{self.name} {what}")
        if what == self.fails_at:
            raise NotMeasured("it broke")

    def prefill(self, n: int) -> float:
        self.held += n
        self._note(f"prefill {self.held}")
        return n * self.slow

    def decode(self, n: int) -> float:
        self._note(f"decode {self.held}")
        return n * (1 + self.held / 1000) * self.slow

    def reset(self) -> None:
        self.held = 0
        self._note("reset")

    def about(self) -> dict[str, Any]:
        return {"version": "1", "kv": "f16"}

    def memory(self) -> dict[str, int | None]:
        return {"peak_bytes": self.held}

    def close(self) -> None:
        self._note("close")


def measured(context: int, repeats: int, log: list[str], **fails_at: str) -> dict[str, Samples]:
    """Two fakes, B at half the speed, and a clock that ticks every time it is asked."""
    starts = {
        name: lambda name=name, slow=slow: Fake(name, log, slow, fails_at.get(name, ""))
        for name, slow in (("A", 1.0), ("B", 2.0))
    }
    ticks = iter(range(1000))
    return Race(
        starts, context, probe=lambda: log.append("probe"), clock=lambda: float(next(ticks)), sleep=lambda _: None
    ).run(repeats)


def test_programs_take_turns_at_every_step() -> None:
    log: list[str] = []
    measured(8192, 2, log)
    timed = [entry for entry in log[log.index("probe") :] if "prefill" in entry or "decode" in entry]
    assert timed[::2] == [entry.replace("B", "A") for entry in timed[1::2]]
    assert all(entry.startswith("A") for entry in timed[::2])
    assert all(entry.startswith("B") for entry in timed[1::2])
    assert log.count("A decode 4200") == 2 * speed.TURNS


def test_long_prompts_are_taken_once_and_everything_else_every_round() -> None:
    samples = measured(30000, 3, [])
    for name, slow in (("A", 1), ("B", 2)):
        assert samples[name].prefill == {n: [n * slow] * (1 if n > 512 else 3) for n in speed.PREFILL}
        want = {n: [pytest.approx((1 + n / 1000) * slow)] * 3 * speed.TURNS for n in speed.DECODE}
        assert samples[name].decode == want
        assert samples[name].first_token == [1.0] * 3
        assert samples[name].memory == {"peak_bytes": 30000}


@pytest.mark.parametrize("context", [16, 24, 130, 519, 520, 4096, 7000, 29007, 29008])
def test_points_beyond_the_context_are_left_out(context: int) -> None:
    log: list[str] = []
    samples = measured(context, 1, log)["A"]
    assert list(samples.prefill) == [n for n in speed.PREFILL if n <= context]
    assert list(samples.decode) == [n for n in speed.DECODE if n + speed.STEPS <= context]
    assert bool(samples.first_token) == (context >= speed.FIRST_TOKEN_PROMPT)
    assert samples.memory == {"peak_bytes": context}
    assert max(int(entry.split()[-1]) for entry in log if "prefill" in entry) == context


@pytest.mark.parametrize("when", ["prefill 128", "prefill 8", "decode 512", "reset"])
def test_a_peer_that_fails_says_why_and_the_others_go_on(when: str) -> None:
    log: list[str] = []
    samples = measured(1024, 2, log, B=when)
    assert samples["B"].failure == "it broke"
    assert samples["A"].failure is None
    assert len(samples["A"].prefill[512]) == 2
    after = log[log.index(f"B {when}") + 1 :]
    assert [entry for entry in after if entry.startswith("B")] == ["B close"]
    cost = TokenCost(read_hf_config(SHAPES["tiny-gemma-2"]), 1, 1)
    assert figures(samples["B"], cost, 1, 1) == {"not_measured": "it broke"}
    assert comparisons(samples["A"], {"B": samples["B"]})["decode"] == {16: None, 128: None, 512: None}


def test_nothing_is_left_running_when_bezel_fails() -> None:
    log: list[str] = []
    with pytest.raises(NotMeasured, match="it broke"):
        measured(1024, 1, log, A="decode 512")
    assert log[-2:] == ["A close", "B close"]


def test_a_comparison_is_the_median_of_ratios_with_the_faster_setting() -> None:
    ours = [1.0, 10.0, 1.0]  # the machine was slow in the second turn
    assert compare(ours, {"on": [3.0, 30.0, 3.0], "off": [2.0, 20.0, 2.5]}) == TimesAsFast("off", 2.0)
    assert compare(ours, {"on": [3.0, 30.0, 3.0], "off": []}) == TimesAsFast("on", 3.0)
    assert compare(ours, {"on": []}) is None
    assert compare([], {"on": [1.0]}) is None


def test_figures_are_medians_and_shares() -> None:
    config = read_hf_config(SHAPES["gemma-2-2b"])
    cost = TokenCost(config, weight_bytes=1000, matrix_weights=50)
    samples = Samples(prefill={128: [1.0, 2.0, 64.0]}, decode={8000: [0.25, 0.5, 9.0]}, first_token=[3, 1, 2])
    samples.about, samples.memory = {"kv": "f16"}, {"peak_bytes": 7}
    kv_bytes = 13 * (4096 + 8000) * 2 * 4 * 256 * 2  # layers of a kind, positions, K and V, heads, width, float16
    found = figures(samples, cost, bandwidth=2 * (1000 + kv_bytes), int8_peak=64 * 2 * 50 * 4)
    assert found["prefill_tokens_per_s"] == {128: 64}
    assert found["prefill_share_of_int8_peak"] == {128: 0.25}
    assert found["decode_tokens_per_s"] == {8000: 2}
    assert found["decode_share_of_bandwidth"] == {8000: 1}
    assert (found["first_token_s"], found["peak_bytes"]) == (2, 7)


def test_layers_may_differ() -> None:
    """Each layer's keys and values as it has them, in a window of its own."""
    config = read_hf_config(SHAPES["gemma-3-270m"])
    first, *rest = config.layers
    config = replace(config, layers=(replace(first, window=100, n_kv_heads=3, head_dim=8), *rest[:5]))
    cost = TokenCost(config, weight_bytes=1000, matrix_weights=50)
    # Float16 keys and values: the first layer, four local ones of 512 positions, and the global one.
    want = 1000 + 2 * 2 * (100 * 3 * 8 + 4 * 512 * 256 + 20000 * 256)
    assert cost.decode_bytes(20000, "f16") == want


def test_a_file_too_small_to_measure(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(bytes(100))
    with pytest.raises(InvalidRequest, match="100 bytes, expected at least 1048576"):
        Machine(tmp_path / "x.gguf", 1)


def test_what_a_token_costs(tmp_path: Path) -> None:
    with GGUFModel(write_gguf(tmp_path / "x.gguf", "tiny-gemma-2", "q8_0")) as file:
        cost = TokenCost.of(file)
        # Four layers: q 256 × 256, k and v 128 × 256 each, output as q, three of 512 × 256.
        assert cost.matrix_weights == 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
        norms = (4 * 4 + 1) * 256 * 4
        assert cost.weight_bytes == (cost.matrix_weights + 1024 * 256) // 32 * 34 + norms


@pytest.mark.parametrize(
    ("shape", "preset"), [*(("tiny-gemma-2", preset) for preset in PRESETS), ("tiny-gemma-3", "q4_0")]
)
def test_random_files_are_valid(shape: str, preset: str, tmp_path: Path) -> None:
    odd = SHAPES[shape] | {"vocab_size": 1001}  # the rows of the embedding do not end where tensors may begin
    model = load(write_gguf(tmp_path / "x.gguf", odd, preset))
    planned = {
        p.spec.gguf: p.format for p in plan_tensors(tensor_specs(model.config), find_recipe(preset, model.config))
    }
    assert {name: info.format for name, info in model.file.tensors.items()} == planned
    for name in ("blk.0.ffn_up.weight", "token_embd.weight"):
        weights = model.file.dequantize(name)
        rounded = math.hypot(1, planned[name].tolerance / 1.5)  # what rounding adds shows in 2 bits
        assert weights.std() == pytest.approx(0.02 * rounded, rel=0.05)
        assert len(np.unique(weights[:, :32], axis=0)) == len(weights)
    assert model.file.dequantize("output_norm.weight").mean() == pytest.approx(1, abs=0.02)
    logits = model.logits([2, 5, 400, 1000])
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    assert model.prompt_ids("hello")[0] == model.tokenizer.bos_id


def test_rows_of_pictures_are_left_out(tmp_path: Path) -> None:
    """As a converter leaves them out: of 4B's embedding only what the vocabulary has pieces for is written."""
    raw = SHAPES["tiny-gemma-3"] | {"vocab_size": 262208}
    with GGUFModel(write_gguf(tmp_path / "x.gguf", raw, "q4_0", "q4_0")) as file:
        assert file.tensors["token_embd.weight"].shape == (262144, 256)
        assert len(file.vocabulary().pieces) == file.config().vocab_size == 262144


def test_llama_cpp_computes_the_same_of_a_random_gemma_3(tmp_path: Path) -> None:
    """Within the window and past it, up to its float16 keys and int8 activations: 6e-5 nats at most.

    A window that is one off gives 4e-2, the local layers' RoPE base in the global one 2e-3.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    path = write_gguf(tmp_path / "x.gguf", "tiny-gemma-3", "q8_0")
    ids = [2, *range(100, 160)]
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=2)
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)], np.float32)
    ours = load(path, kv="f32", activations="f32").logits(ids)
    (records,) = compare_logits([ours, theirs], [(0, 1)], 0, np.array([*ids[1:], 0]))
    assert records["kld"].max() < 2e-4


def test_random_files_are_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="unknown preset"):
        write_gguf(tmp_path / "x.gguf", "tiny-gemma-2", "q3")
    with pytest.raises(InvalidRequest, match="expected one of gemma-2-2b"):
        write_gguf(tmp_path / "x.gguf", "gemma-5", "q4_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_probes(threads: int) -> None:
    pool = _native.ThreadPool(threads)
    data = np.ones((1 << 20) + 3, np.uint8)
    data.flags.writeable = False
    for value in (
        _native.read_bandwidth(pool, data),
        _native.int8_peak(pool, 0.001),
        _native.float_peak(pool, 0.001),
    ):
        assert 1e6 < value < 1e16


def test_probes_refuse_what_they_cannot_read() -> None:
    pool = _native.ThreadPool(1)
    with pytest.raises(ValueError, match="found 7 bytes, expected at least 1048576"):
        _native.read_bandwidth(pool, np.zeros(7, np.uint8))
    for wrong in (np.zeros(1 << 20, np.float32), np.zeros((2, 1 << 20), np.uint8), np.zeros(1 << 21, np.uint8)[::2]):
        with pytest.raises(TypeError):
            _native.read_bandwidth(pool, wrong)


def test_timed_counts_the_calls_from_outside() -> None:
    class Ops:
        length = 3

        def outer(self, x: int) -> int:
            return self.inner(x) + 1

        def inner(self, x: int) -> int:
            return 2 * x

    totals: dict[str, list[float]] = {}
    timed = Timed(Ops(), "ops.", totals)
    assert [timed.outer(1), timed.outer(2), timed.length] == [3, 5, 3]
    assert {op: calls for op, (calls, _) in totals.items()} == {"ops.outer": 2}
    assert totals["ops.outer"][1] > 0


def test_profile_adds_up(model_of: Callable[..., Model]) -> None:
    tables = profile(model_of("demo", "q8_0", engine="native"), held=70, steps=3)
    for rows in tables.values():
        *parts, total = rows
        assert total.op == "total"
        assert sum(row.seconds for row in parts) == pytest.approx(total.seconds)
        assert sum(row.share for row in parts) == pytest.approx(1)
        calls = {row.op: row.calls for row in rows}
        # q, k and v in one call, and the output; the head. The feed-forward's are inside its own.
        assert calls["linear"] == 4 * 2 + 1
        assert calls["cache.attend"] == calls["cache.write"] == 4
        assert all(row.seconds > 0 for row in rows)


def test_the_profile_of_a_picture(shapes_of: Callable[..., Path]) -> None:
    with load(shapes_of("q8_0"), context=256) as model:
        assert model.eye is not None
        ops = model.eye.tower.ops
        rows = profile(model, held=70, steps=1)["picture"]
        assert model.eye.tower.ops is ops
    calls = {row.op: row.calls for row in rows}
    # A layer's q, k and v in one call, its output and its feed-forward's two; patches and the projection.
    assert calls["linear"] == 4 * 4 + 2
    assert calls["attend_all"] == 4
    assert calls["layer_norm"] == 4 * 2 + 1
    assert rows[-1].seconds == pytest.approx(sum(row.seconds for row in rows[:-1]))


def test_a_race_from_a_picture(shapes_of: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp.mtmd_cpp")
    found = CliRunner().invoke(race, [str(shapes_of("q8_0")), "--rounds", "1", "--threads", "1"])
    assert found.exit_code == 0, found.output
    positions = re.findall(r"(bezel|llama.cpp): \S+ s for (\d+) positions", found.output)
    assert len(positions) == 2
    # The same prompt, but for line breaks before the picture that llama.cpp reads apart.
    assert abs(int(positions[0][1]) - int(positions[1][1])) <= 1
    assert re.search(r"1 threads: bezel is \S+ times as fast", found.output)
    assert re.search(r"products: .* of the int8 peak\n.*attention: .* of the float peak", found.output)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_process_memory_is_what_the_kernel_counts() -> None:
    gc.collect()  # what an earlier test left is not to go meanwhile
    before = process_memory()
    block = np.ones(64 << 20, np.uint8)
    grown = process_memory()
    assert before["private_bytes"] is not None
    assert grown["private_bytes"] is not None
    assert grown["private_bytes"] - before["private_bytes"] == pytest.approx(block.nbytes, rel=0.1)
    assert grown["peak_bytes"] is not None
    assert grown["peak_bytes"] >= grown["private_bytes"]


@pytest.fixture
def worker(gguf_of: Callable[..., Path]) -> Iterator[Worker]:
    with Worker(
        "bezel", model=str(gguf_of("demo", "q8_0")), context=300, threads=1, engine="reference", kv="int8"
    ) as worker:
        yield worker


def test_a_worker_measures_and_reports(worker: Worker) -> None:
    assert worker.prefill(200) > 0
    assert worker.decode(8) > 0
    kv_bytes = worker.memory()["kv_bytes"]
    assert kv_bytes
    assert worker.prefill(100) > 0  # decoding was rewound, so the context of 300 holds it
    with pytest.raises(NotMeasured, match="context of 300"):
        worker.prefill(1)
    worker.reset()
    assert worker.prefill(300) > 0
    assert worker.about()["kv"] == "int8"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_a_worker_that_crashes_is_an_error(worker: Worker) -> None:
    worker.prefill(10)
    worker._process.send_signal(signal.SIGSEGV)
    with pytest.raises(NotMeasured, match="SIGSEGV"):
        worker.prefill(10)


def test_a_missing_peer_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    for module in ("llama_cpp", "onnxruntime_genai"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('libgomp is gone')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        peers = {
            "llama-cpp-python": Worker("llama.cpp", model="x", context=16, threads=1, flash_attention=True),
            "onnxruntime-genai": Worker("onnxruntime-genai", model="x", context=16, threads=1),
        }
    for name, peer in peers.items():
        with peer, pytest.raises(NotMeasured, match=rf"{name} is not installed \(libgomp is gone\)"):
            peer.prefill(1)
    ours = Worker("bezel", model="nothing.gguf", context=16, threads=1, engine="reference", kv="f16")
    with ours, pytest.raises(NotMeasured, match=r"nothing.gguf: invalid model file: there is no such file"):
        ours.prefill(1)


def test_onnxruntime_genai_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    with (
        Worker("onnxruntime-genai", model=str(tmp_path), context=16, threads=1) as peer,
        pytest.raises(NotMeasured, match="not a folder that onnxruntime-genai's builder made"),
    ):
        peer.prefill(1)


def run(*args: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*BEZEL, "bench", *map(str, args)], capture_output=True, text=True, encoding="utf-8", cwd=cwd, timeout=300
    )
    assert (done.returncode == 0) == ok, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_command(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    done = run(gguf_of("demo", "q8_0"), "--context", 300, "--repeats", 1, "--kv", "int8", cwd=tmp_path)
    table = done.stdout.splitlines()
    (kept,) = (tmp_path / "bench" / "results").iterdir()
    result = json.loads(kept.read_text(encoding="utf-8"))

    ours = result["runs"]["bezel"]
    assert list(ours["prefill_tokens_per_s"]) == ["128"]
    assert list(ours["decode_tokens_per_s"]) == ["16", "128"]
    speeds = [*ours["prefill_tokens_per_s"].values(), *ours["decode_tokens_per_s"].values()]
    amounts = [ours[key] for key in ("first_token_s", "peak_bytes", "kv_bytes")]
    assert all(value > 0 for value in [*speeds, *amounts, *result["peaks"].values()])
    shares = [*ours["prefill_share_of_int8_peak"].values(), *ours["decode_share_of_bandwidth"].values()]
    assert all(0 < share < 1.5 for share in shares)
    assert (result["context"], result["kv"], result["machine"]["isa"]) == (300, "int8", _native.isa())
    text = "\n".join(table)
    for n in ("128", "16"):
        speeds_of = ours["prefill_tokens_per_s"] if n == "128" else ours["decode_tokens_per_s"]
        assert f"{n:>22}{speeds_of[n]:10,.1f}" in text
    assert "memory after 300 tokens" in text


@pytest.mark.parametrize("shape", ["tiny-gemma-2", "tiny-gemma-3"])
def test_the_command_with_random_weights_and_a_peer(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    args = ("--shape", shape, "--quant", "q8_0", "--context", 140, "--repeats", 1, "--threads", 1, "--json")
    args += ("--vs", "llama.cpp", "--save", tmp_path / "kept")
    if find_spec("llama_cpp") is None:
        assert "--vs llama.cpp: it is not installed: pip install" in run(*args, cwd=tmp_path, ok=False).stderr
        return
    result = json.loads(run(*args, cwd=tmp_path).stdout)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    (file,) = tmp_path.rglob(f"random-{shape}-q8_0.gguf")
    assert result["model"]["file"] == str(file)
    peers = [run for name, run in result["runs"].items() if name.startswith("llama.cpp, flash attention")]
    assert len(peers) == 2
    for peer in peers:
        assert "llama-cpp-python is not installed" in peer.get("not_measured", "") or peer["decode_tokens_per_s"]["16"]
    if all("not_measured" not in peer for peer in peers):
        assert result["compared"]["prefill"]["128"]["times_as_fast"] > 0
        assert result["compared"]["first_token"]["setting"] in result["runs"]


def test_the_profile(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    args = (gguf_of("demo", "q8_0"), "--profile", "--context", 100)
    rows = json.loads(run(*args, "--json", cwd=tmp_path).stdout)["profile"]["decode"]
    assert [row["op"] for row in rows][-2:] == ["Python and the rest", "total"]
    assert "cache.attend" in run(*args, cwd=tmp_path).stdout


def test_errors_name_what_is_wrong(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    demo = gguf_of("demo", "q8_0")
    for args, message in (
        ((), "MODEL or --shape"),
        ((demo, "--shape", "gemma-2-2b"), "MODEL or --shape"),
        ((demo, "--context", 4096), "--context: found 4096, expected up to 2048"),
        (("nothing.gguf",), "nothing.gguf"),
        ((demo, "--vs", "nobody"), "nobody"),
        ((demo, "--vs", "onnxruntime-genai"), "needs --peer-model"),
        ((demo, "--peer-model", demo), "goes with --vs"),
        ((demo, "--engine", "ort"), "expected native or reference"),
    ):
        assert message in run(*args, cwd=tmp_path, ok=False).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a program is being measured")
def test_ctrl_c_leaves_nothing_behind(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    bench = subprocess.Popen(
        [*BEZEL, "bench", str(gguf_of("demo", "q8_0")), "--repeats", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    while bench.poll() is None and not children.read_text():
        time.sleep(0.05)
    os.killpg(bench.pid, signal.SIGINT)  # as a terminal does
    out, err = bench.communicate(timeout=60)
    assert (bench.returncode, out, err) == (130, "", "cancelled\n")

    def alive() -> bool:
        try:
            os.killpg(bench.pid, 0)
        except ProcessLookupError:
            return False
        return True

    deadline = time.monotonic() + 20  # for the system to bury them
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()
