"""What a rounded model is to answer: the exact model's likeliest tokens at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.arrays import Arrays
from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, head_of, logits
from .torch_model import TorchOps, hidden_of

LIKELIEST = 256  # tokens at a position; what a model of 262,144 tokens believes of others is seldom more than 5 %
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


def targets_of(
    config: ModelConfig,
    weights: Weights,
    sequences: Tensor,
    k: int = LIKELIEST,
    progress: Callable[[int], None] = lambda _: None,
) -> Targets:
    """Of an exact model's weights, for sequences (n, length); `progress` is called with the tokens of each."""
    found = []
    with torch.no_grad():
        for ids in sequences:
            hidden = hidden_of(config, weights, ids[None])
            parts = zip(*_likeliest(config, head_of(config, weights), hidden, k), strict=True)
            found.append([torch.cat(part) for part in parts])
            progress(len(ids))
    return Targets(*(torch.stack(part) for part in zip(*found, strict=True)))


def _likeliest(config: ModelConfig, head: Tensor, hidden: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    k = min(k, config.vocab_size)
    for rows in hidden.split(max(1, _HEAD_NUMBERS // config.vocab_size)):
        best, tokens = logits(config, TorchOps(), head, rows).topk(k)
        yield tokens.int(), best
