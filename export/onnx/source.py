"""What an ONNX folder is made from: a checkpoint, quantized on the way, or a GGUF file's own blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import BF16, F16, F32, Format
from ...quant.integers import INTEGER_FORMS
from ...quant.recipes import preset
from ...runtime.errors import InvalidRequest
from ...runtime.files.models import own_eye
from ...runtime.model.tensors import TensorSpec
from ..metadata import described
from ..sources.checkpoint import Checkpoint, TensorSource, VisionSource

QUANTS = {"f32": "f32", "f16": "f16", "int8": "q8_0", "int4": "q4_0"}
"""What `--quant` says for ONNX, and the GGUF preset whose numbers it writes."""


VISION_QUANT = "int8"  # nearly without loss, and fast


class Quantized:
    """The tensors `specs` of something that is exported, in formats that ONNX can hold: those in INTEGER_FORMS, F32 and
    F16, by name in GGUF. `quant` names them.
    """

    def __init__(self, tensors: TensorSource, quant: str, formats: Mapping[str, type[Format]]) -> None:
        self.path, self.files, self.specs = tensors.path, tensors.files, tensors.specs
        self.quant, self._tensors, self._formats = quant, tensors, formats

    def format(self, spec: TensorSpec) -> type[Format]:
        return self._formats[spec.gguf]

    def blocks(self, spec: TensorSpec, start: int, stop: int) -> tuple[NDArray[np.uint8], int]:
        """Rows start … stop−1 in the tensor's format, uint8 (rows, bytes), and how many of their weights vanished.

        May be called from several threads.
        """
        blocks = self._tensors.blocks(spec, start, stop, self.format(spec))
        return blocks, self._tensors.vanished(spec, start, stop, self.format(spec), blocks)


class OnnxSource(Quantized):
    """A checkpoint, and the `eye` that it may have.

    The formats are those of a `quant` and an `embedding`, keys of QUANTS. Without, a GGUF file keeps its own, and a
    folder gets int8. The eye's are those of `vision`, or what suits the text model's. Raises InvalidRequest for a
    format whose numbers ONNX has no exact form for, or a `vision` without an eye, and InvalidCheckpoint for a file that
    is quantized and would have to be quantized again, unless `requantize`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: str | None = None,
        embedding: str | None = None,
        requantize: bool = False,
        vision: str | None = None,
    ) -> None:
        self.checkpoint, self.config, self.vocabulary = checkpoint, checkpoint.config, checkpoint.vocabulary
        self.metadata: dict[str, Any] = described(checkpoint)
        if quant is None and embedding is None and checkpoint.path.is_file():
            self.metadata |= checkpoint.calibration
            formats = {spec.gguf: _kept(checkpoint, spec) for spec in checkpoint.specs}
            matrices = [spec for spec in checkpoint.specs if spec.is_matrix]
            name = ", ".join(dict.fromkeys(checkpoint.format(spec).name for spec in matrices[1:]))
        else:
            if not requantize and (quant, embedding) != ("f32", None):  # float32 has every block's numbers exactly
                checkpoint.check_unquantized()
            name, formats = _asked_for(checkpoint, quant or "int8", embedding)
        super().__init__(checkpoint, name, formats)
        self.warnings = (*checkpoint.warnings, *checkpoint.added_losses(formats), *_eye_left(checkpoint.path))
        if vision is not None and checkpoint.vision is None:
            raise InvalidRequest(f"--vision: {checkpoint.path} has no vision tower")
        fitting = quant if quant in ("f32", "f16") else VISION_QUANT
        self.eye = None if checkpoint.vision is None else EyeSource(checkpoint.vision, vision or fitting)


class EyeSource(Quantized):
    """The eye of a checkpoint, its matrices in the format of a `quant`."""

    def __init__(self, eye: VisionSource, quant: str) -> None:
        _check_quant(quant, "vision")
        recipe = preset(QUANTS[quant], eye.config.n_layers)
        if recipe.default.block > 1:
            eye = eye.widened(recipe.default.block)
        self.config = eye.config
        formats: dict[str, type[Format]] = {
            spec.gguf: recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).format if spec.is_matrix else F32
            for spec in eye.specs
        }
        super().__init__(eye, quant, formats)


def _eye_left(path: Path) -> list[str]:
    """A warning where a GGUF file has an eye beside it."""
    eye = own_eye(path)
    if eye is None:
        return []
    return [f"pictures are left out: {eye.name} is not read; export the checkpoint that it came from"]


def _kept(checkpoint: Checkpoint, spec: TensorSpec) -> type[Format]:
    """The format in which ONNX holds what the file holds."""
    stored = checkpoint.format(spec)
    if spec.is_norm or stored is BF16:
        return F32
    exact: dict[str, type[Format]] = {form.name: form for form in INTEGER_FORMS} | {"f32": F32, "f16": F16}
    if stored.name not in exact:
        raise InvalidRequest(
            f"{checkpoint.path}: tensor '{spec.gguf}' is {stored.name}, which ONNX cannot hold exactly: expected "
            f"integers times a scale, as in {', '.join(f.name for f in INTEGER_FORMS)}. Export with --quant f32, or "
            "from the checkpoint"
        )
    return exact[stored.name]


def _asked_for(checkpoint: Checkpoint, quant: str, embedding: str | None) -> tuple[str, dict[str, type[Format]]]:
    for given in (quant, embedding):
        if given is not None:
            _check_quant(given)
    if embedding is None:  # the head suffers most from quantizing
        embedding = "int8" if quant == "int4" else quant
    recipe = preset(QUANTS[quant], checkpoint.config.n_layers, QUANTS[embedding])
    formats = {
        spec.gguf: recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).format for spec in checkpoint.specs
    }
    return quant if embedding == quant else f"{quant}, embedding {embedding}", formats


def _check_quant(given: str, what: str = "quant") -> None:
    if given not in QUANTS:
        raise InvalidRequest(f"{what}: found {given!r}, expected one of {', '.join(QUANTS)} for ONNX")
