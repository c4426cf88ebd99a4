"""Text to ids and back: Gemma's vocabulary, from `tokenizer.model` or a GGUF file, run by sentencepiece.

GGUF carries each piece's text, score and type. From these a SentencePiece model is rebuilt, so both sources give equal
ids. What users write never becomes a control token: those come by id only.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np

from ..arguments import ids_of, whole
from ..errors import InvalidModelFile, InvalidRequest
from .sentencepiece_model import REFUSALS, model_proto, processor
from .vocabulary import BYTE, BYTES, CONTROL, END_OF_IMAGE, SPACE, START_OF_IMAGE, UNKNOWN, Vocabulary

_UNKNOWN_TEXT = " \u2047 "  # how SentencePiece decodes <unk>


class Tokenizer:
    """Encodes and decodes with one vocabulary; `source` names where it came from in errors.

    Raises InvalidModelFile for a vocabulary that sentencepiece refuses. `special_ids` are those that no text
    encodes to: control pieces and <unk>. A turn marker that the vocabulary lacks has the id None.
    """

    def __init__(self, vocabulary: Vocabulary, source: str) -> None:
        try:
            self._processor = processor(model_proto(vocabulary))
        except REFUSALS as error:
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
        return bytes([BYTES[piece]]) if self.kind(token) == BYTE else piece.replace(SPACE, " ").encode()

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
