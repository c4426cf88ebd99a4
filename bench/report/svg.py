"""HTML elements that cannot be broken out of, and plots as inline SVG that take their colours from the page's style."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

Point = tuple[float, float]
Dot = tuple[int, float, float, float, float, str, str]  # series, x, y, low and high of y, label, title
Box = tuple[float, float, float, float]  # left, top, right, bottom

N_COLORS = 7  # classes s0 … s6 of the style sheet; later series have the same colours and dashed lines
_DASHES = ("", "6 3", "2 3", "9 3 2 3")
_LETTER = 6.8  # px, a little over the mean advance of the style sheet's sans-serif
# What XML, and so an SVG, cannot hold, and what would turn the direction of the text around it.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element, "tag.class.class", of text and elements; underscores in attributes' names become hyphens.

    Text and attributes are escaped when the tree is serialised, so none of them can be markup.
    """
    name, *classes = tag.split(".")
    if classes:
        attributes = {"class": " ".join(classes), **attributes}
    made = Element(name, {k.strip("_").replace("_", "-"): _text(v) for k, v in attributes.items() if v is not None})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child and len(made):
            made[-1].tail = (made[-1].tail or "") + _text(child)
        elif child:
            made.text = (made.text or "") + _text(child)
    return made


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _UNPRINTABLE.sub("\ufffd", str(value))


def series_class(i: int) -> str:
    return f"s{i % N_COLORS}"


