"""Gemma as an ONNX graph: the forward pass, run once on operations that write nodes.

Nodes are named by layer and part (`/layers.3/attention/q/MatMul`), which Netron shows as groups; weights have the names
that GGUF gives them. One graph serves chunks of any length and caches of any size. The activations are (batch, n,
features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, helper

from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, forward
from ...runtime.model.tensors import tensor_specs
from .attention import HalfRows, Int8Rows
from .kv_scales import KVScales
from .nodes import MICROSOFT, Nodes
from .targets import Target
from .weights import External, Storage


def build_model(
    config: ModelConfig, storage: Mapping[str, Storage], target: Target, kv: str | Sequence[KVScales] = "f32"
) -> tuple[ModelProto, list[External]]:
    """The model without its weights, and the external tensors that it needs, in the order of use.

    `storage` has an entry for each GGUF tensor name. `kv` is how caches are kept: "f32", or for onnxruntime "f16", or
    int8 with these scales, one entry a layer. The caller adds the external tensors as initialisers.
    """
    nodes = Nodes()
    ops = target.ops(nodes, storage)
    if isinstance(kv, str):
        rows = (HalfRows if kv == "f16" else target.rows)(nodes, config.layers)
    else:
        rows = Int8Rows(nodes, config.layers, kv)
    specs = list(tensor_specs(config))
    weights = Weights(
        {spec.role: spec for spec in specs if spec.layer is None},
        [{spec.role: spec for spec in specs if spec.layer == i} for i in range(config.n_layers)],
    )
    logits = forward(config, ops, weights, rows)
    shape = [logits.batch, logits.rows, config.vocab_size]
    if target.batches:
        nodes.node("Identity", [logits.name], "/head/rows", nodes.output("logits", shape))
    else:
        nodes.node("Squeeze", [logits.name, nodes.ints(0)], "/head/rows", nodes.output("logits", shape[1:]))
    model = helper.make_model(
        helper.make_graph(nodes.nodes, config.family, nodes.inputs, nodes.outputs, nodes.constants),
        opset_imports=[
            helper.make_opsetid("", target.opset),
            *([helper.make_opsetid(MICROSOFT, 1)] if nodes.uses_microsoft else []),
        ],
        ir_version=target.ir_version,
        producer_name="bezel",
    )
    model.graph.value_info.extend(nodes.described)
    return model, ops.externals
