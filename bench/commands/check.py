"""The command `bezel check`: an ONNX folder, as onnxruntime runs it, against what it was exported from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import click
import numpy as np

from ...runtime.api import Model, load
from ...runtime.errors import InvalidRequest
from ...runtime.files.onnx_folder import OnnxFolder
from .. import DATA
from ..loss.metrics import Records, compare

TEXT = DATA / "fairy-heldout.txt"
_NO_WINDOW = 512  # tokens in a row of the table for a model without windows
# Mean KLD, nats, of rounding activations to 8 bits with room to spare; of summing float32 in another order.
_LARGEST_KLD = {"quantized": 1e-3, "float": 1e-6}


@dataclass(frozen=True)
class Span:
    """What was found at the positions `first` … `last` of a text; `kld` is the mean, in nats."""

    first: int
    last: int
    largest_difference: float
    kld: float
    same_top: float
    largest_kld: float

    @property
    def ok(self) -> bool:
        return self.kld <= self.largest_kld


def check_folder(folder: Path, source: Path, threads: int | None = None) -> list[Span]:
    """Compare the logits of `folder` on onnxruntime with those of its source, window by window.

    A GGUF file runs on the native engine with float32 activations. A checkpoint is not run itself: the reference engine
    takes its place, on the weights that were written. The text is as long as two and a half windows, if the models
    take that many tokens. Raises InvalidRequest for what cannot be compared, and what loading raises.
    """
    with OnnxFolder(folder) as opened:
        quantized = any(name not in ("f32", "f16") for name in opened.formats.values())
    model = load(folder, threads=threads)
    exact = {"kv": "f32", "threads": threads}
    if source.is_file():
        against = load(source, activations="f32", **exact)  # type: ignore[arg-type]
    else:
        against = load(folder, engine="reference", **exact)  # type: ignore[arg-type]
    if against.config != model.config:
        raise InvalidRequest(f"{source}: found another config than {folder} has, expected what it was exported from")
    window = max((layer.window or 0 for layer in model.config.layers), default=0) or _NO_WINDOW
    length = min(model.context, 2 * window + window // 2)
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"), bos=True)[:length]
    return _compare(model, against, ids, window, _LARGEST_KLD["quantized" if quantized else "float"])


def _compare(model: Model, against: Model, ids: Sequence[int], window: int, largest_kld: float) -> list[Span]:
    sessions = [against.session(), model.session()]
    checked = sessions[0].check(ids)
    records: list[Records] = []
    differences = []
    shortest = min(sessions, key=lambda session: session.engine.chunk)
    for start, part in shortest.chunks(checked):
        want, found = (session.engine.forward(part, len(part)) for session in sessions)
        differences.append(np.abs(found - want).max(axis=-1))
        following = np.append(checked[start + 1 : start + len(part) + 1], 0)[: len(part)]  # which, decides nothing here
        records += compare([want, found], [(0, 1)], start, following)
    table, difference = np.concatenate(records), np.concatenate(differences)
    spans = []
    for first, end in pairwise([*range(0, len(ids), window), len(ids)]):
        rows = table[first:end]
        spans.append(
            Span(
                first,
                end - 1,
                float(difference[first:end].max()),
                float(rows["kld"].mean()),
                float((rows["top"][:, 0] == rows["reference_top"][:, 0]).mean()),
                largest_kld,
            )
        )
    return spans


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="What FOLDER was exported from: a GGUF file, or a checkpoint folder.",
)
@click.option("--threads", type=click.IntRange(min=1), help="[default: the performance cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def check(folder: Path, source: Path, threads: int | None, as_json: bool) -> None:
    """Run FOLDER, which `bezel export --format onnx` wrote, and its source on a text past the second window.

    Prints how far the logits are apart in each window, and exits with 1 if that is further than rounding explains.
    `bezel verify` compares the weights; this also finds a graph that computes something else with them.

    \b
    Examples:
      bezel check gemma-onnx/ --source gemma-q4_0.gguf
      bezel check gemma-onnx/ --source gemma-2-2b-it/
    """
    spans = check_folder(folder, source, threads)
    if as_json:
        click.echo(json.dumps([asdict(span) | {"ok": span.ok} for span in spans]))
    else:
        click.echo("   positions  largest difference  mean KLD  allowed  same top token")
        for span in spans:
            click.echo(
                f"{f'{span.first} to {span.last}':>12}  {span.largest_difference:18.2e}  {span.kld:8.1e}  "
                f"{span.largest_kld:7.0e}  {span.same_top:14.2%}{'' if span.ok else '  OFF'}"
            )
    if not all(span.ok for span in spans):
        raise SystemExit(1)
