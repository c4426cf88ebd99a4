"""Ways to run a model: NumPy, the native kernels, onnxruntime. None is loaded that is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cache.store import BytesFor
from ..errors import InvalidRequest
from ..model.config import ModelConfig
from .protocol import Backend

ENGINES = ("native", "ort", "reference")


def new_backend(engine: str, file: Any, config: ModelConfig, threads: int | None, exact: bool) -> Backend:
    """The weights of a `ModelFile`, one of whose `engines` this is; `exact` computes with float32 activations.

    `threads` None takes the performance cores, for "reference" all. Raises InvalidRequest, InvalidModelFile.
    """
    return _BACKENDS[engine](file, config, threads, exact)


def bytes_for(engine: str) -> BytesFor:
    """What the stores of an engine allocate; see `cache.store`."""
    if engine == "native":
        from .native import NativeStore

        return NativeStore.bytes_for
    if engine == "ort":
        from .ort_store import OrtStore

        return OrtStore.bytes_for
    from ..cache.numpy_store import NumpyStore

    return NumpyStore.bytes_for


def _native(file: Any, config: ModelConfig, threads: int | None, exact: bool) -> Backend:
    from .native import NativeBackend

    return NativeBackend(file, config, threads, exact)


def _ort(file: Any, config: ModelConfig, threads: int | None, exact: bool) -> Backend:
    try:
        from .ort import OrtBackend
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise InvalidRequest("the engine 'ort' needs onnxruntime: pip install 'bezel-lm[onnx]'") from None
    return OrtBackend(file, config, threads, exact)


def _reference(file: Any, config: ModelConfig, threads: int | None, exact: bool) -> Backend:  # noqa: ARG001
    from .reference import ReferenceBackend  # always exact

    return ReferenceBackend(file, config, threads)


_BACKENDS: dict[str, Callable[[Any, ModelConfig, int | None, bool], Backend]] = {
    "native": _native,
    "ort": _ort,
    "reference": _reference,
}
