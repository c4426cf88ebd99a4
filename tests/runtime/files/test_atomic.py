"""Files and folders that appear whole or not at all, and what is never replaced."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.atomic import atomic, atomic_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="made of what POSIX has")


def write(out: Path, content: bytes = b"new") -> None:
    with atomic(out) as file:
        file.write(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(error: type[BaseException]) -> None:
        with atomic(out) as file:
            file.write(b"half")
            assert not out.exists()
            raise error

    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            fail(error)
        assert names(tmp_path) == []
    write(out)
    assert (out.read_bytes(), names(tmp_path)) == (b"new", ["out"])


@pytest.mark.parametrize("folder", [False, True])
def test_what_gets_its_name_is_on_the_disk(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves a whole name with half a content."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("named"), replace(*paths)))
    out = tmp_path / "out"
    if folder:
        with atomic_folder(out) as part:
            (part / "a").write_bytes(b"new")
        file = out / "a"
    else:
        write(out)
        file = out
    assert (
        done.index(file.stat().st_ino) < done.index("named") < len(done) - 1 - done[::-1].index(tmp_path.stat().st_ino)
    )


def test_a_full_disk_says_which_file(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as found, atomic(tmp_path / "out"):
        full()
    assert found.value.filename == str(tmp_path / "out")


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replace = tmp_path / "out", os.replace
    out.mkdir()
    (out / "old").write_bytes(b"precious")

    def once(*paths: Path) -> None:
        replace(*paths)
        monkeypatch.setattr(os, "replace", fail)

    def fail(*_: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as part:
        (part / "new").write_bytes(b"new")
    assert (names(tmp_path), names(out)) == (["out"], ["old"])


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    write(tmp_path / "link", b"first")
    write(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"second"
    assert names(tmp_path / "real") == ["file"]


def test_permissions_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    assert out.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    out.chmod(0o640)
    write(out)
    assert out.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        for name, kind in (("pipe", "a pipe"), ("folder", "a folder"), ("device", "a device"), ("socket", "a socket")):
            with pytest.raises(InvalidRequest, match=f"is {kind}, expected a file"):
                write(tmp_path / name)
    assert names(tmp_path) == ["device", "folder", "pipe", "socket"]
    with pytest.raises(InvalidRequest, match="no such folder; create it first"):
        write(tmp_path / "missing" / "out")
    with pytest.raises(InvalidRequest, match="is a folder"):
        write(Path("/"))


def test_what_is_not_to_be_replaced_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    mine = atomic(out, lambda old: old.read_bytes() != b"mine")
    with pytest.raises(InvalidRequest, match="exists already, and is something else"), mine as file:
        file.write(b"new")
    assert (out.read_bytes(), names(tmp_path)) == (b"mine", ["out"])


def test_a_link_planted_at_the_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".out.part").symlink_to(victim)
    write(tmp_path / "out")
    assert (victim.read_bytes(), names(tmp_path)) == (b"precious", ["out", "victim"])
    (tmp_path / ".out.lock").symlink_to(victim)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        write(tmp_path / "out")
    assert victim.read_bytes() == b"precious"


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic(out) as file:
        with pytest.raises(InvalidRequest, match="is being written by another process"):
            write(out)
        file.write(b"first")
    assert out.read_bytes() == b"first"
    write(out)
    assert (out.read_bytes(), names(tmp_path)) == (b"new", ["out"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_goes(how: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from bezel.runtime.files.atomic import atomic\n"
        "with atomic(Path(sys.argv[1])) as file: file.write(b'half'); print('go', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(how)
        process.wait(20)
    assert names(tmp_path) == [".out.lock", ".out.part"]  # Python itself does not clean up after either
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_folder_is_whole_or_what_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()

    def fail() -> None:
        with atomic_folder(out) as part:
            (part / "new").touch()
            with pytest.raises(InvalidRequest, match="is being written by another process"), atomic_folder(out):
                pass
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (names(out), names(tmp_path)) == (["old"], ["out"])
    (tmp_path / ".out.part").mkdir()  # left by a process that was killed
    with atomic_folder(out) as part:
        (part / "new").touch()
    assert (names(out), names(tmp_path)) == (["new"], ["out"])
