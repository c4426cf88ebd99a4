"""The plots of a measurement's report; None where there is too little to show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from xml.etree.ElementTree import Element

from ..loss.result import Measurement, Pair
from . import svg
from .page import KLD, axis_of, figure, file_size, joined
from .svg import Axis, Plot, Row, number

# The index of a candidate, its points, and the band of (x, low, high) around them.
Curve = tuple[int, list[svg.Point], list[tuple[float, float, float]]]

_MOST_BANDS = 3


def ranking(result: Measurement) -> list[str]:
    """The candidates' names, the one that loses least first."""
    return [c.name for c in result.ranked]


def size_against_kld(result: Measurement) -> Element | None:
    usable = [(i, c) for i, c in enumerate(result.candidates) if c.metrics.kld_mean.value > 0]
    if len(usable) < 2:
        return None
    unit, per = ("GB", 1e9) if max(c.file_bytes for _, c in usable) >= 1e9 else ("MB", 1e6)
    dots = []
    for i, c in usable:
        kld = c.metrics.kld_mean
        low, high = kld.low or kld.value, kld.high or kld.value
        title = f"{c.name}: {file_size(c.file_bytes)}, mean KLD {number(kld.value)}, {number(low)} to {number(high)}"
        dots.append((i, c.file_bytes / per, kld.value, low, high, c.name, title))
    sizes, klds = [dot[1] for dot in dots], [v for dot in dots for v in dot[3:5]]
    room = 0.12 * (max(sizes) - min(sizes)) or 0.5 * max(sizes)
    x = Axis(f"file size, {unit}", max(min(sizes) - room, 0), max(sizes) + room)
    plot = Plot(x, Axis.around(f"mean {KLD}", klds, log=True), "size against mean KLD")
    plot.dots(dots)
    caption = "Down and to the left is better: fewer bytes, less loss. The loss is on a logarithmic axis."
    lossless = [c.name for c in result.candidates if c.metrics.kld_mean.value == 0]
    if lossless:
        caption += f" Not shown, because without loss: {joined(lossless)}."
    return figure("Size against loss", plot.svg, caption)


def by_position(result: Measurement) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result.candidates):
        found = c.by_position
        middles = ((a + b) / 2 for a, b in pairwise(found.edges))
        known = [
            (x, y, y if low is None else low, y if high is None else high)
            for x, y, low, high in zip(middles, found.kld_mean, found.low, found.high, strict=True)
            if y is not None
        ]
        curves.append((i, [(x, y) for x, y, _, _ in known], [(x, low, high) for x, _, low, high in known]))
    place = {"long": "text", "chat": "chat"}.get(result.protocol, "chunk")
    edges = [edge for c in result.candidates for edge in c.by_position.edges]
    caption = "Mean loss by how many tokens came before"
    caption += ", with confidence intervals." if len(curves) <= _MOST_BANDS else "."
    caption += " A rise to the right would mean that errors build up as the context grows."
    x = Axis(f"position in the {place}, tokens", min(edges), max(edges), whole=True)
    return _curves("Loss by token position", x, f"mean {KLD}", curves, result, caption)


def histogram(result: Measurement) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result.candidates):
        found = c.histogram
        total = sum(found.counts)
        bins = zip(pairwise(found.log10_edges), found.counts, strict=True)
        bars = [(10**a, 10**b, n / total) for (a, b), n in bins]
        while bars and not bars[0][2]:
            del bars[0]
        while bars and not bars[-1][2]:
            del bars[-1]
        steps = [(x, share) for a, b, share in bars for x in (a, b)]
        steps = [(bars[0][0], 0.0), *steps, (bars[-1][1], 0.0)]
        curves.append((i, steps, [(x, 0.0, share) for x, share in steps]))
    xs = [x for _, points, _ in curves for x, _ in points]
    caption = "How many positions lose how much: most lose little, on the left, and few a lot, on the right."
    x = Axis(KLD, min(xs), max(xs), log=True)
    return _curves("Distribution", x, "share of positions", curves, result, caption, percent=True)


