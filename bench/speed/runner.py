"""A program that is measured, as the process that holds it sees it: one sequence, and what can be done with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import BezelError
from ...runtime.version import bezel_version


class NotMeasured(BezelError):
    """A program that is not installed, refused the model, or crashed."""


def noise(seed: int, size: int = 896) -> NDArray[np.uint8]:
    """A picture (size, size, 3) of nothing."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


class Runner(Protocol):
    """One sequence in some program. `vocab_size` bounds the ids; `kv` is how keys and values are stored."""

    vocab_size: int
    kv: str
    version: str

    def prefill(self, ids: Sequence[int]) -> None: ...

    def step(self, token: int) -> None: ...

    def rewind(self, n: int) -> None: ...

    def reset(self) -> None: ...

    def see(self, seed: int) -> int:  # noqa: ARG002
        """Take a picture that `seed` makes, up to the logits of what follows; how many positions that took."""
        raise NotMeasured("this program is given no pictures here")

    def kv_bytes(self) -> int | None:
        """Bytes allocated for keys and values now, if the program tells."""


class BezelRunner:
    """bezel, through its Python interface."""

    def __init__(self, model: str, context: int, threads: int, engine: str, kv: str) -> None:
        from ...runtime import load

        self._model = load(model, engine=engine, context=context, kv=kv, threads=threads)
        self._session = self._model.session()
        self.vocab_size, self.kv, self.version = self._model.config.vocab_size, kv, bezel_version()

    def prefill(self, ids: Sequence[int]) -> None:
        self._session.prefill(ids)

    def step(self, token: int) -> None:
        self._session.step(token)

    def rewind(self, n: int) -> None:
        self._session.rewind(n)

    def reset(self) -> None:
        self._session.reset()

    def see(self, seed: int) -> int:
        from ...runtime import Image, Message

        asked = [Message("user", [Image(noise(seed)), "What is this?"])]
        self._session.prefill(ids := self._model.prompt_ids(asked))
        return len(ids)

    def kv_bytes(self) -> int:
        return self._session.engine.cache_bytes
