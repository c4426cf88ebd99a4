"""How much memory there is: the system's, or what a container leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from bezel.runtime.files import memory
from bezel.runtime.files.memory import available_memory, give_back_freed


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


def test_giving_back_changes_nothing_that_is_used() -> None:
    kept = bytes(1000) * 1000
    give_back_freed()
    assert not any(kept)
    assert available_memory() is None or available_memory() > 0
