"""The number formats of a model file: one class each, laid out bit for bit as GGUF's.

Written in NumPy and vectorised over blocks: fast enough to quantize whole models, and the reference that the
native kernels are tested against. A class registers itself by being defined; tests and tools walk `FORMATS`.
"""

# ruff: noqa: N801 - the classes carry the names that the field gives to these formats

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Blocks = NDArray[Any]  # structured: one element a block

FORMATS: dict[str, type[Format]] = {}
FORMAT_OF_TYPE: dict[int, type[Format]] = {}

HALF_MAX = 65504.0  # largest float16
_LOW = np.uint8(15)  # the low nibble of a byte
_PIECE = 1 << 16  # weights worked on at a time, so that temporaries stay in the cache

# Root mean square, over blocks of unit Gaussian weights, of the largest magnitude and of max − min.
_PEAK_16, _PEAK_32, _RANGE_32 = 2.13, 2.39, 4.20


def _tolerance(span: float, steps: int) -> float:
    """1.5 × the relative RMS error of a Gaussian tensor whose blocks span `span` deviations in `steps` steps.

    Rounding to a step s is off by s / √12 (RMS). The factor is room for rounded scales and for heavier tails:
    a Laplacian tensor is off by 1.25 × as much as a Gaussian one. Data of another tensor is off by √2.
    """
    return 1.5 * span / steps / math.sqrt(12)


