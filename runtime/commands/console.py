"""What the commands say alike."""

from __future__ import annotations

import sys

import click

CLEARED = "\r\x1b[K"
"""Before what takes the place of a terminal's line."""


def say_over_progress(text: str) -> None:
    """A line on stderr where a line of progress may be, which is drawn again below."""
    click.echo(f"{CLEARED if sys.stderr.isatty() else ''}{text}", err=True)


def unforeseen(error: Exception) -> str:
    """What to say of an error that nobody meant."""
    return (
        f"this should not have happened ({type(error).__name__}: {error}). It is a fault of bezel; please report it "
        "with the command and with what it prints when the environment has BEZEL_TRACEBACK=1"
    )


def printable(value: object) -> str:
    """A text out of a file, without the characters that would command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(value))
