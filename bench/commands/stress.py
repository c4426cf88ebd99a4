"""The command `bezel stress`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ...runtime.errors import InvalidRequest
from ..loss.subjects import Spec, parse_spec
from ..spread import Spread
from ..stress.result import Search, Stress
from ..stress.stress import (
    CHUNK,
    CORNERS,
    DISTANCE,
    GRID,
    PARAMETERS,
    PASSAGES,
    SEARCH_CHUNK,
    SEARCH_PASSAGES,
)
from ..stress.stress import stress as measure_poses
from ..stress.tables import show, show_search
from .shared import (
    candidates_argument,
    goes_on,
    html_option,
    json_option,
    progress_line,
    reference_option,
    scheduler_option,
    spread_by,
    state_option,
    texts_option,
    threads_option,
)


@dataclass(frozen=True)
class _Options:
    """What was asked for, named as on the command line; None where nothing was."""

    turn: tuple[str, ...]
    grid: str | None
    corners: int | None
    search: bool
    distance: float | None
    chunk: int | None
    chunks: int | None
    threads: int | None
    states: Path

    def check(self) -> None:
        """Raises UsageError for options that do not go together."""
        if self.search and (self.turn or self.grid or self.corners is not None):
            raise click.UsageError("--search takes no poses: leave --turn, --grid and --corners out.")
        if self.distance is not None and not self.search:
            raise click.UsageError("--distance goes with --search.")

    def run(
        self, candidates: Sequence[Spec], reference: Spec, texts: Sequence[Path], spread: Spread
    ) -> Stress | Search:
        both: dict[str, Any] = {
            "chunk": self.chunk,
            "threads": self.threads,
            "states": self.states,
            "progress": progress_line("measuring"),
            "spread": spread,
        }
        if self.search:
            limit = SEARCH_PASSAGES if self.chunks is None else self.chunks
            distance = DISTANCE if self.distance is None else self.distance
            return _searching()(candidates, reference, texts, distance=distance, limit=limit, **both)
        return measure_poses(
            candidates,
            reference,
            texts,
            levels=_levels(self.turn),
            grid=_grid(self.grid, self.turn),
            corners=CORNERS if self.corners is None else self.corners,
            limit=PASSAGES if self.chunks is None else self.chunks,
            **both,
        )


def _searching() -> Callable[..., Search]:
    try:
        from ..stress.search import search
    except ModuleNotFoundError as error:
        raise InvalidRequest(f"--search needs the package {error.name}: pip install 'bezel-lm[tune]'") from None
    return search


@click.command()
@candidates_argument
@reference_option
@texts_option
@click.option(
    "--turn",
    multiple=True,
    metavar="NAME[=LEVEL,…]",
    help=f"A parameter to turn, and how far; may be given several times: {', '.join(PARAMETERS)}.  [default: all]",
)
@click.option(
    "--grid",
    metavar="NAME,NAME",
    help=f"Two that are turned together, for the map; 'none' for no map.  [default: {','.join(GRID)}]",
)
@click.option(
    "--corners",
    type=click.IntRange(min=0),
    help=f"Poses that turn any of them, at random.  [default: {CORNERS}]",
)
@click.option(
    "--search",
    is_flag=True,
    help="Rather than poses, search for the few changed words that hurt most (extra: tune).",
)
@click.option(
    "--distance",
    type=float,
    help="How far --search may move a text: the share of its words that unrelated ones may replace.  "
    f"[default: {DISTANCE}]",
)
@click.option(
    "--chunk",
    type=int,
    help=f"Tokens in a passage, whose second half is scored.  [default: {CHUNK}; {SEARCH_CHUNK} in a search]",
)
@click.option(
    "--chunks",
    type=click.IntRange(min=1),
    help=f"Read so many of each text.  [default: {PASSAGES}; {SEARCH_PASSAGES} in a search]",
)
@threads_option
@scheduler_option
@state_option
@html_option
@json_option
def stress(
    candidates: tuple[str, ...],
    reference: str,
    texts: tuple[Path, ...],
    scheduler: str | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what quantization costs where texts are odd: in capitals, misspelt, deep in a context.

    Each CANDIDATE is compared with the reference on passages of the texts, seen from many sides: each parameter is
    turned alone, two of them together, and any of them at random. The table and the report say in which pose a
    candidate leaves the reference most, in what share of the positions another token becomes the likeliest, and
    whether what hurts one candidate hurts the others. Models are given as to `bezel measure`.

    \b
    case         words in capitals (a share of them)
    typos        letters left out, doubled or changed with the next (a share)
    spacing      spaces left out, doubled or turned into new lines (a share)
    homoglyphs   letters of another alphabet that look the same (a share of those that have one)
    digits       words that become numbers (a share)
    repetition   every sentence so many times more
    shuffle      sentences that change places (a share)
    depth        tokens of the text that come before (for its beginning, its end)
    temperature  at which the reference wrote what comes just before

    With --search a few words of each passage are changed instead, where the gradient of the loss says that it hurts
    most, and no farther than --distance by the word mover's distance: what a text can do at its worst, next to random
    words as far away in the same places. It takes 4 bytes of memory a weight for each of two models.

    --scheduler gives the passages to dask's workers on any number of machines, as `bezel measure` does; a search for
    words stays here, and what it found is measured there.

    What is computed is kept for a month. Ctrl-C stops, and the same command goes on from there.

    \b
    Examples:
      bezel stress gemma-q4_0.gguf --reference gemma-2-2b/ --text wiki.test.txt
      bezel stress a.gguf b.gguf --reference gemma-f16.gguf --text wiki.test.txt --html stress.html
      bezel stress a.gguf --reference gemma-f16.gguf --text wiki.test.txt --turn typos=0.1,0.3 --turn depth --grid none
      bezel stress a.gguf b.gguf --reference gemma-f16.gguf --text wiki.test.txt --search --html worst.html
    """
    asked = _Options(**options)
    asked.check()
    specs = [parse_spec(text, Spec(Path())) for text in candidates]
    exact = parse_spec(reference, Spec(Path(), None, "f32", "f32"))
    with goes_on(), spread_by(scheduler) as spread:
        result = asked.run(specs, exact, texts, spread)
    result = replace(result, command=f"bezel {shlex.join(sys.argv[1:])}")
    if as_json:
        click.echo(json.dumps(result.to_json()))
    elif isinstance(result, Search):
        show_search(result)
    else:
        show(result)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    if html:
        from ..report.stress import write_report, write_search

        write_search(result, html) if isinstance(result, Search) else write_report(result, html)
        click.echo(f"written to {html}", err=True)


def _levels(turned: Sequence[str]) -> dict[str, list[float] | None]:
    """What --turn asks for; None where the usual levels do."""
    found: dict[str, list[float] | None] = {}
    for text in turned:
        name, given, numbers = text.partition("=")
        if name in found:
            raise InvalidRequest(f"--turn: found {name!r} twice, expected all its levels at once, as {name}=0.1,0.2")
        try:
            found[name] = [float(number) for number in numbers.split(",")] if given else None
        except ValueError:
            raise InvalidRequest(f"--turn: found {text!r}, expected numbers, as typos=0.1,0.2") from None
    return found


def _grid(text: str | None, turned: Sequence[str]) -> list[str] | None:
    """The two parameters of the map; the usual ones only where everything is turned."""
    if text is None:
        return None if turned else [*GRID]
    return None if text == "none" else [name.strip() for name in text.split(",")]
