"""Multiple choice by likelihood, next to the plainest computation of the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.tasks import tasks as module
from bezel.bench.tasks.likelihood import Scorer, encode_pair
from bezel.bench.tasks.tasks import Question, mcnemar, read_questions, run_tasks, show_answers, wilson
from bezel.runtime import Model
from bezel.runtime.commands.main import main
from bezel.runtime.errors import ContextFull, InvalidRequest
from click.testing import CliRunner
from tiny import DEMO, token_ids

ModelOf = Callable[..., Model]
CONTEXT = "Once upon a time there was a king who had three"
CHOICES = ["sons", "daughters and a horse", "q", "golden apples"]
# Float32 logits of two orders of summation differ by some 1e-5; a score is a sum of a few log-probabilities of them.
NEAR = 1e-3


def plain(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model.logits([*context, *continuation]).astype(np.float64)[len(context) - 1 : -1]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(continuation))
    return float(log_p[rows, continuation].sum()), bool((logits.argmax(axis=1) == continuation).all())


def encoder(model: Model) -> Callable[[str], list[int]]:
    return partial(model.tokenizer.encode, bos=True)


def test_scores_are_the_plain_ones(model_of: ModelOf) -> None:
    """Whatever came before: another context, a shorter one, one whose rings have gone on, the same again."""
    model = model_of("gemma2-gqa")
    scorer, ids = Scorer(model.session()), token_ids("gemma2-gqa")
    pairs = [(ids[:20], ids[20:23]), (ids[:20], ids[30:33]), (ids[:5], ids[5:30]), (ids[:1], ids[1:2])]
    pairs += [(ids[:20], list(np.resize(ids[1:], 150))), (ids[:20], ids[20:23]), ([2, 9, 9], ids[:4])]
    for context, continuation in pairs:
        score, greedy = scorer.score(context, continuation)
        want, want_greedy = plain(model, context, continuation)
        assert score == pytest.approx(want, abs=NEAR * len(continuation))
        assert greedy is want_greedy


def test_greedy_is_what_decoding_would_write(model_of: ModelOf) -> None:
    model, ids = model_of("demo"), token_ids("demo")[:20]
    written: list[int] = []
    for _ in range(3):
        written.append(int(model.logits(ids + written)[-1].argmax()))
    scorer = Scorer(model.session())
    assert scorer.score(ids, written)[1]
    assert not scorer.score(ids, [*written[:-1], written[-1] + 1])[1]


def test_a_context_is_computed_once(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("demo")
    context, taken = token_ids("demo")[:100], []
    scorer = Scorer(model.session())
    engine = scorer._session.engine
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda ids, n, **kw: (taken.append(len(ids)), forward(ids, n, **kw))[1])
    for continuation in ([7, 8], [9], [7, 10, 11]):
        scorer.score(context, continuation)
    # All but the context's last token once; then that one and what the last token of a choice follows.
    assert sum(taken) == 99 + 2 + 1 + 3


@pytest.mark.parametrize("continuation", [" sons", "s", "", " ", "\n\nThe end.", " ünï 🙂"])
@pytest.mark.parametrize("context", [CONTEXT, "", "A colon: ", "Two lines\n\n", "the kin", "   "])
def test_pairs_are_encoded_together(context: str, continuation: str, model_of: ModelOf) -> None:
    """As lm-evaluation-harness does: white space goes to the right, then the ids of all are cut by their number."""
    encode = encoder(model_of("demo"))
    left, right = encode_pair(encode, context, continuation)
    stripped = context.rstrip()
    assert left == encode(stripped)
    assert right == encode(context + continuation)[len(left) :]
    if context.endswith(" ") and stripped:
        assert encode(context)[: len(left)] == left


def test_a_word_across_the_boundary(model_of: ModelOf) -> None:
    """Encoded alone, a continuation would get other tokens than it has in the text."""
    model = model_of("demo")
    left, right = encode_pair(encoder(model), "Once upon a ti", "me there")
    whole = model.tokenizer.encode("Once upon a time there", bos=True)
    assert right == whole[len(left) :]
    assert right != model.tokenizer.encode("me there")


def write(path: Path, *questions: Any) -> Path:
    path.write_text("\n".join(q if isinstance(q, str) else json.dumps(q) for q in questions) + "\n", "utf-8")
    return path


@pytest.mark.parametrize(
    ("raw", "context", "gold"),
    [
        ({"query": "Q", "choices": ["a", "b"], "gold": 1}, "Q", 1),
        ({"ctx": "Q", "endings": ["a", "b", "c"], "label": "2", "ind": 7}, "Q", 2),
        ({"question": "Q?", "choices": ["a", "b"], "answer": 0}, "Question: Q?\nAnswer:", 0),
        (
            {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"},
            "Question: Q?\nAnswer:",
            0,
        ),
        ({"query": "Q", "choices": ["a", "b"], "answer": "B"}, "Q", 1),
        ({"query": "Q", "choices": ["B", "x"], "answer": "B"}, "Q", 0),
        ({"query": "Q", "choices": ["2", "1"], "answer": "1"}, "Q", 1),
        ({"query": "", "choices": ["a", "b"], "gold": 0}, "", 0),
    ],
)
def test_the_fields_of_a_question(raw: dict[str, Any], context: str, gold: int, tmp_path: Path) -> None:
    (found,) = read_questions(write(tmp_path / "q.jsonl", "", raw)).questions
    choices = raw.get("choices", raw.get("endings"))
    texts = choices["text"] if isinstance(choices, dict) else choices
    assert found == Question(context, tuple(texts), gold, 2)


GOOD = {"query": "Q", "choices": ["a", "b"], "gold": 1}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "line 2: found no JSON"),
        ("[" * 100_000, "line 2"),
        ("[1]", "line 2: found list, expected an object"),
        ({"choices": ["a", "b"], "gold": 1}, "one of the fields query, ctx, context, question"),
        ({"query": "Q", "gold": 1}, "one of the fields choices, endings"),
        ({"query": "Q", "choices": ["a", "b"]}, "one of the fields gold"),
        (GOOD | {"query": 3}, "'query': found 3"),
        (GOOD | {"choices": ["a"]}, "two or more texts"),
        (GOOD | {"choices": ["a", ""]}, "two or more texts"),
        (GOOD | {"choices": ["a", 2]}, "two or more texts"),
        (GOOD | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "for each of 2 choices"),
        (GOOD | {"gold": 2}, "'gold': found 2"),
        (GOOD | {"gold": -1}, "'gold': found -1"),
        (GOOD | {"gold": True}, "'gold': found True"),
        (GOOD | {"gold": "C"}, "'gold': found 'C'"),
        (GOOD | {"gold": [1]}, "which of 2 choices"),
        (GOOD | {"gold": "9" * 5000}, "which of 2 choices"),
    ],
)
def test_a_bad_question_says_its_line(bad: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"line 2|" + why) as caught:
        read_questions(write(tmp_path / "q.jsonl", GOOD, bad))
    assert why in str(caught.value)
    assert "line 2" in str(caught.value)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    plain = write(tmp_path / "q.jsonl", GOOD)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert read_questions(tmp_path / "marked.jsonl").questions == read_questions(plain).questions


def test_a_file_without_questions(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="found no question"):
        read_questions(write(tmp_path / "q.jsonl", "", " "))
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read_questions(tmp_path / "q.jsonl")


def test_accuracy_and_flips_are_the_plain_ones(
    model_of: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On questions whose right answers are drawn by lot, so that they go all ways."""
    random = np.random.default_rng(3)
    openings = ["Once upon a time", "The king said:", "She went into the", "", "Then came the wolf and"]
    words = ["wood", "a little old man", "castle of the dwarf", "to", "night\n", "her stepmother", "x1"]
    raw = []
    for opening, _ in product(openings, range(6)):
        choices = random.permutation(words)[:4].tolist()
        raw.append({"query": opening, "choices": choices, "gold": int(random.integers(4))})
    path = write(tmp_path / "q.jsonl", *raw)
    models = {name: model_of("gemma2-gqa", name) for name in ("f32", "q4_0")}
    task = run_tasks(read_questions(path), {name: model.session for name, model in models.items()})

    right: dict[str, list[list[bool]]] = {}
    for name, model in models.items():
        for question in raw:
            context = model.tokenizer.encode(question["query"], bos=True)
            scores = []
            for choice in question["choices"]:
                whole = model.tokenizer.encode(f"{question['query']} {choice}", bos=True)
                scores.append(plain(model, context, whole[len(context) :])[0])
            by_byte = [s / len(c.encode()) for s, c in zip(scores, question["choices"], strict=True)]
            picked = [int(np.argmax(s)) == question["gold"] for s in (scores, by_byte)]
            right.setdefault(name, []).append(picked)
    table = {name: np.array(found) for name, found in right.items()}
    assert task.questions == len(raw)
    for c in task.candidates:
        assert [c.acc.value, c.acc_norm.value] == table[c.name].mean(axis=0).tolist()
        assert c.acc.low is not None
        assert c.acc.high is not None
        assert 0 < c.acc.low < c.acc.value < c.acc.high < 1
    a, b = table["f32"][:, 0], table["q4_0"][:, 0]
    (pair,) = task.pairs
    assert (pair.a, pair.b) == ("f32", "q4_0")
    assert (pair.worse, pair.better) == ((a & ~b).sum(), (~a & b).sum())
    lines = np.arange(len(raw)) + 1
    assert (pair.worse_lines, pair.better_lines) == (lines[a & ~b].tolist(), lines[~a & b].tolist())
    assert pair.worse != pair.better  # or the two could be confused
    assert table["f32"][:, 0].tolist() != table["f32"][:, 1].tolist()  # or by bytes would not be tested
    show_answers(task)
    assert f"{100 * a.mean():.1f} %" in capsys.readouterr().out


