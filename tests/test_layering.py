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
# What export and bench share with the runtime: all that crosses goes through a file, and these describe it.
CONTRACT = (
    "runtime.errors",
    "runtime.arrays",
    "runtime.version",
    "runtime.arguments",
    "runtime.model",
    "runtime.cache",
    "runtime.files",
    "runtime.text.vocabulary",
    "runtime.text.sentencepiece_model",
    "runtime.text.tokenizer",
    "runtime.text.sampling",
)

# Room → what its modules may import: other rooms by their dotted names, and packages. The longest match decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "quant": ("quant", "numpy"),
    "runtime.errors": (),
    "runtime.arrays": ("numpy",),
    "runtime.version": (),
    "runtime.arguments": ("runtime.errors", "numpy"),
    "runtime.model": ("runtime.errors", "runtime.arrays", "runtime.model", "runtime.files.strict_json", "numpy"),
    "runtime.cache": ("runtime.errors", "runtime.arrays", "runtime.cache", "numpy"),
    "runtime.files": (*CONTRACT, "quant.formats", "numpy"),
    "runtime.files.safetensors": ("runtime.arrays", "numpy", "safetensors"),
    "runtime.files.strings": ("runtime._native", "numpy"),
    "runtime.files.gguf": (
        *("runtime.errors", "runtime.files.strings", "runtime.files.read_only", "runtime._native"),
        *("quant.formats", "numpy"),
    ),
    "runtime.files.read_only": ("runtime.errors", "quant.formats", "numpy", "gguf"),
    "runtime.text.vocabulary": (*CONTRACT, "numpy"),
    "runtime.text.sentencepiece_model": (*CONTRACT, "runtime._native", "sentencepiece", "numpy"),
    "runtime.text.tokenizer": (*CONTRACT, "numpy"),
    "runtime.engines": (*CONTRACT, "runtime.engines", "runtime._native", "quant.formats", "threadpoolctl", "numpy"),
    "runtime.engines.ort": (*CONTRACT, "runtime.engines", "runtime._native", "onnxruntime", "numpy"),
    "runtime.engines.ort_tower": (*CONTRACT, "runtime.engines", "onnxruntime", "numpy"),
    "runtime.package": ("runtime.version", "runtime"),
    "runtime.package_main": ("runtime",),
    "runtime.vision": (*CONTRACT, "runtime.vision", "numpy"),
    "runtime.vision.image": ("runtime.errors", "runtime.arrays", "runtime.arguments", "PIL", "numpy"),
    "runtime": ("runtime", "quant.formats", "numpy", "sentencepiece", "threadpoolctl", "safetensors"),
    "runtime.text.grammar": (
        *("runtime.errors", "runtime.text.tokenizer", "runtime.text.sampling"),
        *("llguidance", "numpy"),
    ),
    "runtime.serve": ("runtime", "starlette", "numpy"),
    "runtime.serve.connections": ("uvicorn", "h11"),
    "runtime.commands": ("runtime", "quant.formats", "click", "numpy"),
    "runtime.commands.serve": ("runtime", "click", "uvicorn"),
    "export": ("export", "quant", *CONTRACT, "numpy", "gguf"),
    "export.calibration.eye": ("export", "quant", *CONTRACT, "runtime.vision.image", "numpy"),
    "export.hub": ("export", "quant", *CONTRACT),
    "export.hub.client": ("runtime.errors", "runtime.version", "runtime.files.hashing", "huggingface_hub", "httpx2"),
    "export.tuning": ("export", "quant", *CONTRACT, "numpy", "torch"),
    "export.onnx": ("export", "quant", *CONTRACT, "numpy", "onnx"),
    "export.commands": (
        "export",
        "quant",
        *CONTRACT,
        "runtime.commands.model_path",
        "runtime.commands.console",
        "click",
    ),
    "bench": ("bench", "export", "runtime", "quant", "*"),
}


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or any(path.with_suffix(suffix).exists() for suffix in (".py", ".pyi"))


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Absolute names of the modules that the module at `path` below the root imports anywhere in `tree`."""
    package = ["bezel"] if path.name in ("package.py", "package_main.py") else ["bezel", *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if module.startswith("bezel") and is_module(inner) else module, node
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((arg.value, node) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def type_checking_only(tree: ast.AST) -> set[ast.AST]:
    """The nodes that no run executes."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    bodies = [node.body for node in blocks if ast.unparse(node.test).endswith("TYPE_CHECKING")]
    return {inner for body in bodies for node in body for inner in ast.walk(node)}


def allowed(path: Path, target: str) -> bool:
    """Whether the module at `path` may import `target`, which is no part of the standard library."""
    room = max((room for room in MAY_IMPORT if within(dotted(path), room)), key=len)
    if not within(target, "bezel"):
        target = target.split(".")[0]
        return target in MAY_IMPORT[room] or ("*" in MAY_IMPORT[room] and target != "tests")
    inner = target.removeprefix("bezel").removeprefix(".")
    return any(within(inner, other) for other in MAY_IMPORT[room])


