"""Token by token: sampling, streaming, stopping, and what to do when the context is full."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..arguments import shown
from ..arrays import Floats
from ..errors import InvalidRequest
from ..session import MakeRoom, Session
from .sampling import Bits, Sampler, Sampling
from .tokenizer import Tokenizer


class Constraint(Protocol):
    """What an answer must look like, told token by token: a grammar."""

    def allowed(self) -> Bits:
        """Which tokens may come next: at least one, perhaps only a stop token."""

    def accept(self, token: int) -> None:
        """Take a token that is allowed."""

    def forced(self) -> list[int]:
        """Take all tokens about which there is no choice, and say which they are."""


@dataclass(frozen=True)
class Chance:
    """The natural logarithm of a token's probability by the model alone, and the likeliest tokens with theirs.

    A text's `first` token has none.
    """

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]
    first: bool = False


def chance(logits: Floats, token: int, n: int) -> Chance:
    """The chance of a token by logits (vocab,), and the n likeliest."""
    x = logits.astype(np.float64)
    x -= x.max() + np.log(np.exp(x - x.max()).sum())
    best = np.argpartition(-x, min(n, len(x) - 1))[:n]
    best = best[np.lexsort((best, -x[best]))]
    return Chance(token, float(x[token]), [(int(i), float(x[i])) for i in best])


class Writer:
    """Turns logits into an answer: `ids`, and text that is sure to belong to it.

    `fed` are the ids that the model must see before the next logits. `finish` says why it ended: "stop" (a stop token
    or string), "length" (`max_tokens`), None while it runs. The token that reaches `max_tokens` is to go through the
    model, which costs a step, only if `hold_last`: where the session goes on. `chances` are those of `ids`, with the
    likeliest `logprobs`, where that is not None; each token then takes a step of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: Sampling,
        stop_ids: frozenset[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        hold_last: bool = False,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> None:
        sound = isinstance(stop, Iterable) and not isinstance(stop, str)
        if not sound or not all(isinstance(text, str) for text in stop):
            raise InvalidRequest(f"stop: found {stop!r:.80}, expected a list of texts")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
            raise InvalidRequest(f"max_tokens: found {max_tokens!r:.80}, expected a whole number from 0 on, or None")
        self.ids: list[int] = []
        self.fed: list[int] = []
        self.finish: str | None = None
        self.stopped_by: str | None = None  # the stop string, where it was one
        self._decoder, self._sampler, self._stop_ids = tokenizer.stream(), Sampler(sampling), stop_ids
        self._max_tokens, self._stop, self._hold_last = max_tokens, [s for s in stop if s], hold_last
        self._constraint, self._logprobs = constraint, logprobs
        self._forced: list[int] = []  # ids that are sure to come next
        self.chances: list[Chance] = []
        self.keeps_chances = logprobs is not None
        self._ends: list[int] = []  # of each id: how long the text is with it
        self._given = 0  # characters
        self._held = ""  # text that may be the beginning of a stop string

    @property
    def sure_chances(self) -> int:
        """How many of the `chances` are of text that was given, and not held back."""
        return len(self.chances) if self.finish is not None else bisect_right(self._ends, self._given)

    def take(self, logits: Floats, seen: Sequence[int]) -> str:
        """Draw from logits (vocab,) of the newest token; `seen` are all ids so far. Gives the text that is sure now."""
        text = self._take(logits, seen)
        self._given += len(text)
        if self.stopped_by is not None:  # of what is cut off nothing is told
            del self.chances[bisect_left([0, *self._ends], self._given, hi=len(self._ends)) :]
        return text

    def _take(self, logits: Floats, seen: Sequence[int]) -> str:
        if self._is_full():
            return self.end("length")
        if not self._forced:
            allowed = None if self._constraint is None else self._constraint.allowed()
            token = self._sampler(logits, seen, self.ids, allowed)
            if token in self._stop_ids:
                return self.end("stop")
            self._forced = [token]
            if self._constraint is not None:
                self._constraint.accept(token)
                self._forced += self._constraint.forced()
        together = 1 if self._logprobs is not None else len(self._forced)
        self.fed, self._forced = self._forced[:together], self._forced[together:]
        if self._logprobs is not None:
            self.chances.append(chance(logits, self.fed[0], self._logprobs))
        text = ""
        for i, token in enumerate(self.fed):
            self.ids.append(token)
            self._held += self._decoder.push(token)
            self._ends.append(self._given + len(text) + len(self._held))
            if (found := self._find_stop(self._held)) is not None:
                at, self.stopped_by = found
                self.fed, self.finish = self.fed[: i + 1], "stop"
                return text + self._held[:at]
            keep = self._possible_stop(self._held)
            text += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
            if self._is_full():
                self.fed = self.fed[: i + 1]
                return text if self._hold_last else text + self.end("length")
        return text

    def end(self, finish: str) -> str:
        """End the answer here; the text that was held back."""
        self.finish, text, self._held = finish, self._held + self._decoder.flush(), ""
        return text

    def _is_full(self) -> bool:
        return self._max_tokens is not None and len(self.ids) >= self._max_tokens

    def _find_stop(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string begins, and which it is."""
        return min(((at, stop) for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop)), 0)


class Generation:
    """Text that is being generated after a prompt; iterate over it once for the pieces.

    `ids` are the tokens generated so far, without the one that stopped it; `prompt_read` says that the model has seen
    all of the prompt. `finish` says why it ended: as a `Writer`'s, or "cancelled" (`cancel` returned True). If the
    context is full, `make_room` is asked for shorter ids to go on with; without it ContextFull is raised.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        stop_ids: frozenset[int] | None = None,
        make_room: MakeRoom | None = None,
        cancel: Callable[[], bool] = lambda: False,
        hold_last: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        self._writer = Writer(
            session.model.tokenizer,
            sampling,
            session.model.stop_ids if stop_ids is None else stop_ids,
            max_tokens=max_tokens,
            stop=stop,
            hold_last=hold_last,
            constraint=constraint,
        )
        if not callable(cancel):
            raise InvalidRequest(f"cancel: found {shown(cancel)}, expected what can be called")
        self.ids = self._writer.ids
        self.prompt_read = self._begun = False
        self._session, self._prompt = session, list(prompt)
        self._make_room, self._cancel = make_room, cancel

    @property
    def finish(self) -> str | None:
        return self._writer.finish

    def __iter__(self) -> Iterator[str]:
        if self._begun:
            raise InvalidRequest("this generation was read before: its text comes once; ask for another one")
        self._begun = True
        writer, fed = self._writer, self._prompt
        while writer.finish is None:
            logits = self._session.feed(fed, self._make_room, self._cancel)
            if logits is None:
                piece = writer.end("cancelled")
            else:
                self.prompt_read = True
                piece, fed = writer.take(logits, self._session.ids), writer.fed
            if piece:
                yield piece
