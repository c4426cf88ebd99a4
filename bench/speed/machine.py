"""The machine that is measured on: what it is, and what it can do at best."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime import _native
from ...runtime.errors import InvalidRequest
from ...runtime.version import bezel_version

_SMALL = 1 << 20  # bytes that `read_bandwidth` needs
_LARGE = 1 << 30  # bytes, more than any cache holds
_SECONDS = 0.1  # of computing in a probe


class Machine:
    """Measures memory and arithmetic with as many threads as the models get, whenever `probe` is called.

    `samples` has a list for each: reading private memory and reading `file`, bytes/s; int8 and float32, operations/s.
    Raises InvalidRequest for a file that is too small.
    """

    def __init__(self, file: Path, threads: int) -> None:
        if file.stat().st_size < _SMALL:
            raise InvalidRequest(f"{file}: {file.stat().st_size} bytes, expected at least {_SMALL} to measure anything")
        self._pool = _native.ThreadPool(threads)
        self._file: NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
        self._memory = np.ones(_LARGE, np.uint8)
        self.samples: dict[str, list[float]] = {
            name: []
            for name in (
                "memory_read_bytes_per_s",
                "file_read_bytes_per_s",
                "int8_peak_ops_per_s",
                "float32_peak_ops_per_s",
            )
        }
        _native.read_bandwidth(self._pool, self._file)  # brings the file into memory

    def probe(self) -> None:
        """Take one sample of each."""
        values = (
            _native.read_bandwidth(self._pool, self._memory),
            _native.read_bandwidth(self._pool, self._file),
            _native.int8_peak(self._pool, _SECONDS),
            _native.float_peak(self._pool, _SECONDS),
        )
        for samples, value in zip(self.samples.values(), values, strict=True):
            samples.append(value)


def largest_file(model: Path) -> Path:
    """The file that a model's weights are read from."""
    if not model.is_dir():
        return model
    return max((file for file in model.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def describe() -> dict[str, Any]:
    """Processor, system and versions, for the record."""
    return {
        "cpu": _cpu(),
        "logical_cpus": os.cpu_count(),
        "isa": _native.isa(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "bezel": bezel_version(),
        "commit": _commit(),
    }


def _cpu() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that this runs from, if it does."""
    root = Path(__file__).resolve().parents[2]
    return _output("git", "-C", str(root), "describe", "--always", "--dirty") if (root / ".git").exists() else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
