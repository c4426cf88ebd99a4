"""What is kept of work that was broken off: whole, or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from bezel.export.kept import KeptWork

ARRAYS = {"blk.0.a": np.arange(600, dtype=np.float32).reshape(20, 30), "b": np.ones(3, np.uint8)}


@pytest.fixture
def kept(tmp_path: Path) -> tuple[KeptWork, Path]:
    """With arrays under the number 3, and their file."""
    work = KeptWork(tmp_path, {"of": 1})
    work.save(3, ARRAYS)
    (file,) = tmp_path.rglob("*.npz")
    return work, file


def test_arrays_come_back(kept: tuple[KeptWork, Path], tmp_path: Path) -> None:
    found = kept[0].load(3)
    assert found is not None
    assert {name: (a.dtype, a.tolist()) for name, a in found.items()} == {
        name: (a.dtype, a.tolist()) for name, a in ARRAYS.items()
    }
    assert kept[0].load(2) is None
    assert KeptWork(tmp_path, {"of": 2}).load(3) is None
    assert KeptWork(tmp_path, {"of": 1}).load(3) is not None
    kept[0].drop(3)
    assert kept[0].load(3) is None


def test_a_damaged_file_counts_as_absent(kept: tuple[KeptWork, Path]) -> None:
    """Cut anywhere, or with a bit flipped anywhere."""
    work, file = kept
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert work.load(3) is None, length
    for at in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        assert work.load(3) is None, at


def test_what_is_broken_off_while_it_is_kept_leaves_what_was_there(
    kept: tuple[KeptWork, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(file: BinaryIO, **_: Any) -> None:
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", broken_off)
    for number in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            kept[0].save(number, {"c": np.zeros(3)})
    assert (kept[0].load(3) or {}).keys() == ARRAYS.keys()
    assert sorted(path.name for path in kept[1].parent.iterdir()) == ["000003.npz", "key.json"]
