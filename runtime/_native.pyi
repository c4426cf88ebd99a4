from collections.abc import Sequence
from typing import Any

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

def explain_bus_errors() -> None:
    """From now on a mapped file that is cut short ends the process with a sentence and the exit status 1.

    For programs: a signal handler is the whole process's. Does nothing on Windows.
    """

class ThreadPool:
    """A persistent pool of `threads` threads, the caller's included; freed with the object.

    Several Python threads may share one: they take turns. A forked child must make its own.
    """

    def __init__(self, threads: int) -> None:
        """Raises ValueError outside 1 … 1024, RuntimeError where the system refuses to start a thread."""

    @property
    def threads(self) -> int: ...

class Matrix:
    """A row-major matrix of one of GGUF's types, used where it lies: keeps `data` alive and makes no copy.

    data: uint8 (rows, row_bytes), at any address, possibly read-only. The values are not looked at.
    """

    def __init__(self, data: NDArray[np.uint8], gguf_type: int, cols: int) -> None:
        """Raises ValueError for an unknown type, a wrong number of bytes, or another dtype or memory order."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...

def linear(
    pool: ThreadPool, x: NDArray[np.float32], matrices: Sequence[Matrix], exact: bool = False
) -> list[NDArray[np.float32]]:
    """x (n, cols) · each matrixᵀ → float32 (n, rows) of each; releases the GIL.

    For matrices of quantized types x is quantized, once for all of them, to int8 per block of 32: scale
    max|x| / 127 in float32, ties to even; integer dot products, scaled and summed over (sub-)blocks in float32. For
    float types, and for all if `exact` (slow), float32 fused multiply-adds, column by column. A result has the same
    bits whatever n, the other matrices, the number of threads and the instruction set. A block of x with an infinity
    or a NaN makes its token's row NaN. Raises ValueError for another dtype, shape or memory order.
    """

def feed_forward(
    pool: ThreadPool, x: NDArray[np.float32], gate: Matrix, up: Matrix, down: Matrix, exact: bool = False
) -> NDArray[np.float32]:
    """down · (gelu(gate · x) ⊙ (up · x)) of x (n, cols) → float32 (n, down.rows); releases the GIL.

    GELU by its tanh approximation. The bits are those of its parts: `linear`, the activation of each element, `linear`.
    Raises ValueError for another dtype, shape or memory order, and for matrices whose sizes do not fit.
    """

def embed(matrix: Matrix, ids: NDArray[np.int64], scale: float) -> NDArray[np.float32]:
    """Rows ids (n,), dequantized, times scale → (n, cols). Raises ValueError for an id that is no row."""

def split_strings(data: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`count` strings as GGUF writes an array of them, each after its length in eight bytes: their text without the
    lengths, and where in it each ends. Fewer come back where `data` ends first."""

def string_hashes(text: NDArray[np.uint8], ends: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A hash of each string. Raises ValueError for ends that are not in order or lie past the text."""

def sentencepiece_pieces(
    text: NDArray[np.uint8], ends: NDArray[np.int64], scores: NDArray[np.float32], types: NDArray[np.int32]
) -> bytes:
    """The pieces of a serialised ModelProto: messages of text, score and type. Raises ValueError as `string_hashes`."""

def read_bandwidth(pool: ThreadPool, data: NDArray[np.uint8]) -> float:
    """Bytes a second at which all threads read `data` (n,) once, plainly; releases the GIL.

    Raises ValueError for less than 1 MiB, TypeError for another dtype or memory order.
    """

def int8_peak(pool: ThreadPool, seconds: float) -> float:
    """Integer operations a second, two a multiply-add, of the best int8 dot product of `isa()`, on registers only.

    All threads compute for about `seconds`; releases the GIL.
    """

def float_peak(pool: ThreadPool, seconds: float) -> float:
    """`int8_peak` for float32's multiply-add."""

class KVStore:
    """Keys and values of one layer, for `capacity` positions; position p takes the place of p − capacity or of an
    earlier one. Memory is reserved at once and taken as it is filled.

    `kv` is "f32", "f16", or "int8" with a float32 scale per head and position, as `cache.numpy_store` has it, of the
    head rotated by `cache.rotation.hadamard` where head_dim is a power of two. A store knows no length: the caller says
    which positions it holds. Not to be written while another thread reads it.
    """

    def __init__(self, kv_heads: int, head_dim: int, capacity: int, kv: str) -> None:
        """head_dim is even and at most 512. Raises ValueError for sizes that do not fit, MemoryError."""

    @staticmethod
    def bytes_for(kv_heads: int, head_dim: int, capacity: int, kv: str, positions: int) -> int:
        """`nbytes` of such a store once the positions 0 … positions − 1 have been written. Raises ValueError."""

    @property
    def nbytes(self) -> int:
        """What has been filled, in steps of 256 positions."""

    def write(self, pool: ThreadPool, position: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Keys (after RoPE) and values (n, kv_heads, head_dim) of the positions from `position` on; n ≤ capacity."""

    def attend(
        self,
        pool: ThreadPool,
        queries: NDArray[np.float32],
        first: NDArray[np.int64],
        last: NDArray[np.int64],
        scale: float,
        softcap: float | None,
    ) -> NDArray[np.float32]:
        """Attention of queries (n, heads, head_dim); query i sees first[i] ≤ p < last[i], one position at least.

        Same shape back. All positions from the smallest first to the largest last must have been written, and fit the
        capacity. Where their keys and values are finite, a query's result is the same bits among any other queries, in
        any store that holds what it sees, and on any number of threads. With int8, queries are rotated as the keys are,
        and they and the softmax weights are quantized to 16 bits (the weights, times the values' scales, per 256
        positions). Raises ValueError for another dtype, shape or memory order, and for spans that are empty or do not
        fit.
        """

    def raw(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Positions start … stop − 1 as they are stored, rotated too: "keys" and "values" (n, kv_heads, head_dim), and
        for int8 "key_scales" and "value_scales" (n, kv_heads)."""

    def set_raw(self, start: int, arrays: dict[str, NDArray[Any]]) -> None:
        """What `raw` returned, to the positions from `start` on. Raises ValueError if it does not fit."""

def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, pool: ThreadPool) -> NDArray[np.float32]:
    """`ops.rms_norm` of x (…, dim) with weight (dim,). This and what follows: ValueError for another dtype, shape or
    memory order; the GIL is released; a row's result is the same bits in any chunk and on any number of threads."""

def add_norm(
    x: NDArray[np.float32],
    h: NDArray[np.float32],
    post_weight: NDArray[np.float32] | None,
    next_weight: NDArray[np.float32],
    eps: float,
    pool: ThreadPool,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """x + rms_norm(h, post_weight), or x + h without a post_weight; and rms_norm of that with next_weight."""

def layer_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float, pool: ThreadPool
) -> NDArray[np.float32]:
    """`ops.layer_norm` of x (n, dim) with weight and bias (dim,)."""

def bias_gelu(x: NDArray[np.float32], bias: NDArray[np.float32], pool: ThreadPool) -> None:
    """`ops.bias_gelu` of x (n, dim) with bias (dim,), in place."""

def softcap(x: NDArray[np.float32], cap: float, pool: ThreadPool) -> None:
    """cap · tanh(x / cap), in place; x (n, dim)."""

def rope(x: NDArray[np.float32], positions: NDArray[np.int64], base: float, factor: float, pool: ThreadPool) -> None:
    """Rotary embedding, in place, of x (n, heads, head_dim) at positions (n,): element i of a head turns with element
    i + head_dim / 2, by the frequency base^(−2i / head_dim) / factor, float32 before and after it is divided."""
