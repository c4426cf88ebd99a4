"""What the pages of reports share: the page itself, tables, figures with their captions, and how numbers are written.

A page is one HTML file with neither scripts nor links, whose plots are inline SVG. Texts and vocabularies are
untrusted: everything goes through `svg.element`, and the page forbids itself scripts and every connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from ...runtime.files.atomic import atomic
from ..loss.intervals import Interval
from . import svg
from .svg import Axis, Row, element, number

KLD = "KLD, nats per token"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(path: str | Path, title: str, subtitle: str, parts: Iterable[Element]) -> None:
    """Write a page with this heading to `path`; the file is whole or absent."""
    page = element(
        "html",
        element(
            "head",
            element("meta", name="generator", content="bezel"),
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", files(__package__).joinpath("report.css").read_text("utf-8")),
        ),
        element("body", element("h1", title), element("p.soft", subtitle), *parts),
        lang="en",
    )
    text = "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
    with atomic(Path(path)) as file:
        file.write(text.encode())


def section(title: str, *parts: Element | None) -> list[Element]:
    """Figures under a title; nothing where there are none."""
    shown = [part for part in parts if part is not None]
    return [element("h2", title), element("div.figures", *shown)] if shown else []


def table(heads: Iterable[str], rows: Iterable[Iterable[Element]]) -> Element:
    head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    return element("div.wide", element("table", head, element("tbody", *(element("tr", *row) for row in rows))))


def value(shown: str, exact: float, low: str | None = None, high: str | None = None, unit: str = "") -> list[Element]:
    """A figure, exact in its `data` element, and its interval."""
    parts = [element("data", shown + unit, value=repr(exact))]
    if low is not None and high is not None:
        parts.append(element("span.interval", f"{low} – {high}{unit}"))
    return parts


def interval(found: Interval, show: Callable[[float], str], unit: str = "") -> list[Element]:
    """A figure and its interval, as `show` writes numbers."""
    low, high = (None if end is None else show(end) for end in (found.low, found.high))
    return value(show(found.value), found.value, low, high, unit)


def figure(title: str, plot: Element, caption: str, legend: Sequence[tuple[int, str]] = ()) -> Element:
    keys = element("ul.legend")
    for i, name in legend:
        line = element(f"line.line.{svg.series_class(i)}", x1=0, x2=26, y1=5, y2=5, stroke_dasharray=svg.dash(i))
        keys.append(element("li", element("svg", line, viewBox="0 0 26 10", aria_hidden="true"), name))
    parts = (keys if len(legend) > 1 else None, plot, element("figcaption", caption))
    return element("figure", element("h3", title), *parts)


def heat_figure(
    title: str,
    cells: Sequence[tuple[str, str, float, str]],
    columns: Sequence[str],
    lines: Sequence[str],
    axis: str,
    caption: str,
    beside: str = "",
) -> Element | None:
    """Losses, not below 0, as a map of cells (column, line, nats a token, name), with its scale; None if all are 0.

    The scale is logarithmic where they are far apart, as the caption then says between its two parts.
    """
    losses = [loss for _, _, loss, _ in cells]
    top = max(losses, default=0.0)
    if top <= 0:
        return None
    floor = max(min(losses), top / 1000)
    log = top > 20 * floor

    def strength(loss: float) -> float:
        return math.log(max(loss, floor) / floor) / math.log(top / floor) if log else max(loss / top, 0.0)

    drawn = [(column, line, strength(loss), f"{name}: {number(loss)}") for column, line, loss, name in cells]
    says = f"{caption}: the more colour, the more is lost{' (logarithmic scale)' * log}.{beside}"
    made = figure(title, svg.heat_map(drawn, columns, lines, axis, title), says)
    made.insert(2, element("div.scale", number(floor if log else 0), element("i"), number(top), " nats per token"))
    return made


def axis_of(rows: Sequence[Row], label: str) -> Axis:
    return Axis.around(label, [v for row in rows for v in (row.value, row.low, row.high) if v is not None])


def file_size(size: float) -> str:
    unit, per = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
    return f"{size / per:,.2f} {unit}" if size / per < 100 else f"{size / per:,.0f} {unit}"


def percent(share: float) -> str:
    """The number before the sign."""
    times = 100 * share
    return f"{times:.2f}" if abs(times) >= 0.1 or times == 0 else number(times, 2)


def joined(words: Iterable[str]) -> str:
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last
