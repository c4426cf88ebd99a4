"""One record for each family of models that bezel runs. No other file names one."""

from __future__ import annotations

from .family import Family
from .gemma1 import GEMMA1
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3

__all__ = ["FAMILIES", "Family", "other_model", "what_is_run"]

FAMILIES = {family.name: family for family in (GEMMA1, GEMMA2, GEMMA3)}

# What people may hold besides, by its name in config.json or in GGUF, to say so.
_OTHERS = {
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4",
    "gemma4_unified": "Gemma 4",
    "gemma4-assistant": "a Gemma 4 drafter",
    "gemma-embedding": "EmbeddingGemma",
    "gemma3_text_encoder": "EmbeddingGemma",
    "shieldgemma2": "ShieldGemma 2",
    "vaultgemma": "VaultGemma",
    "t5gemma2": "T5Gemma 2",
    "recurrent_gemma": "RecurrentGemma",
    "t5gemma": "T5Gemma",
    "clip": "the vision part of a model",
}


def what_is_run() -> str:
    """The families by their titles."""
    *titles, last = (family.title for family in FAMILIES.values())
    return f"{', '.join(titles)} and {last}"


def other_model(name: object) -> str:
    """Why a model of another kind is refused."""
    found = _OTHERS.get(name) if isinstance(name, str) else None
    return f"this is {found}; bezel runs {what_is_run()}" if found else f"bezel runs {what_is_run()}"
