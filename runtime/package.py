"""Run Gemma on a laptop CPU, exactly: `bezel.load("gemma.gguf").generate("Why is the sky blue?")`.

This file is installed as `bezel/__init__.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime import BezelError as BezelError
    from .runtime import Image as Image
    from .runtime import Message as Message
    from .runtime import Sampling as Sampling
    from .runtime import load as load

    __version__: str

__all__ = ["BezelError", "Image", "Message", "Sampling", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Late, so that `import bezel` costs nothing.
    if name == "__version__":
        from .runtime.version import bezel_version

        return bezel_version()
    if name in __all__:
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
