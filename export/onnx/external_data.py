"""The weights of graphs: where they lie in a file of their own, and how they come there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ...quant.integers import as_integers
from ...runtime.errors import InvalidModelFile
from ..ordered import CHUNK_WEIGHTS, ordered
from .graph import Built
from .source import Quantized
from .weights import External

# What can be mapped at any offset that a system allows: Windows maps at multiples of 64 KiB.
_ALIGNMENT, _SMALL, _SMALL_ALIGNMENT = 1 << 16, 1 << 20, 64


@dataclass(frozen=True)
class Graph:
    """Serialised graphs, and the tensors of their external data, which is `nbytes` long, with their `offsets` in it."""

    messages: Sequence[bytes]
    tensors: list[External]
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def message(self) -> bytes:
        """The last."""
        return self.messages[-1]


def serialized(data: str, *models: Built) -> Graph:
    """Models whose weights are in the file `data`, each of them once."""
    tensors = list({tensor.name: tensor for _, needed in models for tensor in needed}.values())
    offsets, size = _layout(tensors)
    for model, needed in models:
        for tensor in needed:
            model.graph.initializer.append(_initializer(tensor, Path(data).name, offsets[tensor.name]))
    return Graph([model.SerializeToString(deterministic=True) for model, _ in models], tensors, offsets, size)


def _layout(tensors: list[External]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and how long the file is."""
    offsets, end = {}, 0
    for tensor in tensors:
        step = _ALIGNMENT if tensor.nbytes >= _SMALL else _SMALL_ALIGNMENT
        offsets[tensor.name] = -(-end // step) * step
        end = offsets[tensor.name] + tensor.nbytes
    return offsets, end


def _initializer(tensor: External, location: str, offset: int) -> TensorProto:
    proto = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", tensor.nbytes)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
    return proto


def write_data(
    path: Path,
    source: Quantized,
    graph: Graph,
    progress: Callable[[int], None],
) -> Counter[str]:
    """Write the external data; how many weights of each of the model's tensors are too small for their format."""
    done, vanished = 0, Counter[str]()
    with path.open("wb") as file:
        file.truncate(graph.nbytes)
        for tensor, first, data, lost in _converted(source, graph.tensors):
            vanished[tensor.spec.gguf] += lost
            file.seek(graph.offsets[tensor.name] + first * data.shape[1])
            file.write(data.data)
            if tensor.part != "scales":
                done += len(data) * tensor.spec.shape[-1]
                progress(done)
    return vanished


Converted = tuple[External, int, NDArray[np.uint8], int]


def _converted(source: Quantized, tensors: list[External]) -> Iterator[Converted]:
    """(tensor, first row of the weight, bytes laid out as the tensor has them, in rows, weights that vanished)."""
    parts: dict[str, list[External]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.spec.gguf, []).append(tensor)

    def jobs() -> Iterator[tuple[list[External], int, int]]:
        for group in parts.values():
            spec = group[0].spec
            n_rows = math.prod(spec.shape[:-1])
            step = max(1, CHUNK_WEIGHTS // spec.shape[-1])
            for start in range(0, n_rows, step):
                yield group, start, min(start + step, n_rows)

    def convert(job: tuple[list[External], int, int]) -> list[Converted]:
        group, start, stop = job
        spec = group[0].spec
        (data, vanished), format_ = source.blocks(spec, start, stop), source.format(spec)
        if group[0].part == "weights":
            return [(group[0], start, np.ascontiguousarray(data), vanished)]
        try:
            codes, scales = as_integers(format_, data)
        except ValueError as error:
            raise InvalidModelFile(source.path, f"tensor '{spec.gguf}': {error}") from None
        return [
            (t, start, _laid_out(t, codes), vanished) if t.part == "codes" else (t, start, _laid_out(t, scales), 0)
            for t in group
        ]

    for converted in ordered(convert, jobs()):
        yield from converted


def _laid_out(tensor: External, rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes (rows, n) or scales (rows, n / block) as the bytes of `tensor`, uint8 (its rows, bytes)."""
    if tensor.part == "codes":
        rows = rows.view(np.uint8) + np.uint8(1 << (tensor.storage.bits - 1))
        if tensor.storage.bits == 4:
            rows = rows[:, ::2] | rows[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(rows).view(np.uint8)
