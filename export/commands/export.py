"""The command `bezel export`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...quant.recipes import PLAIN, PRESETS
from ...runtime.commands.console import printable, say_over_progress
from ...runtime.commands.model_path import MODEL
from ...runtime.errors import InvalidRequest
from .progress import progress_bar

if TYPE_CHECKING:
    from ...quant.recipes import Recipe
    from ..sources.checkpoint import Checkpoint
    from ..summary import ExportSummary


_ONNX_QUANTS = ("int8", "int4")  # and f32, f16
_TUNE_STEPS = 500
_PRESETS = {*PRESETS, *_ONNX_QUANTS}


@dataclass(frozen=True)
class _Size:
    """What a mix of formats has to fit in: so many bits a weight, or else bytes of the file."""

    bits: float | None = None
    size: int = 0


def _size(context: click.Context, param: click.Parameter, text: str | None) -> _Size | None:  # noqa: ARG001
    """4.55bpw, 1.5GB or 800 MiB."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+|\d*\.\d+)\s*(?:(bpw)|([KMG]?)(i?)B)", text, re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"found {text!r}, expected bits a weight such as 4.55bpw, or a size such as 1.5GB")
    number = float(match[1])
    if not match[2]:
        return _Size(size=int(number * (1024 if match[4] else 1000) ** " KMG".index(match[3].upper() or " ")))
    if not 1 <= number <= 32:
        raise click.BadParameter(f"found {number:g} bits a weight, expected 1 to 32")
    return _Size(bits=number)


@dataclass(frozen=True)
class _Options:
    """What was asked for, named as on the command line; None where nothing was."""

    container: str
    quant: str | None
    embedding: str | None
    size: _Size | None
    sensitivity: Path | None
    calibration: Path | None
    calibration_images: Path | None
    calibration_tokens: int | None
    tune: bool
    tune_scales: bool
    tune_steps: int | None
    runtime: str | None
    kv: str | None
    vision: str | None
    requantize: bool
    force: bool

    def check(self) -> None:
        """Raises UsageError for options that do not go together."""
        onnx, mixed = self.container == "onnx", self.size is not None
        wrong = (
            (not onnx and (self.runtime or self.kv), "--target and --kv go with --format onnx."),
            (
                not onnx and (self.quant == "int8" or self.embedding in _ONNX_QUANTS),
                "int8, and int4 for the embedding, go with --format onnx; GGUF has q8_0 and q4_0.",
            ),
            (
                self.kv == "int8" and self.calibration is None,
                "--kv int8 needs --calibration TEXT, on which each channel's range is measured.",
            ),
            (
                self.kv == "f16" and self.runtime not in (None, "onnxruntime"),
                "--kv f16 goes with --target onnxruntime.",
            ),
            (
                onnx and self.calibration and (self.kv in ("f32", "f16") or self.runtime not in (None, "onnxruntime")),
                "For ONNX, --calibration is for --kv int8 and --target onnxruntime; to calibrate the weights, export "
                "to GGUF and that file to ONNX.",
            ),
            (
                self.calibration_images and onnx,
                "--calibration-images goes with --format gguf.",
            ),
            (
                self.calibration_tokens and (onnx or not self.calibration),
                "--calibration-tokens goes with --calibration and --format gguf.",
            ),
            (
                self.tuned and (onnx or not self.calibration),
                "--tune goes with --calibration TEXT and --format gguf; for ONNX, export the GGUF file that was tuned.",
            ),
            (self.tune and self.tune_scales, "Give --tune or --tune-scales: scales and codes, or scales alone."),
            (self.tune_steps and not self.tuned, "--tune-steps goes with --tune or --tune-scales."),
            (onnx and mixed, "--size goes with --format gguf."),
            (
                mixed and (self.quant or self.embedding),
                "--size chooses every format: leave --quant and --embedding out.",
            ),
            (
                mixed and self.sensitivity is None,
                "--size needs --sensitivity; the file is written by `bezel sensitivity CHECKPOINT --text FILE "
                "--formats q4_k,iq4_xs,q5_k,q6_k -o sens.json`.",
            ),
            (self.sensitivity is not None and not mixed, "--sensitivity needs --size."),
        )
        for found, words in wrong:
            if found:
                raise click.UsageError(words)

    @property
    def tuned(self) -> bool:
        return self.tune or self.tune_scales

    def recipe(self, source: Checkpoint) -> Recipe:
        """The formats of a GGUF file."""
        from ..gguf.writer import file_size
        from ..recipe import find_recipe, solve_bits, solve_size

        if self.size is None or self.sensitivity is None:
            return find_recipe(self.quant or "q8_0", source.config, self.embedding)
        if self.size.bits is not None:
            return solve_bits(self.sensitivity, source.config, self.size.bits)
        more = 1024 if self.calibration else 0  # what a calibrated file says of that
        return solve_size(self.sensitivity, source.config, self.size.size - more, lambda r: file_size(source, r))


