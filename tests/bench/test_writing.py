"""Measuring on what the reference itself writes: continuations, and answers in a chat."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.loss import writing as module
from bezel.bench.loss.measure import measure
from bezel.bench.loss.metrics import compare
from bezel.bench.loss.passages import begun_chats, cut, read_texts
from bezel.bench.loss.result import Measurement
from bezel.bench.loss.state import KeptResults
from bezel.bench.loss.subjects import Opener, Spec, parse_spec
from bezel.bench.loss.writing import with_answers
from bezel.bench.progress import silent
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.text.chat import Message, render
from click.testing import CliRunner
from tiny import DEMO, TEXT

LINES = "Tell me a tale.\n\nWho was the King?\nWhat did he want, and why?\n"
CHUNK = 48


@pytest.fixture(scope="module")
def exact() -> Spec:
    return parse_spec(str(DEMO), Spec(Path(), None, "f32", "f32"))


@pytest.fixture
def run(gguf_of: Callable[..., Path], exact: Spec, tmp_path: Path) -> Callable[..., Measurement]:
    rounded = parse_spec(f"{gguf_of('demo', 'q4_0')}@engine=reference,kv=f32", Spec(Path()))

    def call(protocol: str, content: str, **options: Any) -> Measurement:
        text = tmp_path / "text.txt"
        text.write_text(content, encoding="utf-8")
        return measure([rounded], exact, [text], protocol=protocol, chunk=CHUNK, states=tmp_path / "states", **options)

    return call


def test_the_second_half_is_the_reference_s(run: Callable[..., Measurement], tmp_path: Path) -> None:
    """It finds its own continuation likelier than the author's; the loss is what both models say of it."""
    tale = TEXT.read_text("utf-8")[:1500]
    plain, own = (run(protocol, tale, limit=6) for protocol in ("chunks", "written"))
    assert own.scored == plain.scored == 6 * (CHUNK // 2 - 1)
    assert own.reference.perplexity.value < 0.8 * plain.reference.perplexity.value
    writer, candidate = (
        Opener().open(Spec(Path(m.path), "reference", "f32", "f32")) for m in (own.reference, *own.candidates)
    )
    passages = dict(enumerate(cut(read_texts([tmp_path / "text.txt"], writer.tokenizer), "written", CHUNK, 6)))
    klds = []
    for number, passage in with_answers(writer, passages, CHUNK, KeptResults(tmp_path, {}), silent).items():
        assert len(passage.ids) == CHUNK
        np.testing.assert_array_equal(passage.ids[: CHUNK // 2 + 1], passages[number].ids[: CHUNK // 2 + 1])
        assert not writer.tokenizer.special_ids & set(passage.ids[1:].tolist())
        logits = [subject.start(CHUNK).forward(passage.ids[:-1], CHUNK // 2 - 1) for subject in (writer, candidate)]
        klds.append(compare(logits, [(0, 1)], CHUNK // 2, passage.ids[CHUNK // 2 + 1 :])[0]["kld"])
    assert own.candidates[0].metrics.kld_mean.value == pytest.approx(np.mean(klds), rel=1e-4)


def test_answers_in_a_chat(run: Callable[..., Measurement], exact: Spec, tmp_path: Path) -> None:
    found = run("chat", LINES)
    assert found.chunks == 3
    tokenizer = Opener().open(exact).tokenizer
    asked = begun_chats(read_texts([tmp_path / "text.txt"], tokenizer), tokenizer)
    assert [passage.line for passage in asked] == [1, 3, 4]
    assert asked[1].ids.tolist() == render(tokenizer, [Message("user", "Who was the King?")])
    answered = with_answers(
        Opener().open(exact), dict(enumerate(asked)), CHUNK, KeptResults(tmp_path, {"other": 1}), silent
    )
    assert found.scored == sum(passage.scored for passage in answered.values())
    for before, after in zip(asked, answered.values(), strict=True):
        assert after.ids[: len(before.ids)].tolist() == before.ids.tolist()
        assert after.first == len(before.ids) - 1  # the answer's first token counts
        answer = after.ids[len(before.ids) :].tolist()
        assert len(after.ids) == CHUNK or answer[-1] == tokenizer.end_of_turn_id
        assert not tokenizer.special_ids & set(answer[:-1])


def test_an_answer_ends_with_the_turn(exact: Spec) -> None:
    writer = Opener().open(exact)
    ids = np.array(writer.tokenizer.encode("Once upon a time", bos=True))
    free = module.continuation(writer, ids, 20, 1.0, 3)
    assert len(free) == 20
    stopped = module.continuation(writer, ids, 20, 1.0, 3, ends={int(free[4])})
    assert stopped.tolist() == free[: free.tolist().index(free[4]) + 1].tolist()


def test_special_tokens_are_never_written(exact: Spec) -> None:
    tokenizer = Opener().open(exact).tokenizer

    class Loud:
        """A model that expects nothing but special tokens."""

        chunk, position = 8, 0
        eye = None

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def start(self, _: int) -> Loud:
            return self

        def forward(self, *_: Any, **__: Any) -> np.ndarray:
            logits = np.zeros((1, tokenizer.vocab_size), np.float32)
            logits[0, list(tokenizer.special_ids)] = 50
            return logits

    loud: Any = Loud()
    assert not tokenizer.special_ids & set(module.continuation(loud, np.array([2]), 20, 1.0, 0).tolist())
    assert module.continuation(loud, np.array([2]), 20, 1.0, 0, ends={1}).tolist() == [1]


def test_what_was_written_is_kept(run: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("chat", LINES)
    monkeypatch.setattr(module, "continuation", None)
    assert vars(run("chat", LINES)) | {"time": ""} == vars(first) | {"time": ""}


def test_lines_that_cannot_be_asked(run: Callable[..., Measurement]) -> None:
    with pytest.raises(InvalidRequest, match=r"line 2: found \d+ tokens with the template, expected fewer than the 48"):
        run("chat", "Why?\n" + "long " * 60)
    assert run("chat", "\ufeffWhy?\n" + "long " * 60, limit=1).chunks == 1  # which does not read the second
    assert run("chat", "One\u2028line,\x0b\x85 and no other").chunks == 1
    with pytest.raises(InvalidRequest, match="found no line, expected a user's message on each"):
        run("chat", "\n \n")


def test_the_command(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "questions.txt"
    text.write_text(LINES, encoding="utf-8")
    command = ["measure", str(gguf_of("demo", "q4_0")), "--reference", str(DEMO), "--text", str(text), "--chunk", "48"]
    command += ["--protocol", "chat", "--state", str(tmp_path / "states"), "--html", str(tmp_path / "report.html")]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "3 chats of 48 tokens of questions.txt" in shown.output
    assert "the reference's answer is scored" in (tmp_path / "report.html").read_text("utf-8")
    report = (tmp_path / "report.html").read_text("utf-8")
    assert re.search(r"at token \d+ of the chat of line [134] of questions\.txt", report)
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert found["protocol"] == "chat"
    assert all(worst["position"] < 48 and worst["line"] in (1, 3, 4) for worst in found["candidates"][0]["worst"])


def test_a_template_that_is_not_gemma_s_is_told(gguf_of: Callable[..., Path], exact: Spec, tmp_path: Path) -> None:
    """And Gemma's own is not, nor any where nobody chats."""
    (tmp_path / "text.txt").write_text(LINES * 4, encoding="utf-8")
    rounded = parse_spec(f"{gguf_of('demo', 'q4_0')}@engine=reference", Spec(Path()))
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    said = {}
    for name, template in (("gemma", config["chat_template"]), ("other", "{{ messages }}"), ("none", None)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        for protocol in ("chat", "chunks"):
            read = {"protocol": protocol, "chunk": 32, "limit": 1, "states": tmp_path / "states"}
            found = measure([rounded], replace(exact, path=folder), [tmp_path / "text.txt"], **read)
            said[name, protocol] = [line for line in found.warnings if "template" in line]
    assert {key for key, lines in said.items() if lines} == {("other", "chat"), ("none", "chat")}
    assert "model has a chat template that is not one of Gemma's" in said["other", "chat"][0]
    assert "model has no chat template" in said["none", "chat"][0]
