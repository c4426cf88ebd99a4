"""`bezel pull`, against a hub of its own."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("huggingface_hub")

import huggingface_hub
from bezel.export.commands.progress import DownloadLine, progress_bar
from bezel.export.gguf.writer import export_gguf
from bezel.export.hub import client
from bezel.export.hub import pull as pull_module
from bezel.export.sources.folder import TEXT_FILES
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime.commands.main import main
from bezel.runtime.files.models import find_model, named_models, unfinished
from gguf_files import edited, split, write_gemma2
from hub_server import Hub, Repo, folder_files
from huggingface_hub import constants
from signals import heed_interrupts
from tiny import DEMO

NAME, GGUF = "google/fairy", "somebody/fairy-GGUF"
COMMAND = [sys.executable, "-c", "from bezel.runtime.commands.main import main; main(prog_name='bezel')"]
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(hub: Hub) -> Hub:
    """The demo as a checkpoint."""
    hub.repos[NAME] = Repo(folder_files(DEMO) | {"README.md": b"x", "pytorch_model.bin": b"x", "a/b.txt": b"x"})
    return hub


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def bezel(*args: object, ok: bool = True) -> str:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert (done.exit_code == 0) == ok, done.output
    assert "fault of bezel" not in done.output
    assert "\x1b" not in done.output
    assert TOKEN not in done.output
    return done.output


def names() -> list[str]:
    return [model.name for model in named_models()]


# --- checkpoints


def test_a_checkpoint_is_exported(hub: Hub, models: Path, tmp_path: Path) -> None:
    said = bezel("pull", NAME)
    assert "google/fairy: 5 files, 8 MB; exported as q4_k_m, about 3 MB" in said
    assert "google/fairy:q4_k_m: ready" in said
    # Each once, the config twice: it is looked into before anything else is fetched.
    assert sorted(hub.fetched()) == sorted([*folder_files(DEMO), "config.json"])
    assert hub.fetched()[0] == "config.json"
    with open_checkpoint(DEMO) as source:
        export_gguf(source, tmp_path / "own.gguf", "q4_k_m")
    file = find_model(NAME)
    assert file == models / "google--fairy--q4_k_m" / "fairy-q4_k_m.gguf"
    own = json.loads(bezel("inspect", tmp_path / "own.gguf", "--json"))
    theirs = json.loads(bezel("inspect", NAME, "--json"))
    assert theirs["provenance"]["sources"] == own["provenance"]["sources"]
    assert theirs["name"] == "fairy"
    assert file.read_bytes()[-1_000_000:] == (tmp_path / "own.gguf").read_bytes()[-1_000_000:]
    assert [path.name for path in models.iterdir()] == ["google--fairy--q4_k_m"]  # the checkpoint is gone
    listed = json.loads(bezel("list", "--json"))[0]
    assert (listed["name"], listed["repo"], listed["commit"]) == (f"{NAME}:q4_k_m", NAME, hub.repos[NAME].commit)


def test_the_newest_is_not_fetched_again(hub: Hub) -> None:
    bezel("pull", NAME)
    hub.requests.clear()
    assert "was there, and is the newest" in bezel("pull", NAME)
    hub.repos[NAME].files["README.md"] = b"another commit, and the same model"
    assert "was there, and is the newest" in bezel("pull", NAME)
    assert set(hub.fetched()) == {"config.json"}
    hub.repos[NAME].files["generation_config.json"] = b'{"temperature": 0.25}'
    bezel("pull", NAME)
    assert json.loads(bezel("inspect", NAME, "--json"))["sampling"]["temperature"] == 0.25
    assert names() == [f"{NAME}:q4_k_m"]


def test_a_kept_checkpoint_is_used_again(hub: Hub) -> None:
    bezel("pull", f"{NAME}:Q8_0", "--keep")
    assert names() == [f"{NAME}:checkpoint", f"{NAME}:q8_0"]
    hub.requests.clear()
    assert "the checkpoint was kept" in bezel("pull", NAME, "--quant", "Q4_0")
    assert set(hub.fetched()) == {"config.json"}
    assert names() == [f"{NAME}:checkpoint", f"{NAME}:q4_0", f"{NAME}:q8_0"]
    assert "all as expected" in bezel("verify", f"{NAME}:q4_0", "--source", f"{NAME}:checkpoint")
    bezel("rm", f"{NAME}:checkpoint", "--yes")
    bezel("pull", f"{NAME}:q4_0", "--keep")  # the model is there, and what it was made of is not
    assert f"{NAME}:checkpoint" in names()


def test_the_checkpoint_alone(hub: Hub) -> None:  # noqa: ARG001
    bezel("pull", f"{NAME}:checkpoint")
    assert names() == [f"{NAME}:checkpoint"]
    assert folder_files(find_model(NAME)) == folder_files(DEMO)
    assert "was there" in bezel("pull", f"{NAME}:checkpoint")


def test_a_recipe_file(hub: Hub) -> None:  # noqa: ARG001
    Path("my recipe.json").write_text('{"bezel_recipe": 1, "default": "q8_0", "rules": []}')
    bezel("pull", NAME, "--quant", "my recipe.json")
    Path("my recipe.json").write_text('{"bezel_recipe": 1, "default": "q4_0", "rules": []}')
    bezel("pull", NAME, "--quant", "my recipe.json")  # which has changed
    assert names() == [f"{NAME}:my-recipe"]
    assert "q4_0" in json.loads(bezel("inspect", NAME, "--json"))["formats"]


def test_shards(hub: Hub) -> None:
    files = hub.repos[NAME].files
    whole = files.pop("model.safetensors")
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    data = whole[8 + length :]
    weight_map = {}
    for i, some in enumerate((list(header)[:20], list(header)[20:]), 1):
        shard, own, content = f"model-0000{i}-of-00002.safetensors", {}, b""
        for name in some:
            begin, end = header[name]["data_offsets"]
            own[name] = header[name] | {"data_offsets": [len(content), len(content) + end - begin]}
            content += data[begin:end]
            weight_map[name] = shard
        text = json.dumps(own).encode()
        files[shard] = len(text).to_bytes(8, "little") + text + content
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    files["other-00001-of-00002.safetensors"] = b"not named"
    bezel("pull", NAME)
    assert "other-00001-of-00002.safetensors" not in hub.fetched()
    del files["model-00002-of-00002.safetensors"]
    assert "model-00002-of-00002.safetensors is not there, though" in bezel("pull", f"{NAME}:q8_0", ok=False)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": "../../x.safetensors"}}).encode()
    assert "expected the name of a file in the folder" in bezel("pull", f"{NAME}:q8_0", ok=False)


def test_all_that_an_export_reads_is_fetched(hub: Hub, tmp_path: Path) -> None:
    files = hub.repos[NAME].files
    files["chat_template.jinja"] = b"{{ x }}"
    bezel("pull", f"{NAME}:checkpoint")
    for name in files:
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(files[name])
    with open_checkpoint(tmp_path / "all") as whole, open_checkpoint(find_model(NAME)) as fetched:
        assert {path.name for path in whole.files} == {path.name for path in fetched.files}
        assert fetched.chat_template == "{{ x }}"
        assert fetched.generation_config == whole.generation_config
    assert {*TEXT_FILES} >= {path.name for path in whole.files} - {"config.json", "model.safetensors"}


def test_what_is_not_supported_is_told_before_it_is_fetched(hub: Hub, models: Path) -> None:
    files = hub.repos[NAME].files
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"model_type": "llama"}).encode()
    said = bezel("pull", NAME, ok=False)
    assert "google/fairy: config.json: " in said
    assert "'llama'" in said
    assert hub.fetched() == ["config.json"]
    assert not list(models.iterdir())


def test_pickles_are_refused(hub: Hub, models: Path) -> None:
    del hub.repos[NAME].files["model.safetensors"]
    said = bezel("pull", NAME, ok=False)
    assert "found pytorch_model.bin, expected model.safetensors" in said
    hub.repos[NAME].files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    assert "this is an adapter" in bezel("pull", NAME, ok=False)
    hub.repos[NAME].files = {"README.md": b""}
    assert "there is no model in it" in bezel("pull", NAME, ok=False)
    assert not hub.fetched()
    assert not list(models.iterdir())


def test_a_revision(hub: Hub) -> None:
    hub.repos[NAME].revisions = ("main", "refs/pr/1")
    bezel("pull", NAME, "--revision", "refs/pr/1")
    assert json.loads(bezel("list", "--json"))[0]["revision"] == "refs/pr/1"
    said = bezel("pull", NAME, "--revision", "x\x1b[2J", ok=False)
    assert "has no revision 'x\\x1b[2J'" in said


# --- GGUF files


@pytest.fixture
def ggufs(hub: Hub, gguf_of: Callable[..., Path], tmp_path: Path) -> Repo:
    whole = gguf_of("demo", "q8_0").read_bytes()
    (tmp_path / "parts").mkdir()
    parts = split(gguf_of("demo", "q8_0"), tmp_path / "parts", 3)
    files = {f"F16/{path.name}": path.read_bytes() for path in parts}
    files |= {"fairy-Q8_0.gguf": whole, "fairy.i1-UD-IQ4_XS.gguf": whole, "imatrix.gguf": b"x", "README.md": b"x"}
    hub.repos[GGUF] = Repo(files)
    return hub.repos[GGUF]


def test_one_of_several_gguf_files(hub: Hub, ggufs: Repo) -> None:
    for name in (GGUF, f"{GGUF}:Q2_K"):
        said = bezel("pull", name, ok=False)
        assert "say which of its GGUF files" in said
        for tag in ("F16", "Q8_0", "UD-IQ4_XS"):
            assert f"\n  {GGUF}:{tag}  5 MB" in said
    assert not hub.fetched()
    assert "1 file, 5 MB" in bezel("pull", f"{GGUF}:q8_0")
    assert names() == [f"{GGUF}:Q8_0"]
    assert find_model(GGUF).read_bytes() == ggufs.files["fairy-Q8_0.gguf"]
    assert hub.fetched() == ["fairy-Q8_0.gguf"]
    assert bezel("run", f"{GGUF}:q8_0", "Once", "--raw", "-n", 4)
    assert "was there" in bezel("pull", f"{GGUF}:q8_0")


def test_a_gguf_file_in_parts(hub: Hub, ggufs: Repo) -> None:
    bezel("pull", f"{GGUF}:F16")
    assert find_model(GGUF).name == "demo-00001-of-00003.gguf"
    assert len(hub.fetched()) == 3
    assert bezel("run", GGUF, "Once", "--raw", "-n", 4)
    bezel("rm", GGUF, "--yes")
    del ggufs.files["F16/demo-00002-of-00003.gguf"]
    assert "has 2 of its 3 parts" in bezel("pull", f"{GGUF}:F16", ok=False)


def test_the_only_gguf_file(hub: Hub, ggufs: Repo) -> None:
    ggufs.files = {"some/folder/fairy.gguf": ggufs.files["fairy-Q8_0.gguf"]}
    bezel("pull", GGUF)
    assert names() == [f"{GGUF}:some-folder-fairy"]
    ggufs.files = {"fairy-Q8_0.gguf": ggufs.files["some/folder/fairy.gguf"]}
    hub.requests.clear()
    bezel("pull", GGUF)
    assert names() == [f"{GGUF}:Q8_0", f"{GGUF}:some-folder-fairy"]
    assert "say which" in bezel("pull", f"{GGUF}:Q4_0", ok=False)


def test_gguf_files_of_the_same_format(ggufs: Repo) -> None:
    ggufs.files = {f"{folder}-Q4_0.gguf": b"x" for folder in ("a/x", "b/x")} | {"x-Q8_0.gguf": b"x"}
    said = bezel("pull", GGUF, ok=False)
    for tag in ("a-x-Q4_0", "b-x-Q4_0", "Q8_0"):
        assert f"{GGUF}:{tag} " in said


@pytest.mark.parametrize("what", ["architecture", "format"])
def test_gguf_files_of_what_is_not_run(
    what: str, hub: Hub, ggufs: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by their beginning."""
    monkeypatch.setattr(pull_module, "_HEADER", 1_000_000)
    if what == "architecture":
        (tmp_path / "in.gguf").write_bytes(ggufs.files["fairy-Q8_0.gguf"])
        content = edited(tmp_path / "in.gguf", tmp_path / "out.gguf", {"general.architecture": "llama"}).read_bytes()
    else:
        name = b"blk.0.attn_q.weight"
        content = ggufs.files["fairy-Q8_0.gguf"]
        at = content.index(name) + len(name) + 4 + 2 * 8  # behind its shape
        content = content[:at] + (24).to_bytes(4, "little") + content[at + 4 :]  # I8
    ggufs.files["fairy-Q8_0.gguf"] = content
    said = bezel("pull", f"{GGUF}:Q8_0", ok=False)
    assert f"{GGUF}:Q8_0: " in said
    assert ("found the architecture 'llama'" if what == "architecture" else "is I8; bezel reads") in said
    assert [headers["range"] for host, _, headers in hub.requests if host == "other"] == ["bytes=0-999999"]
    assert not names()


