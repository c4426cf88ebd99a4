"""What a model that sees takes at most, which says whether a server loads it beside others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from bezel.bench.synthetic import write_eye
from bezel.runtime import load
from bezel.runtime.files.models import eye_path
from bezel.runtime.model.vision import GEMMA3, VisionConfig, look_bytes
from bezel.runtime.serve import models
from bezel.runtime.serve.models import Setting, memory
from serving import serving

LARGE = VisionConfig(GEMMA3, 896, 14, 256, 1024, 1, 4, 1e-6, 4, 256)
LOOK = """
import json, sys
from pathlib import Path
import numpy as np
from bezel.bench.speed.child import process_memory
from bezel.runtime import _native
from bezel.runtime.engines.native import NativeOps, _matrix_of_tower
from bezel.runtime.engines.tower import Tower
from bezel.runtime.files.vision_file import VisionFile

tower = Tower(VisionFile(sys.argv[1]), NativeOps(_native.ThreadPool(2), False), _matrix_of_tower)
_, side = tower.weights, tower.config.image_size
pixels = np.full((side, side, 3), 0.1, np.float32)
before = process_memory()["private_bytes"]
tower.rows(pixels)
now = process_memory()
print(json.dumps(now["peak_bytes"] - now["file_bytes"] - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_look_takes_what_is_said(tmp_path: Path) -> None:
    eye = write_eye(tmp_path / "eye.gguf", LARGE, "q8_0")
    done = subprocess.run([sys.executable, "-c", LOOK, str(eye)], capture_output=True, check=True)
    assert 0.6 * look_bytes(LARGE) < json.loads(done.stdout) <= look_bytes(LARGE)


def test_a_model_must_fit_with_its_eye(
    shapes_of: Callable[..., Path],
    gguf_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sees = shapes_of()
    alone = Path(shutil.copy(sees, tmp_path / "alone.gguf"))
    setting = Setting({"kv": "int8"}, 4, 64 << 20)  # as `serving` has it
    with load(sees, kv="int8") as seeing, load(alone, kv="int8") as blind:
        without, with_eye = memory(blind, setting), memory(seeing, setting)
        assert seeing.eye is not None
        rows = 2 * seeing.context * seeing.config.hidden_size * 4
        assert with_eye - without > eye_path(sees).stat().st_size + look_bytes(seeing.eye.config) + rows
    monkeypatch.setattr(models, "available_memory", lambda: without)
    with serving({"first": gguf_of("demo", "q4_0"), "alone": alone, "sees": sees}) as address:
        found = {}
        for name in ("first", "alone", "sees"):
            ask = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
            found[name] = httpx.post(f"{address}/v1/chat/completions", json=ask, timeout=60)
    assert {name: answer.status_code for name, answer in found.items()} == {"first": 200, "alone": 200, "sees": 503}
    assert "model sees may take" in found["sees"].json()["error"]["message"]
