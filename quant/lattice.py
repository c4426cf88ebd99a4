"""Weights that training has put on a lattice: bfloat16 numbers that are a whole number of steps each, a step a block.

Quantization-aware training leaves them so. A search for the least squared error comes close to the step, and most often
not so close that every product, rounded to bfloat16, is the weight again; this finds the float16 with which they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import EVEN, Blocks, Bytes, F32Array, Format, bf16_bits, column, inverse

_NEARLY_ALL = 0.9
_NEAR = np.float32(2.0**-7)  # of a weight: more than rounding the products and the step makes them differ
_PEAK_CODES = np.array([-8, 7, 6, 5, 4, 3, 2, 1], np.float32)  # of a block's largest weight
_FIRST = 4  # weights that are looked at first: blocks that are on no lattice are many, and few get past these


def same_bf16(x: F32Array, y: F32Array) -> NDArray[np.bool_]:
    """Where y rounds to the bfloat16 numbers x."""
    same: NDArray[np.bool_] = (bf16_bits(y) == x.view(np.uint32) >> 16) | (x == y)  # zeros have two signs
    return same


def is_bf16(x: F32Array) -> bool:
    return not (x.view(np.uint32) & np.uint32(0xFFFF)).any()


def to_lattice(form: type[Format], x: F32Array, blocks: Blocks) -> None:
    """Move the scales "d" of blocks (b,) onto the lattice that their bfloat16 numbers x (b, block) are on, if any."""
    if not is_bf16(x):
        return
    steps, weights = blocks["d"].astype(np.float32), np.ascontiguousarray(x.T)
    near = _near(form, weights, steps)
    # Where training has not used all codes, the least squared error may have another step than the lattice.
    least, most = weights.min(axis=0), weights.max(axis=0)
    peaks = np.where(-least > most, least, most)
    for code in _PEAK_CODES:
        if near.all():
            break
        more = _near(form, weights, peaks / code) & ~near
        steps[more] = peaks[more] / code
        near |= more
    if not near.any():
        return
    found = np.flatnonzero(near)
    x, d = x[found], column(steps[found])
    codes = form.snap(x * inverse(d))
    low, high = _steps(x, codes)
    best, kept = blocks["d"][found], _hits(x, codes, blocks["d"][found])
    middle = ((low + high) / 2).astype(np.float16)
    for trial in (middle, *(np.nextafter(middle, np.float16(end)) for end in (-np.inf, np.inf))):
        hits = _hits(x, codes, trial)
        better = (hits > kept) & np.isfinite(trial)
        best[better], kept[better] = trial[better], hits[better]
    blocks["d"][found] = best


def _near(form: type[Format], x: F32Array, steps: F32Array) -> NDArray[np.bool_]:
    """Which of the columns x (n, b) are almost whole numbers of their steps (b,), those of the format."""

    def near(part: F32Array, d: F32Array) -> NDArray[np.bool_]:
        off = np.abs(form.snap(part * inverse(d)) * d - part)
        all_near: NDArray[np.bool_] = (off <= _NEAR * np.abs(part)).all(0)
        return all_near

    found: NDArray[np.bool_] = near(x[:_FIRST], steps) & (steps != 0)
    found[found] = near(x[:, found], steps[found])
    return found


def _steps(x: F32Array, codes: F32Array) -> tuple[F32Array, F32Array]:
    """Between which steps (b,) every product with the codes rounds to x, both (b, n); of their magnitude, low > high
    where there are none."""
    bits = np.abs(x).view(np.uint32)
    sizes = np.abs(codes)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = ((edge.view(np.float32) / sizes) for edge in (bits - np.uint32(0x8000), bits + np.uint32(0x8000)))
    zero = codes == 0
    sign = np.where((x * codes).sum(1) < 0, np.float32(-1), np.float32(1))
    return sign * np.where(zero, -np.inf, low).max(1), sign * np.where(zero, np.inf, high).min(1)


def _hits(x: F32Array, codes: F32Array, d: NDArray[Any]) -> NDArray[np.int64]:
    """How many products with the scales d (b,) round to x, of each block."""
    hits: NDArray[np.int64] = np.count_nonzero(same_bf16(x, codes * column(d)), axis=1)
    return hits


def quantized(form: type[Format], rows: F32Array) -> Bytes | None:
    """The blocks of float32 rows (m, n), uint8 (m, row_bytes(n)), if they give nearly all of the rows again exactly."""
    for some in (rows[:4], rows):
        data = form.quantize(some, EVEN)
        if not is_kept(form, some, data):
            return None
    return data


def is_kept(form: type[Format], rows: F32Array, data: Bytes) -> bool:
    """Whether the blocks `data` (..., bytes) give nearly all of the rows (..., n) again exactly."""
    return equal(form, rows, data) > _NEARLY_ALL * rows.size


def equal(form: type[Format], rows: F32Array, data: Bytes) -> int:
    """How many of the bfloat16 numbers `rows` (..., n) the blocks `data` (..., bytes) give again, rounded to that.

    Numbers and not blocks: steps that float16 does not have leave a tenth of the blocks with one that is off.
    """
    return int(np.count_nonzero(same_bf16(rows, form.dequantize(data)))) if is_bf16(rows) else 0
