"""The command `bezel tasks`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from ...runtime.api import ACTIVATIONS
from ...runtime.cache.store import KV_TYPES
from ...runtime.commands.model_path import MODEL_SPEC
from ...runtime.errors import InvalidRequest
from ...runtime.session import Session
from ..loss.state import KeptResults
from ..loss.subjects import Opener, Spec, key_of, parse_spec, unique_names
from ..tasks.tasks import QuestionFile, read_questions, run_tasks, show_answers
from .shared import goes_on, html_option, json_option, progress_line, state_option, threads_option


@click.command()
@click.argument("models", nargs=-1, type=MODEL_SPEC, required=True, metavar="MODEL...")
@click.option(
    "--questions",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE.jsonl",
    help="What to answer; may be given several times.",
)
@click.option("--engine", help="What runs the models.  [default: native for GGUF, ort for ONNX]")
@click.option(
    "--kv",
    type=click.Choice(KV_TYPES),
    default="f16",
    show_default=True,
    help="KV cache storage; with ort the export's.",
)
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="int8", show_default=True, help="Native's.")
@threads_option
@state_option
@html_option
@json_option
def tasks(
    models: tuple[str, ...],
    files: tuple[Path, ...],
    engine: str | None,
    kv: str,
    activations: str,
    threads: int | None,
    states: Path,
    html: Path | None,
    as_json: bool,
) -> None:
    """Let each MODEL answer multiple-choice questions by likelihood; the first is what the others are compared with.

    A model is a GGUF file, an ONNX folder or a checkpoint folder, which may say how it is run: see `bezel measure`.

    Besides accuracy by plain likelihood there is that by likelihood per byte; answers that became worse or better,
    and McNemar's p, are of the former. --json and --html say which they are.

    Each line of a file is one question, a JSON object in the form of lm-evaluation-harness: "query", "ctx", "context"
    or "question"; "choices" or "endings"; and which is right, "gold", "label", "answer" or "answerKey".

    What is computed is kept for a month. Ctrl-C stops, and the same command goes on from there.

    \b
    Examples:
      bezel tasks gemma-q4_0.gguf --questions arc-easy.jsonl
      bezel tasks gemma-2-2b/ a.gguf b.gguf@kv=int8 --questions arc-easy.jsonl --html report.html
    """
    default = Spec(Path(), engine, kv, activations)
    specs = [parse_spec(text, default) for text in models]
    named = dict(zip(unique_names(specs), specs, strict=True))

    asked: dict[str, QuestionFile] = {}
    for path in files:  # what is wrong with the last is said before the first is answered
        file = read_questions(path)
        if other := asked.get(file.sha256):
            raise InvalidRequest(
                f"--questions: {path}: found the questions of {other.path} again, expected each once; leave one out"
            )
        asked[file.sha256] = file

    def opener(name: str) -> Callable[[], Session]:
        return lambda: Opener(threads).open(named[name], name).session()

    sessions = {name: opener(name) for name in named}
    results = []
    with goes_on():
        for file in asked.values():
            kept = {
                name: KeptResults(states, {"questions": file.sha256, "model": key_of(spec)})
                for name, spec in named.items()
            }
            progress = progress_line(f"answering {file.path.name}")
            results.append(run_tasks(file, sessions, kept=kept, progress=progress))
    if as_json:
        click.echo(json.dumps({"bezel_tasks": 1, "tasks": [result.to_json() for result in results]}))
    else:
        for i, result in enumerate(results):
            click.echo("\n" * (i > 0), nl=False)
            show_answers(result)
    if html:
        from ..report.tasks import write_report

        write_report(results, html)
        click.echo(f"written to {html}", err=True)
