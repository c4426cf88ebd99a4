"""Exported models in the runtimes of others: `python -m bezel.bench.speed.elsewhere RUNTIME=MODEL …`.

Round by round, A B C A B C, each is opened in a process of its own, while none of the others is there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click

from ...runtime import _native
from ...runtime.commands.model_path import MODEL
from ...runtime.errors import BezelError
from ...runtime.files.model_file import open_model
from . import machine
from .graphs import GRAPH_RUNNERS
from .runner import NotMeasured
from .speed import PAUSE, TokenCost
from .worker import Worker, in_python

NODE, GENAI = "onnxruntime-node", "onnxruntime-genai"
RUNTIMES = ("bezel", *GRAPH_RUNNERS, NODE, GENAI)
PROMPTS = (128, 512)
HELD = (16, 128, 512)  # tokens before those that are decoded
STEPS = 16
_CONTEXT = 1024
_COLUMNS = {
    "load, s": ("load_s", 2),
    "peak MB": ("peak_mb", 0),
    **{f"prompt {n}, tokens/s": (f"prefill_{n}_tokens_per_s", 0) for n in PROMPTS},
    **{f"ms a token after {n}": (f"decode_{n}_ms", 1) for n in HELD},
}

Figures = dict[str, float]


def take(worker: Worker) -> Figures:
    """One round of one model, in the order of the columns; `load_s` goes from opening to the logits of one token."""
    found = {"load_s": worker.open() + worker.prefill(1)}
    for held in HELD:
        worker.reset()
        seconds = worker.prefill(held)
        if held in PROMPTS:
            found[f"prefill_{held}_tokens_per_s"] = held / seconds
        found[f"decode_{held}_ms"] = worker.decode(STEPS) / STEPS * 1e3
    return found | {"peak_mb": (worker.memory()["peak_bytes"] or 0) / 1e6}


def measure(
    starts: Mapping[str, Callable[[], Worker]], rounds: int, between: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Medians of each model and what they are made of, or why there are none.

    `between` is called with a line to show before each is opened.
    """
    taken: dict[str, list[Figures]] = {name: [] for name in starts}
    runs: dict[str, dict[str, Any]] = {name: {} for name in starts}
    for turn in range(rounds):
        for name in [name for name, run in runs.items() if "not_measured" not in run]:
            between(f"round {turn + 1} of {rounds}: {name}")
            try:
                with starts[name]() as worker:
                    taken[name].append(take(worker))
                    runs[name] = worker.about()
            except NotMeasured as error:
                runs[name] = {"not_measured": str(error)}
    for name, run in runs.items():
        if "not_measured" not in run:
            run |= {figure: median(found[figure] for found in taken[name]) for figure in taken[name][0]}
            run["each_round"] = taken[name]
    return runs


def _start(runtime: str, model: Path, threads: int, python: str, modules: Path) -> Callable[[], Worker]:
    options: dict[str, Any] = {"model": str(model.resolve()), "context": _CONTEXT, "threads": threads}
    if runtime == NODE:
        program = str(Path(__file__).with_name("rings.mjs"))
        return partial(Worker, runtime, ["node", program], modules=str(modules.resolve()), **options)
    if runtime == "bezel":
        with open_model(model) as opened:
            options |= {"engine": opened.engines[0], "kv": opened.kv_types(opened.engines[0])[0]}
    return partial(Worker, runtime, in_python(python), **options)


def _shares(model: Path, run: Mapping[str, Any], bandwidth: float) -> Figures:
    """Of the memory's bandwidth, what steps take; of models that bezel opens, and so knows what a step must read."""
    try:
        with open_model(model) as opened:
            cost = TokenCost.of(opened)
    except BezelError:
        return {}
    rates = {held: cost.decode_bytes(held, run["kv"]) / run[f"decode_{held}_ms"] * 1e3 for held in HELD}
    return {f"decode_{held}_share_of_bandwidth": rate / bandwidth for held, rate in rates.items()}


def _show(result: Mapping[str, Any]) -> None:
    peaks = result["peaks"]
    click.echo(
        f"{result['machine']['cpu']}, {result['threads']} threads, medians of {result['rounds']} rounds; "
        f"reads {peaks['memory_read_bytes_per_s'] / 1e9:.1f} GB/s of memory"
    )
    click.echo(f"{'':<44}" + "".join(f"{title:>{len(title) + 3}}" for title in [*_COLUMNS, "of bandwidth"]))
    for name, run in result["runs"].items():
        if "not_measured" in run:
            click.echo(f"{name:<44}   not measured: {run['not_measured']}")
            continue
        cells = (f"{run[key]:{len(title) + 3},.{places}f}" for title, (key, places) in _COLUMNS.items())
        share = run.get(f"decode_{HELD[1]}_share_of_bandwidth")
        click.echo(f"{name:<44}{''.join(cells)}{'–' if share is None else f'{share:.0%}':>15}")


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str, Path]]:
    """Of each RUNTIME=PATH that itself, its runtime and its path, where there is something; or a model of that name."""
    pairs = []
    for value in values:
        runtime, _, path = value.partition("=")
        if runtime not in RUNTIMES:
            raise click.BadParameter(f"found {value!r}, expected RUNTIME=PATH with one of {', '.join(RUNTIMES)}")
        found = MODEL.convert(path, param, ctx)
        if not found.exists():
            raise click.BadParameter(f"{value}: there is nothing at {found}")
        pairs.append((value, runtime, found))
    return pairs


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="RUNTIME=MODEL...", callback=_pairs)
@click.option("--threads", type=click.IntRange(min=1), default=_native.default_threads(), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="RUNTIME=PATH",
    callback=_pairs,
    help="The Python of an environment that has RUNTIME and bezel.",
)
@click.option(
    "--node",
    "modules",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("tests/node"),
    show_default=True,
    help="The folder whose node_modules has onnxruntime-node.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON only.")
def elsewhere(
    models: list[tuple[str, str, Path]],
    threads: int,
    rounds: int,
    pythons: list[tuple[str, str, Path]],
    modules: Path,
    as_json: bool,
) -> None:
    """Time models: bezel runs whatever it opens, onnxruntime, openvino and onnxruntime-node the target `portable`,
    optimum the target `transformers` or its own export, openvino-own the export of optimum-intel, and
    onnxruntime-genai that of its builder.
    """
    paths = {name: path for name, _, path in models}
    interpreters = {runtime: str(path.absolute()) for _, runtime, path in pythons}
    starts = {
        name: _start(runtime, path, threads, interpreters.get(runtime, sys.executable), modules)
        for name, runtime, path in models
    }
    probes = machine.Machine(machine.largest_file(models[0][2]), threads)

    def between(line: str) -> None:
        click.echo(line, err=True)
        probes.probe()
        time.sleep(PAUSE)

    result: dict[str, Any] = {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine.describe(),
        "threads": threads,
        "rounds": rounds,
        "runs": measure(starts, rounds, between),
    }
    result["peaks"] = {name: median(values) for name, values in probes.samples.items()}
    for name, run in result["runs"].items():
        if "not_measured" not in run:
            run |= _shares(paths[name], run, result["peaks"]["memory_read_bytes_per_s"])
    if as_json:
        click.echo(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    elsewhere()
