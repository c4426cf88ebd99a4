"""ONNX folders of models that see: transformers' logits, and the graphs where others run them, fed by the contract."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest
from bezel.bench.pictures.draw import draw, question, scene
from bezel.export.onnx import seeing as seeing_graphs
from bezel.export.onnx import writer as onnx_writer
from bezel.export.onnx.graph import build_model
from bezel.export.onnx.nodes import Nodes
from bezel.export.onnx.plain_attention import RingRows
from bezel.export.onnx.seeing import TowerOps
from bezel.export.onnx.source import QUANTS, OnnxSource
from bezel.export.onnx.targets import TARGETS
from bezel.export.onnx.writer import export_onnx
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime import Model, Sampling, load
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.model.config import ModelConfig
from bezel.runtime.model.families.hf import read_hf_config, write_hf_config
from bezel.runtime.model.families.sight import read_hf_vision, write_hf_vision
from bezel.runtime.vision.eye import Eye
from bezel.runtime.vision.image import Image, normalized
from onnx.reference import ReferenceEvaluator
from seeing import CONFIGS, drawn, expected_logits, eye_of, in_ids, pixels_of, sequences, theirs, write_seeing
from test_onnx_elsewhere import PROGRAMS, RUNTIMES, Run, output
from test_onnx_export import MatMulNBits, in_layers
from tiny import TOLERANCE

OnnxOf = Callable[..., Path]
NAMES = ("gemma3", "paligemma")
SEE = tuple(name for name, target in TARGETS.items() if target.sees)
GRAPHS = ("model.onnx", "embedding.onnx", "vision.onnx")
CHUNK = 5  # tokens of text that are fed at once
IMAGES = [Image(drawn(i)) for i in range(3)]


def end_of_line(model: Model) -> int:
    (found,) = model.tokenizer.encode("\n")
    return found


@pytest.mark.parametrize("target", SEE)
@pytest.mark.parametrize("name", NAMES)
def test_transformers_sees_the_same(name: str, target: str, seeing_onnx_of: OnnxOf) -> None:
    torch = pytest.importorskip("torch")
    folder = seeing_onnx_of(name, "f32", target)
    model, hf = load(folder), theirs(folder.parent / name)
    assert model.runs_on == "ort"
    eye = eye_of(model)
    pictures, pixels = [eye.look(image) for image in IMAGES], pixels_of(IMAGES, eye)
    with torch.no_grad():
        rows = hf.model.get_image_features(pixels).pooler_output.numpy()
    for picture, want in zip(pictures, rows, strict=True):
        assert np.abs(picture.rows - want).max() < TOLERANCE
    for what, sequence in sequences(name, end_of_line(model)).items():
        prefix = end_of_line(model) if name == "paligemma" else None
        want = expected_logits(hf, sequence, pixels, eye.config.n_rows, prefix)
        assert np.abs(model.logits(in_ids(sequence, pictures)) - want).max() < TOLERANCE, what


def expected(folder: Path, sequence: list[int]) -> np.ndarray:
    """By the reference engine, from the numbers in the folder."""
    model = load(folder, engine="reference", kv="f32")
    return model.logits(in_ids(sequence, [eye_of(model).look(image) for image in IMAGES]))


# --- the graphs as docs/onnx.md says that they are to be fed


@pytest.mark.parametrize("quant", QUANTS)
def test_the_program_sees(quant: str, seeing_onnx_of: OnnxOf, tmp_path: Path) -> None:
    """docs/onnx/see.py; with int8 weights onnxruntime rounds activations there as for bezel's own engine."""
    random = np.random.default_rng(8)
    things = scene(random, 2)
    PIL.Image.fromarray(draw(things, random)).save(tmp_path / "two.png")
    folder, asked = seeing_onnx_of("shapes", quant, "portable"), question(things, "describe", random).text
    printed = output(sys.executable, PROGRAMS / "see.py", folder, tmp_path / "two.png", asked, "40")
    said = load(folder).generate([Image(tmp_path / "two.png"), asked], max_tokens=40, sampling=Sampling(temperature=0))
    want = "".join(said).strip()
    assert len(want) > 8
    assert printed.splitlines()[-1].strip() == want


