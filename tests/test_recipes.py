from __future__ import annotations

import pytest
from bezel.quant.formats import FORMATS
from bezel.quant.recipes import PRESETS, choose

WIDE = (64, 2304)  # rows that every format divides


def names(choice) -> tuple[str, str]:
    return choice.format.name, choice.wanted.name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_matrix_follows_its_preset_and_a_norm_is_f32(preset):
    assert names(choose(preset, "ffn_down", WIDE)) == (preset, preset)
    assert names(choose(preset, "ffn_norm", (2304,), embedding="q8_0")) == ("f32", "f32")


@pytest.mark.parametrize("role", ["token_embd", "output"])
@pytest.mark.parametrize("preset", PRESETS)
def test_embedding_and_head_never_go_below_q6_k_unasked(preset, role):
    expected = "q6_k" if preset in ("q5_k", "q4_k", "q4_0") else preset
    assert choose(preset, role, WIDE).format.name == expected
    for asked in PRESETS:
        assert choose(preset, role, WIDE, embedding=asked).format.name == asked
        assert choose(preset, "attn_q", WIDE, embedding=asked).format.name == preset


@pytest.mark.parametrize(
    ("preset", "n", "expected"),
    [
        ("q4_k", 288, "q8_0"),
        ("q5_k", 32, "q8_0"),
        ("q6_k", 255, "f16"),
        ("q4_0", 48, "f16"),
        ("q8_0", 33, "f16"),
        ("q4_0", 96, "q4_0"),
        ("bf16", 7, "bf16"),
        ("f32", 1, "f32"),
    ],
)
def test_rows_that_are_not_whole_blocks_fall_back(preset, n, expected):
    choice = choose(preset, "attn_q", (4, n))
    assert names(choice) == (expected, preset)
    assert choice.fell_back == (expected != preset)
    assert n % choice.format.block == 0


def test_the_default_of_the_embedding_falls_back_too():
    assert names(choose("q4_0", "token_embd", (100, 96))) == ("q8_0", "q6_k")


def test_presets_are_formats_in_order_of_size():
    bits = [FORMATS[p].block_bytes / FORMATS[p].block for p in PRESETS]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize(("preset", "embedding"), [("q4_k_m", None), ("Q4_0", None), ("", None), ("q4_0", "int8")])
def test_an_unknown_preset_is_refused_with_the_list(preset, embedding):
    with pytest.raises(ValueError, match=r"unknown preset '.*f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q4_0$"):
        choose(preset, "attn_q", WIDE, embedding)
