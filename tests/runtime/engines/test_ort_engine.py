"""The ort engine: transformers' logits, the reference engine's, and sessions that go on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bezel.bench.loss.metrics import compare
from bezel.runtime import Model, Session, load
from bezel.runtime.cache.numpy_store import NumpyStore
from bezel.runtime.errors import CacheError, InvalidModelFile, InvalidRequest
from feedings import ALL, FEEDINGS, golden, random_chunks, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import COLUMNS, TOLERANCE, token_ids

OnnxOf = Callable[..., Path]
STEPS = [5, 6, 7, 8]
RUN_HERE = ("onnxruntime", "portable")  # targets
STORED = (*(("onnxruntime", kv) for kv in ("f32", "f16", "int8")), ("portable", "f32"))  # and what their caches hold


@pytest.fixture(scope="module")
def ort_of(onnx_of: OnnxOf) -> Callable[..., Model]:
    models: dict[tuple[str, ...], Model] = {}

    def make(*which: str) -> Model:
        if which not in models:
            models[which] = load(onnx_of(*which))
        return models[which]

    return make


@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize("feed", FEEDINGS)
@pytest.mark.parametrize("name", ALL)
def test_logits_of_transformers(name: str, feed: Any, target: str, ort_of: Callable[..., Model]) -> None:
    logits = feed(ort_of(name, "f32", target).session(), token_ids(name))
    assert np.abs(logits[:, ::COLUMNS] - golden(name)).max() < TOLERANCE


@pytest.mark.parametrize(("activations", "allowed"), [("int8", 1e-3), ("f32", 1e-6)])
@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize("quant", ["f16", "int8", "int4"])
def test_loss_to_the_reference_engine(
    quant: str, target: str, activations: str, allowed: float, onnx_of: OnnxOf
) -> None:
    folder, ids = onnx_of("demo", quant, target), token_ids("demo")
    want = load(folder, engine="reference", kv="f32").logits(ids)
    model = load(folder, activations=activations)
    for feed in FEEDINGS if activations == "int8" else (whole, random_chunks):  # exact is slow for each call
        (records,) = compare([want, feed(model.session(), ids)], [(0, 1)], 0, np.array([*ids[1:], 0]))
        assert records["kld"].mean() < allowed
        if activations == "int8" and quant != "f16":
            assert records["kld"].mean() > 1e-6  # or it would say nothing


def tail(session: Any) -> np.ndarray:
    return np.stack([session.step(token) for token in STEPS])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma1-mqa"])
def test_rewind_save_restore(
    name: str, stored: tuple[str, str], ort_of: Callable[..., Model], onnx_of: OnnxOf, tmp_path: Path
) -> None:
    model, ids = ort_of(name, "int8", *stored), token_ids(name)
    session = model.session()
    session.prefill(ids)
    session.save(tmp_path / "s")
    want = tail(session)
    session.rewind(len(STEPS))
    assert np.array_equal(tail(session), want)
    other = load(onnx_of(name, "int8", *stored)).session()
    other.step(9)
    other.restore(tmp_path / "s")
    assert np.array_equal(tail(other), want)
    if name == "gemma2-gqa":
        with pytest.raises(CacheError, match="cannot rewind 20"):
            session.rewind(20)


@pytest.mark.parametrize("target", RUN_HERE)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.tuples(st.sampled_from(["feed", "rewind"]), st.integers(1, 20)), max_size=15))
def test_random_lives(actions: list[tuple[str, int]], target: str, ort_of: Callable[..., Model]) -> None:
    """Whatever happened to a session, its next logits are those of a fresh one that was fed the same tokens."""
    model = ort_of("gemma2-gqa", "f32", target)
    session = model.session()
    for action, n in actions:
        if action == "feed" and session.position < 200:
            session.prefill([6 + (n * i) % 4000 for i in range(n)])
        elif action == "rewind" and n <= session.position:
            try:
                session.rewind(n)
            except CacheError:
                continue
    fresh = model.session()
    if session.ids:
        fresh.prefill(session.ids)
    assert np.abs(session.step(7) - fresh.step(7)).max() < 1e-4


@pytest.mark.parametrize("stored", STORED)
def test_a_token_writes_one_row_in_place(stored: tuple[str, str], ort_of: Callable[..., Model]) -> None:
    session = ort_of("gemma2-gqa", "f32", *stored).session()
    session.prefill(token_ids("gemma2-gqa"))
    stores = [cache.store for cache in session.engine.caches]  # type: ignore[attr-defined]
    before = [(rows.ctypes.data, rows.copy()) for store in stores for rows in store.rows.values()]
    position = session.position
    session.step(5)
    after = [rows for store in stores for rows in store.rows.values()]
    for (address, old), new in zip(before, after, strict=True):
        assert new.ctypes.data == address
        assert np.flatnonzero((old != new).any(axis=(1, 2))).tolist() == [position % len(new)]


class FixedScales(NumpyStore):
    """int8 with a scale for each channel, in plain NumPy, for the reference engine."""

    def __init__(self, scales: Mapping[str, np.ndarray], *shape: Any) -> None:
        super().__init__(*shape, "f32")
        self._scales = scales

    def write(self, position: int, keys: np.ndarray, values: np.ndarray) -> None:
        rounded = (
            np.clip(np.rint(x / self._scales[name]), -128, 127) * self._scales[name]
            for name, x in (("key", keys), ("value", values))
        )
        super().write(position, *rounded)


@pytest.mark.parametrize("feed", FEEDINGS)
@pytest.mark.parametrize("name", ["demo", "gemma2-gqa", "gemma2-mha-odd-layers", "gemma3-mqa-no-factor", "gemma1-mqa"])
def test_int8_keys_and_values(name: str, feed: Any, onnx_of: OnnxOf) -> None:
    """The graph, which has two ways for few and for many tokens, against the same rounding in the reference engine."""
    folder, ids = onnx_of(name, "f32", "onnxruntime", "int8"), token_ids(name)
    model, plain = load(folder), load(folder, engine="reference", kv="f32")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if "_scale" in tensor.name
    }
    want = plain.session()
    for i, cache in enumerate(want.engine.caches):  # type: ignore[attr-defined]
        scales = {name: stored[f"blk.{i}.{name}_scale"][0, :, 0] for name in ("key", "value")}
        cache._store = FixedScales(scales, *cache._shape, cache.capacity)
    rounded = np.stack([want.step(token) for token in ids])
    found = feed(model.session(), ids)
    following = np.array([*ids[1:], 0])
    # A key at the edge of a step may fall to its other side for the last bit of a float; most logits agree to that bit.
    (records,) = compare([rounded, found], [(0, 1)], 0, following)
    (loss,) = compare([plain.logits(ids), found], [(0, 1)], 0, following)
    assert records["kld"].mean() < 0.05 * loss["kld"].mean() < 5e-5
    assert np.median(np.abs(rounded - found).max(axis=-1)) < 1e-3


@pytest.mark.parametrize("name", ["demo", "gemma2-gqa", "gemma3-mqa-no-factor"])
def test_float16_keys_and_values(name: str, onnx_of: OnnxOf) -> None:
    """Rounded as the reference engine rounds them, and nothing else is."""
    folder, ids = onnx_of(name, "f32", "onnxruntime", "f16"), token_ids(name)
    want, exact = (load(folder, engine="reference", kv=kv).logits(ids) for kv in ("f16", "f32"))
    for feed in FEEDINGS:
        found = feed(load(folder).session(), ids)
        # A number at the edge of a step may fall to its other side for the last bit of a float.
        assert np.abs(found - want).mean() < 0.2 * np.abs(want - exact).mean()
        assert np.abs(found - exact).max() < 1e-2


def test_keys_and_values_are_as_exported(ort_of: Callable[..., Model], onnx_of: OnnxOf) -> None:
    folder = onnx_of("gemma2-gqa", "f32", "onnxruntime", "int8")
    assert load(folder, kv="int8").kv == load(folder).kv == "int8-channel"
    with pytest.raises(InvalidRequest, match=r"kv: found 'f32', expected 'int8-channel', with which ort runs .*"):
        load(folder, kv="f32")
    with pytest.raises(InvalidRequest, match="kv: found 'int8', expected 'f32'"):
        load(onnx_of("gemma2-gqa", "f32"), kv="int8")
    sessions = [ort_of("gemma2-gqa", "f32", "onnxruntime", kv).session() for kv in ("int8", "f16", "f32")]
    for session in sessions:
        session.prefill(STEPS)
    small, half, large = (session.engine.cache_bytes for session in sessions)
    assert (4 * small, 2 * half) == (large, large)


def test_only_wanted_logits_are_computed(ort_of: Callable[..., Model]) -> None:
    model, ids = ort_of("gemma2-gqa", "f32"), np.array(token_ids("gemma2-gqa")[:8])
    every = model.session().engine.forward(ids, 8)
    for wanted in (0, 1, 3):
        found = model.session().engine.forward(ids, wanted)
        assert found.shape == (wanted, model.config.vocab_size)
        assert np.abs(found - every[8 - wanted :]).max(initial=0) < 1e-5


def test_a_ring_gives_what_full_caches_give(ort_of: Callable[..., Model]) -> None:
    model, ids = ort_of("demo", "f32"), token_ids("demo")
    ring, full = model.session(), Session(model, ring=False)
    assert np.abs(random_chunks(ring, ids) - random_chunks(full, ids)).max() < 1e-4
    assert ring.engine.cache_bytes < full.engine.cache_bytes


def test_a_failed_run_changes_nothing(ort_of: Callable[..., Model]) -> None:
    model = ort_of("gemma2-gqa", "f32")
    session, fresh = model.session(), model.session()
    session.prefill(STEPS)
    with pytest.raises(Exception, match="indices"):
        session.engine.forward(np.array([10**6]), 1)
    assert session.position == len(STEPS)
    fresh.prefill(STEPS)
    assert np.abs(session.step(9) - fresh.step(9)).max() < 1e-5


def test_what_does_not_fit(onnx_of: OnnxOf, tmp_path: Path) -> None:
    folder = onnx_of("demo", "int8")
    with pytest.raises(InvalidRequest, match="expected 'f32', with which ort"):
        load(folder, kv="int8")
    with pytest.raises(InvalidRequest, match="native"):
        load(folder, engine="native")
    other = onnx_of("gemma1-mqa", "int8")
    for file in folder.iterdir():
        shutil.copy(file, tmp_path / file.name)
    shutil.copy(other / "model.onnx", tmp_path / "model.onnx")
    manifest = json.loads((tmp_path / "bezel.json").read_text())
    for name, entry in manifest["files"].items():
        entry["bytes"] = (tmp_path / name).stat().st_size
    (tmp_path / "bezel.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidModelFile, match=r"model\.onnx"):
        load(tmp_path)
