"""Tuned exports: what moves, that the divergence is the one that the file then has, and work that was broken off."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bezel.export.calibration.moments import SEQUENCE, read_text
from bezel.export.calibration.rounding import export_calibrated
from bezel.export.onnx.source import OnnxSource
from bezel.export.onnx.writer import export_onnx
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import verify
from bezel.quant.formats import FORMATS, Q4_0, Format
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.model.tensors import TensorSpec
from click.testing import CliRunner
from logits import divergence, logits
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS, DEMO, TEXT, bf16, checkpoint_folder, export

torch = pytest.importorskip("torch")
from bezel.export.tuning import student as student_module  # noqa: E402
from bezel.export.tuning import tuned as module  # noqa: E402
from bezel.export.tuning.latent import Latent, Rounded, Scaled  # noqa: E402
from bezel.export.tuning.student import Student  # noqa: E402
from bezel.export.tuning.targets import Targets, exact_weights, passing_to_targets  # noqa: E402
from bezel.export.tuning.tuned import Descent  # noqa: E402

BLOCKS = [form for form in FORMATS.values() if form.block > 1]
IDS = np.random.default_rng(3).integers(4, 1000, (2, 40))


def matrix(form: type[Format]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (8, 2 blocks), the last one's nothing but zeros, and their blocks."""
    exact = np.random.default_rng(1).normal(0, 0.05, (8, 2 * form.block)).astype(np.float32)
    exact[-1, form.block :] = 0
    return exact, form.quantize(exact)


@pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)
def test_blocks_that_did_not_move_come_back(form: type[Format]) -> None:
    exact, blocks = matrix(form)
    latent = Latent(form, blocks, exact)
    np.testing.assert_array_equal(latent.blocks()[:-1], blocks[:-1])  # where all is zero, many codes say so
    np.testing.assert_allclose(latent().detach().numpy(), form.dequantize(blocks), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)
def test_blocks_say_what_the_matrix_has_moved_to(form: type[Format]) -> None:
    exact, blocks = matrix(form)
    latent = Latent(form, blocks, exact)
    with torch.no_grad():
        latent.place += torch.from_numpy(np.random.default_rng(2).normal(0, 2, latent.place.shape))
        latent.factors += torch.from_numpy(np.random.default_rng(2).normal(0, 0.1, latent.factors.shape))
    found = form.dequantize(latent.blocks())
    assert np.abs(found - form.dequantize(blocks)).max() > 0.01
    np.testing.assert_allclose(latent().detach().numpy(), found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)
def test_scales_that_move_alone(form: type[Format]) -> None:
    """Are those that a matrix has whose codes could move; of its blocks no other bytes change."""
    exact, blocks = matrix(form)
    scaled, latent = Scaled(form, blocks), Latent(form, blocks, exact)
    toward = torch.from_numpy(np.random.default_rng(4).normal(0, 1, exact.shape).astype(np.float32))
    for found in (scaled, latent):
        with torch.no_grad():
            found.factors += torch.from_numpy(np.random.default_rng(2).normal(0, 0.1, latent.factors.shape))
        (found() * toward).sum().backward()
    assert list(scaled.moving) == ["factors"]
    np.testing.assert_allclose(scaled.factors.grad, latent.factors.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled().detach(), form.dequantize(scaled.blocks()), rtol=1e-5, atol=1e-7)
    before, after = (x.reshape(-1).view(form.layout) for x in (blocks, scaled.blocks()))
    changed = {name for name in form.layout.names or () if (before[name] != after[name]).any()}
    assert changed == set(scaled._names)


@pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)
def test_rows_by_number(form: type[Format]) -> None:
    _, blocks = matrix(form)
    ids = torch.tensor([[3, 3], [0, 7]])
    np.testing.assert_array_equal(Rounded(form, blocks)[ids], form.dequantize(blocks)[ids.numpy()])


@pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)
def test_gradients(form: type[Format]) -> None:
    """Of scales against small steps, beside the rounding to float16; of codes the scale times the weight's own."""
    exact, blocks = matrix(form)
    latent = Latent(form, blocks, exact)
    toward = torch.from_numpy(np.random.default_rng(2).normal(0, 1, exact.shape).astype(np.float32))
    (latent() * toward).sum().backward()
    scale = np.broadcast_to(form.steps(blocks.reshape(-1).view(form.layout))[0], latent.place.shape)
    np.testing.assert_allclose(latent.place.grad, scale * toward.reshape(scale.shape).numpy(), rtol=1e-5, atol=1e-9)
    latent._new_halves = lambda: latent._halves() * latent.factors.exp()  # type: ignore[method-assign]
    for name in range(len(latent.factors)):
        with torch.no_grad():
            values = []
            for step in (0.01, -0.01):
                latent.factors[name, 3] += step
                values.append((latent().double() * toward).sum())
                latent.factors[name, 3] -= step
        expected = float(values[0] - values[1]) / 0.02
        assert float(latent.factors.grad[name, 3]) == pytest.approx(expected, rel=0.01, abs=1e-4)


def student_of(folder: Path, rounded: Path, codes: bool = True, hold: bool = False) -> Student:
    def blocks(spec: TensorSpec) -> tuple[type[Format], np.ndarray]:
        rows = 1 if spec.is_norm else spec.shape[0]
        return FORMATS[file.tensors[spec.gguf].format.name], file.data(spec.gguf).reshape(rows, -1).copy()

    with open_checkpoint(folder) as source, GGUFModel(rounded) as file:
        return Student(source.config, source.tensor, blocks, codes=codes, hold=hold)


def targets_for(folder: Path, k: int = 1 << 20) -> Targets:
    """Of IDS; all tokens, where no other number is given."""
    with open_checkpoint(folder) as source:
        *_, (_, found) = passing_to_targets(source.config, exact_weights(source), torch.from_numpy(IDS), 0, {}, k)
    return Targets.restored(found)


@pytest.mark.parametrize("name", [*CONFIGS, "demo"])
def test_the_divergence_is_the_file_s(name: str, tmp_path: Path) -> None:
    """Of several sequences at once, beyond windows, with every family's norms, soft-caps and RoPE."""
    folder = checkpoint_folder(name, tmp_path)
    exact, rounded = export(folder, tmp_path / "f32.gguf"), export(folder, tmp_path / "q8_0.gguf", "q8_0")
    expected = np.mean([divergence(logits(exact, ids), logits(rounded, ids)) for ids in IDS])
    found = student_of(folder, rounded).divergence(torch.from_numpy(IDS), targets_for(folder))
    assert found == pytest.approx(expected, rel=0.02)


def test_the_likeliest_tokens(tmp_path: Path) -> None:
    """Are those of the reference engine's logits, and the divergence is the one among them."""
    exact, rounded = export(DEMO, tmp_path / "f32.gguf"), export(DEMO, tmp_path / "q4_0.gguf", "q4_0")
    found, expected = targets_for(DEMO, 20), []
    for ids, tokens, values in zip(IDS, found.tokens.numpy(), found.logits.numpy(), strict=True):
        y, x = logits(exact, ids), logits(rounded, ids)
        best = np.argsort(-y, axis=-1)[:, :20]
        np.testing.assert_array_equal(np.sort(tokens), np.sort(best))
        np.testing.assert_allclose(values, np.take_along_axis(y, tokens.astype(np.int64), -1), atol=1e-3)
        expected.append(divergence(*(np.take_along_axis(z, best, -1) for z in (y, x))))
    student = student_of(DEMO, rounded)
    assert student.divergence(torch.from_numpy(IDS), found) == pytest.approx(np.mean(expected), rel=0.02)


