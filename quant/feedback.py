"""Rounding with error feedback: what one column of a matrix loses, the columns after it make up for.

Frantar et al. 2022 (GPTQ), which is LDLQ of Chee et al. 2023. The loss is Σ xᵀ(w − q)(w − q)ᵀx over inputs x, with the
second moments H = Σ x xᵀ. With the upper Cholesky factor U of H⁻¹ = UᵀU it is Σⱼ (errorⱼ / Uⱼⱼ)², where errorⱼ is
that of column j after the feedback from all before: each column's errors are least when it is rounded to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Bytes, F32Array, Format, inverse

_PANEL = 256  # columns whose feedback to the columns behind them is one matrix product; whole blocks of any format
_INNER = 32


def feedback_factor(moments: F32Array, damping: float) -> F32Array:
    """U (n, n), upper triangular, UᵀU = (H + damping · mean(diag H) · I)⁻¹, of second moments H (n, n)."""
    # With J the reversal of rows and columns and L the Cholesky factor of JHJ, H = (JLJ)(JLJ)ᵀ and U = J L⁻¹ J.
    h: NDArray[Any] = moments[::-1, ::-1].astype(np.float64)
    mean = float(np.trace(h)) / len(h)
    h[np.diag_indices_from(h)] += damping * mean if mean > 0 else 1.0
    lower: F32Array = np.linalg.cholesky(h).astype(np.float32)
    del h
    _invert_lower(lower)
    return np.ascontiguousarray(lower[::-1, ::-1])


def _invert_lower(a: F32Array) -> None:
    """In place; NumPy has no inverse of a triangular matrix, and that of a full one costs six times as much."""
    n = len(a)
    if n <= _PANEL:
        a[:] = np.tril(np.linalg.inv(a))
        return
    k = n // 2
    _invert_lower(a[:k, :k])
    _invert_lower(a[k:, k:])
    a[k:, :k] = -(a[k:, k:] @ (a[k:, :k] @ a[:k, :k]))


def retargeted(rows: F32Array, drift: F32Array, factor: F32Array) -> F32Array:
    """The rows (m, n) whose products with the inputs x come closest to those of `rows` with the exact inputs y.

    That is what to round where the layers before are rounded already and x differs from y (Li et al. 2025, GPTAQ):
    rows + rows · D · H⁻¹, with the `drift` D = Σ (y − x) xᵀ, H = Σ x xᵀ, and H⁻¹ = UᵀU damped as in `feedback_factor`.
    """
    moved: Any = rows @ drift @ factor.T @ factor
    out: F32Array = rows + moved
    return out


def quantize_with_feedback(form: type[Format], rows: F32Array, factor: F32Array) -> Bytes:
    """float32 rows (m, n) → uint8 (m, row_bytes(n)), with the factor (n, n) of `feedback_factor`."""
    m, n = rows.shape
    w = np.ascontiguousarray(rows.T)  # (n, m): a column of weights is contiguous
    importance = (1 / np.square(np.diagonal(factor))).astype(np.float32)
    out = np.empty((m, n // form.block), form.layout)
    errors = np.empty((_PANEL, m), np.float32)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        for first in range(start, stop, form.block):
            cols = slice(first, first + form.block)
            x = np.ascontiguousarray(w[cols].T)
            blocks = form.fit(x, importance[cols])
            scale, offset = (np.ascontiguousarray(np.broadcast_to(s, x.shape).T) for s in form.steps(blocks))
            reciprocal = inverse(scale)
            values = np.empty((form.block, m), np.float32)
            for inner in range(first, first + form.block, _INNER):
                end = inner + _INNER
                for j in range(inner, end):
                    k = j - first
                    values[k] = form.snap((w[j] - offset[k]) * reciprocal[k])
                    e = errors[j - start]
                    np.multiply(values[k], scale[k], out=e)
                    e += offset[k]
                    np.subtract(w[j], e, out=e)
                    e /= factor[j, j]
                    w[j + 1 : end] -= np.outer(factor[j, j + 1 : end], e)
                if end < stop:
                    w[end:stop] -= factor[inner:end, end:stop].T @ errors[inner - start : end - start]
            form.put_codes(form.round(np.ascontiguousarray(values.T)), blocks)
            out[:, first // form.block] = blocks
        if stop < n:
            w[stop:] -= factor[start:stop, stop:].T @ errors[: stop - start]
    return out.view(np.uint8).reshape(m, -1)
