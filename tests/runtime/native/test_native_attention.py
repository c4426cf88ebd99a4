"""The native caches and attention against the NumPy specification.

What a store holds must be what the NumPy store holds, bit for bit. Attention is compared with its formula in float64 on
the very values that the store returns, so that only the kernel's own roundings remain.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from bezel.runtime import _native
from bezel.runtime._native import KVStore, ThreadPool
from bezel.runtime.cache.numpy_store import NumpyStore, split_key_scales
from bezel.runtime.cache.rotation import hadamard

KVS = ("f32", "f16", "int8")
SPLIT = 256  # positions that attention handles together
OPERAND = 2 * 32639  # steps between the extremes of a quantized query or weight
POOL = ThreadPool(3)


@pytest.fixture(scope="module")
def pool() -> ThreadPool:
    return ThreadPool(2)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def filled(rng: np.random.Generator, kv: str, length: int, heads: int, dim: int, capacity: int = 0) -> KVStore:
    """Positions length − capacity … length − 1."""
    store = KVStore(heads, dim, capacity or length, kv)
    start = max(0, length - (capacity or length))
    store.write(POOL, start, floats(rng, length - start, heads, dim), floats(rng, length - start, heads, dim))
    return store


def turn(store: KVStore, x: np.ndarray) -> np.ndarray:
    """To float64, rotated as the store rotates heads: int8, where they are powers of two. Twice is there and back."""
    rotated = "key_scales" in store.raw(0, 0) and x.shape[-1].bit_count() == 1
    return hadamard(x.astype(np.float64)) if rotated else x.astype(np.float64)


def stored(store: KVStore, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as attention reads them, in float64 (stop − start, kv_heads, head_dim)."""
    raw = store.raw(start, stop)
    keys, values = raw["keys"].astype(np.float64), raw["values"].astype(np.float64)
    if "key_scales" not in raw:
        return keys, values
    steps, offsets = split_key_scales(raw["key_scales"])
    return (keys + offsets[..., None]) * steps[..., None], values * raw["value_scales"][..., None]


Spans = tuple[np.ndarray, np.ndarray]


def causal(n: int, length: int, window: int | None = None) -> Spans:
    """What the n newest of `length` positions see: `window` each, or all before it."""
    last = np.arange(length - n + 1, length + 1)
    return np.zeros_like(last) if window is None else np.maximum(0, last - window), last


