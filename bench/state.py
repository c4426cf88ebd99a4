"""What a measurement has computed so far, on disk, so that it can be broken off and goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.files import atomic
from .machine import cache_folder

_KEPT_DAYS = 30

Arrays = Mapping[str, npt.NDArray[Any]]


class State:
    """Arrays by number, in a folder of their own for each `key`, which holds all that they depend on.

    Each is in one file, which is whole or absent; a damaged one counts as absent.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps({**key, "code": _code()}, sort_keys=True)
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "key.json").write_text(text, encoding="utf-8")

    def load(self, number: int) -> dict[str, npt.NDArray[Any]] | None:
        try:
            with np.load(self._path(number), allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, number: int, arrays: Arrays) -> None:
        with atomic(self._path(number)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}.npz"


def state_folder() -> Path:
    """The usual place for states; what nobody has used for a month is removed."""
    folder = cache_folder() / "measure"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if time.time() - (old / "key.json" if old.is_dir() else old).stat().st_mtime > _KEPT_DAYS * 86400:
            shutil.rmtree(old, ignore_errors=True)
    return folder


@cache
def _code() -> str:
    """A hash of the code that computes: another version may compute something else."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for room in ("quant", "runtime", "bench"):
        for path in sorted((root / room).glob("*")):
            if path.suffix in (".py", ".so", ".pyd") and not path.name.startswith(("cli", "report", "svg", "figures")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
