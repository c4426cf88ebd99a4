"""SentencePiece's own files: read to a vocabulary, and made of one.

A model is rebuilt from pieces, scores and types alone, with the options that every Gemma uses: BPE, byte fallback, no
normalisation, no dummy prefix, whitespace kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native
from ..errors import BezelError, InvalidCheckpoint
from ..files.protobuf import read_fields, varint_bytes
from ..files.strings import Strings
from .vocabulary import NORMAL, Vocabulary, checked_vocabulary

# What sentencepiece raises, depending on its version, for a model that it does not accept.
REFUSALS = (RuntimeError, LookupError, OSError, TypeError, ValueError)
# Ids of this text depend on every option that the rebuilt model takes for granted.
_PROBE = "  Two  spaces,\t\ttabs, ﬁ Å １２3 Ω≈ç 🙂 𐍈.\n\n It was the best of times, it was the worst of times. "

# Fields of sentencepiece_model.proto's ModelProto: pieces, trainer_spec, normalizer_spec.
_PIECES = 1
# trainer_spec (field 2): model_type (3) = BPE, byte_fallback (35). normalizer_spec (field 3): name (1) =
# "identity", no add_dummy_prefix (3), no remove_extra_whitespaces (4), escape_whitespaces (5).
_OPTIONS = b"\x12\x05\x18\x02\x98\x02\x01\x1a\x10\x0a\x08identity\x18\x00\x20\x00\x28\x01"


def read_vocabulary_file(path: str | Path) -> Vocabulary:
    """A checkpoint's `tokenizer.model`. Raises InvalidCheckpoint, as `read_vocabulary` does."""

    def fail(reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{path}: {reason}")

    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror}") from error
    return read_vocabulary(raw, fail)


def read_vocabulary(raw: bytes, fail: Callable[[str], BezelError]) -> Vocabulary:
    """The content of a `tokenizer.model`. Raises what `fail` makes of a reason.

    Also where the file's options are not Gemma's, because nothing but the pieces is carried on.
    """
    if not raw:
        raise fail("the file is empty, expected a SentencePiece model")
    try:
        original = processor(raw)
        probe = original.encode(_PROBE)
        # The library's Python interface does not tell which pieces are user-defined; the file does.
        read = [_read_piece(value) for number, _, value in read_fields(raw) if number == _PIECES]
        texts, scores, types = zip(*read, strict=True)
        pieces = Strings.of(texts)
    except REFUSALS as error:
        raise fail(f"not a SentencePiece model: {str(error)[:200]}") from error
    pad = original.pad_id()  # -1 where there is none
    special = (original.bos_id(), original.eos_id(), pad if pad >= 0 else None)
    vocabulary = checked_vocabulary(pieces, np.array(scores), np.array(types), *special, fail)
    try:
        same = processor(model_proto(vocabulary)).encode(_PROBE) == probe
    except REFUSALS as error:
        raise fail(f"its tokenizer is unsound: {str(error)[:200]}") from error
    if not same:
        raise fail(
            "the tokenizer's options are not Gemma's (BPE with byte fallback, no normalisation, no dummy "
            "prefix, whitespace kept), so its pieces alone do not make it"
        )
    return vocabulary


def processor(model_proto: bytes) -> Any:
    """sentencepiece's own object, for a serialised ModelProto. Raises one of `REFUSALS`."""
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
