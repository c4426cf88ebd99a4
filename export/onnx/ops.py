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
    "v_patch": "patches",
    "v_patch_bias": "patches/bias",
    "v_positions": "patches/placed",
    "v_norm1": "attention_norm",
    "v_attn_q": "attention/q",
    "v_attn_q_bias": "attention/q/bias",
    "v_attn_k": "attention/k",
    "v_attn_k_bias": "attention/k/bias",
    "v_attn_v": "attention/v",
    "v_attn_v_bias": "attention/v/bias",
    "v_attn_output": "attention/output",
    "v_attn_output_bias": "attention/output/bias",
    "v_norm2": "feed_forward_norm",
    "v_ffn_up": "feed_forward/up",
    "v_ffn_up_bias": "feed_forward/up/bias",
    "v_ffn_down": "feed_forward/down",
    "v_ffn_down_bias": "feed_forward/down/bias",
    "v_post_norm": "norm",
    "v_soft_norm": "projection_norm",
    "v_projection": "projection",
    "v_projection_bias": "projection/bias",
}


@dataclass(frozen=True)
class Value:
    """float32 (rows, heads, head_dim), or (rows, features) of one head; in the graph (batch, rows, heads · head_dim).

    `rows` is a dimension's name or a number, `batch` a name or 1.
    """

    name: str
    rows: str | int
    heads: int
    head_dim: int
    batch: int | str = 1

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class GraphOps:
    """Weights are the specs of the tensors, whose `storage` is by their name in GGUF; `externals` those in use.

    With operators of opset 24.
    """

    def __init__(self, nodes: Nodes, storage: Mapping[str, Storage]) -> None:
        self.externals: list[External] = []
        self._nodes, self._storage = nodes, storage
        self._stored: dict[str, dict[str, str]] = {}

    def embed(self, weight: TensorSpec, ids: Value, scale: float) -> Value:
        """`ids` is int64 (batch, n)."""
        node, ints, path = self._nodes.node, self._nodes.ints, "/embedding"
        parts, storage, hidden = self._parts(weight), self._storage[weight.gguf], weight.shape[1]
        if storage.block is None:
            x = node("Gather", [parts["weights"], ids.name], f"{path}/rows")
            if storage.bits == 16:
                x = node("Cast", [x], f"{path}/float", to=FLOAT)
        else:
            x = self._integers(node("Gather", [parts["codes"], ids.name], f"{path}/codes"), storage, f"{path}/integers")
            scales = node("Gather", [parts["scales"], ids.name], f"{path}/scales")
            scales = node("Unsqueeze", [scales, ints(-1)], f"{path}/scales_of_blocks")
            x = node("Mul", [x, scales], f"{path}/blocks")
            x = node("Reshape", [x, ints(0, 0, hidden)], f"{path}/rows")
        return replace(ids, name=node("Mul", [x, self._nodes.number(scale)], f"{path}/scaled"), head_dim=hidden)

    def _integers(self, codes: str, storage: Storage, path: str) -> str:
        """Of codes, uint8 (…, blocks, bytes), as floats (…, blocks, block): every runtime has these operators."""
        node, number = self._nodes.node, self._nodes.number
        x = node("Cast", [codes], f"{path}/float", to=FLOAT)
        if storage.bits == 4:
            high = node("Floor", [node("Div", [x, number(16)], f"{path}/shifted")], f"{path}/high")
            low = node("Sub", [x, node("Mul", [high, number(16)], f"{path}/cleared")], f"{path}/low")
            pair = [node("Unsqueeze", [part, self._nodes.ints(-1)], f"{part}/column") for part in (low, high)]
            x = node("Concat", pair, f"{path}/pairs", axis=-1)
            assert storage.block is not None
            x = node("Reshape", [x, self._nodes.ints(0, 0, -1, storage.block)], f"{path}/unpacked")
        return node("Sub", [x, number(1 << (storage.bits - 1))], path)

    def rms_norm(self, x: Value, weight: TensorSpec, eps: float) -> Value:
        node, path, name = self._nodes.node, path_of(weight), x.name
        if x.heads > 1:
            name = node("Reshape", [name, self._nodes.ints(0, 0, x.heads, x.head_dim)], f"{path}/heads")
        name = self._normed(name, self._parts(weight)["weights"], path if x.heads == 1 else f"{path}/of_heads", eps)
        if x.heads > 1:
            name = node("Reshape", [name, self._nodes.ints(0, 0, x.width)], path)
        return replace(x, name=name)

    def _normed(self, x: str, weight: str, path: str, eps: float) -> str:
        return self._nodes.node("RMSNormalization", [x, weight], path, epsilon=eps)

    def linear(self, x: Value, *weights: TensorSpec) -> list[Value]:
        return [
            replace(x, name=self._linear(x, weight, path_of(weight)), heads=1, head_dim=weight.shape[0])
            for weight in weights
        ]

    def _linear(self, x: Value, weight: TensorSpec, path: str) -> str:
        parts, storage, (n, k) = self._parts(weight), self._storage[weight.gguf], weight.shape
        if storage.block is None:
            return self.product(x, self.floats(weight), n, path, transposed=True)  # MatMul would need the weight turned
        sizes: dict[str, Any] = {"K": k, "N": n, "bits": storage.bits, "block_size": storage.block, "accuracy_level": 4}
        self._nodes.node("MatMulNBits", [x.name, parts["codes"], parts["scales"]], path, domain=MICROSOFT, **sizes)
        return self._nodes.describe(path, [x.batch, x.rows, n])

    def floats(self, weight: TensorSpec) -> str:
        """A weight that is stored as floats, as float32 of its shape."""
        w = self._parts(weight)["weights"]
        if self._storage[weight.gguf].bits == 16:
            w = self._nodes.node("Cast", [w], f"{path_of(weight)}/float", to=FLOAT)
        return w

    def product(self, x: Value, w: str, n: int, path: str, transposed: bool = False) -> str:
        """x (batch, rows, k) times float32 weights, which make n numbers of a row.

        The weights are (k, n), or `transposed`."""
        node, ints = self._nodes.node, self._nodes.ints
        rows = self._nodes.once(f"{x.name}/flat", lambda path: node("Reshape", [x.name, ints(-1, x.width)], path))
        form: dict[str, Any] = {"transB": 1} if transposed else {}
        out = node("Gemm", [rows, w], f"{path}/out", **form)
        shape = self._nodes.once(f"/shape_of_{n}_{x.rows}", lambda path: self._shape_of(x, n, path))
        return node("Reshape", [out, shape], path)

    def _shape_of(self, x: Value, width: int, path: str) -> None:
        """(batch, rows, width), where x has the batch and the rows."""
        rows = self._nodes.node("Shape", [x.name], f"{path}/rows", end=2)
        self._nodes.node("Concat", [rows, self._nodes.ints(width)], path, axis=0)

    def split_heads(self, x: Value, heads: int) -> Value:
        return replace(x, heads=heads, head_dim=x.width // heads)

    def join_heads(self, x: Value) -> Value:
        return replace(x, heads=1, head_dim=x.width)

    def rope(self, x: Value, positions: str, base: float, factor: float) -> Value:
        """`positions` is int64 (batch, n)."""
        return replace(x, name=self._turned(x, self._turns(positions, base, factor, x.head_dim // 2), f"{x.name}/rope"))

    def _turned(self, x: Value, turns: tuple[str, str], path: str) -> str:
        return self._nodes.node("RotaryEmbedding", [x.name, *turns], path, num_heads=x.heads)

    def _turns(self, positions: str, base: float, factor: float, half: int) -> tuple[str, str]:
        """Cosines and sines, (batch, n, half), of float32 angles as the checkpoints were trained with."""
        node, path = self._nodes.node, f"/rope_{base}_{factor}_{half}"

        def make(path: str) -> None:
            frequency = (base ** -(np.arange(half) / half)).astype(np.float32) / np.float32(factor)
            x = node("Cast", [positions], f"{path}/positions", to=FLOAT)
            x = node("Unsqueeze", [x, self._nodes.ints(-1)], f"{path}/column")
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
        return replace(x, name=capped(self._nodes, x.name, cap, f"{x.name}/softcap"))

    def _parts(self, weight: TensorSpec) -> dict[str, str]:
        """The initialisers that hold a weight, by part; the embedding and a tied head share theirs."""
        if weight.gguf not in self._stored:
            found = externals(weight, self._storage[weight.gguf])
            self.externals += found
            self._stored[weight.gguf] = {tensor.part: tensor.name for tensor in found}
        return self._stored[weight.gguf]


class PlainOps(GraphOps):
    """With operators of opset 21, which all runtimes have."""

    def _normed(self, x: str, weight: str, path: str, eps: float) -> str:
        """In the steps that onnxruntime makes one of."""
        node, number = self._nodes.node, self._nodes.number
        square = node("Pow", [x, number(2)], f"{path}/square")
        mean = node("ReduceMean", [square, self._nodes.ints(-1)], f"{path}/mean")
        rms = node("Sqrt", [node("Add", [mean, number(eps)], f"{path}/with_eps")], f"{path}/rms")
        return node("Mul", [node("Div", [x, rms], f"{path}/normal"), weight], path)

    def _turned(self, x: Value, turns: tuple[str, str], path: str) -> str:
        node, ints = self._nodes.node, self._nodes.ints

        def of_heads(turn: str) -> str:
            return self._nodes.once(f"{turn}/of_heads", lambda path: node("Unsqueeze", [turn, ints(2)], path))

        cos, sin = map(of_heads, turns)
        heads = node("Reshape", [x.name, ints(0, 0, x.heads, x.head_dim)], f"{path}/heads")
        first, second = f"{path}/first", f"{path}/second"
        node("Split", [heads], f"{path}/halves", first, second, axis=-1, num_outputs=2)

        def product(part: str, turn: str, name: str) -> str:
            return node("Mul", [part, turn], f"{part}/{name}")

        turned = [
            node("Sub", [product(first, cos, "cos"), product(second, sin, "sin")], f"{path}/turned_first"),
            node("Add", [product(second, cos, "cos"), product(first, sin, "sin")], f"{path}/turned_second"),
        ]
        return node("Reshape", [node("Concat", turned, f"{path}/turned", axis=-1), ints(0, 0, x.width)], path)


def capped(nodes: Nodes, x: str, cap: float, path: str) -> str:
    """cap · tanh(x / cap)."""
    number = nodes.number(cap)
    x = nodes.node("Tanh", [nodes.node("Div", [x, number], f"{path}/in")], f"{path}/tanh")
    return nodes.node("Mul", [x, number], path)


def path_of(weight: TensorSpec) -> str:
    """What the nodes of a weight are called."""
    part = _PARTS.get(weight.role, weight.role)
    return f"/{part}" if weight.layer is None else f"/layers.{weight.layer}/{part}"
