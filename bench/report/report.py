"""The report of `bezel measure`: one HTML file with neither scripts nor links, whose plots are inline SVG.

It is made from the measurement result alone (what `bezel measure --json` prints). Texts and vocabularies are
untrusted: everything goes through `svg.element`, and the page forbids itself scripts and every connection.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from ...runtime.files.atomic import atomic
from . import figures, svg
from .figures import Json, file_size, index, joined, kld_of
from .svg import element, number

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
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
_SHARES = ("top1", "flips", "top5", "rms_dp", "acc")
_MAIN = ("kld_mean", "kld_p999", "top1", "rms_dp", "perplexity_ratio")
_PROTOCOLS = {
    "chunks": "Each chunk of the texts is read afresh, and the second half of it is scored.",
    "long": "Each text is read in one go, across several windows, and every position is scored.",
}


def write_report(result: Json, path: str | Path) -> None:
    """Write the report of a measurement result to `path`; the file is whole or absent."""
    page = "<!DOCTYPE html>\n" + tostring(_page(result), encoding="unicode", method="html") + "\n"
    with atomic(Path(path)) as file:
        file.write(page.encode())


def _page(result: Json) -> Element:
    reference, names = result["reference"]["name"], [c["name"] for c in result["candidates"]]
    title = f"What quantization cost: {joined(names) if len(names) <= 3 else f'{len(names)} candidates'}"
    if not names:
        title = f"How sensitive {reference} is to quantization"
    sections = (_overview, _plots, _tasks, _worst, _method)
    return element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", files(__package__).joinpath("report.css").read_text("utf-8")),
        ),
        element(
            "body",
            element("h1", title),
            element("p.soft", f"Against the reference {reference}. {result.get('tool', '')}, {result.get('time', '')}"),
            *(part for section in sections for part in section(result)),
        ),
        lang="en",
    )


# --- the answer


def _overview(result: Json) -> list[Element]:
    ranked = sorted(result["candidates"], key=kld_of)
    shown = ranked if len(ranked) <= 3 else [ranked[0], ranked[-1]]
    parts = [element("p.lead", _sentence(c, result)) for c in shown]
    if len(ranked) > 3:
        parts.append(element("p.soft", f"The closest and the farthest of {len(ranked)}; all are in the table."))
    parts += [element("p.warning", warning) for warning in result.get("warnings") or ()]
    if not ranked:
        return parts
    parts += [_overview_table(result), _all_figures(result)]
    return parts + _pairs(result)


def _sentence(candidate: Json, result: Json) -> str:
    """What one candidate costs, in words."""
    metrics, reference = candidate["metrics"], result["reference"]
    kld = metrics["kld_mean"]
    if kld["value"] == 0:
        return f"{candidate['name']} loses nothing: at every position it gives what {reference['name']} gives."
    words = f"{candidate['name']} loses {_plus_minus(kld)} nats per token (mean KLD) against {reference['name']}"
    if top1 := metrics.get("top1"):
        words += f": the same top token at {100 * top1['value']:.1f} % of positions"
    if ratio := metrics.get("perplexity_ratio"):
        more = 100 * (ratio["value"] - 1)
        words += f", perplexity {abs(more):.2g} % {'higher' if more > 0 else 'lower'}"
        low, high = ratio.get("low"), ratio.get("high")
        if low is not None and high is not None and low <= 1 <= high:
            words += " (which may be chance)"
    if candidate.get("file_bytes") and reference.get("file_bytes"):
        words += f", at {100 * candidate['file_bytes'] / reference['file_bytes']:.0f} % of its bytes"
    return words.replace(" %", "\N{NO-BREAK SPACE}%") + "."


def _plus_minus(metric: Json) -> str:
    """0.052 ± 0.003, or the interval where it is lopsided."""
    value, low, high = metric["value"], metric.get("low"), metric.get("high")
    if low is None or high is None or low == high:
        return number(value)
    below, above = value - low, high - value
    if below > 0 and above > 0 and max(below, above) < 1.5 * min(below, above):
        digits = 1 - math.floor(math.log10(max(below, above)))
        return f"{value:.{digits}f} ± {max(below, above):.{digits}f}" if 0 < digits < 8 else number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def _overview_table(result: Json) -> Element:
    candidates, reference = result["candidates"], result["reference"]
    present = [m for m in _MAIN if any(m in c["metrics"] for c in candidates)]
    rows = []
    for c in candidates:
        formats = [f"{n} × {name}" for name, n in (c.get("formats") or {}).items()]
        figures = (_cell(c["metrics"].get(m), m, _is_best(c, m, candidates)) for m in present)
        rows.append([*_row_head(c, joined(formats), reference), *figures])
    ppl = _figure(reference.get("perplexity"), "perplexity")
    rows.append([*_row_head(reference, "the reference"), element("td.text", "perplexity ", *ppl, colspan=len(present))])
    confidence = f"{100 * result.get('confidence', 0.95):g} %"
    note = f"Small figures: {confidence} confidence intervals from a bootstrap over chunks. Bold: the best of a column."
    heads = ["candidate", "size", *(METRICS[m][0] for m in present)]
    return element("div", _table(heads, rows), element("p.soft", note))


def _table(heads: Iterable[str], rows: Iterable[Iterable[Element]]) -> Element:
    head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    return element("div.wide", element("table", head, element("tbody", *(element("tr", *row) for row in rows))))


def _row_head(model: Json, what: str, reference: Json | None = None) -> list[Element]:
    """The cells of a model's name and setting, and of its size."""
    setting = f"{model['engine']}, {model['activations']} activations, {model['kv']} KV"
    size, bits = model.get("file_bytes"), model.get("bits_per_weight")
    name = element("th", model["name"], element("span.sub", what), element("span.sub", setting), scope="row")
    cell = element("td", element("data", file_size(size), value=size) if size else "–")
    if bits:
        cell.append(element("span.sub", element("data", f"{bits:.2f}", value=repr(bits)), " bits per weight"))
    if size and reference and reference.get("file_bytes"):
        cell.append(element("span.sub", f"{100 * size / reference['file_bytes']:.0f} % of the reference"))
    return [name, cell]


