"""Multiple choice by likelihood, from a local file of questions: how often is the likeliest choice the right one?

A question is a line of JSON with the fields that lm-evaluation-harness and its data sets use:

- context: `query`, `ctx` or `context` as it is, or `question` as "Question: …" and "Answer:" on the next line;
- choices: `choices` or `endings`, a list of texts, or {"text": [...], "label": [...]};
- the right one: `gold`, `label`, `answer` or `answerKey`, its index from 0 (a number or digits), or, looked for first,
  one of the labels, the text of a choice, or its letter from A.

A choice follows the context after one space. Accuracy (acc) takes the choice with the largest log-likelihood, by bytes
(acc_norm) that with the largest per byte of its text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ...runtime.errors import BezelError, ContextFull, InvalidRequest
from ...runtime.files.text_file import read_text_file
from ...runtime.session import Session
from ..loss.intervals import Interval
from ..loss.state import KeptResults
from ..progress import Progress, silent
from .likelihood import Scorer, encode_pair

_CONTEXTS = ("query", "ctx", "context", "question")
_CHOICES = ("choices", "endings")
_ANSWERS = ("gold", "label", "answer", "answerKey")

_KEPT_AT_ONCE = 16  # questions

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """`gold` is the index of the right choice; `line` is where the question stands in its file, from 1."""

    context: str
    choices: tuple[str, ...]
    gold: int
    line: int


@dataclass(frozen=True)
class QuestionFile:
    path: Path
    sha256: str
    questions: list[Question]


@dataclass(frozen=True)
class Accuracy:
    """The shares of questions that a model answers rightly."""

    name: str
    acc: Interval
    acc_norm: Interval


@dataclass(frozen=True)
class Flips:
    """`worse` questions only a answers rightly, `better` ones only b, on these lines of the file; p is McNemar's."""

    a: str
    b: str
    worse: int
    better: int
    p: float
    worse_lines: list[int]
    better_lines: list[int]


@dataclass(frozen=True)
class Answers:
    """What the models made of a file of questions."""

    file: str
    sha256: str
    questions: int
    candidates: list[Accuracy]
    pairs: list[Flips]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_questions(path: Path) -> QuestionFile:
    """The questions of a JSONL file. Raises InvalidRequest, which says the line and the field."""
    text, sha256 = read_text_file(path)
    questions = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line), number))
            except json.JSONDecodeError as error:
                raise InvalidRequest(
                    f"{path}: line {number}: found no JSON ({error.msg}), expected a question"
                ) from None
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"{path}: line {number}: {error}") from None
    if not questions:
        raise InvalidRequest(f"{path}: found no question, expected one a line, in JSON")
    return QuestionFile(path, sha256, questions)


def run_tasks(
    file: QuestionFile,
    sessions: Mapping[str, Callable[[], Session]],
    confidence: float = 0.95,
    kept: Mapping[str, KeptResults] | None = None,
    progress: Progress = silent,
) -> Answers:
    """Let each model answer the questions of a file; `sessions` opens them, by name, one after the other.

    The first is what the others are compared with. What a model's `kept` results hold is not asked again. Progress
    counts answers and says the model's name. Raises InvalidRequest.
    """
    questions = file.questions
    right: dict[str, Bools] = {}
    for turn, (name, start) in enumerate(sessions.items()):
        found = np.empty((len(questions), 2), bool)
        scorer: Scorer | None = None
        for first in range(0, len(questions), _KEPT_AT_ONCE):
            some = questions[first : first + _KEPT_AT_ONCE]
            stored = kept[name].load(first) if kept else None
            if stored is None:
                scorer = scorer or Scorer(start())
                answers = np.empty((len(some), 2), bool)
                for i, question in enumerate(some):
                    progress(turn * len(questions) + first + i, len(sessions) * len(questions), name)
                    try:
                        answers[i] = _answer(scorer, question)
                    except BezelError as error:
                        raise InvalidRequest(f"{file.path}: line {question.line}: {error}") from error
                stored = {"right": answers}
                if kept:
                    kept[name].save(first, stored)
            found[first : first + len(some)] = stored["right"]
        right[name] = found
    progress(len(sessions) * len(questions), len(sessions) * len(questions), "")
    return Answers(
        file=str(file.path),
        sha256=file.sha256,
        questions=len(questions),
        candidates=[Accuracy(name, *(_share(column, confidence) for column in f.T)) for name, f in right.items()],
        pairs=[_flips(questions, a, b, right[a][:, 0], right[b][:, 0]) for a, b in combinations(right, 2)],
    )


