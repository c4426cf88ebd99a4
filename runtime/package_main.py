"""`python -m bezel`. This file is installed as `bezel/__main__.py`."""

from __future__ import annotations

from .runtime.commands.main import main

main(prog_name="bezel")
