"""The reference engine: NumPy, float32 arithmetic on dequantized weights. Slow, and right by being readable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController

from ..arrays import Floats
from ..cache.numpy_store import NumpyStore
from ..files.model_file import ModelFile
from ..model import ops
from ..model.config import ModelConfig
from ..model.forward import Weights
from ..model.tensors import TensorSpec, tensor_specs
from .protocol import ModelBackend
from .rows import Segment
from .tower import Tower, VisionTensors, float_matrix


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


class ReferenceBackend(ModelBackend):
    """A model's weights for NumPy; 4 bytes a weight once all have been used. `threads` limits NumPy's BLAS."""

    def __init__(self, file: ModelFile, config: ModelConfig, threads: int | None) -> None:
        specs = list(tensor_specs(config))
        weights = Weights(
            LazyWeights(file, [s for s in specs if s.layer is None]),
            [LazyWeights(file, [s for s in specs if s.layer == i]) for i in range(config.n_layers)],
        )
        super().__init__(config, ops, weights, NumpyStore)
        self._threads, self._blas = threads, ThreadpoolController()

    def tower(self, file: VisionTensors) -> Tower:
        return _LimitedTower(self, file)

    def limited(self) -> AbstractContextManager[Any]:
        """What is computed inside takes no more threads than this backend."""
        limited: AbstractContextManager[Any] = self._blas.limit(limits=self._threads, user_api="blas")
        return limited

    def forward(self, segments: Sequence[Segment], streams: list[Any] | None = None) -> Floats:
        with self.limited():
            return super().forward(segments, streams)


class _LimitedTower(Tower):
    def __init__(self, backend: ReferenceBackend, file: VisionTensors) -> None:
        super().__init__(file, ops, float_matrix)
        self._backend = backend

    def rows(self, pixels: Floats) -> Floats:
        with self._backend.limited():
            return super().rows(pixels)
