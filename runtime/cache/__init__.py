"""Positions and memory: what a layer keeps of the tokens that it has seen. Knows no file."""
