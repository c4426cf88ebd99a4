"""Blocks whose numbers can be moved a little: codes as real numbers, and factors of the scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...quant.base import Blocks, Format
from ...runtime.arrays import Floats

_REACH = 0.45  # of a code, that a weight may lie away from it at the start: what is at half changes at a touch


class Latent:
    """A matrix in blocks (rows, row_bytes), which come back changed from `blocks`.

    Each weight is a place in the codebook, and a code the nearest one. It begins as far from its code as the exact
    weight (rows, inputs) lies, so that the codes about which rounding was least sure change first. The float16 scales
    of blocks get factors; sub-scales stay.
    """

    def __init__(self, form: type[Format], blocks: NDArray[np.uint8], exact: Floats) -> None:
        self.form, self.shape = form, exact.shape
        self._blocks: Blocks = blocks.reshape(-1).view(form.layout)
        scale, offset = (np.broadcast_to(x, (len(self._blocks), form.block)) for x in form.steps(self._blocks))
        places = np.arange(len(form.codebook))
        with np.errstate(divide="ignore", invalid="ignore"):
            chosen = (form.dequantize(blocks).reshape(scale.shape) - offset) / scale
            near = (exact.reshape(scale.shape) - offset) / scale
        codes = np.rint(np.interp(np.nan_to_num(chosen), form.codebook, places))
        near = np.interp(np.nan_to_num(near), form.codebook, places)
        self.place = _tensor(near.clip(codes - _REACH, codes + _REACH)).requires_grad_()
        self._names = [name for name in form.layout.names or () if form.layout[name] == np.dtype("<f2")]
        self.factors = torch.zeros(len(self._names), len(self._blocks), 1, requires_grad=True)  # logarithms
        self.moving = {"place": self.place, "factors": self.factors}
        self._halves = torch.stack([_tensor(self._blocks[name]) for name in self._names])[..., None]
        self._codebook = _tensor(form.codebook)
        parts = form.block // _run(scale, offset)
        self._scale = _tensor(scale.reshape(len(scale), parts, -1)[..., :1])
        self._offset = _tensor(offset.reshape(len(scale), parts, -1)[..., :1]) if offset.any() else None

    def __call__(self) -> Tensor:
        """The matrix (rows, inputs), as its blocks would be read; gradients pass through rounding."""
        new = self._new_halves()
        ratio = torch.where(self._halves == 0, 1, new / self._halves)
        scale = self._scale * ratio[0][..., None]  # (blocks, parts, 1)
        values = self._codebook[self._codes()] + (self.place - self.place.detach())
        values = values.unflatten(1, (scale.shape[1], -1))
        weights = values * scale
        if self._offset is not None:
            weights = weights + self._offset * ratio[-1][..., None]
        matrix: Tensor = weights.reshape(self.shape)
        return matrix

    def _codes(self) -> Tensor:
        codes: Tensor = self.place.detach().round().clamp(0, len(self._codebook) - 1).int()
        return codes

    def _new_halves(self) -> Tensor:
        exact: Tensor = self._halves * self.factors.exp()
        return exact + (exact.half().float() - exact).detach()

    def blocks(self) -> NDArray[np.uint8]:
        """(rows, row_bytes)."""
        out = self._blocks.copy()
        for name, half in zip(self._names, self._new_halves(), strict=True):
            out[name] = half[:, 0].detach().numpy().astype(np.float16)
        self.form.put_codes(self._codes().numpy().astype(np.uint8), out)
        return out.view(np.uint8).reshape(self.shape[0], -1)


def _tensor(x: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(x, np.float32))


def _run(*arrays: Floats) -> int:
    """How many neighbours of a row always have the same values: 16 or more."""
    width = arrays[0].shape[1]
    for run in (width, 32, 16):
        parts = [x.reshape(len(x), -1, run) for x in arrays if width % run == 0]
        if parts and all((part == part[..., :1]).all() for part in parts):
            return run
    return 1
