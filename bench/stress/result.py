"""What `bezel stress` finds, as its table and its report take it; `to_json` is the form that others read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..loss.intervals import Interval
from ..loss.result import MeasuredModel, MeasuredText

ORIGIN = 0
"""The index of the pose in which the texts are as they are."""


@dataclass(frozen=True)
class PoseLoss:
    """Of a candidate in a pose: its mean KLD, by how much that is more than at the origin (paired), the share of
    positions whose top token is another than the reference's.
    """

    kld: Interval
    more: Interval
    flips: Interval


@dataclass(frozen=True)
class Stressed(MeasuredModel):
    """A candidate, with a loss for each pose."""

    losses: list[PoseLoss]

    @property
    def ranked(self) -> list[int]:
        """The indices of the poses, the one that costs most first."""
        return sorted(range(len(self.losses)), key=lambda i: -self.losses[i].kld.value)

    @property
    def worst(self) -> int:
        return self.ranked[0]


@dataclass(frozen=True)
class Posed:
    """A pose: the parameters that are turned, and how far; how many passages that changed; `perplexity` is the
    reference's there, and `sample` how the first passage begins.
    """

    turned: dict[str, float]
    changed: int
    perplexity: Interval
    sample: str


@dataclass(frozen=True)
class Transfer:
    """How alike the poses rank by what they cost a and b: Spearman's rank correlation, 1 in the same order."""

    a: str
    b: str
    rank_correlation: float


@dataclass(frozen=True)
class Stress:
    """Poses: the origin, every level of every parameter alone, then the `grid` of two parameters and the corners.

    `passages` were read in each pose, of `chunk` tokens, of which the second half is scored.
    """

    time: str
    tool: str
    texts: list[MeasuredText]
    chunk: int
    passages: int
    scored: int
    confidence: float
    warnings: list[str]
    reference: MeasuredModel
    levels: dict[str, list[float]]
    grid: list[str]
    poses: list[Posed]
    candidates: list[Stressed]
    transfer: list[Transfer]
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"bezel_stress": 1, **asdict(self)}

    def find(self, turned: dict[str, float]) -> int:
        """The index of a pose that was measured."""
        return next(i for i, pose in enumerate(self.poses) if pose.turned == turned)


def shown_name(pose: Posed) -> str:
    """Its name, and if it is one in name only."""
    return pose_name(pose.turned) + ("" if pose.changed or not pose.turned else " (changes nothing)")


def pose_name(turned: Mapping[str, float]) -> str:
    """As `typos 0.05, depth 128`."""
    return ", ".join(f"{name} {level:g}" for name, level in turned.items()) or "as it is"


@dataclass(frozen=True)
class SearchLoss:
    """Of a candidate on one passage: mean KLD over the scored positions as the text is, as it was changed, and with
    random tokens as far away in the same places, on average and in the worst draw; and the shares of positions whose
    top token is not the reference's.
    """

    plain: float
    found: float
    random: float
    random_worst: float
    plain_flips: float
    found_flips: float
    random_flips: float


@dataclass(frozen=True)
class FoundPassage:
    """A passage by its tokens, of which the first `read` are read only, and what was put in their `places`.

    `distance` is the word mover's distance between both, in mean distances of two tokens. `losses` are in the order of
    the candidates.
    """

    text: str
    start: int
    read: int
    before: list[str]
    places: list[int]
    after: list[str]
    distance: float
    losses: list[SearchLoss]


@dataclass(frozen=True)
class Toll:
    """What passages that were changed to make `searched` suffer cost the candidate `measured`: means over them."""

    searched: str
    measured: str
    plain: Interval
    random: Interval
    random_worst: Interval
    found: Interval
    flips: Interval


@dataclass(frozen=True)
class Search:
    """For each candidate the passages that were changed until they hurt it, no farther than `distance`."""

    time: str
    tool: str
    texts: list[MeasuredText]
    chunk: int
    distance: float
    draws: int
    confidence: float
    warnings: list[str]
    reference: MeasuredModel
    candidates: list[MeasuredModel]
    found: dict[str, list[FoundPassage]]
    tolls: list[Toll]
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"bezel_search": 1, **asdict(self)}
