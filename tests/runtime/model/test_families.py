"""Descriptions of models: every spelling that is met gives the same config, and none is guessed at."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES
from bezel.runtime.errors import InvalidConfig
from bezel.runtime.model.config import ModelConfig
from bezel.runtime.model.families.gguf import read_gguf_config, write_gguf_config
from bezel.runtime.model.families.hf import read_hf_config, text_name, write_hf_config
from tiny import CONFIGS

LOCAL, GLOBAL = "sliding_attention", "full_attention"

# The published config of Gemma 3 4B: its text part says what the defaults of transformers do not.
SPARSE = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": SPARSE,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
}
# The same in full, as a text model of its own.
FULL = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
}
OLD = {
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 6,
}
NEW = {
    "rope_parameters": {
        GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
    },
    "layer_types": [GLOBAL if i % 6 == 5 else LOCAL for i in range(34)],
    "_sliding_window_pattern": 6,
}
GEMMA3_4B = read_hf_config(PUBLISHED)
HF_SPELLINGS: dict[str, dict[str, Any]] = {
    "sparse": SPARSE,
    "old keys": FULL | OLD,
    "new keys": FULL | NEW,
    "both": FULL | OLD | NEW,
    "scaling by its first name": FULL | OLD | {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "no bases": FULL | {"rope_parameters": {GLOBAL: {"rope_type": "linear", "factor": 8.0}, LOCAL: None}},
    "nested and full": PUBLISHED | {"text_config": FULL | NEW, "tie_word_embeddings": True},
    "nested, tied outside": PUBLISHED | {"tie_word_embeddings": True},
}

# What llama.cpp's converter writes for the same, and for Gemma 3 270M.
GGUF_4B: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 131072,
    "gemma3.embedding_length": 2560,
    "gemma3.block_count": 34,
    "gemma3.feed_forward_length": 10240,
    "gemma3.attention.head_count": 8,
    "gemma3.attention.head_count_kv": 4,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "gemma3.attention.sliding_window": 1024,
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
}
GGUF_270M = {
    **{key: value for key, value in GGUF_4B.items() if "scaling" not in key},
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.sliding_window": 512,
}
FLAGS = np.array([i % 6 != 5 for i in range(34)])
GGUF_SPELLINGS: dict[str, dict[str, Any]] = {
    "as it was first": GGUF_4B,
    "local base": GGUF_4B | {"gemma3.rope.freq_base_swa": 10000.0},
    "pattern as a period": GGUF_4B | {"gemma3.attention.sliding_window_pattern": 6},
    "pattern as flags": GGUF_4B | {"gemma3.attention.sliding_window_pattern": FLAGS},
    "scaling by its old name": {
        **{key: value for key, value in GGUF_4B.items() if "scaling" not in key},
        "gemma3.rope.scale_linear": 8.0,
    },
    "no soft-cap": GGUF_4B | {"gemma3.final_logit_softcapping": 0.0},
}


def from_gguf(metadata: dict[str, Any], vocab_size: int = 262208) -> ModelConfig:
    return read_gguf_config(metadata, vocab_size=vocab_size, tied_head=True, source="f.gguf")


def without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k != key}


def test_gemma3_as_published() -> None:
    c = GEMMA3_4B
    assert (c.family, c.vocab_size, c.hidden_size, c.context_length) == ("gemma3", 262208, 2560, 131072)
    assert (c.rms_eps, c.query_pre_attn_scalar) == (np.float32(1e-6), 256)
    assert (c.attn_softcap, c.final_softcap, c.tied_head) == (None, None, True)
    assert [i for i, layer in enumerate(c.layers) if layer.window is None] == [5, 11, 17, 23, 29]
    for layer in c.layers:
        sizes = (layer.n_heads, layer.n_kv_heads, layer.head_dim, layer.intermediate_size)
        assert (sizes, layer.post_norms, layer.qk_norms) == ((8, 4, 256, 10240), True, True)
        rope = (layer.window, layer.rope_base, layer.rope_factor)
        assert rope in ((1024, 10000.0, 1.0), (None, 1000000.0, 8.0))


@pytest.mark.parametrize("name", HF_SPELLINGS)
def test_every_spelling_of_a_config_json(name: str) -> None:
    assert read_hf_config(HF_SPELLINGS[name]) == GEMMA3_4B


@pytest.mark.parametrize("name", GGUF_SPELLINGS)
def test_every_spelling_of_gguf_metadata(name: str) -> None:
    assert from_gguf(GGUF_SPELLINGS[name]) == GEMMA3_4B


def test_gemma3_270m_as_llama_cpp_writes_it() -> None:
    layers = from_gguf(GGUF_270M).layers
    assert [layer.window for layer in layers] == [None if i in (5, 11, 17) else 512 for i in range(18)]
    assert {(layer.window, layer.rope_base, layer.rope_factor) for layer in layers} == {(512, 1e4, 1), (None, 1e6, 1)}


@pytest.mark.parametrize("silent", [without(GGUF_4B, "gemma3.attention.sliding_window"), None])
def test_without_a_window_all_layers_are_global(silent: dict[str, Any] | None) -> None:
    config = from_gguf(silent or GGUF_4B | {"gemma3.attention.sliding_window": 0})
    assert {(layer.window, layer.rope_base, layer.rope_factor) for layer in config.layers} == {(None, 1e6, 8)}
    assert from_gguf({"general.architecture": "gemma3", **write_gguf_config(config)}) == config


def test_queries_of_27b_are_scaled_by_the_width_of_a_head() -> None:
    sizes = {"embedding_length": 5376, "block_count": 62, "attention.head_count": 32, "attention.head_count_kv": 16}
    sizes |= {"attention.key_length": 128, "attention.value_length": 128}
    metadata = GGUF_4B | {f"gemma3.{key}": value for key, value in sizes.items()}
    assert from_gguf(metadata).query_pre_attn_scalar == 168
    assert from_gguf(metadata | {"gemma3.block_count": 61}).query_pre_attn_scalar == 128
    assert "bezel.attention.query_pre_attn_scalar" not in write_gguf_config(from_gguf(metadata))


@pytest.mark.parametrize("period", [2, 3, 34, 40])
def test_other_patterns(period: int) -> None:
    windows = [1024 if (i + 1) % period else None for i in range(34)]
    types = [LOCAL if window else GLOBAL for window in windows]
    key = "gemma3.attention.sliding_window_pattern"
    found = (
        read_hf_config(SPARSE | {"sliding_window_pattern": period}),
        read_hf_config(SPARSE | {"layer_types": types, "sliding_window_pattern": 6}),
        from_gguf(GGUF_4B | {key: period}),
        from_gguf(GGUF_4B | {key: np.array([window is not None for window in windows])}),
    )
    for config in found:
        assert [layer.window for layer in config.layers] == windows
        assert {layer.rope_base for layer in config.layers} == {1e4 if window else 1e6 for window in windows}
    written = write_gguf_config(found[0])
    assert written[key] == [window is not None for window in windows]  # which llama.cpp reads, too
    assert not any(key.startswith("bezel.") for key in written)


SEVERAL_WINDOWS = replace(
    GEMMA3_4B, layers=tuple(replace(c, window=c.window and c.window + i) for i, c in enumerate(GEMMA3_4B.layers))
)


@pytest.mark.parametrize("raw", [*CONFIGS.values(), *SHAPES.values(), *HF_SPELLINGS.values()])
def test_what_is_written_is_read_again(raw: dict[str, Any]) -> None:
    config = read_hf_config(raw)
    assert read_hf_config(json.loads(json.dumps(write_hf_config(config)))) == config
    metadata = {"general.architecture": config.family, **write_gguf_config(config)}
    again = read_gguf_config(metadata, vocab_size=config.vocab_size, tied_head=config.tied_head, source="f.gguf")
    assert again == config
    assert read_hf_config(write_hf_config(again)) == config


def test_what_cannot_be_written_is_refused() -> None:
    metadata = {"general.architecture": "gemma3", **write_gguf_config(SEVERAL_WINDOWS)}
    assert from_gguf(metadata) == SEVERAL_WINDOWS
    with pytest.raises(InvalidConfig, match="layers"):
        write_hf_config(SEVERAL_WINDOWS)
    first, *others = GEMMA3_4B.layers
    for change in ({"intermediate_size": 96}, {"rope_base": 2e4}, {"rope_factor": 2.0}, {"qk_norms": False}):
        with pytest.raises(InvalidConfig, match="no keys for such a Gemma 3 model"):
            write_gguf_config(replace(GEMMA3_4B, layers=(replace(first, **change), *others)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": None}, "'sliding_window': found None"),
        ({"sliding_window_pattern": 0}, "'sliding_window_pattern': found 0, expected an integer from 1"),
        ({"sliding_window_pattern": "6"}, "'sliding_window_pattern': found '6'"),
        ({"layer_types": [LOCAL] * 33}, "'layer_types': .*expected 34 entries"),
        ({"layer_types": [LOCAL] * 33 + ["chunked_attention"]}, "'layer_types': .*each one of sliding_attention"),
        ({"rope_theta": 0}, "'rope_theta': found 0, expected a positive"),
        ({"rope_local_base_freq": "1e4"}, "'rope_local_base_freq': found '1e4'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling: key 'rope_type': found 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: key 'factor': found nothing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "low": 1}}, "rope_scaling: unknown key 'low'"),
        ({"rope_scaling": [8.0]}, "'rope_scaling': found"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}}, "'rope_scaling': found"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4}}, "'type': found 'linear', expected"),
        ({"rope_parameters": {GLOBAL: "x", LOCAL: None}}, "'rope_parameters': found .*an entry for each"),
        ({"rope_parameters": {GLOBAL: {}, LOCAL: [1]}}, "'rope_parameters': found .*an entry for each"),
        ({"layer_types": None, "_sliding_window_pattern": 3}, "'_sliding_window_pattern': found 3, expected 'layer"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "'rope_parameters': .*an entry for each of sliding_attention"),
        ({"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 8.0}}}, "'rope_type': found 'linear'"),
        ({"rope_parameters": {GLOBAL: {"rope_theta": 2e6}}, "rope_theta": 1e6}, "'rope_theta': .*2e.06 as in"),
        ({"rope_parameters": NEW["rope_parameters"], "rope_scaling": {"rope_type": "linear", "factor": 4}}, "of 8 as"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping': found 50.0, expected None"),
        ({"final_logit_softcapping": -1.0}, "'final_logit_softcapping': found -1.0"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention': found True"),
        ({"hidden_activation": "silu"}, "'hidden_activation': found 'silu'"),
        ({"attention_bias": True}, "'attention_bias': found True"),
        ({"num_attention_heads": 6}, "6 query heads cannot share 4 KV heads"),
        ({"moe_layers": 2}, "unknown key 'moe_layers'"),
    ],
)
def test_a_wrong_config_json(change: dict[str, Any], message: str) -> None:
    for raw in (SPARSE | change, PUBLISHED | {"text_config": SPARSE | change}):
        with pytest.raises(InvalidConfig, match=message) as raised:
            read_hf_config(raw)
        assert ("text_config" in str(raised.value)) == ("text_config" in raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (without(PUBLISHED, "text_config"), "'text_config': found nothing"),
        (PUBLISHED | {"audio_config": {}}, "unknown key 'audio_config'"),
        (PUBLISHED | {"text_config": SPARSE | {"model_type": "gemma2"}}, "text_config: key 'model_type'"),
        (PUBLISHED | {"tie_word_embeddings": 1}, "'tie_word_embeddings': found 1"),
    ],
)
def test_a_wrong_outer_config(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        read_hf_config(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gemma3.rope.scaling.type": "yarn"}, "'gemma3.rope.scaling.type': found 'yarn'"),
        ({"gemma3.rope.scaling.factor": 0.0}, "'gemma3.rope.scaling.factor': found 0.0"),
        ({"gemma3.rope.freq_base_swa": -1.0}, "'gemma3.rope.freq_base_swa': found -1.0"),
        ({"gemma3.attention.sliding_window_pattern": FLAGS[:-1]}, "a period, or 34 flags"),
        ({"gemma3.attention.sliding_window_pattern": np.arange(34)}, "a period, or 34 flags"),
        ({"gemma3.attention.sliding_window_pattern": 0}, "an integer from 1"),
        ({"gemma3.vision.block_count": 27}, "unknown key 'gemma3.vision.block_count'"),
    ],
)
def test_wrong_gguf_metadata(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        from_gguf(GGUF_4B | change)


@pytest.mark.parametrize(
    ("name", "title"),
    [("gemma3n", "Gemma 3n"), ("gemma4", "Gemma 4"), ("vaultgemma", "VaultGemma"), ("clip", "the vis")],
)
def test_other_models_are_named(name: str, title: str) -> None:
    message = f"this is {title}.*; bezel runs Gemma 1, Gemma 2 and Gemma 3"
    with pytest.raises(InvalidConfig, match=message):
        read_hf_config({"model_type": name})
    with pytest.raises(InvalidConfig, match=message):
        from_gguf({"general.architecture": name})


@pytest.mark.parametrize("name", ["llama", None, 3, ["gemma3"], {}])
def test_models_that_nobody_knows_are_refused(name: object) -> None:
    for read in (lambda: read_hf_config({"model_type": name}), lambda: from_gguf({"general.architecture": name})):
        with pytest.raises(InvalidConfig, match="bezel runs Gemma 1, Gemma 2 and Gemma 3"):
            read()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.weight", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_names_in_a_checkpoint_with_pictures(name: str, found: str | None) -> None:
    assert text_name(name, PUBLISHED) == found
    assert text_name(name, FULL) == name
