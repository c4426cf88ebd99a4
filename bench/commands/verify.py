"""The command `bezel verify`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from ...export.sources.opening import open_checkpoint
from ...export.verify import TensorReport, share_equal
from ...export.verify import verify as compare_tensors
from ...runtime.commands.model_path import MODEL
from ...runtime.files.models import own_eye
from ...runtime.files.onnx_folder import VISION
from ...runtime.files.vision_file import is_eye
from ..loss.agreement import Span, agreement
from ..loss.sight import Sight, sight
from .shared import json_option, progress_line, threads_option


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--source",
    type=MODEL,
    required=True,
    help="What MODEL was exported from: a checkpoint folder or a GGUF file.",
)
@click.option(
    "--run", "as_run", is_flag=True, help="Also run both on a text past the second window, and compare logits."
)
@threads_option
@json_option
def verify(model: Path, source: Path, as_run: bool, threads: int | None, as_json: bool) -> None:
    """Compare every tensor of MODEL, a GGUF file or an ONNX folder, with what it was exported from.

    A vision tower, mmproj-….gguf, is compared like a model, by itself; that in an ONNX folder with the folder.

    Prints the tensors, the worst first. --run also finds a graph or an engine that computes something else with the
    same weights: it prints how far logits are apart in each window, and what a folder's vision tower makes of a drawn
    picture, everything computed with float32 activations. The reference engine stands in for a checkpoint, which is not
    run itself; it takes 4 bytes of memory a weight, and its time. Exits with 1 if a tensor is further off than its
    format explains, or a window or the picture than the order of sums does.

    \b
    Examples:
      bezel verify gemma-2-2b-it.gguf --source gemma-2-2b-it/
      bezel verify mmproj-gemma-3-4b-it.gguf --source gemma-3-4b-it/
      bezel verify gemma-onnx/ --source gemma-q4_0.gguf --run
    """
    if as_run and is_eye(model):
        raise click.UsageError("--run goes with models; a vision tower alone gives no logits.")
    try:
        line = progress_line("tensors")
        with open_checkpoint(source, quantized=True) as opened:
            reports = compare_tensors(model, opened, lambda done, total: line(done, total, ""))
            blind = opened.vision is None
        spans = seen = None
        if as_run:
            exact = all(report.error == 0 for report in reports)
            spans = agreement(model, source, exact, threads, progress_line("positions"))
            seen = sight(model, threads)
    except KeyboardInterrupt:
        click.echo("\ncancelled", err=True)
        raise SystemExit(130) from None
    reports.sort(key=lambda report: (report.ok, -report.error))
    if as_json:
        logits = None if spans is None else [asdict(span) | {"ok": span.ok} for span in spans]
        picture = None if seen is None else asdict(seen) | {"ok": seen.ok}
        tensors = [_as_json(report) for report in reports]
        found = {"equal": share_equal(reports), "tensors": tensors, "logits": logits, "picture": picture}
        click.echo(json.dumps(found, indent=2))
    else:
        _show_tensors(reports)
        if spans is not None:
            _show_spans(spans)
        if seen is not None:
            _show_sight(seen)
    if (eye := _eye_left(model, source if blind else None)) is not None:
        click.echo(f"note: {eye}", err=True)
    if not all(found.ok for found in (*reports, *(spans or ()), *filter(None, [seen]))):
        raise SystemExit(1)


def _eye_left(model: Path, blind: Path | None) -> str | None:
    """What there is to say of the eye of a model that was compared without it, with a source that may be `blind`."""
    if blind is not None and (model / VISION).is_file():
        return f"{model / VISION} was not compared: {blind} has no vision tower"
    beside = own_eye(model)
    return None if beside is None else f"{beside} was not compared: it is verified by itself"


def _as_json(report: TensorReport) -> dict[str, object]:
    """The report with null for what JSON has no number for: the infinite SQNR of an exact tensor."""
    values = asdict(report) | {"ok": report.ok}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _show_tensors(reports: Sequence[TensorReport]) -> None:
    width = max(len(report.name) for report in reports)
    click.echo(f"{'tensor':{width}}  format  rel. RMS error  allowed   max. error  SQNR dB    equal")
    for r in reports:
        click.echo(
            f"{r.name:{width}}  {r.format:6}  {r.error:14.2e}  {r.tolerance:.1e}  {r.max_error:.2e}  "
            f"{r.sqnr_db:7.1f}  {r.equal:7.2%}{'' if r.ok else '  OFF'}"
        )
    off = sum(not report.ok for report in reports)
    what = f"{off} off" if off else "all as expected"
    click.echo(f"{len(reports)} tensors, {what}; {share_equal(reports):.2%} of their weights are the source's")


def _show_spans(spans: Sequence[Span]) -> None:
    click.echo("\n       positions  largest difference  mean KLD  same top token")
    for span in spans:
        click.echo(
            f"{f'{span.first} to {span.last}':>16}  {span.largest_difference:18.2e}  {span.kld:8.1e}  "
            f"{span.same_top:14.2%}{'' if span.ok else '  OFF'}"
        )
    off = sum(not span.ok for span in spans)
    what = f"{off} off" if off else "all as expected"
    click.echo(f"{len(spans)} windows, {what}; a mean KLD of {spans[0].allowed:.0e} is allowed")


def _show_sight(seen: Sight) -> None:
    click.echo(
        f"\na drawn picture: its {seen.rows} rows are up to {seen.difference:.1e} of their length apart; "
        f"{seen.allowed:.0e} is allowed{'' if seen.ok else '  OFF'}"
    )
