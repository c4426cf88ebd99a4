"""Tiny random checkpoints that see pictures, Gemma 3's way and PaliGemma's, from NumPy alone; and what transformers
makes of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Model
from bezel.runtime.model.families.hf import read_hf_config
from bezel.runtime.model.families.sight import read_hf_vision
from bezel.runtime.model.tensors import tensor_specs
from bezel.runtime.model.vision import vision_specs
from bezel.runtime.vision.eye import Eye, Picture
from bezel.runtime.vision.image import Image, normalized
from safetensors.numpy import save_file
from tiny import DEMO

_EYE = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 88,  # which 32 does not divide, as SigLIP's 4304
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}
_TEXT = {
    "attention_bias": False,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 20,
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 4096 + 64,
}
# Windows smaller than a picture, as large, and larger; 9 rows and 36.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 9,
        "text_config": _TEXT
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "sliding_window": 6,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) + ["sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "vision_config": _EYE,
    },
    "paligemma": {
        "model_type": "paligemma",
        "projection_dim": 64,
        "text_config": _TEXT
        | {
            "model_type": "gemma2",
            "num_hidden_layers": 4,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "attn_logit_softcapping": 8.0,
            "final_logit_softcapping": 12.0,
        },
        "vision_config": _EYE | {"projection_dim": 64},
    },
}
SOFT_TOKEN = 4096  # of a picture's rows, in transformers


def write_seeing(folder: Path, name: str, **eye: Any) -> Path:
    """A checkpoint folder for CONFIGS[name], float32, with the demo's tokenizer; `eye` changes its vision_config."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = CONFIGS[name] | {"image_token_index": SOFT_TOKEN}
    raw["vision_config"] = raw["vision_config"] | eye
    (folder / "config.json").write_text(json.dumps(raw))
    for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, folder / file)
    random = np.random.default_rng(list(name.encode()))
    text = read_hf_config(raw)
    vision = read_hf_vision(raw, text.hidden_size, "", {})
    arrays = {}
    for spec in (*tensor_specs(text), *vision_specs(vision)):
        gain = {"token_embd": 0.4, "v_positions": 0.5}.get(spec.role, 1.0)
        fan_in = spec.shape[1] if spec.is_matrix and spec.layer is not None else 1
        if spec.role in ("attn_q", "attn_k", "v_attn_q", "v_attn_k"):
            gain = 2.0
        if len(spec.shape) == 1:
            gain = 0.3
        if spec.role == "v_patch":
            fan_in = vision.patch_inputs
        if spec.role == "v_projection":
            fan_in = vision.hidden_size
        x = random.standard_normal(spec.shape, dtype=np.float32) * np.float32(gain * fan_in**-0.5)
        if spec.role in ("v_norm1", "v_norm2", "v_post_norm"):
            x += 1
        hf = spec.hf if spec.role.startswith("v_") else spec.hf.replace("model.", "language_model.model.", 1)
        arrays[hf] = x
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drawn(seed: int, width: int = 60, height: int = 45) -> np.ndarray:
    """A picture, uint8 (height, width, 3), that is no noise: coloured waves."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * random.uniform(0.05, 0.4) + y * random.uniform(0.05, 0.4) + 6 * random.random()) for _ in "rgb"]
    return (127.5 * (1 + np.stack(waves, axis=2))).astype(np.uint8)


def eye_of(model: Model) -> Eye:
    assert model.eye is not None
    return model.eye


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([n, seed]).integers(6, 4096, n).tolist()


def sequences(name: str, end_of_line: int) -> dict[str, list[int]]:
    """Below 0: a picture, −1 the first. Pictures at the start, adjacent, across windows, again, at the end."""
    if name == "paligemma":
        return {
            "one": [-1, 2, *text(7), end_of_line, *text(60)],
            "two": [-1, -2, 2, *text(3), end_of_line, *text(8)],
            "only a prompt": [-3, 2, *text(12)],
            "the same twice": [-1, -1, 2, end_of_line, *text(4)],
        }
    return {
        "one": [2, *text(5), -1, *text(30)],
        "at the start": [-1, *text(9)],
        "adjacent": [2, -1, 4000, -2, *text(3), -3, *text(11)],
        "the same twice": [2, *text(4), -1, *text(2), -1, *text(3)],
        "at the end": [2, *text(20), -2],
    }


def in_ids(sequence: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
    return [i for token in sequence for i in ([token] if token >= 0 else pictures[-token - 1].ids)]


def theirs(folder: Path) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = transformers.PaliGemmaForConditionalGeneration if "paligemma" in folder.name else None
    model = (kind or transformers.Gemma3ForConditionalGeneration).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def pixels_of(images: Sequence[Image], eye: Eye) -> Any:
    torch = pytest.importorskip("torch")
    c = eye.config
    fitted = [normalized(image.fitted(c.image_size, c.resample), c.mean, c.std) for image in images]
    return torch.tensor(np.stack(fitted)).permute(0, 3, 1, 2)


def expected_logits(model: Any, sequence: Sequence[int], pixels: Any, n_rows: int, end_of_line: int | None) -> Any:
    torch = pytest.importorskip("torch")
    ids = [i for token in sequence for i in ([token] if token >= 0 else [SOFT_TOKEN] * n_rows)]
    if end_of_line is None:
        kinds = [int(i == SOFT_TOKEN) for i in ids]
    else:  # what is told: where the part ends that is seen whole
        whole = ids.index(end_of_line) + 1 if end_of_line in ids else len(ids)
        kinds = [int(i >= whole) for i in range(len(ids))]
    order = [-token - 1 for token in sequence if token < 0]
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([ids]), pixel_values=pixels[order], token_type_ids=torch.tensor([kinds])
        ).logits
    return found[0, :, :4096].numpy()


def whole_until(name: str, ids: list[int], end_of_line: int) -> int:
    """How many ids come before the first that may come by itself: what is seen whole comes whole."""
    if name == "paligemma":
        return ids.index(end_of_line) + 1 if end_of_line in ids else len(ids)
    return max(i for i, token in enumerate(ids) if token < 0) + 1
