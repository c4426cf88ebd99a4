"""Reads an exported file back and compares every tensor with the checkpoint that it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InvalidModelFile
from ..runtime.gguf import GGUFFile, TensorInfo
from ..runtime.tensors import TensorSpec
from ..runtime.tokenizer import NORMAL, Vocabulary
from .checkpoint import Checkpoint

_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class TensorReport:
    """How far a tensor is from its source.

    `error` is the relative RMS error ‖x − y‖ / ‖x‖, `worst_chunk` the same over the worst run of about a
    million weights, so that a displaced part cannot hide in a large tensor (where ‖x‖ of the run is below the
    tensor's average, the average counts). Both may be `tolerance` at most: 0 where the format loses nothing.
    """

    name: str
    role: str
    format: str
    error: float
    worst_chunk: float
    max_error: float
    sqnr_db: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return max(self.error, self.worst_chunk) <= self.tolerance


def verify(file: str | Path, checkpoint: Checkpoint) -> list[TensorReport]:
    """A report for each tensor of the GGUF file, in the model's order.

    Raises InvalidModelFile where comparing makes no sense or the text would differ: another config, other
    tensors, another vocabulary.
    """
    with GGUFFile(file) as gguf:
        config = gguf.config()
        for field in fields(config):
            found, want = getattr(config, field.name), getattr(checkpoint.config, field.name)
            if found != want:
                raise InvalidModelFile(
                    file,
                    f"config: {field.name} is {str(found)[:80]}, expected {str(want)[:80]} as in {checkpoint.path}",
                )
        gguf.check_tensors(config)
        _check_vocabulary(gguf, checkpoint)
        return [_compare(gguf, spec, checkpoint) for spec in checkpoint.specs]


def _check_vocabulary(gguf: GGUFFile, checkpoint: Checkpoint) -> None:
    found, want = Vocabulary.from_gguf(gguf.metadata, str(gguf.path)), checkpoint.vocabulary()
    if len(found.pieces) != len(want.pieces):
        raise InvalidModelFile(
            gguf.path,
            f"{len(found.pieces)} tokens, expected {len(want.pieces)} as in {checkpoint.path}",
        )
    for i, pair in enumerate(zip(found.pieces, want.pieces, strict=True)):
        if pair[0] != pair[1]:
            raise InvalidModelFile(gguf.path, f"token {i} is {pair[0]!r}, expected {pair[1]!r} as in {checkpoint.path}")
    scored = want.types == NORMAL  # the score of any other piece decides nothing
    same = np.array_equal(found.types, want.types) and np.array_equal(found.scores[scored], want.scores[scored])
    special = [(v.bos_id, v.eos_id, v.unk_id, v.pad_id) for v in (found, want)]
    if not same or special[0] != special[1]:
        raise InvalidModelFile(
            gguf.path,
            f"the scores, types or special ids of its tokens differ from those of {checkpoint.path}",
        )


def _compare(gguf: GGUFFile, spec: TensorSpec, checkpoint: Checkpoint) -> TensorReport:
    info = gguf.tensors[spec.gguf]
    n_rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
    step = max(1, _CHUNK_WEIGHTS // columns)
    noise, signal, sizes, max_error = [], [], [], 0.0
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        source = checkpoint.rows(spec, start, stop)
        with np.errstate(all="ignore"):  # a damaged file may hold any number; it shows in the figures
            error = gguf.dequantize(spec.gguf, slice(start, stop)) - source
            noise.append(_energy(error))
            max_error = float(np.maximum(max_error, np.abs(error).max()))
        signal.append(_energy(source))
        sizes.append(stop - start)
    mean = sum(signal) / n_rows
    relative = _ratio(sum(noise), sum(signal))
    return TensorReport(
        name=spec.gguf,
        role=spec.role,
        format=info.format.name,
        error=relative,
        worst_chunk=max(_ratio(n, max(x, mean * rows)) for n, x, rows in zip(noise, signal, sizes, strict=True)),
        max_error=max_error,
        sqnr_db=-20 * math.log10(relative) if relative else math.inf,
        tolerance=_tolerance(info, spec, checkpoint),
    )


def _energy(x: NDArray[np.float32]) -> float:
    """‖x‖²: summed in float32 over a row, in float64 over rows."""
    return float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64))


def _ratio(noise: float, signal: float) -> float:
    if not noise:
        return 0.0
    return math.sqrt(noise / signal) if signal else math.inf


def _tolerance(info: TensorInfo, spec: TensorSpec, checkpoint: Checkpoint) -> float:
    """The format's own, but nothing where source and file hold the same kind of number."""
    same = info.format.name.upper() == checkpoint.dtype(spec) and not spec.is_norm
    return 0.0 if same else info.format.tolerance
