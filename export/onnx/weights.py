"""How the graph's weights are stored: which tensors of the external data hold one of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx import TensorProto

from ...runtime.model.tensors import TensorSpec

_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.INT4: 4,
}


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: as floats of `bits` bits, or as integers of `bits` with a scale for each `block`."""

    bits: int
    block: int | None = None


@dataclass(frozen=True)
class External:
    """A tensor of the external data: "weights", "codes" or "scales", which is `part`, of the model's tensor `spec`.

    `transposed` ones are inputs × outputs. Codes of UINT8 have half their range added, and two of 4 bits share a byte.
    """

    spec: TensorSpec
    storage: Storage
    part: str
    name: str
    data_type: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.data_type] // 8


def externals(spec: TensorSpec, storage: Storage, dialect: str) -> list[External]:
    """The tensors that hold one weight of the model: integers in the layout of MatMulNBits, or as MatMul takes them."""
    if storage.block is None:
        kind = TensorProto.FLOAT16 if storage.bits == 16 else TensorProto.FLOAT
        return [External(spec, storage, "weights", spec.gguf, kind, spec.shape)]
    n, k = spec.shape
    blocks, transposed = k // storage.block, dialect == "standard"
    codes: tuple[int, ...] = (k, n) if transposed else (n, blocks, storage.block * storage.bits // 8)
    signed = TensorProto.INT4 if storage.bits == 4 else TensorProto.INT8
    kind = signed if transposed else TensorProto.UINT8
    scales = (blocks, n) if transposed else (n, blocks)
    return [
        External(spec, storage, "codes", f"{spec.gguf}.codes", kind, codes, transposed),
        External(spec, storage, "scales", f"{spec.gguf}.scales", TensorProto.FLOAT, scales, transposed),
    ]
