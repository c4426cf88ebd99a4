"""The ort engine's caches: memory that an ONNX graph writes to. Needs no onnxruntime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..arrays import Arrays, Floats, Ints
from ..cache.store import KV_DTYPES


class OrtStore:
    """Slots in the layout of the graph's caches, which the graph writes to and attends to.

    Address space is there for all slots from the start; the system gives memory to those that are written to.
    Position p lives in slot p mod capacity.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, capacity: int, kv: str, by_head: bool) -> None:
        """`by_head` caches are (KV heads, slots, head_dim), others (slots, KV heads · head_dim)."""
        # Zeros, because what is in a slot that no query sees is multiplied by 0 all the same.
        shape = (n_kv_heads, capacity, head_dim) if by_head else (capacity, n_kv_heads * head_dim)
        self.arrays = {name: np.zeros(shape, KV_DTYPES[kv]) for name in ("keys", "values")}
        self.rows = {  # (capacity, kv_heads, head_dim)
            name: array.transpose(1, 0, 2) if by_head else array.reshape(capacity, n_kv_heads, head_dim)
            for name, array in self.arrays.items()
        }
        self._by_head, self._used = by_head, 0

    @property
    def nbytes(self) -> int:
        return sum(rows[: self._used].nbytes for rows in self.rows.values())

    @staticmethod
    def bytes_for(n_kv_heads: int, head_dim: int, capacity: int, kv: str, positions: int) -> int:
        """`nbytes` once so many positions were written."""
        return min(positions, capacity) * 2 * n_kv_heads * head_dim * np.dtype(KV_DTYPES[kv]).itemsize

    def graph_shape(self, slots: int) -> tuple[int, ...]:
        """The shape in which the graph takes either array when `slots` are in use."""
        shape = self.arrays["keys"].shape
        return (1, *shape) if self._by_head else (1, slots, shape[1])

    def written(self, length: int) -> None:
        """Said of the graph, once it has written positions up to `length`."""
        self._used = max(self._used, min(length, len(self.rows["keys"])))

    def write(self, position: int, keys: Floats, values: Floats) -> None:
        raise NotImplementedError("the graph writes")

    def attend(self, queries: Floats, first: Ints, last: Ints, scale: float, softcap: float | None) -> Floats:
        raise NotImplementedError("the graph attends")

    def raw(self, start: int, stop: int) -> Arrays:
        return {name: rows[self._slots(start, stop)] for name, rows in self.rows.items()}

    def set_raw(self, start: int, arrays: Arrays) -> None:
        for name, rows in self.rows.items():
            rows[self._slots(start, start + len(arrays[name]))] = arrays[name]
        self.written(start + len(arrays["keys"]))

    def _slots(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.arange(start, stop) % len(self.rows["keys"])
