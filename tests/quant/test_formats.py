"""Formats against the `gguf` package, byte for byte and bit for bit, and against properties of rounding.

Every test walks the registry. What a format can be asked is read from its layout: fields that start with "q"
hold codes, and a format with the single other field "d" has one scale a block.
"""

from __future__ import annotations

import itertools
import math

import gguf
import numpy as np
import pytest
from bezel.quant import base
from bezel.quant.formats import FORMAT_OF_TYPE, FORMATS, Format
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = list(FORMATS.values())
FLOAT = [f for f in ALL if f.block == 1]
BLOCK = [f for f in ALL if f.block > 1]


def codes(f: type[Format]) -> list[str]:
    return [name for name in f.layout.names or () if name.startswith("q")]


def has_one_scale(f: type[Format]) -> bool:
    return f.block == 1 or [name for name in f.layout.names if name not in codes(f)] == ["d"]


def gguf_quantizes(f: type[Format]) -> bool:
    try:
        gguf_quantize(f, np.ones((1, f.block), np.float32))
    except NotImplementedError:
        return False
    return True


def gguf_quantize(f: type[Format], x: np.ndarray) -> np.ndarray:
    # gguf wants at least a full block in its rows of floats as well, and returns floats for float formats
    return gguf.quants.quantize(x, GGMLQuantizationType(f.gguf_type)).view(np.uint8)


