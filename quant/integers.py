"""Block formats taken apart: a weight is an integer times its block's scale, which is how ONNX stores weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats import Q4_0, Q5_0, Q6_K, Q8_0, Blocks, Bytes, F32Array, Format


@dataclass(frozen=True)
class IntegerForm:
    """Signed integers of `bits` bits, with a scale for each `block` of them; `scales` reads those of GGUF's blocks."""

    bits: int
    block: int
    scales: Callable[[Blocks], F32Array]


def _plain(blocks: Blocks) -> F32Array:
    d: F32Array = blocks["d"].astype(np.float32)
    return d


def _q6_k(blocks: Blocks) -> F32Array:
    scales: F32Array = _plain(blocks)[:, None] * blocks["scales"]  # 11 and 8 bits: exact
    return scales


INTEGER_FORMS: dict[type[Format], IntegerForm] = {
    Q4_0: IntegerForm(4, 32, _plain),
    Q5_0: IntegerForm(8, 32, _plain),
    Q6_K: IntegerForm(8, 16, _q6_k),
    Q8_0: IntegerForm(8, 32, _plain),
}


def as_integers(format_: type[Format], data: Bytes) -> tuple[NDArray[np.int8], F32Array]:
    """Codes (rows, n) and scales (rows, n / block) of block rows, uint8 (rows, bytes).

    codes · scales in float32 are the bits of `format_.dequantize(data)`. Raises ValueError for a scale that is not
    finite.
    """
    form = INTEGER_FORMS[format_]
    blocks = np.ascontiguousarray(data).reshape(-1).view(format_.layout)
    scales = form.scales(blocks).reshape(len(data), -1)
    if not np.isfinite(scales).all():
        raise ValueError(f"{format_.name}: found a scale that is not finite")
    weights = format_.dequantize(data).reshape(len(data), -1, form.block)
    step = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.rint(weights / step).astype(np.int8)
    return codes.reshape(len(data), -1), scales
