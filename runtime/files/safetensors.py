"""How a safetensors file begins, and files of arrays.

A little-endian uint64 header length, a JSON header of tensor name → dtype, shape, data_offsets, then the data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..arrays import Arrays

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I64": 8}  # bytes of a number
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int8): "I8", np.dtype(np.int64): "I64"}
_DIGEST = "sha256"


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """How a file of `tensors`, their dtypes and shapes by name, begins; and at which byte each one's data does."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    return begin, {name: len(begin) + start for name, start in starts.items()}


def write_arrays(file: BinaryIO, arrays: Arrays, labels: Mapping[str, str]) -> None:
    """Arrays by name with a checksum, and what is to be known of them."""
    shapes = {name: (_NAMES[array.dtype], array.shape) for name, array in arrays.items()}
    file.write(encode_header(shapes, {**labels, _DIGEST: _digest(arrays)})[0])
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)


def read_labels(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself, or nothing where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, ValueError):
        return {}


def read_arrays(path: Path, only: str | None = None) -> tuple[dict[str, str], dict[str, Any]]:
    """What `write_arrays` wrote: labels and arrays; or `only` the array of a name, whose checksum nobody asks for.

    Raises ValueError for a file that is none, or that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # a pipe would be waited for
        raise ValueError("there is no such file" if not path.exists() else "it is no file")
    try:
        with safe_open(path, framework="numpy") as file:
            labels = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys() if only in (None, name)}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    digest = labels.pop(_DIGEST, None)
    if only is None and digest != _digest(arrays):
        raise ValueError("its checksum is another than when it was written: the file is damaged")
    return labels, arrays


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
