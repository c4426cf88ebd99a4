"""Gemma as an ONNX graph: the forward pass, run once on operations that write nodes.

Standard operators of opset 24 carry the structure: TensorScatter writes a layer's ring, Attention reads it. Nodes are
named by layer and part (`/layers.3/attention/q/MatMul`), which Netron shows as groups; weights have the names that
GGUF gives them. One graph serves chunks of any length and caches of any size. The activations are (1, n, features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, helper

from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, forward
from ...runtime.model.tensors import tensor_specs
from .attention import GraphRows, Int8Rows
from .kv_scales import KVScales
from .nodes import MICROSOFT, Nodes
from .ops import GraphOps
from .weights import External, Storage

OPSET, IR_VERSION = 24, 11
DIALECTS = ("ort", "standard")


def build_model(
    config: ModelConfig, storage: Mapping[str, Storage], dialect: str, kv_scales: Sequence[KVScales] | None = None
) -> tuple[ModelProto, list[External]]:
    """The model without its weights, and the external tensors that it needs, in the order of use.

    `storage` has an entry for each GGUF tensor name. With `kv_scales`, one entry a layer, caches are int8, which only
    the dialect "ort" has an operator for. The caller adds the external tensors as initialisers.
    """
    nodes = Nodes()
    ops = GraphOps(nodes, storage, dialect)
    rows = GraphRows(nodes, config.layers) if kv_scales is None else Int8Rows(nodes, config.layers, kv_scales)
    specs = list(tensor_specs(config))
    weights = Weights(
        {spec.role: spec for spec in specs if spec.layer is None},
        [{spec.role: spec for spec in specs if spec.layer == i} for i in range(config.n_layers)],
    )
    logits = forward(config, ops, weights, rows)
    nodes.output("logits", [logits.rows, config.vocab_size])
    nodes.node("Squeeze", [logits.name, nodes.ints(0)], "/head/rows", "logits")
    model = helper.make_model(
        helper.make_graph(nodes.nodes, config.family, nodes.inputs, nodes.outputs, nodes.constants),
        opset_imports=[
            helper.make_opsetid("", OPSET),
            *([helper.make_opsetid(MICROSOFT, 1)] if nodes.uses_microsoft else []),
        ],
        ir_version=IR_VERSION,
        producer_name="bezel",
    )
    model.graph.value_info.extend(nodes.described)
    return model, ops.externals