@click.command()
@click.argument("checkpoint", type=MODEL)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "container",
    type=click.Choice(("gguf", "onnx")),
    help="gguf: one file. onnx: a folder with a graph.  [default: gguf; with --target, onnx]",
)
@click.option(
    "--quant",
    metavar="PRESET|FILE",
    callback=lambda _context, _parameter, name: name.lower() if name and name.lower() in _PRESETS else name,
    help=f"Format of the weights: {', '.join(PRESETS)}, or a recipe file. q8_0 is almost lossless, int4 the best of at "
    "most 4.6 bits a weight. For ONNX f32, f16, int8 or int4.  [default: q8_0; for ONNX int8, or a GGUF file's own]",
)
@click.option(
    "--embedding",
    type=click.Choice((*PLAIN, *_ONNX_QUANTS), case_sensitive=False),
    help="Format of the embedding, which is also the head. By default as --quant, but no less than q6_k (int4: q5_k, "
    "where that fits), or int8 for ONNX.",
)
@click.option(
    "--size",
    metavar="BPW|SIZE",
    callback=_size,
    help="Instead of --quant: the mix of formats that loses least in so many bits a weight, such as 4.55bpw, or in a "
    "file of a size, such as 1.5GB; needs --sensitivity.",
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
    "--calibration-images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Round the vision tower's weights for what these pictures send through them.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    help="How much of the text is used, spread evenly over it; more takes longer and is a little better.  "
    "[default: 10240, which take Gemma 2 2B about 40 minutes on two cores; more for smaller models, up to 102400]",
)
@click.option(
    "--tune",
    is_flag=True,
    help="After --calibration TEXT, move scales, norms and codes so that the whole model's answers come closest to the "
    "exact model's. The same bytes, and less loss again; needs the extra `tune`, hours for all but small models, and "
    "as much of the text as the steps go through. Broken off, it goes on from what is kept beside OUT.",
)
@click.option(
    "--tune-scales",
    is_flag=True,
    help="As --tune, but codes stay: less is gained, for 5 GB of memory where Gemma 2 2B's codes take 40.",
)
@click.option(
    "--tune-steps",
    type=click.IntRange(min=1),
    help=f"How long --tune takes: so many steps of 3,072 tokens.  [default: {_TUNE_STEPS}]",
)
@click.option(
    "--target",
    "runtime",
    type=click.Choice(("onnxruntime", "portable", "transformers", "web")),
    help="ONNX: what is to run it. onnxruntime: fastest there, as bezel feeds it. portable: OpenVINO, browsers and the "
    "rest, too. transformers: laid out for Optimum and transformers.js. web: a page to chat with in a browser, for any "
    "server of files.  [default: onnxruntime]",
)
@click.option(
    "--kv",
    type=click.Choice(("f32", "f16", "int8")),
    help="ONNX: how keys and values are kept, for --target onnxruntime. f16 takes half of the memory, int8 a quarter, "
    "and is much faster where the context is long; int8 needs --calibration TEXT, on which each channel's range is "
    "measured.  [default: f32; with a text, int8]",
)
@click.option(
    "--vision",
    metavar="PRESET|FILE",
    help="Format of the vision tower's weights, where CHECKPOINT has one: as --quant. It becomes a file of its own, "
    "mmproj-OUT.gguf, or in an ONNX folder vision.onnx.  [default: q8_0, for ONNX int8; with --quant f32, f16 or "
    "bf16, the same]",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Allow a CHECKPOINT that is quantized already. What was lost then and what is lost now add up.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def export(checkpoint: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write CHECKPOINT to OUT: a GGUF file, or a folder with an ONNX graph.

    CHECKPOINT is a folder as downloaded from the hub or saved by transformers, or a GGUF
    file that is not quantized; for ONNX it may be, and its weights then stay what they are. With --requantize it may
    be for GGUF, too. OUT may be a folder; a GGUF file is then named after the checkpoint. `bezel verify` compares what
    was written with its source.

    \b
    Examples:
      bezel export gemma-2-2b-it/ gemma-2-2b-it.gguf
      bezel export gemma-2-2b-it/ . --quant q4_0
      bezel export gemma-2-2b-it/ small.gguf --quant q4_0 --embedding q4_0
      bezel export gemma-2-2b-it/ better.gguf --quant q4_0 --calibration text.txt
      bezel export gemma-3-4b-it/ sees.gguf --quant q4_0 --vision q4_0 --calibration-images photos/
      bezel export gemma-3-270m/ best.gguf --quant q4_0 --calibration text.txt --tune
      bezel export gemma-2-2b-it/ best.gguf --quant q4_0 --calibration text.txt --tune-scales --tune-steps 100
      bezel export gemma-2-2b-it/ mine.gguf --quant recipe.json
      bezel export gemma-2-2b-it/ best.gguf --size 4.55bpw --sensitivity sens.json
      bezel export gemma-2-2b-it/ gemma-onnx/ --format onnx --quant int4
      bezel export gemma-2-2b-it/ gemma-onnx/ --format onnx --quant int4 --kv int8 --calibration text.txt
      bezel export small.gguf gemma-onnx/ --format onnx
      bezel export gemma-2-2b-it/ gemma-js/ --target transformers --quant int4
      bezel export gemma3-270m web/ --target web --quant int4 --requantize
      bezel export gemma-q8_0.gguf gemma-q4_0.gguf --quant q4_0 --requantize

    A recipe file is JSON; the first rule that matches a tensor decides. A rule asks for a role (a name or a list), for
    layers and for a regular expression that the tensor's name in GGUF matches, or for some of these:

    \b
      {"bezel_recipe": 1, "default": "iq4_xs", "rules": [
        {"role": "token_embd", "format": "q6_k"},
        {"role": ["attn_v", "ffn_down"], "layers": "0-3, 25", "format": "q5_k"},
        {"tensor": "blk\\\\.2\\\\..*", "format": "q8_0"}]}
    """
    options["container"] = options["container"] or ("onnx" if options["runtime"] else "gguf")
    asked = _Options(**options)
    asked.check()
    with progress_bar(out.name) as progress:
        try:
            summary = (_export_folder if asked.container == "onnx" else _export_file)(checkpoint, out, asked, progress)
        except KeyboardInterrupt:
            goes_on = asked.calibration is not None and asked.container == "gguf"
            where = "; the same command goes on where this one was" if goes_on else ""
            click.echo(f"\ncancelled{where}", err=True)
            raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
    else:
        print_summary(summary)


def _export_folder(path: Path, out: Path, asked: _Options, progress: Callable[[int, int], None]) -> ExportSummary:
    try:
        from ..onnx.export import export_folder
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise InvalidRequest("--format onnx needs the package onnx: pip install 'bezel-lm[onnx]'") from None
    return export_folder(
        path,
        out,
        asked.quant,
        asked.embedding,
        asked.runtime or "onnxruntime",
        progress,
        asked.force,
        asked.kv or ("int8" if asked.calibration else "f32"),
        asked.calibration,
        asked.requantize,
        asked.vision,
    )


def _export_file(path: Path, out: Path, asked: _Options, progress: Callable[[int, int], None]) -> ExportSummary:
    from ...runtime.files.models import eye_path, own_eye
    from ..calibration.rounding import export_calibrated
    from ..gguf.vision import export_vision, vision_recipe
    from ..gguf.writer import export_gguf
    from ..sources.opening import open_checkpoint

    with open_checkpoint(path, asked.requantize) as source:
        recipe = asked.recipe(source)
        vision = vision_recipe(source, asked.vision, recipe)
        if vision is None and asked.calibration_images:
            raise InvalidRequest(f"--calibration-images: {path} has no vision tower")
        if out.is_dir():
            name, suffix = (re.sub(r"[^\w.-]+", "-", text).strip("-.") for text in (source.name, recipe.name))
            out = out / f"{name or 'model'}-{suffix or 'recipe'}.gguf"
        with export_vision(source, out, vision, progress, asked.force, asked.calibration_images) as seen:
            if asked.calibration is None:
                summary = export_gguf(source, out, recipe, progress=progress, force=asked.force)
            else:
                summary = export_calibrated(
                    source,
                    out,
                    recipe,
                    None,
                    asked.calibration,
                    progress,
                    asked.force,
                    asked.calibration_tokens,
                    (asked.tune_steps or _TUNE_STEPS) if asked.tuned else 0,
                    asked.tune,
                    _warn,
                )
        left = []
        if (eye := own_eye(path)) is not None:
            left = [f"{eye.name} is not read: a copy of it as {eye_path(out).name} fits"]
        return replace(summary, vision=seen, warnings=[*summary.warnings, *left])


def _warn(text: str) -> None:
    say_over_progress(printable(f"warning: {text}"))


def print_summary(summary: ExportSummary) -> None:
    """For people."""
    formats = ", ".join(f"{count} × {name}" for name, count in summary.formats.items())
    click.echo(f"{summary.path}: {summary.file_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s")
    click.echo(f"  {summary.weights / 1e6:,.1f} million weights at {summary.bits_per_weight:.2f} bits: {formats}")
    if summary.kept_exactly > 0.1:
        click.echo(
            f"  {summary.kept_exactly:.2%} of the weights in q4_0 are exactly the source's: they lie on lattices of 16 "
            "values, as quantization-aware training leaves them"
        )
    if summary.divergence is not None and summary.divergence[1] < summary.divergence[0]:
        before, after = summary.divergence
        click.echo(
            f"  tuned: {before:.3g} → {after:.3g} nats a token from the exact model, on text that it was tuned on"
        )
    if summary.vision is not None:
        print_summary(summary.vision)
    for fallback in summary.fallbacks:
        click.echo(f"  fallback: {fallback}")
    for warning in summary.warnings:
        _warn(warning)
