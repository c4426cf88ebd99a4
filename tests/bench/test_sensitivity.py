from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.loss import sensitivity as module
from bezel.bench.loss.metrics import compare
from bezel.bench.loss.passages import cut, read_texts
from bezel.bench.loss.result import Sensitivity
from bezel.bench.loss.sensitivity import round_trip, sensitivity
from bezel.bench.loss.subjects import FloatBackend
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.formats import FORMATS
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidCheckpoint, InvalidRequest
from bezel.runtime.text.tokenizer import Tokenizer
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny import DEMO, checkpoint_folder

TEXT = DEMO.parent / "fairy-heldout.txt"
TINY = "gemma2-gqa"
OPTIONS: dict[str, Any] = {"chunk": 64, "limit": 6}


def direct(folder: Path, tensors: list[str], form: str) -> float:
    """The KLD of rounding some tensors, with a whole forward pass of a model that holds them rounded."""
    with open_checkpoint(folder) as checkpoint:
        passages = cut(read_texts([TEXT], Tokenizer(checkpoint.vocabulary(), "")), "chunks", 64, 6)
        exact, rounded = FloatBackend(checkpoint), FloatBackend(checkpoint)
        for spec in checkpoint.specs:
            if spec.gguf in tensors:
                home = rounded.weights.shared if spec.layer is None else rounded.weights.layers[spec.layer]
                home[spec.role] = round_trip(home[spec.role], FORMATS[form])
        klds = []
        for passage in passages:
            engines = [backend.engine(64, "f32", 64, False) for backend in (exact, rounded)]
            logits = [engine.forward(passage.ids[:-1], passage.scored) for engine in engines]
            klds.append(compare(logits, [(0, 1)], 0, passage.ids[passage.first + 1 :])[0]["kld"])
    return float(np.mean(klds))


@pytest.mark.parametrize("by", ["tensor", "role", "layer"])
def test_what_it_says_is_what_rounding_costs(tmp_path: Path, by: str) -> None:
    folder = checkpoint_folder(TINY, tmp_path)
    found = sensitivity(folder, [TEXT], ["q4_0"], by=by, states=tmp_path / "states", **OPTIONS)
    assert len(found.entries) == {"tensor": 29, "role": 8, "layer": 5}[by]
    klds = [entry.kld for entry in found.entries]
    assert klds == sorted(klds, reverse=True)
    for entry in found.entries[:: 6 if by == "tensor" else 3]:
        # A float32 forward pass that resumes is the same sums in the same order, up to BLAS's choice by shape.
        assert entry.kld == pytest.approx(direct(folder, entry.tensors, "q4_0"), rel=1e-3, abs=1e-9)
        assert entry.low is not None
        assert entry.high is not None
        assert entry.low <= entry.kld <= entry.high
    tensors = [name for entry in found.entries for name in entry.tensors]
    assert len(tensors) == len(set(tensors)) == 29


def test_a_planted_corruption_is_ranked_first(tmp_path: Path) -> None:
    """One huge weight a block, on an input that is always 0, leaves a 4-bit scale no room for all the others."""
    folder = checkpoint_folder(TINY, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.pre_feedforward_layernorm.weight"][::32] = -1
    weights["model.layers.2.mlp.up_proj.weight"][:, ::32] = 50
    save_file(weights, folder / "model.safetensors")
    for by, want in (("tensor", ["blk.2.ffn_up.weight"]), ("role", [f"blk.{i}.ffn_up.weight" for i in range(4)])):
        found = sensitivity(folder, [TEXT], ["q4_0"], by=by, states=tmp_path / "states", **OPTIONS)
        first, second = found.entries[:2]
        assert first.tensors == want
        assert first.low is not None
        assert second.high is not None
        assert first.low > second.high
    # What is kept of this model is not taken for another one's.
    sound = checkpoint_folder(TINY, tmp_path / "sound")
    assert sensitivity(sound, [TEXT], ["q4_0"], by="role", states=tmp_path / "states", **OPTIONS).entries[0] != first


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_folder(TINY, tmp_path)
    rounds: list[str] = []
    original = module._Exact.without

    def counting(self: Any, group: Any, form: Any) -> Any:
        if len(rounds) == 10:
            raise KeyboardInterrupt
        rounds.append(form.name)
        return original(self, group, form)

    def run(*formats: str) -> Sensitivity:
        return sensitivity(folder, [TEXT], formats, by="role", chunk=64, limit=2, states=tmp_path / "states")

    monkeypatch.setattr(module._Exact, "without", counting)
    with pytest.raises(KeyboardInterrupt):
        run("q4_0")
    monkeypatch.setattr(module._Exact, "without", lambda *a: rounds.append(a[2].name) or original(*a))
    run("q4_0")
    assert len(rounds) == 16
    run("q8_0", "q4_0")
    assert rounds[16:] == ["q8_0"] * 16


def test_what_does_not_fit_a_format_is_left_out(tmp_path: Path) -> None:
    """Rows of 64 and 96 are no whole blocks of 256."""
    folder = checkpoint_folder(TINY, tmp_path)
    found = sensitivity(folder, [TEXT], ["q4_k", "q8_0"], by="role", chunk=64, limit=1, states=tmp_path / "states")
    assert {entry.format for entry in found.entries} == {"q8_0"}
    assert found.entries[0].low is None  # one chunk


def test_what_it_refuses(tmp_path: Path, gguf_of: Callable[..., Path]) -> None:
    with pytest.raises(InvalidRequest, match="found q3_x, expected of"):
        sensitivity(DEMO, [TEXT], ["q4_0", "q3_x"], states=tmp_path)
    with pytest.raises(InvalidCheckpoint, match="quantized already"):
        sensitivity(gguf_of(TINY, "q8_0"), [TEXT], ["q4_0"], states=tmp_path)


def test_chunks_that_no_model_was_made_for(tmp_path: Path) -> None:
    folder = checkpoint_folder(TINY, tmp_path)
    with pytest.raises(InvalidRequest, match="found 257, expected 4 to 256"):
        sensitivity(folder, [TEXT], ["q4_0"], chunk=257, states=tmp_path / "states")


def command(folder: Path, tmp_path: Path) -> list[str]:
    options = ["--text", str(TEXT), "--chunk", "64", "--chunks", "6", "--by", "role", "--formats", "q4_0,q8_0"]
    return ["sensitivity", str(folder), *options, "--state", str(tmp_path / "states")]


def test_the_command_writes_the_file_for_export(tmp_path: Path) -> None:
    folder, out = checkpoint_folder(TINY, tmp_path), tmp_path / "out.json"
    called = command(folder, tmp_path)
    shown = CliRunner().invoke(main, [*called, "--out", str(out), "--html", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    assert "mean KLD when one role alone is q4_0" in shown.output
    assert "mean KLD when one role alone is q8_0" in shown.output
    assert "Which roles are sensitive to q4_0?" in (tmp_path / "report.html").read_text("utf-8")
    written = json.loads(out.read_text())
    assert (written["bezel_sensitivity"], written["tokens"]) == (1, 6 * 64)
    assert len(written["entries"]) == 16
    assert json.loads(CliRunner().invoke(main, [*called, "--json"]).stdout) == written
    best = ["export", str(folder), str(tmp_path / "best.gguf"), "--size", "6bpw", "--sensitivity", str(out)]
    assert CliRunner().invoke(main, best).exit_code == 0


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Exact, "without", stop)
    stopped = CliRunner().invoke(main, command(checkpoint_folder(TINY, tmp_path), tmp_path))
    assert stopped.exit_code == 130
    assert "the same command goes on from here" in stopped.output
