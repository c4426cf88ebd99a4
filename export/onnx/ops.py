"""The operations of the forward pass as nodes of a graph: `forward.Ops` that write instead of computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...runtime.model.tensors import TensorSpec
from .nodes import FLOAT, MICROSOFT, Nodes
from .weights import External, Storage, externals

# Roles of weights, and what their nodes are called in the model or in a layer. Others are called as they are.
_PARTS = {
    "token_embd": "head/matrix",
    "output": "head/matrix",
    "output_norm": "norm",
    "attn_norm": "attention_norm",
    "attn_q": "attention/q",
    "attn_k": "attention/k",
    "attn_v": "attention/v",
    "attn_q_norm": "attention/q_norm",
    "attn_k_norm": "attention/k_norm",
    "attn_output": "attention/output",
    "post_attention_norm": "attention/post_norm",
    "ffn_norm": "feed_forward_norm",
    "ffn_gate": "feed_forward/gate",
    "ffn_up": "feed_forward/up",
    "ffn_down": "feed_forward/down",
    "post_ffw_norm": "feed_forward/post_norm",
}


@dataclass(frozen=True)
class Value:
    """float32 (rows, heads, head_dim), or (rows, features) of one head; in the graph (1, rows, heads · head_dim).

    `rows` is a dimension's name.
    """

    name: str
    rows: str
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class GraphOps:
    """Weights are the specs of the tensors, whose `storage` is by their name in GGUF; `externals` those in use."""

    def __init__(self, nodes: Nodes, storage: Mapping[str, Storage], dialect: str) -> None:
        self.externals: list[External] = []
        self._nodes, self._storage, self._dialect = nodes, storage, dialect
        self._stored: dict[str, dict[str, str]] = {}

    def embed(self, weight: TensorSpec, ids: str, scale: float) -> Value:
        """`ids` (n,) is an input."""
        node, ints, path = self._nodes.node, self._nodes.ints, "/embedding"
        parts, storage, (vocab, hidden) = self._parts(weight), self._storage[weight.gguf], weight.shape
        if storage.block is None:
            x = node("Gather", [parts["weights"], ids], f"{path}/rows")
            if storage.bits == 16:
                x = node("Cast", [x], f"{path}/float", to=FLOAT)
        elif self._dialect == "ort":
            # MatMulNBits wants scales without the axis that GatherBlockQuantized wants them with.
            blocks = hidden // storage.block
            scales = node("Reshape", [parts["scales"], ints(vocab, blocks, 1)], f"{path}/scales_of_blocks")
            form = {"bits": storage.bits, "block_size": storage.block, "gather_axis": 0, "quantize_axis": 2}
            inputs = [parts["codes"], ids, scales]
            x = node("GatherBlockQuantized", inputs, f"{path}/blocks", domain=MICROSOFT, **form)
            x = self._nodes.describe(x, ["n", blocks, storage.block])
            x = node("Reshape", [x, ints(-1, hidden)], f"{path}/rows")
        else:
            codes = node("Gather", [parts["codes"], ids], f"{path}/codes", axis=1)
            scales = node("Gather", [parts["scales"], ids], f"{path}/scales", axis=1)
            x = node("DequantizeLinear", [codes, scales], f"{path}/columns", axis=0, block_size=storage.block)
            x = node("Transpose", [x], f"{path}/rows", perm=[1, 0])
        x = node("Mul", [x, self._nodes.number(scale)], f"{path}/scaled")
        return Value(node("Unsqueeze", [x, ints(0)], f"{path}/batch"), "n", 1, hidden)

    def rms_norm(self, x: Value, weight: TensorSpec, eps: float) -> Value:
        node, path, name = self._nodes.node, _path(weight), x.name
        if x.heads > 1:
            name = node("Reshape", [name, self._nodes.ints(1, -1, x.heads, x.head_dim)], f"{path}/heads")
        inputs = [name, self._parts(weight)["weights"]]
        name = node("RMSNormalization", inputs, path if x.heads == 1 else f"{path}/of_heads", epsilon=eps)
        if x.heads > 1:
            name = node("Reshape", [name, self._nodes.ints(1, -1, x.width)], path)
        return replace(x, name=name)

    def linear(self, x: Value, *weights: TensorSpec) -> list[Value]:
        return [Value(self._linear(x, weight, _path(weight)), x.rows, 1, weight.shape[0]) for weight in weights]

    def _linear(self, x: Value, weight: TensorSpec, path: str) -> str:
        node, axis = self._nodes.node, self._nodes.ints(0)
        parts, storage, (n, k) = self._parts(weight), self._storage[weight.gguf], weight.shape
        if storage.block is None:
            w = parts["weights"]
            if storage.bits == 16:
                w = node("Cast", [w], f"{path}/float", to=FLOAT)
            rows = self._nodes.once(f"{x.name}/squeezed", lambda path: node("Squeeze", [x.name, axis], path))
            out = node("Gemm", [rows, w], f"{path}/out", transB=1)  # MatMul would need the weight turned
            return node("Unsqueeze", [out, axis], path)
        block: dict[str, Any] = {"block_size": storage.block}
        if self._dialect == "standard":
            w = node("DequantizeLinear", [parts["codes"], parts["scales"]], f"{path}/float", axis=0, **block)
            return node("MatMul", [x.name, w], path)
        sizes: dict[str, Any] = {"K": k, "N": n, "bits": storage.bits, **block, "accuracy_level": 4}
        node("MatMulNBits", [x.name, parts["codes"], parts["scales"]], path, domain=MICROSOFT, **sizes)
        return self._nodes.describe(path, [1, x.rows, n])

    def split_heads(self, x: Value, heads: int) -> Value:
        return replace(x, heads=heads, head_dim=x.width // heads)

    def join_heads(self, x: Value) -> Value:
        return replace(x, heads=1, head_dim=x.width)

    def rope(self, x: Value, positions: str, base: float, factor: float) -> Value:
        turns = self._turns(positions, base, factor, x.head_dim // 2)
        path = f"{x.name}/rope"
        return replace(x, name=self._nodes.node("RotaryEmbedding", [x.name, *turns], path, num_heads=x.heads))

    def _turns(self, positions: str, base: float, factor: float, half: int) -> tuple[str, str]:
        """Cosines and sines, (1, n, half), of float32 angles as the checkpoints were trained with."""
        node, path = self._nodes.node, f"/rope_{base}_{factor}_{half}"

        def make(path: str) -> None:
            frequency = (base ** -(np.arange(half) / half)).astype(np.float32) / np.float32(factor)
            x = node("Cast", [positions], f"{path}/positions", to=FLOAT)
            x = node("Unsqueeze", [x, self._nodes.ints(0, 2)], f"{path}/column")
            node("Mul", [x, self._nodes.constant(f"{path[1:]}.frequency", frequency)], path)
            node("Cos", [path], f"{path}/cos")
            node("Sin", [path], f"{path}/sin")

        self._nodes.once(path, make)
        return f"{path}/cos", f"{path}/sin"

    def add_norm(
        self, x: Value, h: Value, post_weight: TensorSpec | None, next_weight: TensorSpec, eps: float
    ) -> tuple[Value, Value]:
        path = f"{h.name}/added"
        if post_weight is not None:
            h = self.rms_norm(h, post_weight, eps)
        x = replace(x, name=self._nodes.node("Add", [x.name, h.name], path))
        return x, self.rms_norm(x, next_weight, eps)

    def feed_forward(self, x: Value, gate: TensorSpec, up: TensorSpec, down: TensorSpec) -> Value:
        gated, upped = self.linear(x, gate, up)
        gelu = self._nodes.node("Gelu", [gated.name], f"{gated.name}/gelu", approximate="tanh")
        gated = replace(gated, name=self._nodes.node("Mul", [gelu, upped.name], f"{gated.name}/times_up"))
        return self.linear(gated, down)[0]

    def softcap(self, x: Value, cap: float) -> Value:
        path, number = f"{x.name}/softcap", self._nodes.number(cap)
        name = self._nodes.node("Div", [x.name, number], f"{path}/in")
        name = self._nodes.node("Tanh", [name], f"{path}/tanh")
        return replace(x, name=self._nodes.node("Mul", [name, number], f"{path}/out"))

    def _parts(self, weight: TensorSpec) -> dict[str, str]:
        """The initialisers that hold a weight, by part; the embedding and a tied head share theirs."""
        if weight.gguf not in self._stored:
            found = externals(weight, self._storage[weight.gguf], self._dialect)
            self.externals += found
            self._stored[weight.gguf] = {tensor.part: tensor.name for tensor in found}
        return self._stored[weight.gguf]


def _path(weight: TensorSpec) -> str:
    part = _PARTS.get(weight.role, weight.role)
    return f"/{part}" if weight.layer is None else f"/layers.{weight.layer}/{part}"
