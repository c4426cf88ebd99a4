"""Writes tests/golden/: logits of Hugging Face transformers (eager attention, float32). Needs the `parity` extra."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny import COLUMNS, CONFIGS, GOLDEN, checkpoint_folder, token_ids
from transformers import AutoModelForCausalLM


def hf_logits(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("demo", *CONFIGS):
            logits = hf_logits(checkpoint_folder(name, Path(scratch)), token_ids(name))
            np.save(GOLDEN / f"{name}.npy", logits[:, ::COLUMNS])
            print(f"{name}: logits within ±{np.abs(logits).max():.1f}")
