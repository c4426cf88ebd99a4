"""Pictures in requests, by the official clients."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import PIL.Image
import pytest
from bezel.bench.pictures.draw import draw, example, scene
from bezel.runtime import Message, Model, Sampling, load
from bezel.runtime.files.models import eye_path
from bezel.runtime.vision import image as image_module
from bezel.runtime.vision.image import Image
from serving import process, serving

GREEDY = {"temperature": 0, "max_tokens": 24}


def picture(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return draw(scene(random, 2), random)


def url(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def shown(pixels: np.ndarray) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(pixels)}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def file(shapes_of: Callable[..., Path]) -> Path:
    return shapes_of()


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[Model]:
    with load(file, kv="int8", threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def address(file: Path, gguf_of: Callable[..., Path]) -> Iterator[str]:
    with serving({"shapes": file, "blind": gguf_of("demo", "q4_0")}) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
        yield client


def expected(model: Model, *messages: Message) -> str:
    return "".join(model.generate(list(messages), max_tokens=24, sampling=Sampling(temperature=0)))


def asked(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(**({"model": "shapes", "messages": messages} | GREEDY | options))


def test_a_picture_and_a_question(client: openai.OpenAI, model: Model) -> None:
    content = [shown(picture(0)), said("What colour is the square?")]
    found = asked(client, [{"role": "user", "content": content}])
    want = expected(model, Message("user", [Image(picture(0)), "What colour is the square?"]))
    assert found.choices[0].message.content == want
    assert found.usage.prompt_tokens > 16


def test_examples_between_pictures(client: openai.OpenAI, model: Model) -> None:
    """Picture, answer, picture, answer, picture, ?"""
    random = np.random.default_rng(3)
    messages, told = [], []
    for _ in range(4):
        pixels, answer = example("colour", random)
        messages += [{"role": "user", "content": [shown(pixels)]}, {"role": "assistant", "content": answer}]
        told += [Message("user", [Image(pixels)]), Message("model", answer)]
    pixels, _ = example("colour", random)
    found = asked(client, [*messages, {"role": "user", "content": [shown(pixels)]}])
    assert found.choices[0].message.content == expected(model, *told, Message("user", [Image(pixels)]))


def test_the_next_question_about_it_costs_only_itself(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [shown(picture(5)), said("What colour is the square?")]}]
    first = asked(client, messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}]
    second = asked(client, [*messages, {"role": "user", "content": "How many shapes are there?"}])
    assert second.usage.prompt_tokens_details.cached_tokens > 20


def test_streams_and_many_at_once(client: openai.OpenAI, model: Model) -> None:
    wanted = [
        expected(model, Message("user", ["Look: ", Image(picture(i)), "Describe the picture."])) for i in range(4)
    ]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        content = [said("Look: "), shown(picture(i)), said("Describe the picture.")]
        parts = asked(client, [{"role": "user", "content": content}], stream=True)
        found[i] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == wanted


def test_messages_of_one_side_become_one(client: openai.OpenAI, model: Model) -> None:
    found = asked(
        client,
        [
            {"role": "user", "content": [shown(picture(1))]},
            {"role": "user", "content": "What shape is the blue thing?"},
        ],
    )
    want = expected(model, Message("user", [Image(picture(1)), "What shape is the blue thing?"]))
    assert found.choices[0].message.content == want


def test_responses(client: openai.OpenAI, model: Model) -> None:
    content = [{"type": "input_image", "image_url": url(picture(2))}, {"type": "input_text", "text": "Describe it."}]
    found = client.responses.create(
        model="shapes", input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=24
    )
    assert found.output_text == expected(model, Message("user", [Image(picture(2)), "Describe it."]))


def test_anthropic(address: str, model: Model) -> None:
    data = url(picture(2)).partition(",")[2]
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    content: list[Any] = [block, said("Describe it.")]
    with anthropic.Anthropic(base_url=address, api_key="-", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": content}]
        found = client.messages.create(model="shapes", messages=messages, max_tokens=24, extra_body={"temperature": 0})
        count = client.messages.count_tokens(model="shapes", messages=messages)
    assert found.content[0].text == expected(model, Message("user", [Image(picture(2)), "Describe it."]))
    assert count.input_tokens == found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)


REFUSED: dict[str, tuple[Any, str]] = {
    "an address": ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}], "nothing is fetched"),
    "a file": ([{"type": "image_url", "image_url": "file:///etc/passwd"}], "found an address"),
    "no picture": ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "begins with"),
    "no base64": ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}], "is no base64"),
    "no address": ([{"type": "image_url", "image_url": {}}], "expected a picture"),
    "a sound": ([{"type": "input_audio", "input_audio": {}}], "this model reads texts and pictures"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, client: openai.OpenAI) -> None:
    content, words = REFUSED[name]
    with pytest.raises(openai.BadRequestError, match=words):
        asked(client, [{"role": "user", "content": content}])


def test_pictures_that_cannot_fit_are_not_decoded(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes thousands of times the room of its file: a small request must not fill the memory."""
    monkeypatch.setattr(image_module, "_plain", lambda _: pytest.fail("decoded"))
    with pytest.raises(openai.BadRequestError, match="200 pictures of 16 positions do not fit into the context"):
        asked(client, [{"role": "user", "content": [shown(np.zeros((8, 8, 3), np.uint8))] * 200}])


def test_a_damaged_picture_is_named(client: openai.OpenAI) -> None:
    whole = shown(picture(0))
    cut = {"type": "image_url", "image_url": {"url": url(picture(1))[: len("data:image/png;base64,") + 2000]}}
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[1\].image_url.url: is damaged"):
        asked(client, [{"role": "user", "content": [whole, cut, said("What is it?")]}])


@pytest.fixture
def apart(file: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model and its eye, in folders of their own."""
    (tmp_path / "eyes").mkdir()
    eye = shutil.copy(eye_path(file), tmp_path / "eyes" / "eye.gguf")
    return Path(shutil.copy(file, tmp_path / "alone.gguf")), Path(eye)


def test_an_eye_that_lies_elsewhere(apart: tuple[Path, Path], model: Model) -> None:
    alone, eye = apart
    with process(str(alone), "--vision", str(eye), "--kv", "int8") as server:
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0) as client:
            content = [shown(picture(0)), said("What colour is the square?")]
            found = asked(client, [{"role": "user", "content": content}], model="alone")
        want = expected(model, Message("user", [Image(picture(0)), "What colour is the square?"]))
        assert found.choices[0].message.content == want


def test_an_eye_belongs_to_one_of_several(apart: tuple[Path, Path], file: Path) -> None:
    alone, eye = apart
    with process(f"one={alone}", f"two={file}", "--vision", str(eye)) as refused:
        assert f"--vision {eye}: found 2 models" in refused.said
        assert "as mmproj-alone.gguf or mmproj-shapes.gguf" in refused.said
    eye.write_bytes(eye.read_bytes()[:5000])
    with process(str(alone), "--vision", str(eye)) as refused:
        assert f"{eye}: invalid model file" in refused.said


def test_pictures_where_none_belong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="pictures go into a user's messages"):
        asked(client, [{"role": "system", "content": [shown(picture(0))]}, {"role": "user", "content": "Hello!"}])


def test_a_model_that_sees_nothing_says_so(client: openai.OpenAI) -> None:
    content = [shown(picture(0)), said("What is it?")]
    with pytest.raises(openai.BadRequestError, match="this model sees no pictures") as refused:
        asked(client, [{"role": "user", "content": content}], model="blind")
    assert "mmproj" not in str(refused.value)  # why is for the server's log: it names files
