"""The native engine against the reference engine, and against itself however the tokens come in."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bezel.quant.recipes import PRESETS
from bezel.runtime import Model, Sampling, Session, _native
from bezel.runtime.cache.caches import FullCache, RingCache
from bezel.runtime.cache.store import KV_TYPES
from bezel.runtime.engines.native import NativeStore
from tiny import CONFIGS, token_ids

ModelOf = Callable[..., Model]
# All formats that the demo's rows of 256 and 768 allow; q4_0 brings a head in q6_k.
NATIVE = {"engine": "native"}


def kld(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL divergence of the next-token distributions, (n,), in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_format_on_the_demo(preset: str, model_of: ModelOf) -> None:
    """int8 activations cost below 1e-3 of KLD on average; without them only rounding is left."""
    ids = token_ids("demo")
    want = model_of("demo", preset).logits(ids)
    exact = model_of("demo", preset, **NATIVE, kv="f32", activations="f32").logits(ids)
    fast = model_of("demo", preset, **NATIVE, kv="f16").logits(ids)
    assert np.abs(exact - want).max() < 2e-4
    assert kld(want, exact).max() < 1e-6
    assert kld(want, fast).mean() < 1e-3
    if preset in ("f32", "f16", "bf16"):  # whose activations always stay float32
        assert np.array_equal(exact, model_of("demo", preset, **NATIVE, kv="f32").logits(ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape(name: str, model_of: ModelOf) -> None:
    ids = token_ids(name)
    want = model_of(name).logits(ids)
    assert np.abs(model_of(name, **NATIVE).logits(ids) - want).max() < 2e-4


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("preset", ["q8_0", "q4_0", "q4_k", "bf16"])
def test_bits_do_not_depend_on_chunks_threads_or_rings(preset: str, kv: str, model_of: ModelOf) -> None:
    ids = token_ids("demo")
    model = model_of("demo", preset, **NATIVE, kv=kv, threads=2)
    want = model.logits(ids)
    steps = model.session()
    assert np.array_equal(np.stack([steps.step(i) for i in ids]), want)

    random, chunks, at, parts = np.random.default_rng(3), model.session(), 0, []
    while at < len(ids):
        n = int(random.integers(1, chunks.engine.chunk + 1))
        parts.append(chunks.engine.forward(np.array(ids[at : at + n]), len(ids[at : at + n])))
        at += n
    assert np.array_equal(np.concatenate(parts), want)

    full = Session(model, ring=False)
    assert np.array_equal(full.prefill(ids), want[-1])
    for threads in (1, 3, 4):
        assert np.array_equal(model_of("demo", preset, **NATIVE, kv=kv, threads=threads).logits(ids), want)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_restored_and_rewound_sessions_go_on(kv: str, model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("demo", "q8_0", **NATIVE, kv=kv)
    session = model.session()
    session.prefill(token_ids("demo"))
    session.save(tmp_path / "s")
    tail = [7, 8, 9, 10]
    want = [session.step(i) for i in tail]
    session.rewind(len(tail))
    assert np.array_equal([session.step(i) for i in tail], want)
    other = model_of("demo", "q8_0", **NATIVE, kv=kv).session()
    other.restore(tmp_path / "s")
    assert np.array_equal([other.step(i) for i in tail], want)


@pytest.mark.parametrize("isa", _native.isas())
def test_every_instruction_set_gives_the_same_bits(isa: str, gguf_of: Callable[..., Path]) -> None:
    script = (
        "import sys, hashlib; from bezel.runtime import load\n"
        "model = load(sys.argv[1], kv='int8', threads=2)\n"
        "logits = model.logits([2, *range(100, 180)])\n"
        "print(hashlib.sha256(logits.tobytes()).hexdigest())"
    )

    def digest(isa: str) -> str:
        command = [sys.executable, "-c", script, str(gguf_of("demo", "q4_k"))]
        done = subprocess.run(command, env=os.environ | {"BEZEL_ISA": isa}, capture_output=True, text=True, check=True)
        return done.stdout

    assert digest(isa) == digest("scalar")


def test_two_models_in_several_threads_at_once(model_of: ModelOf) -> None:
    """Sessions of two models, two of each, give what each gives alone: logits, text and caches."""
    models = [
        model_of("demo", "q4_0", **NATIVE, kv="int8", threads=3),
        model_of("gemma1-mqa", **NATIVE, kv="f16", threads=2),
    ]

    def work(number: int) -> tuple[bytes, str]:
        model = models[number % 2]
        ids = np.random.default_rng(number).integers(300, 4000, 70).tolist()
        session = model.session()
        logits = [session.prefill(ids)]
        for _ in range(10):
            logits.append(session.step(int(logits[-1].argmax())))
        session.rewind(4)
        logits.append(session.step(number))
        caches = [array for _, array in sorted(session.engine.snapshot().items())]
        text = "".join(model.generate(ids[:9], max_tokens=10, sampling=Sampling(seed=number)))
        return b"".join(array.tobytes() for array in [*logits, *caches]), text

    alone = [work(number) for number in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert list(threads.map(work, range(4))) == alone


OLD = {"Nehalem": "scalar", "Haswell": "scalar avx2"}  # as an emulator knows them


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or shutil.which("qemu-x86_64") is None, reason="no emulator"
)
@pytest.mark.parametrize("processor", OLD)
def test_an_old_processor_runs_it_too(processor: str, gguf_of: Callable[..., Path]) -> None:
    """No instruction that it lacks, from start to end, and the same bits."""
    script = (
        "import hashlib, sys\n"
        "from bezel.runtime import _native, load\n"
        "session = load(sys.argv[1], kv='int8', threads=2).session()\n"
        "digest = hashlib.sha256(session.prefill(range(300, 340)).tobytes() + session.step(7).tobytes())\n"
        "print(digest.hexdigest(), *_native.isas())"
    )
    command = [sys.executable, "-c", script, str(gguf_of("demo", "q4_k"))]
    env = {name: value for name, value in os.environ.items() if name != "BEZEL_ISA"}
    here = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    emulated = ["qemu-x86_64", "-cpu", processor, *command]
    there = subprocess.run(emulated, env=env, capture_output=True, text=True, timeout=300)
    assert there.returncode == 0, there.stderr
    assert there.stdout.split(maxsplit=1) == [here.split()[0], OLD[processor] + "\n"]


def test_small_rings_equal_full_caches() -> None:
    """On the native store what test_cache.py shows on the reference store."""
    pool = _native.ThreadPool(2)

    def new_store(n_kv_heads: int, head_dim: int, capacity: int, kv: str) -> NativeStore:
        return NativeStore(pool, n_kv_heads, head_dim, capacity, kv)

    random = np.random.default_rng(1)
    k, v = (random.standard_normal((60, 2, 8), dtype=np.float32) for _ in range(2))
    q = random.standard_normal((60, 4, 8), dtype=np.float32) * 3
    for kv in KV_TYPES:
        for window in (1, 2, 3, 5, 8):
            for chunk in (1, 2, 5):
                ring = RingCache(2, 8, window, chunk, kv, new_store)
                full = FullCache(2, 8, 60, window, kv, new_store)
                while ring.length < 60:
                    n = min(int(random.integers(1, chunk + 1)), 60 - ring.length)
                    at = slice(ring.length, ring.length + n)
                    for cache in (ring, full):
                        cache.append(k[at], v[at])
                    a, b = (cache.attend(q[at], 0.3, 5.0) for cache in (ring, full))
                    assert np.array_equal(a, b)


def test_bad_isa_is_a_clear_error(gguf_of: Callable[..., Path]) -> None:
    command = [
        sys.executable,
        "-c",
        "from bezel.runtime.commands.main import main; main()",
        "run",
        str(gguf_of("demo")),
        "x",
    ]
    done = subprocess.run(command, env=os.environ | {"BEZEL_ISA": "sse9"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "BEZEL_ISA" in done.stderr
    assert "Traceback" not in done.stderr
