"""A folder that `bezel export --format onnx` wrote, opened without trusting what is in it.

`model.onnx` is the graph, its weights lie in files that it names, `config.json` and `tokenizer.model` are as in a
checkpoint, and `bezel.json` holds what a GGUF file has as metadata, and the size and hash of every file. Where it is
laid out for Hugging Face's libraries, the graph and its weights are in the folder `onnx/`. Where the model sees,
`model.onnx` takes rows instead of ids, which `embedding.onnx` and `vision.onnx` make of texts and of pictures, and
`preprocessor_config.json` says what becomes of a picture before.

onnxruntime opens whatever file a graph names. So before it sees one, every file here is known to be a plain file of
this folder, without another name, and every tensor to lie inside its file. The graph is then handed over as the bytes
that were checked (`graphs`), and `check_unchanged` afterwards shows that what onnxruntime has opened since is
what was checked too.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..cache.store import INT8_CHANNEL, KV_TYPES
from ..errors import InvalidModelFile
from ..model.config import ModelConfig
from ..model.families.hf import read_hf_config
from ..model.families.sight import read_hf_vision
from ..model.tensors import tensor_specs
from ..text.sentencepiece_model import read_vocabulary
from ..text.vocabulary import Vocabulary
from .hashing import fed
from .onnx_eye import OnnxEye
from .onnx_model import Initializer, OnnxModel, is_file_name, read_model
from .onnx_tensors import OnnxTensor, dequantize, find_tensors
from .strict_json import parse_json

MODEL, MANIFEST, CONFIG, TOKENIZER = "model.onnx", "bezel.json", "config.json", "tokenizer.model"
EMBEDDING, VISION, PREPROCESSOR = "embedding.onnx", "vision.onnx", "preprocessor_config.json"

KV_STORAGE = {"f32": "f32", "f16": "f16", "int8": INT8_CHANNEL}
"""How a graph may store keys and values, as the export's `--kv` and as `bezel.json` say it."""

CHUNK = 256  # most tokens at once: what attention keeps beside a layer's cache grows with them, and speed does not

_VERSION = 2
_MAX_GRAPH, _MAX_TOKENIZER, _MAX_JSON = 64 << 20, 64 << 20, 4 << 20
_MAX_DATA_FILES = 256
_TEXTS = ("quant", "target", "graph", "kv")  # keys of the manifest
_GRAPHS = "onnx"  # the one folder in the folder
_SAMPLE = 4096  # bytes of each tensor that the fingerprint covers


