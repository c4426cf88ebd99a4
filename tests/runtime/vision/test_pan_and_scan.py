"""Pan and scan: the ids and the pixels that transformers' processor makes of the same chat."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from bezel.bench import PICTURES
from bezel.runtime import Message, Model, load
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.serve.contents import _part
from bezel.runtime.serve.fields import Fields
from bezel.runtime.text import chat
from bezel.runtime.vision.eye import Eye, Picture, Scanned
from bezel.runtime.vision.image import Image, normalized
from click.testing import CliRunner
from seeing import drawn

SIZES = [(700, 300), (300, 1400), (400, 400), (1600, 300)]  # two crops, four, none, four
N_CROPS = [2, 4, 0, 4]


@pytest.fixture(scope="module")
def model(shapes_of: Callable[..., Path]) -> Model:
    return load(shapes_of())


def eye_of(model: Model) -> Eye:
    assert model.eye is not None
    return model.eye


def image(i: int, pan_and_scan: bool = True) -> Image:
    return Image(drawn(i, *SIZES[i]), pan_and_scan)


CHATS: dict[str, list[str | int]] = {
    "one": [0, "What is it?"],
    "in a text": ["Look: ", 1, " what is it?"],
    "one that is square": [2, "What is it?"],
    "several": [0, 2, "and", 3, 1],
    "alone": [3],
}


@pytest.mark.parametrize("name", CHATS)
def test_as_transformers(name: str, model: Model) -> None:
    transformers = pytest.importorskip("transformers")
    processor: Any = transformers.AutoProcessor.from_pretrained(PICTURES, backend="pil")
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": shown(part)}
        for part in CHATS[name]
    ]
    want = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    parts = [part if isinstance(part, str) else image(part) for part in CHATS[name]]
    ids = model.prompt_ids([Message("user", parts)])
    soft = processor.tokenizer.image_token_id
    assert [soft if token < 0 else token for token in ids] == want["input_ids"][0].tolist()
    pixels = [pixels_of(eye_of(model), one) for part in parts if isinstance(part, Image) for one in seen(part)]
    assert np.array_equal(np.stack(pixels), want["pixel_values"].transpose(0, 2, 3, 1))
    pictures = [eye_of(model).look(one).ids for part in parts if isinstance(part, Image) for one in seen(part)]
    assert [token for token in ids if token < 0] == list(itertools.chain(*pictures))  # in this order


def shown(i: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(drawn(i, *SIZES[i]))


def seen(one: Image) -> list[Image]:
    return [one, *one.crops()]


def pixels_of(eye: Eye, one: Image) -> np.ndarray:
    c = eye.config
    return normalized(one.fitted(c.image_size, c.resample), c.mean, c.std)


def test_not_unless_it_is_asked_for(model: Model) -> None:
    for i, n_crops in enumerate(N_CROPS):
        rows = [sum(t < 0 for t in model.prompt_ids([image(i, asked), "What?"])) for asked in (False, True)]
        assert rows == [16, 16 * (1 + n_crops)]


def test_a_chat_is_read_back_and_gives_the_same_ids(model: Model) -> None:
    content: list[chat.Part] = ["Look: ", image(1), image(0), "and", image(2), "What is it?"]
    ids = model.prompt_ids([Message("user", content)])
    eye = eye_of(model)
    (message,) = chat.read(model.tokenizer, ids, eye)
    kinds = [part if isinstance(part, str) else type(part) for part in message.parts]
    assert kinds == ["Look:", Scanned, Scanned, "and", Picture, "What is it?"]
    assert [len(part.crops) for part in message.parts if isinstance(part, Scanned)] == [4, 2]
    assert model.prompt_ids([message]) == ids


def test_what_a_user_writes_is_not_mistaken_for_it(model: Model) -> None:
    words = "Here is the original image "
    content: list[chat.Part] = [words, image(2), " and here are some crops to help you see better ", image(2)]
    ids = model.prompt_ids([Message("user", content)])
    (message,) = chat.read(model.tokenizer, ids, eye_of(model))
    assert not any(isinstance(part, Scanned) for part in message.parts)
    assert model.prompt_ids([message]) == ids


def test_on_the_command_line(shapes_of: Callable[..., Path], tmp_path: Path) -> None:
    shown(0).save(tmp_path / "long.png")
    found = CliRunner().invoke(
        main,
        [
            "run",
            str(shapes_of()),
            "What?",
            "-i",
            str(tmp_path / "long.png"),
            "--pan-and-scan",
            "--show-prompt",
            "-n",
            "1",
        ],
    )
    rows = "\n\n<start_of_image><16 rows of a picture><end_of_image>\n\n"
    words = f"Here is the original image {rows} and here are some crops to help you see better {rows} {rows}What?"
    assert f"user\n{words}<end_of_turn>" in found.stderr
    lines = f"/image {tmp_path / 'long.png'}\nWhat?\n/regenerate\n"
    talk = CliRunner().invoke(
        main, ["chat", str(shapes_of()), "--pan-and-scan", "--show-prompt", "-n", "1"], input=lines
    )
    assert talk.stderr.count(f"user\n{words}<end_of_turn>") == 2


def test_a_server_does_it_for_high_detail() -> None:
    out = io.BytesIO()
    shown(0).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    for detail, expected in (("high", True), ("auto", False), (None, False)):
        nested = _part(Fields({"type": "image_url", "image_url": {"url": url, "detail": detail}}))
        flat = _part(Fields({"type": "input_image", "image_url": url, "detail": detail}))
        for part in (nested, flat):
            assert isinstance(part, Image)
            assert part.pan_and_scan == expected


def test_paligemma_has_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(eye_of(model).config), "reads_prefix", True)
    with pytest.raises(InvalidRequest, match="pan and scan is Gemma 3's"):
        model.prompt_ids([image(0), "What?"], raw=True)
