"""Scales of int8 keys and values: what a text reaches in each channel, by another way than the one they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.export.calibration.moments import read_text
from bezel.export.onnx.kv_scales import TOKENS, kv_scales
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime import Model
from bezel.runtime.commands.main import main
from click.testing import CliRunner
from tiny import DEMO, TEXT, checkpoint_folder

NAMES = ("demo", "gemma3-gqa", "gemma1-mqa")


@pytest.mark.parametrize("name", NAMES)
def test_scales_cover_what_the_caches_hold(name: str, model_of: Callable[..., Model], tmp_path: Path) -> None:
    with open_checkpoint(checkpoint_folder(name, tmp_path)) as checkpoint:
        sequences = read_text(checkpoint, TEXT, TOKENS).sequences
        scales = kv_scales(checkpoint, sequences)
    assert sum(map(len, sequences)) == TOKENS
    model = model_of(name)
    reach: list[dict[str, Any]] = [{"keys": 0.0, "values": 0.0} for _ in scales]
    for ids in sequences:
        engine = model.backend.engine(len(ids), "f32", len(ids), False)
        engine.forward(np.array(ids), 0)
        for i, cache in enumerate(engine.caches):  # type: ignore[attr-defined]
            for part, rows in cache.store.raw(0, len(ids)).items():
                reach[i][part] = np.maximum(reach[i][part], np.abs(rows).max(axis=0))
    for found, seen in zip(scales, reach, strict=True):
        assert np.allclose(127 * found.values, 1.1 * seen["values"], rtol=1e-4)
        half = found.keys.shape[-1] // 2
        assert np.array_equal(found.keys[:, :half], found.keys[:, half:])
        both = np.maximum(seen["keys"][:, :half], seen["keys"][:, half:])  # turned by some angle, not the worst
        fill = both / (127 * found.keys[:, :half] / 1.1)
        assert fill.max() <= 1 + 1e-4
        assert np.median(fill) > 0.8


def test_a_gguf_file_as_the_source(gguf_of: Callable[..., Path]) -> None:
    with open_checkpoint(DEMO) as checkpoint, open_checkpoint(gguf_of("demo", "q8_0"), quantized=True) as file:
        sources = checkpoint, file
        exact, rounded = (kv_scales(source, read_text(source, TEXT, 512).sequences) for source in sources)
    for a, b in zip(exact, rounded, strict=True):
        assert not np.array_equal(a.keys, b.keys)
        assert np.allclose(a.keys, b.keys, rtol=0.02, atol=0.01 * a.keys.max())


def test_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["export", str(DEMO), str(tmp_path / "out"), *map(str, arguments)])

    onnx = ("--format", "onnx", "--quant", "int4")
    found = run(*onnx, "--kv", "int8")
    assert found.exit_code == 2
    assert "--kv int8 needs --calibration TEXT" in found.output
    assert "go with --format onnx" in run("--kv", "int8", "--calibration", TEXT).output
    found = run(*onnx, "--kv", "int8", "--calibration", TEXT, "--target", "portable")
    assert found.exit_code == 2
    assert "--calibration is for --kv int8 and --target onnxruntime" in found.output
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    assert "tokens, expected at least 512" in run(*onnx, "--kv", "int8", "--calibration", short).output
    assert not (tmp_path / "out").exists()
    assert run(*onnx, "--calibration", TEXT).exit_code == 0  # with a text, int8 is the default
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert "int8-channel: local + global" in inspected.output
