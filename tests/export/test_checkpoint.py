"""Reading checkpoints: numbers against an independent reading, and each way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES, write_checkpoint
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources import checkpoint as module
from bezel.export.sources.checkpoint import Checkpoint
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.formats import F32, Q6_K
from bezel.runtime.errors import BezelError, InvalidCheckpoint, InvalidConfig
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.model.families import FAMILIES
from bezel.runtime.text.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import DEMO, write_tiny

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in float32."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny-gemma-2", dtype="f32")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def read_raw(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(file: Path, header: str | bytes | dict[str, Any], data: bytes, length: int | None = None) -> None:
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    file.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def all_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {spec.hf: checkpoint.tensor(spec) for spec in checkpoint.specs}


def test_the_demo_gives_the_numbers_in_its_file() -> None:
    header, data = read_raw(DEMO / "model.safetensors")
    del header["__metadata__"]
    with open_checkpoint(DEMO) as checkpoint:
        assert {spec.hf for spec in checkpoint.specs} == header.keys()
        for spec in checkpoint.specs:
            begin, end = header[spec.hf]["data_offsets"]
            # a bfloat16 is the upper half of a float32
            halves = np.frombuffer(data[begin:end], "<u2")
            expected = np.stack([np.zeros_like(halves), halves], axis=-1).view("<f4").reshape(spec.shape)
            assert np.array_equal(checkpoint.tensor(spec), expected + 1 if spec.is_norm else expected), spec
        assert checkpoint.name == "fairy-gemma2"
        assert checkpoint.generation_config["eos_token_id"] == [1, 5]
        assert checkpoint.chat_template is not None
        assert "<start_of_turn>" in checkpoint.chat_template
        assert len(checkpoint.vocabulary().pieces) == 4096


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_other_dtypes_are_exact(folder: Path, dtype: type) -> None:
    tensors = {name: x.astype(dtype) for name, x in load_file(folder / "model.safetensors").items()}
    if dtype is np.float64:
        tensors[EMBEDDING] *= 1 + 2**-40  # which float32 rounds away
    save_file(tensors, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        for spec in checkpoint.specs:
            expected = tensors[spec.hf].astype(np.float32)
            found = checkpoint.tensor(spec)
            assert found.dtype == np.float32
            assert np.array_equal(found, expected + np.float32(1) if spec.is_norm else expected)


def test_rows_are_slices_of_the_tensor(sound: Path) -> None:
    with open_checkpoint(sound) as checkpoint:
        spec = checkpoint.specs[0]
        whole = checkpoint.tensor(spec)
        for start, stop in ((0, 1), (5, 17), (spec.shape[0] - 3, spec.shape[0])):
            assert np.array_equal(checkpoint.rows(spec, start, stop), whole[start:stop])


def test_shards_hold_the_same_model(sound: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny-gemma-2", shards=3, dtype="f32")
    with open_checkpoint(sound) as one, open_checkpoint(tmp_path) as three:
        expected, found = all_tensors(one), all_tensors(three)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert sum(file.suffix == ".safetensors" for file in three.files) == 3


@pytest.mark.parametrize("preset", ["f32", "f16", "bf16"])
def test_a_gguf_source_gives_the_same_numbers_as_the_folder(tmp_path: Path, preset: str) -> None:
    folder = write_checkpoint(tmp_path / "folder", "tiny-gemma-2", dtype="f16" if preset == "f16" else "bf16")
    with open_checkpoint(folder) as source:
        export_gguf(source, tmp_path / "full.gguf", preset)
        export_gguf(source, tmp_path / "direct.gguf", "q8_0")
        with open_checkpoint(tmp_path / "full.gguf") as again:
            expected, found = all_tensors(source), all_tensors(again)
            assert again.config == source.config
            assert again.name == source.name
            assert again.chat_template == source.chat_template
            assert list(again.generation_config["eos_token_id"]) == [1, 107]
            export_gguf(again, tmp_path / "indirect.gguf", "q8_0")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    files = [(tmp_path / name).read_bytes() for name in ("direct.gguf", "indirect.gguf")]
    tail = len(files[0]) - 200_000  # headers differ by their provenance
    assert files[0][tail:] == files[1][len(files[1]) - 200_000 :]


def test_a_quantized_gguf_source_is_refused(sound: Path, tmp_path: Path) -> None:
    with open_checkpoint(sound) as source:
        export_gguf(source, tmp_path / "q.gguf", "q8_0")
    with pytest.raises(InvalidCheckpoint, match=r"token_embd.weight' is q8_0, .*quantized already.*--requantize"):
        open_checkpoint(tmp_path / "q.gguf")


def test_a_quantized_gguf_source_gives_what_its_blocks_stand_for(sound: Path, tmp_path: Path) -> None:
    with open_checkpoint(sound) as source:
        export_gguf(source, tmp_path / "q.gguf", "q4_k_m")
    with open_checkpoint(tmp_path / "q.gguf", quantized=True) as checkpoint, GGUFModel(tmp_path / "q.gguf") as file:
        for spec in checkpoint.specs:
            stored = file.tensors[spec.gguf].format
            assert checkpoint.format(spec) is stored
            assert np.array_equal(checkpoint.tensor(spec), file.dequantize(spec.gguf))
            if spec.is_matrix:
                assert np.array_equal(checkpoint.rows(spec, 3, 9), file.dequantize(spec.gguf)[3:9])
                assert np.array_equal(checkpoint.blocks(spec, 3, 9, stored), file.data(spec.gguf)[3:9])
                assert np.array_equal(checkpoint.blocks(spec, 3, 9, F32).view("<f4"), checkpoint.rows(spec, 3, 9))
        formats = {spec.gguf: checkpoint.format(spec) for spec in checkpoint.specs}
        assert checkpoint.added_losses(formats) == checkpoint.added_losses(dict.fromkeys(formats, F32)) == []
        assert checkpoint.added_losses(formats | {"blk.0.attn_q.weight": Q6_K})[0].startswith(
            "q4_k weights are rounded"
        )


# --- checkpoints with pictures


def nest(plain: Path, out: Path, prefix: str, head: str | None, rows: int = 0) -> Path:
    """The plain Gemma 3 as the text part of a model that sees pictures, its vocabulary longer by `rows`.

    `prefix` takes the place of "model."; with a `head`, the model has one of its own, of that name.
    """
    shutil.copytree(plain, out)
    text = json.loads((plain / "config.json").read_text())
    text["vocab_size"] += rows
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "tie_word_embeddings": head is None}
    (out / "config.json").write_text(json.dumps(raw))

    def change(tensors: dict[str, np.ndarray]) -> None:
        embedding = tensors[EMBEDDING] = np.concatenate([tensors[EMBEDDING], np.ones((rows, 64), np.float32)])
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        if head:
            tensors[head] = embedding[:, ::-1].copy()

    change_tensors(out, change)
    return out


NESTED = (
    ("language_model.model.", None),
    ("model.language_model.", None),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
)


@pytest.mark.parametrize("rows", [0, 64])
@pytest.mark.parametrize(("prefix", "head"), NESTED)
def test_the_text_part_of_a_model_with_pictures(prefix: str, head: str | None, rows: int, tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "gemma3-gqa")
    nested = nest(plain, tmp_path / "nested", prefix, head, rows)
    with open_checkpoint(plain) as one, open_checkpoint(nested) as other:
        assert other.config == replace(one.config, tied_head=head is None)
        expected, found = all_tensors(one), all_tensors(other)
        if head:
            assert np.array_equal(found.pop(HEAD), expected[EMBEDDING][:, ::-1])
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert len(other.vocabulary().pieces) == 4096
        assert one.warnings == ()
        assert ["pictures" in words for words in other.warnings] == [*[False] * (rows > 0), True]
        assert not rows or other.warnings[0].startswith("64 rows of the embedding are left out")
        summary = export_gguf(other, tmp_path / "out.gguf", "f32")
        assert tuple(summary.warnings[: len(other.warnings)]) == other.warnings


def test_rows_without_pieces_are_cut_in_text_models_too(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", "gemma3-gqa")
    change_config(folder, vocab_size=4100)
    change_tensors(folder, lambda t: t.update({EMBEDDING: np.pad(t[EMBEDDING], ((0, 4), (0, 0)))}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.vocab_size == 4096
        assert checkpoint.tensor(checkpoint.specs[0]).shape == (4096, 64)
        assert len(checkpoint.warnings) == 1


def test_an_embedding_that_is_too_short(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", "gemma3-gqa")
    change_config(folder, vocab_size=4000)
    change_tensors(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING][:4000]}))
    with open_checkpoint(folder) as checkpoint, pytest.raises(InvalidCheckpoint, match=r"4096 pieces .* 4000 rows"):
        checkpoint.vocabulary()


def test_a_name_in_both_spellings(tmp_path: Path) -> None:
    nested = nest(write_tiny(tmp_path / "plain", "gemma3-gqa"), tmp_path / "nested", "language_model.model.", None)
    change_tensors(nested, lambda t: t.update({"model.language_model.norm.weight": np.ones(64, np.float32)}))
    with pytest.raises(InvalidCheckpoint, match=r"found 'model\.norm\.weight' under another name too"):
        open_checkpoint(nested)


def test_pictures_belong_to_models_that_see_them(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", "gemma3-gqa")
    change_tensors(folder, lambda t: t.update({"vision_tower.x": np.ones(4, np.float32)}))
    with pytest.raises(InvalidCheckpoint, match=r"'vision_tower\.x': .*no such tensor in a gemma3 model"):
        open_checkpoint(folder)


# --- tensors


def test_a_missing_tensor(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop(NORM))
    with pytest.raises(InvalidCheckpoint, match=r"'model.norm.weight' is missing, expected shape \[256\]"):
        open_checkpoint(folder)


def test_an_extra_tensor(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update(extra=np.zeros(3, np.float32)))
    with pytest.raises(InvalidCheckpoint, match=r"model.safetensors: tensor 'extra': found shape \[3\]"):
        open_checkpoint(folder)


def test_a_wrong_shape(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({NORM: np.zeros(255, np.float32)}))
    with pytest.raises(InvalidCheckpoint, match=r"'model.norm.weight': found shape \[255\], expected \[256\]"):
        open_checkpoint(folder)


def test_a_large_tensor_is_read_in_pieces(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no room for what it is read from."""
    with open_checkpoint(sound) as checkpoint:
        spec, norm = checkpoint.specs[0], next(spec for spec in checkpoint.specs if spec.is_norm)
        whole = checkpoint.rows(spec, 0, spec.shape[0])
        raw_rows, read = checkpoint.raw_rows, []
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", 100 * spec.shape[1])
        monkeypatch.setattr(
            checkpoint, "raw_rows", lambda stored, *ends: (read.append(ends), raw_rows(stored, *ends))[1]
        )
        assert np.array_equal(checkpoint.tensor(spec), whole)
        assert max(stop - start for start, stop in read) == 100
        assert checkpoint.tensor(norm).shape == norm.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite(folder: Path, value: float) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBEDDING][700, 33] = value

    change_tensors(folder, change)
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.specs[0]
        assert np.isfinite(checkpoint.rows(spec, 0, 700)).all()
        with pytest.raises(InvalidCheckpoint, match=r"embed_tokens.*at \[700, 33\], expected finite"):
            checkpoint.rows(spec, 690, 710)


