"""The command `bezel write`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import click

from ..files.atomic import atomic, check_new
from ..files.models import size_text
from .model_path import MODEL


@click.command()
@click.argument("model", type=MODEL)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(min=1), default=51_200, show_default=True, help="How much to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same texts.")
@click.option("--threads", type=int, help="Threads to compute with.  [default: the performance cores]")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def write(model: Path, out: Path, tokens: int, seed: int, threads: int | None, force: bool) -> None:
    """Let MODEL, a GGUF file, write texts from nothing into the file OUT, as likely as it finds them.

    They are of the kinds that it was trained on, code and other languages among them: a text to calibrate on that
    is about everything, alone or behind one of your own. Nothing in it is true.

    \b
    Examples:
      bezel write gemma-3-270m-q8_0.gguf own.txt
      cat mine.txt own.txt > both.txt
      bezel export gemma-3-270m/ small.gguf --quant q4_0 --calibration both.txt
    """
    from ..api import load
    from ..unprompted import unprompted

    check_new(out, force)
    shown = click.progressbar(length=tokens, label=out.name, file=sys.stderr) if sys.stderr.isatty() else nullcontext()
    try:
        with load(model, threads=threads) as opened, atomic(out, _is_text) as file, shown as bar:
            texts = unprompted(opened, tokens, seed, lambda done, _: bar.update(done - bar.pos) if bar else None)
            file.write("\n\n".join(texts).encode() + b"\n")
    except KeyboardInterrupt:
        click.echo("\ncancelled; nothing was written", err=True)
        raise SystemExit(130) from None
    click.echo(f"{out}: {size_text(out.stat().st_size)}, {len(texts)} texts")


def _is_text(old: Path) -> bool:
    """What --force replaces; a model, which may well be named by mistake, begins with zeros among its bytes."""
    with old.open("rb") as file:
        return b"\0" not in file.read(1024)
