"""A GGUF file with a model's eye in it, `mmproj-….gguf` as llama.cpp calls it, its files included."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import BezelError, InvalidModelFile, InvalidRequest
from ..model.families.sight import check_fits, is_gguf_vision, read_gguf_vision
from ..model.vision import VisionConfig, vision_specs
from .gguf import GGUFFile, shape_text
from .models import EYE, eye_path, own_eye


def eyes_beside(path: Path) -> list[Path]:
    """The files of eyes that lie beside a model file: the one of its name, `mmproj-NAME.gguf`, or all there are."""
    if (own := own_eye(path)) is not None:
        return [own]
    return sorted(other for other in path.parent.glob("*mmproj*.gguf") if other.is_file() and other != path)


def vision_beside(path: Path) -> Path:
    """The eye that lies beside a model file: by its name, `mmproj-NAME.gguf`, or the only one there.

    Raises InvalidRequest where there is none, or several others.
    """
    found = eyes_beside(path)
    if not found:
        raise InvalidRequest(
            f"there is no vision tower, {EYE}….gguf, beside its file (`bezel export` writes it where the checkpoint "
            "has one; --vision FILE gives another)"
        )
    if len(found) > 1:
        raise InvalidRequest(
            f"{path.parent}: has {len(found)} files of vision towers ({', '.join(f.name for f in found)}); say which "
            f"belongs to {path.name}: --vision FILE, or vision= in Python, or call it {eye_path(path).name}"
        )
    return found[0]


def is_eye(path: Path) -> bool:
    """Whether this is a GGUF file that says that it holds an eye."""
    try:
        with GGUFFile(path) as file:
            return is_gguf_vision(file.metadata)
    except BezelError:  # which is told where it is opened as what it should be
        return False


class VisionFile(GGUFFile):
    """Opened and checked: `config` is what it says, for a text model of `hidden_size`, or for any.

    Raises InvalidModelFile, and InvalidConfig where it belongs to another model.
    """

    def __init__(self, path: str | Path, hidden_size: int | None = None) -> None:
        super().__init__(path)
        try:
            self.config = read_gguf_vision(self.metadata, str(self.path))
            if hidden_size is not None:
                check_fits(self.config, hidden_size, str(self.path))
            self._names = self._checked_names(self.config)
        except BaseException:
            self.close()
            raise

    def _checked_names(self, config: VisionConfig) -> dict[str, str]:
        """What each tensor of `vision_specs` is called in this file."""
        specs = {spec.gguf: spec for spec in vision_specs(config)}
        names = {name: name for name in specs}
        first = self.tensors.get("v.blk.0.ffn_down.weight")
        if first is not None and first.shape == specs["v.blk.0.ffn_up.weight"].shape != specs[first.name].shape:
            # Older converters had them the wrong way round.
            other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
            for name in specs:
                for one, two in other.items():
                    if f".{one}." in name:
                        names[name] = name.replace(f".{one}.", f".{two}.")
        self.check_shapes({names[name]: spec.shape for name, spec in specs.items()})
        for name, info in self.tensors.items():
            if name not in names.values():
                shape = shape_text(info.shape)
                raise InvalidModelFile(self.path, f"tensor {name!r}: found shape {shape}, expected no such tensor")
        return names

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor of `vision_specs`, by its name there, as float32 in its own shape."""
        return self.dequantize(self._names[name])

    def name_of(self, name: str) -> str:
        """What a tensor of `vision_specs` is called here."""
        return self._names[name]

    def fingerprint(self) -> str:
        """Which eye this is: SHA-256 (hex) of its header and the first 4 KiB of each tensor."""
        digest = hashlib.sha256(self.header())
        for sample in self.samples():
            digest.update(sample)
        return digest.hexdigest()
