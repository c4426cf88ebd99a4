"""Matrices in blocks, for tensors' sake: as they are, with scales that move a little, and with codes that do, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...quant.base import Blocks, Format
from ...runtime.arrays import Floats

_REACH = 0.45  # of a code, that a weight may lie away from it at the start: what is at half changes at a touch


class Rounded:
    """A matrix in blocks (rows, row_bytes), which stay; they are unpacked whenever its numbers are asked for."""

    def __init__(self, form: type[Format], blocks: NDArray[np.uint8]) -> None:
        self._form, self._rows = form, blocks

    def __call__(self) -> Tensor:
        """(rows, inputs)."""
        return torch.from_numpy(self._form.dequantize(self._rows))

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Rows by number (…), (…, inputs)."""
        different, places = ids.unique(return_inverse=True)
        rows: Tensor = torch.from_numpy(self._form.dequantize(self._rows[different.numpy()]))[places]
        return rows


class Scaled:
    """A matrix in blocks (rows, row_bytes), which come back changed from `blocks`: their float16 scales have factors.

    Codes and sub-scales stay. Calling it gives the matrix (rows, inputs), as its blocks would be read; gradients pass
    through the rounding of scales.
    """

    def __init__(self, form: type[Format], blocks: NDArray[np.uint8]) -> None:
        self._form, self._rows = form, blocks
        self._blocks: Blocks = blocks.reshape(-1).view(form.layout)
        self._names = [name for name in form.layout.names or () if form.layout[name] == np.dtype("<f2")]
        self.factors = torch.zeros(len(self._names), len(self._blocks), 1, requires_grad=True)  # logarithms
        self.moving = {"factors": self.factors}
        scale, offset = self._steps()
        self._parts = form.block // _run(scale, offset)  # of a block, whose weights have one scale
        self._offset = self._by_parts(offset) if offset.any() else None

    def __call__(self) -> Tensor:
        old = self._halves()
        ratio = torch.where(old == 0, 1, self._new_halves() / old)
        weights = self._scaled(ratio[0][..., None])
        if self._offset is not None:
            weights = weights + self._offset * ratio[-1][..., None]
        matrix: Tensor = weights.reshape(len(self._rows), -1)
        return matrix

    def _scaled(self, ratio: Tensor) -> Tensor:
        """Codes times scales (blocks, parts, weights of a part), where scales are `ratio` (blocks, 1, 1) of the old."""
        weights = torch.from_numpy(self._form.dequantize(self._rows)).reshape(len(self._blocks), self._parts, -1)
        return (weights if self._offset is None else weights - self._offset) * ratio

    def _steps(self) -> tuple[Floats, Floats]:
        """Scale and offset of each weight, (blocks, block) both."""
        scale, offset = (
            np.broadcast_to(x, (len(self._blocks), self._form.block)) for x in self._form.steps(self._blocks)
        )
        return scale, offset

    def _by_parts(self, x: Floats) -> Tensor:
        """(blocks, parts, 1) of what all weights of a part have alike, (blocks, block)."""
        return _tensor(x.reshape(len(x), self._parts, -1)[..., :1])

    def _halves(self) -> Tensor:
        """The blocks' float16 scales, (names, blocks, 1)."""
        return torch.stack([_tensor(self._blocks[name]) for name in self._names])[..., None]

    def _new_halves(self) -> Tensor:
        exact: Tensor = self._halves() * self.factors.exp()
        return exact + (exact.half().float() - exact).detach()

    def blocks(self) -> NDArray[np.uint8]:
        """(rows, row_bytes)."""
        out = self._blocks.copy()
        for name, half in zip(self._names, self._new_halves(), strict=True):
            out[name] = half[:, 0].detach().numpy().astype(np.float16)
        return out.view(np.uint8).reshape(self._rows.shape)


class Latent(Scaled):
    """As `Scaled`, and codes change, too.

    Each weight is a place in the codebook, and a code the nearest one. It begins as far from its code as the exact
    weight (rows, inputs) lies, so that the codes about which rounding was least sure change first. Gradients pass
    through this rounding as well.
    """

    def __init__(self, form: type[Format], blocks: NDArray[np.uint8], exact: Floats) -> None:
        super().__init__(form, blocks)
        scale, offset = self._steps()
        places = np.arange(len(form.codebook))
        with np.errstate(divide="ignore", invalid="ignore"):
            chosen = (form.dequantize(blocks).reshape(scale.shape) - offset) / scale
            near = (exact.reshape(scale.shape) - offset) / scale
        codes = np.rint(np.interp(np.nan_to_num(chosen), form.codebook, places))
        near = np.interp(np.nan_to_num(near), form.codebook, places)
        self._scale = self._by_parts(scale)
        self.place = _tensor(near.clip(codes - _REACH, codes + _REACH)).requires_grad_()
        self.moving = {"place": self.place, "factors": self.factors}
        self._codebook = _tensor(form.codebook)

    def _scaled(self, ratio: Tensor) -> Tensor:
        values = self._codebook[self._codes()] + (self.place - self.place.detach())
        return values.unflatten(1, (self._parts, -1)) * (self._scale * ratio)

    def _codes(self) -> Tensor:
        codes: Tensor = self.place.detach().round().clamp(0, len(self._codebook) - 1).int()
        return codes

    def blocks(self) -> NDArray[np.uint8]:
        out = super().blocks()
        self._form.put_codes(self._codes().numpy().astype(np.uint8), out.reshape(-1).view(self._form.layout))
        return out


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
