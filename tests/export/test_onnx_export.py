"""ONNX folders: what the graph computes, by onnx's own tools, and that weights keep their bits on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bezel.export.onnx import external_data
from bezel.export.onnx import writer as onnx_writer
from bezel.export.onnx.export import export_folder
from bezel.export.onnx.graph import build_model
from bezel.export.onnx.ops import GraphOps, Value
from bezel.export.onnx.source import QUANTS, OnnxSource
from bezel.export.onnx.targets import TARGETS
from bezel.export.onnx.weights import Storage
from bezel.export.onnx.writer import export_onnx
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import verify
from bezel.runtime import load
from bezel.runtime.cache.caches import Caches
from bezel.runtime.engines.rows import Segment, SegmentRows
from bezel.runtime.errors import InvalidCheckpoint, InvalidModelFile, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.model import ops
from bezel.runtime.model.config import LayerConfig, ModelConfig
from bezel.runtime.model.families import FAMILIES as RECORDS
from bezel.runtime.model.forward import Weights, forward
from bezel.runtime.model.tensors import TensorSpec, tensor_specs
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tiny import COLUMNS, CONFIGS, DEMO, GOLDEN, TOLERANCE, checkpoint_folder, token_ids

FAMILIES = ("gemma2-gqa", "gemma2-mha-odd-layers", "gemma3-gqa", "gemma3-mqa-no-factor", "gemma1-mqa")
OnnxOf = Callable[..., Path]


def write(source: Path, out: Path, quant: str | None = None, **options: Any) -> Path:
    arguments = {"embedding": None, "target": "onnxruntime", "progress": lambda *_: None, "force": False} | options
    export_folder(source, out, quant, **arguments)
    return out


@pytest.mark.parametrize(
    ("target", "kv"), [*((target, "f32") for target in TARGETS), ("onnxruntime", "f16"), ("onnxruntime", "int8")]
)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_accepts_the_graph(name: str, quant: str, target: str, kv: str, onnx_of: OnnxOf) -> None:
    (path,) = onnx_of(name, quant, target, kv).rglob("*.onnx")
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    assert {output for node in model.graph.node for output in node.output} <= known
    domains = {node.domain for node in model.graph.node}
    assert domains == ({"", "com.microsoft"} if quant.startswith("int") else {""})
    inline = ("rope", "_scale")
    large = [t for t in model.graph.initializer if np.prod(t.dims) > 64 and not any(part in t.name for part in inline)]
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in large)
    paths = [node.name for node in model.graph.node]
    assert len(set(paths)) == len(paths)
    assert all(path.startswith("/") for path in paths)


class MatMulNBits(OpRun):  # type: ignore[misc]
    """x · weightᵀ, by onnxruntime's description of its operator, which onnx's evaluator does not know."""

    op_domain = "com.microsoft"

    def _run(self, x: Any, codes: Any, scales: Any, bits: int, **_: Any) -> Any:
        return (x @ unpacked(codes, scales, bits).T,)


def unpacked(codes: Any, scales: Any, bits: int) -> Any:
    """The weights (outputs, inputs) of codes (outputs, blocks, bytes) and scales (outputs, blocks)."""
    integers = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1)
    blocks = integers.reshape(*scales.shape, -1) - np.float32(2 ** (bits - 1))
    return (blocks * scales[..., None]).reshape(len(codes), -1)


class Evaluator:
    """One sequence through onnx's reference evaluator, its caches carried along as arrays."""

    def __init__(self, model: onnx.ModelProto, config: ModelConfig, context: int, chunk: int) -> None:
        self.session = ReferenceEvaluator(model, new_ops=[MatMulNBits])
        self.caches = Caches(config.layers, context, "f32", chunk)
        names = self.session.input_names
        self.kinds = {name: name.removeprefix("visible.") for name in names if name.startswith("visible.")}
        self.layers = config.layers
        self.past = {
            f"past.{i}.{name}": np.zeros(_cache_shape(layer, cache.capacity, by_head=not self.kinds), np.float32)
            for i, (cache, layer) in enumerate(zip(self.caches, config.layers, strict=True))
            for name in ("key", "value")
        }

    def forward(self, ids: list[int]) -> np.ndarray:
        """Masks are written here anew: a query at q sees q − window + 1 … q, wherever those lie."""
        start, n = self.caches.length, len(ids)
        inputs = {"input_ids": np.array(ids), "positions": np.arange(start, start + n), "wanted": np.arange(n)}
        for cache in self.caches:
            cache.advance(n)
        for name, kind in self.kinds.items():
            cache, layer = next(
                pair
                for pair in zip(self.caches, self.layers, strict=True)
                if (pair[1].window is None) == (kind == "global")
            )
            seen = np.zeros((n, cache.capacity), bool)
            for row, query in enumerate(range(start, start + n)):
                for key in range(max(0, query - (layer.window or query + 1) + 1), query + 1):
                    seen[row, key % cache.capacity] = True
            inputs[name] = seen
        outputs = self.session.run(None, inputs | self.past)
        found = dict(zip(self.session.output_names, outputs, strict=True))
        self.past = {name: found[name.replace("past", "present")] for name in self.past}
        return found["logits"]


