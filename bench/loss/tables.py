"""The tables of `bezel measure` for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

Json = Mapping[str, Any]

_MOST = 20  # entries of a ranking shown


def show(result: Json) -> None:
    """Print a measurement result."""
    if result["candidates"]:
        _show_candidates(result)
        _show_pairs(result)
        _show_effects(result)
    if result["sensitivity"]:
        _show_sensitivity(result["sensitivity"])


def _show_candidates(result: Json) -> None:
    reference, candidates = result["reference"], result["candidates"]
    texts = ", ".join(Path(text["path"]).name for text in result["texts"])
    what = "sequences" if result["protocol"] == "long" else "chunks"
    click.echo(
        f"{result['chunks']} {what} of {result['chunk']} tokens of {texts}, {result['scored']:,} positions scored; "
        f"± the longer side of the {result['confidence']:.0%} confidence interval"
    )
    ppl = _value(reference["perplexity"], "{:.4g}")
    click.echo(f"reference: {reference['name']}, {_setting(reference)}: perplexity {ppl}\n")
    columns: list[tuple[str, str, str, float]] = [
        ("mean KLD", "kld_mean", "{:.5f}", 1),
        ("99.9 %", "kld_p999", "{:.4f}", 1),
        ("same top, %", "top1", "{:.2f}", 100),
        ("RMS Δp, %", "rms_dp", "{:.3f}", 100),
        ("perplexity ratio", "perplexity_ratio", "{:.4f}", 1),
    ]
    heads = ["candidate", "MB", "bits", *(head for head, *_ in columns)]
    rows = []
    for c in candidates:
        size = [f"{c['file_bytes'] / 1e6:,.1f}" if c["file_bytes"] else "–"]
        size.append(f"{c['bits_per_weight']:.2f}" if c["bits_per_weight"] else "–")
        figures = [_value(c["metrics"][key], form, times) for _, key, form, times in columns]
        rows.append([c["name"], *size, *figures])
    _table(heads, rows)


def _show_pairs(result: Json) -> None:
    """The candidates by mean KLD, each compared with the next."""
    ranked = sorted(result["candidates"], key=lambda c: c["metrics"]["kld_mean"]["value"])
    places = {c["name"]: i for i, c in enumerate(ranked)}
    lines: dict[int, str] = {}
    for pair in result["pairs"]:
        a, b = sorted((pair["a"], pair["b"]), key=places.__getitem__)
        if pair["metric"] != "kld_mean" or places[b] - places[a] != 1:
            continue
        low, high = sorted((abs(pair["low"]), abs(pair["high"])))
        if pair["low"] <= 0 <= pair["high"]:
            lines[places[a]] = f"  {a} and {b} cannot be told apart"
        else:
            by = f"{abs(pair['difference']):.2g} [{low:.2g}, {high:.2g}]"
            lines[places[a]] = f"  {a} is better than {b} by {by} nats a token"
    if lines:
        click.echo("\nmean KLD, paired:")
        for _, line in sorted(lines.items()):
            click.echo(line)


def _show_effects(result: Json) -> None:
    if result["effects"]:
        click.echo("\neach effect alone")
        rows = [
            [e["candidate"], e["effect"], _value(m["kld_mean"], "{:.2g}"), _value(m["top1"], "{:.2f}", 100)]
            for e in result["effects"]
            for m in [e["metrics"]]
        ]
        _table(["candidate", "effect", "mean KLD", "same top, %"], rows)


def _show_sensitivity(found: Json) -> None:
    click.echo(f"\nmean KLD when one {found['by']} alone is {found['format']}")
    rows = []
    for entry in found["entries"][:_MOST]:
        name = entry["tensors"][0] if len(entry["tensors"]) == 1 else _group(entry)
        rows.append([name, _value({"value": entry["kld"], **entry}, "{:.2g}")])
    _table([found["by"], "mean KLD"], rows)
    if len(found["entries"]) > _MOST:
        click.echo(f"and {len(found['entries']) - _MOST} with less")


def _group(entry: Json) -> str:
    return str(entry["role"]) if entry["layer"] is None else f"layer {entry['layer']}"


def _setting(model: Json) -> str:
    return f"{model['engine']} engine, {model['activations']} activations, {model['kv']} KV"


def _value(metric: Json, form: str, times: float = 1) -> str:
    value, low, high = metric["value"], metric["low"], metric["high"]
    shown = form.format(times * value)
    return shown if low is None else f"{shown} ±{form.format(times * max(value - low, high - value))}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = (f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        click.echo("  ".join(cells))
