"""The rows of a forward pass: of one sequence, or of several whose attention is their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ..arrays import Floats, Ints
from ..cache.caches import Caches
from ..model.forward import Ops

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Segment:
    """Rows of one sequence that follow what its `caches` hold: ids (n,), or embeddings (n, hidden), as they are.

    Logits are wanted of the last `wanted` rows. A row sees those before it; with `blocks`, int64 (n, 2), also the
    positions from blocks[:, 0] to blocks[:, 1] − 1 around itself, which are among these rows: an image is seen whole.
    """

    caches: Caches
    inputs: Ints | Floats
    wanted: int
    blocks: Ints | None = None


class SegmentRows:
    """The rows of all segments, one after the other: `forward.Rows` on arrays."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._all = _spans([len(segment.inputs) for segment in segments])
        self._last = _spans([segment.wanted for segment in segments])
        starts = [segment.caches.length for segment in segments]
        self.positions: Ints = _joined(
            [np.arange(start, start + len(s.inputs)) for start, s in zip(starts, segments, strict=True)]
        )

    def embed(self, ops: Ops, weight: object, scale: float) -> Floats:
        def one(inputs: Ints | Floats) -> Floats:
            rows: Any = inputs if inputs.ndim > 1 else ops.embed(weight, inputs, scale)
            return cast("Floats", rows)

        return _joined([one(segment.inputs) for segment in self._segments])

    def append(self, layer: int, keys: Floats, values: Floats) -> None:
        for segment, span in zip(self._segments, self._all, strict=True):
            segment.caches[layer].append(keys[span], values[span])

    def attend(self, layer: int, queries: Floats, scale: float, softcap: float | None) -> Floats:
        spans = self._all if len(queries) == self._all[-1].stop else self._last
        parts = []
        for segment, span in zip(self._segments, spans, strict=True):
            n = span.stop - span.start
            blocks = None if segment.blocks is None else segment.blocks[len(segment.blocks) - n :]
            if n:
                parts.append(segment.caches[layer].attend(queries[span], scale, softcap, blocks))
        return _joined(parts) if parts else queries

    def wanted(self, x: Floats) -> Floats:
        ends = (span.stop for span in self._all)
        return _joined([x[end - s.wanted : end] for end, s in zip(ends, self._segments, strict=True)])


def run_segments(segments: Sequence[Segment], forward: Callable[[SegmentRows], Floats]) -> Floats:
    """What `forward` makes of the segments' rows. If it raises, the caches hold what they held before."""
    held = [segment.caches.length for segment in segments]
    try:
        return forward(SegmentRows(segments))
    except BaseException:
        for segment, length in zip(segments, held, strict=True):
            segment.caches.cut(length)
        raise


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def _joined(parts: list[npt.NDArray[T]]) -> npt.NDArray[T]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
