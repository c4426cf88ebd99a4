"""Rows of several sequences in one pass, rows that come as embeddings, and rows that see each other whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Model
from bezel.runtime.cache import numpy_store
from bezel.runtime.cache.store import KV_TYPES
from bezel.runtime.engines.protocol import ModelBackend
from bezel.runtime.engines.rows import Segment
from tiny import TOLERANCE, token_ids

ModelOf = Callable[..., Model]
NATIVE = {"engine": "native"}
LENGTHS = ((9, 1, 30, 4), (1, 1, 1, 1), (3, 40, 1, 2), (1, 25, 13, 1))  # of four sequences, in each of four passes


def backend_of(model: Model) -> ModelBackend:
    assert isinstance(model.backend, ModelBackend)
    return model.backend


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("preset", ["q8_0", "q4_0", "bf16"])
def test_a_sequence_among_others_has_its_own_bits(preset: str, kv: str, model_of: ModelOf) -> None:
    """Past the window of 64, whoever else is in the pass; a sequence of which no logits are wanted changes nothing."""
    model = model_of("demo", preset, **NATIVE, kv=kv, threads=2)
    backend, ids = backend_of(model), token_ids("demo")
    texts = [ids[20 * i : 20 * i + 90] for i in range(4)]
    together = [backend.caches(200, kv, 64) for _ in texts]
    alone = [backend.caches(200, kv, 64) for _ in texts]
    for lengths in LENGTHS:
        wanted = [min(n, 2) if i != 1 else 0 for i, n in enumerate(lengths)]
        parts = [np.array(text[c.length : c.length + n]) for text, c, n in zip(texts, together, lengths, strict=True)]
        got = backend.forward([Segment(*row) for row in zip(together, parts, wanted, strict=True)])
        expected = [backend.forward([Segment(*row)]) for row in zip(alone, parts, wanted, strict=True)]
        assert np.array_equal(got, np.concatenate(expected))
    for a, b in zip(together, alone, strict=True):
        assert a.length == b.length
        for name, array in a.snapshot().items():
            assert np.array_equal(array, b.snapshot()[name]), name


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_embeddings_are_taken_as_they_are(engine: str, model_of: ModelOf) -> None:
    backend, ids = backend_of(model_of("demo", engine=engine)), np.array(token_ids("demo")[:40])
    embedded = backend.ops.embed(backend.weights.shared["token_embd"], ids, backend.config.embedding_scale)
    by_id, by_row = (
        backend.forward([Segment(backend.caches(40, "f32", 40), inputs, 40)]) for inputs in (ids, embedded)
    )
    assert np.array_equal(by_id, by_row)


def image(start: int, stop: int, n: int) -> np.ndarray:
    """Blocks of n rows at the positions from 0 on, of which start … stop − 1 are an image."""
    blocks = np.stack([np.arange(n), np.arange(1, n + 1)], axis=1)
    blocks[start:stop] = start, stop
    return blocks


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (5, 17), (60, 63)])
def test_an_image_is_seen_whole(start: int, stop: int, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native and reference alike; causal before the image; and every row sees what it should, across the window."""
    n, ids = 70, np.array(token_ids("gemma2-gqa") * 3)[:70]
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    right = numpy_store.attention

    def watch(q: Any, k: Any, v: Any, first: np.ndarray, last: np.ndarray, *rest: Any) -> Any:
        seen.append((first, last))
        return right(q, k, v, first, last, *rest)

    monkeypatch.setattr(numpy_store, "attention", watch)
    logits = {}
    for engine in ("reference", "native"):
        backend = backend_of(model_of("gemma2-gqa", engine=engine))
        segment = Segment(backend.caches(80, "f32", 80), ids, n, image(start, stop, n))
        logits[engine] = backend.forward([segment])
        causal = backend.forward([Segment(backend.caches(80, "f32", 80), ids, n)])
        assert np.array_equal(logits[engine][:start], causal[:start]) or engine == "reference"
        assert np.abs(logits[engine][:start] - causal[:start]).max(initial=0) < 1e-4
        assert np.abs(logits[engine][start:stop] - causal[start:stop]).max() > 0.1
    assert np.abs(logits["reference"] - logits["native"]).max() < TOLERANCE
    for (first, last), layer in zip(seen, backend.config.layers, strict=False):
        for p in range(n):
            inside = start <= p < stop
            oldest = 0 if layer.window is None else max(0, p - layer.window + 1)
            assert first[p] == (min(oldest, start) if inside else oldest)
            assert last[p] == (stop if inside else p + 1)


def test_a_pass_that_fails_leaves_every_sequence_as_it_was(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, ids = backend_of(model_of("gemma2-gqa")), np.array(token_ids("gemma2-gqa"))
    caches = [backend.caches(100, "f32", 8) for _ in range(2)]
    for each in caches:
        backend.forward([Segment(each, ids[:8], 0)])
    right, calls = numpy_store.attention, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(numpy_store, "attention", fail)
    with pytest.raises(KeyboardInterrupt):
        backend.forward([Segment(each, ids[8:11], 1) for each in caches])
    monkeypatch.undo()
    assert [cache.length for each in caches for cache in each] == [8] * 8
    fresh = backend.caches(100, "f32", 8)
    backend.forward([Segment(fresh, ids[:8], 0)])
    expected = backend.forward([Segment(fresh, ids[8:12], 4)])
    for each in caches:
        assert np.array_equal(backend.forward([Segment(each, ids[8:12], 4)]), expected)
