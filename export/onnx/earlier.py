"""What lies where an export is to be written."""

from __future__ import annotations

import json
from pathlib import Path

from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import check_new
from ...runtime.files.onnx_folder import MANIFEST
from .source import OnnxSource


def check_target(source: OnnxSource, out: Path, target: str, force: bool) -> list[str]:
    """What should be said of an earlier export in the folder `out`, which one for `target` is about to replace.

    Raises InvalidRequest for a folder that no export may be written to, or replace.
    """
    if not out.resolve().parent.is_dir():
        raise InvalidRequest(f"{out.parent}: no such folder; create it first")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InvalidRequest(f"{out}: is not a folder; an ONNX export is one, so choose another name")
    if not out.exists() or not any(out.iterdir()):
        return []
    if any(out.resolve() in file.resolve().parents for file in source.files):
        raise InvalidRequest(f"{out}: holds what is exported; choose another name")
    if not (out / MANIFEST).exists():
        raise InvalidRequest(f"{out}: holds other files, expected no folder, an empty one or an earlier export")
    before, written = _written(out / MANIFEST)
    ours = {MANIFEST, *written}
    foreign = sorted(name for path in out.rglob("*") if (name := path.relative_to(out).as_posix()) not in ours)
    if foreign:
        raise InvalidRequest(f"{out}: holds {foreign[0]!r}, which no export wrote; move it, or choose another name")
    check_new(out, force)
    if before in (target, None):
        return []
    return [f"{out}: held an export for the target {str(before)[:40]}, whose place one for {target} has taken"]


def _written(manifest: Path) -> tuple[object, set[str]]:
    """The target of an earlier export, None where it is not said; the files that it wrote, and the folders of these."""
    try:
        found = json.loads(manifest.read_bytes())
        names = [name for name in found["files"] if isinstance(name, str)]
        target = "web" if "bezel_page" in found else found.get("target")
    except (OSError, ValueError, LookupError, TypeError):
        raise InvalidRequest(f"{manifest}: is not what an export wrote; move it, or choose another name") from None
    return target, {*names, *(name.rpartition("/")[0] for name in names)}