def dash(i: int) -> str | None:
    """`stroke-dasharray` of series i."""
    return _DASHES[i // N_COLORS % len(_DASHES)] or None


def number(value: float, digits: int = 3) -> str:
    """A number as people read it: 0.0123, 1.23 × 10⁻⁵."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -5 < exponent < 6:
        return f"{value:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")
    mantissa = f"{value / 10**exponent:.{digits - 1}f}"
    return f"{mantissa} × 10{_superscript(exponent)}".replace("-", "−")


def _superscript(n: int) -> str:
    return str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class Axis:
    """A range of numbers; `percent` writes shares as percentages, `whole` marks integers only."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False
    whole: bool = False

    @classmethod
    def around(cls, label: str, values: Iterable[float], log: bool = False, percent: bool = False) -> Axis:
        """An axis that holds the values with some room: from zero or, if `log`, over the positive ones."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(found), max(found)) if found else (1.0, 10.0)
        if log:
            room = max((high / low) ** 0.08, 1.15)
            return cls(label, low / room, high * room, True, percent)
        room = 0.06 * (max(high, 0) - min(low, 0)) or 1.0
        return cls(
            label, min(low - room, 0) if low < 0 else 0, high + room if high > 0 or low == 0 else 0, False, percent
        )

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1; what lies outside is moved to the end."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers within the range."""
        if not self.log:
            return self._linear_ticks(most)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        sparse = -(-len(decades) // most)
        found: list[float] = []
        for multiples, every in (((1, 1.5, 2, 3, 5, 7), 1), ((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), sparse)):
            found = [m * 10.0**e for e in decades[::every] for m in multiples]
            found = [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
            if len(found) <= most:
                break
        return found if len(found) > 2 else [v for v in self._linear_ticks(most) if v > 0]

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        rough = max(rough, 1) if self.whole else rough
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def format(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.6g} %"
        if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
            exponent = math.floor(math.log10(abs(value)) + 1e-9)
            mantissa = f"{value / 10**exponent:.3g}"
            return f"{'' if mantissa == '1' else mantissa + '·'}10{_superscript(exponent)}"
        return f"{value:,.10g}".replace("-", "−")


class Plot:
    """Two axes, into which series are drawn in the order of the calls; `svg` is the figure."""

    WIDTH = 460

    def __init__(self, x: Axis, y: Axis, label: str, height: int = 300) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.top, self.bottom = 56.0, self.WIDTH - 14.0, 26.0, height - 46.0
        self.svg = _canvas(self.WIDTH, height, label)
        grid = element("g.grid")
        for tick in y.ticks():
            py = self._y(tick)
            grid.append(element("line", x1=self.left, x2=self.right, y1=py, y2=py))
            grid.append(element("text", y.format(tick), x=self.left - 7, y=py + 4, text_anchor="end"))
        for tick in x.ticks():
            px = self._x(tick)
            grid.append(element("line", x1=px, x2=px, y1=self.top, y2=self.bottom))
            grid.append(element("text", x.format(tick), x=px, y=self.bottom + 17, text_anchor="middle"))
        self.svg.append(grid)
        self.svg.append(element("text.axis", y.label, x=4, y=14))
        middle = (self.left + self.right) / 2
        self.svg.append(element("text.axis", x.label, x=middle, y=height - 8, text_anchor="middle"))

    def curve(
        self, points: Sequence[Point], series: int, title: str, band: Sequence[tuple[float, float, float]] = ()
    ) -> None:
        """A line, and around it a band of (x, low, high); `title` is shown when the pointer rests on it."""
        group = element(f"g.series.{series_class(series)}", element("title", title))
        if band:
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            group.append(element("path.band", d=self._path(edge) + "Z"))
        group.append(element("path.line", d=self._path(points), stroke_dasharray=dash(series)))
        group.append(element("path.touch", d=self._path(points)))
        self.svg.append(group)

    def dots(self, dots: Sequence[Dot]) -> None:
        """Points with error bars, their labels placed clear of each other."""
        taken: list[Box] = []
        for dot in dots:
            taken.append((self._x(dot[1]) - 6, self._y(dot[2]) - 6, self._x(dot[1]) + 6, self._y(dot[2]) + 6))
        for i, x, y, low, high, label, title in dots:
            px, py = self._x(x), self._y(y)
            group = element(f"g.series.{series_class(i)}", element("title", title))
            group.append(element("line.error", x1=px, x2=px, y1=self._y(low), y2=self._y(high)))
            group.append(element("circle.dot", cx=px, cy=py, r=5.0))
            width = _LETTER * len(label) + 4
            for left, top in self._around(px, py, width):
                box = (left, top, left + width, top + 14)
                if not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    nearest = (min(max(px, left), left + width), min(max(py, top), top + 14))
                    if math.dist(nearest, (px, py)) > 12:
                        group.append(element("line.leader", x1=px, y1=py, x2=nearest[0], y2=nearest[1]))
                    group.append(element("text.label", label, x=left + 2, y=top + 11))
                    break
            self.svg.append(group)

    def _around(self, x: float, y: float, width: float) -> Iterator[Point]:
        """Left upper corners for a label near a point, the nearest first, all within the axes."""
        for distance in (9, 18, 30, 44, 60, 80, 100, 120):
            for angle in (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200):
                cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                left = x + distance * cos - width * (1 - cos) / 2
                top = y - distance * sin - 7 - 7 * sin
                if self.left <= left and left + width <= self.right + 8 and self.top <= top <= self.bottom - 14:
                    yield left, top

    def _x(self, value: float) -> float:
        return self.left + self.x.place(value) * (self.right - self.left)

    def _y(self, value: float) -> float:
        return self.bottom - self.y.place(value) * (self.bottom - self.top)

    def _path(self, points: Iterable[Point]) -> str:
        return "M" + "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in points)


@dataclass(frozen=True)
class Row:
    """A row of `rows`: a value and its interval; a heading where the value is None."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    series: int = 0


def rows(data: Sequence[Row], axis: Axis, label: str, bars: bool = True) -> Element:
    """Horizontal bars from zero, or points, one a row, with their intervals and their values in figures."""
    lines: list[Row] = []
    step, width, top, most = 22, Plot.WIDTH, 8, 27
    for row in data:  # a long label gets a line of its own
        lines += [row] if row.value is None or len(row.label) <= most else [Row(row.label), replace(row, label="")]
    data = lines
    left = 12 + _LETTER * max((len(row.label) for row in data if row.value is not None), default=0)
    right, bottom = width - 86.0, top + step * len(data) + 4.0
    svg = _canvas(width, int(bottom) + 42, label)

    def at(value: float) -> float:
        return left + axis.place(value) * (right - left)

    grid = element("g.grid")
    for tick in axis.ticks(4):
        grid.append(element("line", x1=at(tick), x2=at(tick), y1=top, y2=bottom))
        grid.append(element("text", axis.format(tick), x=at(tick), y=bottom + 16, text_anchor="middle"))
    grid.append(element("line.zero", x1=at(0), x2=at(0), y1=top, y2=bottom))
    svg.append(grid)
    svg.append(element("text.axis", axis.label, x=(left + right) / 2, y=bottom + 36, text_anchor="middle"))
    for i, row in enumerate(data):
        middle = top + step * i + step / 2
        if row.value is None:
            heading = row.label if len(row.label) <= 60 else f"{row.label[:59]}…"
            svg.append(element("text.heading", heading, element("title", row.label), x=4, y=middle + 4))
            continue
        low, high = row.value if row.low is None else row.low, row.value if row.high is None else row.high
        title = f"{row.label} {number(row.value)}".strip() + (
            "" if low == high else f" ({number(low)} to {number(high)})"
        )
        group = element(f"g.series.{series_class(row.series)}", element("title", title))
        group.append(element("text.label", row.label, x=left - 7, y=middle + 4, text_anchor="end"))
        if bars:
            start, end = sorted((at(0), at(row.value)))
            group.append(element("rect.bar", x=start, y=middle - 7, width=max(end - start, 0.8), height=14, rx=1.5))
        if low != high:
            group.append(element("line.error", x1=at(low), x2=at(high), y1=middle, y2=middle))
        if not bars:
            group.append(element("circle.dot", cx=at(row.value), cy=middle, r=4.5))
        group.append(element("text.value", number(row.value), x=width - 4, y=middle + 4, text_anchor="end"))
        svg.append(group)
    return svg


def heat_map(
    cells: Sequence[tuple[str, str, float, str]], columns: Sequence[str], lines: Sequence[str], axis: str, label: str
) -> Element:
    """Cells (column, line, strength from 0 to 1, title): the stronger, the more colour; `axis` names the columns."""
    left, top, right = 4 + _LETTER * max(map(len, lines)) + 8, 4.0, Plot.WIDTH - 8.0
    side = (right - left) / len(columns)
    height = min(max(side, 16.0), 26.0)
    bottom = top + height * len(lines)
    svg = _canvas(Plot.WIDTH, int(bottom) + 40, label)
    grid = element("g.grid")
    for i, line in enumerate(lines):
        grid.append(element("text", line, x=left - 7, y=top + height * (i + 0.5) + 4, text_anchor="end"))
    every = max(1, math.ceil(22 / side))
    for i, column in enumerate(columns):
        if i % every == 0:
            x = left + side * (i + 0.5)
            grid.append(element("text", column, x=x, y=bottom + 15, text_anchor="middle"))
    svg.append(grid)
    svg.append(element("text.axis", axis, x=(left + right) / 2, y=bottom + 33, text_anchor="middle"))
    for column, line, strength, title in cells:
        x, y = left + side * columns.index(column), top + height * lines.index(line)
        attributes = {"x": x + 0.5, "y": y + 0.5, "width": side - 1, "height": height - 1}
        svg.append(element("rect.cell", element("title", title), **attributes, fill_opacity=0.05 + 0.95 * strength))
    return svg


def _canvas(width: int, height: int, label: str) -> Element:
    return element("svg.plot", viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
