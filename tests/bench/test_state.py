"""Where measurements keep what they have computed: what was broken off in the middle must stop nobody."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from bezel.bench.loss import state as module
from bezel.bench.loss.state import KeptResults, state_folder

MONTH = 30 * 86400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    return state_folder()


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_nobody_has_used_for_a_month_is_removed(folder: Path) -> None:
    kept, old = KeptResults(folder, {"a": 1}), KeptResults(folder, {"a": 2})
    for results in (kept, old):
        results.save(0, {"x": np.arange(3)})
        age(results._folder, 2 * MONTH)  # of a folder in use, only the key is written again
    age(old._folder / "key.json", 2 * MONTH)
    age(kept._folder / "key.json", MONTH - 86400)
    assert state_folder() == folder
    assert names(folder) == [kept._folder.name]
    assert KeptResults(folder, {"a": 1}).load(0) is not None


def test_a_folder_without_its_key_stops_nobody(folder: Path) -> None:
    """What a program leaves that was ended, or has just begun, between making the folder and writing the key."""
    for name, seconds in (("begun", 0.0), ("abandoned", 2 * MONTH)):
        (folder / name).mkdir()
        age(folder / name, seconds)
    state_folder()
    assert names(folder) == ["begun"]


def test_what_another_process_removes_meanwhile_stops_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        (folder / str(i)).mkdir()
    found = list(folder.iterdir())
    shutil.rmtree(found[1])
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(found))
    state_folder()
    monkeypatch.undo()
    assert len(names(folder)) == 2


def test_the_key_is_whole_or_absent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        KeptResults(folder, {"a": 1})
    monkeypatch.undo()
    (made,) = folder.iterdir()
    assert names(made) == []
    results = KeptResults(folder, {"a": 1})
    assert results._folder == made
    results.save(0, {"x": np.arange(3)})
    assert KeptResults(folder, {"a": 1}).load(0) is not None


def test_another_version_of_the_code_computes_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KeptResults(folder, {"a": 1}).save(0, {"x": np.arange(3)})
    with monkeypatch.context() as patch:
        patch.setattr(module, "code_hash", lambda: "another")
        assert KeptResults(folder, {"a": 1}).load(0) is None
    assert KeptResults(folder, {"a": 1}).load(0) is not None
