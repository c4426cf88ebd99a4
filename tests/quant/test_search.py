"""The scale search: never worse than plain quantizing, and close to trying every scale there is."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from bezel.quant.formats import FORMATS, Format
from bezel.quant.search import AffineSums, search_affine
from test_formats import BLOCK, MATRICES, gguf_dequantize, random_blocks, rng

ONE_SCALE = [f for f in BLOCK if [n for n in f.layout.names if not n.startswith("q")] == ["d"]]


def importances(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    r = rng()
    return {
        "ones": np.ones(1, np.float32),
        "channels": np.exp(r.standard_normal(shape[-1])).astype(np.float32),
        "weights of their own": np.exp(3 * r.standard_normal(shape)).astype(np.float32),
        "mostly zero": (r.random(shape) < 0.1).astype(np.float32),
        "zero": np.zeros(1, np.float32),
    }


def weighted_error(f: type[Format], x: np.ndarray, w: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Of each block, in float64, of what gguf reads."""
    off = np.square(gguf_dequantize(f, data).astype(np.float64) - x) * w
    return off.reshape(-1, f.block).sum(axis=1)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_search_is_never_worse_than_plain(f, kind):
    """In any block, but for the rounding of float32 sums of up to 256 squares."""
    x = MATRICES[kind]
    for name, w in importances(x.shape).items():
        plain = weighted_error(f, x, w, f.quantize(x))
        found = weighted_error(f, x, w, f.quantize(x, w))
        assert (found <= plain * (1 + 1e-5) + 1e-45).all(), name


# What the search takes off plain rounding's squared error, for Gaussian weights of equal importance.
@pytest.mark.parametrize(
    ("name", "gain"),
    [
        *(("q4_0", 0.11), ("q4_1", 0.16), ("q5_0", 0.115), ("q5_1", 0.14), ("q8_0", 0.13), ("q4_k", 0.175)),
        *(("q5_k", 0.12), ("q6_k", 0.165), ("iq4_nl", 0.15), ("iq4_xs", 0.14), ("q2_k", 0.35), ("q3_k", 0.14)),
    ],
)
def test_search_gains_on_gaussian_weights(name, gain):
    f, x = FORMATS[name], rng().standard_normal((128, 2304)).astype(np.float32)
    w = np.ones(1, np.float32)
    plain, found = (weighted_error(f, x, w, data).sum() for data in (f.quantize(x), f.quantize(x, w)))
    assert found <= (1 - gain) * plain


@pytest.mark.parametrize("name", ["q2_k", "q3_k"])
def test_search_is_better_than_llama_cpp_s(name):
    """With the same importance and without any; llama.cpp then makes one up, and each is asked for its own error."""
    llama_cpp = pytest.importorskip("llama_cpp.llama_cpp")
    quantize = llama_cpp._lib.ggml_quantize_chunk
    pointers = (ctypes.c_void_p, ctypes.c_void_p)
    quantize.argtypes = [ctypes.c_int, *pointers, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    f, x = FORMATS[name], rng().standard_normal((64, 2304)).astype(np.float32)
    uneven = np.exp(rng().standard_normal(2304)).astype(np.float32)
    for w, given in ((np.ones(1, np.float32), None), (uneven, uneven)):
        theirs = np.empty((len(x), f.row_bytes(2304)), np.uint8)
        importance = None if given is None else given.ctypes.data
        quantize(f.gguf_type, x.ctypes.data, theirs.ctypes.data, 0, *x.shape, importance)
        found, want = (weighted_error(f, x, w, data).sum() for data in (f.quantize(x, w), theirs))
        assert 0.7 * want < found < 0.995 * want


@pytest.mark.parametrize("f", ONE_SCALE, ids=lambda f: f.name)
def test_search_is_close_to_trying_every_scale(f):
    """All finite float16 scales, each with its nearest codes, on Gaussian blocks of even and uneven importance."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = np.zeros(np.isfinite(halves).sum(), f.layout)
    every["d"] = halves[np.isfinite(halves)]
    scale, _ = f.steps(every)
    values = np.sort(f.codebook)
    best = found = plain = 0.0
    for i in range(20):
        x = (rng().spawn(20)[i].standard_normal((1, f.block)) * 0.02).astype(np.float32)
        w = np.exp(np.arange(f.block) % 5 * (i % 2) / 2, dtype=np.float32)[None]
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.searchsorted((values[1:] + values[:-1]) / 2, np.nan_to_num(x / scale))
        errors = (np.square(values[at] * scale.astype(np.float64) - x) * w).sum(axis=1)
        best += errors.min()
        found += weighted_error(f, x, w, f.quantize(x, w)).sum()
        plain += weighted_error(f, x, w, f.quantize(x)).sum()
    assert best <= found * (1 + 1e-6)
    assert found - best <= {"q8_0": 0.65, "q5_0": 0.15}.get(f.name, 0.08) * (plain - best)


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_what_a_format_can_hold_exactly_stays_exact(f):
    """Values that were quantized once are found again to a few float16 roundings of their scales."""
    x = f.dequantize(random_blocks(f)[:16])
    again = f.dequantize(f.quantize(x, np.ones(1, np.float32)))
    assert np.linalg.norm(again - x) <= 0.1 * f.tolerance * np.linalg.norm(x) + np.linalg.norm(
        f.dequantize(f.quantize(x)) - x
    )


def test_importance_moves_error_to_where_it_matters_least():
    x = rng().standard_normal((64, 768)).astype(np.float32)
    w = np.where(np.arange(768) % 2, 100, 1).astype(np.float32)
    for f in BLOCK:
        even, uneven = (np.square(f.dequantize(f.quantize(x, v)) - x) for v in (np.ones(1, np.float32), w))
        assert uneven[:, 1::2].sum() < even[:, 1::2].sum()


def test_the_scale_of_importance_does_not_matter():
    x, w = MATRICES["tails"], importances((24, 768))["channels"]
    for f in BLOCK:
        data = f.quantize(x, w)
        for factor in (2.0**-100, 2.0**100):
            assert np.array_equal(f.quantize(x, w * np.float32(factor)), data)


def test_affine_scale_and_offset_are_those_of_least_squares():
    """Against numpy.linalg.lstsq for the codes that were chosen."""
    x, w = np.exp(rng().standard_normal((2, 50, 32))).astype(np.float32)
    x /= np.abs(x).max(axis=1, keepdims=True)
    q = np.rint((x - x.min(axis=1, keepdims=True)) * 7).clip(0, 15)
    sums = AffineSums(x, w)
    sums.take(q)
    scale, offset = sums.best(signed=True)
    errors = (w * np.square(x, dtype=np.float64)).sum(axis=1) - sums.gain(scale, offset)
    for i in range(50):
        root = np.sqrt(w[i].astype(np.float64))
        columns = np.stack([q[i], np.ones(32)], axis=1) * root[:, None]
        expected, residual, *_ = np.linalg.lstsq(columns, x[i] * root, rcond=None)
        np.testing.assert_allclose([scale[i], offset[i]], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(errors[i], residual[0], rtol=2e-3)


def test_an_offset_that_must_not_be_positive_is_not():
    x = np.abs(rng().standard_normal((20, 32))).astype(np.float32) + 1
    _, offset = search_affine(x / x.max(), np.ones_like(x), 15, (15.0,), signed=False)
    assert (offset <= 0).all()
