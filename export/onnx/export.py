"""What `bezel export --format onnx` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...runtime.errors import InvalidRequest
from ..sources.opening import open_checkpoint
from ..summary import ExportSummary
from .page_writer import export_page
from .source import OnnxSource
from .targets import TARGETS
from .writer import export_onnx


def export_folder(
    path: Path,
    out: Path,
    quant: str | None,
    embedding: str | None,
    target: str,
    progress: Callable[[int, int], None],
    force: bool,
    kv: str = "f32",
    kv_text: Path | None = None,
    requantize: bool = False,
    vision: str | None = None,
) -> ExportSummary:
    """Write the checkpoint or the GGUF file `path` to the ONNX folder `out`; see `OnnxSource` and `export_onnx`.

    The `target` "web" is a page with the model in it: see `export_page`.

    Raises InvalidRequest, InvalidCheckpoint, InvalidConfig and InvalidModelFile.
    """
    with open_checkpoint(path, quantized=True) as checkpoint:
        source = OnnxSource(checkpoint, quant, embedding, requantize, vision)
        if vision is not None and not (target in TARGETS and TARGETS[target].sees):
            able = " and ".join(name for name, one in TARGETS.items() if one.sees)
            raise InvalidRequest(f"--vision: the target {target} takes no pictures; {able} do")
        if target == "web":
            return export_page(source, out, progress, force)
        return export_onnx(source, out, target, progress, force, kv, kv_text)
