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
from functools import cache, partial
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
PROMPT, COUNT = "Once upon a time there was a king who had", "130"
WINDOW = 64  # of the demo
CHUNK = 7


@cache
def openvino_core() -> Any:
    """One for all tests: where the processor has AMX, each brings a stack for signals, and puts back what it found.

    That may be another's, which is gone by then: the next signal would end the tests.
    """
    return pytest.importorskip("openvino").Core()


def in_openvino(graph: Path) -> Run:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    core = openvino_core()
    compiled = core.compile_model(core.read_model(graph), "CPU", exact)
    outputs = {name: value for value in compiled.outputs for name in value.get_names()}  # it may have several

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(inputs)
        return {name: found[value].copy() for name, value in outputs.items()}

    return run


def in_onnxruntime(graph: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
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


def with_windows_off(by: int, name: str, target: str, scratch: Path) -> Path:
    """An export whose windows are `by` wider than its config says."""

    def off(config: ModelConfig, *rest: Any) -> Any:
        change = in_layers(lambda layer: replace(layer, window=layer.window and layer.window + by))
        return build_model(change(config), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_writer, "build_model", off)
        return write(checkpoint_folder(name, scratch), scratch / ("wide" if by > 0 else "narrow"), "f32", target=target)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("target", ["portable", "transformers"])
def test_a_window_off_by_one_is_seen(target: str, runtime: str, by: int, tmp_path: Path) -> None:
    name = "gemma2-gqa"
    folder, ids = with_windows_off(by, name, target, tmp_path), token_ids(name)
    graph, layers = graph_of(folder)
    run = RUNTIMES[runtime](graph)
    found = in_rings(run, layers, ids) if target == "portable" else grown(run, layers, [ids])[0]
    difference = np.abs(found[:, ::COLUMNS] - np.load(GOLDEN / f"{name}.npy")).max(axis=1)
    assert difference[:7].max() < TOLERANCE
    assert difference[8:].min() > 50 * TOLERANCE


# --- programs that write greedy text, as ids with the prompt's


def output(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_python(folder: Path, _: Path) -> list[int]:
    return ids_in(output(sys.executable, PROGRAMS / "generate.py", folder, PROMPT, COUNT))


def ids_in(printed: str) -> list[int]:
    """The program prints the ids, and then the text."""
    ids, text = printed.splitlines()[-2:]
    assert text.startswith(PROMPT)
    found: list[int] = json.loads(ids)
    return found


def with_node(scratch: Path) -> Path:
    if not (NODE / "node_modules").exists() or not shutil.which("node"):
        pytest.skip("npm ci --ignore-scripts --prefix tests/node")
    (scratch / "node_modules").symlink_to(NODE / "node_modules")
    return scratch


# How the program's session is made with activations as float32 and with one thread, since threads that wait for work
# spin: onnxruntime-web has both anyway.
CREATE = "create(`${folder}/model.onnx`)"
EXACT = {
    "onnxruntime-node": "create(`${folder}/model.onnx`, "
    '{intraOpNumThreads: 1, extra: {session: {disable_prepacking: "1"}}})',
    "onnxruntime-web": "create(readFileSync(`${folder}/model.onnx`), "
    '{externalData: [{path: "model.onnx.data", data: readFileSync(`${folder}/model.onnx.data`)}]})',
}


def by_javascript(package: str, folder: Path, scratch: Path) -> list[int]:
    program, text = with_node(scratch) / "generate.mjs", (PROGRAMS / "generate.mjs").read_text(encoding="utf-8")
    assert text.count(CREATE) == 1
    program.write_text(text.replace(CREATE, EXACT[package]).replace('"onnxruntime-node"', f'"{package}"'))
    return ids_in(output("node", program, folder, PROMPT, COUNT))


def by_cpp(folder: Path, scratch: Path) -> list[int]:
    """No package has onnxruntime's headers; OpenVINO's wheel has its own."""
    root = Path(pytest.importorskip("openvino").__file__).parent
    compiler, library = shutil.which("c++"), next((root / "libs").glob("libopenvino.so*"), None)
    if compiler is None or library is None:
        pytest.skip("needs a C++ compiler and OpenVINO's library")
    program = scratch / "generate"
    linked = [f"-L{library.parent}", f"-l:{library.name}", f"-Wl,-rpath,{library.parent}"]
    output(compiler, "-std=c++17", PROGRAMS / "generate.cpp", f"-I{root / 'include'}", *linked, "-o", program)
    tokenizer = load(folder, engine="reference", kv="f32").tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    return list(map(int, output(program, folder, "64", "lglg", "1", COUNT, *map(str, prompt)).split()))


OPTIMUM = """
import json, sys
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
options = SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.disable_prepacking", "1")
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], session_options=options)
inputs = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt")
print(json.dumps(model.generate(**inputs, do_sample=False, max_new_tokens=int(sys.argv[3]))[0].tolist()))
"""


def by_optimum(folder: Path, _: Path) -> list[int]:
    """In its own environment, because it wants an older transformers."""
    python = os.environ.get("BEZEL_OPTIMUM_PYTHON")
    if not python:
        pytest.skip("BEZEL_OPTIMUM_PYTHON: the Python of an environment with optimum[onnxruntime]")
    found: list[int] = json.loads(output(python, "-c", OPTIMUM, folder, PROMPT, COUNT).splitlines()[-1])
    return found


def by_transformers_js(folder: Path, scratch: Path) -> list[int]:
    program = shutil.copy(NODE / "transformers.mjs", with_node(scratch))
    found: list[int] = json.loads(output("node", program, folder, PROMPT, COUNT).splitlines()[-1])
    return found


# The target that each runs, and the kinds of weights for which its activations are float32.
WRITERS: dict[str, tuple[str, tuple[str, ...], Callable[[Path, Path], list[int]]]] = {
    "onnxruntime": ("portable", ("f32",), by_python),
    "onnxruntime-node": ("portable", QUANTS, partial(by_javascript, "onnxruntime-node")),
    "onnxruntime-web": ("portable", QUANTS, partial(by_javascript, "onnxruntime-web")),
    "openvino-cpp": ("portable", ("f32",), by_cpp),
    "optimum": ("transformers", QUANTS, by_optimum),
    "transformers.js": ("transformers", QUANTS, by_transformers_js),
}


@cache
def greedy(folder: Path) -> list[int]:
    """By bezel's reference engine, up to an end."""
    model = load(folder, engine="reference", kv="f32")
    session, ids = model.session(), [model.tokenizer.bos_id, *model.tokenizer.encode(PROMPT)]
    logits = session.prefill(ids)
    for _ in range(int(COUNT)):
        ids.append(int(logits.argmax()))
        if ids[-1] == model.tokenizer.eos_id:
            break
        logits = session.step(ids[-1])
    return ids


@pytest.mark.parametrize(("runtime", "quant"), [(name, q) for name, (_, quants, _) in WRITERS.items() for q in quants])
def test_greedy_text(runtime: str, quant: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    target, _, write_text = WRITERS[runtime]
    found, want = write_text(onnx_of("demo", quant, target), tmp_path), greedy(onnx_of("demo", quant, "portable"))
    assert found == want[: len(found)]
    assert len(found) > 2 * WINDOW


@pytest.mark.parametrize("runtime", WRITERS)
def test_a_window_off_by_one_changes_the_text(runtime: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    target, _, write_text = WRITERS[runtime]
    folder, want = with_windows_off(-1, "demo", target, tmp_path), greedy(onnx_of("demo", "f32", "portable"))
    found = write_text(folder, tmp_path)
    assert found[:WINDOW] == want[:WINDOW]
    assert found != want[: len(found)]
