"""What measuring finds, as tables, reports and receipts take it; `to_json` is the form that others read.

Intervals are confidence intervals; KLD is in nats per token, of the reference from the candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...export.gguf.receipt import Receipt, model_sha256
from .intervals import Interval


@dataclass(frozen=True)
class MeasuredModel:
    """A model and how it was run. `formats` counts its tensors by format; `vision` is what it saw pictures with."""

    name: str
    path: str
    engine: str
    kv: str
    activations: str
    file_bytes: int
    bits_per_weight: float
    formats: dict[str, int]
    vision: str | None

    @property
    def setting(self) -> str:
        eye = "" if self.vision is None else f", seeing with {Path(self.vision).name}"
        return f"{self.engine} engine, {self.activations} activations, {self.kv} KV{eye}"


@dataclass(frozen=True)
class Reference(MeasuredModel):
    perplexity: Interval


@dataclass(frozen=True)
class Metrics:
    """`top1` and `flips` are shares of positions, `top5` is of the five likeliest tokens; `rms_dp` is of the change in
    the probability of the token that followed; `perplexity_ratio` is the candidate's over the reference's.
    """

    kld_mean: Interval
    kld_median: Interval
    kld_p90: Interval
    kld_p99: Interval
    kld_p999: Interval
    kld_max: Interval
    top1: Interval
    top5: Interval
    flips: Interval
    rms_dp: Interval
    perplexity: Interval
    perplexity_ratio: Interval


@dataclass(frozen=True)
class ByPosition:
    """Mean KLD of the `count` positions from one edge up to the next; None where there is none."""

    edges: list[int]
    kld_mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    count: list[int]


@dataclass(frozen=True)
class Histogram:
    """How many positions have a KLD from 10^edge up to the next."""

    log10_edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Quantiles:
    """Shares `p` of all positions have `kld` at most."""

    p: list[float]
    kld: list[float]


@dataclass(frozen=True)
class WorstToken:
    """A position that lost much: the text `before` it, the token that followed, and what the models expected there:
    the likeliest tokens, each with its probability. `position` counts the tokens from <bos> on: of the text, or of the
    chat that a `line` of it began.
    """

    kld: float
    text: str
    line: int | None
    position: int
    before: str
    token: str
    reference_top: list[tuple[str, float]]
    candidate_top: list[tuple[str, float]]


@dataclass(frozen=True)
class TextLoss:
    """What a candidate lost on the `scored` positions of one text. Bits a byte are what a model takes to say the text,
    in UTF-8: unlike perplexity, they compare where tokens are of other lengths.
    """

    text: str
    scored: int
    kld_mean: Interval
    kld_p999: Interval
    top1: Interval
    perplexity_ratio: Interval
    bits_per_byte: Interval
    reference_bits_per_byte: Interval


def text_names(losses: Sequence[TextLoss]) -> list[str]:
    """The texts' file names, or their paths where those are not different."""
    names = [Path(loss.text).name for loss in losses]
    return names if len(set(names)) == len(names) else [loss.text for loss in losses]


@dataclass(frozen=True)
class LayerError:
    """RMS of the residual stream's difference behind a layer, over the reference's RMS; None where that is 0."""

    layer: int
    error: float | None


@dataclass(frozen=True)
class Candidate(MeasuredModel):
    """`by_text` has the texts of which something was scored, in order. `by_layer` is None where an engine does not
    tell, or where the models have other layers.
    """

    metrics: Metrics
    by_text: list[TextLoss]
    by_position: ByPosition
    histogram: Histogram
    quantiles: Quantiles
    worst: list[WorstToken]
    by_layer: list[LayerError] | None


@dataclass(frozen=True)
class Pair:
    """a − b of two candidates, position by position; `metric` is one of Metrics or "log_perplexity"."""

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """What one cause alone costs a candidate, everything else exact."""

    candidate: str
    effect: str
    metrics: Metrics


@dataclass(frozen=True)
class MeasuredText:
    path: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class MeasuredPicture:
    path: str
    sha256: str


@dataclass(frozen=True)
class Measurement:
    """Candidates in the order of the command line. `chunks` is how many sequences of up to `chunk` tokens were read,
    `scored` how many positions counted; `command` is what to type to get this again.
    """

    time: str
    tool: str
    protocol: str
    chunk: int
    texts: list[MeasuredText]
    pictures: list[MeasuredPicture]
    chunks: int
    scored: int
    confidence: float
    warnings: list[str]
    reference: Reference
    candidates: list[Candidate]
    pairs: list[Pair]
    effects: list[Effect]
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"bezel_measure": 1, **asdict(self)}

    @property
    def ranked(self) -> list[Candidate]:
        """The candidates, the one that loses least first."""
        return sorted(self.candidates, key=lambda c: c.metrics.kld_mean.value)

    def receipts(self) -> list[Receipt]:
        """Of each candidate what its GGUF file can hold. Reads the reference to name it by its hash."""
        sha256 = model_sha256(Path(self.reference.path))
        return [
            Receipt(
                date=self.time,
                tool=self.tool,
                protocol=f"{self.protocol} of {self.chunk}",
                engine=f"{c.engine}, {c.activations} activations, {c.kv} KV",
                text_sha256=tuple(text.sha256 for text in self.texts),
                reference=self.reference.name,
                reference_sha256=sha256,
                tokens=self.scored,
                kld_mean=c.metrics.kld_mean.value,
                kld_mean_low=c.metrics.kld_mean.low,
                kld_mean_high=c.metrics.kld_mean.high,
                kld_p999=c.metrics.kld_p999.value,
                top1=c.metrics.top1.value,
                perplexity_ratio=c.metrics.perplexity_ratio.value,
            )
            for c in self.candidates
        ]


@dataclass(frozen=True)
class SensitivityEntry:
    """Mean KLD when these tensors alone are rounded to `format`; `role` and `layer` where all have the same."""

    tensors: list[str]
    role: str | None
    layer: int | None
    format: str
    kld: float
    low: float | None
    high: float | None

    @property
    def part(self) -> str:
        """What was rounded: the only tensor, or the layer, or the role."""
        if len(self.tensors) == 1:
            return self.tensors[0].removesuffix(".weight")
        return str(self.role) if self.layer is None else f"layer {self.layer}"


@dataclass(frozen=True)
class Sensitivity:
    """What a sensitivity file holds, from which an export finds the best mix; the worst entries first.

    `by` says what was rounded at a time, "tensor", "role" or "layer".
    """

    model: str
    text_sha256: str
    tokens: int
    by: str
    confidence: float
    entries: list[SensitivityEntry]

    def to_json(self) -> dict[str, Any]:
        return {"bezel_sensitivity": 1, **asdict(self)}

    def ranking(self, form: str) -> list[SensitivityEntry]:
        """The entries of one format, the worst first."""
        return [entry for entry in self.entries if entry.format == form]

    @property
    def formats(self) -> list[str]:
        """Those of the entries, the one that loses most first."""
        return list(dict.fromkeys(entry.format for entry in self.entries))
