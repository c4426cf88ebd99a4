"""What every engine offers, and the engine that runs `forward` on some ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..arrays import Arrays, Floats, Ints
from ..cache.caches import Caches
from ..cache.store import NewStore
from ..model.config import ModelConfig
from ..model.forward import Ops, Weights, forward
from ..model.vision import Seeing
from .rows import JoinedRows, Segment, SegmentRows
from .tower import Tower


class Engine(Protocol):
    """The weights of a model, and one sequence going through it.

    `chunk` is the largest number of ids that `forward` takes; a rewind to at most `chunk` positions
    behind the newest that it ever took always works.
    """

    chunk: int

    @property
    def position(self) -> int:
        """How many ids the caches hold: the position of the next one."""

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    def forward(
        self, inputs: Ints | Floats, wanted: int, streams: list[Floats] | None = None, blocks: Ints | None = None
    ) -> Floats:
        """Take n ids; logits (wanted, vocab) of the last `wanted`, 0 to n. If it raises, nothing changed.

        Where the engine takes pictures, `inputs` may be embeddings and some of them `blocks`; see `rows.Segment`.
        `streams`, where the engine knows them, receives the residual stream behind each layer; see `model.forward`.
        """

    def first_unsound(self) -> int | None:
        """The first layer whose newest keys or values are not finite."""

    def rewind(self, n: int) -> None:
        """Forget the n newest ids. Raises CacheError if a ring no longer holds what comes before them."""

    def snapshot(self) -> Arrays:
        """All caches as arrays by name."""

    def restore(self, state: Arrays) -> None:
        """Take over a snapshot. Raises InvalidSession, changing nothing, if it belongs to other caches."""


class Backend(Protocol):
    """A model's weights in the form that one kind of engine takes, shared by all its sequences."""

    def engine(self, context: int, kv: str, chunk: int, ring: bool) -> Engine:
        """A new, empty sequence; see `Caches`."""

    def embed(self, ids: Ints) -> Floats:
        """Text ids (n,) as they enter the first layer, (n, hidden); of a model that sees."""

    def tower(self, file: Any) -> Seeing:
        """The eye in a file of a kind that this engine reads; see `tower.VisionTensors`."""


class CachedEngine:
    """What engines do with their caches."""

    def __init__(self, caches: Caches, chunk: int) -> None:
        self.chunk, self.caches = chunk, caches

    @property
    def position(self) -> int:
        return self.caches.length

    @property
    def cache_bytes(self) -> int:
        return self.caches.nbytes

    def first_unsound(self) -> int | None:
        return self.caches.first_unsound()

    def rewind(self, n: int) -> None:
        self.caches.rewind(n)

    def snapshot(self) -> Arrays:
        return self.caches.snapshot()

    def restore(self, state: Arrays) -> None:
        self.caches = self.caches.restored(state)


class ModelBackend:
    """Weights for some ops, whose sequences keep their caches in stores of their own kind."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: Weights, new_store: NewStore) -> None:
        self.config, self.ops, self.weights, self.new_store = config, ops, weights, new_store

    def caches(self, context: int, kv: str, chunk: int, ring: bool = True) -> Caches:
        """Empty caches for a sequence."""
        return Caches(self.config.layers, context, kv, chunk, ring, self.new_store)

    def engine(self, context: int, kv: str, chunk: int, ring: bool) -> ModelEngine:
        return ModelEngine(self, self.caches(context, kv, chunk, ring), chunk)

    def embed(self, ids: Ints) -> Floats:
        """Text ids (n,) as they enter the first layer, (n, hidden)."""
        rows: Floats = self.ops.embed(self.weights.shared["token_embd"], ids, self.config.embedding_scale)
        return rows

    def tower(self, file: Any) -> Tower:
        """The eye in a file (`VisionTensors`) of a kind that this engine reads."""
        raise NotImplementedError

    def rows(self, segment: Segment) -> SegmentRows:
        """The rows of a segment as they go through the model."""
        return SegmentRows(segment)

    def forward(self, segments: Sequence[Segment], streams: list[Any] | None = None) -> Floats:
        """The rows of all segments in one pass: logits (wanted of all, vocab). If it raises, no cache has changed.

        Where a row's result does not depend on the others in `linear`, as in the native ops, logits have the bits that
        each segment would get alone.
        """
        parts = [self.rows(segment) for segment in segments]
        try:
            rows = parts[0] if len(parts) == 1 else JoinedRows(parts)
            logits: Floats = forward(self.config, self.ops, self.weights, rows, streams)
            return logits
        except BaseException:
            for part in parts:
                part.take_back()
            raise


class ModelEngine(CachedEngine):
    """One sequence through `model.forward` on the ops of a backend."""

    def __init__(self, backend: ModelBackend, caches: Caches, chunk: int) -> None:
        super().__init__(caches, chunk)
        self._backend = backend

    def forward(
        self, inputs: Ints | Floats, wanted: int, streams: list[Floats] | None = None, blocks: Ints | None = None
    ) -> Floats:
        return self._backend.forward([Segment(self.caches, inputs, wanted, blocks)], streams)
