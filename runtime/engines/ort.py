"""The ort engine: an exported ONNX folder through onnxruntime, with caches that its graph writes in place."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .. import _native
from ..arrays import Floats, Ints
from ..cache.caches import Caches, KVCache
from ..cache.store import INT8_CHANNEL
from ..errors import InvalidModelFile
from ..files.onnx_eye import OnnxEye
from ..files.onnx_folder import CHUNK, EMBEDDING, MANIFEST, VISION, OnnxFolder
from ..model.config import ModelConfig
from .ort_store import OrtStore
from .ort_tower import OrtTower, run
from .protocol import CachedEngine

_NUMBERS = {"f32": "float", "f16": "float16", INT8_CHANNEL: "int8"}  # how a cache's are called
_STEP = 32  # slots by which the graph's share of a cache grows


class OrtBackend:
    """A folder's graph in an onnxruntime session. `threads` None takes the performance cores.

    With `exact`, quantized weights are dequantized before they are multiplied with float32 activations, slowly.
    Raises InvalidModelFile for a graph that onnxruntime refuses or that is not one of bezel's.
    """

    def __init__(self, folder: OnnxFolder, config: ModelConfig, threads: int | None, exact: bool = False) -> None:
        self.config, self.folder = config, folder
        self._threads, self._exact = threads, exact
        self.session = self._opened(folder.graph)
        # What the graph gives caches back as: int8 ones once more, as its operator for attention wants it.
        self.states = ("present", "kept") if folder.kv == INT8_CHANNEL else ("present",)
        self.masks = _masks(folder, config)
        want = _interface(folder, config, self.masks, self.states)
        _check_interface(folder, folder.graph, self.session, want, "config.json")
        self._embedding: ort.InferenceSession | None = None
        if folder.sees:
            self._embedding = self._opened(EMBEDDING)
            want = {"input_ids": "tensor(int64) 1", "rows": "output tensor(float) 2"}
            _check_interface(folder, EMBEDDING, self._embedding, want, MANIFEST)

    def _opened(self, graph: str) -> ort.InferenceSession:
        """A session of one of the folder's graphs."""
        folder, path = self.folder, self.folder.path / graph
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or _native.default_threads()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # planning memory for each shape anew costs a token 2 to 3 %
        entries = {
            "session.model_external_initializers_file_folder_path": str(folder.path.resolve()),
            "session.dynamic_block_base": "4",  # cores are not equally fast: work in small pieces, not one for each
        }
        if self._exact:  # kernels for 8-bit activations work on packed weights only
            entries["session.disable_prepacking"] = "1"
        if all(tensor.dtype != "float16" for tensor in folder.initializers.values()):
            # No constant of a quantized model is worth a second copy. Those of 16 bits are needed as float32.
            entries["optimization.constant_folding_max_output_size_in_bytes"] = str(1 << 20)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        try:
            session = ort.InferenceSession(folder.graphs[graph], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise InvalidModelFile(path, f"onnxruntime refuses it: {error}") from error
        folder.check_unchanged()
        _give_back_pages(folder)
        return session

    def engine(self, context: int, kv: str, chunk: int, ring: bool) -> OrtEngine:
        # What is seen at once may be more than is fast for text.
        room, chunk = chunk if self.folder.sees else min(chunk, CHUNK), min(chunk, CHUNK)
        store = partial(OrtStore, by_head=_by_head(self.folder))
        return OrtEngine(self, Caches(self.config.layers, context, kv, room, ring, store), chunk)

    def embed(self, ids: Ints) -> Floats:
        """Text ids (n,) as they enter the first layer, (n, hidden)."""
        assert self._embedding is not None
        return run(self.folder.path / EMBEDDING, self._embedding, {"input_ids": np.ascontiguousarray(ids)})

    def tower(self, file: OnnxEye) -> OrtTower:
        """The folder's own eye."""
        return OrtTower(file, self._opened_eye)

    def _opened_eye(self) -> ort.InferenceSession:
        session = self._opened(VISION)
        want = {"pixels": "tensor(float) 4", "rows": "output tensor(float) 2"}
        _check_interface(self.folder, VISION, session, want, MANIFEST)
        return session


class OrtEngine(CachedEngine):
    """One sequence through the graph."""

    def __init__(self, backend: OrtBackend, caches: Caches, chunk: int) -> None:
        super().__init__(caches, chunk)
        self._backend = backend
        self._binding = backend.session.io_binding()
        self._bound: list[tuple[OrtStore, tuple[int, ...]]] = []

    def forward(
        self,
        inputs: Ints | Floats,
        wanted: int,
        streams: list[Floats] | None = None,  # noqa: ARG002
        blocks: Ints | None = None,
    ) -> Floats:
        n, start = len(inputs), self.position
        rows = np.arange(n - max(wanted, 1), n)  # the graph has no form for no row at all
        for cache in self.caches:
            cache.advance(n)
            _store(cache).written(cache.length)
        try:
            self._bind_caches()
            positions = np.arange(start, start + n)
            feeds: dict[str, npt.NDArray[Any]] = {"positions": positions, "wanted": rows}
            if not self._backend.folder.sees:
                feeds["input_ids"] = np.ascontiguousarray(inputs)
            else:
                embedded: Any = inputs if inputs.ndim > 1 else self._backend.embed(np.asarray(inputs, np.int64))
                feeds["rows"] = np.ascontiguousarray(embedded)
                if self._backend.folder.target == "portable":  # text sees itself whole, which it does anyway
                    feeds["blocks"] = np.stack([positions, positions + 1], axis=1) if blocks is None else blocks
            for name, layer in self._backend.masks.items():
                feeds[name] = _visible(self.caches[layer], n, blocks)
            for name, array in feeds.items():
                self._binding.bind_cpu_input(name, array)
            logits = np.empty((len(rows), self._backend.config.vocab_size), np.float32)
            self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            try:
                self._backend.session.run_with_iobinding(self._binding)
            except Exception as error:  # onnxruntime's exceptions have no base of their own
                raise InvalidModelFile(
                    self._backend.folder.model_path, f"onnxruntime cannot run it: {str(error)[:500]}"
                ) from error
        except BaseException:
            self.caches.cut(start)
            raise
        return logits[len(rows) - wanted :]

    def _bind_caches(self) -> None:
        """Input and output of each cache are the same memory, so that writing a row moves nothing else."""
        stores: list[tuple[OrtStore, tuple[int, ...]]] = []
        for cache in self.caches:
            stores.append((_store(cache), _store(cache).graph_shape(_slots(cache))))
        if stores == self._bound:
            return
        for i, (store, shape) in enumerate(stores):
            for name, array in (("key", store.arrays["keys"]), ("value", store.arrays["values"])):
                place = ("cpu", 0, array.dtype.type, shape, array.ctypes.data)
                self._binding.bind_input(f"past.{i}.{name}", *place)
                for state in self._backend.states:
                    self._binding.bind_output(f"{state}.{i}.{name}", *place)
        self._bound = stores


def _by_head(folder: OnnxFolder) -> bool:
    """How the graph lays out its caches: see `OrtStore`."""
    return folder.kv == INT8_CHANNEL or folder.target == "portable"


def _store(cache: KVCache) -> OrtStore:
    assert isinstance(cache.store, OrtStore)
    return cache.store


def _slots(cache: KVCache) -> int:
    """The slots that the graph sees: those in use, and a few more, so that not every token changes the shape."""
    return min(cache.capacity, -(-cache.length // _STEP) * _STEP)


def _visible(cache: KVCache, n: int, blocks: Ints | None = None) -> npt.NDArray[np.bool_]:
    """Which of the slots in use each of the n newest positions sees, (n, slots); `blocks` as in `rows.Segment`."""
    newest = cache.length - 1
    held = newest - (newest - np.arange(_slots(cache))) % cache.capacity  # the position in each slot; < 0 if empty
    end = np.arange(cache.length - n + 1, cache.length + 1)[:, None]
    oldest = np.zeros_like(end) if cache.window is None else np.maximum(0, end - cache.window)
    if blocks is not None:
        oldest, end = np.minimum(oldest, blocks[:, :1]), np.maximum(end, blocks[:, 1:])
    seen: npt.NDArray[np.bool_] = (oldest <= held) & (held < end)
    return seen


def _give_back_pages(folder: OnnxFolder) -> None:
    """Let go of the weights' pages, which onnxruntime has read once to pack them, and maps to the end.

    They would count as this process's memory until the system runs short. What is read again comes from the file.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    names = {str((folder.path / name).resolve()) for name in folder.files}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        extent, *_, name = line.split(maxsplit=5)
        if name in names:
            start, end = (int(part, 16) for part in extent.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _masks(folder: OnnxFolder, config: ModelConfig) -> dict[str, int]:
    """The masks that the graph takes, each with a layer whose cache says what it holds: none, where it makes them."""
    masks: dict[str, int] = {}
    for i, layer in enumerate(config.layers if folder.target == "onnxruntime" else ()):
        masks.setdefault(f"visible.{'global' if layer.window is None else 'local'}", i)
    return masks


def _interface(folder: OnnxFolder, config: ModelConfig, masks: Iterable[str], states: Iterable[str]) -> dict[str, str]:
    """The inputs and outputs that the graph should have, each with its type and number of dimensions."""
    caches = [f"{i}.{name}" for i in range(config.n_layers) for name in ("key", "value")]
    cache = f"tensor({_NUMBERS[folder.kv]}) {4 if _by_head(folder) else 3}"
    inputs = {"input_ids": "tensor(int64) 1"}
    if folder.sees:
        inputs = {"rows": "tensor(float) 2"} | ({"blocks": "tensor(int64) 2"} if folder.target == "portable" else {})
    return {
        **inputs,
        **dict.fromkeys(("positions", "wanted"), "tensor(int64) 1"),
        **dict.fromkeys(masks, "tensor(bool) 2"),
        **dict.fromkeys((f"past.{name}" for name in caches), cache),
        **dict.fromkeys((f"{state}.{name}" for state in states for name in caches), f"output {cache}"),
        "logits": "output tensor(float) 2",
    }


def _check_interface(
    folder: OnnxFolder, graph: str, session: ort.InferenceSession, want: dict[str, str], source: str
) -> None:
    """Raises InvalidModelFile for a graph with other inputs and outputs than those that follow from `source`."""
    path = folder.path / graph
    try:
        found = {value.name: f"{value.type} {len(value.shape)}" for value in session.get_inputs()}
        found |= {value.name: f"output {value.type} {len(value.shape)}" for value in session.get_outputs()}
    except UnicodeDecodeError as error:
        raise InvalidModelFile(
            path, f"graph inputs and outputs: found names that are no text ({error}); export the model anew"
        ) from None
    for name in sorted({*found, *want}):
        if found.get(name) != want.get(name):
            raise InvalidModelFile(
                path,
                f"graph input or output {name!r}: found {found.get(name)}, expected {want.get(name)} by {source}; "
                "export the model anew",
            )
