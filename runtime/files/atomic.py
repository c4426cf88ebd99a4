"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the name `out` once it is complete and on the disk; else it is removed."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, out)
    except BaseException:  # Ctrl-C too
        part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic(out: Path) -> Iterator[BinaryIO]:
    """A file open for writing that appears under its name once it is complete and on the disk, or not at all."""
    with replacing(out) as part, part.open("wb") as file:
        yield file
