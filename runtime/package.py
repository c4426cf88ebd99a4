"""Run Gemma on this computer, offline: `bezel.load("gemma.gguf").generate("Why is the sky blue?")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Installed as bezel/__init__.py. Imports are late: `import bezel` alone loads nothing.
if TYPE_CHECKING:
    from bezel.runtime import Message, Model, Sampling, Session, load

    __version__: str

__all__ = ["Message", "Model", "Sampling", "Session", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bezel' has no attribute {name!r}")
    if name == "__version__":
        return import_module("bezel.runtime.version").bezel_version()
    return getattr(import_module("bezel.runtime"), name)
