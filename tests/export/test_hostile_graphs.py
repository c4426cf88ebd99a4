"""Exports whose parts were swapped or damaged by somebody who then wrote the manifest anew: refused, in words."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bezel.runtime import load
from bezel.runtime.errors import BezelError
from bezel.runtime.files.onnx_folder import OnnxFolder
from onnx_files import relist

OnnxOf = Callable[..., Path]
KINDS = (
    *(("demo", quant, target) for quant in ("int8", "int4") for target in ("onnxruntime", "portable", "transformers")),
    ("gemma3-gqa", "int4", "portable"),
)
# Each with the next, which differs in one thing or in more, and with what has other weights for the same target.
PAIRS = [(one, KINDS[(i + step) % len(KINDS)]) for i, one in enumerate(KINDS) for step in (1, 3)]
IDS = [2, 5, 7, 11]

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy on numbers that are none


def graph_in(folder: Path) -> str:
    graph: str = json.loads((folder / "bezel.json").read_text())["graph"]
    return graph


def attempt(folder: Path) -> str:
    """What is said of it, by whichever engine would run it; or that it computes numbers."""
    with OnnxFolder(folder) as opened:
        engines = opened.engines
    for engine in engines:
        kv = "f32" if engine == "reference" else None
        assert load(folder, engine=engine, kv=kv, threads=1).logits(IDS).shape[0] == len(IDS)
    return "runs"


@pytest.mark.parametrize("part", ["graph", "weights", "config.json", "all but the manifest"])
def test_swapped_parts(part: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    said = []
    for i, (one, other) in enumerate(PAIRS):
        folder = Path(shutil.copytree(onnx_of(*one), tmp_path / str(i)))
        mine, theirs = graph_in(folder), graph_in(onnx_of(*other))
        names = {"graph": [""], "weights": [".data"], "config.json": [], "all but the manifest": ["", ".data"]}[part]
        for end in names:
            end_of = {name: end if "/" not in name else end.replace(".", "_") for name in (mine, theirs)}
            shutil.copy(onnx_of(*other) / f"{theirs}{end_of[theirs]}", folder / f"{mine}{end_of[mine]}")
        if not names or len(names) == 2:
            shutil.copy(onnx_of(*other) / "config.json", folder)
        relist(folder)
        try:
            said.append(attempt(folder))
        except BezelError as error:
            said.append(str(error))
            assert str(folder) in said[-1] or "finite" in said[-1]
    assert len(said) > said.count("runs")


@pytest.mark.parametrize("target", ["portable", "transformers"])
def test_weights_of_any_bits(target: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    """Scales that are no numbers are numbers that are not finite: no crash, and no endless text."""
    folder = Path(shutil.copytree(onnx_of("demo", "int4", target), tmp_path / "out"))
    (data,) = folder.rglob("model*data")
    data.write_bytes(np.full(data.stat().st_size, 255, np.uint8).tobytes())
    relist(folder)
    with pytest.raises(BezelError, match="finite"):
        attempt(folder)


@pytest.mark.parametrize("target", ["onnxruntime", "portable", "transformers"])
def test_damaged_graphs(target: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    """A few bytes at a time, through to the runtime where bezel's own reader sees nothing wrong."""
    folder = Path(shutil.copytree(onnx_of("demo", "int4", target), tmp_path / "out"))
    graph, rng = folder / graph_in(folder), random.Random(target)
    sound, refused = graph.read_bytes(), 0
    for _ in range(40):
        damaged = bytearray(sound)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        graph.write_bytes(damaged)
        relist(folder)
        try:
            attempt(folder)
        except BezelError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_names_that_are_no_text(target: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    """A dimension's, which bezel does not look into, and onnxruntime hands on as it is."""
    folder = Path(shutil.copytree(onnx_of("demo", "int4", target), tmp_path / "out"))
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"slots.global", b"slots.globa\xec"))
    relist(folder)
    with pytest.raises(BezelError, match="names that are no text"):
        attempt(folder)
