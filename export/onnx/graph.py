"""Gemma as an ONNX graph: the forward pass, run once on operations that write nodes.

Nodes are named by layer and part (`/layers.3/attention/q/MatMul`), which Netron shows as groups; weights have the names
that GGUF gives them. One graph serves chunks of any length and caches of any size. The activations are (batch, n,
features).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnx import ModelProto, helper

from ...runtime.model.config import ModelConfig
from ...runtime.model.forward import Weights, forward
from ...runtime.model.tensors import TensorSpec, tensor_specs
from .attention import HalfRows, Int8Rows
from .kv_scales import KVScales
from .nodes import MICROSOFT, Nodes
from .targets import Target
from .weights import External, Storage

Built = tuple[ModelProto, list[External]]
"""A model without its weights, and the external tensors that it needs, in the order of use.

The caller adds the external tensors as initialisers.
"""


def build_model(
    config: ModelConfig,
    storage: Mapping[str, Storage],
    target: Target,
    kv: str | Sequence[KVScales] = "f32",
    sees: bool = False,
) -> Built:
    """From ids to logits; if it `sees`, from rows as they enter the first layer, of pictures too.

    `storage` has an entry for each GGUF tensor name. `kv` is how caches are kept: "f32", or for onnxruntime "f16", or
    int8 with these scales, one entry a layer.
    """
    nodes = Nodes()
    ops = target.ops(nodes, storage)
    hidden = {"hidden": config.hidden_size} if sees else {}
    if isinstance(kv, str):
        rows = (HalfRows if kv == "f16" else target.rows)(nodes, config.layers, **hidden)
    else:
        rows = Int8Rows(nodes, config.layers, kv, **hidden)
    logits = forward(config, ops, weights_of(tensor_specs(config), config.n_layers), rows)
    shape = [logits.batch, logits.rows, config.vocab_size]
    if target.batches:
        nodes.node("Identity", [logits.name], "/head/rows", nodes.output("logits", shape))
    else:
        nodes.node("Squeeze", [logits.name, nodes.ints(0)], "/head/rows", nodes.output("logits", shape[1:]))
    return model_of(nodes, config.family, target), ops.externals


def weights_of(specs: Iterable[TensorSpec], n_layers: int) -> Weights:
    """The specs as the weights of a forward pass that writes nodes."""
    shared: dict[str, TensorSpec] = {}
    layers: list[dict[str, TensorSpec]] = [{} for _ in range(n_layers)]
    for spec in specs:
        (shared if spec.layer is None else layers[spec.layer])[spec.role] = spec
    return Weights(shared, layers)


def model_of(nodes: Nodes, name: str, target: Target) -> ModelProto:
    """The model that the nodes make."""
    model = helper.make_model(
        helper.make_graph(nodes.nodes, name, nodes.inputs, nodes.outputs, nodes.constants),
        opset_imports=[
            helper.make_opsetid("", target.opset),
            *([helper.make_opsetid(MICROSOFT, 1)] if nodes.uses_microsoft else []),
        ],
        ir_version=target.ir_version,
        producer_name="bezel",
    )
    model.graph.value_info.extend(nodes.described)
    return model
