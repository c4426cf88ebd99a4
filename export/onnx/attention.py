"""The rows of a graph for onnxruntime: its inputs, and attention over caches that TensorScatter writes in place.

Caches are float32 or float16, (1, slots, KV heads · head_dim), or int8 with a fixed scale for each channel, (1, KV
heads, slots, head_dim), which GroupQueryAttention reads without making floats of them first. Position p has slot p mod
slots; a global layer has a slot for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ...runtime.model.config import LayerConfig
from ...runtime.model.forward import Ops
from .kv_scales import KVScales
from .nodes import BOOL, FLOAT, FLOAT16, INT8, INT32, INT64, MICROSOFT, Nodes
from .ops import Value

# Up to so many queries GroupQueryAttention on int8 is faster than Attention on what is made floats of first.
_FEW = 16
UNSEEN = float(np.finfo(np.float32).min)  # what is added to the score of a slot that no query may see


class GraphRows:
    """`forward.Rows` on `Value`s: n ids of one sequence, whose caches are inputs and outputs, float32.

    With `hidden`, rows of that size as they enter the first layer, instead of ids.
    """

    def __init__(self, nodes: Nodes, layers: Sequence[LayerConfig], hidden: int | None = None) -> None:
        self._nodes, self._kinds, self._embedded = nodes, [kind_of(layer) for layer in layers], hidden is not None
        self._inputs, self._positions, self.positions, self._wanted = one_sequence(nodes, hidden)
        for kind in dict.fromkeys(self._kinds):
            nodes.input(f"visible.{kind}", BOOL, ["n", f"slots.{kind}"])
        self._first = nodes.node("Slice", [self._positions, nodes.ints(0), nodes.ints(1)], "/first_position")
        self._caches: dict[int, tuple[Value, Value]] = {}

    def embed(self, ops: Ops, weight: Any, scale: float) -> Any:
        return self._inputs if self._embedded else ops.embed(weight, self._inputs, scale)

    def wanted(self, x: Value) -> Value:
        return wanted_rows(self._nodes, x, self._wanted)

    def append(self, layer: int, keys: Value, values: Value) -> None:
        self._caches[layer] = self._cache(layer, "key", keys), self._cache(layer, "value", values)

    def attend(self, layer: int, queries: Value, scale: float, softcap: float | None) -> Value:
        """Of query heads that share a KV head, two go as one head with twice the rows: kernels read the keys and values
        anew for every head, and from memory, not from a cache, where they are many.
        """
        node, ints, path = self._nodes.node, self._nodes.ints, f"/layers.{layer}/attention"
        keys, values = self._caches[layer]
        q, mask, heads, d = queries.name, self._mask(layer, queries), queries.heads, queries.head_dim
        paired = heads // keys.heads % 2 == 0
        if paired:
            heads //= 2
            q = node("Reshape", [q, ints(-1, heads, 2, d)], f"{path}/q/pairs")
            q = node("Transpose", [q], f"{path}/q/turned", perm=[2, 0, 1, 3])
            q = node("Reshape", [q, ints(1, -1, heads * d)], f"{path}/q/rows")
            # One node for all layers that share the mask.
            mask = self._nodes.once(
                f"/{mask.lstrip('/')}/twice", lambda path: node("Concat", [mask, mask], path, axis=0)
            )
        form = {"q_num_heads": heads, "kv_num_heads": keys.heads, **_softmax(scale, softcap)}
        h = node("Attention", [q, keys.name, values.name, mask], f"{path}/mixed", **form)
        if paired:
            h = node("Reshape", [h, ints(2, -1, heads, d)], f"{path}/mixed/rows")
            h = node("Transpose", [h], f"{path}/mixed/turned", perm=[1, 2, 0, 3])
            h = node("Reshape", [h, ints(1, -1, queries.width)], f"{path}/heads")
        return replace(queries, name=h)

    def _mask(self, layer: int, queries: Value) -> str:
        """Which slots each query sees, bool (rows, slots)."""
        mask = f"visible.{self._kinds[layer]}"
        if queries.rows == "n":
            return mask
        return self._nodes.once(f"/{mask}/wanted", lambda path: self._nodes.node("Gather", [mask, self._wanted], path))

    def _cache(self, layer: int, name: str, new: Value) -> Value:
        """The cache with the new rows in it."""
        return self._scattered(layer, name, new, new.name, [1, f"slots.{self._kinds[layer]}", new.width], 1, FLOAT)

    def _scattered(
        self, layer: int, name: str, new: Value, rows: str, shape: Sequence[int | str], axis: int, data_type: int
    ) -> Value:
        past = self._nodes.input(f"past.{layer}.{name}", data_type, shape)
        present = self._nodes.output(f"present.{layer}.{name}", shape, data_type)
        form: dict[str, Any] = {"axis": axis, "mode": "linear" if self._kinds[layer] == "global" else "circular"}
        self._nodes.node(
            "TensorScatter", [past, rows, self._first], f"/layers.{layer}/attention/{name}_cache", present, **form
        )
        return replace(new, name=present)


class HalfRows(GraphRows):
    """Caches are float16, made floats of for attention: half of what is read from memory, and of what is kept there."""

    def _cache(self, layer: int, name: str, new: Value) -> Value:
        node, path = self._nodes.node, f"/layers.{layer}/attention/{name}_cache"
        rows = node("Cast", [new.name], f"{path}/half", to=FLOAT16)
        shape: list[int | str] = [1, f"slots.{self._kinds[layer]}", new.width]
        kept = self._scattered(layer, name, new, rows, shape, 1, FLOAT16)
        return replace(kept, name=node("Cast", [kept.name], f"{path}/float", to=FLOAT))


class Int8Rows(GraphRows):
    """Caches are int8, and the masks cover the slots in use. `scales` has an entry for each layer."""

    def __init__(
        self,
        nodes: Nodes,
        layers: Sequence[LayerConfig],
        scales: Sequence[KVScales],
        hidden: int | None = None,
    ) -> None:
        super().__init__(nodes, layers, hidden)
        self._scales = scales

    def _cache(self, layer: int, name: str, new: Value) -> Value:
        node, ints, path = self._nodes.node, self._nodes.ints, f"/layers.{layer}/attention/{name}_cache"
        # Division first: QuantizeLinear takes 34 ns a number where scales differ, and 1 where there is one.
        columns = node("Reshape", [self._scale(layer, name), ints(-1)], f"{path}/scale_of_columns")
        x = node("Div", [new.name, columns], f"{path}/steps")
        zero = self._nodes.constant("int8.0", np.array(0, np.int8))
        x = node("QuantizeLinear", [x, self._nodes.number(1), zero], f"{path}/int8")
        x = node("Reshape", [x, ints(1, -1, new.heads, new.head_dim)], f"{path}/heads")
        x = node("Transpose", [x], f"{path}/turned", perm=[0, 2, 1, 3])
        return self._scattered(layer, name, new, x, self._shape(layer, new), 2, INT8)

    def _shape(self, layer: int, rows: Value) -> list[int | str]:
        return [1, rows.heads, f"capacity.{self._kinds[layer]}", rows.head_dim]

    def _scale(self, layer: int, name: str) -> str:
        scales = self._scales[layer].keys if name == "key" else self._scales[layer].values
        return self._nodes.constant(f"blk.{layer}.{name}_scale", scales[None, :, None, :])

    def attend(self, layer: int, queries: Value, scale: float, softcap: float | None) -> Value:
        """GroupQueryAttention insists on giving the caches back, as `kept.N.key` and `kept.N.value`; where these are
        the same memory, it copies nothing.
        """
        nodes, path, kind = self._nodes, f"/layers.{layer}/attention", self._kinds[layer]
        keys, values = self._caches[layer]
        mask, softmax = self._mask(layer, queries), _softmax(scale, softcap)
        # What layers share is made here, not in a branch, where no other would see it.
        bias = nodes.once(f"/{mask.lstrip('/')}/bias", partial(self._bias, mask))
        slots = nodes.once(f"/slots_{kind}", partial(self._slots, f"visible.{kind}"))
        few = nodes.once(f"/few_{queries.rows}", partial(self._few, queries.rows))
        scales = [self._scale(layer, name) for name in ("key", "value")]

        def direct() -> Mapping[str, int]:
            none = nodes.constant(f"no_rows.{keys.width}", np.zeros((1, 0, keys.width), np.float32))
            state = [keys.name, values.name, f"{slots}/last", f"{slots}/count", "", "", "", bias, "", *scales]
            outputs = {f"{path}/few": FLOAT, f"{path}/few/key": INT8, f"{path}/few/value": INT8}
            form = {"num_heads": queries.heads, "kv_num_heads": keys.heads, "causal": 0, **softmax}
            form |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            inputs = [queries.name, none, none, *state]
            nodes.node("GroupQueryAttention", inputs, f"{path}/few", *outputs, domain=MICROSOFT, **form)
            return outputs

        def through_floats() -> Mapping[str, int]:
            node, ints, many = nodes.node, nodes.ints, f"{path}/many"
            floats = []
            for name, cache, factor in zip(("key", "value"), (keys, values), scales, strict=True):
                x = node("Slice", [cache.name, ints(0), slots, ints(2)], f"{many}/{name}/used")
                x = node("Cast", [x], f"{many}/{name}/float", to=FLOAT)
                floats.append(node("Mul", [x, factor], f"{many}/{name}"))
            x = node("Reshape", [queries.name, ints(1, -1, queries.heads, queries.head_dim)], f"{many}/q/heads")
            x = node("Transpose", [x], f"{many}/q", perm=[0, 2, 1, 3])
            x = node("Attention", [x, *floats, mask], f"{many}/mixed", **softmax)
            x = node("Transpose", [x], f"{many}/turned", perm=[0, 2, 1, 3])
            x = node("Reshape", [x, ints(1, -1, queries.width)], many)
            same = [node("Identity", [cache.name], f"{many}/kept/{cache.name}") for cache in (keys, values)]
            return {x: FLOAT, **dict.fromkeys(same, INT8)}

        branches = {
            "then_branch": nodes.branch(f"{path}/few", direct),
            "else_branch": nodes.branch(f"{path}/many", through_floats),
        }
        kept = [
            nodes.output(f"kept.{layer}.{name}", self._shape(layer, cache), INT8)
            for name, cache in (("key", keys), ("value", values))
        ]
        h = nodes.node("If", [few], f"{path}/mixed", f"{path}/mixed", *kept, **branches)
        return replace(queries, name=nodes.describe(h, [1, queries.rows, queries.width]))

    def _slots(self, mask: str, path: str) -> None:
        """How many slots are in use, int64 (1,), and as int32: the last one (1,), and their number ()."""
        slots = self._nodes.node("Shape", [mask], path, start=1, end=2)
        count = self._nodes.node("Cast", [slots], f"{path}/int32", to=INT32)
        self._nodes.node("Sub", [count, self._nodes.constant("int32.1", np.array([1], np.int32))], f"{path}/last")
        self._nodes.node("Squeeze", [count], f"{path}/count")

    def _few(self, rows: str | int, path: str) -> None:
        inputs: dict[str | int, str] = {"n": self._positions, "wanted": self._wanted}
        count = self._nodes.node("Shape", [inputs[rows]], f"{path}/rows")
        self._nodes.node("LessOrEqual", [count, self._nodes.ints(_FEW)], path)

    def _bias(self, mask: str, path: str) -> None:
        """What is added to the scores, (1, 1, rows, slots)."""
        bias = self._nodes.node("Where", [mask, self._nodes.number(0), self._nodes.number(UNSEEN)], f"{path}/rows")
        self._nodes.node("Unsqueeze", [bias, self._nodes.ints(0, 1)], path)


def _softmax(scale: float, softcap: float | None) -> dict[str, Any]:
    return {"scale": scale, "softcap": softcap or 0.0}


def one_sequence(nodes: Nodes, hidden: int | None = None) -> tuple[Value, str, str, str]:
    """Its ids, (1, n), their positions, (n,) and (1, n), and the wanted ones' indices, (wanted,).

    With `hidden` rows, float32 (1, n, hidden), instead of ids.
    """
    inputs = nodes.input("input_ids", INT64, ["n"]) if hidden is None else nodes.input("rows", FLOAT, ["n", hidden])
    positions, wanted = nodes.input("positions", INT64, ["n"]), nodes.input("wanted", INT64, ["wanted"])
    batch, columns = (nodes.node("Unsqueeze", [x, nodes.ints(0)], f"/{x}/batch") for x in (inputs, positions))
    return Value(batch, "n", 1, hidden or 1), positions, columns, wanted


def wanted_rows(nodes: Nodes, x: Value, wanted: str) -> Value:
    return replace(x, name=nodes.node("Gather", [x.name, wanted], f"{x.name}/wanted", axis=1), rows="wanted")


def kind_of(layer: LayerConfig) -> str:
    """What the graph's inputs and dimensions call the caches of such layers, which are of one size."""
    return "global" if layer.window is None else "local"
