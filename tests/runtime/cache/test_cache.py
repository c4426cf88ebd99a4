"""Ring against full cache, bit for bit; both against attention written out in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from bezel.runtime.cache.caches import Caches, FullCache, KVCache, RingCache, bytes_for
from bezel.runtime.cache.numpy_store import NumpyStore
from bezel.runtime.cache.rotation import hadamard
from bezel.runtime.cache.store import KV_TYPES
from bezel.runtime.errors import CacheError, InvalidSession
from bezel.runtime.model.families.hf import read_hf_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS

KV_HEADS, HEADS, DIM = 2, 4, 8
SCALE, CAP = 0.3, 5.0


def stream(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values for positions 0 … n − 1."""
    random = np.random.default_rng(1)
    shapes = ((n, HEADS, DIM), (n, KV_HEADS, DIM), (n, KV_HEADS, DIM))
    q, k, v = (random.standard_normal(shape).astype(np.float32) * 2 for shape in shapes)
    return q, k, v


Q, K, V = stream(400)


def feed(cache: KVCache, n: int, shift: int = 0) -> np.ndarray:
    """The next n positions; `shift` gives other tokens at the same positions."""
    at = slice(cache.length + shift, cache.length + shift + n)
    cache.append(K[at], V[at])
    return cache.attend(Q[at], SCALE, CAP)


def dense(length: int, window: int | None, keys: np.ndarray = K, values: np.ndarray = V) -> np.ndarray:
    """Attention of all positions at once in float64, one query and one head after the other."""
    out = np.zeros((length, HEADS, DIM))
    for p, head in itertools.product(range(length), range(HEADS)):
        first = 0 if window is None else max(0, p - window + 1)
        k, v = (x[first : p + 1, head // (HEADS // KV_HEADS)].astype(np.float64) for x in (keys, values))
        scores = CAP * np.tanh(k @ Q[p, head].astype(np.float64) * SCALE / CAP)
        weights = np.exp(scores)
        out[p, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_every_small_ring(window: int) -> None:
    """All chunks up to 5, all ways to cut a length into chunks: the full cache's bits, and the right numbers."""
    want = dense(10, window)
    for chunk in range(1, 6):
        for length in range(1, 11):
            for cuts in itertools.product((False, True), repeat=length - 1):
                sizes = np.diff([0, *(i + 1 for i, cut in enumerate(cuts) if cut), length])
                if sizes.max() > chunk:
                    continue
                ring, full = RingCache(KV_HEADS, DIM, window, chunk), FullCache(KV_HEADS, DIM, length, window)
                for n in sizes:
                    start = ring.length
                    got = feed(ring, n)
                    assert np.array_equal(got, feed(full, n))
                    assert np.abs(got - want[start : start + n]).max() < 1e-5


def test_no_window_sees_everything() -> None:
    cache = FullCache(KV_HEADS, DIM, 40)
    got = np.concatenate([feed(cache, n) for n in (7, 1, 32)])
    assert np.abs(got - dense(40, None)).max() < 1e-5


Action = tuple[str, int]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["feed", "feed", "rewind", "save", "restore"]), st.integers(1, 12)), max_size=40
)


@pytest.mark.parametrize("kv", KV_TYPES)
@settings(max_examples=150, deadline=None)
@given(window=st.integers(1, 20), chunk=st.integers(1, 12), actions=ACTIONS)
def test_random_lives(kv: str, window: int, chunk: int, actions: list[Action]) -> None:
    """After any appends, rewinds, saves and restores the ring equals a full cache that lived the same."""
    ring: KVCache = RingCache(KV_HEADS, DIM, window, chunk, kv)
    full: KVCache = FullCache(KV_HEADS, DIM, 400, window, kv)
    saved: Any = None
    rewinds = newest = 0
    for action, n in actions:
        if action == "feed" and ring.length < 150:
            n = min(n, chunk)
            assert np.array_equal(feed(ring, n, rewinds), feed(full, n, rewinds))
            newest = max(newest, ring.length)
        elif action == "rewind":
            try:
                ring.rewind(n)
            except CacheError:
                assert n > ring.length or newest - (ring.length - n) > chunk
                continue
            full.rewind(n)
            rewinds += 1
        elif action == "save":
            saved = ring.snapshot(), full.snapshot()
        elif action == "restore" and saved:
            ring, full = ring.restored(saved[0]), full.restored(saved[1])
    assert ring.length == full.length


