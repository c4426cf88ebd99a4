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
from ..spread import Recipe, Spread, here
from .intervals import FEW_UNITS, Bootstrap
from .metrics import compare
from .passages import Passage, cut, read_texts, sequence_length
from .result import Sensitivity, SensitivityEntry
from .state import Arrays, KeptResults
from .subjects import FloatBackend, Spec, key_of, sizes_of

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
    spread: Spread = here,
) -> Sensitivity:
    """The mean KLD, nats per token, that rounding each tensor (or role, or layer) to each format costs.

    `model` is a checkpoint folder or a GGUF file that is not quantized; it is held in memory in float32. What a format
    does not fit, for want of whole blocks, is left out. What has been computed is kept in the folder `states`, and not
    computed again; `spread` says where it is computed. Raises InvalidRequest, InvalidCheckpoint, InvalidModelFile.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InvalidRequest(f"--formats: found {', '.join(unknown) or 'none'}, expected of {', '.join(FORMATS)}")
    with open_checkpoint(model) as checkpoint:
        chunk = sequence_length(chunk, "chunks", checkpoint.config.context_length)
        read = read_texts(texts, Tokenizer(checkpoint.vocabulary(), str(model)))
        passages = cut(read, "chunks", chunk, limit)
        sweep = _Sweep(checkpoint, by)
        groups = sweep.groups
        work = [(group, FORMATS[name]) for name in formats for group in groups if _fits(group, FORMATS[name])]
        key = {"texts": [t.sha256 for t in read], "chunk": chunk, "model": key_of(Spec(model)), "by": by}
        kept = {name: KeptResults(states, key | {"format": name}) for name in formats}
        klds = _compute(sweep, passages, work, kept, progress, spread)
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
    sweep: _Sweep,
    passages: Sequence[Passage],
    work: Sequence[tuple[Group, type[Format]]],
    states: Mapping[str, KeptResults],
    progress: Progress,
    spread: Spread,
) -> npt.NDArray[np.float64]:
    """KLD (work, positions) of all scored positions; computed or loaded."""
    columns = np.cumsum([0, *(passage.scored for passage in passages)])
    out = np.empty((len(work), columns[-1]))

    def state(number: int, i: int) -> tuple[KeptResults, int]:
        group, form = work[i]
        return states[form.name], number * len(sweep.groups) + group.index

    items: dict[tuple[int, int], _Item] = {}
    # By multiples of the golden ratio: what takes long, the first layers', and what does not come in turns all along,
    # so that the time that is left can be told.
    order = sorted(range(len(work)), key=lambda i: i * 0.6180339887 % 1)
    for number, passage in enumerate(passages):
        for i in order:
            kept, place = state(number, i)
            found = kept.load(place)
            if found is None:
                items[number, i] = (passage, work[i][0].index, work[i][1].name)
            else:
                out[i, columns[number] : columns[number + 1]] = found["kld"]
    total = len(work) * len(passages)
    done = total - len(items)
    progress(done, total, "")
    for (number, i), computed in spread(sweep, items):
        kept, place = state(number, i)
        kept.save(place, computed)
        out[i, columns[number] : columns[number + 1]] = computed["kld"]
        done += 1
        progress(done, total, "")
    return out


_Item = tuple[Passage, int, str]  # a group's index and a format's name


class _Sweep:
    """The work on an item: a group of a checkpoint's tensors is rounded, and a passage read.

    The exact weights are loaded for the first item; the exact model's run of a passage serves the items that follow.
    """

    def __init__(self, checkpoint: Checkpoint, by: str) -> None:
        self.groups = _groups(checkpoint, by)
        self._checkpoint, self._by = checkpoint, by
        self._exact: FloatBackend | None = None
        self._run: _Exact | None = None

    def __call__(self, item: _Item) -> Arrays:
        passage, group, form = item
        self._exact = self._exact or FloatBackend(self._checkpoint)
        if self._run is None or not self._run.reads(passage):
            self._run = None  # first: its logits are large
            self._run = _Exact(self._exact, passage)
        return {"kld": self._run.without(self.groups[group], FORMATS[form])}

    def recipe(self) -> Recipe:
        path = self._checkpoint.path.absolute()
        return Recipe(_open_sweep, (path, self._by), sizes_of([path]))


def _open_sweep(path: Path, by: str) -> _Sweep:
    return _Sweep(open_checkpoint(path), by)


class _Exact:
    """The exact model's logits and residual streams for a passage."""

    def __init__(self, backend: FloatBackend, passage: Passage) -> None:
        self._backend, self._passage = backend, passage
        self._ids = passage.ids[:-1]  # nothing follows the last token that could score it
        self._before: list[Floats] = [
            ops.embed(backend.weights.shared["token_embd"], self._ids, backend.config.embedding_scale)
        ]  # each layer; the last entry, after all of them, holds scored rows only
        self._logits = self._forward(self._before[0], backend.weights, 0, self._before)

    def reads(self, passage: Passage) -> bool:
        return passage.first == self._passage.first and np.array_equal(passage.ids, self._passage.ids)

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
