"""GGUF files in parts, as llama.cpp's gguf-split makes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bezel.export.gguf.header import TensorRecord, encode_header
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime import load
from bezel.runtime.errors import InvalidModelFile
from bezel.runtime.files.gguf import GGUFFile
from bezel.runtime.files.gguf_model import GGUFModel
from gguf_files import split


@pytest.fixture(scope="module")
def demo(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q8_0")


@pytest.mark.parametrize("count", [2, 3])
def test_parts_make_the_whole(count: int, demo: Path, tmp_path: Path) -> None:
    first, *others = split(demo, tmp_path, count)
    ids = [2, *range(300, 340)]
    with load(first, threads=1) as parts, load(demo, threads=1) as whole:
        assert np.array_equal(parts.session().prefill(ids), whole.session().prefill(ids))
        assert parts.file.file_bytes == sum(path.stat().st_size for path in (first, *others))
        fingerprint = parts.file.fingerprint()
    with open_checkpoint(first, quantized=True) as source, open_checkpoint(demo, quantized=True) as expected:
        assert source.files == (first, *others)
        for spec in source.specs:
            assert np.array_equal(source.tensor(spec), expected.tensor(spec))
    raw = bytearray(others[0].read_bytes())
    raw[raw.index(b"blk.")] ^= 1
    others[0].write_bytes(raw)
    with GGUFModel(first) as file:
        assert file.fingerprint() != fingerprint


def test_parts_as_the_gguf_package_writes_them(demo: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(demo)
    writer = gguf.GGUFWriter(tmp_path / "demo.gguf", "gemma2", split_max_tensors=16)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = min(tmp_path.iterdir())
    assert first.name == "demo-00001-of-00003.gguf"
    with GGUFModel(first) as parts, GGUFModel(demo) as whole:
        assert parts.metadata["split.count"] == 3
        assert parts.config() == whole.config()
        for name in whole.tensors:
            assert np.array_equal(parts.data(name), whole.data(name))


def test_parts_that_do_not_fit(demo: Path, tmp_path: Path) -> None:
    first, second, third = split(demo, tmp_path, 3)
    with pytest.raises(InvalidModelFile, match=r"part 2 of 3 of a model; give the first, demo-00001-of-00003\.gguf"):
        GGUFModel(second)
    shutil.copy(second, third)
    with pytest.raises(InvalidModelFile, match=r"demo-00003-of-00003.* is part 1 of 3, counted from 0"):
        GGUFModel(first)
    third.unlink()
    with pytest.raises(InvalidModelFile, match=r"demo-00003-of-00003.* there is no such file"):
        GGUFModel(first)
    with pytest.raises(InvalidModelFile, match=r"which call for another name"):
        GGUFModel(first.rename(tmp_path / "renamed.gguf"))


@pytest.mark.parametrize(
    "changes", [{"split.count": "two"}, {"split.no": 5}, {"split.count": 0}, {"split.no": [1]}, {"split.count": [2, 2]}]
)
def test_parts_that_lie(changes: dict[str, Any], demo: Path, tmp_path: Path) -> None:
    first, _ = split(demo, tmp_path, 2, **changes)
    with pytest.raises(InvalidModelFile, match="split"):
        GGUFModel(first)


def test_a_tensor_in_two_parts(demo: Path, tmp_path: Path) -> None:
    first, second = split(demo, tmp_path, 2)
    with GGUFFile(demo) as file:
        info = next(iter(file.tensors.values()))
        record = TensorRecord(info.name, info.shape, info.format.gguf_type, 0)
        header = encode_header({"split.no": 1, "split.count": 2}, [record])
        second.write_bytes(header + file.data(info.name).tobytes())
    with pytest.raises(InvalidModelFile, match="is in a part before this one, too"):
        GGUFModel(first)
