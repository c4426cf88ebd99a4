"""Synthetic checkpoints: what others' libraries make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES, vocabulary, write_checkpoint, write_gguf
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.model.families.hf import read_hf_config
from bezel.runtime.model.tensors import tensor_specs
from bezel.runtime.text.chat import template_is_known
from bezel.runtime.text.sentencepiece_model import model_proto, read_vocabulary_file
from bezel.runtime.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

# Published parameter counts, in millions.
PARAMETERS = {"gemma-2-2b": 2614.3, "gemma-2-9b": 9241.7, "gemma-2b": 2506.2}
PARAMETERS |= {"gemma-3-270m": 268.1, "gemma-3-1b": 999.9, "gemma-3-4b": 3880.1}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_size(name: str) -> None:
    config = read_hf_config(SHAPES[name])
    rows_of_pictures = 64 * config.hidden_size if config.vocab_size == 262208 else 0
    size = sum(math.prod(spec.shape) for spec in tensor_specs(config)) - rows_of_pictures
    assert size / 1e6 == pytest.approx(PARAMETERS[name], abs=0.1)


def processor(name: str, **changes: int) -> SentencePieceProcessor:
    config = read_hf_config(SHAPES[name] | changes)
    return SentencePieceProcessor(model_proto=model_proto(vocabulary(config)))


def test_the_vocabulary_is_one_that_sentencepiece_runs() -> None:
    tokenizer = processor("gemma-2-2b")
    assert tokenizer.get_piece_size() == 256000
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert [tokenizer.id_to_piece(i) for i in (106, 107)] == ["<start_of_turn>", "<end_of_turn>"]
    assert [tokenizer.id_to_piece(i) for i in (217, 226, 472)] == ["<0x00>", "<0x09>", "<0xFF>"]
    assert tokenizer.is_byte(226)
    assert tokenizer.is_control(2)
    text = "Hello  world,\n\nthe quick brown fox\tcosts 10 €."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)  # syllables do merge


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-4b"])
def test_the_vocabulary_of_gemma_3(name: str) -> None:
    """Ids and types as the published files have them, but for <unk>, which llama.cpp makes a control piece."""
    tokenizer = processor(name)
    assert tokenizer.get_piece_size() == 262144
    places = {"<mask>": 4, "<unused0>": 6, "<unused98>": 104, "<start_of_turn>": 105, "<end_of_turn>": 106, "\n": 107}
    places |= {"▁▁": 138, "<table>": 168, "<0x00>": 238, "<0xFF>": 493, "\t": 255968, "<start_of_image>": 255999}
    places |= {"<end_of_image>": 256000, "<unused99>": 256001, "<unused6241>": 262143}
    assert {piece: tokenizer.piece_to_id(piece) for piece in places} == places
    types = vocabulary(read_hf_config(SHAPES[name])).types
    counts = dict(zip(*np.unique(types, return_counts=True), strict=True))
    assert counts == {NORMAL: 255474, UNKNOWN: 1, CONTROL: 6248, USER_DEFINED: 165, BYTE: 256}
    text = "Hello  world,\n\nthe quick brown fox\tcosts 10 €."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_needs_room_for_its_special_pieces(tmp_path: Path) -> None:
    for name, least in (("tiny-gemma-2", 568), ("tiny-gemma-3", 589)):
        with pytest.raises(InvalidRequest, match=f"expected at least {least}"):
            processor(name, vocab_size=least - 1)
        folder = write_checkpoint(tmp_path / name, SHAPES[name] | {"vocab_size": least})
        assert len(read_vocabulary_file(folder / "tokenizer.model").pieces) == least


@pytest.mark.parametrize("name", ["tiny-gemma-1", "tiny-gemma-2", "tiny-gemma-3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_safetensors_library_reads_the_shards(tmp_path: Path, name: str, shards: int) -> None:
    write_checkpoint(tmp_path, name, shards=shards, dtype="f32")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    shapes = {}
    for file in files:
        with safe_open(file, "np") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(key)
                shapes[key] = (tensor.shape, file.name)
                # sampled deviation, off by 1 / √(2n): 5 deviations are never exceeded
                want = 0.05 if tensor.ndim == 1 else 0.02
                assert tensor.std() == pytest.approx(want, rel=5 / math.sqrt(2 * tensor.size))
    config = read_hf_config(json.loads((tmp_path / "config.json").read_text()))
    assert {key: shape for key, (shape, _) in shapes.items()} == {s.hf: s.shape for s in tensor_specs(config)}
    if shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {key: file for key, (_, file) in shapes.items()}


def test_dtypes_are_roundings_of_the_same_numbers(tmp_path: Path) -> None:
    raw = {}
    for dtype in ("f32", "f16", "bf16"):
        file = write_checkpoint(tmp_path / dtype, "tiny-gemma-2", dtype=dtype) / "model.safetensors"
        size = {"f32": 4, "f16": 2, "bf16": 2}[dtype]
        with safe_open(file, "np") as opened:
            count = sum(math.prod(opened.get_slice(k).get_shape()) for k in opened.keys())  # noqa: SIM118
        raw[dtype] = file.read_bytes()[-count * size :]
    exact = np.frombuffer(raw["f32"], "<f4")
    bf16 = (np.frombuffer(raw["bf16"], "<u2").astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.frombuffer(raw["f16"], "<f2"), exact.astype(np.float16))
    assert np.all(np.abs(bf16 - exact) <= np.abs(exact) * 2.0**-8)
    assert np.mean(np.abs(bf16 - exact)) > 0


def test_the_seed_decides(tmp_path: Path) -> None:
    files = [
        write_checkpoint(tmp_path / str(i), "tiny-gemma-2", seed=seed) / "model.safetensors"
        for i, seed in enumerate((1, 1, 2))
    ]
    first, same, other = (file.read_bytes() for file in files)
    assert first == same
    assert first != other


def test_their_chats_are_gemmas(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", "tiny-gemma-2")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    with GGUFModel(write_gguf(tmp_path / "x.gguf", "tiny-gemma-2", "q8_0")) as file:
        stored = file.metadata["tokenizer.chat_template"]
    assert template_is_known(config["chat_template"])
    assert stored == config["chat_template"]


def test_unknown_requests(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected one of gemma-2-2b"):
        write_checkpoint(tmp_path, "gemma-5")
    with pytest.raises(InvalidRequest, match="expected one of bf16"):
        write_checkpoint(tmp_path, "tiny-gemma-2", dtype="q8_0")
