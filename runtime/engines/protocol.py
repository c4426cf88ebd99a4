"""What every engine offers, and the engine that runs `model.forward` on any ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache.caches import KVCache
from ..errors import InvalidSession
from ..model.config import ModelConfig
from ..model.forward import Ops, Weights, forward
from ..model.ops import Floats

State = Mapping[str, npt.NDArray[Any]]


class Engine(Protocol):
    """The weights of a model, and one sequence going through it.

    `chunk` is the largest number of ids that `forward` takes; a rewind to at most `chunk` positions
    behind the newest that it ever took always works.
    """

    chunk: int

    @property
    def position(self) -> int:
        """How many ids the caches hold: the position of the next one."""

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    def forward(self, ids: npt.NDArray[np.int64], wanted: int) -> Floats:
        """Take n ids; logits (wanted, vocab) of the last `wanted`, 0 to n. If it raises, nothing changed."""

    def rewind(self, n: int) -> None:
        """Forget the n newest ids. Raises CacheError if a ring no longer holds what comes before them."""

    def snapshot(self) -> State:
        """All caches as arrays by name."""

    def restore(self, state: State) -> None:
        """Take over a snapshot. Raises InvalidSession, changing nothing, if it belongs to other caches."""


class Backend(Protocol):
    """A model's weights in the form that one kind of engine takes, shared by all its sequences."""

    def engine(self, context: int, kv: str, chunk: int, ring: bool) -> Engine:
        """A new, empty sequence; see `cache.new_caches`."""


class CachedEngine:
    """What engines do with their caches, of which there is one a layer."""

    def __init__(self, caches: list[KVCache], chunk: int) -> None:
        self.chunk, self.caches = chunk, caches

    @property
    def position(self) -> int:
        return self.caches[0].length

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def rewind(self, n: int) -> None:
        for cache in self.caches:
            cache.check_rewind(n)
        for cache in self.caches:
            cache.rewind(n)

    def snapshot(self) -> State:
        return {
            f"layers.{i}.{name}": array
            for i, cache in enumerate(self.caches)
            for name, array in cache.snapshot().items()
        }

    def restore(self, state: State) -> None:
        restored = []
        for i, cache in enumerate(self.caches):
            prefix = f"layers.{i}."
            part = {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}
            restored.append(cache.restored(part))
        if len({cache.length for cache in restored}) != 1:
            raise InvalidSession("the saved layers hold different numbers of positions")
        self.caches = restored


class ModelEngine(CachedEngine):
    """One sequence through `model.forward` on some ops."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        shared: Weights,
        layers: Sequence[Weights],
        caches: list[KVCache],
        chunk: int,
    ) -> None:
        super().__init__(caches, chunk)
        self.ops = ops
        self._config, self._shared, self._layers = config, shared, layers

    def forward(self, ids: npt.NDArray[np.int64], wanted: int) -> Floats:
        start = self.position
        try:
            return forward(self._config, self.ops, self._shared, self._layers, self.caches, ids, wanted)
        except BaseException:
            for cache in self.caches:
                cache.rewind(cache.length - start)
            raise
