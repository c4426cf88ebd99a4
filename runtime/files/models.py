"""Models by name: what lies in the user's models folder, and what packages bring.

In the folder a model OWNER/REPO:TAG is a folder OWNER--REPO--TAG, which the hub's names leave no doubt about: they have
no "--". It holds a GGUF file, or the parts of one, or a checkpoint's folder, and a note on where it came from. A GGUF
file that somebody put there goes by its own name, without the ending.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import BezelError, InvalidRequest
from .atomic import claimed
from .packaged import PACKAGED, assembled
from .strict_json import parse_json
from .user_cache import user_folder

CHECKPOINT = "checkpoint"  # the tag of one that was kept
NOTE = "bezel.json"
EYE = "mmproj-"  # what the name of a file with a vision tower begins with


def eye_path(model: Path) -> Path:
    """What the file of a model's own eye is called."""
    return model.with_name(f"{EYE}{model.name}")


def own_eye(model: Path) -> Path | None:
    """The file of a model's own eye, if there is one; what is a folder has its eye in itself."""
    if not model.is_file():
        return None
    eye = eye_path(model)
    return eye if eye.is_file() else None


_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"({_PART})/({_PART})(?::({_PART}))?")
_LONGEST = 200  # characters; file systems have 255


@dataclass(frozen=True)
class RepoName:
    """OWNER/REPO or OWNER/REPO:TAG, made of nothing that means something to a file system."""

    owner: str
    repo: str
    tag: str | None = None

    @classmethod
    def parse(cls, text: str) -> RepoName:
        """Raises InvalidRequest for anything else."""
        found = _REPO.fullmatch(text)
        if found is None or len(text) > _LONGEST or "--" in text or ".." in text:
            raise InvalidRequest(
                f"{text[:_LONGEST]!r}: is no name of a model, expected OWNER/REPO or OWNER/REPO:TAG, such as "
                "google/gemma-3-1b-it or somebody/gemma-3-1b-it-GGUF:Q4_K_M"
            )
        return cls(*found.groups())

    @property
    def untagged(self) -> str:
        return f"{self.owner}/{self.repo}"

    @property
    def folder_name(self) -> str:
        return "--".join(filter(None, (self.owner, self.repo, self.tag)))

    def __str__(self) -> str:
        return f"{self.untagged}:{self.tag}" if self.tag else self.untagged


@dataclass(frozen=True)
class NamedModel:
    """`place` is what it is in the models folder, `path` what opens it."""

    name: str
    place: Path
    path: Path

    @property
    def file_bytes(self) -> int:
        inside = [path for path in self.place.rglob("*") if path.name != NOTE]
        files = inside or [self.path, *filter(None, [own_eye(self.path)])]
        return sum(path.stat().st_size for path in files if path.is_file())

    def note(self) -> Mapping[str, Any]:
        """What was noted of where it came from; nothing where that is missing or damaged."""
        try:
            return parse_json((self.place / NOTE).read_bytes(), InvalidRequest)
        except (OSError, BezelError):
            return {}


def models_folder() -> Path:
    """BEZEL_MODELS, or a folder in the place for this user's data. It need not be there."""
    if chosen := os.environ.get("BEZEL_MODELS"):
        return Path(chosen).expanduser()
    return user_folder("Library/Application Support", "XDG_DATA_HOME", ".local/share") / "bezel" / "models"


def named_models() -> list[NamedModel]:
    """All in the models folder, by name."""
    folder = models_folder()
    places = folder.iterdir() if folder.is_dir() else ()
    found = (_folder_model(place) if place.is_dir() else _file_model(place) for place in places)
    return sorted(filter(None, found), key=lambda model: model.name)


def unfinished() -> dict[str, Path]:
    """Repositories that were not fetched to the end, and what there is of each."""
    folder = models_folder()
    found = {path.name[1:-5].replace("--", "/"): path for path in folder.glob(".*.part") if path.is_dir()}
    return {name: found[name] for name in sorted(found) if _REPO.fullmatch(name)}


def _folder_model(place: Path) -> NamedModel | None:
    words = place.name.split("--")
    if len(words) != 3 or not _REPO.fullmatch(name := f"{words[0]}/{words[1]}:{words[2]}"):
        return None
    files = sorted(path for path in place.glob("*.gguf") if not path.name.startswith(EYE)) or [
        path.parent for path in place.glob("*/config.json")
    ]
    return NamedModel(name, place, files[0]) if files else None


def _file_model(place: Path) -> NamedModel | None:
    sound = place.suffix == ".gguf" and re.fullmatch(_PART, place.stem) and not place.name.startswith(EYE)
    return NamedModel(place.stem, place, place) if sound else None


def find_named(name: str) -> NamedModel | None:
    """The model that is called so; without a tag, the only one of a repository. A kept checkpoint then counts last.

    Raises InvalidRequest where there are several.
    """
    models = named_models()
    for same in (str, str.lower):
        for model in models:
            if same(model.name) == same(name):
                return model
    found = [model for model in models if model.name.partition(":")[0].lower() == name.lower()]
    found = [model for model in found if not model.name.endswith(f":{CHECKPOINT}")] or found
    if len(found) > 1:
        raise InvalidRequest(f"{name}: there are several, so say which: {', '.join(m.name for m in found)}")
    return found[0] if found else None


def short_names() -> list[str]:
    """What models can be called, each by the shortest name that is enough."""
    names = [model.name for model in named_models()]
    repos = [name.partition(":")[0] for name in names]
    found = [repo if repos.count(repo) == 1 else name for name, repo in zip(names, repos, strict=True)]
    return [*found, *PACKAGED]


def find_model(path: str | Path) -> Path:
    """`path`; or, where there is nothing, what opens the model of that name.

    Raises InvalidRequest where a name is like a model's or a repository's, or stands for several models; and what
    `packaged.assembled` raises.
    """
    path = Path(path)
    if path.exists():
        return path
    name = path.as_posix()
    if name in PACKAGED:
        return assembled(name)
    model = find_named(name)
    if model is not None:
        return model.path
    meant = suggestion(name)
    # Not where it is more likely a path with a mistake in it.
    on_the_hub = _REPO.fullmatch(name) and path.suffix != ".gguf" and not path.parent.exists()
    if meant or on_the_hub:
        fetched = f"{'' if meant else ';'} `bezel pull {name}` would fetch it from the hub" if on_the_hub else ""
        raise InvalidRequest(f"{path}: there is no such file, and no model of that name{meant}{fetched}")
    return path


def suggestion(name: str) -> str:
    """Which model may have been meant by a name that none has."""
    names = [model.name for model in named_models()]
    close = get_close_matches(name, [*names, *(name.partition(":")[0] for name in names), *PACKAGED], 1)
    return f"; did you mean {close[0]}?" if close else ""


def remove(model: NamedModel) -> None:
    """Take it out of the models folder: at once, so that nothing is left under its name if this is broken off."""
    eye = own_eye(model.place)
    with claimed(model.place) as aside:
        _remove(aside)  # what is left of a removal that was broken off
        os.replace(model.place, aside)
        _remove(aside)
    if eye is not None:
        eye.unlink()


def remove_unfinished(name: str) -> None:
    """Throw away what was fetched of a key of `unfinished`."""
    with claimed(models_folder() / RepoName.parse(name).folder_name) as part:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_text(size: int) -> str:
    """A size for people: 806 MB, 2.4 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
