"""From a checkpoint to one GGUF file: read some rows, quantize them on every core, write them in order."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import EVEN, FORMATS, Format
from ...quant.recipes import PRESETS, Recipe
from ...runtime.errors import InvalidCheckpoint, InvalidRequest
from ...runtime.files.atomic import atomic
from ...runtime.model.config import ModelConfig
from ...runtime.model.families.gguf import read_gguf_config, write_gguf_config
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ...runtime.text.tokenizer import END_OF_TURN, Vocabulary
from ..recipe import find_recipe
from ..sources.checkpoint import Checkpoint
from .header import TensorRecord, aligned, encode_header
from .receipt import PLACEHOLDERS

CALIBRATION = "bezel.provenance.calibration"  # the key of a calibrated file; others begin with it
CHUNK_WEIGHTS = 1 << 18  # 1 MiB of float32: a chunk and its temporaries stay in a core's cache

# llama.cpp's `llama_ftype`, by preset or by the format of most matrices.
_FILE_TYPES = {form.name: form.file_type for form in FORMATS.values()} | {"q4_k_m": 15, "q5_k_m": 17}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor's format, the one that the recipe would rather have given it, and its place in the data."""

    spec: TensorSpec
    format: type[Format]
    wanted: type[Format]
    offset: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.spec.shape[:-1])

    @property
    def n_weights(self) -> int:
        return math.prod(self.spec.shape)

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.spec.shape[-1])


class Calibrated(Protocol):
    """Blocks that a calibration text has shaped. `calibrated.py` has two ways of making them."""

    method: str
    text_sha256: str
    tokens: int

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        """The whole tensor (rows, row_bytes); None leaves it to the writer. Called in the order of the tensors."""


@dataclass(frozen=True)
class ExportSummary:
    """What was written. `formats` counts tensors, `fallbacks` names the roles of those that could not have theirs."""

    path: str
    file_bytes: int
    weights: int
    bits_per_weight: float
    formats: dict[str, int]
    fallbacks: list[str]
    warnings: list[str]
    seconds: float


def export_gguf(
    checkpoint: Checkpoint,
    out: str | Path,
    recipe: str | Recipe,
    embedding: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
    calibrated: Calibrated | None = None,
) -> ExportSummary:
    """Write `checkpoint` to the GGUF file `out`, quantized by `recipe`; `force` replaces a file that exists.

    `recipe` may be a preset or the path of a recipe file, too. `embedding` is the format of embedding and head where
    the preset's is not wanted. `progress` is called with (weights done, weights in all). `calibrated` rounds the
    matrices for the inputs that they get. The file is whole or absent, also when `progress` raises, and the same source
    gives the same bytes. Raises InvalidRequest and InvalidCheckpoint.
    """
    start, out = time.monotonic(), Path(out)
    _check_target(checkpoint, out, force)
    if isinstance(recipe, str):
        recipe = find_recipe(recipe, checkpoint.config, embedding)
    plan = plan_tensors(checkpoint.config, recipe)
    records = [TensorRecord(p.spec.gguf, p.spec.shape, p.format.gguf_type, p.offset) for p in plan]
    metadata = _metadata(checkpoint, recipe, plan) | _calibration_metadata(calibrated)
    header = encode_header(metadata, records)
    size = len(header) + data_size(plan)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise InvalidRequest(
            f"{out.parent}: {free / 1e9:.2f} GB free, expected {size / 1e9:.2f} GB for {out.name}; "
            "free some space or choose a smaller format"
        )

    done, total = 0, sum(p.n_weights for p in plan)
    with atomic(out) as file, background_hashes(checkpoint.files) as hashes:
        for planned, row, block in _quantized(checkpoint, plan, calibrated):
            file.seek(len(header) + planned.offset + row * planned.row_bytes)
            file.write(block.data)
            done += len(block) * planned.spec.shape[-1]
            if progress:
                progress(done, total)
        file.truncate(size)
        metadata["bezel.provenance.source_sha256"] = hashes()  # as long as the placeholders
        file.seek(0)
        file.write(encode_header(metadata, records))
    return ExportSummary(
        path=str(out),
        file_bytes=size,
        weights=total,
        bits_per_weight=sum(p.n_rows * p.row_bytes for p in plan) * 8 / total,
        formats=dict(Counter(p.format.name for p in plan)),
        fallbacks=_fallbacks(plan),
        warnings=[*checkpoint.warnings, *_warnings(checkpoint.config, metadata)],
        seconds=time.monotonic() - start,
    )


