"""The report of `bezel measure`: what each candidate lost, where, and on which tokens most."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ..loss.intervals import Interval
from ..loss.result import Candidate, MeasuredModel, Measurement, Pair, WorstToken, text_names
from . import figures, svg
from .page import file_size, interval, joined, percent, section, table, write_page
from .svg import element, number

_CONTEXT, _MOST_WORST = 320, 10  # characters shown before a token; tokens shown of a candidate

# Metric → its name, and what it is.
METRICS: dict[str, tuple[str, str]] = {
    "kld_mean": (
        "mean KLD",
        "Kullback-Leibler divergence of the candidate's next-token probabilities from the reference's, in nats, "
        "averaged over all positions; 0 means equal",
    ),
    "kld_median": ("median KLD", "half of the positions have less"),
    "kld_p90": ("90 % KLD", "one position in 10 has more"),
    "kld_p99": ("99 % KLD", "one position in 100 has more"),
    "kld_p999": ("99.9 % KLD", "one position in 1000 has more: the rare, large errors"),
    "kld_max": ("largest KLD", "the worst position of all"),
    "top1": ("same top token", "how often both find the same token the most likely"),
    "flips": ("flips", "how often they do not"),
    "top5": ("top-5 agreement", "the share of the reference's five likeliest tokens that are the candidate's too"),
    "rms_dp": ("RMS Δp", "root mean square of the change in the probability of the token that really followed"),
    "perplexity": ("perplexity", "how many tokens the model hesitates between, so to speak; less is better"),
    "perplexity_ratio": ("perplexity ratio", "the candidate's over the reference's; 1 means no loss"),
}
_OF_TEXTS = {m: METRICS[m][0] for m in ("kld_mean", "kld_p999", "top1", "perplexity_ratio")}
_OF_TEXTS["bits_per_byte"] = "bits a byte"
_SHARES = ("top1", "flips", "top5", "rms_dp")
_MAIN = ("kld_mean", "kld_p999", "top1", "rms_dp", "perplexity_ratio")
_PROTOCOLS = {
    "chunks": "Each chunk of the texts is read afresh, and the second half of it is scored.",
    "written": "Of each chunk of the texts the first half is read, and what the reference writes then is scored.",
    "chat": "Each line of the texts is what a user says in a chat, and the reference's answer is scored.",
    "long": "Each text is read in one go, across several windows, and every position is scored.",
}


def write_report(result: Measurement, path: str | Path) -> None:
    """Write the report of a measurement to `path`; the file is whole or absent."""
    names = [c.name for c in result.candidates]
    title = f"What quantization cost: {joined(names) if len(names) <= 3 else f'{len(names)} candidates'}"
    subtitle = f"Against the reference {result.reference.name}. {result.tool}, {result.time}"
    parts = [*_overview(result), *_texts(result), *_plots(result), *_worst(result), *_method(result)]
    write_page(path, title, subtitle, parts)


# --- the answer


def _overview(result: Measurement) -> list[Element]:
    ranked = result.ranked
    shown = ranked if len(ranked) <= 3 else [ranked[0], ranked[-1]]
    parts = [element("p.lead", _sentence(c, result)) for c in shown]
    if len(ranked) > 3:
        parts.append(element("p.soft", f"The closest and the farthest of {len(ranked)}; all are in the table."))
    parts += [element("p.warning", warning) for warning in result.warnings]
    parts += [_overview_table(result), _all_figures(result)]
    return parts + _pairs(result)


def _sentence(candidate: Candidate, result: Measurement) -> str:
    """What one candidate costs, in words."""
    metrics, reference = candidate.metrics, result.reference
    if metrics.kld_mean.value == 0:
        return f"{candidate.name} loses nothing: at every position it gives what {reference.name} gives."
    words = f"{candidate.name} loses {_plus_minus(metrics.kld_mean)} nats per token (mean KLD) against {reference.name}"
    words += f": the same top token at {100 * metrics.top1.value:.1f} % of positions"
    ratio = metrics.perplexity_ratio
    more = 100 * (ratio.value - 1)
    words += f", perplexity {abs(more):.2g} % {'higher' if more > 0 else 'lower'}"
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
        words += " (which may be chance)"
    words += f", at {100 * candidate.file_bytes / reference.file_bytes:.0f} % of its bytes"
    return words.replace(" %", "\N{NO-BREAK SPACE}%") + "."


def _plus_minus(metric: Interval) -> str:
    """0.052 ± 0.003, or the interval where it is lopsided."""
    value, low, high = metric.value, metric.low, metric.high
    if low is None or high is None or low == high:
        return number(value)
    below, above = value - low, high - value
    if below > 0 and above > 0 and max(below, above) < 1.5 * min(below, above):
        digits = 1 - math.floor(math.log10(max(below, above)))
        return f"{value:.{digits}f} ± {max(below, above):.{digits}f}" if 0 < digits < 8 else number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def _overview_table(result: Measurement) -> Element:
    reference = result.reference
    rows = []
    for c in result.ranked:
        formats = [f"{n} × {name}" for name, n in c.formats.items()]
        cells = (_cell(c, m, _is_best(c, m, result.candidates)) for m in _MAIN)
        rows.append([*_row_head(c, joined(formats), reference), *cells])
    perplexity = element("td.text", "perplexity ", *_figure(reference.perplexity, "perplexity"), colspan=len(_MAIN))
    rows.append([*_row_head(reference, "the reference"), perplexity])
    note = f"Small figures: {100 * result.confidence:g} % confidence intervals from a bootstrap over chunks."
    heads = ["candidate", "size", *(METRICS[m][0] for m in _MAIN)]
    return element("div", table(heads, rows), element("p.soft", f"{note} Bold: the best of a column."))


def _row_head(model: MeasuredModel, what: str, reference: MeasuredModel | None = None) -> list[Element]:
    """The cells of a model's name and setting, and of its size."""
    setting = f"{model.engine}, {model.activations} activations, {model.kv} KV"
    name = element("th", model.name, element("span.sub", what), element("span.sub", setting), scope="row")
    cell = element("td", element("data", file_size(model.file_bytes), value=model.file_bytes))
    bits = element("data", f"{model.bits_per_weight:.2f}", value=repr(model.bits_per_weight))
    cell.append(element("span.sub", bits, " bits per weight"))
    if reference:
        cell.append(element("span.sub", f"{100 * model.file_bytes / reference.file_bytes:.0f} % of the reference"))
    return [name, cell]