def _cell(metric: Json | None, name: str, best: bool = False) -> Element:
    return element("td.best" if best else "td", *_figure(metric, name))


def _figure(metric: Json | None, name: str) -> list[Element | str]:
    """A value of the metric called `name`, exact in its `data` element, and its interval."""
    if metric is None or metric.get("value") is None:
        return ["–"]
    show, unit = (_percent, " %") if name in _SHARES else (number, "")
    if name == "perplexity_ratio":
        show = "{:.4f}".format
    low, high = metric.get("low"), metric.get("high")
    parts: list[Element | str] = [element("data", show(metric["value"]) + unit, value=repr(metric["value"]))]
    if low is not None and high is not None:
        parts.append(element("span.interval", f"{show(low)} – {show(high)}{unit}"))
    return parts


def _all_figures(result: Json) -> Element:
    candidates = result["candidates"]
    present = [m for m in METRICS if any(m in c["metrics"] for c in candidates)]
    rows = (
        [element("th", METRICS[m][0], scope="row"), *(_cell(c["metrics"].get(m), m) for c in candidates)]
        for m in present
    )
    words = element(
        "dl", *(element(tag, text) for m in present for tag, text in zip(("dt", "dd"), METRICS[m], strict=True))
    )
    table = _table(["metric", *(c["name"] for c in candidates)], rows)
    return element("details", element("summary", "All figures, and what they mean"), table, words)


def _pairs(result: Json) -> list[Element]:
    pairs = [p for p in result.get("pairs") or () if p["metric"] == "kld_mean" and p.get("difference") is not None]
    ranked = figures.ranking(result)

    def places(pair: Json) -> tuple[int, int]:
        first, second = sorted((index(ranked, pair["a"]), index(ranked, pair["b"])))
        return first, second

    pairs.sort(key=places)
    neighbours = [p for p in pairs if places(p)[1] - places(p)[0] == 1]
    if not neighbours:
        return []
    left = element("div", _list(map(_comparison, neighbours)))
    others = [_comparison(p) for p in pairs if p not in neighbours]
    if others:
        left.append(element("details", element("summary", f"The other {len(others)} pairs"), _list(others)))
    return _section("Which is better?", left, figures.differences(neighbours, result))


def _comparison(pair: Json) -> str:
    if pair["low"] <= 0 <= pair["high"]:
        return f"{pair['a']} and {pair['b']} cannot be told apart on these texts."
    better, worse = (pair["a"], pair["b"]) if pair["difference"] < 0 else (pair["b"], pair["a"])
    low, high = sorted((abs(pair["low"]), abs(pair["high"])))
    gain = f"{number(abs(pair['difference']))} ({number(low)} to {number(high)})"
    return f"{better} is better than {worse}, by {gain} nats per token."


def _plots(result: Json) -> list[Element]:
    made = (figures.size_against_kld, figures.by_position, figures.histogram, figures.tail, figures.layers)
    parts = _section("Where the loss lies", *(make(result) for make in made))
    parts += _section("What causes the loss?", figures.effects(result))
    found = result.get("sensitivity")
    known = [e for e in found["entries"] if e["kld"] is not None] if found else []
    if found and known:
        found = {**found, "entries": known}
        parts += _section("Which tensors are sensitive?", figures.heat_map(found), figures.sensitivity_ranking(found))
    return parts


def _section(title: str, *parts: Element | None) -> list[Element]:
    """Figures under a title; nothing where there are none."""
    shown = [part for part in parts if part is not None]
    return [element("h2", title), element("div.figures", *shown)] if shown else []


