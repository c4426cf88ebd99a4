"""A model's eye on the ops of one engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..arrays import Floats
from ..errors import InvalidModelFile
from ..model.forward import Weights
from ..model.tensors import TensorSpec
from ..model.vision import (
    VisionConfig,
    VisionOps,
    as_multiplied,
    is_multiplied,
    look_bytes,
    patches_of,
    see,
    vision_specs,
)


class VisionTensors(Protocol):
    """Where a tower's weights come from: a file, or a checkpoint. `tensor` gives those of `vision_specs`."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> VisionConfig: ...
    def fingerprint(self) -> str: ...
    def tensor(self, name: str, /) -> Floats: ...


class Tower:
    """The tower and the projector in a file, in the form that `ops` take; `matrix` makes that of one for a spec.

    Nothing but the config is read before the first picture comes.
    """

    def __init__(self, file: VisionTensors, ops: VisionOps, matrix: Callable[[Any, TensorSpec], Any]) -> None:
        self.config, self.ops, self._file, self._matrix = file.config, ops, file, matrix

    @cached_property
    def fingerprint(self) -> str:
        """Which eye this is."""
        return self._file.fingerprint()

    @cached_property
    def weights(self) -> Weights:
        file = self._file
        shared: dict[str, Any] = {}
        layers: list[dict[str, Any]] = [{} for _ in range(self.config.n_layers)]
        for spec in vision_specs(self.config):
            home = shared if spec.layer is None else layers[spec.layer]
            home[spec.role] = self._matrix(file, spec) if is_multiplied(spec) else file.tensor(spec.gguf)
        return Weights(shared, layers)

    @property
    def most_bytes(self) -> int:
        """Bytes that it takes at most: its file, what is no matrix in float32, and a look at one picture."""
        floats = sum(4 * math.prod(spec.shape) for spec in vision_specs(self.config) if not spec.is_matrix)
        return self._file.path.stat().st_size + floats + look_bytes(self.config)

    def rows(self, pixels: Floats) -> Floats:
        """The rows (n_rows, text_size) that stand for normalised pixels (side, side, channels).

        Raises InvalidModelFile where they are not finite.
        """
        with np.errstate(all="ignore"):  # of a damaged file, as is told below
            rows: Floats = see(self.config, self.ops, self.weights, patches_of(pixels, self.config.patch_size))
        return sound(self._file.path, rows)


def sound(path: Path, rows: Floats) -> Floats:
    """The rows that an eye in a file makes of a picture. Raises InvalidModelFile where they are not finite."""
    if not np.isfinite(rows).all():
        raise InvalidModelFile(
            path,
            "what it makes of a picture is not finite: it is damaged, or was never sound (`bezel verify` compares "
            "it with its source)",
        )
    return rows


def float_matrix(file: VisionTensors, spec: TensorSpec) -> Floats:
    """A matrix (outputs, inputs) of the tower in float32."""
    return as_multiplied(file.config, spec, file.tensor(spec.gguf))
