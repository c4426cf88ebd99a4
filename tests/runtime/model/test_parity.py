"""The reference engine against Hugging Face transformers: golden logits always, the library itself if installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Model, Session, load
from bezel.runtime.cache import caches as cache
from bezel.runtime.model import ops
from bezel.runtime.model.config import LayerConfig
from bezel.runtime.model.families.hf import read_hf_config
from feedings import ALL, FEEDINGS, golden, random_chunks, whole
from tiny import COLUMNS, CONFIGS, DEMO, TOLERANCE, checkpoint_folder, export, token_ids

ModelOf = Callable[..., Model]


@pytest.mark.parametrize("feed", FEEDINGS)
@pytest.mark.parametrize("name", ALL)
def test_golden_logits(name: str, feed: Any, model_of: ModelOf) -> None:
    logits = feed(model_of(name).session(), token_ids(name))
    assert np.abs(logits[:, ::COLUMNS] - golden(name)).max() < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_transformers(name: str, model_of: ModelOf, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import hf_logits

    ids = token_ids(name)[::-1]  # not the golden ones
    assert np.abs(model_of(name).logits(ids) - hf_logits(checkpoint_folder(name, tmp_path), ids)).max() < TOLERANCE


def test_transformers_with_pictures(tmp_path: Path) -> None:
    """The text part of a model that sees pictures, as transformers saves it."""
    torch = pytest.importorskip("torch")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    torch.manual_seed(0)
    text = CONFIGS["gemma3-gqa"] | {"vocab_size": 4096 + 64, "initializer_range": 0.3}
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=224, patch_size=14
    )
    theirs = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision.to_dict()))
    theirs.save_pretrained(tmp_path / "nested")
    shutil.copy(DEMO / "tokenizer.model", tmp_path / "nested")
    ids = token_ids("gemma3-gqa")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, :, :4096].numpy()
    found = load(export(tmp_path / "nested", tmp_path / "nested.gguf"), engine="reference", kv="f32").logits(ids)
    assert np.abs(expected).max() > 5
    assert np.abs(found - expected).max() < TOLERANCE


def change_layers(m: Model, change: Callable[[LayerConfig], LayerConfig]) -> None:
    m.config = replace(m.config, layers=tuple(map(change, m.config.layers)))


def shifted_pattern(m: Model, _: pytest.MonkeyPatch) -> None:
    layers = m.config.layers
    m.config = replace(m.config, layers=(*layers[1:], layers[0]))


def wider_window(m: Model, _: pytest.MonkeyPatch) -> None:
    change_layers(m, lambda layer: replace(layer, window=layer.window and layer.window + 1))


def narrower_window(m: Model, _: pytest.MonkeyPatch) -> None:
    change_layers(m, lambda layer: replace(layer, window=layer.window and layer.window - 1))


def no_qk_norms(m: Model, _: pytest.MonkeyPatch) -> None:
    change_layers(m, lambda layer: replace(layer, qk_norms=False))


def local_base_in_global_layers(m: Model, _: pytest.MonkeyPatch) -> None:
    change_layers(m, lambda layer: replace(layer, rope_base=10000.0))


def no_factor(m: Model, _: pytest.MonkeyPatch) -> None:
    change_layers(m, lambda layer: replace(layer, rope_factor=1.0))


def factor_in_local_layers(m: Model, _: pytest.MonkeyPatch) -> None:
    change_layers(m, lambda layer: replace(layer, rope_factor=8.0))


def no_attention_softcap(m: Model, _: pytest.MonkeyPatch) -> None:
    m.config = replace(m.config, attn_softcap=None)


def no_final_softcap(m: Model, _: pytest.MonkeyPatch) -> None:
    m.config = replace(m.config, final_softcap=None)


def no_norm_offset(_: Model, patch: pytest.MonkeyPatch) -> None:
    right = ops.rms_norm
    patch.setattr(ops, "rms_norm", lambda x, weight, eps: right(x, weight - 1, eps))


def head_dim_query_scale(m: Model, _: pytest.MonkeyPatch) -> None:
    m.config = replace(m.config, query_pre_attn_scalar=float(m.config.layers[0].head_dim))


def neighbours_in_rope(_: Model, patch: pytest.MonkeyPatch) -> None:
    right = ops.rope

    def paired(x: np.ndarray, *arguments: Any) -> np.ndarray:
        d = x.shape[-1]
        order = np.arange(d).reshape(-1, 2).T.reshape(-1)  # evens first, then odds
        return right(x[..., order], *arguments)[..., np.argsort(order)]

    patch.setattr(ops, "rope", paired)


OF_EVERY_FAMILY = (
    shifted_pattern,
    wider_window,
    narrower_window,
    no_norm_offset,
    head_dim_query_scale,
    neighbours_in_rope,
)
FAULTS = {
    "gemma2-gqa": (*OF_EVERY_FAMILY, no_attention_softcap, no_final_softcap),
    "gemma3-gqa": (*OF_EVERY_FAMILY, no_qk_norms, local_base_in_global_layers, no_factor, factor_in_local_layers),
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in FAULTS for fault in FAULTS[name]])
def test_a_planted_fault_is_seen(name: str, fault: Any, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model_of(name)
    fault(m, monkeypatch)
    m.backend.config = m.config  # type: ignore[attr-defined]
    logits = whole(m.session(), token_ids(name))
    assert np.abs(logits[:, ::COLUMNS] - golden(name)).max() > 50 * TOLERANCE


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_smaller_storage_is_close(kv: str, model_of: ModelOf) -> None:
    ids = token_ids("demo")
    exact, small = model_of("demo").logits(ids), model_of("demo", kv=kv).logits(ids)
    difference = np.abs(exact - small)
    assert 0 < difference.max() < {"f16": 0.05, "int8": 0.5}[kv]


def test_a_full_cache_gives_the_bits_of_a_ring(model_of: ModelOf) -> None:
    m, ids = model_of("demo"), token_ids("demo")
    ring, full = m.session(), Session(m, ring=False)
    assert np.array_equal(random_chunks(ring, ids), random_chunks(full, ids))
    assert ring.engine.cache_bytes < full.engine.cache_bytes


def test_config_names_are_the_ones_tested() -> None:
    """The windows above bite: changing them changes which layers are local."""
    for raw in CONFIGS.values():
        config = read_hf_config(raw)
        local = [layer.window is not None for layer in config.layers]
        period = {"gemma": 1, "gemma2": 2}.get(config.family) or raw["sliding_window_pattern"]
        assert local == [(i + 1) % period != 0 for i in range(config.n_layers)]
        assert cache.default_chunk(config.layers) == min(512, raw.get("sliding_window", 512))
