"""The scales of an ONNX graph's int8 keys and values: how far each channel goes on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.arrays import Floats, Ints
from ..sources.checkpoint import Checkpoint
from ..whole import WholeOps, WholeSequences, run_layers

TOKENS = 2048  # of a text: a minute or two of work for Gemma 2 2B
_MARGIN = 1.1  # beyond what the text reached; what goes further still is cut off


@dataclass(frozen=True)
class KVScales:
    """What a layer's int8 keys and values are multiplied with, by channel: float32 (KV heads, head_dim)."""

    keys: Floats
    values: Floats


def kv_scales(
    source: Checkpoint, sequences: Sequence[Ints], progress: Callable[[int, int], None] | None = None
) -> list[KVScales]:
    """The scales for each layer, from what `sequences` reach with the weights of `source`.

    RoPE turns channels j and j + head_dim / 2 into each other as positions pass, so the two share the length of the
    longest vector that they form. `progress` is called with (layers done, layers in all).
    """
    out: list[KVScales] = []

    class Watched(WholeSequences):
        def append(self, layer: int, keys: Floats, values: Floats) -> None:
            half = np.hypot(*np.split(keys, 2, axis=-1)).max(axis=0)
            out.append(KVScales(_scale(np.concatenate([half, half], axis=-1)), _scale(np.abs(values).max(axis=0))))
            super().append(layer, keys, values)

    config = source.config
    for _ in run_layers(config, WholeOps(source.rows), Watched(config.layers, sequences)):
        if progress:
            progress(len(out), config.n_layers)
    return out


def _scale(reach: Floats) -> Floats:
    """A channel that is always 0 gets 1: a scale has to be more than 0."""
    return np.where(reach > 0, reach * np.float32(_MARGIN / 127), 1).astype(np.float32)
