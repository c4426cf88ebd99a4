"""From a checkpoint or a GGUF file to an ONNX folder: graph, weights, config, tokenizer, provenance."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ...quant.formats import F16
from ...quant.integers import INTEGER_FORMS, as_integers
from ...runtime.errors import InvalidModelFile, InvalidRequest
from ...runtime.files.atomic import atomic_folder
from ...runtime.files.models import size_text
from ...runtime.files.onnx_folder import EMBEDDING, KV_STORAGE, MANIFEST, MODEL, VISION
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec
from ...runtime.version import bezel_version
from ..calibration.moments import read_text
from ..hashes import background_hashes
from ..ordered import CHUNK_WEIGHTS, ordered
from ..summary import ExportSummary, of_vanished
from .companions import DTYPES, companions
from .graph import Built, build_model
from .kv_scales import TOKENS, KVScales, kv_scales
from .seeing import build_embedding, build_eye
from .source import OnnxSource, Quantized
from .targets import TARGETS
from .weights import External, Storage

# What can be mapped at any offset that a system allows: Windows maps at multiples of 64 KiB.
_ALIGNMENT, _SMALL, _SMALL_ALIGNMENT = 1 << 16, 1 << 20, 64


def export_onnx(
    source: OnnxSource,
    out: str | Path,
    target: str = "onnxruntime",
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
    kv: str = "f32",
    kv_text: Path | None = None,
    sees: bool = True,
) -> ExportSummary:
    """Write `source` to the folder `out`; `force` replaces one that an earlier export wrote.

    Its eye comes along if it has one, the target takes one, and it `sees`; a warning says that one is left out.
    `target` is a key of TARGETS. `kv` is how keys and values are kept, a key of KV_STORAGE: "f32", or for "onnxruntime"
    "f16", or "int8", scaled for what the text in the file `kv_text` reaches. `progress` is called with (work done, work
    in all), which is counted in weights. The folder is whole or absent, also when `progress` raises, and the same
    source gives the same bytes. Raises InvalidRequest, InvalidCheckpoint, InvalidConfig and InvalidModelFile.
    """
    start, out = time.monotonic(), Path(out)
    if target not in TARGETS:
        raise InvalidRequest(f"target: found {target!r}, expected one of {', '.join(TARGETS)}")
    if kv not in KV_STORAGE or (kv != "f32" and target != "onnxruntime") or (kv == "int8") != (kv_text is not None):
        raise InvalidRequest(
            f"keys and values: found {kv!r} for the target {target!r}, expected 'f32', or for 'onnxruntime' 'f16', or "
            "'int8' with a text"
        )
    replaced = check_target(source, out, target, force)
    config = source.config
    eye = source.eye if sees and TARGETS[target].sees else None
    storage = storages(source)
    weights = _weights(source)
    total = weights + (0 if eye is None else _weights(eye))
    done, metadata = 0, dict(source.metadata)
    stored: str | Sequence[KVScales] = kv
    report = progress or (lambda *_: None)
    if kv_text is not None:
        text = read_text(source.checkpoint, kv_text, TOKENS)
        done, total = total // 2, total + total // 2  # it takes about half as long
        stored = kv_scales(source.checkpoint, text.sequences, lambda i, n: report(done * i // n, total))
        metadata["bezel.provenance.kv_text_sha256"] = text.sha256
    name, data = _names(target, storage)
    graph = graph_of(config, storage, target, data, stored, sees=eye is not None)
    written: list[tuple[str, Quantized, Graph]] = [(data, source, graph)]
    contents = companions(source, target, name, None if eye is None else eye.config) | {name: graph.message}
    if eye is not None:
        seeing = _serialized(f"{VISION}.data", build_eye(eye.config, storages(eye), TARGETS[target]))
        written.append((f"{VISION}.data", eye, seeing))
        contents |= {EMBEDDING: graph.messages[0], VISION: seeing.message}
    nbytes = sum(part.nbytes for _, _, part in written)
    free = shutil.disk_usage(out.resolve().parent).free
    if free < nbytes:
        raise InvalidRequest(f"{out.parent}: {size_text(free)} free, expected {size_text(nbytes)} for {out.name}")
    with atomic_folder(out) as part, source.checkpoint.unchanged(), background_hashes(source.files) as source_hashes:
        write_files(part, contents)
        vanished = []
        for file, tensors, of_file in written:
            lost = _write_data(part / file, tensors, of_file, partial(_told, report, done, total))
            vanished += of_vanished(lost)
            done += _weights(tensors)
        names = (name, data, *sorted(contents.keys() - {name}), *(file for file, _, _ in written[1:]))
        with background_hashes([part / name for name in names]) as hashes:
            files = {
                name: {"bytes": (part / name).stat().st_size, "sha256": digest}
                for name, digest in zip(names, hashes(), strict=True)
            }
        metadata |= {
            "bezel.provenance.tool": f"bezel {bezel_version()}",
            "bezel.provenance.recipe": source.quant,
            "bezel.provenance.source_files": [file.name for file in source.files],
            "bezel.provenance.source_sha256": source_hashes(),
        }
        manifest = {
            "bezel_onnx": 2,
            "metadata": metadata,
            "quant": source.quant,
            "target": target,
            "graph": name,
            "kv": KV_STORAGE[kv],
            "formats": {spec.gguf: tensors.format(spec).name for _, tensors, _ in written for spec in tensors.specs},
            "files": files,
        }
        if eye is not None:
            manifest["vision"] = eye.quant
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sizes = {name: (part / name).stat().st_size for name in (*names, MANIFEST)}
    warnings = [*replaced, *source.warnings, *vanished]
    if source.eye is not None and eye is None:
        able = " and ".join(name for name, one in TARGETS.items() if one.sees)
        warnings.append(f"pictures are left out: only the targets {able} take a vision tower")
    elif eye is not None and kv == "int8":
        warnings.append(
            "keys and values of pictures are kept in the ranges that the text reached, which they may go beyond; "
            "--kv f16 has room for all"
        )
    seconds = time.monotonic() - start
    summary = _summary(out, sum(sizes.values()), source, graph, warnings, seconds)
    if eye is None:
        return summary
    size = sizes[VISION] + sizes[f"{VISION}.data"]
    return replace(summary, vision=_summary(out / VISION, size, eye, seeing, [], seconds))


def _summary(
    path: Path, file_bytes: int, source: Quantized, graph: Graph, warnings: list[str], seconds: float
) -> ExportSummary:
    weights, storage = _weights(source), storages(source)
    return ExportSummary(
        path=str(path),
        file_bytes=file_bytes,
        weights=weights,
        bits_per_weight=sum(tensor.nbytes for tensor in graph.tensors) * 8 / weights,
        formats=dict(Counter(_describe(storage[spec.gguf]) for spec in source.specs)),
        fallbacks=[],
        warnings=warnings,
        seconds=seconds,
    )


def _told(report: Callable[[int, int], object], before: int, total: int, done: int) -> None:
    report(before + done, total)


def _weights(source: Quantized) -> int:
    return sum(math.prod(spec.shape) for spec in source.specs)


@dataclass(frozen=True)
class Graph:
    """Serialised graphs, and the tensors of their external data, which is `nbytes` long, with their `offsets` in it."""

    messages: Sequence[bytes]
    tensors: list[External]
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def message(self) -> bytes:
        """The last."""
        return self.messages[-1]


def graph_of(
    config: ModelConfig,
    storage: Mapping[str, Storage],
    target: str,
    data: str,
    kv: str | Sequence[KVScales] = "f32",
    sees: bool = False,
) -> Graph:
    """The graph whose weights are in the file `data`; see `build_model`. That of the embedding before, if it `sees`."""
    model = build_model(config, storage, TARGETS[target], kv, sees)
    if not sees:
        return _serialized(data, model)
    return _serialized(data, build_embedding(config, storage, TARGETS[target]), model)


def _serialized(data: str, *models: Built) -> Graph:
    """Models whose weights are in the file `data`, each of them once."""
    tensors = list({tensor.name: tensor for _, needed in models for tensor in needed}.values())
    offsets, size = _layout(tensors)
    for model, needed in models:
        for tensor in needed:
            model.graph.initializer.append(_initializer(tensor, Path(data).name, offsets[tensor.name]))
    return Graph([model.SerializeToString(deterministic=True) for model, _ in models], tensors, offsets, size)


def storages(source: Quantized) -> dict[str, Storage]:
    """How each tensor of the source is stored, by its name in GGUF."""
    return {spec.gguf: _storage(source, spec) for spec in source.specs}


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _storage(source: Quantized, spec: TensorSpec) -> Storage:
    form = INTEGER_FORMS.get(source.format(spec))
    if form is None:
        return Storage(16 if source.format(spec) is F16 else 32)
    return Storage(form.bits, form.block)


def _names(target: str, storage: Mapping[str, Storage]) -> tuple[str, str]:
    """The files of the graph and of its weights."""
    if not TARGETS[target].batches:
        return MODEL, f"{MODEL}.data"
    (bits, _), *_ = Counter(form.bits for name, form in storage.items() if "norm" not in name).most_common()
    graph = f"onnx/{DTYPES[bits][0]}.onnx"  # where transformers.js looks for graphs
    return graph, f"{graph}_data"


def _describe(storage: Storage) -> str:
    return f"float{storage.bits}" if storage.block is None else f"int{storage.bits}, blocks of {storage.block}"


def _layout(tensors: list[External]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and how long the file is."""
    offsets, end = {}, 0
    for tensor in tensors:
        step = _ALIGNMENT if tensor.nbytes >= _SMALL else _SMALL_ALIGNMENT
        offsets[tensor.name] = -(-end // step) * step
        end = offsets[tensor.name] + tensor.nbytes
    return offsets, end


def _initializer(tensor: External, location: str, offset: int) -> TensorProto:
    proto = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", tensor.nbytes)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)
    return proto


def _write_data(
    path: Path,
    source: Quantized,
    graph: Graph,
    progress: Callable[[int], None],
) -> Counter[str]:
    """Write the external data; how many weights of each of the model's tensors are too small for their format."""
    done, vanished = 0, Counter[str]()
    with path.open("wb") as file:
        file.truncate(graph.nbytes)
        for tensor, first, data, lost in _converted(source, graph.tensors):
            vanished[tensor.spec.gguf] += lost
            file.seek(graph.offsets[tensor.name] + first * data.shape[1])
            file.write(data.data)
            if tensor.part != "scales":
                done += len(data) * tensor.spec.shape[-1]
                progress(done)
    return vanished


Converted = tuple[External, int, NDArray[np.uint8], int]


def _converted(source: Quantized, tensors: list[External]) -> Iterator[Converted]:
    """(tensor, first row of the weight, bytes laid out as the tensor has them, in rows, weights that vanished)."""
    parts: dict[str, list[External]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.spec.gguf, []).append(tensor)

    def jobs() -> Iterator[tuple[list[External], int, int]]:
        for group in parts.values():
            spec = group[0].spec
            n_rows = math.prod(spec.shape[:-1])
            step = max(1, CHUNK_WEIGHTS // spec.shape[-1])
            for start in range(0, n_rows, step):
                yield group, start, min(start + step, n_rows)

    def convert(job: tuple[list[External], int, int]) -> list[Converted]:
        group, start, stop = job
        spec = group[0].spec
        (data, vanished), format_ = source.blocks(spec, start, stop), source.format(spec)
        if group[0].part == "weights":
            return [(group[0], start, np.ascontiguousarray(data), vanished)]
        try:
            codes, scales = as_integers(format_, data)
        except ValueError as error:
            raise InvalidModelFile(source.path, f"tensor '{spec.gguf}': {error}") from None
        return [
            (t, start, _laid_out(t, codes), vanished) if t.part == "codes" else (t, start, _laid_out(t, scales), 0)
            for t in group
        ]

    for converted in ordered(convert, jobs()):
        yield from converted


def _laid_out(tensor: External, rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes (rows, n) or scales (rows, n / block) as the bytes of `tensor`, uint8 (its rows, bytes)."""
    if tensor.part == "codes":
        rows = rows.view(np.uint8) + np.uint8(1 << (tensor.storage.bits - 1))
        if tensor.storage.bits == 4:
            rows = rows[:, ::2] | rows[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(rows).view(np.uint8)


def check_target(source: OnnxSource, out: Path, target: str, force: bool) -> list[str]:
    """What should be said of an earlier export in the folder `out`, which one for `target` is about to replace.

    Raises InvalidRequest for a folder that no export may be written to, or replace.
    """
    if not out.resolve().parent.is_dir():
        raise InvalidRequest(f"{out.parent}: no such folder; create it first")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InvalidRequest(f"{out}: is not a folder; an ONNX export is one, so choose another name")
    if not out.exists() or not any(out.iterdir()):
        return []
    if any(out.resolve() in file.resolve().parents for file in source.files):
        raise InvalidRequest(f"{out}: holds what is exported; choose another name")
    if not (out / MANIFEST).exists():
        raise InvalidRequest(f"{out}: holds other files, expected no folder, an empty one or an earlier export")
    before, written = _written(out / MANIFEST)
    ours = {MANIFEST, *written}
    foreign = sorted(name for path in out.rglob("*") if (name := path.relative_to(out).as_posix()) not in ours)
    if foreign:
        raise InvalidRequest(f"{out}: holds {foreign[0]!r}, which no export wrote; move it, or choose another name")
    if not force:
        raise InvalidRequest(f"{out}: exists already; choose another name, or replace it with --force")
    if before in (target, None):
        return []
    return [f"{out}: held an export for the target {str(before)[:40]}, whose place one for {target} has taken"]


def _written(manifest: Path) -> tuple[object, set[str]]:
    """The target of an earlier export, None where it is not said; the files that it wrote, and the folders of these."""
    try:
        found = json.loads(manifest.read_bytes())
        names = [name for name in found["files"] if isinstance(name, str)]
        target = "web" if "bezel_page" in found else found.get("target")
    except (OSError, ValueError, LookupError, TypeError):
        raise InvalidRequest(f"{manifest}: is not what an export wrote; move it, or choose another name") from None
    return target, {*names, *(name.rpartition("/")[0] for name in names)}