class Format:
    """A block format. `layout` describes one block: fields of codes start with "q", all others are scales.

    `largest` is the largest magnitude that is sure to fit. `tolerance` is the largest believable relative RMS
    error, ‖x − dequantized‖ / ‖x‖, of a correctly quantized tensor of roughly Gaussian weights: `_tolerance`
    derives it for blocks; for floats it is the exact bound, half a unit in the last place.
    """

    name: ClassVar[str]
    gguf_type: ClassVar[int]
    block: ClassVar[int]  # weights in a block
    block_bytes: ClassVar[int]
    layout: ClassVar[np.dtype[Any]]
    largest: ClassVar[float]
    tolerance: ClassVar[float]

    def __init_subclass__(cls) -> None:
        cls.block_bytes = cls.layout.itemsize
        FORMATS[cls.name] = FORMAT_OF_TYPE[cls.gguf_type] = cls

    @classmethod
    def row_bytes(cls, n: int) -> int:
        """Bytes of a row of n weights. Raises ValueError if n is not a whole number of blocks."""
        if n % cls.block:
            raise ValueError(f"{cls.name}: a row of {n} weights is not a multiple of the block of {cls.block}")
        return n // cls.block * cls.block_bytes

    @classmethod
    def quantize(cls, rows: F32Array) -> Bytes:
        """float32 (..., n) → uint8 (..., row_bytes(n)).

        Raises ValueError for rows that are not whole blocks and for weights that are not finite or too large;
        TypeError for anything but float32.
        """
        if rows.dtype != np.float32:
            raise TypeError(f"{cls.name}: quantize takes float32 rows, not {rows.dtype}")
        shape = (*rows.shape[:-1], cls.row_bytes(rows.shape[-1]))
        peak = np.maximum(rows.max(initial=0), -rows.min(initial=0))  # NaN if there is one
        if not np.isfinite(peak):
            raise ValueError(f"{cls.name}: found a weight of {peak}: only finite weights can be quantized")
        if peak > cls.largest:
            raise ValueError(
                f"{cls.name}: the largest weight is {peak:.9g}, the format holds at most {cls.largest:.9g}; "
                "keep this tensor in f32"
            )
        x = rows.reshape(-1, cls.block)
        out = np.empty(len(x), cls.layout)
        step = _PIECE // cls.block
        for i in range(0, len(x), step):
            cls._encode(x[i : i + step], out[i : i + step])
        return out.view(np.uint8).reshape(shape)

    @classmethod
    def dequantize(cls, data: Bytes) -> F32Array:
        """uint8 (..., bytes) → float32 (..., n). Any bytes will do; a scale that is not finite spreads.

        Raises ValueError for rows that are not whole blocks, TypeError for anything but uint8.
        """
        if data.dtype != np.uint8:
            raise TypeError(f"{cls.name}: dequantize takes uint8 rows, not {data.dtype}")
        if data.shape[-1] % cls.block_bytes:
            raise ValueError(
                f"{cls.name}: a row of {data.shape[-1]} bytes is not whole blocks of {cls.block_bytes} bytes"
            )
        blocks = np.ascontiguousarray(data).reshape(-1).view(cls.layout)
        out = np.empty((len(blocks), cls.block), np.float32)
        step = _PIECE // cls.block
        with np.errstate(all="ignore"):
            for i in range(0, len(blocks), step):
                cls._decode(blocks[i : i + step], out[i : i + step])
        return out.reshape(*data.shape[:-1], data.shape[-1] // cls.block_bytes * cls.block)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        """Quantize finite x (blocks, cls.block) into out (blocks,)."""
        raise NotImplementedError

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        """Dequantize blocks (blocks,) into out (blocks, cls.block)."""
        raise NotImplementedError


class F32(Format):
    name, gguf_type, block = "f32", 0, 1
    layout: ClassVar[np.dtype[Any]] = np.dtype("<f4")
    largest = float(np.finfo(np.float32).max)
    tolerance = 0.0

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out[:] = x[:, 0]

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        out[:, 0] = blocks


class F16(F32):
    name, gguf_type = "f16", 1
    layout = np.dtype("<f2")
    largest = HALF_MAX
    tolerance = 2.0**-11


class BF16(Format):
    """The upper half of a float32, rounded to nearest even."""

    name, gguf_type, block = "bf16", 30, 1
    layout = np.dtype("<u2")
    largest = float(np.uint32(0x7F7F0000).view(np.float32))
    tolerance = 2.0**-8

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        bits = x[:, 0].view(np.uint32)
        out[:] = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16  # weights are finite: no carry leaves the word

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.left_shift(blocks, 16, out=out[:, 0].view(np.uint32), dtype=np.uint32)


class Q8_0(Format):
    """w = d·q, q in −127 … 127."""

    name, gguf_type, block = "q8_0", 8, 32
    layout = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
    largest = HALF_MAX * 127
    tolerance = _tolerance(_PEAK_32, 127)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        d = np.abs(x).max(axis=1) / np.float32(127)
        q = x * _inverse(d)[:, None]
        # Halves go away from zero. The float just below ½ rounds them up all the same, and .49999997 down.
        q += np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), q)
        out["d"], out["qs"] = d, q

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.multiply(blocks["qs"], _column(blocks["d"]), out=out)


class Q4_0(Format):
    """w = d·(q − 8). The weight of largest magnitude, of either sign, becomes −8."""

    name, gguf_type, block = "q4_0", 2, 32
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    largest = HALF_MAX * 8
    tolerance = _tolerance(_PEAK_32, 8)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"], q = _round_symmetric(x, 8)
        out["qs"] = _pack_nibbles(q.reshape(-1, 2, 16))

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = _unpack_nibbles(blocks["qs"]).reshape(-1, 32).view(np.int8)
        np.multiply(q - np.int8(8), _column(blocks["d"]), out=out)


class Q5_0(Format):
    """w = d·(q − 16), as Q4_0; bit i of qh is the fifth bit of weight i."""

    name, gguf_type, block = "q5_0", 6, 32
    layout = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    largest = HALF_MAX * 16
    tolerance = _tolerance(_PEAK_32, 16)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"], q = _round_symmetric(x, 16)
        out["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")
        out["qs"] = _pack_nibbles((q & _LOW).reshape(-1, 2, 16))

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = _unpack_nibbles(blocks["qs"]).reshape(-1, 32)
        q |= np.unpackbits(blocks["qh"], axis=1, bitorder="little") << 4
        np.multiply(q.view(np.int8) - np.int8(16), _column(blocks["d"]), out=out)


