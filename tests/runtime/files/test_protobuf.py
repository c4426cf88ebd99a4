"""The wire format of protocol buffers, against the values that its specification gives."""

from __future__ import annotations

import pytest
from bezel.runtime.files.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    read_fields,
    read_varint,
    read_varints,
    varint_bytes,
)
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_varints_round_trip(values: list[int]) -> None:
    raw = b"".join(map(varint_bytes, values))
    assert list(read_varints(raw)) == list(read_varints(memoryview(raw))) == values


def test_varints_of_the_specification() -> None:
    assert (varint_bytes(150), varint_bytes(0)) == (b"\x96\x01", b"\x00")
    assert read_varint(b"?\x96\x01!", 1) == (150, 3)
    assert read_varint(b"\x80\x80\x00", 0) == (0, 3)  # longer than need be, and allowed


def test_fields_of_every_wire_type() -> None:
    raw = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d\x01\x02\x03\x04" + b"\x21" + bytes(8) + b"\x12\x00"
    assert list(read_fields(raw)) == [
        (1, VARINT, 150),
        (2, BYTES, b"abc"),
        (3, FIXED32, b"\1\2\3\4"),
        (4, FIXED64, bytes(8)),
        (2, BYTES, b""),
    ]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x80", "no number at byte 0"),
        (b"\x08", "no number at byte 1"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "no number at byte 1"),  # 65 bits
        (b"\x08" + b"\x80" * 10 + b"\x00", "no number at byte 1"),  # 11 bytes
        (b"\x12\x04abc", "a field of 4 bytes at byte 0 lies past the end"),
        (b"\x08\x01\x12" + varint_bytes((1 << 64) - 1), "lies past the end"),
        (b"\x21" + bytes(7), "a field of 8 bytes"),
        (b"\x1d" + bytes(3), "a field of 4 bytes"),
        (b"\x00\x00", "no field at byte 0"),  # number 0
        (b"\x0b\x0c", "no field at byte 0"),  # a group
        (b"\x0e", "no field at byte 0"),  # wire type 6
        (varint_bytes(1 << 32 | 8) + b"\x01", "no field at byte 0"),  # a tag that others would cut to 32 bits
    ],
)
def test_what_makes_no_sense(raw: bytes, words: str) -> None:
    for message in (raw, memoryview(raw)):
        with pytest.raises(ValueError, match=words):
            list(read_fields(message))
