"""Verification of an eye: accepts what the exporter writes, in every format, and finds what is off."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bezel.export.gguf.vision import export_vision
from bezel.export.onnx.seeing import Patches, TowerOps
from bezel.export.onnx.source import QUANTS, OnnxSource
from bezel.export.onnx.writer import export_onnx
from bezel.export.sources.checkpoint import VisionSource
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import TensorReport, verify
from bezel.quant.recipes import preset
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.files.vision_file import VisionFile
from bezel.runtime.model.tensors import TensorSpec
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


# --- in an ONNX folder


def in_folder(folder: Path, out: Path, quant: str) -> Path:
    with open_checkpoint(folder) as source:
        export_onnx(OnnxSource(source, quant, vision=quant), out)
    return out


@pytest.mark.parametrize("quant", QUANTS)
def test_a_folder_s_eye_passes(quant: str, folder: Path, tmp_path: Path) -> None:
    out = in_folder(folder, tmp_path / "out", quant)
    reports = check(out, folder)
    assert off(reports) == set()
    with OnnxFolder(out) as file:
        assert file.vision is not None
        assert reports.keys() == {*file.tensors, *file.vision.tensors}
    rounded = {report.role for report in reports.values() if report.max_error}
    assert ("v_ffn_down" in rounded) == (quant != "f32")


@pytest.mark.parametrize("role", ["v_patch", "v_attn_v", "v_ffn_up_bias"])
def test_a_changed_number_in_a_folder_is_found(
    role: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = VisionSource.rows

    def changed(self: VisionSource, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
        found = rows(self, spec, start, stop)
        if spec.role == role and spec.layer in (None, 1):
            found[-1, 0] += 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(VisionSource, "rows", changed)
        in_folder(folder, tmp_path / "out", "f32")
    found = off(check(tmp_path / "out", folder))
    assert {name.removesuffix(".bias").removesuffix(".weight") for name in found} == {
        {"v_patch": "v.patch_embd", "v_attn_v": "v.blk.1.attn_v", "v_ffn_up_bias": "v.blk.1.ffn_up"}[role]
    }


def test_another_eye_in_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = in_folder(folder, tmp_path / "out", "int8")
    other = write_seeing(tmp_path / folder.name, folder.name, num_hidden_layers=1)
    with pytest.raises(InvalidRequest, match=r"n_layers is 2, and 1 in .*: these are two models"):
        check(out, other)


def test_a_graph_that_sees_something_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the source's; only running it shows that GELU is another."""
    out = in_folder(folder, tmp_path / "out", "int8")
    command = ["verify", str(out), "--source", str(folder), "--run"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, "OFF" in done.output) == (0, False), done.output
    assert re.search(r"a drawn picture: its (9|36) rows are up to \d\.\de-0[67] of their length apart", done.output)
    seen = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["picture"]
    assert (seen["ok"], seen["rows"]) == (True, 9 if folder.name == "gemma3" else 36)

    def bias_gelu(self: TowerOps, x: Patches, bias: TensorSpec) -> Patches:
        x = self.add(x, bias)
        return replace(x, name=self._nodes.node("Gelu", [x.name], f"{x.name}/gelu", approximate="none"))

    monkeypatch.setattr(TowerOps, "bias_gelu", bias_gelu)
    shutil.rmtree(out)
    in_folder(folder, out, "int8")
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, "tensors, all as expected" in done.output) == (1, True), done.output
    assert re.search(r"a drawn picture: .*OFF", done.output)
