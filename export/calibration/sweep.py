"""Second moments of the inputs of every linear, site by site, as a calibration text runs through the model.

Two streams can run side by side: the exact model's, and that of a model whose matrices are replaced by quantized ones
while it runs. Only one layer's weights are in memory, and every sequence's residual streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.arrays import Floats, Ints
from ...runtime.model import ops
from ..sources.checkpoint import Checkpoint
from .layers import ATTENTION, DOWN, FEED_FORWARD, HEAD, OUTPUT, Layer, Site, embedded, in_order
from .state import State

_POST_NORMS = {OUTPUT: "post_attention_norm", DOWN: "post_ffw_norm"}
_STREAMS = 1 << 16  # the number in a state of the streams before layer 0
_BATCH = 1 << 25  # inputs, in numbers, that are multiplied at a time: large matrices are slow to add up
_ONE = np.ones(1, np.float32)


@dataclass(frozen=True)
class Moments:
    """Of `site` in `layer`: `inputs` Σ x xᵀ (n, n), and `cross` Σ y xᵀ of the exact inputs y, None with one stream.

    A position whose output a norm divides by its root mean square r counts 1 / r²: that much an error weighs there.
    """

    layer: int | None
    site: Site
    inputs: Floats
    cross: Floats | None


class Sweep:
    """A pass of `sequences` through the layers. `exact` and `now` are the current layer's weights by role.

    With `replacing`, the caller replaces matrices in `now` after each `Moments`, before it asks for the next, and
    norms after a matrix are fitted to what was replaced, so that the residual stream comes back to the exact one.
    """

    def __init__(self, checkpoint: Checkpoint, sequences: Sequence[Ints], *, replacing: bool) -> None:
        self._checkpoint, self._config, self._replacing = checkpoint, checkpoint.config, replacing
        self._sequences, self._eps = sequences, checkpoint.config.rms_eps
        self._specs = {(spec.layer, spec.role): spec for spec in checkpoint.specs}
        self.exact: dict[str, Floats] = {}
        self.now: dict[str, Floats] = {}
        self._x: list[Floats] = []
        self._y: list[Floats] = []  # the exact streams; the same as x with one

    def to_head(self) -> Moments:
        """Past all layers, to the head's moments; with one stream only."""
        self._begin(None)
        for i in range(self._config.n_layers):
            self._load(i)
            self._y[:] = in_order(Layer(self._config, i, self.exact).passed, self._y)
        return self.head()

    def layers(self, state: State, embedding: Callable[[Ints], Floats] | None = None) -> Iterator[int]:
        """The indices of the layers that are to be passed, from where `state` says that an earlier run had come to.

        What the caller has computed of a layer, it keeps before it asks for the next. `embedding` gives the rows by id
        that replace the exact ones.
        """
        n = self._config.n_layers
        start, found = next(((i, f) for i in range(n, 0, -1) if (f := state.load(_STREAMS + i)) is not None), (0, None))
        if found is not None:
            self._y = list(found["y"])
            self._x = list(found["x"]) if self._replacing else self._y
        else:
            self._begin(embedding)
        for i in range(start, n):
            yield i
            streams = {"y": np.stack(self._y)} | ({"x": np.stack(self._x)} if self._replacing else {})
            state.save(_STREAMS + i + 1, streams)
            state.drop(_STREAMS + i)

    def layer(self, index: int) -> Iterator[Moments]:
        """The moments of the layer's four sites; then the streams have passed it."""
        self._load(index)
        yield self._moments(index, ATTENTION, self._pairs(index, Layer.attention_input))
        yield from self._residual(
            index, OUTPUT, self._pairs(index, lambda layer, x: layer.attention(layer.attention_input(x)))
        )
        yield self._moments(index, FEED_FORWARD, self._pairs(index, Layer.feed_forward_input))
        yield from self._residual(
            index, DOWN, self._pairs(index, lambda layer, x: layer.gated(layer.feed_forward_input(x)))
        )

    def _load(self, index: int) -> None:
        """The weights of a layer, in the place of those before."""
        self.exact, self.now = {}, {}
        specs = {role: spec for (layer, role), spec in self._specs.items() if layer == index}
        self.exact = {role: self._checkpoint.tensor(spec) for role, spec in specs.items()}
        self.now = dict(self.exact) if self._replacing else self.exact

    def _begin(self, embedding: Callable[[Ints], Floats] | None) -> None:
        spec = self._specs[None, "token_embd"]
        self._y = embedded(self._config, self._sequences, lambda ids: self._checkpoint.some_rows(spec, ids))
        self._x = self._y if embedding is None else embedded(self._config, self._sequences, embedding)

    def head(self) -> Moments:
        """The moments of the head's inputs, after the last layer."""
        norm = self._checkpoint.tensor(self._specs[None, "output_norm"])
        streams = zip(self._y, self._x, strict=True)
        return self._moments(None, HEAD, (tuple(ops.rms_norm(s, norm, self._eps) for s in both) for both in streams))

    def _pairs(self, index: int, inputs: Callable[[Layer, Floats], Floats]) -> Iterator[tuple[Floats, ...]]:
        """A site's inputs in the exact stream and in the other, by sequence."""
        exact, now = Layer(self._config, index, self.exact), Layer(self._config, index, self.now)

        def both(i: int) -> tuple[Floats, ...]:
            first = inputs(exact, self._y[i])
            return first, inputs(now, self._x[i]) if self._replacing else first

        return in_order(both, range(len(self._y)))

    def _residual(self, index: int, site: Site, pairs: Iterator[tuple[Floats, ...]]) -> Iterator[Moments]:
        """The moments of a site whose output is added to the residual stream; then both streams are past it."""
        exact, inputs, weights = Layer(self._config, index, self.exact), [], []

        def weighted() -> Iterator[tuple[Floats, ...]]:
            for i, (y, x) in enumerate(pairs):
                self._y[i], weight = exact.add(self._y[i], site, y)
                inputs.append(x)
                weights.append(weight)
                root = np.sqrt(weight)[:, None]
                yield y * root, x * root

        yield self._moments(index, site, weighted())
        if not self._replacing:
            return
        if _POST_NORMS[site] in self.now:
            self.now[_POST_NORMS[site]] = self._fitted_norm(site, inputs)
        now = Layer(self._config, index, self.now)
        for i, x in enumerate(inputs):
            self._x[i], _ = now.add(self._x[i], site, x)

    def _moments(self, layer: int | None, site: Site, pairs: Iterator[tuple[Floats, ...]]) -> Moments:
        n = site.width(self._config)
        inputs, cross = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32) if self._replacing else None
        for y, x in _batches(pairs, _BATCH // n):
            inputs += x.T @ x
            if cross is not None:
                cross += y.T @ x
        return Moments(layer, site, inputs, cross)

    def _fitted_norm(self, site: Site, inputs: Sequence[Floats]) -> Floats:
        """The norm's factors (hidden,) by least squares: what the stream lacks is what the sub-layer should add."""
        over, under = np.zeros(self._config.hidden_size), np.zeros(self._config.hidden_size)
        for y, x, h in zip(self._y, self._x, inputs, strict=True):
            (out,) = ops.linear(h, self.now[site.roles[0]])
            out = ops.rms_norm(out, _ONE, self._eps)
            over += np.einsum("ij,ij->j", out, y - x)
            under += np.einsum("ij,ij->j", out, out)
        plain = self.exact[_POST_NORMS[site]]
        return np.divide(over, under, out=plain.astype(np.float64), where=under > 0).astype(np.float32)


def _batches(pairs: Iterator[tuple[Floats, ...]], least: int) -> Iterator[tuple[Floats, ...]]:
    """The pairs (n, width), several together until there are `least` rows."""
    held: list[tuple[Floats, ...]] = []
    for pair in pairs:
        held.append(pair)
        if sum(len(x) for _, x in held) >= least:
            yield tuple(np.concatenate(side) for side in zip(*held, strict=True))
            held = []
    if held:
        yield tuple(np.concatenate(side) for side in zip(*held, strict=True))
