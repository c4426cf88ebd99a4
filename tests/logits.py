"""Logits of a file by the reference engine, and how far two are apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bezel.runtime.engines.reference import ReferenceBackend
from bezel.runtime.files.gguf_model import GGUFModel


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """(n, vocab) after each of so many ids, in float64."""
    with GGUFModel(path) as file:
        backend = ReferenceBackend(file, file.config(), None)
        engine = backend.engine(len(ids), "f32", len(ids), True)
        return engine.forward(ids, len(ids)).astype(np.float64)


def divergence(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Mean KL divergence of logits (n, vocab), in nats."""
    p, q = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)) for z in (reference, candidate))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
