"""Quantizing with a calibration: from its moments alone, or layer by layer as the text runs through what is rounded."""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant import lattice
from ...quant.feedback import feedback_factor, quantize_with_feedback, retargeted
from ...quant.formats import EVEN, F32, Format
from ...quant.recipes import Recipe
from ...runtime.arrays import Arrays, Floats, Ints
from ...runtime.errors import InvalidRequest
from ...runtime.model.config import ModelConfig
from ...runtime.model.ops import rms_norm
from ...runtime.model.tensors import TensorSpec
from ...runtime.version import bezel_version
from ..gguf.writer import Layout, check_room, check_target, export_gguf, plan_tensors
from ..kept import KeptWork, work_on
from ..ordered import ordered
from ..recipe import find_recipe
from ..sources.checkpoint import Checkpoint
from ..summary import ExportSummary
from ..whole import ROWS, ReadRows, WholeOps, WholeSequences, run_layers
from .moments import SEQUENCE, Calibration, CalibrationText, is_calibration, read_text, source_sha256
from .noting import HEAD, Note, NotingOps, moments, site_of
from .sweep import Sweep

Formats = Mapping[str, type[Format]]
"""By GGUF name."""

DAMPING = 0.3  # of the mean second moment; less suits the text read no better, and others worse
_TIED_DAMPING = 0.3  # a tied head is the embedding, too: errors there weigh about as much, in every direction alike
_OUTPUTS = 2048  # rounded at a time; fixed, so that bits do not depend on the number of cores
# What passing a text through a weight that is rounded for it takes, and how many times as long as a product each step
# of the rounding is; both measured.
_ROUNDING, _FEEDBACK = 3.0, 4.0
_HEAD_SHARE = 4  # every so many-th sequence is enough for the moments of the head, which are far from singular


def export_calibrated(
    checkpoint: Checkpoint,
    out: Path,
    recipe: str | Recipe,
    embedding: str | None,
    calibration: Path,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
    tokens: int | None = None,
    tune_steps: int = 0,
    tune_codes: bool = True,
    warn: Callable[[str], None] | None = None,
) -> ExportSummary:
    """As `export_gguf`, with matrices rounded for a `calibration`: a text, or a file that `calibrate` wrote.

    A text, of which `tokens` are used or `default_tokens`, takes longest and serves best; broken off, the same call
    goes on from the last whole layer. `tune_steps` of tuning follow, on as much of the text as they go through, which
    takes the extra `tune`; without `tune_codes` scales and norms are all that they move. `warn` is called with a
    warning that is known before hours are spent; the summary has it, too. Raises InvalidRequest for a calibration that
    does not fit, too.
    """
    if isinstance(recipe, str):
        recipe = find_recipe(recipe, checkpoint.config, embedding)
    plan = plan_tensors(checkpoint.specs, recipe)
    formats = {p.spec.gguf: p.format for p in plan}
    check_target(checkpoint, out, force)  # before anything is kept beside it
    check_room(Layout(plan, {}), out)
    if is_calibration(calibration):
        if tune_steps:
            raise InvalidRequest(f"{calibration}: holds moments, and tuning reads a text; give --calibration TEXT")
        if tokens is not None:
            raise InvalidRequest(f"{calibration}: has read its text already; leave --calibration-tokens out")
        from_moments = FromMoments(checkpoint, Calibration(calibration, checkpoint), formats)
        return export_gguf(checkpoint, out, recipe, None, progress, force, from_moments)
    text = read_text(checkpoint, calibration, tokens)
    key = Sequential.key(checkpoint, text, formats)
    if not tune_steps:
        with work_on(out, key) as kept:
            sequential = Sequential(checkpoint, text, formats, kept, progress)
            return export_gguf(checkpoint, out, recipe, None, None, force, sequential)
    try:
        from ..tuning.tuned import Tuned, check_tunable
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InvalidRequest("tuning needs the package torch: pip install 'bezel-lm[tune]'") from None
    wanted = Tuned.tokens_for(checkpoint, tune_steps, SEQUENCE)
    more = read_text(checkpoint, calibration, wanted)
    check_tunable(checkpoint, formats, more, tune_codes)
    warnings = []
    if more.tokens <= wanted - SEQUENCE:
        warnings.append(
            f"{calibration}: {more.tokens} tokens, which {tune_steps} steps go through again and again; {wanted} would "
            "serve better"
        )
        if warn:
            warn(warnings[0])
    part = _Parts(progress, Tuned.products(checkpoint, more, tune_steps))
    with work_on(out, key) as kept:
        sequential = Sequential(checkpoint, text, formats, kept, part.first)
        beside = kept.beside(Tuned.key(checkpoint, key, tune_steps, tune_codes, more))
        tuned = Tuned(checkpoint, sequential, more, formats, beside, tune_steps, tune_codes, part.second)
        summary = export_gguf(checkpoint, out, recipe, None, None, force, tuned)
        before, after = tuned.divergence
        if not after < before:  # the file is to say that it is not tuned
            summary = export_gguf(checkpoint, out, recipe, None, None, True, sequential)
            warnings.append(
                f"tuning led away from the exact model ({before:.3g} to {after:.3g} nats a token): kept as calibrated; "
                "more steps may help, on more text"
            )
    return replace(summary, warnings=[*summary.warnings, *warnings], divergence=tuned.divergence)


