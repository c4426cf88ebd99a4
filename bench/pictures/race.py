"""How long a picture takes to the first token, next to llama.cpp: `python -m bezel.bench.pictures.race MODEL.gguf`.

MODEL.gguf and its eye beside it are read by both, turn by turn, in processes of their own. A file that is not there is
written first: Gemma 3 4B in q4_0 with its eye in q8_0, of random weights.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import click

from ...runtime import _native, load
from ...runtime.files.models import eye_path
from ...runtime.model.vision import GEMMA3, VisionConfig, vision_specs
from ..speed.profiling import profile_picture
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
    _show_shares(model, threads)


def _show_shares(model: Path, threads: int) -> None:
    """How much of the machine's peaks, measured just before, the tower's products and its attention reach."""
    pool = _native.ThreadPool(threads)
    int8, floats = _native.int8_peak(pool, 1.0), _native.float_peak(pool, 1.0)
    with load(model, context=_CONTEXT, threads=threads) as opened:
        assert opened.eye is not None
        config, rows = opened.eye.config, {row.op: row for row in profile_picture(opened.eye)}
    products = sum(math.prod(spec.shape) for spec in vision_specs(config) if spec.is_matrix) * 2 * config.n_patches
    attention = 4 * config.n_layers * config.hidden_size * config.n_patches**2
    for what, op, operations, kind, peak in (
        ("products", "linear", products, "int8", int8),
        ("attention", "attend_all", attention, "float", floats),
    ):
        rate = operations / rows[op].seconds
        click.echo(
            f"the tower's {what}: {rows[op].seconds:.1f} s, {rate / 1e9:.0f} billion operations a second, "
            f"{rate / peak:.0%} of the {kind} peak"
        )


if __name__ == "__main__":
    race()
