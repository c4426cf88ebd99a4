"""The reference store, in NumPy: the specification of the others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..arrays import Arrays, Floats, Ints
from .rotation import hadamard
from .store import KV_DTYPES, SCALED

_GROWTH = 256  # rows by which storage grows


class NumpyStore:
    """NumPy arrays of whole slots, which grow as positions come in. Position p lives in slot p mod capacity.

    int8 has a scale for each head and position, see `quantize_values` and `quantize_keys`; heads of a power of two are
    rotated first, see `rotation.py`.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, capacity: int, kv: str) -> None:
        self._capacity = capacity
        shape = (0, n_kv_heads, head_dim)
        self._arrays = {name: np.empty(shape, KV_DTYPES[kv]) for name in ("keys", "values")}
        self._rotated = kv in SCALED and head_dim.bit_count() == 1
        if kv in SCALED:
            self._arrays |= {name: np.empty(shape[:2], np.float32) for name in ("key_scales", "value_scales")}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    @staticmethod
    def bytes_for(n_kv_heads: int, head_dim: int, capacity: int, kv: str, positions: int) -> int:
        """`nbytes` once so many positions were written."""
        row = head_dim * np.dtype(KV_DTYPES[kv]).itemsize + (4 if kv in SCALED else 0)
        return _rows(positions, capacity) * 2 * n_kv_heads * row

    def write(self, position: int, keys: Floats, values: Floats) -> None:
        self._grow(position + len(keys))
        slots = self._slots(position, position + len(keys))
        for name, x, quantize in (("key", keys, quantize_keys), ("value", values, quantize_values)):
            x = self._rotate(x)
            if f"{name}_scales" in self._arrays:
                x, self._arrays[f"{name}_scales"][slots] = quantize(x)
            self._arrays[f"{name}s"][slots] = x

    def attend(self, queries: Floats, first: Ints, last: Ints, scale: float, softcap: float | None) -> Floats:
        start, stop = int(first.min()), int(last.max())
        keys, values = self.read("key", start, stop), self.read("value", start, stop)
        return self._rotate(attention(self._rotate(queries), keys, values, first - start, last - start, scale, softcap))

    def read(self, name: str, start: int, stop: int) -> Floats:
        """The "key" or "value" rows (stop − start, kv_heads, head_dim) as float32, still rotated if they are."""
        slots = self._slots(start, stop)
        rows: Floats = self._arrays[f"{name}s"][slots].astype(np.float32, copy=False)
        scales = self._arrays.get(f"{name}_scales")
        if scales is None:
            return rows
        if name == "value":
            return rows * scales[slots][..., None]
        steps, offsets = split_key_scales(scales[slots])
        return (rows + offsets[..., None]) * steps[..., None]

    def raw(self, start: int, stop: int) -> Arrays:
        slots = self._slots(start, stop)
        return {name: array[slots] for name, array in self._arrays.items()}

    def set_raw(self, start: int, arrays: Arrays) -> None:
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
        rows = _rows(length, self._capacity)
        for name, old in self._arrays.items():
            if rows > len(old):
                self._arrays[name] = np.empty((rows, *old.shape[1:]), old.dtype)
                self._arrays[name][: len(old)] = old


def quantize_values(x: Floats) -> tuple[Floats, Floats]:
    """Codes and scales of heads (…, head_dim): scale · code, with scale = max|x| / 127."""
    scales = np.abs(x).max(axis=-1) / np.float32(127)
    codes: Floats = np.rint(x / np.where(scales > 0, scales, 1)[..., None])
    return codes, scales


def quantize_keys(x: Floats) -> tuple[Floats, Floats]:
    """Codes and scales of heads (…, head_dim): scale · (code + offset), so that the codes' whole range is used.

    The scale is (max − min) / 254, or more, so that the offset fits a byte; in place of its lowest eight bits, with
    which it is rounded up, it holds offset + 128. Where it is not finite the codes are 0, and it stays so.
    """
    high, low, magnitude = x.max(axis=-1), x.min(axis=-1), np.abs(x).max(axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.maximum((high - low) / np.float32(254), np.abs(high + low) / np.float32(252))
        bits = np.where(np.isfinite(magnitude), steps, magnitude).astype(np.float32).view(np.int32)
        usable = (bits > 0) & (bits < 0x7F800000 - 255)
        bits = np.where(usable, bits + 255, bits) & ~255
        steps = np.where(usable, bits.view(np.float32), np.float32(1))
        offsets = np.where(usable, np.rint((high + low) * np.float32(0.5) / steps + np.float32(0.5)), 0)
        codes = np.rint(x / steps[..., None]) - offsets[..., None]
    codes = np.where(usable[..., None], codes.clip(-128, 127), np.float32(0))
    return codes, (bits | (offsets.astype(np.int32) + 128)).view(np.float32)


def split_key_scales(scales: Floats) -> tuple[Floats, Floats]:
    """Steps and offsets in the scales of `quantize_keys`."""
    bits = scales.view(np.int32)
    return (bits & ~255).view(np.float32), ((bits & 255) - 128).astype(np.float32)


def _rows(length: int, capacity: int) -> int:
    """Rows that are allocated once `length` positions were written."""
    return min(capacity, -(-length // _GROWTH) * _GROWTH)


def attention(
    queries: Floats, keys: Floats, values: Floats, first: Ints, last: Ints, scale: float, cap: float | None
) -> Floats:
    """Grouped-query attention of queries (n, heads, d) over keys and values (m, kv_heads, d), in float32.

    Query i sees the keys first[i] ≤ j < last[i]. Scores are scaled, capped as cap · tanh(score / cap) unless that is
    None, and weighed by softmax. Returns (n, heads, d).
    """
    n, heads, d = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(n, kv_heads, heads // kv_heads, d).transpose(1, 2, 0, 3)  # (kv, group, n, d)
    scores = grouped @ keys.transpose(1, 2, 0)[:, None] * np.float32(scale)  # (kv, group, n, m)
    if cap is not None:
        scores = np.float32(cap) * np.tanh(scores / np.float32(cap))
    j = np.arange(len(keys))
    visible = (first[:, None] <= j) & (j < last[:, None])
    scores = np.where(visible, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Floats = weights @ values.transpose(1, 0, 2)[:, None]  # (kv, group, n, d)
    return mixed.transpose(2, 0, 1, 3).reshape(n, heads, d)
