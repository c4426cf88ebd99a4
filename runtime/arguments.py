"""Arguments of the Python interface, checked before they lead anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from .errors import InvalidRequest


def shown(value: object) -> str:
    """A value in a message, by its kind and in a few letters."""
    return f"{type(value).__name__} {value!r:.60}"


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def whole(name: str, value: Any, want: str = "a whole number") -> int:
    if not is_whole(value):
        raise InvalidRequest(f"{name}: found {shown(value)}, expected {want}")
    return int(value)


def path_of(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise InvalidRequest(f"path: found {shown(value)}, expected a path")
    return Path(value)


def ids_of(value: Any, what: str = "token ids") -> list[int]:
    """A sequence of ids as a list."""
    found = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]
    return [whole(what, token, "whole numbers") for token in found]
