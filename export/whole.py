"""Whole texts through a model, layer by layer and with all their rows at once, to see what goes on in it.

`forward.run_layers` runs on ops that read weights when they use them: a model of any size takes the memory of its rows
and of a few matrices. Row-wise work is done some rows at a time, so that what it makes on the way stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..runtime.arrays import Floats, Ints
from ..runtime.cache.caches import first_visible
from ..runtime.cache.numpy_store import attention
from ..runtime.model import forward
from ..runtime.model import ops as plain
from ..runtime.model.config import LayerConfig, ModelConfig
from ..runtime.model.forward import Ops
from ..runtime.model.tensors import TensorSpec, tensor_specs
from .ordered import ordered

ReadRows = Callable[[TensorSpec, int, int], Floats]
"""Rows start … stop−1 of a tensor, float32 (rows, inputs); a norm is one row. Called from several threads."""

ROWS = 512  # at a time in row-wise work; fixed, so that bits do not depend on the number of cores


class WholeSequences:
    """`forward.Rows` of sequences that begin at position 0 and are seen whole: no caches, and all rows are wanted."""

    def __init__(self, layers: Sequence[LayerConfig], sequences: Sequence[Ints]) -> None:
        self._layers, self._ids = layers, np.concatenate(sequences)
        ends = np.cumsum([len(ids) for ids in sequences]).tolist()
        self._spans = [slice(end - len(ids), end) for end, ids in zip(ends, sequences, strict=True)]
        self.positions = np.concatenate([np.arange(len(ids)) for ids in sequences])

    def embed(self, ops: Ops, weight: TensorSpec, scale: float) -> Floats:
        rows: Floats = ops.embed(weight, self._ids, scale)
        return rows

    def append(self, layer: int, keys: Floats, values: Floats) -> None:  # noqa: ARG002
        self._keys, self._values = keys, values

    def attend(self, layer: int, queries: Floats, scale: float, softcap: float | None) -> Floats:
        out, window = np.empty_like(queries), self._layers[layer].window
        first = np.array([first_visible(position, window) for position in self.positions.tolist()])

        def one(span: slice) -> None:
            keys, values, last = self._keys[span], self._values[span], self.positions[span] + 1
            out[span] = attention(queries[span], keys, values, first[span], last, scale, softcap)

        list(ordered(one, self._spans))
        del self._keys, self._values
        return out

    def wanted(self, x: Floats) -> Floats:
        return x


class WholeOps:
    """`forward.Ops` on many rows. Weights are `TensorSpec`s, whose numbers `read` gives.

    A subclass sees in `matrices` what goes through the model's matrices, and may change what it is multiplied with.
    """

    def __init__(self, read: ReadRows) -> None:
        self._read = read

    def matrices(self, x: Floats, weights: Sequence[TensorSpec]) -> Sequence[Floats]:  # noqa: ARG002
        """What to multiply the inputs x (n, inputs) of some matrices with: (outputs, inputs) each."""
        return [self._read(weight, 0, weight.shape[0]) for weight in weights]

    def norm(self, weight: TensorSpec) -> Floats:
        factors: Floats = self._read(weight, 0, 1)[0]
        return factors

    def rows_of(self, weight: TensorSpec, ids: Ints) -> Floats:
        """Rows (len(ids), hidden) of the embedding."""
        return np.concatenate([self._read(weight, i, i + 1) for i in ids.tolist()])

    def embed(self, weight: TensorSpec, ids: Ints, scale: float) -> Floats:
        different, places = np.unique(ids, return_inverse=True)
        return plain.embed(self.rows_of(weight, different), places, scale)

    def rms_norm(self, x: Floats, weight: TensorSpec, eps: float) -> Floats:
        factors = self.norm(weight)
        return by_rows(lambda x: (plain.rms_norm(x, factors, eps),), x)[0]

    def linear(self, x: Floats, *weights: TensorSpec) -> list[Floats]:
        return plain.linear(x, *self.matrices(x, weights))

    split_heads = staticmethod(plain.split_heads)
    join_heads = staticmethod(plain.join_heads)

    def rope(self, x: Floats, positions: Ints, base: float, factor: float) -> Floats:
        return by_rows(lambda x, p: (plain.rope(x, p, base, factor),), x, positions)[0]

    def add_norm(
        self, x: Floats, h: Floats, post_weight: TensorSpec | None, next_weight: TensorSpec, eps: float
    ) -> tuple[Floats, Floats]:
        post, following = None if post_weight is None else self.norm(post_weight), self.norm(next_weight)
        x, h = by_rows(lambda x, h: plain.add_norm(x, h, post, following, eps), x, h)
        return x, h

    def feed_forward(self, x: Floats, gate: TensorSpec, up: TensorSpec, down: TensorSpec) -> Floats:
        return self.linear(self._gated(x, gate, up), down)[0]

    def _gated(self, x: Floats, gate: TensorSpec, up: TensorSpec) -> Floats:
        pair = self.matrices(x, (gate, up))
        return by_rows(lambda x: (plain.gated(x, *pair),), x)[0]

    softcap = staticmethod(plain.softcap)


def run_layers(
    config: ModelConfig, ops: WholeOps, rows: WholeSequences, start: int = 0, x: Floats | None = None
) -> Iterator[tuple[Floats, Floats]]:
    """`forward.run_layers` with the model's tensors as weights."""
    shared = {spec.role: spec for spec in tensor_specs(config) if spec.layer is None}
    layers = [{spec.role: spec for spec in tensor_specs(config) if spec.layer == i} for i in range(config.n_layers)]
    return forward.run_layers(config, ops, forward.Weights(shared, layers), rows, start, x)


def by_rows(work: Callable[..., tuple[Floats, ...]], *inputs: Floats | Ints) -> tuple[Floats, ...]:
    """work(*inputs), which makes rows of rows, of some of them at a time."""
    n = len(inputs[0])
    head = work(*(x[:ROWS] for x in inputs))
    out = tuple(np.empty((n, *part.shape[1:]), part.dtype) for part in head)

    def piece(start: int) -> None:
        rows = slice(start, start + ROWS)
        for whole, part in zip(out, work(*(x[rows] for x in inputs)) if start else head, strict=True):
            whole[rows] = part

    list(ordered(piece, range(0, n, ROWS)))
    return out
