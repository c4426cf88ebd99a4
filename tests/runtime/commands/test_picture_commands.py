"""Pictures on the command line: `run --image`, `/image` in a chat, and what `inspect` says of an eye."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from bezel.bench import PICTURES as BUNDLED
from bezel.bench.pictures.draw import draw, scene
from bezel.export.gguf.vision import export_vision
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.recipes import preset
from bezel.runtime import Message, Model, Sampling, load
from bezel.runtime.commands import generate
from bezel.runtime.commands.main import main
from bezel.runtime.engines.tower import Tower
from bezel.runtime.files.vision_file import VisionFile
from bezel.runtime.vision.image import Image
from click.testing import CliRunner, Result

ASKED = "What colour is the shape?"


@pytest.fixture(scope="module")
def file(shapes_of: Callable[..., Path]) -> Path:
    return shapes_of()


@pytest.fixture(scope="module")
def model(file: Path) -> Model:
    return load(file)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files, each of one shape in a colour of its own."""
    folder, found = tmp_path_factory.mktemp("pictures"), dict[str, Path]()
    for seed in range(40):
        random = np.random.default_rng(seed)
        things = scene(random, 1)
        path = folder / f"{things[0].colour} {seed}.png"
        if things[0].colour not in found and len(found) < 3:
            PIL.Image.fromarray(draw(things, random)).save(path)
            found[things[0].colour] = path
    return list(found.values())


def colour(picture: Path) -> str:
    return picture.name.split()[0]