def test_saved_rope_frequencies_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda t: t.update({name: np.zeros(32, np.float32)}))
    with open_checkpoint(folder) as checkpoint:
        assert name not in all_tensors(checkpoint)


@pytest.mark.parametrize("said", [True, None])
def test_a_tied_head_must_equal_the_embedding(folder: Path, said: bool | None) -> None:
    change_config(folder, tie_word_embeddings=said)
    change_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].copy()}))
    with open_checkpoint(folder) as checkpoint:
        assert HEAD not in all_tensors(checkpoint)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[HEAD][-1, -1] += 1e-3

    change_tensors(folder, change)
    with pytest.raises(InvalidCheckpoint, match=r"'lm_head.weight' differs .*tie_word_embeddings"):
        open_checkpoint(folder)


def test_a_tied_head_of_another_type_with_the_same_numbers(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].astype(np.float16)
        tensors[EMBEDDING] = tensors[HEAD].astype(np.float32)

    change_tensors(folder, change)
    with open_checkpoint(folder) as checkpoint:
        assert HEAD not in all_tensors(checkpoint)


def test_an_untied_head_is_a_tensor_of_the_model(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InvalidCheckpoint, match=r"'lm_head.weight' is missing"):
        open_checkpoint(folder)
    change_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING] * 2}))
    with open_checkpoint(folder) as checkpoint:
        tensors = all_tensors(checkpoint)
    assert np.array_equal(tensors[HEAD], tensors[EMBEDDING] * 2)