def test_a_header_that_is_longer_than_any(ggufs: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "_HEADER", 1000)
    bezel("pull", f"{GGUF}:Q8_0")
    assert find_model(GGUF).read_bytes() == ggufs.files["fairy-Q8_0.gguf"]


def test_a_gguf_file_that_is_unsound_becomes_no_model(ggufs: Repo, tmp_path: Path) -> None:
    write_gemma2(tmp_path / "lacks.gguf", drop=("blk.1.ffn_up.weight",))
    for content in (b"GGUF" + bytes(1000), (tmp_path / "lacks.gguf").read_bytes()):
        ggufs.files["fairy-Q8_0.gguf"] = content
        assert "invalid model file" in bezel("pull", f"{GGUF}:Q8_0", ok=False)
        assert not names()


@pytest.mark.parametrize(("tag", "breaks"), [("Q8_0", [1_000_000, 2_000_000]), ("F16", [10**7, 10**7, 500_000])])
def test_gguf_files_that_break_off_go_on(
    tag: str, breaks: list[int], hub: Hub, ggufs: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning that was looked into is no more fetched again than the rest; nor is a part that is whole."""
    monkeypatch.setattr(pull_module, "_HEADER", 1_000_000)
    hub.break_after = [*breaks, *[0] * 100]
    bezel("pull", f"{GGUF}:{tag}", ok=False)
    hub.break_after = []
    hub.requests.clear()
    bezel("pull", f"{GGUF}:{tag}")
    begun = [int(headers["range"][6:].split("-")[0]) for host, _, headers in hub.requests if host == "other"]
    assert begun == ([3_000_000] if tag == "Q8_0" else [500_000, 0])
    assert bezel("run", GGUF, "Once", "--raw", "-n", 4)
    assert len(ggufs.files) == 7


def test_gguf_files_beside_a_checkpoint(hub: Hub, ggufs: Repo) -> None:
    hub.repos[NAME].files["fairy-Q5_0.gguf"] = ggufs.files["fairy-Q8_0.gguf"]
    bezel("pull", NAME)
    bezel("pull", f"{NAME}:q5_0")
    assert names() == [f"{NAME}:Q5_0", f"{NAME}:q4_k_m"]
    assert "expected one of" in bezel("pull", f"{NAME}:q9_0", ok=False)
    assert "leave one of them out" in bezel("pull", f"{NAME}:q8_0", "--quant", "q4_0", ok=False)
    assert "leave --quant and --keep out" in bezel("pull", f"{GGUF}:Q8_0", "--quant", "q4_0", ok=False)


# --- what breaks off, and what is not what it should be


def test_a_connection_that_breaks_off_is_taken_up(hub: Hub) -> None:
    hub.break_after = [10_000_000, 1_000_000, 1_000_000, 0, 0, 0, 3_000_000]
    bezel("pull", f"{NAME}:checkpoint")
    assert folder_files(find_model(NAME)) == folder_files(DEMO)
    ranges = [headers["range"] for host, path, headers in hub.requests if host == "other" and "model.saf" in path]
    assert [text.split("-")[0] for text in ranges[:3]] == ["bytes=0", "bytes=1000000", "bytes=2000000"]


def test_a_connection_that_brings_nothing_more(hub: Hub, models: Path) -> None:
    hub.break_after = [10_000_000, 5_000_000, *[0] * 100]
    said = bezel("pull", NAME, ok=False)
    assert "it broke off" in said
    assert "the same command goes on" in said
    assert list(unfinished()) == [NAME]
    assert "not fetched to the end: google/fairy" in bezel("list")
    hub.break_after = []
    hub.requests.clear()
    assert "of which 5 MB are there" in bezel("pull", NAME)
    assert [headers["range"] for host, _, headers in hub.requests if host == "other"] == ["bytes=5000000-8402319"]
    assert [path.name for path in models.iterdir()] == ["google--fairy--q4_k_m"]


def test_a_host_that_knows_no_ranges(hub: Hub) -> None:
    hub.knows_ranges = False
    hub.break_after = [10_000_000, 5_000_000]
    bezel("pull", f"{NAME}:checkpoint")
    assert folder_files(find_model(NAME)) == folder_files(DEMO)


def test_what_was_fetched_of_another_content_is_not_used(hub: Hub) -> None:
    hub.break_after = [10_000_000, 5_000_000, *[0] * 100]
    bezel("pull", f"{NAME}:checkpoint", ok=False)
    hub.break_after = []
    content = bytearray(hub.repos[NAME].files["model.safetensors"])
    content[-1] ^= 1
    hub.repos[NAME].files["model.safetensors"] = bytes(content)
    hub.requests.clear()
    assert "are there" in bezel("pull", f"{NAME}:checkpoint")  # the tokenizer
    assert [headers["range"] for host, _, headers in hub.requests if host == "other"] == ["bytes=0-8402319"]
    assert (find_model(NAME) / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "config.json"])
def test_another_content_than_the_hub_lists(name: str, hub: Hub, models: Path) -> None:
    """Files in git LFS have a SHA-256, small ones git's own SHA-1."""
    content = hub.repos[NAME].files[name]
    hub.repos[NAME].sent[name] = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    said = bezel("pull", NAME, ok=False)
    assert f"{name}: what came is not what the hub lists, by its hash" in said
    assert not names()
    assert not [path for path in models.rglob(f"*{name}*") if path.is_file()]
    hub.repos[NAME].sent.clear()
    bezel("pull", NAME)


def test_a_damaged_file_of_before_is_fetched_anew(hub: Hub, models: Path) -> None:
    (models / ".google--fairy.part/checkpoint/fairy").mkdir(parents=True)
    shutil.copytree(DEMO, models / ".google--fairy.part/checkpoint/fairy", dirs_exist_ok=True)
    file = models / ".google--fairy.part/checkpoint/fairy/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (file.parent / "left over").write_text("")
    bezel("pull", f"{NAME}:checkpoint")
    assert hub.fetched() == ["config.json", "model.safetensors"]
    assert folder_files(find_model(NAME)) == folder_files(DEMO)


def test_a_host_that_sends_more_than_there_should_be(hub: Hub) -> None:
    hub.knows_ranges = False
    hub.repos[NAME].sent["model.safetensors"] = hub.repos[NAME].files["model.safetensors"] + b"x"
    assert "is longer than the 8,402,320 bytes that the hub lists" in bezel("pull", NAME, ok=False)


@pytest.mark.parametrize("size", [100, 50_000_000])
def test_a_size_that_lies(size: int, hub: Hub, models: Path) -> None:
    hub.repos[NAME].listed["model.safetensors"] = {"size": size}
    said = bezel("pull", NAME, ok=False)
    assert ("what came is not what the hub lists" if size == 100 else "the hub answers with the status 416") in said
    assert not names()
    assert sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) <= 9_000_000


