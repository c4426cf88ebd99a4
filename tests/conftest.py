from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bezel.bench import PICTURES
from bezel.export.gguf.vision import export_vision
from bezel.export.gguf.writer import export_gguf
from bezel.export.onnx.source import OnnxSource
from bezel.export.onnx.writer import export_onnx
from bezel.export.sources.opening import open_checkpoint
from bezel.quant.recipes import preset as make_recipe
from bezel.runtime import Model, load
from seeing import write_seeing
from tiny import TEXT, checkpoint_folder, export

# PyTorch's threads wait for each other by spinning: several workers' on the same cores take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports "demo" or a tiny model, once per preset and test run."""
    scratch = tmp_path_factory.mktemp("gguf")

    def make(name: str, preset: str = "f32") -> Path:
        out = scratch / f"{name}-{preset}.gguf"
        return out if out.exists() else export(checkpoint_folder(name, scratch), out, preset)

    return make


@pytest.fixture(scope="session")
def shapes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the bundled model that sees, its eye in the same format, once per preset and test run."""
    scratch = tmp_path_factory.mktemp("shapes")

    def make(preset: str = "q8_0") -> Path:
        out = scratch / preset / "shapes.gguf"
        if not out.exists():
            out.parent.mkdir()
            with open_checkpoint(PICTURES) as source, export_vision(source, out, make_recipe(preset, 4)):
                export_gguf(source, out, preset)
        return out

    return make


@pytest.fixture(scope="session")
def onnx_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports "demo" or a tiny model to an ONNX folder, once per kind and test run."""
    scratch = tmp_path_factory.mktemp("onnx")

    def make(name: str, quant: str, target: str = "onnxruntime", kv: str = "f32") -> Path:
        out = scratch / f"{name}-{quant}-{target}-{kv}"
        if not out.exists():
            with open_checkpoint(checkpoint_folder(name, scratch)) as source:
                text = TEXT if kv == "int8" else None
                export_onnx(OnnxSource(source, quant), out, target, kv=kv, kv_text=text)
        return out

    return make


@pytest.fixture(scope="session")
def seeing_onnx_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports the bundled model that sees, "shapes", or a tiny one to an ONNX folder, once per kind and test run.

    The eye's weights are in the format of the text's; without `sees` it is left out.
    """
    scratch = tmp_path_factory.mktemp("seeing-onnx")

    def make(name: str, quant: str = "f32", target: str = "onnxruntime", kv: str = "f32", sees: bool = True) -> Path:
        out = scratch / f"{name}-{quant}-{target}-{kv}-{sees}"
        if not out.exists():
            folder = PICTURES if name == "shapes" else write_seeing(scratch / name, name)
            with open_checkpoint(folder) as source:
                asked = OnnxSource(source, quant, vision=quant)
                export_onnx(asked, out, target, kv=kv, kv_text=TEXT if kv == "int8" else None, sees=sees)
        return out

    return make


@pytest.fixture(scope="session")
def model_of(gguf_of: Callable[..., Path]) -> Callable[..., Model]:
    def make(name: str, preset: str = "f32", **options: object) -> Model:
        exact: dict[str, object] = {"engine": "reference", "kv": "f32"}
        return load(gguf_of(name, preset), **(exact | options))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For the tests of pages: pip install playwright, and apt install chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield browser
        browser.close()
