"""Types of GGUF that bezel reads and never writes: opened, run by the reference engine, converted; refused natively.

Files are written by the gguf package, with random blocks whose float16 scales are those of ordinary weights.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES, write_checkpoint
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import verify
from bezel.quant.formats import FORMAT_OF_TYPE, Readable
from bezel.quant.recipes import PRESETS
from bezel.runtime import load
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidModelFile, InvalidRequest, UnsupportedModelFile
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.files.read_only import F64, READ_ONLY
from click.testing import CliRunner
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import pack, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import export

KINDS = {kind.name: kind for kind in READ_ONLY.values() if kind is not F64}
IDS = [2, 40, 77, 500, 13, 13, 600]
# Where a block has its float16; that of IQ1_M is cut up into the high bits of the last 8 bytes, others have none.
_HALF = {"tq1_0": 52, "tq2_0": 64} | dict.fromkeys(("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), 0)


def random_blocks(kind: type[Readable], shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(5)
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows * columns // kind.block, kind.block_bytes), np.uint8)
    if kind.name == "iq1_m":
        blocks[:, 49:56:2] &= 15
        blocks[:, 55] |= 0x20  # 2⁻⁷
    elif kind.name == "mxfp4":
        blocks[:, 0] = rng.integers(118, 124, len(blocks))  # exponents of 2 plus 127
    elif kind.name == "nvfp4":
        blocks[:, :4] = rng.integers(0x10, 0x28, (len(blocks), 4))  # floats of 4 + 3 bits, 2⁻⁵ to 2⁻²
    elif kind.name in _HALF:
        at = _HALF[kind.name]
        blocks[:, at : at + 2] = np.array([0.01], "<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def rewritten(source: Path, out: Path, change: Callable[[np.ndarray], tuple[np.ndarray, int]]) -> Path:
    """`source` with other data in its matrices: `change` gives bytes and their type for a matrix's float32 numbers."""
    with GGUFModel(source) as file:
        writer = gguf.GGUFWriter(out, "gemma2")
        reader = gguf.GGUFReader(source)
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
        for info in file.tensors.values():
            values = file.dequantize(info.name)
            data, kind = change(values) if len(info.shape) > 1 else (values, 0)
            writer.add_tensor(info.name, data, raw_dtype=GGMLQuantizationType(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model whose matrices are random blocks of a type."""
    scratch = tmp_path_factory.mktemp("read only")
    shape = SHAPES["tiny-gemma-2"] | {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 512}
    plain = export(write_checkpoint(scratch / "m", shape | {"num_hidden_layers": 3}), scratch / "plain.gguf")

    @cache
    def make(name: str) -> Path:
        kind = KINDS[name]
        return rewritten(plain, scratch / f"{name}.gguf", lambda x: (random_blocks(kind, x.shape), kind.gguf_type))

    return make


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_names_and_sizes_are_ggml_s(kind: type[Readable]) -> None:
    theirs = GGMLQuantizationType(kind.gguf_type)
    assert theirs.name.lower() == kind.name
    assert GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)


def test_they_are_offered_to_nobody_who_writes() -> None:
    assert not KINDS.keys() & set(PRESETS)
    assert not READ_ONLY.keys() & FORMAT_OF_TYPE.keys()


@given(st.sampled_from(list(KINDS.values())), st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_dequantized_as_gguf_does(kind: type[Readable], seed: int, rows: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, 2 * kind.block_bytes), np.uint8)
    data.flags.writeable = False  # as in a mapped file
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(data, GGMLQuantizationType(kind.gguf_type))
    found = kind.dequantize(data)
    assert found.dtype == np.float32
    assert found.shape == (rows, 2 * kind.block)
    assert np.array_equal(found, want, equal_nan=True)


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_engine_runs_it(name: str, file_of: Callable[[str], Path], tmp_path: Path) -> None:
    """With the logits of a float32 file of the same numbers; rows that are read alone are those of the whole."""
    path = file_of(name)
    numbers = rewritten(path, tmp_path / "numbers.gguf", lambda x: (x, 0))
    with GGUFModel(path) as file:
        assert {i.format.name for i in file.tensors.values()} == {"f32", name}
        for tensor_name in ("token_embd.weight", "blk.1.ffn_down.weight"):
            whole = file.dequantize(tensor_name)
            assert 0.001 < whole.std() < 10
            assert np.array_equal(file.dequantize(tensor_name, slice(3, 5)), whole[3:5])
    with load(path, engine="reference", kv="f32") as model, load(numbers, engine="reference", kv="f32") as twin:
        assert np.array_equal(model.logits(IDS), twin.logits(IDS))
    assert f"embedding and head in {name}" in run("inspect", path).output


@pytest.mark.parametrize("name", KINDS)
def test_it_is_converted_once(name: str, file_of: Callable[[str], Path], tmp_path: Path) -> None:
    path, out = file_of(name), tmp_path / "out.gguf"
    refused = run("export", path, out, "--quant", "q8_0")
    assert refused.exit_code == 1
    assert f"is {name}" in refused.output
    assert "--requantize" in refused.output
    done = run("export", path, out, "--requantize", "--quant", "q8_0")
    assert done.exit_code == 0, done.output
    assert f"{name} weights are rounded again" in done.output
    with open_checkpoint(path, quantized=True) as source:
        assert all(report.ok for report in verify(out, source))
    with load(path, engine="reference", kv="f32") as model, load(out, kv="f32") as native:
        want, found = model.logits(IDS), native.logits(IDS)
    assert np.corrcoef(want.ravel(), found.ravel())[0, 1] > 0.99


def test_double_precision(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    single = gguf_of("gemma2-gqa")
    path = rewritten(single, tmp_path / "f64.gguf", lambda x: (x.astype("<f8").view(np.uint8), F64.gguf_type))
    with load(path, engine="reference", kv="f32") as model, load(single, engine="reference", kv="f32") as twin:
        assert np.array_equal(model.logits(IDS), twin.logits(IDS))
    with pytest.raises(UnsupportedModelFile, match="is f64, which the native engine has no kernels for"):
        load(path)
    assert run("export", path, tmp_path / "out.gguf", "--quant", "q8_0").exit_code == 0


def test_the_native_engine_says_what_to_do(file_of: Callable[[str], Path]) -> None:
    path = file_of("iq2_xxs")
    with pytest.raises(UnsupportedModelFile) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: not supported: tensor 'token_embd.weight' is iq2_xxs, which the native engine has no kernels for. "
        f"Run it slowly with --engine reference, or convert it once: bezel export {shlex.quote(str(path))} OUT.gguf "
        "--requantize --quant q8_0"
    )


def test_nothing_says_how_far_from_its_source_it_may_be(file_of: Callable[[str], Path]) -> None:
    path = file_of("tq2_0")
    with (
        open_checkpoint(path, quantized=True) as source,
        pytest.raises(InvalidRequest, match=r"'token_embd.weight' is tq2_0, which bezel does not write"),
    ):
        verify(path, source)


def test_onnx_holds_its_numbers_as_float32_only(file_of: Callable[[str], Path], tmp_path: Path) -> None:
    refused = run("export", file_of("mxfp4"), tmp_path / "onnx", "--format", "onnx")
    assert refused.exit_code == 1
    assert "is mxfp4, which ONNX cannot hold exactly" in refused.output


def test_without_the_package(file_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file opens all the same: what is in it can be told."""
    path = file_of("iq3_s")
    with GGUFModel(path) as file:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "gguf", None)
            with pytest.raises(InvalidRequest, match=r"iq3_s weights are read by .* pip install 'bezel-lm\[gguf\]'"):
                file.dequantize("token_embd.weight")
        monkeypatch.delitem(gguf.quants._type_traits, GGMLQuantizationType.IQ3_S)
        with pytest.raises(InvalidRequest, match=r"iq3_s .* is too old: pip install -U gguf"):
            file.dequantize("token_embd.weight")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_sizes_are_checked(kind: type[Readable], tmp_path: Path) -> None:
    data = bytes(kind.row_bytes(512) * 2)
    for columns, size, words in (
        (512 + kind.block // 2, len(data), f"{kind.name} needs a multiple of {kind.block}"),
        (512, len(data) - 1, "past the end of the file"),
        (1 << 40, len(data), "more than the whole file"),
    ):
        path = tmp_path / "bad.gguf"
        path.write_bytes(pack([], [tensor("t", (columns, 2), kind.gguf_type)], data[:size]))
        with pytest.raises(InvalidModelFile, match=words):
            GGUFModel(path)
