"""Gemma's forward pass, from token ids to logits: the one place that knows the order of its operations.

It runs on any `Ops` and over any `Rows`, which decide what a value is: an array, or the name of one in a graph.
Shapes: n rows, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .config import LayerConfig, ModelConfig

ByRole = Mapping[str, Any]
"""Weights by role, in the form that the ops take; norms hold weight + 1."""


@dataclass(frozen=True)
class Weights:
    """Those of each layer, and `shared` ones."""

    shared: ByRole
    layers: Sequence[ByRole]


class Ops(Protocol):
    """What the forward pass is made of; `ops.py` says what each computes."""

    def embed(self, weight: Any, ids: Any, scale: float, /) -> Any: ...
    def rms_norm(self, x: Any, weight: Any, eps: float, /) -> Any: ...
    def linear(self, x: Any, /, *weights: Any) -> Sequence[Any]: ...
    def split_heads(self, x: Any, heads: int, /) -> Any: ...
    def join_heads(self, x: Any, /) -> Any: ...
    def rope(self, x: Any, positions: Any, base: float, factor: float, /) -> Any: ...
    def add_norm(self, x: Any, h: Any, post_weight: Any, next_weight: Any, eps: float, /) -> tuple[Any, Any]: ...
    def feed_forward(self, x: Any, gate: Any, up: Any, down: Any, /) -> Any: ...
    def softcap(self, x: Any, cap: float, /) -> Any: ...


class Rows(Protocol):
    """The rows that go through the model, and what each of them sees."""

    @property
    def positions(self) -> Any:
        """(n,)."""

    def embed(self, ops: Ops, weight: Any, scale: float, /) -> Any:
        """The rows as they enter the first layer, (n, hidden)."""

    def append(self, layer: int, keys: Any, values: Any, /) -> None:
        """Keep the rows' keys (after RoPE) and values, (n, K, D), of a layer."""

    def attend(self, layer: int, queries: Any, scale: float, softcap: float | None, /) -> Any:
        """Attention of (n, H, D), of all rows or of the wanted ones, over what was appended. Same shape back."""

    def wanted(self, x: Any, /) -> Any:
        """Of (n, …) the rows that logits are wanted of."""


def forward(config: ModelConfig, ops: Ops, weights: Weights, rows: Rows, streams: list[Any] | None = None) -> Any:
    """Logits (wanted, vocab) of the rows that they are wanted of.

    `streams` receives the residual stream behind each layer, (n, hidden); behind the last one, of the wanted rows.
    """
    for x, h in run_layers(config, ops, weights, rows):  # noqa: B007 - of h only the last is wanted
        if streams is not None:
            streams.append(x)
    return logits(config, ops, head_of(config, weights), h)


def run_layers(
    config: ModelConfig, ops: Ops, weights: Weights, rows: Rows, start: int = 0, x: Any = None
) -> Iterator[tuple[Any, Any]]:
    """Yields the residual stream (n, hidden) behind each layer, and that normed for what is next, which is the head.

    Those from `start` on, before which the stream is `x`, or the embedded rows.
    """
    shared, last = weights.shared, config.n_layers - 1
    if x is None:
        x = rows.embed(ops, shared["token_embd"], config.embedding_scale)
    h = ops.rms_norm(x, weights.layers[start]["attn_norm"], config.rms_eps)
    for i in range(start, config.n_layers):
        next_norm = shared["output_norm"] if i == last else weights.layers[i + 1]["attn_norm"]
        x, h = layer(config, ops, i, weights.layers[i], next_norm, x, h, rows)
        yield x, h


def head_of(config: ModelConfig, weights: Weights) -> Any:
    return weights.shared["token_embd" if config.tied_head else "output"]


def logits(config: ModelConfig, ops: Ops, head: Any, h: Any) -> Any:
    """(n, vocab) of what the last norm made, (n, hidden)."""
    (found,) = ops.linear(h, head)
    return capped(config, ops, found)


def capped(config: ModelConfig, ops: Ops, products: Any) -> Any:
    """Logits of products with the head, all or some."""
    return products if config.final_softcap is None else ops.softcap(products, config.final_softcap)


def layer(
    config: ModelConfig, ops: Ops, index: int, w: ByRole, next_norm: Any, x: Any, h: Any, rows: Rows
) -> tuple[Any, Any]:
    """The residual stream x (n, hidden) behind a layer, and that normed for what is next; h is x normed for this one.

    From the last layer on there are only the rows that logits are wanted of.
    """
    c: LayerConfig = config.layers[index]
    eps = config.rms_eps
    q, k, v = ops.linear(h, w["attn_q"], w["attn_k"], w["attn_v"])
    q, k, v = ops.split_heads(q, c.n_heads), ops.split_heads(k, c.n_kv_heads), ops.split_heads(v, c.n_kv_heads)
    if c.qk_norms:
        q, k = ops.rms_norm(q, w["attn_q_norm"], eps), ops.rms_norm(k, w["attn_k_norm"], eps)
    q = ops.rope(q, rows.positions, c.rope_base, c.rope_factor)
    rows.append(index, ops.rope(k, rows.positions, c.rope_base, c.rope_factor), v)
    if index == config.n_layers - 1:
        q, x = rows.wanted(q), rows.wanted(x)
    h = rows.attend(index, q, config.query_scale, config.attn_softcap)  # (n, H, D)
    (h,) = ops.linear(ops.join_heads(h), w["attn_output"])  # (n, hidden)
    x, h = ops.add_norm(x, h, w.get("post_attention_norm"), w["ffn_norm"], eps)
    h = ops.feed_forward(h, w["ffn_gate"], w["ffn_up"], w["ffn_down"])
    return ops.add_norm(x, h, w.get("post_ffw_norm"), next_norm, eps)