def bezel(*args: object, stdin: str | None = None, code: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    assert done.exit_code == code, done.output
    assert "fault of bezel" not in done.output
    return done


def run(file: Path, *args: object, code: int = 0) -> Result:
    return bezel("run", file, "--temp", 0, "-n", 24, *args, code=code)


def answer(model: Model, *parts: str | Path) -> str:
    content = [part if isinstance(part, str) else Image(part) for part in parts]
    pieces = model.generate([Message("user", content)], max_tokens=24, sampling=Sampling(temperature=0))
    return "".join(pieces) + "\n"


# --- run


def test_a_picture_and_a_question(file: Path, model: Model, pictures: list[Path]) -> None:
    told = [run(file, ASKED, "--image", picture).stdout for picture in pictures]
    assert told == [answer(model, picture, ASKED) for picture in pictures]
    assert len(set(told)) == len(pictures)
    assert [colour(picture) in text for picture, text in zip(pictures, told, strict=True)] == [True] * 3


def test_where_pictures_belong(file: Path, model: Model, pictures: list[Path]) -> None:
    one, two, three = pictures
    assert run(file, "Look: {} what is it?", "-i", one).stdout == answer(model, "Look: ", one, " what is it?")
    parts = generate._with_images("{} and {}{}", (one, two, three), False)
    shown = [part if isinstance(part, str) else part.name for part in parts]
    assert shown == ["", one.name, " and ", two.name, "", three.name, ""]
    found = run(file, "{} and {}{}", "-i", one, "-i", two, "-i", three, "--show-prompt")
    assert found.stdout == answer(model, one, " and ", two, three)
    rows = "<start_of_image><16 rows of a picture><end_of_image>"
    assert f"user\n\n\n{rows}\n\nand\n\n{rows}\n\n\n\n{rows}\n\n<end_of_turn>" in found.stderr
    assert run(file, ASKED, "-i", one, "-i", two).stdout == answer(model, one, two, ASKED)
    assert run(file, "{} {}", "-i", one, "-i", one).stdout == answer(model, one, " ", one)
    with_system = run(file, ASKED, "-i", one, "--system", "Be brief.", "--show-prompt")
    assert f"user\nBe brief.\n\n\n\n{rows}\n\n{ASKED}<end_of_turn>" in with_system.stderr


def test_as_json(file: Path, pictures: list[Path]) -> None:
    plain, figures = run(file, ASKED, "-i", pictures[0]), run(file, ASKED, "-i", pictures[0], "--json")
    told = json.loads(figures.stdout)
    assert told["text"] + "\n" == plain.stdout
    assert told["prompt_tokens"] > 16


@pytest.mark.parametrize(
    ("prompt", "n", "words"),
    [
        ("{} and {}", 1, "the prompt has {} 2 times, and --image is given 1 times"),
        ("{}", 3, "the prompt has {} 1 times, and --image is given 3 times"),
    ],
)
def test_as_many_places_as_pictures(prompt: str, n: int, words: str, file: Path, pictures: list[Path]) -> None:
    assert words in run(file, prompt, *[arg for one in pictures[:n] for arg in ("-i", one)], code=2).stderr


def test_braces_without_pictures_are_text(file: Path) -> None:
    assert "user\nWhat is {}?<end_of_turn>" in run(file, "What is {}?", "--show-prompt").stderr


def test_no_such_pictures(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("Dear reader,")
    wrong = {
        "no.png": "cannot be read: No such file",
        "empty.png": "is empty, expected one of PNG",
        "text.png": "begins with b'Dear rea'",
        ".": "is no file",
    }
    for name, words in wrong.items():
        done = run(file, ASKED, "-i", tmp_path / name, code=1)
        assert words in done.stderr
        assert done.stdout == ""


def test_a_model_that_sees_nothing(file: Path, pictures: list[Path], tmp_path: Path) -> None:
    alone = Path(shutil.copy(file, tmp_path / "alone.gguf"))
    words = f"{pictures[0].name}: this model sees no pictures: there is no vision tower"
    assert words in run(alone, ASKED, "-i", pictures[0], code=1).stderr
    eye = file.with_name(f"mmproj-{file.name}")
    assert run(alone, ASKED, "-i", pictures[0], "--vision", eye).stdout == run(file, ASKED, "-i", pictures[0]).stdout
    for name in ("mmproj-BF16.gguf", "mmproj-F16.gguf"):
        shutil.copy(eye, tmp_path / name)
    assert "has 2 files of vision towers" in run(alone, ASKED, "-i", pictures[0], code=1).stderr
    assert run(alone, "How are you?").stdout == run(file, "How are you?").stdout
    (tmp_path / "mmproj-alone.gguf").write_bytes(eye.read_bytes()[:-100_000])
    assert "mmproj-alone.gguf: invalid model file" in run(alone, ASKED, "-i", pictures[0], code=1).stderr


# --- chat


def chat(file: Path, *lines: object, options: tuple[object, ...] = ()) -> Result:
    return bezel("chat", file, "--temp", 0, "-n", 24, *options, stdin="\n".join(map(str, lines)) + "\n")


def test_an_image_goes_with_the_next_message(file: Path, model: Model, pictures: list[Path]) -> None:
    one, two = pictures[:2]
    found = chat(file, f"/image {one}", ASKED, f'/image "{two}"', ASKED, "/undo", ASKED)
    assert f"image: {one.name}, 112 × 112; it goes with your next message" in found.stderr
    talk = model.conversation()
    greedy = Sampling(temperature=0)
    told = ["".join(talk.ask([Image(path), ASKED], greedy, 24)) for path in (one, two)]
    talk.undo()
    told.append("".join(talk.ask(ASKED, greedy, 24)))  # after the first picture, which it is still about
    assert found.stdout == "".join(f"{text}\n" for text in told)
    assert "1 exchange left" in found.stderr


def test_several_images_and_other_ways_to_write_a_path(file: Path, model: Model, pictures: list[Path]) -> None:
    one, two = pictures[:2]
    escaped = str(two).replace(" ", "\\ ")
    found = chat(file, f"/image '{one}'", f"/image {escaped}", "/context", "Which?", "/regenerate")
    want = answer(model, one, two, "Which?")
    assert found.stdout == want * 2
    assert "0 of 1024 tokens" in found.stderr


def test_a_chat_outlives_pictures_that_are_none(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("Dear reader,")
    found = chat(
        file, f"/image {tmp_path}/no.png", f"/image {tmp_path}/text.png", "/image", f"/image {tmp_path}", ASKED
    )
    assert found.stderr.count("error: ") == 3
    assert "no picture waits; /image FILE shows one" in found.stderr
    assert "it goes with your next message" not in found.stderr
    assert found.stdout.endswith(chat(file, ASKED).stdout)


def test_a_picture_that_no_answer_came_to_is_still_there(file: Path, pictures: list[Path]) -> None:
    """A message that does not fit takes its pictures with it neither into the chat nor out of reach."""
    long = " ".join(["colour"] * 200)
    found = chat(file, f"/image {pictures[0]}", long, "/context", ASKED, options=("--context", 80))
    assert "error: " in found.stderr
    assert "0 of 80 tokens" in found.stderr
    assert found.stdout.strip() == chat(file, f"/image {pictures[0]}", ASKED).stdout.strip()


def test_a_chat_without_an_eye_says_so_at_once(file: Path, pictures: list[Path], tmp_path: Path) -> None:
    alone = Path(shutil.copy(file, tmp_path / "alone.gguf"))
    found = chat(alone, f"/image {pictures[0]}", "How are you?")
    assert "error: " in found.stderr
    assert "this model sees no pictures: there is no vision tower" in " ".join(found.stderr.split())
    assert found.stdout == chat(file, "How are you?").stdout


def test_a_saved_chat_goes_on_with_its_picture(file: Path, pictures: list[Path], tmp_path: Path) -> None:
    save = tmp_path / "s.session"
    whole = chat(file, f"/image {pictures[0]}", ASKED, f"/save {save}", "What is it?")
    found = chat(file, f"/load {save}", "What is it?")
    assert "> [a saved picture] " + ASKED in found.stderr
    assert found.stdout == whole.stdout.splitlines(keepends=True)[1]


def test_pictures_can_be_taken_back(file: Path, pictures: list[Path]) -> None:
    one, two = pictures[:2]
    blind = chat(file, ASKED).stdout
    assert chat(file, f"/image {one}", "/reset", ASKED).stdout == blind
    found = chat(file, f"/image {one}", f"/image {two}", "/image", "/image", ASKED)
    assert found.stdout == blind
    told = " ".join(found.stderr.split())
    assert f"taken back: {one.name}, {two.name}" in told
    assert told.count("no picture waits") == 1


def test_another_eye_goes_on_with_a_saved_chat(file: Path, pictures: list[Path], tmp_path: Path) -> None:
    """What the first eye saw was saved; without one at all the chat says why it cannot go on."""
    chat(file, f"/image {pictures[0]}", ASKED, f"/save {tmp_path}/s")
    eye = tmp_path / "mmproj-e.gguf"
    with open_checkpoint(BUNDLED) as source, export_vision(source, tmp_path / "e.gguf", preset("q4_0", 4)):
        pass
    again = chat(file, f"/load {tmp_path}/s", "/regenerate", f"/image {pictures[0]}", ASKED, options=("--vision", eye))
    assert again.stdout.split() == [colour(pictures[0])] * 2
    alone = Path(shutil.copy(file, tmp_path / "alone.gguf"))
    eye.unlink()
    blind = chat(alone, f"/load {tmp_path}/s", "/context")
    assert "holds pictures, and this model sees none" in " ".join(blind.stderr.split())
    assert "0 of 1024 tokens" in blind.stderr


def test_a_full_context_drops_pictures_too(file: Path, pictures: list[Path]) -> None:
    asked = [line for one in pictures * 2 for line in (f"/image {one}", ASKED)]
    found = chat(file, *asked, "/regenerate", "/context", options=("--context", 90, "--on-full", "slide"))
    assert "context full: dropped the oldest" in found.stderr
    assert found.stdout.split() == [colour(one) for one in [*pictures * 2, pictures[-1]]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_eye_that_is_damaged_is_blamed_itself(
    value: float, file: Path, pictures: list[Path], tmp_path: Path
) -> None:
    eye = Path(shutil.copy(file.with_name(f"mmproj-{file.name}"), tmp_path / "eye.gguf"))
    with VisionFile(eye) as opened:
        at = opened.info("v.blk.0.ln1.weight").offset
    raw = bytearray(eye.read_bytes())
    raw[at : at + 4] = np.float32(value).tobytes()
    eye.write_bytes(raw)
    for engine in ("native", "reference"):
        done = run(file, ASKED, "-i", pictures[0], "--vision", eye, "--engine", engine, code=1)
        assert "eye.gguf: invalid model file: what it makes of a picture is not finite" in done.stderr
        assert "Warning" not in done.stderr
    found = chat(file, f"/image {pictures[0]}", ASKED, "/context", "/reset", ASKED, options=("--vision", eye))
    assert "0 of 1024 tokens" in found.stderr
    assert found.stdout == chat(file, ASKED).stdout


def test_ctrl_c_while_a_picture_is_looked_at(file: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops at once, not once the picture is seen; a chat goes on, and still has the picture."""
    whole, stops = Tower.rows, [True]

    def rows(self: Tower, pixels: np.ndarray) -> np.ndarray:
        if stops and stops.pop():
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("was not stopped")
        return whole(self, pixels)

    monkeypatch.setattr(Tower, "rows", rows)
    done = run(file, ASKED, "-i", pictures[0], code=130)
    assert done.stdout == ""
    stops.append(True)
    found = chat(file, f"/image {pictures[0]}", ASKED, "/context", ASKED)
    assert "stopped" in found.stderr
    assert "0 of 1024 tokens" in found.stderr
    assert found.stdout.split() == [colour(pictures[0])]


def test_looking_is_told_on_a_terminal(model: Model, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    image = Image(PIL.Image.open(pictures[0]).rotate(90))  # which the model has not seen
    image.name = "a\x1b[2Jb.png"
    ids = model.prompt_ids([image, "What?"])
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    generate.look_at_pictures(model, ids)
    generate.look_at_pictures(model, ids)  # which needs no look any more
    assert terminal.getvalue() == "\r\x1b[Klooking at a\\x1b[2Jb.png\r\x1b[K"


def test_an_onnx_folder_without_an_eye_says_so(onnx_of: Callable[..., Path], pictures: list[Path]) -> None:
    done = run(onnx_of("demo", "int8"), ASKED, "-i", pictures[0], code=1)
    assert "this model sees no pictures: there is no vision tower, vision.onnx, in its folder" in done.stderr


# --- inspect


def test_inspect_shows_an_eye(file: Path) -> None:
    eye = file.with_name(f"mmproj-{file.name}")
    facts = json.loads(bezel("inspect", eye, "--json").stdout)
    assert facts["family"] == "gemma3"
    assert {key: facts["config"][key] for key in ("image_size", "patches", "rows", "layers", "hidden_size")} == {
        "image_size": 112,
        "patches": 64,
        "rows": 16,
        "layers": 4,
        "hidden_size": 128,
    }
    assert facts["weight_bytes"] == sum(tensor["bytes"] for tensor in facts["tensors"])
    assert facts["weight_bytes"] == sum(row["bytes"] for row in facts["formats"].values())
    assert set(facts["formats"]) == {"q8_0", "f32"}
    shown = bezel("inspect", eye, "--tensors").stdout
    assert "the eye of a gemma3 model" in shown
    assert "16 rows" in shown
    assert "v.blk.3.ffn_down.weight" in shown
    assert bezel("inspect", eye, "--context", 5, code=1)


def test_inspect_shows_the_eye_beside_a_model(file: Path, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    eye = file.with_name(f"mmproj-{file.name}")
    beside = json.loads(bezel("inspect", file, "--json").stdout)["vision"]
    assert beside == json.loads(bezel("inspect", eye, "--json").stdout)
    assert f"{eye.name}: 0.8 MiB q8_0" in bezel("inspect", file).stdout
    blind = Path(shutil.copy(gguf_of("demo", "q4_0"), tmp_path / "blind.gguf"))
    assert json.loads(bezel("inspect", blind, "--json").stdout)["vision"] is None
    assert "Pictures" not in bezel("inspect", blind).stdout
    for n, words in ((1, "belong to different models"), (2, "has 2 files of vision towers")):
        raw = eye.read_bytes().replace(
            b"clip.vision.projection_dim\x04\0\0\0\0\1", b"clip.vision.projection_dim\x04\0\0\0\0\2"
        )
        assert raw != eye.read_bytes()
        (tmp_path / f"mmproj-{n}.gguf").write_bytes(raw)
        assert words in json.loads(bezel("inspect", blind, "--json").stdout)["vision"]["error"]
        assert words in bezel("inspect", blind).stdout


def test_an_eye_is_no_model(file: Path) -> None:
    done = run(file.with_name(f"mmproj-{file.name}"), "Hello!", code=1)
    assert "this is the vision tower of a model" in done.stderr


def test_an_eye_that_is_left_alone_is_told(shapes_of: Callable[..., Path], tmp_path: Path) -> None:
    """Neither a check nor a copy of the model's file alone may look like one of both."""
    file = shapes_of("f32")
    found = CliRunner().invoke(main, ["verify", str(file), "--source", str(BUNDLED)])
    assert found.exit_code == 0, found.output
    assert f"mmproj-{file.name} was not compared" in found.stderr
    found = CliRunner().invoke(main, ["export", str(file), str(tmp_path / "x.gguf"), "--quant", "q8_0", "--requantize"])
    assert found.exit_code == 0, found.output
    assert f"mmproj-{file.name} is not read: a copy of it as mmproj-x.gguf fits" in found.stderr
    shutil.copy(file.with_name(f"mmproj-{file.name}"), tmp_path / "mmproj-x.gguf")
    with load(tmp_path / "x.gguf") as model:
        assert model.eye is not None


def test_an_eye_in_a_folder_is_told(seeing_onnx_of: Callable[..., Path], shapes_of: Callable[..., Path]) -> None:
    found = CliRunner().invoke(main, ["verify", str(seeing_onnx_of("shapes")), "--source", str(shapes_of("f32"))])
    assert found.exit_code == 0, found.output
    assert f"vision.onnx was not compared: {shapes_of('f32')} has no vision tower" in found.stderr
