"""What an export tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ExportSummary:
    """What was written. `formats` counts tensors, `fallbacks` names the roles of those that could not have theirs.

    `vision` is the file of the vision tower, where there is one. `kept_exactly` is the share of the weights in Q4_0
    that are the bfloat16 numbers of the source, in tensors of which nearly all are. `divergence` is that from the exact
    model before tuning and after it, in nats a token of a few of the sequences that it was tuned on; where it did not
    fall, nothing was tuned.
    """

    path: str
    file_bytes: int
    weights: int
    bits_per_weight: float
    formats: dict[str, int]
    fallbacks: list[str]
    warnings: list[str]
    seconds: float
    kept_exactly: float = 0.0
    vision: ExportSummary | None = None
    divergence: tuple[float, float] | None = None


def of_vanished(weights: Mapping[str, int]) -> list[str]:
    """A warning for the tensors of which so many weights became zeros, if any did."""
    found = [f"{n} of {name}" for name, n in weights.items() if n]
    if not found:
        return []
    more = f" and of {len(found) - 3} more tensors" if len(found) > 3 else ""
    return [
        f"weights too small for their format became zeros: {', '.join(found[:3])}{more}; a recipe can keep them bf16"
    ]
