"""Pictures through the ort engine: text as without an eye, sessions, the bundled model's answers, damaged folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest
from bezel.bench.pictures.draw import draw, question, scene
from bezel.runtime import Message, Model, Sampling, Session, load
from bezel.runtime.engines import ort
from bezel.runtime.errors import InvalidModelFile, InvalidRequest
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.vision.image import Image
from onnx_files import relist, set_external
from seeing import drawn, eye_of, in_ids, sequences, text, whole_until
from tiny import TOLERANCE

OnnxOf = Callable[..., Path]
NAMES = ("gemma3", "paligemma")
TARGETS = ("onnxruntime", "portable")
STORED = (*(("onnxruntime", kv) for kv in ("f32", "f16", "int8")), ("portable", "f32"))
GREEDY = Sampling(temperature=0)
IMAGES = [Image(drawn(i)) for i in range(3)]


def pictures_in(model: Model, sequence: list[int]) -> list[int]:
    return in_ids(sequence, [eye_of(model).look(image) for image in IMAGES])


def all_sequences(name: str, model: Model) -> dict[str, list[int]]:
    return sequences(name, model.tokenizer.encode("\n")[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quant", ["f32", "f16", "int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_text_alone_has_the_same_bits(name: str, quant: str, target: str, seeing_onnx_of: OnnxOf) -> None:
    """Rings are larger where a picture must fit: without rings, so that slots are the same, no bit differs."""
    blind, sees = (load(seeing_onnx_of(name, quant, target, sees=sees)) for sees in (False, True))
    assert blind.eye is None
    ids = text(200)
    assert np.array_equal(Session(blind, ring=False).logits(ids), Session(sees, ring=False).logits(ids))
    if quant == "f32":
        assert np.abs(blind.logits(ids) - sees.logits(ids)).max() < TOLERANCE


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_packed_weights_are_those_of_the_folder(name: str, target: str, quant: str, seeing_onnx_of: OnnxOf) -> None:
    """The reference engine reads eye and text out of the same files, and computes on NumPy."""
    folder = seeing_onnx_of(name, quant, target)
    want, found = load(folder, engine="reference", kv="f32"), load(folder, activations="f32")
    for sequence in all_sequences(name, want).values():
        logits = [model.logits(pictures_in(model, sequence)) for model in (want, found)]
        assert np.abs(logits[0] - logits[1]).max() < TOLERANCE
    rounded = eye_of(load(folder)).look(IMAGES[0]).rows  # 8 bits of activations
    exact = eye_of(want).look(IMAGES[0]).rows
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_steps_and_caches_of_all_kinds(name: str, stored: tuple[str, str], seeing_onnx_of: OnnxOf) -> None:
    model = load(seeing_onnx_of(name, "f32", *stored))
    exact = load(seeing_onnx_of(name, "f32"), engine="reference", kv="f32")
    allowed = {"f32": TOLERANCE, "f16": 0.02, "int8": 1.0}[stored[1]]
    for what, sequence in all_sequences(name, model).items():
        ids = pictures_in(model, sequence)
        want = exact.logits(pictures_in(exact, sequence))
        assert np.abs(model.logits(ids) - want).max() < allowed, what
        last = whole_until(name, ids, model.tokenizer.encode("\n")[0])
        session = model.session()
        logits = session.prefill(ids[:last])
        for i, token in enumerate(ids[last:], last):
            assert np.abs(logits - want[i - 1]).max() < allowed
            logits = session.step(token)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_may_be_longer_than_what_is_fast_for_text(
    name: str, target: str, seeing_onnx_of: OnnxOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "CHUNK", 4)
    model = load(seeing_onnx_of(name, "f32", target))
    exact = load(seeing_onnx_of(name, "f32"), engine="reference", kv="f32")
    assert model.session().engine.chunk == 4
    for sequence in all_sequences(name, model).values():
        want = exact.logits(pictures_in(exact, sequence))
        assert np.abs(model.logits(pictures_in(model, sequence)) - want).max() < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_side_by_side_in_one_call(target: str, seeing_onnx_of: OnnxOf) -> None:
    """The next picture is none of the first one's business, though its rows are there already."""
    model = load(seeing_onnx_of("gemma3", "f32", target))
    exact = load(seeing_onnx_of("gemma3", "f32"), engine="reference", kv="f32")
    sequence, n = [2, *text(4), -1, -2, *text(5)], eye_of(model).config.n_rows
    want = exact.logits(pictures_in(exact, sequence))
    ids, eye = np.array(pictures_in(model, sequence)), eye_of(model)
    rows = eye._inputs(ids)
    positions = np.arange(len(ids))
    blocks = np.stack([positions, positions + 1], axis=1)
    blocks[5 : 5 + n, 1], blocks[5 + n : 5 + 2 * n, 1] = 5 + n, 5 + 2 * n

    def logits(blocks: np.ndarray) -> Any:
        return Session(model, ring=False).engine.forward(rows, len(ids), blocks=blocks)

    assert np.abs(logits(blocks) - want).max() < TOLERANCE
    leaking = blocks.copy()
    leaking[5 : 5 + n, 1] += 1
    causal = np.stack([positions, positions + 1], axis=1)
    for wrong in (leaking, causal):
        assert np.abs(logits(wrong) - want).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_session_goes_on(name: str, stored: tuple[str, str], seeing_onnx_of: OnnxOf, tmp_path: Path) -> None:
    model = load(seeing_onnx_of(name, "int8", *stored))
    ids = pictures_in(model, all_sequences(name, model)["one"])
    session = model.session()
    session.prefill(ids)
    session.save(tmp_path / "s.session")
    want = session.step(77)
    session.rewind(1)
    assert np.array_equal(session.step(77), want)
    again = load(seeing_onnx_of(name, "int8", *stored)).session()
    again.restore(tmp_path / "s.session")
    assert again.ids == ids
    assert np.array_equal(again.step(77), want)


