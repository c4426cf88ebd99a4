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


def test_rms_norm_of_each_head(pool: ThreadPool) -> None:
    rng = np.random.default_rng(2)
    x, weight = floats(rng, 30, 4, 72), floats(rng, 72)
    rows = _native.rms_norm(x.reshape(-1, 72), weight, 1e-6, pool)
    got = _native.rms_norm(x, weight, 1e-6, pool)
    assert got.shape == x.shape
    assert got.tobytes() == rows.tobytes()
    assert _native.rms_norm(x[3, 1], weight, 1e-6, pool).tobytes() == got[3, 1].tobytes()


def test_eps_counts(pool: ThreadPool) -> None:
    x = np.full((1, 64), 1e-3, np.float32)
    expected = ops.rms_norm(x.astype(np.float64), np.ones(64), 1e-6)
    np.testing.assert_allclose(_native.rms_norm(x, np.ones(64, np.float32), 1e-6, pool), expected, rtol=1e-6)


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dim", SIZES)
def test_add_norm(n: int, dim: int, post: bool, pool: ThreadPool) -> None:
    rng = np.random.default_rng(dim)
    x, h, w1, w2 = floats(rng, n, dim), floats(rng, n, dim), floats(rng, dim), floats(rng, dim)
    added = ops.rms_norm(h.astype(np.float64), w1.astype(np.float64), 1e-6) if post else h
    total, y = _native.add_norm(x, h, w1 if post else None, w2, 1e-6, pool)
    expected = x.astype(np.float64) + added
    assert (np.abs(total - expected) <= norm_error(dim) * np.abs(added) + 2 * EPS * np.abs(expected)).all()
    normed = ops.rms_norm(total.astype(np.float64), w2.astype(np.float64), 1e-6)
    assert (np.abs(y - normed) <= norm_error(dim) * np.abs(normed)).all()
    if not post:
        assert y.tobytes() == _native.rms_norm(total, w2, 1e-6, pool).tobytes()


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


