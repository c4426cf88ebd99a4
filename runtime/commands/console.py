"""What the commands say alike."""

from __future__ import annotations

CLEARED = "\r\x1b[K"
"""Before what takes the place of a terminal's line."""


def unforeseen(error: Exception) -> str:
    """What to say of an error that nobody meant."""
    return (
        f"this should not have happened ({type(error).__name__}: {error}). It is a fault of bezel; please report it "
        "with the command and with what it prints when the environment has BEZEL_TRACEBACK=1"
    )


def printable(value: object) -> str:
    """A text out of a file, without the characters that would command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(value))
