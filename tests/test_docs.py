"""What the pages say is what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from make_docs import PAGE, page

ROOT = Path(__file__).parents[1]


def test_the_python_page_is_the_docstrings() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/make_docs.py writes it anew"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/cluster.md"])
def test_what_a_page_points_to_is_there(name: str) -> None:
    """Links, and paths in backticks that begin with a room."""
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [(ROOT / name).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    paths = [ROOT / path for path in re.findall(r"`((?:runtime|export|quant|bench|tests|docs)/[\w./-]*)`", text)]
    missing = [str(path) for path in links + paths if not path.exists()]
    assert not missing, f"{name} points to {', '.join(missing)}"
