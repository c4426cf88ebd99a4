"""Which bezel this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def bezel_version() -> str:
    """The installed version, or "unknown" in a source tree that is not installed."""
    try:
        return version("bezel-lm")
    except PackageNotFoundError:
        return "unknown"