class OnnxFolder:
    """An open folder. `metadata` has the keys of GGUF metadata, from `bezel.json`; `model` is the checked graph.

    `files` maps the names of the folder's files to {"bytes": …, "sha256": …}, `formats` those of the model's tensors to
    GGUF's name for the format of their numbers; `quant`, `vision_quant` (None: it has no eye) and `target` say how the
    folder was exported, and `kv` how its graph stores keys and values, "f32", "f16" or "int8-channel". `graphs` has the
    checked bytes of each graph by its name. Raises InvalidModelFile for whatever is not a sound folder.
    """

    kind = "an ONNX folder"
    largest_chunk = CHUNK

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._identities: dict[str, tuple[int, ...]] = {}
        self.files: Mapping[str, Mapping[str, Any]] = {}
        manifest = self._read_manifest()
        self.metadata: Mapping[str, Any] = manifest["metadata"]
        self.quant, self.target, self.graph, self.kv = (str(manifest[key]) for key in _TEXTS)
        self.model_path = self.path / self.graph
        self.vision_quant: str | None = manifest.get("vision")
        self.files, self.formats = manifest["files"], manifest["formats"]
        names = [self.graph, *((EMBEDDING, VISION) if self.sees else ())]
        self.graphs = {name: self._read(name, _MAX_GRAPH) for name in names}
        self._models = {name: read_model(self.path / name, graph) for name, graph in self.graphs.items()}
        self.model: OnnxModel = self._models[self.graph]
        self.initializers: Mapping[str, Initializer] = self._merged()
        self._data = self._map_data()

    @property
    def engines(self) -> tuple[str, ...]:
        """What Hugging Face's libraries feed otherwise than bezel does, they alone run."""
        return ("reference",) if self.target == "transformers" else ("ort", "reference")

    @property
    def sees(self) -> bool:
        """Whether the folder has an eye, and the graph takes rows instead of ids."""
        return self.vision_quant is not None

    @property
    def file_bytes(self) -> int:
        """Size of the whole folder, as far as `bezel.json` lists it."""
        return sum(entry["bytes"] for entry in self.files.values())

    def kv_types(self, engine: str) -> tuple[str, ...]:
        """How an engine can store keys and values, default first; the graph has one way."""
        return (self.kv,) if engine == "ort" else KV_TYPES

    def data(self, name: str) -> NDArray[np.uint8]:
        """An initialiser's bytes, uint8 (nbytes,), read-only, mapped where they lie in a file of their own."""
        tensor = self.initializers.get(name)
        if tensor is None:
            self._fail(self.graph, f"there is no initialiser {name!r}")
        if tensor.location is not None:
            return self._data[tensor.location][tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.raw is None:
            self._fail(self.graph, f"initialiser {name!r}: found a list of numbers, expected raw data")
        return np.frombuffer(tensor.raw, np.uint8)

    def config(self) -> ModelConfig:
        """The model's description. Raises InvalidConfig."""
        return read_hf_config(self._json(CONFIG), str(self.path / CONFIG))

    @cached_property
    def vision(self) -> OnnxEye | None:
        """The folder's own eye. Raises InvalidConfig and InvalidModelFile."""
        if not self.sees:
            return None
        source, hidden = str(self.path / CONFIG), self.config().hidden_size
        config = read_hf_vision(self._json(CONFIG), hidden, source, self._json(PREPROCESSOR))
        initializers = self._models[VISION].initializers
        return OnnxEye(self.path / VISION, config, self.graphs[VISION], initializers, self.formats, self.data)

    def vocabulary(self) -> Vocabulary:
        """The pieces of the tokenizer."""
        raw = self._read(TOKENIZER, _MAX_TOKENIZER)
        return read_vocabulary(raw, lambda reason: InvalidModelFile(self.path / TOKENIZER, reason))

    def fingerprint(self) -> str:
        """Which model this is: SHA-256 (hex) of all but the weights, and of the first 4 KiB of each tensor."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.graphs[self.graph])
        for name, limit in ((CONFIG, _MAX_JSON), (TOKENIZER, _MAX_TOKENIZER), (MANIFEST, _MAX_JSON)):
            digest.update(self._read(name, limit))
        for tensor in self.initializers.values():
            if tensor.location is not None:
                digest.update(self.data(tensor.name)[:_SAMPLE].data)
        return digest.hexdigest()

    @cached_property
    def tensors(self) -> Mapping[str, OnnxTensor]:
        """The model's tensors by their names in GGUF. Raises InvalidModelFile and InvalidConfig."""
        return find_tensors(self.model_path, self.initializers, tensor_specs(self.config()), self.formats)

    def check_tensors(self, config: ModelConfig) -> None:
        """Raises InvalidModelFile unless the graph holds all tensors of `config`, in their shapes."""
        find_tensors(self.model_path, self.initializers, tensor_specs(config), self.formats)

    def dequantize(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor as float32 in its own shape, or some rows of it, float32 (rows, inputs)."""
        return dequantize(self.tensors[name], self.data, rows)

    def check_unchanged(self) -> None:
        """Raises InvalidModelFile if a file is no longer the one that was checked when this folder was opened.

        To be called when onnxruntime has opened the files, and before its session is used.
        """
        for name, identity in self._identities.items():
            try:
                now = _identity(os.lstat(self.path / name))
            except OSError:
                now = ()
            if now != identity:
                self._fail(name, "it was changed while it was being opened; try again once nothing writes to it")

    def check_hashes(self) -> None:
        """Raises InvalidModelFile unless every file that `bezel.json` lists has the content it had when written."""
        for name in self.files:
            with os.fdopen(self._open(name)[0], "rb") as file:
                self._check_hash(name, fed(hashlib.sha256(), file).hexdigest())

    def facts(self) -> dict[str, Any]:
        """What only a graph has. Operators are named with their domain, unless it is ONNX's own."""
        operators = {f"{domain}.{op}".lstrip("."): n for (domain, op), n in sorted(self.model.operators.items())}
        return {
            "onnx": {
                "quant": self.quant,
                "target": self.target,
                "vision": self.vision_quant,
                "opsets": {domain or "ai.onnx": version for domain, version in self.model.opsets.items()},
                "operators": operators,
                "files": {name: entry["bytes"] for name, entry in self.files.items()},
            }
        }

    def close(self) -> None:
        self._data = {}

    def __enter__(self) -> OnnxFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fail(self, name: str, reason: str) -> NoReturn:
        raise InvalidModelFile(self.path / name, reason)

    def _read_manifest(self) -> dict[str, Any]:
        try:
            os.lstat(self.path / MANIFEST)
        except OSError:
            self._fail("", _not_an_export(self.path))
        raw = self._json(MANIFEST)
        if "bezel_page" in raw:
            self._fail("", f"this is a page for browsers; its model is {self.path / 'model'}")
        if raw.get("bezel_onnx") != _VERSION or isinstance(raw["bezel_onnx"], bool):
            self._fail(MANIFEST, f"key 'bezel_onnx': found {_show(raw.get('bezel_onnx'))}, expected {_VERSION}")
        tables = ("metadata", "files", "formats")
        for key, kind in (*((key, str) for key in _TEXTS), *((key, dict) for key in tables)):
            if not isinstance(raw.get(key), kind):
                self._fail(MANIFEST, f"key {key!r}: found {_show(raw.get(key))}, expected a {kind.__name__}")
        if raw["graph"] not in raw["files"]:
            self._fail(MANIFEST, f"key 'graph': found {_show(raw['graph'])}, expected one of the files")
        if raw["kv"] not in KV_STORAGE.values():
            self._fail(MANIFEST, f"key 'kv': found {_show(raw['kv'])}, expected {' or '.join(KV_STORAGE.values())}")
        if not isinstance(raw.get("vision", ""), str):
            self._fail(MANIFEST, f"key 'vision': found {_show(raw['vision'])}, expected a str, or no such key")
        for name, form in raw["formats"].items():
            if not isinstance(form, str):
                self._fail(MANIFEST, f"key 'formats': found {_show({name: form})}, expected the name of a format")
        for name, entry in raw["files"].items():
            sound = (
                is_file_name(name.removeprefix(f"{_GRAPHS}/"))
                and isinstance(entry, dict)
                and set(entry) >= {"bytes", "sha256"}
            )
            if not sound or type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                self._fail(MANIFEST, f"key 'files': found {_show({name: entry})}, expected a file's bytes and sha256")
        return raw

    def _json(self, name: str) -> dict[str, Any]:
        return parse_json(self._read(name, _MAX_JSON), lambda reason: InvalidModelFile(self.path / name, reason))

    def _read(self, name: str, limit: int) -> bytes:
        descriptor, size = self._open(name)
        with os.fdopen(descriptor, "rb") as file:
            if size > limit:
                self._fail(name, f"found {size} bytes, expected {limit} at most")
            content = file.read(size + 1)
        if len(content) != size:
            self._fail(name, f"found {len(content)} bytes, expected {size}: it was changed while it was being read")
        if name != MANIFEST:
            self._check_hash(name, hashlib.sha256(content).hexdigest())
        return content

    def _check_hash(self, name: str, found: str) -> None:
        """What was altered after the export may fit no more what was not."""
        expected = self.files.get(name, {}).get("sha256")
        if found != expected:
            self._fail(name, f"found SHA-256 {found}, expected {expected} by {MANIFEST}: it was altered")

    def _merged(self) -> dict[str, Initializer]:
        """The initialisers of all graphs. What two have in common in another file must be the same there."""
        merged = dict(self.model.initializers)
        for graph, model in self._models.items():
            for name, tensor in model.initializers.items():
                other = merged.setdefault(name, tensor)
                if other is not tensor and _place(other) != _place(tensor):
                    self._fail(graph, f"initialiser {name!r}: is another than in {self.graph}; export the model anew")
        return merged

    def _map_data(self) -> dict[str, NDArray[np.uint8]]:
        """The files that hold weights, mapped, once all initialisers are known to lie inside them."""
        names = sorted({t.location for t in self.initializers.values() if t.location is not None})
        folder = self.graph.removesuffix(self.model_path.name)
        if len(names) > _MAX_DATA_FILES:
            self._fail(self.graph, f"found {len(names)} files of external data, expected {_MAX_DATA_FILES} at most")
        mapped = {}
        for name in names:
            descriptor, size = self._open(folder + name)
            with os.fdopen(descriptor, "rb") as file:
                for tensor in self.initializers.values():
                    if tensor.location == name and tensor.offset + tensor.nbytes > size:
                        self._fail(
                            self.graph,
                            f"initialiser {tensor.name!r}: found {tensor.nbytes} bytes from byte {tensor.offset} of "
                            f"{name}, expected its end by byte {size}, where the file ends; is the copy complete?",
                        )
                mapped[name] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return mapped

    def _open(self, name: str) -> tuple[int, int]:
        """A descriptor of a file of this folder, and its size.

        Neither kind of link is followed: a link's target may be any file that the user can read, which a model that
        came from elsewhere has no business with.
        """
        path = self.path / name
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            if path.parent != self.path and not stat.S_ISDIR(os.lstat(path.parent).st_mode):
                self._fail(_GRAPHS, "this is not a folder, or a link to one, expected the folder itself")
            seen = os.lstat(path)
            if stat.S_ISLNK(seen.st_mode) or _is_reparse_point(seen):
                self._fail(name, "it is a symbolic link, expected the file itself; copy the folder with `cp -rL`")
            if not stat.S_ISREG(seen.st_mode):  # asked before opening, because opening a named pipe may wait
                self._fail(name, "this is not a file")
            if seen.st_nlink > 1:
                self._fail(name, f"it is a hard link, one of {seen.st_nlink} names of a file; copy the folder")
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            self._fail(name, "there is no such file; is the copy of the folder complete?")
        except (OSError, ValueError) as error:
            self._fail(name, f"it cannot be opened: {error}")
        identity = _identity(os.fstat(descriptor))
        if identity != _identity(seen) or self._identities.setdefault(name, identity) != identity:
            os.close(descriptor)
            self._fail(name, "it was changed while it was being opened; try again once nothing writes to it")
        if name != MANIFEST:
            want = self.files.get(name, {}).get("bytes")
            if want != seen.st_size:
                os.close(descriptor)
                found = f"{seen.st_size} bytes, expected {'no such file' if want is None else want} by {MANIFEST}"
                self._fail(name, f"found {found}; is the copy of the folder complete?")
        return descriptor, seen.st_size


def _place(tensor: Initializer) -> tuple[object, ...]:
    """Where a tensor lies in another file, and as what."""
    return (tensor.dtype, tensor.shape, tensor.location, tensor.offset) if tensor.location is not None else ()


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink)


def _is_reparse_point(found: os.stat_result) -> bool:
    """Whether this is what Windows has for links, of several kinds."""
    return bool(getattr(found, "st_file_attributes", 0) & getattr(stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0))


def _not_an_export(path: Path) -> str:
    what = f"found a folder without {MANIFEST}, expected one that `bezel export --format onnx` wrote"
    if not path.is_dir():
        return "there is no such folder"
    if any(path.glob("*.safetensors")):
        return f"this is a checkpoint, which bezel does not run as it is: first `bezel export {path} model.gguf`"
    if (path / "genai_config.json").exists():
        return f"{what}; this one was made for onnxruntime-genai"
    return what


def _show(value: object) -> str:
    return repr(value)[:100]
