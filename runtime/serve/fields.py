"""The fields of a request, read with their types."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import is_whole

_MOST_DIGITS = 400


class BadRequest(Exception):
    """What is wrong with a request, for its sender: an HTTP status, the field, and a code that programs look at."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Fields:
    """A JSON object whose values are asked for by name; what nobody asks for is ignored, null is as good as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values, self._where = values, where

    @staticmethod
    def parse(body: bytes) -> Fields:
        try:
            values = json.loads(body, parse_float=_finite, parse_constant=_finite, parse_int=_whole)
            json.dumps(values, ensure_ascii=False).encode()  # an answer repeats some of it: half a surrogate pair fails
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise BadRequest(f"the body is no JSON: {reason}") from None
        if not isinstance(values, dict):
            raise BadRequest(f"the body is {_shown(values)}, expected an object")
        return Fields(values)

    @property
    def path(self) -> str:
        """Where in the request this object is."""
        return self._where.rstrip(".")

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def fail(self, name: str, want: str) -> BadRequest:
        return BadRequest(f"{self._where}{name}: found {_shown(self.get(name))}, expected {want}", self._where + name)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(name, "a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return bool(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_whole(value) or not least <= value <= most:
            raise self.fail(name, f"a whole number from {least} to {most}")
        return int(value)

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if not (is_whole(value) or isinstance(value, float)) or not least <= value <= most:
            raise self.fail(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def choice(self, name: str, known: Sequence[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in known:
            raise self.fail(name, " or ".join(known))
        return value

    def object(self, name: str) -> Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(value, f"{self._where}{name}.")

    def objects(self, name: str) -> list[Fields]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.fail(name, "a list of objects")
        return [Fields(entry, f"{self._where}{name}[{i}].") for i, entry in enumerate(value)]

    def texts(self, name: str, most: int) -> list[str]:
        """A text, or a list of up to `most` of them."""
        value = self.get(name)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list) or len(found) > most or not all(isinstance(text, str) for text in found):
            raise self.fail(name, f"a text or a list of up to {most}")
        return found

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None


def _shown(value: Any) -> str:
    """A value in a message, in a few letters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"found a number of {len(text)} digits, expected at most {_MOST_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    """A number that JSON can tell again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {text[:20]}, expected a number that float64 holds")
    return value
