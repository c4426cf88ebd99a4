"""The command `bezel measure`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from ...export.gguf.receipt import stamp
from ...runtime.api import ACTIVATIONS
from ...runtime.cache.store import KV_TYPES
from ...runtime.files.atomic import check_output
from ...runtime.files.gguf_model import GGUFModel
from ..loss.measure import measure as run
from ..loss.passages import CHUNK, PROTOCOLS
from ..loss.result import Measurement
from ..loss.subjects import Spec, parse_spec
from ..loss.tables import show
from .shared import (
    candidates_argument,
    goes_on,
    html_option,
    json_option,
    progress_line,
    reference_option,
    scheduler_option,
    spread_by,
    state_option,
    texts_option,
    threads_option,
)


@click.command()
@candidates_argument
@reference_option
@texts_option
@click.option(
    "--image",
    "pictures",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="With --protocol chat: ask every line about this picture; may be given several times.",
)
@click.option("--engine", help="What runs the candidates.  [default: native for GGUF, ort for ONNX]")
@click.option(
    "--kv",
    type=click.Choice(KV_TYPES),
    default="f16",
    show_default=True,
    help="Their KV cache storage; with ort the export's.",
)
@click.option(
    "--activations", type=click.Choice(ACTIVATIONS), default="int8", show_default=True, help="Theirs, native."
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="chunks",
    show_default=True,
    help="chunks: each read afresh, its second half scored. long: read across windows, every position scored. "
    "written: the second half of each chunk is what the reference writes. chat: each line is a user's message, and the "
    "reference's answer is scored.",
)
@click.option("--chunk", type=int, help=f"Tokens in a chunk.  [default: {CHUNK}; long: all that the models take]")
@click.option("--chunks", "limit", type=click.IntRange(min=1), help="Read so many of each text only.  [default: all]")
@click.option("--effects", is_flag=True, help="Measure weights, activations, keys and values, and the eye apart, too.")
@threads_option
@scheduler_option
@state_option
@html_option
@click.option("--receipt", is_flag=True, help="Write the loss into the candidates' GGUF files, for `bezel inspect`.")
@json_option
def measure(
    candidates: tuple[str, ...],
    reference: str,
    texts: tuple[Path, ...],
    pictures: tuple[Path, ...],
    engine: str | None,
    kv: str,
    activations: str,
    protocol: str,
    chunk: int | None,
    limit: int | None,
    effects: bool,
    threads: int | None,
    scheduler: str | None,
    states: Path,
    html: Path | None,
    receipt: bool,
    as_json: bool,
) -> None:
    """Measure what quantization cost: compare each CANDIDATE with the reference on the same texts.

    A model is a GGUF file, an ONNX folder or a checkpoint folder, which is computed with in float32 (4 bytes of
    memory a weight). It may say how it is run: model.gguf@kv=int8,activations=f32 with the keys engine, kv,
    activations, ring (on, off), name and vision, the file that it sees pictures with (that beside it, unless it says
    otherwise). The reference is exact unless it says otherwise: float32 activations, keys and values.

    What is computed is kept for a month. Ctrl-C stops, and the same command goes on from there. `bezel sensitivity`
    says which tensors suffer, `bezel tasks` how well models answer questions.

    --scheduler gives the passages to dask's workers on any number of machines, which read the models at the same paths
    (pip install 'bezel-lm[cluster]'). --threads are then those of each worker.

    \b
    Examples:
      bezel measure gemma-q4_0.gguf --reference gemma-2-2b/ --text wiki.test.txt
      bezel measure a.gguf b.gguf --reference gemma-f16.gguf --text wiki.test.txt --chunks 100 --html report.html
      bezel measure a.gguf@kv=int8 a.gguf@kv=f16 --reference a.gguf --text book.txt --protocol long
      bezel measure a.gguf --reference gemma-2-2b-it/ --text questions.txt --protocol chat --chunks 50
      bezel measure a.gguf --reference gemma-f16.gguf --text wiki.test.txt --effects --json
      bezel measure a.gguf --reference gemma-3-4b-it/ --protocol chat --text asked.txt --image cat.jpg --effects
      bezel measure a.gguf --reference gemma-f16.gguf --text wiki.test.txt --receipt
      bezel measure a.gguf --reference gemma-f16.gguf --text wiki.test.txt --scheduler tcp://desk1:8786
    """
    default = Spec(Path(), engine, kv, activations)
    specs = [parse_spec(text, default) for text in candidates]
    if receipt:
        _check_receipts(specs)
    with goes_on(), spread_by(scheduler) as spread:
        result = run(
            specs,
            parse_spec(reference, Spec(Path(), None, "f32", "f32")),
            texts,
            pictures=pictures,
            protocol=protocol,
            chunk=chunk,
            limit=limit,
            effects=effects,
            threads=threads,
            states=states,
            progress=progress_line("measuring"),
            spread=spread,
        )
    result = replace(result, command=f"bezel {shlex.join(sys.argv[1:])}")
    if receipt:
        _stamp(specs, result)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        show(result)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    if html:
        from ..report.measurement import write_report

        write_report(result, html)
        click.echo(f"written to {html}", err=True)


def _check_receipts(specs: Sequence[Spec]) -> None:
    """Before hours of measuring rather than after them."""
    for spec in specs:
        GGUFModel(spec.path).close()
        check_output(spec.path)


def _stamp(specs: Sequence[Spec], result: Measurement) -> None:
    """A file that was measured in several settings gets the receipt of the first."""
    for spec, receipt in reversed([*zip(specs, result.receipts(), strict=True)]):
        stamp(spec.path, receipt)
