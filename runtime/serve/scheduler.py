"""Many answers at once: every sequence takes a step in the same pass, and prompts are read between the steps.

A row's bits do not depend on its neighbours (`engines/rows.py`), nor on what of a prompt was read before. So an answer
is the one that the model gives alone, whoever else is being served.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ..api import Model
from ..arrays import Floats, Ints
from ..cache.caches import Caches
from ..engines.protocol import ModelBackend
from ..engines.rows import Segment
from ..errors import BezelError, InvalidRequest
from ..session import unsound
from ..text.generation import chance
from ..vision.eye import next_piece
from .fields import BadRequest
from .prefixes import Kept, Prefixes, Stored, common
from .tasks import Task

_PASS = 0.3  # seconds that a pass should take at most: as long do others wait for their next token
_FEWEST = 16  # rows of a prompt in a pass, however slow
_WORTH = 16  # ids: fewer are not worth waiting for, nor keeping
_AHEAD = 8  # chats whose next prompt is waited for
_REST_SECONDS = 30.0  # without work, until what is kept goes to files


@dataclass
class Counts:
    """What was done since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)


class Scheduler:
    """Runs tasks on a model, in a thread of its own; up to `parallel` at a time, beside paused ones; the others wait.

    `cache_bytes` is how much memory may hold sequences that ended; between runs they are in files of `cache_folder`.
    """

    def __init__(self, model: Model, parallel: int, cache_bytes: int, cache_folder: Path | None = None) -> None:
        assert isinstance(model.backend, ModelBackend)
        self.model, self.parallel, self.counts = model, parallel, Counts()
        self.prefixes = Prefixes(cache_bytes)
        self._backend: ModelBackend = model.backend
        self._chunk = model.chunk
        self._rows = self._chunk  # of prompts in a pass
        self._stored = Stored(cache_folder, model, self._new_caches, cache_bytes) if cache_folder else None
        self._changed = threading.Condition()
        self._waiting: deque[Task] = deque()
        self._active: list[Task] = []
        self._closed = self._stopped = False
        self._following = deque[Callable[[], Sequence[int]]](maxlen=_AHEAD)
        self._unsaved = False
        self._thread = threading.Thread(target=self._run, name=f"bezel {model.name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Raises InvalidRequest for ids that the model cannot take, BadRequest where no more tasks are taken."""
        vocab_size, n = self.model.config.vocab_size, len(task.prompt)
        blind = self.model.eye is None
        if not n or (blind and task.prompt.min() < 0) or task.prompt.max() >= vocab_size:
            raise InvalidRequest(f"prompt: expected one or more ids from 0 to {vocab_size - 1}")
        if self.model.eye is not None:
            task.pictures = self.model.eye.pictures(task.prompt)
        with self._changed:
            if self._closed:
                raise _shutting_down()
            self._waiting.append(task)
            self._changed.notify()

    def wake(self) -> None:
        """After `paused` or `cancelled` of a task were changed."""
        with self._changed:
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """How many tasks are being worked on, and how many wait."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def tasks(self) -> list[Task]:
        """Those that are being worked on."""
        with self._changed:
            return list(self._active)

    def drain(self) -> None:
        """Take no more tasks, and end those that wait; those that were begun go on."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no more tasks, and end those that there are."""
        with self._changed:
            self._closed = self._stopped = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and put what is kept into files."""
        self.stop()
        self._thread.join()
        if self._stored is not None:
            for _ in self._stored.save(self.prefixes):
                pass

    # --- in its thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ready():
                    if self._closed and not self._active and not self._waiting:
                        return
                    if self._following or not self._changed.wait(_REST_SECONDS if self._unsaved else None):
                        break
                idle = not self._ready()
                if self._closed:
                    for task in (*self._waiting, *(self._active if self._stopped else ())):
                        task.error = _shutting_down()
                        self._end(task, "")
                self._end_cancelled()
                self._admit()
                part = self._share_out()
            if idle:
                self._idle()
            elif part:
                try:
                    self._step(part)
                except Exception as error:  # a pass that failed has changed nothing; the server goes on
                    for task in [task for task, _ in part if task in self._active]:
                        self._fail(task, error)

    def _ready(self) -> bool:
        tasks = (*self._active, *self._waiting)
        if self._closed and (self._waiting or self._stopped):
            return bool(tasks)
        return any(task.cancelled for task in tasks) or any(not task.paused for task in tasks)

    def _end_cancelled(self) -> None:
        for task in [task for task in (*self._active, *self._waiting) if task.cancelled]:
            self._end(task, task.writer.end("cancelled"))

    def _admit(self) -> None:
        """Begin what waits while there is room; first come, first served, but for what is about to be read anyway."""
        for task in list(self._waiting):
            if sum(not other.paused for other in self._active) >= self.parallel:
                return
            try:
                begun = self._begin(task)
            except Exception as error:  # no memory for its caches
                self._fail(task, error)
                continue
            if begun:
                self._waiting.remove(task)
                self._active.append(task)

    def _new_caches(self) -> Caches:
        return self._backend.caches(self.model.context, self.model.kv, self._chunk)

    def _begin(self, task: Task) -> bool:
        """Give a task its caches; False while another one reads what it could go on from."""
        last = task.prompt[: -1 if task.scored is None else 0]  # logits come with the last id
        sources = self._sources(last)
        n, source = _nearest(sources)
        for other in self._active:
            ahead = common(other.prompt, last)
            if other.reads and ahead - max(n, len(other.held)) >= _WORTH:
                other.boundaries.add(ahead)
                return False
        task.caches = self._from(source, n)
        task.held, task.pending = task.prompt[:n].tolist(), task.prompt[n:].tolist()
        # Others may go on from where turns begin, and from what two prompts had in common already.
        turns = np.flatnonzero(task.prompt == self.model.tokenizer.start_of_turn_id).tolist()
        task.boundaries = {b for b in (*turns, *(n for n, _ in sources)) if b >= n + _WORTH}
        if turns and turns[-1] >= _WORTH:  # where the text of the answer is not cut into these ids the next time
            task.boundaries.add(turns[-1])
        task.figures.cached_tokens = n
        self.counts.cached_tokens += n
        return True

    def _sources(self, prompt: Ints) -> list[tuple[int, Kept | Task]]:
        """What a prompt could go on from, each with how much they have in common."""
        if self._stored is not None:
            than = max((common(kept.ids, prompt) for kept in self.prefixes), default=0)
            for ids, caches in self._stored.better(prompt, than):
                self.prefixes.put(ids, caches)
        sources: list[tuple[int, Kept | Task]] = [(common(kept.ids, prompt), kept) for kept in self.prefixes]
        return sources + [(common(np.array(task.held, np.int64), prompt), task) for task in self._active]

    def _from(self, source: Kept | Task | None, n: int) -> Caches:
        """Caches that hold the first n ids of a source."""
        if isinstance(source, Kept) and n:
            return self.prefixes.take(source, n)
        if source is not None and source.caches is not None and n:
            return source.caches.forked(n)
        return self._new_caches()

    # --- while there is nothing else to do

    def _idle(self) -> None:
        if self._following:
            with suppress(Exception):  # then it is read when it is asked for
                self._read_ahead(self._following.pop())
        elif self._stored is not None:
            self._unsaved = False
            for _ in self._stored.save(self.prefixes):
                with self._changed:
                    if self._ready():
                        self._unsaved = True
                        return

    def _read_ahead(self, following: Callable[[], Sequence[int]]) -> None:
        """Read the next part of what a prompt will begin with, where that is not what was written: a sampled text is
        often not cut into the ids that it was made of, and rings do not reach back to where that begins.
        """
        ids = np.array(following(), np.int64)[: self.model.context]
        n, source = _nearest(self._sources(ids))
        if len(ids) - n < _WORTH:
            return
        caches = self._from(source, n)
        piece = next_piece(self.model.eye, ids[n:], n, self._rows)
        self._backend.forward([Segment(caches, piece.inputs, 0, piece.blocks)])
        self.prefixes.put(ids[: n + len(piece.ids)].tolist(), caches)
        self._unsaved = self._stored is not None
        if _nearest(self._sources(ids))[0] > n:  # else there is no room for it
            self._following.append(lambda: ids.tolist())

    # --- passes

    def _share_out(self) -> list[tuple[Task, int]]:
        """How many rows of each task the next pass takes.

        What is being written goes on; of the rows for prompts the oldest gets half, and the shortest what is left.
        """
        running = [task for task in self._active if not task.paused]
        part = [(task, min(len(task.pending), self._chunk)) for task in running if not task.reads]
        reading = [task for task in running if task.reads]
        left = self._rows
        for i, task in enumerate(sorted(reading, key=lambda t: (t is not reading[0], len(t.pending)))):
            share = left // 2 if not i and len(reading) > 1 else left
            n = min(len(task.pending), share, self._chunk if task.scored is None else _FEWEST)
            left -= n
            if n:
                part.append((task, n))
        return part

    def _step(self, part: Sequence[tuple[Task, int]]) -> None:
        began = time.monotonic()
        segments = []
        for task, most in part:
            assert task.caches is not None
            piece = next_piece(self.model.eye, np.array(task.pending, np.int64), len(task.held), most)
            n = len(piece.ids)
            self._keep_boundaries(task, n)
            wanted = n if task.scored is not None and task.reads else int(n == len(task.pending))
            segments.append(Segment(task.caches, piece.inputs, wanted, piece.blocks))
        logits = self._backend.forward(segments)
        now = time.monotonic()
        row = 0
        for (task, _), segment in zip(part, segments, strict=True):
            n = len(segment.inputs)
            if task.scored is not None and task.reads:
                following = task.prompt[len(task.held) + 1 :].tolist()
                rows = zip(logits[row : row + n], following, strict=False)
                task.chances += [chance(one, token, task.scored) for one, token in rows]
            task.held += task.pending[:n]
            del task.pending[:n]
            row += segment.wanted
            if not task.pending:
                self._take(task, logits[row - 1], now)
        taken = sum(len(segment.inputs) for segment in segments)
        self.counts.passes += 1
        self.counts.seconds += now - began
        if taken >= _FEWEST:
            fit = int(taken * _PASS / (now - began))
            self._rows = max(_FEWEST, min(self._chunk, fit))

    def _keep_boundaries(self, task: Task, n: int) -> None:
        """Keep what the next n rows would push out of the rings."""
        assert task.caches is not None
        for boundary in sorted(task.boundaries):
            if boundary <= len(task.held) and task.caches.loses(boundary, n):
                task.boundaries.remove(boundary)
                if task.caches.reaches(boundary):
                    with suppress(MemoryError):  # then it is read again
                        self.prefixes.put(task.held[:boundary], task.caches.forked(boundary))

    def _take(self, task: Task, logits: Floats, now: float) -> None:
        """Let a task write on from logits (vocab,)."""
        writer, before = task.writer, len(task.writer.ids)
        assert task.caches is not None
        if not before:
            task.figures.prompt_seconds = now - task.began
            self.counts.prompt_tokens += len(task.prompt) - task.figures.cached_tokens
        try:
            if (error := unsound(logits, len(task.held), task.caches, self.model.kv)) is not None:
                raise error
            text = writer.take(logits, task.held)
        except Exception as error:
            self._fail(task, error)
            return
        task.pending = list(writer.fed)
        self.counts.tokens += len(writer.ids) - before
        task.figures.tokens = len(writer.ids)
        task.figures.seconds = now - task.began - task.figures.prompt_seconds
        if writer.finish is None and len(task.held) + len(task.pending) > self.model.context:
            text += writer.end("length")
        if writer.finish is not None:
            self._end(task, text)
        elif text:
            self._tell(task, text)

    def _end(self, task: Task, text: str) -> None:
        with self._changed:
            for tasks in (self._active, self._waiting):
                if task in tasks:
                    tasks.remove(task)
        if task.caches is not None and task.held:
            self.prefixes.put(task.held, task.caches)
            self._unsaved = self._stored is not None
        task.caches = None
        self.counts.ended[task.writer.finish or "error"] += 1
        if text:
            self._tell(task, text)
        task.tell(None)
        if task.following is not None and task.writer.finish in ("stop", "length"):
            self._following.append(partial(task.following, task.text))

    def _tell(self, task: Task, text: str) -> None:
        task.text += text
        task.tell(text)

    def _fail(self, task: Task, error: Exception) -> None:
        task.error = error if isinstance(error, (BadRequest, BezelError, MemoryError)) else RuntimeError(repr(error))
        task.caches = None
        self._end(task, "")


def _nearest(sources: Sequence[tuple[int, Kept | Task]]) -> tuple[int, Kept | Task | None]:
    """The source that holds most of what it has in common, and how much that is."""
    within = [(n, source) for n, source in sources if source.caches is not None and source.caches.reaches(n)]
    return max(within, key=lambda found: found[0], default=(0, None))


def _shutting_down() -> BadRequest:
    return BadRequest("the server is shutting down", status=503)
