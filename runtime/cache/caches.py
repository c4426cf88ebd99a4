"""Keys and values of a sequence: at which position, and what a query may see.

The model appends keys (after RoPE) and values, and asks for attention; it never sees a slot. A full cache has a slot
for every position of the context; a ring only for what the oldest query of a chunk can see, window − 1 + chunk. Where
and how the numbers lie is the store's business; every store reads exactly the visible span in order of position, so
that a ring gives the bits of a full cache with a window.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ..arrays import Arrays, Floats, Ints
from ..errors import CacheError, InvalidSession
from .numpy_store import NumpyStore
from .store import KV_DTYPES, SCALED, BytesFor, NewStore, Store

if TYPE_CHECKING:
    from typing import Self

LARGEST_CHUNK = 512  # tokens that go through a model at once, where nothing asks for fewer


class CachedLayer(Protocol):
    """What the cache of a layer is made for."""

    @property
    def window(self) -> int | None: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class KVCache:
    """A layer's cache of `capacity` slots; `window` None sees everything. Use FullCache or RingCache.

    `kv` is the storage: "f32", "f16" or "int8". `length` counts the positions appended so far.
    """

    def __init__(
        self, n_kv_heads: int, head_dim: int, capacity: int, window: int | None, kv: str, new_store: NewStore
    ) -> None:
        self.capacity, self.window, self.kv = capacity, window, kv
        self.length = 0
        self._oldest = 0  # the oldest position that no later one has overwritten, ever: rewinding brings none back
        self._shape = (n_kv_heads, head_dim)
        self._new_store = new_store
        self._store = new_store(n_kv_heads, head_dim, capacity, kv)

    @property
    def store(self) -> Store:
        """Where the numbers lie."""
        return self._store

    @property
    def nbytes(self) -> int:
        """Bytes that the store has allocated."""
        return self._store.nbytes

    def append(self, keys: Floats, values: Floats) -> None:
        """Take keys (after RoPE) and values, (n, kv_heads, head_dim), for the next n positions.

        Raises CacheError if n positions would push out what the first of their queries still sees.
        """
        start = self.length
        self.advance(len(keys))
        self._store.write(start, keys, values)

    def advance(self, n: int) -> None:
        """`append` for a store that is written to by someone else."""
        end = self.length + n
        if end - self.capacity > first_visible(self.length, self.window):
            raise CacheError(f"cannot append {n} positions at {self.length}: the cache has {self.capacity} slots")
        self.length = end
        self._oldest = max(self._oldest, end - self.capacity)

    def attend(self, queries: Floats, scale: float, softcap: float | None, blocks: Ints | None = None) -> Floats:
        """Attention of queries (n, heads, head_dim), which belong to the n newest positions. Same shape back.

        A query sees its window up to itself and, with `blocks` (n, 2), the positions from blocks[:, 0] to
        blocks[:, 1] − 1 around itself whole: those of an image.
        """
        first, last = _causal(self.length, len(queries), self.window)
        if blocks is not None:
            first, last = np.minimum(first, blocks[:, 0]), np.maximum(last, blocks[:, 1])
        return self._store.attend(queries, first, last, scale, softcap)

    def is_sound(self) -> bool:
        """Whether the newest keys and values are finite, as they are stored."""
        newest = self._store.raw(max(0, self.length - 1), self.length).values()
        return all(np.isfinite(array).all() for array in newest)

    def check_rewind(self, n: int) -> None:
        """Raises CacheError if after forgetting the n newest positions the next query would miss a key."""
        target = self.length - n
        if n < 0 or target < 0 or first_visible(target, self.window) < self._oldest:
            raise CacheError(
                f"cannot rewind {n} of {self.length} positions: the cache holds positions from {self._oldest} on"
                + (f" and its window is {self.window}" if self.window else "")
            )

    def loses(self, length: int, n: int) -> bool:
        """Whether there is no way back to `length` positions once n more are taken."""
        return first_visible(length, self.window) < max(self._oldest, self.length + n - self.capacity)

    def rewind(self, n: int) -> None:
        """Forget the n newest positions. Raises CacheError, as `check_rewind`, rather than lose a visible key."""
        self.check_rewind(n)
        self.length -= n

    def forked(self, length: int) -> Self:
        """A cache of its own that holds the first `length` positions. Raises CacheError as `check_rewind` does."""
        self.check_rewind(self.length - length)
        new = copy.copy(self)
        new.length = length
        new._store = self._new_store(*self._shape, self.capacity, self.kv)
        if length > self._oldest:
            new._store.set_raw(self._oldest, self._store.raw(self._oldest, length))
        return new

    def snapshot(self) -> Arrays:
        """Copies of all that is held, in order of position. `restored` brings back this very state."""
        span = np.array([self._oldest, self.length], np.int64)
        return {"span": span, **self._store.raw(self._oldest, self.length)}

    def restored(self, state: Arrays) -> Self:
        """A new cache like this one in the state of a snapshot. Raises InvalidSession if it does not fit."""
        new = copy.copy(self)
        new._oldest, new.length = _span(state)
        held = new.length - new._oldest
        if held > self.capacity or first_visible(new.length, self.window) < new._oldest:
            raise InvalidSession(f"the saved positions {new._oldest} to {new.length} do not fit this cache")
        rows: tuple[tuple[int, ...], type] = (held, *self._shape), KV_DTYPES[self.kv]
        want = {"keys": rows, "values": rows}
        if self.kv in SCALED:
            scales = (held, self._shape[0]), np.float32
            want |= {"key_scales": scales, "value_scales": scales}
        for name, (shape, dtype) in want.items():
            saved = state.get(name)
            if saved is None or saved.shape != shape or saved.dtype != dtype:
                found = "nothing" if saved is None else f"{saved.dtype} {saved.shape}"
                raise InvalidSession(f"saved '{name}': found {found}, expected {np.dtype(dtype)} {shape}")
        new._store = self._new_store(*self._shape, self.capacity, self.kv)
        new._store.set_raw(new._oldest, {name: state[name] for name in want})
        return new


class FullCache(KVCache):
    """A slot for every position of the context; with a window, the same attention as a ring's."""

    def __init__(
        self,
        n_kv_heads: int,
        head_dim: int,
        context: int,
        window: int | None = None,
        kv: str = "f32",
        new_store: NewStore = NumpyStore,
    ) -> None:
        super().__init__(n_kv_heads, head_dim, context, window, kv, new_store)


