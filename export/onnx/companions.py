"""The small files beside a graph: config and tokenizer, as bezel and as Hugging Face's libraries read them."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from ...runtime.files.onnx_folder import CONFIG, PREPROCESSOR, TOKENIZER
from ...runtime.model.families.hf import write_hf_config
from ...runtime.model.families.sight import write_hf_vision
from ...runtime.model.vision import VisionConfig
from ...runtime.text.sentencepiece_model import model_proto
from ...runtime.text.vocabulary import Vocabulary
from ..sources.tokenizer_json import write_tokenizer_json
from .source import OnnxSource

DTYPES = {32: ("model", "fp32"), 16: ("model_fp16", "fp16"), 8: ("model_quantized", "q8"), 4: ("model_q4", "q4")}
"""By the bits of its weights, what transformers.js calls a graph and what asks it for that one."""


def companions(source: OnnxSource, target: str, graph: str, eye: VisionConfig | None = None) -> dict[str, bytes]:
    """Contents by name; `graph` is the graph's, and `eye` what it sees with."""
    vocabulary, config = source.vocabulary(), write_hf_config(source.config)
    prepared: dict[str, bytes] = {}
    if eye is not None:
        config, preprocessor = write_hf_vision(eye, config)
        prepared[PREPROCESSOR] = _json(preprocessor)
    if target == "onnxruntime":
        return {CONFIG: _json(config), TOKENIZER: model_proto(vocabulary), **prepared}
    tokens: dict[str, Any] = {"bos_token_id": vocabulary.bos_id, "eos_token_id": stop_ids(source, vocabulary)}
    if vocabulary.pad_id is not None:
        tokens["pad_token_id"] = vocabulary.pad_id
    config |= tokens | {"dtype": "float32"}
    if target == "transformers":  # transformers.js cannot list a folder: it is told which graph is here
        name = PurePosixPath(graph)
        config["transformers.js_config"] = {
            "dtype": dict(DTYPES.values())[name.stem],
            "use_external_data_format": {name.name: True},
        }
    return {
        CONFIG: _json(config),
        TOKENIZER: model_proto(vocabulary),
        "tokenizer.json": json.dumps(write_tokenizer_json(vocabulary), ensure_ascii=False).encode(),
        "tokenizer_config.json": _json(_tokenizer_config(source, vocabulary)),
        "generation_config.json": _json(tokens | _sampling(source)),
        **prepared,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def stop_ids(source: OnnxSource, vocabulary: Vocabulary) -> list[int]:
    """Every token that ends a turn or a text."""
    return list(source.metadata.get("bezel.generation.stop_token_ids", [vocabulary.eos_id]))


def _sampling(source: OnnxSource) -> dict[str, Any]:
    known = source.checkpoint.generation_config
    return {key: known[key] for key in ("do_sample", "temperature", "top_k", "top_p", "min_p") if key in known}


def _tokenizer_config(source: OnnxSource, vocabulary: Vocabulary) -> dict[str, Any]:
    pieces, template = vocabulary.pieces, source.metadata.get("tokenizer.chat_template")
    special = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unk": vocabulary.unk_id, "pad": vocabulary.pad_id}
    return {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{name}_token": pieces[i] for name, i in special.items() if i is not None},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.context_length,
        **({} if template is None else {"chat_template": template}),
    }
