"""Where a layer's keys and values lie: what a store offers, and how it may keep its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..arrays import Arrays, Floats, Ints

INT8_CHANNEL = "int8-channel"  # int8 with a fixed scale for each channel, which an ONNX graph holds
KV_DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8, INT8_CHANNEL: np.int8}
KV_TYPES = ("f16", "f32", "int8")  # those that a user chooses from, the default first
LARGEST_HEAD = 512  # numbers of a head that the native store takes
SCALED = ("int8",)  # those with a float32 scale for each head and position


class Store(Protocol):
    """Keys and values in slots; position p lives in the place of p − capacity, or of an earlier one."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for what has been written so far."""

    def write(self, position: int, keys: Floats, values: Floats) -> None:
        """Store (n, kv_heads, head_dim) for the positions from `position` on."""

    def attend(self, queries: Floats, first: Ints, last: Ints, scale: float, softcap: float | None) -> Floats:
        """Attention of queries (n, heads, head_dim), each over first ≤ position < last, (n,). Same shape back."""

    def raw(self, start: int, stop: int) -> Arrays:
        """Copies as stored, in order of position: keys and values (m, kv_heads, head_dim), scales (m, kv_heads)."""

    def set_raw(self, start: int, arrays: Arrays) -> None:
        """Put back what `raw` gave."""


NewStore = Callable[[int, int, int, str], Store]
"""(kv_heads, head_dim, capacity, kv) → an empty store."""

BytesFor = Callable[[int, int, int, str, int], int]
"""(kv_heads, head_dim, capacity, kv, positions) → the `nbytes` of a store once so many positions were written."""
