"""Models by name: the models folder, what names stand for, and what is taken out of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bezel.runtime import load
from bezel.runtime.commands import models as commands
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files import models
from bezel.runtime.files.models import RepoName, find_model, models_folder, named_models, own_eye, short_names
from click.shell_completion import BashComplete
from click.testing import CliRunner
from tiny import DEMO


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder, beside the working directory."""
    monkeypatch.setenv("BEZEL_MODELS", str(tmp_path / "models"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def put(folder: Path, name: str, content: bytes = b"GGUF", **note: str) -> Path:
    place = folder / name
    place.mkdir()
    (place / "model.gguf").write_bytes(content)
    (place / "bezel.json").write_text(json.dumps(note))
    return place / "model.gguf"


def bezel(*args: object, stdin: str = "", ok: bool = True) -> str:
    done = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    assert (done.exit_code == 0) == ok, done.output
    assert "fault of bezel" not in done.output
    return done.output


def test_a_name_opens_what_lies_there(folder: Path) -> None:
    one = put(folder, "google--gemma--q4_k_m")
    assert find_model("google/gemma:q4_k_m") == find_model("google/gemma") == find_model("Google/Gemma:Q4_K_M") == one
    two = put(folder, "google--gemma--q8_0")
    assert find_model("google/gemma:q8_0") == two
    with pytest.raises(InvalidRequest, match="say which: google/gemma:q4_k_m, google/gemma:q8_0"):
        find_model("google/gemma")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the file system takes these for one")
def test_the_case_of_letters_tells_two_models_apart(folder: Path) -> None:
    ours, theirs = put(folder, "a--b--q4_k_m"), put(folder, "a--b--Q4_K_M")
    assert find_model("a/b:q4_k_m") == ours
    assert find_model("a/b:Q4_K_M") == theirs


def test_a_kept_checkpoint_counts_last(folder: Path) -> None:
    place = folder / "google--gemma--checkpoint"
    shutil.copytree(DEMO, place / "gemma")
    assert find_model("google/gemma") == find_model("google/gemma:checkpoint") == place / "gemma"
    one = put(folder, "google--gemma--q4_k_m")
    assert find_model("google/gemma") == one


def test_parts_are_one_model(folder: Path) -> None:
    first = put(folder, "a--b--Q8_0").rename(folder / "a--b--Q8_0" / "b-00001-of-00002.gguf")
    first.with_name("b-00002-of-00002.gguf").write_bytes(b"12345")
    assert find_model("a/b:q8_0") == first
    assert [model.file_bytes for model in named_models()] == [9]


def test_a_file_that_the_user_put_there(folder: Path) -> None:
    (folder / "mine.gguf").write_bytes(b"GGUF")
    assert find_model("mine") == folder / "mine.gguf"
    for other in ("notes.txt", ".hidden.gguf", "a b.gguf", "x\x1b[2J.gguf"):
        (folder / other).write_bytes(b"")
    (folder / ".a--b.part").mkdir()
    (folder / "a--b--half").mkdir()  # nothing in it
    assert [model.name for model in named_models()] == ["mine"]


def test_an_eye_is_no_model_and_goes_with_its_own(folder: Path) -> None:
    before = {model.name for model in named_models()}
    for name, size in (("mine.gguf", 1000), ("mmproj-mine.gguf", 500), ("mmproj-other.gguf", 100)):
        (folder / name).write_bytes(bytes(size))
    assert {model.name for model in named_models()} == before | {"mine"}
    assert next(model for model in named_models() if model.name == "mine").file_bytes == 1500
    bezel("rm", "mine", "--yes")
    assert not (folder / "mine.gguf").exists()
    assert not (folder / "mmproj-mine.gguf").exists()
    assert (folder / "mmproj-other.gguf").exists()


def test_a_model_s_own_eye(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine.gguf", "mmproj-mine.gguf", "blind.gguf", "mmproj-gone.gguf", "mmproj-onnx"):
        (folder / name).write_bytes(b"")
    (folder / "onnx").mkdir()
    found = {name: own_eye(folder / name) for name in ("mine.gguf", "blind.gguf", "gone.gguf", "onnx")}
    assert found == {"mine.gguf": folder / "mmproj-mine.gguf", "blind.gguf": None, "gone.gguf": None, "onnx": None}
    monkeypatch.chdir(folder)
    assert own_eye(Path(".")) is None


def test_a_path_comes_first(folder: Path) -> None:
    put(folder, "google--gemma--q4_k_m")
    (folder / "mine.gguf").write_bytes(b"GGUF")
    Path("google").mkdir()
    for path in ("google/gemma", "mine", "google/gemma:q4_k_m"):
        Path(path).write_text("")
        assert find_model(path) == Path(path)


def test_a_mistyped_name(folder: Path) -> None:
    put(folder, "google--gemma-3-1b-it--q4_k_m")
    with pytest.raises(InvalidRequest, match=r"did you mean google/gemma-3-1b-it\?"):
        find_model("google/gema-3-1b-it")
    with pytest.raises(InvalidRequest, match=r"; `bezel pull who/what` would fetch it"):
        find_model("who/what")
    for path in ("other.gguf", "no/such/folder", "x/model.gguf"):  # more likely paths
        assert find_model(path) == Path(path)


NO_NAMES = ["../x", "/etc/passwd", "a/../b", "a/..", "a", "a/b/c", "a/b:", "a/b:c/d", "a/b:..", "a\0/b", "a/b\n"]
NO_NAMES += ["a/\x1b[2J", "a--b/c", "a/b--c", "-a/b", ".a/b", "a/.b", "a/b.", "a\\b/c", "ä/b", f"a/{'b' * 300}", "C:/b"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no name of a model"):
        RepoName.parse(name)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    put(folder, "a--b--c")
    said = bezel("rm", "--yes", "--", name, ok=False)
    assert "no such model" in said
    assert "\x1b" not in said
    assert (tmp_path / "x.gguf").exists()
    assert len(named_models()) == 1


def test_the_folder_is_where_the_platform_has_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BEZEL_MODELS", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert models_folder() == tmp_path / ".local/share/bezel/models"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert models_folder() == tmp_path / "data/bezel/models"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert models_folder() == tmp_path / "Library/Application Support/bezel/models"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert models_folder() == tmp_path / "local/bezel/models"


# --- the commands


def test_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "installed", list)  # models that packages brought
    assert "no models in" in bezel("list")
    assert json.loads(bezel("list", "--json")) == []
    put(
        folder,
        "google--gemma--q4_k_m",
        bytes(2_300_000),
        repo="google/gemma",
        commit="0123456789",
        pulled="2026-11-27T",
    )
    put(folder, "a--b--Q8_0", repo="\a\x1b[2J", commit="\a", pulled="\a")  # a note that was tampered with
    (folder / "mine.gguf").write_bytes(b"GGUF")
    (folder / ".who--what.part").mkdir()
    shown = bezel("list")
    assert "google/gemma:q4_k_m  2 MB  q4_k_m  google/gemma@01234567  2026-11-27" in shown
    assert "mine" in shown
    assert "\a" not in shown
    assert "\x1b" not in shown
    assert "not fetched to the end: who/what" in shown
    facts = json.loads(bezel("list", "--json"))
    assert [model["name"] for model in facts] == ["a/b:Q8_0", "google/gemma:q4_k_m", "mine"]
    assert (facts[1]["bytes"], facts[1]["repo"], facts[2]["repo"]) == (2_300_000, "google/gemma", None)


def test_rm_asks(folder: Path) -> None:
    put(folder, "google--gemma--q4_k_m")
    assert "kept" in bezel("rm", "google/gemma", stdin="n\n")
    assert "Aborted" in bezel("rm", "google/gemma", ok=False)  # end of input
    assert len(named_models()) == 1
    bezel("rm", "google/gemma", stdin="y\n")
    assert not list(folder.iterdir())


def test_rm_that_is_broken_off_leaves_no_half_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "google--gemma--q4_k_m")

    def broken_off(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models.shutil, "rmtree", broken_off)
        bezel("rm", "google/gemma", "--yes", ok=False)
    assert not named_models()
    put(folder, "google--gemma--q4_k_m")
    bezel("rm", "google/gemma", "--yes")  # and what was left goes with the next
    assert not list(folder.iterdir())


def test_rm_takes_what_was_not_fetched_to_the_end(folder: Path) -> None:
    (folder / ".who--what.part" / "x").mkdir(parents=True)
    bezel("rm", "who/what", "--yes")
    assert not list(folder.iterdir())


def test_rm_takes_the_link_and_not_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    elsewhere = put(tmp_path, "elsewhere")
    (folder / "a--b--c").symlink_to(elsewhere.parent)
    (folder / "mine.gguf").symlink_to(elsewhere)
    bezel("rm", "a/b", "mine", "--yes")
    assert not list(folder.iterdir())
    assert elsewhere.exists()


def test_rm_of_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    put(folder, "google--gemma--q4_k_m")
    (tmp_path / "here" / "x.gguf").write_bytes(b"GGUF")
    assert "did you mean google/gemma?" in bezel("rm", "google/gema", "--yes", ok=False)
    for path in ("x.gguf", "./x.gguf", tmp_path / "here" / "x.gguf"):
        assert "no such model" in bezel("rm", path, "--yes", ok=False)


def test_every_command_takes_a_name(folder: Path, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    """The verbs that open a model, each in its own way; the rest share their ways."""
    shutil.copytree(DEMO, folder / "a--b--checkpoint" / "b")
    shutil.copy(gguf_of("demo", "q8_0"), put(folder, "a--b--q8_0"))
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a king who had three sons. " * 20)
    rest = ("--text", text, "--chunk", 64, "--state", tmp_path / "state")
    assert bezel("run", "a/b", "Once", "--raw", "-n", 4)
    assert "/reset" in bezel("chat", "a/b", stdin="/help\n")
    assert "model.gguf" in bezel("inspect", "a/b")
    assert "all as expected" in bezel("verify", "a/b", "--source", "a/b:checkpoint")
    assert "kld" in bezel("measure", "a/b@kv=int8", "--reference", "a/b:checkpoint", *rest, "--json")
    assert "q4_0" in bezel("sensitivity", "a/b:checkpoint", "--formats", "q4_0", "--chunks", 1, "--by", "layer", *rest)
    assert "MB in" in bezel("export", "a/b:checkpoint", tmp_path / "out.gguf", "--quant", "q4_0")
    speed = ("--context", 40, "--repeats", 1, "--save", tmp_path)
    assert "decode" in bezel("bench", "a/b", *speed, "--json")
    with load("a/b") as model:
        assert model.file.path == folder / "a--b--q8_0" / "model.gguf"
    assert "did you mean a/b" in bezel("run", "a/bb", "Once", ok=False)


def test_the_shell_completes_names(folder: Path) -> None:
    put(folder, "google--gemma--q4_k_m")
    for tag in ("q4_0", "q8_0"):
        put(folder, f"who--what--{tag}")
    assert [name for name in short_names() if "/" in name] == ["google/gemma", "who/what:q4_0", "who/what:q8_0"]

    def completed(*words: str) -> list[tuple[str, str]]:
        found = BashComplete(main, {}, "bezel", "_BEZEL_COMPLETE").get_completions(list(words[:-1]), words[-1])
        return [(item.type, item.value) for item in found]

    assert completed("rm", "goo") == [("plain", "google/gemma")]
    # A path may be meant, too; bash forgets what comes before it.
    for words in (["run"], ["chat"], ["inspect"], ["verify"], ["measure"], ["tasks"], ["verify", "x", "--source"]):
        assert completed(*words, "goo") == [("file", "goo"), ("plain", "google/gemma")]
    for verb in ("export", "calibrate", "sensitivity", "bench"):
        assert ("plain", "google/gemma") in completed(verb, "goo")
