"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import InvalidRequest

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


class BeingWritten(InvalidRequest):
    """Another process writes the same file."""


@contextmanager
def atomic(out: Path, replaces: Callable[[Path], bool] = lambda _: True) -> Iterator[BinaryIO]:
    """A file open for writing that appears under its name once it is complete and on the disk, or not at all.

    A link at `out` stays, and what it leads to is replaced; the new file gets the permissions of the old one. Raises
    InvalidRequest, before anything is written, where `out` is something else than a file, or one that it is not to
    replace, or is being written by someone else.
    """
    out = check_output(out, replaces)
    with claimed(out) as part:
        # The claim keeps others away; what is left of an interrupted run, or a link planted here, goes.
        part.unlink(missing_ok=True)
        mode = stat.S_IMODE(out.stat().st_mode) if out.exists() else None
        try:
            with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666), "w+b") as file:
                if mode is not None:
                    os.chmod(part, mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, out)
            _sync(out.parent)
        except BaseException as error:  # Ctrl-C too
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
                error.filename = str(out)
            raise


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` once it is complete and on the disk; `out` may be there already.

    Raises InvalidRequest if it is being written by someone else.
    """
    with claimed(out) as part:
        old = part.with_suffix(".old")
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            for path in part.rglob("*"):
                if path.is_dir():
                    _sync(path)
                else:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            _sync(part)
            if out.exists():
                os.replace(out, old)
            os.replace(part, out)
            _sync(out.parent)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(part, ignore_errors=True)
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_new(out: Path, force: bool) -> None:
    """Raises InvalidRequest for what is there already, unless it is to be replaced by `force`."""
    if out.exists() and not force:
        raise InvalidRequest(f"{out}: exists already; choose another name, or replace it with --force")


def check_output(out: Path, replaces: Callable[[Path], bool] = lambda _: True) -> Path:
    """The path that writing to `out` changes, behind all links. Raises InvalidRequest where that is to be refused."""
    out = Path(os.path.realpath(out))
    if not out.name:
        raise InvalidRequest(f"{out}: is a folder, expected the name of a file")
    if not out.parent.is_dir():
        raise InvalidRequest(f"{out.parent}: no such folder; create it first")
    if out.exists():
        mode = out.stat().st_mode
        for is_kind, kind in _KINDS:
            if is_kind(mode):
                raise InvalidRequest(f"{out}: is {kind}, expected a file or the name of a new one")
        if not replaces(out):
            raise InvalidRequest(f"{out}: exists already, and is something else; choose another name")
    return out


_BINARY = getattr(os, "O_BINARY", 0)  # Windows


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """The name that `out` is written under, which no other process uses meanwhile."""
    lock = out.with_name(f".{out.name}.lock")
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _BINARY, 0o600)
        except OSError as error:
            raise InvalidRequest(f"{out}: cannot be written: {error.strerror}") from None
        try:
            if not _lock(handle):
                raise BeingWritten(f"{out}: is being written by another process; choose another name, or wait")
            try:
                if not os.path.samestat(os.fstat(handle), os.lstat(lock)):
                    continue  # its owner took it away before the lock was got
            except FileNotFoundError:
                continue
            try:
                yield out.with_name(f".{out.name}.part")
            finally:
                with suppress(PermissionError):  # Windows removes no open file; whoever writes next takes it over
                    lock.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Whether a lock on an open file was free; it is held until the file is closed, or its process is gone."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sync(folder: Path) -> None:
    """Have the disk know what the folder's files are called."""
    if os.name == "nt":  # which knows no such thing
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # not every file system can
        pass
    finally:
        os.close(handle)
