"""What goes through each matrix of a model, as ops note it while a layer runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.arrays import Floats
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ..whole import ReadRows, WholeOps

_BATCH = 1 << 25  # inputs, in numbers, that are multiplied at a time: large matrices are slow to add up

HEAD = "head"
_TOGETHER = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "ffn_gate": "ffn", "ffn_up": "ffn"}


def site_of(spec: TensorSpec, config: ModelConfig) -> str | None:
    """The name of what goes into a matrix, which some share: "blk.0.attn", …, HEAD; None for what is no linear's."""
    if spec.layer is None:
        return HEAD if spec.role == head_role(config) else None
    return f"blk.{spec.layer}.{_TOGETHER.get(spec.role, spec.role)}" if spec.is_matrix else None


def head_role(config: ModelConfig) -> str:
    return "token_embd" if config.tied_head else "output"


def widths(config: ModelConfig) -> dict[str, int]:
    """How many numbers go into each site of a model, the head's last."""
    found = {site: spec.shape[1] for spec in tensor_specs(config) if (site := site_of(spec, config))}
    return {**found, HEAD: found.pop(HEAD)}


@dataclass
class Note:
    """Of a site, by row: `inputs` (n, width), and the residual `stream` (n, hidden) once its output was added to that.

    `weight` (n,) is how much an error in the output counts; None: the same in each row.
    """

    inputs: Floats
    weight: Floats | None = None
    stream: Floats | None = None


class NotingOps(WholeOps):
    """Keeps a `Note` of each site."""

    def __init__(self, config: ModelConfig, read: ReadRows) -> None:
        super().__init__(read)
        self._config = config
        self.notes: dict[str, Note] = {}

    def taken(self) -> Iterator[tuple[str, Note]]:
        """The notes by site, each of them forgotten."""
        while self.notes:
            site = next(iter(self.notes))
            yield site, self.notes.pop(site)

    def matrices(self, x: Floats, weights: Sequence[TensorSpec]) -> Sequence[Floats]:
        site = site_of(weights[0], self._config)
        assert site is not None
        self._newest = self.notes[site] = Note(x)
        return super().matrices(x, weights)

    def add_norm(
        self, x: Floats, h: Floats, post_weight: TensorSpec | None, next_weight: TensorSpec, eps: float
    ) -> tuple[Floats, Floats]:
        if post_weight is not None:  # which divides by h's root mean square: errors count relative to that
            self._newest.weight = 1 / (np.einsum("ij,ij->i", h, h) / h.shape[1] + np.float32(eps))
        x, h = super().add_norm(x, h, post_weight, next_weight, eps)
        self._newest.stream = x
        return x, h


def moments(x: Floats, weight: Floats | None = None, y: Floats | None = None) -> tuple[Floats, Floats | None]:
    """Σ x xᵀ and, given y, Σ (y − x) xᵀ (width, width) over rows (n, width), each counted as `weight` (n,) says."""
    n, width = x.shape
    inputs = np.zeros((width, width), np.float32)
    drift = None if y is None else np.zeros_like(inputs)
    step = max(1, _BATCH // width)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        root = 1 if weight is None else np.sqrt(weight[rows])[:, None]
        part = x[rows] * root
        inputs += part.T @ part
        if y is not None and drift is not None:
            off = y[rows] - x[rows]
            off *= root
            drift += off.T @ part
    return inputs, drift
