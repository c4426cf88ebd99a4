"""Where the time of a token goes: what each op takes, and what is left for Python."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime.api import Model
from ...runtime.cache.caches import default_chunk
from ...runtime.engines.protocol import ModelBackend, ModelEngine
from ...runtime.engines.tower import Tower
from ...runtime.errors import InvalidRequest
from ...runtime.vision.eye import Eye

Totals = dict[str, list[float]]  # op → calls, seconds


class Timed:
    """Stands in for an object, or a module, and adds up the calls of its public functions in `totals`.

    Calls that its functions make of each other go unseen, so that no time counts twice.
    """

    def __init__(self, target: Any, prefix: str, totals: Totals) -> None:
        self._target, self._prefix, self._totals = target, prefix, totals

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if name.startswith("_") or not callable(value):
            return value
        total, clock = self._totals.setdefault(self._prefix + name, [0, 0.0]), time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = value(*args, **kwargs)
            total[1] += clock() - start
            total[0] += 1
            return result

        self.__dict__[name] = timed  # found without __getattr__ from now on
        return timed


@dataclass(frozen=True)
class OpTime:
    """One op over a forward pass: how often it was called, its seconds, and its share of the pass."""

    op: str
    calls: float
    seconds: float
    share: float


def profile(model: Model, held: int, steps: int) -> dict[str, list[OpTime]]:
    """The rows of a "decode" step with `held` tokens held, a mean over `steps`, of one "prefill" chunk, and of a
    "picture" in the tower, where the model sees.

    Slowest first; the last two are "Python and the rest" and "total". Raises ContextFull.
    """
    backend = model.backend
    if not isinstance(backend, ModelBackend):
        raise InvalidRequest(f"--profile: {model.file.path} runs on an engine whose operations cannot be told apart")
    totals: Totals = {}
    timed = ModelBackend(
        model.config,
        Timed(backend.ops, "", totals),
        backend.weights,
        lambda *shape: Timed(backend.new_store(*shape), "cache.", totals),
    )
    chunk = default_chunk(model.config.layers)

    def run(engine: ModelEngine, first: int, count: int) -> None:
        engine.forward(np.array([_token(model, i) for i in range(first, first + count)]), 1)

    def clock() -> float:
        for total in totals.values():
            total[:] = [0, 0.0]
        return time.perf_counter()

    engine = timed.engine(model.context, model.kv, chunk, True)
    for start in range(0, held, chunk):
        run(engine, start, min(chunk, held - start))
    run(engine, held, 1)
    begin = clock()
    for i in range(steps):
        run(engine, i, 1)
    decode = _rows(totals, time.perf_counter() - begin, steps)

    engine = timed.engine(model.context, model.kv, chunk, True)
    begin = clock()
    run(engine, 0, min(chunk, model.context))
    found = {"decode": decode, "prefill": _rows(totals, time.perf_counter() - begin, 1)}
    return found if model.eye is None else found | {"picture": profile_picture(model.eye)}


def profile_picture(eye: Eye) -> list[OpTime]:
    """The rows of a picture in an eye's tower, once its weights are there."""
    totals: Totals = {}
    assert isinstance(eye.tower, Tower)
    _, side = eye.tower.weights, eye.config.image_size  # which are read only now
    pixels = np.random.default_rng(0).standard_normal((side, side, 3), dtype=np.float32)
    tower = copy.copy(eye.tower)
    tower.ops = Timed(tower.ops, "", totals)
    begin = time.perf_counter()
    tower.rows(pixels)
    return _rows(totals, time.perf_counter() - begin, 1)


def _token(model: Model, i: int) -> int:
    return (2 + 7919 * i) % model.config.vocab_size


def _rows(totals: Totals, seconds: float, passes: int) -> list[OpTime]:
    rows = [
        OpTime(op, calls / passes, spent / passes, spent / seconds)
        for op, (calls, spent) in sorted(totals.items(), key=lambda item: -item[1][1])
        if calls
    ]
    rest = seconds - sum(spent for _, spent in totals.values())
    return [
        *rows,
        OpTime("Python and the rest", 0, rest / passes, rest / seconds),
        OpTime("total", 0, seconds / passes, 1.0),
    ]
