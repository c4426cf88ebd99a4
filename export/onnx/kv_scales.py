"""The scales of an ONNX graph's int8 keys and values: how far each channel goes on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.arrays import Floats, Ints
from ...runtime.model.ops import linear
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ..calibration.layers import Layer, embedded, in_order
from ..sources.quantized import Source

TOKENS = 2048  # of a text: a minute or two of work for Gemma 2 2B
_MARGIN = 1.1  # beyond what the text reached; what goes further still is cut off


@dataclass(frozen=True)
class KVScales:
    """What a layer's int8 keys and values are multiplied with, by channel: float32 (KV heads, head_dim)."""

    keys: Floats
    values: Floats


def kv_scales(
    source: Source, sequences: Sequence[Ints], progress: Callable[[int, int], None] | None = None
) -> list[KVScales]:
    """The scales for each layer, from what `sequences` reach with the weights of `source`.

    RoPE turns channels j and j + head_dim / 2 into each other as positions pass, so the two share the length of the
    longest vector that they form. `progress` is called with (layers done, layers in all).
    """
    c = source.config
    layers: dict[int | None, list[TensorSpec]] = {}
    for spec in tensor_specs(c):
        layers.setdefault(spec.layer, []).append(spec)
    embedding = next(spec for spec in layers[None] if spec.role == "token_embd")
    xs = embedded(c, sequences, lambda ids: np.concatenate([source.rows(embedding, i, i + 1) for i in ids]))
    out = []
    for i in range(c.n_layers):
        weights: Mapping[str, Floats] = {
            spec.role: source.rows(spec, 0, 1)[0] if spec.is_norm else source.rows(spec, 0, spec.shape[0])
            for spec in layers[i]
        }
        layer = Layer(c, i, weights)

        def through(x: Floats, layer: Layer = layer, weights: Mapping[str, Floats] = weights) -> tuple[Floats, ...]:
            k, v = linear(layer.attention_input(x), weights["attn_k"], weights["attn_v"])
            k, v = (a.reshape(len(x), layer.kind.n_kv_heads, layer.kind.head_dim) for a in (k, v))
            half = np.hypot(*np.split(k, 2, axis=-1)).max(axis=0)
            return layer.passed(x), np.concatenate([half, half], axis=-1), np.abs(v).max(axis=0)

        done = list(in_order(through, xs))
        xs = [x for x, _, _ in done]
        keys, values = (np.max([row[part] for row in done], axis=0) for part in (1, 2))
        out.append(KVScales(_scale(keys), _scale(values)))
        if progress:
            progress(i + 1, c.n_layers)
    return out


def _scale(reach: Floats) -> Floats:
    """A channel that is always 0 gets 1: a scale has to be more than 0."""
    return np.where(reach > 0, reach * np.float32(_MARGIN / 127), 1).astype(np.float32)
