"""Which tensors suffer from quantization: each is rounded alone, in memory, and everything else is exact.

Only the layers from the first changed one on are computed again; what comes before is the exact model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...export.sources.checkpoint import Checkpoint
from ...export.sources.opening import open_checkpoint
from ...quant.formats import FORMATS, Format
from ...runtime.arrays import Floats, Ints
from ...runtime.cache.caches import Caches
from ...runtime.cache.numpy_store import NumpyStore
from ...runtime.engines.protocol import ModelBackend
from ...runtime.engines.rows import Segment
from ...runtime.errors import InvalidRequest
from ...runtime.model import ops
from ...runtime.model.forward import Weights
from ...runtime.model.tensors import TensorSpec
from ...runtime.text.tokenizer import Tokenizer
from ..progress import Progress, silent
from .intervals import FEW_UNITS, Bootstrap
from .metrics import compare
from .passages import Passage, cut, read_texts, sequence_length
from .result import Sensitivity, SensitivityEntry
from .state import KeptResults
from .subjects import FloatBackend, Spec, key_of

BY = ("tensor", "role", "layer")
CHUNKS = FEW_UNITS  # enough to rank by: what is compared reads the same text
_PIECE = 1 << 18  # weights that a thread rounds at a time


@dataclass(frozen=True)
class Group:
    """Tensors that are rounded together; `role` and `layer` where all have the same."""

    index: int
    specs: tuple[TensorSpec, ...]
    role: str | None
    layer: int | None

    @property
    def first_layer(self) -> int | None:
        """The first layer that differs; None for what comes after all layers."""
        if any(spec.role == "token_embd" for spec in self.specs):
            return 0
        return min((spec.layer for spec in self.specs if spec.layer is not None), default=None)


def sensitivity(
    model: Path,
    texts: Sequence[Path],
    formats: Sequence[str],
    *,
    by: str = "tensor",
    chunk: int | None = None,
    limit: int = CHUNKS,
    confidence: float = 0.95,
    states: Path,
    progress: Progress = silent,
) -> Sensitivity:
    """The mean KLD, nats per token, that rounding each tensor (or role, or layer) to each format costs.

    `model` is a checkpoint folder or a GGUF file that is not quantized; it is held in memory in float32. What a format
    does not fit, for want of whole blocks, is left out. What has been computed is kept in the folder `states`, and not
    computed again. Raises InvalidRequest, InvalidCheckpoint, InvalidModelFile.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InvalidRequest(f"--formats: found {', '.join(unknown) or 'none'}, expected of {', '.join(FORMATS)}")
    with open_checkpoint(model) as checkpoint:
        chunk = sequence_length(chunk, "chunks", checkpoint.config.context_length)
        read = read_texts(texts, Tokenizer(checkpoint.vocabulary(), str(model)))
        passages = cut(read, "chunks", chunk, limit)
        groups = _groups(checkpoint, by)
        work = [(group, FORMATS[name]) for name in formats for group in groups if _fits(group, FORMATS[name])]
        key = {"texts": [t.sha256 for t in read], "chunk": chunk, "model": key_of(Spec(model)), "by": by}
        kept = {name: KeptResults(states, key | {"format": name}) for name in formats}
        klds = _compute(checkpoint, passages, work, len(groups), kept, progress)
    bootstrap, units = Bootstrap(len(passages), confidence), np.repeat(range(len(passages)), passages[0].scored)
    entries = []
    for (group, form), kld in zip(work, klds, strict=True):
        found = bootstrap.mean(kld, units, least=0)
        tensors = [spec.gguf for spec in group.specs]
        entries.append(
            SensitivityEntry(tensors, group.role, group.layer, form.name, found.value, found.low, found.high)
        )
    return Sensitivity(
        model=checkpoint.name,
        text_sha256=",".join(text.sha256 for text in read),
        tokens=sum(len(passage.ids) for passage in passages),
        by=by,
        confidence=confidence,
        entries=sorted(entries, key=lambda entry: -entry.kld),
    )


def _groups(checkpoint: Checkpoint, by: str) -> list[Group]:
    matrices = [spec for spec in checkpoint.specs if spec.is_matrix]
    keys: dict[str, Callable[[TensorSpec], Any]] = {
        "tensor": lambda spec: spec.gguf,
        "role": lambda spec: spec.role,
        "layer": lambda spec: spec.role if spec.layer is None else spec.layer,
    }
    found: dict[Any, list[TensorSpec]] = {}
    for spec in matrices:
        found.setdefault(keys[by](spec), []).append(spec)
    groups: list[Group] = []
    for specs in found.values():
        roles, layers = {spec.role for spec in specs}, {spec.layer for spec in specs}
        role = roles.pop() if len(roles) == 1 else None
        groups.append(Group(len(groups), tuple(specs), role, layers.pop() if len(layers) == 1 else None))
    return groups


