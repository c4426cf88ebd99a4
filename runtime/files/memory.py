"""How much memory there is."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that programs can have without others being swapped out; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
