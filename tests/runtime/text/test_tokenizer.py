"""The tokenizer against the sentencepiece library, on the demo's and on freshly trained vocabularies."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from bezel.runtime.errors import InvalidCheckpoint, InvalidModelFile, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.files.strings import Strings
from bezel.runtime.text.sentencepiece_model import _read_piece, read_vocabulary_file
from bezel.runtime.text.tokenizer import Tokenizer
from bezel.runtime.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from hypothesis import given
from hypothesis import strategies as st
from tiny import DEMO, TEXT

MODEL_FILE = DEMO / "tokenizer.model"
HELD_OUT = TEXT.read_text(encoding="utf-8")

ORACLE = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_FILE))
VOCABULARY = read_vocabulary_file(MODEL_FILE)
TOKENIZER = Tokenizer(VOCABULARY, "tokenizer.model")
REBUILT = Tokenizer(Vocabulary.from_gguf(VOCABULARY.to_gguf(), "model.gguf"), "model.gguf")

TEXTS = {
    "held-out": HELD_OUT,
    "empty": "",
    "spaces": "a b  c   d    e     f" + " " * 40 + "g  ",
    "leading": "  two before",
    "newlines": "\n" + "a\nb\n\nc\n\n\nd" + "\n" * 9,
    "tabs": "\ta\t\tb\t\t\t \t \n\t",
    "digits": "1234567890 3.14159 1,000,000 ١٢٣ ²",
    "unicode": "Zoë naïve ﬁne Å Å १२३ 漢字かな교 ½ ™ \u00a0\u2009\u3000 Ω≈ç√∫",
    "emoji": "🙂👩‍👩‍👧‍👦🇳🇴 👍🏽",
    "controls": "\x00\x01\x7f\r\n\x0b\x85\u2028\ufeff\ufffd",
    "metaspace": "▁a ▁ ▁▁ b",
    "looks like bytes": "<0x09><0x41> <unk> <pad> <bos> <eos>",
}
FRAGMENTS = [
    "  ",
    "\n",
    "\n\n",
    "\t",
    " the",
    "the",
    "<start_of",
    "_turn>",
    "<",
    "é",
    "🙂",
    "7",
    "▁",
    "\x00",
    "\r",
]
MARKERS = ("<start_of_turn>", "<end_of_turn>")


def train(options: dict[str, Any] | None = None) -> bytes:
    """A small SentencePiece model with Gemma's options and its kinds of user-defined pieces."""
    runs = ["▁" * n for n in range(2, 9)] + ["\n" * n for n in range(1, 5)] + ["\t\t", "\t\t\t", "<h1>"]
    out = io.BytesIO()
    gemma: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "user_defined_symbols": [*MARKERS, *runs],
        "minloglevel": 2,
    }
    sentences = iter(HELD_OUT[:40000].split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=out, **(gemma | (options or {})))
    return out.getvalue()


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Vocabulary]:
    """sentencepiece's own processor, and our vocabulary, of one model whose runs of spaces are pieces."""
    path = tmp_path_factory.mktemp("gemma-like") / "tokenizer.model"
    path.write_bytes(train())
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), read_vocabulary_file(path)


def as_llama_cpp(vocabulary: Vocabulary) -> dict[str, Any]:
    """The metadata as llama.cpp's converter writes it, with a literal tab for the tab's byte piece."""
    metadata = vocabulary.to_gguf()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].copy()
    tab = tokens.index("<0x09>")
    tokens[tab], types[tab] = "\t", NORMAL
    return metadata | {"tokenizer.ggml.token_type": types}


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_sentencepieces_own(name: str, gemma_like: tuple[Any, Vocabulary]) -> None:
    text = TEXTS[name]
    assert TOKENIZER.encode(text) == REBUILT.encode(text) == ORACLE.encode(text)
    oracle, vocabulary = gemma_like
    for metadata in (vocabulary.to_gguf(), as_llama_cpp(vocabulary)):
        rebuilt = Tokenizer(Vocabulary.from_gguf(metadata, "x"), "x")
        assert rebuilt.encode(text) == oracle.encode(text)
        assert rebuilt.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))


