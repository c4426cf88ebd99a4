"""Gemma's forward pass, from token ids to logits. Shapes: n tokens, H query heads, K KV heads, D head_dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import ops
from .cache import KVCache
from .config import ModelConfig
from .ops import Floats

Weights = Mapping[str, Any]
"""By GGUF name without "blk.N." and ".weight", one mapping a layer and one for the rest; norms hold weight + 1."""


def forward(
    config: ModelConfig,
    shared: Weights,
    layers: Sequence[Weights],
    caches: Sequence[KVCache],
    ids: npt.NDArray[np.int64],
    every: bool,
) -> Floats:
    """Append the ids to the caches; logits (n, vocab) for every id, or (1, vocab) for the last."""
    n = len(ids)
    positions = np.arange(n) + caches[0].length
    heads, kv_heads = (n, config.n_heads, config.head_dim), (n, config.n_kv_heads, config.head_dim)

    x = shared["token_embd"][ids] * np.float32(config.embedding_scale)  # (n, hidden)
    for layer, w, cache in zip(config.layers, layers, caches, strict=True):
        h = ops.rms_norm(x, w["attn_norm"], config.rms_eps)
        q = ops.linear(h, w["attn_q"]).reshape(heads)  # (n, H, D)
        k = ops.linear(h, w["attn_k"]).reshape(kv_heads)  # (n, K, D)
        v = ops.linear(h, w["attn_v"]).reshape(kv_heads)
        cache.append(ops.rope(k, positions, layer.rope_base), v)
        q = ops.rope(q, positions, layer.rope_base)
        h = cache.attend(q, config.query_scale, config.attn_softcap)  # (n, H, D)
        h = ops.linear(h.reshape(n, -1), w["attn_output"])  # (n, hidden)
        if config.post_norms:
            h = ops.rms_norm(h, w["post_attention_norm"], config.rms_eps)
        x = x + h

        h = ops.rms_norm(x, w["ffn_norm"], config.rms_eps)
        h = ops.gelu_tanh(ops.linear(h, w["ffn_gate"])) * ops.linear(h, w["ffn_up"])  # (n, intermediate)
        h = ops.linear(h, w["ffn_down"])
        if config.post_norms:
            h = ops.rms_norm(h, w["post_ffw_norm"], config.rms_eps)
        x = x + h

    if not every:
        x = x[-1:]
    x = ops.rms_norm(x, shared["output_norm"], config.rms_eps)
    logits = ops.linear(x, shared["token_embd" if config.tied_head else "output"])
    return logits if config.final_softcap is None else ops.softcap(logits, config.final_softcap)
