"""The functions that a request describes, and what its messages say of calls of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from .fields import BadRequest, Fields
from .tools import Tool


def functions_of(entries: Sequence[Fields], schema: str = "parameters") -> list[Tool]:
    """The functions that a request describes, each an object with its name, description and a JSON schema."""
    found = []
    for entry in entries:
        name, parameters = entry.text("name"), entry.get(schema)
        if not name or not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name):
            raise entry.fail("name", "up to 128 letters, digits, dots, dashes and underscores")
        if parameters is not None and not (
            isinstance(parameters, dict) and parameters.get("type", "object") == "object"
        ):
            raise entry.fail(schema, "a JSON schema of an object")
        found.append(
            Tool(
                name,
                entry.text("description", "") or "",
                {"type": "object", **(parameters or {})},
                entry.flag("strict"),
            )
        )
    if len({tool.name for tool in found}) < len(found):
        raise BadRequest("tools: two functions of the same name", "tools")
    return found


def call_of(entry: Fields, name: str, calls: Mapping[str, str]) -> str:
    """The function whose result this is, by the id of its call. Raises BadRequest for a call that there is none of."""
    call = entry.text(name)
    if call is None or call not in calls:
        raise entry.fail(name, "the id of a call that an earlier message has")
    return calls[call]


def json_text(entry: Fields, name: str, text: str) -> str:
    """JSON in a text, as the model would write it. Raises BadRequest where it is none."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        raise entry.fail(name, "JSON") from None


def check_choice(choice: str, functions: Sequence[Tool]) -> str:
    """Raises BadRequest where a function must be called, and is not there."""
    names = [tool.name for tool in functions]
    if (choice == "required" and not names) or (choice[:5] == "call " and choice[5:] not in names):
        raise BadRequest(f"tool_choice: asks for a call, and tools has {', '.join(names) or 'none'}", "tool_choice")
    return choice
