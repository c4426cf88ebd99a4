"""The forward pass on PyTorch, which gives gradients: `forward.Ops` on tensors, and a batch of whole sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import ByRole, Ops, Weights, run_layers


def quick_precision() -> torch.dtype:
    """Of products that need not be exact: bfloat16 where the processor multiplies it, twice as fast as float32."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # which older releases lack
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def value(weight: Any) -> Tensor:
    """A weight's numbers: it is a tensor, or makes one."""
    made: Tensor = weight if isinstance(weight, Tensor) else weight()
    return made


def in_memory(weights: ByRole) -> Mapping[str, Tensor]:
    """All of them as tensors."""
    return {role: value(weight) for role, weight in weights.items()}


class TorchOps:
    """`forward.Ops` on float32 tensors, as `ops.py` has them; `linear` multiplies numbers in `precision`.

    Weights are what `value` takes, and for `embed` what has rows by number.
    """

    def __init__(self, precision: torch.dtype = torch.float32) -> None:
        self._precision = precision

    def embed(self, weight: Any, ids: Tensor, scale: float) -> Tensor:
        rows: Tensor = weight[ids]
        return rows * scale

    def rms_norm(self, x: Tensor, weight: Any, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * value(weight)

    def linear(self, x: Tensor, *weights: Any) -> list[Tensor]:
        short = x.to(self._precision)
        return [functional.linear(short, value(weight).to(self._precision)).float() for weight in weights]

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1))

    def join_heads(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def rope(self, x: Tensor, positions: Tensor, base: float, factor: float) -> Tensor:
        half = x.shape[-1] // 2
        frequency = torch.tensor([base ** -(i / half) / factor for i in range(half)], dtype=x.dtype, device=x.device)
        angle = positions[:, None, None] * frequency
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def add_norm(self, x: Tensor, h: Tensor, post_weight: Any, next_weight: Any, eps: float) -> tuple[Tensor, Tensor]:
        x = x + (h if post_weight is None else self.rms_norm(h, post_weight, eps))
        return x, self.rms_norm(x, next_weight, eps)

    def feed_forward(self, x: Tensor, gate: Any, up: Any, down: Any) -> Tensor:
        opened, upped = self.linear(x, gate, up)
        return self.linear(functional.gelu(opened, approximate="tanh") * upped, down)[0]

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)


class Batch:
    """`forward.Rows` of sequences of equal length, ids (sequences, length), that are seen whole."""

    def __init__(self, config: ModelConfig, ids: Tensor) -> None:
        self._config, self._ids = config, ids
        length = ids.shape[1]
        self.positions = torch.arange(length, device=ids.device).repeat(len(ids))
        place = torch.arange(length, device=ids.device)
        self._behind = place[:, None] - place  # how far behind a query each key lies

    def embed(self, ops: Ops, weight: Any, scale: float) -> Any:
        return ops.embed(weight, self._ids.flatten(), scale)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:  # noqa: ARG002
        self._keys, self._values = keys, values

    def attend(self, layer: int, queries: Tensor, scale: float, softcap: float | None) -> Tensor:
        n, heads, window = len(self._ids), queries.shape[1], self._config.layers[layer].window
        q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (queries, self._keys, self._values))
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scale  # (sequences, heads, queries, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = (self._behind >= 0) & (self._behind < (window or len(self._behind)))
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).flatten(0, 1)

    def wanted(self, x: Tensor) -> Tensor:
        return x


def hidden_of(config: ModelConfig, weights: Weights, embedded: Tensor) -> Tensor:
    """What the last norm makes of all positions of embedded sequences (n, length, hidden): (n · length, hidden)."""
    places = torch.zeros(embedded.shape[:2])
    passes = run_layers(config, TorchOps(), weights, Batch(config, places), 0, embedded.flatten(0, 1))
    [(_, hidden)] = deque(passes, maxlen=1)
    made: Tensor = hidden
    return made


def through_layer(
    config: ModelConfig,
    weights: Weights,
    ids: Tensor,
    index: int,
    x: Tensor | None,
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The residual stream (n · length, hidden) of sequences (n, length) behind one layer, and what the next norm makes
    of it; before the layer it is x, or None at the first.
    """
    return next(run_layers(config, TorchOps(precision), weights, Batch(config, ids), index, x))
