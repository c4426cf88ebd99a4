"""A page with a model in it, for any server of files: the graph, the tokenizer, the chat page, and what runs them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import atomic_folder
from ...runtime.files.onnx_folder import MANIFEST, MODEL, OnnxFolder
from ...runtime.model.config import LayerConfig
from ...runtime.text.sampling import read_sampling
from ...runtime.text.vocabulary import END_OF_TURN, START_OF_TURN
from ..summary import ExportSummary
from .companions import stop_ids
from .earlier import check_target
from .npm import PACKAGES, package_files
from .source import OnnxSource
from .weights import Storage
from .writer import export_onnx, graph_of, storages, write_files

_CHAT_PAGE = "bezel.runtime.serve"
_NO_FETCHING = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
)
_LOADED = (MODEL, f"{MODEL}.data", "tokenizer.json", "tokenizer_config.json")  # in the order that worker.js has
_LARGEST = 2 << 30  # bytes of a graph's weights: WebAssembly has 4 GB for them, and for all else
_FLOAT_GRAPH, _FLOAT_DATA = "float.onnx", "float.data"
_CONTEXT = 32768  # tokens; a browser has no more memory for keys and values


def export_page(
    source: OnnxSource, out: Path, progress: Callable[[int, int], None] | None = None, force: bool = False
) -> ExportSummary:
    """Write a page that chats with `source` to the folder `out`; `force` replaces one that an earlier export wrote.

    The model is in `model/`, as the target "portable" has it. Whole or absent. Raises what `export_onnx` raises, and
    InvalidRequest for a model that is too large for browsers.
    """
    replaced = check_target(source, out, "web", force)
    contents = _page() | {place: file for package in PACKAGES for place, file in package_files(package).items()}
    with atomic_folder(out) as part:
        summary = export_onnx(source, part / "model", "portable", progress, sees=False)
        for name in _LOADED:
            if (size := (part / "model" / name).stat().st_size) > _LARGEST:
                raise InvalidRequest(f"{source.path}: {name} would have {size / 1e9:.1f} GB, and a browser runs 2 GB")
        about = _about(source, part / "model")
        if (floats := _floats(source, part / "model")) is not None:
            contents[f"model/{_FLOAT_GRAPH}"] = floats[0]
            about["floats"] = floats[1]
        contents["page/about.json"] = json.dumps(about, ensure_ascii=False).encode()
        contents["service-worker.js"] = contents["service-worker.js"].replace(
            b"bezel VERSION", b"bezel " + _version(part / "model", contents).encode()
        )
        manifest = json.loads((part / "model" / MANIFEST).read_bytes())["files"]
        listed = {f"model/{name}": entry for name, entry in manifest.items()}
        listed |= {name: _entry(content) for name, content in contents.items()}
        listed[f"model/{MANIFEST}"] = _entry((part / "model" / MANIFEST).read_bytes())
        contents[MANIFEST] = (json.dumps({"bezel_page": 1, "files": listed}, indent=2) + "\n").encode()
        write_files(part, contents)
        file_bytes = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    return replace(summary, path=str(out), file_bytes=file_bytes, warnings=[*replaced, *summary.warnings])


def _page() -> dict[str, bytes]:
    """The chat page of `bezel serve`, which asks a worker here where it asks a server there."""
    found = {
        f"page/{file.name}": file.read_bytes()
        for folder in (files(_CHAT_PAGE).joinpath("page"), files(__package__).joinpath("page"))
        for file in folder.iterdir()
        if file.is_file()
    }
    found["service-worker.js"] = found.pop("page/service-worker.js")  # it serves what lies beside and below it
    rule = f'<meta http-equiv="Content-Security-Policy" content="{_NO_FETCHING}">\n<title>'
    found["index.html"] = found.pop("page/index.html").replace(b"<title>", rule.encode(), 1)
    return found


def _about(source: OnnxSource, model: Path) -> dict[str, Any]:
    """What the page has to know of the model."""
    vocabulary, config = source.vocabulary(), source.config
    turns = [vocabulary.pieces.find(piece) for piece in (START_OF_TURN, END_OF_TURN)]
    chats = "tokenizer.chat_template" in source.metadata and None not in turns
    windows = [layer.window or 0 for layer in config.layers]
    return {
        "name": source.metadata["general.name"],
        "context": min(config.context_length, _CONTEXT),
        "bos": vocabulary.bos_id,
        "stops": stop_ids(source, vocabulary),
        "turns": turns if chats else None,
        "sampling": read_sampling(source.metadata)[0],
        "window": max(windows),
        "layers": [_layer(layer) for layer in config.layers],
        "files": [{"name": name, "bytes": (model / name).stat().st_size} for name in _LOADED],
    }


def _floats(source: OnnxSource, model: Path) -> tuple[bytes, dict[str, Any]] | None:
    """The graph of the same model in float32, and of what in `model.onnx.data` each of its tensors is made.

    Without a GPU, browsers multiply float32 ten times as fast as they multiply int4 and int8, so the page unpacks the
    weights when it loads them. None for models that would take too much memory then, or hold float16.
    """
    stored = storages(source)
    graph = graph_of(source.config, dict.fromkeys(stored, Storage(32)), "portable", _FLOAT_DATA)
    if graph.nbytes > _LARGEST or any(storage.bits == 16 for storage in stored.values()):
        return None
    tensors = []
    with OnnxFolder(model) as packed:
        for tensor in graph.tensors:
            storage, name = stored[tensor.name], tensor.name
            parts = [f"{name}.codes", f"{name}.scales"] if storage.block else [name]
            places = [packed.initializers[part].offset for part in parts]
            tensors.append([graph.offsets[name], math.prod(tensor.shape), storage.bits, storage.block or 0, *places])
    files = {"name": _FLOAT_GRAPH, "bytes": len(graph.message)}
    return graph.message, {"graph": files, "data": _FLOAT_DATA, "bytes": graph.nbytes, "tensors": tensors}


def _layer(layer: LayerConfig) -> dict[str, Any]:
    return {"global": layer.window is None, "heads": layer.n_kv_heads, "size": layer.head_dim}


def _version(model: Path, contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256((model / MANIFEST).read_bytes())
    for name in sorted(contents):
        digest.update(contents[name])
    return digest.hexdigest()[:16]


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
