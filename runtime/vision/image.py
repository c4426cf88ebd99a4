"""stub"""

from __future__ import annotations

import numpy as np
from PIL import Image as P


class Image:
    def __init__(self, source):
        self.name = "picture"
        self._p = P.fromarray(source) if isinstance(source, np.ndarray) else P.open(source).convert("RGB")

    def fitted(self, size, resample="bilinear"):
        return np.asarray(self._p.resize((size, size), {"bilinear": 2, "bicubic": 3}[resample]))


def normalized(pixels, mean, std):
    return ((pixels.astype(np.float32) / np.float32(255)) - np.array(mean, np.float32)) / np.array(std, np.float32)
