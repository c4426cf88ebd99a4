"""How much memory there is: the system's, or what a container leaves of it."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from bezel.runtime.files import memory
from bezel.runtime.files.memory import available_memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups are, in place of the system's."""
    places = [(tmp_path / root.name, *names) for root, *names in memory._GROUPS]
    monkeypatch.setattr(memory, "_GROUPS", places)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_of_system", lambda: iter([9 << 30]))
    return tmp_path


def group(folder: Path, version: int, limit: str, used: int, files: int) -> None:
    """Files that were read once and those that were read more often have half of `files` each."""
    *names, kinds = memory._GROUPS[version == 1][1:]
    folder.mkdir(parents=True)
    stat = "\n".join(["anon 5", *(f"{kind} {files // 2}" for kind in kinds), "other 1"])
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


def test_without_groups_the_system_s_is_what_there_is(groups: Path) -> None:
    assert available_memory() == 9 << 30
    (groups / "own").write_text("0::/\n")
    assert available_memory() == 9 << 30
    group(groups / "cgroup", 2, "max", 1 << 30, 0)
    assert available_memory() == 9 << 30


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_counts(version: int, groups: Path) -> None:
    """That of any group above, too; files that can be read again are no use of it."""
    controllers, root = ("", groups / "cgroup") if version == 2 else ("cpu,memory", groups / "memory")
    (groups / "own").write_text(f"3:cpuset:/elsewhere\n0:{controllers}:/outer/inner\n")
    group(root / "outer", version, str(6 << 30), 3 << 30, 1 << 30)
    group(root / "outer" / "inner", version, str(8 << 30), 1 << 30, 0)
    assert available_memory() == 4 << 30
    (root / "outer" / "inner" / memory._GROUPS[version == 1][2]).write_text(str(20 << 30))
    assert available_memory() == 0


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="where freeing is glibc's")
def test_what_is_freed_goes_back_at_once() -> None:
    """Pieces as large as what was freed before are kept otherwise, where others lie behind them."""
    source = """
from pathlib import Path
import numpy as np
from bezel.runtime.files.memory import give_back_at_once

def used():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)

give_back_at_once()
before = used()
del [np.ones(30 << 20, np.uint8)][0]
pieces = [np.ones(8 << 20, np.uint8) for _ in range(20)]
behind = np.ones(2 << 20, np.uint8)
del pieces
print(used() - before)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # of 160,000