# --- files


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidCheckpoint, match=name):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors", "tokenizer_config.json"])
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(InvalidCheckpoint, match=rf"{name}: found a git-lfs pointer.*git lfs pull"):
        open_checkpoint(folder)


def test_a_pickle_is_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match=r"pytorch_model.bin, .*safetensors only.*executes code"):
        open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")


def test_a_tokenizer_of_another_size(folder: Path) -> None:
    shutil.copy(DEMO / "tokenizer.model", folder / "tokenizer.model")
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(InvalidCheckpoint, match="4096 pieces and the embedding 1024 rows"),
    ):
        checkpoint.vocabulary()


def test_a_file_cut_while_it_is_read(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1 << 20)
        with pytest.raises(InvalidCheckpoint, match="ends early"):
            all_tensors(checkpoint)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1]", "{", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InvalidCheckpoint, match=r"config.json: "):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "rename",
    [lambda name: name.removeprefix("model."), lambda name: f"base_model.model.{name}"],
    ids=["a model without its head", "what peft held"],
)
def test_names_under_other_prefixes(rename: Callable[[str], str], folder: Path, sound: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): array for name, array in tensors.items()}, folder / "model.safetensors")
    with open_checkpoint(folder) as found, open_checkpoint(sound) as expected:
        for name, array in all_tensors(expected).items():
            assert np.array_equal(all_tensors(found)[name], array)


