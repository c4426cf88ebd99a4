"""A model that comes in pieces, as packages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from bezel.runtime.commands import models as commands
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidModelFile, InvalidRequest
from bezel.runtime.files import models, packaged
from bezel.runtime.files.models import find_model
from bezel.runtime.files.packaged import PACKAGED, PackagedModel
from click.testing import CliRunner

PIECES = (b"first ", b"second ", b"third")
WHOLE = b"".join(PIECES)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model called "toy" in three packages; gives the folder of packages."""
    folder = tmp_path / "packages"
    for i, piece in enumerate(PIECES):
        (folder / f"toy_part{i}/data").mkdir(parents=True)
        (folder / f"toy_part{i}/__init__.py").write_text("raise RuntimeError('imported')")
        (folder / f"toy_part{i}/data/part").write_bytes(piece)
    parts = [(f"toy_part{i}", "data/part") for i in range(3)]
    model = PackagedModel("toy", "toy.gguf", "q8_0", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), parts)
    for module in (packaged, models, commands):
        monkeypatch.setattr(module, "PACKAGED", {"toy": model})
    monkeypatch.setenv("BEZEL_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "cache_folder", lambda: tmp_path)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_it_is_put_together_once(toy: Path) -> None:
    out = find_model("toy")
    assert out.read_bytes() == WHOLE
    before = out.stat().st_mtime_ns
    (toy / "toy_part1/data/part").unlink()  # no longer needed
    assert find_model("toy") == out
    assert out.stat().st_mtime_ns == before


def test_it_is_listed_where_it_is_installed(toy: Path) -> None:
    assert [row.split() for row in CliRunner().invoke(main, ["list"]).stdout.splitlines()[1:]] == [
        ["toy", "0", "kB", "q8_0", "-", "-"]
    ]
    assert json.loads(CliRunner().invoke(main, ["list", "--json"]).stdout)[0]["path"] is None
    done = CliRunner().invoke(main, ["rm", "toy"])
    assert (done.exit_code, "pip uninstall toy-part0 toy-part1 toy-part2" in done.stderr) == (1, True)
    (toy / "toy_part1").rename(toy / "elsewhere")
    assert "toy" not in CliRunner().invoke(main, ["list"]).stdout


def test_a_file_of_that_name_comes_first(toy: Path) -> None:  # noqa: ARG001
    Path("toy").write_text("mine")
    assert find_model("toy") == Path("toy")
    assert find_model("other.gguf") == Path("other.gguf")


def test_what_is_not_installed(toy: Path) -> None:
    (toy / "toy_part2/data/part").unlink()
    with pytest.raises(InvalidRequest, match=r"toy: there is no such file.*pip install 'bezel-lm\[toy\]'"):
        find_model("toy")


def test_damaged_pieces_leave_nothing(toy: Path, tmp_path: Path) -> None:
    (toy / "toy_part1/data/part").write_bytes(b"Second ")
    with pytest.raises(InvalidModelFile, match="SHA-256"):
        find_model("toy")
    assert not list(tmp_path.glob("*toy.gguf*"))


def test_a_file_that_was_cut_is_made_anew(toy: Path) -> None:  # noqa: ARG001
    find_model("toy").write_bytes(WHOLE[:5])
    assert find_model("toy").read_bytes() == WHOLE


def test_a_file_that_was_written_to_is_made_anew(toy: Path) -> None:  # noqa: ARG001
    find_model("toy").write_bytes(bytes(len(WHOLE)))
    assert find_model("toy").read_bytes() == WHOLE


def test_a_name_that_is_almost_one(toy: Path) -> None:  # noqa: ARG001
    with pytest.raises(InvalidRequest, match=r"toyy: there is no such file, .*; did you mean toy"):
        find_model("toyy")


def test_the_real_ones_have_an_extra() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    for model in PACKAGED.values():
        assert f'\n"{model.extra}" = [' in project or f"\n{model.extra} = [" in project
