"""How much memory there is, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

# Of control groups of version 2 and 1: where they are, what says a group's limit and its use, and what of that are
# files, which can be read again.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
_OWN_GROUPS = Path("/proc/self/cgroup")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def available_memory() -> int | None:
    """Bytes that this process can have without others being swapped out, or its container's limit reached; None where
    the system does not say.
    """
    return min((*_of_system(), *_of_groups()), default=None)


def give_back_at_once() -> None:
    """From here on pieces of memory of 4 MiB and more go back to the system as soon as they are freed.

    glibc keeps those of up to 32 MiB, a gigabyte and more of them where others in use lie between.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, 4 << 20)


def _of_system() -> Iterator[int]:
    try:
        yield _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return


def _of_groups() -> Iterator[int]:
    """What is left to each control group that the process is in."""
    try:
        own = [line.split(":", 2)[1:] for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in own:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used, files = _GROUPS[bool(controllers)]
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = _numbers(folder / "memory.stat")
                yield max(0, left + sum(stat.get(name, 0) for name in files))
            except (OSError, ValueError):  # no limit
                pass
            if folder == root:
                break


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by its name."""
    return {name: int(number) for name, number, *_ in map(str.split, file.read_text().splitlines())}
