"""The model's tensors in an ONNX folder: which initialisers hold each, in which layout, and their numbers.

A tensor that is not quantized is an initialiser of its name in GGUF ("blk.0.attn_q.weight") and of its shape, outputs ×
inputs. A quantized one is two, that name with ".codes" and with ".scales": codes,
uint8 (outputs, inputs / block, block · bits / 8), integers plus half their range, of two with 4 bits the first in the
lower half of a byte; and scales (outputs, inputs / block), as `com.microsoft.MatMulNBits` takes them. A weight is an
integer times the scale of its block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import FORMATS, Format
from ..errors import InvalidModelFile
from ..model.tensors import TensorSpec
from .onnx_model import Initializer

Raw = NDArray[np.uint8]
Floats = NDArray[np.float32]
Read = Callable[[str], Raw]  # the bytes of an initialiser

_FLOATS = {"f32": "float32", "f16": "float16"}
# Formats of GGUF whose weights are integers times a scale: the bits that these need, and the block that has one scale.
_INTEGERS = {"q4_0": (4, 32), "q5_0": (8, 32), "q6_k": (8, 16), "q8_0": (8, 32)}


@dataclass(frozen=True)
class OnnxTensor:
    """A tensor of the model; `shape` is outputs × inputs, `format` the GGUF format that has these very numbers.

    Integers have `bits` bits, 0 for floats, and a scale for each `block` of them along the inputs.
    """

    name: str
    shape: tuple[int, ...]
    format: type[Format]
    codes: Initializer
    scales: Initializer | None = None
    bits: int = 0
    block: int = 0

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales else 0)


def find_tensors(
    path: Path, initializers: Mapping[str, Initializer], specs: Iterable[TensorSpec], formats: Mapping[str, Any]
) -> dict[str, OnnxTensor]:
    """The tensors of a model by their names in GGUF; `path` names the graph in errors.

    `formats` has the name of each tensor's format. Raises InvalidModelFile for a tensor that is missing, misshapen, or
    stored otherwise than bezel does it.
    """
    out = {}
    for spec in specs:
        found = [
            initializers[spec.gguf + part] for part in ("", ".codes", ".scales") if spec.gguf + part in initializers
        ]
        tensor = _tensor(spec, found, formats.get(spec.gguf))
        if tensor is None:
            what = ", ".join(f"{i.name!r}: {i.dtype} {' × '.join(map(str, i.shape))}" for i in found) or "nothing"
            raise InvalidModelFile(
                path,
                f"tensor {spec.gguf!r}: found {what[:200]} as {str(formats.get(spec.gguf))[:20]!r}, expected "
                f"{' × '.join(map(str, spec.shape))} as bezel exports one of {', '.join((*_FLOATS, *_INTEGERS))}",
            )
        out[spec.gguf] = tensor
    return out


def _tensor(spec: TensorSpec, found: list[Initializer], name: Any) -> OnnxTensor | None:
    stored = [(i.dtype, i.shape) for i in found]
    if name in _FLOATS and stored == [(_FLOATS[name], spec.shape)]:
        return OnnxTensor(spec.gguf, spec.shape, FORMATS[name], found[0])
    if name not in _INTEGERS or not spec.is_matrix or len(found) != 2:
        return None
    (n, k), (bits, block) = spec.shape, _INTEGERS[name]
    if k % block or stored != [("uint8", (n, k // block, block * bits // 8)), ("float32", (n, k // block))]:
        return None
    return OnnxTensor(spec.gguf, spec.shape, FORMATS[name], found[0], found[1], bits, block)


def dequantize(tensor: OnnxTensor, read: Read, rows: slice | None = None) -> Floats:
    """The tensor as float32 in its own shape, or some rows of it, float32 (rows, inputs)."""
    n, block = math.prod(tensor.shape[:-1]), tensor.block
    start, stop, _ = (rows or slice(None)).indices(n)
    stop = max(start, stop)
    shape = tensor.shape if rows is None else (stop - start, tensor.shape[-1])
    codes = read(tensor.codes.name).reshape(n, -1)[start:stop]
    if tensor.scales is None:
        return _floats(codes, tensor.codes).reshape(shape)
    raw = np.stack([codes & 15, codes >> 4], -1) if tensor.bits == 4 else codes
    numbers = raw.reshape(stop - start, -1, block).astype(np.float32) - np.float32(1 << (tensor.bits - 1))
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # any bytes may be there, and logits that are not finite are seen
        numbers *= _floats(read(tensor.scales.name).reshape(n, -1)[start:stop], tensor.scales)[..., None]
    return numbers.reshape(shape)


def _floats(raw: Raw, stored: Initializer) -> Floats:
    return np.ascontiguousarray(raw).view("<f4" if stored.dtype == "float32" else "<f2").astype(np.float32)