def test_what_does_not_fit_says_which_question(model_of: ModelOf, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, GOOD | {"query": "long " * 300})
    with pytest.raises(InvalidRequest, match=r"line 2: choice 'a': found 30\d tokens .* the context's 64") as caught:
        run_tasks(read_questions(path), {"small": model_of("demo", "q4_0", context=64).session})
    assert isinstance(caught.value.__cause__, ContextFull)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (10, 2), (2, 10), (5, 5), (0, 12)])
def test_mcnemar_counts_every_way_that_coins_may_fall(worse: int, better: int) -> None:
    n = worse + better
    falls = [sum(coins) for coins in product((0, 1), repeat=n)]
    as_uneven = sum(abs(2 * heads - n) >= abs(worse - better) for heads in falls)
    assert mcnemar(worse, better) == pytest.approx(float(Fraction(as_uneven, len(falls))))


def test_wilson_has_its_coverage() -> None:
    """The interval covers the truth about as often as it says, whatever the truth is, as Wald's does not."""
    random = np.random.default_rng(0)
    for truth in (0.05, 0.5, 0.9):
        drawn = random.binomial(60, truth, 2000)
        covered = np.mean([low <= truth <= high for low, high in (wilson(int(k), 60, 0.95) for k in drawn)])
        assert 0.92 <= covered <= 0.98
    assert wilson(8, 10, 0.95) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # a textbook's
    assert wilson(0, 5, 0.95)[0] == 0


