"""Keys and values of one layer: at which position, and what a query may see.

The model appends keys (after RoPE) and values, and asks for attention; it never sees a slot. Position p lives in
slot p mod capacity. FullCache has a slot for every position of the context; RingCache only for what the oldest
query of a chunk can see, window − 1 + chunk. Where and how the numbers lie is the store's business; every store
reads exactly the visible span in order of position, so that a ring gives the bits of a full cache with a window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import CacheError, InvalidSession
from ..files.onnx_folder import INT8_CHANNEL
from ..model import ops
from ..model.config import ModelConfig
from ..model.ops import Floats
from .rotation import hadamard

if TYPE_CHECKING:
    from typing_extensions import Self

KV_TYPES = ("f32", "f16", "int8")
KV_DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8, INT8_CHANNEL: np.int8}
_GROWTH = 256  # rows by which storage grows

Arrays = dict[str, npt.NDArray[Any]]


class Store(Protocol):
    """Keys and values in slots. int8 has a float32 scale, max |x| / 127, per head and position, where heads of a power
    of two are rotated first (rotation.py)."""

    def write(self, position: int, keys: Floats, values: Floats) -> None:
        """Store (n, kv_heads, head_dim) for the positions from `position` on."""

    def attend(self, queries: Floats, length: int, window: int | None, scale: float, softcap: float | None) -> Floats:
        """Attention of queries (n, heads, head_dim) for the n newest of `length` positions. Same shape back."""

    def raw(self, start: int, stop: int) -> Arrays:
        """Copies as stored, in order of position: keys and values (m, kv_heads, head_dim), scales (m, kv_heads)."""

    def set_raw(self, start: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put back what `raw` gave."""


NewStore = Callable[[int, int, int, str], Store]
"""(kv_heads, head_dim, capacity, kv) → an empty store."""