def test_an_adapter_that_is_not_merged(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(folder, lambda t: t.update({name.replace(".weight", ".base_layer.weight"): t.pop(name)}))
    with pytest.raises(InvalidCheckpoint, match="an adapter that is not merged yet"):
        open_checkpoint(folder)


@pytest.mark.parametrize("listed", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_were_added_beside_a_tokenizer_model(listed: str, folder: Path) -> None:
    """As transformers' slow tokenizers save them; the embedding has rows for them, and is padded beyond."""
    with open_checkpoint(folder) as checkpoint:
        n, unused = len(checkpoint.vocabulary().pieces), checkpoint.vocabulary().pieces.find("<start_of_turn>")
    assert unused is not None
    change_tensors(folder, lambda t: t.update({EMBEDDING: np.concatenate([t[EMBEDDING], t[EMBEDDING][:64]])}))
    change_config(folder, vocab_size=n + 64)
    names = {"<tool>": n, "</tool>": n + 1, "<|im_start|>": unused, "<|im_end|>": unused + 1}
    if listed == "added_tokens.json":
        (folder / listed).write_text(json.dumps(names))
    else:
        file = folder / listed
        config = json.loads(file.read_text()) if file.exists() else {}
        config["added_tokens_decoder"] = {str(i): {"content": name, "special": True} for name, i in names.items()}
        file.write_text(json.dumps(config))
    with open_checkpoint(folder) as checkpoint:
        pieces = checkpoint.vocabulary().pieces
        assert checkpoint.config.vocab_size == len(pieces) == n + 2
        assert {name: pieces.find(name) for name in names} == names
        assert any("62 rows of the embedding are left out" in warning for warning in checkpoint.warnings)
        assert checkpoint.vocabulary().turn_ids() == (unused, unused + 1)
        tokenizer = Tokenizer(checkpoint.vocabulary(), "")
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (unused, unused + 1)
    assert {n, n + 1} <= tokenizer.special_ids
    if listed == "added_tokens.json":
        (folder / listed).write_text(json.dumps({"<far>": n + 9}))
        with pytest.raises(InvalidCheckpoint, match=rf"added token {n + 9} \('<far>'\) comes after"):
            open_checkpoint(folder)
        (folder / listed).write_text(json.dumps({"tale": 300}))
        with pytest.raises(InvalidCheckpoint, match=r"token 300 is .*an added token calls it 'tale'"):
            open_checkpoint(folder)


def test_an_adapter_is_told_from_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma-2-2b"}')
    with open_checkpoint(folder) as checkpoint:
        assert any("the adapter in" in warning for warning in checkpoint.warnings)
    (folder / "config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"an adapter of google/gemma-2-2b, not a model; merge it first"):
        open_checkpoint(folder)


@pytest.mark.parametrize("hub", [False, True])
def test_a_template_that_is_a_link(sound: Path, tmp_path: Path, hub: bool) -> None:
    """Its text goes into the exported model, which people publish."""
    folder = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(sound, folder)
    secret = tmp_path / ("models--a--b/blobs/template" if hub else "secret")
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("a text of the user's")
    (folder / "chat_template.jinja").symlink_to(secret)
    if hub:  # its files are all links to its own folder
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.chat_template == "a text of the user's"
    else:
        with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: is a link to .*secret"):
            open_checkpoint(folder)


def test_the_root_of_a_repository_in_the_hub_cache(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--google--gemma-2-2b-it"
    shutil.copytree(sound, root / "snapshots" / "0123abcd")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abcd")
    with open_checkpoint(root) as checkpoint:
        assert checkpoint.name == "gemma-2-2b-it"
    (root / "refs" / "main").unlink()
    with open_checkpoint(root) as checkpoint:  # its only version
        assert checkpoint.name == "gemma-2-2b-it"
    (root / "snapshots" / "4567abcd").mkdir()
    with pytest.raises(InvalidCheckpoint, match="has 2 versions in snapshots"):
        open_checkpoint(root)
    (root / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(InvalidCheckpoint, match="expected the name of a folder in snapshots"):
        open_checkpoint(root)


def test_the_name_in_the_hub_cache_is_the_repository(sound: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--gemma-2-2b-it" / "snapshots" / "0123abcd"
    shutil.copytree(sound, snapshot)
    # the cache keeps files elsewhere and links to them
    (snapshot / "model.safetensors").rename(tmp_path / "blob")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blob")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.name == "gemma-2-2b-it"


# --- the index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", "tiny-gemma-2", shards=2)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/tmp/x.safetensors", "a/../x.safetensors", "..\\x.safetensors", "x.bin", ""],
)
def test_an_index_that_leaves_the_folder(sharded: Path, shard: str) -> None:
    (sharded.parent / "x.safetensors").write_bytes(b"")
    change_index(sharded, lambda m: m.update({NORM: shard}))
    with pytest.raises(InvalidCheckpoint, match="expected the name of a file in the folder"):
        open_checkpoint(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"model-00002-of-00002.safetensors is missing"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("change", [lambda m: m.update({NORM: m[EMBEDDING]}), lambda m: m.pop(NORM)])
def test_an_index_that_does_not_say_where_a_tensor_is(
    sharded: Path, change: Callable[[dict[str, str]], object]
) -> None:
    with open_checkpoint(sharded) as checkpoint:
        expected = all_tensors(checkpoint)
    change_index(sharded, change)
    with open_checkpoint(sharded) as checkpoint:
        assert [warning for warning in checkpoint.warnings if "does not say where 1 tensors are" in warning]
        found = all_tensors(checkpoint)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_an_index_that_invents_a_tensor(sharded: Path) -> None:
    change_index(sharded, lambda m: m.update(ghost=m[NORM]))
    with pytest.raises(InvalidCheckpoint, match="tensor 'ghost' is missing"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, two = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(two)
    name, copied = next((name, x) for name, x in load_file(one).items() if x.ndim == 2)
    save_file({**tensors, name: copied.astype(np.float32)}, two)
    with open_checkpoint(sharded) as checkpoint:
        assert len(all_tensors(checkpoint)) == len(checkpoint.specs)
    copied[-1, -1] += 1
    save_file({**tensors, name: copied}, two)
    with pytest.raises(InvalidCheckpoint, match=rf"{two.name}: tensor '{name}' differs from that in {one.name}"):
        open_checkpoint(sharded)


# --- the safetensors header


def _entry(header: dict[str, Any], **values: Any) -> dict[str, Any]:
    return header | {NORM: header[NORM] | values}


BROKEN: dict[str, tuple[Callable[[dict[str, Any], bytes], tuple[Any, ...]], str]] = {
    "data cut short": (lambda h, d: (h, d[:-8]), "cut short"),
    "trailing data": (lambda h, d: (h, d + bytes(8)), "tensors end at byte"),
    "header longer than the file": (lambda h, d: (h, d, 1 << 62), "a header of"),
    "header over 100 MB": (lambda h, d: (h, d, 100_000_001), "a header of"),
    "header of the wrong length": (lambda h, d: (h, d, 40), "not valid JSON"),
    "not an object": (lambda _, d: ("[]", d), "expected an object"),
    "too deep": (lambda _, d: ("[" * 200_000, d), "not valid JSON"),
    "not UTF-8": (lambda _, d: (b'{"\xff": 1}', d), "not valid JSON"),
    "a tensor twice": (lambda h, d: (json.dumps(h)[:-1] + f', "{NORM}": {{}}}}', d), "appears twice"),
    "no entry": (lambda h, d: (h | {NORM: 3}, d), "expected exactly dtype, shape"),
    "an entry with more keys": (lambda h, d: (_entry(h, more=1), d), "expected exactly dtype, shape"),
    "dtype": (lambda h, d: (_entry(h, dtype="U8"), d), "dtype 'U8', expected one of F64"),
    "dtype of another type": (lambda h, d: (_entry(h, dtype=["F32"]), d), "expected one of F64"),
    "extent": (lambda h, d: (_entry(h, dtype="F16"), d), "expected 512 bytes"),
    "negative shape": (lambda h, d: (_entry(h, shape=[-256]), d), "expected a list of sizes"),
    "shape of reals": (lambda h, d: (_entry(h, shape=[256.0]), d), "expected a list of sizes"),
    "shape of truths": (lambda h, d: (_entry(h, shape=[True]), d), "expected a list of sizes"),
    "overflowing shape": (lambda h, d: (_entry(h, shape=[1 << 62, 4]), d), "expected 7378"),
    "offsets reversed": (
        lambda h, d: (_entry(h, data_offsets=h[NORM]["data_offsets"][::-1]), d),
        "expected .begin, end",
    ),
    "three offsets": (lambda h, d: (_entry(h, data_offsets=[0, 0, 0]), d), "expected .begin, end"),
    "overlap": (lambda h, d: (_entry(h, data_offsets=[0, 1024]), d), "overlaps"),
    "gap": (
        lambda h, d: (_entry(h, data_offsets=[n + 4 for n in h[NORM]["data_offsets"]]), d + bytes(4)),
        "leaves a gap",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_header_that_disagrees_with_the_file(folder: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    file = folder / "model.safetensors"
    write_raw(file, *change(*read_raw(file)))
    with pytest.raises(InvalidCheckpoint, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_a_stub_of_a_file(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InvalidCheckpoint, match=r"cut short|not valid JSON"):
        open_checkpoint(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_the_header_gives_more_than_an_error(folder: Path, data: st.DataObject) -> None:
    file = folder / "model.safetensors"
    pristine = file.read_bytes()
    (length,) = struct.unpack("<Q", pristine[:8])
    damaged = bytearray(pristine)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        with open_checkpoint(folder) as checkpoint:
            checkpoint.tensor(checkpoint.specs[-1])
    except BezelError:
        pass
    finally:
        file.write_bytes(pristine)


def test_a_model_that_bezel_does_not_run(folder: Path) -> None:
    change_config(folder, model_type="llama")
    with pytest.raises(InvalidConfig, match="model_type"):
        open_checkpoint(folder)


def test_the_tiny_shapes_are_those_of_the_families() -> None:
    shapes = {SHAPES[name]["model_type"] for name in SHAPES if name.startswith("tiny")}
    assert shapes == {family.hf_type for family in FAMILIES.values()}