def _cache_shape(layer: LayerConfig, slots: int, by_head: bool) -> tuple[int, ...]:
    return (1, layer.n_kv_heads, slots, layer.head_dim) if by_head else (1, slots, layer.kv_size)


@pytest.mark.parametrize(("target", "quant"), [*(("portable", quant) for quant in QUANTS), ("onnxruntime", "f32")])
@pytest.mark.parametrize("name", FAMILIES)
def test_reference_evaluator(name: str, quant: str, target: str, onnx_of: OnnxOf) -> None:
    """The graph as onnx itself understands it, in chunks through several windows, against bezel's NumPy."""
    folder = onnx_of(name, quant, target)
    model, ids = load(folder, engine="reference", kv="f32"), token_ids(name)
    evaluator = Evaluator(onnx.load(folder / "model.onnx"), model.config, len(ids), 5)
    ends = [*range(5, len(ids) - 2, 5), len(ids) - 2, len(ids) - 1, len(ids)]
    found = np.concatenate([evaluator.forward(ids[a:b]) for a, b in pairwise([0, *ends])])
    assert np.abs(found - model.logits(ids)).max() < TOLERANCE
    if quant == "f32":
        assert np.abs(found[:, ::COLUMNS] - np.load(GOLDEN / f"{name}.npy")).max() < TOLERANCE


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_layers_need_not_be_alike(target: str) -> None:
    """Each has its own heads, head_dim, feed-forward, RoPE and norms; what computes is onnx, and the specification."""
    a = LayerConfig(5, 4, 2, 16, 48, 1e4, 1.0, True, True)
    b = LayerConfig(None, 3, 1, 8, 32, 1e6, 8.0, False, True)
    c = LayerConfig(5, 2, 2, 24, 64, 1e4, 1.0, True, False)
    d = LayerConfig(None, 4, 1, 16, 48, 1e4, 2.0, False, False)
    config = ModelConfig("gemma3", 96, 32, 64, 1e-6, 32**0.5, 12.0, None, None, True, (a, b, c, d))
    random, specs = np.random.default_rng(1), list(tensor_specs(config))
    gain = {spec.gguf: 1.0 if spec.is_norm else spec.shape[1] ** -0.5 for spec in specs}
    arrays = {s.gguf: random.standard_normal(s.shape, np.float32) * np.float32(gain[s.gguf]) for s in specs}
    model, tensors = build_model(config, {spec.gguf: Storage(32) for spec in specs}, TARGETS[target])
    model.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[t.name], t.name) for t in tensors)
    weights = Weights(
        {spec.role: arrays[spec.gguf] for spec in specs if spec.layer is None},
        [{spec.role: arrays[spec.gguf] for spec in specs if spec.layer == i} for i in range(4)],
    )
    ids = random.integers(0, 96, 23)
    evaluator, caches = Evaluator(model, config, len(ids), 4), Caches(config.layers, len(ids), "f32", 4)
    for part in np.split(ids, range(4, len(ids), 4)):
        want = forward(config, ops, weights, SegmentRows(Segment(caches, part, len(part))))
        assert np.abs(evaluator.forward(part.tolist()) - want).max() < TOLERANCE
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("preset", ["f32", "f16", "bf16", "q8_0", "q6_k", "q4_0"])
@pytest.mark.parametrize("name", ["demo", "gemma2-gqa"])
def test_weights_of_a_gguf_file_keep_their_bits(
    name: str, preset: str, target: str, gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = gguf_of(name, preset)
    folder = write(source, tmp_path / "out", target=target)
    with OnnxFolder(folder) as found, GGUFModel(source) as want:
        for tensor in want.tensors:
            assert np.array_equal(found.dequantize(tensor), want.dequantize(tensor)), tensor
        assert found.metadata["bezel.provenance.source_files"] == [source.name]
        assert found.metadata["bezel.generation.stop_token_ids"] == [1, 5]
    with open_checkpoint(source, quantized=True) as original:
        assert all(report.error == 0 and report.ok for report in verify(folder, original))


@pytest.mark.parametrize("preset", ["q8_0", "q4_0"])
def test_other_readers_find_the_bits_of_a_gguf_file(preset: str, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    """As the operator's description reads the integers and the scales, against the gguf package."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    source = gguf_of("demo", preset)
    graph = onnx.load(write(source, tmp_path / "out") / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    bits = {
        node.input[1]: next(a.i for a in node.attribute if a.name == "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    checked = 0
    for want in GGUFReader(source).tensors:
        if f"{want.name}.codes" in tensors:
            codes, scales = (onnx.numpy_helper.to_array(tensors[f"{want.name}.{part}"]) for part in ("codes", "scales"))
            weights = unpacked(codes, scales, bits[f"{want.name}.codes"])
            assert np.array_equal(weights, dequantize(want.data, want.tensor_type)), want.name
            checked += 1
    assert checked == 29


def test_formats_without_integers(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    source = gguf_of("gemma2-gqa", "q8_0")
    with pytest.raises(InvalidCheckpoint, match="quantized"):
        write(source, tmp_path / "out", "int4")
    mins = gguf_of("demo", "q4_k")
    with pytest.raises(InvalidRequest, match=r"is q4_k, which ONNX cannot hold exactly.*--quant f32"):
        write(mins, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    folder = write(mins, tmp_path / "out", "f32")
    with OnnxFolder(folder) as found, GGUFModel(mins) as want:
        assert all(np.array_equal(found.dequantize(name), want.dequantize(name)) for name in want.tensors)


def test_whole_or_absent(tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(DEMO, out, "int8", progress=stop)
    assert not any(tmp_path.iterdir())
    write(DEMO, out, "int8")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InvalidRequest, match="--force"):
        write(DEMO, out, "int4")
    with pytest.raises(KeyboardInterrupt):
        write(DEMO, out, "int4", progress=stop, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    write(DEMO, out, "int4", force=True)
    write(DEMO, out, "int8", force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(InvalidRequest, match="holds other files"):
        write(DEMO, tmp_path / "other", "int8", force=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_is_no_source(target: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    graph = "onnx/model_q4.onnx" if target == "transformers" else "model.onnx"
    words = (
        rf"found an ONNX graph, {graph}, made from \['model.safetensors', .*export from what the graph was made from"
    )
    folder = Path(shutil.copytree(onnx_of("demo", "int4", target), tmp_path / "graph"))
    with pytest.raises(InvalidCheckpoint, match=words):
        write(folder, tmp_path / "out", "int4")
    (folder / "bezel.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=rf"{graph}; expected a checkpoint's folder"):
        write(folder, tmp_path / "out", "int4")


def test_another_target_takes_the_place_of_one_and_says_so(tmp_path: Path) -> None:
    warnings = []
    for target in ("portable", "portable", "transformers", "onnxruntime"):
        with open_checkpoint(DEMO) as checkpoint:
            warnings.append(export_onnx(OnnxSource(checkpoint, "int8"), tmp_path / "out", target, force=True).warnings)
    assert [[words.partition(": ")[2] for words in found] for found in warnings] == [
        [],
        [],
        ["held an export for the target portable, whose place one for transformers has taken"],
        ["held an export for the target transformers, whose place one for onnxruntime has taken"],
    ]


def test_large_tensors_can_be_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(external_data, "_SMALL", 1 << 14)
    with OnnxFolder(write(DEMO, tmp_path / "out", "int8")) as folder:
        places = sorted((t.offset, t.nbytes) for t in folder.initializers.values() if t.location)
    assert all(offset % (1 << 16 if size >= 1 << 14 else 64) == 0 for offset, size in places)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))


def test_one_initialiser_serves_embedding_and_head(onnx_of: OnnxOf) -> None:
    with OnnxFolder(onnx_of("demo", "f32")) as folder:
        assert [name for name, t in folder.initializers.items() if t.nbytes >= 4096 * 256 * 4] == ["token_embd.weight"]


def flipped(config: ModelConfig) -> ModelConfig:
    """Odd layers local."""
    windows = RECORDS[config.family].windows(config.n_layers + 1, 8)[1:]
    layers = (replace(layer, window=window) for layer, window in zip(config.layers, windows, strict=True))
    return replace(config, layers=tuple(layers))


def test_a_flipped_parity_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that other exporters had: nothing shows within the first window, everything after it."""
    monkeypatch.setattr(onnx_writer, "build_model", lambda config, *rest: build_model(flipped(config), *rest))
    name = "gemma2-gqa"
    model = load(write(checkpoint_folder(name, tmp_path), tmp_path / "out", "f32"))
    model.config = model.backend.config = flipped(model.config)  # type: ignore[attr-defined]
    model.backend.masks = {"visible.global": 0, "visible.local": 1}  # type: ignore[attr-defined]
    difference = np.abs(model.logits(token_ids(name))[:, ::COLUMNS] - np.load(GOLDEN / f"{name}.npy")).max(axis=1)
    assert difference[:8].max() < TOLERANCE
    assert difference[8:].min() > 50 * TOLERANCE


Fault = Callable[[ModelConfig], ModelConfig]


def in_layers(change: Callable[[LayerConfig], LayerConfig]) -> Fault:
    return lambda config: replace(config, layers=tuple(map(change, config.layers)))


FAULTS: dict[str, Fault] = {
    "local base in global layers": in_layers(lambda layer: replace(layer, rope_base=1e4)),
    "no factor": in_layers(lambda layer: replace(layer, rope_factor=1.0)),
    "factor in local layers": in_layers(lambda layer: replace(layer, rope_factor=8.0)),
    "pattern shifted": lambda config: replace(config, layers=(*config.layers[1:], config.layers[0])),
    "wider window": in_layers(lambda layer: replace(layer, window=layer.window and layer.window + 1)),
    "narrower window": in_layers(lambda layer: replace(layer, window=layer.window and layer.window - 1)),
    "query scale by head_dim": lambda config: replace(config, query_pre_attn_scalar=32.0),
    "no norm of queries": lambda config: config,
    "no norm of keys": lambda config: config,
    "nothing": lambda config: config,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_gemma_3_is_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, rms_norm = "gemma3-gqa", GraphOps.rms_norm
    left_out = {"no norm of queries": "attn_q_norm", "no norm of keys": "attn_k_norm"}.get(fault)

    def norm(self: GraphOps, x: Value, weight: TensorSpec, eps: float) -> Value:
        found = rms_norm(self, x, weight, eps)
        return x if weight.role == left_out else found

    monkeypatch.setattr(GraphOps, "rms_norm", norm)
    monkeypatch.setattr(onnx_writer, "build_model", lambda config, *rest: build_model(FAULTS[fault](config), *rest))
    model = load(write(checkpoint_folder(name, tmp_path), tmp_path / "out", "f32"))
    config = model.config = model.backend.config = FAULTS[fault](model.config)  # type: ignore[attr-defined]
    local = [layer.window is not None for layer in config.layers]
    masks = {"visible.global": local.index(False), "visible.local": local.index(True)}
    model.backend.masks = masks  # type: ignore[attr-defined]
    difference = np.abs(model.logits(token_ids(name))[:, ::COLUMNS] - np.load(GOLDEN / f"{name}.npy")).max()
    assert difference < TOLERANCE if fault == "nothing" else difference > 50 * TOLERANCE


def test_config_names_cover_the_families() -> None:
    assert {CONFIGS[name]["model_type"] for name in FAMILIES} == {"gemma", "gemma2", "gemma3_text"}
    with open_checkpoint(DEMO) as checkpoint:
        assert checkpoint.config.tied_head


def test_the_folder_of_graphs_is_no_link(onnx_of: OnnxOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_of("demo", "int4", "transformers"), tmp_path / "out"))
    OnnxFolder(folder).close()
    (folder / "onnx").rename(tmp_path / "elsewhere")
    (folder / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidModelFile, match=r"onnx: .*this is not a folder, or a link to one"):
        OnnxFolder(folder)


@pytest.mark.parametrize("graph", ["../model.onnx", "onnx/../model.onnx", "/etc/passwd", "nothing.onnx"])
def test_a_graph_elsewhere_is_refused(graph: str, onnx_of: OnnxOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_of("demo", "int4", "transformers"), tmp_path / "out"))
    manifest = json.loads((folder / "bezel.json").read_text())
    manifest["graph"] = graph
    if graph != "nothing.onnx":
        manifest["files"][graph] = {"bytes": 1, "sha256": ""}
    (folder / "bezel.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidModelFile, match=r"key '(graph|files)': found"):
        OnnxFolder(folder)
