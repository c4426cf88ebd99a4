"""Which room may import what, read from the source: late imports and literal `import_module` calls count."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("runtime", "export", "quant", "bench")
CONTRACT = (
    *("errors", "config", "tensors", "gguf", "tokenizer", "protobuf", "strict_json", "files", "ops"),
    *("onnx_folder", "onnx_model", "onnx_tensors", "model_file"),
)

CONTRACT_MODULES = {f"bezel.runtime.{name}" for name in CONTRACT}
RUNTIME_THIRD_PARTY = {"numpy", "click", "sentencepiece", "threadpoolctl", "safetensors"}


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or any(path.with_suffix(suffix).exists() for suffix in (".py", ".pyi"))


def imports(path: Path, source: str) -> Iterator[str]:
    """Absolute names of the modules that `source`, at `path` below the root, imports anywhere."""
    package = ["bezel", *path.parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if module.startswith("bezel") and is_module(inner) else module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def type_checking_only(source: str) -> set[str]:
    blocks = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    bodies = [node.body for node in blocks if ast.unparse(node.test).endswith("TYPE_CHECKING")]
    return {name for body in bodies for node in body for name in imports(Path("x.py"), ast.unparse(node))}


def allowed(path: Path, target: str) -> bool:
    """Whether the module at `path` may import `target`, which is no part of the standard library."""
    room, third_party = path.parts[0], target.split(".")[0]
    if room == "bench":
        return third_party != "tests"
    if room == "quant":
        return third_party == "numpy" or target.startswith("bezel.quant")
    if room == "export":
        return (
            third_party in ("numpy", "gguf", "onnx", "click")
            or target.startswith(("bezel.quant", "bezel.export"))
            or target in CONTRACT_MODULES
        )
    if target == "bezel.quant.formats":
        return True
    if len(path.parts) == 2 and path.stem in CONTRACT:
        vocabulary = path.stem == "tokenizer" and third_party == "sentencepiece"
        return third_party == "numpy" or target in CONTRACT_MODULES or vocabulary
    if third_party == "onnxruntime":
        return path.name.startswith("ort")
    return third_party in RUNTIME_THIRD_PARTY or target == "bezel.runtime" or target.startswith("bezel.runtime.")


def violations(path: Path, source: str) -> list[str]:
    optional = type_checking_only(source) & {"typing_extensions"}
    return [
        target
        for target in imports(path, source)
        if target.split(".")[0] not in sys.stdlib_module_names and target not in optional and not allowed(path, target)
    ]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_every_module_keeps_to_its_room(path: Path) -> None:
    found = violations(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not found, f"{path} may not import {', '.join(found)}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/x.py", "from ..runtime.errors import BezelError"),
        ("quant/x.py", "import scipy"),
        ("runtime/config.py", "from .cache import Cache"),
        ("runtime/config.py", "from . import model"),
        ("runtime/errors.py", "import click"),
        ("runtime/gguf.py", "from ..quant.recipes import RECIPES"),
        ("runtime/model.py", "def f():\n    import torch"),
        ("runtime/model.py", "import torch.nn as nn"),
        ("runtime/model.py", "from onnxruntime import InferenceSession"),
        ("runtime/ort.py", "import onnx"),
        ("runtime/model.py", "from bezel.quant import recipes"),
        ("runtime/model.py", "from .. import export"),
        ("runtime/model.py", "from ..bench.speed import run"),
        ("runtime/model.py", "import importlib\nimportlib.import_module('transformers')"),
        ("runtime/model.py", "import importlib\nimportlib.import_module('bezel.export.cli')"),
        ("runtime/deep/er.py", "from ...export import gguf"),
        ("runtime/model.py", "from typing_extensions import Self"),
        ("export/x.py", "from ..runtime.model import forward"),
        ("export/x.py", "from ..bench import speed"),
        ("export/x.py", "import torch"),
        ("bench/x.py", "from tests.test_native import W"),
    ],
)
def test_a_planted_import_is_found(path: str, source: str) -> None:
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/x.py", "import math, numpy.linalg\nfrom .formats import FORMATS"),
        (
            "runtime/gguf.py",
            "import mmap\nfrom ..quant.formats import FORMATS\nfrom .config import ModelConfig",
        ),
        ("runtime/gguf.py", "from ..quant import formats\nfrom . import errors"),
        ("runtime/model.py", "from . import _native, cache\nfrom ._native import ThreadPool"),
        ("runtime/ort.py", "def f():\n    import onnxruntime"),
        ("runtime/model.py", "if TYPE_CHECKING:\n    from typing_extensions import Self"),
        ("runtime/cli.py", "import importlib\nimportlib.import_module(f'bezel.{room}.cli')"),
        (
            "export/x.py",
            "import gguf, onnx, click\nfrom ..runtime.gguf import read\nfrom ..quant import recipes",
        ),
        ("bench/x.py", "import torch\nfrom ..export import gguf\nfrom ..runtime import model"),
    ],
)
def test_a_proper_import_is_let_through(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    heavy = ["onnx", "onnxruntime", "torch", "transformers", "sentencepiece", "click", "gguf"]
    source = f"import sys, bezel.runtime\nprint([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
