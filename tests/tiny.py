"""Tiny random Gemma checkpoints whose windows, soft-caps and heads all bite, from NumPy alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.formats import BF16
from bezel.runtime.model.families.hf import read_hf_config
from bezel.runtime.model.tensors import tensor_specs
from safetensors.numpy import save_file

DEMO = Path(__file__).parent.parent / "bench" / "data" / "fairy-gemma2"
TEXT = DEMO.parent / "fairy-heldout.txt"
GOLDEN = Path(__file__).parent / "golden"
# Every COLUMNS-th logit is kept in a golden file; positions are all kept.
COLUMNS = 32
# Float32 sums of some thousand terms in another order, against logits within ±30.
TOLERANCE = 2e-4

_COMMON = {
    "attention_bias": False,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 4096,
}
_GEMMA1 = _COMMON | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
_GEMMA2 = _COMMON | {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 8.0,
    "final_logit_softcapping": 12.0,
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
}
# Gemma 3 as the first configs spell it; its last layer is local.
_GEMMA3 = _COMMON | {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 20,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 8,
    "sliding_window_pattern": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2-gqa": _GEMMA2,
    "gemma2-mqa-wide-heads": _GEMMA2 | {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2-mha-odd-layers": _GEMMA2 | {"num_key_value_heads": 4, "num_hidden_layers": 3, "head_dim": 8},
    "gemma2-one-head-window-1": _GEMMA2
    | {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 5, "sliding_window": 1},
    "gemma3-gqa": _GEMMA3,
    "gemma3-mqa-no-factor": _GEMMA3
    | {"num_key_value_heads": 1, "head_dim": 24, "sliding_window_pattern": 6, "rope_scaling": None},
    "gemma1-mqa": _GEMMA1 | {"num_key_value_heads": 1},
    "gemma1-mha-odd-layers": _GEMMA1 | {"num_key_value_heads": 4, "num_hidden_layers": 3, "head_dim": 24},
}


def write_tiny(folder: Path, name: str) -> Path:
    """A checkpoint folder for CONFIGS[name], float32, with the demo's tokenizer; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(raw))
    for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, folder / file)
    random = np.random.default_rng(list(name.encode()))
    gain = {"token_embd": 0.4, "attn_q": 2.0, "attn_k": 2.0}
    arrays = {}
    for spec in tensor_specs(read_hf_config(raw)):
        x = random.standard_normal(spec.shape, dtype=np.float32)
        scale = 0.3 if spec.is_norm else gain.get(spec.role, 1.0) * (1 if spec.layer is None else spec.shape[1] ** -0.5)
        arrays[spec.hf] = x * np.float32(scale)
    save_file(arrays, folder / "model.safetensors")
    return folder


def checkpoint_folder(name: str, scratch: Path) -> Path:
    return DEMO if name == "demo" else write_tiny(scratch / name, name)


def export(checkpoint: Path, out: Path, preset: str = "f32", embedding: str | None = None) -> Path:
    with open_checkpoint(checkpoint) as source:
        export_gguf(source, out, preset, embedding)
    return out


def token_ids(name: str) -> list[int]:
    """<bos> and random ids over four windows and a little more."""
    window = 64 if name == "demo" else CONFIGS[name].get("sliding_window", 8)
    n = 4 * max(window, 8) + 3
    return [2, *np.random.default_rng(n).integers(6, 4096, n - 1).tolist()]


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    return BF16.dequantize(BF16.quantize(x.astype(np.float32).reshape(1, -1))).reshape(x.shape)
