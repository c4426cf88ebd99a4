"""The rows of graphs that all runtimes run: attention in plain products, over rings or over caches that grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ...runtime.model.config import LayerConfig
from ...runtime.model.forward import Ops
from .attention import UNSEEN, kind_of, one_sequence, wanted_rows
from .nodes import BOOL, FLOAT, INT64, Nodes
from .ops import Value, capped


class PlainRows:
    """`forward.Rows` on `Value`s. Caches are inputs and outputs, float32 (batch, KV heads, slots, head_dim).

    `inputs` are ids, or if `embedded` rows as they enter the first layer.
    """

    def __init__(
        self, nodes: Nodes, layers: Sequence[LayerConfig], inputs: Value, positions: str, embedded: bool = False
    ) -> None:
        self._nodes, self._layers, self._inputs, self.positions = nodes, layers, inputs, positions
        self._embedded = embedded
        self._caches: dict[int, tuple[str, str]] = {}

    def embed(self, ops: Ops, weight: Any, scale: float) -> Any:
        return self._inputs if self._embedded else ops.embed(weight, self._inputs, scale)

    def append(self, layer: int, keys: Value, values: Value) -> None:
        self._caches[layer] = self._cache(layer, "key", keys), self._cache(layer, "value", values)

    def attend(self, layer: int, queries: Value, scale: float, softcap: float | None) -> Value:
        """The queries of all heads that share a KV head are the rows of one product."""
        node, ints, path = self._nodes.node, self._nodes.ints, f"/layers.{layer}/attention"
        heads, d = self._layers[layer].n_kv_heads, queries.head_dim
        group = queries.heads // heads
        keys, values = self._caches[layer]
        q = node("Mul", [queries.name, self._nodes.number(scale)], f"{path}/q/scaled")
        q = node("Reshape", [q, ints(0, 0, heads, group, d)], f"{path}/q/heads")
        q = node("Transpose", [q], f"{path}/q/turned", perm=[0, 2, 3, 1, 4])
        q = node("Reshape", [q, ints(0, heads, -1, d)], f"{path}/q/rows")
        k = node("Transpose", [keys], f"{path}/k/turned", perm=[0, 1, 3, 2])
        x = node("MatMul", [q, k], f"{path}/scores")
        if softcap is not None:
            x = capped(self._nodes, x, softcap, f"{path}/softcap")
        x = node("Add", [x, self._bias(layer, queries, group)], f"{path}/seen")
        x = node("Softmax", [x], f"{path}/shares", axis=-1)
        x = node("MatMul", [x, values], f"{path}/mixed")
        x = node("Reshape", [x, ints(0, heads, group, -1, d)], f"{path}/mixed/heads")
        x = node("Transpose", [x], f"{path}/mixed/turned", perm=[0, 3, 1, 2, 4])
        return replace(queries, name=node("Reshape", [x, ints(0, 0, queries.width)], f"{path}/heads"))

    def wanted(self, x: Value) -> Value:
        raise NotImplementedError

    def _cache(self, layer: int, name: str, new: Value) -> str:
        """The cache with the new rows in it."""
        raise NotImplementedError

    def _visible(self, layer: int, queries: Value, path: str) -> str:
        """Which slots each query sees, bool (batch or 1, 1, rows, slots)."""
        raise NotImplementedError

    def _bias(self, layer: int, queries: Value, group: int) -> str:
        """What is added to the scores, (batch or 1, 1, group · rows, slots); the same for all layers of a kind."""
        layer_kind, nodes = self._layers[layer], self._nodes
        kind = f"/{kind_of(layer_kind)}_{layer_kind.window or 0}/{queries.rows}"

        def bias(path: str) -> None:
            visible = self._visible(layer, queries, f"{path}/visible")
            nodes.node("Where", [visible, nodes.number(0), nodes.number(UNSEEN)], path)

        one = nodes.once(f"{kind}/bias", bias)
        if group == 1:
            return one
        return nodes.once(f"{kind}/bias_of_{group}", lambda path: nodes.node("Concat", [one] * group, path, axis=2))

    def _heads_first(self, new: Value, path: str) -> str:
        """(batch, KV heads, rows, head_dim)."""
        x = self._nodes.node("Reshape", [new.name, self._nodes.ints(0, 0, new.heads, new.head_dim)], f"{path}/heads")
        return self._nodes.node("Transpose", [x], f"{path}/turned", perm=[0, 2, 1, 3])

    def _in_window(self, layer: int, keys: str, queries: str, path: str) -> str:
        """Whether queries, positions (rows, 1), see keys, positions (slots,): bool (rows, slots)."""
        node, window = self._nodes.node, self._layers[layer].window
        seen = node("LessOrEqual", [keys, queries], f"{path}/past")
        if window is not None:
            oldest = node("Sub", [queries, self._nodes.ints(window)], f"{path}/before_window")
            seen = node("And", [seen, node("Greater", [keys, oldest], f"{path}/near")], f"{path}/in_window")
        return seen


class RingRows(PlainRows):
    """n ids of one sequence. Position p has slot p mod slots of its layer's caches, whose number the caller chooses.

    What a slot holds follows from the newest position, so the graph makes the masks. With `hidden`, rows of that size
    come instead of ids, and each says from where to where it sees what is around it whole, as a picture's rows do.
    """

    def __init__(self, nodes: Nodes, layers: Sequence[LayerConfig], hidden: int | None = None) -> None:
        inputs, self._row, positions, self._wanted = one_sequence(nodes, hidden)
        super().__init__(nodes, layers, inputs, positions, embedded=hidden is not None)
        self._blocks = None if hidden is None else nodes.input("blocks", INT64, ["n", 2])

    def wanted(self, x: Value) -> Value:
        return wanted_rows(self._nodes, x, self._wanted)

    def _cache(self, layer: int, name: str, new: Value) -> str:
        kind, path = kind_of(self._layers[layer]), f"/layers.{layer}/attention/{name}_cache"
        shape: list[int | str] = [1, new.heads, f"slots.{kind}", new.head_dim]
        past = self._nodes.input(f"past.{layer}.{name}", FLOAT, shape)
        present = self._nodes.output(f"present.{layer}.{name}", shape)
        slots = self._nodes.once(f"/{kind}/slots", lambda at: self._nodes.node("Shape", [past], at, start=2, end=3))
        places = self._nodes.once(f"/{kind}/places_of_{new.heads}", partial(self._places, slots, new.heads))
        return self._nodes.node("ScatterND", [past, places, self._heads_first(new, path)], path, present)

    def _places(self, slots: str, heads: int, path: str) -> None:
        """Indices of the new rows, int64 (1, heads, n, 3): sequence, head and slot."""
        node, constant = self._nodes.node, self._nodes.constant
        new = self._nodes.once(f"{slots}/new", lambda at: node("Mod", [self._row, slots], at))
        new = node("Unsqueeze", [new, self._nodes.ints(0, 1, 3)], f"{path}/slots")
        last = constant("place.slot", np.array([[[[0, 0, 1]]]], np.int64))
        rows = [[[0, head, 0]] for head in range(heads)]
        first = constant(f"place.heads.{heads}", np.array([rows], np.int64))
        node("Add", [node("Mul", [new, last], f"{path}/last"), first], path)

    def _visible(self, layer: int, queries: Value, path: str) -> str:
        node, ints = self._nodes.node, self._nodes.ints
        slots = f"/{kind_of(self._layers[layer])}/slots"
        held = self._nodes.once(f"{slots}/held", partial(self._held, slots))
        rows = self._row
        if queries.rows == "wanted":
            rows = self._nodes.once("/positions/wanted", lambda at: node("Gather", [self._row, self._wanted], at))
        rows = node("Unsqueeze", [rows, ints(1)], f"{path}/rows")
        seen = self._in_window(layer, held, rows, path)
        if self._blocks is not None:
            seen = node("Or", [seen, self._in_block(self._blocks, held, queries, path)], f"{path}/with_blocks")
        seen = node("And", [seen, f"{slots}/filled"], f"{path}/of_rows")
        return node("Unsqueeze", [seen, ints(0, 1)], path)

    def _in_block(self, blocks: str, keys: str, queries: Value, path: str) -> str:
        """Whether the keys at positions (slots,) are in the blocks of the queries, bool (rows, slots)."""
        node, ints = self._nodes.node, self._nodes.ints
        if queries.rows == "wanted":
            blocks = self._nodes.once("/blocks/wanted", lambda at: node("Gather", [blocks, self._wanted], at))
        first, end = (node("Slice", [blocks, ints(i), ints(i + 1), ints(1)], f"{path}/block/{i}") for i in (0, 1))
        begun = node("GreaterOrEqual", [keys, first], f"{path}/block/begun")
        return node("And", [begun, node("Less", [keys, end], f"{path}/block/open")], f"{path}/block")

    def _held(self, slots: str, path: str) -> None:
        """The newest position that each slot may hold, int64 (slots,): negative where it was not written to yet."""
        node, nodes = self._nodes.node, self._nodes
        zero, one = nodes.scalar(0), nodes.scalar(1)
        each = node("Range", [zero, node("Squeeze", [slots], f"{path}/count"), one], f"{path}/slot")
        newest = nodes.once("/positions/newest", lambda at: node("ReduceMax", [self._row], at))
        age = node("Mod", [node("Sub", [newest, each], f"{path}/distance"), slots], f"{path}/age")
        node("Sub", [newest, age], path)
        node("GreaterOrEqual", [path, zero], f"{slots}/filled")


class GrownRows(PlainRows):
    """Sequences of one length, padded on the left, with the inputs and outputs of Hugging Face's libraries.

    Caches grow by the new rows. Windows count slots, as transformers' do, and logits are of all rows.
    """

    def __init__(self, nodes: Nodes, layers: Sequence[LayerConfig]) -> None:
        batch, n, self._total = "batch_size", "sequence_length", "total_sequence_length"
        ids = nodes.input("input_ids", INT64, [batch, n])
        self._mask = nodes.input("attention_mask", INT64, [batch, self._total])
        super().__init__(nodes, layers, Value(ids, n, 1, 1, batch), nodes.input("position_ids", INT64, [batch, n]))

    def wanted(self, x: Value) -> Value:
        return x

    def _cache(self, layer: int, name: str, new: Value) -> str:
        path = f"/layers.{layer}/attention/{name}_cache"
        # Optimum 2.1 begins Gemma 2 with empty caches of other heads, so their sizes are left open.
        past = self._nodes.input(
            f"past_key_values.{layer}.{name}", FLOAT, [new.batch, "heads", "past_sequence_length", "head_dim"]
        )
        past = self._nodes.node("Reshape", [past, self._nodes.ints(0, new.heads, -1, new.head_dim)], f"{path}/past")
        present = self._nodes.output(f"present.{layer}.{name}", [new.batch, new.heads, self._total, new.head_dim])
        return self._nodes.node("Concat", [past, self._heads_first(new, path)], path, present, axis=2)

    def _visible(self, layer: int, queries: Value, path: str) -> str:  # noqa: ARG002
        node, nodes = self._nodes.node, self._nodes
        slots = nodes.once("/slots", self._slots)
        rows = node("Unsqueeze", ["/slots/new", nodes.ints(1)], f"{path}/rows")
        seen = node("Unsqueeze", [self._in_window(layer, slots, rows, path), nodes.ints(0, 1)], f"{path}/of_rows")
        return node("And", [seen, "/slots/used"], path)

    def _slots(self, path: str) -> None:
        """All slots, int64 (total,), of the new rows (n,), and which are no padding, bool (batch, 1, 1, total)."""
        node, nodes = self._nodes.node, self._nodes
        zero, one = nodes.scalar(0), nodes.scalar(1)
        total, n = (
            node("Squeeze", [node("Shape", [x], f"{path}/{name}/shape", start=1, end=2)], f"{path}/{name}")
            for name, x in (("total", self._mask), ("count", self._inputs.name))
        )
        node("Range", [zero, total, one], path)
        node("Range", [node("Sub", [total, n], f"{path}/past"), total, one], f"{path}/new")
        used = node("Cast", [self._mask], f"{path}/mask", to=BOOL)
        node("Unsqueeze", [used, nodes.ints(1, 2)], f"{path}/used")
