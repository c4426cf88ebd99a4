"""The best mix of formats within a budget, from what each choice costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_UNITS = 1 << 18  # that a budget is divided into, if sizes have no common divisor that makes fewer


@dataclass(frozen=True)
class Option:
    """One of the formats that a group of tensors may have."""

    size: int  # bytes
    cost: float


def best_mix(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """For each group the index of its option, so that the sizes add up to at most `budget` and the costs to the least.

    Dynamic programming over bytes: exact where the sizes have a common divisor of budget / 2¹⁸ or more, as those of
    matrices have; otherwise sizes count as rounded up to that. Raises ValueError where not even the smallest options
    fit.
    """
    smallest = [min(range(len(options)), key=lambda i: options[i].size) for options in groups]
    least = sum(options[i].size for options, i in zip(groups, smallest, strict=True))
    if least > budget:
        raise ValueError(f"{budget} bytes, but the smallest mix has {least}")
    unit = max(math.gcd(*(option.size for options in groups for option in options)), -(-budget // _UNITS), 1)
    room = budget // unit
    # best[b]: the least cost of the groups so far in b units.
    best = np.zeros(room + 1)
    chosen = np.zeros((len(groups), room + 1), np.uint8)
    for g, options in enumerate(groups):
        trial = np.full(room + 1, np.inf)
        for i, option in enumerate(options):
            size = -(-option.size // unit)
            if size > room:
                continue
            cost = best[: room + 1 - size] + option.cost
            better = cost < trial[size:]
            trial[size:][better] = cost[better]
            chosen[g, size:][better] = i
        best = trial
    if not np.isfinite(best[room]):
        return smallest
    out, left = [], room
    for g in reversed(range(len(groups))):
        out.append(int(chosen[g, left]))
        left -= -(-groups[g][out[-1]].size // unit)
    return out[::-1]
