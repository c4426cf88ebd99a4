"""The K formats: super-blocks of 256 weights whose sub-blocks have integer scales."""

# ruff: noqa: N801 - the classes carry the names that the field gives to these formats

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from .affine_k import AffineK
from .base import (
    HALF_MAX,
    LOW,
    NO_OFFSET,
    PEAK_16,
    RANGE_16,
    RANGE_32,
    Blocks,
    Bytes,
    F32Array,
    Format,
    column,
    half_up,
    integers,
    inverse,
    pack_nibbles,
    shifts,
    signed_peak,
    unpack_nibbles,
)
from .basic import Q4_0, Q5_0, Q5_1, Q8_0
from .search import AFFINE_TRIALS_15, AFFINE_TRIALS_31, search_two_levels

_TRIALS_Q2 = (3.0, 3.3, 3.6, 4.0, 4.5, 2.7, 2.4, 2.1)
_TRIALS_Q3 = (-4.0, -3.6, -3.2, -4.5, -5.0, 3.0, 3.4, 2.7)
_TRIALS_Q6 = (-32.0, -31.5, -31.0, 31.0, 30.5)


def _pack_six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Twice eight 6-bit integers in 12 bytes: the last four of each keep their top bits above the first."""
    heads = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (scales, minima)]
    return np.concatenate([*heads, scales[:, 4:] & LOW | minima[:, 4:] << 4], axis=1)


def _unpack_six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate([scales & 63, rest & LOW | scales >> 6 << 4], axis=1),
        np.concatenate([minima & 63, rest >> 4 | minima >> 6 << 4], axis=1),
    )


def _pack_pairs(codes: Bytes) -> Bytes:
    """Codes below 4 (b, 256) → (b, 2, 32)."""
    packed: Bytes = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << shifts(4, 2), axis=2)
    return packed


def _unpack_pairs(packed: Bytes) -> Bytes:
    return (packed[:, :, None] >> shifts(4, 2) & np.uint8(3)).reshape(-1, 256)


def _pack_nibble_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    return scales | minima << np.uint8(4)


def _unpack_nibble_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    return packed & LOW, packed >> np.uint8(4)


class _WithMinima(Format):
    """What the formats with minima have in common. `parts` says how their blocks are cut, `codes` unpacks (b, 256)."""

    parts: ClassVar[AffineK]

    @classmethod
    def codes(cls, blocks: Blocks) -> Bytes:
        raise NotImplementedError

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return cls.parts.steps(blocks)

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        return cls.parts.search(x, w, cls.layout)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        cls.put_codes(cls.parts.encode(x, out), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        cls.parts.decode(cls.codes(blocks), blocks, out)


class Q2_K(_WithMinima):
    """w = d·scale·q − dmin·min: 16 sub-blocks of 16, with 4-bit scales and minima, which share a byte.

    Each half of a block keeps its 128 weights in 32 bytes, those that lie 32 apart in the same byte.
    """

    name, gguf_type, file_type, block, fallback = "q2_k", 10, 10, 256, Q4_0
    layout = np.dtype([("scales", "u1", 16), ("qs", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")])
    largest = HALF_MAX * 14
    codebook = integers(0, 3)
    span, divisions = RANGE_16, 3
    parts = AffineK(16, 3, 15, _TRIALS_Q2, _pack_nibble_pairs, _unpack_nibble_pairs)

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = _pack_pairs(codes)

    @classmethod
    def codes(cls, blocks: Blocks) -> Bytes:
        return _unpack_pairs(blocks["qs"])


class Q3_K(Format):
    """w = d·scale·(q − 4): 16 sub-blocks of 16, with scales of −32 … 31, which are kept plus 32.

    The low two bits of codes lie as those of Q2_K; bit i of the bytes of qh is the third of weights 32 i … 32 i + 31.
    The low four bits of scales j and j + 8 share byte j, the high two of every fourth byte 8 + j % 4.
    """

    name, gguf_type, file_type, block, fallback = "q3_k", 11, 11, 256, Q4_0
    layout = np.dtype([("qh", "u1", 32), ("qs", "u1", (2, 32)), ("scales", "u1", 12), ("d", "<f2")])
    codebook = integers(-4, 3)
    largest = HALF_MAX * 32 * 4
    span, divisions = PEAK_16, 4

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return np.repeat(cls._scales(blocks), 16, axis=1), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qh"] = np.bitwise_or.reduce(codes.reshape(-1, 8, 32) >> 2 << shifts(8, 1), axis=1)
        out["qs"] = _pack_pairs(codes & np.uint8(3))

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        x, w = x.reshape(-1, 16, 16), w.reshape(-1, 16, 16)
        for d, scales in search_two_levels(x, w, cls.snap, _TRIALS_Q3, (-32, 31)):
            out = np.zeros(len(x), cls.layout)
            cls._put_scales(d, scales, out)
            yield out

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        step = signed_peak(x.reshape(-1, 16, 16)) / np.float32(-4)
        d = half_up(signed_peak(step) / np.float32(-32))
        cls._put_scales(d, np.rint(step * inverse(d)[:, None]).clip(-32, 31), out)
        cls.put_codes(cls.nearest(x, out), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = _unpack_pairs(blocks["qs"]).reshape(-1, 8, 32)
        q |= (blocks["qh"][:, None] >> shifts(8, 1) & 1) << 2
        codes = q.view(np.int8).reshape(-1, 16, 16) - np.int8(4)
        np.multiply(codes, cls._scales(blocks)[..., None], out=out.reshape(-1, 16, 16))

    @staticmethod
    def _put_scales(d: F32Array, scales: F32Array, out: Blocks) -> None:
        stored = (scales + np.float32(32)).astype(np.uint8)
        high = np.bitwise_or.reduce(stored.reshape(-1, 4, 4) >> 4 << shifts(4, 2), axis=1)
        out["d"] = d
        out["scales"] = np.concatenate([pack_nibbles((stored & LOW).reshape(-1, 2, 8)), high], axis=1)

    @staticmethod
    def _scales(blocks: Blocks) -> F32Array:
        low, high = blocks["scales"][:, :8], blocks["scales"][:, None, 8:] >> shifts(4, 2) & 3
        stored = unpack_nibbles(low).reshape(-1, 16) | high.reshape(-1, 16) << 4
        return column(blocks["d"]) * (stored.astype(np.float32) - np.float32(32))


class Q4_K(_WithMinima):
    """w = d·scale·q − dmin·min: 8 sub-blocks of 32, with 6-bit scales and minima."""

    name, gguf_type, file_type, block, fallback = "q4_k", 12, 14, 256, Q5_0
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32))])
    largest = HALF_MAX * 62
    codebook = integers(0, 15)
    span, divisions = RANGE_32, 15
    parts = AffineK(32, 15, 63, AFFINE_TRIALS_15, _pack_six_bits, _unpack_six_bits)

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes.reshape(-1, 4, 2, 32))

    @classmethod
    def codes(cls, blocks: Blocks) -> Bytes:
        return unpack_nibbles(blocks["qs"]).reshape(-1, 256)


class Q5_K(_WithMinima):
    """As Q4_K; bit i of the bytes of qh is the fifth bit of sub-block i."""

    name, gguf_type, file_type, block, fallback = "q5_k", 13, 16, 256, Q5_1
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32))])
    largest = HALF_MAX * 62
    codebook = integers(0, 31)
    span, divisions = RANGE_32, 31
    parts = AffineK(32, 31, 63, AFFINE_TRIALS_31, _pack_six_bits, _unpack_six_bits)

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qh"] = np.bitwise_or.reduce(codes.reshape(-1, 8, 32) >> 4 << shifts(8, 1), axis=1)
        out["qs"] = pack_nibbles((codes & LOW).reshape(-1, 4, 2, 32))

    @classmethod
    def codes(cls, blocks: Blocks) -> Bytes:
        q = unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32)
        q |= (blocks["qh"][:, None] >> shifts(8, 1) & 1) << 4
        return q.reshape(-1, 256)


class Q6_K(Format):
    """w = d·scale·(q − 32): 16 sub-blocks of 16, with 8-bit signed scales.

    Each half of a block keeps the low four bits of its 128 weights in 64 bytes, the high two bits in 32.
    """

    name, gguf_type, file_type, block, fallback = "q6_k", 14, 18, 256, Q8_0
    layout = np.dtype([("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])
    codebook = integers(-32, 31)
    largest = HALF_MAX * 128 * 32
    span, divisions = PEAK_16, 32

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return np.repeat(column(blocks["d"]) * blocks["scales"], 16, axis=1), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["ql"] = pack_nibbles((codes & LOW).reshape(-1, 2, 2, 64))
        out["qh"] = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) >> 4 << shifts(4, 2), axis=2)

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        x, w = x.reshape(-1, 16, 16), w.reshape(-1, 16, 16)
        for d, scales in search_two_levels(x, w, cls.snap, _TRIALS_Q6, (-128, 127)):
            out = np.zeros(len(x), cls.layout)
            out["d"], out["scales"] = d, scales
            yield out

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        x = x.reshape(-1, 16, 16)
        step = signed_peak(x) / np.float32(-32)
        d = half_up(signed_peak(step) / np.float32(-128))
        scales = np.rint(step * inverse(d)[:, None]).clip(-128, 127)
        out["d"], out["scales"] = d, scales

        q = x * inverse(d[:, None] * scales)[..., None]
        np.rint(q, out=q).clip(-32, 31, out=q)
        cls.put_codes((q + np.float32(32)).astype(np.uint8).reshape(-1, 256), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = unpack_nibbles(blocks["ql"]).reshape(-1, 2, 4, 32)
        q |= (blocks["qh"][:, :, None] >> shifts(4, 2) & 3) << 4
        step = column(blocks["d"]) * blocks["scales"]
        codes = q.view(np.int8).reshape(-1, 16, 16) - np.int8(32)
        np.multiply(codes, step[..., None], out=out.reshape(-1, 16, 16))