def test_gradients_of_the_divergence(tmp_path: Path) -> None:
    """Of norms, which no rounding is behind, against small steps."""
    student = student_of(DEMO, export(DEMO, tmp_path / "q4_0.gguf", "q4_0"))
    ids, wanted = torch.from_numpy(IDS), targets_for(DEMO, 50)
    for name in ("blk.1.ffn_norm.weight", "output_norm.weight"):
        norm, values, toward = student.moving[name].moving["norm"], [], 0.01
        norm.grad = None
        student.divergence(ids, wanted)
        assert norm.grad is not None
        found = float(norm.grad.sum())
        for step in (toward, -2 * toward):
            with torch.no_grad():
                norm += step
            values.append(student.divergence(ids, wanted))
        with torch.no_grad():
            norm += toward
        assert found == pytest.approx((values[0] - values[1]) / (2 * toward), rel=0.05)


@pytest.mark.parametrize("codes", [True, False])
def test_one_layer_is_unpacked_at_a_time(codes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(DEMO, export(DEMO, tmp_path / "q4_0.gguf", "q4_0"), codes)
    alive: list[weakref.ref[Any]] = []
    most, unpack = 0, Scaled.__call__

    def counted(self: Scaled) -> Any:
        nonlocal most
        matrix = unpack(self)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(matrix.untyped_storage())]
        most = max(most, len(alive))
        return matrix

    monkeypatch.setattr(Scaled, "__call__", counted)
    student.divergence(torch.from_numpy(IDS), targets_for(DEMO, 20))
    assert student.config.n_layers > 1
    assert most <= 7 + 1


