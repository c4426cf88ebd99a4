"""The native engine: the same forward pass on the C++ kernels, with the file's own blocks as its weights."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Any

import numpy as np

from ...quant.formats import F32
from .. import _native
from ..arrays import Arrays, Floats, Ints
from ..errors import InvalidRequest, UnsupportedModelFile
from ..files.gguf import GGUFFile
from ..files.gguf_model import GGUFModel
from ..files.read_only import READ_ONLY
from ..files.vision_file import VisionFile
from ..model import ops
from ..model.config import ModelConfig
from ..model.forward import Weights
from ..model.tensors import TensorSpec, tensor_specs
from .protocol import ModelBackend
from .tower import Tower, float_matrix


class NativeOps:
    """`ops.py` on kernels; matrices are `_native.Matrix`. With `exact`, activations stay float32, slowly."""

    split_heads = staticmethod(ops.split_heads)
    join_heads = staticmethod(ops.join_heads)
    mean_pool = staticmethod(ops.mean_pool)

    def __init__(self, pool: _native.ThreadPool, exact: bool) -> None:
        self._pool, self._exact = pool, exact

    def embed(self, weight: _native.Matrix, ids: Ints, scale: float) -> Floats:
        return _native.embed(weight, ids, scale)

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        return _native.rms_norm(x, weight, eps, self._pool)

    def linear(self, x: Floats, *weights: _native.Matrix) -> list[Floats]:
        return _native.linear(self._pool, x, weights, self._exact)

    def rope(self, x: Floats, positions: Ints, base: float, factor: float) -> Floats:
        _native.rope(x, positions, base, factor, self._pool)  # in place: x is this pass's own
        return x

    def add_norm(
        self, x: Floats, h: Floats, post_weight: Floats | None, next_weight: Floats, eps: float
    ) -> tuple[Floats, Floats]:
        return _native.add_norm(x, h, post_weight, next_weight, eps, self._pool)

    def feed_forward(self, x: Floats, gate: _native.Matrix, up: _native.Matrix, down: _native.Matrix) -> Floats:
        return _native.feed_forward(self._pool, x, gate, up, down, self._exact)

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
        return _native.layer_norm(x, weight, bias, eps, self._pool)

    def bias_gelu(self, x: Floats, bias: Floats) -> Floats:
        _native.bias_gelu(x, bias, self._pool)  # in place: x is this pass's own
        return x

    def attend_all(self, q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
        n, heads, head_dim = q.shape
        store = _native.KVStore(heads, head_dim, n, "f32")
        store.write(self._pool, 0, k, v)
        return store.attend(self._pool, q, np.zeros(n, np.int64), np.full(n, n), scale, None)

    def softcap(self, x: Floats, cap: float) -> Floats:
        _native.softcap(x, cap, self._pool)
        return x


class NativeStore:
    """`_native.KVStore` with its thread pool."""

    bytes_for = staticmethod(_native.KVStore.bytes_for)

    def __init__(self, pool: _native.ThreadPool, n_kv_heads: int, head_dim: int, capacity: int, kv: str) -> None:
        self._store = store = _native.KVStore(n_kv_heads, head_dim, capacity, kv)
        self.write, self.attend = partial(store.write, pool), partial(store.attend, pool)

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def raw(self, start: int, stop: int) -> Arrays:
        return self._store.raw(start, stop)

    def set_raw(self, start: int, arrays: Arrays) -> None:
        self._store.set_raw(start, {name: np.ascontiguousarray(array) for name, array in arrays.items()})


class NativeBackend(ModelBackend):
    """A model's weights in place, in the mapped file. `threads` None takes the performance cores.

    `exact` computes with float32 activations instead of int8. Raises InvalidRequest for a BEZEL_ISA that this
    machine does not have, and UnsupportedModelFile for a type without kernels.
    """

    def __init__(self, file: GGUFModel, config: ModelConfig, threads: int | None, exact: bool) -> None:
        try:
            _native.isa()
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        threads = threads or _native.default_threads()
        try:
            pool = _native.ThreadPool(threads)
        except RuntimeError as error:
            raise InvalidRequest(f"threads: this machine refuses to start {threads} ({error}); use fewer") from None
        for layer in config.layers:
            try:
                _native.KVStore.bytes_for(layer.n_kv_heads, layer.head_dim, 1, "f32", 0)
            except ValueError as error:
                raise InvalidRequest(
                    f"{file.path}: the native engine cannot run it ({error}); use the reference engine"
                ) from None
        shared: dict[str, Any] = {}
        layers: list[dict[str, Any]] = [{} for _ in config.layers]
        for spec in tensor_specs(config):
            home = shared if spec.layer is None else layers[spec.layer]
            home[spec.role] = _matrix(file, spec.gguf) if spec.is_matrix else file.dequantize(spec.gguf)
        self._native_ops = NativeOps(pool, exact)
        super().__init__(config, self._native_ops, Weights(shared, layers), partial(NativeStore, pool))

    def tower(self, file: VisionFile) -> Tower:
        return Tower(file, self._native_ops, _matrix_of_tower)


def _matrix(file: GGUFFile, name: str) -> _native.Matrix:
    """A matrix where it lies in the file. Raises UnsupportedModelFile for a type without kernels."""
    info = file.info(name)
    if info.format.gguf_type in READ_ONLY:
        raise UnsupportedModelFile(
            file.path,
            f"tensor '{name}' is {info.format.name}, which the native engine has no kernels for. Run it slowly with "
            f"--engine reference, or convert it once: bezel export {shlex.quote(str(file.path))} OUT.gguf "
            "--requantize --quant q8_0",
        )
    return _native.Matrix(file.data(name), info.format.gguf_type, info.shape[1])


def _matrix_of_tower(file: VisionFile, spec: TensorSpec) -> _native.Matrix:
    if spec.is_matrix:
        return _matrix(file, file.name_of(spec.gguf))
    weights = float_matrix(file, spec)
    return _native.Matrix(weights.view(np.uint8), F32.gguf_type, weights.shape[1])
