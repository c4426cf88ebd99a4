"""llama.cpp's own quantizer, through llama-cpp-python: what bezel's files are compared with.

    python -m bezel.bench.llama_quantizer gemma-2-2b/ theirs.gguf --type q4_k_m --imatrix-text calibration.txt

writes the file that llama.cpp would make of a checkpoint; `bezel measure theirs.gguf ours.gguf` then tells them apart.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..export.gguf.writer import export_gguf
from ..export.sources.checkpoint import Checkpoint
from ..export.sources.opening import open_checkpoint
from ..export.whole import WholeOps, WholeSequences, run_layers
from ..quant.formats import BF16, Readable
from ..runtime.arrays import Floats, Ints
from ..runtime.errors import BezelError, InvalidRequest
from ..runtime.files.gguf_model import GGUFModel
from ..runtime.model.tensors import TensorSpec
from ..runtime.text.tokenizer import Tokenizer
from .loss.passages import CHUNK, cut, read_texts

TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15}
TYPES |= {"q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30}
"""llama.cpp's names for its mixes of formats, and the numbers of its `llama_ftype`."""

Importance = Mapping[str, npt.NDArray[np.float32]]
"""The mean square of each input of a tensor, by the tensor's name in GGUF: what an imatrix holds."""


def llama_quantize(
    source: Path,
    out: Path,
    mix: str,
    importance: Importance | None = None,
    formats: Mapping[str, type[Readable]] | None = None,
    threads: int = 0,
) -> None:
    """Quantize the GGUF file `source` (F32, F16 or BF16) to `out`.

    `mix` is one of TYPES; `formats` overrides what it gives to the tensors named. `threads` 0 is every core. Raises
    InvalidRequest for an unknown mix or where llama-cpp-python is missing or too old, BezelError where the quantizer
    fails; it then leaves no file.
    """
    if mix not in TYPES:
        raise InvalidRequest(f"type: found {mix!r}, expected one of {', '.join(TYPES)}")
    llama = _library()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[mix], threads
    kept = [np.ascontiguousarray(values, np.float32) for values in (importance or {}).values()]
    if importance is not None:
        # Ended by an entry without a name, as the overrides below.
        entries = (llama.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, name, data in zip(entries, importance, kept, strict=False):
            entry.name, entry.size = name.encode(), data.size
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if formats:
        overrides = (llama.llama_model_tensor_override * (len(formats) + 1))()
        for override, (name, form) in zip(overrides, formats.items(), strict=False):
            override.pattern, override.type = f"^{re.escape(name)}$".encode(), form.gguf_type
        params.tt_overrides = overrides
        # Embedding and head are decided before the overrides are read.
        for name, field in (("token_embd.weight", "token_embedding_type"), ("output.weight", "output_tensor_type")):
            if name in formats:
                setattr(params, field, formats[name].gguf_type)
    code = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        out.unlink(missing_ok=True)
        raise BezelError(f"{source}: llama.cpp's quantizer failed with code {code} at {mix}")


@cache
def _library() -> Any:
    """llama-cpp-python's C functions, which then print nothing."""
    try:
        import llama_cpp as library
    except ImportError as error:
        raise InvalidRequest(f"llama-cpp-python is not installed ({error}): pip install llama-cpp-python") from None
    if not hasattr(library, "llama_model_tensor_override"):
        raise InvalidRequest(f"llama-cpp-python {library.__version__} is too old: pip install -U llama-cpp-python")
    library.llama_log_set(_silence(library.llama_log_callback), ctypes.c_void_p())
    return library


@cache  # it must live as long as the library
def _silence(callback: Any) -> Any:
    return callback(lambda *_: None)


def importance_of(checkpoint: Checkpoint, sequences: Sequence[Ints]) -> dict[str, Floats]:
    """What llama.cpp's imatrix tool finds: of every matrix in a layer; nothing of a head that is the embedding."""
    found: dict[str, Floats] = {}

    class Watching(WholeOps):
        def matrices(self, x: Floats, weights: Sequence[TensorSpec]) -> Sequence[Floats]:
            squares = np.einsum("ij,ij->j", x, x, dtype=np.float64) / len(x)
            found.update((weight.gguf, squares.astype(np.float32)) for weight in weights)
            return super().matrices(x, weights)

    config = checkpoint.config
    for _ in run_layers(config, Watching(checkpoint.rows), WholeSequences(config.layers, sequences)):
        pass
    return found


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--type", "mix", type=click.Choice([*TYPES]), default="q4_k_m", show_default=True)
@click.option(
    "--imatrix-text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weigh errors by what this text sends through the matrices.  [default: plain]",
)
@click.option("--chunks", type=click.IntRange(min=1), help=f"Read so many chunks of {CHUNK} tokens only.")
@click.option(
    "--formats-of",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Give every tensor the format that it has in this GGUF file.",
)
@click.option("--requantize", is_flag=True, help="Let CHECKPOINT be quantized itself.")
def command(
    checkpoint: Path,
    out: Path,
    mix: str,
    imatrix_text: Path | None,
    chunks: int | None,
    formats_of: Path | None,
    requantize: bool,
) -> None:
    """Quantize CHECKPOINT, a folder or an unquantized GGUF file, to OUT with llama.cpp's own quantizer."""
    formats = None
    if formats_of is not None:
        with GGUFModel(formats_of) as file:
            formats = {name: info.format for name, info in file.tensors.items() if len(info.shape) > 1}
    with open_checkpoint(checkpoint, requantize) as source, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        importance = None
        if imatrix_text is not None:
            text = read_texts([imatrix_text], Tokenizer(source.vocabulary(), str(checkpoint)))
            chunk = min(CHUNK, source.config.context_length)
            importance = importance_of(source, [passage.ids for passage in cut(text, "chunks", chunk, chunks)])
        plain = Path(scratch) / "plain.gguf"
        export_gguf(source, plain, "bf16" if source.format(source.specs[0]) is BF16 else "f32")
        llama_quantize(plain, out, mix, importance, formats)
    click.echo(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    command()
