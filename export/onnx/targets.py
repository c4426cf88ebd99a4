"""What a graph is made for: the operators that it may use, and how its caches are fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .attention import GraphRows
from .ops import GraphOps, PlainOps
from .plain_attention import GrownRows, RingRows


@dataclass(frozen=True)
class Target:
    """`rows` makes a graph's rows of its nodes and the model's layers; logits lose the axis of one sequence unless
    `batches`. Where it `sees`, pictures can be fed, and `rows` takes the model's hidden size if they are.
    """

    opset: int
    ir_version: int
    ops: type[GraphOps]
    rows: Callable[..., Any]
    sees: bool = True
    batches: bool = False


TARGETS = {
    "onnxruntime": Target(24, 11, GraphOps, GraphRows),
    "portable": Target(21, 10, PlainOps, RingRows),
    "transformers": Target(21, 10, PlainOps, GrownRows, sees=False, batches=True),
}
"""Rings that are written in place, for onnxruntime alone; rings for any runtime; what Hugging Face's libraries feed."""
