"""Gemma's forward pass, from token ids to logits. Shapes: n tokens, H query heads, K KV heads, D head_dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache.caches import KVCache
from .config import ModelConfig
from .ops import Floats, Ints

Weights = Mapping[str, Any]
"""By role, one mapping a layer and one for the rest, in the form that the ops take; norms hold weight + 1."""


class Ops(Protocol):
    """What the forward pass is made of; `ops.py` says what each computes."""

    def embed(self, weight: Any, ids: Ints, scale: float, /) -> Floats: ...
    def rms_norm(self, x: Floats, weight: Floats, eps: float, /) -> Floats: ...
    def linear(self, x: Floats, /, *weights: Any) -> list[Floats]: ...
    def rope(self, x: Floats, first_position: int, base: float, /) -> Floats: ...
    def add_norm(
        self, x: Floats, h: Floats, post_weight: Floats | None, next_weight: Floats, eps: float, /
    ) -> tuple[Floats, Floats]: ...
    def feed_forward(self, x: Floats, gate: Any, up: Any, down: Any, /) -> Floats: ...
    def softcap(self, x: Floats, cap: float, /) -> Floats: ...


def forward(
    config: ModelConfig,
    ops: Ops,
    shared: Weights,
    layers: Sequence[Weights],
    caches: Sequence[KVCache],
    ids: npt.NDArray[np.int64],
    wanted: int,
) -> Floats:
    """Append the ids to the caches; logits (wanted, vocab) of the last `wanted` of them, 0 to n."""
    n, eps, start = len(ids), config.rms_eps, caches[0].length
    last = config.n_layers - 1

    x = ops.embed(shared["token_embd"], ids, config.embedding_scale)  # (n, hidden)
    h = ops.rms_norm(x, layers[0]["attn_norm"], eps)
    for i, (layer, w, cache) in enumerate(zip(config.layers, layers, caches, strict=True)):
        q, k, v = ops.linear(h, w["attn_q"], w["attn_k"], w["attn_v"])
        q = q.reshape(n, config.n_heads, config.head_dim)  # (n, H, D)
        k, v = (part.reshape(n, config.n_kv_heads, config.head_dim) for part in (k, v))  # (n, K, D)
        cache.append(ops.rope(k, start, layer.rope_base), v)
        q = ops.rope(q, start, layer.rope_base)
        if i == last:  # from here on, only what logits are wanted of
            q, x = q[n - wanted :], x[n - wanted :]
            if not wanted:
                return np.empty((0, config.vocab_size), np.float32)
        h = cache.attend(q, config.query_scale, config.attn_softcap)
        (h,) = ops.linear(h.reshape(len(x), -1), w["attn_output"])  # (n, hidden)
        x, h = ops.add_norm(x, h, w.get("post_attention_norm"), w["ffn_norm"], eps)
        h = ops.feed_forward(h, w["ffn_gate"], w["ffn_up"], w["ffn_down"])
        next_norm = shared["output_norm"] if i == last else layers[i + 1]["attn_norm"]
        x, h = ops.add_norm(x, h, w.get("post_ffw_norm"), next_norm, eps)

    (logits,) = ops.linear(h, shared["token_embd" if config.tied_head else "output"])
    return logits if config.final_softcap is None else ops.softcap(logits, config.final_softcap)
