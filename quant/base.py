"""What every number format is: its sizes, its registration, and how rows are cut into blocks.

A format is one class, laid out bit for bit as GGUF's and written in NumPy, vectorised over blocks: fast enough to
quantize whole models, and the reference that the native kernels are tested against. A class registers itself by
being defined; tests and tools walk `FORMATS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .search import dot, normalized, search_scale

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Blocks = NDArray[Any]  # structured: one element a block

FORMATS: dict[str, type[Format]] = {}
FORMAT_OF_TYPE: dict[int, type[Format]] = {}

HALF_MAX = 65504.0  # largest float16
LOW = np.uint8(15)  # the low nibble of a byte
_SURELY_STORED = 1e-3  # a block with a weight as large has a scale in every format
PIECE = 1 << 16  # weights worked on at a time, so that temporaries stay in the cache

EVEN = np.ones(1, np.float32)  # the importance that favours no weight
NO_OFFSET = np.zeros((1, 1), np.float32)


class Span(NamedTuple):
    """What is divided into steps: of each `weights` neighbours, (n, weights), what `of` says, (n,).

    `gaussian` is its root mean square over unit Gaussian weights.
    """

    weights: int
    of: Callable[[F32Array], F32Array]
    gaussian: float

    def energy(self, x: F32Array) -> float:
        """Σ span² over the weights x (rows, columns)."""
        spans = self.of(x.reshape(-1, self.weights)).astype(np.float64)
        return float(self.weights * (spans @ spans))


def _peak(x: F32Array) -> F32Array:
    peaks: F32Array = np.abs(x).max(axis=1)
    return peaks


def _range(x: F32Array) -> F32Array:
    ranges: F32Array = x.max(axis=1, initial=0) - x.min(axis=1, initial=0)
    return ranges


PEAK_16, PEAK_32 = Span(16, _peak, 2.13), Span(32, _peak, 2.39)
RANGE_16, RANGE_32 = Span(16, _range, 3.61), Span(32, _range, 4.20)


def integers(first: int, last: int) -> F32Array:
    """The codebook of evenly spaced codes."""
    return np.arange(first, last + 1, dtype=np.float32)


class Readable:
    """What is known of every type of tensor that can be read: its sizes, and what its bytes stand for.

    `Format` adds what writing asks for; what is only read is in `runtime/files/read_only.py`.
    """

    name: ClassVar[str]
    gguf_type: ClassVar[int]
    block: ClassVar[int]  # weights in a block
    block_bytes: ClassVar[int]

    @classmethod
    def row_bytes(cls, n: int) -> int:
        """Bytes of a row of n weights. Raises ValueError if n is not a whole number of blocks."""
        if n % cls.block:
            raise ValueError(f"{cls.name}: a row of {n} weights is not a multiple of the block of {cls.block}")
        return n // cls.block * cls.block_bytes

    @classmethod
    def dequantize(cls, data: Bytes) -> F32Array:
        """uint8 (..., bytes), whole blocks → float32 (..., n)."""
        raise NotImplementedError


class Format(Readable):
    """A block format. `layout` describes one block: fields of codes start with "q", all others are scales.

    `codebook` holds the values of the codes, ascending: a weight is scale · codebook[code] + offset. Floats, whose
    blocks are single numbers, have none, nor `fit`, `steps` and `put_codes`.

    `largest` is the largest magnitude that is sure to fit. `tolerance` is the largest believable relative RMS
    error, ‖x − dequantized‖ / ‖x‖, of a correctly quantized tensor of roughly Gaussian weights. For floats it is the
    exact bound, half a unit in the last place; for blocks, whose `span` is divided into `divisions`, `tolerance_of`
    derives it.
    """

    file_type: ClassVar[int]  # llama.cpp's `llama_ftype` of a file that holds mostly this
    layout: ClassVar[np.dtype[Any]]
    fallback: ClassVar[type[Format] | None] = None  # which llama.cpp puts in its place where rows are not whole blocks
    codebook: ClassVar[F32Array]
    largest: ClassVar[float]
    span: ClassVar[Span | None] = None
    divisions: ClassVar[float]
    tolerance: ClassVar[float]

    def __init_subclass__(cls) -> None:
        if "gguf_type" not in vars(cls):  # what formats have in common
            return
        if cls.span:
            cls.tolerance = cls.tolerance_of(cls.span.gaussian)
        cls.block_bytes = cls.layout.itemsize
        FORMATS[cls.name] = FORMAT_OF_TYPE[cls.gguf_type] = cls

    @classmethod
    def tolerance_of(cls, span: float) -> float:
        """1.5 × the relative RMS error of a tensor whose blocks span so many of its deviations (RMS).

        Rounding to a step s is off by s / √12 (RMS) where weights are spread evenly between two steps; the factor is
        room for rounded scales and for those that are not. Data of another tensor is off by √2.
        """
        return 1.5 * span / cls.divisions / math.sqrt(12)

    @classmethod
    def quantize(cls, rows: F32Array, weights: F32Array | None = None) -> Bytes:
        """float32 (..., n) → uint8 (..., row_bytes(n)).

        Without `weights`, scales follow the extremes of a block and weights are rounded. `weights` is the importance
        of each weight's squared error, broadcastable to `rows`: scales are then searched that make the weighted
        error small (`fit`). EVEN asks for a search that favours no weight. Floats ignore it.

        Raises ValueError for rows that are not whole blocks, for weights that are not finite or too large, and for
        an importance that is negative, not finite or of another shape; TypeError for anything but float32.
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
        if weights is not None and cls.block > 1:
            return cls._quantize_weighted(rows, weights).view(np.uint8).reshape(shape)
        x = rows.reshape(-1, cls.block)
        out = np.empty(len(x), cls.layout)
        step = PIECE // cls.block
        for i in range(0, len(x), step):
            cls._encode(x[i : i + step], out[i : i + step])
        return out.view(np.uint8).reshape(shape)

    @classmethod
    def _quantize_weighted(cls, rows: F32Array, weights: F32Array) -> Blocks:
        if weights.dtype != np.float32:
            raise TypeError(f"{cls.name}: importance is float32, not {weights.dtype}")
        try:
            weights = np.broadcast_to(weights, rows.shape)
        except ValueError:
            raise ValueError(f"{cls.name}: importance {weights.shape} does not fit rows {rows.shape}") from None
        low, high = weights.min(initial=0), weights.max(initial=0)
        if low < 0 or not np.isfinite(high):  # NaN is neither
            raise ValueError(f"{cls.name}: found an importance of {low if low < 0 else high}, expected finite and ≥ 0")
        n = rows.shape[-1]
        rows, weights = rows.reshape(-1, n), weights.reshape(-1, n)
        out = np.empty((len(rows), n // cls.block), cls.layout)
        step = max(1, PIECE // n) if n else 1
        for i in range(0, len(rows), step):
            x = rows[i : i + step].reshape(-1, cls.block)
            blocks = cls.fit(x, weights[i : i + step].reshape(-1, cls.block))
            cls.put_codes(cls.nearest(x, blocks), blocks)
            out[i : i + step] = blocks.reshape(-1, n // cls.block)
        return out

    @classmethod
    def fit(cls, x: F32Array, weights: F32Array | None) -> Blocks:
        """Blocks (b,) for x (b, block) whose scales are set, rounded as they are stored, and whose codes are zero.

        `weights`, broadcastable to x, is the importance of each squared error, finite and ≥ 0: the scales are then
        the best that a search finds for nearest codes, and never worse than the plain ones. None gives these.
        """
        best = np.empty(len(x), cls.layout)
        cls._encode(x, best)
        for name in cls.layout.names or ():
            if name.startswith("q"):
                best[name] = 0
        if weights is None:
            return best
        w, _ = normalized(np.broadcast_to(weights, x.shape))
        error = cls._error(x, w, best)
        for trial in cls._search(x, w):
            found = cls._error(x, w, trial)
            better = found < error
            best[better], error[better] = trial[better], found[better]
        return best

    @classmethod
    def _search(cls, x: F32Array, w: F32Array) -> Iterator[Blocks]:
        """Blocks (b,) with promising scales and codes of zero, for x (b, block) of importance w, at most 1."""
        raise NotImplementedError

    @classmethod
    def _error(cls, x: F32Array, w: F32Array, blocks: Blocks) -> F32Array:
        """Σ w (x − dequantized)² of each block, with nearest codes."""
        scale, offset = cls.steps(blocks)
        off = cls.snap((x - offset) * inverse(scale))
        off *= scale
        off += offset
        off -= x
        off *= off
        return dot(w, off)

    @classmethod
    def steps(cls, blocks: Blocks) -> tuple[F32Array, F32Array]:
        """Scale and offset, both broadcastable to (b, block), of blocks (b,)."""
        raise NotImplementedError

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        """Pack codes (b, block), indices into `codebook`, into blocks (b,)."""
        raise NotImplementedError

    @classmethod
    def nearest(cls, x: F32Array, blocks: Blocks) -> Bytes:
        """The codes (b, block) that come closest to x (b, block) with the scales of blocks (b,)."""
        scale, offset = cls.steps(blocks)
        return cls.round((x - offset) * inverse(scale))

    @classmethod
    def round(cls, values: F32Array) -> Bytes:
        """The code of the nearest value of the codebook, for each of `values`."""
        codes: Bytes = (cls.snap(values) - cls.codebook[0]).astype(np.uint8)
        return codes

    @classmethod
    def snap(cls, values: F32Array) -> F32Array:
        """The nearest value of the codebook, for each of `values`."""
        snapped: F32Array = np.rint(values)
        np.maximum(snapped, cls.codebook[0], out=snapped)
        np.minimum(snapped, cls.codebook[-1], out=snapped)
        return snapped

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
        step = PIECE // cls.block
        with np.errstate(all="ignore"):
            for i in range(0, len(blocks), step):
                cls._decode(blocks[i : i + step], out[i : i + step])
        return out.reshape(*data.shape[:-1], data.shape[-1] // cls.block_bytes * cls.block)

    @classmethod
    def vanished(cls, rows: F32Array, data: Bytes) -> int:
        """How many of the float32 rows (..., n) `data` (..., bytes) has lost: those whose whole block became zeros.

        Float16 scales do that, which end at 6e-8. A row counts as a block of floats.
        """
        x = rows.reshape(-1, cls.block if cls.block > 1 else rows.shape[-1])
        peaks = np.abs(x).max(axis=1)
        small = np.flatnonzero((peaks > 0) & (peaks < _SURELY_STORED))
        if not len(small):
            return 0
        gone = ~cls.dequantize(data.reshape(len(x), -1)[small]).any(axis=1)
        return int(np.count_nonzero(x[small[gone]]))

    @classmethod
    def _encode(cls, x: F32Array, out: Blocks) -> None:
        """Quantize finite x (blocks, cls.block) into out (blocks,), plainly."""
        raise NotImplementedError

    @classmethod
    def _decode(cls, blocks: Blocks, out: F32Array) -> None:
        """Dequantize blocks (blocks,) into out (blocks, cls.block)."""
        raise NotImplementedError


def search_one_scale(form: type[Format], x: F32Array, w: F32Array, trials: Sequence[float]) -> Blocks:
    """Blocks of a format whose only scale is "d", for x (b, block) of importance w; `search_scale` says more."""
    unit, peak = normalized(x)
    out = np.zeros(len(x), form.layout)
    out["d"] = search_scale(unit, w, form.snap, trials) * peak[:, 0]
    return out


def column(half: Blocks) -> F32Array:
    return half.astype(np.float32)[:, None]


def inverse(d: NDArray[np.floating[Any]]) -> F32Array:
    """1 / d, and 0 where that is infinite: a block whose scale vanishes gets codes of zero."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: F32Array = (np.float32(1) / d).astype(np.float32, copy=False)
    inverse[np.isinf(inverse)] = 0
    return inverse


def half_up(d: NDArray[np.floating[Any]]) -> F32Array:
    """d rounded away from zero to a float16, as float32.

    A super-scale of ordinary weights is small enough to be a subnormal float16 of few bits. Rounded down, its
    sub-scales would overflow their integers.
    """
    half = d.astype(np.float16)
    bits = half.view(np.uint16)
    bits += np.abs(half) < np.abs(d)  # the next float16 away from zero, whatever the sign
    return half.astype(np.float32)


def bf16_bits(x: F32Array) -> NDArray[np.uint32]:
    """Of finite x, rounded to the nearest bfloat16, halves to even: the 16 bits that it has."""
    bits, one, upper = x.view(np.uint32), np.uint32(1), np.uint32(16)
    rounded: NDArray[np.uint32] = (bits + ((bits >> upper) & one) + np.uint32(0x7FFF)) >> upper  # no carry is lost
    return rounded


def signed_peak(x: F32Array) -> F32Array:
    """Of the last axis, the value of largest magnitude, the first of equals."""
    high, low = x.max(axis=-1), x.min(axis=-1)
    peak: F32Array = np.where(high > -low, high, low)
    tied = high == -low
    rows = x[tied]
    first = np.abs(rows).argmax(axis=-1)[:, None]
    peak[tied] = np.take_along_axis(rows, first, axis=-1)[:, 0]
    return peak


def pack_nibbles(q: Bytes) -> Bytes:
    """Codes below 16 (..., 2, k) → (..., k), the first of the two in the low nibble."""
    return q[..., 0, :] | q[..., 1, :] << np.uint8(4)


def unpack_nibbles(packed: Bytes) -> Bytes:
    """(..., k) → (..., 2, k)."""
    return np.stack([packed & LOW, packed >> np.uint8(4)], axis=-2)


def shifts(count: int, bits: int) -> Bytes:
    """(count, 1): 0, bits, 2·bits …"""
    return np.arange(0, count * bits, bits, dtype=np.uint8)[:, None]
