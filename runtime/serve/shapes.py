"""What the APIs' JSON has in common."""

from __future__ import annotations

import json
import secrets
from typing import Any

Json = dict[str, Any]


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def event(kind: str, **values: Any) -> Json:
    """An event of a stream whose events have names: in their "type", and for the stream itself."""
    return {"event": kind, "type": kind, **values}


def error_of(message: str, kind: str, code: str | None = None, param: str | None = None) -> Json:
    """What OpenAI's API tells of an error."""
    return {"message": message, "type": kind, "param": param, "code": code}


def told(path: str, status: int, error: Json) -> Json:
    """An error of a request for `path`, as its API tells it."""
    if not path.startswith("/v1/messages"):
        return {"error": error}
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
    kind = "invalid_request_error" if status < 500 else "api_error" if status == 500 else "overloaded_error"
    return {"type": "error", "error": {"type": kinds.get(status, kind), "message": error["message"]}}


def told_in_stream(path: str, status: int, error: Json) -> Json:
    """The same where an answer is on its way already: an event, in the APIs whose events have names."""
    if path.startswith("/v1/messages"):
        return {"event": "error", **told(path, status, error)}
    if path.startswith("/v1/responses"):
        return event("error", code=error["code"] or error["type"], message=error["message"], param=error["param"])
    return told(path, status, {**error, "code": status})


def dumps(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
