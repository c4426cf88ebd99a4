"""A vocabulary from `tokenizer.json`, which is all that recent versions of transformers write, and back.

It lists the merges of BPE in order, and SentencePiece has a score for each piece instead: merges of two into a piece
come as early as its score is high. So scores follow from the merges wherever these came from a SentencePiece model,
which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...runtime.errors import BezelError
from ...runtime.files.strings import Strings
from ...runtime.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    checked_vocabulary,
)

_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# Changes nothing once spaces are escaped.
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def read_tokenizer_json(
    raw: Mapping[str, Any], special: Mapping[str, Any], fail: Callable[[str], BezelError]
) -> Vocabulary:
    """The vocabulary of a parsed `tokenizer.json`; `special` is `tokenizer_config.json`, which names special tokens.

    Raises what `fail` makes of a reason: for another kind of tokenizer than Gemma's, and for one that is unsound.
    """
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback") is not True:
        raise fail("model: found another tokenizer, expected BPE with byte_fallback, as every Gemma has it")
    for key, allowed in (("normalizer", (_ESCAPE,)), ("pre_tokenizer", (None, _SPLIT))):
        found = raw.get(key)
        if found not in allowed:
            raise fail(f"{key}: found {str(found)[:200]}, expected what Gemma has: {allowed[-1]}")
    added = _added(raw, fail)
    pieces = _pieces(model.get("vocab"), added, fail)
    ids = {piece: i for i, piece in enumerate(pieces)}
    types = np.full(len(pieces), NORMAL, np.int32)
    for i, piece in enumerate(pieces):
        if len(piece) == 6 and piece.startswith("<0x"):
            types[i] = BYTE
        elif i in added:
            types[i] = CONTROL if added[i]["special"] else USER_DEFINED
    unknown = ids.get(model["unk_token"]) if isinstance(model.get("unk_token"), str) else None
    if unknown is not None:
        types[unknown] = UNKNOWN
    scores = _scores(pieces, ids, types, model.get("merges"), fail)
    shown = list(pieces)
    for i in added:  # transformers looks them up in the text as it is, where spaces are spaces
        spaced = pieces[i].replace(" ", SPACE)
        if types[i] == USER_DEFINED and spaced not in ids:
            shown[i] = spaced

    def id_of(name: str, usual: str) -> int:
        value = special.get(name, usual)
        content = value.get("content") if isinstance(value, dict) else value
        return ids.get(content, -1) if isinstance(content, str) else -1

    pad = id_of("pad_token", "<pad>")
    return checked_vocabulary(
        Strings.of(shown),
        scores,
        types,
        id_of("bos_token", "<bos>"),
        id_of("eos_token", "<eos>"),
        pad if pad >= 0 else None,
        fail,
    )


def _added(raw: Mapping[str, Any], fail: Callable[[str], BezelError]) -> dict[int, dict[str, Any]]:
    """The tokens that are looked up before anything else, by id."""
    found = {}
    for entry in raw.get("added_tokens") or []:
        sound = isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str)
        if not sound or not isinstance(entry.get("special"), bool) or entry["id"] in found:
            raise fail(f"added_tokens: found {str(entry)[:200]}, expected an id of its own, content and special")
        found[entry["id"]] = entry
    return found


def _pieces(vocab: Any, added: Mapping[int, Mapping[str, Any]], fail: Callable[[str], BezelError]) -> list[str]:
    """The pieces in the order of their ids, 0, 1, 2 …"""
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise fail("model.vocab: expected pieces and their ids")
    by_id = {i: piece for piece, i in vocab.items()} | {i: entry["content"] for i, entry in added.items()}
    if len({**vocab, **{entry["content"]: i for i, entry in added.items()}}) != len(by_id):
        raise fail("model.vocab: found an id twice, or a piece that added_tokens has under another id")
    missing = next((i for i in range(len(by_id)) if i not in by_id), None)
    if missing is not None:
        raise fail(f"model.vocab: found no piece with the id {missing}, expected ids from 0 to {len(by_id) - 1}")
    return [by_id[i] for i in range(len(by_id))]


def _scores(
    pieces: Sequence[str],
    ids: Mapping[str, int],
    types: Any,
    merges: Any,
    fail: Callable[[str], BezelError],
) -> Any:
    """float32 (n,): the earlier a piece's merges, the higher. Those of tokens that are never merged are 0."""
    scores = np.zeros(len(pieces), np.float32)
    seen: set[tuple[str, str]] = set()
    before, rank = None, 0
    for pair in _pairs(merges, fail):
        merged = ids.get(pair[0] + pair[1])
        if merged is None:
            raise fail(f"model.merges: found {str(pair)[:200]}, whose sum is no piece")
        if types[merged] != NORMAL:
            continue
        if merged != before:
            if scores[merged]:
                raise fail(f"model.merges: found {str(pair)[:200]} apart from the other merges of its sum: {_FOREIGN}")
            before, rank = merged, rank + 1
            scores[merged] = -rank
        seen.add(pair)
    for i in np.flatnonzero(types == NORMAL).tolist():
        piece = pieces[i]
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if (
                pair not in seen
                and pair[0] in ids
                and pair[1] in ids
                and types[ids[pair[0]]] == types[ids[pair[1]]] == NORMAL
            ):
                raise fail(f"model.merges: found no {pair}, though all three are pieces: {_FOREIGN}")
    return scores


_FOREIGN = "these are not the merges of a SentencePiece model, so bezel would split text in another way"


def _pairs(merges: Any, fail: Callable[[str], BezelError]) -> Iterator[tuple[str, str]]:
    """Both spellings: pairs, and texts with a space between."""
    if not isinstance(merges, list):
        raise fail("model.merges: expected a list")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise fail(f"model.merges: found {str(merge)[:200]}, expected two pieces")
        yield pair[0], pair[1]


def write_tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The `tokenizer.json` of a vocabulary, whose scores become the order of the merges."""
    pieces, types = list(vocabulary.pieces), vocabulary.types
    normal = {pieces[i]: i for i in np.flatnonzero(types == NORMAL).tolist()}
    # SentencePiece looks user-defined pieces up in escaped text, before it merges anything: never those with a space.
    added = [
        {
            "id": i,
            "content": pieces[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": bool(types[i] == USER_DEFINED),
            "special": bool(types[i] != USER_DEFINED),
        }
        for i in np.flatnonzero((types != NORMAL) & (types != BYTE)).tolist()
        if types[i] != USER_DEFINED or " " not in pieces[i]
    ]
    by_score = sorted(normal.values(), key=lambda i: (-vocabulary.scores[i], i))
    merges = [
        [piece[:at], piece[at:]]
        for piece in (pieces[i] for i in by_score)
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    bos = pieces[vocabulary.bos_id]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _ESCAPE,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, pair],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[vocabulary.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
