"""How often a model answers rightly what is asked about drawn pictures: with a question, and by examples alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.api import Model
from ...runtime.text.chat import Content, Message
from ...runtime.text.sampling import Sampling
from ...runtime.vision.image import Image
from ..tasks.tasks import wilson
from .draw import KINDS, TASKS, draw, example, question, scene

TEST_SEED = 5  # of no training
SHOTS = 4


@dataclass(frozen=True)
class Trial:
    """What is said before, the picture (and question) that the model answers, and what is right.

    `group` is "asked", or "shown" by so many examples: `shots`.
    """

    group: str
    kind: str
    shots: int
    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Score:
    """Of so many trials so many were right; the interval is Wilson's, 95 %."""

    right: int
    trials: int

    @property
    def share(self) -> float:
        return self.right / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.trials, 0.95)


def trials(count: int, held_out: bool = False) -> Iterator[Trial]:
    """For each kind of question and each task `count` trials, the same every time; of the held-out pairs, if asked.

    Tasks come with SHOTS examples before, and without any, where nothing says what is wanted.
    """
    random = np.random.default_rng([TEST_SEED, held_out])
    for kind in KINDS:
        for _ in range(count):
            things = scene(random, int(random.integers(1, 5)), held_out)
            asked = question(things, kind, random)
            content: Content = [Image(draw(things, random)), asked.text]
            yield Trial("asked", kind, 0, (Message("user", content),), asked.answer)
    for task in TASKS:
        for _ in range(count):
            messages: list[Message] = []
            for _ in range(SHOTS):
                picture, answer = example(task, random, held_out)
                messages += [Message("user", [Image(picture)]), Message("model", answer)]
            picture, answer = example(task, random, held_out)
            last = Message("user", [Image(picture)])
            yield Trial("shown", task, SHOTS, (*messages, last), answer)
            yield Trial("shown", task, 0, (last,), answer)


def answer_of(model: Model, messages: Sequence[Message]) -> str:
    """The likeliest answer, greedily."""
    return "".join(model.generate(list(messages), max_tokens=64, sampling=Sampling(temperature=0))).strip()


def score(
    answer: Callable[[Sequence[Message]], str],
    asked: Sequence[Trial],
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, str, int], Score]:
    """By group, kind and number of examples: how often the answer is what is right, to the letter."""
    right: dict[tuple[str, str, int], list[bool]] = {}
    for i, trial in enumerate(asked, 1):
        found = answer(trial.messages)
        right.setdefault((trial.group, trial.kind, trial.shots), []).append(found == trial.answer)
        if progress is not None:
            progress(i, len(asked))
    return {key: Score(sum(found), len(found)) for key, found in right.items()}
