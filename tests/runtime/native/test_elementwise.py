"""The native norms, activations and rotary embedding against ops.py in float64, inside derived bounds.

EPS is the largest relative error of one float32 rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from bezel.runtime import _native
from bezel.runtime._native import ThreadPool
from bezel.runtime.model import ops

EPS = 2.0**-24
TANH = 5.2 * 2 * EPS  # of the kernels' tanh: 5.2 units in the last place
SIZES = [1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 257, 2304, 9216]
ROWS = [1, 3, 40]


@pytest.fixture(scope="module")
def pool() -> ThreadPool:
    return ThreadPool(2)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def norm_error(dim: int) -> float:
    """Relative. The squares are positive, so their sum is off by a rounding for each addition of a lane, dim / 64,
    and 8 to put the lanes together; the root halves that, and adds a rounding, as do 1 / x and both products."""
    return ((dim / 64 + 8) / 2 + 5) * EPS


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dim", SIZES)
def test_rms_norm(n: int, dim: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(dim)
    x, weight = floats(rng, n, dim) * np.float32(30), floats(rng, dim)
    expected = ops.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    got = _native.rms_norm(x, weight, 1e-6, pool)
    assert (np.abs(got - expected) <= norm_error(dim) * np.abs(expected)).all()


def test_eps_counts(pool: ThreadPool) -> None:
    x = np.full((1, 64), 1e-3, np.float32)
    expected = ops.rms_norm(x.astype(np.float64), np.ones(64), 1e-6)
    np.testing.assert_allclose(_native.rms_norm(x, np.ones(64, np.float32), 1e-6, pool), expected, rtol=1e-6)


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dim", SIZES)
def test_norm_add_norm(n: int, dim: int, post: bool, pool: ThreadPool) -> None:
    rng = np.random.default_rng(dim)
    x, h, w1, w2 = floats(rng, n, dim), floats(rng, n, dim), floats(rng, dim), floats(rng, dim)
    added = ops.rms_norm(h.astype(np.float64), w1.astype(np.float64), 1e-6) if post else h
    total, y = _native.norm_add_norm(x, h, w1 if post else None, w2, 1e-6, pool)
    expected = x.astype(np.float64) + added
    assert (np.abs(total - expected) <= norm_error(dim) * np.abs(added) + 2 * EPS * np.abs(expected)).all()
    normed = ops.rms_norm(total.astype(np.float64), w2.astype(np.float64), 1e-6)
    assert (np.abs(y - normed) <= norm_error(dim) * np.abs(normed)).all()
    if not post:
        assert y.tobytes() == _native.rms_norm(total, w2, 1e-6, pool).tobytes()


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dim", SIZES)
def test_geglu(n: int, dim: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(dim)
    gate, up = floats(rng, n, dim) * np.float32(4), floats(rng, n, dim)
    x, u = gate.astype(np.float64), up.astype(np.float64)
    # Three roundings of the result, and what tanh is off by: its own units in the last place, and five roundings of its
    # argument a, which tanh' passes on. Where a is near −1.5 that shows a coefficient that is off by a millionth.
    a = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    t = np.tanh(a)
    tanh_error = 5.2 * np.spacing(np.abs(t).astype(np.float32)) + 5 * EPS * np.abs(a) * (1 - t * t)
    bound = 1.001 * (0.5 * np.abs(x * u) * tanh_error + 3 * EPS * np.abs(ops.gelu_tanh(x) * u))
    assert (np.abs(_native.geglu(gate, up, pool) - ops.gelu_tanh(x) * u) <= bound).all()


def test_geglu_far_out(pool: ThreadPool) -> None:
    gate = np.array([[-1e30, -100, -20, -0.0, 0, 20, 100, 1e30, np.inf]], np.float32)
    got = _native.geglu(gate, np.ones_like(gate), pool)
    assert got.tolist() == [[0, 0, 0, 0, 0, 20, 100, float(np.float32(1e30)), np.inf]]
    assert np.isnan(_native.geglu(np.full((1, 1), np.nan, np.float32), np.ones((1, 1), np.float32), pool)).all()


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
@pytest.mark.parametrize("dim", SIZES)
def test_softcap(cap: float, dim: int, pool: ThreadPool) -> None:
    x = floats(np.random.default_rng(dim), 3, dim) * np.float32(cap)
    got = x.copy()
    _native.softcap(got, cap, pool)
    expected = ops.softcap(x.astype(np.float64), cap)
    assert (np.abs(got - expected) <= (TANH + 4 * EPS) * np.abs(expected)).all()


def test_tanh_over_the_whole_range(pool: ThreadPool) -> None:
    bits = np.arange(0x00800000, 0x7F800000, 997, dtype=np.uint32)
    x = bits.view(np.float32)[None]
    got = np.concatenate([x, -x])
    _native.softcap(got, 1.0, pool)
    assert (got[0] == -got[1]).all()
    exact = np.tanh(x[0].astype(np.float64))
    assert (np.abs(got[0] - exact) <= TANH * exact).all()
    assert (got[0] <= 1).all()
    assert (got[0][x[0] > 8.1] == 1).all()
    damaged = np.array([[np.nan, np.inf, -np.inf, 0.0]], np.float32)
    _native.softcap(damaged, 2.0, pool)
    np.testing.assert_array_equal(damaged, [[np.nan, 2, -2, 0]])


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("first", [0, 1, 5000, 100_000])
@pytest.mark.parametrize("head_dim", [2, 8, 24, 80, 256])
def test_rope(n: int, first: int, head_dim: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(head_dim)
    for base in (10_000.0, 1_000_000.0, 10_000.0):
        x = floats(rng, n, 3, head_dim)
        got = x.copy()
        _native.rope(got, first, base, pool)
        half = head_dim // 2
        inverse_frequency = (base ** -(np.arange(half) / half)).astype(np.float32)
        angle = np.arange(first, first + n).astype(np.float32)[:, None, None] * inverse_frequency
        cos, sin = np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
        a, b = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
        expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        bound = np.tile(3 * EPS * (np.abs(a) + np.abs(b)), 2)
        assert (np.abs(got - expected) <= bound).all()
        np.testing.assert_allclose(got, ops.rope(x, first, base), atol=1e-5)


def test_pieces_and_threads_do_not_change_a_bit() -> None:
    rng = np.random.default_rng(1)
    x, h, weight = floats(rng, 70, 700), floats(rng, 70, 700), floats(rng, 700)
    one = ThreadPool(1)

    def everything(rows: slice, pool: ThreadPool) -> list[np.ndarray]:
        a, b = x[rows], h[rows]
        capped, turned = a.copy(), a.reshape(-1, 5, 140).copy()
        _native.softcap(capped, 2.0, pool)
        _native.rope(turned, rows.start, 10_000.0, pool)
        pair = _native.norm_add_norm(a, b, weight, weight, 1e-6, pool)
        return [_native.rms_norm(a, weight, 1e-6, pool), *pair, _native.geglu(a, b, pool), capped, turned]

    whole = everything(slice(0, 70), one)
    for threads in (2, 3, 4):
        for mine, expected in zip(everything(slice(0, 70), ThreadPool(threads)), whole, strict=True):
            assert mine.tobytes() == expected.tobytes()
    for start in range(0, 70, 7):
        rows = slice(start, start + 7)
        for mine, expected in zip(everything(rows, one), whole, strict=True):
            assert mine.tobytes() == expected[rows].tobytes()


X, W = np.zeros((3, 8), np.float32), np.zeros(8, np.float32)
READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: _native.rms_norm(X[0], W, 1e-6, p), r"x: found float32 \(8,\), expected float32 \(n, cols\)"),
        (
            lambda p: _native.rms_norm(X, W[:7], 1e-6, p),
            r"weight: found float32 \(7,\), expected float32 \(8,\)",
        ),
        (lambda p: _native.rms_norm(X.T, W[:3], 1e-6, p), "not C-contiguous"),
        (lambda p: _native.rms_norm(X.astype("f8"), W, 1e-6, p), "x: found float64"),
        (lambda p: _native.norm_add_norm(X, X[:2], W, W, 1e-6, p), r"h: found float32 \(2, 8\)"),
        (lambda p: _native.norm_add_norm(X, X, W[:2], W, 1e-6, p), "post_weight: found"),
        (lambda p: _native.geglu(X, X[:, :7].copy(), p), r"up: found float32 \(3, 7\)"),
        (lambda p: _native.softcap(X.copy(), 0.0, p), "cap is not a positive number"),
        (lambda p: _native.rope(np.zeros((1, 2, 3), np.float32), 0, 1e4, p), "head_dim of 3"),
        (lambda p: _native.rope(np.zeros((1, 2, 4), np.float32), -1, 1e4, p), "first_position is -1"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str, pool: ThreadPool) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(pool)


def test_read_only_memory_is_not_written(pool: ThreadPool) -> None:
    with pytest.raises(TypeError):
        _native.softcap(READ_ONLY, 1.0, pool)


@pytest.mark.parametrize("isa", _native.isas())
def test_every_isa(isa: str) -> None:
    """Runs the tests above again in a process of that instruction set."""
    if isa == _native.isa():
        pytest.skip("this process")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "not isa", "-p", "no:cacheprovider", "-x"],
        env=os.environ | {"BEZEL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