class _Parts:
    """Two parts of a work, told as one; the second is thought to be `expected` until it says itself."""

    def __init__(self, progress: Callable[[int, int], None] | None, expected: int) -> None:
        self._progress, self._expected, self._behind = progress or (lambda _done, _total: None), expected, 0

    def first(self, done: int, total: int) -> None:
        self._behind = total
        self._progress(done, total + self._expected)

    def second(self, done: int, total: int) -> None:
        self._progress(self._behind + done, self._behind + total)


class Feedback:
    """Rounds the matrices of one site, given Σ x xᵀ of their inputs x.

    With the `drift` Σ (y − x) xᵀ from the exact model's inputs y, what is rounded moves towards what was made of y.
    """

    def __init__(self, inputs: Floats, drift: Floats | None = None, damping: float = DAMPING) -> None:
        self._factor, self._drift = feedback_factor(inputs, damping), drift

    def quantize(self, form: type[Format], spec: TensorSpec, read: ReadRows) -> NDArray[np.uint8]:
        """The blocks (rows, row_bytes) of a matrix, which need not be in memory as a whole.

        Rows that the format keeps exactly stay what they are.
        """

        def piece(start: int) -> NDArray[np.uint8]:
            rows = read(spec, start, min(start + _OUTPUTS, spec.shape[0]))
            if form.block == 1:
                return form.quantize(rows)
            if (kept := lattice.quantized(form, rows)) is not None:
                return kept
            if self._drift is not None:
                rows = retargeted(rows, self._drift, self._factor)
            return quantize_with_feedback(form, rows, self._factor)

        return np.concatenate(list(ordered(piece, range(0, spec.shape[0], _OUTPUTS))))


class FromMoments:
    """Each matrix is rounded for the inputs that it has in the exact model, from a file of moments."""

    method = "error feedback on the exact model's inputs"

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, formats: Formats) -> None:
        self._checkpoint, self._calibration, self._formats = checkpoint, calibration, formats
        self.text_sha256, self.tokens = calibration.origin.text_sha256, calibration.origin.tokens
        self._feedback: tuple[str, Feedback] | None = None  # of the newest site

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        config, form = self._checkpoint.config, self._formats[spec.gguf]
        site = site_of(spec, config)
        if site is None or form.block == 1:
            return None
        if self._feedback is None or self._feedback[0] != site:
            damping = _head_damping(config) if site == HEAD else DAMPING
            self._feedback = site, Feedback(self._calibration.moments(site), damping=damping)
        return self._feedback[1].quantize(form, spec, self._checkpoint.rows)


