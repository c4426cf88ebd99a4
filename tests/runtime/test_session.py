"""Sessions: a saved, restored or rewound one goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Model, load
from bezel.runtime.api import _stored_stop_ids
from bezel.runtime.errors import CacheError, ContextFull, InvalidModelFile, InvalidRequest, InvalidSession
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.files.safetensors import read_arrays, write_arrays
from bezel.runtime.session import Session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import token_ids

ModelOf = Callable[..., Model]
IDS = token_ids("gemma2-gqa")
STEPS = [5, 6, 7, 8]


def tail(session: Any) -> np.ndarray:
    return np.stack([session.step(token) for token in STEPS])


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
def test_a_restored_session_goes_on(kv: str, model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("gemma2-gqa", kv=kv)
    session = model.session()
    session.prefill(IDS)
    session.save(tmp_path / "s")
    want = tail(session)
    other = load(model.file.path, engine="reference", kv=kv).session()
    other.step(9)
    other.restore(tmp_path / "s")
    assert other.ids == IDS
    assert np.array_equal(tail(other), want)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_rewound_session_goes_on(model_of: ModelOf) -> None:
    model = model_of("gemma2-gqa")
    session = model.session()
    session.prefill(IDS)
    want = tail(session)
    session.rewind(len(STEPS))
    assert np.array_equal(tail(session), want)
    with pytest.raises(CacheError, match="cannot rewind 20"):
        session.rewind(20)
    assert session.position == len(IDS) + len(STEPS) == len(session.ids)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(st.tuples(st.sampled_from(["feed", "rewind", "save", "restore"]), st.integers(1, 20)), max_size=15)
)
def test_random_lives(actions: list[tuple[str, int]], model_of: ModelOf, tmp_path: Path) -> None:
    """Whatever happened to a session, its next logits are those of a fresh one that was fed the same tokens."""
    model = model_of("gemma2-gqa")
    session = model.session()
    saved = False
    for action, n in actions:
        if action == "feed" and session.position < 200:
            session.prefill([6 + (n * i) % 4000 for i in range(n)])
        elif action == "rewind" and n <= session.position:
            try:
                session.rewind(n)
            except CacheError:
                continue
        elif action == "save":
            session.save(tmp_path / "s")
            saved = True
        elif action == "restore" and saved:
            session.restore(tmp_path / "s")
    fresh = model.session()
    if session.ids:
        fresh.prefill(session.ids)
    # Equal but for rounding: the two cut their tokens into other chunks.
    assert np.abs(session.step(7) - fresh.step(7)).max() < 1e-4


def test_go_to_keeps_what_it_can(model_of: ModelOf) -> None:
    model = model_of("gemma2-gqa")
    session, fresh = model.session(), model.session()
    session.prefill(IDS)
    for ids in ([*IDS[:-3], 9, 9], IDS[:4], [2, 3], []):
        session.go_to(ids)
        assert session.ids == ids
        fresh.reset()
        if ids:
            fresh.prefill(ids)
        assert np.abs(session.step(7) - fresh.step(7)).max() < 1e-4
        session.rewind(1)


def test_what_fails_on_its_way_elsewhere_stays_where_it_was(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma2-gqa")
    session, fresh = model.session(), model.session()
    for one in (session, fresh):
        one.prefill(IDS)
    elsewhere = [2, *reversed(IDS)]  # whose beginning the rings no longer hold

    def fail(*_: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(session.engine), "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            session.go_to(elsewhere)
    assert session.ids == IDS
    assert np.array_equal(tail(session), tail(fresh))


@pytest.mark.parametrize("ring", [False, True])
def test_a_session_keeps_its_kind_of_cache(model_of: ModelOf, ring: bool) -> None:
    model = model_of("gemma2-gqa", context=len(IDS) + 2)
    session = Session(model, ring=ring)
    session.prefill(IDS)
    before = session.engine.cache_bytes
    session.feed([5, 6, 7], make_room=lambda ids: ids[4:])
    assert session.engine.cache_bytes == before


def test_a_full_context_takes_nothing(model_of: ModelOf) -> None:
    session = model_of("gemma2-gqa", context=20).session()
    session.prefill(IDS[:15])
    with pytest.raises(ContextFull, match=r"6 more tokens do not fit.*context of 20 has 5"):
        session.prefill(IDS[:6])
    assert session.position == 15
    session.prefill(IDS[:5])


@pytest.mark.parametrize(
    ("bad", "message"),
    [([], "one or more"), ([-1], "found -1"), ([4096], "0 to 4095"), ([[1]], "one or more"), ([1.5], "float")],
)
def test_bad_ids(bad: Any, message: str, model_of: ModelOf) -> None:
    with pytest.raises(InvalidRequest, match=message):
        model_of("gemma2-gqa").session().prefill(bad)


def test_an_interrupted_forward_changes_nothing(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma2-gqa")
    session = model.session()
    session.prefill(IDS)
    from bezel.runtime.cache import numpy_store

    right, calls = numpy_store.attention, []

    def interrupt(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(numpy_store, "attention", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.step(5)
    monkeypatch.undo()
    assert session.position == len(IDS)
    fresh = model.session()
    fresh.prefill(IDS)
    assert np.array_equal(tail(session), tail(fresh))


class TestSavedFiles:
    @pytest.fixture
    def saved(self, model_of: ModelOf, tmp_path: Path) -> tuple[Model, Path]:
        model = model_of("gemma2-gqa")
        session = model.session()
        session.prefill(IDS)
        session.save(tmp_path / "s")
        return model, tmp_path / "s"

    def test_another_model(self, saved: tuple[Model, Path], model_of: ModelOf) -> None:
        with pytest.raises(InvalidSession, match="saved with model"):
            model_of("gemma2-mqa-wide-heads").session().restore(saved[1])

    def test_another_storage(self, saved: tuple[Model, Path], model_of: ModelOf) -> None:
        with pytest.raises(InvalidSession, match="kv f32, expected f16"):
            model_of("gemma2-gqa", kv="f16").session().restore(saved[1])

    def test_another_engine(self, saved: tuple[Model, Path], model_of: ModelOf) -> None:
        with pytest.raises(InvalidSession, match="engine reference, expected native"):
            model_of("gemma2-gqa", engine="native").session().restore(saved[1])

    def test_another_engine_for_the_same_bits(self, saved: tuple[Model, Path], model_of: ModelOf) -> None:
        """The reference engine never rounds activations, whether asked to or not."""
        session = model_of("gemma2-gqa", activations="f32").session()
        session.restore(saved[1])
        assert session.ids == IDS

    @pytest.mark.parametrize(("version", "said"), [("1", "a session of version 1"), (None, "no session")])
    def test_another_version(self, version: str | None, said: str, saved: tuple[Model, Path]) -> None:
        model, path = saved
        with safe_open(path, framework="numpy") as file:
            labels, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(arrays, path, {k: v for k, v in (labels | {"bezel_session": version}).items() if v})
        with pytest.raises(InvalidSession, match=f"found {said}, expected one of version 3"):
            model.session().restore(path)

    def test_too_long(self, saved: tuple[Model, Path], model_of: ModelOf) -> None:
        with pytest.raises(InvalidSession, match="expected up to 20"):
            model_of("gemma2-gqa", context=20).session().restore(saved[1])

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda a: a.update(ids=a["ids"][:-1]), "34 ids, but the caches hold 35 positions"),
            (lambda a: a.update(ids=a["ids"].astype(np.int64) - 7), "holds pictures, and this model sees none"),
            (lambda a: a.update(ids=a["ids"].astype(np.int64) + 4096), "a token outside the vocabulary"),
            (lambda a: a.pop("layers.1.keys"), "'keys': found nothing"),
        ],
    )
    def test_what_does_not_fit_together(
        self, change: Callable[[dict[str, Any]], object], said: str, saved: tuple[Model, Path]
    ) -> None:
        """With the right checksum; and the session goes on as if nothing had happened."""
        model, path = saved
        labels, arrays = read_arrays(path)
        change(arrays)
        with path.open("wb") as file:
            write_arrays(file, arrays, labels)
        session, fresh = model.session(), model.session()
        for one in (session, fresh):
            one.prefill(IDS[:5])
        with pytest.raises(InvalidSession, match=said):
            session.restore(path)
        assert session.ids == IDS[:5]
        assert np.array_equal(tail(session), tail(fresh))

    def test_missing(self, model_of: ModelOf, tmp_path: Path) -> None:
        with pytest.raises(InvalidSession, match="not a saved session"):
            model_of("gemma2-gqa").session().restore(tmp_path / "nothing")

    def test_damaged(self, saved: tuple[Model, Path]) -> None:
        """Cut or flipped anywhere: refused, or sound; and a refusal leaves the session as it was."""
        model, path = saved
        raw = path.read_bytes()
        session = model.session()
        session.step(9)
        random = np.random.default_rng(5)
        for trial in range(100):
            damaged = bytearray(raw)
            if trial % 2:
                damaged = damaged[: random.integers(len(raw))]
            else:
                damaged[random.integers(min(len(raw), 4000))] ^= 1 << random.integers(8)
            path.write_bytes(damaged)
            try:
                session.restore(path)
            except InvalidSession:
                assert session.ids == [9] or len(session.ids) == len(IDS)
            assert session.position == len(session.ids)


def test_load_refuses_nonsense(gguf_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_of("gemma2-gqa")
    opened: list[GGUFModel] = []
    close = GGUFModel.close
    monkeypatch.setattr(GGUFModel, "close", lambda self: (opened.append(self), close(self)))
    for options, message in (
        ({"engine": "magic"}, "engine.*magic"),
        ({"engine": "ort"}, "engine: found 'ort', expected native or reference: .* is a GGUF file"),
        ({"kv": "int3"}, "kv: found 'int3', expected 'f16' or 'f32' or 'int8', with which native runs"),
        ({"context": 0}, "context"),
        ({"context": 257}, "1 to 256"),
        ({"threads": 0}, "threads"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            load(path, **options)  # type: ignore[arg-type]
    assert len(opened) == 4  # what was opened was closed: "magic" and 0 threads are seen before
    with pytest.raises(InvalidModelFile):
        load(tmp_path / "nothing.gguf")


def test_a_model_lets_go_of_its_file(gguf_of: Callable[..., Path]) -> None:
    with load(gguf_of("gemma2-gqa"), engine="reference") as model:
        model.logits(IDS)
    with pytest.raises(InvalidRequest, match="closed"):
        model.file.dequantize("token_embd.weight")


@pytest.mark.parametrize("stored", [1, [1], np.array([1]), "1", None, [[1], [1, 2]], 1 << 40])
def test_a_stored_stop_token_leaves_the_others(stored: Any, gguf_of: Callable[..., Path]) -> None:
    with GGUFModel(gguf_of("gemma2-gqa")) as file:
        file.metadata = {"tokenizer.ggml.eot_token_id": 5, "bezel.generation.stop_token_ids": stored}
        known = isinstance(stored, np.ndarray) or stored in (1, [1])
        assert _stored_stop_ids(file, 4096) == ({1, 5} if known else {5})


def test_threads_change_no_token(model_of: ModelOf) -> None:
    one, two = (model_of("demo", threads=n).logits(token_ids("demo")[:40]) for n in (1, 2))
    assert np.abs(one - two).max() < 1e-4
