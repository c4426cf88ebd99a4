"""Gemma as an ONNX graph: the nodes, their names, and which tensors they need.

Standard operators of opset 24 carry the structure: TensorScatter writes a layer's ring, Attention reads it. Nodes are
named by layer and part (`/layers.3/attention/q/MatMul`), which Netron shows as groups; weights have the names that
GGUF gives them. One graph serves chunks of any length and caches of any size. The activations are (1, n, features).

Caches are float32, (1, slots, KV heads · head_dim), or int8 with a fixed scale for each channel, (1, KV heads, slots,
head_dim), which GroupQueryAttention reads without making floats of them first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ...runtime.model.config import LayerConfig, ModelConfig
from ...runtime.model.tensors import TensorSpec, tensor_specs
from .kv_scales import KVScales

OPSET, IR_VERSION = 24, 11
MICROSOFT = "com.microsoft"
DIALECTS = ("ort", "standard")
FLOAT, INT64, INT32, INT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.INT8
_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.INT4: 4,
}

# Up to so many queries GroupQueryAttention on int8 is faster than Attention on what is made floats of first.
_FEW = 16
_UNSEEN = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: as floats of `bits` bits, or as integers of `bits` with a scale for each `block`."""

    bits: int
    block: int | None = None


@dataclass(frozen=True)
class External:
    """A tensor of the external data: "weights", "codes" or "scales", which is `part`, of the model's tensor `spec`.

    `transposed` ones are inputs × outputs. Codes of UINT8 have half their range added, and two of 4 bits share a byte.
    """

    spec: TensorSpec
    storage: Storage
    part: str
    name: str
    data_type: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.data_type] // 8


