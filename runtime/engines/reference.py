"""The reference engine: NumPy, float32 arithmetic on dequantized weights. Slow, and right by being readable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from ..cache.caches import KVCache, new_caches
from ..files.model_file import ModelFile
from ..model import ops
from ..model.config import ModelConfig
from ..model.ops import Floats
from ..model.tensors import TensorSpec, tensor_specs
from .protocol import ModelEngine


class LazyWeights(Mapping[str, Floats]):
    """Tensors of a file by role, dequantized to float32 when first used and then kept."""

    def __init__(self, file: ModelFile, specs: list[TensorSpec]) -> None:
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


class ReferenceBackend:
    """A model's weights for NumPy; 4 bytes a weight once all have been used. `threads` limits NumPy's BLAS."""

    def __init__(self, file: ModelFile, config: ModelConfig, threads: int | None) -> None:
        specs = list(tensor_specs(config))
        self.config, self.threads = config, threads
        self.shared = LazyWeights(file, [s for s in specs if s.layer is None])
        self.layers = [LazyWeights(file, [s for s in specs if s.layer == i]) for i in range(config.n_layers)]

    def engine(self, context: int, kv: str, chunk: int, ring: bool) -> ReferenceEngine:
        return ReferenceEngine(self, new_caches(self.config, context, kv, chunk, ring), chunk)


class ReferenceEngine(ModelEngine):
    """One sequence on NumPy."""

    def __init__(self, backend: ReferenceBackend, caches: list[KVCache], chunk: int) -> None:
        super().__init__(backend.config, ops, backend.shared, backend.layers, caches, chunk)
        self._threads = backend.threads
        self._blas = ThreadpoolController()

    def forward(self, ids: npt.NDArray[np.int64], wanted: int) -> Floats:
        with self._blas.limit(limits=self._threads, user_api="blas"):
            return super().forward(ids, wanted)
