"""Checkpoints of random weights in the real shapes, to measure speed and memory without the real weights.

Everything but the numbers is as published: tensor names, dtypes, shards, configs, and a vocabulary with as many pieces
and with Gemma's special ids that sentencepiece loads.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.gguf.header import TensorRecord, aligned, encode_header
from ..export.gguf.writer import PlannedTensor, plan_tensors
from ..export.recipe import find_recipe
from ..quant import recipes
from ..quant.formats import Format
from ..runtime.errors import InvalidRequest
from ..runtime.files import safetensors
from ..runtime.files.atomic import atomic
from ..runtime.files.strings import Strings
from ..runtime.model.config import ModelConfig
from ..runtime.model.families.gguf import write_gguf_config
from ..runtime.model.families.hf import read_hf_config
from ..runtime.model.families.sight import write_gguf_vision
from ..runtime.model.tensors import TensorSpec, tensor_specs
from ..runtime.model.vision import VisionConfig, vision_specs
from ..runtime.text.sentencepiece_model import model_proto
from ..runtime.text.vocabulary import BYTE, CONTROL, END_OF_TURN, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from . import DEMO

_GEMMA_1 = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
_GEMMA_2 = _GEMMA_1 | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_3 = _GEMMA_1 | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# As text alone; 64 rows of its embedding are for pictures and belong to no piece.
_GEMMA_3_4B = _GEMMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "vocab_size": 262208,
}
# Small enough for tests, with a window that bites and rows of whole 256-blocks.
_TINY = {
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2-2b": _GEMMA_2 | _sizes(2304, 26, 8, 4, 9216),
    "gemma-2-9b": _GEMMA_2 | _sizes(3584, 42, 16, 8, 14336),
    "gemma-3-270m": _GEMMA_3 | _sizes(640, 18, 4, 1, 2048),
    "gemma-3-1b": _GEMMA_3 | _sizes(1152, 26, 4, 1, 6912),
    "gemma-3-4b": _GEMMA_3_4B | _sizes(2560, 34, 8, 4, 10240),
    "gemma-2b": _GEMMA_1 | _sizes(2048, 18, 8, 1, 16384),
    "tiny-gemma-2": _GEMMA_2 | _TINY | {"num_key_value_heads": 2, "query_pre_attn_scalar": 64, "sliding_window": 8},
    "tiny-gemma-3": _GEMMA_3
    | _TINY
    | {"num_hidden_layers": 7, "num_key_value_heads": 1, "query_pre_attn_scalar": 64, "sliding_window": 8},
    "tiny-gemma-1": _GEMMA_1 | _TINY | {"num_key_value_heads": 1},
}

# Deviations of the weights. With a residual stream of order 1 they keep every layer's activations of order 1.
_LINEAR, _NORM = 0.02, 0.05
_CHUNK = 1 << 20  # weights generated at a time


def _chat_template() -> str:
    """Gemma 2's, as the bundled model has it."""
    text = (DEMO / "tokenizer_config.json").read_text(encoding="utf-8")
    template: str = json.loads(text)["chat_template"]
    return template


def write_checkpoint(
    path: str | Path, shape: str | Mapping[str, Any], seed: int = 0, shards: int = 1, dtype: str = "bf16"
) -> Path:
    """Write a Hugging Face folder of random weights and return its path.

    `shape` is a key of SHAPES or the content of a config.json, `dtype` "bf16", "f16" or "f32". The same
    arguments give the same bytes. Raises InvalidRequest, and InvalidConfig for a config that is none.
    """
    if dtype not in _DTYPES:
        raise InvalidRequest(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    raw = _raw_config(shape)
    config = read_hf_config(raw)
    vocab = vocabulary(config)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)

    stop_ids = [vocab.eos_id, vocab.pieces.index(END_OF_TURN)]
    generation = {"bos_token_id": 2, "eos_token_id": stop_ids, "pad_token_id": 0}
    tokenizer = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        "chat_template": _chat_template(),
    }
    for name, content in (
        ("config.json", raw),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
    ):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(model_proto(vocab))
    _write_weights(folder, config, seed, shards, dtype)
    return folder