def test_a_host_that_never_sends_it_all(hub: Hub) -> None:
    hub.knows_ranges = False
    hub.repos[NAME].listed["model.safetensors"] = {"size": 50_000_000}
    assert "50,000,000 bytes were promised, and no more than 8,402,320 come" in bezel("pull", NAME, ok=False)


def test_names_that_lead_elsewhere(hub: Hub, models: Path, tmp_path: Path) -> None:
    whole = hub.repos[NAME].files["model.safetensors"]
    evil = ["../../x-Q8_0.gguf", "/etc/x-Q8_0.gguf", "a/../../x-Q8_0.gguf", "x\x1b[2J-Q8_0.gguf", "..\\x-Q8_0.gguf"]
    evil += ["C:x-Q8_0.gguf", ".hidden-Q8_0.gguf", "x\0-Q8_0.gguf", "x\n-Q8_0.gguf", f"{'x' * 5000}-Q8_0.gguf"]
    hub.repos[GGUF] = Repo(dict.fromkeys(evil, whole))
    for name in (GGUF, f"{GGUF}:Q8_0"):
        assert "there is no model in it" in bezel("pull", name, ok=False)
    assert not hub.fetched()
    before = {path for path in tmp_path.rglob("*") if models not in path.parents}
    hub.repos[NAME].files |= dict.fromkeys(evil, b"x")
    bezel("pull", NAME)
    assert {path for path in tmp_path.rglob("*") if models not in path.parents} == before


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"size": "8"}, {"size": None}, {"lfs": {"size": 8, "sha256": "x", "pointerSize": 1}}, {"blobId": 7}],
)
def test_a_listing_that_makes_no_sense(changes: dict[str, Any], hub: Hub) -> None:
    hub.repos[NAME].listed["model.safetensors"] = changes if "blobId" not in changes else changes | {"lfs": None}
    assert "expected model.safetensors" in bezel("pull", NAME, ok=False)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"<html>",
        b"\xff",
        b'{"sha": "../x", "siblings": []}',
        b'{"id": 1, "siblings": [{}]}',
        b'{"id": "x", "sha": 7, "siblings": 7}',
        b'{"id": "x", "sha": "0000000000000000000000000000000000000000", "siblings": 7}',
    ],
)
def test_an_answer_that_makes_no_sense(answer: bytes, hub: Hub) -> None:
    hub.answer = answer
    assert "makes no sense" in bezel("pull", NAME, ok=False)


