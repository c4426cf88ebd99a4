"""Types of numbers that bezel reads and never writes; those in blocks by the dequantizers of the `gguf` package.

The reference engine runs them, and an export takes them as its source. They are not in FORMATS: no exporter offers
them, and there are no kernels for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quant.formats import Readable
from ..errors import InvalidRequest

# Name, GGUF's number, weights and bytes in a block.
_TYPES = (
    ("iq2_xxs", 16, 256, 66),
    ("iq2_xs", 17, 256, 74),
    ("iq3_xxs", 18, 256, 98),
    ("iq1_s", 19, 256, 50),
    ("iq3_s", 21, 256, 110),
    ("iq2_s", 22, 256, 82),
    ("iq1_m", 29, 256, 56),
    ("tq1_0", 34, 256, 54),
    ("tq2_0", 35, 256, 66),
    ("mxfp4", 39, 32, 17),
    ("nvfp4", 40, 64, 36),
)


class F64(Readable):
    """As safetensors and GGUF store it; the numbers are rounded to float32."""

    name, gguf_type, block, block_bytes = "f64", 28, 1, 8

    @classmethod
    def dequantize(cls, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
            return np.ascontiguousarray(data).view("<f8").astype(np.float32)


class ReadOnly(Readable):
    @classmethod
    def dequantize(cls, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raises InvalidRequest where the `gguf` package is missing or too old."""
        try:
            from gguf import quants
            from gguf.constants import GGMLQuantizationType

            with np.errstate(all="ignore"):  # any bytes will do
                out: Any = quants.dequantize(data, GGMLQuantizationType(cls.gguf_type))
        except ImportError as error:
            raise InvalidRequest(
                f"{cls.name} weights are read by the gguf package, which is not installed ({error}): "
                "pip install 'bezel-lm[gguf]'"
            ) from None
        except (ValueError, NotImplementedError):
            raise InvalidRequest(
                f"{cls.name} weights are read by the gguf package, and that installed is too old: pip install -U gguf"
            ) from None
        return np.asarray(out, np.float32)


def _read_only(name: str, gguf_type: int, block: int, block_bytes: int) -> type[ReadOnly]:
    facts = {"name": name, "gguf_type": gguf_type, "block": block, "block_bytes": block_bytes}
    return type(name.upper(), (ReadOnly,), facts)


_ALL: tuple[type[Readable], ...] = (F64, *(_read_only(*facts) for facts in _TYPES))
READ_ONLY = {kind.gguf_type: kind for kind in _ALL}
