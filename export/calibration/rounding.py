"""Quantizing with a calibration: from its moments alone, or layer by layer as the text runs through what is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.feedback import feedback_factor, quantize_with_feedback, retargeted
from ...quant.formats import EVEN, F32, Format
from ...quant.recipes import Recipe
from ...runtime.arrays import Floats, Ints
from ...runtime.model.tensors import TensorSpec
from ..gguf.writer import ExportSummary, export_gguf, plan_tensors, tool_version
from ..recipe import find_recipe
from ..sources.checkpoint import Checkpoint
from .layers import in_order, site_of
from .moments import Calibration, CalibrationText, is_calibration, read_text, source_sha256, work_folder
from .state import State
from .sweep import Sweep

Formats = Mapping[str, type[Format]]  # by GGUF name
Rows = Callable[[int, int], Floats]  # rows start … stop−1 of a matrix, which need not be in memory as a whole

DAMPING = 0.03  # of the mean second moment; .003 and .01 do about as well
_TIED_DAMPING = 0.3  # a tied head is the embedding, too: errors there weigh about as much, in every direction alike
_ROWS = 2048  # rounded at a time; fixed, so that bits do not depend on the number of cores
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
) -> ExportSummary:
    """As `export_gguf`, with matrices rounded for a `calibration`: a text, or a file that `calibrate` wrote.

    A text, of which `tokens` are used or `default_tokens`, takes longest and serves best; broken off, the same call
    goes on from the last whole layer. Raises InvalidRequest for a calibration that does not fit, too.
    """
    if isinstance(recipe, str):
        recipe = find_recipe(recipe, checkpoint.config, embedding)
    formats = {p.spec.gguf: p.format for p in plan_tensors(checkpoint.config, recipe)}
    if is_calibration(calibration):
        moments = FromMoments(checkpoint, Calibration(calibration, checkpoint), formats)
        return export_gguf(checkpoint, out, recipe, None, progress, force, moments)
    text = read_text(checkpoint, calibration, tokens)
    with work_folder(out, Sequential.key(checkpoint, text, formats)) as state:
        sequential = Sequential(checkpoint, text, formats, state)
        return export_gguf(checkpoint, out, recipe, None, progress, force, sequential)


class Feedback:
    """Rounds the matrices of one site, given the moments of their inputs; cross moments move the target as well."""

    def __init__(self, inputs: Floats, cross: Floats | None = None, damping: float = DAMPING) -> None:
        self._factor = feedback_factor(inputs, damping)
        self._drift = None if cross is None else cross - inputs

    def quantize(self, form: type[Format], rows: Rows, count: int) -> NDArray[np.uint8]:
        """The blocks (count, row_bytes) of so many rows (n)."""

        def piece(start: int) -> NDArray[np.uint8]:
            part = rows(start, min(start + _ROWS, count))
            if self._drift is not None:
                part = retargeted(part, self._drift, self._factor)
            return quantize_with_feedback(form, part, self._factor)

        return np.concatenate(list(in_order(piece, range(0, count, _ROWS))))


class FromMoments:
    """Each matrix is rounded for the inputs that it has in the exact model, from a file of moments."""

    method = "error feedback on the exact model's inputs"

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, formats: Formats) -> None:
        self._checkpoint, self._calibration, self._formats = checkpoint, calibration, formats
        self.text_sha256, self.tokens = calibration.origin.text_sha256, calibration.origin.tokens
        self._site: tuple[object, Feedback] | None = None

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        site, form = site_of(spec), self._formats[spec.gguf]
        if site is None or form.block == 1:
            return None
        if self._site is None or self._site[0] != (spec.layer, site):
            damping = _head_damping(self._checkpoint) if spec.layer is None else DAMPING
            self._site = (spec.layer, site), Feedback(self._calibration.moments(spec.layer, site), damping=damping)
        return self._site[1].quantize(form, partial(self._checkpoint.rows, spec), spec.shape[0])


class Sequential:
    """Each matrix is rounded for the inputs that it gets from those before it, as they are rounded.

    The head comes first, for the exact model's inputs: tied, it is the embedding, where everything begins. Blocks are
    asked for in the order of the model's tensors; those of a layer are kept in `state`.
    """

    method = "error feedback on the quantized model's inputs"

    def __init__(self, checkpoint: Checkpoint, text: CalibrationText, formats: Formats, state: State) -> None:
        self._checkpoint, self._text, self._formats, self._state = checkpoint, text, formats, state
        self.text_sha256, self.tokens = text.sha256, text.tokens
        self._specs = {(spec.layer, spec.role): spec for spec in checkpoint.specs}
        self._loaded: tuple[int, Mapping[str, NDArray[Any]]] = (-1, {})
        self._work = self._run()

    @staticmethod
    def key(checkpoint: Checkpoint, text: CalibrationText, formats: Formats) -> dict[str, object]:
        """All that the blocks depend on."""
        return {
            "sequential": 2,
            "text": text.sha256,
            "tokens": text.tokens,
            "source": source_sha256(checkpoint),
            "tool": tool_version(),
            "formats": {name: form.name for name, form in formats.items()},
        }

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        number = self._checkpoint.config.n_layers if spec.layer is None else spec.layer
        while self._loaded[0] != number:
            found = self._state.load(number)
            if found is not None:
                self._loaded = number, found
            else:
                next(self._work)
        return self._loaded[1].get(spec.gguf)

    def _run(self) -> Iterator[None]:
        head = self._specs[None, "token_embd" if self._checkpoint.config.tied_head else "output"]
        embedding = self._specs[None, "token_embd"]
        n = self._checkpoint.config.n_layers
        if self._state.load(n) is None:
            feedback = Feedback(self._head_moments(), damping=_head_damping(self._checkpoint))
            self._state.save(n, {head.gguf: self._round(feedback, head, partial(self._checkpoint.rows, head))})
            del feedback
            yield

        blocks = (self._state.load(n) or {}).get(embedding.gguf)

        def rounded(ids: Ints) -> Floats:
            form = self._formats[embedding.gguf]
            if blocks is None:
                return form.dequantize(form.quantize(self._checkpoint.some_rows(embedding, ids), EVEN))
            return form.dequantize(blocks[ids])

        sweep = Sweep(self._checkpoint, self._text.sequences, replacing=True)
        for i in sweep.layers(self._state, rounded):
            found = {}
            for moments in sweep.layer(i):
                feedback = Feedback(moments.inputs, moments.cross)
                for role in moments.site.roles:
                    spec = self._specs[i, role]
                    found[spec.gguf] = self._round(feedback, spec, partial(_between, sweep.exact[role]))
                    sweep.now[role] = self._formats[spec.gguf].dequantize(found[spec.gguf])
                del feedback
            for (layer, role), spec in self._specs.items():
                if layer == i and spec.is_norm:
                    found[spec.gguf] = F32.quantize(sweep.now[role][None])
            self._state.save(i, found)
            yield

    def _head_moments(self) -> Floats:
        sweep = Sweep(self._checkpoint, self._text.sequences[::_HEAD_SHARE], replacing=False)
        return sweep.to_head().inputs

    def _round(self, feedback: Feedback, spec: TensorSpec, rows: Rows) -> NDArray[np.uint8]:
        form, count = self._formats[spec.gguf], spec.shape[0]
        return form.quantize(rows(0, count)) if form.block == 1 else feedback.quantize(form, rows, count)


def _between(matrix: Floats, start: int, stop: int) -> Floats:
    return matrix[start:stop]


def _head_damping(checkpoint: Checkpoint) -> float:
    return _TIED_DAMPING if checkpoint.config.tied_head else DAMPING
