"""What answers must look like: the form that a request wants, and calls of its functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import InvalidRequest
from ..text.generation import Constraint
from ..text.grammar import ANY_JSON, Grammar, Grammars
from . import tools
from .fields import BadRequest, Fields
from .models import Served
from .shapes import Json
from .talks import Talk


async def constraint_of(served: Served, talk: Talk) -> Callable[[], Constraint] | None:
    """What an answer must look like, by the functions that it may call and by its form.

    Raises BadRequest for what no answer can look like.
    """
    kind, source = _form_of(talk.form)
    form = talk.form.path if talk.form is not None else ""
    try:
        if talk.may_call:
            if kind not in ("text", "json") and talk.choice == "auto":
                raise BadRequest(f"{form}.type: found {kind!r}, expected a JSON schema beside tools", f"{form}.type")
            if kind == "json":  # by itself first: its faults are its own
                await served.compiled(lambda grammars: grammars.json_schema(source))
            return (await _calls(served, talk, source if kind == "json" else None)).constraint
        if kind == "text":
            return None
        makers: dict[str, Callable[[Grammars, Any], Grammar]] = {
            "json": Grammars.json_schema,
            "regex": Grammars.regex,
            "grammar": Grammars.lark,
        }
        return (await served.compiled(lambda grammars: makers[kind](grammars, source))).constraint
    except InvalidRequest as error:
        raise BadRequest(f"{form}: {error}", form) from None


async def _calls(served: Served, talk: Talk, form: Json | None) -> Grammar:
    named = [tool for tool in talk.functions if talk.choice == f"call {tool.name}"]
    try:
        return await served.compiled(
            lambda grammars: tools.grammar(
                grammars,
                named or talk.functions,
                required=talk.choice != "auto",
                parallel=talk.parallel and not named,
                form=form,
            )
        )
    except InvalidRequest as error:
        raise BadRequest(f"tools: {error}", "tools") from None


def _form_of(form: Fields | None) -> tuple[str, Any]:
    """What a `response_format` asks for: "text", "json" by a schema, "regex" or "grammar", and the source of it."""
    kind = form.choice("type", ("text", "json_object", "json_schema", "regex", "grammar")) if form is not None else None
    if form is None or kind in (None, "text"):
        return "text", None
    if kind == "json_object":
        return "json", ANY_JSON
    if kind == "json_schema":
        within = form if "schema" in form or form.path != "response_format" else form.object("json_schema")
        if within is None:
            raise form.fail("json_schema", "an object with a schema")
        schema = within.get("schema")
        if not isinstance(schema, dict):
            raise within.fail("schema", "a JSON schema, an object")
        return "json", schema
    name = "pattern" if kind == "regex" else "grammar"
    source = form.text(name)
    if source is None:
        raise form.fail(name, "a text")
    return kind, source
