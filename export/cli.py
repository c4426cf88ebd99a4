"""The commands `bezel export` and `bezel verify`."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..quant.recipes import PRESETS

if TYPE_CHECKING:
    from .gguf_writer import ExportSummary
    from .verify import TensorReport


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    type=click.Choice(PRESETS),
    default="q8_0",
    show_default=True,
    help="Format of the weights: q8_0 is almost lossless, q4_0 the smallest and the fastest on a laptop.",
)
@click.option(
    "--embedding",
    type=click.Choice(PRESETS),
    help="Format of the embedding, which is also the head. By default as --quant, but no less than q6_k.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def export(checkpoint: Path, out: Path, quant: str, embedding: str | None, force: bool, as_json: bool) -> None:
    """Write CHECKPOINT to the GGUF file OUT.

    CHECKPOINT is a folder as downloaded from the hub (config.json, tokenizer.model, safetensors), or a GGUF
    file that is not quantized. OUT may be a folder; the file is then named after the checkpoint.

    \b
    Examples:
      bezel export gemma-2-2b-it/ gemma-2-2b-it.gguf
      bezel export gemma-2-2b-it/ . --quant q4_0
      bezel export gemma-2-2b-it/ small.gguf --quant q4_0 --embedding q4_0
    """
    from .checkpoint import open_checkpoint
    from .gguf_writer import export_gguf

    with open_checkpoint(checkpoint) as source:
        if out.is_dir():
            name = re.sub(r"[^\w.-]+", "-", source.name).strip("-.") or "model"
            out = out / f"{name}-{quant}.gguf"
        show = sys.stderr.isatty()
        with click.progressbar(length=1, label=out.name, file=sys.stderr) if show else nullcontext() as bar:

            def progress(done: int, total: int) -> None:
                if bar is not None:
                    bar.length = total
                    bar.update(done - bar.pos)

            try:
                summary = export_gguf(source, out, quant, embedding, progress, force)
            except KeyboardInterrupt:
                click.echo("\ncancelled", err=True)
                raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
    else:
        _print_summary(summary)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="What MODEL was exported from: a checkpoint folder, or a GGUF file, whose weights must then be kept exactly.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(model: Path, checkpoint: Path, as_json: bool) -> None:
    """Compare every tensor of MODEL, a GGUF file or an ONNX folder, with what it was exported from.

    Prints the tensors, worst first, and exits with 1 if one is further off than its format explains.

    \b
    Examples:
      bezel verify gemma-2-2b-it.gguf --checkpoint gemma-2-2b-it/
      bezel verify gemma-2-2b-it-onnx/ --checkpoint gemma-2-2b-it.gguf
    """
    from .verify import open_source
    from .verify import verify as compare

    with open_source(checkpoint) as source:
        reports = compare(model, source)
    reports.sort(key=lambda report: (report.ok, -report.error))
    if as_json:
        click.echo(json.dumps([_as_json(report) for report in reports], indent=2))
    else:
        _print_reports(reports)
    if not all(report.ok for report in reports):
        raise SystemExit(1)


def _as_json(report: TensorReport) -> dict[str, object]:
    """The report with null for what JSON has no number for: the infinite SQNR of an exact tensor."""
    values = asdict(report) | {"ok": report.ok}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _print_summary(summary: ExportSummary) -> None:
    formats = ", ".join(f"{count} × {name}" for name, count in summary.formats.items())
    click.echo(f"{summary.path}: {summary.file_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s")
    click.echo(f"  {summary.weights / 1e6:,.1f} million weights at {summary.bits_per_weight:.2f} bits: {formats}")
    for fallback in summary.fallbacks:
        click.echo(f"  fallback: {fallback}")
    for warning in summary.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_reports(reports: list[TensorReport]) -> None:
    width = max(len(report.name) for report in reports)
    click.echo(f"{'tensor':{width}}  format  rel. RMS error  allowed   max. error  SQNR dB")
    for r in reports:
        click.echo(
            f"{r.name:{width}}  {r.format:6}  {r.error:14.2e}  {r.tolerance:.1e}  {r.max_error:.2e}  "
            f"{r.sqnr_db:7.1f}{'' if r.ok else '  OFF'}"
        )
    off = sum(not report.ok for report in reports)
    click.echo(f"{len(reports)} tensors, {off} off" if off else f"{len(reports)} tensors, all as expected")
