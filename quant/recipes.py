"""Recipes: which format each tensor of a model gets."""

from __future__ import annotations

from dataclasses import dataclass

from .formats import F16, F32, FORMATS, Q6_K, Q8_0, Format

PRESETS: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")

_EMBEDDING_ROLES = ("token_embd", "output")  # a tied token_embd is also the head
_SMALLER_THAN_Q6_K = ("q5_k", "q4_k", "q4_0")


@dataclass(frozen=True)
class Choice:
    """The format a tensor gets and the one its recipe wanted; they differ where a row is not whole blocks."""

    format: type[Format]
    wanted: type[Format]

    @property
    def fell_back(self) -> bool:
        return self.format is not self.wanted


def choose(preset: str, role: str, shape: tuple[int, ...], embedding: str | None = None) -> Choice:
    """The format for a tensor of this role ("attn_q", "token_embd", …) and shape (outputs, inputs).

    One-dimensional tensors, Gemma's norms, are always F32. The embedding and the head follow `embedding` if
    given; without it they are Q6_K in the presets below Q6_K, because the head is the matrix that suffers
    most from quantizing. Everything else follows the preset. Where a row is not whole blocks of the wanted
    format, Q8_0 takes its place if the row is whole blocks of that, else F16: larger, never coarser. Callers
    announce it.

    Raises ValueError for an unknown preset or embedding.
    """
    for given in (preset,) if embedding is None else (preset, embedding):
        if given not in PRESETS:
            raise ValueError(f"unknown preset '{given}': expected one of {', '.join(PRESETS)}")
    if len(shape) == 1:
        return Choice(F32, F32)
    wanted = FORMATS[preset]
    if role in _EMBEDDING_ROLES:
        if embedding is not None:
            wanted = FORMATS[embedding]
        elif preset in _SMALLER_THAN_Q6_K:
            wanted = Q6_K
    fits = next(f for f in (wanted, Q8_0, F16) if shape[-1] % f.block == 0)
    return Choice(fits, wanted)
