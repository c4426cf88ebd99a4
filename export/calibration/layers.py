"""The forward pass cut open at its linears, for calibration: one layer at a time over many sequences.

It is the pass of `runtime/model.py` on the same operations, with all sequences at position 0 and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ...runtime.arrays import Floats, Ints
from ...runtime.cache.numpy_store import attention
from ...runtime.model import ops
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec

WORKERS = 2  # sequences in hand at a time; the matrix products inside use every core
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Site:
    """Linears that share one input: their roles in a layer, or of the whole model."""

    name: str
    roles: tuple[str, ...]
    width: Callable[[ModelConfig], int]


ATTENTION = Site("attn", ("attn_q", "attn_k", "attn_v"), lambda c: c.hidden_size)
OUTPUT = Site("attn_output", ("attn_output",), lambda c: c.layers[0].q_size)
FEED_FORWARD = Site("ffn", ("ffn_gate", "ffn_up"), lambda c: c.hidden_size)
DOWN = Site("ffn_down", ("ffn_down",), lambda c: c.layers[0].intermediate_size)
HEAD = Site("head", ("token_embd", "output"), lambda c: c.hidden_size)
IN_LAYER = (ATTENTION, OUTPUT, FEED_FORWARD, DOWN)


class Layer:
    """One layer on weights by role, float32; `x` (n, hidden) is the residual stream of one sequence."""

    def __init__(self, config: ModelConfig, index: int, weights: Mapping[str, Floats]) -> None:
        self._config, self.kind, self._w = config, config.layers[index], weights
        # Gemma 1 adds a sub-layer's output as it is.
        self._post = {OUTPUT: weights.get("post_attention_norm"), DOWN: weights.get("post_ffw_norm")}

    def attention_input(self, x: Floats) -> Floats:
        return ops.rms_norm(x, self._w["attn_norm"], self._config.rms_eps)

    def attention(self, h: Floats) -> Floats:
        """The input of attn_output (n, heads · head_dim) from that of attn_q, attn_k and attn_v."""
        c, kind, positions = self._config, self.kind, np.arange(len(h))
        q, k, v = ops.linear(h, *(self._w[role] for role in ATTENTION.roles))
        q, k, v = (ops.split_heads(x, n) for x, n in ((q, kind.n_heads), (k, kind.n_kv_heads), (v, kind.n_kv_heads)))
        q, k = (ops.rope(x, positions, kind.rope_base, kind.rope_factor) for x in (q, k))
        first = np.zeros_like(positions) if kind.window is None else np.maximum(0, positions - kind.window + 1)
        out = attention(q, k, v, first, positions + 1, c.query_scale, c.attn_softcap)
        return out.reshape(len(h), -1)

    def feed_forward_input(self, x: Floats) -> Floats:
        return ops.rms_norm(x, self._w["ffn_norm"], self._config.rms_eps)

    def gated(self, h: Floats) -> Floats:
        """The input of ffn_down (n, intermediate) from that of ffn_gate and ffn_up."""
        gate, up = ops.linear(h, self._w["ffn_gate"], self._w["ffn_up"])
        gate = ops.gelu_tanh(gate)
        gate *= up
        return gate

    def passed(self, x: Floats) -> Floats:
        """The residual stream behind the layer."""
        x, _ = self.add(x, OUTPUT, self.attention(self.attention_input(x)))
        x, _ = self.add(x, DOWN, self.gated(self.feed_forward_input(x)))
        return x

    def add(self, x: Floats, site: Site, inputs: Floats) -> tuple[Floats, Floats]:
        """x plus what OUTPUT or DOWN make of their inputs, and how much an error there weighs, by position (n,).

        A norm after the linear makes errors count relative to its output.
        """
        post = self._post[site]
        (out,) = ops.linear(inputs, self._w[site.roles[0]])
        if post is None:
            return x + out, np.ones(len(x), np.float32)
        eps = np.float32(self._config.rms_eps)
        return x + ops.rms_norm(out, post, self._config.rms_eps), 1 / (np.mean(np.square(out), axis=-1) + eps)


def site_of(spec: TensorSpec) -> Site | None:
    """The site of a linear, the head's for an embedding that is also the head; None for a norm."""
    return next((site for site in (*IN_LAYER, HEAD) if spec.role in site.roles), None)


def embedded(config: ModelConfig, sequences: Sequence[Ints], rows: Callable[[Ints], Floats]) -> list[Floats]:
    """The residual streams before the first layer, float32 (n, hidden) each, from `rows` of the embedding by id."""
    wanted = np.unique(np.concatenate(sequences))
    some = rows(wanted)
    return [ops.embed(some, np.searchsorted(wanted, ids), config.embedding_scale) for ids in sequences]


def in_order(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item) of each item, in their order, a few at a time."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        ahead = [pool.submit(work, item) for item in items[:WORKERS]]
        for item in items[WORKERS:]:
            yield ahead.pop(0).result()
            ahead.append(pool.submit(work, item))
        while ahead:
            yield ahead.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)
