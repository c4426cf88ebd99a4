"""Lazy reader of what is exported: a Hugging Face folder, or a GGUF file.

A tensor is read when it is asked for, by rows, with positioned reads instead of a map, so that reading a
checkpoint of any size costs only the rows in hand. Both kinds of source give the same numbers: those that
GGUF stores, float32, norms as weight + 1.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import EVEN, F32, Format
from ...runtime.errors import InvalidCheckpoint
from ...runtime.files.gguf_model import GGUFModel
from ...runtime.files.packaged import find_model
from ...runtime.files.strings import Strings
from ...runtime.model.config import ModelConfig
from ...runtime.model.families.hf import read_hf_config, text_name
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ...runtime.text.sampling import read_sampling
from ...runtime.text.tokenizer import CONTROL, SPACE, USER_DEFINED, Vocabulary, checked_vocabulary
from .safetensors import DTYPES, StoredTensor, read_header, read_json
from .tokenizer_json import read_tokenizer_json

_PADDING = 256  # rows by which an embedding may be filled up
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def open_checkpoint(path: str | Path, quantized: bool = False) -> Checkpoint:
    """A Hugging Face folder (safetensors, one file or sharded) or a GGUF file, which may be `quantized` if asked for.

    A packaged model may be given by name; see `packaged.find_model`. Checks everything but the numbers: files, names,
    shapes, extents. Raises InvalidCheckpoint, InvalidConfig, and InvalidModelFile for a damaged GGUF file.
    """
    path = find_model(path)
    if path.is_dir():
        return _open_folder(_snapshot(path))
    if path.is_file():
        checkpoint = _open_gguf(path)
        if not quantized:
            checkpoint.check_unquantized()
        return checkpoint
    raise InvalidCheckpoint(f"{path}: no such file or folder; expected a checkpoint folder or a GGUF file")


class Checkpoint:
    """An opened checkpoint. `stored` maps GGUF tensor names to places; `files` is all that was read.

    `warnings` say what of it is left out.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: ModelConfig,
        stored: Mapping[str, StoredTensor],
        files: tuple[Path, ...],
        load_vocabulary: Callable[[], Vocabulary],
        *,
        norm_offset: float,
        generation_config: Mapping[str, Any],
        chat_template: str | None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.path, self.name, self.config, self.stored, self.files = path, name, config, stored, files
        self.generation_config, self.chat_template, self.warnings = generation_config, chat_template, warnings
        self.specs = tuple(tensor_specs(config))
        self._load_vocabulary, self._norm_offset = cache(load_vocabulary), np.float32(norm_offset)
        self._open: dict[Path, FileIO] = {}
        self._states = {file: _state(file) for file in files}
        self._lock = threading.Lock()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises InvalidCheckpoint at the end if a file has changed since the checkpoint was opened."""
        yield
        for file, state in self._states.items():
            if _state(file) != state:
                raise InvalidCheckpoint(f"{file}: has changed while it was read; once it is complete, start again")

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def format(self, spec: TensorSpec) -> type[Format]:
        """How the checkpoint stores the tensor."""
        return self.stored[spec.gguf].format

    def check_unquantized(self) -> None:
        """Raises InvalidCheckpoint if a tensor is quantized already."""
        for name, stored in self.stored.items():
            if stored.format.block > 1:
                raise InvalidCheckpoint(
                    f"{self.path}: tensor '{name}' is {stored.format.name}, expected one of "
                    f"{', '.join(form.name for form in DTYPES.values())}: this file is quantized already, and rounding "
                    "it again would lose more than rounding the original once, from which to start; only `bezel export "
                    "--requantize` takes it all the same"
                )

    def added_losses(self, formats: Mapping[str, type[Format]]) -> list[str]:
        """A warning if tensors that are quantized already are to be rounded to other `formats`, by name in GGUF."""
        rounded = {
            stored.format.name
            for name, stored in self.stored.items()
            if stored.format.block > 1 and formats[name] not in (stored.format, F32)
        }
        if not rounded:
            return []
        before = ", ".join(sorted(rounded))
        return [f"{before} weights are rounded again: what was lost before and what is lost now add up"]

    def tensor(self, spec: TensorSpec) -> NDArray[np.float32]:
        """The whole tensor, `spec.shape`; a norm is weight + 1, as GGUF stores it."""
        n_rows = spec.shape[0] if len(spec.shape) > 1 else 1
        return self.rows(spec, 0, n_rows).reshape(spec.shape)

    def rows(self, spec: TensorSpec, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start … stop−1 as float32 (rows, inputs); a one-dimensional tensor is one row.

        May be called from several threads. Raises InvalidCheckpoint at a number that is not finite.
        """
        stored = self.stored[spec.gguf]
        values = stored.format.dequantize(self._read(stored, start, stop))
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise InvalidCheckpoint(
                f"{stored.file}: tensor '{spec.hf}' ({spec.gguf}): found {values[row, column]} at "
                f"[{start + row}, {column}], expected finite numbers; the checkpoint is damaged"
            )
        return values + self._norm_offset if spec.is_norm else values

    def blocks(self, spec: TensorSpec, start: int, stop: int, form: type[Format]) -> NDArray[np.uint8]:
        """Rows start … stop−1 in a format, uint8 (rows, bytes); blocks that are in it already stay as they are.

        May be called from several threads. Raises InvalidCheckpoint at a number that is not finite, or too large.
        """
        stored = self.stored[spec.gguf]
        if form is stored.format and form.block > 1:
            return self._read(stored, start, stop)
        try:
            return form.quantize(self.rows(spec, start, stop), EVEN)
        except ValueError as error:
            raise InvalidCheckpoint(f"{self.path}: tensor '{spec.hf}': {error}") from None

    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary, which has one piece for each row of the embedding."""
        vocabulary = self._load_vocabulary()
        if len(vocabulary.pieces) != self.config.vocab_size:
            raise InvalidCheckpoint(
                f"{self.path}: the tokenizer has {len(vocabulary.pieces)} pieces and the embedding "
                f"{self.config.vocab_size} rows, expected equal numbers: they belong to different models"
            )
        return vocabulary

    def _read(self, stored: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
        row_bytes = stored.format.row_bytes(stored.shape[-1])
        out = np.empty((stop - start) * row_bytes, np.uint8)
        with self._lock:  # the handle has one position
            if stored.file not in self._open:
                self._open[stored.file] = stored.file.open("rb", buffering=0)
            file = self._open[stored.file]
            file.seek(stored.offset + start * row_bytes)
            view, done = out.data, 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise InvalidCheckpoint(f"{stored.file}: ends early: it was cut while it was being read")
                done += got
        return out.reshape(stop - start, row_bytes)


def _state(file: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None where there is none any more."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _snapshot(folder: Path) -> Path:
    """The newest version of a repository in the hub's cache, `models--…`; any other folder as it is."""
    main = folder / "refs" / "main"
    if not main.is_file() or not (folder / "snapshots").is_dir():
        return folder
    revision = main.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{7,64}", revision):
        raise InvalidCheckpoint(f"{main}: found {revision[:80]!r}, expected the name of a folder in snapshots")
    return folder / "snapshots" / revision


