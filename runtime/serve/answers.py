"""Answers on their way from the scheduler's thread to a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..text.generation import Writer
from .scheduler import Scheduler
from .tasks import Task
from .tools import Call, Calls

_MOST_UNREAD = 64  # pieces that a client may leave unread; its answer waits then …
_STALLED_SECONDS = 30  # … and ends, if they stay unread for so long


class Answer:
    """One answer: an asynchronous iterable of (text, how many `chances` its writer has by then)."""

    def __init__(self, scheduler: Scheduler, prompt: Sequence[int], writer: Writer, **options: Any) -> None:
        """`options` are a task's."""
        self._loop, self._scheduler = asyncio.get_running_loop(), scheduler
        self._pieces: asyncio.Queue[tuple[str, int] | None] = asyncio.Queue()
        self.writer, self.task = writer, Task(prompt, writer, self._tell, **options)
        self._stalled: asyncio.TimerHandle | None = None

    def _tell(self, text: str | None) -> None:
        piece = None if text is None else (text, self.writer.sure_chances)
        if not self._loop.is_closed():  # the server may be gone before its last task
            self._loop.call_soon_threadsafe(self._put, piece)

    def _put(self, piece: tuple[str, int] | None) -> None:
        self._pieces.put_nowait(piece)
        if not self.task.paused and self._pieces.qsize() >= _MOST_UNREAD:
            self.task.paused = True
            self._stalled = self._loop.call_later(_STALLED_SECONDS, self.cancel)
            self._scheduler.wake()

    async def __aiter__(self) -> AsyncIterator[tuple[str, int]]:
        """Raises what went wrong."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
            if self._stalled and self._pieces.qsize() < _MOST_UNREAD // 2:
                self._stalled.cancel()
                self._stalled, self.task.paused = None, False
                self._scheduler.wake()
        if self.task.error is not None:
            raise self.task.error

    def cancel(self) -> None:
        """Nobody waits for it any more; nothing happens where it has ended."""
        if self._stalled:
            self._stalled.cancel()
        self.task.cancelled = True
        self._scheduler.wake()


async def parts_of(answer: Answer, calls: bool) -> AsyncIterator[str | Call]:
    """An answer's text, and the calls of functions in it where there may be any. Raises what went wrong."""
    reader = Calls(calls)
    async for text, _ in answer:
        for part in reader.push(text):
            yield part
    for part in reader.end():
        yield part


async def whole_of(answer: Answer, calls: bool) -> tuple[list[Call], str]:
    """All calls of an answer, and all text."""
    parts = [part async for part in parts_of(answer, calls)]
    return [part for part in parts if isinstance(part, Call)], "".join(part for part in parts if isinstance(part, str))


async def together(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, str, int]]:
    """The pieces of several answers as they come: index, text, how many chances. Raises what went wrong with any."""
    if len(answers) == 1:
        async for text, n in answers[0]:
            yield 0, text, n
        return
    pieces: asyncio.Queue[tuple[int, str, int] | Exception | None] = asyncio.Queue(1)

    async def read(i: int, answer: Answer) -> None:
        try:
            async for text, n in answer:
                await pieces.put((i, text, n))
            await pieces.put(None)
        except Exception as error:
            await pieces.put(error)

    readers = [asyncio.create_task(read(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for reader in readers:
            reader.cancel()