@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)))
def test_ids_are_sentencepieces_own_on_any_text(text: str) -> None:
    for marker in MARKERS:
        text = text.replace(marker, "")
    ids = ORACLE.encode(text)
    assert TOKENIZER.encode(text) == REBUILT.encode(text) == ids
    assert TOKENIZER.decode(ids) == text.replace("▁", " ")


def test_runs_of_spaces_are_pieces(gemma_like: tuple[Any, Vocabulary]) -> None:
    _, vocabulary = gemma_like
    metadata = vocabulary.to_gguf()
    run = vocabulary.pieces.index("▁▁▁")
    assert vocabulary.types[run] == USER_DEFINED
    assert metadata["tokenizer.ggml.tokens"][run] == "   "  # what llama.cpp matches against the text
    for source in (metadata, as_llama_cpp(vocabulary)):
        back = Vocabulary.from_gguf(source, "x")
        assert list(back.pieces) == list(vocabulary.pieces)
        assert back.types.tolist() == vocabulary.types.tolist()
        assert run in Tokenizer(back, "x").encode("a   b")


@pytest.mark.parametrize("text", ["<bos>", "<eos>", "<pad>", *MARKERS, "a<end_of_turn>\n<start_of_turn>model\n"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, REBUILT])
def test_text_cannot_forge_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_ids_and_kinds_of_the_demo() -> None:
    for t in (TOKENIZER, REBUILT):
        assert (t.vocab_size, t.bos_id, t.eos_id, t.start_of_turn_id, t.end_of_turn_id) == (4096, 2, 1, 4, 5)
        assert (t.stop_ids, t.special_ids) == ({1, 5}, {0, 1, 2, 3, 4, 5})
        assert t.encode("hello", bos=True) == [2, *t.encode("hello")]
        assert (t.piece(4), t.piece(271), t.kind(4), t.kind(3)) == (MARKERS[0], "▁the", CONTROL, UNKNOWN)
    assert (VOCABULARY.unk_id, VOCABULARY.pad_id) == (3, 0)
    assert VOCABULARY.scores.tolist() == [ORACLE.get_score(i) for i in range(4096)]
    assert list(VOCABULARY.pieces) == [ORACLE.id_to_piece(i) for i in range(4096)]


def test_a_vocabulary_without_turn_markers() -> None:
    pieces = [p.replace("_of_turn>", "_of_day>") for p in VOCABULARY.pieces]
    metadata = VOCABULARY.to_gguf() | {"tokenizer.ggml.tokens": pieces}
    tokenizer = Tokenizer(Vocabulary.from_gguf(metadata, "x"), "x")
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id, tokenizer.stop_ids) == (None, None, {1})


@pytest.mark.parametrize("length", [100, 116, 117, 126, 127, 128, 130, 300])
def test_lengths_around_the_bounds_of_a_varint(length: int) -> None:
    metadata = VOCABULARY.to_gguf()
    metadata["tokenizer.ggml.tokens"][4095] = "x" * length
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"].copy()
    metadata["tokenizer.ggml.token_type"][4095] = USER_DEFINED
    tokenizer = Tokenizer(Vocabulary.from_gguf(metadata, "x"), "x")
    assert tokenizer.encode("x" * length) == [4095]


def test_through_a_file_that_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    for key, value in VOCABULARY.to_gguf().items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with GGUFModel(path) as file:
        vocabulary = Vocabulary.from_gguf(file.metadata, str(path))
    assert list(vocabulary.pieces) == list(VOCABULARY.pieces)
    assert vocabulary.scores.tolist() == VOCABULARY.scores.tolist()
    assert vocabulary.types.tolist() == VOCABULARY.types.tolist()
    assert Tokenizer(vocabulary, "x").encode(HELD_OUT) == ORACLE.encode(HELD_OUT)


# Decoding


