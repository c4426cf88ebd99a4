"""Rounding weights for what a text sends through them."""
