"""Files of a checkpoint's folder, looked at before they are read."""

from __future__ import annotations

from pathlib import Path

from ...runtime.errors import InvalidCheckpoint

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def required(path: Path) -> Path:
    """`path`, if it is a file with its content in place."""
    if not path.is_file():
        raise InvalidCheckpoint(
            f"{path.parent}: {path.name} is missing; expected a folder with config.json, tokenizer.model or "
            "tokenizer.json, and model.safetensors (or its shards), as downloaded"
        )
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InvalidCheckpoint(
                f"{path}: found a git-lfs pointer, expected the file itself; run 'git lfs pull' in {path.parent}"
            )
    return path


def own(path: Path) -> Path:
    """`path`, if what it is a link to belongs to the checkpoint: its content goes into what is exported."""
    folder, real = path.parent.resolve(), path.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # the hub's cache, whose files are links
        homes.append(folder.parents[1] / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise InvalidCheckpoint(
            f"{path}: is a link to {real}, which is no part of the checkpoint; put a copy in its place if it should be"
        )
    return path