def test_more_files_than_any_model_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_FILES", 5)
    assert "has 8 files, expected a model" in bezel("pull", NAME, ok=False)
    assert not hub.fetched()


def test_a_config_that_is_no_config(hub: Hub) -> None:
    hub.repos[NAME].listed["config.json"] = {"size": 1 << 40}
    assert "is larger than any real one" in bezel("pull", NAME, ok=False)
    assert not hub.fetched()


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda _: usage(0, 0, 10_000_000))
    said = bezel("pull", NAME, ok=False)  # 8.5 MB to fetch, and 2.9 to write
    assert "10 MB free, expected 11 MB for google/fairy" in said
    assert "BEZEL_MODELS" in said
    assert set(hub.fetched()) == {"config.json"}
    hub.break_after = [10_000_000, 5_000_000, *[0] * 100]
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda _: usage(0, 0, 12_000_000))
    bezel("pull", NAME, ok=False)
    hub.break_after = []
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda _: usage(0, 0, 7_000_000))
    bezel("pull", NAME)  # 5 MB are there already
    assert models.exists()


# --- who may, and how it is said


def test_a_licence_that_was_not_accepted(hub: Hub, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    hub.repos[NAME].gated = True
    hub.tokens = {TOKEN: (NAME,), f"{TOKEN}2": ()}
    said = bezel("pull", NAME, ok=False)
    assert f"its licence must be accepted first: open {hub.url}/{NAME}, log in and accept it" in said
    assert "set HF_TOKEN to a token from" in said
    assert "`hf auth login`" in said
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}2")
    assert "the account of your token has not been let in" in bezel("pull", NAME, ok=False)
    assert not list(models.iterdir())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    bezel("pull", NAME)