def show_answers(task: Answers) -> None:
    """Print a result of `run_tasks`."""
    first = task.candidates[0].name
    flips = {pair.b: pair for pair in task.pairs if pair.a == first}
    width = max(len(c.name) for c in task.candidates)
    click.echo(f"{task.file}: {task.questions} questions")
    heads = f"{'worse':>7}{'better':>8}{'p':>9}   than {first}" if flips else ""
    click.echo(f"  {'':{width}}  {'accuracy':>18}  {'by bytes':>18}{heads}")
    for c in task.candidates:
        line = f"  {c.name:{width}}  {_shown(c.acc)}  {_shown(c.acc_norm)}"
        if pair := flips.get(c.name):
            line += f"{pair.worse:7}{pair.better:8}{pair.p:9.2g}"
        click.echo(line)


def mcnemar(worse: int, better: int) -> float:
    """The exact two-sided p of McNemar's test: a fair coin's chance to be as uneven (McNemar 1947)."""
    n, fewer = worse + better, min(worse, better)
    tail: int = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), which stays within 0 and 1."""
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _answer(scorer: Scorer, question: Question) -> tuple[bool, bool]:
    """Whether the likeliest choice is the right one, and whether the likeliest per byte is."""
    scores = []
    for choice in question.choices:
        gap = "" if choice[0].isspace() else " "
        context, continuation = encode_pair(scorer.encode, question.context, gap + choice)
        if not continuation:
            raise InvalidRequest(f"choice {_short(choice)}: has no token of its own after the context")
        try:
            scores.append(scorer.score(context, continuation)[0])
        except ContextFull as error:
            raise ContextFull(f"choice {_short(choice)}: {error}") from None
    per_byte = np.array(scores) / [len(choice.encode()) for choice in question.choices]
    return int(np.argmax(scores)) == question.gold, int(np.argmax(per_byte)) == question.gold


def _question(raw: Any, line: int) -> Question:
    if not isinstance(raw, dict):
        raise ValueError(f"found {type(raw).__name__}, expected an object")
    key, context = _first(raw, _CONTEXTS)
    if not isinstance(context, str):
        raise ValueError(f"'{key}': found {_short(context)}, expected a text")
    if key == "question":
        context = f"Question: {context}\nAnswer:"
    key, choices = _first(raw, _CHOICES)
    labels: Any = []
    if isinstance(choices, dict):
        labels = choices.get("label", [])
        choices = choices.get("text")
    if not _texts(choices) or len(choices) < 2 or not all(choices):
        raise ValueError(f"'{key}': found {_short(choices)}, expected two or more texts")
    if labels and (not _texts(labels) or len(labels) != len(choices)):
        raise ValueError(
            f"'{key}': found the labels {_short(labels)}, expected a text for each of {len(choices)} choices"
        )
    key, answer = _first(raw, _ANSWERS)
    gold = _index_of(answer, choices, labels)
    if gold is None:
        raise ValueError(f"'{key}': found {_short(answer)}, expected which of {len(choices)} choices is right")
    return Question(context, tuple(choices), gold, line)


def _index_of(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    if isinstance(answer, str):
        letters = [chr(ord("A") + i) for i in range(min(len(choices), 26))]
        for known in (labels, choices, letters):
            if answer in known:
                return known.index(answer)
        answer = int(answer) if answer.isascii() and answer.isdigit() and len(answer) < 4 else None
    return answer if type(answer) is int and 0 <= answer < len(choices) else None


def _first(raw: dict[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    for name in names:
        if name in raw:
            return name, raw[name]
    raise ValueError(f"found {_short(list(raw))}, expected one of the fields {', '.join(names)}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _short(value: Any) -> str:
    return repr(value)[:80]


def _share(right: Bools, confidence: float) -> Interval:
    return Interval(float(right.mean()), *wilson(int(right.sum()), len(right), confidence))


def _flips(questions: Sequence[Question], name_a: str, name_b: str, a: Bools, b: Bools) -> Flips:
    lines = np.array([question.line for question in questions])
    worse, better = (lines[flipped].tolist() for flipped in (a & ~b, ~a & b))
    p = mcnemar(len(worse), len(better))
    return Flips(name_a, name_b, len(worse), len(better), p, worse_lines=worse, better_lines=better)


def _shown(share: Interval) -> str:
    interval = f"({100 * (share.low or 0):.1f} – {100 * (share.high or 0):.1f})"
    return f"{100 * share.value:5.1f} % {interval:>15}"
