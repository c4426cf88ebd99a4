"""The demo, as somebody new types it."""

from __future__ import annotations

from pathlib import Path

from bezel.runtime import load
from bezel.runtime.commands.main import main
from click.testing import CliRunner


def test_the_demo_s_model_can_be_kept(tmp_path: Path) -> None:
    file = tmp_path / "fairy.gguf"
    done = CliRunner().invoke(main, ["demo", "--keep", str(file)])
    assert done.exit_code == 0, done.output
    assert "equal to the bit" in done.stdout
    assert f"bezel serve {file}" in done.stdout
    with load(file) as model:
        assert model.is_chat_model
    before = file.read_bytes()
    again = CliRunner().invoke(main, ["demo", "--keep", str(file)])
    assert (again.exit_code, f"Error: {file}: it exists" in again.output) == (1, True)
    assert file.read_bytes() == before
