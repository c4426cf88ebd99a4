"""From a checkpoint to one GGUF file: read some rows, quantize them on every core, write them in order."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...quant import lattice
from ...quant.formats import F32, FORMATS, Q4_0, Format
from ...quant.recipes import PRESETS, Choice, Recipe
from ...runtime.cache.store import LARGEST_HEAD
from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import atomic, check_new, check_output
from ...runtime.files.models import size_text
from ...runtime.model.config import ModelConfig
from ...runtime.model.families import FAMILIES
from ...runtime.model.families.gguf import read_gguf_config, write_gguf_config
from ...runtime.model.tensors import Kind, TensorSpec
from ...runtime.version import bezel_version
from ..hashes import background_hashes
from ..metadata import CALIBRATION, CALIBRATION_TEXT, described
from ..ordered import CHUNK_WEIGHTS, ordered
from ..recipe import find_recipe
from ..sources.checkpoint import Checkpoint, TensorSource
from ..summary import ExportSummary, of_vanished
from .header import TensorRecord, aligned, encode_header

# llama.cpp's `llama_ftype`, by preset or by the format of most matrices.
_FILE_TYPES = {form.name: form.file_type for form in FORMATS.values()} | {"q4_k_m": 15, "q5_k_m": 17}

_HASHES = "bezel.provenance.source_sha256"
_LOOKED_AT = 4  # rows of a matrix that say whether it lies on lattices


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


class Piece(NamedTuple):
    """Some rows of a tensor from `row` on in its format, uint8 (rows, row_bytes).

    So many of their weights `vanished`, and so many are `kept` exactly in Q4_0.
    """

    planned: PlannedTensor
    row: int
    blocks: NDArray[np.uint8]
    vanished: int
    kept: int


@dataclass(frozen=True)
class Layout:
    """A file that is to be written."""

    plan: Sequence[PlannedTensor]
    metadata: dict[str, Any]

    @cached_property
    def header_size(self) -> int:
        return len(self.header)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.header_size + data_size(self.plan)

    @property
    def header(self) -> bytes:
        """Everything before the data."""
        return encode_header(
            self.metadata, [TensorRecord(p.spec.gguf, p.spec.shape, p.format.gguf_type, p.offset) for p in self.plan]
        )

    @property
    def n_weights(self) -> int:
        return sum(p.n_weights for p in self.plan)

    @property
    def bits_per_weight(self) -> float:
        return sum(p.n_rows * p.row_bytes for p in self.plan) * 8 / self.n_weights


class Shaped(Protocol):
    """Blocks that a calibration has shaped."""

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        """The whole tensor (rows, row_bytes); None leaves it to the writer. Called in the order of the tensors."""


class Calibrated(Shaped, Protocol):
    """Those that a text has shaped."""

    method: str
    text_sha256: str
    tokens: int


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
    check_target(checkpoint, out, force)
    if isinstance(recipe, str):
        recipe = find_recipe(recipe, checkpoint.config, embedding)
    plan = plan_tensors(checkpoint.specs, recipe)
    metadata = _metadata(checkpoint, recipe, plan) | _calibration_metadata(calibrated)
    layout = Layout(plan, metadata)
    check_room(layout, out)
    with atomic(out) as file:
        vanished, kept = fill(file, checkpoint, layout, progress, calibrated)
    return replace(
        summary_of(layout, out, vanished, start),
        warnings=[
            *checkpoint.warnings,
            *checkpoint.added_losses({p.spec.gguf: p.format for p in plan}),
            *of_vanished(vanished),
            *_lattices_left(checkpoint, plan),
            *_warnings(checkpoint.config, metadata),
        ],
        kept_exactly=kept / max(1, sum(p.n_weights for p in plan if p.format is Q4_0)),
    )


def _lattices_left(checkpoint: Checkpoint, plan: Sequence[PlannedTensor]) -> Iterator[str]:
    """A line on what Q4_0 would have kept exactly, by a few rows of each matrix, where other blocks were asked for."""
    left: dict[type[Format], dict[str, None]] = {}
    for p in plan:
        if p.format.block == 1 or p.format in (Q4_0, checkpoint.format(p.spec)):
            continue
        middle = p.n_rows // 2
        rows = checkpoint.rows(p.spec, middle, min(middle + _LOOKED_AT, p.n_rows))
        if rows.any() and lattice.quantized(Q4_0, rows) is not None:
            left.setdefault(p.format, {})[p.spec.role] = None
    for form, roles in left.items():
        yield (
            f"{', '.join(roles)}: lies on lattices of 16 values, as training for q4_0 leaves it; {form.name} rounds "
            f"it, and q4_0 would keep it exactly{' (--embedding q4_0)' if list(roles) == ['token_embd'] else ''}"
        )


def check_room(layout: Layout, out: Path) -> None:
    """Raises InvalidRequest where the disk has no room for a file that is to be written."""
    free = shutil.disk_usage(out.parent).free
    if free < layout.size:
        raise InvalidRequest(
            f"{out.parent}: {size_text(free)} free, expected {size_text(layout.size)} for {out.name}; "
            "free some space or choose a smaller format"
        )


def summary_of(layout: Layout, out: Path, vanished: Mapping[str, int], start: float) -> ExportSummary:
    """What `fill` wrote, begun at `start` by the monotonic clock."""
    return ExportSummary(
        path=str(out),
        file_bytes=layout.size,
        weights=layout.n_weights,
        bits_per_weight=layout.bits_per_weight,
        formats=dict(Counter(p.format.name for p in layout.plan)),
        fallbacks=_fallbacks(layout.plan),
        warnings=of_vanished(vanished),
        seconds=time.monotonic() - start,
    )


def fill(
    file: BinaryIO,
    source: TensorSource,
    layout: Layout,
    progress: Callable[[int, int], None] | None = None,
    calibrated: Shaped | None = None,
) -> tuple[Counter[str], int]:
    """Write a whole GGUF file, with the hashes of the source's files where `provenance` left room for them.

    How many weights vanished of each tensor, and how many were kept exactly in Q4_0.
    """
    start, total = layout.header_size, layout.n_weights
    done, vanished, kept = 0, Counter[str](), 0
    with source.unchanged(), background_hashes(source.files) as hashes:
        for piece in _quantized(source, layout.plan, calibrated):
            vanished[piece.planned.spec.gguf] += piece.vanished
            kept += piece.kept
            file.seek(start + piece.planned.offset + piece.row * piece.planned.row_bytes)
            file.write(piece.blocks.data)
            done += len(piece.blocks) * piece.planned.spec.shape[-1]
            if progress:
                progress(done, total)
        file.truncate(layout.size)
        layout.metadata[_HASHES] = hashes()  # as long as the placeholders
        file.seek(0)
        file.write(layout.header)
    return vanished, kept


def plan_tensors(specs: Iterable[TensorSpec], recipe: Recipe) -> list[PlannedTensor]:
    """Format and offset of every tensor."""
    plan, offset = [], 0
    for spec in specs:
        choice = recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape)
        if spec.kind is Kind.EXACT:
            choice = Choice(F32, F32)
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
    plan = plan_tensors(checkpoint.specs, recipe)
    return Layout(plan, _metadata(checkpoint, recipe, plan)).size


def check_target(source: TensorSource, out: Path, force: bool) -> None:
    """Raises InvalidRequest where a GGUF file must not be written to `out`."""
    check_output(out)
    if out.exists() and any(out.samefile(file) for file in source.files):
        raise InvalidRequest(f"{out}: is part of the checkpoint that is exported; choose another name")
    check_new(out, force)
    if out.exists() and out.stat().st_size and not _is_gguf(out):
        raise InvalidRequest(f"{out}: is no GGUF file, which alone --force replaces; choose another name")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _quantized(source: TensorSource, plan: Sequence[PlannedTensor], calibrated: Shaped | None) -> Iterator[Piece]:
    """All rows, in the order of the plan."""

    def pieces() -> Iterator[tuple[PlannedTensor, slice, NDArray[np.uint8] | None]]:
        for planned in plan:
            whole = calibrated.blocks(planned.spec) if calibrated else None
            step = max(1, CHUNK_WEIGHTS // planned.spec.shape[-1])
            for start in range(0, planned.n_rows, step):
                yield planned, slice(start, min(start + step, planned.n_rows)), whole

    def quantize(piece: tuple[PlannedTensor, slice, NDArray[np.uint8] | None]) -> Piece:
        planned, rows, whole = piece
        what = planned.spec, rows.start, rows.stop, planned.format
        blocks = source.blocks(*what) if whole is None else whole[rows]
        kept = source.kept_exactly(*what, blocks) if planned.format is Q4_0 else 0
        return Piece(planned, rows.start, blocks, source.vanished(*what, blocks), kept)

    return ordered(quantize, pieces())


def _metadata(checkpoint: Checkpoint, recipe: Recipe, plan: Sequence[PlannedTensor]) -> dict[str, Any]:
    vocabulary = checkpoint.vocabulary()
    formats = {p.spec.role: p.format.name for p in plan}
    metadata: dict[str, Any] = {
        "general.architecture": checkpoint.config.family,
        **file_type(recipe, plan),
        **write_gguf_config(checkpoint.config),
        **vocabulary.to_gguf(),
    }
    if (end := vocabulary.turn_ids()[1]) is not None:
        metadata["tokenizer.ggml.eot_token_id"] = end
    return metadata | {
        **described(checkpoint),
        **provenance(checkpoint, recipe),
        "bezel.provenance.embedding_format": formats["token_embd"],
    }


def file_type(recipe: Recipe, plan: Sequence[PlannedTensor]) -> dict[str, Any]:
    """What a file is called by its formats."""
    commonest = Counter(p.format.name for p in plan if p.spec.is_matrix).most_common(1)[0][0]
    return {
        "general.file_type": _FILE_TYPES.get(recipe.name, _FILE_TYPES[commonest]),
        "general.quantization_version": 2,
    }


def provenance(source: TensorSource, recipe: Recipe) -> dict[str, Any]:
    """Where a file comes from; `fill` puts the hashes in."""
    return {
        "bezel.provenance.tool": f"bezel {bezel_version()}",
        "bezel.provenance.recipe": recipe.name,
        **({} if recipe.name in PRESETS else {"bezel.provenance.recipe_rules": json.dumps(recipe.to_json())}),
        "bezel.provenance.source_files": [file.name for file in source.files],
        _HASHES: ["0" * 64 for _ in source.files],
    }


def _calibration_metadata(calibrated: Calibrated | None) -> dict[str, Any]:
    if calibrated is None:
        return {}
    return {
        CALIBRATION: calibrated.method,
        CALIBRATION_TEXT: calibrated.text_sha256,
        f"{CALIBRATION}_tokens": calibrated.tokens,
    }


def _warnings(config: ModelConfig, metadata: Mapping[str, Any]) -> list[str]:
    """What the native engine cannot run, and what llama.cpp, which has no keys for it, would read differently."""
    standard = {key: value for key, value in metadata.items() if not key.startswith("bezel.")}
    tied_head = config.tied_head or not FAMILIES[config.family].unties
    theirs = read_gguf_config(standard, vocab_size=config.vocab_size, tied_head=tied_head, source="metadata")
    what = {
        "layers": "its own pattern of layer windows",
        "query_pre_attn_scalar": "its own query scale",
        "tied_head": "the embedding as the head, and refuses or ignores output.weight",
    }
    wide = max(layer.head_dim for layer in config.layers)
    native = (
        f"heads of {wide} numbers are too wide for the native engine ({LARGEST_HEAD}): the reference engine runs this"
    )
    return [native] * (wide > LARGEST_HEAD) + [
        f"llama.cpp reads this file with {what.get(field.name, field.name)}, so its output will differ"
        for field in fields(config)
        if getattr(theirs, field.name) != getattr(config, field.name)
    ]
