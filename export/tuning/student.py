"""A rounded model whose blocks and norms can move, and how far its answers are from the exact model's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...quant import lattice
from ...quant.base import Format
from ...quant.formats import F32
from ...runtime.arrays import Floats
from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, capped, head_of
from ...runtime.model.tensors import TensorSpec, tensor_specs
from .latent import Latent, Rounded, Scaled
from .targets import TOGETHER, Targets
from .torch_model import TorchOps, through_layer

_ROWS = 128  # positions whose wanted rows of the head are there at a time


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


@dataclass
class _Pass:
    """What went through a layer, (positions, hidden) all: `x` enters it, None at the first, and `behind` leaves it,
    which the next norm makes `hidden` of. `matrices` are the layer's by role, in the precision of its products and the
    same for all that go through it.
    """

    x: Tensor | None
    matrices: dict[str, Tensor]
    behind: Tensor
    hidden: Tensor


def can_move(spec: TensorSpec, form: type[Format]) -> bool:
    """Whether a matrix moves, unless its format keeps it exactly. Embedding and head do not: what they learn from one
    text does not hold for another.
    """
    return spec.layer is not None and form.block > 1


class Student:
    """A rounded model that is to follow an exact one.

    `exact` gives a tensor's numbers, (rows, inputs) or those of a norm; `rounded` its format and blocks (rows,
    row_bytes). Both are asked in the order of the model's tensors. What the format keeps exactly stays, and so do codes
    unless they are to move, `codes`. The layers' products are in `precision`, whose errors are a hundredth of what a
    code's step is. With `hold` all that a layer makes stays in memory until the way back, which otherwise goes through
    it again: a third longer, to the same bits.
    """

    def __init__(
        self,
        config: ModelConfig,
        exact: Callable[[TensorSpec], Floats],
        rounded: Callable[[TensorSpec], tuple[type[Format], NDArray[np.uint8]]],
        precision: torch.dtype = torch.float32,
        codes: bool = True,
        hold: bool = False,
    ) -> None:
        self.config, self._precision, self._hold = config, precision, hold
        self.moving: dict[str, Scaled | Factors] = {}  # by GGUF name
        weights = defaultdict[int | None, dict[str, Rounded | Scaled | Factors]](dict)
        for spec in tensor_specs(config):
            form, blocks = rounded(spec)
            weight: Rounded | Scaled | Factors
            if spec.is_norm:
                weight = self.moving[spec.gguf] = Factors(form.dequantize(blocks)[0])
            elif can_move(spec, form) and not lattice.is_kept(form, numbers := exact(spec), blocks):
                weight = self.moving[spec.gguf] = Latent(form, blocks, numbers) if codes else Scaled(form, blocks)
            else:
                weight = Rounded(form, blocks)
            weights[spec.layer][spec.role] = weight
        self.weights = Weights(weights[None], [weights[i] for i in range(config.n_layers)])

    def parameters(self, kind: str) -> Iterator[Tensor]:
        """What moves, of a kind, in the order of the model's tensors."""
        yield from (weight.moving[kind] for weight in self.moving.values() if kind in weight.moving)

    def divergence(self, ids: Tensor, wanted: Targets) -> float:
        """Mean KL divergence from the exact model among the tokens that are `wanted`, in nats a token, over sequences
        (n, length). Its gradients are left in what moves.
        """
        before: list[Tensor | None] = [None]  # what enters each layer
        held: list[list[_Pass]] = []
        for i in range(self.config.n_layers):
            with torch.set_grad_enabled(self._hold):
                found = list(self._through(i, ids, before[i]))
            before.append(torch.cat([part.behind.detach() for part in found]))
            hidden = torch.cat([part.hidden.detach() for part in found])
            if self._hold:
                held.append(found)
            del found
        divergence, gradient = self._of_answers(hidden, wanted)
        for i in reversed(range(self.config.n_layers)):
            before.pop()
            gradient = self._back(i, held.pop() if held else self._through(i, ids, before[i]), gradient)
        return divergence

    def _through(self, index: int, ids: Tensor, x: Tensor | None) -> Iterator[_Pass]:
        """Sequences (n, length) through a layer, which x enters; a few at a time."""
        layers, matrices = list(self.weights.layers), dict[str, Tensor]()
        for role, weight in layers[index].items():
            if not isinstance(weight, Factors):
                matrix = weight().detach().to(self._precision)
                matrices[role] = matrix.requires_grad_(isinstance(weight, Scaled))
        layers[index] = {**layers[index], **matrices}
        there, parts = Weights(self.weights.shared, layers), ids.split(TOGETHER)
        streams = x.split(TOGETHER * ids.shape[1]) if x is not None else [None] * len(parts)
        for part, stream in zip(parts, streams, strict=True):
            if stream is not None:
                stream.requires_grad_(torch.is_grad_enabled())
            yield _Pass(stream, matrices, *through_layer(self.config, there, part, index, stream, self._precision))

    def _back(self, index: int, passes: Iterable[_Pass], gradient: Tensor) -> Tensor:
        """Back through a layer, from the gradients of what is behind it to those of what enters it, if that is x."""
        before, matrices = self._to_matrices(passes, index == self.config.n_layers - 1, gradient)
        for role, weight in self.weights.layers[index].items():
            if isinstance(weight, Scaled):
                weight().backward(matrices.pop(role))  # one after the other goes
        return before

    def _to_matrices(self, passes: Iterable[_Pass], last: bool, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradients of what enters a layer, and by role those of its matrices, in float32 whatever those are in."""
        before, rest, found = list[Tensor](), gradient, dict[str, Tensor]()

        def add(role: str, matrix: Tensor) -> None:
            assert matrix.grad is not None
            found[role] = found[role].add_(matrix.grad) if role in found else matrix.grad.float()
            matrix.grad = None

        for number, made in enumerate(passes):
            if not number:
                for role, matrix in made.matrices.items():
                    if matrix.requires_grad:
                        matrix.register_post_accumulate_grad_hook(partial(add, role))
            behind = made.hidden if last else made.behind
            behind.backward(rest[: len(behind)])
            rest = rest[len(behind) :]
            if made.x is not None and made.x.grad is not None:
                before.append(made.x.grad)
        return torch.cat(before) if before else gradient.new_empty(0), found

    def _of_answers(self, hidden: Tensor, wanted: Targets) -> tuple[float, Tensor]:
        """The divergence of what the last norm made, (positions, hidden), and its gradients."""
        gradient, total = torch.empty_like(hidden), 0.0
        tokens, exact = (x.flatten(0, 1) for x in (wanted.tokens, wanted.logits))
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            found = hidden[rows].detach().requires_grad_()
            divergence = self._piece(found, tokens[rows], exact[rows]) / len(hidden)
            (gradient[rows],) = torch.autograd.grad(divergence, found)
            total += float(divergence.detach())
        return total, gradient

    def _piece(self, hidden: Tensor, tokens: Tensor, exact: Tensor) -> Tensor:
        """Of positions (n,), all together."""
        rows = head_of(self.config, self.weights)[tokens]  # (n, k, hidden)
        found = capped(self.config, TorchOps(), (rows @ hidden[..., None]).squeeze(-1))
        p, q = exact.log_softmax(-1), found.log_softmax(-1)
        return (p.exp() * (p - q)).sum()
