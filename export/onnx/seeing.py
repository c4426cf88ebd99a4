"""An eye as graphs: from a picture's pixels to the rows that stand for it, and from ids to a text's rows.

The first is `vision.see`, run once on operations that write nodes. All of its operators are ONNX's own, except the
products with quantized weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ...runtime.model.vision import CHANNELS, GEMMA3, VisionConfig, see, vision_specs
from .graph import Built, model_of, weights_of
from .nodes import FLOAT, INT64, Nodes
from .ops import GraphOps, Value, path_of
from .targets import Target
from .weights import Storage

# The most scores of queries and keys that are there at once, 32 MB of them. Those of all of SigLIP's patches would be
# 1 GB in Gemma 3, and take twice as long; onnxruntime's own operators for attention are slower, or no faster.
_SCORES = 1 << 23


def build_eye(config: VisionConfig, storage: Mapping[str, Storage], target: Target) -> Built:
    """From `pixels`, float32 (1, channels, side, side), less mean and divided by std, to `rows` (n_rows, text_size)."""
    nodes, side = Nodes(), config.image_size
    graph_ops = target.ops(nodes, storage)
    ops = TowerOps(nodes, graph_ops, config)
    patches = ops.patches(nodes.input("pixels", FLOAT, [1, CHANNELS, side, side]))
    rows = see(config, ops, weights_of(vision_specs(config), config.n_layers), patches)
    out = nodes.output("rows", [config.n_rows, config.text_size])
    nodes.node("Squeeze", [rows.name, nodes.ints(0)], "/projection/rows", out)
    return model_of(nodes, f"{config.projector}-eye", target), graph_ops.externals


def build_embedding(config: ModelConfig, storage: Mapping[str, Storage], target: Target) -> Built:
    """From `input_ids`, int64 (n,), to `rows` (n, hidden) as they enter the first layer."""
    nodes = Nodes()
    ops, weight = target.ops(nodes, storage), next(iter(tensor_specs(config)))
    ids = nodes.node("Unsqueeze", [nodes.input("input_ids", INT64, ["n"]), nodes.ints(0)], "/input_ids/batch")
    rows = ops.embed(weight, Value(ids, "n", 1, 1), config.embedding_scale)
    nodes.node("Squeeze", [rows.name, nodes.ints(0)], "/embedding/out", nodes.output("rows", ["n", config.hidden_size]))
    return model_of(nodes, f"{config.family}-embedding", target), ops.externals


@dataclass(frozen=True)
class Patches(Value):
    """A value to which another, and a weight, can be added."""

    ops: TowerOps = field(kw_only=True)

    def __add__(self, other: Value | TensorSpec) -> Patches:
        return self.ops.add(self, other)


class TowerOps:
    """`vision.VisionOps` that write nodes; weights are the specs of tensors."""

    def __init__(self, nodes: Nodes, ops: GraphOps, config: VisionConfig) -> None:
        self._nodes, self._ops, self._config = nodes, ops, config

    def patches(self, pixels: str) -> Patches:
        """What `patches_of` gives of pixels (1, channels, side, side)."""
        c, node, ints = self._config, self._nodes.node, self._nodes.ints
        x = node("Reshape", [pixels, ints(CHANNELS, c.side, c.patch_size, c.side, c.patch_size)], "/pixels/cut")
        x = node("Transpose", [x], "/pixels/turned", perm=[1, 3, 0, 2, 4])
        x = node("Reshape", [x, ints(1, c.n_patches, c.patch_inputs)], "/pixels/patches")
        return Patches(x, c.n_patches, 1, c.patch_inputs, ops=self)

    def add(self, x: Patches, other: Value | TensorSpec) -> Patches:
        if isinstance(other, TensorSpec):
            return replace(x, name=self._nodes.node("Add", [x.name, self._ops.floats(other)], path_of(other)))
        return replace(x, name=self._nodes.node("Add", [x.name, other.name], f"{other.name}/added"))

    def linear(self, x: Patches, *weights: TensorSpec) -> list[Value]:
        return [self._linear(x, weight) for weight in weights]

    def _linear(self, x: Patches, weight: TensorSpec) -> Value:
        path = path_of(weight)
        if weight.role == "v_patch":
            n = weight.shape[0]
            flat = self._nodes.node("Reshape", [self._ops.floats(weight), self._nodes.ints(n, -1)], f"{path}/flat")
            return replace(x, name=self._ops.product(x, flat, n, path, transposed=True), head_dim=n)
        if weight.role == "v_projection" and self._config.projector == GEMMA3:  # which is turned round
            n = weight.shape[1]
            return replace(x, name=self._ops.product(x, self._ops.floats(weight), n, path), head_dim=n)
        return self._ops.linear(x, weight)[0]

    def layer_norm(self, x: Patches, weight: TensorSpec, bias: TensorSpec, eps: float) -> Patches:
        inputs = [x.name, self._ops.floats(weight), self._ops.floats(bias)]
        return replace(x, name=self._nodes.node("LayerNormalization", inputs, path_of(weight), epsilon=eps))

    def bias_gelu(self, x: Patches, bias: TensorSpec) -> Patches:
        x = self.add(x, bias)
        return replace(x, name=self._nodes.node("Gelu", [x.name], f"{x.name}/gelu", approximate="tanh"))

    def rms_norm(self, x: Patches, weight: TensorSpec, eps: float) -> Value:
        return self._ops.rms_norm(x, weight, eps)

    def split_heads(self, x: Patches, heads: int) -> Value:
        return self._ops.split_heads(x, heads)

    def join_heads(self, x: Patches) -> Value:
        return self._ops.join_heads(x)

    def mean_pool(self, x: Patches, side: int, by: int) -> Patches:
        node, ints, few = self._nodes.node, self._nodes.ints, side // by
        h = node("Reshape", [x.name, ints(few, by, few, by, x.width)], "/pool/squares")
        h = node("ReduceMean", [h, ints(1, 3)], "/pool/means", keepdims=0)
        return replace(x, name=node("Reshape", [h, ints(1, few * few, x.width)], "/pool"), rows=few * few)

    def attend_all(self, q: Patches, k: Value, v: Value, scale: float) -> Patches:
        """Some queries after the others, so that their scores stay few."""
        node, ints, path = self._nodes.node, self._nodes.ints, q.name.rpartition("/q/")[0]
        n, heads, d = self._config.n_patches, q.heads, q.head_dim

        def turned(x: str, perm: list[int], path: str) -> str:
            return node("Transpose", [node("Reshape", [x, ints(0, 0, heads, d)], f"{path}/heads")], path, perm=perm)

        queries = node("Mul", [q.name, self._nodes.number(scale)], f"{path}/q/scaled")
        queries = turned(queries, [0, 2, 1, 3], f"{path}/q/turned")
        keys, values = (
            turned(k.name, [0, 2, 3, 1], f"{path}/k/turned"),
            turned(v.name, [0, 2, 1, 3], f"{path}/v/turned"),
        )
        sizes = [len(part) for part in np.array_split(np.arange(n), min(n, -(-heads * n * n // _SCORES)))]
        parts = [f"{path}/q/{i}" for i in range(len(sizes))] if len(sizes) > 1 else [queries]
        if len(sizes) > 1:
            node("Split", [queries, ints(*sizes)], f"{path}/q/parts", *parts, axis=2)
        mixed = []
        for i, part in enumerate(parts):
            shares = node(
                "Softmax", [node("MatMul", [part, keys], f"{path}/{i}/scores")], f"{path}/{i}/shares", axis=-1
            )
            mixed.append(node("MatMul", [shares, values], f"{path}/{i}/mixed"))
        x = node("Concat", mixed, f"{path}/mixed", axis=2) if len(mixed) > 1 else mixed[0]
        x = node("Transpose", [x], f"{path}/mixed/turned", perm=[0, 2, 1, 3])
        return replace(q, name=node("Reshape", [x, ints(0, 0, q.width)], f"{path}/heads"))
