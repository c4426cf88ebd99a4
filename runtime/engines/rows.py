"""The rows of a forward pass: of one sequence, or of several whose attention is their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Floats, Ints
from ..cache.caches import Caches
from ..model.forward import Ops


class Segment(NamedTuple):
    """Rows of one sequence that follow what its `caches` hold: ids (n,), or embeddings (n, hidden), as they are.

    Logits are wanted of the last `wanted` rows. A row sees those before it; with `blocks`, int64 (n, 2), also the
    positions from blocks[:, 0] to blocks[:, 1] − 1 around itself, which are among these rows: an image is seen whole.
    """

    caches: Caches
    inputs: Ints | Floats
    wanted: int
    blocks: Ints | None = None


class SegmentRows:
    """The rows of one segment: `forward.Rows` on arrays."""

    def __init__(self, segment: Segment) -> None:
        self._caches, self._inputs, self._wanted, self._blocks = segment
        self._layers = list(self._caches)
        self._start = self._caches.length
        self.positions: Ints = np.arange(self._start, self._start + len(self))

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def n_wanted(self) -> int:
        """How many rows logits are wanted of."""
        return self._wanted

    def embed(self, ops: Ops, weight: object, scale: float) -> Floats:
        rows: Any = self._inputs if self._inputs.ndim > 1 else ops.embed(weight, self._inputs, scale)
        embedded: Floats = rows
        return embedded

    def append(self, layer: int, keys: Floats, values: Floats) -> None:
        self._layers[layer].append(keys, values)

    def attend(self, layer: int, queries: Floats, scale: float, softcap: float | None) -> Floats:
        if not len(queries):  # no logits are wanted
            return queries
        blocks = None if self._blocks is None else self._blocks[len(self) - len(queries) :]
        return self._layers[layer].attend(queries, scale, softcap, blocks)

    def wanted(self, x: Floats) -> Floats:
        return x[len(x) - self._wanted :]

    def take_back(self) -> None:
        """Have the caches hold what they held before, after a pass that stopped half-way."""
        self._caches.cut(self._start)


class JoinedRows:
    """The rows of several segments, one after the other: `forward.Rows` on arrays."""

    def __init__(self, parts: Sequence[SegmentRows]) -> None:
        self._parts = parts
        self._all = _spans([len(part) for part in parts])
        self._last = _spans([part.n_wanted for part in parts])
        self.positions: Ints = np.concatenate([part.positions for part in parts])

    def embed(self, ops: Ops, weight: object, scale: float) -> Floats:
        return np.concatenate([part.embed(ops, weight, scale) for part in self._parts])

    def append(self, layer: int, keys: Floats, values: Floats) -> None:
        for part, span in zip(self._parts, self._all, strict=True):
            part.append(layer, keys[span], values[span])

    def attend(self, layer: int, queries: Floats, scale: float, softcap: float | None) -> Floats:
        spans = self._all if len(queries) == self._all[-1].stop else self._last
        parts = zip(self._parts, spans, strict=True)
        return np.concatenate([part.attend(layer, queries[span], scale, softcap) for part, span in parts])

    def wanted(self, x: Floats) -> Floats:
        return np.concatenate([part.wanted(x[span]) for part, span in zip(self._parts, self._all, strict=True)])


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
