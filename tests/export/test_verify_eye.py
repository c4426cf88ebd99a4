"""Verification of an eye: accepts what the exporter writes, in every format, and finds what is off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bezel.export.gguf.vision import export_vision
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import TensorReport, verify
from bezel.quant.recipes import preset
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.vision_file import VisionFile
from click.testing import CliRunner
from seeing import write_seeing
from tiny import DEMO


@pytest.fixture(scope="module", params=["gemma3", "paligemma"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing(tmp_path_factory.mktemp("verify") / request.param, request.param)


def exported(folder: Path, out: Path, form: str) -> Path:
    with open_checkpoint(folder) as source, export_vision(source, out, preset(form, 2)):
        pass
    return out.with_name(f"mmproj-{out.name}")


def check(file: Path, folder: Path) -> dict[str, TensorReport]:
    with open_checkpoint(folder) as checkpoint:
        return {report.name: report for report in verify(file, checkpoint)}


def off(reports: dict[str, TensorReport]) -> set[str]:
    return {name for name, report in reports.items() if not report.ok}


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0", "q6_k", "q4_0", "q4_k"])
def test_every_format_passes(form: str, folder: Path, tmp_path: Path) -> None:
    """A feed-forward of 88 is wider in blocks, by zeros that have to be zeros."""
    file = exported(folder, tmp_path / "m.gguf", form)
    reports = check(file, folder)
    assert off(reports) == set()
    with VisionFile(file) as eye:
        assert reports.keys() == eye.tensors.keys()
    rounded = {report.role for report in reports.values() if report.max_error}
    assert ("v_ffn_down" in rounded) == (form != "f32")


def test_a_changed_bit_is_found(folder: Path, tmp_path: Path) -> None:
    file = exported(folder, tmp_path / "m.gguf", "f32")
    raw = bytearray(file.read_bytes())
    with VisionFile(file) as eye:
        at = eye.tensors["v.blk.1.attn_k.bias"].offset
    raw[at] ^= 1
    file.write_bytes(raw)
    assert off(check(file, folder)) == {"v.blk.1.attn_k.bias"}


def test_zeros_that_are_none_are_found(folder: Path, tmp_path: Path) -> None:
    file = exported(folder, tmp_path / "m.gguf", "q8_0")
    raw = bytearray(file.read_bytes())
    with VisionFile(file) as eye:
        info = eye.tensors["v.blk.0.ffn_up.bias"]
        assert info.shape == (96,)
        assert not eye.dequantize(info.name)[88:].any()
    raw[info.offset + 4 * 90 : info.offset + 4 * 91] = np.float32(9).tobytes()
    file.write_bytes(raw)
    assert off(check(file, folder)) == {"v.blk.0.ffn_up.bias"}


def test_another_models_eye_is_refused(folder: Path, tmp_path: Path) -> None:
    file = exported(folder, tmp_path / "m.gguf", "q8_0")
    other = write_seeing(tmp_path / folder.name, folder.name, num_hidden_layers=1)
    with pytest.raises(InvalidRequest, match=r"n_layers is 2, and 1 in .*: these are two models"):
        check(file, other)
    with pytest.raises(InvalidRequest, match=r"this is a vision tower, and .* has none"):
        check(file, DEMO)


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    file = exported(folder, tmp_path / "m.gguf", "q8_0")
    done = CliRunner().invoke(main, ["verify", str(file), "--source", str(folder)])
    assert done.exit_code == 0
    assert "tensors, all as expected" in done.output
    assert CliRunner().invoke(main, ["verify", str(file), "--source", str(folder), "--run"]).exit_code == 2
