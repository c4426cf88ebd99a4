"""How far the next-token probabilities of one model are from another's, position by position.

Logits come in as float32; from there on everything is float64, and no more of it is in memory than a few rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...runtime.arrays import Floats, Ints
from ...runtime.errors import BezelError

TOP = 5
_BLOCK = 1 << 18  # logits worked on at a time: float64 temporaries of 2 MiB stay near a core

Records = NDArray[Any]  # of POSITION
POSITION = np.dtype(
    [
        ("position", "<i4"),  # of the logits in their sequence; the token that followed is at position + 1
        ("kld", "<f8"),  # Σ p · (log p − log q) over the vocabulary, nats; p the reference's, q the candidate's
        ("reference_logp", "<f8"),  # of the token that followed, nats
        ("logp", "<f8"),
        ("shared_top", "u1"),  # how many of the reference's TOP likeliest tokens are the candidate's too
        ("reference_top", "<i4", TOP),  # the likeliest first; of equal ones the smaller id
        ("reference_top_p", "<f4", TOP),
        ("top", "<i4", TOP),
        ("top_p", "<f4", TOP),
    ]
)


class NotFinite(BezelError):
    """A model gave logits that are infinite or no numbers. `which` is its index."""

    def __init__(self, which: int, row: int) -> None:
        super().__init__(f"model {which} gave a logit that is not finite, at row {row}")
        self.which, self.row = which, row


class _Distribution(NamedTuple):
    """Of some positions: logits − log Σ exp(logits), Σ over the vocabulary, and the TOP likeliest tokens."""

    logp: NDArray[np.float64]  # (n, vocab)
    top: Ints  # (n, TOP)


def compare(
    logits: Sequence[Floats], pairs: Sequence[tuple[int, int]], first_position: int, next_ids: Ints
) -> list[Records]:
    """Compare models at n positions that follow each other.

    `logits` has (n, vocab) of each model, the pairs say which reference goes with which candidate, `next_ids` (n,)
    are the tokens that followed. Returns records (n,) for each pair. Equal logits give a KLD of exactly 0.
    Raises NotFinite.
    """
    n, vocab = logits[0].shape
    out = [np.empty(n, POSITION) for _ in pairs]
    step = max(1, _BLOCK // vocab)

    def work(start: int) -> None:
        rows = slice(start, min(start + step, n))
        found = [_distribution(model[rows], which, start) for which, model in enumerate(logits)]
        for (a, b), records in zip(pairs, out, strict=True):
            _compare(found[a], found[b], next_ids[rows], records[rows])

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(work, range(0, n, step)))
    for records in out:
        records["position"] = np.arange(first_position, first_position + n)
    return out


def _distribution(logits: Floats, which: int, first_row: int) -> _Distribution:
    x = logits.astype(np.float64)
    peak = x.max(axis=1, keepdims=True)
    bad = ~np.isfinite(peak[:, 0]) | ~np.isfinite(x.min(axis=1))
    if bad.any():
        raise NotFinite(which, first_row + int(np.flatnonzero(bad)[0]))
    x -= peak
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    rest, top = logits.copy(), np.empty((len(logits), TOP), np.int64)
    rows = np.arange(len(logits))
    for i in range(TOP):  # much faster than to sort, or to partition, the whole vocabulary
        top[:, i] = np.argmax(rest, axis=1)
        rest[rows, top[:, i]] = -np.inf
    return _Distribution(x, top)


def _compare(reference: _Distribution, candidate: _Distribution, next_ids: Ints, out: Records) -> None:
    p = np.exp(reference.logp)
    # The exact value is ≥ 0; rounding may leave a little less.
    out["kld"] = np.maximum((p * (reference.logp - candidate.logp)).sum(axis=1), 0)
    rows = np.arange(len(p))
    out["reference_logp"], out["logp"] = reference.logp[rows, next_ids], candidate.logp[rows, next_ids]
    out["shared_top"] = (reference.top[:, :, None] == candidate.top[:, None, :]).sum(axis=(1, 2))
    for prefix, found in (("reference_", reference), ("", candidate)):
        out[f"{prefix}top"] = found.top
        out[f"{prefix}top_p"] = np.exp(np.take_along_axis(found.logp, found.top, axis=1))


def same_top(records: Records) -> NDArray[np.bool_]:
    """Whether both models find the same token the likeliest."""
    same: NDArray[np.bool_] = records["reference_top"][:, 0] == records["top"][:, 0]
    return same


def probability_change(records: Records) -> NDArray[np.float64]:
    """Δp: by how much the candidate finds the token that followed likelier than the reference does."""
    change: NDArray[np.float64] = np.exp(records["logp"]) - np.exp(records["reference_logp"])
    return change
