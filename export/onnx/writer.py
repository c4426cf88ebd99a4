"""From a checkpoint or a GGUF file to an ONNX folder: graph, weights, config, tokenizer, provenance."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...quant.formats import F16
from ...quant.integers import INTEGER_FORMS
from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import atomic_folder
from ...runtime.files.models import size_text
from ...runtime.files.onnx_folder import EMBEDDING, KV_STORAGE, MANIFEST, MODEL, VISION
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import TensorSpec
from ...runtime.version import bezel_version
from ..calibration.moments import read_text
from ..hashes import background_hashes
from ..summary import ExportSummary, of_vanished
from .companions import DTYPES, companions
from .earlier import check_target
from .external_data import Graph, serialized, write_data
from .graph import build_model
from .kv_scales import TOKENS, KVScales, kv_scales
from .seeing import build_embedding, build_eye
from .source import EyeSource, OnnxSource, Quantized
from .targets import TARGETS
from .weights import Storage


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
    _check_asked(target, kv, kv_text)
    replaced = check_target(source, out, target, force)
    eye = source.eye if sees and TARGETS[target].sees else None
    report, before = progress or (lambda *_: None), 0
    total = _weights(source) + (0 if eye is None else _weights(eye))
    stored: str | Sequence[KVScales] = kv
    metadata = dict(source.metadata)
    if kv_text is not None:
        text = read_text(source.checkpoint, kv_text, TOKENS)
        before, total = total // 2, total + total // 2  # it takes about half as long
        stored = kv_scales(source.checkpoint, text.sequences, lambda i, n: report(before * i // n, total))
        metadata["bezel.provenance.kv_text_sha256"] = text.sha256
    plan = _planned(source, eye, target, stored)
    _check_room(out, plan)
    with atomic_folder(out) as part, source.checkpoint.unchanged(), background_hashes(source.files) as source_hashes:
        write_files(part, plan.contents)
        lost = _write_weights(part, plan, lambda done: report(before + done, total))
        files = _listed(part, plan)
        manifest = {
            "bezel_onnx": 2,
            "metadata": metadata | _provenance(source, source_hashes()),
            "quant": source.quant,
            "target": target,
            "graph": plan.graph,
            "kv": KV_STORAGE[kv],
            "formats": plan.formats,
            "files": files,
        }
        if eye is not None:
            manifest["vision"] = eye.quant
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sizes = {name: (part / name).stat().st_size for name in (*files, MANIFEST)}
    warnings = [*replaced, *source.warnings, *lost, *_eye_warnings(source, eye, kv)]
    seconds = time.monotonic() - start
    model, *others = plan.parts
    summary = _summary(out, sum(sizes.values()), model, warnings, seconds)
    if not others:
        return summary
    size = sizes[VISION] + sizes[others[0].file]
    return replace(summary, vision=_summary(out / VISION, size, others[0], [], seconds))


def _check_asked(target: str, kv: str, kv_text: Path | None) -> None:
    """Raises InvalidRequest for a target that is none, or does not keep keys and values so."""
    if target not in TARGETS:
        raise InvalidRequest(f"target: found {target!r}, expected one of {', '.join(TARGETS)}")
    if kv not in KV_STORAGE or (kv != "f32" and target != "onnxruntime") or (kv == "int8") != (kv_text is not None):
        raise InvalidRequest(
            f"keys and values: found {kv!r} for the target {target!r}, expected 'f32', or for 'onnxruntime' 'f16', or "
            "'int8' with a text"
        )


@dataclass(frozen=True)
class _Part:
    """Graphs, and the `file` of their weights, which are those of `tensors`."""

    file: str
    tensors: Quantized
    graph: Graph


@dataclass(frozen=True)
class _Plan:
    """What is to be written: `contents` by the names of their files, among them the model's `graph`; and the weights of
    `parts`, the model's first.
    """

    graph: str
    contents: Mapping[str, bytes]
    parts: Sequence[_Part]

    @property
    def names(self) -> list[str]:
        """The files, as the manifest lists them."""
        model, *others = (part.file for part in self.parts)
        return [self.graph, model, *sorted(self.contents.keys() - {self.graph}), *others]

    @property
    def formats(self) -> dict[str, str]:
        """The name of each tensor's format, by its name in GGUF."""
        return {spec.gguf: part.tensors.format(spec).name for part in self.parts for spec in part.tensors.specs}


