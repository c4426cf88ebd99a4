"""The reports of `bezel stress`: what each pose costs and who suffers alike; what a search found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ..loss.intervals import Interval
from ..stress.result import ORIGIN, FoundPassage, Search, Stress, Stressed, pose_name, shown_name
from .page import KLD, figure, heat_figure, interval, joined, percent, section, table, value, write_page
from .svg import Axis, Plot, element, number

_WORST = 10
# Of each parameter what its levels are.
_LEVELS = {
    "case": "share of words in capitals",
    "typos": "share of letters left out, doubled or changed with the next",
    "spacing": "share of spaces left out, doubled or made new lines",
    "homoglyphs": "share of letters that are other alphabets' twins",
    "digits": "share of words that are numbers instead",
    "repetition": "times that every sentence is said again",
    "shuffle": "share of sentences that change places",
    "depth": "tokens that come before",
    "temperature": "temperature at which the reference wrote what comes before",
}


def write_report(result: Stress, path: str | Path) -> None:
    """Write the report to `path`; the file is whole or absent."""
    names = joined([c.name for c in result.candidates])
    subtitle = f"Against the reference {result.reference.name}. {result.tool}, {result.time}"
    parts = [element("p.lead", _sentence(c, result)) for c in result.candidates]
    parts += [element("p.warning", warning) for warning in result.warnings]
    parts += section("One parameter turned", *(_curves(result, name) for name in result.levels))
    if result.grid:
        parts += section(f"{joined(result.grid).capitalize()} together", *(_map(result, c) for c in result.candidates))
    parts += _worst(result)
    parts += _transfer(result)
    read = (
        f"In each of {len(result.poses)} poses {result.passages} passages of {result.chunk} tokens were read, and the "
        "second half of each was scored. Intervals are from a bootstrap over the passages, which are the same in all."
    )
    parts += _method(result, element("p", read))
    write_page(path, f"Where quantization hurts: {names}", subtitle, parts)


def write_search(result: Search, path: str | Path) -> None:
    """Write the report of a search to `path`; the file is whole or absent."""
    names = joined([c.name for c in result.candidates])
    subtitle = f"Against the reference {result.reference.name}. {result.tool}, {result.time}"
    parts = [element("p.warning", warning) for warning in result.warnings]
    rows = []
    for toll in result.tolls:
        head = element("th", toll.measured, element("span.sub", f"searched for {toll.searched}"), scope="row")
        losses = (toll.plain, toll.random, toll.random_worst, toll.found)
        rows.append([head, *(_cell(loss, number) for loss in losses), _cell(toll.flips, percent, " %")])
    words = (
        f"Mean loss on passages of {result.chunk} tokens, of which the second half counts: as they are, with random "
        f"tokens (the mean and the worst of {result.draws} draws, as far from the text and in the same places), and "
        "with those that a search found. What was found for one candidate is measured on the others too. Far is the "
        f"word mover's distance, here at most {100 * result.distance:g} % of what lies between two tokens of the text."
    )
    heads = ["candidate", "as it is", "random", "worst random", "found", "other top token"]
    parts += [table(heads, rows), element("p.soft", words), element("h2", "What was found")]
    for place, (name, found) in enumerate(result.found.items()):
        ranked = sorted(found, key=lambda passage: -passage.losses[place].found)
        cards = (_found(passage, place) for passage in ranked)
        parts.append(element("details", element("summary", name), *cards, open="" if place == 0 else None))
    parts += _method(result)
    write_page(path, f"Where a few words hurt: {names}", subtitle, parts)


def _found(passage: FoundPassage, place: int) -> Element:
    """The passage before and after, side by side, with the changed tokens marked."""
    loss, changed = passage.losses[place], dict(zip(passage.places, passage.after, strict=True))
    where = (
        f"KLD {number(loss.plain)} → {number(loss.found)} (random {number(loss.random)}, at worst "
        f"{number(loss.random_worst)}); moved by {percent(passage.distance)} %; {len(changed)} tokens; token "
        f"{passage.start:,} of {Path(passage.text).name}"
    )
    sides = []
    for name, put in (("before", {}), ("after", changed)):
        line = element("blockquote")
        read = element("span")
        for i, token in enumerate(passage.before[1:], 1):
            shown = put.get(i, token).replace("▁", " ")
            read.append(element("mark" if i in changed else "span", element("bdi", shown)))
            if i + 1 == passage.read:
                line.append(read)
                read = element("span.soft")
        line.append(read)
        sides.append(element("div", element("span.soft", name), line))
    return element("div.worst", element("span.soft", where), element("div.sides", *sides))


def _sentence(candidate: Stressed, result: Stress) -> str:
    plain, worst = candidate.losses[ORIGIN].kld.value, candidate.losses[candidate.worst]
    words = f"{candidate.name} loses {number(plain)} nats per token on the texts as they are"
    if candidate.worst == ORIGIN:
        return f"{words}, and nowhere more."
    times = f", {worst.kld.value / plain:.1f} times as much" if plain else ""
    words += f", and {number(worst.kld.value)}{times}, at its worst of {len(result.poses)} poses: "
    words += pose_name(result.poses[candidate.worst].turned)
    return f"{words}. There {100 * worst.flips.value:.1f}\N{NO-BREAK SPACE}% of positions have another top token."


def _curves(result: Stress, name: str) -> Element | None:
    levels = [0.0, *sorted(result.levels[name])]
    places = [result.find({name: level} if level else {}) for level in levels]
    found = [[c.losses[i].kld for i in places] for c in result.candidates]
    highest = [v for of_one in found for kld in of_one for v in (kld.value, kld.high) if v is not None]
    plot = Plot(Axis(_LEVELS[name], 0, levels[-1]), Axis.around(f"mean {KLD}", [0.0, *highest]), name)
    for series, (candidate, klds) in enumerate(zip(result.candidates, found, strict=True)):
        points = [(level, kld.value) for level, kld in zip(levels, klds, strict=True)]
        band = [
            (level, kld.low, kld.high)
            for level, kld in zip(levels, klds, strict=True)
            if kld.low is not None and kld.high is not None
        ]
        plot.curve(points, series, candidate.name, band)
    reference = joined([f"{result.poses[i].perplexity.value:,.3g}" for i in places])
    caption = f"At {joined([f'{level:g}' for level in levels])} the reference's perplexity is {reference}."
    return figure(name, plot.svg, caption, [(i, c.name) for i, c in enumerate(result.candidates)])


def _map(result: Stress, candidate: Stressed) -> Element | None:
    across, down = result.grid
    columns, lines = ([0.0, *sorted(result.levels[name])] for name in (across, down))
    cells = []
    for x in columns:
        for y in lines:
            turned = {name: level for name, level in ((across, x), (down, y)) if level}
            place = result.find(turned)
            cells.append((f"{x:g}", f"{down} {y:g}", candidate.losses[place].kld.value, pose_name(turned)))
    heads = [f"{x:g}" for x in columns], [f"{down} {y:g}" for y in reversed(lines)]
    return heat_figure(candidate.name, cells, *heads, across, f"Mean loss of {candidate.name}")


def _worst(result: Stress) -> list[Element]:
    parts: list[Element] = [element("h2", "The worst poses")]
    for candidate in result.candidates:
        rows = [_row(result, candidate, i) for i in (*candidate.ranked[:_WORST], ORIGIN)]
        heads = ["pose, and how a passage begins", "mean KLD", "more than plain", "other top token", "perplexity"]
        summary = element("summary", candidate.name)
        parts.append(element("details", summary, table(heads, rows), open="" if len(parts) == 1 else None))
    caption = (
        "The poses that cost most among all that were measured, and the texts as they are. The worst of many is also "
        "the luckiest: on other passages it would cost a little less. The perplexity is the reference's."
    )
    return [*parts, element("p.soft", caption)]


def _row(result: Stress, candidate: Stressed, i: int) -> Sequence[Element]:
    pose, loss = result.poses[i], candidate.losses[i]
    head = element("th", shown_name(pose), element("span.sub.sample", element("bdi", pose.sample)), scope="row")
    perplexity = element("td", *value(f"{pose.perplexity.value:,.4g}", pose.perplexity.value))
    return [head, _cell(loss.kld, number), _cell(loss.more, number), _cell(loss.flips, percent, " %"), perplexity]


def _cell(found: Interval, show: Callable[[float], str], unit: str = "") -> Element:
    return element("td", *interval(found, show, unit))


def _transfer(result: Stress) -> list[Element]:
    if not result.transfer:
        return []
    rows = [
        [
            element("th", f"{pair.a} and {pair.b}", scope="row"),
            element("td", *value(f"{pair.rank_correlation:.2f}", pair.rank_correlation)),
        ]
        for pair in result.transfer
    ]
    words = (
        "How alike the poses rank by what they cost two candidates (Spearman's rank correlation): 1 if what hurts one "
        "hurts the other, 0 if one says nothing of the other."
    )
    return [
        element("h2", "Do they suffer alike?"),
        table(["candidates", "rank correlation"], rows),
        element("p.soft", words),
    ]


def _method(result: Stress | Search, *words: Element) -> list[Element]:
    texts = (f"{text.path}: {text.tokens:,} tokens, sha256 {text.sha256}" for text in result.texts)
    parts = [element("h2", "What was measured"), *words, *(element("p.hash", text) for text in texts)]
    if result.command is not None:
        parts.append(element("pre", result.command))
    return parts
