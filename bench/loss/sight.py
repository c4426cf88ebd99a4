"""Whether the eye in a folder sees what its weights say: a drawn picture, on onnxruntime and on the reference engine.

Both compute with float32 activations, so that only the order of sums tells them apart: rows are 2e-7 to 1e-6 of their
length apart, in a tower of SigLIP's 27 layers as in one of two, where another form of GELU gives 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.api import load
from ...runtime.arrays import Floats
from ...runtime.files.model_file import open_model
from ...runtime.vision.image import Image
from ..pictures.draw import draw, scene

LARGEST_DIFFERENCE = 3e-5


@dataclass(frozen=True)
class Sight:
    """How far the `rows` of a picture are from the reference's: the largest ‖x − y‖ / ‖y‖ of a row."""

    rows: int
    difference: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed


def sight(path: Path, threads: int | None = None) -> Sight | None:
    """Compare what a folder's own eye sees with what the reference engine sees by its weights; None without an eye.

    Raises what loading raises, and InvalidModelFile for rows that are not finite.
    """
    with open_model(path) as file:
        if file.vision is None:
            return None
    random = np.random.default_rng(0)
    picture = Image(draw(scene(random, 3), random))
    found, want = (_seen(path, engine, picture, threads) for engine in (None, "reference"))
    lengths = np.maximum(np.linalg.norm(want, axis=1), np.finfo(np.float32).tiny)
    apart = np.linalg.norm(found - want, axis=1) / lengths
    return Sight(len(want), float(apart.max()), LARGEST_DIFFERENCE)


def _seen(path: Path, engine: str | None, picture: Image, threads: int | None) -> Floats:
    with load(path, engine, activations="f32", threads=threads) as model:
        assert model.eye is not None
        return model.eye.look(picture).rows
