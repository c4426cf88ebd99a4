"""The command `bezel demo`: the whole path on the bundled model."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from ...export.gguf.writer import export_gguf
from ...export.sources.opening import open_checkpoint
from ...runtime.api import Model, load
from ...runtime.cache.caches import LARGEST_CHUNK
from ...runtime.cache.sizes import cache_sizes
from ...runtime.engines import bytes_for
from ...runtime.errors import InvalidRequest
from ...runtime.session import Session
from ...runtime.text.generation import Generation
from ...runtime.text.sampling import Sampling
from .. import DEMO

OPENING = "Once upon a time there was a king who had three sons,"
KIB = 1 << 10


@click.command()
@click.option("--seed", type=int, default=2, show_default=True, help="Another seed tells another story.")
@click.option(
    "--keep", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Keep the model, to try others on."
)
@click.option("--picture", is_flag=True, help="The bundled model that sees, asked about a drawn picture, instead.")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="With --picture: how many pictures of each kind its accuracy is measured on.",
)
def demo(seed: int, keep: Path | None, picture: bool, trials: int) -> None:
    """Export the bundled model, tell a story with it, and show that the ring cache is exact.

    The model is tiny (4 million weights, trained on fairy tales): its grammar is sound and its sense is not.

    \b
    Examples:
      bezel demo --seed 7
      bezel demo --keep fairy.gguf
      bezel demo --picture --keep shapes.gguf
    """
    if keep is not None and keep.exists():
        raise InvalidRequest(f"{keep}: it exists; choose another name")
    if picture:
        from ..pictures.demo import show

        show(seed, keep, trials)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "fairy.gguf"
        _step("Export to Q8_0")
        with open_checkpoint(DEMO) as checkpoint:
            export_gguf(checkpoint, file, "q8_0")
        source = sum(path.stat().st_size for path in DEMO.glob("*.safetensors"))
        click.echo(
            f"{source / KIB:,.0f} KiB of bfloat16 became {file.stat().st_size / KIB:,.0f} KiB, tokenizer included."
        )

        model = load(file, kv="f16")
        window = min(layer.window for layer in model.config.layers if layer.window)
        length = 3 * window + window // 2
        _step(f"Tell a story longer than three windows of {window} tokens")
        session = model.session()
        generation = Generation(
            session,
            model.prompt_ids(OPENING, raw=True),
            Sampling(temperature=0.8, seed=seed),
            max_tokens=length,
            stop_ids=frozenset(),
        )
        click.echo(OPENING, nl=False)
        for piece in generation:
            click.echo(piece, nl=False)
        click.echo()

        _step("Is the ring exact?")
        _compare(model, session)
        _sizes(model)
        model.file.close()  # Windows deletes no open file
    following = f"bezel chat {keep}, bezel serve {keep}" if keep else "bezel export --help, bezel run --help"
    click.echo(f"\nDone in {time.perf_counter() - started:.1f} s. Next: {following}")


def _compare(model: Model, told: Session) -> None:
    """The told story again, through rings and through full caches."""
    full = Session(model, ring=False)
    full.prefill(told.ids[:-1])
    ring = model.session()
    ring.prefill(told.ids[:-1])
    last = told.ids[-1]
    difference = np.abs(ring.step(last) - full.step(last)).max()
    click.echo(
        f"After {ring.position} tokens the largest difference between the logits of ring and full caches is "
        f"{difference:g}: {'equal to the bit' if difference == 0 else 'NOT EXACT'}."
    )


def _sizes(model: Model) -> None:
    contexts = (512, 1024, model.config.context_length)
    rows = [cache_sizes(model.config.layers, n, model.kv, LARGEST_CHUNK, bytes_for("native")) for n in contexts]
    click.echo("\nKeys and values by context, with rings and with full caches:")
    for row in rows:
        click.echo(f"{row['context']:8} {row['total'] / KIB:9,.0f} KiB {row['full'] / KIB:7,.0f} KiB")


def _step(title: str) -> None:
    click.echo("\n" + click.style(title, bold=True))
