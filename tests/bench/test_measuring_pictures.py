"""What quantization costs a model that sees: the same comparisons over answers about pictures, and the eye's part."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench import PICTURES
from bezel.bench.loss import measure as measure_module
from bezel.bench.loss.measure import measure
from bezel.bench.loss.passages import begun_chats
from bezel.bench.loss.result import Measurement
from bezel.bench.loss.subjects import Opener, Spec, parse_spec, seeing
from bezel.bench.pictures.draw import draw, scene
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from click.testing import CliRunner
from PIL import Image as PillowImage
from tiny import DEMO

ShapesOf = Callable[..., Path]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.txt"
    path.write_text("How many shapes are there?\n\nDescribe the picture.\n", encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    random, paths = np.random.default_rng(3), []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        PillowImage.fromarray(draw(scene(random, 2 + i), random)).save(paths[-1])
    return paths


@pytest.fixture
def run(tmp_path: Path, asked: Path, pictures: list[Path]) -> Callable[..., Measurement]:
    def call(candidate: str, reference: Path, **options: Any) -> Measurement:
        exact = parse_spec(str(reference), Spec(Path(), None, "f32", "f32"))
        options = {"protocol": "chat", "chunk": 96, "states": tmp_path / "states", "threads": 2, **options}
        return measure([parse_spec(candidate, Spec(Path()))], exact, [asked], pictures=pictures, **options)

    return call


def test_a_checkpoint_sees_as_its_own_file_does(run: Callable[..., Measurement], shapes_of: ShapesOf) -> None:
    found = run(f"{shapes_of('f32')}@kv=f32,activations=f32", PICTURES)
    assert found.chunks == 4  # each line about each picture
    assert found.candidates[0].metrics.kld_max.value < 1e-6
    assert found.reference.vision == str(PICTURES)
    assert [Path(picture.path).name for picture in found.pictures] == ["0.png", "1.png"]
    assert "<image_soft_token>" not in "".join(worst.before for worst in found.candidates[0].worst)


def test_the_part_of_the_eye(run: Callable[..., Measurement], shapes_of: ShapesOf) -> None:
    """An exact text model with the candidate's eye: nothing but the eye's rounding can show."""
    f32, q4 = shapes_of("f32"), shapes_of("q4_0")
    found = run(str(q4), f32, effects=True)
    part = {effect.effect: effect.metrics.kld_mean.value for effect in found.effects}
    assert part["eye"] > 0
    alone = run(f"{f32}@vision={q4.with_name(f'mmproj-{q4.name}')},kv=f32,activations=f32", f32)
    assert alone.candidates[0].metrics.kld_mean.value == part["eye"]


def test_a_folder_sees_with_what_is_in_it(run: Callable[..., Measurement], seeing_onnx_of: Callable[..., Path]) -> None:
    found = run(str(seeing_onnx_of("shapes")), PICTURES, effects=True)
    assert found.candidates[0].metrics.kld_max.value < 1e-6
    assert [effect.effect for effect in found.effects] == ["weights"]
    with pytest.raises(InvalidRequest, match="has no vision tower, and there are pictures"):
        run(str(seeing_onnx_of("shapes", sees=False)), PICTURES)


def test_other_pictures_are_measured_anew(
    run: Callable[..., Measurement], shapes_of: ShapesOf, pictures: list[Path]
) -> None:
    first = run(str(shapes_of("q4_0")), PICTURES)
    assert run(str(shapes_of("q4_0")), PICTURES).candidates == first.candidates
    random = np.random.default_rng(7)
    PillowImage.fromarray(draw(scene(random, 4), random)).save(pictures[1])
    again = run(str(shapes_of("q4_0")), PICTURES)
    assert again.pictures[0] == first.pictures[0]
    assert again.pictures[1] != first.pictures[1]
    assert again.candidates[0].metrics != first.candidates[0].metrics


def test_the_hash_is_of_what_was_seen(
    run: Callable[..., Measurement], shapes_of: ShapesOf, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even of a file that becomes another just then."""
    was = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]

    def changed(*args: Any) -> Any:
        found = begun_chats(*args)
        pictures[0].write_bytes(pictures[1].read_bytes())
        return found

    monkeypatch.setattr(measure_module, "begun_chats", changed)
    assert [picture.sha256 for picture in run(str(shapes_of("q4_0")), PICTURES).pictures] == was


def test_what_cannot_be_measured_with_pictures(
    run: Callable[..., Measurement], shapes_of: ShapesOf, gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="--image: found pictures with --protocol chunks, expected chat"):
        run(str(shapes_of("q4_0")), PICTURES, protocol="chunks")
    with pytest.raises(InvalidRequest, match="has no vision tower"):
        _ = Opener().open(seeing(Spec(DEMO, "reference"))).eye
    blind = shutil.copy(gguf_of("demo", "q4_0"), tmp_path / "blind.gguf")
    with pytest.raises(InvalidRequest, match=r"no vision tower.*beside its file.*blind.gguf@vision=FILE"):
        run(str(blind), PICTURES)
    with pytest.raises(InvalidRequest, match=r"line 1: found \d+ tokens with the template and the picture"):
        run(str(shapes_of("q4_0")), PICTURES, chunk=20)


def test_the_command(shapes_of: ShapesOf, asked: Path, pictures: list[Path], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    options = ["--protocol", "chat", "--chunk", "96", "--text", str(asked), "--state", str(tmp_path / "states")]
    images = [part for path in pictures for part in ("--image", str(path))]
    command = ["measure", str(shapes_of("q4_0")), "--reference", str(PICTURES), *options, *images, "--effects"]
    found = CliRunner().invoke(main, [*command, "--html", str(report), "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert {effect["effect"] for effect in result["effects"]} >= {"eye", "weights"}
    assert "1.png" in report.read_text("utf-8")
