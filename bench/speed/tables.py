"""The tables of `bezel bench` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .profiling import OpTime
from .speed import FIRST_TOKEN_PROMPT

_PEER = 20  # columns of a peer's figure
_MEMORY = {"peak": "peak_bytes", "private": "private_bytes", "mapped file": "file_bytes", "KV": "kv_bytes"}


def show_speed(result: Mapping[str, Any]) -> None:
    """Print what `bezel bench` measured, from what it writes as JSON."""
    model, machine, peaks = result["model"], result["machine"], result["peaks"]
    click.echo(f"{model['file']}: {model['name'] or 'unnamed'}, {model['file_bytes'] / 1e6:,.1f} MB")
    click.echo(
        f"{result['engine']} engine, {machine['isa']}, {result['threads']} threads, {result['kv']} keys and values; "
        f"medians of {result['repeats']} rounds"
    )
    click.echo(
        f"{machine['cpu']}: reads {peaks['memory_read_bytes_per_s'] / 1e9:.1f} GB/s of memory, "
        f"{peaks['file_read_bytes_per_s'] / 1e9:.1f} of the file; "
        f"{peaks['int8_peak_ops_per_s'] / 1e9:,.0f} Gop/s int8, {peaks['float32_peak_ops_per_s'] / 1e9:,.0f} float32"
    )
    for what, title, share, limit in (
        ("prefill", "prompt, tokens", "prefill_share_of_int8_peak", "int8 peak"),
        ("decode", "decode after, tokens", "decode_share_of_bandwidth", "bandwidth"),
    ):
        click.echo(f"\n{title:<22}{'tokens/s':>10}{'of ' + limit:>14}{_peer_heading(result)}")
        ours = result["runs"]["bezel"]
        for n, speed in ours[f"{what}_tokens_per_s"].items():
            theirs = _peer(result, result.get("compared", {}).get(what, {}).get(n), f"{what}_tokens_per_s", n)
            click.echo(f"{n:>22}{speed:10,.1f}{ours[share][n]:14.0%}{theirs}")
    _show_first_token(result)
    _show_memory(result)
    for name, run in result["runs"].items():
        if "not_measured" in run:
            click.echo(f"{name}: not measured: {run['not_measured']}")


def show_profile(title: str, rows: list[OpTime]) -> None:
    """Print one table of `profiling.profile`."""
    click.echo(f"{title + ', by op':<44}{'calls':>8}{'µs':>14}{'share':>9}")
    for row in rows:
        calls = f"{row.calls:,.0f}" if row.calls else ""
        click.echo(f"  {row.op:<42}{calls:>8}{row.seconds * 1e6:14,.0f}{row.share:9.1%}")
    click.echo()


def _peer_heading(result: Mapping[str, Any]) -> str:
    return f"{result['versus']:>{_PEER}}  bezel is" if "versus" in result else ""


def _peer(result: Mapping[str, Any], found: Mapping[str, Any] | None, figure: str, n: int | None = None) -> str:
    """The peer's columns: its figure in its faster setting, how much faster bezel is, and which setting it was."""
    if found is None:
        return ""
    figures = result["runs"][found["setting"]][figure]
    value = figures if n is None else figures[n]
    setting = found["setting"].partition(", ")[2]
    return f"{value:{_PEER},.{2 if n is None else 1}f}{found['times_as_fast']:8.2f} times as fast ({setting})"


def _show_first_token(result: Mapping[str, Any]) -> None:
    seconds = result["runs"]["bezel"]["first_token_s"]
    if seconds is not None:
        theirs = _peer(result, result.get("compared", {}).get("first_token"), "first_token_s")
        click.echo(f"\n{'start to first token':<22}{'s':>10}{'':14}{_peer_heading(result)}")
        click.echo(f"{f'prompt of {FIRST_TOKEN_PROMPT}':>22}{seconds:10.2f}{'':14}{theirs}")


def _show_memory(result: Mapping[str, Any]) -> None:
    click.echo(
        f"\n{'memory after ' + str(result['context']) + ' tokens, MB':<36}" + "".join(f"{name:>13}" for name in _MEMORY)
    )
    for name, run in result["runs"].items():
        if "not_measured" not in run:
            cells = (f"{'–':>13}" if run[key] is None else f"{run[key] / 1e6:13,.1f}" for key in _MEMORY.values())
            click.echo(f"  {name:<34}" + "".join(cells))
