"""Keys and values of one layer: who stores them, at which position, and what a query may see.

The model appends keys (after RoPE) and values, and asks for attention; it never sees a slot. Position p lives in
slot p mod capacity. FullCache has a slot for every position of the context; RingCache only for what the oldest
query of a chunk can see, window − 1 + chunk. Both read exactly the visible span in order of position, so that a
ring gives the bits that a full cache with the same window gives.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import ops
from .config import ModelConfig
from .errors import CacheError, InvalidSession
from .ops import Floats

if TYPE_CHECKING:
    from typing_extensions import Self

KV_TYPES = ("f32", "f16", "int8")
_DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
_GROWTH = 256  # rows by which storage grows


class _Store:
    """Rows of (kv_heads, head_dim) in a storage type; int8 carries a float32 scale per row and head."""

    def __init__(self, n_heads: int, head_dim: int, kv: str) -> None:
        self.quantized = kv == "int8"
        self.rows: npt.NDArray[Any] = np.empty((0, n_heads, head_dim), _DTYPES[kv])
        self.scales: Floats = np.empty((0, n_heads if self.quantized else 0), np.float32)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scales.nbytes

    def grow(self, rows: int) -> None:
        for name in ("rows", "scales"):
            old = getattr(self, name)
            new = np.empty((rows, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def write(self, slots: npt.NDArray[np.int64], x: Floats) -> None:
        if self.quantized:
            scales = np.abs(x).max(axis=-1) / np.float32(127)
            self.scales[slots] = scales
            x = np.rint(x / np.where(scales > 0, scales, 1)[..., None])
        self.rows[slots] = x

    def read(self, slots: npt.NDArray[np.int64]) -> Floats:
        rows = self.rows[slots].astype(np.float32, copy=False)
        return rows * self.scales[slots][..., None] if self.quantized else rows


class KVCache:
    """A layer's cache of `capacity` slots; `window` None sees everything. Use FullCache or RingCache.

    `kv` is the storage: "f32", "f16" or "int8". `length` counts the positions appended so far. Memory grows as
    positions come in; `nbytes` is what is allocated now.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, capacity: int, window: int | None, kv: str) -> None:
        self.capacity, self.window, self.kv = capacity, window, kv
        self.length = 0
        self._oldest = 0  # the oldest position that no later one has overwritten, ever: rewinding brings none back
        self._keys = _Store(n_kv_heads, head_dim, kv)
        self._values = _Store(n_kv_heads, head_dim, kv)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def append(self, keys: Floats, values: Floats) -> None:
        """Take keys (after RoPE) and values, (n, kv_heads, head_dim), for the next n positions.

        Raises CacheError if n positions would push out what the first of their queries still sees.
        """
        end = self.length + len(keys)
        if end - self.capacity > self._first_visible(self.length):
            raise CacheError(
                f"cannot append {len(keys)} positions at {self.length}: the cache has {self.capacity} slots"
            )
        self._ensure_rows(end)
        slots = self._slots(self.length, end)
        self._keys.write(slots, keys)
        self._values.write(slots, values)
        self.length = end
        self._oldest = max(self._oldest, end - self.capacity)

    def attend(self, queries: Floats, scale: float, softcap: float | None) -> Floats:
        """Attention of queries (n, heads, head_dim), which belong to the n newest positions. Same shape back."""
        first_query = self.length - len(queries)
        first_key = self._first_visible(first_query)
        slots = self._slots(first_key, self.length)
        return ops.attention(
            queries,
            self._keys.read(slots),
            self._values.read(slots),
            np.arange(first_query, self.length),
            np.arange(first_key, self.length),
            self.window,
            scale,
            softcap,
        )

    def check_rewind(self, n: int) -> None:
        """Raises CacheError if after forgetting the n newest positions the next query would miss a key."""
        target = self.length - n
        if n < 0 or target < 0 or self._first_visible(target) < self._oldest:
            raise CacheError(
                f"cannot rewind {n} of {self.length} positions: the cache holds positions from {self._oldest} on"
                + (f" and its window is {self.window}" if self.window else "")
            )

    def rewind(self, n: int) -> None:
        """Forget the n newest positions. Raises CacheError, as `check_rewind`, rather than lose a visible key."""
        self.check_rewind(n)
        self.length -= n

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of all that is held, in order of position. `restored` brings back this very state."""
        slots = self._slots(self._oldest, self.length)
        span = np.array([self._oldest, self.length], np.int64)
        state = {"span": span, "keys": self._keys.rows[slots], "values": self._values.rows[slots]}
        if self.kv == "int8":
            state |= {"key_scales": self._keys.scales[slots], "value_scales": self._values.scales[slots]}
        return state

    def restored(self, state: Mapping[str, npt.NDArray[Any]]) -> Self:
        """A new cache like this one in the state of a snapshot. Raises InvalidSession if it does not fit."""
        new = copy.copy(self)
        n_heads, head_dim = self._keys.rows.shape[1:]
        new._keys, new._values = (_Store(n_heads, head_dim, self.kv) for _ in range(2))
        new._oldest, new.length = _span(state)
        held = new.length - new._oldest
        if held > self.capacity or new._first_visible(new.length) < new._oldest:
            raise InvalidSession(f"the saved positions {new._oldest} to {new.length} do not fit this cache")
        parts = [("keys", new._keys, "rows"), ("values", new._values, "rows")]
        if self.kv == "int8":
            parts += [("key_scales", new._keys, "scales"), ("value_scales", new._values, "scales")]
        for name, store, field in parts:
            rows = getattr(store, field)
            saved, want = state.get(name), (held, *rows.shape[1:])
            if saved is None or saved.shape != want or saved.dtype != rows.dtype:
                found = "nothing" if saved is None else f"{saved.dtype} {saved.shape}"
                raise InvalidSession(f"saved '{name}': found {found}, expected {rows.dtype} {want}")
        new._ensure_rows(new.length)
        slots = new._slots(new._oldest, new.length)
        for name, store, field in parts:
            getattr(store, field)[slots] = state[name]
        return new

    def _first_visible(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window + 1)

    def _slots(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.arange(start, stop) % self.capacity

    def _ensure_rows(self, length: int) -> None:
        rows = allocated_rows(length, self.capacity)
        if rows > len(self._keys.rows):
            self._keys.grow(rows)
            self._values.grow(rows)


class FullCache(KVCache):
    """A slot for every position of the context; with a window, the same attention as a ring's."""

    def __init__(
        self, n_kv_heads: int, head_dim: int, context: int, window: int | None = None, kv: str = "f32"
    ) -> None:
        super().__init__(n_kv_heads, head_dim, context, window, kv)


