"""What is computed layer by layer as a text runs through a model, and can be broken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...runtime.arrays import Arrays
from ..kept import KeptWork

_STREAMS = 1 << 16  # the number of the residual streams before layer 0 in what is kept


class Sweep:
    """Arrays of each of so many layers, from what is kept or else computed and kept.

    `passing(i, streams)` goes through the layers from i on, before which the residual streams are `streams`; from the
    text on without any, where i is 0. It yields the streams behind each layer, and the layer's arrays.
    """

    def __init__(
        self, kept: KeptWork, passing: Callable[[int, Arrays], Iterator[tuple[Arrays, Arrays]]], layers: int
    ) -> None:
        self._kept, self._passing, self._layers = kept, passing, layers
        self._next = -1  # the layer that `_work` yields next
        self._work: Iterator[tuple[Arrays, Arrays]] = iter(())

    def layer(self, index: int) -> Arrays:
        """What was kept may be damaged anywhere: a layer whose streams are gone is reached from the first one again."""
        found: Arrays | None = self._kept.load(index)
        if found is not None:
            return found
        if self._next != index:
            streams = self._kept.load(_STREAMS + index)
            self._next = 0 if streams is None else index
            self._work = self._passing(self._next, streams or {})
        while self._next < index:
            self._pass()
        return self._pass()

    def _pass(self) -> Arrays:
        """One layer; what is kept leads on to the next at any time."""
        i, self._next = self._next, -1  # until it is done: what is broken off begins again
        streams, found = next(self._work)
        self._kept.save(_STREAMS + i + 1, streams)
        self._kept.save(i, found)
        self._kept.drop(_STREAMS + i)
        self._next = i + 1
        if self._next == self._layers:
            self._work = iter(())  # it holds all that the last layer made of the text
        return found
