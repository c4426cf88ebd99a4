"""`bezel pull` of GGUF files that see: the eye comes with its model, and the right one of several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("huggingface_hub")

import PIL.Image
from bezel.export.gguf.vision import export_vision
from bezel.export.hub.choice import eye_of, gguf_choices
from bezel.export.hub.client import HubFile, HubRepo
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.recipes import preset
from bezel.runtime import load
from bezel.runtime.commands.main import main
from bezel.runtime.files.models import find_model
from gguf_files import split
from hub_server import Hub, Repo
from seeing import drawn, write_seeing

NAME = "somebody/shapes-GGUF"


def bezel(*args: object) -> str:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def repo(hub: Hub, shapes_of: Callable[..., Path]) -> Repo:
    """As people upload them: one model in several formats, and its eye in several."""
    model = shapes_of()
    eye = model.with_name(f"mmproj-{model.name}").read_bytes()
    files = {"shapes-Q8_0.gguf": model.read_bytes(), "mmproj-model-f16.gguf": eye, "mmproj-F32.gguf": b"x"}
    hub.repos[NAME] = Repo(files)
    return hub.repos[NAME]


def test_the_eye_comes_with_its_model(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    said = bezel("pull", NAME)
    assert "2 files" in said
    assert "it sees with mmproj-model-f16.gguf" in said
    assert hub.fetched() == ["shapes-Q8_0.gguf", "mmproj-model-f16.gguf"]
    file = find_model(NAME)
    assert file.name == "shapes-Q8_0.gguf"
    assert file.with_name("mmproj-shapes-Q8_0.gguf").read_bytes() == repo.files["mmproj-model-f16.gguf"]
    PIL.Image.fromarray(drawn(1)).save(tmp_path / "a.png")
    assert bezel("run", NAME, "What is it?", "-i", tmp_path / "a.png", "-n", 4)
    assert json.loads(bezel("list", "--json"))[0]["bytes"] == sum(len(repo.files[name]) for name in hub.fetched())
    hub.requests.clear()
    assert "was there, and is the newest" in bezel("pull", NAME)
    assert not hub.fetched()
    repo.files["mmproj-model-f16.gguf"] += bytes(32)  # a new one is news
    bezel("pull", NAME)
    assert file.with_name("mmproj-shapes-Q8_0.gguf").read_bytes() == repo.files["mmproj-model-f16.gguf"]


def test_a_model_in_parts_sees_too(repo: Repo, shapes_of: Callable[..., Path], tmp_path: Path) -> None:
    parts = split(shapes_of(), tmp_path, 2)
    repo.files = {f"Q8_0/{path.name}": path.read_bytes() for path in parts} | {
        "mmproj-F16.gguf": repo.files["mmproj-model-f16.gguf"]
    }
    bezel("pull", NAME)
    with load(NAME) as model:
        assert model.eye is not None


@pytest.mark.parametrize("what", ["damaged", "another model's"])
def test_an_eye_that_does_not_fit_is_left_out(what: str, repo: Repo, tmp_path: Path) -> None:
    if what == "damaged":
        repo.files["mmproj-model-f16.gguf"] = b"GGUF" + bytes(100)
    else:
        folder = write_seeing(tmp_path / "other", "gemma3")
        with open_checkpoint(folder) as source, export_vision(source, tmp_path / "o.gguf", preset("f32", 2)):
            pass
        repo.files["mmproj-model-f16.gguf"] = (tmp_path / "mmproj-o.gguf").read_bytes()
    assert "it will see no pictures: " in bezel("pull", NAME)
    assert [path.name for path in find_model(NAME).parent.glob("*.gguf")] == ["shapes-Q8_0.gguf"]
    assert bezel("run", NAME, "Hello!", "-n", 4)
    assert "was there, and is the newest" in bezel("pull", NAME)


F16, BF16, F32, Q8, Q4 = (f"mmproj-{form}.gguf" for form in ("F16", "BF16", "F32", "Q8_0", "Q4_0"))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([BF16, F32, F16, Q8, Q4], F16),
        ([F32, Q8, BF16], BF16),
        ([F32, Q4, Q8], Q8),
        ([Q4, F32], F32),
        (["mmproj.gguf"], "mmproj.gguf"),
        (["x.mmproj-f16.gguf", BF16], "x.mmproj-f16.gguf"),
        ([F16, f"q/{BF16}"], f"q/{BF16}"),  # nearer
        ([f"other/{F16}"], None),
        (["mmproj-other-f16.gguf", "mmproj-model-f16.gguf"], "mmproj-model-f16.gguf"),
        (["mmproj-F16.gguf.txt"], None),
        ([], None),
    ],
)
def test_which_eye_it_is(others: list[str], expected: str | None) -> None:
    files = [HubFile(path, 5, "0") for path in ("q/model-Q4_0.gguf", *others)]
    repo = HubRepo("a/b", "0", tuple(files))
    (choice,) = gguf_choices(repo)
    found = eye_of(repo, choice)
    assert (found and found.path) == expected
