"""Rounding a vision tower for what pictures send through it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bezel.bench import PICTURES
from bezel.bench.pictures.draw import draw, scene
from bezel.export.calibration import eye as module
from bezel.runtime import Image, load
from bezel.runtime.commands.main import main
from bezel.runtime.files.gguf import GGUFFile
from click.testing import CliRunner
from PIL import Image as PillowImage
from tiny import DEMO


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn pictures, and a file that is none."""
    folder, random = tmp_path_factory.mktemp("shown"), np.random.default_rng(2)
    for i in range(40):
        PillowImage.fromarray(draw(scene(random, 1 + i % 4), random)).save(folder / f"{i:02}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def export(out: Path, *options: str | Path, source: Path = PICTURES) -> str:
    found = CliRunner().invoke(main, ["export", str(source), str(out), "--quant", "f32", *map(str, options)])
    assert found.exit_code == 0, found.output
    return found.output


def rows(model: Path, eye: Path) -> np.ndarray:
    """What an eye makes of pictures that no calibration has seen."""
    random = np.random.default_rng(9)
    with load(model, vision=eye, activations="f32") as opened:
        assert opened.eye is not None
        return np.concatenate([opened.eye.look(Image(draw(scene(random, 3), random))).rows for _ in range(8)])


def test_half_of_the_loss(shown: Path, shapes_of: Callable[..., Path], tmp_path: Path) -> None:
    exact = shapes_of("f32")
    want, error = rows(exact, exact.with_name("mmproj-shapes.gguf")), {}
    for name, more in {"plain": (), "calibrated": ("--calibration-images", shown)}.items():
        out = tmp_path / f"{name}.gguf"
        export(out, "--vision", "q4_0", *more)
        error[name] = np.square(rows(exact, tmp_path / f"mmproj-{name}.gguf") - want).mean()
    assert error["calibrated"] < 0.5 * error["plain"]
    sizes = [(tmp_path / f"mmproj-{name}.gguf").stat().st_size for name in error]
    assert 0 < sizes[1] - sizes[0] < 1024  # what the file says of it
    with GGUFFile(tmp_path / "mmproj-calibrated.gguf") as file:
        assert file.metadata["bezel.provenance.calibration_pictures"] == 40
    verified = CliRunner().invoke(main, ["verify", str(tmp_path / "mmproj-calibrated.gguf"), "--source", str(PICTURES)])
    assert verified.exit_code == 0, verified.output


def test_the_same_bytes_after_a_break(shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--vision", "q4_0", "--calibration-images", shown)
    export(tmp_path / "x.gguf", *asked)

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bezel.export.gguf.writer.export_gguf", broken)
        command = ["export", str(PICTURES), str(tmp_path / "y.gguf"), "--quant", "f32", *map(str, asked)]
        assert CliRunner().invoke(main, command).exit_code == 130
    assert not [path for path in tmp_path.glob("*y.gguf") if path.is_file()]
    monkeypatch.setattr(module, "see", broken)  # which is not needed again
    export(tmp_path / "y.gguf", *asked)
    assert (tmp_path / "mmproj-y.gguf").read_bytes() == (tmp_path / "mmproj-x.gguf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", "mmproj-x.gguf", "y.gguf", "mmproj-y.gguf"}


def test_pictures_are_spread_over_the_folder(shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PATCHES", 64 * 4)
    few = tmp_path / "few"
    few.mkdir()
    for i in (0, 10, 20, 30):
        shutil.copy(shown / f"{i:02}.png", few)
    for name, folder in {"x": shown, "y": few}.items():
        export(tmp_path / f"{name}.gguf", "--vision", "q4_0", "--calibration-images", folder)
    assert (tmp_path / "mmproj-x.gguf").read_bytes() == (tmp_path / "mmproj-y.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--calibration-images", "{empty}"], "found no picture, expected files of .bmp"),
        (["--calibration-images", "{broken}"], "cat.png"),
        (["--calibration-images", "{shown}", "--format", "onnx"], "--calibration-images goes with --format gguf"),
    ],
)
def test_what_is_no_calibration(options: list[str], said: str, shown: Path, tmp_path: Path) -> None:
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "cat.png").write_bytes(b"\x89PNG")
    options = [part.format(shown=shown, empty=tmp_path / "empty", broken=tmp_path / "broken") for part in options]
    found = CliRunner().invoke(main, ["export", str(PICTURES), str(tmp_path / "x.gguf"), *options])
    assert found.exit_code in (1, 2)
    assert said in found.output
    assert not list(tmp_path.glob("*.gguf"))


def test_a_model_without_an_eye(shown: Path, tmp_path: Path) -> None:
    command = ["export", str(DEMO), str(tmp_path / "x.gguf"), "--calibration-images", str(shown)]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 1
    assert "--calibration-images:" in found.output
    assert "has no vision tower" in found.output