def asked(seed: int) -> Message:
    random = np.random.default_rng(seed)
    things = scene(random, 1 + seed % 4)
    kinds = ("colour", "shape", "count", "place", "is there", "describe")
    return Message("user", [Image(draw(things, random)), question(things, kinds[seed % 6], random).text])


@pytest.mark.parametrize("target", TARGETS)
def test_the_bundled_model_answers_as_its_gguf_file_does(
    target: str, shapes_of: Callable[..., Path], seeing_onnx_of: OnnxOf
) -> None:
    models = load(shapes_of("f32"), kv="f32"), load(seeing_onnx_of("shapes", "f32", target))
    said = set()
    for seed in range(12):
        want, found = (list(model.generate([asked(seed)], max_tokens=48, sampling=GREEDY)) for model in models)
        assert "".join(found) == "".join(want)
        said.add("".join(want))
    assert len(said) > 6
    wide = [asked(0), Message("model", "red"), asked(1), Message("model", "circle"), asked(5)]  # past the window of 64
    assert len(models[0].prompt_ids(wide)) > 64
    assert len({"".join(model.generate(wide, max_tokens=48, sampling=GREEDY)) for model in models}) == 1


def test_from_the_command_line(seeing_onnx_of: OnnxOf, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    pixels = draw(scene(random, 1), random)
    PIL.Image.fromarray(pixels).save(tmp_path / "one.png")
    folder = seeing_onnx_of("shapes", "int8")
    asked = "Which colour is it?"
    command = ["run", folder, asked, "--image", tmp_path / "one.png", "--temperature", "0", "--max-tokens", "16"]
    done = subprocess.run([sys.executable, "-m", "bezel", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with load(folder) as model:
        want = model.generate([Image(tmp_path / "one.png"), asked], max_tokens=16, sampling=GREEDY)
        assert done.stdout.strip() == "".join(want).strip() != ""


# --- folders that somebody changed, and wrote the manifest anew


@pytest.fixture
def folder(seeing_onnx_of: OnnxOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeing_onnx_of("gemma3"), tmp_path / "out"))


def seen(folder: Path) -> Any:
    model = load(folder)
    return model.logits(pictures_in(model, [2, -1]))


def test_an_eye_of_another_folder_is_refused(folder: Path, seeing_onnx_of: OnnxOf) -> None:
    for name in ("vision.onnx", "vision.onnx.data"):
        shutil.copy(seeing_onnx_of("paligemma") / name, folder / name)
    relist(folder)
    with pytest.raises(InvalidModelFile, match=r"vision\.onnx: .*output .rows.: found the shape \(36, 64\), expected"):
        seen(folder)


def test_an_eye_of_other_sizes_is_refused(folder: Path, seeing_onnx_of: OnnxOf) -> None:
    for name in ("vision.onnx", "vision.onnx.data"):
        shutil.copy(seeing_onnx_of("shapes") / name, folder / name)
    relist(folder)
    picture = eye_of(load(folder, engine="reference", kv="f32")).look(IMAGES[0])
    with pytest.raises(InvalidModelFile, match=r"vision\.onnx: .*tensor 'v\.patch_embd\.weight': found .* 128 ×"):
        picture.see()


def test_graphs_of_other_inputs_are_refused(folder: Path, seeing_onnx_of: OnnxOf) -> None:
    shutil.copy(folder / "vision.onnx", folder / "embedding.onnx")
    relist(folder)
    with pytest.raises(InvalidModelFile, match=r"embedding\.onnx: .*graph input or output 'input_ids': found None"):
        load(folder)
    other = seeing_onnx_of("gemma3", sees=False)
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(other / name, folder / name)
    shutil.copy(seeing_onnx_of("gemma3") / "embedding.onnx", folder / "embedding.onnx")
    relist(folder)
    with pytest.raises(InvalidModelFile, match=r"model\.onnx: .*graph input or output 'input_ids': .*expected None"):
        load(folder)


def test_graphs_that_share_a_name_for_other_bytes_are_refused(folder: Path) -> None:
    graph = onnx.load(folder / "embedding.onnx", load_external_data=False)
    (tensor,) = (t for t in graph.graph.initializer if t.name == "token_embd.weight")
    set_external(tensor, offset=str(64))
    (folder / "embedding.onnx").write_bytes(graph.SerializeToString())
    relist(folder)
    with pytest.raises(InvalidModelFile, match=r"embedding\.onnx: .*initialiser 'token_embd\.weight': is another"):
        OnnxFolder(folder)


def test_weights_outside_their_file_are_refused(folder: Path) -> None:
    graph = onnx.load(folder / "vision.onnx", load_external_data=False)
    set_external(graph.graph.initializer[-1], offset=str(1 << 30))
    (folder / "vision.onnx").write_bytes(graph.SerializeToString())
    relist(folder)
    with pytest.raises(InvalidModelFile, match="expected its end by byte"):
        OnnxFolder(folder)


@pytest.mark.parametrize("name", ["vision.onnx", "vision.onnx.data", "embedding.onnx", "preprocessor_config.json"])
def test_whatever_is_missing_or_altered_is_said(name: str, folder: Path) -> None:

    def read() -> None:
        with OnnxFolder(folder) as opened:
            assert opened.vision is not None
            opened.check_hashes()

    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InvalidModelFile, match=rf"{name}.*it was altered"):
        read()
    (folder / name).unlink()
    with pytest.raises(InvalidModelFile, match=rf"{name}.*there is no such file"):
        read()


def test_wild_manifests(folder: Path) -> None:
    manifest = json.loads((folder / "bezel.json").read_text())
    for wild in (7, {}, [], True):
        (folder / "bezel.json").write_text(json.dumps(manifest | {"vision": wild}))
        with pytest.raises(InvalidModelFile, match="key 'vision': found"):
            OnnxFolder(folder)
    del manifest["vision"]
    (folder / "bezel.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidModelFile, match="graph input or output 'input_ids': found None"):
        load(folder)


def test_another_eye_is_not_for_folders(folder: Path, shapes_of: Callable[..., Path]) -> None:
    with pytest.raises(InvalidRequest, match=r"an ONNX folder that sees has its vision tower in itself"):
        load(folder, vision=shapes_of().with_name("mmproj-shapes.gguf"))


@pytest.mark.parametrize("name", ["vision.onnx.data", "embedding.onnx"])
def test_what_is_replaced_before_the_first_picture_is_refused(name: str, folder: Path) -> None:
    """Long after the folder was checked, onnxruntime opens the eye's files."""
    model = load(folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(bytes(len(content)))
    with pytest.raises(InvalidModelFile, match="it was changed while it was being opened"):
        model.logits(pictures_in(model, [2, -1]))


def test_rows_are_computed_when_a_picture_is_first_needed(folder: Path) -> None:
    (folder / "vision.onnx.data").write_bytes(bytes((folder / "vision.onnx.data").stat().st_size))
    relist(folder)
    model = load(folder)
    assert np.isfinite(model.logits(text(9))).all()
    assert not eye_of(model).look(IMAGES[0]).is_seen


def test_rows_that_are_not_finite_are_the_eyes_fault(folder: Path) -> None:
    (folder / "vision.onnx.data").write_bytes(b"\xff" * (folder / "vision.onnx.data").stat().st_size)
    relist(folder)
    picture = eye_of(load(folder)).look(IMAGES[0])
    with pytest.raises(InvalidModelFile, match=r"vision\.onnx: .*what it makes of a picture is not finite"):
        picture.see()