class RingCache(KVCache):
    """Slots for one window and one chunk: the memory of a local layer, whatever the context's length."""

    def __init__(
        self,
        n_kv_heads: int,
        head_dim: int,
        window: int,
        chunk: int,
        kv: str = "f32",
        new_store: NewStore = NumpyStore,
    ) -> None:
        super().__init__(n_kv_heads, head_dim, _ring(window, chunk), window, kv, new_store)


class Caches:
    """The caches of one sequence, which grow and shrink together: one a layer, in the order of `layers`.

    Local layers get rings, unless not `ring`, or the context is shorter.
    """

    def __init__(
        self,
        layers: Sequence[CachedLayer],
        context: int,
        kv: str,
        chunk: int,
        ring: bool = True,
        new_store: NewStore = NumpyStore,
    ) -> None:
        self._caches: list[KVCache] = []
        for layer in layers:
            if ring and layer.window is not None and _ring(layer.window, chunk) < context:
                made: KVCache = RingCache(layer.n_kv_heads, layer.head_dim, layer.window, chunk, kv, new_store)
            else:
                made = FullCache(layer.n_kv_heads, layer.head_dim, context, layer.window, kv, new_store)
            self._caches.append(made)

    def __getitem__(self, layer: int) -> KVCache:
        return self._caches[layer]

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self._caches)

    @property
    def length(self) -> int:
        """How many positions are held by all."""
        return self._caches[-1].length

    @property
    def nbytes(self) -> int:
        """Bytes that the stores have allocated."""
        return sum(cache.nbytes for cache in self)

    def loses(self, length: int, n: int) -> bool:
        """Whether `reaches(length)` is no longer true once n more positions are taken."""
        return any(cache.loses(length, n) for cache in self)

    def reaches(self, length: int) -> bool:
        """Whether a rewind to `length` positions would lose no visible key."""
        try:
            for cache in self:
                cache.check_rewind(cache.length - length)
        except CacheError:
            return False
        return True

    def forked(self, length: int) -> Caches:
        """Caches of their own that hold the first `length` positions. Raises CacheError as `rewind` does."""
        new = copy.copy(self)
        new._caches = [cache.forked(length) for cache in self]
        return new

    def rewind(self, n: int) -> None:
        """Forget the n newest positions. Raises CacheError if a ring no longer holds what comes before them."""
        for cache in self:
            cache.check_rewind(n)
        for cache in self:
            cache.rewind(n)

    def first_unsound(self) -> int | None:
        """The first layer whose newest keys or values are not finite."""
        return next((i for i, cache in enumerate(self) if not cache.is_sound()), None)

    def cut(self, length: int) -> None:
        """Back to `length` positions after a pass that stopped half-way, when not all layers had taken its rows."""
        for cache in self:
            cache.rewind(cache.length - length)

    def snapshot(self) -> Arrays:
        """All caches as arrays by name."""
        return {f"layers.{i}.{name}": array for i, cache in enumerate(self) for name, array in cache.snapshot().items()}

    def restored(self, state: Arrays) -> Caches:
        """Caches like these in the state of a snapshot. Raises InvalidSession if it belongs to others."""
        new = copy.copy(self)
        new._caches = []
        for i, cache in enumerate(self):
            prefix = f"layers.{i}."
            part = {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}
            new._caches.append(cache.restored(part))
        if len({cache.length for cache in new}) != 1:
            raise InvalidSession("the saved layers hold different numbers of positions")
        return new


