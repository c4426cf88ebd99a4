"""What is kept of sequences that ended, for prompts that begin alike; in memory, and between runs in files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import Ints
from ..cache.caches import Caches
from ..errors import InvalidRequest, InvalidSession
from ..session import Runnable, read_session, session_ids, write_session


@dataclass(eq=False)
class Kept:
    """A sequence that nobody writes to: its ids (n,), and the caches that hold them."""

    ids: Ints
    caches: Caches


def common(a: Ints, b: Ints) -> int:
    """How many ids two sequences have in common from the first on."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class Prefixes:
    """Sequences that take up to `limit` bytes; what was not used for longest goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Kept] = []  # the latest used last

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(kept.caches.nbytes for kept in self._kept)

    def take(self, kept: Kept, length: int) -> Caches:
        """Caches that hold its first `length` positions, and that are the caller's."""
        self._kept.remove(kept)
        if length == len(kept.ids):
            return kept.caches
        self._kept.append(kept)  # it may serve others
        return kept.caches.forked(length)

    def put(self, ids: Sequence[int], caches: Caches) -> None:
        """Keep a sequence. Those that are the beginning of it, and that it can be rewound to, are not needed."""
        new = Kept(np.array(ids, np.int64), caches)
        self._kept = [old for old in self._kept if not _covers(new, old)]
        if not any(_covers(old, new) for old in self._kept):
            self._kept.append(new)
        while self._kept and self.nbytes > self._limit:
            del self._kept[0]


def _covers(kept: Kept, other: Kept) -> bool:
    n = len(other.ids)
    return common(kept.ids, other.ids) == n and kept.caches.reaches(n)


def make_folder(folder: Path) -> None:
    """For `Stored`, where it is not there. Raises OSError where there can be none."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what people wrote can be read from it


class Stored:
    """Sequences in files of a folder, each a saved session; of these files up to `limit` bytes are kept.

    What is damaged, or of another model, counts as absent.
    """

    def __init__(self, folder: Path, model: Runnable, new_caches: Callable[[], Caches], limit: int) -> None:
        self._folder, self._model, self._new_caches, self._limit = folder, model, new_caches, limit
        self._ids: dict[Path, Ints] = {}
        self._saved: set[Path] = set()  # by this process
        for path in folder.glob("*.session"):
            with suppress(InvalidSession):
                self._ids[path] = np.array(session_ids(path, model), np.int64)

    def better(self, prompt: Ints, than: int) -> Iterator[tuple[list[int], Caches]]:
        """Those that have more in common with a prompt than so many ids; each is given once."""
        for path, ids in list(self._ids.items()):
            if common(ids, prompt) <= than:
                continue
            del self._ids[path]
            with suppress(InvalidSession):
                found, arrays = read_session(path, self._model)
                caches = self._new_caches().restored(arrays)
                if caches.length == len(found):
                    yield found, caches

    def save(self, prefixes: Prefixes) -> Iterator[None]:
        """Put what is kept in memory into files, one by one; the oldest files go where they become too many."""
        with suppress(OSError):  # somebody may have removed it
            make_folder(self._folder)
        for kept in list(prefixes):
            digest = hashlib.sha256(self._model.identity()["model"].encode() + kept.ids.tobytes()).hexdigest()
            path = self._folder / f"{digest[:32]}.session"
            with suppress(OSError, InvalidRequest):  # without room it is read again the next time
                if path in self._saved and path.exists():
                    os.utime(path)
                    continue
                path.unlink(missing_ok=True)  # a damaged one, which would not be written over
                write_session(path, self._model, kept.ids.tolist(), kept.caches.snapshot())
                self._saved.add(path)
            yield
        left = self._limit
        for path in sorted(self._folder.glob("*.session"), key=lambda path: -path.lstat().st_mtime):
            left -= path.lstat().st_size
            if left < 0:
                path.unlink()
                self._saved.discard(path)
