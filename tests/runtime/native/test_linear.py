"""The native matrix products against NumPy, on every instruction set that this machine can run.

Integer dot products are exact, so against the dequantized weights times the quantized activations only float32
roundings may differ; against the activations themselves, half a step of their quantization more. Instruction sets
agree bit for bit: one of them computes what all must give, the others run this file again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from bezel.quant.formats import FORMATS, Format
from bezel.runtime import _native
from bezel.runtime._native import Matrix, ThreadPool, embed, feed_forward, linear
from bezel.runtime.model import ops

EPS = float(np.finfo(np.float32).eps) / 2  # of one rounding
QUANTIZED = [f for f in FORMATS.values() if f.block > 1]
ROWS = [*range(1, 34), 47, 63, 64, 65]


@pytest.fixture(scope="module")
def pool() -> ThreadPool:
    return ThreadPool(2)


def random_bytes(rng: np.random.Generator, fmt: type[Format], rows: int, cols: int) -> np.ndarray:
    """Any codes, with scales of either sign and of ordinary size → uint8 (rows, row_bytes)."""
    blocks = rng.integers(0, 256, (rows * cols // fmt.block, fmt.block_bytes), dtype=np.uint8)
    if fmt.block == 1:
        return fmt.quantize(rng.standard_normal((rows, cols)).astype(np.float32))
    fields = blocks.reshape(-1).view(fmt.layout)
    for name in fmt.layout.names or ():
        if fmt.layout[name] == np.dtype("<f2"):
            fields[name] = rng.standard_normal(len(fields))
    return blocks.reshape(rows, -1)


def matrix(fmt: type[Format], w: np.ndarray) -> Matrix:
    return Matrix(w, fmt.gguf_type, w.shape[1] // fmt.block_bytes * fmt.block)


def column_counts(fmt: type[Format]) -> list[int]:
    """One block to more than a panel of 512, whole units of 256 and not."""
    if fmt.block == 1:
        return [1, 3, 8, 31, 257, 600]
    return [256, 768, 1280] if fmt.block == 256 else [32, 64, 224, 256, 288, 544, 1312]


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, cols) → scales float32 (n, blocks), values int64 (n, blocks, 32); every operation as the kernel's."""
    x = x.reshape(len(x), -1, 32)
    scales = np.abs(x).max(axis=2) / np.float32(127)
    assert scales.dtype == np.float32
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    return scales, np.rint(x * inverse[:, :, None]).astype(np.int64)


def rounding(magnitude: np.ndarray, terms: int) -> np.ndarray:
    """Bound of the float32 roundings of a sum of `terms` terms, whose magnitudes add up to `magnitude`.

    A term has the roundings of the scales, of the products of scales, and of its own product, and then one for each
    addition; a dequantized weight has one or two itself.
    """
    roundings = terms + 8
    return magnitude * roundings * EPS / (1 - roundings * EPS)


def terms(fmt: type[Format], cols: int) -> int:
    """That a row adds up for quantized activations: a sub-block, and its minimum, is one."""
    return cols // (16 if fmt.name in ("q2_k", "q3_k", "q6_k") else 32) * 2


