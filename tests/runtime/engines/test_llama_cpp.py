"""llama.cpp reads the files that bezel writes, and computes the same from them. Needs the `bench` extra."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bezel.export.calibration.rounding import export_calibrated
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime import Model, load
from tiny import CONFIGS, DEMO, export, token_ids, write_tiny

llama_cpp = pytest.importorskip("llama_cpp")

# llama.cpp rounds keys and values to float16 and, for quantized weights, activations to int8 with a step of 1/127 of a
# block's largest; bezel's reference engine does neither. Both errors are noise in the residual stream: over L layers
# they add up to less than √(2 L) · step · (logit spread), as a root mean square. The K formats' blocks of activations
# are 256 instead of 32, whose largest is that of 32 times 1.25. The largest of a million normal numbers is 5 times
# their root mean square, and some positions are noisier than others: up to 8 times, with the kernels of any processor.
SPREAD = 4.0
STEP = {"f32": 2.0**-11, "q8_0": 2.0**-11 + 0.5 / 127}
STEP["q4_0"] = STEP["q8_0"]  # its activations are Q8_0, too
STEP["q2_k"] = STEP["q3_k"] = 2.0**-11 + 1.25 * 0.5 / 127


def assert_same_logits(path: Path, preset: str, name: str = "demo") -> None:
    ids = token_ids(name)
    llama = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=2)
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)], np.float32)
    model = load(path, engine="reference", kv="f32")
    bound = np.sqrt(2 * model.config.n_layers) * STEP[preset] * SPREAD
    difference = np.abs(model.logits(ids) - theirs)
    rms = np.sqrt(np.mean(difference**2))
    print(f"{preset}: difference {rms:.2g} (rms), {difference.max():.2g} at most, bound {bound:.2g}")
    assert rms < bound
    assert difference.max() < 8 * bound


@pytest.mark.parametrize("preset", ["f32", "q8_0", "q2_k", "q3_k"])
def test_same_logits(preset: str, gguf_of: Callable[..., Path]) -> None:
    assert_same_logits(gguf_of("demo", preset), preset)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("gemma3")])
def test_same_logits_of_gemma3(name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, name)
    raw = CONFIGS[name] | {"query_pre_attn_scalar": CONFIGS[name]["head_dim"]}  # llama.cpp knows no other
    (folder / "config.json").write_text(json.dumps(raw))
    assert_same_logits(export(folder, tmp_path / "tiny.gguf"), "f32", name)


def test_same_logits_of_a_calibrated_file(tmp_path: Path) -> None:
    out = tmp_path / "calibrated.gguf"
    with open_checkpoint(DEMO) as checkpoint:
        export_calibrated(checkpoint, out, "q4_0", "q4_0", DEMO.parents[2] / "LICENSE", tokens=512)
    assert_same_logits(out, "q4_0")


@pytest.mark.parametrize("text", ["Once upon a time.", "two\n\n\nlines\t<eos> ünïcode 🙂 1234", "<start_of_turn>user"])
def test_same_ids(text: str, gguf_of: Callable[..., Path], model_of: Callable[..., Model]) -> None:
    # No runs of spaces: the demo's user-defined pieces of spaces are not in SentencePiece's own spelling, so the
    # sentencepiece library, which bezel follows, never finds them in a text; llama.cpp does.
    llama = llama_cpp.Llama(str(gguf_of("demo", "f32")), vocab_only=True, verbose=False)
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == model_of("demo").tokenizer.encode(text)
