"""Who may talk to the server: a page of another site may not, nor may anybody without the key where there is one.

A browser sends what any page asks it to send. So the Host of a server that only this computer can reach must be this
computer, or one of the sites that are listed (else a name that a foreign page made point here would do: DNS rebinding),
and the Origin, where there is one, must be the server's own or be listed.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .shapes import error_of, told
from .web import FOLDER

_OPEN = ("/", "/health")  # without a key, as the page's files: nothing of anybody's is there
_BODY_SECONDS = 30  # in which a request must have arrived


def is_loopback(host: str) -> bool:
    """Whether only this computer can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin_of(site: str) -> str:
    """A site as browsers name it: scheme, host and port. Raises ValueError for what is none."""
    parts = urlsplit(site.lower())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or "*" in site:
        raise ValueError(f"found {site!r}, expected a site such as https://example.com, or http://localhost:3000")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"found {site!r}, expected scheme, host and port only")
    usual = {"http": 80, "https": 443}[parts.scheme]
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, usual) else "")


class Guard:
    """Lets requests through to `app`, or answers 401, 403, 408 or 413.

    `local` says that only this computer can reach it; `origins` are of sites that may call it, as `origin_of` has them.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, origins: Collection[str], local: bool, most_bytes: int
    ) -> None:
        self._app, self._key, self._origins, self._most = app, key, frozenset(origins), most_bytes
        self._local, self._hosts = local, {urlsplit(origin).hostname for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and origin in self._origins:
                pairs = [(name.encode(), value.encode("latin-1")) for name, value in _cors(headers).items()]
                message["headers"] = [*message.get("headers", []), *pairs]
            await send(message)

        refusal = self._refusal(scope, headers, origin)
        if refusal is None and origin in self._origins and scope["method"] == "OPTIONS":
            refusal = Response(status_code=204)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        body = _Body(receive, scope["path"], self._most)
        try:
            await self._app(scope, body.receive, send_with_headers)
        except _Refused as refused:
            await refused.response(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers, origin: str | None) -> Response | None:
        path = scope["path"]
        host = _name(headers.get("host", ""))
        if self._local and not is_loopback(host) and host.lower() not in self._hosts:
            return problem(path, 403, f"the host {host[:100]!r} is not this computer's: call the server by 127.0.0.1")
        own = f"{scope['scheme']}://{headers.get('host', '')}"
        if origin is not None and origin not in (own, *self._origins):
            return problem(path, 403, f"the origin {origin[:100]!r} is not allowed: see --allow-origin")
        if self._key is None or path in _OPEN or path.startswith(FOLDER) or scope["method"] == "OPTIONS":
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")
        if hmac.compare_digest(given.encode("latin-1"), self._key.encode()):  # headers come as Latin-1
            return None
        form = "x-api-key: KEY" if path.startswith("/v1/messages") else "Authorization: Bearer KEY"
        wrong = "this is not the server's key" if given else f"a key is required: {form}"
        return problem(path, 401, wrong, "authentication_error", "invalid_api_key")


class _Refused(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class _Body:
    """Receives what a client sends, as far as it is not too much and does not take too long."""

    def __init__(self, receive: Receive, path: str, most: int) -> None:
        self._receive, self._path, self._left, self._complete = receive, path, most, False
        self._most, self._until = most, asyncio.get_running_loop().time() + _BODY_SECONDS

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        left = self._until - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            raise _Refused(
                problem(self._path, 408, f"the request did not arrive within {_BODY_SECONDS} seconds")
            ) from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _Refused(problem(self._path, 413, f"the body is larger than {self._most} bytes")) from None
        self._complete = not message.get("more_body", False)
        return message


def problem(
    path: str, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None
) -> JSONResponse:
    """An error of a request for `path`, as its API tells it."""
    return JSONResponse(told(path, status, error_of(message, kind, code)), status)


def _name(host: str) -> str:
    """A Host without its port, and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _cors(asked: Headers) -> dict[str, str]:
    return {
        "access-control-allow-origin": asked.get("origin", ""),
        "access-control-allow-headers": asked.get("access-control-request-headers", ""),  # clients have their own
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "vary": "Origin",
    }
