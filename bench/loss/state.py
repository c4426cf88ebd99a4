"""What a measurement has computed so far, on disk, so that it can be broken off and goes on from there."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ...export.kept import KeptWork
from ...runtime.arrays import Arrays
from ...runtime.files.user_cache import cache_folder

__all__ = ["Arrays", "KeptResults", "code_hash", "number_of", "state_folder"]

_KEPT_DAYS = 30


class KeptResults(KeptWork):
    """Arrays by number, for one `key` and this version of the code, another one of which may compute something else."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        super().__init__(folder, {**key, "code": code_hash()})


def number_of(what: bytes) -> int:
    """A number for what has no place among others, to keep it as."""
    return int.from_bytes(hashlib.sha256(what).digest()[:7], "big")


def state_folder() -> Path:
    """The usual place for states; what nobody has used for a month is removed."""
    folder = cache_folder() / "measure"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if time.time() - _last_use(old) > _KEPT_DAYS * 86400:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _last_use(kept: Path) -> float:
    """When the key was written, as every use does; if it never was, when the folder was made; now, if that is gone."""
    for path in (kept / "key.json", kept):
        with suppress(OSError):  # another process makes and removes folders too
            return path.stat().st_mtime
    return time.time()


@cache
def code_hash(kinds: tuple[str, ...] = (".py", ".so", ".pyd")) -> str:
    """A hash of the files of these kinds that compute: another version may compute something else."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for room in ("quant", "runtime", "export", "bench"):
        for path in sorted((root / room).rglob("*")):
            if path.suffix in kinds and path.parent.name not in ("commands", "report"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
