"""The progress bar of long commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import click


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """What takes (done, total) and shows it on a terminal; elsewhere it shows nothing."""
    with click.progressbar(length=1, label=label, file=sys.stderr) if sys.stderr.isatty() else nullcontext() as bar:

        def progress(done: int, total: int) -> None:
            if bar is not None:
                bar.length = total
                bar.update(done - bar.pos)

        yield progress
