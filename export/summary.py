"""What an export tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportSummary:
    """What was written. `formats` counts tensors, `fallbacks` names the roles of those that could not have theirs."""

    path: str
    file_bytes: int
    weights: int
    bits_per_weight: float
    formats: dict[str, int]
    fallbacks: list[str]
    warnings: list[str]
    seconds: float