def test_decode_is_sentencepieces_own_on_any_ids() -> None:
    rng = random.Random(0)
    bytes_first = VOCABULARY.pieces.index("<0x00>")
    for _ in range(2000):
        ids = [rng.randrange(6, 4096) for _ in range(4)] + [rng.randrange(4) for _ in range(2)]
        ids += [bytes_first + rng.randrange(256) for _ in range(4)]
        rng.shuffle(ids)
        assert TOKENIZER.decode(ids) == REBUILT.decode(ids) == ORACLE.decode(ids)
    assert TOKENIZER.decode([2, 4, 271, 5, 1]) == " the"  # control pieces leave no text
    assert TOKENIZER.decode(np.array([271, 268])) == " thehe"


@given(st.text())
def test_streaming_gives_the_same_text_in_whole_characters(text: str) -> None:
    stream = TOKENIZER.stream()
    parts = [stream.push(i) for i in TOKENIZER.encode(text)]
    assert stream.flush() == ""
    assert "".join(parts) == text.replace("▁", " ")


def test_streaming_holds_a_character_until_it_is_whole() -> None:
    stream = TOKENIZER.stream()
    first = VOCABULARY.pieces.index("<0x00>")
    ids = [first + byte for byte in "🙂".encode()]
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    assert [stream.push(ids[0]), stream.push(ids[1]), stream.push(271)] == ["", "", "\ufffd the"]
    assert [stream.push(ids[0]), stream.push(2), stream.push(3)] == ["", "\ufffd", " ⁇ "]
    assert [stream.push(first + 0xFF), stream.push(ids[0]), stream.flush()] == ["\ufffd", "", "\ufffd"]
    assert stream.flush() == ""


@given(st.binary(max_size=12))
def test_streaming_replaces_invalid_bytes_as_python_does(raw: bytes) -> None:
    stream = TOKENIZER.stream()
    first = VOCABULARY.pieces.index("<0x00>")
    assert "".join(stream.push(first + b) for b in raw) + stream.flush() == raw.decode(errors="replace")


@pytest.mark.parametrize("token", [-1, 4096, 1 << 70, -(1 << 70)])
def test_ids_outside_the_vocabulary(token: int) -> None:
    for use in (
        lambda: TOKENIZER.decode([5, token]),
        lambda: TOKENIZER.piece(token),
        lambda: TOKENIZER.kind(token),
    ):
        with pytest.raises(InvalidRequest, match="outside the vocabulary of 4096"):
            use()
    with pytest.raises(InvalidRequest):
        TOKENIZER.stream().push(token)


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(InvalidRequest, match="a lone surrogate, after '"):
        TOKENIZER.encode("ab\ud800c")


# Hostile and damaged files


def changed(**changes: Any) -> dict[str, Any]:
    """The demo's metadata with keys replaced, or with entries of arrays replaced where a dict says so."""
    metadata = VOCABULARY.to_gguf()
    for name, change in changes.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(change, dict):
            metadata[key] = metadata[key].copy()
            for index, value in change.items():
                metadata[key][index] = value
        elif change is None:
            del metadata[key]
        else:
            metadata[key] = change
    return metadata


