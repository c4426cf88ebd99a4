import numpy as np
from numpy.typing import NDArray

def isa() -> str:
    """The instruction set that the kernels use: the environment's BEZEL_ISA, else the best of `isas()`.

    Settled by the first call of this or of a kernel. Raises ValueError where BEZEL_ISA is none of `isas()`.
    """

def isas() -> list[str]:
    """All that this machine can run, best last: "scalar", then of "avx2", "avxvnni", "avx512vnni", or of
    "neon", "neondot", "neoni8mm"."""

def default_threads() -> int:
    """Physical performance cores that this process may use, at least 1."""

class ThreadPool:
    """A persistent pool of `threads` threads, the caller's included; freed with the object.

    Several Python threads may share one: they take turns. A forked child must make its own.
    """

    def __init__(self, threads: int) -> None:
        """Raises ValueError outside 1 … 1024, RuntimeError where the system refuses to start a thread."""

    @property
    def threads(self) -> int: ...

def gemv_q8_0(weights: NDArray[np.uint8], x: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]:
    """weights (rows, n / 32 · 34) in Q8_0 · x (n,) → (rows,); releases the GIL.

    x is quantized to int8 per block of 32 (scale max|x| / 127 in float32, ties to even); integer dot
    products, scaled and summed over blocks in float32. The result does not depend on the number of threads;
    a block of x with an infinity or a NaN makes every row NaN. `weights` may start at any byte and be
    read-only. Raises ValueError for another dtype, shape or memory order.
    """
