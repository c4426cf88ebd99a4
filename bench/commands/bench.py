"""The command `bezel bench`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click

from ...quant.recipes import PRESETS
from ...runtime import _native
from ...runtime.api import load
from ...runtime.cache.store import KV_TYPES
from ...runtime.commands.console import CLEARED
from ...runtime.commands.model_path import MODEL
from ...runtime.engines import ENGINES
from ...runtime.errors import InvalidRequest
from ...runtime.files.model_file import ModelFile, open_model
from ...runtime.files.user_cache import cache_folder
from ..speed import machine
from ..speed.peers import MODULES, OWN_FILE, SETTINGS
from ..speed.profiling import profile
from ..speed.speed import Race, TokenCost, comparisons, figures
from ..speed.tables import show_profile, show_speed
from ..speed.worker import Worker
from ..synthetic import SHAPES, write_gguf

_CONTEXT = 8192
_PROFILE_HELD, _PROFILE_STEPS = 512, 32


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead of MODEL.")
@click.option("--quant", type=click.Choice(PRESETS), default="q4_0", show_default=True, help="Their format.")
@click.option("--embedding", type=click.Choice(PRESETS), help="Their embedding's format, as `bezel export` has it.")
@click.option(
    "--engine", type=click.Choice(ENGINES), help="Which of bezel's.  [default: native or ort, as MODEL needs]"
)
@click.option("--kv", type=click.Choice(KV_TYPES), help="KV cache storage.  [default: f16; with ort the export's]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: the performance cores]")
@click.option(
    "--context",
    type=click.IntRange(min=16),
    help=f"Most tokens to hold; small ones are quick.  [default: {_CONTEXT}, or what the model was made for]",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of everything.")
@click.option("--vs", type=click.Choice(list(SETTINGS)), help="Measure this program too, turn by turn.")
@click.option("--peer-model", type=MODEL, help="What it measures on.  [default: MODEL]")
@click.option("--profile", "as_profile", is_flag=True, help="Show where a token's time goes instead.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Folder for the result.  [default: bench/results, or a cache]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
def bench(
    model: Path | None,
    shape: str | None,
    quant: str,
    embedding: str | None,
    engine: str | None,
    kv: str | None,
    threads: int | None,
    context: int | None,
    repeats: int,
    vs: str | None,
    peer_model: Path | None,
    as_profile: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    """Measure the speed and the memory of MODEL, a GGUF file or an exported ONNX folder, on this computer.

    Prints a table, or with --json one line, which is kept in bench/results if there is such a folder, else with the
    user's cached files. The whole bench takes minutes, and more with a long --context; --context 1024 is quick.

    \b
    Examples:
      bezel bench gemma.gguf
      bezel bench gemma.gguf --vs llama.cpp --kv int8
      bezel bench --shape gemma-2-2b --quant q4_0 --context 1024
      bezel bench --shape gemma-3-270m --quant q4_k_m --context 30000 --vs llama.cpp
      bezel bench gemma.gguf --profile
      bezel bench gemma-onnx/ --vs onnxruntime-genai --peer-model genai/
    """
    if (model is None) == (shape is None):
        raise click.UsageError("Give either MODEL or --shape.")
    if peer_model is not None and vs is None:
        raise click.UsageError("--peer-model goes with --vs.")
    if vs in OWN_FILE and peer_model is None:
        raise click.UsageError(f"--vs {vs} needs --peer-model, the folder that its own exporter made.")
    if vs is not None and find_spec(MODULES[vs]) is None:
        raise InvalidRequest(f"--vs {vs}: it is not installed: pip install 'bezel-lm[bench]'")
    progress = _show if sys.stderr.isatty() else _hide
    try:
        file = model or _random_model(str(shape), quant, embedding, progress)
        with open_model(file) as opened:
            if engine is not None and engine not in opened.engines:
                raise InvalidRequest(f"--engine: found {engine}, expected {' or '.join(opened.engines)} for {file}")
            engine = engine or opened.engines[0]
            facts = _facts(
                opened, engine, kv or opened.kv_types(engine)[0], threads or _native.default_threads(), context
            )
            cost = TokenCost.of(opened)
        if as_profile:
            if engine == "ort":
                raise InvalidRequest("--profile: found the engine ort, expected native or reference")
            _profile(facts, as_json, progress)
            return
        result = _measure(facts, cost, repeats, vs, peer_model, progress)
    except KeyboardInterrupt:
        progress("")
        click.echo("cancelled", err=True)
        raise SystemExit(130) from None
    progress("")
    record = facts | result
    if not as_json:
        show_speed(record)
    else:
        click.echo(json.dumps(record))
    _keep(record, save)


def _random_model(shape: str, quant: str, embedding: str | None, progress: Callable[[str], None]) -> Path:
    path = cache_folder() / f"random-{shape}-{quant}{f'-{embedding}' if embedding else ''}.gguf"
    if not path.exists():
        progress(f"writing {path}")
        write_gguf(path, shape, quant, embedding)
    return path


def _facts(file: ModelFile, engine: str, kv: str, threads: int, context: int | None) -> dict[str, Any]:
    """What is measured, and how."""
    longest = file.config().context_length
    if context is not None and context > longest:
        raise InvalidRequest(f"--context: found {context}, expected up to {longest}, what {file.path} was made for")
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": {
            "file": str(file.path),
            "name": file.metadata.get("general.name"),
            "file_bytes": file.file_bytes,
            "tensor_bytes": sum(info.nbytes for info in file.tensors.values()),
        },
        "engine": engine,
        "kv": kv,
        "threads": threads,
        "context": min(_CONTEXT, longest) if context is None else context,
        "machine": machine.describe(),
    }


def _measure(
    facts: Mapping[str, Any],
    cost: TokenCost,
    repeats: int,
    vs: str | None,
    peer_model: Path | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    path, threads, context = facts["model"]["file"], facts["threads"], facts["context"]
    common = {"threads": threads, "context": context}
    starts = {"bezel": partial(Worker, "bezel", model=path, engine=facts["engine"], kv=facts["kv"], **common)}
    settings = {f"{vs}, {setting}": options for setting, options in SETTINGS[vs].items()} if vs else {}
    for name, options in settings.items():
        starts[name] = partial(Worker, str(vs), model=str(peer_model or path), **options, **common)
    progress("reading the file")
    probes = machine.Machine(machine.largest_file(Path(path)), threads)
    samples = Race(starts, context, probe=probes.probe, progress=progress).run(repeats)
    peaks = {name: median(values) for name, values in probes.samples.items()}
    bandwidth = max(peaks["memory_read_bytes_per_s"], peaks["file_read_bytes_per_s"])
    runs = {name: figures(s, cost, bandwidth, peaks["int8_peak_ops_per_s"]) for name, s in samples.items()}
    result = {"repeats": repeats, "peaks": peaks, "runs": runs}
    if vs:
        result |= {
            "versus": vs,
            "peer_model": str(peer_model or path),
            "compared": comparisons(samples["bezel"], {s: samples[s] for s in settings}),
        }
    return result


def _profile(facts: dict[str, Any], as_json: bool, progress: Callable[[str], None]) -> None:
    progress("profiling")
    model = load(
        facts["model"]["file"],
        engine=facts["engine"],
        context=facts["context"],
        kv=facts["kv"],
        threads=facts["threads"],
    )
    held = max(0, min(_PROFILE_HELD, model.context - _PROFILE_STEPS - 1))
    steps = min(_PROFILE_STEPS, model.context - held - 1)
    tables = profile(model, held, steps)
    progress("")
    if not as_json:
        show_profile(f"A token after {held} others, mean of {steps}", tables["decode"])
        show_profile("The first chunk of a prompt", tables["prefill"])
        if "picture" in tables:
            show_profile("A picture in the tower", tables["picture"])
        return
    rows = {what: [asdict(row) for row in table] for what, table in tables.items()}
    click.echo(json.dumps(facts | {"profile": rows}))


def _keep(record: dict[str, Any], save: Path | None) -> None:
    usual = Path("bench/results")
    folder = save or (usual if usual.is_dir() else cache_folder() / "results")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "-", Path(record["model"]["file"]).stem)
    path = folder / f"speed-{name}-{record['time'].replace(':', '')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    click.echo(f"kept in {path}", err=True)


def _show(text: str) -> None:
    click.echo(f"{CLEARED}{text}", nl=False, err=True)


def _hide(text: str) -> None:
    pass
