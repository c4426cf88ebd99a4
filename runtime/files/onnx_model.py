"""What a `model.onnx` holds, read field by field before onnxruntime sees it, and believed by nobody until then.

Messages and fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. Only what `bezel export` writes is let
through: a field that is not in `_SCHEMA`, or that comes twice where it counts once (libraries merge such messages or
keep the last), is an error, so that no other reader of the same bytes can see another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InvalidModelFile
from .protobuf import BYTES, FIXED32, FIXED64, VARINT, read_fields, read_varints

# Bounds on what a hostile graph costs to read. Gemma 2 27B's takes about 60,000 fields and 4 MB.
_MAX_FIELDS = 1 << 18
_MAX_DEPTH = 24
_MAX_NAME = 256

DOMAINS = ("", "ai.onnx", "com.microsoft")

# Message → its fields: number, name, kind. A kind is another message, or a type; * marks what may come several times.
_SCHEMA_TEXT = {
    "Model": "1 ir_version int; 2 producer_name bytes; 3 producer_version bytes; 4 domain bytes; 5 model_version int; "
    "6 doc_string bytes; 7 graph Graph; 8 opset_import OperatorSet*; 14 metadata_props Entry*",
    "OperatorSet": "1 domain bytes; 2 version int",
    "Entry": "1 key bytes; 2 value bytes",
    # Types of values hold no data: they are not looked into.
    "Graph": "1 node Node*; 2 name bytes; 5 initializer Tensor*; 10 doc_string bytes; 11 input bytes*; "
    "12 output bytes*; 13 value_info bytes*; 16 metadata_props Entry*",
    "Node": "1 input bytes*; 2 output bytes*; 3 name bytes; 4 op_type bytes; 5 attribute Attribute*; "
    "6 doc_string bytes; 7 domain bytes; 9 metadata_props Entry*",
    "Attribute": "1 name bytes; 2 f float; 3 i int; 4 s bytes; 5 t Tensor; 6 g Graph; 7 floats float*; 8 ints int*; "
    "9 strings bytes*; 13 doc_string bytes; 20 type int",
    "Tensor": "1 dims int*; 2 data_type int; 4 float_data float*; 5 int32_data int*; 7 int64_data int*; 8 name bytes; "
    "9 raw_data bytes; 10 double_data double*; 11 uint64_data int*; 12 doc_string bytes; 13 external_data Entry*; "
    "14 data_location int; 16 metadata_props Entry*",
}
_WIRES = {"int": VARINT, "float": FIXED32, "double": FIXED64}


@dataclass(frozen=True)
class _Field:
    name: str
    kind: str
    repeated: bool


def _parse_schema(text: str) -> dict[int, _Field]:
    rows = [row.split() for row in text.split(";")]
    return {int(number): _Field(name, kind.rstrip("*"), kind.endswith("*")) for number, name, kind in rows}


_SCHEMA = {message: _parse_schema(text) for message, text in _SCHEMA_TEXT.items()}

# TensorProto.DataType → name and bits. Strings and complex numbers have no place in a model's weights.
DATA_TYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bfloat16", 16),
    21: ("uint4", 4),
    22: ("int4", 4),
}
DATA_BITS = dict(DATA_TYPES.values())
_TYPED_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_EXTERNAL = 1  # TensorProto.DataLocation


@dataclass(frozen=True)
class Initializer:
    """A constant tensor of the graph; `dtype` as in DATA_TYPES, `shape` as ONNX counts it, in elements.

    Its bytes are `raw`, or `nbytes` from `offset` on in the file `location` of the same folder, or, if both are None,
    somewhere in the graph in a form that is not read here.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    raw: memoryview | None = None
    location: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class OnnxModel:
    """A checked graph. `opsets` maps domains to versions; `operators` counts the nodes by domain and operator."""

    opsets: Mapping[str, int]
    operators: Mapping[tuple[str, str], int]
    initializers: Mapping[str, Initializer]


