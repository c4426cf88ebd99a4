"""The reference engine against Hugging Face transformers: golden logits always, the library itself if installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Model, Session
from bezel.runtime.cache import caches as cache
from bezel.runtime.model import ops
from bezel.runtime.model.families import FAMILIES
from bezel.runtime.model.families.hf import read_hf_config
from feedings import ALL, FEEDINGS, golden, random_chunks, whole
from tiny import COLUMNS, CONFIGS, TOLERANCE, checkpoint_folder, token_ids

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


def flipped_parity(m: Model, _: pytest.MonkeyPatch) -> None:
    windows = FAMILIES[m.config.family].windows(m.config.n_layers + 1, 8)[1:]
    m.config = replace(
        m.config, layers=tuple(replace(layer, window=w) for layer, w in zip(m.config.layers, windows, strict=True))
    )


def wider_window(m: Model, _: pytest.MonkeyPatch) -> None:
    layers = tuple(replace(layer, window=layer.window and layer.window + 1) for layer in m.config.layers)
    m.config = replace(m.config, layers=layers)


def narrower_window(m: Model, _: pytest.MonkeyPatch) -> None:
    layers = tuple(replace(layer, window=layer.window and layer.window - 1) for layer in m.config.layers)
    m.config = replace(m.config, layers=layers)


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


FAULTS = (
    flipped_parity,
    wider_window,
    narrower_window,
    no_attention_softcap,
    no_final_softcap,
    no_norm_offset,
    head_dim_query_scale,
    neighbours_in_rope,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: Any, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model_of("gemma2-gqa")
    fault(m, monkeypatch)
    m.backend.config = m.config  # type: ignore[attr-defined]
    logits = whole(m.session(), token_ids("gemma2-gqa"))
    assert np.abs(logits[:, ::COLUMNS] - golden("gemma2-gqa")).max() > 50 * TOLERANCE


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
        assert local == [config.family == "gemma2" and i % 2 == 0 for i in range(config.n_layers)]
        assert cache.default_chunk(config.layers) == min(512, raw.get("sliding_window", 512))
