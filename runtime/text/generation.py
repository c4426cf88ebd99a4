"""Token by token: sampling, streaming, stopping, and what to do when the context is full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import InvalidRequest
from ..session import MakeRoom, Session
from .sampling import Sampler, Sampling


class Generation:
    """Text that is being generated after a prompt; iterate over it once for the pieces.

    `ids` are the tokens generated so far, without the one that stopped it; `prompt_read` says that the model has seen
    all of the prompt. `finish` says why it ended: "stop" (a
    stop token or string), "length" (max_tokens), "cancelled" (`cancel` returned True), None while it runs. If the
    context is full, `make_room` is asked for shorter ids to go on with; without it ContextFull is raised. The token
    that reaches max_tokens goes through the model, which costs a step, only if `hold_last`: where the session goes on.
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
    ) -> None:
        sound = isinstance(stop, Iterable) and not isinstance(stop, str)
        if not sound or not all(isinstance(text, str) for text in stop):
            raise InvalidRequest(f"stop: found {stop!r:.80}, expected a list of texts")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
            raise InvalidRequest(f"max_tokens: found {max_tokens!r:.80}, expected a whole number from 0 on, or None")
        self.ids: list[int] = []
        self.finish: str | None = None
        self.prompt_read = False
        self._session, self._prompt, self._sampler = session, list(prompt), Sampler(sampling)
        self._max_tokens, self._stop = max_tokens, [s for s in stop if s]
        self._stop_ids = session.model.stop_ids if stop_ids is None else stop_ids
        self._make_room, self._cancel, self._hold_last = make_room, cancel, hold_last

    def __iter__(self) -> Iterator[str]:
        decoder = self._session.model.tokenizer.stream()
        held = ""  # text that may be the beginning of a stop string
        for token in self._tokens():
            held += decoder.push(token)
            if (at := self._find_stop(held)) is not None:
                self.finish = "stop"
                if held[:at]:
                    yield held[:at]
                return
            keep = self._possible_stop(held)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        held += decoder.flush()
        if held:
            yield held

    def _tokens(self) -> Iterator[int]:
        fed = self._prompt
        while (logits := self._session.feed(fed, self._make_room, self._cancel)) is not None:
            self.prompt_read = True
            if self._reached_max():
                self.finish = "length"
                return
            token = self._sampler(logits, self._session.ids)
            if token in self._stop_ids:
                self.finish = "stop"
                return
            self.ids.append(token)
            yield token
            if self._reached_max() and not self._hold_last:
                self.finish = "length"
                return
            fed = [token]
        self.finish = "cancelled"

    def _reached_max(self) -> bool:
        return self._max_tokens is not None and len(self.ids) >= self._max_tokens

    def _find_stop(self, text: str) -> int | None:
        found = [at for at in map(text.find, self._stop) if at >= 0]
        return min(found, default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop)), 0)
