"""What `import bezel` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import bezel
import pytest
from bezel import runtime


def test_the_package_offers_what_the_runtime_does() -> None:
    assert all(getattr(bezel, name) is getattr(runtime, name) for name in runtime.__all__)
    assert set(bezel.__all__) == {*runtime.__all__, "__version__"}
    assert bezel.__version__ == version("bezel-lm")
    with pytest.raises(AttributeError, match="module 'bezel' has no attribute 'unload'"):
        bezel.unload  # noqa: B018


def test_importing_it_loads_nothing() -> None:
    source = "import sys, bezel\nprint([name for name in sys.modules if name == 'numpy' or name.startswith('bezel.')])"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
