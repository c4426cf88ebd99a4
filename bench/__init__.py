"""How fast a model runs, and what quantizing cost."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
DEMO = DATA / "fairy-gemma2"  # the bundled checkpoint
PICTURES = DATA / "shapes-gemma3"  # the bundled one that sees
