"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is in all, and a word on what has been found so far."""


def silent(done: int, total: int, found: str) -> None:
    """Progress that nobody watches."""