class Q4_1(Format):
    """w = d·q + m."""

    name, gguf_type, block = "q4_1", 3, 32
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
    largest = HALF_MAX
    tolerance = _tolerance(_RANGE_32, 15)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        low = x.min(axis=1)
        d = (x.max(axis=1) - low) / np.float32(15)
        q = (x - low[:, None]) * _inverse(d)[:, None]
        q += np.float32(0.5)
        out["d"], out["m"] = d, low
        out["qs"] = _pack_nibbles(q.astype(np.uint8).reshape(-1, 2, 16))

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = _unpack_nibbles(blocks["qs"]).reshape(-1, 32)
        np.multiply(q, _column(blocks["d"]), out=out)
        out += _column(blocks["m"])


class Q4_K(Format):
    """w = d·scale·q − dmin·min: 8 sub-blocks of 32, with 6-bit scales and minima."""

    name, gguf_type, block = "q4_k", 12, 256
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32))])
    largest = HALF_MAX * 62
    tolerance = _tolerance(_RANGE_32, 15)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        q = _round_affine_k(x, 15, out)
        out["qs"] = _pack_nibbles(q.reshape(-1, 4, 2, 32))

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        _decode_affine_k(_unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32), blocks, out)


class Q5_K(Format):
    """As Q4_K; bit i of the bytes of qh is the fifth bit of sub-block i."""

    name, gguf_type, block = "q5_k", 13, 256
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32))])
    largest = HALF_MAX * 62
    tolerance = _tolerance(_RANGE_32, 31)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        q = _round_affine_k(x, 31, out)
        out["qh"] = np.bitwise_or.reduce(q >> 4 << _shifts(8, 1), axis=1)
        out["qs"] = _pack_nibbles((q & _LOW).reshape(-1, 4, 2, 32))

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = _unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32)
        q |= (blocks["qh"][:, None] >> _shifts(8, 1) & 1) << 4
        _decode_affine_k(q, blocks, out)


