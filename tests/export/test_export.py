"""Exported files, read back with the `gguf` package; and that a file is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES, write_checkpoint
from bezel.export.commands import export as cli
from bezel.export.gguf import writer as gguf_writer
from bezel.export.gguf.writer import ExportSummary, export_gguf
from bezel.export.onnx.source import OnnxSource
from bezel.export.onnx.writer import export_onnx
from bezel.export.recipe import find_recipe
from bezel.export.sources.opening import open_checkpoint
from bezel.export.verify import verify
from bezel.quant.formats import FORMATS
from bezel.quant.recipes import PRESETS
from bezel.runtime.commands.inspect import inspect
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidCheckpoint, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tiny import DEMO, bf16, write_tiny


def export(folder: Path, out: Path, preset: str = "q8_0", **options: Any) -> ExportSummary:
    with open_checkpoint(folder) as checkpoint:
        return export_gguf(checkpoint, out, preset, **options)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "tiny", "tiny-gemma-2")


@pytest.fixture(scope="session")
def demo_q4(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    out = tmp_path_factory.mktemp("export") / "demo.gguf"
    export(DEMO, out, "q4_0")
    return gguf.GGUFReader(out)


# --- content


@pytest.mark.parametrize("family", ["tiny-gemma-1", "tiny-gemma-2"])
@pytest.mark.parametrize("preset", PRESETS)
def test_gguf_reads_the_tensors_of_the_checkpoint(tmp_path: Path, preset: str, family: str) -> None:
    folder = write_checkpoint(tmp_path / "folder", family, dtype="f32")
    source = load_file(folder / "model.safetensors")
    summary = export(folder, tmp_path / "out.gguf", preset)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    with open_checkpoint(folder) as checkpoint:
        specs = {spec.gguf: spec for spec in checkpoint.specs}
        recipe = find_recipe(preset, checkpoint.config)
    assert [tensor.name for tensor in reader.tensors] == list(specs)
    counted: dict[str, int] = {}
    for tensor in reader.tensors:
        spec, kind = specs[tensor.name], tensor.tensor_type.name.lower()
        expected = source[spec.hf]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        assert tensor.data_offset % 32 == 0
        counted[kind] = counted.get(kind, 0) + 1
        if spec.is_norm:
            assert kind == "f32"
            assert np.array_equal(found, expected + np.float32(1))
            continue
        assert kind == recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).wanted.name
        error = np.linalg.norm(found.reshape(spec.shape) - expected) / np.linalg.norm(expected)
        assert error <= FORMATS[kind].tolerance
    assert summary.formats == counted
    assert summary.file_bytes == (tmp_path / "out.gguf").stat().st_size
    assert summary.fallbacks == summary.warnings == []


def test_the_metadata_that_loaders_of_gemma2_read(demo_q4: gguf.GGUFReader) -> None:
    # Keys that llama.cpp's loader requires, or reads if they are there, with the types that it insists on.
    kinds = {"UINT32": int, "FLOAT32": float, "BOOL": bool, "STRING": str}
    expected: dict[str, tuple[str, Any]] = {
        "general.architecture": ("STRING", "gemma2"),
        "general.name": ("STRING", "fairy-gemma2"),
        "general.file_type": ("UINT32", 2),
        "general.quantization_version": ("UINT32", 2),
        "gemma2.context_length": ("UINT32", 2048),
        "gemma2.embedding_length": ("UINT32", 256),
        "gemma2.block_count": ("UINT32", 4),
        "gemma2.feed_forward_length": ("UINT32", 768),
        "gemma2.attention.head_count": ("UINT32", 4),
        "gemma2.attention.head_count_kv": ("UINT32", 2),
        "gemma2.attention.key_length": ("UINT32", 64),
        "gemma2.attention.value_length": ("UINT32", 64),
        "gemma2.attention.layer_norm_rms_epsilon": ("FLOAT32", float(np.float32(1e-6))),
        "gemma2.attention.sliding_window": ("UINT32", 64),
        "gemma2.attn_logit_softcapping": ("FLOAT32", 50.0),
        "gemma2.final_logit_softcapping": ("FLOAT32", 30.0),
        "tokenizer.ggml.model": ("STRING", "llama"),
        "tokenizer.ggml.bos_token_id": ("UINT32", 2),
        "tokenizer.ggml.eos_token_id": ("UINT32", 1),
        "tokenizer.ggml.unknown_token_id": ("UINT32", 3),
        "tokenizer.ggml.padding_token_id": ("UINT32", 0),
        "tokenizer.ggml.eot_token_id": ("UINT32", 5),
        "tokenizer.ggml.add_bos_token": ("BOOL", True),
        "tokenizer.ggml.add_eos_token": ("BOOL", False),
        "tokenizer.ggml.add_space_prefix": ("BOOL", False),
        "bezel.provenance.recipe": ("STRING", "q4_0"),
        "bezel.provenance.embedding_format": ("STRING", "q6_k"),
    }
    for key, (kind, value) in expected.items():
        field = demo_q4.fields[key]
        assert [t.name for t in field.types] == [kind], key
        assert kinds[kind](field.contents()) == value, key
    arrays = {
        "bezel.generation.stop_token_ids": ("UINT32", [1, 5]),
    }
    for key, (kind, values) in arrays.items():
        assert [t.name for t in demo_q4.fields[key].types] == ["ARRAY", kind]
        assert demo_q4.fields[key].contents() == values
    assert not any(key.startswith("bezel.attention.") for key in demo_q4.fields)  # all as Gemma 2 has it
    template = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]
    assert demo_q4.fields["tokenizer.chat_template"].contents() == template


def test_the_tokens_are_those_of_the_tokenizer(demo_q4: gguf.GGUFReader) -> None:
    tokenizer = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    tokens = demo_q4.fields["tokenizer.ggml.tokens"].contents()
    scores = demo_q4.fields["tokenizer.ggml.scores"]
    types = demo_q4.fields["tokenizer.ggml.token_type"]
    assert [t.name for t in scores.types] == ["ARRAY", "FLOAT32"]
    assert [t.name for t in types.types] == ["ARRAY", "INT32"]
    plain = [i for i, kind in enumerate(types.contents()) if kind == gguf.TokenType.NORMAL]
    assert len(tokens) == 4096
    assert len(plain) > 3000
    for i in plain:
        assert tokens[i] == tokenizer.id_to_piece(i)
        assert scores.contents(i) == tokenizer.get_score(i)
    assert [i for i, kind in enumerate(types.contents()) if kind == gguf.TokenType.BYTE] == [
        i for i in range(4096) if tokenizer.is_byte(i)
    ]


def test_our_reader_takes_the_file(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out.gguf")
    with open_checkpoint(tiny) as checkpoint, GGUFModel(tmp_path / "out.gguf") as file:
        assert file.config() == checkpoint.config
        file.check_tensors(checkpoint.config)


def test_provenance_names_and_hashes_every_source_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", "tiny-gemma-2", shards=2)
    export(folder, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    names = reader.fields["bezel.provenance.source_files"].contents()
    hashes = reader.fields["bezel.provenance.source_sha256"].contents()
    assert sorted(names) == sorted(file.name for file in folder.iterdir())
    assert hashes == [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def test_the_bytes_depend_on_neither_cores_nor_chunks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tiny, tmp_path / "one.gguf", "q4_0")
    monkeypatch.setattr(gguf_writer, "CHUNK_WEIGHTS", 1000)
    for cores in (1, 7):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        export(tiny, tmp_path / "two.gguf", "q4_0", force=True)
        assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_an_embedding_format_of_its_own(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out.gguf", "q4_0", embedding="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"


def test_rows_that_do_not_fit_fall_back_and_say_so(tmp_path: Path) -> None:
    shape = SHAPES["tiny-gemma-2"] | {"hidden_size": 288, "num_hidden_layers": 2}
    summary = export(write_checkpoint(tmp_path / "folder", shape), tmp_path / "out.gguf", "q4_k")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.1.attn_q.weight"] == "Q5_0"  # 288 inputs
    assert kinds["blk.1.ffn_down.weight"] == "Q4_K"  # 512 inputs
    because = "because rows of 288 are not a multiple of 256"
    assert summary.fallbacks == [
        f"token_embd: q8_0 instead of q6_k, {because}",
        f"attn_q, attn_k, attn_v, ffn_gate, ffn_up: q5_0 instead of q4_k, {because}",
    ]


def test_tensors_of_odd_sizes_stay_aligned(tmp_path: Path) -> None:
    shape = SHAPES["tiny-gemma-2"] | {"hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2}
    folder = write_checkpoint(tmp_path / "folder", shape, dtype="f16")
    export(folder, tmp_path / "out.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert any(tensor.n_bytes % 32 for tensor in reader.tensors)
    source = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        names = {spec.gguf: spec.hf for spec in checkpoint.specs if spec.is_matrix}
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        if tensor.name in names:
            assert np.array_equal(tensor.data, source[names[tensor.name]])


def test_what_llama_cpp_would_read_differently_is_said(tmp_path: Path) -> None:
    base = SHAPES["tiny-gemma-2"]
    local = ["full_attention", "sliding_attention"] * 2
    for i, (change, word) in enumerate(
        (
            ({"layer_types": local}, "pattern of layer windows"),
            ({"query_pre_attn_scalar": 60}, "query scale"),
            ({"tie_word_embeddings": False}, "output.weight"),
            ({"layer_types": local[::-1]}, None),
        )
    ):
        folder = write_checkpoint(tmp_path / f"folder{i}", base | change)
        warnings = export(folder, tmp_path / f"{i}.gguf").warnings
        assert [word in warning for warning in warnings] == ([True] if word else []), (change, warnings)
    patterned, scaled = (gguf.GGUFReader(tmp_path / f"{i}.gguf").fields for i in (0, 1))
    assert patterned["bezel.attention.layer_windows"].types[1].name == "UINT32"
    assert patterned["bezel.attention.layer_windows"].contents() == [0, 8, 0, 8]
    assert scaled["bezel.attention.query_pre_attn_scalar"].contents() == 60.0


def test_sampling_defaults_and_stop_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", "tiny-gemma-2")

    def fields(**generation: Any) -> dict[str, Any]:
        (folder / "generation_config.json").write_text(json.dumps(generation))
        export(folder, tmp_path / "out.gguf", force=True)
        reader = gguf.GGUFReader(tmp_path / "out.gguf")
        return {k: f.contents() for k, f in reader.fields.items() if "sampling" in k or "generation" in k}

    assert fields(temperature=0.5, top_k=64, top_p=0.25, eos_token_id=107) == {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 64,
        "general.sampling.top_p": 0.25,
        "bezel.generation.stop_token_ids": [107],
    }
    assert fields() == {"bezel.generation.stop_token_ids": [1]}  # as config.json says
    assert fields(min_p=0.25, repetition_penalty=1.5, do_sample=False) == {
        "general.sampling.temp": 0.0,
        "general.sampling.min_p": 0.25,
        "general.sampling.penalty_repeat": 1.5,
        "bezel.generation.stop_token_ids": [1],
    }
    for bad in ({"temperature": "hot"}, {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0}, {"min_p": True}):
        with pytest.raises(InvalidCheckpoint, match=f"generation config: {next(iter(bad))}: found"):
            fields(**bad)
    for bad in ({"eos_token_id": [1, 1024]}, {"eos_token_id": "x"}):
        with pytest.raises(InvalidCheckpoint, match="key 'eos_token_id'"):
            fields(**bad)


def test_llama_cpp_is_said_to_ignore_a_head_where_it_does(tmp_path: Path) -> None:
    for shape, ignored in (("tiny-gemma-2", True), ("tiny-gemma-3", False)):
        folder = write_checkpoint(tmp_path / shape, SHAPES[shape] | {"tie_word_embeddings": False})
        summary = export(folder, tmp_path / f"{shape}.gguf")
        assert any("the embedding as the head" in warning for warning in summary.warnings) == ignored


def test_heads_that_the_native_engine_cannot_run_are_told_of(tmp_path: Path) -> None:
    shape = SHAPES["tiny-gemma-2"] | {"head_dim": 514, "query_pre_attn_scalar": 514}
    folder = write_checkpoint(tmp_path / "wide", shape)
    summary = export(folder, tmp_path / "wide.gguf")
    assert any("heads of 514 numbers are too wide for the native engine" in warning for warning in summary.warnings)


@pytest.mark.parametrize("preset", ["q4_0", "q4_k", "q6_k", "f16", "bf16"])
def test_weights_too_small_for_a_format(tmp_path: Path, preset: str) -> None:
    folder = write_checkpoint(tmp_path / "folder", "tiny-gemma-2", dtype="f32")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] *= np.float32(1e-9) / np.abs(weights[name]).max()
    save_file(weights, folder / "model.safetensors")
    exported = export(folder, tmp_path / "out.gguf", preset).warnings
    expected = f"weights too small for their format became zeros: {weights[name].size} of blk.1.ffn_down.weight"
    assert [warning.startswith(expected) for warning in exported] == ([] if preset == "bf16" else [True])
    if preset == "q4_0":
        with open_checkpoint(folder) as checkpoint:
            (warning,) = export_onnx(OnnxSource(checkpoint, "int4"), tmp_path / "onnx").warnings
        assert warning.startswith(expected)


# --- failing


def test_a_weight_too_large_for_the_format_names_its_tensor(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", "tiny-gemma-2", dtype="f32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"'model.layers.1.mlp.up_proj.weight': f16: .*100000"):
        export(folder, tmp_path / "out.gguf", "f16")
    assert left(tmp_path) == ["folder"]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_an_export_that_fails_leaves_nothing(tiny: Path, tmp_path: Path, error: type[BaseException], at: float) -> None:
    def progress(done: int, total: int) -> None:
        assert left(tmp_path)  # it is being written
        if done >= at * total:
            raise error

    with pytest.raises(error):
        export(tiny, tmp_path / "out.gguf", progress=progress)
    assert left(tmp_path) == []


def test_an_existing_file_survives_unless_replacing_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:  # noqa: ARG001
        raise RuntimeError

    out = tmp_path / "out.gguf"
    out.write_bytes(b"GGUF, precious")
    with pytest.raises(InvalidRequest, match=r"exists already.*--force"):
        export(tiny, out)
    with pytest.raises(RuntimeError):
        export(tiny, out, force=True, progress=fail)
    assert out.read_bytes() == b"GGUF, precious"
    export(tiny, out, force=True)
    assert out.read_bytes()[4:8] == (3).to_bytes(4, "little")
    assert left(tmp_path) == ["out.gguf"]
    out.write_bytes(b"my thesis")
    with pytest.raises(InvalidRequest, match="is no GGUF file, which alone --force replaces"):
        export(tiny, out, force=True)
    assert out.read_bytes() == b"my thesis"


def test_a_source_that_changes_while_it_is_read(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "folder"))

    def change(done: int, total: int) -> None:  # noqa: ARG001
        os.utime(folder / "model.safetensors", ns=(1, 1))

    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: has changed while it was read"):
        export(folder, tmp_path / "out.gguf", progress=change)
    assert left(tmp_path) == ["folder"]


def test_a_source_is_never_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "full.gguf"
    export(tiny, out, "bf16")
    with pytest.raises(InvalidRequest, match="part of the checkpoint"):
        export(out, out, force=True)


def test_a_full_disk_is_noticed_before_writing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(InvalidRequest, match=r"1 MB free, expected 3 MB for out.gguf"):
        export(tiny, tmp_path / "out.gguf")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("absent/out.gguf", {}, "no such folder"),
        (".", {}, "is a folder"),
        ("out.gguf", {"preset": "iq2_xs"}, "unknown preset 'iq2_xs'"),
        ("out.gguf", {"embedding": "iq2_xs"}, "unknown format 'iq2_xs'"),
    ],
)
def test_requests_that_make_no_sense(
    tiny: Path, tmp_path: Path, out: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        export(tiny, tmp_path / out, **options)
    assert left(tmp_path) == []


def test_a_tokenizer_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "folder"))
    shutil.copy(DEMO / "tokenizer.model", folder)
    with pytest.raises(InvalidCheckpoint, match="4096 pieces and the embedding 1024 rows"):
        export(folder, tmp_path / "out.gguf")
    assert left(tmp_path) == ["folder"]


def test_progress_counts_every_weight(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = export(tiny, tmp_path / "out.gguf", progress=lambda *counts: seen.append(counts))
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (summary.weights, summary.weights)


# --- the commands


@pytest.fixture
def run() -> Callable[..., Any]:
    def invoke(command: Any, *arguments: object) -> Any:
        return CliRunner().invoke(command, [str(a) for a in arguments])

    return invoke


def test_the_commands(tiny: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    result = run(cli.export, tiny, tmp_path, "--quant", "q4_0")
    assert result.exit_code == 0, result.output
    assert left(tmp_path) == ["tiny-q4_0.gguf"]  # named after the checkpoint
    assert "28 × q4_0" in result.output
    result = run(main, "verify", tmp_path / "tiny-q4_0.gguf", "--source", tiny)
    assert result.exit_code == 0, result.output
    assert "46 tensors, all as expected; " in result.output


def test_the_commands_in_json(tiny: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    summary = json.loads(run(cli.export, tiny, tmp_path / "out.gguf", "--json").stdout)
    assert summary["path"] == str(tmp_path / "out.gguf")
    assert summary["formats"] == {"q8_0": 29, "f32": 17}  # the default is q8_0
    found = json.loads(run(main, "verify", tmp_path / "out.gguf", "--source", tiny, "--json").stdout)
    reports = found["tensors"]
    assert len(reports) == 46
    sizes = {tensor.name: tensor.n_elements for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    equal = sum(report["equal"] * sizes[report["name"]] for report in reports)
    assert found["equal"] == pytest.approx(equal / summary["weights"])
    assert all(report["ok"] for report in reports)
    assert {r["sqnr_db"] is None for r in reports if r["format"] == "f32"} == {True}  # infinite


def test_verify_exits_with_one_if_a_tensor_is_off(tiny: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    other = write_checkpoint(tmp_path / "other", "tiny-gemma-2", seed=1)
    export(other, tmp_path / "other.gguf")
    result = run(main, "verify", tmp_path / "other.gguf", "--source", tiny)
    assert result.exit_code == 1
    assert "46 tensors, 46 off" in result.output


def test_ctrl_c_is_not_an_error_trace(
    tiny: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_writer, "_quantized", quantize)
    result = run(cli.export, tiny, tmp_path)
    assert result.exit_code == 130
    assert "cancelled" in result.stderr
    assert left(tmp_path) == []


def test_a_name_from_a_file_cannot_leave_the_folder(
    tiny: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bezel.export.sources.folder._folder_name", lambda _: "../../etc/x")
    result = run(cli.export, tiny, tmp_path)
    assert result.exit_code == 0, result.output
    assert left(tmp_path) == ["etc-x-q8_0.gguf"]


# --- recipes


def test_a_recipe_file_is_followed_and_told(tiny: Path, tmp_path: Path) -> None:
    recipe = {"bezel_recipe": 1, "default": "iq4_xs", "rules": [{"role": "attn_v", "layers": "1-2", "format": "q5_k"}]}
    (tmp_path / "odd.json").write_text(json.dumps(recipe))
    runner, out = CliRunner(), tmp_path / "out.gguf"
    result = runner.invoke(cli.export, [str(tiny), str(out), "--quant", str(tmp_path / "odd.json")])
    assert result.exit_code == 0, result.output
    with GGUFModel(out) as file:
        formats = {name: info.format.name for name, info in file.tensors.items() if len(info.shape) > 1}
        assert {name for name, form in formats.items() if form == "q5_k"} == {
            "blk.1.attn_v.weight",
            "blk.2.attn_v.weight",
        }
        assert set(formats.values()) == {"iq4_xs", "q5_k"}
        assert file.metadata["general.file_type"] == 30
        assert file.metadata["bezel.provenance.recipe"] == "odd"
        rules = json.loads(file.metadata["bezel.provenance.recipe_rules"])
        assert rules == recipe | {"name": "odd", "rules": [recipe["rules"][0] | {"role": ["attn_v"]}]}  # type: ignore[index]
    assert "recipe_rules" in runner.invoke(inspect, [str(out)]).output


def test_requantizing(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    export(tiny, source, "q8_0")

    def run(*options: str) -> Any:
        return CliRunner().invoke(main, ["export", str(source), str(tmp_path / "out.gguf"), "--force", *options])

    refused = run("--quant", "q4_0")
    assert refused.exit_code == 1
    assert "quantized already" in refused.output
    assert "`bezel export --requantize`" in refused.output
    assert not (tmp_path / "out.gguf").exists()
    twice = run("--quant", "q4_0", "--requantize")
    assert twice.exit_code == 0, twice.output
    assert "q8_0 weights are rounded again: what was lost before and what is lost now add up" in twice.output
    with open_checkpoint(source, quantized=True) as eight:
        assert all(report.ok for report in verify(tmp_path / "out.gguf", eight))
    for quant in ("q8_0", "f32"):  # blocks that stay, and their very numbers
        kept = run("--quant", quant, "--requantize")
        assert "rounded again" not in kept.output
        with GGUFModel(source) as want, GGUFModel(tmp_path / "out.gguf") as found:
            assert all(np.array_equal(want.dequantize(name), found.dequantize(name)) for name in want.tensors)


@pytest.fixture
def sensitivities(tiny: Path, tmp_path: Path) -> Path:
    with open_checkpoint(tiny) as checkpoint:
        entries = [
            {"tensors": [spec.gguf], "format": name, "kld": 1 / FORMATS[name].block_bytes}
            for spec in checkpoint.specs
            if spec.is_matrix
            for name in ("q4_k", "q5_k", "q6_k")
        ]
    (tmp_path / "s.json").write_text(json.dumps({"bezel_sensitivity": 1, "entries": entries}))
    return tmp_path / "s.json"


def test_targets_are_kept(tiny: Path, tmp_path: Path, sensitivities: Path) -> None:
    def run(*options: str) -> dict[str, Any]:
        arguments = [str(tiny), str(tmp_path / "out.gguf"), "--sensitivity", str(sensitivities), "--json", "--force"]
        result = CliRunner().invoke(cli.export, [*arguments, *options])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    by_bits = run("--size", "5.2bpw")
    assert 5.1 < by_bits["bits_per_weight"] <= 5.2
    assert len(by_bits["formats"]) > 2
    size = int(by_bits["file_bytes"]) + 100
    for given in (f"{size}B", f"{size / 1e6:.6f}MB", f"{size / 1024:.4f} KiB"):
        assert size - 20_000 < run("--size", given)["file_bytes"] <= size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "5bpw"], "needs --sensitivity; the file is written by `bezel sensitivity "),
        (["--sensitivity", "s.json"], "--sensitivity needs --size"),
        (["--size", "5bpw", "--sensitivity", "s.json", "--quant", "q8_0"], "leave --quant and --embedding out"),
        (["--size", "5bpw", "--sensitivity", "s.json", "--embedding", "q8_0"], "leave --quant and --embedding out"),
        (["--size", "5 bits", "--sensitivity", "s.json"], "found '5 bits', expected bits a weight such as 4.55bpw"),
        (["--size", "5", "--sensitivity", "s.json"], "found '5', expected bits a weight such as 4.55bpw, or a size"),
        (["--size", "33bpw", "--sensitivity", "s.json"], "found 33 bits a weight, expected 1 to 32"),
        (["--size", "1KB", "--sensitivity", "s.json"], "the smallest mix has"),
        (["--size", "5bpw", "--sensitivity", "s.json", "--format", "onnx"], "goes with --format gguf"),
        (["--calibration-tokens", "512"], "--calibration-tokens goes with --calibration"),
        (
            ["--format", "onnx", "--kv", "int8", "--calibration", "s.json", "--calibration-tokens", "5"],
            "and --format gg",
        ),
        (["--format", "onnx", "--kv", "int8"], "--kv int8 needs --calibration TEXT"),
        (["--format", "onnx", "--calibration", "s.json", "--kv", "f32"], "--calibration is for --kv int8"),
        (["--target", "web", "--calibration", "s.json"], "--calibration is for --kv int8 and --target onnxruntime"),
        (["--target", "portable", "--kv", "f16"], "--kv f16 goes with --target onnxruntime"),
        (["--kv", "f32"], "--target and --kv go with --format onnx"),
        (["--format", "gguf", "--target", "portable"], "--target and --kv go with --format onnx"),
        (["--embedding", "int4"], "go with --format onnx"),
        (["--quant", "int8"], "go with --format onnx"),
        (["--quant", "q3"], "unknown preset 'q3': expected one of f32, "),
    ],
)
def test_options_that_make_no_sense(
    tiny: Path, tmp_path: Path, sensitivities: Path, options: list[str], message: str
) -> None:
    options = [str(sensitivities) if option == "s.json" else option for option in options]
    result = CliRunner().invoke(main, ["export", str(tiny), str(tmp_path / "out.gguf"), *options])
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out.gguf").exists()


def trained_for_q4_0(folder: Path, rounded: Callable[[np.ndarray], np.ndarray] = bf16) -> dict[str, np.ndarray]:
    """A checkpoint's weights, whose every block of 32 is on a lattice, rounded to what they are stored in."""
    write_tiny(folder, "gemma3-gqa")
    weights = load_file(folder / "model.safetensors")
    for name, x in weights.items():
        if x.ndim == 2:
            blocks = x.reshape(-1, 32)
            step = bf16(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7.5))
            weights[name] = rounded(np.clip(np.rint(blocks / step), -8, 7) * step).reshape(x.shape)
    save_file(weights, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("stored", [bf16, np.float16, np.float32])
def test_a_checkpoint_trained_for_q4_0_is_kept_exactly(
    stored: Callable[[np.ndarray], np.ndarray], tmp_path: Path, run: Callable[..., Any]
) -> None:
    """Plain or calibrated; what can be seen in the summary and by `verify`, and the bytes that gguf reads."""
    folder = tmp_path / "trained"
    weights = trained_for_q4_0(folder, stored)
    (tmp_path / "text.txt").write_text(
        "Once upon a time there was a king who had three sons and 12 golden apples. " * 50
    )
    for name, options in (("plain", ()), ("calibrated", ("--calibration", tmp_path / "text.txt"))):
        out = tmp_path / f"{name}.gguf"
        result = run(cli.export, folder, out, "--quant", "q4_0", "--embedding", "q4_0", *options)
        assert "100.00% of the weights in q4_0 are exactly the source's" in result.output, result.output
        found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(out).tensors}
        with open_checkpoint(folder) as source:
            for spec in source.specs:
                if spec.is_matrix:
                    np.testing.assert_array_equal(stored(found[spec.gguf]), weights[spec.hf])
            assert {report.equal for report in verify(out, source) if not report.name.endswith("norm.weight")} == {1.0}
        assert "100.00%" in run(main, "verify", out, "--source", folder).output
        assert "lattices of 16 values, as training" not in result.output
    plain = run(cli.export, DEMO, tmp_path / "other.gguf", "--quant", "q4_0", "--json")
    assert not json.loads(plain.stdout)["warnings"]
    assert json.loads(plain.stdout)["kept_exactly"] < 0.01


@pytest.mark.parametrize(("quant", "left"), [("q4_0", "token_embd: lies on lattices of 16 values"), ("f16", "")])
def test_what_q4_0_would_keep_is_said(quant: str, left: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    trained_for_q4_0(tmp_path / "trained")
    found = run(cli.export, tmp_path / "trained", tmp_path / "out.gguf", "--quant", quant)
    assert ("lies on lattices" in found.output) == bool(left)
    assert left in found.output