def _planned(source: OnnxSource, eye: EyeSource | None, target: str, kv: str | Sequence[KVScales]) -> _Plan:
    storage = storages(source)
    name, data = _names(target, storage)
    graph = graph_of(source.config, storage, target, data, kv, sees=eye is not None)
    contents = companions(source, target, name, None if eye is None else eye.config) | {name: graph.message}
    parts = [_Part(data, source, graph)]
    if eye is not None:
        file = f"{VISION}.data"
        seeing = serialized(file, build_eye(eye.config, storages(eye), TARGETS[target]))
        parts.append(_Part(file, eye, seeing))
        contents |= {EMBEDDING: graph.messages[0], VISION: seeing.message}
    return _Plan(name, contents, parts)


def _check_room(out: Path, plan: _Plan) -> None:
    """Raises InvalidRequest where the weights do not fit onto the disk."""
    nbytes = sum(part.graph.nbytes for part in plan.parts)
    free = shutil.disk_usage(out.resolve().parent).free
    if free < nbytes:
        raise InvalidRequest(f"{out.parent}: {size_text(free)} free, expected {size_text(nbytes)} for {out.name}")


def _write_weights(folder: Path, plan: _Plan, progress: Callable[[int], None]) -> list[str]:
    """Write the weights of all parts; warnings about those that vanished. `progress` is called with weights done."""
    done, warnings = 0, list[str]()
    for part in plan.parts:
        lost = write_data(folder / part.file, part.tensors, part.graph, partial(_told, progress, done))
        warnings += of_vanished(lost)
        done += _weights(part.tensors)
    return warnings


def _told(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def _listed(folder: Path, plan: _Plan) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, by name."""
    with background_hashes([folder / name for name in plan.names]) as hashes:
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(plan.names, hashes(), strict=True)
        }


def _provenance(source: OnnxSource, source_hashes: Sequence[str]) -> dict[str, Any]:
    return {
        "bezel.provenance.tool": f"bezel {bezel_version()}",
        "bezel.provenance.recipe": source.quant,
        "bezel.provenance.source_files": [file.name for file in source.files],
        "bezel.provenance.source_sha256": source_hashes,
    }


def _eye_warnings(source: OnnxSource, eye: EyeSource | None, kv: str) -> list[str]:
    """What there is to say of an eye that is left out, or whose pictures may not fit."""
    if source.eye is not None and eye is None:
        able = " and ".join(name for name, one in TARGETS.items() if one.sees)
        return [f"pictures are left out: only the targets {able} take a vision tower"]
    if eye is not None and kv == "int8":
        return [
            "keys and values of pictures are kept in the ranges that the text reached, which they may go beyond; "
            "--kv f16 has room for all"
        ]
    return []


def _summary(path: Path, file_bytes: int, part: _Part, warnings: list[str], seconds: float) -> ExportSummary:
    weights, storage = _weights(part.tensors), storages(part.tensors)
    return ExportSummary(
        path=str(path),
        file_bytes=file_bytes,
        weights=weights,
        bits_per_weight=sum(tensor.nbytes for tensor in part.graph.tensors) * 8 / weights,
        formats=dict(Counter(_describe(storage[spec.gguf]) for spec in part.tensors.specs)),
        fallbacks=[],
        warnings=warnings,
        seconds=seconds,
    )


def _weights(source: Quantized) -> int:
    return sum(math.prod(spec.shape) for spec in source.specs)


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
        return serialized(data, model)
    return serialized(data, build_embedding(config, storage, TARGETS[target]), model)


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
