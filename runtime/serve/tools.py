"""Calls of a client's functions.

Gemma 3 was trained on no form for them, so this is bezel's own, in JSON: the system text names the functions and says
that a call is `{"tool_calls": [{"name": NAME, "arguments": {…}}]}` and nothing else; what came of it is told in a user
turn, `{"tool_results": […]}`. A grammar sees to it that an answer which begins with a brace is such a call of a
function that there is, with arguments that its schema describes; or an answer in the form that the request wants of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequest
from ..text.grammar import Grammar, Grammars

MOST_CALLS = 8  # in an answer
_START = '{"tool_calls": ['
_NAME, _ARGUMENTS = '{"name": ', ', "arguments": '
_ANY_OBJECT = {"type": "object"}
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # in these, names are free

_WORDS = """\
You can call these functions, whose parameters JSON schemas describe:
{functions}
To call functions, answer with JSON alone, without any other text, in this form:
{{"tool_calls": [{{"name": "the function's name", "arguments": {{"parameter": "value"}}}}]}}
What they give is told to you as {{"tool_results": [...]}}. Otherwise answer in {otherwise}."""


@dataclass(frozen=True)
class Tool:
    """A function of the client's; `parameters` is a JSON schema of its arguments, an object.

    A `strict` one takes no arguments but those of its schema; for others, keywords that no grammar can see to
    (`uniqueItems`, `not` …) are told to the model only.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON


def instructions(tools: Sequence[Tool], in_json: bool = False) -> str:
    """What the system text says of the functions, and that other answers are text, or else JSON."""
    functions = ({"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools)
    told = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    return _WORDS.format(functions=told, otherwise="JSON" if in_json else "plain text")


def told_calls(calls: Sequence[Call]) -> str:
    """Calls that the model has made, as it writes them."""
    parts = (f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in calls)
    return f"{_START}{', '.join(parts)}]}}"


def told_result(name: str, content: str) -> str:
    return json.dumps({"tool_results": [{"name": name, "content": content}]}, ensure_ascii=False)


def grammar(
    grammars: Grammars, tools: Sequence[Tool], *, required: bool, parallel: bool, form: dict[str, Any] | None = None
) -> Grammar:
    """What an answer may be: calls of these functions or, unless `required`, JSON of the schema `form`, or a text.

    Raises InvalidRequest for a schema that cannot be followed, with the name of its function.
    """
    for tool in tools:
        if tool.strict:
            _check(grammars, tool)
    try:
        schema = _calls_schema(tools, parallel)
        if required:
            return grammars.json_schema(schema, lenient=True)
        # What begins as calls do is calls: so an answer in the form has no such key.
        not_calls = form and {"allOf": [_moved(form, "#/allOf/0"), {"properties": {"tool_calls": False}}]}
        return grammars.json_or(schema, not_calls)
    except RecursionError:
        raise InvalidRequest("a schema is nested too deeply") from None
    except InvalidRequest:
        for tool in tools:
            _check(grammars, tool)
        raise


def _check(grammars: Grammars, tool: Tool) -> None:
    try:
        grammars.json_schema(tool.parameters or _ANY_OBJECT, lenient=not tool.strict)
    except InvalidRequest as error:
        raise InvalidRequest(f"{tool.name}{', which is strict' if tool.strict else ''}: {error}") from None


def _calls_schema(tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
    parameters = {f"a{i}": _moved(tool.parameters or _ANY_OBJECT, f"#/$defs/a{i}") for i, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/a{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    return {
        "type": "object",
        "properties": {
            "tool_calls": {
                "type": "array",
                "items": {"anyOf": calls},
                "minItems": 1,
                "maxItems": MOST_CALLS if parallel else 1,
            }
        },
        "required": ["tool_calls"],
        "additionalProperties": False,
        "$defs": parameters,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts hold where it is a part of another one."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            found[key] = {name: _moved(part, place) for name, part in value.items()}
        elif key in ("const", "enum", "default", "examples"):  # no schemas
            found[key] = value
        elif key == "$ref" and isinstance(value, str) and re.match("#(/|$)", value):
            found[key] = place + value[1:]
        elif key != "$id":  # which would be another place for references to begin
            found[key] = _moved(value, place)
    return found


class Calls:
    """Reads an answer as it comes: text or, where these are `expected`, calls, each once it is complete."""

    def __init__(self, expected: bool) -> None:
        self._held, self._begun, self._expected, self._is_text = "", False, expected, False
        self._called = False

    def push(self, text: str) -> Iterator[str | Call]:
        if not self._expected:
            yield text
            return
        self._held += text
        if not self._begun and not self._is_text:
            self._is_text = bool(self._held) and not _START.startswith(self._held[: len(_START)])
            if self._held.startswith(_START):
                self._begun, self._held = True, self._held[len(_START) :]
        if self._is_text and self._held:
            yield self._held
            self._held = ""
        while self._begun and "}" in text:  # what completes a call, which is not looked at in vain
            try:
                name, arguments, self._held = _call(self._held)
            except ValueError:  # not all of it is there
                return
            self._called = True
            yield Call(name, arguments)

    def end(self) -> Iterator[str]:
        """What is no call because it was cut, as the text that it is; behind a call that was told, nothing."""
        text = (_START if self._begun else "") + self._held
        if text and not self._called:
            yield text


def _call(text: str) -> tuple[str, str, str]:
    """The name and the arguments, as they are written, of the call that a text begins with, and what is behind it."""
    text, decoder = text.lstrip(", "), json.JSONDecoder()
    _, end = decoder.raw_decode(text)
    name, at = decoder.raw_decode(text, len(_NAME))
    return name, text[at + len(_ARGUMENTS) : end - 1], text[end:]
