"""The tables of `bezel measure` and `bezel sensitivity` for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from .intervals import Interval
from .result import Measurement, Metrics, Sensitivity, text_names

_MOST = 20  # entries of a ranking shown


def show(result: Measurement) -> None:
    """Print a measurement result."""
    reference = result.reference
    texts = ", ".join(Path(text.path).name for text in result.texts)
    what = {"long": "sequences", "chat": "chats"}.get(result.protocol, "chunks")
    click.echo(
        f"{result.chunks} {what} of {result.chunk} tokens of {texts}, {result.scored:,} positions scored; "
        f"± the longer side of the {result.confidence:.0%} confidence interval"
    )
    perplexity = with_interval(reference.perplexity, "{:.4g}")
    click.echo(f"reference: {reference.name}, {reference.setting}: perplexity {perplexity}\n")
    heads = ["mean KLD", "99.9 %", "same top, %", "RMS Δp, %", "perplexity ratio"]
    rows = [
        [c.name, f"{c.file_bytes / 1e6:,.1f}", f"{c.bits_per_weight:.2f}", *_figures(c.metrics)] for c in result.ranked
    ]
    print_table(["candidate", "MB", "bits", *heads], rows)
    _show_texts(result)
    _show_pairs(result)
    if result.effects:
        click.echo("\neach effect alone")
        effects = [
            [
                e.candidate,
                e.effect,
                with_interval(e.metrics.kld_mean, "{:.2g}"),
                with_interval(e.metrics.top1, "{:.2f}", 100),
            ]
            for e in result.effects
        ]
        print_table(["candidate", "effect", "mean KLD", "same top, %"], effects)


def show_sensitivity(result: Sensitivity) -> None:
    """Print the ranking of each format."""
    click.echo(f"{result.model}: {result.tokens:,} tokens read")
    for form in result.formats:
        entries = result.ranking(form)
        click.echo(f"\nmean KLD when one {result.by} alone is {form}")
        rows = [
            [entry.part, with_interval(Interval(entry.kld, entry.low, entry.high), "{:.2g}")]
            for entry in entries[:_MOST]
        ]
        print_table([result.by, "mean KLD"], rows)
        if len(entries) > _MOST:
            click.echo(f"and {len(entries) - _MOST} with less")


def _figures(metrics: Metrics) -> list[str]:
    return [
        with_interval(metrics.kld_mean, "{:.5f}"),
        with_interval(metrics.kld_p999, "{:.4f}"),
        with_interval(metrics.top1, "{:.2f}", 100),
        with_interval(metrics.rms_dp, "{:.3f}", 100),
        with_interval(metrics.perplexity_ratio, "{:.4f}"),
    ]


def _show_texts(result: Measurement) -> None:
    """Each text alone, where there are several."""
    if len(result.ranked[0].by_text) < 2:
        return
    rows = []
    for c in result.ranked:
        for name, found in zip(text_names(c.by_text), c.by_text, strict=True):
            rows.append(
                [
                    f"{c.name}, {name}",
                    with_interval(found.kld_mean, "{:.5f}"),
                    with_interval(found.kld_p999, "{:.4f}"),
                    with_interval(found.top1, "{:.2f}", 100),
                    with_interval(found.perplexity_ratio, "{:.4f}"),
                    f"{found.bits_per_byte.value:.4f}",
                    f"{found.reference_bits_per_byte.value:.4f}",
                ]
            )
    click.echo("\neach text alone")
    heads = ["mean KLD", "99.9 %", "same top, %", "perplexity ratio", "bits a byte", "reference's"]
    print_table(["candidate, text", *heads], rows)


def _show_pairs(result: Measurement) -> None:
    """The candidates by mean KLD, each compared with the next."""
    ranked = sorted(result.candidates, key=lambda c: c.metrics.kld_mean.value)
    places = {c.name: i for i, c in enumerate(ranked)}
    lines: dict[int, str] = {}
    for pair in result.pairs:
        a, b = sorted((pair.a, pair.b), key=places.__getitem__)
        if pair.metric != "kld_mean" or places[b] - places[a] != 1:
            continue
        low, high = sorted((abs(pair.low), abs(pair.high)))
        if pair.low <= 0 <= pair.high:
            lines[places[a]] = f"  {a} and {b} cannot be told apart"
        else:
            by = f"{abs(pair.difference):.2g} [{low:.2g}, {high:.2g}]"
            lines[places[a]] = f"  {a} is better than {b} by {by} nats a token"
    if lines:
        click.echo("\nmean KLD, paired:")
        for _, line in sorted(lines.items()):
            click.echo(line)


def with_interval(figure: Interval, form: str, times: float = 1) -> str:
    """A figure and the longer side of its interval, both times `times` and in the format `form`."""
    shown = form.format(times * figure.value)
    if figure.low is None or figure.high is None:
        return shown
    return f"{shown} ±{form.format(times * max(figure.value - figure.low, figure.high - figure.value))}"


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """In columns as wide as they need be, all but the first to the right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = (f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        click.echo("  ".join(cells))
