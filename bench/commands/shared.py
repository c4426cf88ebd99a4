"""What the verbs that measure for long have in common: progress, going on after Ctrl-C, and options."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ...export.commands.progress import duration
from ...runtime.commands.console import CLEARED, say_over_progress
from ...runtime.commands.model_path import MODEL_SPEC
from ...runtime.files.atomic import check_output
from ..loss.state import state_folder
from ..progress import Progress, silent
from ..report import PAGE_BEGINS
from ..spread import Cluster, Spread, here


class Output(click.Path):
    """A file to be written; of those that exist, one that begins like what is written, or an empty one."""

    def __init__(self, begin: bytes) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self._begin = begin

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        check_output(path, self.replaces)
        return path

    def replaces(self, old: Path) -> bool:
        with old.open("rb") as file:
            return file.read(len(self._begin)) in (b"", self._begin)


REPORT = Output(PAGE_BEGINS)
candidates_argument = click.argument("candidates", nargs=-1, type=MODEL_SPEC, required=True, metavar="CANDIDATE...")
reference_option = click.option(
    "--reference", type=MODEL_SPEC, metavar="MODEL", required=True, help="What the candidates are compared with."
)
texts_option = click.option(
    "--text",
    "texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    help="What to read, UTF-8; may be given several times.",
)
state_option = click.option(
    "--state",
    "states",
    type=click.Path(file_okay=False, path_type=Path),
    default=state_folder,
    help="Folder for what is computed, so that the same command can go on.  [default: the user's cache]",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="[default: the performance cores]")
scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Compute on the workers of this dask scheduler, tcp://HOST:8786, or of that whose file this is.",
)
html_option = click.option("--html", type=REPORT, help="Write a report for a browser here; an earlier one is replaced.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")


@contextmanager
def goes_on() -> Iterator[None]:
    """Ctrl-C ends the program with a word that what is computed is kept."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on from here", err=True)
        raise SystemExit(130) from None


@contextmanager
def spread_by(scheduler: str | None) -> Iterator[Spread]:
    """Over the scheduler's workers, or here where there is none. Raises InvalidRequest, BezelError."""
    if scheduler is None:
        yield here
        return
    with Cluster(scheduler, say_over_progress) as cluster:
        yield cluster


def progress_line(what: str) -> Progress:
    """Progress on a terminal; elsewhere none."""
    return ProgressLine(what) if sys.stderr.isatty() else silent


class ProgressLine:
    """A line on the terminal with the time that is left; what an earlier run has kept, and is loaded, is no speed."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock = what, clock
        self._began: tuple[float, int] | None = None  # when computing did, and how much was done then
        self._last = 0

    def __call__(self, done: int, total: int, found: str) -> None:
        now = self._clock()
        began, first = self._began or (now, done)
        if done - self._last <= 1 and now - began < 0.05 * (done - first):
            began, first = now, done
        self._began, self._last = (began, first), done
        known = first < done < total
        left = f", {duration((now - began) / (done - first) * (total - done))} left" if known else ""
        line = f"{self._what}: {done} of {total}{left}{'; ' if found else ''}{found}"
        click.echo(f"{CLEARED}{line}" + ("\n" if done == total else ""), nl=False, err=True)