def write_gguf(
    path: str | Path, shape: str | Mapping[str, Any], preset: str, embedding: str | None = None, seed: int = 0
) -> Path:
    """Write a GGUF file of random weights, in the formats that `bezel export` chooses, and return its path.

    As fast as the disk: each format quantizes 4 million weights once, and every tensor is cut from those. The file is
    whole or absent. Raises InvalidRequest and InvalidConfig.
    """
    config = read_hf_config(_raw_config(shape))
    vocab = vocabulary(config)
    config = replace(config, vocab_size=len(vocab.pieces))
    plan = plan_tensors(tensor_specs(config), find_recipe(preset, config, embedding))
    metadata = {
        "general.architecture": config.family,
        "general.name": f"random {shape if isinstance(shape, str) else config.family} {preset}",
        "general.quantization_version": 2,
        **write_gguf_config(config),
        **vocab.to_gguf(),
        "tokenizer.ggml.eot_token_id": vocab.pieces.index(END_OF_TURN),
        "tokenizer.chat_template": _chat_template(),
    }
    return _write(Path(path), plan, metadata, seed)


def write_eye(path: str | Path, config: VisionConfig, preset: str, seed: int = 0) -> Path:
    """Write the file of an eye of random weights, as `write_gguf` does a model's."""
    plan = plan_tensors(vision_specs(config), recipes.preset(preset, config.n_layers))
    return _write(Path(path), plan, write_gguf_vision(config) | {"general.name": f"random eye {preset}"}, seed)


