"""How long a picture takes to the first token, next to llama.cpp: `python -m bezel.bench.pictures.race MODEL.gguf`.

MODEL.gguf and its eye beside it are read by both, turn by turn, in processes of their own. A file that is not there is
written first: Gemma 3 4B in q4_0 with its eye in q8_0, of random weights.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click

from ...runtime import _native
from ...runtime.files.models import eye_path
from ...runtime.model.vision import GEMMA3, VisionConfig
from ..speed.worker import Worker
from ..synthetic import write_eye, write_gguf

# SigLIP so400m as Gemma 3 4B has it, its feed-forward widened to whole blocks as `bezel export` does.
EYE = VisionConfig(GEMMA3, 896, 14, 1152, 4320, 27, 16, 1e-6, 4, 2560)
_CONTEXT = 1024


@click.command()
@click.argument("model", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=_native.default_threads())
def race(model: Path, rounds: int, threads: int) -> None:
    """Medians of `rounds` pictures for each program, and their ratio."""
    if not model.exists():
        click.echo(f"writing {model} and {eye_path(model).name}")
        write_gguf(model, "gemma-3-4b", "q4_0")
        write_eye(eye_path(model), EYE, "q8_0")
    options = {"model": str(model), "context": _CONTEXT, "threads": threads}
    pool = _native.ThreadPool(threads)
    with (
        Worker("bezel", engine="native", kv="f16", **options) as ours,
        Worker("llama.cpp", flash_attention=True, **options) as theirs,
    ):
        workers, times = {"bezel": ours, "llama.cpp": theirs}, dict[str, list[float]]()
        for turn in range(rounds):
            for name, worker in workers.items():
                seconds, positions = worker.see(turn)
                times.setdefault(name, []).append(seconds)
                click.echo(f"{name}: {seconds:.1f} s for {positions} positions")
        for name, worker in workers.items():
            peak = (worker.memory()["peak_bytes"] or 0) / 1e6
            click.echo(
                f"{name} {worker.about()['version']}: median {statistics.median(times[name]):.1f} s, {peak:,.0f} MB"
            )
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    click.echo(f"{threads} threads: bezel is {ratio:.2f} times as fast")
    peaks = [peak(pool, 1.0) / 1e9 for peak in (_native.int8_peak, _native.float_peak)]
    click.echo(f"peak of this machine just now: int8 {peaks[0]:.0f}, float {peaks[1]:.0f} billion operations a second")


if __name__ == "__main__":
    race()