class NumpyStore:
    """The reference store: NumPy arrays of whole slots, which grow as positions come in."""

    def __init__(self, n_kv_heads: int, head_dim: int, capacity: int, kv: str) -> None:
        self._capacity = capacity
        shape = (0, n_kv_heads, head_dim)
        self._arrays: Arrays = {name: np.empty(shape, KV_DTYPES[kv]) for name in ("keys", "values")}
        self._rotated = kv == "int8" and head_dim.bit_count() == 1
        if kv == "int8":
            self._arrays |= {name: np.empty(shape[:2], np.float32) for name in ("key_scales", "value_scales")}

    def write(self, position: int, keys: Floats, values: Floats) -> None:
        self._grow(position + len(keys))
        slots = self._slots(position, position + len(keys))
        for name, x in (("key", self._rotate(keys)), ("value", self._rotate(values))):
            if (scales := self._arrays.get(f"{name}_scales")) is not None:
                scales[slots] = np.abs(x).max(axis=-1) / np.float32(127)
                x = np.rint(x / np.where(scales[slots] > 0, scales[slots], 1)[..., None])
            self._arrays[f"{name}s"][slots] = x

    def attend(self, queries: Floats, length: int, window: int | None, scale: float, softcap: float | None) -> Floats:
        first_query = length - len(queries)
        first_key = first_visible(first_query, window)
        mixed = ops.attention(
            self._rotate(queries),
            self.read("key", first_key, length),
            self.read("value", first_key, length),
            np.arange(first_query, length),
            np.arange(first_key, length),
            window,
            scale,
            softcap,
        )
        return self._rotate(mixed)

    def read(self, name: str, start: int, stop: int) -> Floats:
        """The "key" or "value" rows (stop − start, kv_heads, head_dim) as float32, still rotated if they are."""
        slots = self._slots(start, stop)
        rows: Floats = self._arrays[f"{name}s"][slots].astype(np.float32, copy=False)
        scales = self._arrays.get(f"{name}_scales")
        return rows if scales is None else rows * scales[slots][..., None]

    def raw(self, start: int, stop: int) -> Arrays:
        slots = self._slots(start, stop)
        return {name: array[slots] for name, array in self._arrays.items()}

    def set_raw(self, start: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        stop = start + len(arrays["keys"])
        self._grow(stop)
        for name, array in self._arrays.items():
            array[self._slots(start, stop)] = arrays[name]

    def _rotate(self, x: Floats) -> Floats:
        """Scores of rotated queries and keys are those of queries and keys; twice is once there and back."""
        return hadamard(x) if self._rotated else x

    def _slots(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.arange(start, stop) % self._capacity

    def _grow(self, length: int) -> None:
        rows = allocated_rows(length, self._capacity)
        for name, old in self._arrays.items():
            if rows > len(old):
                self._arrays[name] = np.empty((rows, *old.shape[1:]), old.dtype)
                self._arrays[name][: len(old)] = old


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
        self._newest = 0  # the most positions ever held, which is what memory was allocated for
        self._shape = (n_kv_heads, head_dim)
        self._new_store = new_store
        self._store = new_store(n_kv_heads, head_dim, capacity, kv)

    @property
    def store(self) -> Store:
        """Where the numbers lie."""
        return self._store

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the positions held so far."""
        return self.slots * row_bytes(*self._shape, self.kv)

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
        self._newest = max(self._newest, end)
        self._oldest = max(self._oldest, end - self.capacity)

    @property
    def slots(self) -> int:
        """How many slots storage has for the positions held so far: those that memory was allocated for."""
        return allocated_rows(self._newest, self.capacity)

    def visible(self, n: int) -> npt.NDArray[np.bool_]:
        """Which slots each of the n newest positions sees, (n, slots)."""
        newest = self.length - 1
        held = newest - (newest - np.arange(self.slots)) % self.capacity  # the position in each slot; < 0 in empty ones
        queries = np.arange(self.length - n, self.length)[:, None]
        oldest = 0 if self.window is None else np.maximum(0, queries - self.window + 1)
        return (oldest <= held) & (held <= queries)

    def attend(self, queries: Floats, scale: float, softcap: float | None) -> Floats:
        """Attention of queries (n, heads, head_dim), which belong to the n newest positions. Same shape back."""
        return self._store.attend(queries, self.length, self.window, scale, softcap)

    def check_rewind(self, n: int) -> None:
        """Raises CacheError if after forgetting the n newest positions the next query would miss a key."""
        target = self.length - n
        if n < 0 or target < 0 or first_visible(target, self.window) < self._oldest:
            raise CacheError(
                f"cannot rewind {n} of {self.length} positions: the cache holds positions from {self._oldest} on"
                + (f" and its window is {self.window}" if self.window else "")
            )

    def rewind(self, n: int) -> None:
        """Forget the n newest positions. Raises CacheError, as `check_rewind`, rather than lose a visible key."""
        self.check_rewind(n)
        self.length -= n

    def snapshot(self) -> Arrays:
        """Copies of all that is held, in order of position. `restored` brings back this very state."""
        span = np.array([self._oldest, self.length], np.int64)
        return {"span": span, **self._store.raw(self._oldest, self.length)}

    def restored(self, state: Mapping[str, npt.NDArray[Any]]) -> Self:
        """A new cache like this one in the state of a snapshot. Raises InvalidSession if it does not fit."""
        new = copy.copy(self)
        new._oldest, new.length = _span(state)
        new._newest = new.length
        held = new.length - new._oldest
        if held > self.capacity or first_visible(new.length, self.window) < new._oldest:
            raise InvalidSession(f"the saved positions {new._oldest} to {new.length} do not fit this cache")
        rows: tuple[tuple[int, ...], type] = (held, *self._shape), KV_DTYPES[self.kv]
        want = {"keys": rows, "values": rows}
        if self.kv == "int8":
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
        super().__init__(n_kv_heads, head_dim, window - 1 + chunk, window, kv, new_store)


def first_visible(position: int, window: int | None) -> int:
    """The oldest position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def allocated_rows(length: int, capacity: int) -> int:
    """Rows that a cache of `capacity` has allocated once it has held `length` positions."""
    return min(capacity, -(-length // _GROWTH) * _GROWTH)


def default_chunk(config: ModelConfig, most: int = 512) -> int:
    """The most tokens that go through the model at once: `most`, or the smallest window if that is less."""
    return min([most, *(layer.window for layer in config.layers if layer.window)])


def new_caches(
    config: ModelConfig, context: int, kv: str, chunk: int, ring: bool = True, new_store: NewStore = NumpyStore
) -> list[KVCache]:
    """A cache per layer: rings for the local layers (unless not `ring`, or the context is shorter), else full."""
    caches: list[KVCache] = []
    for layer in config.layers:
        if ring and layer.window is not None and layer.window - 1 + chunk < context:
            caches.append(RingCache(config.n_kv_heads, config.head_dim, layer.window, chunk, kv, new_store))
        else:
            caches.append(FullCache(config.n_kv_heads, config.head_dim, context, layer.window, kv, new_store))
    return caches


def row_bytes(n_kv_heads: int, head_dim: int, kv: str) -> int:
    """Bytes that one position takes in one layer: keys and values, with their scales."""
    per_head = head_dim * np.dtype(KV_DTYPES[kv]).itemsize + (4 if kv == "int8" else 0)
    return 2 * n_kv_heads * per_head


def _span(state: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
    span = state.get("span")
    if span is None or span.shape != (2,) or span.dtype != np.int64 or not 0 <= span[0] <= span[1] < 1 << 40:
        raise InvalidSession("saved 'span': expected the oldest position and the length")
    return int(span[0]), int(span[1])
