"""The report of `bezel tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ..loss.intervals import Interval
from ..tasks.tasks import Answers, Flips
from .page import percent, table, value, write_page
from .svg import element, number

_CAPTION = (
    "The answer is the choice that the model finds the likeliest (by bytes: for its length). A flip is a question "
    "that one model answers rightly and the other wrongly; p is the probability of flips so uneven between models "
    "that are equally good (McNemar's exact test)."
)


def write_report(results: Sequence[Answers], path: str | Path) -> None:
    """Write the report to `path`; the file is whole or absent."""
    names = ", ".join(Path(result.file).name for result in results)
    parts = [part for result in results for part in _questions(result)]
    write_page(path, "Multiple choice", f"Questions of {names}.", [*parts, element("p.soft", _CAPTION)])


def _questions(result: Answers) -> list[Element]:
    first = result.candidates[0].name
    flips = {pair.b: pair for pair in result.pairs if pair.a == first}
    rows = []
    for c in result.candidates:
        pair = flips.get(c.name)
        words = (f"{pair.worse} worse, {pair.better} better", number(pair.p, 2)) if pair else ("–", "–")
        cells = [_share(c.acc), _share(c.acc_norm), *(element("td", text) for text in words)]
        rows.append([element("th", c.name, scope="row"), *cells])
    heads = ("model", "accuracy", "accuracy by bytes", f"flips against {first}", "p (McNemar)")
    title = f"{Path(result.file).name}: {result.questions} questions"
    flipped = [_flipped(pair) for pair in flips.values() if pair.worse or pair.better]
    return [element("h2", title), table(heads, rows), *flipped, element("p.soft", f"sha256 {result.sha256}")]


def _flipped(pair: Flips) -> Element:
    found = (("worse", pair.worse_lines), ("better", pair.better_lines))
    lines = "; ".join(f"{how} on lines {', '.join(map(str, lines))}" for how, lines in found if lines)
    return element("details", element("summary", f"which flipped in {pair.b}"), element("p", lines))


def _share(share: Interval) -> Element:
    low, high = (None if end is None else percent(end) for end in (share.low, share.high))
    return element("td", *value(percent(share.value), share.value, low, high, " %"))
