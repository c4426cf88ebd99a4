"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bezel.runtime import Model
from bezel.runtime.files.atomic import atomic


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
def test_whole_or_as_before(before: bytes | None, error: type[BaseException] | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if before is not None:
        out.write_bytes(before)

    def write() -> None:
        with atomic(out) as file:
            file.write(b"new")
            assert out.exists() == (before is not None)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            write()
    else:
        write()
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = b"new" if error is None else before
    assert content == ({} if expected is None else {"out": expected})


def test_a_session_that_cannot_be_written_leaves_the_old_file(
    model_of: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model_of("gemma2-gqa").session()
    session.prefill([2, 5])
    session.save(tmp_path / "s")
    saved = (tmp_path / "s").read_bytes()

    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        session.save(tmp_path / "s")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", saved)]
