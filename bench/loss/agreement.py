"""Whether a model computes what it was made from computes: the logits of both over a text, window by window.

Both compute with float32 activations. Then only the order of their sums tells them apart, however coarse the weights
are: mean KLDs of 1e-12 nats, where a window that is one position off gives 1e-4 and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.api import load
from ...runtime.arrays import Floats
from ...runtime.cache.caches import default_chunk
from ...runtime.cache.store import INT8_CHANNEL
from ...runtime.engines.protocol import ModelBackend
from ...runtime.engines.rows import Segment, SegmentRows
from ...runtime.errors import BezelError
from ...runtime.files.model_file import open_model
from ...runtime.files.onnx_folder import OnnxFolder
from .. import DATA
from ..progress import Progress, silent
from .metrics import NotFinite, Records, compare, same_top

# Nats, the mean of a window; and where int8 caches may round what sums differ in the other way.
LARGEST_KLD, LARGEST_KLD_INT8 = 1e-6, 2e-5
TEXT = DATA / "fairy-heldout.txt"
_NO_WINDOW = 512  # positions that are taken together in a model without windows
_LOGIT_BYTES = 512 << 20  # of both models at a time


@dataclass(frozen=True)
class Span:
    """What was found at the positions `first` … `last` of the text; `kld` is the mean, in nats."""

    first: int
    last: int
    largest_difference: float
    kld: float
    same_top: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.kld <= self.allowed


def agreement(
    path: Path, source: Path, same_weights: bool, threads: int | None = None, progress: Progress = silent
) -> list[Span]:
    """Compare the logits of the model file or folder `path` with those of its source, over two and a half windows.

    A folder of the `same_weights` as its source, a GGUF file, is compared with that on the native engine. Otherwise the
    reference engine takes the source's place, on the weights that were written. Raises what loading raises, and
    BezelError for logits that are not finite.
    """
    with open_model(path) as file:
        folder = isinstance(file, OnnxFolder)
        scales = _kv_scales(file) if isinstance(file, OnnxFolder) and file.kv == INT8_CHANNEL else None
    exact: dict[str, Any] = {"activations": "f32", "threads": threads}
    model = load(path, kv=None if folder else "f32", **exact)
    run_source = folder and same_weights and source.is_file()
    against = load(source, kv="f32", **exact) if run_source else load(path, "reference", kv="f32", **exact)
    backend = against.backend
    if scales is not None:
        assert isinstance(backend, ModelBackend)
        backend = _Int8Backend(backend, scales)
    layers, vocabulary = model.config.layers, model.config.vocab_size
    window = max((layer.window or 0 for layer in layers), default=0) or _NO_WINDOW
    n = min(model.context, 2 * window + window // 2)
    ids = np.array(model.tokenizer.encode(TEXT.read_text(encoding="utf-8"), bos=True)[: n + 1])
    n = len(ids) - 1  # every position is followed by a token
    engines = [b.engine(n, kv, default_chunk(layers), True) for b, kv in ((backend, "f32"), (model.backend, model.kv))]
    records: list[Records] = []
    differences: list[float] = []
    rows = max(1, min(*(engine.chunk for engine in engines), _LOGIT_BYTES // (8 * vocabulary)))
    for start in range(0, n, rows):
        progress(start, n, "")
        part = ids[start : min(start + rows, n)]
        want, found = (engine.forward(part, len(part)) for engine in engines)
        try:
            records += compare([want, found], [(0, 1)], start, ids[start + 1 : start + 1 + len(part)])
        except NotFinite as error:
            which = path if error.which or not run_source else source
            raise BezelError(f"{which}: a logit that is not finite at position {start + error.row}") from None
        differences += [float(np.abs(a - b).max()) for a, b in zip(want, found, strict=True)]
    progress(n, n, "")
    table = np.concatenate(records)
    return [
        Span(
            first,
            end - 1,
            max(differences[first:end]),
            float(table["kld"][first:end].mean()),
            float(same_top(table[first:end]).mean()),
            LARGEST_KLD if scales is None else LARGEST_KLD_INT8,
        )
        for first, end in pairwise([*range(0, n, window), n])
    ]


def _kv_scales(folder: OnnxFolder) -> list[tuple[Floats, Floats]]:
    """Of each layer what its int8 keys and values are multiplied with, (KV heads, head_dim)."""
    return [
        (
            folder.data(f"blk.{i}.key_scale").view("<f4").reshape(layer.n_kv_heads, layer.head_dim),
            folder.data(f"blk.{i}.value_scale").view("<f4").reshape(layer.n_kv_heads, layer.head_dim),
        )
        for i, layer in enumerate(folder.config().layers)
    ]


class _Int8Backend(ModelBackend):
    """A backend whose keys and values are rounded as an ONNX graph rounds them, by fixed scales."""

    def __init__(self, backend: ModelBackend, scales: Sequence[tuple[Floats, Floats]]) -> None:
        super().__init__(backend.config, backend.ops, backend.weights, backend.new_store)
        self._scales = scales

    def rows(self, segment: Segment) -> SegmentRows:
        return _Int8Rows(segment, self._scales)


class _Int8Rows(SegmentRows):
    def __init__(self, segment: Segment, scales: Sequence[tuple[Floats, Floats]]) -> None:
        super().__init__(segment)
        self._scales = scales

    def append(self, layer: int, keys: Floats, values: Floats) -> None:
        rounded = (
            np.clip(np.rint(x / scale), -128, 127) * scale
            for x, scale in zip((keys, values), self._scales[layer], strict=True)
        )
        super().append(layer, *rounded)
