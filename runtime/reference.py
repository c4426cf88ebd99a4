"""The reference engine: NumPy, float32 arithmetic on dequantized weights. Slow, and right by being readable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from . import ops
from .cache import KVCache
from .config import ModelConfig
from .engine import State
from .errors import InvalidSession
from .gguf import GGUFFile
from .model import forward
from .ops import Floats
from .tensors import TensorSpec, tensor_specs


class LazyWeights(Mapping[str, Floats]):
    """Tensors of a file by role, dequantized to float32 when first used and then kept."""

    def __init__(self, file: GGUFFile, specs: list[TensorSpec]) -> None:
        self._file, self._specs = file, {spec.role: spec for spec in specs}
        self._kept: dict[str, Floats] = {}

    def __getitem__(self, role: str) -> Floats:
        if role not in self._kept:
            self._kept[role] = self._file.dequantize(self._specs[role].gguf)
        return self._kept[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class ReferenceWeights:
    """A model's weights, shared by its sessions; 4 bytes a weight once all have been used."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        specs = list(tensor_specs(config))
        self.shared = LazyWeights(file, [s for s in specs if s.layer is None])
        self.layers = [LazyWeights(file, [s for s in specs if s.layer == i]) for i in range(config.n_layers)]


class ReferenceEngine:
    """One sequence on NumPy. See `Engine`; `caches` has one cache a layer."""

    def __init__(
        self, config: ModelConfig, weights: ReferenceWeights, caches: list[KVCache], chunk: int, threads: int | None
    ) -> None:
        self.chunk = chunk
        self.caches = caches
        self._config, self._weights, self._threads = config, weights, threads
        self._blas = ThreadpoolController()

    @property
    def position(self) -> int:
        return self.caches[0].length

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def forward(self, ids: npt.NDArray[np.int64], wanted: int) -> Floats:
        start = self.position
        try:
            with self._blas.limit(limits=self._threads, user_api="blas"):
                w = self._weights
                return forward(self._config, ops, w.shared, w.layers, self.caches, ids, wanted)
        except BaseException:
            for cache in self.caches:
                cache.rewind(cache.length - start)
            raise

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
