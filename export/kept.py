"""Work that can be broken off: arrays by number in a folder, for one set of inputs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.arrays import Arrays
from ..runtime.files.atomic import BeingWritten, atomic
from ..runtime.files.hashing import fed

_DIGEST_BYTES = 32


class KeptWork:
    """Arrays by number, in a folder of their own for each `key`, which holds all that they depend on.

    Each is in one file, its SHA-256 and then an archive, which is whole or absent; a damaged one counts as absent.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps(key, sort_keys=True)
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        with suppress(BeingWritten), atomic(self._folder / "key.json") as file:
            file.write(text.encode())

    def beside(self, key: Mapping[str, Any]) -> KeptWork:
        """What is kept of other work on the same file."""
        return KeptWork(self._folder.parent, key)

    def load(self, number: int) -> dict[str, npt.NDArray[Any]] | None:
        try:
            with self._path(number).open("rb") as file:
                expected = file.read(_DIGEST_BYTES)
                if fed(hashlib.sha256(), file).digest() != expected:
                    return None
                file.seek(_DIGEST_BYTES)
                with np.load(file, allow_pickle=False) as found:
                    return dict(found)
        except OSError:
            return None

    def save(self, number: int, arrays: Arrays) -> None:
        """Unless another process is at it, which writes the same."""
        with suppress(BeingWritten), atomic(self._path(number)) as file:
            file.write(bytes(_DIGEST_BYTES))
            np.savez(file, allow_pickle=False, **arrays)
            file.seek(_DIGEST_BYTES)
            digest = fed(hashlib.sha256(), file).digest()
            file.seek(0)
            file.write(digest)

    def drop(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}.npz"


@contextmanager
def work_on(out: Path, key: Mapping[str, Any]) -> Iterator[KeptWork]:
    """What is kept of the work on the file `out`, beside it; removed when it is done, left when it is broken off."""
    folder = out.with_name(f".{out.name}.work")
    yield KeptWork(folder, key)
    shutil.rmtree(folder, ignore_errors=True)