class RingCache(KVCache):
    """Slots for one window and one chunk: the memory of a local layer, whatever the context's length."""

    def __init__(self, n_kv_heads: int, head_dim: int, window: int, chunk: int, kv: str = "f32") -> None:
        super().__init__(n_kv_heads, head_dim, window - 1 + chunk, window, kv)


def allocated_rows(length: int, capacity: int) -> int:
    """Rows that a cache of `capacity` has allocated once it has held `length` positions."""
    return min(capacity, -(-length // _GROWTH) * _GROWTH)


def default_chunk(config: ModelConfig) -> int:
    """The most tokens that go through the model at once: 512, or the smallest window if that is less."""
    return min([512, *(layer.window for layer in config.layers if layer.window)])


def new_caches(config: ModelConfig, context: int, kv: str, chunk: int, ring: bool = True) -> list[KVCache]:
    """A cache per layer: rings for the local layers (unless not `ring`, or the context is shorter), else full."""
    caches: list[KVCache] = []
    for layer in config.layers:
        if ring and layer.window is not None and layer.window - 1 + chunk < context:
            caches.append(RingCache(config.n_kv_heads, config.head_dim, layer.window, chunk, kv))
        else:
            caches.append(FullCache(config.n_kv_heads, config.head_dim, context, layer.window, kv))
    return caches


def row_bytes(config: ModelConfig, kv: str) -> int:
    """Bytes that one position takes in one layer: keys and values, with their scales."""
    per_head = config.head_dim * np.dtype(_DTYPES[kv]).itemsize + (4 if kv == "int8" else 0)
    return 2 * config.n_kv_heads * per_head


def _span(state: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
    span = state.get("span")
    if span is None or span.shape != (2,) or span.dtype != np.int64 or not 0 <= span[0] <= span[1] < 1 << 40:
        raise InvalidSession("saved 'span': expected the oldest position and the length")
    return int(span[0]), int(span[1])