def plan_tensors(config: ModelConfig, recipe: Recipe) -> list[PlannedTensor]:
    """Format and offset of every tensor."""
    plan, offset = [], 0
    for spec in tensor_specs(config):
        choice = recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape)
        plan.append(PlannedTensor(spec, choice.format, choice.wanted, offset))
        offset += aligned(plan[-1].n_rows * plan[-1].row_bytes)
    return plan


def _fallbacks(plan: Sequence[PlannedTensor]) -> list[str]:
    """A line for each format that took another's place, and length of rows."""
    roles: dict[tuple[type[Format], type[Format], int], dict[str, None]] = {}
    for p in plan:
        if p.format is not p.wanted:
            roles.setdefault((p.format, p.wanted, p.spec.shape[-1]), {})[p.spec.role] = None
    return [
        f"{', '.join(found)}: {form.name} instead of {wanted.name}, because rows of {n} are not a multiple of "
        f"{wanted.block}"
        for (form, wanted, n), found in roles.items()
    ]


def data_size(plan: Sequence[PlannedTensor]) -> int:
    """Bytes of a file's tensors, with what lies between them."""
    return plan[-1].offset + aligned(plan[-1].n_rows * plan[-1].row_bytes)


def file_size(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of the file that `export_gguf` would write."""
    plan = plan_tensors(checkpoint.config, recipe)
    records = [TensorRecord(p.spec.gguf, p.spec.shape, p.format.gguf_type, p.offset) for p in plan]
    return len(encode_header(_metadata(checkpoint, recipe, plan), records)) + data_size(plan)


def _check_target(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise InvalidRequest(f"{out.parent}: no such folder; create it first")
    if out.is_dir():
        raise InvalidRequest(f"{out}: is a folder, expected the name of a file")
    if out.exists() and any(out.samefile(file) for file in checkpoint.files):
        raise InvalidRequest(f"{out}: is part of the checkpoint that is exported; choose another name")
    if out.exists() and not force:
        raise InvalidRequest(f"{out}: exists already; choose another name, or replace it with --force")


def _quantized(
    checkpoint: Checkpoint, plan: Sequence[PlannedTensor], calibrated: Calibrated | None
) -> Iterator[tuple[PlannedTensor, int, NDArray[np.uint8]]]:
    """(tensor, first row, quantized rows) in order; a few chunks are in hand at a time."""

    def quantize(planned: PlannedTensor, start: int, stop: int) -> NDArray[np.uint8]:
        rows = checkpoint.rows(planned.spec, start, stop)
        try:
            return planned.format.quantize(rows, EVEN)
        except ValueError as error:
            raise InvalidCheckpoint(f"{checkpoint.path}: tensor '{planned.spec.hf}': {error}") from None

    workers = os.cpu_count() or 1
    pending: deque[tuple[PlannedTensor, int, Future[NDArray[np.uint8]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for planned in plan:
            whole = calibrated.blocks(planned.spec) if calibrated else None
            if whole is not None:
                while pending:
                    done, row, block = pending.popleft()
                    yield done, row, block.result()
                yield planned, 0, whole
                continue
            step = max(1, CHUNK_WEIGHTS // planned.spec.shape[-1])
            for start in range(0, planned.n_rows, step):
                stop = min(start + step, planned.n_rows)
                pending.append((planned, start, pool.submit(quantize, planned, start, stop)))
                if len(pending) > 2 * workers:
                    done, row, block = pending.popleft()
                    yield done, row, block.result()
        while pending:
            done, row, block = pending.popleft()
            yield done, row, block.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def background_hashes(files: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """SHA-256 of each file, computed by a thread of its own while the tensors are quantized."""
    stop = threading.Event()

    def sha256(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not stop.is_set() and (block := file.read(1 << 20)):
                digest.update(block)
        return digest.hexdigest()

    pool = ThreadPoolExecutor(1)
    futures = [pool.submit(sha256, file) for file in files]
    try:
        yield lambda: [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _metadata(checkpoint: Checkpoint, recipe: Recipe, plan: Sequence[PlannedTensor]) -> dict[str, Any]:
    vocabulary = checkpoint.vocabulary()
    formats = {p.spec.role: p.format.name for p in plan}
    commonest = Counter(p.format.name for p in plan if p.spec.is_matrix).most_common(1)[0][0]
    metadata: dict[str, Any] = {
        "general.architecture": checkpoint.config.family,
        "general.name": checkpoint.name,
        "general.file_type": _FILE_TYPES.get(recipe.name, _FILE_TYPES[commonest]),
        "general.quantization_version": 2,
        **write_gguf_config(checkpoint.config),
        **vocabulary.to_gguf(),
    }
    if END_OF_TURN in vocabulary.pieces:
        metadata["tokenizer.ggml.eot_token_id"] = vocabulary.pieces.index(END_OF_TURN)
    if checkpoint.chat_template is not None:
        metadata["tokenizer.chat_template"] = checkpoint.chat_template
    return metadata | {
        **generation_metadata(checkpoint, vocabulary),
        "bezel.provenance.tool": f"bezel {tool_version()}",
        "bezel.provenance.recipe": recipe.name,
        **({} if recipe.name in PRESETS else {"bezel.provenance.recipe_rules": json.dumps(recipe.to_json())}),
        "bezel.provenance.embedding_format": formats["token_embd"],
        "bezel.provenance.source_files": [file.name for file in checkpoint.files],
        "bezel.provenance.source_sha256": ["0" * 64 for _ in checkpoint.files],
        **PLACEHOLDERS,
    }


def _calibration_metadata(calibrated: Calibrated | None) -> dict[str, Any]:
    if calibrated is None:
        return {}
    return {
        CALIBRATION: calibrated.method,
        f"{CALIBRATION}_text_sha256": calibrated.text_sha256,
        f"{CALIBRATION}_tokens": calibrated.tokens,
    }


def generation_metadata(checkpoint: Checkpoint, vocabulary: Vocabulary) -> dict[str, Any]:
    """The defaults that the checkpoint gives for sampling, and every token that ends a turn."""
    config = checkpoint.generation_config

    def fail(key: str, want: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"{checkpoint.path}: generation config: key '{key}': found {str(config[key])[:80]}, expected {want}"
        )

    out: dict[str, Any] = {}
    for key, gguf_key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p")):
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1 << 31:
            raise fail(key, "a number ≥ 0")
        out[f"general.sampling.{gguf_key}"] = int(value) if key == "top_k" else float(value)

    stops = config.get("eos_token_id")
    if stops is not None:
        stops = stops if isinstance(stops, list) else [stops]
        if not stops or not all(type(i) is int and 0 <= i < len(vocabulary.pieces) for i in stops):
            raise fail("eos_token_id", f"token ids below {len(vocabulary.pieces)}")
        out["bezel.generation.stop_token_ids"] = stops
    return out


def _warnings(config: ModelConfig, metadata: Mapping[str, Any]) -> list[str]:
    """What llama.cpp, which has no keys for it, would read differently from bezel."""
    standard = {key: value for key, value in metadata.items() if not key.startswith("bezel.")}
    theirs = read_gguf_config(standard, vocab_size=config.vocab_size, tied_head=True, source="metadata")
    what = {
        "layers": "its own pattern of layer windows",
        "query_pre_attn_scalar": "its own query scale",
        "tied_head": "the embedding as the head, and refuses or ignores output.weight",
    }
    return [
        f"llama.cpp reads this file with {what.get(field.name, field.name)}, so its output will differ"
        for field in fields(config)
        if getattr(theirs, field.name) != getattr(config, field.name)
    ]


def tool_version() -> str:
    try:
        return version("bezel-lm")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
