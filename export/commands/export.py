"""The command `bezel export`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...quant.recipes import PLAIN, PRESETS
from ...runtime.errors import InvalidRequest
from .progress import progress_bar

if TYPE_CHECKING:
    from ...quant.recipes import Recipe
    from ..gguf.writer import ExportSummary
    from ..sources.checkpoint import Checkpoint


_ONNX_QUANTS = ("int8", "int4")  # and f32, f16


def _bytes(context: click.Context, param: click.Parameter, text: str | None) -> int | None:  # noqa: ARG001
    """1.5GB, 800 MiB or 1500000 as a number."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+|\d*\.\d+)\s*([KMG]?)(i?)B?", text, re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"found {text!r}, expected a size such as 1.5GB or 800MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMG".index(match[2].upper() or " "))


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--from", "source", type=click.Path(path_type=Path), help="CHECKPOINT, where it is not said first.")
@click.option(
    "--format",
    "container",
    type=click.Choice(("gguf", "onnx")),
    default="gguf",
    show_default=True,
    help="gguf: one file. onnx: a folder for onnxruntime.",
)
@click.option(
    "--quant",
    metavar="PRESET|FILE",
    help=f"Format of the weights: {', '.join(PRESETS)}, or a recipe file. q8_0 is almost lossless, int4 the best of at "
    "most 4.6 bits a weight. For ONNX f32, f16, int8 or int4.  [default: q8_0; for ONNX int8, or a GGUF file's own]",
)
@click.option(
    "--embedding",
    type=click.Choice((*PLAIN, *_ONNX_QUANTS)),
    help="Format of the embedding, which is also the head. By default as --quant, but no less than q6_k (int4: q5_k, "
    "where that fits), or int8 for ONNX.",
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(min=1, max=32),
    metavar="BITS",
    help="Instead of --quant: the mix of formats that loses least in so many bits a weight; needs --sensitivity.",
)
@click.option(
    "--target-size", metavar="SIZE", callback=_bytes, help="The same for the size of the file, such as 1.5GB."
)
@click.option(
    "--sensitivity",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What each tensor loses in each format, measured: `bezel sensitivity CHECKPOINT … -o FILE`.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="TEXT|FILE",
    help="Round weights for what this text sends through them: about half the loss at the same size. Takes a while; "
    "broken off, it goes on. Or a file from `bezel calibrate`: faster, a little less good.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    help="How much of the text is used, spread evenly over it; more takes longer and is a little better.  "
    "[default: 10240, which take Gemma 2 2B about 40 minutes on two cores; more for smaller models, up to 102400]",
)
@click.option(
    "--dialect",
    type=click.Choice(("ort", "standard")),
    help="ONNX: operators for quantized weights, onnxruntime's own or any runtime's.  [default: ort]",
)
@click.option(
    "--kv",
    type=click.Choice(("f32", "int8")),
    help="ONNX: how keys and values are kept. int8 takes a quarter of the memory and is much faster where the context "
    "is long; needs --calibration TEXT, on which each channel's range is measured.  [default: f32]",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def export(
    checkpoint: Path,
    out: Path | None,
    source: Path | None,
    container: str,
    quant: str | None,
    embedding: str | None,
    target_bpw: float | None,
    target_size: int | None,
    sensitivity: Path | None,
    calibration: Path | None,
    calibration_tokens: int | None,
    dialect: str | None,
    kv: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT to OUT: a GGUF file, or a folder with an ONNX graph.

    CHECKPOINT is a folder as downloaded from the hub (config.json, tokenizer.model, safetensors), or a GGUF
    file that is not quantized; for ONNX it may be, and its weights then stay what they are. OUT may be a folder; a
    GGUF file is then named after the checkpoint. `bezel verify` compares what was written with its source.

    \b
    Examples:
      bezel export gemma-2-2b-it/ gemma-2-2b-it.gguf
      bezel export gemma-2-2b-it/ . --quant q4_0
      bezel export gemma-2-2b-it/ small.gguf --quant q4_0 --embedding q4_0
      bezel export gemma-2-2b-it/ better.gguf --quant q4_0 --calibration text.txt
      bezel export gemma-2-2b-it/ mine.gguf --quant recipe.json
      bezel export gemma-2-2b-it/ best.gguf --target-bpw 4.55 --sensitivity sens.json
      bezel export gemma-2-2b-it/ gemma-onnx/ --format onnx --quant int4
      bezel export gemma-2-2b-it/ gemma-onnx/ --format onnx --quant int4 --kv int8 --calibration text.txt
      bezel export --from small.gguf gemma-onnx/ --format onnx

    A recipe file is JSON; the first rule that matches a tensor decides. A rule asks for a role (a name or a list), for
    layers and for a regular expression that the tensor's name in GGUF matches, or for some of these:

    \b
      {"bezel_recipe": 1, "default": "iq4_xs", "rules": [
        {"role": "token_embd", "format": "q6_k"},
        {"role": ["attn_v", "ffn_down"], "layers": "0-3, 25", "format": "q5_k"},
        {"tensor": "blk\\\\.2\\\\..*", "format": "q8_0"}]}
    """
    if (out is None) == (source is None):
        raise click.UsageError("Give CHECKPOINT and OUT, or OUT and --from.")
    if source is not None:
        checkpoint, out = source, checkpoint
    assert out is not None
    if container == "gguf" and (dialect or kv):
        raise click.UsageError("--dialect and --kv go with --format onnx.")
    if container == "onnx" and (calibration is not None) != (kv == "int8"):
        raise click.UsageError(
            "For ONNX, --kv int8 and --calibration TEXT need each other; to calibrate the weights, export to GGUF and "
            "that file to ONNX with --from."
        )
    if container == "gguf" and (quant == "int8" or embedding in _ONNX_QUANTS):
        raise click.UsageError("int8, and int4 for the embedding, go with --format onnx; GGUF has q8_0 and q4_0.")
    targets = (target_bpw is not None) + (target_size is not None)
    if targets and container == "onnx":
        raise click.UsageError("--target-bpw and --target-size go with --format gguf.")
    if targets > 1:
        raise click.UsageError("Give --target-bpw or --target-size, not both.")
    if targets and sensitivity is None:
        raise click.UsageError(
            "--target-bpw and --target-size need --sensitivity; the file is written by `bezel sensitivity "
            f"{checkpoint} --text FILE --formats q4_k,iq4_xs,q5_k,q6_k -o sens.json`."
        )
    if sensitivity is not None and not targets:
        raise click.UsageError("--sensitivity needs --target-bpw or --target-size.")
    if targets and (quant or embedding):
        raise click.UsageError("--target-bpw and --target-size choose every format: leave --quant and --embedding out.")

    def recipe_for(source: Checkpoint) -> Recipe:
        from ..gguf.writer import file_size
        from ..recipe import find_recipe, solve_bits, solve_size

        if sensitivity is not None and target_bpw is not None:
            return solve_bits(sensitivity, source.config, target_bpw)
        if sensitivity is not None and target_size is not None:
            more = 1024 if calibration else 0  # what a calibrated file says of that
            return solve_size(sensitivity, source.config, target_size - more, lambda r: file_size(source, r))
        return find_recipe(quant or "q8_0", source.config, embedding)

    with progress_bar(out.name) as progress:
        try:
            if container == "onnx":
                summary = _export_folder(
                    checkpoint, out, quant, embedding, dialect or "ort", progress, force, calibration
                )
            else:
                summary = _export_file(checkpoint, out, recipe_for, calibration, calibration_tokens, progress, force)
        except KeyboardInterrupt:
            click.echo("\ncancelled", err=True)
            raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
    else:
        _print_summary(summary)


def _export_folder(path: Path, *arguments: Any) -> ExportSummary:
    try:
        from ..onnx.export import export_folder
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise InvalidRequest("--format onnx needs the package onnx: pip install 'bezel-lm[onnx]'") from None
    return export_folder(path, *arguments)


def _export_file(
    checkpoint: Path,
    out: Path,
    recipe_for: Callable[[Checkpoint], Recipe],
    calibration: Path | None,
    tokens: int | None,
    progress: Callable[[int, int], None],
    force: bool,
) -> ExportSummary:
    from ..calibration.rounding import export_calibrated
    from ..gguf.writer import export_gguf
    from ..sources.checkpoint import open_checkpoint

    with open_checkpoint(checkpoint) as source:
        recipe = recipe_for(source)
        if out.is_dir():
            name, suffix = (re.sub(r"[^\w.-]+", "-", text).strip("-.") for text in (source.name, recipe.name))
            out = out / f"{name or 'model'}-{suffix or 'recipe'}.gguf"
        if calibration is not None:
            return export_calibrated(source, out, recipe, None, calibration, progress, force, tokens)
        return export_gguf(source, out, recipe, progress=progress, force=force)


def _print_summary(summary: ExportSummary) -> None:
    formats = ", ".join(f"{count} × {name}" for name, count in summary.formats.items())
    click.echo(f"{summary.path}: {summary.file_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s")
    click.echo(f"  {summary.weights / 1e6:,.1f} million weights at {summary.bits_per_weight:.2f} bits: {formats}")
    for fallback in summary.fallbacks:
        click.echo(f"  fallback: {fallback}")
    for warning in summary.warnings:
        click.echo(f"warning: {warning}", err=True)
