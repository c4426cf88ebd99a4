"""What is exported, read lazily: a Hugging Face folder (`folder.py`) or a GGUF file (`opening.py`).

A tensor is read when it is asked for, by rows, with positioned reads instead of a map, so that reading a
checkpoint of any size costs only the rows in hand. Both kinds of source give the same numbers: those that
GGUF stores, float32, norms as weight + 1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...quant import lattice
from ...quant.formats import EVEN, F32, Format, Readable
from ...runtime.errors import InvalidCheckpoint
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ...runtime.model.vision import VisionConfig, vision_specs
from ...runtime.text.vocabulary import Vocabulary
from ..ordered import CHUNK_WEIGHTS
from .safetensors import DTYPES, StoredTensor

if TYPE_CHECKING:
    from typing import Self


class TensorSource:
    """The tensors `specs` of something that is exported. `stored` maps their GGUF names to places; `files` is all that
    was read. Norms are stored less `norm_offset`.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        stored: Mapping[str, StoredTensor],
        files: tuple[Path, ...],
        norm_offset: float,
    ) -> None:
        self.path, self.specs, self.stored, self.files = path, tuple(specs), stored, files
        self._norm_offset = np.float32(norm_offset)
        self._open: dict[Path, FileIO] = {}
        self._states = {file: _state(file) for file in files}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises InvalidCheckpoint at the end if a file has changed since the checkpoint was opened."""
        yield
        for file, state in self._states.items():
            if _state(file) != state:
                raise InvalidCheckpoint(f"{file}: has changed while it was read; once it is complete, start again")

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def format(self, spec: TensorSpec) -> type[Readable]:
        """How the checkpoint stores the tensor."""
        return self.stored[spec.gguf].format

    def check_unquantized(self) -> None:
        """Raises InvalidCheckpoint if a tensor is quantized already."""
        for name, stored in self.stored.items():
            if stored.format.block > 1:
                raise InvalidCheckpoint(
                    f"{self.path}: tensor '{name}' is {stored.format.name}, expected one of "
                    f"{', '.join(form.name for form in DTYPES.values())}: this file is quantized already, and rounding "
                    "it again would lose more than rounding the original once, from which to start; only `bezel export "
                    "--requantize` takes it all the same"
                )

    def added_losses(self, formats: Mapping[str, type[Format]]) -> list[str]:
        """A warning if tensors that are quantized already are to be rounded to other `formats`, by name in GGUF."""
        rounded = {
            stored.format.name
            for name, stored in self.stored.items()
            if stored.format.block > 1 and formats[name] not in (stored.format, F32)
        }
        if not rounded:
            return []
        before = ", ".join(sorted(rounded))
        return [f"{before} weights are rounded again: what was lost before and what is lost now add up"]

    def tensor(self, spec: TensorSpec) -> NDArray[np.float32]:
        """The whole tensor, `spec.shape`; a norm is weight + 1, as GGUF stores it."""
        n_rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
        out = np.empty((n_rows, columns), np.float32)
        step = max(1, CHUNK_WEIGHTS // columns)
        for start in range(0, n_rows, step):  # beside a large embedding there is no room for what it is read from
            stop = min(start + step, n_rows)
            out[start:stop] = self.rows(spec, start, stop)
        return out.reshape(spec.shape)

    def rows(self, spec: TensorSpec, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start … stop−1 as float32 (rows, inputs); a one-dimensional tensor is one row.

        May be called from several threads. Raises InvalidCheckpoint at a number that is not finite.
        """
        stored = self.stored[spec.gguf]
        values = stored.format.dequantize(self.raw_rows(stored, start, stop))
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise InvalidCheckpoint(
                f"{stored.file}: tensor '{spec.hf}' ({spec.gguf}): found {values[row, column]} at "
                f"[{start + row}, {column}], expected finite numbers; the checkpoint is damaged"
            )
        return values + self._norm_offset if spec.is_norm else values

    def blocks(self, spec: TensorSpec, start: int, stop: int, form: type[Format]) -> NDArray[np.uint8]:
        """Rows start … stop−1 in a format, uint8 (rows, bytes); blocks that are in it already stay as they are.

        May be called from several threads. Raises InvalidCheckpoint at a number that is not finite, or too large.
        """
        stored = self.stored[spec.gguf]
        if form is stored.format and form.block > 1:
            return self.raw_rows(stored, start, stop)
        try:
            return form.quantize(self.rows(spec, start, stop), EVEN)
        except ValueError as error:
            raise InvalidCheckpoint(f"{self.path}: tensor '{spec.hf}': {error}") from None

    def vanished(self, spec: TensorSpec, start: int, stop: int, form: type[Format], blocks: NDArray[np.uint8]) -> int:
        """How many weights of these rows were too small for `form`, so that `blocks` holds zeros instead."""
        if form is self.format(spec):
            return 0
        return form.vanished(self.rows(spec, start, stop), blocks)

    def kept_exactly(
        self, spec: TensorSpec, start: int, stop: int, form: type[Format], blocks: NDArray[np.uint8]
    ) -> int:
        """How many weights of these rows blocks (rows, bytes) give again; 0 if the first row is on no lattice."""
        if form is self.format(spec) or not lattice.is_kept(form, self.rows(spec, start, start + 1), blocks[:1]):
            return 0
        return lattice.equal(form, self.rows(spec, start, stop), blocks)

    def raw_rows(self, stored: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows start … stop−1 of any tensor as they are stored, uint8 (rows, row_bytes)."""
        row_bytes = stored.format.row_bytes(stored.shape[-1])
        out = np.empty((stop - start) * row_bytes, np.uint8)
        with self._lock:  # the handle has one position
            if stored.file not in self._open:
                self._open[stored.file] = stored.file.open("rb", buffering=0)
            file = self._open[stored.file]
            file.seek(stored.offset + start * row_bytes)
            view, done = out.data, 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise InvalidCheckpoint(f"{stored.file}: ends early: it was cut while it was being read")
                done += got
        return out.reshape(stop - start, row_bytes)


class Checkpoint(TensorSource):
    """An opened checkpoint: a text model, and the eye that it may have. `warnings` say what of it is left out.

    `calibration` is the metadata of a calibrated GGUF file on that.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: ModelConfig,
        stored: Mapping[str, StoredTensor],
        files: tuple[Path, ...],
        load_vocabulary: Callable[[], Vocabulary],
        *,
        norm_offset: float,
        generation_config: Mapping[str, Any],
        chat_template: str | None,
        warnings: tuple[str, ...] = (),
        vision: VisionSource | None = None,
        calibration: Mapping[str, str | int] = MappingProxyType({}),
    ) -> None:
        super().__init__(path, tensor_specs(config), stored, files, norm_offset)
        self.name, self.config, self.vision, self.warnings = name, config, vision, warnings
        self.generation_config, self.chat_template = generation_config, chat_template
        self.calibration = calibration
        self._load_vocabulary = cache(load_vocabulary)

    def close(self) -> None:
        super().close()
        if self.vision is not None:
            self.vision.close()

    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary, which has one piece for each row of the embedding."""
        vocabulary = self._load_vocabulary()
        if len(vocabulary.pieces) != self.config.vocab_size:
            raise InvalidCheckpoint(
                f"{self.path}: the tokenizer has {len(vocabulary.pieces)} pieces and the embedding "
                f"{self.config.vocab_size} rows, expected equal numbers: they belong to different models"
            )
        return vocabulary


class VisionSource(TensorSource):
    """The eye of a checkpoint."""

    def __init__(
        self, path: Path, config: VisionConfig, stored: Mapping[str, StoredTensor], files: tuple[Path, ...]
    ) -> None:
        super().__init__(path, vision_specs(config), stored, files, norm_offset=1.0)
        self.config = config

    def widened(self, multiple: int) -> VisionSource:
        """The same with as many more zeros between the feed-forwards' matrices as make their number a `multiple`.

        SigLIP's 4304 are not whole blocks of 32, so nothing could be quantized; gelu(0) = 0 adds nothing.
        """
        wide = -(-self.config.intermediate_size // multiple) * multiple
        config = replace(self.config, intermediate_size=wide)
        return VisionSource(self.path, config, self.stored, self.files)

    def rows(self, spec: TensorSpec, start: int, stop: int) -> NDArray[np.float32]:
        have, n_inputs = self.stored[spec.gguf].shape, spec.shape[-1]
        n_rows = math.prod(have[:-1])
        found = super().rows(spec, min(start, n_rows), min(stop, n_rows))
        return np.pad(found, ((0, stop - start - len(found)), (0, n_inputs - found.shape[1])))


def _state(file: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None where there is none any more."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
