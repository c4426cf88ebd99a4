"""A Hugging Face folder: its config, weights (safetensors, one file or sharded) and templates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.arrays import Floats
from ...runtime.errors import InvalidCheckpoint
from ...runtime.files.onnx_folder import MANIFEST
from ...runtime.model.families.hf import read_hf_config, sees_pictures, text_name
from ...runtime.model.families.sight import read_hf_vision, vision_name
from ...runtime.model.tensors import TensorSpec, tensor_specs
from ...runtime.model.vision import vision_specs
from .checkpoint import Checkpoint, VisionSource
from .files import own, required
from .safetensors import StoredTensor, read_header, read_json
from .vocabulary import NEWER, OLDER, read_vocabulary

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
TOKENIZERS = (NEWER, OLDER)
PREPROCESSOR = "preprocessor_config.json"
TEMPLATE = "chat_template.jinja"  # where recent versions of transformers keep it
# What is read beside config and weights, as far as it is there.
TEXT_FILES = (*TOKENIZERS, "tokenizer_config.json", "generation_config.json", PREPROCESSOR, TEMPLATE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_PADDING = 256  # rows by which an embedding may be filled up
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def open_folder(folder: Path) -> Checkpoint:
    """A checkpoint as transformers saves it, or a repository in the hub's cache; see `open_checkpoint`."""
    folder = _snapshot(folder)
    _check_no_graph(folder)
    adapters = _check_adapter(folder)
    config_file = required(folder / CONFIG)
    raw_config = read_json(config_file)
    config = read_hf_config(raw_config, str(config_file))
    read = _read_weights(folder)
    found = read.stored
    tokenizer_files = [folder / name for name in TOKENIZERS if (folder / name).exists()]
    files = [*read.files, config_file, *map(required, tokenizer_files or [folder / OLDER])]
    weights, seen = _by_part(raw_config, found)
    stored = _match(folder, config.family, tensor_specs(config), weights, unused=(_HEAD,))
    load_vocabulary = cache(partial(read_vocabulary, folder, config.vocab_size))
    warnings = [*adapters, *read.warnings]
    rows = config.vocab_size - len(load_vocabulary().pieces)
    if 0 < rows <= _PADDING:
        warnings.append(f"{rows} rows of the embedding are left out: the tokenizer has no pieces for them")
        config = replace(config, vocab_size=config.vocab_size - rows)
        for spec in tensor_specs(config):
            stored[spec.gguf] = replace(stored[spec.gguf], shape=spec.shape)

    def optional_json(name: str) -> dict[str, Any]:
        if not (folder / name).exists():
            return {}
        files.append(required(folder / name))
        return read_json(folder / name)

    vision = None
    if sees_pictures(raw_config) and not seen:
        warnings.append("pictures are left out: the weights of the vision tower are missing")
    elif sees_pictures(raw_config):
        prepared = optional_json(PREPROCESSOR)
        eye = read_hf_vision(raw_config, config.hidden_size, str(config_file), prepared)
        vision = VisionSource(folder, eye, _match(folder, eye.projector, vision_specs(eye), seen), tuple(files))
    generation_config = optional_json("generation_config.json")
    generation_config.setdefault("eos_token_id", raw_config.get("eos_token_id"))
    template_file = folder / TEMPLATE
    template = _chat_template(optional_json("tokenizer_config.json").get("chat_template"))
    if template_file.exists():
        files.append(own(required(template_file)))
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
        vision=vision,
    )
    for name, copy in read.twice:
        if not _same(checkpoint, found[name], copy):
            raise InvalidCheckpoint(
                f"{copy.file}: tensor {name[:200]!r} differs from that in {found[name].file.name}, expected it once"
            )
    if config.tied_head and _HEAD in weights and not _same(checkpoint, weights[_HEAD], weights[_EMBEDDING]):
        raise InvalidCheckpoint(
            f"{weights[_HEAD].file}: tensor '{_HEAD}' differs from '{_EMBEDDING}', expected the same, because "
            "config.json ties them (as it does by saying nothing); if the head is the model's own, set "
            '"tie_word_embeddings": false there'
        )
    return checkpoint


def _snapshot(folder: Path) -> Path:
    """The newest version of a repository in the hub's cache, `models--…`; any other folder as it is."""
    main = folder / "refs" / "main"
    if not (folder / "snapshots").is_dir():
        return folder
    if not main.is_file():
        versions = sorted((folder / "snapshots").iterdir())
        if len(versions) != 1:
            raise InvalidCheckpoint(f"{folder}: has {len(versions)} versions in snapshots; say which of them")
        return versions[0]
    revision = main.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{7,64}", revision):
        raise InvalidCheckpoint(f"{main}: found {revision[:80]!r}, expected the name of a folder in snapshots")
    return folder / "snapshots" / revision


def _check_adapter(folder: Path) -> list[str]:
    """A warning where an adapter lies beside a model. Raises InvalidCheckpoint where it lies alone."""
    file = folder / ADAPTER
    if not file.exists():
        return []
    base = read_json(required(file)).get("base_model_name_or_path")
    if not (folder / CONFIG).exists():
        raise InvalidCheckpoint(
            f"{folder}: this is an adapter of {str(base)[:200]}, not a model; merge it first: with peft, "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT)"
        )
    return [f"the adapter in {folder} is left out: only the model beside it is exported"]


