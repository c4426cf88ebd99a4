"""What `bezel export --format onnx` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...runtime.files.gguf_model import GGUFModel
from ..gguf.writer import ExportSummary
from ..sources.checkpoint import open_checkpoint
from ..sources.quantized import QuantizedCheckpoint, QuantizedFile, Source
from .writer import export_onnx


@contextmanager
def open_source(path: Path, quant: str | None, embedding: str | None) -> Iterator[Source]:
    """A checkpoint folder, by default quantized to int8; or a GGUF file, whose numbers are kept unless `quant` asks
    for others. Raises what opening it raises.
    """
    if path.is_file():
        with GGUFModel(path) as file:
            if quant in (None, "f32") and embedding is None:
                yield QuantizedFile(file, as_f32=quant is not None)
                return
    with open_checkpoint(path) as checkpoint:
        yield QuantizedCheckpoint(checkpoint, quant or "int8", embedding)


def export_folder(
    path: Path,
    out: Path,
    quant: str | None,
    embedding: str | None,
    dialect: str,
    progress: Callable[[int, int], None],
    force: bool,
    kv_text: Path | None = None,
) -> ExportSummary:
    """Write the checkpoint or the GGUF file `path` to the ONNX folder `out`; see `export_onnx`.

    Raises InvalidRequest, InvalidCheckpoint, InvalidConfig and InvalidModelFile.
    """
    with open_source(path, quant, embedding) as source:
        return export_onnx(source, out, dialect, progress, force, kv_text)