def in_onnx(graph: Path) -> Run:
    session = ReferenceEvaluator(onnx.load(graph), new_ops=[MatMulNBits])
    return lambda inputs: dict(zip(session.output_names, session.run(None, inputs), strict=True))


ANYWHERE = {"onnx": in_onnx, **RUNTIMES}


class Fed:
    """A folder for "portable" in any runtime; `run` opens a graph."""

    def __init__(self, run: Callable[[Path], Run], folder: Path) -> None:
        with OnnxFolder(folder) as opened:
            self.config, eye = opened.config(), opened.vision
        assert eye is not None
        self.eye = eye.config
        self.decoder, self.embedding, self.vision = (run(folder / name) for name in GRAPHS)

    def text(self, ids: list[int]) -> np.ndarray:
        return self.embedding({"input_ids": np.array(ids)})["rows"]

    def picture(self, image: Image) -> np.ndarray:
        c = self.eye
        pixels = normalized(image.fitted(c.image_size, c.resample), c.mean, c.std)
        return self.vision({"pixels": pixels.transpose(2, 0, 1)[None].copy()})["rows"]

    def pieces(self, sequence: list[int], newline: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows, and from where to where each sees whole."""
        at, start = 0, 0
        while at < len(sequence):
            if self.eye.reads_prefix and at == 0:  # pictures, and the text up to the end of a line
                end = sequence.index(newline) + 1 if newline in sequence else len(sequence)
                rows = np.concatenate(
                    [self.picture(IMAGES[-t - 1]) if t < 0 else self.text([t]) for t in sequence[:end]]
                )
                blocks = np.array([[0, len(rows)]] * len(rows))
                at = end
            elif sequence[at] < 0:
                rows = self.picture(IMAGES[-sequence[at] - 1])
                blocks = np.array([[start + i, start + len(rows)] for i in range(len(rows))])
                at += 1
            else:
                end = next((i for i in range(at, min(at + CHUNK, len(sequence))) if sequence[i] < 0), at + CHUNK)
                rows = self.text(sequence[at:end])
                blocks = np.array([[start + i, start + i + 1] for i in range(len(rows))])
                at = end
            yield rows, blocks
            start += len(rows)

    def logits(self, pieces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        total, longest = sum(len(rows) for rows, _ in pieces), max(len(rows) for rows, _ in pieces)
        past = {}
        for i, layer in enumerate(self.config.layers):
            slots = total if layer.window is None else layer.window + longest - 1
            for name in ("key", "value"):
                past[f"past.{i}.{name}"] = np.zeros((1, layer.n_kv_heads, slots, layer.head_dim), np.float32)
        found, start = [], 0
        for rows, blocks in pieces:
            n = len(rows)
            inputs = {"rows": rows, "positions": np.arange(start, start + n), "wanted": np.arange(n), "blocks": blocks}
            out = self.decoder({**inputs, **past})
            past = {name: out[name.replace("past", "present")] for name in past}
            found.append(out["logits"])
            start += n
        return np.concatenate(found)


@pytest.mark.parametrize("runtime", ANYWHERE)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_portable_graphs_elsewhere(name: str, quant: str, runtime: str, seeing_onnx_of: OnnxOf) -> None:
    folder = seeing_onnx_of(name, quant, "portable")
    fed, newline = Fed(ANYWHERE[runtime], folder), end_of_line(load(folder, engine="reference", kv="f32"))
    for what, sequence in sequences(name, newline).items():
        found = fed.logits(list(fed.pieces(sequence, newline)))
        assert np.abs(found - expected(folder, sequence)).max() < TOLERANCE, what


ADJACENT = [2, 77, 78, -1, -2, *range(100, 116)]


def at_once(fed: Fed) -> list[tuple[np.ndarray, np.ndarray]]:
    """ADJACENT in one piece."""
    pieces = list(fed.pieces(ADJACENT, -99))
    return [(np.concatenate([rows for rows, _ in pieces]), np.concatenate([blocks for _, blocks in pieces]))]


@pytest.mark.parametrize("runtime", ANYWHERE)
def test_pictures_side_by_side_in_one_call(runtime: str, seeing_onnx_of: OnnxOf) -> None:
    folder = seeing_onnx_of("gemma3", "f32", "portable")
    fed = Fed(ANYWHERE[runtime], folder)
    assert np.abs(fed.logits(at_once(fed)) - expected(folder, ADJACENT)).max() < TOLERANCE


# --- faults


def no_blocks(patch: pytest.MonkeyPatch) -> None:
    """Pictures are seen as text is: each row sees what came before."""

    def past(self: RingRows, _blocks: str, keys: str, _queries: Any, path: str) -> str:
        return self._in_window(0, keys, f"{path}/rows", f"{path}/again")

    patch.setattr(RingRows, "_in_block", past)


def blocks_one_longer(patch: pytest.MonkeyPatch) -> None:
    """A picture's rows see the first one of what follows, the next picture's."""
    whole = RingRows._in_block

    def longer(self: RingRows, blocks: str, keys: str, queries: Any, path: str) -> str:
        one = self._nodes.constant("fault", np.array([[0, 1]]))
        return whole(self, self._nodes.node("Add", [blocks, one], f"{path}/fault"), keys, queries, f"{path}/wrong")

    patch.setattr(RingRows, "_in_block", longer)


def blocks_begin_early(patch: pytest.MonkeyPatch) -> None:
    """As if the window began before the picture."""
    whole = RingRows._in_block

    def early(self: RingRows, blocks: str, keys: str, queries: Any, path: str) -> str:
        wide = self._nodes.constant("fault", np.array([[-8, 0]]))
        return whole(self, self._nodes.node("Add", [blocks, wide], f"{path}/fault"), keys, queries, f"{path}/wrong")

    patch.setattr(RingRows, "_in_block", early)


def pooled_in_another_order(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: TowerOps, x: Any, side: int, by: int) -> Any:
        node, ints, few = self._nodes.node, self._nodes.ints, side // by
        h = node("Reshape", [x.name, ints(few * few, by * by, x.width)], "/pool/squares")
        h = node("ReduceMean", [h, ints(1)], "/pool/means", keepdims=0)
        return replace(x, name=node("Reshape", [h, ints(1, few * few, x.width)], "/pool"), rows=few * few)

    patch.setattr(TowerOps, "mean_pool", wrong)


def columns_before_rows(patch: pytest.MonkeyPatch) -> None:
    """Patches are counted down the picture."""
    node = Nodes.node

    def turned(self: Nodes, op: str, inputs: Any, path: str, *outputs: str, **form: Any) -> str:
        if path == "/pixels/turned":
            form["perm"] = [3, 1, 0, 2, 4]
        return node(self, op, inputs, path, *outputs, **form)

    patch.setattr(Nodes, "node", turned)


def unscaled_text(patch: pytest.MonkeyPatch) -> None:
    """The embedding as it lies in the checkpoint."""
    build = seeing_graphs.build_embedding
    patch.setattr(
        onnx_writer, "build_embedding", lambda config, *rest: build(replace(config, embedding_scale=1.0), *rest)
    )


def wider_window(patch: pytest.MonkeyPatch) -> None:
    def wide(config: ModelConfig, *rest: Any) -> Any:
        return build_model(
            in_layers(lambda layer: replace(layer, window=layer.window and layer.window + 1))(config), *rest
        )

    patch.setattr(onnx_writer, "build_model", wide)


def nothing(_: pytest.MonkeyPatch) -> None: ...


FAULTS = (
    nothing,
    no_blocks,
    blocks_one_longer,
    blocks_begin_early,
    pooled_in_another_order,
    columns_before_rows,
    unscaled_text,
    wider_window,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(
    fault: Callable[..., None], seeing_onnx_of: OnnxOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = expected(seeing_onnx_of("gemma3", "f32", "portable"), ADJACENT)
    with monkeypatch.context() as patch, open_checkpoint(write_seeing(tmp_path / "gemma3", "gemma3")) as source:
        fault(patch)
        export_onnx(OnnxSource(source, "f32"), tmp_path / "out", "portable")
    fed = Fed(RUNTIMES["onnxruntime"], tmp_path / "out")
    difference = np.abs(fed.logits(at_once(fed)) - want).max()
    assert difference < TOLERANCE if fault is nothing else difference > 1000 * TOLERANCE


# --- form


@pytest.mark.parametrize("target", SEE)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_onnx_accepts_the_graphs(name: str, quant: str, target: str, seeing_onnx_of: OnnxOf) -> None:
    folder = seeing_onnx_of(name, quant, target)
    for graph in GRAPHS:
        onnx.checker.check_model(folder / graph, full_check=True)
        model = onnx.load(folder / graph, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
        assert {output for node in model.graph.node for output in node.output} <= known
        multiplied = graph != "embedding.onnx" and quant.startswith("int")
        assert {node.domain for node in model.graph.node} == ({"", "com.microsoft"} if multiplied else {""})
        paths = [node.name for node in model.graph.node]
        assert len(set(paths)) == len(paths)
        weights = [t for t in model.graph.initializer if np.prod(t.dims) > 64]
        assert weights
        assert all(t.data_location == onnx.TensorProto.EXTERNAL or "rope" in t.name for t in weights)


def test_text_and_head_share_their_weights(seeing_onnx_of: OnnxOf) -> None:
    folder = seeing_onnx_of("gemma3", "int8")
    alone = seeing_onnx_of("gemma3", "int8", sees=False)
    assert (folder / "model.onnx.data").read_bytes() == (alone / "model.onnx.data").read_bytes()


def test_a_head_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing but the embedding's graph has the embedding."""
    untied = CONFIGS["gemma3"]["text_config"] | {"tie_word_embeddings": False}
    monkeypatch.setitem(CONFIGS, "gemma3", CONFIGS["gemma3"] | {"text_config": untied})
    with open_checkpoint(write_seeing(tmp_path / "gemma3", "gemma3")) as source:
        assert not source.config.tied_head
        export_onnx(OnnxSource(source, "int8"), tmp_path / "out")
    want = expected(tmp_path / "out", ADJACENT)
    model = load(tmp_path / "out", activations="f32")
    found = model.logits(in_ids(ADJACENT, [eye_of(model).look(image) for image in IMAGES]))
    assert np.abs(found - want).max() < TOLERANCE


@pytest.mark.parametrize(("most", "parts"), [(1 << 23, 1), (4 * 36 * 8, 5), (1, 36)])
def test_attention_some_queries_at_a_time(
    most: int, parts: int, seeing_onnx_of: OnnxOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the parts are of two sizes: 36 patches by 5. And never more than a patch's."""
    monkeypatch.setattr(seeing_graphs, "_SCORES", most)
    with open_checkpoint(write_seeing(tmp_path / "gemma3", "gemma3")) as source:
        export_onnx(OnnxSource(source, "f32"), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "vision.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Softmax" for node in graph.node) == 2 * parts
    whole, cut = (eye_of(load(path)).look(IMAGES[0]).rows for path in (seeing_onnx_of("gemma3"), tmp_path / "out"))
    assert np.abs(whole - cut).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_config_json_round_trip(name: str) -> None:
    raw = CONFIGS[name] | {"vision_config": CONFIGS[name]["vision_config"] | {"layer_norm_eps": 1e-5}}
    config, means = read_hf_config(raw), {"image_mean": [0.4, 0.5, 0.25], "image_std": [0.3, 0.2, 0.1]}
    eye = read_hf_vision(raw, config.hidden_size, "", means)
    assert eye.mean == (0.4, 0.5, 0.25)
    written, prepared = write_hf_vision(eye, write_hf_config(config))
    assert read_hf_config(written) == config
    assert read_hf_vision(written, config.hidden_size, "", prepared) == eye


# --- what takes no pictures


def test_other_targets_say_so(seeing_onnx_of: OnnxOf, tmp_path: Path) -> None:
    seeing_onnx_of("gemma3")
    words = "pictures are left out: only the targets onnxruntime and portable take a vision tower"
    with open_checkpoint(write_seeing(tmp_path / "gemma3", "gemma3")) as source:
        summary = export_onnx(OnnxSource(source, "int8"), tmp_path / "out", "transformers")
    assert summary.warnings[1:] == [words]
    assert summary.vision is None
    with OnnxFolder(tmp_path / "out") as folder:
        assert folder.vision is None
        assert set(folder.graphs) == {"onnx/model_quantized.onnx"}


def test_a_summary_of_the_eye(tmp_path: Path) -> None:
    with open_checkpoint(write_seeing(tmp_path / "gemma3", "gemma3")) as source:
        told: list[tuple[int, int]] = []
        summary = export_onnx(OnnxSource(source, "int4"), tmp_path / "out", progress=lambda *now: told.append(now))
    assert [words.partition(":")[0] for words in summary.warnings] == ["64 rows of the embedding are left out"]
    assert summary.vision is not None
    assert told == sorted(told)
    assert told[-1] == (summary.weights + summary.vision.weights,) * 2
    assert summary.vision.path == str(tmp_path / "out" / "vision.onnx")
    assert summary.vision.formats == {"float32": 27, "int8, blocks of 32": 12}
    eye = [tmp_path / "out" / name for name in ("vision.onnx", "vision.onnx.data")]
    assert summary.vision.file_bytes == sum(path.stat().st_size for path in eye)
    assert summary.file_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_formats_of_the_eye(tmp_path: Path) -> None:
    with open_checkpoint(write_seeing(tmp_path / "gemma3", "gemma3")) as source:
        for quant, form in (("f32", "f32"), ("f16", "f16"), ("int8", "int8"), ("int4", "int8"), (None, "int8")):
            eye = OnnxSource(source, quant).eye
            assert eye is not None
            assert eye.quant == form
        with pytest.raises(InvalidRequest, match="vision: found 'q4_k', expected one of f32, f16, int8, int4"):
            OnnxSource(source, "int8", vision="q4_k")


def test_an_eye_beside_a_file_is_not_read(shapes_of: Callable[..., Path], tmp_path: Path) -> None:
    with open_checkpoint(shapes_of(), quantized=True) as source:
        (warning,) = export_onnx(OnnxSource(source), tmp_path / "out").warnings
    assert warning == ("pictures are left out: mmproj-shapes.gguf is not read; export the checkpoint that it came from")


def test_a_format_for_no_eye_is_refused(gguf_of: Callable[..., Path]) -> None:
    with open_checkpoint(gguf_of("demo")) as source, pytest.raises(InvalidRequest, match="has no vision tower"):
        OnnxSource(source, "int8", vision="int8")


def test_a_causal_picture_shows_in_the_engine(seeing_onnx_of: OnnxOf, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Eye.piece
    for target in SEE:
        folder = seeing_onnx_of("gemma3", "f32", target)
        want = expected(folder, ADJACENT)
        with monkeypatch.context() as patch:
            patch.setattr(Eye, "piece", lambda *args: whole(*args)._replace(blocks=None))
            model = load(folder)
            found = model.logits(in_ids(ADJACENT, [eye_of(model).look(image) for image in IMAGES]))
        assert np.abs(found - want).max() > 1000 * TOLERANCE
