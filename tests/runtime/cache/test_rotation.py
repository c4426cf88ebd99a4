"""The Hadamard rotation against the matrix that defines it."""

from __future__ import annotations

import numpy as np
import pytest
from bezel.runtime.cache.rotation import hadamard

SIZES = [1, 2, 4, 8, 16, 128, 256, 512]
EPS = 2.0**-24  # of one float32 rounding


def matrix(n: int) -> np.ndarray:
    """Sylvester's construction."""
    return np.ones((1, 1)) if n == 1 else np.kron([[1, 1], [1, -1]], matrix(n // 2))


@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_matrix(n: int) -> None:
    assert np.array_equal(hadamard(np.eye(n, dtype=np.float32)), (matrix(n) * np.sqrt(np.float32(1 / n))))
    x = np.random.default_rng(n).standard_normal((3, 5, n)).astype(np.float32)
    got = hadamard(x)
    assert got.dtype == np.float32
    # A rounding for each of at most 9 additions, for the root and for the product, of what Σ|x| / √n bounds.
    bound = 11 * EPS * np.abs(x).sum(-1, keepdims=True) / np.sqrt(n)
    assert (np.abs(got - x @ matrix(n) / np.sqrt(n)) <= bound).all()


@pytest.mark.parametrize("n", SIZES)
def test_twice_is_once_there_and_back_and_products_stay(n: int) -> None:
    x, y = np.random.default_rng(n).standard_normal((2, 40, n))
    np.testing.assert_allclose(hadamard(hadamard(x)), x, atol=1e-14)
    np.testing.assert_allclose(hadamard(x) @ hadamard(y).T, x @ y.T, atol=1e-12)


def test_an_outlier_is_spread_over_the_head() -> None:
    x = np.zeros(256, np.float32)
    x[77] = 16
    assert np.abs(hadamard(x)).tolist() == [1] * 256
