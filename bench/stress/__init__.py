"""Texts seen from odd sides: where a rounded model leaves the exact one most."""
