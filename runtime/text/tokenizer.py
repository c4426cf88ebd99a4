"""Text to ids and back: Gemma's vocabulary, from `tokenizer.model` or a GGUF file, run by sentencepiece.

GGUF carries each piece's text, score and type. From these a SentencePiece model is rebuilt, with the options
that every Gemma uses: BPE, byte fallback, no normalisation, no dummy prefix, whitespace kept. So both sources
give equal ids. What users write never becomes a control token: those come by id only.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..arguments import ids_of, whole
from ..errors import BezelError, InvalidCheckpoint, InvalidModelFile, InvalidRequest
from ..files.protobuf import read_fields, varint_bytes
from ..files.strings import Strings

# Types of pieces, numbered alike in SentencePiece's and in GGUF's specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
_TURNS = ((START_OF_TURN, END_OF_TURN), ("<|im_start|>", "<|im_end|>"))  # the latter in fine-tunes that renamed them
# Control pieces whatever the file says. `tokenizer.model` has the markers of turns and pictures as user-defined pieces,
# which text would match: anyone could then end their turn and speak as the model.
START_OF_IMAGE, END_OF_IMAGE = "<start_of_image>", "<end_of_image>"
CONTROL_PIECES = ("<pad>", "<eos>", "<bos>", START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE)

SPACE = "▁"  # how SentencePiece writes a space
_UNKNOWN_TEXT = " \u2047 "  # how SentencePiece decodes <unk>
_BYTES = {f"<0x{i:02X}>": i for i in range(256)}
# llama.cpp's converter gives this score to each piece that it takes from the list of added tokens.
_ADDED_SCORE = np.float32(-1000.0)

# What sentencepiece raises, depending on its version, for a model that it does not accept.
_REFUSALS = (RuntimeError, LookupError, OSError, TypeError, ValueError)
# Ids of this text depend on every option that the rebuilt model takes for granted.
_PROBE = "  Two  spaces,\t\ttabs, ﬁ Å １２3 Ω≈ç 🙂 𐍈.\n\n It was the best of times, it was the worst of times. "


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The pieces of a tokenizer; the index is the id. `scores` is float32 (n,), `types` int32 (n,)."""

    pieces: Strings
    scores: NDArray[np.float32]
    types: NDArray[np.int32]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int | None

    @classmethod
    def from_model_file(cls, path: str | Path) -> Vocabulary:
        """From a checkpoint's `tokenizer.model`. Raises InvalidCheckpoint, as `from_model` does."""

        def fail(reason: str) -> InvalidCheckpoint:
            return InvalidCheckpoint(f"{path}: {reason}")

        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise fail(f"cannot be read: {error.strerror}") from error
        return cls.from_model(raw, fail)

    @classmethod
    def from_model(cls, raw: bytes, fail: Callable[[str], BezelError]) -> Vocabulary:
        """From the content of a `tokenizer.model`. Raises what `fail` makes of a reason.

        Also where the file's options are not Gemma's, because nothing but the pieces is carried on.
        """
        if not raw:
            raise fail("the file is empty, expected a SentencePiece model")
        try:
            original = _load(raw)
            probe = original.encode(_PROBE)
            # The library's Python interface does not tell which pieces are user-defined; the file does.
            read = [_read_piece(value) for number, _, value in read_fields(raw) if number == _PIECES]
            texts, scores, types = zip(*read, strict=True)
            pieces = Strings.of(texts)
        except _REFUSALS as error:
            raise fail(f"not a SentencePiece model: {str(error)[:200]}") from error
        pad = original.pad_id()  # -1 where there is none
        special = (original.bos_id(), original.eos_id(), pad if pad >= 0 else None)
        vocabulary = checked_vocabulary(pieces, np.array(scores), np.array(types), *special, fail)
        try:
            same = Tokenizer(vocabulary, "").encode(_PROBE) == probe
        except InvalidModelFile as error:
            raise fail(error.reason) from error
        if not same:
            raise fail(
                "the tokenizer's options are not Gemma's (BPE with byte fallback, no normalisation, no dummy "
                "prefix, whitespace kept), so its pieces alone do not make it"
            )
        return vocabulary

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> Vocabulary:
        """From a GGUF file's metadata, llama.cpp's files included; `source` names the file.

        Arrays of numbers come as NumPy arrays. Raises InvalidModelFile.
        """

        def fail(reason: str) -> InvalidModelFile:
            return InvalidModelFile(source, reason)

        def expect(key: str, want: str, accept: Callable[[Any], bool]) -> Any:
            value = metadata.get(f"tokenizer.ggml.{key}")
            if not accept(value):
                found = "nothing" if value is None else repr(value)[:80]
                if isinstance(value, np.ndarray):
                    found = f"an array of {value.dtype} of shape {value.shape}"
                raise fail(f"key 'tokenizer.ggml.{key}': found {found}, expected {want}")
            return value

        expect("model", "'llama', a SentencePiece vocabulary", lambda v: isinstance(v, str) and v == "llama")
        expect("add_space_prefix", "false, as in every Gemma", lambda v: v is None or v is False)
        tokens = expect("tokens", "an array of strings", lambda v: _is_array(v) and len(v) > 0)
        if not isinstance(tokens, Strings) and set(map(type, tokens)) != {str}:
            raise fail("key 'tokenizer.ggml.tokens': expected an array of strings, found something else in it")
        n = len(tokens)

        def numbers(key: str, kinds: str, want: str) -> NDArray[Any]:
            def accept(value: Any) -> bool:
                return isinstance(value, np.ndarray) and value.shape == (n,) and value.dtype.kind in kinds

            found: NDArray[Any] = expect(key, f"an array of {n} {want}, one a token", accept).copy()
            return found

        def special(key: str, needed: bool = True) -> Any:
            def accept(value: Any) -> bool:
                return (value is None and not needed) or (type(value) is int and 0 <= value < n)

            return expect(key, f"an id from 0 to {n - 1}", accept)

        scores, types = numbers("scores", "f", "real numbers"), numbers("token_type", "iu", "integers")
        try:
            pieces = _undo_conversion(Strings.of(tokens), scores, types)
        except UnicodeEncodeError:
            raise fail("a token holds a lone surrogate, which no text can") from None
        bos_id, eos_id = special("bos_token_id"), special("eos_token_id")
        pad_id, unk_id = special("padding_token_id", False), special("unknown_token_id", False)
        if unk_id is not None and types[unk_id] == CONTROL and UNKNOWN not in types:  # as llama.cpp's converter has it
            types[unk_id] = UNKNOWN
        vocabulary = checked_vocabulary(pieces, scores, types, bos_id, eos_id, pad_id, fail)
        if unk_id not in (None, vocabulary.unk_id):
            want = f"{vocabulary.unk_id}, the token of the type unknown"
            raise fail(f"key 'tokenizer.ggml.unknown_token_id': found {unk_id}, expected {want}")
        return vocabulary

    def to_gguf(self) -> dict[str, Any]:
        """The metadata that `from_gguf` reads: tokens list[str], scores float32, types int32, ids and flags.

        llama.cpp looks user-defined pieces up in the text as it is, so those with spaces are written as its
        converter writes them: with spaces for ▁, and with the score by which they are known on the way back.
        """
        pieces, scores = list(self.pieces), self.scores.copy()
        for i in np.flatnonzero(self.types == USER_DEFINED).tolist():
            if SPACE in pieces[i]:
                pieces[i], scores[i] = pieces[i].replace(SPACE, " "), _ADDED_SCORE
        out: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.bos_token_id": self.bos_id,
            "tokenizer.ggml.eos_token_id": self.eos_id,
            "tokenizer.ggml.unknown_token_id": self.unk_id,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.ggml.add_space_prefix": False,
        }
        if self.pad_id is not None:
            out["tokenizer.ggml.padding_token_id"] = self.pad_id
        return out

    def turn_ids(self) -> tuple[int | None, int | None]:
        """The ids of the control pieces that begin and end a turn; None for what there is not."""
        found: tuple[int | None, int | None] = None, None
        for names in _TURNS:
            start, end = (
                (i if i is not None and self.types[i] == CONTROL else None) for i in map(self.pieces.find, names)
            )
            if start is not None and end is not None:
                return start, end
            found = found[0] if start is None else start, found[1] if end is None else end
        return found


