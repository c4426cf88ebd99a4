"""The report of `bezel sensitivity`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ..loss.result import Sensitivity, SensitivityEntry
from . import svg
from .page import KLD, axis_of, figure, heat_figure, joined, section, write_page
from .svg import Row, element, number

_MOST_RANKED = 20


def write_report(result: Sensitivity, path: str | Path) -> None:
    """Write the report to `path`; the file is whole or absent."""
    read = f"Measured on {result.tokens:,} tokens, one {result.by} at a time; text with SHA-256 {result.text_sha256}."
    parts = [element("p.warning", "Nothing was measured: no format fits.")] if not result.entries else []
    for form in result.formats:
        entries = result.ranking(form)
        title = f"Which {result.by}s are sensitive to {form}?"
        parts += section(title, _heat_map(entries, form), _ranking(entries, form))
    write_page(path, f"How sensitive {result.model} is to quantization", read, parts)


def _ranking(entries: Sequence[SensitivityEntry], form: str) -> Element:
    rows = [Row(entry.part, entry.kld, entry.low, entry.high) for entry in entries[:_MOST_RANKED]]
    caption = f"Mean loss when only this is in {form} and all else is exact; the most sensitive first."
    if len(entries) > len(rows):
        caption += f" The first {len(rows)} of {len(entries)}."
    return figure("Ranking", svg.rows(rows, axis_of(rows, f"mean {KLD}"), "sensitivity ranking"), caption)


def _heat_map(entries: Sequence[SensitivityEntry], form: str) -> Element | None:
    """By layer and role; for single tensors only."""
    cells = [(e.layer, e.role, e) for e in entries if e.role is not None and e.layer is not None]
    columns, roles = sorted({layer for layer, *_ in cells}), list(dict.fromkeys(role for _, role, _ in cells))
    roles.sort(key=lambda role: -sum(e.kld for _, other, e in cells if other == role))
    others = [f"{e.part} {number(e.kld)}" for e in entries if e.role is None or e.layer is None]
    drawn = [(str(layer), role, e.kld, e.part) for layer, role, e in cells]
    caption = f"Mean loss when one tensor alone is in {form}"
    beside = f" Outside the layers: {joined(others[:6])}." if others else ""
    return heat_figure("Layer by role", drawn, [*map(str, columns)], roles, "layer", caption, beside)
