"""Exported models timed in the runtimes of others: each is fed right, and they take turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bezel
import numpy as np
import pytest
from bezel.bench.speed import elsewhere as script
from bezel.bench.speed.elsewhere import HELD, PROMPTS, STEPS, elsewhere, measure
from bezel.bench.speed.graphs import CHUNK
from bezel.bench.speed.runner import NotMeasured
from bezel.runtime import load
from click.testing import CliRunner
from tiny import TOLERANCE

OnnxOf = Callable[..., Path]
IDS = [2 + 31 * i % 4000 for i in range(2 * CHUNK + 40)]  # past four of the demo's windows
NODE = Path(__file__).parents[1] / "node"

# Feeds ids in every way that a runner has, and writes the logits behind the last.
FEED = """
import json, sys
import numpy as np
from bezel.bench.speed.graphs import GRAPH_RUNNERS
runtime, folder, ids, out = sys.argv[1:]
ids = json.loads(ids)
if runtime == "openvino":  # which computes in bfloat16 where the processor has it
    import openvino
    compiled, exact = openvino.Core.compile_model, {"INFERENCE_PRECISION_HINT": "f32"}
    openvino.Core.compile_model = lambda core, graph, device, config: compiled(core, graph, device, config | exact)
runner = GRAPH_RUNNERS[runtime](folder, len(ids), 1)
runner.prefill(ids[:50])
runner.reset()
runner.prefill(ids[:-6])
for token in (5, 6, 7):
    runner.step(token)
runner.rewind(3)
for token in ids[-6:-3]:
    runner.step(token)
runner.prefill(ids[-3:])
np.save(out, runner.logits)
"""


@pytest.fixture
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other environments find bezel, and nothing else of this one."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "bezel").symlink_to(Path(bezel.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "alone"))


def optimum_python() -> str:
    python = os.environ.get("BEZEL_OPTIMUM_PYTHON")
    if not python:
        pytest.skip("BEZEL_OPTIMUM_PYTHON: the Python of an environment with optimum[onnxruntime]")
    return python


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("runtime", "target"), [("onnxruntime", "portable"), ("openvino", "portable"), ("optimum", "transformers")]
)
def test_each_is_fed_right(runtime: str, target: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    python = optimum_python() if runtime == "optimum" else sys.executable
    if runtime != "optimum":
        pytest.importorskip(runtime)
    folder, out = onnx_of("demo", "f32", target), tmp_path / "logits.npy"
    subprocess.run([python, "-c", FEED, runtime, folder, json.dumps(IDS), out], check=True)
    expected = load(folder, engine="reference", kv="f32").logits(IDS)[-1]
    # Rounding makes 1e-5, a ring with a slot too few 2e-4: only the first row of a chunk misses a position then.
    assert np.abs(np.load(out) - expected).max() < TOLERANCE / 4


class Fake:
    """A program whose prompts take a second a token, and whose steps take `slow` seconds."""

    def __init__(self, name: str, slow: float, log: list[str], fails: bool = False) -> None:
        self.name, self.slow, self.log, self.fails, self.held = name, slow, log, fails, 0

    def __enter__(self) -> Fake:
        self.log.append(f"{self.name} opened")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self.name} closed")

    def open(self) -> float:
        return 5.0

    def prefill(self, n: int) -> float:
        if self.fails:
            raise NotMeasured("it broke")
        self.held += n
        return float(n)

    def decode(self, n: int) -> float:
        assert self.held in HELD
        return n * self.slow

    def reset(self) -> None:
        self.held = 0

    def about(self) -> dict[str, Any]:
        return {"version": "1", "kv": "f32"}

    def memory(self) -> dict[str, int | None]:
        return {"peak_bytes": 3_000_000}


def test_they_take_turns_and_are_never_there_together() -> None:
    log: list[str] = []
    slowness = iter([1, 4, 2])
    starts: dict[str, Any] = {
        "A": lambda: Fake("A", next(slowness), log),
        "B": lambda: Fake("B", 1, log, fails=True),
        "C": lambda: Fake("C", 1, log),
    }
    runs = measure(starts, 3, log.append)
    assert [entry for entry in log if "opened" in entry or "closed" in entry] == [
        f"{name} {what}" for name in "ABCACAC" for what in ("opened", "closed")
    ]
    assert log[0] == "round 1 of 3: A"
    assert runs["B"] == {"not_measured": "it broke"}
    assert [found["decode_16_ms"] for found in runs["A"].pop("each_round")] == [1000.0, 4000.0, 2000.0]
    assert runs["A"] == {
        "version": "1",
        "kv": "f32",
        "load_s": 6.0,
        "peak_mb": 3.0,
        **{f"prefill_{n}_tokens_per_s": 1.0 for n in PROMPTS},
        **{f"decode_{n}_ms": 2000.0 for n in HELD},
    }


def test_the_command(onnx_of: OnnxOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = onnx_of("demo", "int4", "portable")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.onnx").write_bytes(b"no graph")
    runtimes = ["bezel", "onnxruntime"]
    if (NODE / "node_modules").exists() and shutil.which("node"):
        runtimes.append("onnxruntime-node")
    models = [f"{runtime}={folder}" for runtime in runtimes]
    monkeypatch.setattr(script, "_CONTEXT", max(HELD) + STEPS)
    arguments = [*models, f"onnxruntime={broken}", "--threads", "1", "--rounds", "1", "--node", str(NODE)]
    done = CliRunner().invoke(elsewhere, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert list(found["runs"]) == [*models, f"onnxruntime={broken}"]
    assert "model.onnx" in found["runs"].pop(f"onnxruntime={broken}")["not_measured"]
    for run in found["runs"].values():
        assert min(value for value in run.values() if isinstance(value, float)) > 0
        assert sum(key.endswith("of_bandwidth") for key in run) == len(HELD)
    shown = CliRunner().invoke(elsewhere, arguments, catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in shown[-len(models) - 1 :]] == [*models, f"onnxruntime={broken}"]


@pytest.mark.parametrize(
    ("argument", "message"), [("tensorflow=x", "with one of bezel, onnxruntime"), ("bezel=nowhere", "there is nothing")]
)
def test_what_is_not_there(argument: str, message: str) -> None:
    done = CliRunner().invoke(elsewhere, [argument])
    assert done.exit_code == 2
    assert message in done.output
