"""Tuning what rounding left: blocks and norms that bring the whole model's answers closest to the exact model's."""
