"""`bezel verify --run`: what computes as its source does passes; planted faults are seen, whatever the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bezel.bench.loss.agreement import LARGEST_KLD, Span, agreement
from bezel.export.onnx.export import export_folder
from bezel.runtime import _native
from bezel.runtime.commands.main import main
from bezel.runtime.engines import ort as ort_engine
from bezel.runtime.errors import BezelError
from bezel.runtime.files.gguf_model import GGUFModel
from click.testing import CliRunner
from tiny import DEMO

GgufOf = Callable[..., Path]
OnnxOf = Callable[..., Path]


def folder_of(source: Path, out: Path) -> Path:
    export_folder(source, out, None, None, "onnxruntime", lambda *_: None, False)
    return out


def test_a_folder_and_the_file_that_it_was_made_from(
    tmp_path: Path, gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_engine, "CHUNK", 24)  # less than the other engine takes, as with a window of 4096
    source = gguf_of("demo", "q4_0")
    seen: list[tuple[int, int]] = []
    spans = agreement(
        folder_of(source, tmp_path / "out"), source, True, progress=lambda *now: seen.append((now[0], now[1]))
    )
    assert [(span.first, span.last) for span in spans] == [(0, 63), (64, 127), (128, 159)]
    assert all(span.ok and 0 < span.kld < 1e-10 and span.same_top == 1 for span in spans)
    assert seen[:2] == [(0, 160), (24, 160)]
    assert seen[-1] == (160, 160)


@pytest.mark.parametrize("quant", ["f32", "int8", "int4"])
def test_a_folder_of_a_checkpoint(quant: str, onnx_of: OnnxOf) -> None:
    assert all(span.ok and span.kld < 1e-10 for span in agreement(onnx_of("demo", quant), DEMO, False))


def test_a_folder_with_int8_keys_and_values(onnx_of: OnnxOf) -> None:
    """Their rounding is part of what both sides compute; now and then a number falls on the other side of a half."""
    assert all(span.ok and span.kld < 1e-7 for span in agreement(onnx_of("demo", "int4", kv="int8"), DEMO, False))


@pytest.mark.parametrize("name", ["demo", "gemma1-mqa", "gemma2-mha-odd-layers"])
def test_a_gguf_file(name: str, gguf_of: GgufOf) -> None:
    assert all(span.ok and span.kld < 1e-10 for span in agreement(gguf_of(name, "q4_0"), DEMO, False))


def off(spans: list[Span]) -> list[bool]:
    return [not span.ok for span in spans]


@pytest.mark.parametrize("kv", ["f32", "int8"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_window_that_is_one_off(quant: str, kv: str, onnx_of: OnnxOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing shows within the first window, everything after it."""
    visible = ort_engine._visible

    def shorter(cache: Any, *rest: Any) -> Any:
        window = cache.window
        try:
            cache.window = window and window - 1
            return visible(cache, *rest)
        finally:
            cache.window = window

    folder = onnx_of("demo", quant, kv=kv)
    monkeypatch.setattr(ort_engine, "_visible", shorter)
    spans = agreement(folder, DEMO, False)
    assert off(spans) == [False, True, True]
    assert spans[1].kld > 50 * LARGEST_KLD


def test_a_window_that_is_one_off_in_the_native_engine(gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = _native.KVStore.attend

    def shorter(self: Any, pool: Any, queries: Any, first: Any, last: Any, *rest: Any) -> Any:
        return attend(self, pool, queries, np.where(first > 0, first + 1, 0), last, *rest)

    monkeypatch.setattr(_native.KVStore, "attend", shorter)
    assert off(agreement(gguf_of("demo", "q4_0"), DEMO, False)) == [False, True, True]


def test_a_damaged_graph(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_folder(DEMO, folder, "int4", None, "onnxruntime", lambda *_: None, False)
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "softcap":
                attribute.f = 0
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "bezel.json").read_text())
    content = path.read_bytes()
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "bezel.json").write_text(json.dumps(manifest))
    assert off(agreement(folder, DEMO, False)) == [True] * 3


def test_a_model_without_numbers_is_named(tmp_path: Path, gguf_of: GgufOf) -> None:
    original = gguf_of("demo", "q8_0")
    with GGUFModel(original) as gguf:
        offset = gguf.tensors["output_norm.weight"].offset
    raw = bytearray(original.read_bytes())
    raw[offset : offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "broken.gguf").write_bytes(raw)
    with pytest.raises(BezelError, match=r"broken\.gguf: a logit that is not finite at position 0"):
        agreement(tmp_path / "broken.gguf", DEMO, False)


def test_the_command(onnx_of: OnnxOf, gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["verify", str(onnx_of("demo", "int4")), "--source", str(DEMO), "--run"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    assert "46 tensors, all as expected" in found.output
    assert "3 windows, all as expected; a mean KLD of 1e-06 is allowed" in found.output
    visible = ort_engine._visible
    monkeypatch.setattr(ort_engine, "_visible", lambda *args: np.ones_like(visible(*args)))
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 1
    assert "46 tensors, all as expected" in found.output
    assert "3 windows, 3 off" in found.output
    other = CliRunner().invoke(main, [*command[:3], str(gguf_of("gemma2-gqa", "q8_0"))])
    assert other.exit_code == 1
    assert "layer 0: window is 64, and 8 in " in other.output
    assert "these are two models" in other.output


def test_ctrl_c(gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bezel.bench.commands.verify.agreement", stop)
    found = CliRunner().invoke(main, ["verify", str(gguf_of("demo", "q8_0")), "--source", str(DEMO), "--run"])
    assert (found.exit_code, found.stdout) == (130, "")
    assert "cancelled" in found.stderr
