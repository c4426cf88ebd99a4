"""What an ONNX folder is made from: a checkpoint, quantized on the way, or a quantized GGUF file as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import BF16, EVEN, F16, F32, Format
from ...quant.integers import INTEGER_FORMS
from ...quant.recipes import preset
from ...runtime.arrays import Floats
from ...runtime.errors import InvalidCheckpoint, InvalidRequest
from ...runtime.files.gguf_model import GGUFModel
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ...runtime.text.tokenizer import Vocabulary
from ..gguf.writer import generation_metadata
from .checkpoint import Checkpoint

QUANTS = {"f32": "f32", "f16": "f16", "int8": "q8_0", "int4": "q4_0"}
"""What `--quant` says for ONNX, and the GGUF preset whose numbers it writes."""


class Source(Protocol):
    """Weights in blocks of GGUF's formats. `metadata` has GGUF's keys for what config and tokenizer do not tell."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def quant(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...

    def vocabulary(self) -> Vocabulary: ...

    def format(self, spec: TensorSpec) -> type[Format]:
        """A format in INTEGER_FORMS, F32 or F16."""

    def blocks(self, spec: TensorSpec, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows start … stop−1 in that format, uint8 (rows, bytes). May be called from several threads."""

    def rows(self, spec: TensorSpec, start: int, stop: int) -> Floats:
        """Rows start … stop−1 as they are found, float32 (rows, inputs)."""


class QuantizedCheckpoint:
    """A checkpoint whose rows are quantized as they are asked for. `quant` and `embedding` are keys of QUANTS."""

    def __init__(self, checkpoint: Checkpoint, quant: str, embedding: str | None = None) -> None:
        for given in (quant, embedding):
            if given is not None and given not in QUANTS:
                raise InvalidRequest(f"quant: found {given!r}, expected one of {', '.join(QUANTS)} for ONNX")
        if embedding is None:  # the head suffers most from quantizing
            embedding = "int8" if quant == "int4" else quant
        self.path, self.files, self.config = checkpoint.path, checkpoint.files, checkpoint.config
        self.quant = quant if embedding == quant else f"{quant}, embedding {embedding}"
        self._checkpoint, self.warnings = checkpoint, checkpoint.warnings
        recipe = preset(QUANTS[quant], checkpoint.config.n_layers, QUANTS[embedding])
        self._formats = {
            spec.gguf: recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).format for spec in checkpoint.specs
        }
        vocabulary = checkpoint.vocabulary()
        self.metadata = {"general.name": checkpoint.name, **generation_metadata(checkpoint, vocabulary)}
        if checkpoint.chat_template is not None:
            self.metadata["tokenizer.chat_template"] = checkpoint.chat_template

    def vocabulary(self) -> Vocabulary:
        return self._checkpoint.vocabulary()

    def format(self, spec: TensorSpec) -> type[Format]:
        return self._formats[spec.gguf]

    def blocks(self, spec: TensorSpec, start: int, stop: int) -> NDArray[np.uint8]:
        try:
            return self.format(spec).quantize(self.rows(spec, start, stop), EVEN)
        except ValueError as error:
            raise InvalidCheckpoint(f"{self.path}: tensor '{spec.hf}': {error}") from None

    def rows(self, spec: TensorSpec, start: int, stop: int) -> Floats:
        return self._checkpoint.rows(spec, start, stop)


class QuantizedFile:
    """A GGUF file's own blocks; `quant` names their formats. With `as_f32`, the float32 numbers they stand for.

    Raises InvalidRequest for a format whose numbers ONNX has no exact form for.
    """

    _KEPT = ("general.name", "general.sampling.", "tokenizer.chat_template", "bezel.generation.")

    def __init__(self, file: GGUFModel, as_f32: bool = False) -> None:
        self.path, self.files, self.config = file.path, (file.path,), file.config()
        file.check_tensors(self.config)
        self._file, self._as_f32, self.warnings = file, as_f32, ()
        specs = [spec for spec in tensor_specs(self.config) if spec.is_matrix]
        self.quant = "f32" if as_f32 else ", ".join(dict.fromkeys(file.tensors[s.gguf].format.name for s in specs[1:]))
        for spec in specs:
            found = file.tensors[spec.gguf].format
            if not as_f32 and found not in (*INTEGER_FORMS, F32, F16, BF16):
                raise InvalidRequest(
                    f"{file.path}: tensor '{spec.gguf}' is {found.name}, which ONNX cannot hold exactly: expected "
                    f"integers times a scale, as in {', '.join(f.name for f in INTEGER_FORMS)}. Export with --quant "
                    "f32, or from the checkpoint"
                )
        self.metadata = {
            key: np.asarray(value).tolist() if isinstance(value, (np.ndarray, np.generic)) else value
            for key, value in file.metadata.items()
            if key.startswith(self._KEPT)
        }

    def vocabulary(self) -> Vocabulary:
        return self._file.vocabulary()

    def format(self, spec: TensorSpec) -> type[Format]:
        stored = self._file.tensors[spec.gguf].format
        if self._as_f32 or spec.is_norm or stored is BF16:
            return F32
        return stored

    def blocks(self, spec: TensorSpec, start: int, stop: int) -> NDArray[np.uint8]:
        if self.format(spec) is self._file.tensors[spec.gguf].format:
            return self._file.data(spec.gguf)[start:stop]
        return F32.quantize(self.rows(spec, start, stop))

    def rows(self, spec: TensorSpec, start: int, stop: int) -> Floats:
        found: Floats = self._file.tensors[spec.gguf].format.dequantize(self._file.data(spec.gguf)[start:stop])
        return found
