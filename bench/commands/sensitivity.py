"""The command `bezel sensitivity`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ...runtime.commands.model_path import MODEL
from ...runtime.files.atomic import atomic
from ..loss.passages import CHUNK
from ..loss.sensitivity import BY, CHUNKS
from ..loss.sensitivity import sensitivity as run
from ..loss.tables import show_sensitivity
from .shared import (
    Output,
    goes_on,
    html_option,
    json_option,
    progress_line,
    scheduler_option,
    spread_by,
    state_option,
    texts_option,
)

_FILE = Output(b'{\n "bezel_sensitivity": 1')


@click.command()
@click.argument("model", type=MODEL)
@texts_option
@click.option(
    "--formats",
    metavar="FORMAT[,FORMAT…]",
    required=True,
    help="What tensors are rounded to, such as q4_k,iq4_xs,q5_k,q6_k.",
)
@click.option("--by", type=click.Choice(BY), default=BY[0], show_default=True, help="What is rounded at a time.")
@click.option("--chunk", type=int, help=f"Tokens in a chunk, whose second half is scored.  [default: {CHUNK}]")
@click.option(
    "--chunks",
    "limit",
    type=click.IntRange(min=1),
    default=CHUNKS,
    show_default=True,
    help="Read so many of each text.",
)
@scheduler_option
@state_option
@click.option("-o", "--out", type=_FILE, help="Write the file for an export; an earlier one is replaced.")
@html_option
@json_option
def sensitivity(
    model: Path,
    texts: tuple[Path, ...],
    formats: str,
    by: str,
    chunk: int | None,
    limit: int,
    scheduler: str | None,
    states: Path,
    out: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure which tensors suffer from quantization: MODEL's are rounded one by one, everything else exact.

    MODEL is a checkpoint folder or a GGUF file that is not quantized, which is computed with in float32 (4 bytes of
    memory a weight). The file that --out names is what `bezel export --size` finds the best mix of formats by; it may
    hold as many formats as that should choose from.

    What is computed is kept for a month. Ctrl-C stops, and the same command goes on from there.

    --scheduler has the tensors rounded by dask's workers on any number of machines, which read the model at the same
    path (pip install 'bezel-lm[cluster]'). Each worker takes all cores that it may use.

    \b
    Examples:
      bezel sensitivity gemma-2-2b/ --text wiki.test.txt --formats q4_k,iq4_xs,q5_k,q6_k -o sens.json
      bezel export gemma-2-2b/ best.gguf --size 4.55bpw --sensitivity sens.json
      bezel sensitivity gemma-2-2b/ --text wiki.test.txt --formats q4_0 --by role --html report.html
      bezel sensitivity gemma-2-2b/ --text wiki.test.txt --formats q4_k --scheduler tcp://desk1:8786
    """
    with goes_on(), spread_by(scheduler) as spread:
        result = run(
            model,
            texts,
            formats.split(","),
            by=by,
            chunk=chunk,
            limit=limit,
            states=states,
            progress=progress_line("rounding"),
            spread=spread,
        )
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        show_sensitivity(result)
    if out:
        with atomic(out, _FILE.replaces) as file:
            file.write((json.dumps(result.to_json(), indent=1) + "\n").encode())
        click.echo(f"written to {out}", err=True)
    if html:
        from ..report.sensitivity import write_report

        write_report(result, html)
        click.echo(f"written to {html}", err=True)