def read_model(path: Path, message: bytes) -> OnnxModel:
    """Read a serialised ModelProto; `path` names it in errors. Raises InvalidModelFile.

    Only initialisers of the graph itself may lie in other files, and their extents are plausible; that the files
    hold them is for the caller to check.
    """
    return _Reader(path).model(message)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path, self.fields_left = path, _MAX_FIELDS

    def fail(self, reason: str) -> NoReturn:
        raise InvalidModelFile(self.path, reason)

    def model(self, raw: bytes) -> OnnxModel:
        if raw[4:8] == b"ORTM":
            self.fail("found onnxruntime's own format, expected ONNX; export the model anew")
        try:
            model = self.message("Model", memoryview(raw), "model")
        except ValueError as error:
            self.fail(f"not an ONNX model, or cut short: {error}")
        graph = model.get("graph")
        if graph is None:
            self.fail("found no graph; expected an ONNX model")
        opsets: dict[str, int] = {}
        for entry in model.get("opset_import", ()):
            domain = self.domain(entry.get("domain", b""), "an operator set")
            if domain in opsets:
                self.fail(f"two operator sets of the domain {domain!r}")
            opsets[domain] = entry.get("version", 0)
        ops: dict[tuple[str, str], int] = {}
        for node in self.nodes(graph):
            op = self.operator(node)
            ops[op] = ops.get(op, 0) + 1
        return OnnxModel(opsets, ops, self.initializers(graph))

    def message(self, kind: str, raw: memoryview, where: str, depth: int = 0) -> dict[str, Any]:
        """The fields of a message by name, those inside it too. Raises ValueError for what is no message."""
        if depth > _MAX_DEPTH:
            self.fail(f"{where}: messages nested more than {_MAX_DEPTH} deep")
        out: dict[str, Any] = {}
        for number, wire, value in read_fields(raw):
            self.fields_left -= 1
            if self.fields_left < 0:
                self.fail(f"more than {_MAX_FIELDS} fields, expected a model that bezel exported")
            field = _SCHEMA[kind].get(number)
            if field is None:
                self.fail(
                    f"{where}: found field {number} of {kind}Proto, which bezel does not read and its exports do not "
                    "hold; export the model with `bezel export --format onnx`"
                )
            inside = f"{where}.{field.name}"
            values = self.values(field, wire, value, inside, depth)
            if field.repeated:
                out.setdefault(field.name, []).extend(values)
            elif field.name in out:
                self.fail(f"{inside}: found twice, expected once")
            else:
                (out[field.name],) = values
        return out

    def values(self, field: _Field, wire: int, value: int | memoryview, where: str, depth: int) -> list[Any]:
        packed = field.repeated and wire == BYTES and field.kind in _WIRES
        if not packed and wire != _WIRES.get(field.kind, BYTES):
            self.fail(f"{where}: found wire type {wire}, expected {_WIRES.get(field.kind, BYTES)}")
        if isinstance(value, int):
            return [value]
        if field.kind in _SCHEMA:
            return [self.message(field.kind, value, where, depth + 1)]
        if packed and field.kind == "int":
            numbers = []
            for number in read_varints(value):
                self.fields_left -= 1
                if self.fields_left < 0:
                    self.fail(f"{where}: more than {_MAX_FIELDS} numbers")
                numbers.append(number)
            return numbers
        return [value]

    def nodes(self, graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The nodes of a graph and of the graphs inside it, none of whose tensors lies in another file."""
        for node in graph.get("node", ()):
            yield node
            for attribute in node.get("attribute", ()):
                if "t" in attribute:
                    self.inline(attribute["t"], f"an attribute of {_text(node.get('name', b''))!r}")
                if "g" in attribute:
                    for tensor in attribute["g"].get("initializer", ()):
                        self.inline(tensor, f"a graph inside {_text(node.get('name', b''))!r}")
                    yield from self.nodes(attribute["g"])

    def operator(self, node: Mapping[str, Any]) -> tuple[str, str]:
        op = _text(node.get("op_type", b""))
        domain = self.domain(node.get("domain", b""), f"operator {op!r}")
        if op == "EPContext":  # names a file for an execution provider to load
            self.fail(f"operator {op!r}: found a compiled part for other hardware; export the model anew")
        return domain, op

    def domain(self, raw: memoryview, what: str) -> str:
        domain = _text(raw)
        if domain not in DOMAINS:
            self.fail(f"{what}: found the domain {domain!r}, expected one of {', '.join(map(repr, DOMAINS))}")
        return "" if domain == "ai.onnx" else domain

    def inline(self, tensor: Mapping[str, Any], where: str) -> None:
        if tensor.get("data_location", 0) or "external_data" in tensor:
            self.fail(f"{where}: found a tensor in another file, expected those of the graph's initialisers only")
        self.initializer(tensor, where)

    def initializers(self, graph: Mapping[str, Any]) -> dict[str, Initializer]:
        found: dict[str, Initializer] = {}
        for i, tensor in enumerate(graph.get("initializer", ())):
            raw = tensor.get("name", b"")
            name = _text(raw, _MAX_NAME)
            if not name or name in found or name.encode() != raw:
                self.fail(f"initialiser {i} is called {name[:80]!r}, expected a plain name of its own")
            found[name] = self.initializer(tensor, f"initialiser {name!r}", name)
        return found

    def initializer(self, tensor: Mapping[str, Any], where: str, name: str = "") -> Initializer:
        code = tensor.get("data_type", 0)
        if code not in DATA_TYPES:
            self.fail(
                f"{where}: found data type {code}, expected one of {', '.join(n for n, _ in DATA_TYPES.values())}"
            )
        dtype, bits = DATA_TYPES[code]
        shape = tuple(tensor.get("dims", ()))
        if len(shape) > 8 or any(size >= 1 << 48 for size in shape):  # a negative size reads as one above 2^63
            self.fail(f"{where}: found the shape {_shape(shape)}, expected up to 8 plausible sizes")
        nbytes = (math.prod(shape) * bits + 7) // 8
        location = tensor.get("data_location", 0)
        if location not in (0, _EXTERNAL):
            self.fail(f"{where}: found data location {location}, expected 0 or {_EXTERNAL}")
        typed = [key for key in _TYPED_DATA if key in tensor]
        entries = tensor.get("external_data", ())
        if bool(entries) != (location == _EXTERNAL) or len(typed) + ("raw_data" in tensor) + bool(entries) > 1:
            self.fail(f"{where}: found no data or more than one kind of it, expected one; export the model anew")
        if entries:
            return self.external(Initializer(name, dtype, shape, nbytes), entries, where)
        raw = tensor.get("raw_data")
        if raw is not None and len(raw) != nbytes:
            self.fail(f"{where}: found {len(raw)} bytes, expected {nbytes} for {dtype} of shape {_shape(shape)}")
        if raw is None:
            # A number takes a byte at least, of the file or as an entry of a list that was counted.
            size = sum(len(v) if isinstance(v, memoryview) else 1 for key in typed for v in tensor[key])
            if math.prod(shape) > 2 * size:
                self.fail(f"{where}: found data for {size} numbers at most, expected the shape {_shape(shape)}")
        return Initializer(name, dtype, shape, nbytes, raw)

    def external(self, tensor: Initializer, entries: list[dict[str, memoryview]], where: str) -> Initializer:
        values: dict[str, str] = {}
        for entry in entries:
            key = _text(entry.get("key", b""))
            if key not in ("location", "offset", "length") or key in values:
                self.fail(f"{where}: found the external data's key {key!r}, expected location, offset and length, once")
            values[key] = _text(entry.get("value", b""), 4096)
        if len(values) < 3:
            self.fail(f"{where}: found {', '.join(values)} of its external data, expected location, offset and length")
        location = values["location"]
        if not is_file_name(location):
            self.fail(
                f"{where}: found the location {location[:80]!r}, expected the name of a file in the same folder; "
                "no model needs another: do not trust this one"
            )
        for key in ("offset", "length"):
            if not re.fullmatch(r"0|[1-9][0-9]{0,17}", values[key], re.ASCII):
                self.fail(f"{where}: found the {key} {values[key][:40]!r}, expected a number of bytes")
        offset, length = int(values["offset"]), int(values["length"])
        if length != tensor.nbytes or not length:
            want = f"{tensor.nbytes} for {tensor.dtype} of shape {_shape(tensor.shape)}"
            self.fail(f"{where}: found {length} bytes of external data, expected {want}, and more than none")
        item = max(1, DATA_BITS[tensor.dtype] // 8)
        if offset % item:
            self.fail(f"{where}: found the offset {offset}, expected a multiple of {item}, the size of a number")
        return Initializer(tensor.name, tensor.dtype, tensor.shape, length, None, location, offset)


def is_file_name(name: str) -> bool:
    """Whether a name can only be that of a file right in the folder, on every system."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name, re.ASCII)) and not name.endswith(".")


def _text(raw: memoryview | bytes, limit: int = 80) -> str:
    """Text out of the file, cut short and safe to print."""
    return "".join(c if c.isprintable() else "\ufffd" for c in bytes(raw[:limit]).decode("utf-8", "replace"))


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape[:8])) or "()"
