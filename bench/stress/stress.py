"""What a text's pose costs: candidates and reference read the same passages, seen from many sides."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations, product
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from ...runtime.errors import InvalidRequest
from ...runtime.version import bezel_version
from ..loss.intervals import FEW_UNITS, Bootstrap
from ..loss.metrics import Records, same_top
from ..loss.passages import Passage, Text, read_texts, sequence_length
from ..loss.result import MeasuredText
from ..loss.scoring import Subjects, compute
from ..loss.state import Arrays, KeptResults, number_of
from ..loss.subjects import Opener, Spec, Subject, calibration_warnings, key_of
from ..loss.writing import continuation
from ..progress import Progress, silent
from ..spread import Spread, here
from .poses import Pose, posed
from .result import ORIGIN, Posed, PoseLoss, Stress, Stressed, Transfer, pose_name

CHUNK, PASSAGES, CORNERS = 256, 16, 24
LEVELS: dict[str, tuple[float, ...]] = {
    "case": (0.25, 0.5, 1),
    "typos": (0.02, 0.05, 0.1, 0.2),
    "spacing": (0.05, 0.1, 0.2, 0.4),
    "homoglyphs": (0.05, 0.1, 0.2, 0.4),
    "digits": (0.1, 0.2, 0.4),
    "repetition": (1, 3),
    "shuffle": (0.5, 1),
    "temperature": (0.7, 1, 1.5),
}
"""How far each parameter is turned, if nothing else is asked for; "depth" depends on the model's window."""

PARAMETERS = (*LEVELS, "depth")
GRID = ("typos", "case")
SEARCH_CHUNK, SEARCH_PASSAGES, DISTANCE = 64, 8, 0.05  # the last: how far a search may move a text
_MOST = {"repetition": 20.0, "temperature": 5.0}  # of what is no share
_SOURCE = 2  # chunks of text that a passage is made of: some changes leave fewer tokens
_SAMPLE = 160  # characters


