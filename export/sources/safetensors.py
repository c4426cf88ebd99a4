"""Safetensors headers: a reader that believes nothing it has not checked.

The format: a little-endian uint64 header length, a JSON header of tensor name → dtype, shape, data_offsets,
then the data, which the tensors cover without gap or overlap (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...quant.formats import BF16, F16, F32, Readable
from ...runtime.errors import InvalidCheckpoint
from ...runtime.files import strict_json
from ...runtime.files.read_only import F64

MAX_HEADER = 100_000_000
DTYPES: dict[str, type[Readable]] = {"F64": F64, "F32": F32, "F16": F16, "BF16": BF16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, row after row: `offset` in bytes from the start of `file`, `shape` outputs × inputs."""

    file: Path
    format: type[Readable]
    shape: tuple[int, ...]
    offset: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or InvalidCheckpoint."""
    if path.stat().st_size > MAX_HEADER:
        raise InvalidCheckpoint(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_HEADER}")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    return strict_json.parse_json(text, lambda reason: InvalidCheckpoint(f"{path}: {reason}"))


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of one safetensors file says about it. Raises InvalidCheckpoint for a file of another kind."""
    found = _read_json_header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InvalidCheckpoint(f"{path}: __metadata__: expected names and texts")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises InvalidCheckpoint if the header and the file disagree."""
    header, length = _read_json_header(path)
    header.pop("__metadata__", None)
    data_start, data_size = 8 + length, path.stat().st_size - 8 - length

    tensors: dict[str, StoredTensor] = {}
    extents = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _entry(path, name, entry)
        want = DTYPES[dtype].block_bytes
        for n in shape:
            want *= n
        if end - begin != want or end > data_size:
            raise InvalidCheckpoint(
                f"{path}: tensor {name[:200]!r}: bytes {begin} to {end}, expected {want} bytes "
                f"({dtype} {list(shape)}) inside the {data_size} bytes of data; if the file is cut short, "
                "fetch it again"
            )
        tensors[name] = StoredTensor(path, DTYPES[dtype], shape, data_start + begin)
        extents.append((begin, end, name))

    position = 0
    for begin, end, name in sorted(extents):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise InvalidCheckpoint(f"{path}: tensor {name[:200]!r} begins at {begin} and {fault}, expected {position}")
        position = end
    if position != data_size:
        raise InvalidCheckpoint(f"{path}: tensors end at byte {position} of the data, expected {data_size}")
    return tensors


def _read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and its length in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise InvalidCheckpoint(
                f"{path}: not a safetensors file, or cut short: a header of {length} bytes, "
                f"expected at most {max(0, min(MAX_HEADER, size - 8))} in a file of {size} bytes"
            )
        return parse_json(file.read(length), path), length


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)

    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpoint(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidCheckpoint(f"{where}: dtype {str(dtype)[:20]!r}, expected one of {', '.join(DTYPES)}")
    if not sizes(shape) or len(shape) > 8:
        raise InvalidCheckpoint(f"{where}: shape {str(shape)[:80]}, expected a list of sizes")
    if not sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidCheckpoint(f"{where}: data_offsets {str(offsets)[:80]}, expected [begin, end]")
    return dtype, tuple(shape), (offsets[0], offsets[1])
