"""Receipts: what was measured is written into a file, and nothing else of the file changes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bezel.bench.loss.result import MeasuredText
from bezel.bench.synthetic import write_gguf
from bezel.export.gguf.header import encode_header
from bezel.export.gguf.receipt import PLACEHOLDERS, Receipt, stamp
from bezel.runtime import load
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidModelFile, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from click.testing import CliRunner
from measured import result
from tiny import TEXT

GgufOf = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path, gguf_of: GgufOf) -> Path:
    return Path(shutil.copy(gguf_of("demo", "q4_0"), tmp_path / "demo.gguf"))


def receipts_of(reference: Path, **changes: Any) -> list[Receipt]:
    """As the candidates of a measurement get them."""
    made = result(**changes)
    return replace(made, reference=replace(made.reference, path=str(reference))).receipts()


def receipt(model: Path) -> Any:
    return json.loads(CliRunner().invoke(main, ["inspect", str(model), "--json"]).output)["receipt"]


def test_a_receipt_says_what_was_measured(model: Path, gguf_of: GgufOf) -> None:
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    assert receipt(model) is None
    stamp(model, measured)
    figures = {"kld_mean": 0.0123456, "kld_mean_low": 0.0123456 * 0.97, "kld_p999": 0.31415, "top1": 0.9412}
    with GGUFModel(gguf_of("demo", "f32")) as reference:
        texts = {
            "reference": "exact",
            "reference_sha256": reference.fingerprint(),
            "text_sha256": "0123456789abcdef" * 4,
        }
    texts |= {"date": "2026-01-02T03:04:05Z", "tool": "bezel 0.1.0", "protocol": "chunks of 512"}
    found = receipt(model)
    assert {key: found[key] for key in texts} == texts
    assert {key: found[key] for key in figures} == pytest.approx(figures, rel=2**-24)
    assert found["tokens"] == 2560
    words = CliRunner().invoke(main, ["inspect", str(model)]).output
    assert "measured against exact" in words
    assert "0.01235 nats per token (0.01198 to 0.01284)" in words
    assert "94.12% of positions" in words
    fields = gguf.GGUFReader(model).fields  # an independent reader finds the same
    assert fields["bezel.receipt.top1"].contents() == np.float32(0.9412)
    assert fields["bezel.receipt.text_sha256"].contents() == texts["text_sha256"]


def test_a_receipt_of_few_chunks_has_no_interval(model: Path, gguf_of: GgufOf) -> None:
    first, _ = receipts_of(gguf_of("demo", "f32"))
    stamp(model, replace(first, kld_mean_low=None, kld_mean_high=None))
    assert "mean KLD               0.01235 nats per token\n" in CliRunner().invoke(main, ["inspect", str(model)]).output


def test_nothing_but_the_receipt_changes(model: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    before = model.read_bytes()
    session = load(model).session()
    session.prefill([2, 100, 200])
    session.save(tmp_path / "session")
    with GGUFModel(model) as file:
        print1, spans = file.fingerprint(), file.receipt_spans
    for measured in receipts_of(gguf_of("demo", "f32")):  # a second receipt takes the place of the first
        stamp(model, measured)
        after = model.read_bytes()
        changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)).tolist()
        assert changed
        assert all(any(span.start <= i < span.stop for span in spans.values()) for i in changed)
    assert receipt(model)["kld_mean"] == pytest.approx(0.00123456)
    with GGUFModel(model) as file:
        assert file.fingerprint() == print1
    load(model).session().restore(tmp_path / "session")
    other = bytearray(before)  # whereas another key's value makes it another model
    other[before.index(b"fairy-gemma2")] = ord("F")
    model.write_bytes(other)
    with GGUFModel(model) as file:
        assert file.fingerprint() != print1


def test_a_file_without_room_is_refused(tmp_path: Path, gguf_of: GgufOf) -> None:
    bare = tmp_path / "bare.gguf"
    write_gguf(bare, "tiny-gemma-2", "q4_0")
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    before = bare.read_bytes()
    with pytest.raises(InvalidRequest, match="export the model again"):
        stamp(bare, measured)
    assert bare.read_bytes() == before
    (tmp_path / "text").write_text("no model")
    with pytest.raises(InvalidModelFile):
        stamp(tmp_path / "text", measured)


@pytest.mark.parametrize(
    ("key", "value"),
    [("protocol", "twenty bytes of room"), ("kld_mean", "four"), ("tokens", True), ("date", ["2026-01-02T03:04:05Z"])],
)
def test_room_of_another_shape_is_refused(key: str, value: Any, tmp_path: Path, gguf_of: GgufOf) -> None:
    """As in a file of another version, or in one that is made to have a writer run over."""
    out = tmp_path / "odd.gguf"
    out.write_bytes(encode_header({**PLACEHOLDERS, f"bezel.receipt.{key}": value}, []))
    before = out.read_bytes()
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    with pytest.raises(InvalidRequest, match=f"key 'bezel.receipt.{key}'"):
        stamp(out, measured)
    assert out.read_bytes() == before


def test_a_failure_leaves_the_file_as_it_was(model: Path, gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.read_bytes()
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    prints = iter(["one", "another"])
    monkeypatch.setattr(GGUFModel, "fingerprint", lambda _: next(prints))
    with pytest.raises(InvalidRequest, match="another program"):
        stamp(model, measured)
    assert model.read_bytes() == before


def test_what_does_not_fit_is_cut_and_what_is_missing_stays_empty(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    measured, _ = receipts_of(folder, texts=[MeasuredText(p, p * 64, 1) for p in "ab"])
    stamp(model, replace(measured, reference="ü" * 100, kld_mean_high=None))
    found = receipt(model)
    assert found["reference"] == "ü" * 32
    assert "kld_mean_high" not in found
    assert found["reference_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert found["text_sha256"] == hashlib.sha256(f"{'a' * 64}\n{'b' * 64}\n".encode()).hexdigest()


def test_placeholders_are_no_receipt(gguf_of: GgufOf) -> None:
    with GGUFModel(gguf_of("demo", "q4_0")) as file:
        assert file.receipt_spans.keys() == PLACEHOLDERS.keys()
        assert math.isnan(file.metadata["bezel.receipt.kld_mean"])
    assert "Receipt" not in CliRunner().invoke(main, ["inspect", str(gguf_of("demo", "q4_0"))]).output


def test_llama_cpp_reads_a_file_with_a_receipt(model: Path, gguf_of: GgufOf) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    stamp(model, measured)
    llama = llama_cpp.Llama(str(model), n_ctx=64, verbose=False, n_threads=2)
    llama.eval([2, 100])
    assert float(llama.metadata["bezel.receipt.top1"]) == pytest.approx(0.9412)


def measure(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["measure", *map(str, arguments)])


def test_measure_writes_a_receipt(model: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    again = f"{model}@kv=int8"  # the same file in another setting: the first one's receipt stays
    options = ("--text", TEXT, "--chunks", 2, "--chunk", 64, "--receipt", "--json", "--state", tmp_path / "state")
    found = measure(model, again, "--reference", gguf_of("demo"), *options)
    assert found.exit_code == 0, found.output
    first, second = json.loads(found.stdout)["candidates"]
    assert receipt(model)["kld_mean"] == pytest.approx(first["metrics"]["kld_mean"]["value"], rel=2**-24)
    assert receipt(model)["engine"] == "native, int8 activations, f16 KV"
    assert second["kv"] == "int8"


def test_room_is_asked_for_before_measuring(tmp_path: Path, gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = write_gguf(tmp_path / "bare.gguf", "tiny-gemma-2", "q4_0")
    monkeypatch.setattr("bezel.bench.commands.measure.run", lambda *_, **__: pytest.fail("it has begun to measure"))
    found = measure(bare, "--reference", gguf_of("demo"), "--text", TEXT, "--receipt")
    assert found.exit_code == 1
    assert "export the model again" in found.output
