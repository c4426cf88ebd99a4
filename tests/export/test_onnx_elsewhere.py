"""The targets "portable" and "transformers" where others run them: logits of transformers, and text to the letter.

Each runtime is asked past several windows. What is not installed is skipped; CI has all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bezel.export.onnx import writer as onnx_writer
from bezel.export.onnx.graph import build_model
from bezel.runtime import load
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.model.config import LayerConfig, ModelConfig
from test_onnx_export import FAMILIES, in_layers, write
from tiny import COLUMNS, GOLDEN, TOLERANCE, checkpoint_folder, token_ids

OnnxOf = Callable[..., Path]
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
QUANTS = ("f32", "int8", "int4")
PROGRAMS = Path(__file__).parents[2] / "docs" / "onnx"
NODE = Path(__file__).parents[1] / "node"
PROMPT = "Once upon a time there was a king who had"
CHUNK = 7


def in_openvino(graph: Path) -> Run:
    openvino = pytest.importorskip("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", exact)
    outputs = {name: value for value in compiled.outputs for name in value.get_names()}  # it may have several

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(inputs)
        return {name: found[value].copy() for name, value in outputs.items()}

    return run


def in_onnxruntime(graph: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # then activations stay float32
    session = onnxruntime.InferenceSession(graph, options)
    names = [value.name for value in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


RUNTIMES = {"openvino": in_openvino, "onnxruntime": in_onnxruntime}


def chunks(ids: list[int]) -> Iterator[tuple[int, int]]:
    """Long ones first, then the last three alone."""
    n = len(ids)
    return pairwise([*range(0, n - 3, CHUNK), n - 3, n - 2, n - 1, n])


def in_rings(run: Run, layers: tuple[LayerConfig, ...], ids: list[int]) -> np.ndarray:
    """Logits of all ids, from caches with no slot to spare."""
    past = {}
    for i, layer in enumerate(layers):
        slots = len(ids) if layer.window is None else layer.window + CHUNK - 1
        for name in ("key", "value"):
            past[f"past.{i}.{name}"] = np.zeros((1, layer.n_kv_heads, slots, layer.head_dim), np.float32)
    logits = []
    for start, end in chunks(ids):
        rows = {"input_ids": np.array(ids[start:end]), "positions": np.arange(start, end)}
        found = run({**rows, "wanted": np.arange(end - start), **past})
        past = {name: found[name.replace("past", "present")] for name in past}
        logits.append(found["logits"])
    return np.concatenate(logits)


def grown(run: Run, layers: tuple[LayerConfig, ...], sequences: list[list[int]]) -> np.ndarray:
    """Logits (sequences, n, vocab) as Hugging Face's libraries feed sequences that 0 pads on the left."""
    ids = np.array(sequences)
    mask = (ids > 0).astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    past = {
        f"past_key_values.{i}.{name}": np.zeros((len(ids), layer.n_kv_heads, 0, layer.head_dim), np.float32)
        for i, layer in enumerate(layers)
        for name in ("key", "value")
    }
    logits = []
    for start, end in chunks(sequences[0]):
        rows = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
        found = run({**rows, "attention_mask": mask[:, :end], **past})
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        logits.append(found["logits"])
    return np.concatenate(logits, axis=1)


def graph_of(folder: Path) -> tuple[Path, tuple[LayerConfig, ...]]:
    with OnnxFolder(folder) as opened:
        return opened.model_path, opened.config().layers


