"""The K formats: super-blocks of 256 weights whose sub-blocks have integer scales."""

# ruff: noqa: N801 - the classes carry the names that the field gives to these formats

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .base import (
    HALF_MAX,
    LOW,
    NO_OFFSET,
    PEAK_16,
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
from .basic import Q5_0, Q5_1, Q8_0
from .search import AFFINE_TRIALS_15, AFFINE_TRIALS_31, AffineSums, normalized, ratio, search_affine, search_two_levels

_TRIALS_Q6 = (-32.0, -31.5, -31.0, 31.0, 30.5)
_TURNS = 2  # of integers and super-scales after codes


class Q4_K(Format):
    """w = d·scale·q − dmin·min: 8 sub-blocks of 32, with 6-bit scales and minima."""

    name, gguf_type, file_type, block, fallback = "q4_k", 12, 14, 256, Q5_0
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32))])
    largest = HALF_MAX * 62
    codebook = integers(0, 15)
    span, divisions = RANGE_32, 15

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return _affine_steps(blocks)

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes.reshape(-1, 4, 2, 32))

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        return _search_affine_k(x, w, 15, AFFINE_TRIALS_15, cls.layout)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        cls.put_codes(_round_affine_k(x, 15, out), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        _decode_affine_k(unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32), blocks, out)


class Q5_K(Format):
    """As Q4_K; bit i of the bytes of qh is the fifth bit of sub-block i."""

    name, gguf_type, file_type, block, fallback = "q5_k", 13, 16, 256, Q5_1
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32))])
    largest = HALF_MAX * 62
    codebook = integers(0, 31)
    span, divisions = RANGE_32, 31

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        return _affine_steps(blocks)

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        out["qh"] = np.bitwise_or.reduce(codes.reshape(-1, 8, 32) >> 4 << shifts(8, 1), axis=1)
        out["qs"] = pack_nibbles((codes & LOW).reshape(-1, 4, 2, 32))

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        return _search_affine_k(x, w, 31, AFFINE_TRIALS_31, cls.layout)

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        cls.put_codes(_round_affine_k(x, 31, out), out)

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        q = unpack_nibbles(blocks["qs"]).reshape(-1, 8, 32)
        q |= (blocks["qh"][:, None] >> shifts(8, 1) & 1) << 4
        _decode_affine_k(q, blocks, out)


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


def _round_affine_k(x: F32Array, steps: int, out: Blocks) -> Bytes:
    """Codes 0 … steps (blocks, 256) of x (blocks, 256); the scales and minima go to `out`.

    Codes are rounded with the scales as stored, after their own rounding to six bits.
    """
    x = x.reshape(-1, 8, 32)
    below = np.abs(np.minimum(x.min(axis=-1), np.float32(0)))
    step = (x.max(axis=-1) + below) / np.float32(steps)
    d, dmin = half_up(step.max(axis=1) / np.float32(63)), half_up(below.max(axis=1) / np.float32(63))
    scales = np.rint(step * inverse(d)[:, None])
    minima = np.rint(below * inverse(dmin)[:, None])
    out["d"], out["dmin"] = d, dmin
    out["scales"] = _pack_scales(scales.astype(np.uint8), minima.astype(np.uint8))

    q: F32Array = x + (dmin[:, None] * minima)[..., None]
    q *= inverse(d[:, None] * scales)[..., None]
    np.rint(q, out=q).clip(0, steps, out=q)
    return q.astype(np.uint8).reshape(-1, 256)


