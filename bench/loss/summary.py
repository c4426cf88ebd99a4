"""From the records of all positions to the figures of the result, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.text.tokenizer import Tokenizer
from .intervals import FEW_UNITS, FEWEST_UNITS, Bootstrap, Interval
from .metrics import TOP, Records, probability_change, same_top
from .passages import BLOCK, Passage, Text
from .state import Arrays

_QUANTILES = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99, "kld_p999": 0.999, "kld_max": 1.0}
_CURVE = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
_LOG10_EDGES = np.arange(-10, 2.01, 0.25)
_WORST, _BEFORE = 20, 60  # positions shown, and tokens before each
_BINS = 16  # of positions, at most

Json = dict[str, Any]


class Pooled:
    """All records of one comparison, and the bootstrap unit of each."""

    def __init__(self, arrays: Sequence[Arrays], passages: Sequence[Passage], protocol: str, confidence: float) -> None:
        self.records: Records = np.concatenate([a["records"] for a in arrays])
        self.layers: NDArray[np.float64] = np.sum([a["layers"] for a in arrays], axis=0)
        self.passage = np.repeat(np.arange(len(passages)), [p.scored for p in passages])
        own = [p.units(protocol) for p in passages]
        starts = np.cumsum([0, *(int(u[-1]) + 1 for u in own)])
        self.units = np.concatenate([u + start for u, start in zip(own, starts, strict=False)])
        self.bootstrap = Bootstrap(int(starts[-1]), confidence)

    @cached_property
    def _quantiles(self) -> tuple[list[Interval], NDArray[Any]]:
        return self.bootstrap.quantiles(self.records["kld"], self.units, list(_QUANTILES.values()))

    def mean(self, values: NDArray[Any], least: float = -math.inf, most: float = math.inf) -> Interval:
        return self.bootstrap.mean(values, self.units, least, most)

    def drawn(self, metric: str) -> tuple[float, NDArray[Any]]:
        """A quantile of the KLD, and what it was in each draw of the bootstrap."""
        intervals, drawn = self._quantiles
        place = list(_QUANTILES).index(metric)
        return intervals[place].value, drawn[:, place]

    def metrics(self) -> dict[str, Json]:
        r = self.records
        same = same_top(r)
        found = {"kld_mean": self.mean(r["kld"], 0)}
        found |= dict(zip(_QUANTILES, self._quantiles[0], strict=True))
        # Draws of what was seen say nothing about what was not: no bootstrap holds for a maximum.
        found["kld_max"] = Interval(found["kld_max"].value, None, None)
        found |= {
            "top1": self.mean(same, 0, 1),
            "top5": self.mean(r["shared_top"] / TOP, 0, 1),
            "flips": self.mean(~same, 0, 1),
            "rms_dp": self.mean(probability_change(r) ** 2, 0, 1).map(math.sqrt),
            "perplexity": self.mean(-r["logp"], 0).map(math.exp),
            "perplexity_ratio": self.mean(r["reference_logp"] - r["logp"]).map(math.exp),
        }
        return {name: interval._asdict() for name, interval in found.items()}

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


def reference_perplexity(pooled: Pooled) -> Json:
    return pooled.mean(-pooled.records["reference_logp"], 0).map(math.exp)._asdict()


def describe(
    pooled: Pooled, passages: Sequence[Passage], texts: Sequence[Text], tokenizer: Tokenizer, protocol: str, chunk: int
) -> Json:
    """All that the result says about what one candidate lost."""
    kld = pooled.records["kld"]
    levels = [p for p in _CURVE if len(kld) * (1 - p) >= 1]
    counts, _ = np.histogram(np.log10(np.clip(kld, 10 ** _LOG10_EDGES[0], 10 ** _LOG10_EDGES[-1])), _LOG10_EDGES)
    difference, size = pooled.layers
    return {
        "metrics": pooled.metrics(),
        "by_position": _by_position(pooled, 0 if protocol == "long" else chunk // 2, chunk),
        "histogram": {"log10_edges": _LOG10_EDGES.tolist(), "counts": counts.tolist()},
        "quantiles": {"p": levels, "kld": np.quantile(kld, levels, method="inverted_cdf").tolist()},
        "worst": _worst(pooled, passages, texts, tokenizer),
        "by_layer": [
            {"layer": i, "error": math.sqrt(d / s) if s else None}
            for i, (d, s) in enumerate(zip(difference, size, strict=True))
        ]
        or None,
    }


def pairs(found: Sequence[tuple[str, Pooled]]) -> list[Json]:
    """a − b of every two candidates, position by position; nothing where there are no intervals."""
    out = []
    for (name_a, a), (name_b, b) in combinations(found, 2):
        if a.bootstrap.n < FEWEST_UNITS:
            continue
        kld = a.mean(a.records["kld"] - b.records["kld"])
        top1 = a.mean(same_top(a.records).astype(float) - same_top(b.records).astype(float))
        loss = a.mean(b.records["logp"] - a.records["logp"])
        (value_a, drawn_a), (value_b, drawn_b) = a.drawn("kld_p999"), b.drawn("kld_p999")
        p999 = a.bootstrap.difference(value_a, value_b, drawn_a, drawn_b)
        for metric, interval in (("kld_mean", kld), ("kld_p999", p999), ("top1", top1), ("log_perplexity", loss)):
            out.append(
                {
                    "a": name_a,
                    "b": name_b,
                    "metric": metric,
                    "difference": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                }
            )
    return out


def _by_position(pooled: Pooled, first: int, chunk: int) -> Json:
    step = max(-(-(chunk - first) // _BINS), 1)
    if chunk - first > _BINS * BLOCK:
        step = -(-step // BLOCK) * BLOCK  # whole units, so that a bin has as many as can be
    edges = [*range(first, chunk, step), chunk]
    columns: Json = {"edges": edges, "kld_mean": [], "low": [], "high": [], "count": []}
    position = pooled.records["position"]
    for start, stop in pairwise(edges):
        inside = (position >= start) & (position < stop)
        units, renumbered = np.unique(pooled.units[inside], return_inverse=True)
        empty = Interval(math.nan, None, None)
        kld = pooled.records["kld"][inside]
        found = Bootstrap(len(units), pooled.bootstrap.confidence).mean(kld, renumbered, 0) if len(units) else empty
        columns["kld_mean"].append(found.value if len(units) else None)
        columns["low"].append(found.low)
        columns["high"].append(found.high)
        columns["count"].append(int(inside.sum()))
    return columns


def _worst(pooled: Pooled, passages: Sequence[Passage], texts: Sequence[Text], tokenizer: Tokenizer) -> list[Json]:
    out = []
    for i in np.argsort(-pooled.records["kld"], kind="stable")[:_WORST]:
        record, passage = pooled.records[i], passages[pooled.passage[i]]
        next_place = int(record["position"]) + 1
        before = passage.ids[max(0, next_place - _BEFORE) : next_place].tolist()
        shown: Callable[[int], str] = lambda token: show_token(tokenizer, token)  # noqa: E731
        out.append(
            {
                "kld": float(record["kld"]),
                "text": str(texts[passage.text].path),
                "position": passage.start + next_place,
                "before": tokenizer.decode(before),
                "token": shown(int(passage.ids[next_place])),
                "reference_top": _tops(record, "reference_top", shown),
                "candidate_top": _tops(record, "top", shown),
            }
        )
    return out


def _tops(record: Any, field: str, shown: Callable[[int], str]) -> list[list[Any]]:
    return [[shown(int(t)), float(p)] for t, p in zip(record[field], record[f"{field}_p"], strict=True)]


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """The token's text, or its piece where that is no text: a control token, a lone byte."""
    text = tokenizer.decode([token])
    return tokenizer.piece(token) if not text or "\ufffd" in text else text
