"""Scales by weighted least squares: the best of several trial roundings, each with its best scale.

Arrays: `x` (..., n) are weights, `w` the importance of their squared errors, the last axis one (sub-)block. Both are
taken to be of moderate magnitude, as `normalized` makes them. For codes q, the best scale is Σwxq / Σwq², and what it
takes off the error Σwx² is (Σwxq)² / Σwq²: the largest wins. Codes are floats, values of a format's codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
Snap = Callable[[F32Array], F32Array]  # to the nearest values of a codebook

AFFINE_TRIALS_15 = (15.0, 15.5, 16.0, 16.6, 14.5, 14.0, 17.4, 13.0)
AFFINE_TRIALS_31 = (31.0, 31.6, 32.2, 30.4, 33.0)
_ROUNDS = 2  # in which codes and scales follow each other; a third gains a thousandth of the error


def dot(a: F32Array, b: F32Array) -> F32Array:
    """Sums of a · b over the last axis."""
    out: F32Array = np.einsum("...i,...i->...", a, b)
    return out


def normalized(x: F32Array) -> tuple[F32Array, F32Array]:
    """x over its largest magnitude along the last axis, and that magnitude (..., 1); zeros stay."""
    peak = np.maximum(x.max(axis=-1, keepdims=True), -x.min(axis=-1, keepdims=True))
    return x * ratio(np.float32(1), peak), peak


def ratio(a: NDArray[Any] | np.float32, b: NDArray[Any]) -> Any:
    """a / b, and 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        out = a / b
    return np.where(np.isfinite(out), out, out.dtype.type(0))


def search_scale(x: F32Array, w: F32Array, snap: Snap, trials: Sequence[float]) -> F32Array:
    """Scales (...) so that scale · (nearest code) comes close to x (..., n), whose largest magnitude is 1.

    `trials` are the values that the largest weight is tried at, of either sign.
    """
    high, low = x.max(axis=-1), x.min(axis=-1)
    sign: F32Array = np.where(high >= -low, 1, -1).astype(np.float32)
    wx = w * x
    best = np.zeros_like(sign)
    scale: F32Array = sign / np.float32(trials[0])
    for trial in trials:
        num, den = _sums(x, w, wx, snap, sign * np.float32(trial))
        gain = ratio(num * num, den)
        better = gain > best
        best[better], scale[better] = gain[better], num[better] / den[better]
    for _ in range(_ROUNDS):
        found = ratio(*_sums(x, w, wx, snap, ratio(np.float32(1), scale)))
        np.copyto(scale, found, where=found != 0)
    return scale


def _sums(x: F32Array, w: F32Array, wx: F32Array, snap: Snap, inverse: F32Array) -> tuple[F32Array, F32Array]:
    """Σwxq and Σwq² of the codes of x · inverse (...)."""
    q = snap(x * inverse[..., None])
    num = dot(wx, q)
    q *= q
    return num, dot(w, q)


class AffineSums:
    """The sums over (sub-)blocks that error and best scale and offset of x ≈ scale · q + offset depend on, float64."""

    def __init__(self, x: F32Array, w: F32Array) -> None:
        self.w, self.wx = w, w * x
        self.s1, self.sx = w.sum(axis=-1, dtype=np.float64), self.wx.sum(axis=-1, dtype=np.float64)

    def take(self, q: F32Array) -> None:
        """Those of the codes q (..., n) from now on."""
        wq = self.w * q
        self.sq, self.sqq = wq.sum(axis=-1).astype(np.float64), dot(wq, q).astype(np.float64)
        self.sxq = dot(self.wx, q).astype(np.float64)

    def gain(self, scale: Any, offset: Any) -> Any:
        """How much smaller than Σwx² the error is."""
        cross = scale * self.sxq + offset * self.sx
        return 2 * cross - scale * scale * self.sqq - 2 * scale * offset * self.sq - offset * offset * self.s1

    def best(self, signed: bool) -> tuple[Any, Any]:
        """Scale and offset; the offset is at most 0 unless it is `signed`."""
        det = self.s1 * self.sqq - self.sq * self.sq
        scale = ratio(self.s1 * self.sxq - self.sx * self.sq, np.where(det > 1e-6 * self.s1 * self.sqq, det, 0))
        offset = ratio(self.sx - scale * self.sq, self.s1)
        if signed:
            return scale, offset
        return np.where(offset > 0, ratio(self.sxq, self.sqq), scale), np.minimum(offset, 0)


def search_affine(
    x: F32Array, w: F32Array, top: int, trials: Sequence[float], signed: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and offset (...) so that scale · q + offset, q in 0 … `top`, comes close to x (..., n).

    `trials` are the numbers of steps that the range of x is tried to be cut into. Without `signed`, offsets are ≤ 0.
    """
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    if not signed:
        np.minimum(low, 0, out=low)
    unit = (x - low) * ratio(np.float32(1), high - low)
    sums = AffineSums(x, w)
    scale, offset = ((high - low)[..., 0] / top).astype(np.float64), low[..., 0].astype(np.float64)
    best = np.full_like(scale, -np.inf)
    for trial in trials:  # a range of fewer steps than codes leaves room on both sides, one of more is clipped on both
        shift = np.float32((top - trial) / 2 if signed else min(0.0, (top - trial) / 2))
        q = unit * np.float32(trial)
        q += shift
        best = _adopt(sums, np.rint(q, out=q).clip(0, top, out=q), signed, best, scale, offset)
    for _ in range(_ROUNDS):
        q = (x - offset[..., None].astype(np.float32)) * ratio(np.float32(1), scale[..., None].astype(np.float32))
        best = _adopt(sums, np.rint(q, out=q).clip(0, top, out=q), signed, best, scale, offset)
    return scale, offset


def _adopt(sums: AffineSums, q: F32Array, signed: bool, best: Any, scale: Any, offset: Any) -> Any:
    """Put the best scale and offset of the codes q where they gain more than `best`; returns what is gained now."""
    sums.take(q)
    new_scale, new_offset = sums.best(signed)
    gain = sums.gain(new_scale, new_offset)
    better = (gain > best) & (new_scale > 0)
    scale[better], offset[better] = new_scale[better], new_offset[better]
    return np.where(better, gain, best)


def search_two_levels(
    x: F32Array, w: F32Array, snap: Snap, trials: Sequence[float], limits: tuple[int, int]
) -> Iterator[tuple[F32Array, F32Array]]:
    """Super-scales (b,), float16 numbers, and integer scales (b, k) within `limits`, for x (b, k, n).

    First from scales searched in each sub-block; then codes follow scales and scales codes.
    """
    unit, peak = normalized(x)
    step = search_scale(unit, w, snap, trials) * peak[..., 0]
    high, low = step.max(axis=-1), step.min(axis=-1)
    d = (np.where(high > -low, high, low) / np.float32(limits[0])).astype(np.float16).astype(np.float32)
    scales = np.rint(step * ratio(np.float32(1), d)[:, None]).clip(*limits)
    yield d, scales
    wx = w * x
    for _ in range(_ROUNDS):
        num, den = _sums(x, w, wx, snap, ratio(np.float32(1), d[:, None] * scales))
        scales = np.rint(ratio(num, den) * ratio(np.float32(1), d)[:, None]).clip(*limits)
        d = ratio(dot(scales, num), dot(scales * scales, den)).astype(np.float16).astype(np.float32)
        yield d, scales
