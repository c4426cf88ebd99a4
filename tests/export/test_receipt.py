"""Receipts: what was measured is written into a file, and nothing else of the file changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bezel.bench.loss.result import MeasuredText
from bezel.export.gguf.receipt import Receipt, stamp
from bezel.runtime import load
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidModelFile, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from click.testing import CliRunner
from gguf_files import edited
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
    session = load(model).session()
    session.prefill([2, 100, 200])
    session.save(tmp_path / "session")
    before = model.read_bytes()

    def content() -> tuple[Any, ...]:
        reader = gguf.GGUFReader(model)
        keys = [(key, f.contents()) for key, f in reader.fields.items() if "receipt" not in key and "GGUF" not in key]
        return keys, [(t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors]

    expected = content()
    with GGUFModel(model) as file:
        print1 = file.fingerprint()
        assert not any("receipt" in key for key in file.metadata)
    for measured in receipts_of(gguf_of("demo", "f32")):  # a second receipt takes the place of the first
        stamp(model, measured)
        assert content() == expected
        with GGUFModel(model) as file:
            assert sum("receipt" in key for key in file.metadata) == 14
            assert file.fingerprint() == print1
    assert receipt(model)["kld_mean"] == pytest.approx(0.00123456)
    load(model).session().restore(tmp_path / "session")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    other = bytearray(before)  # whereas another key's value makes it another model
    other[before.index(b"fairy-gemma2")] = ord("F")
    model.write_bytes(other)
    with GGUFModel(model) as file:
        assert file.fingerprint() != print1


def test_what_is_no_model_gets_none(tmp_path: Path, gguf_of: GgufOf) -> None:
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    (tmp_path / "text").write_text("no model")
    with pytest.raises(InvalidModelFile):
        stamp(tmp_path / "text", measured)
    assert (tmp_path / "text").read_text() == "no model"


def test_a_receipt_in_the_place_of_another_writers(gguf_of: GgufOf, tmp_path: Path) -> None:
    """Of other types, lengths and among the other keys; and in a file of another alignment."""
    odd = {"bezel.receipt.kld_mean": "four", "zz": 5, "bezel.receipt.x": ["a", "b"], "general.alignment": 64}
    model = edited(gguf_of("demo", "q8_0"), tmp_path / "m.gguf", odd, 64)
    with GGUFModel(model) as file:
        print1, weights = file.fingerprint(), file.dequantize("blk.3.ffn_up.weight")
    measured, _ = receipts_of(gguf_of("demo", "f32"))
    stamp(model, measured)
    with GGUFModel(model) as file:
        assert file.fingerprint() == print1
        assert (file.metadata["zz"], "bezel.receipt.x" in file.metadata) == (5, False)
        assert np.array_equal(file.dequantize("blk.3.ffn_up.weight"), weights)
    assert gguf.GGUFReader(model).fields["bezel.receipt.tokens"].contents() == 2560


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


def test_the_file_is_looked_at_before_measuring(
    tmp_path: Path, gguf_of: GgufOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bezel.bench.commands.measure.run", lambda *_, **__: pytest.fail("it has begun to measure"))
    (tmp_path / "text").write_text("no model")
    found = measure(tmp_path / "text", "--reference", gguf_of("demo"), "--text", TEXT, "--receipt")
    assert found.exit_code == 1
    assert "not a GGUF file" in found.output