def _cell(candidate: Candidate, metric: str, best: bool = False) -> Element:
    return element("td.best" if best else "td", *_figure(getattr(candidate.metrics, metric), metric))


def _figure(found: Interval, name: str) -> list[Element]:
    """A value of the metric called `name` and its interval."""
    show, unit = (percent, " %") if name in _SHARES else (number, "")
    if name == "perplexity_ratio":
        show = "{:.4f}".format
    return interval(found, show, unit)


def _all_figures(result: Measurement) -> Element:
    rows = (
        [element("th", title, scope="row"), *(_cell(c, m) for c in result.candidates)]
        for m, (title, _) in METRICS.items()
    )
    words = element(
        "dl", *(element(tag, text) for m in METRICS.values() for tag, text in zip(("dt", "dd"), m, strict=True))
    )
    figures = table(["metric", *(c.name for c in result.candidates)], rows)
    return element("details", element("summary", "All figures, and what they mean"), figures, words)


def _pairs(result: Measurement) -> list[Element]:
    ranked = figures.ranking(result)

    def places(pair: Pair) -> tuple[int, int]:
        first, second = sorted((ranked.index(pair.a), ranked.index(pair.b)))
        return first, second

    pairs = sorted((pair for pair in result.pairs if pair.metric == "kld_mean"), key=places)
    neighbours = [p for p in pairs if places(p)[1] - places(p)[0] == 1]
    if not neighbours:
        return []
    left = element("div", _list(map(_comparison, neighbours)))
    others = [_comparison(p) for p in pairs if p not in neighbours]
    if others:
        title = "The other pair" if len(others) == 1 else f"The other {len(others)} pairs"
        left.append(element("details", element("summary", title), _list(others)))
    return section("Which is better?", left, figures.differences(neighbours, result))


def _comparison(pair: Pair) -> str:
    if pair.low <= 0 <= pair.high:
        return f"{pair.a} and {pair.b} cannot be told apart on these texts."
    better, worse = (pair.a, pair.b) if pair.difference < 0 else (pair.b, pair.a)
    low, high = sorted((abs(pair.low), abs(pair.high)))
    gain = f"{number(abs(pair.difference))} ({number(low)} to {number(high)})"
    return f"{better} is better than {worse}, by {gain} nats per token."


def _texts(result: Measurement) -> list[Element]:
    """A row for each text and candidate, where there are several texts."""
    losses = result.ranked[0].by_text
    if len(losses) < 2:
        return []
    rows = []
    for i, name in enumerate(text_names(losses)):
        for c in result.ranked:
            cells = (element("td", *_figure(getattr(c.by_text[i], m), m)) for m in _OF_TEXTS)
            rows.append([element("th", name, element("span.sub", c.name), scope="row"), *cells])
    each = zip(text_names(losses), losses, strict=True)
    says = (f"{number(loss.reference_bits_per_byte.value)} for {name}" for name, loss in each)
    words = (
        "Bits a byte are what a model takes to say the text: less is better, and they compare across languages and "
        f"tokenizers. The reference takes {joined(list(says))}."
    )
    found = table(["text", *_OF_TEXTS.values()], rows)
    return [element("h2", "Text by text"), found, element("p.soft", words)]