def _check_adapter(folder: Path) -> list[str]:
    """A warning where an adapter lies beside a model. Raises InvalidCheckpoint where it lies alone."""
    file = folder / "adapter_config.json"
    if not file.exists():
        return []
    base = read_json(_required(file)).get("base_model_name_or_path")
    if not (folder / "config.json").exists():
        raise InvalidCheckpoint(
            f"{folder}: this is an adapter of {str(base)[:200]}, not a model; merge it first: with peft, "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT)"
        )
    return [f"the adapter in {folder} is left out: only the model beside it is exported"]


def _open_folder(folder: Path) -> Checkpoint:
    adapters = _check_adapter(folder)
    config_file = _required(folder / "config.json")
    raw_config = read_json(config_file)
    config = read_hf_config(raw_config, str(config_file))
    found, weight_files = _read_weights(folder)
    tokenizer_files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
    files = [*weight_files, config_file, *map(_required, tokenizer_files or [folder / "tokenizer.model"])]
    weights = _of_text(raw_config, found)
    stored = _match(folder, config, weights)
    load_vocabulary = cache(partial(_vocabulary, folder, config.vocab_size))
    pictures = ["pictures are left out: bezel runs the text part of this model"] if len(weights) < len(found) else []
    warnings = [*adapters, *pictures]
    rows = config.vocab_size - len(load_vocabulary().pieces)
    if 0 < rows <= _PADDING:
        warnings.append(f"{rows} rows of the embedding are left out: the tokenizer has no pieces for them")
        config = replace(config, vocab_size=config.vocab_size - rows)
        for spec in tensor_specs(config):
            stored[spec.gguf] = replace(stored[spec.gguf], shape=spec.shape)

    def optional_json(name: str) -> dict[str, Any]:
        if not (folder / name).exists():
            return {}
        files.append(_required(folder / name))
        return read_json(folder / name)

    generation_config = optional_json("generation_config.json")
    generation_config.setdefault("eos_token_id", raw_config.get("eos_token_id"))
    template_file = folder / "chat_template.jinja"
    template = _chat_template(optional_json("tokenizer_config.json").get("chat_template"))
    if template_file.exists():  # where recent versions of transformers keep it
        files.append(_own(_required(template_file)))
        template = template_file.read_text(encoding="utf-8", errors="replace")

    checkpoint = Checkpoint(
        folder,
        _folder_name(folder),
        config,
        stored,
        tuple(files),
        load_vocabulary,
        norm_offset=1.0,
        generation_config=generation_config,
        chat_template=template,
        warnings=tuple(warnings),
    )
    if config.tied_head and _HEAD in weights:
        _check_tied_head(checkpoint, weights[_HEAD], weights[_EMBEDDING])
    return checkpoint


