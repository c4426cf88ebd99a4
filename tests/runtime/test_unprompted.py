"""Texts from nothing: drawn as the model has it, whatever else is written meanwhile, and never half a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bezel.runtime import unprompted as module
from bezel.runtime.api import load
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.unprompted import unprompted
from click.testing import CliRunner


@pytest.fixture
def demo(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q8_0")


def test_no_text_depends_on_the_others(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "LONGEST", 60)
    with load(demo) as model:
        many = unprompted(model, 600, 7, lambda *now: told.append(now))
        assert len(many) >= 10
        assert unprompted(model, 600, 8)[0] != many[0]
        (alone,) = unprompted(model, 30, 7)  # no more texts than so many tokens fill
    assert many[0].startswith(alone[:80])
    assert len(set(many)) == len(many)
    assert told[-1] == (600, 600)


def test_tokens_are_drawn_by_their_chances() -> None:
    logits = np.log(
        np.array([0.5, 0.0, 0.25, 0.25, 0.0], np.float32), where=[1, 0, 1, 1, 0], out=np.full(5, -np.inf, np.float32)
    )
    random = np.random.default_rng(0)
    found = Counter(module._drawn(logits, random) for _ in range(4000))
    assert set(found) == {0, 2, 3}
    assert found[0] == pytest.approx(2000, abs=130)
    assert found[2] == pytest.approx(1000, abs=115)


def test_only_what_texts_are_made_of(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Special tokens are never drawn, but for the end of a text, behind which the next one begins."""
    with load(demo) as model:
        loud = sorted(model.tokenizer.special_ids)

        def only_special(segments: list[object]) -> np.ndarray:
            logits = np.zeros((len(segments), model.tokenizer.vocab_size), np.float32)
            logits[:, loud] = 5 + np.log(len(logits[0]))
            return logits

        monkeypatch.setattr(model.backend, "forward", only_special)
        drawn: list[int] = []
        draw = module._drawn
        monkeypatch.setattr(module, "_drawn", lambda *given: drawn.append(draw(*given)) or drawn[-1])
        unprompted(model, 5, 0)
    assert set(drawn) & set(loud) == {model.tokenizer.eos_id}


def test_the_command(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str, code: int = 0) -> str:
        found = CliRunner().invoke(main, ["write", str(demo), *arguments])
        assert found.exit_code == code
        return found.output

    out = tmp_path / "own.txt"
    assert "own.txt: 0 kB, " in said(str(out), "--tokens", "100")
    first = out.read_text()
    assert "exists already" in said(str(out), "--tokens", "100", code=1)
    said(str(out), "--tokens", "100", "--force", "--threads", "1")
    assert out.read_text() == first
    before = demo.read_bytes()
    assert "is something else" in said(str(demo), "--force", code=1)  # a model named twice by mistake
    assert demo.read_bytes() == before

    def interrupted(*_: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "unprompted", interrupted)
    assert "nothing was written" in said(str(out), "--force", code=130)
    assert out.read_text() == first
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def test_folders_are_refused(onnx_of: Callable[..., Path]) -> None:
    with load(onnx_of("demo", "int8")) as model, pytest.raises(InvalidRequest, match="give a GGUF file"):
        unprompted(model, 10, 0)
