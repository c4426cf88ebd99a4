"""What `bezel demo --picture` shows: the bundled model that sees, asked about pictures, and what int8 and int4 cost."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import click
import numpy as np

from ...export.gguf.vision import export_vision
from ...export.gguf.writer import export_gguf
from ...export.sources.opening import open_checkpoint
from ...quant.recipes import preset
from ...runtime.api import Model, load
from ...runtime.text.chat import Message
from ...runtime.vision.image import Image
from .. import PICTURES
from .draw import TASKS, described, draw, example, question, scene
from .score import SHOTS, Score, answer_of, score, trials

FORMATS = {"float": "f32", "int8": "q8_0", "int4": "q4_0"}
KINDS = ("colour", "shape", "count", "place", "is there", "describe")


def show(seed: int, keep: Path | None, count: int) -> None:
    """Asks about a picture, then `count` times of each kind in float, int8 and int4; `keep` keeps the int8 pair."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"shapes-{form}.gguf" for name, form in FORMATS.items()}
        if keep is not None:
            files["int8"] = keep
        for name, file in files.items():
            with open_checkpoint(PICTURES) as source, export_vision(source, file, preset(FORMATS[name], 4)):
                export_gguf(source, file, FORMATS[name])
        models = {name: load(file) for name, file in files.items()}
        _ask(models["int8"], seed, None if keep is None else keep.with_suffix(".png"))
        _measure(models, files, count)
        for model in models.values():
            model.close()
    following = f"bezel run {keep} 'How many shapes are there?' --image {keep.with_suffix('.png')}" if keep else ""
    click.echo(f"\nDone in {time.perf_counter() - started:.0f} s. Next: {following or 'bezel run --help, --image'}")


def _ask(model: Model, seed: int, keep: Path | None) -> None:
    random = np.random.default_rng([seed, 2])
    things = scene(random, 3)
    pixels = draw(things, random)
    picture = Image(pixels)
    if keep is not None:
        import PIL.Image

        PIL.Image.fromarray(pixels).save(keep)
    _title("A picture that nobody has seen before")
    click.echo(f"Drawn{f' ({keep})' if keep else ''}: {described(things)}")
    for kind in KINDS:
        asked = question(things, kind, random)
        answer = answer_of(model, [Message("user", [picture, asked.text])])
        click.echo(f"  {asked.text:44} {answer}{_mark(answer == asked.answer)}")
    _title("Without a question: examples show what is wanted")
    for task in TASKS:
        messages, shown = list[Message](), list[str]()
        for _ in range(SHOTS):
            one, said = example(task, random)
            messages += [Message("user", [Image(one)]), Message("model", said)]
            shown.append(said)
        last, right = example(task, random)
        answer = answer_of(model, [*messages, Message("user", [Image(last)])])
        click.echo(f"  {', '.join(f'[picture] {said}' for said in shown)}, [picture] {answer}{_mark(answer == right)}")


def _measure(models: dict[str, Model], files: dict[str, Path], count: int) -> None:
    """Right answers of each model, and what its files take."""
    _title(f"How often it is right: {count} pictures of each kind, with 95 % intervals")
    asked = list(trials(count))
    found = {}
    for name, model in models.items():
        with click.progressbar(length=len(asked), label=name) as bar:
            found[name] = score(partial(answer_of, model), asked, lambda *_: bar.update(1))
    click.echo(f"{'':24}" + "".join(f"{name:>20}" for name in models))
    for key in next(iter(found.values())):
        group, kind, shots = key
        label = f"{kind}, asked" if group == "asked" else f"{kind}, {shots or 'no'} examples"
        click.echo(f"{label:24}" + "".join(f"{_shown(scores[key]):>20}" for scores in found.values()))
    for label, shots in (("all asked", 0), (f"all by {SHOTS} examples", SHOTS)):
        group = "shown" if shots else "asked"
        sums = [[s for key, s in scores.items() if (key[0], key[2]) == (group, shots)] for scores in found.values()]
        totals = [Score(sum(s.right for s in some), sum(s.trials for s in some)) for some in sums]
        click.echo(click.style(f"{label:24}" + "".join(f"{_shown(total):>20}" for total in totals), bold=True))
    sizes = [(file.stat().st_size, file.with_name(f"mmproj-{file.name}").stat().st_size) for file in files.values()]
    click.echo(f"{'kB, text and eye':24}" + "".join(f"{f'{a / 1e3:,.0f} + {b / 1e3:,.0f}':>20}" for a, b in sizes))


def _shown(found: Score) -> str:
    low, high = found.interval
    return f"{found.share:.0%} ({low:.0%} to {high:.0%})"


def _mark(right: bool) -> str:
    return "" if right else "  (wrong)"


def _title(words: str) -> None:
    click.echo("\n" + click.style(words, bold=True))
