"""The eye in an ONNX folder: a graph of its own, `vision.onnx`, which is checked with the rest of the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.vision import VisionConfig, vision_specs
from .onnx_model import Initializer
from .onnx_tensors import OnnxTensor, Read, dequantize, find_tensors

_SAMPLE = 4096  # bytes of each tensor that the fingerprint covers


class OnnxEye:
    """What `VisionFile` is beside a GGUF file. `graph` are the checked bytes, `read` gives those of an initialiser."""

    def __init__(
        self,
        path: Path,
        config: VisionConfig,
        graph: bytes,
        initializers: Mapping[str, Initializer],
        formats: Mapping[str, Any],
        read: Read,
    ) -> None:
        self.path, self.config, self.graph = path, config, graph
        self._initializers, self._formats, self._read = initializers, formats, read

    @cached_property
    def tensors(self) -> Mapping[str, OnnxTensor]:
        """Those of `vision_specs`, by their names there. Raises InvalidModelFile."""
        return find_tensors(self.path, self._initializers, vision_specs(self.config), self._formats)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32 in its own shape."""
        return self.dequantize(name)

    def dequantize(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The same, or some rows of it, float32 (rows, inputs)."""
        return dequantize(self.tensors[name], self._read, rows)

    def fingerprint(self) -> str:
        """Which eye this is: SHA-256 (hex) of its graph, of its config and of the first 4 KiB of each tensor."""
        digest = hashlib.sha256(self.graph)
        digest.update(repr(self.config).encode())
        for tensor in self._initializers.values():
            if tensor.location is not None:
                digest.update(self._read(tensor.name)[:_SAMPLE].data)
        return digest.hexdigest()
