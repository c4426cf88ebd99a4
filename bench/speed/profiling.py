"""Where the time of a token goes: what each op takes, and what is left for Python."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...runtime.api import Model, Session

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
class Row:
    """One op over a forward pass: how often it was called, its seconds, and its share of the pass."""

    op: str
    calls: float
    seconds: float
    share: float


def profile(model: Model, held: int, steps: int) -> dict[str, list[Row]]:
    """The rows of a "decode" step with `held` tokens held, a mean over `steps`, and of one "prefill" chunk.

    Slowest first; the last two are "Python and the rest" and "total". Raises ContextFull.
    """
    session = model.session()
    session.prefill([_token(model, i) for i in range(held)])
    session.step(_token(model, held))
    with _timed(session) as totals:
        start = time.perf_counter()
        for i in range(steps):
            session.step(_token(model, i))
        decode = _rows(totals, time.perf_counter() - start, steps)

    session = model.session()
    chunk = [_token(model, i) for i in range(min(session.engine.chunk, model.context))]
    with _timed(session) as totals:
        start = time.perf_counter()
        session.prefill(chunk)
        return {"decode": decode, "prefill": _rows(totals, time.perf_counter() - start, 1)}


def _token(model: Model, i: int) -> int:
    return (2 + 7919 * i) % model.config.vocab_size


@contextmanager
def _timed(session: Session) -> Iterator[Totals]:
    """Times what the session's forward passes call: the engine's ops and its caches."""
    totals: Totals = {}
    engine: Any = session.engine
    ops, caches = engine.ops, engine.caches
    engine.ops = Timed(ops, "", totals)
    engine.caches = [Timed(cache, "cache.", totals) for cache in caches]
    try:
        yield totals
    finally:
        engine.ops, engine.caches = ops, caches


def _rows(totals: Totals, seconds: float, passes: int) -> list[Row]:
    rows = [
        Row(op, calls / passes, spent / passes, spent / seconds)
        for op, (calls, spent) in sorted(totals.items(), key=lambda item: -item[1][1])
        if calls
    ]
    rest = seconds - sum(spent for _, spent in totals.values())
    return [*rows, Row("Python and the rest", 0, rest / passes, rest / seconds), Row("total", 0, seconds / passes, 1.0)]