def _fits(group: Group, form: type[Format]) -> bool:
    return all(spec.shape[-1] % form.block == 0 for spec in group.specs)


def _compute(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    work: Sequence[tuple[Group, type[Format]]],
    n_groups: int,
    states: Mapping[str, KeptResults],
    progress: Progress,
) -> npt.NDArray[np.float64]:
    """KLD (work, positions) of all scored positions; computed or loaded."""
    exact: FloatBackend | None = None
    out = np.empty((len(work), sum(passage.scored for passage in passages)))
    total, done, column = len(work) * len(passages), 0, 0
    # By multiples of the golden ratio: what takes long, the first layers', and what does not come in turns all along,
    # so that the time that is left can be told.
    order = sorted(range(len(work)), key=lambda i: i * 0.6180339887 % 1)
    for number, passage in enumerate(passages):
        run: _Exact | None = None
        for i in order:
            group, form = work[i]
            progress(done, total, "")
            state, place = states[form.name], number * n_groups + group.index
            found = state.load(place)
            if found is None:
                exact = exact or FloatBackend(checkpoint)
                run = run or _Exact(exact, passage)
                found = {"kld": run.without(group, form)}
                state.save(place, found)
            out[i, column : column + passage.scored] = found["kld"]
            done += 1
        column += passage.scored
    progress(done, total, "")
    return out


class _Exact:
    """The exact model's logits and residual streams for a passage."""

    def __init__(self, backend: FloatBackend, passage: Passage) -> None:
        self._backend, self._passage = backend, passage
        self._ids = passage.ids[:-1]  # nothing follows the last token that could score it
        self._before: list[Floats] = [
            ops.embed(backend.weights.shared["token_embd"], self._ids, backend.config.embedding_scale)
        ]  # each layer; the last entry, after all of them, holds scored rows only
        self._logits = self._forward(self._before[0], backend.weights, 0, self._before)

    def without(self, group: Group, form: type[Format]) -> npt.NDArray[np.float64]:
        """KLD (scored,) when the group is rounded to the format."""
        backend = self._backend
        roles = {spec.role for spec in group.specs}
        changed = {spec.layer for spec in group.specs}
        exact = backend.weights
        shared = {role: round_trip(w, form) if role in roles else w for role, w in exact.shared.items()}
        layers = [_Rounded(w, roles, form) if i in changed else w for i, w in enumerate(exact.layers)]
        last = backend.config.n_layers - 1
        start = last if group.first_layer is None else group.first_layer
        stream = self._ids if "token_embd" in roles else self._before[start]
        logits = self._forward(stream, Weights(shared, layers[start:]), start)
        first = self._passage.first
        (records,) = compare([self._logits, logits], [(0, 1)], first, self._passage.ids[first + 1 :])
        kld: npt.NDArray[np.float64] = records["kld"]
        return kld

    def _forward(
        self, inputs: Ints | Floats, weights: Weights, start: int, streams: list[Floats] | None = None
    ) -> Floats:
        """The logits of the scored positions, by the layers from `start` on, whose weights these are."""
        config = replace(self._backend.config, layers=self._backend.config.layers[start:])
        n = len(inputs)
        segment = Segment(Caches(config.layers, n, "f32", n, ring=False), inputs, self._passage.scored)
        return ModelBackend(config, ops, weights, NumpyStore).forward([segment], streams)


class _Rounded(Mapping[str, Floats]):
    """A layer's weights, some of them rounded whenever they are asked for: a model's worth would not fit twice."""

    def __init__(self, exact: Mapping[str, Floats], roles: set[str], form: type[Format]) -> None:
        self._exact, self._roles, self._form = exact, roles, form

    def __getitem__(self, role: str) -> Floats:
        weight = self._exact[role]
        return round_trip(weight, self._form) if role in self._roles else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._exact)

    def __len__(self) -> int:
        return len(self._exact)


def round_trip(weight: Floats, form: type[Format]) -> Floats:
    """What is left of a matrix (outputs, inputs) once it has been stored in a format."""
    out = np.empty_like(weight)
    step = max(1, _PIECE // weight.shape[1])

    def work(start: int) -> None:
        rows = slice(start, start + step)
        out[rows] = form.dequantize(form.quantize(weight[rows]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, len(weight), step)))
    return out
