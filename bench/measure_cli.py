"""The command `bezel measure`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..export.gguf_writer import atomic
from ..runtime.api import ACTIVATIONS
from ..runtime.cache import KV_TYPES
from .measure import measure as run
from .measure_tables import show
from .passages import CHUNK, PROTOCOLS
from .sensitivity import BY, CHUNKS
from .sensitivity import sensitivity as find_sensitivity
from .state import state_folder
from .subjects import Spec, parse_spec


@click.command()
@click.argument("candidates", nargs=-1, metavar="[CANDIDATE]...")
@click.option("--reference", required=True, metavar="MODEL", help="What the candidates are compared with.")
@click.option(
    "--text",
    "texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    help="What to read, UTF-8; may be given several times.",
)
@click.option("--engine", help="What runs the candidates.  [default: native for GGUF, ort for ONNX]")
@click.option("--kv", type=click.Choice(KV_TYPES), default="f16", show_default=True, help="Their KV cache storage.")
@click.option(
    "--activations", type=click.Choice(ACTIVATIONS), default="int8", show_default=True, help="Theirs, native."
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="chunks",
    show_default=True,
    help="chunks: each read afresh, its second half scored. long: read across windows, every position scored.",
)
@click.option("--chunk", type=int, help=f"Tokens in a chunk.  [default: {CHUNK}; long: all that the models take]")
@click.option(
    "--chunks",
    "limit",
    type=click.IntRange(min=1),
    help=f"Read so many chunks only.  [default: all; --sensitivity: {CHUNKS}]",
)
@click.option("--effects", is_flag=True, help="Measure weights, activations and keys and values apart, too.")
@click.option(
    "--sensitivity",
    "formats",
    metavar="FORMAT[,FORMAT…]",
    help="Round the reference's tensors one by one and rank them.",
)
@click.option(
    "--by", type=click.Choice(BY), default=BY[0], show_default=True, help="What --sensitivity rounds at a time."
)
@click.option(
    "--sensitivity-out", type=click.Path(dir_okay=False, path_type=Path), help="Write the ranking for export."
)
@click.option("--threads", type=click.IntRange(min=1), help="[default: the performance cores]")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for what is computed, so that the same command can go on.  [default: the user's cache]",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a report with plots here.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def measure(
    candidates: tuple[str, ...],
    reference: str,
    texts: tuple[Path, ...],
    engine: str | None,
    kv: str,
    activations: str,
    protocol: str,
    chunk: int | None,
    limit: int | None,
    effects: bool,
    formats: str | None,
    by: str,
    sensitivity_out: Path | None,
    threads: int | None,
    state: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure what quantization cost: compare each CANDIDATE with the reference on the same texts.

    A model is a GGUF file, an ONNX folder or a checkpoint folder, which is computed with in float32 (4 bytes of
    memory a weight). It may say how it is run: model.gguf@kv=int8,activations=f32 with the keys engine, kv,
    activations, ring (on, off) and name. The reference is exact unless it says otherwise: float32 activations, keys
    and values.

    What is computed is kept for a month. Ctrl-C stops, and the same command goes on from there.

    \b
    Examples:
      bezel measure gemma-q4_0.gguf --reference gemma-2-2b/ --text wiki.test.txt
      bezel measure a.gguf b.gguf --reference gemma-f16.gguf --text wiki.test.txt --chunks 100 --html report.html
      bezel measure a.gguf@kv=int8 a.gguf@kv=f16 --reference a.gguf --text book.txt --protocol long
      bezel measure a.gguf --reference gemma-f16.gguf --text wiki.test.txt --effects --json
      bezel measure --reference gemma-2-2b/ --text wiki.test.txt --sensitivity q4_0,q6_k --sensitivity-out sens.json
    """
    if not candidates and not formats:
        raise click.UsageError("Give at least one CANDIDATE, or --sensitivity.")
    if sensitivity_out and not formats:
        raise click.UsageError("--sensitivity-out needs --sensitivity.")
    default = Spec(Path(), engine, kv, activations)
    exact = parse_spec(reference, Spec(Path(), None, "f32", "f32"))
    states = state or state_folder()
    try:
        result = run(
            [parse_spec(text, default) for text in candidates],
            exact,
            texts,
            protocol=protocol,
            chunk=chunk,
            limit=limit if candidates else limit or CHUNKS,
            effects=effects,
            threads=threads,
            states=states,
            progress=_progress("measuring"),
        )
        if formats:
            found = find_sensitivity(
                exact.path,
                texts,
                formats.split(","),
                by=by,
                chunk=chunk if protocol == "chunks" else None,
                limit=limit or CHUNKS,
                states=states,
                progress=_progress("sensitivity"),
            )
            # The report draws one format; the file has them all.
            first = [entry for entry in found["entries"] if entry["format"] == formats.split(",")[0]]
            result["sensitivity"] = {"format": formats.split(",")[0], "by": by, "entries": first}
            if sensitivity_out:
                with atomic(sensitivity_out) as file:
                    file.write((json.dumps(found, indent=1) + "\n").encode())
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on from here", err=True)
        raise SystemExit(130) from None
    result["command"] = f"bezel {shlex.join(sys.argv[1:])}"
    _give(result, as_json, html)


def _give(result: dict[str, Any], as_json: bool, html: Path | None) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result)
    for warning in result["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if html:
        from .report import write_report

        write_report(result, html)
        click.echo(f"written to {html}", err=True)


def _progress(what: str) -> Progress | None:
    return Progress(what) if sys.stderr.isatty() else None


class Progress:
    """A line on the terminal with the time that is left."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock, self._started, self._first = what, clock, clock(), 0
        self._last = 0

    def __call__(self, done: int, total: int, found: str) -> None:
        now = self._clock()
        spent = now - self._started
        if done - self._last <= 1 and spent < 0.05 * (done - self._first):  # loaded, not computed
            self._started, self._first = now, done
        self._last = done
        computed = done - self._first
        left = f", {_duration(spent / computed * (total - done))} left" if computed and done < total else ""
        line = f"{self._what}: {done} of {total}{left}{'; ' if found else ''}{found}"
        click.echo(f"\r\x1b[K{line}" + ("\n" if done == total else ""), nl=False, err=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
