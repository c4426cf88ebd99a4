"""Error feedback against a plain float64 procedure that eliminates one column after another."""

from __future__ import annotations

import numpy as np
import pytest
from bezel.quant.feedback import feedback_factor, quantize_with_feedback, retargeted
from bezel.quant.formats import EVEN, Format
from test_formats import BLOCK, rng


def problem(n: int, tokens: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Rows (8, n) and the second moments (n, n) of inputs that hang together, some of them large."""
    r = rng()
    x = r.standard_normal((tokens, n // 4)) @ r.standard_normal((n // 4, n)) + r.standard_normal((tokens, n))
    x *= np.exp(r.standard_normal(n) / 2)
    return r.standard_normal((8, n)).astype(np.float32), (x.T @ x).astype(np.float32)


def loss(rows: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    off = rounded.astype(np.float64) - rows
    return float(np.einsum("ri,ij,rj->", off, moments.astype(np.float64), off))


def textbook(form: type[Format], rows: np.ndarray, moments: np.ndarray, damping: float) -> np.ndarray:
    """Optimal brain quantization in a fixed order (Frantar et al. 2022, equations 2 and 3), with no Cholesky factor."""
    n = rows.shape[1]
    inverse = np.linalg.inv(moments.astype(np.float64) + damping * np.mean(np.diag(moments)) * np.eye(n))
    w, out = rows.astype(np.float64), np.empty(rows.shape)
    importance = np.empty(n, np.float32)
    left = inverse.copy()
    for j in range(n):
        importance[j] = 1 / left[j, j]
        left -= np.outer(left[:, j], left[j]) / left[j, j]
    for first in range(0, n, form.block):
        cols = slice(first, first + form.block)
        blocks = form.fit(np.ascontiguousarray(w[:, cols], np.float32), importance[cols])
        scale, offset = (np.broadcast_to(s, (len(rows), form.block)).astype(np.float64) for s in form.steps(blocks))
        for j in range(first, first + form.block):
            s, o = scale[:, j - first], offset[:, j - first]
            values = form.codebook.astype(np.float64)[:, None] * s + o
            out[:, j] = np.take_along_axis(values, np.abs(values - w[:, j]).argmin(axis=0)[None], axis=0)[0]
            w -= np.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j])
            inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1.0  # used up
    return out


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_feedback_is_what_eliminating_columns_one_by_one_gives(f):
    """Float32 turns a few codes that lie half-way; then later columns follow another path of equal quality."""
    rows, moments = problem(512)
    found = f.dequantize(quantize_with_feedback(f, rows, feedback_factor(moments, 0.01)))
    expected = textbook(f, rows, moments, 0.01)
    first = np.abs(found - expected)[:, :32] <= 1e-6 * np.abs(rows).max()
    assert first.mean() > 0.95
    assert loss(rows, found, moments) == pytest.approx(loss(rows, expected, moments), rel=0.05)


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_feedback_beats_rounding_to_the_nearest(f):
    rows, moments = problem(768)
    importance = np.ascontiguousarray(np.diag(moments))
    found = loss(rows, f.dequantize(quantize_with_feedback(f, rows, feedback_factor(moments, 0.01))), moments)
    for weights in (EVEN, importance):
        assert found < 0.6 * loss(rows, f.dequantize(f.quantize(rows, weights)), moments)


def test_the_factor_s_square_is_the_damped_inverse():
    _, moments = problem(600)
    factor = feedback_factor(moments, 0.02).astype(np.float64)
    assert np.array_equal(factor, np.triu(factor))
    damped = moments.astype(np.float64) + 0.02 * np.mean(np.diag(moments)) * np.eye(600)
    assert np.abs(damped @ (factor.T @ factor) - np.eye(600)).max() < 1e-3


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_inputs_that_never_occur_do_not_matter(f):
    rows, moments = problem(256)
    moments[::3] = moments[:, ::3] = 0
    values = f.dequantize(quantize_with_feedback(f, rows, feedback_factor(moments, 0.01)))
    assert np.isfinite(values).all()
    nothing = f.dequantize(quantize_with_feedback(f, rows, feedback_factor(np.zeros_like(moments), 0.01)))
    assert np.array_equal(nothing, f.dequantize(f.quantize(rows, EVEN)))


def test_a_moved_target_is_the_least_squares_solution():
    """Against numpy.linalg.lstsq: rows whose products with x come closest to those of the old ones with y."""
    r = rng()
    y = r.standard_normal((4000, 64))
    x = y + 0.3 * r.standard_normal((4000, 64)) @ r.standard_normal((64, 64)) / 8
    rows = r.standard_normal((5, 64)).astype(np.float32)
    moments, drift = ((a.T @ x).astype(np.float32) for a in (x, y - x))
    found = retargeted(rows, drift, feedback_factor(moments, 1e-7))
    expected = np.linalg.lstsq(x, y @ rows.T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - rows).max() > 0.05


def test_rows_do_not_depend_on_each_other():
    """So that they can be rounded in any pieces."""
    rows, moments = problem(512)
    factor = feedback_factor(moments, 0.01)
    for f in BLOCK:
        whole = f.dequantize(quantize_with_feedback(f, rows, factor))
        part = f.dequantize(quantize_with_feedback(f, rows[3:5], factor))
        assert loss(whole[3:5], part, moments) < 0.05 * loss(rows[3:5], part, moments)
