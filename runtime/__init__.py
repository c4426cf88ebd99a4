"""Run Gemma from a GGUF file: `load(path).generate(prompt)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Model, load
    from .errors import BezelError
    from .session import Session
    from .text.chat import Message
    from .text.sampling import Sampling
    from .vision.image import Image

__all__ = ["BezelError", "Image", "Message", "Model", "Sampling", "Session", "load"]

_HOME = {
    "BezelError": "errors",
    "Image": "vision.image",
    "Message": "text.chat",
    "Model": "api",
    "Sampling": "text.sampling",
    "Session": "session",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    # Late, so that a room that needs one contract module does not pay for the engines.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
