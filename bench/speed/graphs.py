"""Exported folders in the runtimes of others, each fed as its makers' documents say: bezel's own by docs/onnx.md.

`logits` are those of the last token that was taken, float32 (vocab,).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .runner import Runner

Arrays = dict[str, NDArray[Any]]

CHUNK = 128  # tokens at once, as in docs/onnx/generate.py


def ring_sizes(config: Mapping[str, Any], context: int) -> dict[str, tuple[int, ...]]:
    """The shape of each cache of a `portable` graph, from its `config.json`."""
    layers = config.get("layer_types", ["full_attention"] * config["num_hidden_layers"])
    local = config.get("sliding_window", 0) + CHUNK - 1
    return {
        f"past.{i}.{name}": (
            *(1, config["num_key_value_heads"]),
            *(local if kind == "sliding_attention" else context, config["head_dim"]),
        )
        for i, kind in enumerate(layers)
        for name in ("key", "value")
    }


class Graph(Protocol):
    """Runs a graph: names and arrays in, names and arrays out."""

    def __call__(self, inputs: Arrays) -> Arrays: ...


class Portable(Runner):
    """The target `portable`; subclasses open the graph."""

    kv = "f32"
    _past: Arrays
    _held = 0

    def __init__(self, model: str, context: int, threads: int) -> None:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        self.vocab_size: int = config["vocab_size"]
        self._run = self._open(Path(model) / "model.onnx", threads)
        self._shapes = ring_sizes(config, context)
        self.reset()

    def _open(self, graph: Path, threads: int) -> Graph:
        raise NotImplementedError

    def prefill(self, ids: Sequence[int]) -> None:
        for first in range(0, len(ids), CHUNK):
            part = ids[first : first + CHUNK]
            rows = {"input_ids": np.array(part), "positions": np.arange(self._held, self._held + len(part))}
            found = self._run({**rows, "wanted": np.array([len(part) - 1]), **self._past})
            self._past = {name: found[name.replace("past", "present")] for name in self._past}
            self._held += len(part)
            self.logits = found["logits"][0]

    def step(self, token: int) -> None:
        self.prefill([token])

    def rewind(self, n: int) -> None:
        self._held -= n

    def reset(self) -> None:
        self._past = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        self._held = 0

    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._past.values())


class Onnxruntime(Portable):
    """onnxruntime, as docs/onnx/generate.py has it."""

    def _open(self, graph: Path, threads: int) -> Graph:
        import onnxruntime

        self.version = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(graph, options)
        names = [value.name for value in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


class Openvino(Portable):
    """OpenVINO, as docs/onnx/generate.cpp has it."""

    def _open(self, graph: Path, threads: int) -> Graph:
        import openvino

        self.version = openvino.__version__.partition("-")[0]
        compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_NUM_THREADS": threads})
        outputs = {name: value for value in compiled.outputs for name in value.get_names()}
        request = compiled.create_infer_request()

        def run(inputs: Arrays) -> Arrays:
            found = request.infer(inputs)
            return {name: found[value] for name, value in outputs.items()}

        return run


class Optimum(Runner):
    """Optimum's ORTModelForCausalLM, on the target `transformers` or on what its own exporter wrote.

    Like its `generate`, which takes a prompt in one piece.
    """

    kv = "f32"
    _past: Any = None
    _held = 0

    def __init__(self, model: str, context: int, threads: int) -> None:  # noqa: ARG002 - caches grow
        import onnxruntime
        import optimum.version
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        self._torch, self.version = torch, optimum.version.__version__
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(model, session_options=options)
        self.vocab_size: int = self._model.config.vocab_size

    def prefill(self, ids: Sequence[int]) -> None:
        held = self._held + len(ids)
        found = self._model(
            input_ids=self._torch.tensor([ids]),
            attention_mask=self._torch.ones(1, held, dtype=self._torch.int64),
            position_ids=self._torch.arange(self._held, held)[None],
            past_key_values=self._past,
            use_cache=True,
        )
        self._past, self._held, self.logits = found.past_key_values, held, found.logits[0, -1].numpy()

    def step(self, token: int) -> None:
        self.prefill([token])

    def rewind(self, n: int) -> None:
        self._past = tuple(tuple(part[:, :, :-n] for part in layer) for layer in self._past)
        self._held -= n

    def reset(self) -> None:
        self._past, self._held = None, 0

    def kv_bytes(self) -> int | None:
        return None


class OpenvinoOwn(Runner):
    """OpenVINO on what `optimum-cli export openvino` wrote, a graph that keeps keys and values itself.

    It takes no token back: those of decoding stay, until `reset`.
    """

    kv = "u8"  # OpenVINO's default on processors
    _held = 0

    def __init__(self, model: str, context: int, threads: int) -> None:  # noqa: ARG002 - caches grow
        import openvino

        self.version = openvino.__version__.partition("-")[0]
        self.vocab_size: int = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        graph = Path(model) / "openvino_model.xml"
        compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._request = compiled.create_infer_request()

    def prefill(self, ids: Sequence[int]) -> None:
        held = self._held + len(ids)
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, held), np.int64),
            "position_ids": np.arange(self._held, held)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._held, self.logits = held, self._request.infer(inputs)["logits"][0, -1]

    def step(self, token: int) -> None:
        self.prefill([token])

    def rewind(self, n: int) -> None:
        pass

    def reset(self) -> None:
        self._request.reset_state()
        self._held = 0

    def kv_bytes(self) -> int | None:
        return None


GRAPH_RUNNERS: dict[str, Callable[..., Runner]] = {
    "onnxruntime": Onnxruntime,
    "openvino": Openvino,
    "optimum": Optimum,
    "openvino-own": OpenvinoOwn,
}
# What each is imported as.
GRAPH_MODULES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "optimum": "optimum.onnxruntime",
    "openvino-own": "openvino",
}
