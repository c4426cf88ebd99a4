"""Ways to run a model: NumPy, the native kernels, onnxruntime."""

from __future__ import annotations

from ..cache.store import BytesFor


def bytes_for(engine: str) -> BytesFor:
    """What the stores of an engine allocate; see `cache.store`. Loads no engine that is not asked for."""
    if engine == "native":
        from .native import NativeStore

        return NativeStore.bytes_for
    if engine == "ort":
        from .ort_store import OrtStore

        return OrtStore.bytes_for
    from ..cache.numpy_store import NumpyStore

    return NumpyStore.bytes_for
