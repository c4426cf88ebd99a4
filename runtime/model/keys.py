"""Checked look-ups in what describes a model: the keys of a config.json, or of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import InvalidConfig

_F32_TINY, _F32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Keys:
    """A mapping that remembers what was asked for; `source` names it in errors. Look-ups raise InvalidConfig."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source, self.used = raw, source, set[str]()

    def fail(self, key: str, want: str) -> InvalidConfig:
        got = repr(self.raw[key])[:80] if key in self.raw else "nothing"
        return InvalidConfig(f"{self.source}: key '{key}': found {got}, expected {want}")

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def get(self, key: str, want: str, accept: Callable[[Any], bool]) -> Any:
        self.used.add(key)
        # `accept` may compare the value with ==, which NumPy answers for each element of an array.
        if key not in self.raw or isinstance(self.raw[key], np.ndarray) or not accept(self.raw[key]):
            raise self.fail(key, want)
        return self.raw[key]

    def array(self, key: str, want: str, accept: Callable[[list[Any]], bool]) -> list[Any]:
        self.used.add(key)
        value = self.raw.get(key)
        values = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(values, list) or not accept(values):
            raise self.fail(key, want)
        return values

    def must_be(self, key: str, values: tuple[Any, ...], why: str = "") -> None:
        """Checks a key that changes the mathematics unless it is absent or holds one of `values`."""
        if key in self.raw:
            self.get(key, " or ".join(map(repr, values)) + why, lambda value: value in values)

    def count(self, key: str, limit: int = 1 << 24) -> int:
        return int(self.get(key, f"an integer from 1 to {limit}", lambda v: is_int(v) and 1 <= v <= limit))

    def positive(self, key: str) -> float:
        return f32(self.get(key, "a positive float32", is_positive))

    def flag(self, key: str) -> bool:
        return bool(self.get(key, "true or false", lambda v: isinstance(v, bool)))

    def refuse_unknown(self, known: Iterable[str], advice: str = "") -> None:
        """Raises InvalidConfig for a key that nobody asked for and that is not `known` to be harmless."""
        unknown = sorted(set(self.raw) - self.used - set(known))
        if unknown:
            raise InvalidConfig(
                f"{self.source}: unknown key {unknown[0][:80]!r} = {repr(self.raw[unknown[0]])[:80]}: it may change "
                f"what the model computes, so bezel does not guess{advice}"
            )


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether a number stays positive and finite as a float32, and loses no digits to underflow."""
    return (is_int(value) or isinstance(value, float)) and _F32_TINY <= value <= _F32_MAX


def f32(value: float) -> float:
    return float(np.float32(value))


def shortest(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))
