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
}


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: as floats of `bits` bits, or as integers of `bits` with a scale for each `block`."""

    bits: int
    block: int | None = None


@dataclass(frozen=True)
class External:
    """A tensor of the external data: "weights", "codes" or "scales", which is `part`, of the model's tensor `spec`.

    Codes have half their range added, and two of 4 bits share a byte.
    """

    spec: TensorSpec
    storage: Storage
    part: str
    name: str
    data_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.data_type] // 8


def externals(spec: TensorSpec, storage: Storage) -> list[External]:
    """The tensors that hold one weight of the model; integers in the layout of onnxruntime's MatMulNBits."""
    if storage.block is None:
        kind = TensorProto.FLOAT16 if storage.bits == 16 else TensorProto.FLOAT
        return [External(spec, storage, "weights", spec.gguf, kind, spec.shape)]
    n, k = spec.shape
    blocks = k // storage.block
    codes = n, blocks, storage.block * storage.bits // 8
    return [
        External(spec, storage, "codes", f"{spec.gguf}.codes", TensorProto.UINT8, codes),
        External(spec, storage, "scales", f"{spec.gguf}.scales", TensorProto.FLOAT, (n, blocks)),
    ]
