"""A rounded model whose blocks and norms can move, and how far its answers are from the exact model's."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...quant import lattice
from ...quant.base import Format
from ...quant.formats import F32
from ...runtime.arrays import Floats
from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, head_of, logits, run_layers
from ...runtime.model.tensors import TensorSpec, tensor_specs
from .latent import Latent
from .torch_model import Batch, TorchOps, value

_HEAD_NUMBERS = 1 << 24  # logits that are there at a time


class Factors:
    """A norm's factors (hidden,), moved by their logarithms."""

    def __init__(self, start: Floats) -> None:
        self._start = torch.from_numpy(start)
        self.norm = torch.zeros(len(start), requires_grad=True)
        self.moving = {"norm": self.norm}

    def __call__(self) -> Tensor:
        factors: Tensor = self._start * self.norm.exp()
        return factors

    def blocks(self) -> NDArray[np.uint8]:
        return F32.quantize(self().detach().numpy()[None])


class Student:
    """A rounded model, and `teacher`, the exact one that it is to follow.

    `exact` gives a tensor's numbers, (rows, inputs) or those of a norm; `rounded` its format and blocks (rows,
    row_bytes). Both are asked in the order of the model's tensors. What the format keeps
    exactly stays. So do embedding and head, as they are rounded: what they learn from one text does not hold for
    another.
    """

    def __init__(
        self,
        config: ModelConfig,
        exact: Callable[[TensorSpec], Floats],
        rounded: Callable[[TensorSpec], tuple[type[Format], NDArray[np.uint8]]],
    ) -> None:
        self.config = config
        self.moving: dict[str, Latent | Factors] = {}  # by GGUF name
        teacher, own = (defaultdict[int | None, dict[str, Tensor | Latent | Factors]](dict) for _ in range(2))
        for spec in tensor_specs(config):
            numbers, (form, blocks) = exact(spec), rounded(spec)
            weight: Tensor | Latent | Factors
            if spec.is_norm:
                weight = self.moving[spec.gguf] = Factors(form.dequantize(blocks)[0])
            elif form.block > 1 and spec.layer is not None and not lattice.is_kept(form, numbers, blocks):
                weight = self.moving[spec.gguf] = Latent(form, blocks, numbers)
            else:
                weight = torch.from_numpy(form.dequantize(blocks))
            teacher[spec.layer][spec.role], own[spec.layer][spec.role] = torch.from_numpy(numbers), weight
        self.teacher, self.weights = (Weights(x[None], [x[i] for i in range(config.n_layers)]) for x in (teacher, own))

    def parameters(self, kind: str) -> Iterator[Tensor]:
        """What moves, of a kind, in the order of the model's tensors."""
        yield from (weight.moving[kind] for weight in self.moving.values() if kind in weight.moving)

    def divergence(self, ids: Tensor) -> Tensor:
        """Mean KL divergence from the exact model, in nats a token, over sequences (n, length)."""
        with torch.no_grad():
            exact = self._answer(self.teacher, ids)
        found = self._answer(self.weights, ids)
        heads = head_of(self.config, self.teacher), value(head_of(self.config, self.weights))
        step = max(1, _HEAD_NUMBERS // self.config.vocab_size)
        total = found.new_zeros(())
        for start in range(0, len(found), step):
            rows = slice(start, start + step)
            total = total + checkpoint(self._piece, exact[rows], found[rows], *heads, use_reentrant=False)
        return total / len(found)

    def _answer(self, weights: Weights, ids: Tensor) -> Tensor:
        [(_, h)] = deque(run_layers(self.config, TorchOps(), weights, Batch(self.config, ids)), maxlen=1)
        return h

    def _piece(self, exact: Tensor, found: Tensor, exact_head: Tensor, head: Tensor) -> Tensor:
        with torch.no_grad():
            p = logits(self.config, TorchOps(), exact_head, exact).log_softmax(-1)
        q = logits(self.config, TorchOps(), head, found).log_softmax(-1)
        return (p.exp() * (p - q)).sum()