N = 4096
HOSTILE = {
    "no model": (changed(model=None), "tokenizer.ggml.model': found nothing"),
    "another model": (changed(model="gpt2"), "found 'gpt2', expected 'llama'"),
    "model of another type": (changed(model=7), "found 7"),
    "dummy prefix": (changed(add_space_prefix=True), "add_space_prefix': found True"),
    "no tokens": (changed(tokens=None), "tokens': found nothing"),
    "empty tokens": (changed(tokens=[]), "expected an array of strings"),
    "tokens in one string": (changed(tokens="abc"), "expected an array of strings"),
    "tokens are numbers": (changed(tokens=np.zeros(N)), "expected an array of strings"),
    "a token is a number": (changed(tokens={9: 5}), "expected an array of strings"),
    "no scores": (changed(scores=None), "scores': found nothing"),
    "fewer scores": (
        changed(scores=np.zeros(N - 1, np.float32)),
        r"shape \(4095,\), expected an array of 4096",
    ),
    "scores are integers": (changed(scores=np.zeros(N, np.int32)), "scores': found an array of int32"),
    "scores are a matrix": (changed(scores=np.zeros((N, 1), np.float32)), "scores': found"),
    "a score is NaN": (changed(scores={300: np.nan}), "token 300 .* has the score nan"),
    "a score is infinite": (changed(scores={300: -np.inf}), "token 300 .* has the score -inf"),
    "a score overflows": (changed(scores=np.full(N, 1e300)), "has the score inf"),
    "no types": (changed(token_type=None), "token_type': found nothing"),
    "more types": (changed(token_type=np.ones(N + 1, np.int32)), "token_type': found"),
    "types are real": (changed(token_type=np.ones(N, np.float32)), "token_type': found"),
    "types are bools": (changed(token_type=np.ones(N, bool)), "token_type': found"),
    "type 0": (changed(token_type={300: 0}), "token 300 .* has the type 0"),
    "type 7": (changed(token_type={300: 7}), "token 300 .* has the type 7"),
    "type beyond int32": (changed(token_type=np.full(N, (1 << 32) + 1, np.int64)), "has the type 4294967297"),
    "no bos": (changed(bos_token_id=None), "bos_token_id': found nothing"),
    "bos out of range": (changed(bos_token_id=N), "bos_token_id': found 4096, expected an id from 0 to 4095"),
    "bos is negative": (changed(bos_token_id=-1), "bos_token_id': found -1"),
    "bos is a bool": (changed(bos_token_id=True), "bos_token_id': found True"),
    "bos is a string": (changed(bos_token_id="2"), "bos_token_id': found '2'"),
    "bos is a word": (changed(bos_token_id=271), "the bos token is 271 .*expected a control token"),
    "no eos": (changed(eos_token_id=None), "eos_token_id': found nothing"),
    "eos is a word": (changed(eos_token_id=271), "the eos token is 271"),
    "padding out of range": (changed(padding_token_id=N), "padding_token_id': found 4096"),
    "another unknown": (changed(unknown_token_id=2), "unknown_token_id': found 2, expected 3"),
    "nothing is unknown": (changed(token_type={3: NORMAL}), "0 tokens are of the type unknown"),
    "an unknown of another type without its id": (
        changed(token_type={3: CONTROL}, unknown_token_id=None),
        "0 tokens are of the type unknown",
    ),
    "two are unknown": (changed(token_type={300: UNKNOWN}), "2 tokens are of the type unknown"),
    "duplicate": (changed(tokens={300: "he"}), "token 300 is 'he', and so is token 268"),
    "duplicate control": (changed(tokens={300: "<bos>"}), "token 300 is '<bos>', and so is token 2"),
    "empty": (changed(tokens={300: ""}), "token 300 is ''"),
    "NUL": (changed(tokens={300: "a\0b"}), "token 300 is 'a.x00b'"),
    "single NUL": (changed(tokens={300: "\0"}), "token 300"),
    "surrogate": (changed(tokens={300: "\ud800"}), "lone surrogate"),
    "huge token": (changed(tokens={300: "x" * 5_000_000}), "tokenizer is unsound: .*too long"),
    "byte missing": (changed(tokens={12 + 0x41: "\x41\x41"}, token_type={12 + 0x41: NORMAL}), "no <0x41>"),
    "byte of another type": (changed(token_type={12 + 0x41: NORMAL}), "no <0x41>"),
    "257th byte": (
        changed(token_type={300: BYTE}),
        f"has '{VOCABULARY.pieces[300]}', expected <0x00> to <0xFF>",
    ),
    "newline for its byte": (
        changed(tokens={6: "q6", 12 + 10: "\n"}, token_type={12 + 10: NORMAL}),
        "no <0x0A>",
    ),
    "tab elsewhere": (changed(tokens={300: "\t", 12 + 9: "q9"}, token_type={12 + 9: NORMAL}), "no <0x09>"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata(name: str) -> None:
    metadata, message = HOSTILE[name]
    with pytest.raises(InvalidModelFile, match=message) as raised:
        Tokenizer(Vocabulary.from_gguf(metadata, "hostile.gguf"), "hostile.gguf")
    assert len(str(raised.value)) < 400
    assert "hostile.gguf" in str(raised.value)


def test_optional_ids_may_be_absent() -> None:
    vocabulary = Vocabulary.from_gguf(changed(padding_token_id=None, unknown_token_id=None), "x")
    assert (vocabulary.pad_id, vocabulary.unk_id) == (None, 3)
    assert "tokenizer.ggml.padding_token_id" not in vocabulary.to_gguf()


def test_unk_may_be_typed_control() -> None:
    """llama.cpp's files of Gemma 3."""
    vocabulary = Vocabulary.from_gguf(changed(token_type={3: CONTROL}), "x")
    assert vocabulary.unk_id == 3
    assert np.array_equal(vocabulary.types, VOCABULARY.types)


def test_a_vocabulary_that_sentencepiece_refuses() -> None:
    twice = Strings.of([*VOCABULARY.pieces[:-1], "he"])
    vocabulary = Vocabulary(twice, VOCABULARY.scores, VOCABULARY.types, 2, 1, 3, 0)
    with pytest.raises(InvalidModelFile, match=r"x: .*unsound.*already defined"):
        Tokenizer(vocabulary, "x")


@pytest.mark.parametrize("size", [0, 1, 2, 5, 100, 1000, 30000, 63000, 63622])
def test_a_model_file_that_is_cut_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL_FILE.read_bytes()[:size])
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.model: "):
        read_vocabulary_file(path)


@pytest.mark.parametrize("raw", [b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"\xff" * 99, bytes(99)])
def test_a_model_file_that_is_none(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(raw)
    with pytest.raises(InvalidCheckpoint):
        read_vocabulary_file(path)
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        read_vocabulary_file(tmp_path / "absent.model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "options are not Gemma's"),
        ({"add_dummy_prefix": True}, "options are not Gemma's"),
        ({"remove_extra_whitespaces": True}, "options are not Gemma's"),
        ({"normalization_rule_name": "nfkc"}, "options are not Gemma's"),
        ({"byte_fallback": False}, "byte tokens has no <0x00>"),
        ({"bos_id": -1}, "has no bos token"),
    ],
    ids=str,
)
def test_a_model_file_with_other_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(options))
    with pytest.raises(InvalidCheckpoint, match=message):
        read_vocabulary_file(path)


def test_pieces_are_read_alike_however_they_are_written() -> None:
    """What is usual is read in one go, anything else field by field: the same of both, and no cut one passes."""
    text, score, kind = b"\n\x03abc", b"\x15\x00\x00\x80\xc0", b"\x18\x06"
    other, long, far = b"\x22\x00", b"\n\x80\x01" + b"x" * 128, b"\x18\x80\x01"
    written = [text + score + kind, text + score, score + kind + text, text + kind, text + score + kind + other, b""]
    written += [text + score + kind + b"\x18\x03", long + score + kind, text + score + far, b"\n\x00" + score]
    found = [_read_piece(message) for message in written]
    assert found[0] == found[2] == found[4] == ("abc", -4.0, 6)
    assert found[1] == ("abc", -4.0, NORMAL)
    assert found[3] == ("abc", 0.0, 6)
    assert found[5:7] == [("", 0.0, NORMAL), ("abc", -4.0, 3)]
    assert found[7:] == [("x" * 128, -4.0, 6), ("abc", -4.0, 128), ("", -4.0, NORMAL)]
    for end in set(range(len(text + score + kind))) - {0, len(text), len(text + score)}:
        with pytest.raises(ValueError, match="byte"):
            _read_piece((text + score + kind)[:end])
