"""Tuning what rounding left: blocks and norms that bring the whole model's answers closest to the exact model's."""

import os

# For torch, which looks when it is imported: memory that is new each time, `give_back_at_once`, is there as quickly.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
