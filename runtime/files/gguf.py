"""A reader of GGUF files, version 2 and 3, little-endian, that trusts nothing in them.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic "GGUF", uint32 version, uint64
counts of tensors and keys; the keys (name, type, value); the tensor infos (name, dimensions, type, offset);
padding up to the alignment; the tensors' data. A string is a uint64 length and UTF-8 bytes.

The file is mapped, never copied: opening reads the header only, and the strings of an array are decoded when
asked for. Every count, length, size and offset is compared with what the file can hold before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import FORMAT_OF_TYPE, Readable
from .. import _native
from ..errors import InvalidModelFile, InvalidRequest, UnsupportedModelFile
from .read_only import READ_ONLY
from .strings import Strings

if TYPE_CHECKING:
    from typing import Self

# Bounds on what a hostile header costs to read. Gemma's own headers hold under 7 MB, 50 keys and 600 tensors.
_MAX_HEADER = 16 << 20
_MAX_ENTRIES = 1 << 16
_SAMPLE = 4096  # bytes of each tensor that a fingerprint covers
_MAX_KEY, _MAX_NAME, _MAX_DIMENSIONS = 65535, 64, 4  # the limits of the GGUF specification
_ALIGNMENTS = tuple(1 << i for i in range(3, 17))

_KEYS = 4 + 4 + 8 + 8  # magic, version, the numbers of tensors and of keys; then come the keys
_SMALLEST_KEY = 8 + 1 + 4 + 1  # length, one letter, value type, a one-byte value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # length, one letter, one dimension, type, offset
RECEIPT = "bezel.receipt."  # keys that may be added later, and so are no part of the fingerprint

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")
_LENGTH = _U64.size  # what precedes a string

# The tensor types of ggml by number, to name those that bezel does not read.
_GGML_TYPES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 "
    "Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M "
    "BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 "
    "NVFP4 Q1_0"
).split()
_READABLE: Mapping[int, type[Readable]] = {**FORMAT_OF_TYPE, **READ_ONLY}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` is row-major, outputs × inputs; `offset` is from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: type[Readable]
    offset: int
    nbytes: int


class StringArray(Strings):
    """A GGUF array of strings, decoded when read. Raises InvalidModelFile for bytes that are not UTF-8."""

    def __init__(self, path: Path, start: int, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """`start` is where the array's first length lies in the file."""
        super().__init__(text, ends)
        self._path, self._start = path, start

    def _decode(self, value: bytes, i: int) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            offset = self._start + _LENGTH * (i + 1) + int(self.ends[i]) - len(value) + error.start
            raise InvalidModelFile(self._path, f"string {i} of an array is not UTF-8", offset) from None


