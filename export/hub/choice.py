"""What of a repository is a model: the files of a checkpoint, or a GGUF file, its parts and its eye."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from ...runtime.errors import HubError, InvalidRequest
from ..sources.folder import ADAPTER, CONFIG, INDEX, PICKLES, SINGLE, TEXT_FILES
from .client import HubFile, HubRepo

_PARTS = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_QUANT = re.compile(r"(?:.*?[-._])?((?:UD-)?(?:I?Q[1-8]_\w+|TQ\d_\w+|[MNV]+FP4\w*|BF16|F16|F32))", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # what sees pictures, and what llama.cpp calibrates with
_EYE = re.compile(r"mmproj", re.IGNORECASE)
EYE_FORMATS = ("f16", "bf16", "q8_0", "f32")  # the first that there is: all of it, or nearly, in the fewest bytes


@dataclass(frozen=True)
class GGUFChoice:
    """One of the GGUF files of a repository: its parts, in order, of which the first opens it."""

    tag: str
    parts: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def gguf_choices(repo: HubRepo) -> list[GGUFChoice]:
    """The GGUF files of a repository, each with all its parts, by size. Tags are as in their names, such as Q4_K_M.

    Raises HubError where parts are missing.
    """
    groups: dict[str, dict[int, HubFile]] = {}
    counts: dict[str, int] = {}
    for file in repo.files:
        if not file.name.endswith(".gguf") or _NO_MODEL.search(file.name):
            continue
        stem = file.path.removesuffix(".gguf")
        found = _PARTS.fullmatch(stem)
        name, number, count = (found[1], int(found[2]), int(found[3])) if found else (stem, 1, 1)
        groups.setdefault(name, {})[number] = file
        counts[name] = max(counts.get(name, 0), count)
    tags = _tags(list(groups))
    choices = []
    for name, parts in groups.items():
        if sorted(parts) != list(range(1, counts[name] + 1)):
            raise HubError(f"{repo.name}: {name}: the repository has {len(parts)} of its {counts[name]} parts")
        choices.append(GGUFChoice(tags[name], tuple(parts[i] for i in sorted(parts))))
    return sorted(choices, key=lambda choice: choice.size)


def eye_of(repo: HubRepo, choice: GGUFChoice) -> HubFile | None:
    """The eye that comes with a GGUF file: in its folder, else at the top; of several in the best of EYE_FORMATS.

    Of those in the same format it is the one that is called most like the model.
    """
    model = choice.parts[0]
    found = [file for file in repo.files if file.name.endswith(".gguf") and _EYE.search(file.name)]
    folder = model.path.removesuffix(model.name)
    near = [file for file in found if file.path == folder + file.name] or [f for f in found if f.path == f.name]

    def likeness(file: HubFile) -> tuple[int, int, int]:
        form = _quant(file.name.removesuffix(".gguf")).lower()
        rank = EYE_FORMATS.index(form) if form in EYE_FORMATS else len(EYE_FORMATS)
        name = re.sub(r"^mmproj[-_.]?", "", file.name.lower())
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(name, model.name.lower(), strict=False)))
        return rank, -len(same), file.size

    return min(near, key=likeness, default=None)


def _tags(names: Sequence[str]) -> dict[str, str]:
    """A tag for each: its quantization, or all of its name where that would not tell it from the others."""
    quants = {name: _quant(name) for name in names}
    repeated = Counter(quant.lower() for quant in quants.values())
    return {
        name: quant if quant and repeated[quant.lower()] == 1 else re.sub(r"\W+", "-", name).strip("-")
        for name, quant in quants.items()
    }


def _quant(name: str) -> str:
    """The quantization that a file is named after, or the folder that it is in."""
    found = (_QUANT.fullmatch(part) for part in reversed(name.split("/")))
    return next((match[1] for match in found if match), "")


def is_checkpoint(repo: HubRepo) -> bool:
    """Whether there are weights that bezel exports."""
    names = {file.path for file in repo.files}
    return CONFIG in names and bool(names & {SINGLE, INDEX})


def checkpoint_files(repo: HubRepo) -> list[HubFile]:
    """What an export reads of a checkpoint beside the weights; the index of these among them if they have one."""
    by_path = {file.path: file for file in repo.files}
    weights = () if SINGLE in by_path else (INDEX,)
    return [by_path[name] for name in (CONFIG, *weights, *TEXT_FILES) if name in by_path]


def weight_files(repo: HubRepo, shards: Sequence[str]) -> list[HubFile]:
    """The files of the weights: one, or the `shards` that the index names. Raises HubError where one is not there."""
    by_path = {file.path: file for file in repo.files}
    names = [SINGLE] if SINGLE in by_path else shards
    missing = [name for name in names if name not in by_path]
    if missing:
        raise HubError(f"{repo.name}: {missing[0]} is not there, though {INDEX} names it")
    return [by_path[name] for name in names]


def refuse(repo: HubRepo) -> InvalidRequest:
    """Why there is no model in a repository."""
    names = [file.path for file in repo.files if "/" not in file.path]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if ADAPTER in names:
        return InvalidRequest(f"{repo.name}: this is an adapter, not a model; its base has to be merged with it first")
    if pickles:
        return InvalidRequest(
            f"{repo.name}: found {pickles[0]}, expected {SINGLE}: bezel reads safetensors only, because loading a "
            "pickle executes code from the file"
        )
    return InvalidRequest(
        f"{repo.name}: found neither {CONFIG} with {SINGLE}, nor a GGUF file: there is no model in it"
    )