class Q6_K(Format):
    """w = d·scale·(q − 32): 16 sub-blocks of 16, with 8-bit signed scales.

    Each half of a block keeps the low four bits of its 128 weights in 64 bytes, the high two bits in 32.
    """

    name, gguf_type, block = "q6_k", 14, 256
    layout = np.dtype([("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])
    largest = HALF_MAX * 128 * 32
    tolerance = _tolerance(_PEAK_16, 32)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        x = x.reshape(-1, 16, 16)
        step = _signed_peak(x) / np.float32(-32)
        d = _half_up(_signed_peak(step) / np.float32(-128))
        scales = np.rint(step * _inverse(d)[:, None]).clip(-128, 127)
        out["d"], out["scales"] = d, scales

        q = x * _inverse(d[:, None] * scales)[..., None]
        np.rint(q, out=q).clip(-32, 31, out=q)
        codes = (q + np.float32(32)).astype(np.uint8).reshape(-1, 2, 4, 32)
        out["ql"] = _pack_nibbles((codes & _LOW).reshape(-1, 2, 2, 64))
        out["qh"] = np.bitwise_or.reduce(codes >> 4 << _shifts(4, 2), axis=2)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = _unpack_nibbles(blocks["ql"]).reshape(-1, 2, 4, 32)
        q |= (blocks["qh"][:, :, None] >> _shifts(4, 2) & 3) << 4
        step = _column(blocks["d"]) * blocks["scales"]
        codes = q.view(np.int8).reshape(-1, 16, 16) - np.int8(32)
        np.multiply(codes, step[..., None], out=out.reshape(-1, 16, 16))


def _column(half: Blocks) -> F32Array:
    return half.astype(np.float32)[:, None]


def _inverse(d: F32Array) -> F32Array:
    """1 / d, and 0 where that is infinite: a block whose scale vanishes gets codes of zero."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: F32Array = np.float32(1) / d
    inverse[np.isinf(inverse)] = 0
    return inverse


def _half_up(d: F32Array) -> F32Array:
    """d rounded away from zero to a float16, as float32.

    A super-scale of ordinary weights is small enough to be a subnormal float16 of few bits. Rounded down, its
    sub-scales would overflow their integers.
    """
    half = d.astype(np.float16)
    bits = half.view(np.uint16)
    bits += np.abs(half) < np.abs(d)  # the next float16 away from zero, whatever the sign
    return half.astype(np.float32)


def _signed_peak(x: F32Array) -> F32Array:
    """Of the last axis, the value of largest magnitude, the first of equals."""
    high, low = x.max(axis=-1), x.min(axis=-1)
    peak: F32Array = np.where(high > -low, high, low)
    tied = high == -low
    rows = x[tied]
    first = np.abs(rows).argmax(axis=-1)[:, None]
    peak[tied] = np.take_along_axis(rows, first, axis=-1)[:, 0]
    return peak


def _round_symmetric(x: F32Array, steps: int) -> tuple[F32Array, Bytes]:
    """Scales (blocks,) and codes 0 … 2·steps − 1 of x (blocks, 32), where the code `steps` is zero."""
    d = _signed_peak(x) / np.float32(-steps)
    q = x * _inverse(d)[:, None]
    q += np.float32(steps + 0.5)
    return d, np.minimum(q.astype(np.uint8), np.uint8(2 * steps - 1))


def _round_affine_k(x: F32Array, steps: int, out: Blocks) -> Bytes:
    """Codes 0 … steps (blocks, 8, 32) of x (blocks, 256); the scales and minima go to `out`.

    Codes are rounded with the scales as stored, after their own rounding to six bits.
    """
    x = x.reshape(-1, 8, 32)
    below = np.abs(np.minimum(x.min(axis=-1), np.float32(0)))
    step = (x.max(axis=-1) + below) / np.float32(steps)
    d, dmin = _half_up(step.max(axis=1) / np.float32(63)), _half_up(below.max(axis=1) / np.float32(63))
    scales = np.rint(step * _inverse(d)[:, None])
    minima = np.rint(below * _inverse(dmin)[:, None])
    out["d"], out["dmin"] = d, dmin
    out["scales"] = _pack_scales(scales.astype(np.uint8), minima.astype(np.uint8))

    q: F32Array = x + (dmin[:, None] * minima)[..., None]
    q *= _inverse(d[:, None] * scales)[..., None]
    np.rint(q, out=q).clip(0, steps, out=q)
    return q.astype(np.uint8)


def _decode_affine_k(q: Bytes, blocks: Blocks, out: F32Array) -> None:
    scales, minima = _unpack_scales(blocks["scales"])
    out = out.reshape(-1, 8, 32)
    np.multiply(q, (_column(blocks["d"]) * scales)[..., None], out=out)
    out -= (_column(blocks["dmin"]) * minima)[..., None]


def _pack_scales(scales: Bytes, minima: Bytes) -> Bytes:
    """Twice eight 6-bit integers in 12 bytes: the last four of each keep their top bits above the first."""
    heads = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (scales, minima)]
    return np.concatenate([*heads, scales[:, 4:] & _LOW | minima[:, 4:] << 4], axis=1)


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate([scales & 63, rest & _LOW | scales >> 6 << 4], axis=1),
        np.concatenate([minima & 63, rest >> 4 | minima >> 6 << 4], axis=1),
    )


def _pack_nibbles(q: Bytes) -> Bytes:
    """Codes below 16 (..., 2, k) → (..., k), the first of the two in the low nibble."""
    return q[..., 0, :] | q[..., 1, :] << np.uint8(4)


def _unpack_nibbles(packed: Bytes) -> Bytes:
    """(..., k) → (..., 2, k)."""
    return np.stack([packed & _LOW, packed >> np.uint8(4)], axis=-2)


def _shifts(count: int, bits: int) -> Bytes:
    """(count, 1): 0, bits, 2·bits …"""
    return np.arange(0, count * bits, bits, dtype=np.uint8)[:, None]
