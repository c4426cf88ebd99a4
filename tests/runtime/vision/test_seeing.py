"""Models that see, against transformers: what the tower makes of a picture, and what a text model makes of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.export.gguf.vision import export_vision
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.recipes import preset
from bezel.runtime import Message, Model, load
from bezel.runtime.engines import tower
from bezel.runtime.errors import InvalidConfig, InvalidModelFile, InvalidRequest, InvalidSession
from bezel.runtime.files.vision_file import vision_beside
from bezel.runtime.model import ops
from bezel.runtime.session import Session
from bezel.runtime.vision import eye as eye_module
from bezel.runtime.vision.eye import Eye, Picture
from bezel.runtime.vision.image import Image
from seeing import drawn, expected_logits, eye_of, in_ids, pixels_of, sequences, text, theirs, whole_until, write_seeing
from tiny import TOLERANCE

NAMES = ("gemma3", "paligemma")
EXACT: dict[str, dict[str, Any]] = {"reference": {}, "native": {"activations": "f32", "threads": 2}}


@pytest.fixture(scope="session")
def seeing_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The GGUF file of a tiny model that sees, its eye beside it, exported once."""
    scratch = tmp_path_factory.mktemp("seeing")

    def make(name: str, form: str = "f32") -> Path:
        out = scratch / f"{name}-{form}" / "model.gguf"
        if not out.exists():
            out.parent.mkdir()
            folder = write_seeing(scratch / name, name)
            with open_checkpoint(folder) as source, export_vision(source, out, preset(form, 2)):
                export_gguf(source, out, form)
        return out

    return make


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(path: Path, engine: str = "reference", **options: Any) -> Model:
    return load(path, engine=engine, kv="f32", **EXACT[engine], **options)


