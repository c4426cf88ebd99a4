"""llama.cpp's own quantizer: the oracle for the mixes that bear its names, and what bezel is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bezel.bench.llama_quantizer import TYPES, command, importance_of, llama_quantize
from bezel.bench.loss.subjects import FloatBackend
from bezel.bench.synthetic import SHAPES, write_checkpoint
from bezel.export.recipe import find_recipe
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.formats import FORMATS, Format
from bezel.runtime.errors import BezelError, InvalidRequest
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.model import ops
from click.testing import CliRunner
from tiny import DEMO, TEXT, checkpoint_folder, export


def formats_of(path: Path) -> dict[str, type[Format]]:
    with GGUFModel(path) as file:
        return {name: info.format for name, info in file.tensors.items() if len(info.shape) > 1}


@pytest.mark.parametrize(
    ("family", "n_layers", "hidden"), [("tiny-gemma-2", 4, 288), ("tiny-gemma-2", 26, 256), ("tiny-gemma-1", 18, 256)]
)
def test_the_mixes_of_the_same_name_are_the_same(family: str, n_layers: int, hidden: int, tmp_path: Path) -> None:
    """With rows of 288 weights, too, which are not whole blocks of the K formats."""
    pytest.importorskip("llama_cpp")
    shape = SHAPES[family] | {"num_hidden_layers": n_layers, "vocab_size": 640, "intermediate_size": 256}
    shape["hidden_size"] = hidden
    plain = export(write_checkpoint(tmp_path / "m", shape), tmp_path / "plain.gguf", "f16")
    with open_checkpoint(plain) as checkpoint:
        specs = [spec for spec in checkpoint.specs if spec.is_matrix]
        for name in ("q4_k_m", "q5_k_m", "q4_0", "q4_1", "q6_k", "q8_0", "q3_k_s"):
            llama_quantize(plain, tmp_path / "out.gguf", name, threads=1)
            recipe = find_recipe(name.removesuffix("_s"), checkpoint.config)
            ours = {spec.gguf: recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).format for spec in specs}
            assert formats_of(tmp_path / "out.gguf") == ours


def test_importance_counts_and_formats_can_be_asked_for(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    """A column that does not matter is sacrificed for the others."""
    pytest.importorskip("llama_cpp")
    plain, name = gguf_of("demo", "f32"), "blk.1.ffn_up.weight"
    importance = np.ones(256, np.float32)
    importance[::8] = 1e-6
    errors = []
    for weights in (None, {name: importance}):
        asked = {name: FORMATS["q4_0"], "token_embd.weight": FORMATS["q5_k"]}
        llama_quantize(plain, tmp_path / "out.gguf", "q8_0", weights, asked)
        found = formats_of(tmp_path / "out.gguf")
        assert {tensor: form for tensor, form in found.items() if form.name != "q8_0"} == asked
        with GGUFModel(tmp_path / "out.gguf") as file, GGUFModel(plain) as source:
            errors.append(np.square(file.dequantize(name) - source.dequantize(name)).mean(axis=0))
    unweighted, weighted = errors
    others = importance == 1
    assert weighted[others].mean() < 0.95 * unweighted[others].mean()
    assert weighted[~others].mean() > unweighted[~others].mean()


def test_importance_is_the_mean_square_of_inputs(tmp_path: Path) -> None:
    """By hand for the first layer, where it needs no more than a norm; and every matrix of a layer has its own."""
    folder, ids = checkpoint_folder("gemma2-gqa", tmp_path), [np.array([2, 40, 77, 900]), np.array([2, 13])]
    with open_checkpoint(folder) as checkpoint:
        found = importance_of(checkpoint, ids)
        backend, config = FloatBackend(checkpoint), checkpoint.config
        inputs = [ops.embed(backend.weights.shared["token_embd"], part, config.embedding_scale) for part in ids]
        h = ops.rms_norm(np.concatenate(inputs), backend.weights.layers[0]["attn_norm"], config.rms_eps)
        np.testing.assert_allclose(found["blk.0.attn_k.weight"], np.square(h).mean(axis=0), rtol=1e-5)
        in_layers = {spec.gguf: spec.shape[1] for spec in checkpoint.specs if spec.is_matrix and spec.layer is not None}
        assert {name: len(values) for name, values in found.items()} == in_layers
        for layer in range(config.n_layers):
            of = {role: found[f"blk.{layer}.{role}.weight"] for role in backend.weights.layers[0] if "norm" not in role}
            assert np.array_equal(of["attn_q"], of["attn_v"])
            assert np.array_equal(of["ffn_gate"], of["ffn_up"])
            assert not np.array_equal(of["attn_q"], of["ffn_up"])


def test_the_command(tmp_path: Path, gguf_of: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    ours, out = gguf_of("demo", "int4"), tmp_path / "theirs.gguf"
    arguments = [str(DEMO), str(out), "--type", "iq4_xs", "--imatrix-text", str(TEXT), "--chunks", "2"]
    result = CliRunner().invoke(command, [*arguments, "--formats-of", str(ours)])
    assert result.exit_code == 0, result.output
    assert formats_of(out) == formats_of(ours)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.gguf"]


def test_what_it_refuses(tmp_path: Path, gguf_of: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(InvalidRequest, match=f"found 'q9', expected one of {', '.join(TYPES)}"):
        llama_quantize(gguf_of("demo"), tmp_path / "out.gguf", "q9")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(BezelError, match=r"bad\.gguf: llama.cpp's quantizer failed with code"):
        llama_quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q4_0")
    assert not (tmp_path / "out.gguf").exists()