def gguf_dequantize(f: type[Format], data: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(data, GGMLQuantizationType(f.gguf_type))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def relative_error(f: type[Format], x: np.ndarray) -> float:
    return float(np.linalg.norm(x - f.dequantize(f.quantize(x))) / np.linalg.norm(x))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def matrices() -> dict[str, np.ndarray]:
    """Rows of 768 that together meet every branch of a quantizer."""
    r = rng()
    gaussian = r.standard_normal((24, 768)).astype(np.float32)
    return {
        "weights": gaussian * np.float32(0.02),
        "tails": r.standard_t(2, gaussian.shape).astype(np.float32),
        # few values: peaks of both signs tie, and halves between two codes occur
        "ties": r.integers(-16, 17, gaussian.shape).astype(np.float32) / 8,
        "halves": r.integers(-254, 255, gaussian.shape).astype(np.float32) / 2,
        "positive": np.abs(gaussian),
        "negative": -np.abs(gaussian) - 3,
        "constant": np.full((4, 768), -0.37, np.float32),
        "zero": np.zeros((4, 768), np.float32) * np.float32(-1) ** np.arange(768, dtype=np.float32),
        "sparse": gaussian * (r.random(gaussian.shape) < 0.02),
        "mixed scales": gaussian * 10.0 ** r.integers(-9, 4, (24, 1)).astype(np.float32),
        "mixed scales in a row": gaussian
        * 10.0 ** np.repeat(r.integers(-9, 4, (24, 48)), 16, axis=1).astype(np.float32),
        "subnormal float16 scales": gaussian * np.float32(1e-6),
        "tiny": gaussian * np.float32(1e-37),
        "large": gaussian * np.float32(10000),
    }


MATRICES = {name: x.astype(np.float32) for name, x in matrices().items()}


def random_blocks(f: type[Format]) -> np.ndarray:
    """Random bytes with float16 scales that are finite, in rows of three blocks."""
    data = rng().integers(0, 256, (64, 3 * f.block_bytes * (1 if f.block > 1 else 256)), np.uint8)
    blocks = data.view(f.layout)
    if f.block == 1:
        floats = f.dequantize(data)
        blocks[~np.isfinite(floats)] = 0
        return data
    for name in f.layout.names:
        if f.layout[name] == np.dtype("<f2"):
            blocks[name] = rng().standard_normal(blocks.shape)
    return data


# Layout and registry


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_ids_names_and_sizes_are_ggml_s(f):
    theirs = GGMLQuantizationType(f.gguf_type)
    assert f.name == theirs.name.lower()
    assert (f.block, f.block_bytes) == GGML_QUANT_SIZES[theirs]
    assert FORMATS[f.name] is f
    assert FORMAT_OF_TYPE[f.gguf_type] is f
    mostly = LlamaFileType(f.file_type).name
    assert mostly.split("_", 1)[1].removesuffix("_S").lower() == f.name  # ALL_F32, MOSTLY_F16, MOSTLY_Q4_K_S


def test_the_registry_holds_every_format_that_is_promised():
    names = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs"
    assert set(names.split()) == set(FORMATS)
    assert len(FORMATS) == len(FORMAT_OF_TYPE)


# Against gguf


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("f", [f for f in ALL if gguf_quantizes(f)], ids=lambda f: f.name)
def test_quantize_gives_gguf_s_bytes(f, kind):
    x = MATRICES[kind]
    ours = f.quantize(x)
    with np.errstate(all="ignore"):
        theirs = gguf_quantize(f, x)
    if kind in ("tiny", "mixed scales in a row", "mixed scales"):
        theirs, ours = without_infinite_inverses(f, x, theirs), without_infinite_inverses(f, x, ours)
    assert np.array_equal(ours, theirs)


def without_infinite_inverses(f: type[Format], x: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Leaves out blocks so small that gguf's 1 / scale overflows and its codes are undefined."""
    largest = np.abs(x.reshape(-1, f.block)).max(axis=1)
    return data.reshape(-1, f.block_bytes)[(largest == 0) | (largest > 1e-36)]


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_dequantize_gives_gguf_s_bits_on_random_bytes(f):
    data = random_blocks(f)
    assert same_bits(f.dequantize(data), gguf_dequantize(f, data))


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_dequantize_gives_gguf_s_bits_on_quantized_weights(f, kind):
    data = f.quantize(MATRICES[kind])
    assert same_bits(f.dequantize(data), gguf_dequantize(f, data))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_dequantized_as_gguf_does(data):
    f = data.draw(st.sampled_from(ALL))
    size = f.block_bytes * (1 if f.block > 1 else 32)
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    x = f.dequantize(raw)
    with np.errstate(all="ignore"):
        assert np.array_equal(x, gguf_dequantize(f, raw[None])[0], equal_nan=True)
    assert x.dtype == np.float32


# How well weights are rounded


def grids(f: type[Format], data: np.ndarray) -> np.ndarray:
    """Every value that a weight could take with its block's scales as they are: (values, blocks, weights)."""
    blocks = np.repeat(data.reshape(1, -1), 256, axis=0).view(f.layout)
    # all bytes where the codes are one field; where they are two, bytes that give every nibble, pair and bit
    fields = codes(f)
    fills = range(256) if len(fields) == 1 else range(0, 256, 17)
    for i, byte in enumerate(itertools.product(fills, repeat=len(fields))):
        for field, value in zip(fields, byte, strict=True):
            blocks[i][field] = np.uint8(value).astype(f.layout[field].base)
    return f.dequantize(blocks.view(np.uint8)).reshape(256, -1, f.block)


@st.composite
def some_blocks(draw) -> tuple[type[Format], np.ndarray]:
    """Two blocks of weights of one scale or of many, centred or not."""
    f = draw(st.sampled_from(BLOCK))
    r = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = r.standard_t(draw(st.sampled_from([2, 4, 100])), (2, f.block)) + draw(st.sampled_from([0, 0, -3, 3]))
    spread = draw(st.sampled_from([0, 1, 3]))
    x *= 10.0 ** -np.repeat(r.uniform(0, spread, (2, f.block // 16)), 16, axis=1)
    x *= draw(st.sampled_from([1, 100, 4000])) / np.abs(x).max()
    return f, x.astype(np.float32)


@given(some_blocks())
@settings(max_examples=150, deadline=None)
def test_every_weight_becomes_the_nearest_value_that_its_scales_allow(case):
    """Up to the rounding of a scale to float16, 2⁻¹¹ of the value on both sides, after codes were chosen.

    Where a float16 minimum m is added to code · scale, each is rounded: |m| is the largest weight at most, and the
    other, which reaches from the smallest weight to the largest, twice that.
    """
    f, x = case
    data = f.quantize(x)
    nearest = np.abs(grids(f, data) - x).min(axis=0)
    largest, reach = np.abs(x).max(axis=1, keepdims=True), 3 if "m" in f.layout.names else 1
    assert (np.abs(f.dequantize(data) - x) <= nearest + 2.0**-10 * reach * largest + 2.0**-20).all()


@given(some_blocks())
@settings(max_examples=150, deadline=None)
def test_scales_are_as_fine_as_the_weights_allow_and_reach_them(case):
    """The step is at most 2·max|w| / (codes − 1), and no weight is more than a step out of the codes' reach.

    The slack of 1/64 is what rounding costs: an 8-bit scale of −128 that has to be +127, or half of a 6-bit
    scale or minimum; the constant is the smallest float16 at the largest sub-scale.
    """
    f, x = case
    values = grids(f, f.quantize(x))
    low, high = values.min(axis=0), values.max(axis=0)
    count = max(len(np.unique(values[:, b, w])) for b in range(values.shape[1]) for w in range(0, f.block, 16))
    step = (high - low) / (count - 1)
    allowed = 2 * np.abs(x).max(axis=1, keepdims=True) / (count - 1)
    allowed = allowed * (1 + 1 / 64) + 2.0**-24 * 128
    assert (step <= allowed).all()
    assert (x <= high + allowed).all()
    assert (x >= low - allowed).all()


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_tolerance_holds_for_believable_weights_and_not_much_more(f):
    gaussian = rng().standard_normal((64, 2304)).astype(np.float32) * np.float32(0.02)
    laplacian = rng().laplace(size=(64, 2304)).astype(np.float32) * np.float32(0.02)
    error = relative_error(f, gaussian)
    assert error <= relative_error(f, laplacian) * 1.01
    assert relative_error(f, laplacian) <= f.tolerance
    if f.block == 1:
        assert error >= f.tolerance / 3  # half a unit in the last place is the bound, not the mean
    else:
        assert f.tolerance / 1.6 <= error <= f.tolerance / 1.4


@pytest.mark.parametrize("f", [f for f in ALL if f.span], ids=lambda f: f.name)
@pytest.mark.parametrize("freedom", [2.5, 5, 100])
def test_tolerance_grows_with_the_tails(f, freedom):
    x = rng().standard_t(freedom, size=(640, 2304)).astype(np.float32)
    span = math.sqrt(f.span.energy(x) / np.square(x).sum(dtype=np.float64))
    assert f.tolerance_of(span) / 2.5 <= relative_error(f, x) <= f.tolerance_of(span)
    if freedom == 100:
        assert f.tolerance_of(span) == pytest.approx(f.tolerance, rel=0.02)


@given(st.lists(st.floats(-65504, 65504, width=32).filter(lambda v: v == 0 or abs(v) >= 2.0**-14), min_size=1))
def test_floats_are_rounded_by_half_a_unit_at_most(values):
    x = np.array(values, np.float32)
    for f in FLOAT:
        assert (np.abs(f.dequantize(f.quantize(x)) - x) <= f.tolerance * np.abs(x)).all()


@given(some_blocks())
@settings(max_examples=100, deadline=None)
def test_quantizing_again_changes_nothing_where_a_block_has_one_scale(case):
    f, x = case
    once = f.dequantize(f.quantize(x))
    twice = f.dequantize(f.quantize(once))
    if has_one_scale(f):
        assert np.array_equal(once, twice)
    else:  # sub-scales may be rounded once more, but never by more than the first time
        assert np.linalg.norm(twice - once) <= np.linalg.norm(once - x) + 2.0**-10 * np.abs(x).max()


@pytest.mark.parametrize("f", FLOAT, ids=lambda f: f.name)
def test_quantizing_floats_again_gives_the_same_bytes(f):
    for x in MATRICES.values():
        data = f.quantize(x)
        assert np.array_equal(f.quantize(f.dequantize(data)), data)


# Edges


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_zero_stays_zero_beside_weights(f):
    x = np.zeros((2, 512), np.float32)
    assert not f.dequantize(f.quantize(x)).any()
    x[1, 256:] = MATRICES["weights"][0, :256]
    assert not f.dequantize(f.quantize(x))[:, :256].any()
    assert relative_error(f, x[1:]) <= f.tolerance


@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -0.37, 40.0, -40.0])
@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_a_constant_block_is_all_but_exact(f, value):
    """Every weight is the extreme that sets the scale: only the scale's rounding to float16 is left."""
    x = np.full(f.block, value, np.float32)
    assert np.abs(f.dequantize(f.quantize(x)) - x).max() <= abs(value) * 2.0**-10


@pytest.mark.parametrize("scale", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-20, 1e-38, 1e-44])
@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_scales_below_float16_lose_precision_and_nothing_worse(f, scale):
    """Beyond the format's own error, half of float16's finest spacing, 2⁻²⁵, for each of up to 128 codes."""
    x = MATRICES["weights"] / np.float32(0.02)
    own = np.abs(f.dequantize(f.quantize(x)) - x).max()
    small = x * np.float32(scale)
    back = f.dequantize(f.quantize(small))
    assert np.abs(back - small).max() <= 1.5 * own * scale + 2.0**-25 * 128


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_the_largest_weights_survive_and_larger_ones_are_named(f):
    x = np.resize(np.array([1, -1], np.float32), 256) * np.float32(f.largest)
    for signed in (x, np.abs(x), -np.abs(x)):
        back = f.dequantize(f.quantize(signed)).astype(np.float64)
        coarsest = 4 if f.name == "q3_k" else 7  # which has no code for +4, as Q4_0 has none for +8
        assert (np.abs(back - signed) <= f.largest / coarsest).all()
    if f.largest < np.finfo(np.float32).max:
        x[17] = np.nextafter(np.float32(f.largest), np.float32(np.inf))
        with pytest.raises(ValueError, match=f"{f.name}: the largest weight is {x[17]:.9g}".replace("+", r"\+")):
            f.quantize(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_weights_that_are_not_finite_are_refused(f, bad):
    x = np.ones((3, 512), np.float32)
    x[2, 300] = bad
    with pytest.raises(ValueError, match=f"{f.name}: .*finite"):
        f.quantize(x)


def test_float16_overflow_is_an_error_and_the_message_says_by_what():
    assert FORMATS["f16"].dequantize(FORMATS["f16"].quantize(np.array([65504.0], np.float32)))[0] == 65504
    with pytest.raises(ValueError, match=r"f16: the largest weight is 65505, .*at most 65504"):
        FORMATS["f16"].quantize(np.array([1.0, -65505.0], np.float32))


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_shapes_are_kept_and_broken_rows_refused(f):
    x = np.resize(MATRICES["weights"], (2, 3, 512))
    data = f.quantize(x)
    assert data.shape == (2, 3, f.row_bytes(512))
    assert data.dtype == np.uint8
    assert f.dequantize(data).shape == x.shape
    assert f.quantize(np.empty((0, 512), np.float32)).shape == (0, f.row_bytes(512))
    assert f.dequantize(np.empty((0, f.row_bytes(512)), np.uint8)).shape == (0, 512)

    transposed = np.ascontiguousarray(x[0].T).T
    assert np.array_equal(f.quantize(transposed), data[0])
    assert same_bits(f.dequantize(data[:, 1]), f.dequantize(data)[:, 1])

    if f.block > 1:
        for call in (f.row_bytes, lambda n: f.quantize(np.ones((2, n), np.float32))):
            with pytest.raises(ValueError, match=f"{f.name}: .*{f.block + 1}.*{f.block}"):
                call(f.block + 1)
    if f.block_bytes > 1:
        with pytest.raises(ValueError, match=f"{f.name}: .*{f.block_bytes + 1}.*{f.block_bytes}"):
            f.dequantize(np.ones((2, f.block_bytes + 1), np.uint8))
    with pytest.raises(TypeError, match=f"{f.name}: .*float32.*float64"):
        f.quantize(x.astype(np.float64))
    with pytest.raises(TypeError, match=f"{f.name}: .*uint8.*int8"):
        f.dequantize(data.view(np.int8))


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
def test_the_pieces_that_work_is_cut_into_do_not_show(f, monkeypatch):
    x = MATRICES["mixed scales"]
    data = f.quantize(x)
    values = f.dequantize(data)
    monkeypatch.setattr(base, "PIECE", 512)
    assert np.array_equal(f.quantize(x), data)
    assert same_bits(f.dequantize(data), values)


# Codes and steps


def random_fit(f: type[Format]) -> np.ndarray:
    """Blocks with the scales of many magnitudes and signs."""
    x = np.concatenate([MATRICES[name].reshape(-1, f.block) for name in ("weights", "tails", "mixed scales in a row")])
    return f.fit(x, None)


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_a_weight_is_scale_times_codebook_plus_offset(f):
    """Every code of every weight, put into blocks and read by gguf."""
    blocks = random_fit(f)
    scale, offset = f.steps(blocks)
    assert (scale.dtype, offset.dtype, f.codebook.dtype) == (np.float32,) * 3
    assert (np.diff(f.codebook) > 0).all()
    codes = rng().integers(0, len(f.codebook), (len(blocks), f.block), np.uint8)
    before = {name: blocks[name].copy() for name in f.layout.names if not name.startswith("q")}
    f.put_codes(codes, blocks)
    assert all(np.array_equal(blocks[name], value) for name, value in before.items())
    values = gguf_dequantize(f, blocks.view(np.uint8).reshape(-1, f.block_bytes))
    assert np.array_equal(values, scale * f.codebook[codes] + offset)


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_fit_leaves_codes_of_zero_and_plain_scales(f):
    x = MATRICES["tails"].reshape(-1, f.block)
    blocks, plain = f.fit(x, None), f.quantize(x).view(f.layout)[:, 0]
    for name in f.layout.names:
        assert np.array_equal(blocks[name], 0 * plain[name] if name.startswith("q") else plain[name])


@pytest.mark.parametrize("f", BLOCK, ids=lambda f: f.name)
def test_values_become_the_nearest_of_the_codebook(f):
    low, high = f.codebook[0], f.codebook[-1]
    values = np.linspace(low - 3, high + 3, 40001, dtype=np.float32)
    values = np.append(values, np.float32([-1e30, 1e30, -0.0]))
    found = np.abs(f.codebook[f.round(values)] - values)
    assert np.array_equal(found, np.abs(f.codebook[:, None] - values).min(axis=0))


@pytest.mark.parametrize(
    ("name", "largest"), [("q2_k", 15), ("q3_k", 32), ("q4_k", 63), ("q5_k", 63), ("q6_k", 128), ("iq4_xs", 32)]
)
def test_scales_of_sub_blocks_are_stored_as_the_integers_that_they_are(name, largest):
    """Constant sub-blocks whose magnitudes are whole numbers: only the super-scale is rounded, up, by ≤ 2⁻¹⁰."""
    f = FORMATS[name]
    size = 16 if name in ("q2_k", "q3_k", "q6_k") else 32
    whole = rng().integers(0, largest + 1, (100, 256 // size))
    whole[np.arange(100), rng().integers(0, 256 // size, 100)] = largest
    x = np.repeat(whole, size, axis=1).astype(np.float32) * np.float32(0.0123)
    back = f.dequantize(f.quantize(x))
    assert (np.abs(back - x) <= x * 2.0**-10).all()
