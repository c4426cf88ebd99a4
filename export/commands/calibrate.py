"""The command `bezel calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from ...runtime.commands.model_path import MODEL
from ...runtime.files.atomic import check_new
from .progress import progress_bar


@click.command()
@click.argument("checkpoint", type=MODEL)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="What the model is to be good at, UTF-8; twenty thousand words are enough.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="How much of the text is used, spread evenly over it.  "
    "[default: 10240, which take Gemma 2 2B about 40 minutes on two cores; more for smaller models, up to 102400]",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def calibrate(checkpoint: Path, text: Path, tokens: int | None, out: Path, force: bool) -> None:
    """Gather what a text sends through the linears of CHECKPOINT, for `bezel export --calibration`.

    One file serves every format. It takes 4 bytes for each pair of inputs of a linear, 10 GB for Gemma 2 2B; for one
    export, give the text itself to `bezel export`. Broken off, the same command goes on where it was.

    \b
    Example:
      bezel calibrate gemma-2-2b-it/ --text text.txt -o gemma-2-2b-it.calib
    """
    from ..calibration.moments import calibrate as gather
    from ..calibration.moments import read_text
    from ..sources.opening import open_checkpoint

    check_new(out, force)
    with open_checkpoint(checkpoint) as source, progress_bar(out.name) as progress:
        try:
            origin = gather(source, read_text(source, text, tokens), out, progress)
        except KeyboardInterrupt:
            click.echo("\ncancelled; the same command goes on where this one was", err=True)
            raise SystemExit(130) from None
    click.echo(f"{out}: {out.stat().st_size / 1e6:,.1f} MB from {origin.tokens:,} tokens")