def externals(spec: TensorSpec, storage: Storage, dialect: str) -> list[External]:
    """The tensors that hold one weight of the model: integers in the layout of MatMulNBits, or as MatMul takes them."""
    if storage.block is None:
        kind = TensorProto.FLOAT16 if storage.bits == 16 else FLOAT
        return [External(spec, storage, "weights", spec.gguf, kind, spec.shape)]
    n, k = spec.shape
    blocks, transposed = k // storage.block, dialect == "standard"
    codes: tuple[int, ...] = (k, n) if transposed else (n, blocks, storage.block * storage.bits // 8)
    signed = TensorProto.INT4 if storage.bits == 4 else TensorProto.INT8
    kind = signed if transposed else TensorProto.UINT8
    scales = (blocks, n) if transposed else (n, blocks)
    return [
        External(spec, storage, "codes", f"{spec.gguf}.codes", kind, codes, transposed),
        External(spec, storage, "scales", f"{spec.gguf}.scales", FLOAT, scales, transposed),
    ]


def build_model(
    config: ModelConfig, storage: Mapping[str, Storage], dialect: str, kv_scales: Sequence[KVScales] | None = None
) -> tuple[ModelProto, list[External]]:
    """The model without its weights, and the external tensors that it needs, in the order of use.

    `storage` has an entry for each GGUF tensor name. With `kv_scales`, one entry a layer, caches are int8, which only
    the dialect "ort" has an operator for. The caller adds the external tensors as initialisers.
    """
    graph = _Graph(config, storage, dialect, kv_scales)
    graph.build()
    opsets = [helper.make_opsetid("", OPSET)]
    if graph.uses_microsoft:
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    model = helper.make_model(
        helper.make_graph(graph.nodes, config.family, graph.inputs, graph.outputs, graph.constants),
        opset_imports=opsets,
        ir_version=IR_VERSION,
        producer_name="bezel",
    )
    model.graph.value_info.extend(graph.value_info)
    return model, graph.externals


class _Graph:
    """Nodes, inputs, outputs and constants as they come."""

    def __init__(
        self,
        config: ModelConfig,
        storage: Mapping[str, Storage],
        dialect: str,
        kv_scales: Sequence[KVScales] | None,
    ) -> None:
        self.config, self.storage, self.dialect, self.kv_scales = config, storage, dialect, kv_scales
        self.specs = {spec.gguf: spec for spec in tensor_specs(config)}
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.value_info: list[ValueInfoProto] = []
        self.constants: list[TensorProto] = []
        self.externals: list[External] = []
        self.uses_microsoft = False
        self.rows = "n"  # of the activations; in the last layer, those that logits are wanted of
        self._stored: dict[str, dict[str, str]] = {}
        self._known: set[str] = set()

    def node(
        self, op: str, inputs: Sequence[str], path: str, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """A node called `path`/`op`, and the name of its output, by default `path`."""
        name, output = f"{path}/{op}", output or path
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, domain=domain or None, **attributes))
        self.uses_microsoft |= domain == MICROSOFT
        return output

    def ints(self, *values: int) -> str:
        return self.constant("ints." + ".".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(f"number.{np.float32(value)}", np.array(value, np.float32))

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def input(self, name: str, kind: int, shape: Iterable[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, shape: Iterable[int | str], kind: int = FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def once(self, path: str, make: Callable[[str], str]) -> str:
        """The value called `path`, which `make` gives nodes for the first time that it is asked for."""
        if path not in self._known:
            self._known.add(path)
            make(path)
        return path

    def branch(self, path: str, make: Callable[[], Mapping[str, int]]) -> GraphProto:
        """A graph for `If` of the nodes that `make` adds; it says the outputs and their types."""
        nodes, self.nodes = self.nodes, []
        outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in make().items()]
        graph = helper.make_graph(self.nodes, path, [], outputs)
        self.nodes = nodes
        return graph

    def stored(self, name: str) -> dict[str, str]:
        """The initialisers that hold a weight, by part; the embedding and a tied head share theirs."""
        if name not in self._stored:
            found = externals(self.specs[name], self.storage[name], self.dialect)
            self.externals += found
            self._stored[name] = {tensor.part: tensor.name for tensor in found}
        return self._stored[name]

    def build(self) -> None:
        c = self.config
        ids = self.input("input_ids", INT64, ["n"])
        positions = self.input("positions", INT64, ["n"])
        self.wanted = self.input("wanted", INT64, ["wanted"])
        self.masks = {
            kind: self.input(f"visible.{kind}", TensorProto.BOOL, ["n", f"slots.{kind}"])
            for kind in dict.fromkeys(map(_kind, c.layers))
        }
        self.first = self.node("Slice", [positions, self.ints(0), self.ints(1)], "/first_position")
        self.turns = {base: self._turns(positions, base) for base in dict.fromkeys(la.rope_base for la in c.layers)}
        self.output("logits", ["wanted", c.vocab_size])

        x = self._embed(ids)
        for i, layer in enumerate(c.layers):
            x = self._layer(i, layer, x)
        x = self._norm(x, "output_norm.weight", "/norm")
        x = self._linear(x, "token_embd.weight" if c.tied_head else "output.weight", "/head/matrix")
        if c.final_softcap is not None:
            cap = self.number(c.final_softcap)
            x = self.node("Div", [x, cap], "/head/softcap/in")
            x = self.node("Tanh", [x], "/head/softcap/tanh")
            x = self.node("Mul", [x, cap], "/head/softcap/out")
        self.node("Squeeze", [x, self.ints(0)], "/head/rows", "logits")

    def _turns(self, positions: str, base: float) -> tuple[str, str]:
        """RoPE's cosines and sines, (1, n, head_dim / 2), of float32 angles as the checkpoints were trained with."""
        half = self.config.layers[0].head_dim // 2
        frequency = (base ** -(np.arange(half) / half)).astype(np.float32)
        path = f"/rope_{base:g}"
        x = self.node("Cast", [positions], f"{path}/positions", to=FLOAT)
        x = self.node("Unsqueeze", [x, self.ints(0, 2)], f"{path}/column")
        x = self.node("Mul", [x, self.constant(f"rope_{base:g}.frequency", frequency)], f"{path}/angle")
        return self.node("Cos", [x], f"{path}/cos"), self.node("Sin", [x], f"{path}/sin")

    def _embed(self, ids: str) -> str:
        c, path, name = self.config, "/embedding", "token_embd.weight"
        parts, storage = self.stored(name), self.storage[name]
        scale = self.number(c.embedding_scale)
        if storage.block is None:
            x = self.node("Gather", [parts["weights"], ids], f"{path}/rows")
            if storage.bits == 16:
                x = self.node("Cast", [x], f"{path}/float", to=FLOAT)
        elif self.dialect == "ort":
            # MatMulNBits wants scales without the axis that GatherBlockQuantized wants them with.
            blocks = c.hidden_size // storage.block
            shape = self.ints(c.vocab_size, blocks, 1)
            scales = self.node("Reshape", [parts["scales"], shape], f"{path}/scales_of_blocks")
            form: dict[str, Any] = {
                "bits": storage.bits,
                "block_size": storage.block,
                "gather_axis": 0,
                "quantize_axis": 2,
            }
            inputs = [parts["codes"], ids, scales]
            x = self.node("GatherBlockQuantized", inputs, f"{path}/blocks", domain=MICROSOFT, **form)
            x = self._described(x, [self.rows, blocks, storage.block])
            x = self.node("Reshape", [x, self.ints(-1, c.hidden_size)], f"{path}/rows")
        else:
            codes = self.node("Gather", [parts["codes"], ids], f"{path}/codes", axis=1)
            scales = self.node("Gather", [parts["scales"], ids], f"{path}/scales", axis=1)
            x = self.node("DequantizeLinear", [codes, scales], f"{path}/columns", axis=0, block_size=storage.block)
            x = self.node("Transpose", [x], f"{path}/rows", perm=[1, 0])
        x = self.node("Mul", [x, scale], f"{path}/scaled")
        return self.node("Unsqueeze", [x, self.ints(0)], f"{path}/batch")

    def _layer(self, i: int, layer: LayerConfig, x: str) -> str:
        c, path, blk, kind = self.config, f"/layers.{i}", f"blk.{i}", _kind(layer)
        h = self._norm(x, f"{blk}.attn_norm.weight", f"{path}/attention_norm")
        cos, sin = self.turns[layer.rope_base]
        k = self._linear(h, f"{blk}.attn_k.weight", f"{path}/attention/k")
        v = self._linear(h, f"{blk}.attn_v.weight", f"{path}/attention/v")
        k = self.node("RotaryEmbedding", [k, cos, sin], f"{path}/attention/k/rope", num_heads=layer.n_kv_heads)
        cache = self._cache if self.kv_scales is None else self._int8_cache
        keys, values = (cache(i, name, new, kind) for name, new in (("key", k), ("value", v)))
        mask = self.masks[kind]
        if i == c.n_layers - 1:  # from here on, only what logits are wanted of
            self.rows = "wanted"
            mask = self.node("Gather", [mask, self.wanted], f"{path}/wanted/visible")
            h, x, cos, sin = (
                self.node("Gather", [t, self.wanted], f"{path}/wanted/{n}", axis=1)
                for n, t in (("normed", h), ("stream", x), ("cos", cos), ("sin", sin))
            )
        q = self._linear(h, f"{blk}.attn_q.weight", f"{path}/attention/q")
        q = self.node("RotaryEmbedding", [q, cos, sin], f"{path}/attention/q/rope", num_heads=layer.n_heads)
        if self.kv_scales is None:
            h = self._attend(q, keys, values, mask, f"{path}/attention")
        else:
            h = self._attend_int8(i, q, keys, values, mask, kind)
        h = self._linear(h, f"{blk}.attn_output.weight", f"{path}/attention/output")
        x = self._add(x, h, f"{blk}.post_attention_norm.weight", f"{path}/attention")
        h = self._norm(x, f"{blk}.ffn_norm.weight", f"{path}/feed_forward_norm")
        gate = self._linear(h, f"{blk}.ffn_gate.weight", f"{path}/feed_forward/gate")
        up = self._linear(h, f"{blk}.ffn_up.weight", f"{path}/feed_forward/up")
        gate = self.node("Gelu", [gate], f"{path}/feed_forward/gelu", approximate="tanh")
        h = self.node("Mul", [gate, up], f"{path}/feed_forward/gated")
        h = self._linear(h, f"{blk}.ffn_down.weight", f"{path}/feed_forward/down")
        return self._add(x, h, f"{blk}.post_ffw_norm.weight", f"{path}/feed_forward")

    def _attend(self, q: str, keys: str, values: str, mask: str, path: str) -> str:
        """Attention of q (1, n, heads · head_dim), in the same shape.

        Of query heads that share a KV head, two go as one head with twice the rows: kernels read the keys and values
        anew for every head, and from memory, not from a cache, where they are many.
        """
        c = self.config.layers[0]
        heads, paired = c.n_heads, c.n_heads // c.n_kv_heads % 2 == 0
        if paired:
            heads //= 2
            q = self.node("Reshape", [q, self.ints(-1, heads, 2, c.head_dim)], f"{path}/q/pairs")
            q = self.node("Transpose", [q], f"{path}/q/turned", perm=[2, 0, 1, 3])
            q = self.node("Reshape", [q, self.ints(1, -1, heads * c.head_dim)], f"{path}/q/rows")
            mask = self._doubled(mask)
        form = self._softmax() | {"q_num_heads": heads, "kv_num_heads": c.n_kv_heads}
        h = self.node("Attention", [q, keys, values, mask], f"{path}/mixed", **form)
        if not paired:
            return h
        h = self.node("Reshape", [h, self.ints(2, -1, heads, c.head_dim)], f"{path}/mixed/rows")
        h = self.node("Transpose", [h], f"{path}/mixed/turned", perm=[1, 2, 0, 3])
        return self.node("Reshape", [h, self.ints(1, -1, c.n_heads * c.head_dim)], f"{path}/heads")

    def _softmax(self) -> dict[str, Any]:
        return {"scale": self.config.query_scale, "softcap": self.config.attn_softcap or 0.0}

    def _doubled(self, mask: str) -> str:
        """The mask's rows twice, one node for all layers that share it."""
        return self.once(f"/{mask.lstrip('/')}/twice", lambda path: self.node("Concat", [mask, mask], path, axis=0))

    def _cache(self, i: int, name: str, new: str, kind: str) -> str:
        """The cache with the new rows in it. Position p has slot p mod slots; a global layer has a slot for each."""
        shape: list[int | str] = [1, f"slots.{kind}", self.config.layers[0].kv_size]
        return self._scattered(i, name, new, kind, shape, 1, FLOAT)

    def _int8_cache(self, i: int, name: str, new: str, kind: str) -> str:
        c, path = self.config.layers[i], f"/layers.{i}/attention/{name}_cache"
        # Division first: QuantizeLinear takes 34 ns a number where scales differ, and 1 where there is one.
        columns = self.node("Reshape", [self._kv_scale(i, name), self.ints(-1)], f"{path}/scale_of_columns")
        new = self.node("Div", [new, columns], f"{path}/steps")
        zero = self.constant("int8.0", np.array(0, np.int8))
        new = self.node("QuantizeLinear", [new, self.number(1), zero], f"{path}/int8")
        new = self.node("Reshape", [new, self.ints(1, -1, c.n_kv_heads, c.head_dim)], f"{path}/heads")
        new = self.node("Transpose", [new], f"{path}/turned", perm=[0, 2, 1, 3])
        return self._scattered(i, name, new, kind, [1, c.n_kv_heads, f"capacity.{kind}", c.head_dim], 2, INT8)

    def _scattered(
        self, i: int, name: str, new: str, kind: str, shape: list[int | str], axis: int, data_type: int
    ) -> str:
        past = self.input(f"past.{i}.{name}", data_type, shape)
        self.output(f"present.{i}.{name}", shape, data_type)
        mode = "linear" if kind == "global" else "circular"
        path = f"/layers.{i}/attention/{name}_cache"
        return self.node("TensorScatter", [past, new, self.first], path, f"present.{i}.{name}", axis=axis, mode=mode)

    def _kv_scale(self, i: int, name: str) -> str:
        assert self.kv_scales is not None
        scales = self.kv_scales[i].keys if name == "key" else self.kv_scales[i].values
        return self.constant(f"blk.{i}.{name}_scale", scales[None, :, None, :])

    def _attend_int8(self, i: int, q: str, keys: str, values: str, mask: str, kind: str) -> str:
        """As `_attend`, of int8 caches (1, KV heads, capacity, head_dim), of which the mask covers the slots in use.

        GroupQueryAttention insists on giving the caches back, as `kept.N.key` and `kept.N.value`; where these are the
        same memory, it copies nothing.
        """
        c, path = self.config.layers[i], f"/layers.{i}/attention"
        width = c.q_size
        scales = [self._kv_scale(i, name) for name in ("key", "value")]
        slots, newest, length = self._slots(kind)
        bias = self.once(f"/{mask.lstrip('/')}/bias", partial(self._bias, mask))
        few = self.once(f"/few_{self.rows}", partial(self._few, self.wanted if self.rows == "wanted" else "positions"))
        none = self.constant("no_rows", np.zeros((1, 0, c.n_kv_heads * c.head_dim), np.float32))

        def direct() -> Mapping[str, int]:
            inputs = [q, none, none, keys, values, newest, length, "", "", "", bias, "", *scales]
            outputs = {f"{path}/few": FLOAT, f"{path}/few/key": INT8, f"{path}/few/value": INT8}
            form = self._softmax() | {"num_heads": c.n_heads, "kv_num_heads": c.n_kv_heads, "causal": 0}
            form |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            op, name = "GroupQueryAttention", f"{path}/few/GroupQueryAttention"
            self.nodes.append(helper.make_node(op, inputs, list(outputs), name=name, domain=MICROSOFT, **form))
            return outputs

        def through_floats() -> Mapping[str, int]:
            floats = []
            for name, cache, scale in (("key", keys, scales[0]), ("value", values, scales[1])):
                x = self.node("Slice", [cache, self.ints(0), slots, self.ints(2)], f"{path}/many/{name}/used")
                x = self.node("Cast", [x], f"{path}/many/{name}/float", to=FLOAT)
                floats.append(self.node("Mul", [x, scale], f"{path}/many/{name}"))
            x = self.node("Reshape", [q, self.ints(1, -1, c.n_heads, c.head_dim)], f"{path}/many/q/heads")
            x = self.node("Transpose", [x], f"{path}/many/q", perm=[0, 2, 1, 3])
            x = self.node("Attention", [x, *floats, mask], f"{path}/many/mixed", **self._softmax())
            x = self.node("Transpose", [x], f"{path}/many/turned", perm=[0, 2, 1, 3])
            x = self.node("Reshape", [x, self.ints(1, -1, width)], f"{path}/many")
            kept = [self.node("Identity", [cache], f"{path}/many/kept/{cache}") for cache in (keys, values)]
            return {x: FLOAT, **dict.fromkeys(kept, INT8)}

        outputs = [f"{path}/mixed"]
        for name in ("key", "value"):
            outputs.append(f"kept.{i}.{name}")
            self.output(outputs[-1], [1, c.n_kv_heads, f"capacity.{kind}", c.head_dim], INT8)
        branches = {
            "then_branch": self.branch(f"{path}/few", direct),
            "else_branch": self.branch(f"{path}/many", through_floats),
        }
        self.nodes.append(helper.make_node("If", [few], outputs, name=f"{path}/mixed/If", **branches))
        self.uses_microsoft = True
        return self._described(outputs[0], [1, self.rows, width])

    def _slots(self, kind: str) -> tuple[str, str, str]:
        """How many slots are in use, int64 (1,), as int32 and the last one, int32 (1,)."""
        path = f"/slots_{kind}"

        def make(path: str) -> str:
            slots = self.node("Shape", [f"visible.{kind}"], path, start=1, end=2)
            count = self.node("Cast", [slots], f"{path}/int32", to=INT32)
            self.node("Sub", [count, self.constant("int32.1", np.array([1], np.int32))], f"{path}/last")
            return self.node("Squeeze", [count], f"{path}/count")

        self.once(path, make)
        return path, f"{path}/last", f"{path}/count"

    def _few(self, rows: str, path: str) -> str:
        count = self.node("Shape", [rows], f"{path}/rows")
        return self.node("LessOrEqual", [count, self.ints(_FEW)], path)

    def _bias(self, mask: str, path: str) -> str:
        """What is added to the scores, (1, 1, n, slots)."""
        bias = self.node("Where", [mask, self.number(0), self.number(_UNSEEN)], f"{path}/rows")
        return self.node("Unsqueeze", [bias, self.ints(0, 1)], path)

    def _add(self, x: str, h: str, post_norm: str, path: str) -> str:
        if post_norm in self.specs:
            h = self._norm(h, post_norm, f"{path}/post_norm")
        return self.node("Add", [x, h], f"{path}/added")

    def _norm(self, x: str, weight: str, path: str) -> str:
        return self.node("RMSNormalization", [x, self.stored(weight)["weights"]], path, epsilon=self.config.rms_eps)

    def _linear(self, x: str, weight: str, path: str) -> str:
        parts, storage, (n, k) = self.stored(weight), self.storage[weight], self.specs[weight].shape
        if storage.block is None:
            w = parts["weights"]
            if storage.bits == 16:
                w = self.node("Cast", [w], f"{path}/float", to=FLOAT)
            x = self.node("Squeeze", [x, self.ints(0)], f"{path}/in")
            x = self.node("Gemm", [x, w], f"{path}/out", transB=1)  # MatMul would need the weight turned
            return self.node("Unsqueeze", [x, self.ints(0)], path)
        block: dict[str, Any] = {"block_size": storage.block}
        if self.dialect == "standard":
            w = self.node("DequantizeLinear", [parts["codes"], parts["scales"]], f"{path}/float", axis=0, **block)
            return self.node("MatMul", [x, w], path)
        sizes: dict[str, Any] = {"K": k, "N": n, "bits": storage.bits, **block, "accuracy_level": 4}
        self.node("MatMulNBits", [x, parts["codes"], parts["scales"]], path, domain=MICROSOFT, **sizes)
        return self._described(path, [1, self.rows, n])

    def _described(self, value: str, shape: Sequence[int | str]) -> str:
        """`value`, its type and shape put down because ONNX's own shape inference does not know its operator."""
        self.value_info.append(helper.make_tensor_value_info(value, FLOAT, list(shape)))
        return value


def _kind(layer: LayerConfig) -> str:
    """What the graph's inputs and dimensions call the caches of such layers, which are of one size."""
    return "global" if layer.window is None else "local"
