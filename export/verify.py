"""Reads an exported model back and compares every tensor with the checkpoint or the GGUF file that it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..quant import lattice
from ..quant.formats import Format
from ..runtime.errors import InvalidModelFile, InvalidRequest
from ..runtime.files.model_file import ModelFile, Tensor, open_model
from ..runtime.files.models import find_model
from ..runtime.files.onnx_eye import OnnxEye
from ..runtime.files.vision_file import VisionFile, is_eye
from ..runtime.model.tensors import TensorSpec
from ..runtime.text.vocabulary import NORMAL
from .metadata import CALIBRATION, TUNED
from .sources.checkpoint import Checkpoint, TensorSource, VisionSource

_CHUNK_WEIGHTS = 1 << 20
# With a calibration, weights move beyond the nearest value, and norms too, to make up for one another.
_CALIBRATED_FACTOR, _CALIBRATED_NORM = 2.0, 0.05


@dataclass(frozen=True)
class TensorReport:
    """How far a tensor is from its source.

    `error` is the relative RMS error ‖x − y‖ / ‖x‖, `worst_chunk` the same over the worst run of about a
    million weights, so that a displaced part cannot hide in a large tensor (where ‖x‖ of the run is below the
    tensor's average, the average counts). Both may be `tolerance` at most: 0 where the format loses nothing. `equal` is
    the share of its `weights` that are the source's; rounded to bfloat16, where the source's are such numbers.
    """

    name: str
    role: str
    format: str
    error: float
    worst_chunk: float
    max_error: float
    sqnr_db: float
    weights: int
    equal: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return max(self.error, self.worst_chunk) <= self.tolerance


def share_equal(reports: Sequence[TensorReport]) -> float:
    """The share of all weights that are the source's."""
    return sum(r.equal * r.weights for r in reports) / sum(r.weights for r in reports)


def verify(
    path: str | Path, source: Checkpoint, progress: Callable[[int, int], None] = lambda *_: None
) -> list[TensorReport]:
    """A report for each tensor of the GGUF file, an eye's too, or the ONNX folder, in the model's order; then of the
    folder's eye, if the source has one.

    `progress` is called with (tensors done, tensors in all).

    Raises InvalidRequest for models of two configs, InvalidModelFile where the text would differ: other tensors,
    another vocabulary; and where a file of a folder is not what was written.
    """
    path = find_model(path)
    if is_eye(path):
        return _verify_eye(path, source, progress)
    with open_model(path) as file, ExitStack() as stack:
        config = file.config()
        if config.n_layers == source.config.n_layers:
            for i, pair in enumerate(zip(config.layers, source.config.layers, strict=True)):
                _check_same(path, f"layer {i}: ", *pair, source)
        _check_same(path, "", config, source.config, source)
        file.check_tensors(config)
        file.check_hashes()
        _check_vocabulary(file, source)
        pairs = [_Pair(file, source, str, _calibration(file.metadata))]
        if file.vision is not None and source.vision is not None:
            eye = stack.enter_context(closing(_fitting_eye(file.vision, source.vision, source)))
            pairs.append(_Pair(file.vision, eye, str))
        return _compared(pairs, progress)


def _verify_eye(path: Path, source: Checkpoint, progress: Callable[[int, int], None]) -> list[TensorReport]:
    """A report for each tensor of the eye in a file, with those of a checkpoint that has one."""
    if source.vision is None:
        raise InvalidRequest(f"{path}: this is a vision tower, and {source.path} has none")
    with VisionFile(path) as file, closing(_fitting_eye(file, source.vision, source)) as eye:
        return _compared([_Pair(file, eye, file.name_of, _calibration(file.metadata))], progress)


def _fitting_eye(file: VisionFile | OnnxEye, eye: VisionSource, source: Checkpoint) -> VisionSource:
    """The eye of a source as wide as a file's. Raises InvalidRequest where the two differ otherwise."""
    eye = eye.widened(file.config.intermediate_size)  # zeros, where there are fewer
    _check_same(file.path, "", file.config, eye.config, source)
    return eye


class _Tensors(Protocol):
    """What holds tensors that were written: a model's file or folder, or an eye's."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    def dequantize(self, name: str, rows: slice | None = None) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class _Pair:
    """Tensors and where they come from; `name_of` is what one is called in the file. `calibrated` says how."""

    file: _Tensors
    source: TensorSource
    name_of: Callable[[str], str]
    calibrated: str = ""


def _calibration(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get(CALIBRATION, ""))


def _compared(pairs: Sequence[_Pair], progress: Callable[[int, int], None]) -> list[TensorReport]:
    """A report for each tensor of the sources."""
    reports: list[TensorReport] = []
    total = sum(len(pair.source.specs) for pair in pairs)
    for pair in pairs:
        for spec in pair.source.specs:
            progress(len(reports), total)
            reports.append(_compare(pair, spec))
    progress(len(reports), total)
    return reports


def _check_same(path: Path, where: str, config: Any, wanted: Any, source: Checkpoint) -> None:
    """Raises InvalidRequest where a field of two configs differs."""
    for field in fields(config):
        found, want = getattr(config, field.name), getattr(wanted, field.name)
        if found != want:
            raise InvalidRequest(
                f"{path}: {where}{field.name} is {str(found)[:80]}, and {str(want)[:80]} in {source.path}: these "
                "are two models"
            )


def _check_vocabulary(file: ModelFile, source: Checkpoint) -> None:
    found, want = file.vocabulary(), source.vocabulary()
    if len(found.pieces) != len(want.pieces):
        raise InvalidModelFile(
            file.path,
            f"{len(found.pieces)} tokens, expected {len(want.pieces)} as in {source.path}",
        )
    for i, pair in enumerate(zip(found.pieces, want.pieces, strict=True)):
        if pair[0] != pair[1]:
            raise InvalidModelFile(file.path, f"token {i} is {pair[0]!r}, expected {pair[1]!r} as in {source.path}")
    scored = want.types == NORMAL  # the score of any other piece decides nothing
    same = np.array_equal(found.types, want.types) and np.array_equal(found.scores[scored], want.scores[scored])
    special = [(v.bos_id, v.eos_id, v.unk_id, v.pad_id) for v in (found, want)]
    if not same or special[0] != special[1]:
        raise InvalidModelFile(
            file.path,
            f"the scores, types or special ids of its tokens differ from those of {source.path}",
        )


def _compare(pair: _Pair, spec: TensorSpec) -> TensorReport:
    file, source, name = pair.file, pair.source, pair.name_of(spec.gguf)
    form = file.tensors[name].format
    if not issubclass(form, Format):
        raise InvalidRequest(
            f"{file.path}: tensor '{name}' is {form.name}, which bezel does not write, so that nothing says how "
            "far from its source it may be; `bezel measure` says what it costs"
        )
    n_rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
    step = max(1, _CHUNK_WEIGHTS // columns)
    noise, signal, spans, sizes, max_error, equal = [], [], [], [], 0.0, 0
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        rows = source.rows(spec, start, stop)
        with np.errstate(all="ignore"):  # a damaged file may hold any number; it shows in the figures
            found = file.dequantize(name, slice(start, stop))
            equal += int(np.count_nonzero(lattice.same(rows, found)))
            error = found - rows
            noise.append(_energy(error))
            max_error = float(np.maximum(max_error, np.abs(error).max()))
        signal.append(_energy(rows))
        spans.append(form.span.energy(rows) if form.span else 0.0)
        sizes.append(stop - start)
    mean = sum(signal) / n_rows
    relative = _ratio(sum(noise), sum(signal))
    chunks = [max(x, mean * rows) for x, rows in zip(signal, sizes, strict=True)]
    span = max(map(_ratio, spans, chunks))
    return TensorReport(
        name=name,
        role=spec.role,
        format=form.name,
        error=relative,
        worst_chunk=max(map(_ratio, noise, chunks)),
        max_error=max_error,
        sqnr_db=-20 * math.log10(relative) if relative else math.inf,
        weights=n_rows * columns,
        equal=equal / (n_rows * columns),
        tolerance=_tolerance(form, spec, source, span, pair.calibrated),
    )


def _energy(x: NDArray[np.float32]) -> float:
    """‖x‖²: summed in float32 over a row, in float64 over rows."""
    return float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64))


def _ratio(noise: float, signal: float) -> float:
    if not noise:
        return 0.0
    return math.sqrt(noise / signal) if signal else math.inf


def _tolerance(form: type[Format], spec: TensorSpec, source: TensorSource, span: float, calibrated: str) -> float:
    """The format's own, or more where the source's blocks have the larger `span`, in deviations; but nothing where
    source and file hold the same kind of number."""
    same = form is source.format(spec) and spec.is_matrix
    if (calibrated and spec.role.startswith("post_")) or (TUNED in calibrated and spec.is_norm):
        return _CALIBRATED_NORM
    if same:
        return 0.0
    tolerance = max(form.tolerance, form.tolerance_of(span)) if form.span else form.tolerance
    return tolerance * (_CALIBRATED_FACTOR if calibrated else 1.0)