def turned(x: np.ndarray, positions: np.ndarray, base: float, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """RoPE with float32 angles, the rest in float64; and a bound of the kernel's three roundings."""
    half = x.shape[-1] // 2
    frequency = (base ** -(np.arange(half) / half)).astype(np.float32) / np.float32(factor)
    angle = (positions.astype(np.float32)[:, None, None] * frequency).astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    bound = np.tile(3 * EPS * (np.abs(a) + np.abs(b)), 2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1), bound


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("first", [0, 1, 5000, 100_000])
@pytest.mark.parametrize("head_dim", [2, 8, 24, 80, 256])
def test_rope(n: int, first: int, head_dim: int, pool: ThreadPool) -> None:
    """In turn for frequencies, factors and positions that differ in one thing each: no angle is another's."""
    rng = np.random.default_rng(head_dim)
    run = np.arange(first, first + n)
    for positions in (run, np.r_[run[:1], run[1:] + 7], run, run + 1, run[:-1], rng.integers(0, 100_000, n), run):
        for base, factor in ((10_000.0, 1.0), (1_000_000.0, 1.0), (1_000_000.0, 8.0), (10_000.0, 1.0)):
            x = floats(rng, len(positions), 3, head_dim)
            got = x.copy()
            _native.rope(got, positions, base, factor, pool)
            expected, bound = turned(x, positions, base, factor)
            assert (np.abs(got - expected) <= bound).all()
    x = floats(rng, n, 3, head_dim)
    got = x.copy()
    _native.rope(got, run, 10_000.0, 1.0, pool)
    np.testing.assert_allclose(got, ops.rope(x, run, 10_000.0, 1.0), atol=1e-5)


def test_pieces_and_threads_do_not_change_a_bit() -> None:
    rng = np.random.default_rng(1)
    x, h, weight = floats(rng, 70, 700), floats(rng, 70, 700), floats(rng, 700)
    positions = rng.integers(0, 10_000, 70)
    one = ThreadPool(1)

    def everything(rows: slice, pool: ThreadPool) -> list[np.ndarray]:
        a, b = x[rows], h[rows]
        capped, rotated = a.copy(), a.reshape(-1, 5, 140).copy()
        _native.softcap(capped, 2.0, pool)
        _native.rope(rotated, positions[rows], 10_000.0, 8.0, pool)
        pair = _native.add_norm(a, b, weight, weight, 1e-6, pool)
        return [_native.rms_norm(a, weight, 1e-6, pool), *pair, capped, rotated]

    whole = everything(slice(0, 70), one)
    for threads in (2, 3, 4):
        for mine, expected in zip(everything(slice(0, 70), ThreadPool(threads)), whole, strict=True):
            assert mine.tobytes() == expected.tobytes()
    for start in range(0, 70, 7):
        rows = slice(start, start + 7)
        for mine, expected in zip(everything(rows, one), whole, strict=True):
            assert mine.tobytes() == expected[rows].tobytes()


X, W = np.zeros((3, 8), np.float32), np.zeros(8, np.float32)
AT = np.zeros(3, np.int64)
READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: _native.rms_norm(W[0:1].reshape(()), W, 1e-6, p), "x: found a single number, expected rows"),
        (
            lambda p: _native.rms_norm(X, W[:7], 1e-6, p),
            r"weight: found float32 \(7,\), expected float32 \(8,\)",
        ),
        (lambda p: _native.rms_norm(X.T, W[:3], 1e-6, p), "not C-contiguous"),
        (lambda p: _native.rms_norm(X.astype("f8"), W, 1e-6, p), "x: found float64"),
        (lambda p: _native.add_norm(X, X[:2], W, W, 1e-6, p), r"h: found float32 \(2, 8\)"),
        (lambda p: _native.add_norm(X, X, W[:2], W, 1e-6, p), "post_weight: found"),
        (lambda p: _native.softcap(X.copy(), 0.0, p), "cap is not a positive number"),
        (lambda p: _native.rope(np.zeros((1, 2, 3), np.float32), AT[:1], 1e4, 1.0, p), "head_dim of 3"),
        (lambda p: _native.rope(np.zeros((2, 2, 4), np.float32), AT, 1e4, 1.0, p), r"positions: .* \(2,\)"),
        (lambda p: _native.rope(np.zeros((3, 2, 4), np.float32), AT - 1, 1e4, 1.0, p), "positions: found -1 at 0"),
        (lambda p: _native.rope(np.zeros((3, 2, 4), np.float32), AT, 1e4, 0.0, p), "factor is not a positive number"),
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


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dim", SIZES)
def test_layer_norm(n: int, dim: int, pool: ThreadPool) -> None:
    """The centre is off by what its sum is, which counts beside the spread: the mean here is five times that."""
    rng = np.random.default_rng(dim)
    x, weight, bias = floats(rng, n, dim) + np.float32(5), floats(rng, dim), floats(rng, dim)
    expected = ops.layer_norm(x.astype(np.float64), weight.astype(np.float64), bias.astype(np.float64), 1e-6)
    got = _native.layer_norm(x, weight, bias, 1e-6, pool)
    spread = np.maximum(x.astype(np.float64).std(axis=1, keepdims=True), 1e-3)
    off_center = (dim / 64 + 8) * EPS * 6 / spread * np.abs(weight)
    bound = norm_error(dim) * np.abs(expected - bias) + 2 * EPS * np.abs(expected) + off_center
    assert (np.abs(got - expected) <= bound).all()
    if dim > 1:
        assert np.abs(got - _native.rms_norm(x, weight, 1e-6, pool)).max() > 0.1  # it is another norm


@pytest.mark.parametrize("dim", SIZES)
def test_bias_gelu(dim: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(dim)
    x, bias = floats(rng, 3, dim) * np.float32(3), floats(rng, dim)
    summed = (x + bias).astype(np.float64)
    got = x.copy()
    _native.bias_gelu(got, bias, pool)
    assert (np.abs(got - ops.gelu_tanh(summed)) <= np.abs(summed) * (TANH + 8 * EPS) + 1e-7).all()


def test_norms_of_the_tower_refuse_what_does_not_fit(pool: ThreadPool) -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="weight"):
        _native.layer_norm(x, np.zeros(7, np.float32), np.zeros(8, np.float32), 1e-6, pool)
    with pytest.raises(ValueError, match="bias"):
        _native.bias_gelu(x, np.zeros(9, np.float32), pool)
