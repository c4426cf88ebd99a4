"""The formats whose sixteen values lie closer together around zero, as weights do."""

# ruff: noqa: N801 - the classes carry the names that the field gives to these formats

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .base import (
    HALF_MAX,
    LOW,
    NO_OFFSET,
    PEAK_32,
    Blocks,
    Bytes,
    F32Array,
    Format,
    column,
    half_up,
    inverse,
    pack_nibbles,
    search_one_scale,
    signed_peak,
    unpack_nibbles,
)
from .search import search_two_levels

# Part of the file format; `kvalues` in the gguf package.
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
# Half-way points between neighbours are multiples of ½, so the code of v is that of the half unit in which v lies.
_CODES = np.searchsorted((VALUES[:-1] + VALUES[1:].astype(np.float32)) / 2, np.arange(-256, 256) / 2, side="right")
_CODE_OF_HALF = _CODES.astype(np.uint8)
_VALUE_OF_HALF = VALUES[_CODES].astype(np.float32)
_TRIALS = (-127.0, -120.0, -113.0, -134.0, -106.0, 113.0, 106.0, 120.0)  # what the largest weight may become
# An even step that would round a Gaussian, whose largest of 32 is at −127, as well as these values do.
_GAP = 15.1
_HIGH = np.arange(0, 16, 2, dtype=np.uint16)  # where a scale's high bits lie


class IQ4_NL(Format):
    """w = d·value(q). The weight of largest magnitude, of either sign, becomes −127."""

    name, gguf_type, file_type, block = "iq4_nl", 20, 25, 32
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    codebook = VALUES.astype(np.float32)
    largest = HALF_MAX * 127
    span, divisions = PEAK_32, 127 / _GAP

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return column(blocks["d"]), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes.reshape(-1, 2, 16))

    @classmethod
    def round(cls, values: F32Array) -> Bytes:
        return round_to_values(values)

    @classmethod
    def snap(cls, values: F32Array) -> F32Array:
        return snap_to_values(values)

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        yield search_one_scale(cls, x, w, _TRIALS)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        out["d"] = signed_peak(x) / np.float32(-127)
        cls.put_codes(cls.nearest(x, out), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        values = VALUES[unpack_nibbles(blocks["qs"]).reshape(-1, 32)]
        np.multiply(values, column(blocks["d"]), out=out)


class IQ4_XS(Format):
    """w = d·scale·value(q): 8 sub-blocks of 32, with scales of −32 … 31.

    A scale is kept plus 32: its low four bits in scales_l, two to a byte, its high two bits in scales_h.
    """

    name, gguf_type, file_type, block, fallback = "iq4_xs", 23, 30, 256, IQ4_NL
    layout = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", (8, 16))])
    codebook = VALUES.astype(np.float32)
    largest = HALF_MAX * 127 * 32
    span, divisions = PEAK_32, 127 / _GAP

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return np.repeat(column(blocks["d"]) * _unpack_scales(blocks), 32, axis=1), NO_OFFSET

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes.reshape(-1, 8, 2, 16))

    @classmethod
    def round(cls, values: F32Array) -> Bytes:
        return round_to_values(values)

    @classmethod
    def snap(cls, values: F32Array) -> F32Array:
        return snap_to_values(values)

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        for d, scales in search_two_levels(x.reshape(-1, 8, 32), w.reshape(-1, 8, 32), cls.snap, _TRIALS, (-32, 31)):
            out = np.zeros(len(x), cls.layout)
            out["d"] = d
            _pack_scales(scales, out)
            yield out

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        step = signed_peak(x.reshape(-1, 8, 32)) / np.float32(-127)
        d = half_up(signed_peak(step) / np.float32(-32))
        out["d"] = d
        _pack_scales(np.rint(step * inverse(d)[:, None]).clip(-32, 31), out)
        cls.put_codes(cls.nearest(x, out), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        values = VALUES[unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32)]
        step = column(blocks["d"]) * _unpack_scales(blocks)
        np.multiply(values, step[..., None], out=out.reshape(-1, 8, 32))


def round_to_values(values: F32Array) -> Bytes:
    return _CODE_OF_HALF[_halves(values)]


def snap_to_values(values: F32Array) -> F32Array:
    return _VALUE_OF_HALF[_halves(values)]


def _halves(values: F32Array) -> NDArray[np.int16]:
    """Index of the half unit that a value lies in."""
    halves: NDArray[np.int16] = np.floor(values * np.float32(2)).clip(-256, 255).astype(np.int16)
    halves += 256
    return halves


def _pack_scales(scales: F32Array, out: Blocks) -> None:
    """Integers −32 … 31 (blocks, 8) into blocks."""
    stored = (scales + np.float32(32)).astype(np.uint16)
    out["scales_l"] = stored[:, ::2] & 15 | stored[:, 1::2] << 4 & 240
    out["scales_h"] = np.bitwise_or.reduce(stored >> 4 << _HIGH, axis=-1)


def _unpack_scales(blocks: Blocks) -> F32Array:
    low = np.stack([blocks["scales_l"] & LOW, blocks["scales_l"] >> 4], axis=-1).reshape(-1, 8)
    high = blocks["scales_h"][:, None] >> _HIGH & 3
    scales: F32Array = (low | high << 4).astype(np.float32) - np.float32(32)
    return scales
