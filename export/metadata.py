"""Metadata that a GGUF file and the manifest of an ONNX folder share, by GGUF's keys."""

from __future__ import annotations

from typing import Any

from ..runtime.errors import InvalidCheckpoint
from .sources.checkpoint import Checkpoint

CALIBRATION = "bezel.provenance.calibration"  # the key of a calibrated file; others begin with it


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What neither the config nor the vocabulary tells of a model. Raises InvalidCheckpoint for a value of no sense."""
    name, template = {"general.name": checkpoint.name}, checkpoint.chat_template
    return name | ({} if template is None else {"tokenizer.chat_template": template}) | _generation(checkpoint)


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """The defaults that the checkpoint gives for sampling, and every token that ends a turn."""
    config, n_tokens = checkpoint.generation_config, checkpoint.config.vocab_size

    def fail(key: str, want: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"{checkpoint.path}: generation config: key '{key}': found {str(config[key])[:80]}, expected {want}"
        )

    out: dict[str, Any] = {}
    for key, gguf_key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p")):
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1 << 31:
            raise fail(key, "a number ≥ 0")
        out[f"general.sampling.{gguf_key}"] = int(value) if key == "top_k" else float(value)

    stops = config.get("eos_token_id")
    if stops is not None:
        stops = stops if isinstance(stops, list) else [stops]
        if not stops or not all(type(i) is int and 0 <= i < n_tokens for i in stops):
            raise fail("eos_token_id", f"token ids below {n_tokens}")
        out["bezel.generation.stop_token_ids"] = stops
    return out
