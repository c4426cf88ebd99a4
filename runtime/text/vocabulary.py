"""Gemma's vocabulary: its pieces, in GGUF's keys too, and the checks that make it one which text cannot trick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BezelError, InvalidModelFile
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
BYTES = {f"<0x{i:02X}>": i for i in range(256)}
# llama.cpp's converter gives this score to each piece that it takes from the list of added tokens.
_ADDED_SCORE = np.float32(-1000.0)


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
    if found != BYTES.keys():
        missing, extra = sorted(BYTES.keys() - found), sorted(found - BYTES.keys())
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