def _list(lines: Iterable[str]) -> Element:
    return element("ul.plain", *(element("li", line) for line in lines))


def _tasks(result: Json) -> list[Element]:
    parts: list[Element] = []
    for task in result.get("tasks") or ():
        against = task["candidates"][0]["name"]
        pairs = {p["b"]: p for p in task["pairs"] if p["a"] == against}
        rows = []
        for c in task["candidates"]:
            pair = pairs.get(c["name"])
            flips = (f"{pair['worse']} worse, {pair['better']} better", number(pair["p"], 2)) if pair else ("–", "–")
            cells = [_cell(c["acc"], "acc"), _cell(c["acc_norm"], "acc"), *(element("td", text) for text in flips)]
            rows.append([element("th", c["name"], scope="row"), *cells])
        heads = ("model", "accuracy", "accuracy by bytes", f"flips against {against}", "p (McNemar)")
        title = f"{Path(task['file']).name}: {task['questions']} questions"
        parts += [element("h3", title), _table(heads, rows)]
    if not parts:
        return []
    caption = (
        "The answer is the choice that the model finds the likeliest (by bytes: for its length). A flip is a question "
        "that one model answers rightly and the other wrongly; p is the probability of flips so uneven between models "
        "that are equally good (McNemar's exact test)."
    )
    return [element("h2", "Multiple choice"), *parts, element("p.soft", caption)]


# --- the worst tokens


def _worst(result: Json) -> list[Element]:
    parts: list[Element] = []
    for i, candidate in enumerate(result["candidates"]):
        if worst := candidate.get("worst"):
            cards = (_card(w, i, candidate["name"], result["reference"]["name"]) for w in worst[:_MOST_WORST])
            parts.append(element("details", element("summary", candidate["name"]), *cards, open=None if parts else ""))
    if not parts:
        return []
    caption = (
        "The positions that lose the most, with the token that really followed marked, and what reference and "
        "candidate expected there, the likeliest first. · stands for a space that begins a token, ↵ for a new line."
    )
    return [element("h2", "The worst tokens, in their context"), element("p.soft", caption), *parts]


def _card(worst: Json, series: int, candidate: str, reference: str) -> Element:
    before = worst.get("before") or ""
    if len(before) > _CONTEXT:
        before = "…" + before[-_CONTEXT:]
    where = f"KLD {number(worst['kld'])} at token {worst['position']:,} of {Path(str(worst['text'])).name}"
    sides = []
    for name, color, top in ((reference, 6, worst["reference_top"]), (candidate, series, worst["candidate_top"])):
        lines = element(f"ul.tops.{svg.series_class(color)}")
        for token, p in top:
            shown = element("mark" if token == worst["token"] else "span", element("bdi", visible(token)))
            bar = element("span.share", style=f"width:{100 * min(max(p, 0), 1):.1f}%")
            lines.append(element("li", element("span.token", shown), bar, element("span.p", f"{_percent(p)} %")))
        sides.append(element("div", element("span.soft", name), lines))
    quote = element("blockquote", before, element("mark", element("bdi", _followed(worst["token"]))))
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


def _method(result: Json) -> list[Element]:
    words = element("dl")

    def say(term: str, *what: Element | str | None) -> None:
        words.append(element("dt", term))
        words.append(element("dd", *what))

    scored = f"{result['scored']:,} positions in {result['chunks']:,} chunks of up to {result['chunk']:,} tokens."
    say("protocol", f"{_PROTOCOLS.get(result['protocol'], result['protocol'])} {scored}")
    say(
        "intervals",
        "a bootstrap over whole chunks, because neighbouring tokens are not independent; differences between "
        "candidates are paired chunk by chunk.",
    )
    for text in result["texts"]:
        tokens = f"{text['path']}: {text['tokens']:,} tokens"
        say("text", tokens, element("br"), element("span.hash", f"sha256 {text['sha256']}"))
    for i, model in enumerate((result["reference"], *result["candidates"])):
        setting = f"{model['name']}: {model['engine']} engine, {model['activations']} activations, {model['kv']} KV"
        say("candidate" if i else "reference", setting, element("br"), element("span.hash", str(model["path"])))
    parts = [element("h2", "What was measured"), words]
    if command := result.get("command"):
        parts.append(element("pre", str(command)))
    parts.append(element("footer", f"Written by {result.get('tool', 'bezel')} at {result.get('time', '')}."))
    return parts


# --- small things


def _is_best(candidate: Json, metric: str, candidates: Sequence[Json]) -> bool:
    """Of the metrics that say how close one is; a perplexity below the reference's is no merit."""
    values = [c["metrics"].get(metric, {}).get("value") for c in candidates]
    known = [v for v in values if v is not None]
    if len(known) < 2 or metric.startswith("perplexity"):
        return False
    best = max(known) if metric in ("top1", "top5") else min(known)
    return bool(candidate["metrics"].get(metric, {}).get("value") == best)


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else number(value, 2)
