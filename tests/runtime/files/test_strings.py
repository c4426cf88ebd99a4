"""Strings in one piece of memory against Python's lists of them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from bezel.runtime import _native
from bezel.runtime.files.strings import Strings
from hypothesis import given
from hypothesis import strategies as st

texts = st.lists(st.text(max_size=5), max_size=8)


@given(texts, st.text(max_size=3))
def test_they_are_a_sequence(strings: list[str], other: str) -> None:
    got = Strings.of(strings)
    assert (len(got), list(got), [got[i] for i in range(len(got))]) == (len(strings), strings, strings)
    assert got[1:3] == strings[1:3]
    for string in (*strings, other):
        assert (string in got) == (string in strings)
        if string in strings:
            assert got.index(string) == strings.index(string)
    assert got.sizes().tolist() == [len(string.encode()) for string in strings]
    assert got.are_text()
    assert got.are_distinct() == (len(set(strings)) == len(strings))


@given(texts, st.data())
def test_some_are_replaced(strings: list[str], data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.integers(0, max(0, len(strings) - 1)), st.text(max_size=3)))
    changes = {i: string for i, string in changes.items() if i < len(strings)}
    expected = [changes.get(i, string) for i, string in enumerate(strings)]
    assert list(Strings.of(strings).replaced(changes)) == expected


def test_what_is_no_string() -> None:
    with pytest.raises(IndexError):
        Strings.of(["a"])[1]
    with pytest.raises(ValueError, match="'b' is not among"):
        Strings.of(["ab"]).index("b")
    with pytest.raises(ValueError, match="'a' is not among"):
        Strings.of(["a", "b"]).index("a", 1)
    assert "\ud800" not in Strings.of(["a"])
    with pytest.raises(UnicodeEncodeError):
        Strings.of(["\ud800"])


@pytest.mark.parametrize("parts", [[b"a\xff"], [b"\xc3", b"\xa9"], [b"a\xe2\x82", b"\xac"], [b"\xed\xa0\x80"]])
def test_bytes_that_are_no_text(parts: list[bytes]) -> None:
    whole = np.frombuffer(b"".join(parts), np.uint8)
    assert not Strings(whole, np.cumsum([len(part) for part in parts])).are_text()


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(0, 40), st.integers(0, 8))
def test_splitting_stops_where_the_data_ends(strings: list[bytes], cut: int, more: int) -> None:
    data = b"".join(struct.pack("<Q", len(string)) + string for string in strings)
    data = data[: len(data) - cut]
    fit, at = 0, 0
    for string in strings:
        at += 8 + len(string)
        fit += at <= len(data)
    text, ends = _native.split_strings(np.frombuffer(data, np.uint8), len(strings) + more)
    assert text.tobytes() == b"".join(strings[:fit])
    assert ends.tolist() == np.cumsum([len(string) for string in strings[:fit]]).tolist()
    text, ends = _native.split_strings(np.frombuffer(data, np.uint8), min(fit, 1))
    assert len(ends) == min(fit, 1)


@pytest.mark.parametrize("length", [1, 2**31, 2**63 - 9, 2**63, 2**64 - 8, 2**64 - 1])
def test_a_length_past_the_data(length: int) -> None:
    text, ends = _native.split_strings(np.frombuffer(struct.pack("<Q", length), np.uint8), 3)
    assert (text.size, ends.size) == (0, 0)


@pytest.mark.parametrize(("ends", "found"), [([2, 1], "1 at 1"), ([-1], "-1 at 0"), ([1, 9], "9 at 1")])
def test_ends_out_of_order_are_refused(ends: list[int], found: str) -> None:
    text = np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match=f"ends: found {found}, expected"):
        _native.string_hashes(text, np.array(ends), 0)
    with pytest.raises(ValueError, match=f"ends: found {found}, expected"):
        _native.sentencepiece_pieces(
            text, np.array(ends), np.zeros(len(ends), np.float32), np.ones(len(ends), np.int32)
        )


def test_pieces_are_protocol_buffers() -> None:
    """Lengths of one, two and three bytes, read by sentencepiece's own module of the message."""
    messages = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    strings = ["a", "é" * 60, "x" * 127, "x" * 128, "y" * 20000]
    scores, types = np.float32([0, -1.5, 3e38, -0.0, 1e-45]), np.int32([1, 2, 3, 4, 6])
    got = messages.ModelProto()
    packed = Strings.of(strings)
    got.ParseFromString(_native.sentencepiece_pieces(packed.text, packed.ends, scores, types))
    assert [piece.piece for piece in got.pieces] == strings
    assert np.float32([piece.score for piece in got.pieces]).tobytes() == scores.tobytes()
    assert [piece.type for piece in got.pieces] == types.tolist()
