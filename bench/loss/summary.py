"""From the records of all positions to the figures of the result, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.text.tokenizer import Tokenizer
from .intervals import FEW_UNITS, FEWEST_UNITS, Bootstrap, Interval
from .metrics import TOP, Records, probability_change, same_top
from .passages import BLOCK, Passage, Text
from .result import (
    ByPosition,
    Candidate,
    Histogram,
    LayerError,
    MeasuredModel,
    Metrics,
    Pair,
    Quantiles,
    TextLoss,
    WorstToken,
)
from .state import Arrays

_QUANTILES = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99, "kld_p999": 0.999, "kld_max": 1.0}
_CURVE = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
_LOG10_EDGES = np.arange(-10, 2.01, 0.25)
_WORST, _BEFORE = 20, 60  # positions shown, and tokens before each
_BINS = 16  # of positions, at most


class Sample:
    """Positions of one comparison, and the bootstrap unit of each."""

    def __init__(self, records: Records, units: NDArray[np.int64], confidence: float) -> None:
        """`units` number from 0 on, and leave no number out."""
        self.records, self.units = records, units
        self.bootstrap = Bootstrap(int(units.max()) + 1, confidence)

    @cached_property
    def _quantiles(self) -> tuple[list[Interval], NDArray[Any]]:
        return self.bootstrap.quantiles(self.records["kld"], self.units, list(_QUANTILES.values()))

    def mean(self, values: NDArray[Any], least: float = -math.inf, most: float = math.inf) -> Interval:
        return self.bootstrap.mean(values, self.units, least, most)

    def bits_a_byte(self, logp: str, lengths: NDArray[np.int64]) -> Interval:
        """What `logp` or `reference_logp` say that the tokens take which followed, `lengths` bytes long."""
        return self.bootstrap.mean(-self.records[logp] / math.log(2), self.units, 0, sizes=lengths)

    def drawn(self, metric: str) -> tuple[float, NDArray[Any]]:
        """A quantile of the KLD, and what it was in each draw of the bootstrap."""
        intervals, drawn = self._quantiles
        place = list(_QUANTILES).index(metric)
        return intervals[place].value, drawn[:, place]

    def metrics(self) -> Metrics:
        r = self.records
        same = same_top(r)
        quantiles = dict(zip(_QUANTILES, self._quantiles[0], strict=True))
        # Draws of what was seen say nothing about what was not: no bootstrap holds for a maximum.
        quantiles["kld_max"] = Interval(quantiles["kld_max"].value, None, None)
        return Metrics(
            kld_mean=self.mean(r["kld"], 0),
            **quantiles,
            top1=self.mean(same, 0, 1),
            top5=self.mean(r["shared_top"] / TOP, 0, 1),
            flips=self.mean(~same, 0, 1),
            rms_dp=self.mean(probability_change(r) ** 2, 0, 1).map(math.sqrt),
            perplexity=self.mean(-r["logp"], 0).map(math.exp),
            perplexity_ratio=self.mean(r["reference_logp"] - r["logp"]).map(math.exp),
        )

    def reference_perplexity(self) -> Interval:
        return self.mean(-self.records["reference_logp"], 0).map(math.exp)

    def warnings(self) -> list[str]:
        """What the reader should know before believing the intervals."""
        out = []
        n = self.bootstrap.n
        if n < FEW_UNITS:
            trust = (
                "there are no confidence intervals" if n < FEWEST_UNITS else "the confidence intervals are too narrow"
            )
            out.append(f"only {n} chunk{'s' * (n > 1)}: {trust}; {FEW_UNITS} or more are wanted, better 100")
        beyond = round(len(self.records) * 0.001)
        if beyond < 10:
            out.append(f"the 99.9 % KLD rests on {beyond} of {len(self.records)} positions: take it as a rough figure")
        return out


class Pooled(Sample):
    """All records of one comparison, and the passage of each."""

    def __init__(self, arrays: Sequence[Arrays], passages: Sequence[Passage], protocol: str, confidence: float) -> None:
        self.layers: NDArray[np.float64] = np.sum([a["layers"] for a in arrays], axis=0)
        self.passage = np.repeat(np.arange(len(passages)), [p.scored for p in passages])
        own = [p.units(protocol) for p in passages]
        starts = np.cumsum([0, *(int(u[-1]) + 1 for u in own)])
        units = np.concatenate([u + start for u, start in zip(own, starts, strict=False)])
        super().__init__(np.concatenate([a["records"] for a in arrays]), units, confidence)

    def by_text(self, passages: Sequence[Passage], texts: Sequence[Text], tokenizer: Tokenizer) -> list[TextLoss]:
        """The loss on each text alone."""
        text = np.array([passage.text for passage in passages])[self.passage]
        following, places = np.unique(np.concatenate([p.ids[p.first + 1 :] for p in passages]), return_inverse=True)
        lengths = np.array([len(tokenizer.bytes_of(int(token))) for token in following])[places]
        out = []
        for index in np.unique(text):
            inside = text == index
            part = self if inside.all() else self._part(inside)
            metrics, bits = part.metrics(), [part.bits_a_byte(x, lengths[inside]) for x in ("logp", "reference_logp")]
            figures = metrics.kld_mean, metrics.kld_p999, metrics.top1, metrics.perplexity_ratio
            out.append(TextLoss(str(texts[index].path), len(part.records), *figures, *bits))
        return out

    def _part(self, inside: NDArray[np.bool_]) -> Sample:
        _, units = np.unique(self.units[inside], return_inverse=True)
        return Sample(self.records[inside], units, self.bootstrap.confidence)


def describe(
    model: MeasuredModel,
    pooled: Pooled,
    passages: Sequence[Passage],
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    protocol: str,
    chunk: int,
) -> Candidate:
    """All that the result says about what one candidate lost."""
    kld = pooled.records["kld"]
    levels = [p for p in _CURVE if len(kld) * (1 - p) >= 1]
    counts, _ = np.histogram(np.log10(np.clip(kld, 10 ** _LOG10_EDGES[0], 10 ** _LOG10_EDGES[-1])), _LOG10_EDGES)
    layers = zip(*pooled.layers, strict=True)
    return Candidate(
        **vars(model),
        metrics=pooled.metrics(),
        by_text=pooled.by_text(passages, texts, tokenizer),
        by_position=_by_position(pooled, chunk // 2 if protocol in ("chunks", "written") else 0, chunk),
        histogram=Histogram(_LOG10_EDGES.tolist(), counts.tolist()),
        quantiles=Quantiles(levels, np.quantile(kld, levels, method="inverted_cdf").tolist()),
        worst=_worst(pooled, passages, texts, tokenizer),
        by_layer=[LayerError(i, math.sqrt(d / s) if s else None) for i, (d, s) in enumerate(layers)] or None,
    )


def pairs(found: Sequence[tuple[str, Pooled]]) -> list[Pair]:
    """a − b of every two candidates, position by position; nothing where there are no intervals."""
    out = []
    for (name_a, a), (name_b, b) in combinations(found, 2):
        top1 = a.mean(same_top(a.records).astype(float) - same_top(b.records).astype(float))
        (value_a, drawn_a), (value_b, drawn_b) = a.drawn("kld_p999"), b.drawn("kld_p999")
        differences = {
            "kld_mean": a.mean(a.records["kld"] - b.records["kld"]),
            "kld_p999": a.bootstrap.difference(value_a, value_b, drawn_a, drawn_b),
            "top1": top1,
            "log_perplexity": a.mean(b.records["logp"] - a.records["logp"]),
        }
        for metric, found_of in differences.items():
            if found_of.low is not None and found_of.high is not None:
                out.append(Pair(name_a, name_b, metric, found_of.value, found_of.low, found_of.high))
    return out


def _by_position(pooled: Pooled, first: int, chunk: int) -> ByPosition:
    step = max(-(-(chunk - first) // _BINS), 1)
    if chunk - first > _BINS * BLOCK:
        step = -(-step // BLOCK) * BLOCK  # whole units, so that a bin has as many as can be
    edges = [*range(first, chunk, step), chunk]
    columns = ByPosition(edges, [], [], [], [])
    position = pooled.records["position"]
    for start, stop in pairwise(edges):
        inside = (position >= start) & (position < stop)
        kld = pooled.records["kld"][inside]
        columns.count.append(len(kld))
        value = low = high = None
        if len(kld):
            units, renumbered = np.unique(pooled.units[inside], return_inverse=True)
            found = Bootstrap(len(units), pooled.bootstrap.confidence).mean(kld, renumbered, 0)
            value, low, high = found.value, found.low, found.high
        columns.kld_mean.append(value)
        columns.low.append(low)
        columns.high.append(high)
    return columns


def _worst(
    pooled: Pooled, passages: Sequence[Passage], texts: Sequence[Text], tokenizer: Tokenizer
) -> list[WorstToken]:
    def shown(token: int) -> str:
        return show_token(tokenizer, int(token))

    out = []
    for i in np.argsort(-pooled.records["kld"], kind="stable")[:_WORST]:
        record, passage = pooled.records[i], passages[pooled.passage[i]]
        next_place = int(record["position"]) + 1
        tops = (
            [(shown(t), float(p)) for t, p in zip(record[which], record[f"{which}_p"], strict=True)]
            for which in ("reference_top", "top")
        )
        before = passage.ids[max(0, next_place - _BEFORE) : next_place]
        out.append(
            WorstToken(
                float(record["kld"]),
                str(texts[passage.text].path),
                passage.line,
                passage.start + next_place,
                tokenizer.decode(before[before >= 0].tolist()),  # without pictures
                shown(passage.ids[next_place]),
                *tops,
            )
        )
    return out


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """The token's text, or its piece where that is no text: a control token, a lone byte."""
    text = tokenizer.decode([token])
    return tokenizer.piece(token) if not text or "\ufffd" in text else text
