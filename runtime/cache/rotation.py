"""A rotation of heads by which an outlier is spread over all of a head's numbers, so that one int8 scale suits them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def hadamard(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x (…, n) times the Hadamard matrix over √n, for n a power of two. It is its own inverse and keeps dot products.

    The fast Walsh–Hadamard transform: log2 n times the sums and the differences of the two halves, side by side. The
    native kernel adds the same numbers in the same order, and so gives the same bits.
    """
    n = x.shape[-1]
    y = x
    for _ in range(n.bit_length() - 1):
        first, second = np.split(y, 2, axis=-1)
        y = np.stack([first + second, first - second], axis=-1).reshape(x.shape)
    rotated: npt.NDArray[np.float32] = y * np.sqrt(x.dtype.type(1 / n))
    return rotated