def _write(out: Path, plan: Sequence[PlannedTensor], metadata: dict[str, Any], seed: int) -> Path:
    records = [TensorRecord(p.spec.gguf, p.spec.shape, p.format.gguf_type, p.offset) for p in plan]
    rng = np.random.Generator(np.random.SFC64(seed))
    pools: dict[type[Format], NDArray[np.uint8]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as file:
        file.write(encode_header(metadata, records))
        for planned in plan:
            size = planned.n_rows * planned.row_bytes
            if planned.spec.is_norm:
                norm = 1 + rng.standard_normal(planned.spec.shape, dtype=np.float32) * np.float32(_NORM)
                file.write(planned.format.quantize(norm).data)
            else:
                if planned.format not in pools:
                    weights = rng.standard_normal((_POOL // 256, 256), dtype=np.float32) * np.float32(_LINEAR)
                    pools[planned.format] = planned.format.quantize(weights)
                for block in _cuts(pools[planned.format], size, planned.format.block_bytes, rng):
                    file.write(block.data)
            file.write(bytes(aligned(size) - size))
    return out


_POOL = 1 << 22  # weights


def _cuts(
    pool: NDArray[np.uint8], size: int, block_bytes: int, rng: np.random.Generator
) -> Iterator[NDArray[np.uint8]]:
    """`size` bytes of the pool's blocks, beginning anew at a random block whenever the pool ends."""
    flat = pool.reshape(-1)
    while size:
        start = int(rng.integers(flat.size // block_bytes)) * block_bytes
        block = flat[start : start + size]
        size -= block.size
        yield block


def _raw_config(shape: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(shape, str) and shape not in SHAPES:
        raise InvalidRequest(f"shape {shape!r}: expected one of {', '.join(SHAPES)}, or a config")
    return dict(SHAPES[shape] if isinstance(shape, str) else shape)


# dtype → its name in safetensors, bytes a number.
_DTYPES = {"bf16": ("BF16", 2), "f16": ("F16", 2), "f32": ("F32", 4)}


def _write_weights(folder: Path, config: ModelConfig, seed: int, shards: int, dtype: str) -> None:
    """`model.safetensors`, or shards of about equal size and their index."""
    specs = list(tensor_specs(config))
    sizes = np.array([np.prod(spec.shape) for spec in specs]) * _DTYPES[dtype][1]
    middle = np.cumsum(sizes) - sizes / 2
    shard_of = (middle * shards / sizes.sum()).astype(int)
    used = sorted(set(shard_of.tolist()))  # fewer than asked where the embedding alone is larger than a share
    rng = np.random.Generator(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(used, 1):
        name = f"model-{number:05d}-of-{len(used):05d}.safetensors" if len(used) > 1 else "model.safetensors"
        members = [spec for spec, s in zip(specs, shard_of.tolist(), strict=True) if s == shard]
        weight_map |= {spec.hf: name for spec in members}
        _write_shard(folder / name, members, rng, dtype)
    if len(used) > 1:
        index = {"metadata": {"total_size": int(sizes.sum())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_shard(path: Path, specs: list[TensorSpec], rng: np.random.Generator, dtype: str) -> None:
    tensors = {spec.hf: (_DTYPES[dtype][0], spec.shape) for spec in specs}
    with path.open("wb") as file:
        file.write(safetensors.encode_header(tensors, {"format": "pt"})[0])
        for spec in specs:
            left = int(np.prod(spec.shape))
            while left:
                n = min(left, _CHUNK)
                values = rng.standard_normal(n, dtype=np.float32)
                values *= np.float32(_NORM if spec.is_norm else _LINEAR)
                file.write(_encode(values, dtype).data)
                left -= n


def _encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "bf16":
        bits = values.view(np.uint32)
        bits += 0x8000  # halves go up: which way does not matter for noise
        return (bits >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "f16" else "<f4")


_TAGS = (
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code"),
)


_TAGS_OF_GEMMA_3 = (*_TAGS, "a", "html", "body", "img", "span", "bbox", "ul", "li", "div", "iframe", "footer")
_TURNS = ["<start_of_turn>", "<end_of_turn>"]
_BYTES = [f"<0x{i:02X}>" for i in range(256)]

Pieces = list[tuple[int, list[str]]]
"""Pieces that follow each other, by type."""


def _markup(tags: Sequence[str]) -> list[str]:
    """Runs of newlines and of spaces, and tags."""
    runs = ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
    return [*runs, *(f"<{tag}>" for tag in tags), *(f"</{tag}>" for tag in tags)]


def _unused(first: int, stop: int) -> list[str]:
    return [f"<unused{i}>" for i in range(first, stop)]


@dataclass(frozen=True)
class _Layout:
    """Which special pieces come before the normal ones and, in a vocabulary of `size` pieces, after them."""

    before: Pieces
    size: int
    after: Pieces


_START: Pieces = [(CONTROL, ["<pad>", "<eos>", "<bos>"]), (UNKNOWN, ["<unk>"])]
_GEMMA_1_AND_2 = _Layout(
    before=[
        *_START,
        (USER_DEFINED, ["<mask>", "<2mass>", "[@BOS@]", *_unused(0, 99), *_TURNS, *_markup(_TAGS)]),
        (BYTE, _BYTES),
    ],
    size=256000,
    after=[],
)
_LAYOUTS = {
    "gemma": _GEMMA_1_AND_2,
    "gemma2": _GEMMA_1_AND_2,
    "gemma3": _Layout(
        before=[
            *_START,
            (CONTROL, ["<mask>"]),
            (USER_DEFINED, ["[multimodal]"]),
            (CONTROL, [*_unused(0, 99), *_TURNS]),
            (USER_DEFINED, _markup(_TAGS_OF_GEMMA_3)),
            (BYTE, _BYTES),
        ],
        size=262144,
        after=[
            (USER_DEFINED, [*("\t" * n for n in range(1, 32)), "<start_of_image>", "<end_of_image>"]),
            (CONTROL, _unused(99, 6242)),
        ],
    ),
}


def vocabulary(config: ModelConfig) -> Vocabulary:
    """BPE pieces with the family's special ids: those, the printable characters, then made-up syllables.

    No more than the family has; the embedding may have further rows. Raises InvalidRequest if there is no room.
    """
    layout = _LAYOUTS[config.family]
    size = min(config.vocab_size, layout.size)
    after = layout.after if size == layout.size else []
    characters = ["▁", *(chr(i) for i in range(33, 127))]
    room = size - len(characters) - sum(len(pieces) for _, pieces in (*layout.before, *after))
    if room < 0:
        raise InvalidRequest(f"vocab_size {size}: expected at least {size - room}")
    normal = [*characters, *itertools.islice(_syllables(), room)]
    runs = [*layout.before, (NORMAL, normal), *after]
    pieces = [piece for _, run in runs for piece in run]
    types = np.array([kind for kind, run in runs for _ in run], np.int32)
    scores = np.where(types == NORMAL, -np.arange(size), 0).astype(np.float32)
    return Vocabulary(Strings.of(pieces), scores, types, bos_id=2, eos_id=1, unk_id=3, pad_id=0)


def _syllables() -> Iterator[str]:
    """aa, ab, … and with ▁ before them: every piece is made of two shorter ones, as BPE needs."""
    for length in itertools.count(2):
        for letters in itertools.product("▁" + string.ascii_lowercase, *[string.ascii_lowercase] * (length - 1)):
            yield "".join(letters)
