"""What every engine offers: one sequence of tokens, its caches, and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .ops import Floats

State = Mapping[str, npt.NDArray[Any]]


class Engine(Protocol):
    """The weights of a model, and one sequence going through it.

    `chunk` is the largest number of ids that `forward` takes; a rewind to at most `chunk` positions
    behind the newest that it ever took always works.
    """

    chunk: int

    @property
    def position(self) -> int:
        """How many ids the caches hold: the position of the next one."""

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    def forward(self, ids: npt.NDArray[np.int64], wanted: int) -> Floats:
        """Take n ids; logits (wanted, vocab) of the last `wanted`, 0 to n. If it raises, nothing changed."""

    def rewind(self, n: int) -> None:
        """Forget the n newest ids. Raises CacheError if a ring no longer holds what comes before them."""

    def snapshot(self) -> State:
        """All caches as arrays by name."""

    def restore(self, state: State) -> None:
        """Take over a snapshot. Raises InvalidSession, changing nothing, if it belongs to other caches."""