def expected(name: str, quant: str, folder: Path, ids: list[int]) -> np.ndarray:
    if quant == "f32":
        golden: np.ndarray = np.load(GOLDEN / f"{name}.npy")
        return golden
    return load(folder, engine="reference", kv="f32").logits(ids)[:, ::COLUMNS]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rings(name: str, quant: str, runtime: str, onnx_of: OnnxOf) -> None:
    folder, ids = onnx_of(name, quant, "portable"), token_ids(name)
    graph, layers = graph_of(folder)
    logits = in_rings(RUNTIMES[runtime](graph), layers, ids)[:, ::COLUMNS]
    assert np.abs(logits - expected(name, quant, folder, ids)).max() < TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_grown_caches(name: str, quant: str, runtime: str, onnx_of: OnnxOf) -> None:
    """Alone, and beside a sequence that padding makes as long."""
    folder, ids = onnx_of(name, quant, "transformers"), token_ids(name)
    graph, layers = graph_of(folder)
    run, pad = RUNTIMES[runtime](graph), 9
    want = expected(name, quant, folder, ids)
    assert np.abs(grown(run, layers, [ids])[0, :, ::COLUMNS] - want).max() < TOLERANCE
    both = grown(run, layers, [[0] * pad + ids[:-pad], ids])[..., ::COLUMNS]
    assert np.abs(both[0, pad:] - want[:-pad]).max() < TOLERANCE
    assert np.abs(both[1] - want).max() < TOLERANCE


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("target", ["portable", "transformers"])
def test_a_window_off_by_one_is_seen(
    target: str, runtime: str, by: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(config: ModelConfig, *rest: Any) -> Any:
        change = in_layers(lambda layer: replace(layer, window=layer.window and layer.window + by))
        return build_model(change(config), *rest)

    monkeypatch.setattr(onnx_writer, "build_model", off)
    name = "gemma2-gqa"
    folder, ids = write(checkpoint_folder(name, tmp_path), tmp_path / "out", "f32", target=target), token_ids(name)
    graph, layers = graph_of(folder)
    run = RUNTIMES[runtime](graph)
    found = in_rings(run, layers, ids) if target == "portable" else grown(run, layers, [ids])[0]
    difference = np.abs(found[:, ::COLUMNS] - np.load(GOLDEN / f"{name}.npy")).max(axis=1)
    assert difference[:7].max() < TOLERANCE
    assert difference[8:].min() > 50 * TOLERANCE


def greedy(folder: Path, count: int) -> list[int]:
    """By bezel's reference engine, up to an end."""
    model = load(folder, engine="reference", kv="f32")
    session, ids = model.session(), [2, *model.tokenizer.encode(PROMPT)]
    logits = session.prefill(ids)
    while count and ids[-1] != 1:
        ids.append(int(logits.argmax()))
        logits, count = session.step(ids[-1]), count - 1
    return ids


def output(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs_node() -> None:
    if not (NODE / "node_modules").exists() or not shutil.which("node"):
        pytest.skip("npm ci --ignore-scripts --prefix tests/node")


def test_the_program_in_python(onnx_of: OnnxOf) -> None:
    folder = onnx_of("demo", "f32", "portable")
    ids, text = output(sys.executable, PROGRAMS / "generate.py", folder, PROMPT, "200").splitlines()[:2]
    assert json.loads(ids) == greedy(folder, 200)
    assert text.startswith(PROMPT)


# How the program's session is made with activations as float32, which onnxruntime-web has anyway.
CREATE = "create(`${folder}/model.onnx`)"
EXACT = {
    "onnxruntime-node": 'create(`${folder}/model.onnx`, {extra: {session: {disable_prepacking: "1"}}})',
    "onnxruntime-web": "create(readFileSync(`${folder}/model.onnx`), "
    '{externalData: [{path: "model.onnx.data", data: readFileSync(`${folder}/model.onnx.data`)}]})',
}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("package", EXACT)
def test_the_program_in_javascript(package: str, quant: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    needs_node()
    folder = onnx_of("demo", quant, "portable")
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    program, text = tmp_path / "generate.mjs", (PROGRAMS / "generate.mjs").read_text(encoding="utf-8")
    assert text.count(CREATE) == 1
    program.write_text(text.replace(CREATE, EXACT[package]).replace('"onnxruntime-node"', f'"{package}"'))
    ids, text = output("node", program, folder, PROMPT, "200").splitlines()[-2:]
    assert json.loads(ids) == greedy(folder, 200)
    assert text.startswith(PROMPT)


def test_the_program_in_cpp(onnx_of: OnnxOf, tmp_path: Path) -> None:
    """Without headers of onnxruntime in any package, on OpenVINO, whose wheel has its own."""
    root = Path(pytest.importorskip("openvino").__file__).parent
    compiler, library = shutil.which("c++"), next((root / "libs").glob("libopenvino.so*"), None)
    if compiler is None or library is None:
        pytest.skip("needs a C++ compiler and OpenVINO's library")
    folder, program = onnx_of("demo", "f32", "portable"), tmp_path / "generate"
    linked = [f"-L{library.parent}", f"-l:{library.name}", f"-Wl,-rpath,{library.parent}"]
    output(compiler, "-std=c++17", PROGRAMS / "generate.cpp", f"-I{root / 'include'}", *linked, "-o", program)
    want = greedy(folder, 200)
    prompt = want[: len(want) - 200] if len(want) > 200 else want[:1]
    found = output(program, folder, "64", "lglg", "200", *map(str, prompt))
    assert list(map(int, found.split())) == want


@pytest.mark.parametrize("quant", QUANTS)
def test_optimum(quant: str, onnx_of: OnnxOf) -> None:
    """In its own environment, because it wants an older transformers; with activations as float32."""
    python = os.environ.get("BEZEL_OPTIMUM_PYTHON")
    if not python:
        pytest.skip("BEZEL_OPTIMUM_PYTHON: the Python of an environment with optimum[onnxruntime]")
    folder = onnx_of("demo", quant, "transformers")
    script = """
import json, sys
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
options = SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], session_options=options)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
print(json.dumps(model.generate(**inputs, do_sample=False, max_new_tokens=200)[0].tolist()))
"""
    found = json.loads(output(python, "-c", script, folder, PROMPT).splitlines()[-1])
    want = greedy(folder, 200)
    assert found == want[: len(found)]
    assert len(found) > 100


@pytest.mark.parametrize("quant", QUANTS)
def test_transformers_js(quant: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    needs_node()
    folder = onnx_of("demo", quant, "transformers")
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    program = shutil.copy(NODE / "transformers.mjs", tmp_path)
    found = json.loads(output("node", program, folder, PROMPT, "200").splitlines()[-1])
    want = greedy(folder, 200)
    assert found == want[: len(found)]
    assert len(found) > 100