class Sequential:
    """Each matrix is rounded for the inputs that it gets from those before it, as they are rounded.

    The head comes first, for the exact model's inputs: tied, it is the embedding, where everything begins. Blocks are
    asked for in the order of the model's tensors; those of a layer are kept.
    """

    method = "error feedback on the quantized model's inputs"

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: CalibrationText,
        formats: Formats,
        kept: KeptWork,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`progress` is called with (done, in all), in products of a weight and a token; by one thread at a time."""
        self._checkpoint, self._config, self._text, self._formats = checkpoint, checkpoint.config, text, formats
        self._work = _Work(checkpoint, text.tokens, progress)
        self.text_sha256, self.tokens = text.sha256, text.tokens
        self._kept, self._sweep = kept, Sweep(kept, self._passing, checkpoint.config.n_layers)
        self._found: tuple[int, Arrays] = -1, {}  # of the newest layer that was asked for

    @staticmethod
    def key(checkpoint: Checkpoint, text: CalibrationText, formats: Formats) -> dict[str, object]:
        """All that the blocks depend on."""
        return {
            "sequential": 7,
            "text": text.sha256,
            "tokens": text.tokens,
            "source": source_sha256(checkpoint),
            "tool": bezel_version(),
            "formats": {name: form.name for name, form in formats.items()},
        }

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        if spec.layer is None and spec.is_norm:
            return None  # for which the head, which may be hundreds of megabytes, is not read again
        number = self._config.n_layers if spec.layer is None else spec.layer
        if self._found[0] != number:
            self._found = -1, {}
            with self._work.unit(spec.layer):
                self._found = number, self._head() if spec.layer is None else self._sweep.layer(number)
        return self._found[1].get(spec.gguf)

    def _head(self) -> Arrays:
        number, config = self._config.n_layers, self._config
        found: Arrays | None = self._kept.load(number)
        if found is None:
            read = self._work.reader(1 / _HEAD_SHARE)
            rows = WholeSequences(config.layers, self._text.sequences[::_HEAD_SHARE])
            [(_, h)] = deque(run_layers(config, WholeOps(read), rows), maxlen=1)
            feedback = Feedback(*moments(h), damping=_head_damping(config))
            (head,) = (spec for spec in self._checkpoint.specs if site_of(spec, config) == HEAD)
            read = self._work.reader(_FEEDBACK * head.shape[1] / self._text.tokens)
            found = {head.gguf: feedback.quantize(self._formats[head.gguf], head, read)}
            self._kept.save(number, found)
        return found

    def _passing(self, start: int, streams: Arrays) -> Iterator[tuple[Arrays, Arrays]]:
        """The exact stream y passes a layer, then the stream x of what is rounded on its way."""
        config = self._config
        rows, exact = WholeSequences(config.layers, self._text.sequences), NotingOps(config, self._work.reader(1))
        rounding = RoundingOps(config, self._work.reader(_ROUNDING), self._formats, exact.notes, self._head)
        ys = run_layers(config, exact, rows, start, streams.get("y"))
        xs = run_layers(config, rounding, rows, start, streams.get("x"))
        for (y, _), (x, _) in zip(ys, xs, strict=True):
            yield {"y": y, "x": x}, rounding.taken()


class _Work:
    """How much of the multiplying is done, told wherever rows of a matrix are read."""

    def __init__(self, checkpoint: Checkpoint, tokens: int, progress: Callable[[int, int], None] | None) -> None:
        self._checkpoint, self._tokens, self._progress = checkpoint, tokens, progress
        self._lock, self._done = threading.Lock(), 0.0
        self._layers: dict[int | None, float] = defaultdict(float)
        for spec in checkpoint.specs:
            if spec.is_matrix and spec.layer is not None:
                self._layers[spec.layer] += math.prod(spec.shape) * (1 + _ROUNDING)
                self._layers[None] += math.prod(spec.shape) / _HEAD_SHARE
            elif site_of(spec, checkpoint.config):
                self._layers[None] += math.prod(spec.shape) * _FEEDBACK * spec.shape[1] / tokens
        self._total = float(sum(self._layers.values()))

    @contextmanager
    def unit(self, layer: int | None) -> Iterator[None]:
        """A layer or, None, the head. What an earlier run has kept of it takes no time, and counts as no work."""
        before = self._done
        yield
        self._total += self._done - before - self._layers[layer]
        self._tell()

    def reader(self, passes: float) -> ReadRows:
        """Reads rows, with each weight of which all tokens are multiplied so many times."""

        def read(spec: TensorSpec, start: int, stop: int) -> Floats:
            rows = self._checkpoint.rows(spec, start, stop)
            if spec.is_matrix:
                with self._lock:
                    self._done += rows.size * passes
                    self._tell()
            return rows

        return read

    def _tell(self) -> None:
        if self._progress:
            done, total = (round(x * self._tokens) for x in (self._done, self._total))
            self._progress(min(done, total), max(total, 1))


class RoundingOps(WholeOps):
    """Rounds each matrix for the inputs that come to it, and multiplies them with what was rounded.

    A norm behind is fitted, so that the residual stream comes back to the exact one. `notes` are of the exact model in
    the same layer; `head` gives the blocks that stand for the embedding, unless that is rounded plainly.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: ReadRows,
        formats: Formats,
        notes: dict[str, Note],
        head: Callable[[], Arrays],
    ) -> None:
        super().__init__(read)
        self._config, self._formats, self._notes, self._head = config, formats, notes, head
        self._found: dict[str, NDArray[Any]] = {}

    def taken(self) -> Arrays:
        """The blocks of what was rounded or fitted since the last time, by GGUF name."""
        found, self._found = self._found, {}
        return found

    def rows_of(self, weight: TensorSpec, ids: Ints) -> Floats:
        form, blocks = self._formats[weight.gguf], self._head().get(weight.gguf)
        return form.dequantize(form.quantize(super().rows_of(weight, ids), EVEN) if blocks is None else blocks[ids])

    def matrices(self, x: Floats, weights: Sequence[TensorSpec]) -> Sequence[Floats]:
        self._exact = note = self._notes.pop(str(site_of(weights[0], self._config)))
        feedback = Feedback(*moments(x, note.weight, note.inputs))
        del note.inputs
        found = {w.gguf: feedback.quantize(self._formats[w.gguf], w, self._read) for w in weights}
        self._found |= found
        return [self._formats[name].dequantize(blocks) for name, blocks in found.items()]

    def add_norm(
        self, x: Floats, h: Floats, post_weight: TensorSpec | None, next_weight: TensorSpec, eps: float
    ) -> tuple[Floats, Floats]:
        if post_weight is not None and self._exact.stream is not None:
            factors = fitted(x, h, self._exact.stream, self.norm(post_weight), eps)
            self._found[post_weight.gguf] = F32.quantize(factors[None])
        return super().add_norm(x, h, post_weight, next_weight, eps)

    def norm(self, weight: TensorSpec) -> Floats:
        blocks = self._found.get(weight.gguf)
        return super().norm(weight) if blocks is None else F32.dequantize(blocks)[0]


def fitted(x: Floats, h: Floats, target: Floats, factors: Floats, eps: float) -> Floats:
    """The factors (hidden,) of a norm with which x plus h, normed, comes closest to `target`, (n, hidden) all three.

    Where least squares says nothing, those that it had.
    """
    over, under = np.zeros(len(factors)), np.zeros(len(factors))
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        normal = rms_norm(h[rows], np.ones(1, np.float32), eps)
        over += np.einsum("ij,ij->j", normal, target[rows] - x[rows])
        under += np.einsum("ij,ij->j", normal, normal)
    return np.divide(over, under, out=factors.astype(np.float64), where=under > 0).astype(np.float32)


def _head_damping(config: ModelConfig) -> float:
    return _TIED_DAMPING if config.tied_head else DAMPING
