"""The native engine: the same forward pass on the C++ kernels, with the file's own blocks as its weights."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Any

import numpy as np

from .. import _native
from ..arrays import Arrays, Floats, Ints
from ..errors import InvalidRequest, UnsupportedModelFile
from ..files.gguf_model import GGUFModel
from ..files.read_only import READ_ONLY
from ..model import ops
from ..model.config import ModelConfig
from ..model.forward import Weights
from ..model.tensors import tensor_specs
from .protocol import ModelBackend


class NativeOps:
    """`ops.py` on kernels; matrices are `_native.Matrix`. With `exact`, activations stay float32, slowly."""

    split_heads = staticmethod(ops.split_heads)
    join_heads = staticmethod(ops.join_heads)

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
            if not spec.is_matrix:
                home[spec.role] = file.dequantize(spec.gguf)
                continue
            form = file.tensors[spec.gguf].format
            if form.gguf_type in READ_ONLY:
                raise UnsupportedModelFile(
                    file.path,
                    f"tensor '{spec.gguf}' is {form.name}, which the native engine has no kernels for. Run it slowly "
                    f"with --engine reference, or convert it once: bezel export {shlex.quote(str(file.path))} OUT.gguf "
                    "--requantize --quant q8_0",
                )
            home[spec.role] = _native.Matrix(file.data(spec.gguf), form.gguf_type, spec.shape[1])
        super().__init__(config, NativeOps(pool, exact), Weights(shared, layers), partial(NativeStore, pool))
