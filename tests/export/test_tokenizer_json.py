"""`tokenizer.json` without `tokenizer.model`, as recent versions of transformers save."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.export.sources.opening import open_checkpoint
from bezel.export.sources.tokenizer_json import read_tokenizer_json, write_tokenizer_json
from bezel.runtime.errors import InvalidCheckpoint
from bezel.runtime.text.tokenizer import Tokenizer
from bezel.runtime.text.vocabulary import CONTROL, SPACE, USER_DEFINED
from tiny import DEMO, TEXT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer as transformers saves it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """The demo with nothing but these files for its tokenizer."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    (folder / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")


def hard_texts() -> list[str]:
    """No marker of transformers' own, which no text of a user makes in bezel."""
    rng, text = random.Random(0), TEXT.read_text(encoding="utf-8").replace("<unk>", "")
    cuts = [text[at : at + rng.randrange(1, 300)] for at in (rng.randrange(len(text)) for _ in range(150))]
    noise = ["".join(rng.choice("  \n\n\ta1ßé漢🙂<>_.,ﬁ\u0301\u200b") for _ in range(80)) for _ in range(100)]
    return ["", " ", "\n", "   lead", "trail   ", *cuts, *noise]


def test_ids_are_those_of_transformers(checkpoint: Path, saved: Path) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(saved)
    with open_checkpoint(checkpoint) as source, open_checkpoint(DEMO) as original:
        vocabulary, known = source.vocabulary(), original.vocabulary()
    assert (vocabulary.types == known.types).all()
    tokenizer = Tokenizer(vocabulary, "")
    for text in hard_texts():
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("as_in_gemma", [False, True])
def test_written_ids_are_bezels(as_in_gemma: bool, tmp_path: Path) -> None:
    """By the library that transformers reads the file with, and read again by bezel.

    The demo has runs of spaces that nothing can reach, because SentencePiece looks for them where spaces are escaped;
    Gemma has them escaped.
    """
    with open_checkpoint(DEMO) as source:
        vocabulary = source.vocabulary()
    if as_in_gemma:
        escaped = {i: piece.replace(" ", SPACE) for i, piece in enumerate(vocabulary.pieces) if " " in piece}
        vocabulary = replace(vocabulary, pieces=vocabulary.pieces.replaced(escaped))
    raw = write_tokenizer_json(vocabulary)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    written, tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer(vocabulary, "")
    for text in hard_texts():
        ids = tokenizer.encode(text)
        assert written.encode(text).ids == [vocabulary.bos_id, *ids], text
        assert written.decode(ids) == text, text
    if as_in_gemma:
        again = read_tokenizer_json(raw, {}, InvalidCheckpoint)
        assert list(again.pieces) == list(vocabulary.pieces)
        assert (again.types == vocabulary.types).all()


def test_both_files_must_agree(checkpoint: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", checkpoint)
    with open_checkpoint(checkpoint) as source, open_checkpoint(DEMO) as original:
        assert list(source.vocabulary().pieces) == list(original.vocabulary().pieces)
        assert np.array_equal(source.vocabulary().scores, original.vocabulary().scores)

    def change(raw: dict[str, Any]) -> None:
        vocab = raw["model"]["vocab"]
        a, b = sorted(vocab, key=vocab.get)[-2:]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    edit(checkpoint, change)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json: token \d+ is .*, and in tokenizer\.model it is"):
        open_checkpoint(checkpoint)


def test_a_renamed_control_token_has_its_new_name(checkpoint: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", checkpoint)

    def change(raw: dict[str, Any]) -> None:
        for entry in raw["added_tokens"]:
            if entry["content"] == "<start_of_turn>":
                entry |= {"content": "<|im_start|>", "special": True}
        del raw["model"]["vocab"]["<start_of_turn>"]
        raw["model"]["vocab"]["<|im_start|>"] = 4

    edit(checkpoint, change)
    with open_checkpoint(checkpoint) as source:
        vocabulary = source.vocabulary()
    assert (vocabulary.pieces[4], vocabulary.types[4]) == ("<|im_start|>", CONTROL)


def test_added_tokens_are_tokens(checkpoint: Path) -> None:
    """Those with a row of the embedding; the last one of transformers' own, <mask>, has none."""
    with open_checkpoint(checkpoint) as source:
        assert "<mask>" not in source.vocabulary().pieces

    def change(raw: dict[str, Any]) -> None:
        new = next(piece for piece, i in raw["model"]["vocab"].items() if i == 4095)
        raw["model"]["merges"] = [m for m in raw["model"]["merges"] if new not in (*m, "".join(m))]
        del raw["model"]["vocab"][new]
        raw["added_tokens"].insert(-1, {"id": 4095, "content": "<tool>", "special": False})

    edit(checkpoint, change)
    with open_checkpoint(checkpoint) as source:
        vocabulary = source.vocabulary()
    assert (vocabulary.pieces[4095], vocabulary.types[4095]) == ("<tool>", USER_DEFINED)
    assert Tokenizer(vocabulary, "").encode("a<tool>b")[-2] == 4095


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another kind": (lambda raw: raw["model"].update(type="Unigram"), "model: found another tokenizer"),
    "no bytes": (lambda raw: raw["model"].update(byte_fallback=False), "model: found another tokenizer"),
    "lower case": (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "normalizer: found"),
    "words": (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer: found"),
    "no merges": (lambda raw: raw["model"].pop("merges"), "model.merges: expected a list"),
    "no pair": (lambda raw: raw["model"]["merges"].append(["a"]), "model.merges: found .* expected two pieces"),
    "no piece": (lambda raw: raw["model"]["merges"].append(["a", "🙂"]), "whose sum is no piece"),
    "a merge less": (lambda raw: raw["model"]["merges"].pop(), "model.merges: found no .* though all three are pieces"),
    "a hole": (lambda raw: raw["model"]["vocab"].update({"new": 9999}), "found no piece with the id"),
    "an id twice": (lambda raw: raw["model"]["vocab"].update({"new": 300}), "found an id twice"),
    "an id that is a text": (lambda raw: raw["model"]["vocab"].update({"new": "5"}), "expected pieces and their ids"),
    "added nonsense": (lambda raw: raw["added_tokens"].append({"id": "x"}), "added_tokens: found"),
    "no end": (lambda raw: raw["added_tokens"][1].update(content="<end>"), "found an id twice, or a piece"),
}


@pytest.mark.parametrize(("change", "said"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_tokenizer_of_gemma(change: Callable[[dict[str, Any]], None], said: str, saved: Path) -> None:
    raw = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    change(raw)
    with pytest.raises(InvalidCheckpoint, match=said):
        read_tokenizer_json(raw, {}, InvalidCheckpoint)


def test_merges_in_the_older_spelling(saved: Path) -> None:
    raw = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = read_tokenizer_json(raw, {}, InvalidCheckpoint)
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"] if " " not in "".join(pair)]
    texts = read_tokenizer_json(raw, {}, InvalidCheckpoint)
    assert np.array_equal(pairs.scores, texts.scores)
