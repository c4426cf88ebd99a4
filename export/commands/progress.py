"""How far long commands are, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ...runtime.commands.console import CLEARED
from ...runtime.files.models import size_text


class _Pace:
    """Units a second since the first call, once `least` are done; what an earlier run has done by then is no pace."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None

    def __call__(self, done: int, least: int = 0) -> float:
        now = self._clock()
        began, first = self._began = self._began or (now, done)
        return (done - first) / (now - began) if now > began and done - first >= least else 0.0


@contextmanager
def progress_bar(label: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int, int], None]]:
    """What takes (done, total) and shows it on a terminal; elsewhere it shows nothing."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    pace = _Pace(clock)
    # click's own estimate averages over what the first steps took, which are no measure of millions.
    with click.progressbar(
        length=1, label=label, file=sys.stderr, show_eta=False, item_show_func=lambda left: left
    ) as bar:

        def progress(done: int, total: int) -> None:
            rate = pace(done, total // 100)
            bar.length = total
            bar.update(done - bar.pos, f"{duration((total - done) / rate)} left" if rate and done < total else "")

        yield progress


@contextmanager
def download_line(label: str) -> Iterator[Callable[[int, int], None]]:
    """As `progress_bar`, for bytes that come over a network."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    try:
        yield DownloadLine(label)
    finally:
        click.echo(err=True)


class DownloadLine:
    """A line with the speed and the time that is left; what an earlier run has fetched is no speed."""

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._clock, self._pace = label, clock, _Pace(clock)
        self._shown = -1.0

    def __call__(self, done: int, total: int) -> None:
        now, rate = self._clock(), self._pace(done)
        if done < total and now - self._shown < 0.1:
            return
        self._shown = now
        left = f", {size_text(int(rate))}/s, {duration((total - done) / rate)} left" if rate and done < total else ""
        click.echo(f"{CLEARED}{self._label}: {size_text(done)} of {size_text(total)}{left}", nl=False, err=True)


def duration(seconds: float) -> str:
    """Roughly, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
