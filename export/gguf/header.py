"""The part of a GGUF file before its data: version 3, little-endian.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, key-value pairs,
one record a tensor, padding to ALIGNMENT. A page of code here spares users the `gguf` package.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGNMENT = 32

_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ARRAY_TYPES = {"uint32": _UINT32, "int32": 5, "float32": _FLOAT32, "bool": _BOOL}


@dataclass(frozen=True)
class TensorRecord:
    """`shape` is row-major; `offset` counts from the start of the data and is a multiple of ALIGNMENT."""

    name: str
    shape: tuple[int, ...]
    gguf_type: int
    offset: int


def aligned(n: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def encode_header(metadata: Mapping[str, Any], tensors: Sequence[TensorRecord]) -> bytes:
    """Everything before the data. Its length depends on the metadata's lengths only, not on their content.

    int → uint32, float → float32, bool, str; lists of str, int, float, bool → arrays of the same; NumPy arrays of
    uint32, int32, float32 and bool → arrays of their type.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(encode_entry(key, value))
    for tensor in tensors:
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape)),
            struct.pack("<IQ", tensor.gguf_type, tensor.offset),
        ]
    header = b"".join(parts)
    return header + bytes(aligned(len(header)) - len(header))


def _string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def encode_entry(key: str, value: Any) -> bytes:
    """A key and its value, as `encode_header` says."""
    return _string(key) + _value(key, value)


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, (bool, np.bool_)):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, (int, np.integer)):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, (float, np.floating)):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if not isinstance(value, np.ndarray):
        value = list(value)
        if all(isinstance(item, (str, bytes)) for item in value):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
        kind = np.array(value).dtype.kind
        value = np.array(value, {"f": np.float32, "b": np.bool_}.get(kind, np.uint32))
    if value.dtype.name not in _ARRAY_TYPES:
        raise TypeError(f"metadata key '{key}': an array of {value.dtype}")
    array_type = _ARRAY_TYPES[value.dtype.name]
    raw: bytes = value.astype(value.dtype.newbyteorder("<")).tobytes()
    return struct.pack("<IIQ", _ARRAY, array_type, len(value)) + raw
