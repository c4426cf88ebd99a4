"""Verification accepts what the exporter writes, and finds each fault that is planted."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES, write_checkpoint
from bezel.export import verify as verify_module
from bezel.export.gguf import writer as gguf_writer
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources.checkpoint import Checkpoint
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import TensorReport, verify
from bezel.quant.recipes import PRESETS
from bezel.runtime.errors import InvalidModelFile, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.model.tensors import TensorSpec
from tiny import DEMO


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "tiny", "tiny-gemma-2")


@pytest.fixture
def exported(tiny: Path, tmp_path: Path) -> Path:
    """A Q4_0 file to damage."""
    with open_checkpoint(tiny) as checkpoint:
        export_gguf(checkpoint, tmp_path / "out.gguf", "q4_0", embedding="q4_0")
    return tmp_path / "out.gguf"


def check(file: Path, folder: Path) -> dict[str, TensorReport]:
    with open_checkpoint(folder) as checkpoint:
        return {report.name: report for report in verify(file, checkpoint)}


def off(reports: dict[str, TensorReport]) -> set[str]:
    return {name for name, report in reports.items() if not report.ok}


def edit(file: Path, change: Callable[[Callable[[str], np.ndarray]], None]) -> None:
    """Change a file's tensors in place: `change` gets a writable view of any of them, bytes by row."""
    with GGUFModel(file) as gguf:
        extents = {name: (t.offset, t.nbytes, gguf.data(name).shape) for name, t in gguf.tensors.items()}
    raw = np.frombuffer(bytearray(file.read_bytes()), np.uint8)

    def view(name: str) -> np.ndarray:
        offset, nbytes, shape = extents[name]
        return raw[offset : offset + nbytes].reshape(shape)

    change(view)
    file.write_bytes(raw.tobytes())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(tmp_path: Path, preset: str) -> None:
    with open_checkpoint(DEMO) as checkpoint:
        export_gguf(checkpoint, tmp_path / "out.gguf", preset)
    reports = check(tmp_path / "out.gguf", DEMO)
    assert len(reports) == 46
    assert off(reports) == set()
    exact = {name for name, report in reports.items() if report.max_error == 0}
    norms = {name for name in reports if "norm" in name}
    assert exact >= (reports.keys() if preset in ("f32", "bf16") else norms)  # the demo is in bfloat16
    if preset not in ("f32", "f16", "bf16"):
        assert not exact & (reports.keys() - norms)


def test_the_figures(exported: Path, tiny: Path) -> None:
    report = check(exported, tiny)["blk.0.ffn_up.weight"]
    with open_checkpoint(tiny) as checkpoint, GGUFModel(exported) as gguf:
        spec = next(s for s in checkpoint.specs if s.gguf == report.name)
        source = checkpoint.tensor(spec).astype(np.float64)
        error = gguf.dequantize(report.name) - source
    assert report.error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(source), rel=1e-5)
    assert report.max_error == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert report.sqnr_db == pytest.approx(10 * math.log10((source**2).sum() / (error**2).sum()), rel=1e-5)
    assert report.worst_chunk == report.error  # one chunk


def test_a_forgotten_norm_offset(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(tiny) as checkpoint:
        monkeypatch.setattr(checkpoint, "_norm_offset", np.float32(0))
        export_gguf(checkpoint, tmp_path / "out.gguf", "q8_0")
    reports = check(tmp_path / "out.gguf", tiny)
    assert off(reports) == {name for name in reports if "norm" in name}


def test_a_norm_that_is_off_by_one_bit(exported: Path, tiny: Path) -> None:
    def change(view: Callable[[str], np.ndarray]) -> None:
        view("blk.1.attn_norm.weight")[0, 12] ^= 1

    edit(exported, change)
    assert off(check(exported, tiny)) == {"blk.1.attn_norm.weight"}


def test_one_bit_of_a_tensor_that_was_only_copied(tiny: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:  # in bfloat16
        export_gguf(checkpoint, tmp_path / "out.gguf", "bf16")

    def change(view: Callable[[str], np.ndarray]) -> None:
        view("blk.0.attn_q.weight")[3, 14] ^= 1

    edit(tmp_path / "out.gguf", change)
    assert off(check(tmp_path / "out.gguf", tiny)) == {"blk.0.attn_q.weight"}


def test_swapped_tensors(exported: Path, tiny: Path) -> None:
    def change(view: Callable[[str], np.ndarray]) -> None:
        keys, values = view("blk.2.attn_k.weight"), view("blk.2.attn_v.weight")
        keys[:], values[:] = values.copy(), keys.copy()

    edit(exported, change)
    reports = check(exported, tiny)
    assert off(reports) == {"blk.2.attn_k.weight", "blk.2.attn_v.weight"}
    assert reports["blk.2.attn_k.weight"].error == pytest.approx(math.sqrt(2), rel=0.05)


def test_a_fault_too_small_for_the_whole_tensor_shows_in_its_chunk(
    exported: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(view: Callable[[str], np.ndarray]) -> None:
        rows = view("token_embd.weight")
        rows[[500, 501]] = rows[[501, 500]]

    edit(exported, change)
    monkeypatch.setattr(verify_module, "_CHUNK_WEIGHTS", 16 * 256)
    reports = check(exported, tiny)
    assert reports["token_embd.weight"].error < reports["token_embd.weight"].tolerance
    assert off(reports) == {"token_embd.weight"}


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite(exported: Path, tiny: Path, scale: float) -> None:
    def change(view: Callable[[str], np.ndarray]) -> None:
        view("blk.0.attn_q.weight")[7, :2] = np.array([scale], "<f2").view(np.uint8)

    edit(exported, change)
    assert off(check(exported, tiny)) == {"blk.0.attn_q.weight"}


def test_a_chunk_written_to_the_wrong_place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Checkpoint.rows

    def shifted(self: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
        if spec.role == "token_embd":
            start, stop = (start + 16) % 1024, (start + 16) % 1024 + stop - start
        return rows(self, spec, start, stop)

    monkeypatch.setattr(gguf_writer, "CHUNK_WEIGHTS", 16 * 256)
    with monkeypatch.context() as patch, open_checkpoint(tiny) as checkpoint:
        patch.setattr(Checkpoint, "rows", shifted)
        export_gguf(checkpoint, tmp_path / "out.gguf", "q8_0")
    assert off(check(tmp_path / "out.gguf", tiny)) == {"token_embd.weight"}


def test_another_config(exported: Path, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    (folder / "config.json").write_text(json.dumps(SHAPES["tiny-gemma-2"] | {"final_logit_softcapping": 20.0}))
    with pytest.raises(InvalidRequest, match=r"final_softcap is 30.0, and 20.0 in .*: these are two models"):
        check(exported, folder)


def test_another_vocabulary(exported: Path, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    model = folder / "tokenizer.model"
    raw = model.read_bytes()
    assert raw.count(b"\n\x02aq") == 1
    model.write_bytes(raw.replace(b"\n\x02aq", b"\n\x02a~"))
    with pytest.raises(InvalidModelFile, match=r"token \d+ is 'aq', expected 'a~'"):
        check(exported, folder)


def test_another_merge_order(exported: Path, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    model = folder / "tokenizer.model"
    raw = bytearray(model.read_bytes())
    at = raw.index(b"\n\x02aq\x15") + 5
    raw[at : at + 4] = np.array([-5000], "<f4").tobytes()
    model.write_bytes(raw)
    with pytest.raises(InvalidModelFile, match=r"scores, types or special ids"):
        check(exported, folder)