def test_the_token_goes_to_the_hub_only(hub: Hub, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    hub.repos[NAME].gated = True
    hub.tokens = {TOKEN: (NAME,)}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    bezel("pull", NAME, "--keep")
    seen = {
        host: {headers.get("authorization") for at, _, headers in hub.requests if at == host}
        for host in ("hub", "other")
    }
    assert seen == {"hub": {f"Bearer {TOKEN}"}, "other": {None}}
    assert all(TOKEN.encode() not in path.read_bytes() for path in models.rglob("*") if path.is_file())
    assert all("torch" not in headers["user-agent"] for _, _, headers in hub.requests)


def test_what_is_not_there_or_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["who/private"] = Repo({}, private=True)
    for name in ("who/nothing", "who/private"):
        said = bezel("pull", name, ok=False)
        assert f"{name}: there is no such repository on {hub.url}, or it is private" in said
        assert "`hf auth login`" in said
    hub.tokens = {TOKEN: ()}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "or your token may not see it" in bezel("pull", "who/private", ok=False)


@pytest.mark.parametrize("name", ["HF_TOKEN", "file"])
@pytest.mark.usefixtures("hub")
def test_a_token_that_the_hub_does_not_know(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN) if name == "file" else monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the hub does not accept your token" in bezel("pull", NAME, ok=False)


@pytest.mark.parametrize("more", ["\x01", "ä", " x", "\r\nX: y"])
def test_a_token_that_is_none(more: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{more}x")
    said = bezel("pull", NAME, ok=False)
    assert "has characters that no token has" in said or "the hub does not accept" in said
    assert all("x" not in headers.get("X", "") for _, _, headers in hub.requests)


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "does not let your token"), (429, "too many requests"), (500, "status 500"), (418, "418")],
)
def test_the_hub_says_no(status: int, said: str, hub: Hub) -> None:
    hub.status = status
    found = bezel("pull", NAME, ok=False)
    assert said in found
    assert "secret words" not in found


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    said = bezel("pull", NAME, ok=False)
    assert "no connection to http://127.0.0.1:1" in said
    assert not hub.requests
    monkeypatch.setattr(constants, "ENDPOINT", "no url")
    assert "no connection to" in bezel("pull", NAME, ok=False)


