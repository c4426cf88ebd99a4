"""Floats, and the formats whose blocks of 32 weights have scales of their own."""

# ruff: noqa: N801 - the classes carry the names that the field gives to these formats

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from .base import (
    HALF_MAX,
    LOW,
    NO_OFFSET,
    PEAK_32,
    RANGE_32,
    Blocks,
    Bytes,
    F32Array,
    Format,
    bf16_bits,
    column,
    integers,
    inverse,
    pack_nibbles,
    search_one_scale,
    signed_peak,
    unpack_nibbles,
)
from .lattice import to_lattice
from .search import AFFINE_TRIALS_15, AFFINE_TRIALS_31, normalized, search_affine

_TRIALS_Q8 = (-127.0, -126.5, 126.5, 126.0, -125.5)
_TRIALS_Q4 = (-8.0, -8.4, -8.8, -7.6, -7.2, -6.8, 6.6, 7.0, 7.4, 7.8)
_TRIALS_Q5 = (-16.0, -16.5, -17.0, -15.5, -15.0, -14.5, -14.0, -13.2, 15.0, 15.5, 14.5, 14.0, 13.3)


class F32(Format):
    name, gguf_type, file_type, block = "f32", 0, 0, 1
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
    name, gguf_type, file_type = "f16", 1, 1
    layout = np.dtype("<f2")
    largest = HALF_MAX
    tolerance = 2.0**-11


class BF16(Format):
    """The upper half of a float32, rounded to nearest even."""

    name, gguf_type, file_type, block = "bf16", 30, 32, 1
    layout = np.dtype("<u2")
    largest = float(np.uint32(0x7F7F0000).view(np.float32))
    tolerance = 2.0**-8

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out[:] = bf16_bits(x[:, 0])

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.left_shift(blocks, 16, out=out[:, 0].view(np.uint32), dtype=np.uint32)


class Q8_0(Format):
    """w = d·q, q in −127 … 127."""

    name, gguf_type, file_type, block = "q8_0", 8, 7, 32
    layout = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
    codebook = integers(-127, 127)
    largest = HALF_MAX * 127
    span, divisions = PEAK_32, 127

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return column(blocks["d"]), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = codes.astype(np.int16) - 127

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        yield search_one_scale(cls, x, w, _TRIALS_Q8)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        d = np.abs(x).max(axis=1) / np.float32(127)
        q = x * inverse(d)[:, None]
        # Halves go away from zero. The float just below ½ rounds them up all the same, and .49999997 down.
        q += np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), q)
        out["d"], out["qs"] = d, q

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.multiply(blocks["qs"], column(blocks["d"]), out=out)


class Q4_0(Format):
    """w = d·(q − 8). The weight of largest magnitude, of either sign, becomes −8."""

    name, gguf_type, file_type, block = "q4_0", 2, 2, 32
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    codebook = integers(-8, 7)
    largest = HALF_MAX * 8
    span, divisions = PEAK_32, 8

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return column(blocks["d"]), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes.reshape(-1, 2, 16))

    @classmethod
    def fit(cls, x: F32Array, weights: F32Array | None) -> Blocks:
        """As `Format.fit`; weights that training put on a lattice of such blocks come back exactly."""
        blocks = super().fit(x, weights)
        if weights is not None:
            to_lattice(cls, x, blocks)
        return blocks

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        yield search_one_scale(cls, x, w, _TRIALS_Q4)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"], codes = _round_symmetric(x, 8)
        cls.put_codes(codes, out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = unpack_nibbles(blocks["qs"]).reshape(-1, 32).view(np.int8)
        np.multiply(q - np.int8(8), column(blocks["d"]), out=out)


class Q5_0(Format):
    """w = d·(q − 16), as Q4_0; bit i of qh is the fifth bit of weight i."""

    name, gguf_type, file_type, block = "q5_0", 6, 8, 32
    layout = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    codebook = integers(-16, 15)
    largest = HALF_MAX * 16
    span, divisions = PEAK_32, 16

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return column(blocks["d"]), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        _put_five_bits(codes, out)

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        yield search_one_scale(cls, x, w, _TRIALS_Q5)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"], codes = _round_symmetric(x, 16)
        cls.put_codes(codes, out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.multiply(_five_bits(blocks).view(np.int8) - np.int8(16), column(blocks["d"]), out=out)


class Q4_1(Format):
    """w = d·q + m."""

    name, gguf_type, file_type, block = "q4_1", 3, 3, 32
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
    codebook = integers(0, 15)
    largest = HALF_MAX
    span, divisions = RANGE_32, 15

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return column(blocks["d"]), column(blocks["m"])

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes.reshape(-1, 2, 16))

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        yield _search_affine(x, w, AFFINE_TRIALS_15, cls.layout)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"], out["m"], codes = _round_affine(x, 15)
        cls.put_codes(codes, out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.multiply(unpack_nibbles(blocks["qs"]).reshape(-1, 32), column(blocks["d"]), out=out)
        out += column(blocks["m"])


class Q5_1(Format):
    """w = d·q + m, as Q4_1, with the fifth bits of Q5_0."""

    name, gguf_type, file_type, block = "q5_1", 7, 9, 32
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    codebook = integers(0, 31)
    largest = HALF_MAX
    span, divisions = RANGE_32, 31

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return column(blocks["d"]), column(blocks["m"])

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        _put_five_bits(codes, out)

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        yield _search_affine(x, w, AFFINE_TRIALS_31, cls.layout)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"], out["m"], codes = _round_affine(x, 31)
        cls.put_codes(codes, out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        np.multiply(_five_bits(blocks), column(blocks["d"]), out=out)
        out += column(blocks["m"])


def _round_symmetric(x: F32Array, steps: int) -> tuple[F32Array, Bytes]:
    """Scales (blocks,) and codes 0 … 2·steps − 1 of x (blocks, 32), where the code `steps` is zero."""
    d = signed_peak(x) / np.float32(-steps)
    q = x * inverse(d)[:, None]
    q += np.float32(steps + 0.5)
    return d, np.minimum(q.astype(np.uint8), np.uint8(2 * steps - 1))


def _round_affine(x: F32Array, top: int) -> tuple[F32Array, F32Array, Bytes]:
    """Scales and minima (blocks,) and codes 0 … top of x (blocks, 32)."""
    low = x.min(axis=1)
    d = (x.max(axis=1) - low) / np.float32(top)
    q = (x - low[:, None]) * inverse(d)[:, None]
    q += np.float32(0.5)
    return d, low, q.astype(np.uint8)


def _search_affine(x: F32Array, w: F32Array, trials: Sequence[float], layout: np.dtype[Any]) -> Blocks:
    """Blocks of scales "d" and minima "m", for x (b, 32) of importance w; the first trial is the largest code."""
    unit, peak = normalized(x)
    scale, offset = search_affine(unit, w, int(trials[0]), trials, signed=True)
    out = np.zeros(len(x), layout)
    out["d"], out["m"] = scale * peak[:, 0], offset * peak[:, 0]
    return out


def _put_five_bits(codes: Bytes, out: Blocks) -> None:
    out["qh"] = np.packbits(codes >> 4, axis=1, bitorder="little")
    out["qs"] = pack_nibbles((codes & LOW).reshape(-1, 2, 16))


def _five_bits(blocks: Blocks) -> Bytes:
    """Codes (blocks, 32)."""
    q = unpack_nibbles(blocks["qs"]).reshape(-1, 32)
    q |= np.unpackbits(blocks["qh"], axis=1, bitorder="little") << 4
    return q
