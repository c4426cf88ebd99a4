"""What `bezel pull` does: a model of the hub becomes one in the models folder.

It grows in a hidden folder of its own beside the models, OWNER--REPO.part, which one process has at a time. What is
there when the work is broken off is used by the next; a model appears by being moved to its name once it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ...quant.recipes import PRESETS
from ...runtime.errors import HubError, InvalidConfig, InvalidModelFile, InvalidRequest, UnsupportedModelFile
from ...runtime.files.atomic import claimed
from ...runtime.files.gguf import GGUFFile
from ...runtime.files.gguf_model import GGUFModel
from ...runtime.files.models import (
    CHECKPOINT,
    NOTE,
    NamedModel,
    RepoName,
    eye_path,
    find_named,
    models_folder,
    named_models,
    size_text,
)
from ...runtime.files.vision_file import VisionFile
from ...runtime.model.config import ModelConfig
from ...runtime.model.families import FAMILIES, other_model
from ...runtime.model.families.hf import read_hf_config
from ...runtime.model.tensors import tensor_specs
from ..gguf.vision import export_vision, vision_recipe
from ..gguf.writer import data_size, export_gguf, plan_tensors
from ..recipe import find_recipe
from ..sources.folder import CONFIG, INDEX, TEXT_FILES, read_index
from ..sources.opening import open_checkpoint
from ..sources.safetensors import MAX_HEADER, read_json
from ..summary import ExportSummary
from .choice import GGUFChoice, checkpoint_files, eye_of, gguf_choices, is_checkpoint, refuse, weight_files
from .client import HubFile, HubRepo, fetch, look_up

DEFAULT_QUANT = "q4_k_m"
_HEADER = 32_000_000  # bytes; Gemma's GGUF files have about 7 million before their weights

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Pulled:
    """`summary` is of the export; None where there was nothing to export. `is_new` is False if all was there before."""

    model: NamedModel
    summary: ExportSummary | None = None
    is_new: bool = True


@dataclass(frozen=True)
class _Pull:
    """One call of `pull`, and the folder that it works in."""

    name: RepoName
    repo: HubRepo
    revision: str | None
    work: Path
    say: Callable[[str], None]
    fetching: Bar
    exporting: Bar

    def named(self, tag: str) -> RepoName:
        return RepoName.parse(f"{self.name.untagged}:{tag}")

    def already(self, tag: str, files: Sequence[HubFile]) -> NamedModel | None:
        """The model of this tag, if it was made of these very files."""
        found = find_named(str(self.named(tag)))
        return found if found and found.note().get("files") == _digests(files) else None

    def make_room(self, folder: Path, files: Sequence[HubFile], more: int = 0) -> str:
        """Take what is not of these files out of the folder, and say how much there is to fetch.

        Raises InvalidRequest if that, and `more` bytes, do not fit on the disk.
        """
        folder.mkdir(parents=True, exist_ok=True)
        held, wanted = 0, {name for file in files for name in (file.name, _part_name(file))}
        for path in folder.iterdir():
            if path.name in wanted:
                held += path.stat().st_size
            else:
                path.unlink()
        total, free = sum(file.size for file in files), shutil.disk_usage(folder).free
        if total - held + more > free:
            need = size_text(total - held + more)
            raise InvalidRequest(
                f"{models_folder()}: {size_text(free)} free, expected {need} for {self.name}; free some space, or have "
                "the models elsewhere: BEZEL_MODELS names the folder"
            )
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        return f"{count}, {size_text(total)}" + (f", of which {size_text(held)} are there" if held else "")

    def download(self, folder: Path, files: Sequence[HubFile], bar: Bar) -> None:
        """Have the files in a folder, each checked; what is there of them already is used. Raises HubError."""
        missing = [file for file in files if not file.matches(folder / file.name)]
        total, before = sum(file.size for file in missing), 0
        with bar(self.repo.name) as progress:
            for file in missing:
                self._fetch(folder, file, partial(_of_all, progress, before, total))
                before += file.size

    def _fetch(self, folder: Path, file: HubFile, progress: Callable[[int], None]) -> None:
        part = folder / _part_name(file)
        fetch(self.repo, file, part, progress)
        if not file.matches(part):
            part.unlink()
            raise HubError(
                f"{self.repo.name}: {file.path}: what came is not what the hub lists, by its hash; it was thrown away, "
                "and the same command fetches it anew"
            )
        os.replace(part, folder / file.name)

    def place(self, grown: Path, tag: str, files: Sequence[HubFile]) -> NamedModel:
        """Give what has grown its name, in place of what had it before."""
        note = {
            "repo": self.repo.name,
            "revision": self.revision,
            "commit": self.repo.commit,
            "pulled": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "files": _digests(files),
        }
        (grown / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        name = self.named(tag)
        old, place = self.work / "old", models_folder() / name.folder_name
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            os.replace(place, old)
        os.replace(grown, place)
        shutil.rmtree(old, ignore_errors=True)
        return next(model for model in named_models() if model.place == place)


def pull(
    name: RepoName,
    quant: str | None,
    revision: str | None,
    keep: bool,
    say: Callable[[str], None],
    fetching: Bar,
    exporting: Bar,
) -> Pulled:
    """Fetch a model, and export it where it is a checkpoint, with the preset or the recipe file `quant`.

    A tag chooses among GGUF files; for a checkpoint it is a preset, or CHECKPOINT for itself, which `keep` keeps too.
    `say` is told what will be done, before it is; `fetching` and `exporting` make progress bars, for bytes and for
    weights. Raises HubError, InvalidRequest, and what an export raises.
    """
    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    repo = look_up(name.untagged, revision)
    choices = gguf_choices(repo)
    chosen = [choice for choice in choices if (name.tag or "").lower() == choice.tag.lower()]
    with claimed(folder / RepoName(name.owner, name.repo).folder_name) as work:
        work.mkdir(exist_ok=True)
        this = _Pull(name, repo, revision, work, say, fetching, exporting)
        try:
            if is_checkpoint(repo) and not chosen:
                return _pull_checkpoint(this, quant, keep)
            if quant or keep:
                raise InvalidRequest(f"{name}: a GGUF file is fetched as it is: leave --quant and --keep out")
            return _pull_gguf(this, chosen or choices)
        finally:
            with suppress(OSError):  # there is something to go on with
                work.rmdir()


def _pull_gguf(this: _Pull, choices: Sequence[GGUFChoice]) -> Pulled:
    if not choices:
        raise refuse(this.repo)
    if len(choices) > 1 or (this.name.tag or choices[0].tag).lower() != choices[0].tag.lower():
        listed = "".join(f"\n  {this.named(c.tag)}  {size_text(c.size)}" for c in choices)
        raise InvalidRequest(f"{this.name}: say which of its GGUF files:{listed}")
    tag, parts, eye = choices[0].tag, choices[0].parts, eye_of(this.repo, choices[0])
    files = parts if eye is None else (*parts, eye)
    if there := this.already(tag, files):
        return Pulled(there, is_new=False)
    folder = this.work / tag
    sees = "" if eye is None else f"; it sees with {eye.path}"
    this.say(f"{this.named(tag)}: {this.make_room(folder, files)}{sees}")
    if not (folder / parts[0].name).exists():
        _check_header(this, folder / _part_name(parts[0]), parts[0])
    this.download(folder, files, this.fetching)
    with GGUFModel(folder / parts[0].name) as file:
        config = file.config()
        file.check_tensors(config)
    if eye is not None:
        _give_eye(this, folder / eye.name, folder / parts[0].name, config)
    return Pulled(this.place(folder, tag, files))


def _give_eye(this: _Pull, eye: Path, model: Path, config: ModelConfig) -> None:
    """Put an eye beside its model; what is not the model's, or is none that bezel knows, is left out."""
    try:
        VisionFile(eye, config.hidden_size).close()
    except (InvalidModelFile, InvalidConfig) as error:
        eye.unlink()
        this.say(f"it will see no pictures: {error}")
    else:
        os.replace(eye, eye_path(model))