@pytest.mark.parametrize("name", ["fairy", "../fairy", "google/..", "https://huggingface.co/google/fairy", "a/b/c"])
def test_no_name(name: str, hub: Hub) -> None:
    assert "is no name of a model" in bezel("pull", name, ok=False)
    assert not hub.requests


# --- as a program


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """huggingface_hub reads these when it is imported."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_broken_off_goes_on(sent: signal.Signals, hub: Hub, models: Path, tmp_path: Path) -> None:
    sending: list[subprocess.Popen[str]] = []
    count = 0

    def on_chunk() -> None:
        nonlocal count
        count += 1
        if count == 70:
            sending[0].send_signal(sent)
            sending[0].wait(30)

    hub.on_chunk = on_chunk
    env = environment(hub, tmp_path)
    pull = [*COMMAND, "pull", NAME]
    sending.append(subprocess.Popen(pull, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts))
    _, err = sending[0].communicate(timeout=60)
    assert sending[0].returncode in {signal.SIGINT: [130], signal.SIGTERM: [143], signal.SIGKILL: [-9]}[sent]
    assert "Traceback" not in err
    assert ("the same command goes on from here" in err) == (sent == signal.SIGINT)
    assert not names()
    held = next(path for path in models.rglob(".model.safetensors.*.part")).stat().st_size
    assert held > 0
    hub.on_chunk = lambda: None
    hub.requests.clear()
    done = subprocess.run([*COMMAND, "pull", NAME], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert names() == [f"{NAME}:q4_k_m"]
    assert [headers["range"] for host, _, headers in hub.requests if host == "other"] == [f"bytes={held}-8402319"]


def test_two_at_a_time(hub: Hub, tmp_path: Path) -> None:
    others: list[subprocess.CompletedProcess[str]] = []

    def on_chunk() -> None:
        if not others:
            others.append(
                subprocess.run(
                    [*COMMAND, "pull", NAME], env=environment(hub, tmp_path), capture_output=True, text=True, timeout=60
                )
            )

    hub.on_chunk = on_chunk
    bezel("pull", NAME)
    assert others[0].returncode == 1
    assert "another process" in others[0].stderr
    assert names() == [f"{NAME}:q4_k_m"]


def test_what_a_server_says_is_not_repeated(hub: Hub, tmp_path: Path) -> None:
    """Nor by the library, whose warnings go to the terminal."""
    hub.status = 500
    env = environment(hub, tmp_path)
    done = subprocess.run([*COMMAND, "pull", NAME], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "status 500" in done.stderr
    assert "\x1b" not in done.stderr


def test_without_huggingface_hub(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ModuleNotFoundError(name='huggingface_hub')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*COMMAND, "pull", NAME], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'bezel-lm[hub]'" in done.stderr


@pytest.mark.parametrize("args", [["list"], ["rm", "x/y"], ["run", "--help"], ["pull", "--help"], ["pull", "../x"]])
def test_who_needs_no_network_loads_none(args: list[str], hub: Hub) -> None:  # noqa: ARG001
    source = "import sys\nfrom bezel.runtime.commands.main import main\ntry: main()\nexcept SystemExit: pass\n"
    source += "print([name for name in ('huggingface_hub', 'httpx2', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert set(found) <= ({"numpy"} if args[0] == "pull" else set()), done.stdout + done.stderr


def test_the_library_itself_is_served(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That this hub speaks as the library expects, and not only as bezel asks."""
    hub.repos[NAME].gated = True
    hub.tokens = {TOKEN: (NAME,)}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("config.json", "model.safetensors"):
        path = huggingface_hub.hf_hub_download(NAME, name, local_dir=tmp_path / "library", endpoint=hub.url)
        assert Path(path).read_bytes() == (DEMO / name).read_bytes()
    info = huggingface_hub.HfApi(endpoint=hub.url).model_info(NAME, files_metadata=True)
    assert info.sha == hub.repos[NAME].commit
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        huggingface_hub.hf_hub_download(NAME, "nothing", local_dir=tmp_path / "library", endpoint=hub.url)


def test_the_time_left_of_a_long_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is that of the pace so far, once there is one: not of the first steps, nor of what an earlier run has done."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, now = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar("o.gguf", lambda: now[0]) as progress:
        for second, done in ((0, 2_000_000), (30, 2_000_001), (60, 5_000_000), (80, 6_000_000), (140, 12_000_000)):
            now[0] = second
            progress(done, 12_000_000)
    left = re.findall(r"[\d.]+ \w+ left", shown.getvalue())
    assert left == ["2 min left", "2 min left"]


def test_the_line_of_a_download(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    line = DownloadLine("google/fairy", lambda: now[0])
    line(1_000_000_000, 2_000_000_000)  # of an earlier run
    now[0] = 10.0
    line(1_100_000_000, 2_000_000_000)
    line(1_200_000_000, 2_000_000_000)  # too soon to be shown
    now[0] = 20.0
    line(2_000_000_000, 2_000_000_000)
    shown = capsys.readouterr().err.split("\r")[1:]
    assert shown == [
        "google/fairy: 1.0 GB of 2.0 GB",
        "google/fairy: 1.1 GB of 2.0 GB, 10 MB/s, 2 min left",
        "google/fairy: 2.0 GB of 2.0 GB",
    ]