def _plots(result: Measurement) -> list[Element]:
    made = (figures.size_against_kld, figures.by_position, figures.histogram, figures.tail, figures.layers)
    parts = section("Where the loss lies", *(make(result) for make in made))
    return parts + section("What causes the loss?", figures.effects(result))


def _list(lines: Iterable[str]) -> Element:
    return element("ul.plain", *(element("li", line) for line in lines))


# --- the worst tokens


def _worst(result: Measurement) -> list[Element]:
    parts: list[Element] = []
    for i, candidate in enumerate(result.candidates):
        cards = (_card(w, i, candidate.name, result.reference.name) for w in candidate.worst[:_MOST_WORST])
        parts.append(element("details", element("summary", candidate.name), *cards, open=None if parts else ""))
    caption = (
        "The positions that lose the most, with the token that really followed marked, and what reference and "
        "candidate expected there, the likeliest first. · stands for a space that begins a token, ↵ for a new line."
    )
    return [element("h2", "The worst tokens, in their context"), element("p.soft", caption), *parts]


def _card(worst: WorstToken, series: int, candidate: str, reference: str) -> Element:
    before = worst.before if len(worst.before) <= _CONTEXT else f"…{worst.before[-_CONTEXT:]}"
    chat = "" if worst.line is None else f"the chat of line {worst.line:,} of "
    where = f"KLD {number(worst.kld)} at token {worst.position:,} of {chat}{Path(worst.text).name}"
    sides = []
    for name, color, top in ((reference, 6, worst.reference_top), (candidate, series, worst.candidate_top)):
        lines = element(f"ul.tops.{svg.series_class(color)}")
        for token, p in top:
            shown = element("mark" if token == worst.token else "span", element("bdi", visible(token)))
            bar = element("span.share", style=f"width:{100 * min(max(p, 0), 1):.1f}%")
            lines.append(element("li", element("span.token", shown), bar, element("span.p", f"{percent(p)} %")))
        sides.append(element("div", element("span.soft", name), lines))
    quote = element("blockquote", before, element("mark", element("bdi", _followed(worst.token))))
    return element("div.worst", element("span.soft", where), quote, element("div.sides", *sides))


def visible(token: str) -> str:
    """A token for a list: what would not be seen is shown by a sign."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    text = "".join(signs.get(c) or (chr(0x2400 + ord(c)) if ord(c) < 32 else c) for c in token)
    start = len(text) - len(text.lstrip(" ▁"))
    text = "·" * start + text[start:]
    if all(unicodedata.category(c)[0] in "CZM" for c in text):
        return " ".join(f"U+{ord(c):04X}" for c in text) or "(nothing)"
    return text


def _followed(token: str) -> str:
    """The marked token within running text, where spaces and lines are themselves."""
    return token.replace("▁", " ") if token.strip(" ▁\n\t") else visible(token)


# --- what was done


def _method(result: Measurement) -> list[Element]:
    words = element("dl")

    def say(term: str, *what: Element | str) -> None:
        words.append(element("dt", term))
        words.append(element("dd", *what))

    scored = f"{result.scored:,} positions in {result.chunks:,} chunks of up to {result.chunk:,} tokens."
    say("protocol", f"{_PROTOCOLS[result.protocol]} {scored}")
    say(
        "intervals",
        "a bootstrap over whole chunks, because neighbouring tokens are not independent; differences between "
        "candidates are paired chunk by chunk.",
    )
    for text in result.texts:
        tokens = f"{text.path}: {text.tokens:,} tokens"
        say("text", tokens, element("br"), element("span.hash", f"sha256 {text.sha256}"))
    for picture in result.pictures:
        say("picture", picture.path, element("br"), element("span.hash", f"sha256 {picture.sha256}"))
    for i, model in enumerate((result.reference, *result.candidates)):
        path = element("span.hash", model.path)
        say("candidate" if i else "reference", f"{model.name}: {model.setting}", element("br"), path)
    parts = [element("h2", "What was measured"), words]
    if result.command is not None:
        parts.append(element("pre", result.command))
    parts.append(element("footer", f"Written by {result.tool} at {result.time}."))
    return parts


def _is_best(candidate: Candidate, metric: str, candidates: Sequence[Candidate]) -> bool:
    """Of the metrics that say how close one is; a perplexity below the reference's is no merit."""
    if len(candidates) < 2 or metric.startswith("perplexity"):
        return False
    best = (max if metric in ("top1", "top5") else min)(getattr(c.metrics, metric).value for c in candidates)
    return bool(getattr(candidate.metrics, metric).value == best)
