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

from ...export.gguf.receipt import check_room, stamp
from ...runtime.api import ACTIVATIONS
from ...runtime.cache.store import KV_TYPES
from ...runtime.files.atomic import atomic
from ...runtime.files.gguf_model import GGUFModel
from ...runtime.session import Session
from ..loss.measure import measure as run
from ..loss.passages import CHUNK, PROTOCOLS
from ..loss.sensitivity import BY, CHUNKS
from ..loss.sensitivity import sensitivity as find_sensitivity
from ..loss.state import state_folder
from ..loss.subjects import Opener, Spec, parse_spec, unique_names
from ..loss.tables import show
from ..tasks.tasks import run_tasks, show_tasks


@click.command()
@click.argument("candidates", nargs=-1, metavar="[CANDIDATE]...")
@click.option("--reference", metavar="MODEL", help="What the candidates are compared with.")
@click.option(
    "--text",
    "texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="What to read, UTF-8; may be given several times.",
)
@click.option(
    "--tasks",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE.jsonl",
    help="Multiple-choice questions to answer, too; may be given several times.",
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
@click.option("--receipt", is_flag=True, help="Write the loss into the candidates' GGUF files, for `bezel inspect`.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def measure(
    candidates: tuple[str, ...],
    reference: str | None,
    texts: tuple[Path, ...],
    tasks: tuple[Path, ...],
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
    receipt: bool,
    as_json: bool,
) -> None:
    """Measure what quantization cost: compare each CANDIDATE with the reference on the same texts.

    A model is a GGUF file, an ONNX folder or a checkpoint folder, which is computed with in float32 (4 bytes of
    memory a weight). It may say how it is run: model.gguf@kv=int8,activations=f32 with the keys engine, kv,
    activations, ring (on, off) and name. The reference is exact unless it says otherwise: float32 activations, keys
    and values.

    --tasks answers multiple-choice questions by likelihood, without a reference too. Each line of the file is one
    question, a JSON object in the form of lm-evaluation-harness: "query", "ctx", "context" or "question";
    "choices" or "endings"; and which is right, "gold", "label", "answer" or "answerKey".

    What is computed is kept for a month. Ctrl-C stops, and the same command goes on from there.

    \b
    Examples:
      bezel measure gemma-q4_0.gguf --reference gemma-2-2b/ --text wiki.test.txt
      bezel measure a.gguf b.gguf --reference gemma-f16.gguf --text wiki.test.txt --chunks 100 --html report.html
      bezel measure a.gguf@kv=int8 a.gguf@kv=f16 --reference a.gguf --text book.txt --protocol long
      bezel measure a.gguf --reference gemma-f16.gguf --text wiki.test.txt --effects --json
      bezel measure a.gguf --reference gemma-f16.gguf --text wiki.test.txt --receipt
      bezel measure a.gguf b.gguf --tasks arc-easy.jsonl
      bezel measure --reference gemma-2-2b/ --text wiki.test.txt --sensitivity q4_0,q6_k --sensitivity-out sens.json
    """
    if not candidates and not formats:
        raise click.UsageError("Give at least one CANDIDATE, or --sensitivity.")
    if sensitivity_out and not formats:
        raise click.UsageError("--sensitivity-out needs --sensitivity.")
    if not texts and not tasks:
        raise click.UsageError("Give --text, --tasks or both.")
    if texts and reference is None:
        raise click.UsageError("--text needs a --reference.")
    if not texts and (html or receipt or effects or formats):
        raise click.UsageError("--html, --receipt, --effects and --sensitivity need a --text.")
    default, exact = Spec(Path(), engine, kv, activations), Spec(Path(), None, "f32", "f32")
    specs = [parse_spec(text, default) for text in candidates]
    against = None if reference is None else parse_spec(reference, exact)
    if receipt:
        _check_receipts(specs)
    states = state or state_folder()
    result: dict[str, Any] = {}
    try:
        if texts and against:
            result = run(
                specs,
                against,
                texts,
                protocol=protocol,
                chunk=chunk,
                limit=limit if candidates else limit or CHUNKS,
                effects=effects,
                threads=threads,
                states=states,
                progress=_progress("measuring"),
            )
        if formats and against:
            found = find_sensitivity(
                against.path,
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
        if tasks:
            result["tasks"] = [_answer(questions, against, specs, threads) for questions in tasks]
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on from here", err=True)
        raise SystemExit(130) from None
    result["command"] = f"bezel {shlex.join(sys.argv[1:])}"
    if receipt:
        _stamp(specs, result)
    _give(result, as_json, html)


def _answer(file: Path, against: Spec | None, specs: list[Spec], threads: int | None) -> dict[str, Any]:
    """`run_tasks`, each model opened when its turn comes."""
    subjects = specs if against is None else [against, *specs]

    def opener(spec: Spec, name: str) -> Callable[[], Session]:
        return lambda: Opener(threads).open(spec, name).session()

    sessions = {name: opener(spec, name) for spec, name in zip(subjects, unique_names(subjects), strict=True)}
    return run_tasks(file, sessions, progress=_progress("answering"))


def _check_receipts(specs: list[Spec]) -> None:
    """Before hours of measuring rather than after them."""
    for spec in specs:
        with GGUFModel(spec.path) as file:
            check_room(file)


def _stamp(specs: list[Spec], result: dict[str, Any]) -> None:
    """A file that was measured in several settings gets the receipt of the first."""
    for spec, candidate in reversed([*zip(specs, result["candidates"], strict=True)]):
        stamp(spec.path, result, candidate)


def _give(result: dict[str, Any], as_json: bool, html: Path | None) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        if "candidates" in result:
            show(result)
        for task in result.get("tasks", ()):
            click.echo()
            show_tasks(task)
    for warning in result.get("warnings", ()):
        click.echo(f"warning: {warning}", err=True)
    if html:
        from ..report.report import write_report

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