def _check_header(this: _Pull, part: Path, first: HubFile) -> None:
    """Raises InvalidRequest for what bezel does not run, by the beginning of a GGUF file."""
    size = min(first.size, _HEADER)
    if not part.exists() or part.stat().st_size < size:
        with this.fetching(f"{this.repo.name}, its header") as progress:
            fetch(this.repo, replace(first, size=size), part, partial(_of_all, progress, 0, size))
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / first.name
        with part.open("rb") as whole, file.open("wb") as copy:
            copy.write(whole.read(size))
            copy.truncate(first.size)  # no weights, and no room for them on the disk
        try:
            with GGUFFile(file) as opened:
                architecture = opened.metadata.get("general.architecture")
        except UnsupportedModelFile as error:
            raise InvalidRequest(f"{this.name}: {first.path}: not supported: {error.reason}") from None
        except InvalidModelFile:  # a longer header, or no sound one: as is seen when all is there
            return
    if architecture not in FAMILIES:
        raise InvalidRequest(f"{this.name}: found the architecture {architecture!r:.80}: {other_model(architecture)}")


def _pull_checkpoint(this: _Pull, quant: str | None, keep: bool) -> Pulled:
    config, files = _look_into(this)
    given = _preset_or_file(this.name, quant)
    recipe = find_recipe(given, config) if given else None
    tag = (re.sub(r"\W+", "-", recipe.name).strip("-") or "recipe") if recipe else CHECKPOINT
    kept, there = this.already(CHECKPOINT, files), this.already(tag, files)
    if there and (kept or not keep) and given in (None, *PRESETS):  # a recipe file may have changed
        return Pulled(there, is_new=False)
    grown = this.work / CHECKPOINT
    folder = grown / this.name.repo  # by which an export calls the model
    size = data_size(plan_tensors(tensor_specs(config), recipe)) if recipe else 0
    text = sum(file.size for file in files if file.path in TEXT_FILES)  # as much of the export, roughly
    to_fetch = this.make_room(folder, () if kept else files, size + text)
    becomes = f"; exported as {tag}, about {size_text(size)}" if recipe else ""
    this.say(f"{this.repo.name}: {'the checkpoint was kept' if kept else to_fetch}{becomes}")
    if kept is None:
        this.download(folder, files, this.fetching)
    if recipe is None:
        open_checkpoint(folder).close()  # which checks it
        return Pulled(this.place(grown, CHECKPOINT, files))
    out = this.work / tag / f"{this.name.repo}-{tag}.gguf"
    out.parent.mkdir(exist_ok=True)
    with (
        open_checkpoint(kept.path if kept else folder) as source,
        this.exporting(out.name) as progress,
        export_vision(source, out, vision_recipe(source, None, recipe), progress, force=True) as seen,
    ):
        summary = export_gguf(source, out, recipe, progress=progress, force=True)
    model = this.place(out.parent, tag, files)
    if keep and kept is None:
        this.place(grown, CHECKPOINT, files)
    else:
        shutil.rmtree(grown)
    return Pulled(model, replace(summary, path=str(model.path), vision=seen))


