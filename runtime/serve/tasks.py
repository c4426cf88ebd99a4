"""What a scheduler works on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..cache.caches import Caches
from ..text.generation import Chance, Writer
from ..vision.eye import Picture


@dataclass
class Figures:
    """What an answer took. Times in seconds: until the prompt was read, and after that."""

    prompt_tokens: int
    cached_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0


class Task:
    """An answer to be written after the ids of a `prompt`.

    `tell` is called in the scheduler's thread with each piece of text that there is, and at the end once with None;
    `writer.finish` then says why it ended ("cancelled" too), or `error` what went wrong. `paused` leaves it out of the
    passes, `cancelled` ends it; any thread may set them. With `scored`, `chances` tells how likely the model found the
    ids of the prompt from the second on, and so many likeliest ones; all of it is then read anew. `following` tells
    what the prompt of the next turn begins with, from the text of the answer.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        writer: Writer,
        tell: Callable[[str | None], None],
        *,
        scored: int | None = None,
        following: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self.prompt, self.writer, self.tell = np.array(prompt, np.int64), writer, tell
        self.following, self.text = following, ""
        self.figures = Figures(len(prompt))
        self.scored, self.chances = scored, list[Chance]()
        self.error: Exception | None = None
        self.cancelled = self.paused = False
        self.held: list[int] = []  # ids that the caches hold
        self.pending: list[int] = list(prompt)  # ids that come next
        self.caches: Caches | None = None
        self.pictures: list[Picture] = []  # of the prompt, held while it is read
        self.boundaries: set[int] = set()  # where others may want to go on
        self.began = time.monotonic()

    @property
    def reads(self) -> bool:
        """Whether it is still at its prompt."""
        return len(self.held) < len(self.prompt)