class Tokenizer:
    """Encodes and decodes with one vocabulary; `source` names where it came from in errors.

    Raises InvalidModelFile for a vocabulary that sentencepiece refuses. `special_ids` are those that no text
    encodes to: control pieces and <unk>. A turn marker that the vocabulary lacks has the id None.
    """

    def __init__(self, vocabulary: Vocabulary, source: str) -> None:
        try:
            self._processor = _load(model_proto(vocabulary))
        except _REFUSALS as error:
            raise InvalidModelFile(source, f"its tokenizer is unsound: {str(error)[:200]}") from error
        self._pieces, self._types = vocabulary.pieces, vocabulary.types
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.start_of_turn_id, self.end_of_turn_id = vocabulary.turn_ids()
        self.start_of_image_id, self.end_of_image_id = map(vocabulary.pieces.find, (START_OF_IMAGE, END_OF_IMAGE))
        newline = self._processor.encode("\n")
        self.end_of_line_id = newline[0] if len(newline) == 1 else None
        self.stop_ids = frozenset(i for i in (self.eos_id, self.end_of_turn_id) if i is not None)
        self.longest_piece = int(vocabulary.pieces.sizes().max())  # bytes
        self.special_ids = frozenset(np.flatnonzero(np.isin(self._types, (UNKNOWN, CONTROL))).tolist())

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of a text, after <bos> if asked for. Raises InvalidRequest for text that is not Unicode."""
        if not isinstance(text, str):
            raise InvalidRequest(f"text: found {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = ord(text[error.start])
            # As Python reads bytes that are no text.
            what = f"the byte {found - 0xDC00:#04x} is no UTF-8" if 0xDC80 <= found <= 0xDCFF else "a lone surrogate"
            before = text[max(0, error.start - 20) : error.start]
            raise InvalidRequest(f"the text is not valid Unicode: {what}, after {before!r}") from None
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, control pieces left out. Each byte that is not UTF-8 becomes U+FFFD.

        Raises InvalidRequest for an id outside the vocabulary.
        """
        text: str = self._processor.decode([self._check(i) for i in ids_of(ids)])
        return text

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def piece(self, token: int) -> str:
        """The piece as the vocabulary has it, for showing. Raises InvalidRequest like `decode`."""
        return self._pieces[self._check(token)]

    def bytes_of(self, token: int) -> bytes:
        """What a piece stands for in UTF-8; a control piece for its name. Raises InvalidRequest like `decode`."""
        piece = self.piece(token)
        return bytes([_BYTES[piece]]) if self.kind(token) == BYTE else piece.replace(SPACE, " ").encode()

    def kind(self, token: int) -> int:
        """The type of a piece: NORMAL, UNKNOWN, CONTROL, … Raises InvalidRequest like `decode`."""
        return int(self._types[self._check(token)])

    def _check(self, token: int) -> int:
        if not 0 <= whole("token", token) < self.vocab_size:
            raise InvalidRequest(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return int(token)


class StreamDecoder:
    """Decodes one id at a time and never breaks a character in two.

    Gives in all what `Tokenizer.decode` gives, except that bytes which are not UTF-8 become as many U+FFFD as
    Python makes of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes. Raises InvalidRequest for an id outside the vocabulary."""
        kind, piece = self._tokenizer.kind(token), self._tokenizer.piece(token)
        if kind == BYTE:
            return self._bytes.decode(self._tokenizer.bytes_of(token))
        if kind == CONTROL:
            return self.flush()
        return self.flush() + (_UNKNOWN_TEXT if kind == UNKNOWN else piece.replace(SPACE, " "))

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for a character that was never completed, or nothing."""
        return self._bytes.decode(b"", final=True)


def checked_vocabulary(
    pieces: Strings,
    scores: NDArray[Any],
    types: NDArray[Any],
    bos_id: int,
    eos_id: int,
    pad_id: int | None,
    fail: Callable[[str], BezelError],
) -> Vocabulary:
    """The vocabulary, once it is known to be one that sentencepiece can run and text cannot trick."""
    if not pieces.are_text():
        list(pieces)  # fails, and says where
    if not pieces.text.all() or not pieces.sizes().all():
        bad = next(i for i, piece in enumerate(pieces) if not piece or "\0" in piece)
        raise fail(f"token {bad} is {pieces[bad][:40]!r}: a piece must not be empty or hold a NUL")
    if not pieces.are_distinct():
        first: dict[str, int] = {}
        again = next(i for i, piece in enumerate(pieces) if first.setdefault(piece, i) != i)
        raise fail(f"token {again} is {pieces[again][:40]!r}, and so is token {first[pieces[again]]}")

    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise fail(f"token {bad} ({pieces[bad][:40]!r}) has the score {scores[bad]}, expected a finite number")
    if types.min() < NORMAL or types.max() > BYTE:
        bad = int(np.flatnonzero((types < NORMAL) | (types > BYTE))[0])
        raise fail(f"token {bad} ({pieces[bad][:40]!r}) has the type {types[bad]}, expected {NORMAL} to {BYTE}")
    types = types.astype(np.int32)
    for name in CONTROL_PIECES:
        if (token := pieces.find(name)) is not None:
            types[token] = CONTROL
    unknown = np.flatnonzero(types == UNKNOWN).tolist()
    if len(unknown) != 1:
        raise fail(f"{len(unknown)} tokens are of the type unknown, expected one")

    found = {pieces[i] for i in np.flatnonzero(types == BYTE).tolist()}
    if found != _BYTES.keys():
        missing, extra = sorted(_BYTES.keys() - found), sorted(found - _BYTES.keys())
        what = f"has no {missing[0]}" if missing else f"has {extra[0][:40]!r}"
        raise fail(f"the set of byte tokens {what}, expected <0x00> to <0xFF>, each one of the type byte")
    for name, token in (("bos", bos_id), ("eos", eos_id), ("padding", pad_id)):
        if token is not None and token < 0:
            raise fail(f"the tokenizer has no {name} token")
        if token is not None and types[token] != CONTROL:
            raise fail(f"the {name} token is {token} ({pieces[token][:40]!r}), expected a control token")
    return Vocabulary(pieces, scores, types, bos_id, eos_id, unknown[0], pad_id)


def _is_array(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _undo_conversion(pieces: Strings, scores: NDArray[Any], types: NDArray[Any]) -> Strings:
    """Gives the tokens that llama.cpp's converter rewrote their own form back, the types in place."""
    added = np.flatnonzero((types == USER_DEFINED) & (scores == _ADDED_SCORE)).tolist()
    changes = {i: pieces[i].replace(" ", SPACE) for i in added}
    # Gemma's tokenizer.json has a literal tab at the id of the tab's byte piece.
    if "<0x09>" not in pieces and (before := pieces.find("<0x08>")) is not None:
        tab = before + 1
        if pieces[tab : tab + 2] == ["\t", "<0x0A>"]:
            changes[tab], types[tab] = "<0x09>", BYTE
    return pieces.replaced(changes)


# Fields of sentencepiece_model.proto's ModelProto: pieces, trainer_spec, normalizer_spec.
_PIECES = 1
# trainer_spec (field 2): model_type (3) = BPE, byte_fallback (35). normalizer_spec (field 3): name (1) =
# "identity", no add_dummy_prefix (3), no remove_extra_whitespaces (4), escape_whitespaces (5).
_OPTIONS = b"\x12\x05\x18\x02\x98\x02\x01\x1a\x10\x0a\x08identity\x18\x00\x20\x00\x28\x01"


def _load(model_proto: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor  # late: importing this module stays cheap

    return SentencePieceProcessor(model_proto=model_proto)


def model_proto(vocabulary: Vocabulary) -> bytes:
    """A serialised ModelProto. trainer_spec comes twice, which protocol buffers merge; its second part names the
    special tokens.
    """
    texts = vocabulary.pieces
    pieces = _native.sentencepiece_pieces(texts.text, texts.ends, vocabulary.scores, vocabulary.types)
    special = _special_tokens(vocabulary)
    return pieces + _OPTIONS + b"\x12" + varint_bytes(len(special)) + special


def _special_tokens(vocabulary: Vocabulary) -> bytes:
    """Fields 40 … 43 of a trainer_spec, the ids of unk, bos, eos and pad, and 45 … 48, their pieces."""
    out = b""
    ids = (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    for i, token in enumerate(ids):
        if token is not None:
            piece = vocabulary.pieces[token].encode()
            numbers = ((40 + i) << 3, token, (45 + i) << 3 | 2, len(piece))
            out += b"".join(map(varint_bytes, numbers)) + piece
    return out


def _read_piece(message: Any) -> tuple[str, float, int]:
    """Text, score and type of a serialised piece; what is left out has its default."""
    if len(message) > 1 and message[0] == 0x0A and message[1] < 128:  # as sentencepiece writes it; a third of the time
        end = 2 + message[1]
        rest = message[end:]
        if rest[:1] == b"\x15" and (len(rest) == 5 or (len(rest) == 7 and rest[5:6] == b"\x18" and rest[6] < 128)):
            (score,) = struct.unpack_from("<f", rest, 1)
            return message[2:end].decode(), score, rest[6] if len(rest) == 7 else NORMAL
    fields = {number: value for number, _, value in read_fields(message)}
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise ValueError(f"a piece of another form: {message[:40]!r}")
    return text.decode(), struct.unpack("<f", score)[0], kind
