"""The number formats of a model file, all of them registered in FORMATS."""

# "as" because others import them from here
from .base import EVEN as EVEN
from .base import FORMAT_OF_TYPE as FORMAT_OF_TYPE
from .base import FORMATS as FORMATS
from .base import Blocks as Blocks
from .base import Bytes as Bytes
from .base import F32Array as F32Array
from .base import Format as Format
from .base import Readable as Readable
from .basic import BF16 as BF16
from .basic import F16 as F16
from .basic import F32 as F32
from .basic import Q4_0 as Q4_0
from .basic import Q4_1 as Q4_1
from .basic import Q5_0 as Q5_0
from .basic import Q5_1 as Q5_1
from .basic import Q8_0 as Q8_0
from .iq4 import IQ4_NL as IQ4_NL
from .iq4 import IQ4_XS as IQ4_XS
from .k_quants import Q2_K as Q2_K
from .k_quants import Q3_K as Q3_K
from .k_quants import Q4_K as Q4_K
from .k_quants import Q5_K as Q5_K
from .k_quants import Q6_K as Q6_K
