"""What an ONNX graph is made of: nodes, inputs, outputs and constants, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
BOOL, FLOAT, FLOAT16, INT8 = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8
INT32, INT64 = TensorProto.INT32, TensorProto.INT64
Shape = Iterable[int | str]


class Nodes:
    """A graph that grows. Values are known by their names, and nodes by the path of what they are a part of."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.described: list[ValueInfoProto] = []
        self.constants: list[TensorProto] = []
        self.uses_microsoft = False
        self._known: set[str] = set()

    def node(
        self, op: str, inputs: Sequence[str], path: str, *outputs: str, domain: str = "", **attributes: Any
    ) -> str:
        """A node called `path`/`op`, and the name of its first output, by default its only one and `path`."""
        outputs = outputs or (path,)
        name = f"{path}/{op}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain or None, **attributes))
        self.uses_microsoft |= domain == MICROSOFT
        return outputs[0]

    def ints(self, *values: int) -> str:
        return self.constant("ints." + ".".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """A scalar."""
        return self.constant(f"int.{value}", np.array(value, np.int64))

    def number(self, value: float) -> str:
        return self.constant(f"number.{np.float32(value)}", np.array(value, np.float32))

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def input(self, name: str, kind: int, shape: Shape) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, shape: Shape, kind: int = FLOAT) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def describe(self, value: str, shape: Shape) -> str:
        """Put down the shape of a float value, because ONNX's own shape inference does not know its operator."""
        self.described.append(helper.make_tensor_value_info(value, FLOAT, list(shape)))
        return value

    def once(self, path: str, make: Callable[[str], object]) -> str:
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
