"""Weights that training has put on a lattice: a whole number of steps each, a step a block, in bfloat16 most often.

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
_ON_LATTICE = np.float32(2.0**-8)  # of a weight: as much as that does where the step is the right one
# Of a block's largest weight. The largest step first: half of a small one float16 may not have.
_PEAK_CODES = np.array([1, 2, 3, 4, 5, 6, 7, -8], np.float32)
_FIRST = 4  # weights that are looked at first: blocks that are on no lattice are many, and few get past these
_F16_HALF = np.float32(2.0**-25)  # of the step between the smallest float16 numbers


def same(x: F32Array, y: F32Array) -> NDArray[np.bool_]:
    """Where y, rounded to the precision that all of x has, is x: bfloat16, float16 or float32."""
    dropped = _dropped_bits(x)
    with np.errstate(over="ignore"):
        equal: NDArray[np.bool_] = x == (y.astype(np.float16) if dropped == 13 else y)  # zeros have two signs
    if dropped == 16:
        equal |= bf16_bits(y) == x.view(np.uint32) >> 16
    return equal


def _dropped_bits(x: F32Array) -> int:
    """Of the bits of a float32, how many none of x needs: 16 in bfloat16, 13 in float16, else 0."""
    used = np.bitwise_or.reduce(x.view(np.uint32), axis=None)
    if not used & 0xFFFF:
        return 16
    with np.errstate(over="ignore"):
        return 13 if not used & 0x1FFF and (x.astype(np.float16) == x).all() else 0


def to_lattice(form: type[Format], x: F32Array, blocks: Blocks) -> None:
    """Move the scales "d" of blocks (b,) onto the lattice that their numbers x (b, block) are on, if any."""
    weights = np.ascontiguousarray(x.T)
    least, most = weights.min(axis=0), weights.max(axis=0)
    peaks = np.where(-least > most, least, most)
    steps, near = np.zeros_like(peaks), peaks == 0
    for code in _PEAK_CODES:
        if near.all():
            break
        more = _near(form, weights, peaks / code) & ~near
        steps[more] = peaks[more] / code
        near |= more
    found = np.flatnonzero(steps)
    if not len(found):
        return
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
    bits, sizes, dropped = np.abs(x).view(np.uint32), np.abs(codes), _dropped_bits(x)
    half = np.uint32(1 << dropped >> 1)
    below, above = (bits - half).view(np.float32), (bits + half).view(np.float32)
    if dropped == 13:
        below, above = np.minimum(below, np.abs(x) - _F16_HALF), np.maximum(above, np.abs(x) + _F16_HALF)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = below / sizes, above / sizes
    zero = codes == 0
    sign = np.where((x * codes).sum(1) < 0, np.float32(-1), np.float32(1))
    return sign * np.where(zero, -np.inf, low).max(1), sign * np.where(zero, np.inf, high).min(1)


def _hits(x: F32Array, codes: F32Array, d: NDArray[Any]) -> NDArray[np.int64]:
    """How many products with the scales d (b,) round to x, of each block."""
    hits: NDArray[np.int64] = np.count_nonzero(same(x, codes * column(d)), axis=1)
    return hits


def quantized(form: type[Format], rows: F32Array) -> Bytes | None:
    """The blocks of float32 rows (m, n), uint8 (m, row_bytes(n)), if nearly all of the rows are on their lattices."""
    for some in (rows[:4], rows):
        data = form.quantize(some, EVEN)
        if not is_kept(form, some, data):
            return None
    return data


def is_kept(form: type[Format], rows: F32Array, data: Bytes) -> bool:
    """Whether nearly all of the rows (..., n) are on the lattices of the blocks `data` (..., bytes).

    As near as bfloat16 and a float16 step come; how many are the same is what `equal` says.
    """
    off = np.abs(form.dequantize(data) - rows)
    return int(np.count_nonzero(off <= _ON_LATTICE * np.abs(rows))) > _NEARLY_ALL * rows.size


def equal(form: type[Format], rows: F32Array, data: Bytes) -> int:
    """How many of the numbers `rows` (..., n) the blocks `data` (..., bytes) give again, rounded to what those have."""
    return int(np.count_nonzero(same(rows, form.dequantize(data))))
