"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..errors import BezelError


def parse_json(text: bytes, fail: Callable[[str], BezelError]) -> dict[str, Any]:
    """A JSON object without duplicate keys (json would keep the last and hide the others), or what `fail` makes."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise fail(f"key {twice[:200]!r} appears twice")
        return out

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise fail(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise fail(f"found a JSON {type(value).__name__}, expected an object")
    return value