def violations(path: Path, source: str) -> list[str]:
    tree = ast.parse(source)
    optional = type_checking_only(tree)
    return [
        target
        for target, node in imports(path, tree)
        if target.split(".")[0] not in sys.stdlib_module_names
        and not (target == "typing_extensions" and node in optional)
        and not allowed(path, target)
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
        ("runtime/model/config.py", "from ..cache.caches import KVCache"),
        ("runtime/model/config.py", "from ..files.gguf import GGUFFile"),
        ("runtime/model/families/x.py", "from ...engines import native"),
        ("runtime/cache/x.py", "from ..files.onnx_folder import OnnxFolder"),
        ("runtime/cache/x.py", "from ..model.config import ModelConfig"),
        ("runtime/errors.py", "import click"),
        ("runtime/api.py", "import click"),
        ("runtime/text/chat.py", "import click"),
        ("runtime/files/gguf.py", "from ...quant.recipes import RECIPES"),
        ("runtime/files/gguf.py", "from ..model.config import ModelConfig"),
        ("runtime/files/gguf_model.py", "from ..text.chat import Message"),
        ("runtime/model/forward.py", "def f():\n    import torch"),
        ("runtime/model/forward.py", "import torch.nn as nn"),
        ("runtime/engines/native.py", "from onnxruntime import InferenceSession"),
        ("runtime/engines/native.py", "from ..text.generation import Generation"),
        ("runtime/engines/ort.py", "import onnx"),
        ("runtime/api.py", "from bezel.quant import recipes"),
        ("runtime/api.py", "from .. import export"),
        ("runtime/api.py", "from ..bench.speed import speed"),
        ("runtime/api.py", "import importlib\nimportlib.import_module('transformers')"),
        ("runtime/api.py", "import importlib\nimportlib.import_module('bezel.export.recipe')"),
        ("runtime/deep/er.py", "from ...export import gguf"),
        ("runtime/cache/x.py", "from typing_extensions import Self"),
        ("export/x.py", "from ..runtime.engines import native"),
        ("export/x.py", "from ..runtime.api import load"),
        ("export/x.py", "from ..bench import speed"),
        ("export/x.py", "import onnx"),
        ("export/gguf/x.py", "import click"),
        ("export/x.py", "import torch"),
        ("export/hub/pull.py", "import huggingface_hub"),
        ("export/commands/pull.py", "import huggingface_hub"),
        ("export/hub/client.py", "import click"),
        ("export/hub/client.py", "from ..gguf.writer import export_gguf"),
        ("runtime/files/models.py", "import huggingface_hub"),
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
            "runtime/files/gguf.py",
            "import mmap\nfrom ...quant.formats import FORMATS\nfrom ..errors import BezelError",
        ),
        ("runtime/files/x.py", "from ..model.config import ModelConfig\nfrom .. import errors"),
        ("runtime/engines/x.py", "from .. import _native, cache\nfrom .._native import ThreadPool"),
        ("runtime/engines/ort.py", "def f():\n    import onnxruntime"),
        ("runtime/cache/x.py", "if TYPE_CHECKING:\n    from typing_extensions import Self"),
        ("runtime/commands/x.py", "import importlib\nimportlib.import_module(f'bezel.{room}.cli')"),
        ("export/onnx/x.py", "import onnx\nfrom ...runtime.files.gguf import GGUFFile\nfrom ...quant import recipes"),
        ("export/commands/x.py", "import click\nfrom ..recipe import find_recipe"),
        ("bench/x.py", "import torch\nfrom ..export import gguf\nfrom ..runtime import model"),
    ],
)
def test_a_proper_import_is_let_through(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        found = next((f for target in sorted(graph.get(module, ())) if (f := visit(target))), [])
        path.pop()
        done.add(module)
        return found

    return next((found for module in graph if (found := visit(module))), [])


def test_no_imports_in_a_circle() -> None:
    """Not even of types."""
    graph: dict[str, set[str]] = {}
    for path in sources():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        graph[f"bezel.{dotted(path)}"] = {target for target, _ in imports(path, tree) if within(target, "bezel")}
    assert not cycle(graph), " → ".join(cycle(graph))


def test_a_circle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("name", ["bezel", "bezel.runtime"])
def test_importing_loads_nothing_heavy(name: str) -> None:
    heavy = [
        "numpy",
        "onnx",
        "onnxruntime",
        "torch",
        "transformers",
        "sentencepiece",
        "click",
        "gguf",
        "huggingface_hub",
    ]
    source = f"import sys, {name}\nprint([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