@pytest.mark.parametrize("engine", EXACT)
def test_transformers_sees_the_same(name: str, engine: str, seeing_of: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    path = seeing_of(name)
    model, hf = opened(path, engine), theirs(path.parents[1] / name)
    eye, images = eye_of(model), [Image(drawn(i)) for i in range(3)]
    pictures, pixels = [eye.look(image) for image in images], pixels_of(images, eye)
    with torch.no_grad():
        rows = hf.model.get_image_features(pixels).pooler_output.numpy()
    for picture, want in zip(pictures, rows, strict=True):
        assert np.abs(want).max() > 2
        assert np.abs(picture.rows - want).max() < TOLERANCE
    end_of_line = model.tokenizer.encode("\n")[0]
    for what, sequence in sequences(name, end_of_line).items():
        prefix = end_of_line if name == "paligemma" else None
        want = expected_logits(hf, sequence, pixels, eye.config.n_rows, prefix)
        found = model.logits(in_ids(sequence, pictures))
        assert np.abs(found - want).max() < TOLERANCE, what


def causal_pictures(_: Model, patch: pytest.MonkeyPatch) -> None:
    whole = Eye.piece
    patch.setattr(Eye, "piece", lambda *args: whole(*args)._replace(blocks=None))


def pictures_that_see_what_follows(_: Model, patch: pytest.MonkeyPatch) -> None:
    """A picture and the text after it in one block."""
    whole = Eye.piece

    def leaking(self: Eye, ids: Any, position: int, most: int) -> Any:
        piece = whole(self, ids, position, most)
        if piece.blocks is None or len(ids) == len(piece.ids):
            return piece
        following = ids[len(piece.ids) : len(piece.ids) + 1]
        inputs = np.concatenate([piece.inputs, self._embed(following)])
        blocks = np.concatenate([piece.blocks, piece.blocks[-1:]])
        blocks[:, 1] += 1
        return piece._replace(ids=ids[: len(inputs)], inputs=inputs, blocks=blocks)

    patch.setattr(Eye, "piece", leaking)


def pooled_in_another_order(_: Model, patch: pytest.MonkeyPatch) -> None:
    def wrong(x: Any, _side: int, by: int) -> Any:
        return x.reshape(-1, by * by, x.shape[1]).mean(axis=1)

    patch.setattr(ops, "mean_pool", wrong)


def positions_turned(model: Model, _: pytest.MonkeyPatch) -> None:
    shared = eye_of(model).tower.weights.shared  # type: ignore[attr-defined]
    table = shared["v_positions"]
    shared["v_positions"] = table.reshape(6, 6, -1).transpose(1, 0, 2).reshape(table.shape)


def rows_scaled(_: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(eye_module.Picture, "rows", property(lambda self: 8 * Picture_rows(self)))


def window_before_the_picture(_: Model, patch: pytest.MonkeyPatch) -> None:
    """As if the window began before the picture's first row."""
    whole = Eye.piece

    def wider(self: Eye, ids: Any, position: int, most: int) -> Any:
        piece = whole(self, ids, position, most)
        if piece.blocks is not None:
            piece.blocks[:, 0] = position
        return piece

    patch.setattr(Eye, "piece", wider)


Picture_rows = Picture.rows.fget
FAULTS = (
    causal_pictures,
    pictures_that_see_what_follows,
    pooled_in_another_order,
    positions_turned,
    rows_scaled,
    window_before_the_picture,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(
    fault: Callable[..., None], seeing_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence, image = [2, *text(5), -1, *text(12)], Image(drawn(1))
    right = opened(seeing_of("gemma3"))
    want = right.logits(in_ids(sequence, [eye_of(right).look(image)]))
    model = opened(seeing_of("gemma3"))
    fault(model, monkeypatch)
    found = Session(model, ring=False).logits(in_ids(sequence, [eye_of(model).look(image)]))
    assert np.abs(found - want).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("engine", EXACT)
def test_chunks_rings_and_steps_change_no_bit(name: str, engine: str, seeing_of: Callable[..., Path]) -> None:
    model = opened(seeing_of(name), engine)
    pictures = [eye_of(model).look(Image(drawn(i))) for i in range(3)]
    for sequence in sequences(name, model.tokenizer.encode("\n")[0]).values():
        ids = in_ids(sequence, pictures)
        want = model.logits(ids)
        full = Session(model, ring=False).logits(ids)
        assert np.array_equal(full, want) if engine == "native" else np.abs(full - want).max() < TOLERANCE
        last = whole_until(name, ids, model.tokenizer.encode("\n")[0])
        session = model.session()
        logits = session.prefill(ids[:last])
        for i, token in enumerate(ids[last:], last):
            assert np.abs(logits - want[i - 1]).max() < TOLERANCE
            logits = session.step(token)


def test_threads_and_batches_change_no_bit(name: str, seeing_of: Callable[..., Path]) -> None:
    path = seeing_of(name, "q8_0")
    one, two = load(path, threads=1), load(path, threads=2)
    rows = [eye_of(model).look(Image(drawn(4))).rows for model in (one, two)]
    assert np.array_equal(*rows)


def test_text_alone_is_untouched(name: str, seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    path = seeing_of(name, "q8_0")
    alone = tmp_path / "model.gguf"
    alone.write_bytes(path.read_bytes())
    blind, sees = load(alone), load(path)
    assert blind.eye is None
    assert sees.chunk > blind.chunk
    ids = text(200)
    assert np.array_equal(blind.logits(ids), sees.logits(ids))


def test_a_saved_session_goes_on(name: str, seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    model = opened(seeing_of(name))
    ids = in_ids(sequences(name, 13)["one"], [eye_of(model).look(Image(drawn(0)))])
    session = model.session()
    session.prefill(ids)
    want = session.step(77)
    session.rewind(1)
    session.save(tmp_path / "s.session")
    again = opened(seeing_of(name))
    restored = again.session()
    restored.restore(tmp_path / "s.session")
    assert restored.ids == ids
    assert np.array_equal(restored.step(77), want)
    restored.go_to(ids[: len(ids) // 2])  # which the rings no longer hold: the picture's rows are needed again
    assert restored.ids == ids[: len(ids) // 2]
    fresh = again.session()
    fresh.prefill([*ids, 77])
    assert len(again.session().model.eye._newest) == 1  # type: ignore[union-attr]


def test_a_picture_of_a_session_is_no_authority(seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    """Rows that somebody put into a session file are not taken for the picture's own when it is shown."""
    path, image = seeing_of("gemma3"), Image(drawn(0))
    model = opened(path)
    picture = eye_of(model).look(image)
    rows = picture.rows.copy()
    picture._rows = rows + 1
    session = model.session()
    session.prefill([2, *picture.ids])
    session.save(tmp_path / "s.session")
    other = opened(path)
    restored = other.session()
    restored.restore(tmp_path / "s.session")
    assert np.array_equal(eye_of(other).look(image).rows, rows)


def test_a_picture_is_not_cut_by_a_rewind(seeing_of: Callable[..., Path]) -> None:
    """Its rows saw each other: a part of them is nothing that a model was ever given."""
    model = opened(seeing_of("gemma3"))
    one, two = (eye_of(model).look(Image(drawn(seed))).ids for seed in (0, 1))
    ids = [2, 5, *one, *two, 7]
    session = Session(model, ring=False)
    session.prefill(ids)
    for n in (2, len(two), len(two) + 2, len(one) + len(two)):
        with pytest.raises(InvalidRequest, match=f"rewind: {n} tokens back is inside of a picture"):
            session.rewind(n)
        assert session.ids == ids
    for n in (1, len(two), len(one)):
        session.rewind(n)
    assert session.ids == [2, 5]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", 0),
        ("size", {"height": 96, "width": 96}),
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 0.01),
        ("do_resize", False),
    ],
)
def test_pictures_prepared_in_another_way(key: str, value: Any, tmp_path: Path) -> None:
    folder = write_seeing(tmp_path / "model", "gemma3")
    file = folder / "preprocessor_config.json"
    with open_checkpoint(folder) as source:
        assert source.vision is not None
        size = source.vision.config.image_size
    usual = {"size": {"height": size, "width": size}, "resample": 2, "do_rescale": True, "do_pan_and_scan": None}
    file.write_text(json.dumps(usual))
    open_checkpoint(folder).close()
    file.write_text(json.dumps(usual | {key: value}))
    with pytest.raises(InvalidConfig, match=f"preprocessor_config.json: key '{key}'"):
        open_checkpoint(folder)


def test_unknown_and_broken_pictures_are_refused(seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    model = opened(seeing_of("gemma3"))
    picture = eye_of(model).look(Image(drawn(0)))
    for ids in ([2, -5], [2, *picture.ids[:-1]], [2, *picture.ids[:-1], 7], [2, *picture.ids[1:]]):
        session = model.session()
        with pytest.raises(InvalidRequest, match="begins no picture that is known"):
            session.prefill(ids)
        assert session.ids == []
    session.prefill([2, *picture.ids])
    session.save(tmp_path / "s.session")
    blind = load(_alone(seeing_of("gemma3"), tmp_path), engine="reference", kv="f32")
    with pytest.raises(InvalidSession, match="holds pictures, and this model sees none"):
        blind.session().restore(tmp_path / "s.session")
    with pytest.raises(InvalidRequest, match="found -5 to 2"):
        blind.session().prefill([2, -5])


def _alone(path: Path, folder: Path) -> Path:
    """The model file without its eye."""
    out = folder / path.name
    out.write_bytes(path.read_bytes())
    return out


def test_the_eye_forgets_what_nobody_holds(seeing_of: Callable[..., Path]) -> None:
    model = opened(seeing_of("gemma3"), context=20)
    eye = eye_of(model)  # 40 rows: four pictures of 9
    pictures = [eye.look(Image(drawn(i))) for i in range(6)]
    first = pictures[0].ids
    assert eye.find(np.array(first)) is pictures[0]  # held here
    del pictures
    assert eye.find(np.array(first)) is not None  # the newest again, as it was asked for
    for i in range(10, 14):
        eye.look(Image(drawn(i)))
    assert eye.find(np.array(first)) is None


def test_a_session_holds_the_pictures_of_shorter_ids(seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    """Also when a full context was made shorter, or the rings no longer reached back: whatever else is looked at."""
    model = opened(seeing_of("gemma3"), context=60)

    def look(seed: int) -> list[int]:
        return list(eye_of(model).look(Image(drawn(seed))).ids)

    def forget() -> None:
        for seed in range(50, 70):  # more than twice a context
            look(seed)

    session = model.session()
    session.prefill([2, *text(20)])
    session.feed([*look(0), *text(40)], make_room=lambda ids: [2, *ids[21:]])
    assert len(session.ids) == 50
    forget()
    session.save(tmp_path / "shorter.session")
    session.go_to([2, *look(1), *text(3)])
    forget()
    session.save(tmp_path / "other.session")
    assert [len(picture.ids) for picture in session._pictures] == [9]  # and none that is not there any more


def test_the_right_eye_is_found(seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    path = seeing_of("gemma3")
    alone = _alone(path, tmp_path)
    with pytest.raises(InvalidRequest, match="there is no vision tower"):
        vision_beside(alone)
    own = path.with_name("mmproj-model.gguf").read_bytes()
    (tmp_path / "mmproj-BF16.gguf").write_bytes(own)
    assert vision_beside(alone) == tmp_path / "mmproj-BF16.gguf"
    (tmp_path / "mmproj-F16.gguf").write_bytes(own)
    with pytest.raises(InvalidRequest, match=r"has 2 files of vision towers .* --vision FILE"):
        vision_beside(alone)
    with pytest.raises(InvalidRequest, match=r"picture: this model sees no pictures: .*has 2 files"):
        load(alone).prompt_ids([Image(drawn(0)), "What is it?"])
    assert load(alone, vision=tmp_path / "mmproj-F16.gguf").eye is not None
    (tmp_path / "mmproj-model.gguf").write_bytes(own)
    assert vision_beside(alone) == tmp_path / "mmproj-model.gguf"


def test_eyes_of_other_models_are_refused(seeing_of: Callable[..., Path], gguf_of: Callable[..., Path]) -> None:
    eye = seeing_of("gemma3").with_name("mmproj-model.gguf")
    with pytest.raises(InvalidConfig, match="rows of 64 numbers for pictures, and the text model takes 256"):
        load(gguf_of("demo"), vision=eye)
    with pytest.raises(InvalidConfig, match=r"general\.architecture"):
        load(gguf_of("demo"), vision=gguf_of("demo"))
    with pytest.raises(InvalidModelFile, match="there is no such file"):
        load(gguf_of("demo"), vision="nothing.gguf")


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def of_another_model(raw: bytes) -> bytes:
    key = b"clip.vision.projection_dim" + (4).to_bytes(4, "little")  # u32
    assert key in raw
    at = raw.index(key) + len(key)
    return raw[:at] + (128).to_bytes(4, "little") + raw[at + 4 :]


BESIDE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "two": (lambda raw: raw, "has 2 files of vision towers"),
    "cut": (cut, "mmproj-a.gguf"),
    "another model's": (of_another_model, "they belong to different models"),
    "nothing": (lambda _: b"", "not a GGUF file"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_eyes_that_are_not_its_own_hinder_no_text(what: str, seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    path = seeing_of("gemma3")
    alone, (change, words) = _alone(path, tmp_path), BESIDE[what]
    want = opened(alone).logits(text(20))
    for name in ("mmproj-a.gguf", "mmproj-b.gguf")[: 1 + (what == "two")]:
        (tmp_path / name).write_bytes(change(path.with_name("mmproj-model.gguf").read_bytes()))
    model = opened(alone)
    assert np.array_equal(model.logits(text(20)), want)
    assert model.prompt_ids("Once", raw=True)
    talk = model.conversation()
    talk.prompt_ids("Hello!")
    for ask in (model.prompt_ids, partial(model.prompt_ids, raw=True), talk.prompt_ids):
        with pytest.raises(InvalidRequest, match=f"picture: this model sees no pictures: .*{words}"):
            ask([Image(drawn(0)), "What is it?"])


def test_older_files_have_up_and_down_the_wrong_way_round(seeing_of: Callable[..., Path], tmp_path: Path) -> None:
    path = seeing_of("gemma3")
    alone = _alone(path, tmp_path)
    raw = path.with_name("mmproj-model.gguf").read_bytes()
    swapped = raw.replace(b"ffn_up", b"ffn_??").replace(b"ffn_down", b"ffn_up").replace(b"ffn_??", b"ffn_down")
    assert len(swapped) == len(raw)  # as many of one as of the other
    (tmp_path / "mmproj-model.gguf").write_bytes(_with_lengths(swapped))
    image = Image(drawn(0))
    assert np.array_equal(eye_of(opened(alone)).look(image).rows, eye_of(opened(path)).look(image).rows)


def _with_lengths(raw: bytes) -> bytes:
    """The lengths before names that were changed, set right."""
    for name, was in ((b"ffn_up", 8), (b"ffn_down", 6)):
        for kind in (b"weight", b"bias"):
            for layer in range(2):
                text = b"v.blk.%d.%s.%s" % (layer, name, kind)
                at = raw.index(text) - 8
                length = len(text) + was - len(name)
                assert raw[at : at + 8] == length.to_bytes(8, "little")
                raw = raw[:at] + len(text).to_bytes(8, "little") + raw[at + 8 :]
    return raw


def test_pixels_and_patches() -> None:
    pixels = np.arange(6 * 6 * 3).reshape(6, 6, 3).astype(np.float32)
    patches = tower.patches_of(pixels, 3)
    assert patches.shape == (4, 27)
    assert patches[1].tolist() == [pixels[y, x, c] for c in range(3) for y in range(3) for x in range(3, 6)]


def test_widened_zeros_add_nothing(seeing_of: Callable[..., Path]) -> None:
    """An intermediate size of 88 becomes 96 in whole blocks of 32, and 256 in those of a k-quant."""
    image = Image(drawn(2))
    exact = eye_of(opened(seeing_of("gemma3"))).look(image).rows
    for form, wide, bound in (("q8_0", 96, 0.05), ("q4_0", 96, 1.0), ("bf16", 88, 0.05)):
        eye = eye_of(opened(seeing_of("gemma3", form)))
        assert eye.config == replace(eye.config, intermediate_size=wide)
        assert 0 < np.abs(eye.look(image).rows - exact).max() < bound


def test_paligemma_takes_pictures_before_a_line_of_text(seeing_of: Callable[..., Path]) -> None:
    model = opened(seeing_of("paligemma"))
    one, two = Image(drawn(0)), Image(drawn(1))
    ids = [token for image in (one, two) for token in eye_of(model).look(image).ids]
    encode = model.tokenizer.encode
    for content in ([one, two, "caption en"], [" ", one, "\n", two, " caption ", "en\n"]):
        words = "".join(part for part in content if isinstance(part, str)).strip()
        assert model.prompt_ids(content, raw=True) == [*ids, 2, *encode(f"{words}\n")]
    assert model.prompt_ids([one], raw=True) == [*eye_of(model).look(one).ids, 2, *encode("\n")]
    for content, words in (
        (["what", one, "is"], "found text before a picture"),
        ([one, "and", two], "found text before a picture"),
        ([one, "one\ntwo"], "found a line break"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            model.prompt_ids(content, raw=True)
    with pytest.raises(InvalidRequest, match="before one line of text, and not in a chat"):
        model.prompt_ids([Message("user", [one, "caption en"])])
