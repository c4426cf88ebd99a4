"""What the runtime needs of a file with a model in it, of whichever kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import Readable
from ..errors import InvalidModelFile
from ..model.config import ModelConfig
from ..text.vocabulary import Vocabulary
from .gguf_model import GGUFModel
from .models import find_model
from .onnx_eye import OnnxEye
from .onnx_folder import OnnxFolder


class Tensor(Protocol):
    """A tensor under its name in GGUF; `shape` is outputs × inputs, `nbytes` what it takes in the file."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> type[Readable]: ...
    @property
    def nbytes(self) -> int: ...


class ModelFile(Protocol):
    """`GGUFModel` or `OnnxFolder`. `metadata` has GGUF's keys; `engines` those that run it, default first.

    `largest_chunk` is the most tokens that the first of them takes at once.
    """

    @property
    def path(self) -> Path: ...
    @property
    def kind(self) -> str: ...
    @property
    def engines(self) -> tuple[str, ...]: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def largest_chunk(self) -> int: ...
    @property
    def vision(self) -> OnnxEye | None:
        """The file's own eye, where it has one in itself."""

    def kv_types(self, engine: str) -> tuple[str, ...]:
        """How an engine can store keys and values, default first: keys of KV_DTYPES."""

    def config(self) -> ModelConfig:
        """The model's description. Raises InvalidConfig."""

    def check_tensors(self, config: ModelConfig) -> None:
        """Raises InvalidModelFile unless the file holds exactly the tensors of `config`, in their shapes."""

    def dequantize(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor as float32 in its own shape, or some rows of it, float32 (rows, inputs)."""

    def vocabulary(self) -> Vocabulary:
        """The tokenizer's pieces. Raises InvalidModelFile."""

    def fingerprint(self) -> str:
        """Which model this is."""

    def check_hashes(self) -> None:
        """Raises InvalidModelFile if a part does not have the content that the file says it has."""

    def facts(self) -> dict[str, Any]:
        """What to tell of the file that files of other kinds do not have, for JSON."""

    def close(self) -> None: ...
    def __enter__(self) -> ModelFile: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_model(path: str | Path) -> ModelFile:
    """A GGUF file, a folder that `bezel export --format onnx` wrote, or a model by name; see `models.find_model`.

    Raises InvalidModelFile, and InvalidRequest for a named model that is not installed.
    """
    path = find_model(path)
    if path.suffix == ".onnx" and path.is_file():
        raise InvalidModelFile(path, f"this is one file of a model; give its folder, {path.parent}")
    return OnnxFolder(path) if path.is_dir() else GGUFModel(path)
