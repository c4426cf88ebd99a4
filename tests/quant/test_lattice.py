"""Weights as quantization-aware training leaves them: a lattice of 16 values a block, mostly rounded to bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
from bezel.quant import lattice
from bezel.quant.formats import EVEN, IQ4_NL, Q4_0
from tiny import bf16


def trained(top: float, clip: float = 1.0, *, bf16_steps: bool = True, n: int = 512, scale: float = 0.03) -> np.ndarray:
    """(n, 256) weights whose block's largest, clipped, is `top` steps; or −8, whatever its sign, for a `top` of −8."""
    x = np.random.default_rng(7).normal(0, scale, (n * 8, 32))
    peak = np.abs(x).max(axis=1, keepdims=True)
    if top < 0:
        peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    step = bf16(peak * clip / top) if bf16_steps else (peak * clip / top).astype(np.float32)
    return bf16(np.clip(np.rint(x / step), -8, 7) * step).reshape(n, 256)


@pytest.mark.parametrize("scale", [0.03, 30.0, 0.001])
@pytest.mark.parametrize(
    ("top", "clip"), [(7, 1), (7.5, 1), (8, 1), (-8, 1), (7, 0.8), (7.5, 0.6), (6.4, 1), (5, 1), (3, 1)]
)
def test_lattices_come_back_to_the_bit(top: float, clip: float, scale: float) -> None:
    rows = trained(top, clip, scale=scale)
    data = Q4_0.quantize(rows, EVEN)
    np.testing.assert_array_equal(bf16(Q4_0.dequantize(data)), rows)
    assert lattice.equal(Q4_0, rows, data) == rows.size
    np.testing.assert_array_equal(lattice.quantized(Q4_0, rows), data)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("scale", "top"), [(0.03, 7), (0.03, 7.5), (3000.0, 8), (1e-5, 7), (1e-4, 3)])
def test_lattices_in_float16_and_float32(scale: float, top: float, dtype: type) -> None:
    """Also where float16 is subnormal."""
    x = np.random.default_rng(7).normal(0, scale, (4096, 32))
    step = (np.abs(x).max(axis=1, keepdims=True) / top).astype(np.float16).astype(np.float32)
    rows = (
        (np.clip(np.rint(x / step), -8, 7).astype(np.float32) * step).reshape(-1, 256).astype(dtype).astype(np.float32)
    )
    data = Q4_0.quantize(rows, EVEN)
    np.testing.assert_array_equal(Q4_0.dequantize(data).astype(dtype), rows)
    assert lattice.equal(Q4_0, rows, data) == rows.size
    np.testing.assert_array_equal(lattice.quantized(Q4_0, rows), data)


def test_float32_steps_that_float16_does_not_have_are_lattices_too() -> None:
    """Which float32 weights show: none is the same, and all keep their codes."""
    x = np.random.default_rng(7).normal(0, 0.03, (4096, 32))
    step = (np.abs(x).max(axis=1, keepdims=True) / 7).astype(np.float32)
    codes = np.rint(x / step)
    rows = (codes.astype(np.float32) * step).reshape(-1, 256)
    data = lattice.quantized(Q4_0, rows)
    assert data is not None
    assert lattice.equal(Q4_0, rows, data) < 0.2 * rows.size  # zeros
    found = Q4_0.dequantize(data).reshape(-1, 32) / data.reshape(-1).view(Q4_0.layout)["d"][:, None]
    np.testing.assert_array_equal(np.abs(found), np.abs(codes))


@pytest.mark.parametrize("row", [False, True])
def test_a_step_of_more_than_a_block(row: bool) -> None:
    """Of a row or of all weights: then most blocks do not reach the ends of the codes."""
    x = np.random.default_rng(7).normal(0, 0.03, (64, 256))
    step = bf16(np.abs(x).max(axis=1 if row else None, keepdims=True) / 7)
    rows = bf16(np.clip(np.rint(x / step), -8, 7) * step)
    np.testing.assert_array_equal(bf16(Q4_0.dequantize(Q4_0.quantize(rows, EVEN))), rows)


def test_steps_that_float16_does_not_have() -> None:
    """Float32 steps: as many weights as the best float16 gives, which trying all near ones finds."""
    rows = trained(7, bf16_steps=False, n=16)
    x = rows.reshape(-1, 32)
    blocks = Q4_0.quantize(rows, EVEN).reshape(-1).view(Q4_0.layout)
    found = lattice._hits(
        x, Q4_0.dequantize(blocks.view(np.uint8).reshape(len(x), -1)) / blocks["d"][:, None], blocks["d"]
    )
    near = blocks["d"].view(np.uint16)[None] + np.arange(-4, 5).astype(np.uint16)[:, None]
    codes = np.rint(x / blocks["d"].astype(np.float32)[:, None])
    best = np.max([lattice._hits(x, codes, d.view(np.float16)) for d in near], axis=0)
    np.testing.assert_array_equal(found, best)
    assert found.sum() > 0.995 * x.size
    assert all(lattice.quantized(Q4_0, row[None]) is not None for row in rows)  # though one of their 8 blocks is off


def test_other_weights_are_left_alone() -> None:
    random = np.random.default_rng(1).normal(0, 0.03, (64, 256)).astype(np.float32)
    for rows in (random, bf16(random)):
        x = rows.reshape(-1, 32)
        blocks = Q4_0.fit(x, EVEN)
        before = blocks.copy()
        lattice.to_lattice(Q4_0, x, blocks)
        np.testing.assert_array_equal(blocks, before)
        assert lattice.quantized(Q4_0, rows) is None
    assert lattice.quantized(IQ4_NL, trained(7)) is None


def test_one_block_of_another_kind_does_not_hide_the_rest() -> None:
    rows = trained(7)
    rows[3, :32] = bf16(np.random.default_rng(1).normal(0, 0.03, 32))
    data = Q4_0.quantize(rows, EVEN)
    same = bf16(Q4_0.dequantize(data)) == rows
    assert np.count_nonzero(same.reshape(-1, 32).all(axis=1)) == rows.size // 32 - 1
    assert lattice.equal(Q4_0, rows, data) == np.count_nonzero(same)
    assert lattice.quantized(Q4_0, rows) is not None


def test_zeros_have_two_signs() -> None:
    rows = trained(7)
    rows[rows == 0] = -0.0
    rows[5] = 0
    assert lattice.equal(Q4_0, rows, Q4_0.quantize(rows, EVEN)) == rows.size