@given(window=st.integers(1, 20), chunk=st.integers(1, 12), length=st.integers(1, 60), n=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_rewind_is_right_or_refused(window: int, chunk: int, length: int, n: int) -> None:
    ring, straight = RingCache(KV_HEADS, DIM, window, chunk), RingCache(KV_HEADS, DIM, window, chunk)
    for _ in range(length):
        feed(ring, 1)
    if n <= min(chunk, length):
        ring.rewind(n)  # a chunk's worth always works
    else:
        try:
            ring.rewind(n)
        except CacheError:
            assert ring.length == length
            return
    for _ in range(length - n):
        feed(straight, 1)
    for _ in range(5):
        assert np.array_equal(feed(ring, 1), feed(straight, 1))


def test_append_never_pushes_out_what_a_query_sees() -> None:
    ring = RingCache(KV_HEADS, DIM, window=4, chunk=3)
    feed(ring, 3)
    feed(ring, 3)
    with pytest.raises(CacheError, match="cannot append 4 positions at 6"):
        feed(ring, 4)
    assert ring.length == 6


@pytest.mark.parametrize("kv", KV_TYPES)
def test_memory_is_what_is_announced(kv: str) -> None:
    raw = CONFIGS["gemma2-gqa"] | {"max_position_embeddings": 4000, "sliding_window": 300}
    config = read_hf_config(raw)
    caches = Caches(config.layers, 4000, kv, 64)
    for cache, layer in zip(caches, config.layers, strict=True):
        x = np.ones((64, layer.n_kv_heads, layer.head_dim), np.float32)
        assert cache.nbytes == 0
        while cache.length < 1984:
            cache.append(x, x)
            announced = bytes_for(layer, 4000, kv, 64, True, cache.length, NumpyStore.bytes_for)
            assert cache.nbytes == sum(a.nbytes for a in cache._store._arrays.values()) == announced
            assert len(cache._store._arrays["keys"]) <= min(cache.capacity, cache.length + 255)
    assert caches.nbytes == sum(cache.nbytes for cache in caches)
    assert [cache.capacity for cache in caches] == [363, 4000, 363, 4000]


@pytest.mark.parametrize("kv", KV_TYPES)
def test_storage_error_is_bounded(kv: str) -> None:
    cache = FullCache(KV_HEADS, DIM, 50, kv=kv)
    feed(cache, 50)
    step = {"f32": 0.0, "f16": 2**-11, "int8": 0.5 / 127}[kv]  # half a step, relative to the largest of a head
    for name, x in (("key", K[:50]), ("value", V[:50])):
        x = hadamard(x) if kv == "int8" else x
        bound = step * np.abs(x).max(axis=-1, keepdims=True) * (1 + 1e-5)
        assert (np.abs(cache._store.read(name, 0, 50) - x) <= bound).all()


def test_rotated_heads_give_the_attention_of_the_heads_themselves() -> None:
    cache = FullCache(KV_HEADS, DIM, 40, kv="int8")
    got = feed(cache, 40)
    keys, values = (hadamard(cache._store.read(name, 0, 40)) for name in ("key", "value"))
    assert np.abs(got - dense(40, None, keys, values)).max() < 1e-5


def test_int8_of_zeros_is_zero() -> None:
    cache = FullCache(KV_HEADS, DIM, 4, kv="int8")
    zeros = np.zeros((2, KV_HEADS, DIM), np.float32)
    cache.append(zeros, zeros)
    assert not cache.attend(np.ones((2, HEADS, DIM), np.float32), 1.0, None).any()


def test_a_foreign_snapshot_is_refused() -> None:
    ring = RingCache(KV_HEADS, DIM, 4, 3)
    feed(ring, 3)
    state = ring.snapshot()
    wrong = {
        "keys": state["keys"][:, :1],
        "values": state["values"].astype(np.float16),
        "span": np.array([0, 99]),
    }
    for name, array in wrong.items():
        with pytest.raises(InvalidSession, match="saved"):
            ring.restored({**state, name: array})
    missing = dict(state)
    del missing["keys"]
    with pytest.raises(InvalidSession, match=r"keys.*nothing"):
        ring.restored(missing)
