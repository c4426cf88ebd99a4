"""What the K formats with minima share: w = d·scale·q − dmin·min.

A super-block has 256 weights; each of its sub-blocks has an integer scale and an integer minimum. Arrays: x (b, 256).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .base import Blocks, Bytes, F32Array, column, half_up, inverse
from .search import AffineSums, normalized, ratio, search_affine

_TURNS = 2  # of integers and super-scales after codes


class AffineK(NamedTuple):
    """Sub-blocks of `size` weights, codes 0 … `top`, and scales and minima 0 … `most`, which are packed together.

    `trials` are those of `search_affine`.
    """

    size: int
    top: int
    most: int
    trials: Sequence[float]
    pack: Callable[[Bytes, Bytes], Bytes]  # scales and minima (b, sub-blocks) → (b, bytes)
    unpack: Callable[[Bytes], tuple[Bytes, Bytes]]

    def steps(self, blocks: Blocks) -> tuple[F32Array, F32Array]:
        step, below = self._steps(blocks)
        return np.repeat(step, self.size, axis=1), np.repeat(-below, self.size, axis=1)

    def decode(self, q: Bytes, blocks: Blocks, out: F32Array) -> None:
        """Blocks with the codes q (b, 256) into out (b, 256)."""
        step, below = self._steps(blocks)
        out = self._cut(out)
        np.multiply(self._cut(q), step[..., None], out=out)
        out -= below[..., None]

    def encode(self, x: F32Array, out: Blocks) -> Bytes:
        """Plain codes (b, 256) of x; the scales and minima go to `out`.

        Codes are rounded with the scales as stored, after their own rounding to integers.
        """
        x = self._cut(x)
        below = np.abs(np.minimum(x.min(axis=-1), np.float32(0)))
        step = (x.max(axis=-1) + below) / np.float32(self.top)
        d, dmin = self._super_scales(step, below)
        scales, minima = np.rint(step * inverse(d)[:, None]), np.rint(below * inverse(dmin)[:, None])
        self._put(out, d, dmin, scales, minima)
        return self._codes(x, d, dmin, scales, minima).astype(np.uint8).reshape(-1, 256)

    def search(self, x: F32Array, w: F32Array, layout: np.dtype[Any]) -> Iterator[Blocks]:
        """Scales and minima searched in each sub-block; then integers and super-scales follow codes, and these them.

        With codes q, the error of a sub-block is a quadratic of its scale and minimum, so that their integers need no
        further look at the weights; with integers too, that of a super-block is one of d and dmin.
        """
        x, w = self._cut(x), self._cut(w)
        unit, peak = normalized(x)
        step, offset = search_affine(unit, w, self.top, self.trials, signed=False)
        step, below = (step * peak[..., 0]).astype(np.float32), (-offset * peak[..., 0]).astype(np.float32)
        d, dmin = self._super_scales(step, below)
        scales, minima = (np.rint(v * inverse(s)[:, None]).clip(0, self.most) for v, s in ((step, d), (below, dmin)))
        sums = AffineSums(x, w)
        for turn in range(_TURNS + 1):
            out = np.zeros(len(x), layout)
            self._put(out, d, dmin, scales, minima)
            yield out
            if turn == _TURNS:
                return
            sums.take(self._codes(x, d, dmin, scales, minima))
            scales, minima = self._best_integers(sums, d[:, None], dmin[:, None], scales)
            d, dmin = _best_super_scales(sums, scales, minima, d, dmin)

    def _cut(self, x: Any) -> Any:
        return x.reshape(len(x), -1, self.size)

    def _steps(self, blocks: Blocks) -> tuple[F32Array, F32Array]:
        scales, minima = self.unpack(blocks["scales"])
        return column(blocks["d"]) * scales, column(blocks["dmin"]) * minima

    def _super_scales(self, step: NDArray[Any], below: NDArray[Any]) -> tuple[F32Array, F32Array]:
        most = np.float32(self.most)
        return half_up(step.max(axis=1) / most), half_up(below.max(axis=1) / most)

    def _put(self, out: Blocks, d: F32Array, dmin: F32Array, scales: F32Array, minima: F32Array) -> None:
        out["d"], out["dmin"] = d, dmin
        out["scales"] = self.pack(scales.astype(np.uint8), minima.astype(np.uint8))

    def _codes(self, x: F32Array, d: F32Array, dmin: F32Array, scales: F32Array, minima: F32Array) -> F32Array:
        q: F32Array = x + (dmin[:, None] * minima)[..., None]
        q *= inverse(d[:, None] * scales)[..., None]
        return np.rint(q, out=q).clip(0, self.top, out=q)

    def _best_integers(
        self, sums: AffineSums, d: F32Array, dmin: F32Array, scales: F32Array
    ) -> tuple[F32Array, F32Array]:
        """Of each scale and its two neighbours, the best with its best minimum."""
        best, chosen, minima = np.full(scales.shape, -np.inf), scales.copy(), np.zeros_like(scales)
        for scale in (scales, scales - np.float32(1), scales + np.float32(1)):
            scale = scale.clip(0, self.most)
            minimum = np.rint(ratio((d * scale * sums.sq - sums.sx) * inverse(dmin), sums.s1)).clip(0, self.most)
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
