"""Subjects read sequences side by side, and what each position lost is kept.

Nothing but a few figures of each position is: a piece of logits of all models is compared and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.arrays import Floats
from ...runtime.errors import BezelError, InvalidRequest
from ...runtime.model.config import ModelConfig
from ...runtime.text.vocabulary import SPACE
from ..progress import Progress
from ..spread import Recipe, Spread, here
from .metrics import NotFinite, Records, compare
from .passages import Passage
from .state import Arrays, KeptResults
from .subjects import Opener, Spec, Subject, absolute, forward, key_of, sizes_of, unique_names

_ROWS = 64  # positions compared at a time …
_LOGIT_BYTES = 512 << 20  # … or fewer, so that the logits of all models take no more than this
_SHOWN = 3  # comparisons in the progress line


@dataclass(frozen=True)
class Comparison:
    """A candidate and what it is compared with, as indices into the subjects; `effect` says what it isolates."""

    reference: int
    candidate: int
    effect: str | None = None
    of: str = ""  # the candidate that an effect belongs to


class Subjects:
    """The subjects, the reference first, each only once; and which is compared with which."""

    def __init__(self, candidates: Sequence[Spec], reference: Spec, effects: bool, opener: Opener) -> None:
        self.subjects: list[Subject] = []
        self.comparisons: list[Comparison] = []
        self.threads, self._opener = opener.threads, opener
        names = unique_names([reference, *candidates])
        self._add(reference, names[0])
        for spec, name in zip(candidates, names[1:], strict=True):
            self.comparisons.append(Comparison(0, self._add(spec, name)))
        if effects:
            for path in dict.fromkeys(spec.path for spec in candidates):
                spec, name = next((s, n) for s, n in zip(candidates, names[1:], strict=True) if s.path == path)
                self._add_effects(spec, name)
        for subject in self.subjects[1:]:
            _check_same_model(self.subjects[0], subject)
            _check_same_rows(self.subjects[0], subject)

    @property
    def candidates(self) -> list[Subject]:
        """In the order in which they were given."""
        return [self.subjects[c.candidate] for c in self.comparisons if c.effect is None]

    def _add(self, spec: Spec, name: str) -> int:
        subject = self._opener.open(spec, name)
        self.subjects.append(subject)
        return len(self.subjects) - 1

    def _find(self, spec: Spec, name: str) -> int:
        """The subject for an effect: one that is there already, or a new one."""
        for i, subject in enumerate(self.subjects):
            if replace(subject.spec, name=None) == replace(spec, name=None):
                return i
        return self._add(spec, name)

    def _add_effects(self, spec: Spec, name: str) -> None:
        if spec.engine == "ort":  # its graph fixes how it computes
            self.comparisons.append(Comparison(0, self._find(spec, name), "weights", name))
            return
        if spec.vision is not None:
            seen = self._find(replace(self.subjects[0].spec, vision=spec.vision), name)
            self.comparisons.append(Comparison(0, seen, "eye", name))
        plain = self._find(replace(spec, kv="f32", activations="f32"), name)
        self.comparisons.append(Comparison(0, plain, "weights", name))
        variants = [("kv f16", {"kv": "f16"}), ("kv int8", {"kv": "int8"})]
        if spec.engine == "native":
            variants.insert(0, ("activations int8", {"activations": "int8"}))
        for effect, change in variants:
            one = self._find(replace(self.subjects[plain].spec, **change), name)  # type: ignore[arg-type]
            self.comparisons.append(Comparison(plain, one, effect, name))


def _check_same_model(reference: Subject, candidate: Subject) -> None:
    """Logits can be compared only where a token is the same token."""
    a, b = reference.tokenizer, candidate.tokenizer
    # Some tokenizers write a space as itself, others by its sign.
    pieces = ([t.piece(i).replace(" ", SPACE) for i in range(t.vocab_size)] for t in (a, b))
    if a.vocab_size != b.vocab_size or next(pieces) != next(pieces):
        raise InvalidRequest(
            f"{candidate.spec.path}: its vocabulary is not that of the reference, {reference.spec.path}; they belong "
            "to different models"
        )


def _check_same_rows(reference: Subject, candidate: Subject) -> None:
    """A picture must be as many rows for both."""
    if reference.eye is None or candidate.eye is None:
        return
    want, found = reference.eye.config.n_rows, candidate.eye.config.n_rows
    if want != found:
        raise InvalidRequest(
            f"{candidate.spec.vision}: makes {found} rows of a picture, expected {want} as {reference.spec.vision} does"
        )


def compute(
    work: Subjects,
    passages: Mapping[int, Passage],
    key: Mapping[str, Any],
    folder: Path,
    progress: Progress,
    spread: Spread = here,
) -> list[list[Arrays]]:
    """For each comparison the arrays of each passage, by its number among all, computed by `spread` or loaded."""
    keys = [key_of(subject.spec) for subject in work.subjects]
    states = [
        KeptResults(folder, {**key, "reference": keys[c.reference], "candidate": keys[c.candidate]})
        for c in work.comparisons
    ]
    found: list[dict[int, Arrays]] = [
        {number: kept for number in passages if (kept := state.load(number)) is not None} for state in states
    ]
    missing = {number: [i for i, kept in enumerate(found) if number not in kept] for number in passages}
    items = {
        number: (passages[number], [work.comparisons[i] for i in lacking])
        for number, lacking in missing.items()
        if lacking
    }
    done, means = len(passages) - len(items), _MeansSoFar(work, found)
    progress(done, len(passages), str(means))
    for number, computed in spread(Scoring(work.subjects, work.threads), items):
        for i, arrays in zip(missing[number], computed, strict=True):
            states[i].save(number, arrays)
            found[i][number] = arrays
            means.add(i, arrays)
        done += 1
        progress(done, len(passages), str(means))
    return [[kept[number] for number in passages] for kept in found]


class Scoring:
    """The work on a passage: some comparisons of it by the subjects, as `score`."""

    def __init__(self, subjects: Sequence[Subject], threads: int | None) -> None:
        self._subjects, self._threads = subjects, threads

    def __call__(self, item: tuple[Passage, Sequence[Comparison]]) -> list[Arrays]:
        passage, comparisons = item
        return score(self._subjects, comparisons, passage)

    def recipe(self) -> Recipe:
        specs = [absolute(s.spec) for s in self._subjects]
        eyes = (s.vision for s in specs if s.vision is not None)
        return Recipe(_open_scoring, (specs, self._threads), sizes_of([*(s.path for s in specs), *eyes]), self._threads)


def _open_scoring(specs: Sequence[Spec], threads: int | None) -> Scoring:
    opener = Opener(threads)
    return Scoring([opener.open(spec) for spec in specs], threads)


def score(subjects: Sequence[Subject], comparisons: Sequence[Comparison], passage: Passage) -> list[Arrays]:
    """Run the passage through the models that the comparisons need; the records and layer errors of each."""
    used = sorted({i for c in comparisons for i in (c.reference, c.candidate)})
    place = {subject: i for i, subject in enumerate(used)}
    pairs = [(place[c.reference], place[c.candidate]) for c in comparisons]
    n = len(passage.ids) - 1  # nothing follows the last token that could score it
    started, eyes = [subjects[i].start(n) for i in used], [subjects[i].eye for i in used]
    own = [subjects[i].ids_of(passage) for i in used]
    records: list[list[Records]] = [[] for _ in comparisons]
    layers = [_LayerErrors(subjects[c.reference].config, subjects[c.candidate].config) for c in comparisons]
    rows = _LOGIT_BYTES // (4 * subjects[0].config.vocab_size * len(used))
    rows = max(1, min(_ROWS, rows, *(engine.chunk for engine in started)))
    for start, stop in _pieces(n, passage.first, rows):
        wanted = stop - start if start >= passage.first else 0
        streams: list[list[Floats]] = [[] for _ in started]
        logits = [
            forward(engine, ids[start:stop], wanted, stream if wanted else None, eye)
            for engine, ids, stream, eye in zip(started, own, streams, eyes, strict=True)
        ]
        if not wanted:
            continue
        try:
            compared = compare(logits, pairs, start, passage.ids[start + 1 : stop + 1])
        except NotFinite as error:
            where = f"position {start + error.row} of {passage.place}"
            raise BezelError(
                f"{subjects[used[error.which]].spec.path}: a logit that is not finite at {where}"
            ) from None
        for (a, b), new, kept, errors in zip(pairs, compared, records, layers, strict=True):
            kept.append(new)
            errors.add(streams[a], streams[b])
    return [
        {"records": np.concatenate(kept), "layers": errors.sums} for kept, errors in zip(records, layers, strict=True)
    ]


def _pieces(n: int, first: int, rows: int) -> Iterator[tuple[int, int]]:
    """0 … n cut into what is only read and, from `first` on, pieces of `rows` to compare."""
    if first:
        yield 0, first
    for start in range(first, n, rows):
        yield start, min(start + rows, n)


class _LayerErrors:
    """Sums over positions and channels of (candidate − reference)² and reference², after each layer: (2, layers)."""

    def __init__(self, reference: ModelConfig, candidate: ModelConfig) -> None:
        same = (reference.hidden_size, reference.n_layers) == (candidate.hidden_size, candidate.n_layers)
        self.sums = np.zeros((2, reference.n_layers if same else 0))

    def add(self, reference: list[Floats], candidate: list[Floats]) -> None:
        if not reference or not candidate:  # an engine that does not tell
            self.sums = np.zeros((2, 0))
        elif self.sums.size:
            for i, (x, y) in enumerate(zip(reference, candidate, strict=True)):
                x = x[-len(y) :].astype(np.float64)
                self.sums[:, i] += np.square(y[-len(x) :] - x).sum(), np.square(x).sum()


class _MeansSoFar:
    """The mean KLD of the first few comparisons over what is there, for the progress line."""

    def __init__(self, work: Subjects, found: Sequence[Mapping[int, Arrays]]) -> None:
        self._names = [work.subjects[c.candidate].name for c in work.comparisons[:_SHOWN]]
        self._sums, self._counts = [0.0] * len(self._names), [0] * len(self._names)
        for i, known in enumerate(found[:_SHOWN]):
            for arrays in known.values():
                self.add(i, arrays)

    def add(self, comparison: int, arrays: Arrays) -> None:
        if comparison < len(self._names):
            self._sums[comparison] += float(arrays["records"]["kld"].sum())
            self._counts[comparison] += len(arrays["records"])

    def __str__(self) -> str:
        means = [
            f"{n} {x / count:.4g}" for n, x, count in zip(self._names, self._sums, self._counts, strict=True) if count
        ]
        return f"mean KLD {', '.join(means)}" if means else ""
