"""The figures of the report, made of a measurement result; None where it has not what the figure shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any
from xml.etree.ElementTree import Element

from . import svg
from .svg import Axis, Plot, Row, element, number

Json = Mapping[str, Any]
# The index of a candidate, its points, and the band of (x, low, high) around them.
Curve = tuple[int, list[svg.Point], list[tuple[float, float, float]]]

_KLD = "KLD, nats per token"
_MOST_RANKED, _MOST_BANDS = 20, 3


def size_against_kld(result: Json) -> Element | None:
    usable = [(i, c) for i, c in enumerate(result["candidates"]) if c.get("file_bytes") and 0 < kld_of(c) < math.inf]
    if len(usable) < 2:
        return None
    unit, per = ("GB", 1e9) if max(c["file_bytes"] for _, c in usable) >= 1e9 else ("MB", 1e6)
    dots = []
    for i, c in usable:
        kld = c["metrics"]["kld_mean"]
        low, high = kld.get("low") or kld["value"], kld.get("high") or kld["value"]
        title = f"{c['name']}: {file_size(c['file_bytes'])}, mean KLD {number(kld['value'])}, {_range(low, high)}"
        dots.append((i, c["file_bytes"] / per, kld["value"], low, high, c["name"], title))
    sizes, klds = [dot[1] for dot in dots], [v for dot in dots for v in dot[3:5]]
    room = 0.12 * (max(sizes) - min(sizes)) or 0.5 * max(sizes)
    x = Axis(f"file size, {unit}", max(min(sizes) - room, 0), max(sizes) + room)
    plot = Plot(x, Axis.around(f"mean {_KLD}", klds, log=True), "size against mean KLD")
    plot.dots(dots)
    caption = "Down and to the left is better: fewer bytes, less loss. The loss is on a logarithmic axis."
    lossless = [c["name"] for c in result["candidates"] if kld_of(c) == 0]
    if lossless:
        caption += f" Not shown, because without loss: {joined(lossless)}."
    return figure("Size against loss", plot.svg, caption)


def by_position(result: Json) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result["candidates"]):
        if found := c.get("by_position"):
            middles = ((a + b) / 2 for a, b in pairwise(found["edges"]))
            known = [
                (x, y, y if low is None else low, y if high is None else high)
                for x, y, low, high in zip(middles, found["kld_mean"], found["low"], found["high"], strict=True)
                if y is not None
            ]
            curves.append((i, [(x, y) for x, y, _, _ in known], [(x, low, high) for x, _, low, high in known]))
    place = "text" if result.get("protocol") == "long" else "chunk"
    xs = [x for c in result["candidates"] if c.get("by_position") for x in c["by_position"]["edges"]]
    caption = "Mean loss by how many tokens came before"
    caption += ", with confidence intervals." if len(curves) <= _MOST_BANDS else "."
    caption += " A rise to the right would mean that errors build up as the context grows."
    x = Axis(f"position in the {place}, tokens", min(xs, default=0), max(xs, default=1), whole=True)
    return _curves("Loss by token position", x, f"mean {_KLD}", curves, result, caption)


def histogram(result: Json) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result["candidates"]):
        found = c.get("histogram") or {"counts": ()}
        if total := sum(found["counts"]):
            bins = zip(pairwise(found["log10_edges"]), found["counts"], strict=True)
            bars = [(10**a, 10**b, n / total) for (a, b), n in bins if None not in (a, b) and math.isfinite(b - a)]
            while bars and not bars[0][2]:
                del bars[0]
            while bars and not bars[-1][2]:
                del bars[-1]
            if bars:
                steps = [(x, share) for a, b, share in bars for x in (a, b)]
                steps = [(bars[0][0], 0.0), *steps, (bars[-1][1], 0.0)]
                curves.append((i, steps, [(x, 0.0, share) for x, share in steps]))
    xs = [x for _, points, _ in curves for x, _ in points]
    caption = "How many positions lose how much: most lose little, on the left, and few a lot, on the right."
    x = Axis(_KLD, min(xs, default=1), max(xs, default=10), log=True)
    return _curves("Distribution", x, "share of positions", curves, result, caption, percent=True)


def tail(result: Json) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result["candidates"]):
        found = c.get("quantiles") or {"p": (), "kld": ()}
        points = [(kld, 1 - p) for p, kld in zip(found["p"], found["kld"], strict=True) if p < 1 and kld and kld > 0]
        curves.append((i, points, []))
    klds = [kld for _, points, _ in curves for kld, _ in points]
    caption = "Read up from a loss: so many positions lose more than that. What ends farther right has the worse tail."
    x = Axis.around(_KLD, klds, log=True)
    y = "share of positions that lose more"
    return _curves("The tail", x, y, curves, result, caption, percent=True, log=True, top=1.0)


def layers(result: Json) -> Element | None:
    curves: list[Curve] = []
    for i, c in enumerate(result["candidates"]):
        points = [(p["layer"], p["error"]) for p in c.get("by_layer") or () if p["error"] is not None]
        curves.append((i, points, []))
    x = Axis("layer", 0, max((n for _, points, _ in curves for n, _ in points), default=1), whole=True)
    caption = "How far the hidden state after each layer is from the reference's (RMS of the difference over RMS)."
    y = "relative error of the residual stream"
    return _curves("Loss by layer", x, y, curves, result, caption, percent=True)


def effects(result: Json) -> Element | None:
    found = [e for e in result.get("effects") or () if kld_of(e) < math.inf]
    if not found:
        return None
    names = [c["name"] for c in result["candidates"]]
    found.sort(key=lambda e: index(names, e["candidate"]))
    rows = []
    for name, group in groupby(found, lambda e: e["candidate"]):
        if len({e["candidate"] for e in found}) > 1:
            rows.append(Row(name))
        for effect in group:
            kld = effect["metrics"]["kld_mean"]
            rows.append(Row(effect["effect"], kld["value"], kld.get("low"), kld.get("high"), index(names, name)))
    caption = (
        "Each effect alone, everything else exact: what rounding only the weights, only the activations or only the "
        "keys and values costs. The parts need not add up to the whole."
    )
    return figure("Mean loss from each source", svg.rows(rows, _axis_of(rows, f"mean {_KLD}"), "effects"), caption)


def differences(pairs: Sequence[Json], result: Json) -> Element:
    """Paired differences, with the candidate that is the better one in the ranking named first."""
    names = [c["name"] for c in result["candidates"]]
    ranked = ranking(result)
    rows = []
    for p in pairs:
        a, b, sign = p["a"], p["b"], 1
        if index(ranked, a) > index(ranked, b):
            a, b, sign = b, a, -1
        low, high = sorted((sign * p["low"], sign * p["high"]))
        rows.append(Row(f"{a} − {b}", sign * p["difference"], low, high, index(names, a)))
    axis = _axis_of(rows, "difference in mean KLD, nats per token")
    caption = (
        "Each row compares two neighbours in the ranking on the same chunks. Left of zero the first is the better "
        "one; an interval that reaches zero means that these texts do not tell."
    )
    return figure("Each and the next", svg.rows(rows, axis, "differences", bars=False), caption)


def sensitivity_ranking(found: Json) -> Element:
    entries = sorted(found["entries"], key=lambda e: -e["kld"])
    rows = [Row(part_of(e), e["kld"], e.get("low"), e.get("high")) for e in entries[:_MOST_RANKED]]
    caption = f"Mean loss when only this is in {found['format']} and all else is exact; the most sensitive first."
    if len(entries) > len(rows):
        caption += f" The first {len(rows)} of {len(entries)}."
    return figure("Ranking", svg.rows(rows, _axis_of(rows, f"mean {_KLD}"), "sensitivity ranking"), caption)


def heat_map(found: Json) -> Element | None:
    """Sensitivity by layer and role; for single tensors only."""
    cells = [e for e in found["entries"] if e.get("role") is not None and e.get("layer") is not None]
    top = max((e["kld"] for e in cells), default=0.0)
    if top <= 0:
        return None
    floor = max(min(e["kld"] for e in cells), top / 1000)
    log = top > 20 * floor

    def strength(kld: float) -> float:
        return math.log(max(kld, floor) / floor) / math.log(top / floor) if log else max(kld / top, 0.0)

    drawn = [(e["layer"], e["role"], strength(e["kld"]), f"{part_of(e)}: {number(e['kld'])}") for e in cells]
    columns, roles = sorted({e["layer"] for e in cells}), list(dict.fromkeys(e["role"] for e in cells))
    roles.sort(key=lambda role: -sum(e["kld"] for e in cells if e["role"] == role))
    caption = f"Mean loss when one tensor alone is in {found['format']}: the more colour, the more sensitive"
    caption += " (logarithmic scale)." if log else "."
    others = [f"{part_of(e)} {number(e['kld'])}" for e in found["entries"] if e not in cells]
    if others:
        caption += f" Outside the layers: {joined(others[:6])}."
    made = figure("Layer by role", svg.heat_map(drawn, columns, roles, "sensitivity by layer and role"), caption)
    scale = element("div.scale", number(floor if log else 0), element("i"), number(top), " nats per token")
    made.insert(2, scale)
    return made


# --- what figures and report share


def figure(title: str, plot: Element, caption: str, legend: Sequence[tuple[int, str]] = ()) -> Element:
    keys = element("ul.legend")
    for i, name in legend:
        line = element(f"line.line.{svg.series_class(i)}", x1=0, x2=26, y1=5, y2=5, stroke_dasharray=svg.dash(i))
        keys.append(element("li", element("svg", line, viewBox="0 0 26 10", aria_hidden="true"), name))
    parts = (keys if len(legend) > 1 else None, plot, element("figcaption", caption))
    return element("figure", element("h3", title), *parts)


def kld_of(measured: Json) -> float:
    """The mean KLD of a candidate or an effect; infinite where it was not measured."""
    value = measured["metrics"].get("kld_mean", {}).get("value")
    return math.inf if value is None else float(value)


def ranking(result: Json) -> list[str]:
    """The candidates' names, the one that loses least first."""
    return [str(c["name"]) for c in sorted(result["candidates"], key=kld_of)]


def part_of(entry: Json) -> str:
    """What a sensitivity entry is about: its only tensor, or its layer, or its role."""
    if len(entry["tensors"]) == 1:
        return str(entry["tensors"][0]).removesuffix(".weight")
    return f"layer {entry['layer']}" if entry.get("layer") is not None else str(entry.get("role"))


def file_size(size: float) -> str:
    unit, per = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
    return f"{size / per:,.2f} {unit}" if size / per < 100 else f"{size / per:,.0f} {unit}"


def joined(words: Iterable[str]) -> str:
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _curves(
    title: str,
    x: Axis,
    y: str,
    curves: Sequence[Curve],
    result: Json,
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
    names = [c["name"] for c in result["candidates"]]
    plot = Plot(x, axis, title)
    for i, points, band in curves:
        plot.curve(points, i, names[i], band if banded else ())
    return figure(title, plot.svg, caption, [(i, names[i]) for i, _, _ in curves])


def _axis_of(rows: Sequence[Row], label: str) -> Axis:
    return Axis.around(label, [v for row in rows for v in (row.value, row.low, row.high) if v is not None])


def _range(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"