def formula(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray, scale: float, cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of (n, heads, d) over (m, kv_heads, d), visible (n, m); and the weights (n, heads, m)."""
    group = queries.shape[1] // keys.shape[1]
    scores = np.einsum("nhd,mhd->nhm", queries, np.repeat(keys, group, axis=1)) * scale
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nhm,mhd->nhd", weights, np.repeat(values, group, axis=1)), weights


def specification(
    store: KVStore, queries: np.ndarray, spans: Spans, scale: float, cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64, rotated as the store is, and how far the kernel may be from it, an element.

    Float32 roundings: a score of at most 20 is off by a few of its ulps, its weight by as much relatively, and so
    the result by less than 1e-5 of the largest value. Int8 stores multiply with quantized queries and weights:
    half a step of a query times Σ|key| is what a score may be off; half a step of a split's weights, which are
    quantized with the values' scales, comes 127 times to the result from each position of the split. A rotation has a
    rounding for each of its log2 d additions and two for the factor: of a query's elements, each of which Σ|query| / √d
    bounds, and of the result's, whose d errors, rotated again, may come together.
    """
    start, stop = int(spans[0].min()), int(spans[1].max())
    keys, values = stored(store, start, stop)
    q = turn(store, queries)
    positions = np.arange(start, stop)
    visible = (spans[0][:, None] <= positions) & (positions < spans[1][:, None])
    expected, weights = formula(q, keys, values, visible, scale, cap)
    bound = np.full(queries.shape[:2], 1e-5 * np.abs(values).max())
    raw = store.raw(start, stop)
    if "value_scales" in raw:
        group = queries.shape[1] // keys.shape[1]
        dim = queries.shape[2]
        rotation = (np.log2(dim) + 2) * 2.0**-24 if dim.bit_count() == 1 else 0.0
        query_error = np.abs(q).max(-1) / OPERAND + rotation * np.abs(queries).sum(-1) / dim**0.5
        score_error = scale * query_error * np.abs(keys).sum(-1).max()
        weights *= np.repeat(raw["value_scales"].T, group, axis=0)
        edges = np.unique(np.r_[0, np.arange(-start % SPLIT, stop - start, SPLIT)])
        seen = np.add.reduceat(weights > 0, edges, axis=-1)
        bound += 2 * score_error * np.abs(values).max()
        bound += (seen * np.maximum.reduceat(weights, edges, axis=-1)).sum(-1) * 127 / OPERAND
        bound += rotation * np.abs(expected).sum(-1)
    return expected, bound[..., None]


def check(store: KVStore, queries: np.ndarray, spans: Spans, cap: float | None, pool: ThreadPool) -> None:
    scale = float(queries.shape[2] ** -0.5)
    got = store.attend(pool, queries, *spans, scale, cap)
    assert got.dtype == np.float32
    assert got.shape == queries.shape
    expected, bound = specification(store, queries, spans, scale, cap)
    error = np.abs(turn(store, got) - expected)
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize(
    ("dim", "group"),
    [
        (2, 1),
        (8, 8),
        (24, 2),
        (64, 1),
        (64, 4),
        (72, 3),
        (80, 8),
        (128, 2),
        (256, 1),
        (256, 2),
        (256, 8),
        (512, 5),
    ],
)
def test_attention(kv: str, dim: int, group: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(dim + group)
    for length, n, window, cap in [
        (1, 1, None, None),
        (255, 3, None, 50.0),
        (300, 90, 40, 3.0),
        (777, 1, 513, 50.0),
    ]:
        store = filled(rng, kv, length, 2, dim)
        check(store, floats(rng, n, 2 * group, dim), causal(n, length, window), cap, pool)


def image_and_text(length: int, n: int) -> Spans:
    """The n newest positions: text, an image of a third of them whose rows see each other whole, and text again."""
    first, last = causal(n, length)
    image = slice(n // 3, n - n // 3)
    last[image] = last[image].max()
    return first, last


def anywhere(rng: np.random.Generator, length: int, n: int) -> Spans:
    first = rng.integers(0, length, n)
    return first, rng.integers(first, length) + 1


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("n", [1, 6, 90, 400])
def test_each_query_sees_its_own_span(kv: str, n: int, pool: ThreadPool) -> None:
    """Anywhere, overlapping or apart, and an image among text; each alone has the same bits."""
    rng = np.random.default_rng(n)
    store = filled(rng, kv, 900, 2, 64)
    queries = floats(rng, n, 4, 64)
    for spans in (anywhere(rng, 900, n), image_and_text(900, n)):
        check(store, queries, spans, 30.0, pool)
        together = store.attend(pool, queries, *spans, 0.125, 30.0)
        for i in rng.permutation(n)[:40]:
            at = slice(i, i + 1)
            alone = store.attend(pool, queries[at], spans[0][at], spans[1][at], 0.125, 30.0)
            assert alone.tobytes() == together[at].tobytes(), i


@pytest.mark.parametrize("kv", KVS)
def test_an_image_changes_no_bit_of_the_text_around_it(kv: str, pool: ThreadPool) -> None:
    rng = np.random.default_rng(8)
    store = filled(rng, kv, 700, 1, 64)
    queries = floats(rng, 300, 4, 64)
    plain, image = (store.attend(pool, queries, *s, 0.125, None) for s in (causal(300, 700), image_and_text(700, 300)))
    same = (plain == image).all(axis=(1, 2))
    assert same.tolist() == [i not in range(100, 199) for i in range(300)]  # the image's last row sees no more


@pytest.mark.parametrize("kv", KVS)
def test_attention_of_large_scores(kv: str, pool: ThreadPool) -> None:
    """One key takes nearly all the weight, and the soft-cap saturates: no overflow, no NaN."""
    rng = np.random.default_rng(1)
    store = KVStore(1, 64, 600, kv)
    store.write(POOL, 0, floats(rng, 600, 1, 64) * np.float32(8), floats(rng, 600, 1, 64))
    queries = floats(rng, 5, 2, 64) * np.float32(8)
    keys, values = (turn(store, x) for x in stored(store, 0, 600))
    for cap in (50.0, None):
        got = store.attend(pool, queries, *causal(5, 600), 1.0, cap)
        assert (np.abs(got) <= np.abs(values).max() * 1.001).all()
    best = (queries.transpose(1, 0, 2) @ keys[:, 0].T)[:, :, :596].argmax(-1)  # all five see these
    scores = np.sort(queries[0, 0] @ keys[:596, 0].T)
    assert scores[-1] - scores[-2] > 20  # so that the next weight is below 1e-8
    np.testing.assert_allclose(got[0, 0], values[best[0, 0], 0], atol=1e-3)


def test_quantized_operands_add_little_to_int8(pool: ThreadPool) -> None:
    """Queries and weights of 16 bits against keys and values of 8: a few percent of their error at most."""
    rng = np.random.default_rng(2)
    keys, values, queries = (
        floats(rng, 2000, 2, 256),
        floats(rng, 2000, 2, 256),
        floats(rng, 8, 4, 256) * np.float32(3),
    )
    store = KVStore(2, 256, 2000, "int8")
    store.write(POOL, 0, keys, values)
    spans = causal(8, 2000)
    visible = np.arange(2000) < spans[1][:, None]
    q = queries.astype(np.float64)
    exact = formula(q, keys.astype(np.float64), values.astype(np.float64), visible, 0.0625, 50.0)[0]
    rounded = turn(store, specification(store, queries, spans, 0.0625, 50.0)[0])
    got = store.attend(pool, queries, *spans, 0.0625, 50.0)
    assert np.square(got - rounded).mean() ** 0.5 <= 0.03 * np.square(rounded - exact).mean() ** 0.5


def test_an_outlying_channel_costs_int8_little(pool: ThreadPool) -> None:
    """A head's error is its scale's, so it falls as the largest number does that the rotation leaves."""
    rng = np.random.default_rng(10)
    keys, queries = floats(rng, 1000, 2, 256), floats(rng, 8, 4, 256)
    keys[..., 17] = np.copysign(15, keys[..., 17])
    values = np.zeros_like(keys)  # whose only number int8 holds, rotated or not
    values[np.arange(1000), :, np.arange(1000) % 256] = floats(rng, 1000, 2)
    store = KVStore(2, 256, 1000, "int8")
    store.write(POOL, 0, keys, values)
    step = np.abs(keys).max(-1, keepdims=True) / 127
    visible = np.arange(1000) < causal(8, 1000)[1][:, None]
    args = values.astype(np.float64), visible, 0.0625, None
    exact, plain = (formula(queries.astype(np.float64), k, *args)[0] for k in (keys, np.rint(keys / step) * step))
    got = store.attend(pool, queries, *causal(8, 1000), 0.0625, None)
    error, plain_error = (np.square(x - exact).mean() ** 0.5 for x in (got, plain))
    factor = np.abs(keys).max(-1).mean() / np.abs(hadamard(keys)).max(-1).mean()
    assert factor > 3.5
    assert plain_error / error > 0.9 * factor


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("window", [1, 2, 7, 255, 256, 257, 300])
def test_a_ring_in_any_chunks_gives_the_bits_of_a_full_cache(kv: str, window: int, pool: ThreadPool) -> None:
    rng = np.random.default_rng(window)
    length, heads, dim = 800, 1, 16
    keys, values, queries = (
        floats(rng, length, heads, dim),
        floats(rng, length, heads, dim),
        floats(rng, length, 2, dim),
    )
    full = KVStore(heads, dim, length, kv)
    full.write(POOL, 0, keys, values)
    expected = full.attend(pool, queries, *causal(length, length, window), 0.25, 50.0)
    wider = full.attend(pool, queries, *causal(length, length, window + 1), 0.25, 50.0)
    assert not np.array_equal(expected, wider)
    for chunk in (1, 3, 64, 200, 511):
        ring = KVStore(heads, dim, window - 1 + chunk, kv)
        for start in range(0, length, chunk):
            part = slice(start, min(start + chunk, length))
            ring.write(POOL, start, keys[part], values[part])
            got = ring.attend(pool, queries[part], *causal(part.stop - start, part.stop, window), 0.25, 50.0)
            assert got.tobytes() == expected[part].tobytes(), (chunk, start)


@pytest.mark.parametrize("kv", KVS)
def test_small_windows_capacities_and_chunks(kv: str, pool: ThreadPool) -> None:
    """Around the wrap of the smallest store, every combination."""
    rng = np.random.default_rng(9)
    length, dim, begin = SPLIT + 20, 8, SPLIT - 30
    keys, values, queries = (
        floats(rng, length, 1, dim),
        floats(rng, length, 1, dim),
        floats(rng, length, 1, dim),
    )
    full = KVStore(1, dim, length, kv)
    full.write(POOL, 0, keys, values)
    for window, chunk, extra in itertools.product((1, 2, 3, 5, 8), (1, 2, 3, 5), (0, 1)):
        expected = full.attend(pool, queries, *causal(length, length, window), 0.5, None)
        ring = KVStore(1, dim, window - 1 + chunk + extra, kv)
        for start in range(begin, length, chunk):
            part = slice(start, min(start + chunk, length))
            ring.write(POOL, start, keys[part], values[part])
            if start - window >= begin:
                got = ring.attend(pool, queries[part], *causal(part.stop - start, part.stop, window), 0.5, None)
                assert got.tobytes() == expected[part].tobytes(), (window, chunk, start)


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize(("length", "n"), [(900, 1), (2100, 3), (1000, 130), (600, 600)])
def test_threads_do_not_change_a_bit(kv: str, length: int, n: int) -> None:
    rng = np.random.default_rng(length)
    store = filled(rng, kv, length, 2, 64)
    queries = floats(rng, n, 4, 64)
    pools = [ThreadPool(threads) for threads in (1, 2, 3, 4)]
    for spans in (causal(n, length), image_and_text(length, n), anywhere(rng, length, n)):
        assert len({store.attend(p, queries, *spans, 0.125, 50.0).tobytes() for p in pools}) == 1


def test_python_threads_share_a_store() -> None:
    rng = np.random.default_rng(3)
    store, pools = filled(rng, "int8", 700, 1, 64), [ThreadPool(2), ThreadPool(3)]
    queries = floats(rng, 4, 2, 64)
    spans = causal(4, 700)
    expected = store.attend(pools[0], queries, *spans, 0.125, None).tobytes()
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(100):
            if store.attend(pools[i % 2], queries, *spans, 0.125, None).tobytes() != expected:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("dim", [2, 16, 30, 80, 128, 256, 512])
def test_storage_is_that_of_the_numpy_cache(kv: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    keys, values = floats(rng, 300, 3, dim), floats(rng, 300, 3, dim) * np.float32(1000)
    keys[5, 1] = 0  # a scale of zero
    keys[7, 1], keys[8, 0] = 3.5, 100 + np.abs(keys[8, 0])  # far from zero, for what they span
    if kv == "int8" and dim in (30, 80):  # that are not rotated
        keys[9, 2, :2] = -3e38, 3e38  # further apart than a float32 can say
    values[6, 2] *= np.float32(1e-30)
    cache, store = NumpyStore(3, dim, 300, kv), KVStore(3, dim, 300, kv)
    for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
        cache.write(part.start, keys[part], values[part])
        store.write(POOL, part.start, keys[part], values[part])
    snapshot, raw = cache.raw(0, 300), store.raw(0, 300)
    assert set(raw) == set(snapshot)
    for name, array in raw.items():
        assert array.dtype == snapshot[name].dtype
        assert array.tobytes() == snapshot[name].tobytes(), name


@pytest.mark.parametrize("kv", KVS)
def test_raw_goes_into_a_store_of_another_capacity(kv: str, pool: ThreadPool) -> None:
    rng = np.random.default_rng(4)
    store = filled(rng, kv, 1000, 2, 40, capacity=350)
    other = KVStore(2, 40, 2000, kv)
    other.set_raw(650, store.raw(650, 1000))
    queries = floats(rng, 2, 2, 40)
    a, b = (s.attend(pool, queries, *causal(2, 1000, 349), 0.2, 30.0) for s in (store, other))
    assert a.tobytes() == b.tobytes()


def test_halves_round_as_in_numpy() -> None:
    bits = np.arange(0, 1 << 32, 99991, dtype=np.uint64).astype(np.uint32)
    with np.errstate(all="ignore"):
        x = bits.view(np.float32)
        x = x[~np.isnan(x)]
        x = np.ascontiguousarray(x[: len(x) // 2 * 2].reshape(-1, 1, 2))
        expected = x.astype(np.float16)
    store = KVStore(1, 2, len(x), "f16")
    store.write(POOL, 0, x, x)
    assert store.raw(0, len(x))["keys"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damage_shows_where_it_is_seen_and_only_there(kv: str, bad: float, pool: ThreadPool) -> None:
    rng = np.random.default_rng(5)
    keys, values, queries = floats(rng, 400, 1, 32), floats(rng, 400, 1, 32), floats(rng, 400, 1, 32)
    store = KVStore(1, 32, 400, kv)
    store.write(POOL, 0, keys, values)
    spans = causal(400, 400, 50)
    expected = store.attend(pool, queries, *spans, 0.2, None)
    values[100, 0, 3] = bad
    store.write(POOL, 0, keys, values)
    got = store.attend(pool, queries, *spans, 0.2, None)
    sees = (np.arange(400) >= 100) & (np.arange(400) < 150)
    assert not np.isfinite(got[sees, 0, 3]).any()
    # Queries of a tile share their products with float values, and 0 · NaN is NaN, here as in NumPy.
    beyond = np.arange(400) >= (150 if kv == "int8" else 200)
    assert got[beyond].tobytes() == expected[beyond].tobytes()
    queries[300] = bad
    assert np.isnan(store.attend(pool, queries, *spans, 0.2, None)[300]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_as_it_is_filled() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    store = KVStore(4, 256, 1 << 22, "int8")  # 8 GiB
    assert store.nbytes == 0
    assert resident() - before < 1 << 20
    x = np.ones((1000, 4, 256), np.float32)
    store.write(POOL, 0, x, x)
    taken = 2 * 4 * 1024 * (256 + 4)
    assert store.nbytes == taken
    assert resident() - before < taken + (4 << 20) + 2 * x.nbytes  # pages may be of 2 MiB


@pytest.mark.parametrize("kv", KVS)
def test_memory_is_what_is_announced(kv: str) -> None:
    for capacity, end in ((10, 3), (256, 256), (700, 257), (700, 2000)):
        store = KVStore(2, 40, capacity, kv)
        for start in range(0, end, 3):
            store.write(POOL, start, *[np.ones((min(3, end - start), 2, 40), np.float32)] * 2)
        assert store.nbytes == KVStore.bytes_for(2, 40, capacity, kv, end) > 0
    assert KVStore.bytes_for(2, 40, capacity, kv, 0) == 0


X = np.zeros((3, 2, 8), np.float32)
Q = np.zeros((3, 4, 8), np.float32)
SPANS = causal(3, 5)


def spans(*pairs: tuple[int, int]) -> Spans:
    first, last = np.array(pairs, np.int64).T.copy()
    return first, last


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s, p: s.write(p, 0, X[:, :1], X),
            r"keys: found float32 \(3, 1, 8\), expected float32 \(n, 2, 8\)",
        ),
        (
            lambda s, p: s.write(p, 0, X, X[:2]),
            r"values: found float32 \(2, 2, 8\), expected float32 \(3, 2, 8\)",
        ),
        (lambda s, p: s.write(p, 0, X.astype(np.float64), X), "keys: found float64"),
        (lambda s, p: s.write(p, 0, X[:, ::-1], X), "keys: .* is not C-contiguous"),
        (lambda s, p: s.write(p, -1, X, X), "positions -1 to 2 do not fit a store of 10 positions"),
        (lambda s, p: s.write(p, 0, *[np.zeros((11, 2, 8), np.float32)] * 2), "positions 0 to 11 do not fit"),
        (lambda s, _p: s.raw(3, 2), "do not fit"),
        (lambda s, _p: s.raw(0, 11), "do not fit"),
        (
            lambda s, p: s.attend(p, Q[:, :3].copy(), *SPANS, 1.0, None),
            "found 3 heads, expected a multiple of",
        ),
        (lambda s, p: s.attend(p, Q[:, :0].copy(), *SPANS, 1.0, None), "found 0 heads"),
        (
            lambda s, p: s.attend(p, Q[:2], *SPANS, 1.0, None),
            r"first: found int64 \(3,\), expected int64 \(2,\)",
        ),
        (lambda s, p: s.attend(p, Q, SPANS[0], SPANS[1].astype(np.int32), 1.0, None), "last: found int32"),
        (
            lambda s, p: s.attend(p, Q, *spans((0, 4), (5, 5), (0, 6)), 1.0, None),
            "query 1 sees the positions 5 to 5, expected one at least",
        ),
        (lambda s, p: s.attend(p, Q, *spans((0, 4), (0, 5), (6, 5)), 1.0, None), "query 2 sees"),
        (lambda s, p: s.attend(p, Q, *spans((-1, 4), (0, 5), (0, 6)), 1.0, None), "query 0 sees the positions -1 to"),
        (lambda s, p: s.attend(p, Q, *causal(3, 11), 1.0, None), "positions 0 to 11 do not fit"),
        (lambda s, p: s.attend(p, Q, *spans((39, 41), (45, 50), (40, 44)), 1.0, None), "positions 39 to 50 do not"),
        (lambda s, p: s.attend(p, Q, *spans((0, 1), (0, 1), (0, 2**63 - 1)), 1.0, None), "do not fit"),
        (lambda s, p: s.attend(p, Q, *spans(*[(2**62, 2**62 + 1)] * 3), 1.0, None), "do not fit"),
        (lambda s, p: s.attend(p, Q, *SPANS, np.nan, None), "scale"),
        (lambda s, p: s.attend(p, Q, *SPANS, 1.0, 0.0), "softcap"),
        (lambda s, _p: s.set_raw(0, {}), "keys: found nothing"),
        (
            lambda s, _p: s.set_raw(0, {**s.raw(0, 3), "keys": X}),
            r"keys: found float32 \(3, 2, 8\), expected int8",
        ),
        (
            lambda s, _p: s.set_raw(0, {**s.raw(0, 3), "value_scales": X[:, :, 0].copy()[:2]}),
            "value_scales: found",
        ),
        (lambda _s, _p: KVStore(0, 8, 10, "f16"), "kv_heads is 0, expected 1 to"),
        (lambda _s, _p: KVStore(1, 7, 10, "f16"), "head_dim is 7, expected an even number"),
        (lambda _s, _p: KVStore(1, 514, 10, "f16"), "head_dim is 514, expected 1 to 512"),
        (lambda _s, _p: KVStore(1, 8, 0, "f16"), "capacity is 0"),
        (lambda _s, _p: KVStore(1, 8, 10, "int4"), "kv is 'int4', expected 'f32', 'f16' or 'int8'"),
        (lambda _s, _p: KVStore.bytes_for(1, 7, 10, "f16", 5), "head_dim is 7"),
        (lambda _s, _p: KVStore.bytes_for(1, 8, 10, "f16", -1), "positions is -1"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str, pool: ThreadPool) -> None:  # type: ignore[no-untyped-def]
    store = KVStore(2, 8, 10, "int8")
    with pytest.raises(ValueError, match=message):
        call(store, pool)


def test_a_store_too_large_for_the_machine() -> None:
    with pytest.raises(MemoryError):
        KVStore(1 << 16, 512, 1 << 32, "f32")


@pytest.mark.parametrize("isa", _native.isas())
def test_every_isa(isa: str) -> None:
    """Runs the tests above again in a process of that instruction set."""
    if isa == _native.isa():
        pytest.skip("this process")
    select = [
        "-k",
        "not isa and not refused and not memory and not too_large",
        "-p",
        "no:cacheprovider",
        "-x",
    ]
    if isa == "scalar":  # slow: its fused multiply-adds may be calls
        select[1] += " and not ring and not threads and not 512"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *select],
        env=os.environ | {"BEZEL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
