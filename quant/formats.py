"""The number formats of a model file, all of them registered in FORMATS."""

from .base import EVEN, FORMAT_OF_TYPE, FORMATS, Blocks, Bytes, F32Array, Format
from .basic import BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .iq4 import IQ4_NL, IQ4_XS
from .k_quants import Q4_K, Q5_K, Q6_K

__all__ = [
    "BF16",
    "EVEN",
    "F16",
    "F32",
    "FORMATS",
    "FORMAT_OF_TYPE",
    "IQ4_NL",
    "IQ4_XS",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "Blocks",
    "Bytes",
    "F32Array",
    "Format",
]