def _search_affine_k(
    x: F32Array, w: F32Array, top: int, trials: Sequence[float], layout: np.dtype[Any]
) -> Iterator[Blocks]:
    """Scales and minima searched in each sub-block; then integers and super-scales follow codes, and these follow them.

    With codes q, the error of a sub-block is a quadratic of its scale and minimum, so that their integers need no
    further look at the weights; with integers too, that of a super-block is one of d and dmin.
    """
    x, w = x.reshape(-1, 8, 32), w.reshape(-1, 8, 32)
    unit, peak = normalized(x)
    step, offset = search_affine(unit, w, top, trials, signed=False)
    step, below = (step * peak[..., 0]).astype(np.float32), (-offset * peak[..., 0]).astype(np.float32)
    d, dmin = half_up(step.max(axis=1) / np.float32(63)), half_up(below.max(axis=1) / np.float32(63))
    scales, minima = (np.rint(v * inverse(s)[:, None]).clip(0, 63) for v, s in ((step, d), (below, dmin)))
    sums = AffineSums(x, w)
    for turn in range(_TURNS + 1):
        out = np.zeros(len(x), layout)
        out["d"], out["dmin"] = d, dmin
        out["scales"] = _pack_scales(scales.astype(np.uint8), minima.astype(np.uint8))
        yield out
        if turn == _TURNS:
            return
        q = x + (dmin[:, None] * minima)[..., None]
        q *= inverse(d[:, None] * scales)[..., None]
        sums.take(np.rint(q, out=q).clip(0, top, out=q))
        scales, minima = _best_integers(sums, d[:, None], dmin[:, None], scales)
        d, dmin = _best_super_scales(sums, scales, minima, d, dmin)


def _best_integers(sums: AffineSums, d: F32Array, dmin: F32Array, scales: F32Array) -> tuple[F32Array, F32Array]:
    """Of each scale and its two neighbours, the best with its best minimum."""
    best, chosen, minima = np.full(scales.shape, -np.inf), scales.copy(), np.zeros_like(scales)
    for scale in (scales, scales - np.float32(1), scales + np.float32(1)):
        scale = scale.clip(0, 63)
        minimum = np.rint(ratio((d * scale * sums.sq - sums.sx) * inverse(dmin), sums.s1)).clip(0, 63)
        gain = sums.gain(d * scale, -dmin * minimum)
        better = gain > best
        chosen[better], minima[better], best[better] = scale[better], minimum[better], gain[better]
    return chosen, minima


def _best_super_scales(
    sums: AffineSums, scales: F32Array, minima: F32Array, d: F32Array, dmin: F32Array
) -> tuple[F32Array, F32Array]:
    """d and dmin, rounded to float16, by least squares; where these are no scales, they stay."""
    aa, bb = (scales * scales * sums.sqq).sum(axis=1), (minima * minima * sums.s1).sum(axis=1)
    ab, ax = -(scales * minima * sums.sq).sum(axis=1), (scales * sums.sxq).sum(axis=1)
    bx = -(minima * sums.sx).sum(axis=1)
    det = aa * bb - ab * ab
    flat = det <= 1e-6 * aa * bb  # no minima, or no scales
    new_d = np.where(flat, ratio(ax - ab * dmin, aa), ratio(ax * bb - bx * ab, det)).astype(np.float16)
    new_dmin = np.where(flat, dmin, ratio(bx * aa - ax * ab, det)).astype(np.float16)
    bad = ~(np.isfinite(new_d) & np.isfinite(new_dmin) & (new_d > 0) & (new_dmin >= 0))
    return np.where(bad, d, new_d.astype(np.float32)), np.where(bad, dmin, new_dmin.astype(np.float32))


def _affine_steps(blocks: Blocks) -> tuple[F32Array, F32Array]:
    scales, minima = _unpack_scales(blocks["scales"])
    step, below = column(blocks["d"]) * scales, column(blocks["dmin"]) * minima
    return np.repeat(step, 32, axis=1), np.repeat(-below, 32, axis=1)


def _decode_affine_k(q: Bytes, blocks: Blocks, out: F32Array) -> None:
    scales, minima = _unpack_scales(blocks["scales"])
    out = out.reshape(-1, 8, 32)
    np.multiply(q, (column(blocks["d"]) * scales)[..., None], out=out)
    out -= (column(blocks["dmin"]) * minima)[..., None]


def _pack_scales(scales: Bytes, minima: Bytes) -> Bytes:
    """Twice eight 6-bit integers in 12 bytes: the last four of each keep their top bits above the first."""
    heads = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (scales, minima)]
    return np.concatenate([*heads, scales[:, 4:] & LOW | minima[:, 4:] << 4], axis=1)


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate([scales & 63, rest & LOW | scales >> 6 << 4], axis=1),
        np.concatenate([minima & 63, rest >> 4 | minima >> 6 << 4], axis=1),
    )
