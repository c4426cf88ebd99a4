"""A chat in one session: turns added and taken back, and room made when the context is full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ..errors import ContextFull, InvalidRequest
from ..session import Runnable, Session
from ..vision.eye import Eye
from . import chat
from .generation import Generation
from .sampling import Sampling


class Talker(Runnable, Protocol):
    """What a conversation needs of a model; see `Model`."""

    @property
    def default_sampling(self) -> Sampling: ...
    def session(self) -> Session: ...
    def eye_for(self, messages: Iterable[chat.Message], /) -> Eye | None: ...


class Conversation:
    """A chat with a model. `save` and `restore` keep the session that holds it, and the system text.

    `system` text opens the first user turn. With `slide`, a full context drops the oldest turns, telling
    `announce` so; without, it raises ContextFull.
    """

    def __init__(self, model: Talker, system: str | None, slide: bool, announce: Callable[[str], None]) -> None:
        self.session = model.session()
        self.system = system
        self._model, self._slide, self._announce = model, slide, announce

    def save(self, path: str | Path) -> None:
        """Write the chat to a file; see `Session.save`."""
        self.session.save(path, self.system or "")

    def restore(self, path: str | Path) -> None:
        """Go on with a saved chat and its system text; see `Session.restore`."""
        self.system = self.session.restore(path) or None

    def prompt_ids(self, content: chat.Content) -> list[int]:
        """What the model will see of a user's turn that follows what the session holds."""
        if not self.session.ids:
            return self._rendered(self._opening(content))
        opened = self._rendered([chat.Message("user", content)])[1:]
        return [*chat.turn_end(self._model.tokenizer), *opened]

    def ask(
        self,
        content: chat.Content,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        cancel: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """The model's reply to a user's turn, as an iterable of pieces; sampled as the file recommends by default.

        A turn that is not read to its end, because it is cancelled or does not fit, leaves the chat as it was.
        """
        start = self._model.tokenizer.start_of_turn_id
        return _Reply(
            self.session,
            self.prompt_ids(content),
            self._model.default_sampling if sampling is None else sampling,
            max_tokens=max_tokens,
            # The model's turn ends where it would open another.
            stop_ids=self._model.stop_ids | (set() if start is None else {start}),
            make_room=self._make_room if self._slide else None,
            cancel=cancel,
            hold_last=True,
        )

    def undo(self) -> None:
        """Take back the last exchange. Raises InvalidRequest if there is none."""
        starts = self._user_turns(self.session.ids)
        if not starts:
            raise InvalidRequest("nothing to undo")
        closing = len(chat.turn_end(self._model.tokenizer))
        self.session.go_to(self.session.ids[: starts[-1] - closing] if len(starts) > 1 else [])

    def turns(self) -> int:
        """How many exchanges the session holds."""
        return len(self._user_turns(self.session.ids))

    def messages(self) -> list[chat.Message]:
        """What the session holds, as a chat, with the system text as a message of its own."""
        messages = chat.read(self._model.tokenizer, self.session.ids, self._model.eye)
        opening = f"{self.system.strip()}\n\n" if self.system else ""
        if opening and messages and messages[0].text.startswith(opening):
            first = self._without(opening, messages[0])
            return [chat.Message("system", self.system or ""), first, *messages[1:]]
        return messages

    def last_message(self) -> chat.Content:
        """The newest message of the user. Raises InvalidRequest if there is none."""
        messages = [message.content for message in self.messages() if message.role == "user"]
        if not messages:
            raise InvalidRequest("there is no message yet")
        return messages[-1]

    def _opening(self, content: chat.Content) -> list[chat.Message]:
        system = [chat.Message("system", self.system)] if self.system else []
        return [*system, chat.Message("user", content)]

    def _rendered(self, messages: list[chat.Message], reply: bool = True) -> list[int]:
        return chat.render(self._model.tokenizer, messages, reply, self._model.eye_for(messages))

    @staticmethod
    def _without(opening: str, message: chat.Message) -> chat.Message:
        """A message less what its first text begins with."""
        if isinstance(message.content, str):
            return chat.Message(message.role, message.content.removeprefix(opening))
        first, *others = message.parts
        assert isinstance(first, str)
        return chat.Message(message.role, [first.removeprefix(opening), *others])

    def _user_turns(self, ids: list[int]) -> list[int]:
        """Where user turns start. No text and no reply holds the marker's id, so every one is a turn."""
        tokenizer = self._model.tokenizer
        opening = [tokenizer.start_of_turn_id, *tokenizer.encode("user\n")][:2]
        return [i for i in range(len(ids)) if ids[i : i + 2] == opening]

    def _make_room(self, ids: list[int]) -> list[int]:
        """Without the oldest turns, down to three quarters of the context; the system text stays."""
        starts = self._user_turns(ids)
        limit = self._model.context * 3 // 4
        dropped = 0
        while dropped < len(starts) - 1 and len(ids) - starts[dropped] + 1 > limit:
            dropped += 1
        start, tokenizer = starts[dropped], self._model.tokenizer
        shorter = [tokenizer.bos_id, *ids[start:]]
        if self.system and dropped:
            end = ids.index(tokenizer.end_of_turn_id or 0, start)
            (turn,) = chat.read(tokenizer, ids[start : end + 1], self._model.eye)
            opening = self._rendered(self._opening(turn.content), reply=False)
            shorter = [*opening[: -len(chat.turn_end(tokenizer))], *ids[end:]]
        if not dropped or len(shorter) > self._model.context:
            raise ContextFull(f"this exchange alone fills the context of {self._model.context} tokens")
        self._announce(f"context full: dropped the oldest {dropped} of {len(starts)} exchanges")
        return shorter


class _Reply(Generation):
    def __iter__(self) -> Iterator[str]:
        before = self._session.position
        try:
            yield from super().__iter__()
        finally:
            if not self.prompt_read:
                self._session.go_to(self._session.ids[:before])


def keep_prompt(n_prompt: int, model: Runnable, announce: Callable[[str], None]) -> Callable[[list[int]], list[int]]:
    """For one prompt and a long text after it: keeps the prompt and drops the oldest quarter of a full context."""

    def make_room(ids: list[int]) -> list[int]:
        room = max(1, model.context // 4)
        if len(ids) - n_prompt <= room:
            raise ContextFull(f"the prompt's {n_prompt} tokens leave no room in the context of {model.context}")
        announce(f"context full: dropped {room} tokens after the prompt")
        return ids[:n_prompt] + ids[n_prompt + room :]

    return make_room