def tail(result: Measurement) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result.candidates):
        points = [(kld, 1 - p) for p, kld in zip(c.quantiles.p, c.quantiles.kld, strict=True) if kld > 0]
        curves.append((i, points, []))
    klds = [kld for _, points, _ in curves for kld, _ in points]
    caption = "Read up from a loss: so many positions lose more than that. What ends farther right has the worse tail."
    x = Axis.around(KLD, klds, log=True)
    y = "share of positions that lose more"
    return _curves("The tail", x, y, curves, result, caption, percent=True, log=True, top=1.0)


def layers(result: Measurement) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result.candidates):
        points = [(float(each.layer), each.error) for each in c.by_layer or () if each.error is not None]
        curves.append((i, points, []))
    x = Axis("layer", 0, max((n for _, points, _ in curves for n, _ in points), default=1), whole=True)
    caption = "How far the hidden state after each layer is from the reference's (RMS of the difference over RMS)."
    y = "relative error of the residual stream"
    return _curves("Loss by layer", x, y, curves, result, caption, percent=True)


def effects(result: Measurement) -> Element | None:
    if not result.effects:
        return None
    names = [c.name for c in result.candidates]
    found = sorted(result.effects, key=lambda e: names.index(e.candidate))
    rows = []
    for name, group in groupby(found, lambda e: e.candidate):
        if len({e.candidate for e in found}) > 1:
            rows.append(Row(name))
        for effect in group:
            kld = effect.metrics.kld_mean
            rows.append(Row(effect.effect, kld.value, kld.low, kld.high, names.index(name)))
    caption = (
        "Each effect alone, everything else exact: what rounding only the weights, only the activations or only the "
        "keys and values costs. The parts need not add up to the whole."
    )
    return figure("Mean loss from each source", svg.rows(rows, axis_of(rows, f"mean {KLD}"), "effects"), caption)


def differences(pairs: Sequence[Pair], result: Measurement) -> Element:
    """Paired differences, with the candidate that is the better one in the ranking named first."""
    names, ranked = [c.name for c in result.candidates], ranking(result)
    rows = []
    for p in pairs:
        a, b, sign = p.a, p.b, 1
        if ranked.index(a) > ranked.index(b):
            a, b, sign = b, a, -1
        low, high = sorted((sign * p.low, sign * p.high))
        rows.append(Row(f"{a} − {b}", sign * p.difference, low, high, names.index(a)))
    axis = axis_of(rows, "difference in mean KLD, nats per token")
    caption = (
        "Each row compares two neighbours in the ranking on the same chunks. Left of zero the first is the better "
        "one; an interval that reaches zero means that these texts do not tell."
    )
    return figure("Each and the next", svg.rows(rows, axis, "differences", bars=False), caption)


def _curves(
    title: str,
    x: Axis,
    y: str,
    curves: Sequence[Curve],
    result: Measurement,
    caption: str,
    *,
    percent: bool = False,
    log: bool = False,
    top: float | None = None,
) -> Element | None:
    """A figure of one curve a candidate; the y axis is logarithmic too where several candidates are far apart."""
    curves = [curve for curve in curves if len(curve[1]) > 1]
    if not curves:
        return None
    banded = len(curves) <= _MOST_BANDS
    values = [y for _, points, _ in curves for _, y in points]
    bands = [v for _, _, band in curves for _, low, high in band for v in (low, high)] if banded else []
    log = log or (len(curves) > 1 and min(values) > 0 and max(values) > 12 * min(values))
    axis = Axis.around(y, [*values, *bands], log, percent)
    if top is not None:
        axis = Axis(y, min(values), top, log, percent)
    names = [c.name for c in result.candidates]
    plot = Plot(x, axis, title)
    for i, points, band in curves:
        plot.curve(points, i, names[i], band if banded else ())
    return figure(title, plot.svg, caption, [(i, names[i]) for i, _, _ in curves])