def _look_into(this: _Pull) -> tuple[ModelConfig, list[HubFile]]:
    """The config, and all files of the checkpoint. Raises InvalidConfig for what bezel does not run."""
    texts = checkpoint_files(this.repo)
    small = [file for file in texts if file.path in (CONFIG, INDEX)]
    if any(file.size > MAX_HEADER for file in small):
        raise HubError(f"{this.repo.name}: {CONFIG} or {INDEX} is larger than any real one")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        this.download(folder, small, _no_bar)
        config = read_hf_config(read_json(folder / CONFIG), f"{this.repo.name}: {CONFIG}")
        shards = sorted(set(read_index(folder / INDEX).values())) if (folder / INDEX).exists() else ()
    return config, [*texts, *weight_files(this.repo, shards)]


def _preset_or_file(name: RepoName, quant: str | None) -> str | None:
    """What the export of a checkpoint gets; None for the checkpoint itself. Raises InvalidRequest."""
    tag = (name.tag or "").lower()
    if not tag:
        return quant or DEFAULT_QUANT
    if quant is not None:
        raise InvalidRequest(f"{name}: says what to export to, and so does --quant; leave one of them out")
    if tag not in (CHECKPOINT, *PRESETS):
        raise InvalidRequest(
            f"{name}: found {name.tag!r}, expected one of {', '.join(PRESETS)}; or {CHECKPOINT}, not exported"
        )
    return None if tag == CHECKPOINT else tag


def _part_name(file: HubFile) -> str:
    """What a file is called until it is whole: another content is another file."""
    return f".{file.name}.{file.digest[:16]}.part"


def _digests(files: Sequence[HubFile]) -> dict[str, str]:
    return {file.path: file.digest for file in files}


def _of_all(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    """Progress of one file as a part of all."""
    progress(before + done, total)


def _no_bar(_: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda *_: None)
