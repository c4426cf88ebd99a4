"""What a rounded model is to answer: the exact model's likeliest tokens at every position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...runtime.arrays import Arrays
from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, head_of, logits
from ...runtime.model.tensors import TensorSpec
from ..sources.checkpoint import Checkpoint
from .torch_model import TorchOps, in_memory, through_layer

LIKELIEST = 256  # tokens at a position; what a model of 262,144 tokens believes of others is seldom more than 5 %
TOGETHER = 2  # sequences that pass a layer at a time
_HEAD_NUMBERS = 1 << 24  # logits that are there at a time


@dataclass(frozen=True)
class Targets:
    """At the positions of sequences, (n, length): the `tokens` and their `logits`, (n, length, k)."""

    tokens: Tensor
    logits: Tensor

    def __getitem__(self, chosen: list[int]) -> Targets:
        return Targets(self.tokens[chosen], self.logits[chosen])

    def arrays(self) -> Arrays:
        return {"tokens": self.tokens.numpy(), "logits": self.logits.numpy()}

    @classmethod
    def restored(cls, arrays: Arrays) -> Targets:
        return cls(*(torch.from_numpy(arrays[name]) for name in ("tokens", "logits")))


def exact_weights(checkpoint: Checkpoint) -> Weights:
    """All of a checkpoint's, each read when it is asked for."""
    found = defaultdict[int | None, dict[str, Callable[[], Tensor]]](dict)
    for spec in checkpoint.specs:
        found[spec.layer][spec.role] = partial(_read, checkpoint, spec)
    return Weights(found[None], [found[i] for i in range(checkpoint.config.n_layers)])


def _read(checkpoint: Checkpoint, spec: TensorSpec) -> Tensor:
    return torch.from_numpy(checkpoint.tensor(spec))


def passing_to_targets(
    config: ModelConfig, weights: Weights, sequences: Tensor, start: int, streams: Arrays, k: int = LIKELIEST
) -> Iterator[tuple[Arrays, Arrays]]:
    """Sequences (n, length) pass the layers from `start` on, of which one at a time is in memory, as `Sweep` asks for.

    Yields what they are behind each layer, and behind the last one, as its arrays, their `Targets`.
    """
    shared, layers = in_memory(weights.shared), list(weights.layers)
    shape = *sequences.shape, config.hidden_size
    x = torch.from_numpy(streams["x"]) if streams else torch.empty(shape)
    found: list[tuple[Tensor, Tensor]] = []
    for i in range(start, config.n_layers):
        layers[i] = in_memory(weights.layers[i])
        for ids, stream in zip(sequences.split(TOGETHER), x.split(TOGETHER), strict=True):
            with torch.no_grad():
                there = Weights(shared, layers)
                behind, hidden = through_layer(config, there, ids, i, stream.flatten(0, 1) if i else None)
                stream.copy_(behind.view_as(stream))
                if i == config.n_layers - 1:
                    found += _likeliest(config, head_of(config, there), hidden, k)
        layers[i] = {}
        if found:
            tokens, likeliest = (torch.cat(part).unflatten(0, sequences.shape) for part in zip(*found, strict=True))
            yield {}, Targets(tokens, likeliest).arrays()
        else:
            yield {"x": x.numpy()}, {}


def _likeliest(config: ModelConfig, head: Tensor, hidden: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    k = min(k, config.vocab_size)
    for rows in hidden.split(max(1, _HEAD_NUMBERS // config.vocab_size)):
        best, tokens = logits(config, TorchOps(), head, rows).topk(k)
        yield tokens.int(), best
