"""Metadata that a GGUF file and the manifest of an ONNX folder share, by GGUF's keys."""

from __future__ import annotations

from typing import Any

from ..runtime.errors import InvalidCheckpoint, InvalidRequest
from ..runtime.text.sampling import write_sampling
from .sources.checkpoint import Checkpoint

CALIBRATION = "bezel.provenance.calibration"  # the key of a calibrated file; others begin with it
CALIBRATION_TEXT = f"{CALIBRATION}_text_sha256"
TUNED = "steps of tuning"  # what its value holds where every norm may have moved


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

    try:
        out: dict[str, Any] = dict(write_sampling(config))
    except InvalidRequest as error:
        raise InvalidCheckpoint(
            f"{checkpoint.path}: generation config: {error}; set it right there, or remove it"
        ) from None

    stops = config.get("eos_token_id")
    if stops is not None:
        stops = stops if isinstance(stops, list) else [stops]
        if not stops or not all(type(i) is int and 0 <= i < n_tokens for i in stops):
            raise fail("eos_token_id", f"token ids below {n_tokens}")
        out["bezel.generation.stop_token_ids"] = stops
    return out