def test_what_is_held_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the divergence and the gradients, when the way back does not go through layers again. Sequences by themselves
    come to the same as together, apart from the order of sums.
    """
    path = export(DEMO, tmp_path / "q4_0.gguf", "q4_0")

    def found(together: int, hold: bool) -> list[np.ndarray]:
        monkeypatch.setattr(student_module, "TOGETHER", together)
        student = student_of(DEMO, path, hold=hold)
        divergence = student.divergence(torch.from_numpy(IDS), targets_for(DEMO, 20))
        parts = (x.grad for kind in module.RATES for x in student.parameters(kind))
        return [np.array(divergence), *(grad.numpy() for grad in parts if grad is not None)]

    apart, held, together = found(1, False), found(1, True), found(2, False)
    assert len(apart) > 50
    for one, other, whole in zip(apart, held, together, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())


@pytest.mark.parametrize(("codes", "share"), [(True, 0.7), (False, 0.9)])
def test_steps_bring_the_whole_model_closer(codes: bool, share: float, tmp_path: Path) -> None:
    student = student_of(DEMO, export(DEMO, tmp_path / "q4_0.gguf", "q4_0"), codes)
    descent, ids, wanted = Descent(student, 40), torch.from_numpy(IDS), targets_for(DEMO, 256)
    before = descent.take(ids, wanted)
    for _ in range(39):
        descent.take(ids, wanted)
    assert student.divergence(ids, wanted) < share * before


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT.read_text()[:12000])
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_folder("gemma2-gqa", tmp_path_factory.mktemp("tiny"))


def tuned(
    folder: Path, text: Path, out: Path, steps: int = 3, progress: Callable[[int, int], None] | None = None
) -> Path:
    with open_checkpoint(folder) as source:
        export_calibrated(source, out, "q4_0", None, text, progress, True, 1024, steps)
    return out


def test_what_is_written_is_what_was_tuned(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gguf, which is not ours, reads the student's last weights; `verify` lets them pass, and the file says all."""
    students: list[Student] = []

    class Kept(Student):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            students.append(self)

    monkeypatch.setattr(module, "Student", Kept)
    told: list[tuple[int, int]] = []
    path = tuned(tiny, text, tmp_path / "a.gguf", progress=lambda *parts: told.append(parts))
    reader = gguf.GGUFReader(path)
    moved = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for name, weight in students[0].moving.items():
        np.testing.assert_allclose(moved[name], weight().detach().numpy(), rtol=1e-5, atol=1e-9)
    field = reader.get_field("bezel.provenance.calibration")
    assert field is not None
    assert field.contents() == "error feedback on the quantized model's inputs, then 3 steps of tuning"
    with open_checkpoint(tiny) as source:
        assert all(report.ok for report in verify(path, source))
        plain = tmp_path / "plain.gguf"
        export_calibrated(source, plain, "q4_0", None, text, tokens=1024)
    changed = [t.name for t in gguf.GGUFReader(plain).tensors if not np.array_equal(data_of(path, t.name), t.data)]
    assert set(changed) == set(students[0].moving)
    assert all(0 <= done <= total for done, total in told)
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("spare", [0, -1])
def test_all_layers_work_is_held_where_there_is_room(
    spare: int, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, what is freed goes back at once."""
    said: list[object] = []

    class Noted(Student):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            said.append(args[-1])

    with open_checkpoint(tiny) as source:
        read = read_text(source, text, module.Tuned.tokens_for(source, 3, SEQUENCE))
        need = module.memory_for(source, read, True, hold=True)
    monkeypatch.setattr(module, "Student", Noted)
    monkeypatch.setattr(module, "give_back_at_once", lambda: said.append("at once"))
    monkeypatch.setattr(module, "available_memory", lambda: need + spare)
    tuned(tiny, text, tmp_path / "b.gguf")
    assert said == ([True] if spare == 0 else ["at once", False])


def test_an_onnx_folder_of_a_tuned_file_says_so_and_passes(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Next to what the file came from: its norms moved, too."""
    file, folder = tmp_path / "a.gguf", tmp_path / "onnx"
    with open_checkpoint(tiny) as source:
        export_calibrated(source, file, "q4_0", "q8_0", text, None, False, 1024, 3)
        with open_checkpoint(file, quantized=True) as kept:
            export_onnx(OnnxSource(kept), folder)
        assert all(report.ok for report in verify(folder, source))
    with GGUFModel(file) as before, OnnxFolder(folder) as after:
        said = {key: value for key, value in before.metadata.items() if "calibration" in key}
        assert len(said) == 3
        assert said.items() <= after.metadata.items()
    with open_checkpoint(file, quantized=True) as kept:
        rounded_again = OnnxSource(kept, "int8", requantize=True)
        assert not said.keys() & rounded_again.metadata.keys()


def test_tuning_that_leads_away_is_left_out(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was calibrated, to the byte, and the summary says so."""
    monkeypatch.setattr(module, "RATES", {**module.RATES, "factors": 1.0})
    text.write_text(TEXT.read_text()[:4000])
    told: list[object] = []
    with open_checkpoint(tiny) as source:
        hear = {"progress": lambda *at: told.append(at), "warn": told.append}
        away = export_calibrated(source, tmp_path / "away.gguf", "q4_0", None, text, tokens=1024, tune_steps=3, **hear)
        export_calibrated(source, tmp_path / "plain.gguf", "q4_0", None, text, tokens=1024)
    assert away.divergence is not None
    assert away.divergence[1] > away.divergence[0]
    little, led_away = away.warnings[-2:]
    assert "tuning led away from the exact model" in led_away
    assert "tokens, which 3 steps go through again and again" in little
    assert told[0] == little  # before there is any progress
    assert little not in told[1:]
    assert (tmp_path / "away.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_a_refused_export_keeps_nothing(text: Path, tmp_path: Path) -> None:
    (tmp_path / "o.gguf").write_bytes(b"GGUF")
    with open_checkpoint(DEMO) as source:
        for name, quant, words in (("o", "q4_0", "exists already"), ("f32", "f32", "no matrix is to be in blocks")):
            with pytest.raises(InvalidRequest, match=words):
                export_calibrated(source, tmp_path / f"{name}.gguf", quant, None, text, tokens=1024, tune_steps=1)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "o.gguf"}


def test_scales_and_norms_of_larger_models_move_less(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(DEMO) as source:
        assert module.rates_for(source) == module.RATES
        monkeypatch.setattr(module, "_SMALL", module._SMALL / 100)
        found = module.rates_for(source)
    assert found["place"] == module.RATES["place"]
    assert found["factors"] == found["norm"] == pytest.approx(0.003 / 10, rel=0.02)


def data_of(path: Path, name: str) -> np.ndarray:
    return next(t.data for t in gguf.GGUFReader(path).tensors if t.name == name)


@pytest.mark.parametrize(
    ("seconds", "step", "by"),
    [(0.0, 2, KeyboardInterrupt), (1e9, 2, KeyboardInterrupt), (1e9, 0, KeyboardInterrupt), (1e9, 2, SystemExit)],
)
def test_a_broken_off_tuning_goes_on(
    seconds: float,
    step: int,
    by: type[BaseException],
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the same file as one that was not, however long ago its state was kept; and nothing of the work is left."""
    monkeypatch.setattr(module, "_KEEP_SECONDS", seconds)
    whole = tuned(tiny, text, tmp_path / "whole.gguf", 4).read_bytes()
    steps: list[int] = []
    take = Descent.take

    def broken_off(self: Descent, *args: Any) -> float:
        if self.step == step and step not in steps:
            steps.append(step)
            raise by
        steps.append(self.step)
        return take(self, *args)

    monkeypatch.setattr(Descent, "take", broken_off)
    with pytest.raises(by):
        tuned(tiny, text, tmp_path / "again.gguf", 4)
    assert not (tmp_path / "again.gguf").exists()
    assert tuned(tiny, text, tmp_path / "again.gguf", 4).read_bytes() == whole
    assert steps == sorted([0, 1, 2, 3, step])
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "whole.gguf", "again.gguf"}


def test_half_a_step_is_not_kept(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned(tiny, text, tmp_path / "o.gguf", 2)
    assert list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob(f"{module._STATE:06}.npz"))


def test_what_tuning_needs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*options: str) -> str:
        found = CliRunner().invoke(main, ["export", str(DEMO), str(tmp_path / "o.gguf"), "--quant", "q4_0", *options])
        assert found.exit_code
        assert {path.name for path in tmp_path.iterdir()} <= {"text.txt", "m.safetensors", ".o.gguf.work"}
        return found.output

    assert "--tune goes with --calibration TEXT" in said("--tune")
    assert "Give --tune or --tune-scales" in said("--calibration", str(text), "--tune", "--tune-scales")
    assert "--tune-steps goes with --tune" in said("--calibration", str(text), "--tune-steps", "3")
    monkeypatch.setattr(module, "available_memory", lambda: 10**6)
    assert "tuning takes about 0.7 GB of memory, and 0.0 GB are free; --tune-scales takes 0.6 GB" in said(
        "--calibration", str(text), "--tune"
    )
    monkeypatch.setitem(sys.modules, "bezel.export.tuning.tuned", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "bezel.export.tuning.tuned")
    assert "pip install 'bezel-lm[tune]'" in said("--calibration", str(text), "--tune")
    moments = ["calibrate", str(DEMO), "--text", str(text), "-o", str(tmp_path / "m.safetensors")]
    assert CliRunner().invoke(main, moments).exit_code == 0
    assert "give --calibration TEXT" in said("--calibration", str(tmp_path / "m.safetensors"), "--tune")


def test_what_is_exact_is_not_tuned(tmp_path: Path) -> None:
    """Of a checkpoint whose weights are those of a Q4_0 file, rounded to bfloat16, nothing but norms could move: this
    is said before anything is computed.
    """
    folder = checkpoint_folder("gemma2-gqa", tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name, x in weights.items():
        if x.ndim == 2:
            weights[name] = bf16(Q4_0.dequantize(Q4_0.quantize(bf16(x))))
    save_file(weights, folder / "model.safetensors")
    (tmp_path / "text.txt").write_text(TEXT.read_text()[:4000])
    before = set(tmp_path.iterdir())
    with open_checkpoint(folder) as source, pytest.raises(InvalidRequest, match="every matrix is kept exactly"):
        export_calibrated(source, tmp_path / "o.gguf", "q4_0", None, tmp_path / "text.txt", tune_steps=2)
    assert set(tmp_path.iterdir()) == before
