"""The vocabulary of a Hugging Face folder, from the one or two files that its tokenizer is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import InvalidCheckpoint
from ...runtime.files.strings import Strings
from ...runtime.text.sentencepiece_model import read_vocabulary_file
from ...runtime.text.vocabulary import CONTROL, SPACE, USER_DEFINED, Vocabulary, checked_vocabulary
from .files import required
from .safetensors import read_json
from .tokenizer_json import read_tokenizer_json

NEWER, OLDER = "tokenizer.json", "tokenizer.model"


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """From `tokenizer.json`, which has the latest say, or `tokenizer.model`; where both are there, they must agree.

    Tokens that were added without a row of the embedding are left out.
    """
    newer, older = folder / NEWER, folder / OLDER
    config_file = folder / "tokenizer_config.json"
    special = read_json(required(config_file)) if config_file.exists() else {}

    def fail(reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{newer if newer.exists() else older}: {reason}")

    if newer.exists():
        found = read_tokenizer_json(read_json(newer), special, fail)
    else:
        found = _with_added(read_vocabulary_file(older), _added_tokens(folder, special), rows, fail)
    n = len(found.pieces)
    while n > rows and found.types[n - 1] in (CONTROL, USER_DEFINED):
        n -= 1
    if n < len(found.pieces):
        pieces, scores, types = Strings.of(found.pieces[:n]), found.scores[:n], found.types[:n]
        found = checked_vocabulary(pieces, scores, types, found.bos_id, found.eos_id, found.pad_id, fail)
    if newer.exists() and older.exists():
        original, same = read_vocabulary_file(older), len(found.pieces)
        for i, (new, old) in enumerate(zip(found.pieces, original.pieces, strict=False)):
            if new == old.replace(" ", SPACE):
                continue
            same = min(same, i)
            if found.types[i] not in (CONTROL, USER_DEFINED):  # those a fine-tune may have taken for something else
                raise fail(f"token {i} is {new[:40]!r}, and in {older.name} it is {old[:40]!r}; remove the wrong file")
        if same == len(original.pieces) == len(found.pieces):
            return original
    return found


def _added_tokens(folder: Path, special: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """What transformers lists beside `tokenizer.model`, by id: a token's text, and whether it is special."""
    listed = folder / "added_tokens.json"
    found = {}
    for text, token in (read_json(required(listed)) if listed.exists() else {}).items():
        if type(token) is not int:
            raise InvalidCheckpoint(f"{listed}: {text[:40]!r}: found {str(token)[:40]}, expected an id")
        found[token] = text, True
    decoder = special.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if not key.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InvalidCheckpoint(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: found {key[:40]!r}: {str(entry)[:80]}, "
                "expected an id and its content"
            )
        found[int(key)] = entry["content"], entry.get("special") is True
    return found


def _with_added(
    vocabulary: Vocabulary, added: Mapping[int, tuple[str, bool]], rows: int, fail: Callable[[str], InvalidCheckpoint]
) -> Vocabulary:
    """The vocabulary with tokens that were added behind it, or that took the place of unused ones."""
    pieces, scores, types = list(vocabulary.pieces), list(vocabulary.scores), list(vocabulary.types)
    for token, (text, special) in sorted(added.items()):
        if token >= rows:
            break
        if token > len(pieces):
            raise fail(f"added token {token} ({text[:40]!r}) comes after {len(pieces)} pieces: one is missing between")
        kind = CONTROL if special else USER_DEFINED
        if token == len(pieces):
            pieces.append(text)
            scores.append(0.0)
            types.append(kind)
        elif pieces[token].replace(" ", SPACE) != text.replace(" ", SPACE):
            if types[token] not in (CONTROL, USER_DEFINED):
                raise fail(f"token {token} is {pieces[token][:40]!r}, and an added token calls it {text[:40]!r}")
            pieces[token], types[token] = text, kind
    if pieces == list(vocabulary.pieces):
        return vocabulary
    special_ids = vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id
    return checked_vocabulary(Strings.of(pieces), np.array(scores), np.array(types), *special_ids, fail)