class GGUFFile:
    """An open GGUF file. `metadata` maps keys to Python scalars, read-only arrays and StringArrays.

    Raises InvalidModelFile for whatever is not a sound GGUF file. The map is released once the file is closed
    and the last array that was read from it is gone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._raw = _map_file(self.path)
        header = _Header(self.path, self._raw)
        version = header.number("I", "the version")
        if version not in (2, 3):
            header.fail(_refused_version(version), 4)
        n_tensors = header.count("tensors", _SMALLEST_TENSOR)
        n_keys = header.count("metadata keys", _SMALLEST_KEY)
        self.metadata: Mapping[str, Any] = header.keys(n_keys)
        self._receipts, self._keys_end, self._n_keys = header.receipts, header.pos, n_keys
        self._alignment: int = self.metadata.get("general.alignment", 32)
        self.tensors: dict[str, TensorInfo] = header.tensors(n_tensors, self._alignment)
        self.file_bytes = self._raw.size
        self._header_size = header.pos
        self._closed = False

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, uint8 (rows, row_bytes), a read-only view on the map; a vector is one row."""
        if self._closed:
            raise InvalidRequest(f"{self.path}: the file is closed")
        info = self.info(name)
        return self._raw[info.offset : info.offset + info.nbytes].reshape(math.prod(info.shape[:-1]), -1)

    def dequantize(self, name: str, rows: slice | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """The tensor as float32 in its own shape, or only the chosen rows, float32 (chosen, inputs)."""
        info, data = self.info(name), self.data(name)
        if rows is None:
            return info.format.dequantize(data).reshape(info.shape)
        return info.format.dequantize(data[rows])

    def header(self, receipts: Sequence[bytes] = ()) -> bytes:
        """The bytes before the tensors' data, padding included, with other keys and values in place of receipts."""
        raw, done = self._raw, _KEYS
        n_keys = self._n_keys - len(self._receipts) + len(receipts)
        parts = [raw[: _KEYS - _U64.size].tobytes(), _U64.pack(n_keys)]
        for span in self._receipts:
            parts.append(raw[done : span.start].tobytes())
            done = span.stop
        header = b"".join(
            [*parts, raw[done : self._keys_end].tobytes(), *receipts, raw[self._keys_end : self._header_size].tobytes()]
        )
        return header + bytes(-len(header) % self._alignment)

    @property
    def data_start(self) -> int:
        """Where the tensors' data begins."""
        return -(-self._header_size // self._alignment) * self._alignment

    def close(self) -> None:
        self._closed = True
        self._raw = np.empty(0, np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def samples(self) -> Iterator[memoryview]:
        """The first 4 KiB of each tensor, for a fingerprint."""
        return (self.data(name).reshape(-1)[:_SAMPLE].data for name in self.tensors)

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InvalidModelFile unless there is a tensor of each name, in its shape."""
        for name, shape in expected.items():
            found = self.tensors.get(name)
            if found is None or found.shape != shape:
                what = "nothing" if found is None else f"shape {shape_text(found.shape)}"
                raise InvalidModelFile(self.path, f"tensor {name!r}: found {what}, expected shape {shape_text(shape)}")

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises InvalidModelFile if there is none of that name."""
        if name not in self.tensors:
            raise InvalidModelFile(self.path, f"there is no tensor {name!r}")
        return self.tensors[name]


def _map_file(path: Path) -> NDArray[np.uint8]:
    """The whole file, mapped read-only, once it is known to begin as a GGUF file does."""
    try:
        # Asked before opening, because opening a named pipe waits for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InvalidModelFile(path, "this is not a file")
        with open(path, "rb") as file:
            start = file.read(64)
            if start[:4] != b"GGUF":
                raise InvalidModelFile(path, f"this is not a GGUF file: {_looks_like(start)}", 0)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise InvalidModelFile(path, "there is no such file") from None
    except (OSError, ValueError, OverflowError) as error:
        raise InvalidModelFile(path, f"it cannot be opened: {error}") from None


def _looks_like(start: bytes) -> str:
    known = {
        b"version https://git-lfs": "it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
        b"PK\x03\x04": "it looks like a zip archive or a PyTorch checkpoint",
        b"\x80\x02": "it looks like a Python pickle",
        b"\x1f\x8b": "it looks like a gzip archive",
        b"\x89HDF": "it looks like an HDF5 file",
        b"lmgg": "it is in GGML, the format before GGUF",
        b"tjgg": "it is in GGJT, a format before GGUF",
        b"fmgg": "it is in GGMF, a format before GGUF",
        b"<": "it looks like a web page; the download may have failed",
        b"{": "it looks like JSON",
    }
    if not start:
        return "it is empty"
    if start[8:9] == b"{":
        return "it looks like a safetensors file; `bezel export` makes a GGUF file of a checkpoint"
    for magic, what in known.items():
        if start.startswith(magic):
            return what
    return f"it begins with {start[:4]!r}"


def _refused_version(version: int) -> str:
    if version and version % (1 << 16) == 0:  # a small number, its bytes reversed
        return "this GGUF file is big-endian; bezel reads little-endian files"
    return f"GGUF version {version}; bezel reads versions 2 and 3"


class _Header:
    """A position in the header that never steps past the end of the file, or past what a header may hold."""

    def __init__(self, path: Path, raw: NDArray[np.uint8]) -> None:
        self.path, self.raw, self.view = path, raw, raw.data
        self.pos, self.end = len(b"GGUF"), min(raw.size, _MAX_HEADER)
        self.receipts: list[slice] = []  # the keys that begin so, with their values

    def fail(self, reason: str, offset: int | None = None) -> NoReturn:
        raise InvalidModelFile(self.path, reason, self.pos if offset is None else offset)

    def take(self, size: int, what: str) -> int:
        """Steps over `size` bytes and returns where they start."""
        start, left = self.pos, self.end - self.pos
        if size > left:
            limit = "the file" if self.end == self.raw.size else f"{_MAX_HEADER >> 20} MiB, bezel's limit for a header,"
            self.fail(f"{what} takes {_count(size)} bytes, but {limit} ends after {left}")
        self.pos += size
        return start

    def number(self, code: str, what: str) -> int:
        start = self.take(struct.calcsize("<" + code), what)
        return int(struct.unpack_from("<" + code, self.view, start)[0])

    def count(self, what: str, smallest: int) -> int:
        """A number of entries, none of which takes less than `smallest` bytes."""
        start = self.pos
        count = self.number("Q", f"the number of {what}")
        most = min((self.end - self.pos) // smallest, _MAX_ENTRIES)
        if count > most:
            self.fail(
                f"{_count(count)} {what}; there can be {most} at most in a file of {self.raw.size} bytes",
                start,
            )
        return count

    def text(self, what: str, limit: int = _MAX_HEADER) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            self.fail(f"{what} is {_count(length)} bytes long, expected {limit} at most", self.pos - 8)
        start = self.take(length, what)
        try:
            return str(self.view[start : self.pos], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8", start + error.start)

    def name(self, what: str, limit: int, taken: Mapping[str, Any]) -> str:
        start = self.pos
        name = self.text(f"the name of {what}", limit)
        if not name:
            self.fail(f"the name of {what} is empty", start)
        if name in taken:
            self.fail(f"duplicate name: {what} is called {_show(name)} as one before it", start)
        return name

    def keys(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in range(count):
            start = self.pos
            key = self.name(f"key {i}", _MAX_KEY, found)
            found[key] = self.value(f"key {_show(key)}")
            if key.startswith(RECEIPT):
                self.receipts.append(slice(start, self.pos))
        return found

    def value(self, what: str) -> Any:
        type_id = self.number("I", f"the type of {what}")
        if type_id == _STRING:
            return self.text(what)
        if type_id != _ARRAY:
            return self.numbers(type_id, 1, what)[0].item()
        type_id = self.number("I", f"the type of {what}")
        if type_id == _ARRAY:
            self.fail(f"{what} is a nested array, which no model needs", self.pos - 4)
        length = self.number("Q", f"the length of {what}")
        return self.strings(length, what) if type_id == _STRING else self.numbers(type_id, length, what)

    def numbers(self, type_id: int, length: int, what: str) -> NDArray[Any]:
        if type_id not in _NUMBERS:
            self.fail(f"{what} has the unknown value type {type_id}")
        dtype = np.dtype(_NUMBERS[type_id]).newbyteorder("<")
        start = self.take(length * dtype.itemsize, what)
        raw = self.raw[start : self.pos]
        if dtype == np.bool_ and raw.max(initial=0) > 1:
            self.fail(f"{what} is a bool of {raw.max()}, expected 0 or 1", start)
        # A copy where the file did not align the numbers, for readers that cannot do without.
        numbers: NDArray[Any] = np.require(raw.view(dtype), requirements="A")
        numbers.flags.writeable = False
        return numbers

    def strings(self, length: int, what: str) -> StringArray:
        if length * _LENGTH > self.end - self.pos:
            self.take(length * _LENGTH, what)  # fails: each string takes 8 bytes at least
        start = self.pos
        text, ends = _native.split_strings(self.raw[start : self.end], length)
        self.pos += text.size + _LENGTH * len(ends)
        if len(ends) < length:
            what = f"string {len(ends)} of {what}"
            if self.end - self.pos < _LENGTH:
                self.fail(f"{what} lies past the end of the header")
            self.fail(f"{what} is {_count(_U64.unpack_from(self.view, self.pos)[0])} bytes long")
        return StringArray(self.path, start, text, ends)

    def tensors(self, count: int, alignment: Any) -> dict[str, TensorInfo]:
        if not isinstance(alignment, int) or alignment not in _ALIGNMENTS:
            self.fail(
                f"key 'general.alignment': found {_show(alignment)}, expected a power of two from "
                f"{_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]}"
            )
        relative: dict[str, TensorInfo] = {}
        for i in range(count):
            name = self.name(f"tensor {i}", _MAX_NAME, relative)
            relative[name] = self.tensor(name, alignment)
        start = -(-self.pos // alignment) * alignment
        found = {name: replace(info, offset=start + info.offset) for name, info in relative.items()}
        end, before = start, None
        for info in sorted(found.values(), key=lambda info: info.offset):
            if info.offset < end:
                self.fail(f"tensor {_show(info.name)} overlaps tensor {_show(before)}", info.offset)
            end, before = info.offset + info.nbytes, info.name
            if end > self.raw.size:
                self.fail(
                    f"tensor {_show(info.name)} takes {info.nbytes} bytes from byte {_count(info.offset)}, "
                    f"past the end of the file at {self.raw.size}; is the download complete?"
                )
        return found

    def tensor(self, name: str, alignment: int) -> TensorInfo:
        """A tensor info whose offset still counts from the start of the data."""
        what, start = f"tensor {_show(name)}", self.pos
        n_dims = self.number("I", f"the number of dimensions of {what}")
        if not 1 <= n_dims <= _MAX_DIMENSIONS:
            self.fail(f"{what} has {n_dims} dimensions, expected 1 to {_MAX_DIMENSIONS}", start)
        shape = tuple(self.number("Q", f"the shape of {what}") for _ in range(n_dims))[::-1]
        type_id = self.number("I", f"the type of {what}")
        offset = self.number("Q", f"the offset of {what}")
        if type_id not in _READABLE:
            known = ", ".join(kind.name for kind in _READABLE.values())
            found = _GGML_TYPES[type_id] if type_id < len(_GGML_TYPES) else f"of the unknown type {type_id}"
            raise UnsupportedModelFile(
                self.path,
                f"{what} is {found}; bezel reads {known}. Look for the model in one of these, or export its checkpoint",
            )
        kind = _READABLE[type_id]
        if 0 in shape:
            self.fail(f"{what} has shape {shape_text(shape)}: a dimension is zero", start)
        if shape[-1] % kind.block:
            self.fail(
                f"{what} has rows of {shape[-1]} weights, {kind.name} needs a multiple of {kind.block}",
                start,
            )
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        if nbytes > self.raw.size:
            self.fail(
                f"{what} of shape {shape_text(shape)} takes {_count(nbytes)} bytes, more than the whole file of "
                f"{self.raw.size}; is the download complete?",
                start,
            )
        if offset % alignment:
            self.fail(f"{what} has offset {offset}, expected a multiple of the alignment {alignment}", start)
        return TensorInfo(name, shape, kind, offset, nbytes)


def shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(_count, shape))


def _count(number: int) -> str:
    """A number out of the file, in a length that a message can hold."""
    return str(number) if number < 1 << 64 else f"over 2^{number.bit_length() - 1}"


def _show(value: object) -> str:
    """A value out of the file, cut short and without control characters."""
    return repr(value[:80] if isinstance(value, str) else value)[:100]