def questions(tmp_path: Path, n: int = 3) -> Path:
    return write(tmp_path / "q.jsonl", *[GOOD | {"query": CONTEXT, "choices": CHOICES}] * n)


def test_the_command(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--questions", str(questions(tmp_path)), "--state", str(tmp_path / "states")]
    models = [str(gguf_of("demo", preset)) for preset in ("q8_0", "q4_0")]
    found = CliRunner().invoke(main, ["tasks", *models, *options, "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["bezel_tasks"] == 1
    (task,) = result["tasks"]
    assert [c["name"] for c in task["candidates"]] == ["demo-q8_0", "demo-q4_0"]
    assert set(task["candidates"][0]["acc"]) == {"value", "low", "high"}
    assert set(task["pairs"][0]) == {"a", "b", "worse", "better", "p", "worse_lines", "better_lines"}
    # A checkpoint can answer too, though it is no model file.
    found = CliRunner().invoke(main, ["tasks", str(DEMO), models[0], *options, "--html", str(tmp_path / "x.html")])
    assert "than fairy-gemma2" in found.output
    assert "q.jsonl: 3 questions" in (tmp_path / "x.html").read_text("utf-8")


def test_a_bad_file_is_said_before_another_is_answered(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    good, bad, states = questions(tmp_path), tmp_path / "bad.jsonl", tmp_path / "states"
    bad.write_text("[]\n")
    command = ["tasks", str(gguf_of("demo")), "--questions", str(good), "--questions", str(bad)]
    found = CliRunner().invoke(main, [*command, "--state", str(states)])
    assert (found.exit_code, states.exists()) == (1, False)
    assert f"{bad}: line 1" in found.output


@pytest.mark.parametrize("verb", ["tasks", "measure", "stress", "sensitivity"])
def test_a_file_given_twice_would_count_twice(verb: str, gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    option, file, model = "--questions" if verb == "tasks" else "--text", questions(tmp_path), str(gguf_of("demo"))
    (tmp_path / "again.jsonl").write_bytes(file.read_bytes())
    reference = {"tasks": [], "sensitivity": ["--formats", "q4_0"]}.get(verb, ["--reference", model])
    again = str(tmp_path / "again.jsonl")
    found = CliRunner().invoke(main, [verb, model, *reference, option, str(file), option, again])
    assert found.exit_code == 1
    assert f"{option}: {again}: found the " in found.output
    assert f"of {file} again" in found.output


def test_what_was_answered_is_kept(
    gguf_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original, after = module._answer, 40

    def answer(scorer: Scorer, question: Question) -> tuple[bool, bool]:
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append(question.line)
        return original(scorer, question)

    monkeypatch.setattr(module, "_answer", answer)
    path = questions(tmp_path, 50)
    command = ["tasks", str(gguf_of("demo", "q4_0")), "--questions", str(path), "--state", str(tmp_path / "states")]
    stopped = CliRunner().invoke(main, [*command, "--json"])
    assert stopped.exit_code == 130
    assert "the same command goes on from here" in stopped.output
    after = 1000
    assert CliRunner().invoke(main, [*command, "--json"]).exit_code == 0
    assert asked == [*range(1, 41), *range(33, 51)]  # two blocks of 16 were whole
    again = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert len(asked) == 58
    monkeypatch.setattr(module, "_answer", original)
    with_nothing_kept = [*command[:-1], str(tmp_path / "other")]
    assert json.loads(CliRunner().invoke(main, [*with_nothing_kept, "--json"]).stdout) == again
    write(path, GOOD | {"query": CONTEXT, "choices": CHOICES}, GOOD)  # other questions
    monkeypatch.setattr(module, "_answer", answer)
    CliRunner().invoke(main, command)
    assert len(asked) == 60