def _check_no_graph(folder: Path) -> None:
    """Raises InvalidCheckpoint for what is exported already, by bezel or by others."""
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return
    graph = next((path for inner in (".", "onnx", "model") for path in sorted((folder / inner).glob("*.onnx"))), None)
    if graph is None:
        return
    manifest = graph.with_name(MANIFEST) if graph.with_name(MANIFEST).is_file() else folder / MANIFEST
    about = read_json(manifest).get("metadata") if manifest.is_file() else None
    files = about.get("bezel.provenance.source_files") if isinstance(about, dict) else None
    made_from = f", made from {str(files)[:200]}" if files else ""
    raise InvalidCheckpoint(
        f"{folder}: found an ONNX graph, {graph.relative_to(folder)}{made_from}; expected a checkpoint's folder or a "
        "GGUF file: export from what the graph was made from"
    )


@dataclass
class _Weights:
    """All tensors of the weight files; `twice` are those of which another shard holds a copy."""

    stored: dict[str, StoredTensor]
    files: list[Path]
    twice: list[tuple[str, StoredTensor]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _read_weights(folder: Path) -> _Weights:
    """What is in `model.safetensors`, or in the shards that the index names, whichever of them it puts a tensor in."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return _Weights(read_header(required(single)), [single])
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise InvalidCheckpoint(
                f"{folder}: found {pickles[0]}, expected model.safetensors: bezel reads safetensors only, "
                "because loading a pickle executes code from the file; convert it with transformers' "
                "save_pretrained"
            )
        raise InvalidCheckpoint(f"{folder}: found neither model.safetensors nor model.safetensors.index.json")

    weight_map = read_index(required(index))
    shards = sorted(set(weight_map.values()))
    found = _Weights({}, [index, *(folder / shard for shard in shards)])
    elsewhere = 0
    for shard in shards:
        for name, stored in read_header(required(folder / shard)).items():
            elsewhere += weight_map.get(name) != shard
            if name in found.stored:
                found.twice.append((name, stored))
            else:
                found.stored[name] = stored
    for name, shard in weight_map.items():
        if name not in found.stored:
            raise InvalidCheckpoint(
                f"{folder / shard}: tensor {name[:200]!r} is missing, though {index.name} lists it here"
            )
    if elsewhere:
        found.warnings.append(f"{index.name} does not say where {elsewhere} tensors are; they were found all the same")
    return found


def read_index(index: Path) -> dict[str, str]:
    """The shard that an index puts each tensor in, by name. Raises InvalidCheckpoint."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidCheckpoint(f"{index}: key 'weight_map': expected tensor names → shard file names")
    for shard in weight_map.values():
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise InvalidCheckpoint(f"{index}: shard {shard[:200]!r}: expected the name of a file in the folder")
    return weight_map


def _by_part(
    raw_config: Mapping[str, Any], found: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors of the text model, under the names that one alone has, and those of the eye by `vision_specs`."""
    weights: dict[str, StoredTensor] = {}
    seen: dict[str, StoredTensor] = {}
    for prefix in ("module.", "_orig_mod.", "base_model.model."):  # torch's wrappers; peft's, which has nothing in it
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): stored for name, stored in found.items()}
    unmerged = next((name for name in found if ".base_layer." in name or ".lora_" in name), None)
    if unmerged is not None:
        raise InvalidCheckpoint(
            f"{found[unmerged].file}: tensor {unmerged[:200]!r} belongs to an adapter that is not merged yet; merge it "
            "with peft's merge_and_unload(), and save the model anew"
        )
    if _EMBEDDING.removeprefix("model.") in found:  # a model without its head, as AutoModel saves it
        found = {name if name == _HEAD else f"model.{name}": stored for name, stored in found.items()}
    for name, stored in found.items():
        plain, part = text_name(name, raw_config), weights
        if plain is None:
            plain, part = vision_name(name), seen
        if plain in part:
            raise InvalidCheckpoint(f"{stored.file}: tensor {name[:200]!r}: found '{plain}' under another name too")
        if plain is not None:
            part[plain] = stored
    return weights, seen


def _match(
    folder: Path,
    kind: str,
    specs: Iterable[TensorSpec],
    weights: Mapping[str, StoredTensor],
    unused: Sequence[str] = (),
) -> dict[str, StoredTensor]:
    """The tensors of a model of some `kind` by GGUF name. Raises InvalidCheckpoint if one is missing or wrong."""
    matched, known = {}, set(unused)
    for spec in specs:
        known.add(spec.hf)
        stored = weights.get(spec.hf)
        if stored is None:
            raise InvalidCheckpoint(f"{folder}: tensor '{spec.hf}' is missing, expected shape {list(spec.shape)}")
        if stored.shape != spec.shape:
            raise InvalidCheckpoint(
                f"{stored.file}: tensor '{spec.hf}': found shape {list(stored.shape)}, "
                f"expected {list(spec.shape)} by config.json"
            )
        matched[spec.gguf] = stored
    for name, stored in weights.items():
        # The RoPE frequencies that old versions of transformers saved follow from the config.
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise InvalidCheckpoint(
                f"{stored.file}: tensor {name[:200]!r}: found shape {list(stored.shape)}, expected no such "
                f"tensor in a {kind} model; adapters must be merged before export"
            )
    return matched


def _same(checkpoint: Checkpoint, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their type."""
    n_rows, step = math.prod(one.shape[:-1]), 1024

    def numbers(stored: StoredTensor, start: int) -> Floats:
        stored = replace(stored, shape=stored.shape or (1,))
        return stored.format.dequantize(checkpoint.raw_rows(stored, start, min(start + step, n_rows)))

    return one.shape == other.shape and all(
        np.array_equal(numbers(one, start), numbers(other, start)) for start in range(0, n_rows, step)
    )


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