def _vocabulary(folder: Path, rows: int) -> Vocabulary:
    """From `tokenizer.json`, which has the latest say, or `tokenizer.model`; where both are there, they must agree.

    Tokens that were added without a row of the embedding are left out.
    """
    newer, older = folder / "tokenizer.json", folder / "tokenizer.model"
    if not newer.exists():
        return Vocabulary.from_model_file(older)
    special = (
        read_json(_required(folder / "tokenizer_config.json")) if (folder / "tokenizer_config.json").exists() else {}
    )

    def fail(reason: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{newer}: {reason}")

    found = read_tokenizer_json(read_json(newer), special, fail)
    n = len(found.pieces)
    while n > rows and found.types[n - 1] in (CONTROL, USER_DEFINED):
        n -= 1
    if n < len(found.pieces):
        pieces, scores, types = Strings.of(found.pieces[:n]), found.scores[:n], found.types[:n]
        found = checked_vocabulary(pieces, scores, types, found.bos_id, found.eos_id, found.pad_id, fail)
    if older.exists():
        original, same = Vocabulary.from_model_file(older), len(found.pieces)
        for i, (new, old) in enumerate(zip(found.pieces, original.pieces, strict=False)):
            if new == old.replace(" ", SPACE):
                continue
            same = min(same, i)
            if found.types[i] not in (CONTROL, USER_DEFINED):  # those a fine-tune may have taken for something else
                raise fail(f"token {i} is {new[:40]!r}, and in {older.name} it is {old[:40]!r}; remove the wrong file")
        if same == len(original.pieces) == len(found.pieces):
            return original
    return found


def _read_weights(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """All tensors of `model.safetensors`, or of the shards that the index names, and the files read."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(_required(single)), [single]
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise InvalidCheckpoint(
                f"{folder}: found {pickles[0]}, expected model.safetensors: bezel reads safetensors only, "
                "because loading a pickle executes code from the file; convert it with transformers' "
                "save_pretrained"
            )
        raise InvalidCheckpoint(f"{folder}: found neither model.safetensors nor model.safetensors.index.json")

    weight_map = read_json(_required(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidCheckpoint(f"{index}: key 'weight_map': expected tensor names → shard file names")
    weights: dict[str, StoredTensor] = {}
    files = [index]
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise InvalidCheckpoint(f"{index}: shard {shard[:200]!r}: expected the name of a file in the folder")
    for shard in shards:
        files.append(folder / shard)
        for name, stored in read_header(_required(folder / shard)).items():
            if weight_map.get(name) != shard:
                where = weight_map.get(name, "nowhere")
                raise InvalidCheckpoint(
                    f"{folder / shard}: holds tensor {name[:200]!r}, which {index.name} puts in {where}"
                )
            weights[name] = stored
    for name, shard in weight_map.items():
        if name not in weights:
            raise InvalidCheckpoint(
                f"{folder / shard}: tensor {name[:200]!r} is missing, though {index.name} lists it here"
            )
    return weights, files


def _of_text(raw_config: Mapping[str, Any], found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that are not of pictures, under the names that a text model's have."""
    weights: dict[str, StoredTensor] = {}
    prefix = "base_model.model."  # peft's, around a model that it has nothing in
    if found and all(name.startswith(prefix) for name in found):
        found = {name.removeprefix(prefix): stored for name, stored in found.items()}
    if _EMBEDDING.removeprefix("model.") in found:  # a model without its head, as AutoModel saves it
        found = {name if name == _HEAD else f"model.{name}": stored for name, stored in found.items()}
    for name, stored in found.items():
        plain = text_name(name, raw_config)
        if plain in weights:
            raise InvalidCheckpoint(f"{stored.file}: tensor {name[:200]!r}: found '{plain}' under another name too")
        if plain is not None:
            weights[plain] = stored
    return weights


def _match(folder: Path, config: ModelConfig, weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The model's tensors by GGUF name. Raises InvalidCheckpoint if one is missing, extra or misshapen."""
    matched = {}
    for spec in tensor_specs(config):
        stored = weights.get(spec.hf)
        if stored is None:
            raise InvalidCheckpoint(f"{folder}: tensor '{spec.hf}' is missing, expected shape {list(spec.shape)}")
        if stored.shape != spec.shape:
            raise InvalidCheckpoint(
                f"{stored.file}: tensor '{spec.hf}': found shape {list(stored.shape)}, "
                f"expected {list(spec.shape)} by config.json"
            )
        matched[spec.gguf] = stored
    known = {spec.hf for spec in tensor_specs(config)} | {_HEAD}
    for name, stored in weights.items():
        # The RoPE frequencies that old versions of transformers saved follow from the config.
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise InvalidCheckpoint(
                f"{stored.file}: tensor {name[:200]!r}: found shape {list(stored.shape)}, expected no such "
                f"tensor in a {config.family} model; adapters must be merged before export"
            )
    return matched


def _check_tied_head(checkpoint: Checkpoint, head: StoredTensor, embedding: StoredTensor) -> None:
    """A head saved beside a tied embedding must hold the same numbers, whatever their type."""
    same, step = head.shape == embedding.shape, 1024
    for start in range(0, embedding.shape[0] if same else 0, step):
        stop = min(start + step, embedding.shape[0])
        ours, theirs = (t.format.dequantize(checkpoint._read(t, start, stop)) for t in (head, embedding))
        same = np.array_equal(ours, theirs)
        if not same:
            break
    if not same:
        raise InvalidCheckpoint(
            f"{head.file}: tensor '{_HEAD}' differs from '{_EMBEDDING}', expected the same, because "
            "config.json ties them (as it does by saying nothing); if the head is the model's own, set "
            '"tie_word_embeddings": false there'
        )


def _required(path: Path) -> Path:
    """`path`, if it is a file with its content in place."""
    if not path.is_file():
        raise InvalidCheckpoint(
            f"{path.parent}: {path.name} is missing; expected a folder with config.json, tokenizer.model or "
            "tokenizer.json, and model.safetensors (or its shards), as downloaded"
        )
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InvalidCheckpoint(
                f"{path}: found a git-lfs pointer, expected the file itself; run 'git lfs pull' in {path.parent}"
            )
    return path


def _own(path: Path) -> Path:
    """`path`, if what it is a link to belongs to the checkpoint: its content goes into what is exported."""
    folder, real = path.parent.resolve(), path.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # the hub's cache, whose files are links
        homes.append(folder.parents[1] / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise InvalidCheckpoint(
            f"{path}: is a link to {real}, which is no part of the checkpoint; put a copy in its place if it should be"
        )
    return path


def _chat_template(value: Any) -> str | None:
    """The template, or the one called "default" where there are several."""
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _folder_name(folder: Path) -> str:
    """The folder's name; in the hub's cache, the repository's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.split("--")[-1]
    return folder.name


def _open_gguf(path: Path) -> Checkpoint:
    with GGUFModel(path) as gguf:
        config = gguf.config()
        gguf.check_tensors(config)
        tensors = (gguf.tensors[spec.gguf] for spec in tensor_specs(config))
        stored = {i.name: StoredTensor(gguf.home(i.name), i.format, i.shape, i.offset) for i in tensors}
        files = gguf.paths
        metadata = gguf.metadata
        generation_config, complaints = read_sampling(metadata)
        if (stops := metadata.get("bezel.generation.stop_token_ids")) is not None:
            generation_config["eos_token_id"] = np.asarray(stops).tolist()
        template = metadata.get("tokenizer.chat_template")
        name = metadata.get("general.name")

    def load_vocabulary() -> Vocabulary:
        with GGUFModel(path) as gguf:
            return gguf.vocabulary()

    return Checkpoint(
        path,
        name if isinstance(name, str) and name else path.stem,
        config,
        stored,
        files,
        load_vocabulary,
        norm_offset=0.0,  # GGUF holds weight + 1 already
        warnings=tuple(complaints),
        generation_config=generation_config,
        chat_template=template if isinstance(template, str) else None,
    )
