"""The wire format of protocol buffers (https://protobuf.dev/programming-guides/encoding/), read and written by hand.

Model files of this format are untrusted, and their libraries are more than reading them safely needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; the others, groups, are long out of use
_LARGEST_TAG = (1 << 32) - 1

Message = TypeVar("Message", bytes, memoryview)


def varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(message: bytes | memoryview, pos: int) -> tuple[int, int]:
    """The number that begins at byte `pos`, and where it ends. Raises ValueError unless it is whole and has 64 bits."""
    if pos < len(message) and message[pos] < 128:  # most have one byte, and a tokenizer has two million
        return message[pos], pos + 1
    start, value, shift = pos, 0, 0
    while pos < len(message) and shift < 64:
        byte = message[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128 and value < 1 << 64:
            return value, pos
        shift += 7
    raise ValueError(f"no number at byte {start}")


def read_varints(message: bytes | memoryview) -> Iterator[int]:
    """Numbers one after the other, as a packed field holds them. Raises ValueError like `read_varint`."""
    pos = 0
    while pos < len(message):
        value, pos = read_varint(message, pos)
        yield value


def read_fields(message: Message) -> Iterator[tuple[int, int, int | Message]]:
    """Number, wire type and value of each field: a varint as int, anything else as a part of the message.

    Raises ValueError where the message is cut short or makes no sense.
    """
    pos, end = 0, len(message)
    while pos < end:
        start = pos
        tag, pos = read_varint(message, pos)
        number, wire = tag >> 3, tag & 7
        if not number or tag > _LARGEST_TAG or wire not in (VARINT, FIXED64, BYTES, FIXED32):
            raise ValueError(f"no field at byte {start}")
        if wire == VARINT:
            value, pos = read_varint(message, pos)
            yield number, wire, value
            continue
        size = 8 if wire == FIXED64 else 4
        if wire == BYTES:
            size, pos = read_varint(message, pos)
        if size > end - pos:
            raise ValueError(f"a field of {size} bytes at byte {start} lies past the end")
        yield number, wire, message[pos : pos + size]
        pos += size
