"""What is kept of sequences that ended, for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Ints
from ..cache.caches import Caches


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