def bytes_for(
    layer: CachedLayer, context: int, kv: str, chunk: int, ring: bool, positions: int, store: BytesFor
) -> int:
    """The `nbytes` of a layer's cache among `Caches` for `context`, once it holds so many positions."""
    capacity = context
    if ring and layer.window is not None:
        capacity = min(context, _ring(layer.window, chunk))
    return store(layer.n_kv_heads, layer.head_dim, capacity, kv, positions)


def default_chunk(layers: Sequence[CachedLayer], most: int = LARGEST_CHUNK) -> int:
    """The most tokens that go through the model at once: `most`, or the smallest window if that is less."""
    return min([most, *(layer.window for layer in layers if layer.window)])


def first_visible(position: int, window: int | None) -> int:
    """The oldest position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


@lru_cache(maxsize=8)  # layers of one kind ask for the same, one after the other
def _causal(length: int, n: int, window: int | None) -> tuple[Ints, Ints]:
    """What each of the n newest of `length` positions sees: from … to before, (n,) each."""
    last = np.arange(length - n + 1, length + 1)
    first = np.zeros(n, np.int64) if window is None else np.maximum(last - window, 0)
    return first, last


def _ring(window: int, chunk: int) -> int:
    """Slots of a ring: what the first query of a chunk sees before it, and the chunk."""
    return window - 1 + chunk


def _span(state: Arrays) -> tuple[int, int]:
    span: npt.NDArray[np.int64] | None = state.get("span")
    if span is None or span.shape != (2,) or span.dtype != np.int64 or not 0 <= span[0] <= span[1] < 1 << 40:
        raise InvalidSession("saved 'span': expected the oldest position and the length")
    return int(span[0]), int(span[1])