def stress(
    candidates: Sequence[Spec],
    reference: Spec,
    texts: Sequence[Path],
    *,
    levels: Mapping[str, Sequence[float] | None] | None = None,
    grid: Sequence[str] | None = GRID,
    corners: int = CORNERS,
    chunk: int | None = None,
    limit: int = PASSAGES,
    confidence: float = 0.95,
    threads: int | None = None,
    states: Path,
    progress: Progress = silent,
    spread: Spread = here,
) -> Stress:
    """Compare every candidate with the reference in every pose of the texts' first passages, at most `limit` of each.

    `levels` are those of the parameters to turn (default: all of PARAMETERS); two that are in `grid` are turned
    together, at every two levels, and `corners` poses turn any of them, at random. What has been computed is kept in
    the folder `states`, and not computed again; `spread` says where the passages are computed. Raises InvalidRequest,
    and what opening the models raises.
    """
    work = Subjects(candidates, reference, False, Opener(threads))
    context = min(subject.config.context_length for subject in work.subjects)
    chunk = sequence_length(min(CHUNK, context // 2) if chunk is None else chunk, "chunks", context)
    exact = work.subjects[0]
    read = read_texts(texts, exact.tokenizer)
    key = {"stress": 2, "texts": [text.sha256 for text in read], "chunk": chunk}
    sources = _Sources(exact, read, chunk, limit, KeptResults(states, {**key, "writer": key_of(reference)}), progress)
    deepest = min(context - chunk, sources.deepest)
    turned = _levels(levels, exact, deepest)
    _check(turned, grid, deepest)
    poses = list(_poses(turned, grid, corners))
    passages = [sources.passage(i, pose) for pose in poses for i in range(sources.n)]
    numbers = [sources.number(i, pose) for pose in poses for i in range(sources.n)]
    found = compute(work, dict(zip(numbers, passages, strict=True)), key, states, progress, spread)
    bootstrap = Bootstrap(sources.n, confidence)
    units = np.repeat(range(sources.n), passages[0].scored)
    records = [_by_pose(arrays, len(poses)) for arrays in found]
    stressed = [
        Stressed(**vars(subject.facts), losses=_losses(of_one, bootstrap, units))
        for subject, of_one in zip(work.candidates, records, strict=True)
    ]
    likely = [bootstrap.mean(-of_pose["reference_logp"], units, 0).map(math.exp) for of_pose in records[0]]
    plain = passages[: sources.n]
    changed = [
        sum(not np.array_equal(a.ids, b.ids) for a, b in zip(plain, passages[i:], strict=False))
        for i in range(0, len(passages), sources.n)
    ]
    samples = [exact.tokenizer.decode(p.ids[-chunk:].tolist())[:_SAMPLE] for p in passages[:: sources.n]]
    few = f"only {sources.n} passages: intervals are too narrow, or missing; {FEW_UNITS} or more are wanted"
    return Stress(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tool=f"bezel {bezel_version()}",
        texts=[MeasuredText(str(text.path), text.sha256, len(text.ids)) for text in read],
        chunk=chunk,
        passages=sources.n,
        scored=sum(passage.scored for passage in passages),
        confidence=confidence,
        warnings=[
            *([few] if sources.n < FEW_UNITS else []),
            *calibration_warnings(work.candidates, read),
        ],
        reference=exact.facts,
        levels=turned,
        grid=list(grid or ()),
        poses=[Posed(dict(p), n, x, s) for p, n, x, s in zip(poses, changed, likely, samples, strict=True)],
        candidates=stressed,
        transfer=[Transfer(a.name, b.name, _rank_correlation(a, b)) for a, b in combinations(stressed, 2)],
    )


class _Sources:
    """What passages are made of: stretches of the texts, `n` in all, that the reference may have written part of."""

    def __init__(
        self, writer: Subject, texts: Sequence[Text], chunk: int, limit: int, kept: KeptResults, progress: Progress
    ) -> None:
        self._writer, self._chunk, self._kept, self._progress = writer, chunk, kept, progress
        self._found: list[tuple[int, Text, int]] = []  # the text, by number too, and where the stretch begins
        for number, text in enumerate(texts):
            starts = range(1, len(text.ids) - _SOURCE * chunk + 1, chunk)
            self._found += [(number, text, start) for start in starts[:limit]]
        self.n = len(self._found)
        # What comes before a passage is the text before it and, where that begins, its end: no part of the passage.
        self.deepest = min((len(text.ids) - 1 - _SOURCE * chunk for _, text, _ in self._found), default=0)
        if not self.n:
            longest = max(texts, key=lambda text: len(text.ids))
            raise InvalidRequest(
                f"{longest.path}: found {len(longest.ids)} tokens, expected at least {_SOURCE * chunk + 1}; give more "
                "text or a smaller --chunk"
            )

    def number(self, i: int, pose: Pose) -> int:
        """What a passage in a pose is kept as, whichever others there are."""
        number, _, start = self._found[i]
        return number_of(json.dumps([number, start, sorted(pose.items())]).encode())

    def passage(self, i: int, pose: Pose) -> Passage:
        """<bos>, `depth` tokens of the text from elsewhere, and what the pose makes of the stretch, a chunk in all."""
        number, text, start = self._found[i]
        tokenizer, depth = self._writer.tokenizer, int(pose.get("depth", 0))
        plain = tokenizer.decode(self._stretch(i, pose.get("temperature", 0.0)).tolist())
        made = tokenizer.encode(posed(plain, pose, f"{number} {start}"))[: self._chunk - 1]
        if len(made) < self._chunk - 1:
            raise InvalidRequest(
                f"{text.path}: {pose_name(pose)}: leaves {len(made)} of {_SOURCE * self._chunk} tokens, "
                f"expected at least {self._chunk - 1}; turn it less, or leave it out (--turn)"
            )
        before = np.take(text.ids[1:], range(start - 1 - depth, start - 1), mode="wrap")
        return Passage(number, start, np.concatenate([text.ids[:1], before, made]), depth + self._chunk // 2)

    def _stretch(self, i: int, temperature: float) -> npt.NDArray[np.int64]:
        """Its ids; with a temperature the reference has written the quarter of the chunk before what is scored."""
        _, text, start = self._found[i]
        ids = text.ids
        stretch, quarter = ids[start : start + _SOURCE * self._chunk].copy(), self._chunk // 4
        if temperature:
            place = self.number(i, {"temperature": temperature})
            found = self._kept.load(place)
            if found is None:
                self._progress(i, self.n, f"the reference writes at temperature {temperature:g}")
                begun = np.concatenate([ids[:1], stretch[:quarter]])
                found = {"ids": continuation(self._writer, begun, quarter, temperature, seed=start)}
                self._kept.save(place, found)
            stretch[quarter : 2 * quarter] = found["ids"]
        return stretch


def _levels(
    asked: Mapping[str, Sequence[float] | None] | None, subject: Subject, deepest: int
) -> dict[str, list[float]]:
    """Those asked for, and where none are named LEVELS, and depths within the local layers' window, at its edge and
    far past it.
    """
    window = max((layer.window or 0 for layer in subject.config.layers), default=0) or deepest // 4
    depths = [float(depth) for depth in (window // 2, window, 2 * window, 4 * window) if 0 < depth <= deepest]
    usual = {**LEVELS, "depth": depths}
    found = {name: usual.get(name, ()) if some is None else some for name, some in (asked or usual).items()}
    return {name: list(some) for name, some in found.items() if asked or some}


def _check(levels: Mapping[str, Sequence[float]], grid: Sequence[str] | None, deepest: int) -> None:
    for name, some in levels.items():
        if name not in PARAMETERS:
            raise InvalidRequest(f"--turn: found {name!r}, expected one of {', '.join(PARAMETERS)}")
        most = deepest if name == "depth" else _MOST.get(name, 1.0)
        if not some or not all(0 < level <= most for level in some) or len({*some}) < len(some):
            raise InvalidRequest(
                f"--turn: {name}: found {', '.join(f'{x:g}' for x in some) or 'no level'}, expected different levels "
                f"above 0, up to {most:g}"
            )
        if name in ("depth", "repetition") and not all(float(level).is_integer() for level in some):
            raise InvalidRequest(f"--turn: {name}: found {', '.join(f'{x:g}' for x in some)}, expected whole numbers")
    for name in grid or ():
        if name not in levels:
            raise InvalidRequest(f"--grid: found {name!r}, expected two of what is turned: {', '.join(levels)}")
    if grid is not None and len({*grid}) != 2:
        raise InvalidRequest(f"--grid: found {','.join(grid)!r}, expected two parameters, as {','.join(GRID)}")


def _poses(levels: Mapping[str, Sequence[float]], grid: Sequence[str] | None, corners: int) -> Iterator[Pose]:
    """Each once: the origin, each parameter alone, the grid, and so many that turn each parameter or do not."""
    random, seen = Random(0), set[frozenset[tuple[str, float]]]()
    alone: list[Pose] = [{name: level} for name, some in levels.items() for level in some]
    both = [dict(zip(grid, pair, strict=True)) for pair in product(*(levels[name] for name in grid))] if grid else []
    mixed: list[Pose] = []
    for _ in range(corners):
        drawn = {name: random.choice((0.0, random.choice(some))) for name, some in levels.items()}
        mixed.append({name: level for name, level in drawn.items() if level})
    for pose in ({}, *alone, *both, *mixed):
        if (turned := frozenset(pose.items())) not in seen:
            seen.add(turned)
            yield pose


def _by_pose(found: Sequence[Arrays], n: int) -> list[Records]:
    """The records of all passages in each of n poses."""
    step = len(found) // n
    return [np.concatenate([a["records"] for a in found[i : i + step]]) for i in range(0, len(found), step)]


def _losses(by_pose: Sequence[Records], bootstrap: Bootstrap, units: npt.NDArray[np.int64]) -> list[PoseLoss]:
    origin = by_pose[ORIGIN]["kld"]
    return [
        PoseLoss(
            kld=bootstrap.mean(records["kld"], units, 0),
            more=bootstrap.mean(records["kld"] - origin, units),
            flips=bootstrap.mean(~same_top(records), units, 0, 1),
        )
        for records in by_pose
    ]


def _rank_correlation(a: Stressed, b: Stressed) -> float:
    """Spearman's, of the losses over all poses."""
    one, other = (np.argsort(np.argsort([loss.kld.value for loss in model.losses])) for model in (a, b))
    return float(np.corrcoef(one, other)[0, 1])
