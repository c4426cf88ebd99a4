"""Rounding an eye's matrices for what pictures send through them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import Format
from ...runtime.arrays import Arrays, Floats
from ...runtime.errors import InvalidRequest
from ...runtime.model import ops as plain
from ...runtime.model.forward import Weights
from ...runtime.model.tensors import TensorSpec
from ...runtime.model.vision import VisionConfig, as_multiplied, is_multiplied, patches_of, see
from ...runtime.version import bezel_version
from ...runtime.vision.image import Image, normalized
from ..kept import KeptWork
from ..ordered import ordered
from ..sources.checkpoint import VisionSource
from ..whole import by_rows
from .moments import source_sha256
from .noting import moments
from .rounding import Feedback

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_MOST_PATCHES = 32768  # what is kept of all at once takes so many times the widest row


@dataclass(frozen=True)
class CalibrationPictures:
    """Some pictures as an eye takes them: `patches` (count · n, patch_inputs), those of each behind the last one's."""

    count: int
    sha256: str
    patches: Floats


def read_pictures(config: VisionConfig, folder: Path) -> CalibrationPictures:
    """The pictures in a folder, or as many of them as serve, spread evenly by name. Raises InvalidRequest."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise InvalidRequest(f"{folder}: found no picture, expected files of {', '.join(sorted(_SUFFIXES))}")
    count = min(len(paths), max(1, _MOST_PATCHES // config.n_patches))
    digest, patches = hashlib.sha256(), []
    for i in range(count):
        pixels = Image(paths[i * len(paths) // count]).fitted(config.image_size, config.resample)
        digest.update(pixels.tobytes())
        patches.append(patches_of(normalized(pixels, config.mean, config.std), config.patch_size))
    return CalibrationPictures(count, digest.hexdigest(), np.concatenate(patches))


class CalibratedEye:
    """Each matrix is rounded for the inputs that it gets from those before it, as they are rounded."""

    method = "error feedback on the quantized eye's inputs"

    def __init__(
        self,
        eye: VisionSource,
        pictures: CalibrationPictures,
        formats: Mapping[str, type[Format]],
        kept: KeptWork,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`formats` by GGUF name; `progress` is called with (done, in all), in weights."""
        self._eye, self._pictures, self._formats, self._kept = eye, pictures, formats, kept
        self._progress = progress

    @staticmethod
    def key(eye: VisionSource, pictures: CalibrationPictures, formats: Mapping[str, type[Format]]) -> dict[str, object]:
        """All that the blocks depend on."""
        return {
            "eye": 1,
            "pictures": pictures.sha256,
            "source": source_sha256(eye),
            "tool": bezel_version(),
            "formats": {name: form.name for name, form in formats.items()},
        }

    def blocks(self, spec: TensorSpec) -> NDArray[np.uint8] | None:
        return self._found.get(spec.gguf)

    @cached_property
    def _found(self) -> Arrays:
        found: Arrays | None = self._kept.load(0)
        if found is None:
            eye, count = self._eye, self._pictures.count
            shared: dict[str, Any] = {}
            layers: list[dict[str, Any]] = [{} for _ in range(eye.config.n_layers)]
            for spec in eye.specs:
                home = shared if spec.layer is None else layers[spec.layer]
                home[spec.role] = spec if spec.is_matrix else eye.tensor(spec)
                if is_multiplied(spec) and not spec.is_matrix:
                    home[spec.role] = as_multiplied(eye.config, spec, home[spec.role])
            shared["v_positions"] = np.tile(shared["v_positions"], (count, 1))
            rounding = _RoundingOps(eye, count, self._formats, self._progress)
            see(eye.config, rounding, Weights(shared, layers), self._pictures.patches)
            found = rounding.found
            self._kept.save(0, found)
        return found


class _RoundingOps:
    """`VisionOps` on the patches of several pictures at once, which round each matrix for what comes to it, and
    multiply with what was rounded. A matrix's weights are its `TensorSpec`.
    """

    def __init__(
        self,
        eye: VisionSource,
        count: int,
        formats: Mapping[str, type[Format]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._eye, self._count, self._formats, self._progress = eye, count, formats, progress
        self._done, self._total = 0, sum(math.prod(spec.shape) for spec in eye.specs if spec.is_matrix)
        self.found: dict[str, NDArray[Any]] = {}

    split_heads, join_heads = staticmethod(plain.split_heads), staticmethod(plain.join_heads)

    def linear(self, x: Floats, *weights: TensorSpec | Floats) -> list[Floats]:
        specs = [weight for weight in weights if isinstance(weight, TensorSpec)]
        if not specs:  # those that are never quantized
            return plain.linear(x, *(weight for weight in weights if not isinstance(weight, TensorSpec)))
        feedback = Feedback(moments(x)[0])
        for spec in specs:
            self.found[spec.gguf] = feedback.quantize(self._formats[spec.gguf], spec, self._eye.rows)
            self._done += math.prod(spec.shape)
            if self._progress:
                self._progress(self._done, self._total)
        return plain.linear(x, *(self._formats[s.gguf].dequantize(self.found[s.gguf]) for s in specs))

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
        return by_rows(lambda x: (plain.layer_norm(x, weight, bias, eps),), x)[0]

    def bias_gelu(self, x: Floats, bias: Floats) -> Floats:
        return by_rows(lambda x: (plain.bias_gelu(x, bias),), x)[0]

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        return by_rows(lambda x: (plain.rms_norm(x, weight, eps),), x)[0]

    def mean_pool(self, x: Floats, side: int, by: int) -> Floats:
        return np.concatenate([plain.mean_pool(part, side, by) for part in np.split(x, self._count)])

    def attend_all(self, q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
        def one(part: tuple[Floats, Floats, Floats]) -> Floats:
            return plain.attend_all(*part, scale)

        q, k, v = (x.reshape(self._count, -1, *x.shape[1:]) for x in (q, k, v))
        return np.concatenate(list(ordered(one, zip(q, k, v, strict=True))))
