"""Ways to feed a model the same tokens: whole, one by one, in random chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from bezel.runtime import Session
from tiny import CONFIGS, GOLDEN

ALL = ("demo", *CONFIGS)


def golden(name: str) -> np.ndarray:
    return np.load(GOLDEN / f"{name}.npy")


def logits_in(session: Session, ids: list[int], lengths: Iterator[int]) -> np.ndarray:
    parts, at = [], 0
    while at < len(ids):
        n = next(lengths)
        parts.append(session.engine.forward(np.array(ids[at : at + n]), len(ids[at : at + n])))
        at += n
    return np.concatenate(parts)


def whole(session: Session, ids: list[int]) -> np.ndarray:
    m = session.model
    session.engine = m.backend.engine(m.context, m.kv, len(ids), True)
    return logits_in(session, ids, iter([len(ids)]))


def token_by_token(session: Session, ids: list[int]) -> np.ndarray:
    return np.stack([session.step(token) for token in ids])


def random_chunks(session: Session, ids: list[int]) -> np.ndarray:
    random = np.random.default_rng(7)
    return logits_in(session, ids, iter(lambda: int(random.integers(1, session.engine.chunk + 1)), None))


FEEDINGS = (whole, token_by_token, random_chunks)