def parts(fmt: type[Format], data: np.ndarray) -> np.ndarray:
    """|d·code| + |m| of every weight, float64: what an affine format adds up, before it cancels."""
    w = np.abs(fmt.dequantize(data).astype(np.float64))
    if "m" in (fmt.layout.names or ()):
        m = np.abs(data.reshape(-1).view(fmt.layout)["m"].astype(np.float64)).reshape(len(data), -1)
        return w + 2 * np.repeat(m, 32, axis=1)
    if "dmin" in (fmt.layout.names or ()):
        m = np.abs(data.reshape(-1).view(fmt.layout)["dmin"].astype(np.float64)).reshape(len(data), -1)
        return w + 2 * np.repeat(m * (15 if fmt.name == "q2_k" else 63), 256, axis=1)
    return w


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 11, 13, 40])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_against_numpy(fmt: type[Format], n: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(n)
    for cols in column_counts(fmt):
        rows = int(rng.choice(ROWS))
        data = random_bytes(rng, fmt, rows, cols)
        w, x = fmt.dequantize(data).astype(np.float64), rng.standard_normal((n, cols)).astype(np.float32)
        (y,) = linear(pool, x, [matrix(fmt, data)])
        assert (y.dtype, y.shape) == (np.float32, (n, rows))
        (exact,) = linear(pool, x, [matrix(fmt, data)], exact=True)
        assert (np.abs(exact - x @ w.T) <= rounding(np.abs(x) @ parts(fmt, data).T, cols)).all()
        if fmt.block == 1:
            assert y.tobytes() == exact.tobytes()
            continue
        scales, values = quantize_activations(x)
        seen = (values * scales[:, :, None].astype(np.float64)).reshape(n, cols)
        slack = rounding(np.abs(seen) @ parts(fmt, data).T, terms(fmt, w.shape[1]))
        assert (np.abs(y - seen @ w.T) <= slack).all()
        half_steps = np.repeat(scales.astype(np.float64) / 2 * (1 + 256 * EPS), 32, axis=1)
        assert (np.abs(y - x @ w.T) <= half_steps @ np.abs(w).T + slack).all()


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_the_bound_would_show_a_wrong_code(fmt: type[Format], pool: ThreadPool) -> None:
    """One code off by one in one row is more than all roundings together."""
    rng = np.random.default_rng(0)
    data = random_bytes(rng, fmt, 16, 256)
    w, x = fmt.dequantize(data).astype(np.float64), rng.standard_normal((1, 256)).astype(np.float32)
    scales, values = quantize_activations(x)
    seen = (values * scales[:, :, None].astype(np.float64)).reshape(1, -1)
    slack = rounding(np.abs(seen) @ parts(fmt, data).T, terms(fmt, w.shape[1]))
    field = next(name for name in fmt.layout.names or () if name.startswith("q"))
    codes = data.view(fmt.layout)[field]
    codes[(slice(None), *(0,) * (codes.ndim - 1))] ^= 1
    (y,) = linear(pool, x, [matrix(fmt, data)])
    assert (np.abs(y - seen @ w.T) > slack).sum() >= 12  # scales close to zero may hide it


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_bits_depend_on_nothing_else(fmt: type[Format], exact: bool) -> None:
    """Not on the number of tokens, on the threads, on the other matrices, nor on where the weights lie."""
    rng = np.random.default_rng(7)
    pools = [ThreadPool(threads) for threads in (1, 2, 3, 4)]
    other = matrix(FORMATS["q4_1"], random_bytes(rng, FORMATS["q4_1"], 5, 768))
    for rows in (1, 15, 16, 33, 160):
        data = random_bytes(rng, fmt, rows, 768)
        memory = np.zeros(data.size + 9, np.uint8)
        x = rng.standard_normal((40, 768)).astype(np.float32)
        (y,) = linear(pools[0], x, [matrix(fmt, data)], exact)
        for t in (0, 17, 39):
            assert linear(pools[1], x[t : t + 1], [matrix(fmt, data)], exact)[0].tobytes() == y[t].tobytes()
        for n in (*range(2, 10), 12, 13, 16, 17, 24, 33):
            offset = n % 9
            moved = memory[offset : offset + data.size].reshape(data.shape)
            moved[:] = data
            moved.flags.writeable = False
            found = linear(pools[n % 4], x[-n:], [other, matrix(fmt, moved), other], exact)[1]
            assert found.tobytes() == y[-n:].tobytes()


def test_many_tokens_and_many_rows(pool: ThreadPool) -> None:
    """More than a block of tokens, and more rows than a work item."""
    rng = np.random.default_rng(3)
    for name in ("q4_0", "q6_k", "f16"):
        data = random_bytes(rng, FORMATS[name], 700, 256)
        x = rng.standard_normal((1100, 256)).astype(np.float32)
        (y,) = linear(pool, x, [matrix(FORMATS[name], data)])
        for t in (0, 511, 512, 549, 550, 1099):
            (one,) = linear(pool, x[t : t + 1], [matrix(FORMATS[name], data)])
            assert one.tobytes() == y[t].tobytes()


def gated(pool: ThreadPool, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gelu_tanh(gate) · up of finite numbers, (n, dim): what a feed-forward makes whose matrices only pass them on."""
    first, second, same = (
        matrix(FORMATS["f32"], np.array(w, "<f4").view(np.uint8)) for w in ([[1, 0]], [[0, 1]], [[1]])
    )
    pairs = np.stack([gate.ravel(), up.ravel()], axis=1)
    return feed_forward(pool, pairs, first, second, same).reshape(gate.shape)


def test_geglu(pool: ThreadPool) -> None:
    rng = np.random.default_rng(7)
    gate, up = (rng.standard_normal((40, 500)).astype(np.float32) for _ in range(2))
    gate *= 4
    x, u = gate.astype(np.float64), up.astype(np.float64)
    # Three roundings of the result, and what tanh is off by: its own units in the last place, and five roundings of its
    # argument a, which tanh' passes on. Where a is near −1.5 that shows a coefficient that is off by a millionth.
    a = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    t = np.tanh(a)
    tanh_error = 5.2 * np.spacing(np.abs(t).astype(np.float32)) + 5 * EPS * np.abs(a) * (1 - t * t)
    bound = 1.001 * (0.5 * np.abs(x * u) * tanh_error + 3 * EPS * np.abs(ops.gelu_tanh(x) * u))
    assert (np.abs(gated(pool, gate, up) - ops.gelu_tanh(x) * u) <= bound).all()
    far = np.array([[-1e30, -100, -20, -0.0, 0, 20, 100, 1e30]], np.float32)
    assert gated(pool, far, np.ones_like(far)).tolist() == [[0, 0, 0, 0, 0, 20, 100, float(np.float32(1e30))]]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_feed_forward_is_its_parts(fmt: type[Format], exact: bool, pool: ThreadPool) -> None:
    """Gate and up in different formats, several items of rows and less than a group, one token to blocks of them."""
    rng = np.random.default_rng(5)
    for width in (19, 45, 700) if fmt.block == 1 else (fmt.block, 3 * 256, 5 * 256 if fmt.block == 256 else 1120):
        gate, up = (matrix(f, random_bytes(rng, f, width, 256)) for f in (fmt, FORMATS["q4_1"]))
        down = matrix(fmt, random_bytes(rng, fmt, 33, width))
        # More tokens than are taken at a time: how these are cut does not depend on the format.
        many = 540 if fmt.name in ("f32", "q4_0", "q6_k") else 60
        for n in (1, 3, 8, 17, 40) if width < 1120 else (1, many):
            x = rng.standard_normal((n, 256)).astype(np.float32) / 4
            (want,) = linear(pool, gated(pool, *linear(pool, x, [gate, up], exact)), [down], exact)
            assert feed_forward(pool, x, gate, up, down, exact).tobytes() == want.tobytes()
    assert feed_forward(pool, x[:0], gate, up, down, exact).shape == (0, 33)


def test_feed_forward_refuses_what_does_not_fit(pool: ThreadPool) -> None:
    gate, down = Matrix(DATA, 8, 64), Matrix(np.zeros((64, 3 * 4), np.uint8), 0, 3)
    assert feed_forward(pool, X, gate, gate, down).shape == (1, 64)
    other = Matrix(DATA[:2], 8, 64)
    for wrong in ((gate, other, down), (other, gate, down), (gate, gate, gate), (down, gate, down)):
        with pytest.raises(ValueError, match=r"sizes do not fit each other"):
            feed_forward(pool, X, *wrong)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_embed(fmt: type[Format]) -> None:
    rng = np.random.default_rng(4)
    data = random_bytes(rng, fmt, 9, 512)
    ids = np.array([0, 8, 3, 3], np.int64)
    expected = fmt.dequantize(data)[ids] * np.float32(1.7)
    assert embed(matrix(fmt, data), ids, np.float32(1.7)).tobytes() == expected.tobytes()
    assert embed(matrix(fmt, data), ids[:0], 1).shape == (0, 512)
    for bad in (-1, 9):
        with pytest.raises(ValueError, match=f"ids: found {bad} at 1, but the matrix has rows 0 to 8"):
            embed(matrix(fmt, data), np.array([0, bad], np.int64), 1)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_float32_activations_see_the_dequantized_weights(fmt: type[Format], pool: ThreadPool) -> None:
    """One product a row is exact."""
    rng = np.random.default_rng(5)
    data = random_bytes(rng, fmt, 20, 256)
    x = np.eye(256, dtype=np.float32)[::5].copy()
    (y,) = linear(pool, x, [matrix(fmt, data)], exact=True)
    np.testing.assert_array_equal(y, fmt.dequantize(data).T[::5])


def test_every_float16_scale(pool: ThreadPool) -> None:
    """One product a row, so the result is exact: subnormals, both zeros, infinities and NaNs included."""
    halves = np.arange(1 << 16, dtype="<u2")
    w = np.zeros((len(halves), 34), np.uint8)
    w[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    w[:, 2] = 1
    x = np.zeros((2, 32), np.float32)
    x[:, 0] = 127
    with np.errstate(invalid="ignore"):
        expected = halves.view("<f2").astype(np.float32) * np.float32(127)
    for n in (1, 2):
        for row in linear(pool, x[:n], [Matrix(w, 8, 32)])[0]:
            np.testing.assert_array_equal(row, expected)


def identity() -> Matrix:
    """One block a row, with a one on the diagonal: the product is x as it was quantized."""
    w = np.zeros((32, 34), np.uint8)
    w[:, :2] = np.array([1], "<f2").view(np.uint8)
    w[range(32), range(2, 34)] = 1
    return Matrix(w, 8, 32)


def quantized(x: np.ndarray, pool: ThreadPool) -> np.ndarray:
    return linear(pool, x[None], [identity()])[0][0]


def test_activations_round_to_the_nearest_even(pool: ThreadPool) -> None:
    x = np.zeros(32, np.float32)
    x[:7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    assert quantized(x, pool)[:7].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_activations_are_multiplied_by_the_inverse_scale(pool: ThreadPool) -> None:
    """Not divided by the scale: next to a tie the two round to different integers."""
    rng = np.random.default_rng(6)
    differ = 0
    for _ in range(50):
        x = (rng.integers(-127, 127, 32) + 0.5).astype(np.float32)
        x[0] = 127
        x *= np.float32(rng.uniform(0.1, 10))
        scales, values = quantize_activations(x[None])
        differ += (np.rint(x / scales[0]) != values[0, 0]).any()
        assert quantized(x, pool).tolist() == (values[0, 0].astype(np.float32) * scales[0]).tolist()
    assert differ > 0


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_damaged_activations_show(bad: float, fmt: type[Format], pool: ThreadPool) -> None:
    w = matrix(fmt, random_bytes(np.random.default_rng(0), fmt, 9, 256))
    for n, position in ((1, 0), (1, 255), (6, 33)):
        x = np.ones((n, 256), np.float32)
        x[n // 2, position] = bad
        (y,) = linear(pool, x, [w])
        assert np.isnan(y[n // 2]).all()
        assert np.isfinite(np.delete(y, n // 2, axis=0)).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1.4e-36, 1.5e-36, 1.6e-36, 1.0, 3e38])
def test_activations_of_any_size(magnitude: float, pool: ThreadPool) -> None:
    """Half a step off at most, and a few roundings; zero where the step would be no normal number."""
    x = np.linspace(-1, 1, 32).astype(np.float32) * np.float32(magnitude)
    y = quantized(x, pool).astype(np.float64)
    step = float(x.max()) / 127
    if step < np.finfo(np.float32).tiny:
        assert not y.any()
    else:
        assert (np.abs(y - x) <= step * (0.5 + 127 * 8 * EPS)).all()


def test_nothing_to_do(pool: ThreadPool) -> None:
    w, none = Matrix(np.zeros((3, 34), np.uint8), 8, 32), Matrix(np.zeros((0, 34), np.uint8), 8, 32)
    x = np.ones((2, 32), np.float32)
    assert linear(pool, x, []) == []
    assert linear(pool, x[:0], [w])[0].shape == (0, 3)
    assert [y.shape for y in linear(pool, x, [none, w, none])] == [(2, 0), (2, 3), (2, 0)]


def test_a_matrix_keeps_its_bytes(pool: ThreadPool) -> None:
    rng = np.random.default_rng(8)
    data = random_bytes(rng, FORMATS["q4_0"], 64, 2304)
    x = rng.standard_normal((1, 2304)).astype(np.float32)
    (expected,) = linear(pool, x, [matrix(FORMATS["q4_0"], data)])
    w = matrix(FORMATS["q4_0"], data.copy())
    for _ in range(20):
        np.full(data.shape, 255, np.uint8)  # would take the place of the copy
    assert linear(pool, x, [w])[0].tobytes() == expected.tobytes()
    assert (w.rows, w.cols) == (64, 2304)


DATA, X = np.zeros((3, 2 * 34), np.uint8), np.zeros((1, 64), np.float32)


@pytest.mark.parametrize(
    ("data", "gguf_type", "cols", "message"),
    [
        (DATA.view(np.int8), 8, 64, r"data: found int8 \(3, 68\), expected uint8 \(rows, row_bytes\)"),
        (DATA[0], 8, 64, r"data: found uint8 \(68,\), expected"),
        (DATA[:, :-1], 8, 64, r"data: uint8 \(3, 67\) is not C-contiguous"),
        (np.asfortranarray(DATA), 8, 64, "data: .* is not C-contiguous"),
        (DATA[:, :34].copy(), 8, 64, "data: found rows of 34 bytes, expected 2 blocks of 34 bytes, 64 weights in q8_0"),
        (DATA[:, :67].copy(), 8, 64, "data: found rows of 67 bytes"),
        (DATA, 8, 65, "cols: found 65, expected a positive multiple of 32, the block of q8_0"),
        (DATA, 8, 0, "cols: found 0"),
        (DATA, 8, -64, "cols: found -64"),
        (DATA, 12, 64, "cols: found 64, expected a positive multiple of 256"),
        (DATA, 0, 1 << 62, "data: found rows of 68 bytes, expected"),
        *((DATA, t, 64, f"gguf_type: found {t}, which no kernel reads") for t in (-1, 4, 24, 31, 1 << 40)),
    ],
)
def test_wrong_matrices_are_refused(data: np.ndarray, gguf_type: int, cols: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matrix(data, gguf_type, cols)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.astype(np.float64), r"x: found float64 \(1, 64\), expected float32 \(n, cols\)"),
        (X.astype(np.complex64), r"x: found another type \(1, 64\)"),
        (X[0], r"x: found float32 \(64,\)"),
        (np.zeros((2, 128), np.float32)[:, ::2], "x: .* is not C-contiguous"),
        (X[:, :32].copy(), r"x: found float32 \(1, 32\), but matrices\[1\] has 64 columns"),
        (np.frombuffer(bytes(257), np.uint8)[1:].view(np.float32)[None], "x: .* is not aligned"),
    ],
)
def test_wrong_activations_are_refused(x: np.ndarray, message: str, pool: ThreadPool) -> None:
    with pytest.raises(ValueError, match=message):
        linear(pool, x, [Matrix(DATA[:, :34].copy(), 8, 32), Matrix(DATA, 8, 64)][x.shape[-1] != 32 :])


def test_what_is_no_matrix_is_refused(pool: ThreadPool) -> None:
    with pytest.raises(TypeError):
        linear(pool, X, [DATA])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        linear(None, X, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrices\[0\] is None"):
        linear(pool, X, [None])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        Matrix([[1]], 8, 32)  # type: ignore[arg-type]


def digest(pool: ThreadPool) -> str:
    """Of the results of every format, at sizes that reach every kernel, in either mode."""
    rng = np.random.default_rng(9)
    sha = hashlib.sha256()
    for fmt in FORMATS.values():
        for rows in ROWS:
            cols = int(rng.choice(column_counts(fmt)))
            w = matrix(fmt, random_bytes(rng, fmt, rows, cols))
            for n in (1, 2, 3, 4, int(rng.integers(5, 41))):
                x = rng.standard_normal((n, cols)).astype(np.float32)
                sha.update(linear(pool, x, [w])[0].tobytes())
                if n > 2:
                    sha.update(linear(pool, x, [w], exact=True)[0].tobytes())
        gate = matrix(fmt, random_bytes(rng, fmt, 256, 256))
        for n in (1, 20):
            x = rng.standard_normal((n, 256)).astype(np.float32)
            sha.update(feed_forward(pool, x, gate, gate, gate).tobytes())
    return sha.hexdigest()


@pytest.mark.skipif("BEZEL_ISA" in os.environ, reason="runs in a process of one instruction set already")
@pytest.mark.parametrize("isa", _native.isas())
def test_every_isa(isa: str, pool: ThreadPool) -> None:
    """The tests of this file in a process of that instruction set, and the same bits as here."""
    env = os.environ | {"BEZEL_ISA": isa}
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout
    ask = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from bezel.runtime import _native\n"
        "from test_linear import digest\n"
        "print(_native.isa(), digest(_native.ThreadPool(3)))"
    )
    result = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, timeout=600)
    assert result.stdout.split() == [isa, digest(pool)], result.stderr
