"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import BezelError, InvalidRequest
from ..version import bezel_version
from . import anthropic, openai, responses
from .answers import Answer
from .asks import Ask, start
from .completions import completion_asks
from .fields import BadRequest, Fields
from .guard import Guard, problem
from .models import Models, Served
from .shapes import Json, dumps, error_of, told, told_in_stream
from .talks import check_length, prompt_of
from .web import page_routes

_PING_SECONDS = 15  # without a word a stream sends a comment, so that nobody takes it for dead
_log = logging.getLogger("bezel.serve")

Parts = AsyncIterator[dict[str, Any]]


class Form(Protocol):
    """How an API tells answers: whole, or in the parts of a stream, each with the name of its "event" if it has one."""

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]: ...
    def parts(self, answers: Sequence[Answer]) -> Parts: ...


class Server:
    """What the endpoints do. `most_begun` is how many answers may be asked for at a time, each model's."""

    def __init__(self, models: Models, most_begun: int) -> None:
        self._models, self._most_begun = models, most_begun

    # --- of OpenAI's API

    async def list_models(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self._models.paths]})

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models.paths:
            raise BadRequest(f"model: found {name[:100]!r}", "model", 404, "model_not_found")
        return JSONResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        served = self._models.loaded.get(name)
        return {
            "id": name,
            "object": "model",
            "created": served.loaded if served is not None else 0,
            "owned_by": "bezel",
            "meta": asdict(self._models.facts[name]),
        }

    async def chat_completions(self, request: Request) -> Response:
        fields, served = await self._read(request)
        ask = await openai.chat_ask(fields, served)
        form = openai.Form(served, fields, is_chat=True, calls=ask.calls)
        return await self._answer(request, fields.flag("stream"), served, [ask], form)

    async def completions(self, request: Request) -> Response:
        fields, served = await self._read(request)
        found = await completion_asks(fields, served)
        form = openai.Form(served, fields, is_chat=False)
        return await self._answer(request, fields.flag("stream"), served, found, form)

    async def responses(self, request: Request) -> Response:
        fields, served = await self._read(request)
        ask = await responses.responses_ask(fields, served)
        form = responses.Form(served, fields, ask.calls)
        return await self._answer(request, fields.flag("stream"), served, [ask], form, done=False)

    # --- of Anthropic's API

    async def messages(self, request: Request) -> Response:
        fields, served = await self._read(request)
        ask = await anthropic.messages_ask(fields, served)
        form = anthropic.Form(served, ask.calls)
        return await self._answer(request, fields.flag("stream"), served, [ask], form, done=False)

    async def count_tokens(self, request: Request) -> Response:
        fields, served = await self._read(request)
        talk = await asyncio.to_thread(anthropic.talk_of, fields)
        ids = await asyncio.to_thread(prompt_of, served, talk)
        return JSONResponse({"input_tokens": len(ids)})

    async def _read(self, request: Request) -> tuple[Fields, Served]:
        fields = Fields.parse(await request.body())
        return fields, await self._models.get(fields.text("model"))

    async def _answer(
        self,
        request: Request,
        streamed: bool,
        served: Served,
        found: Sequence[Ask],
        form: Form,
        done: bool = True,
    ) -> Response:
        answers = self._start(served, found)
        if streamed:
            return events(request.url.path, answers, form.parts(answers), done)
        return JSONResponse(await attended(request, answers, form.whole(answers)))

    def _start(self, served: Served, found: Sequence[Ask]) -> list[Answer]:
        begun = sum(served.scheduler.load)
        if begun >= self._most_begun:
            raise BadRequest(f"{begun} answers are being written or wait already; try again later", status=503)
        answers: list[Answer] = []
        try:
            for ask in found:
                answers += start(served, ask)
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    async def embeddings(self, request: Request) -> Response:  # noqa: ARG002
        raise BadRequest("Gemma models write texts: none of these gives embeddings", status=404)

    # --- of llama.cpp's server

    async def tokenize(self, request: Request) -> Response:
        fields, served = await self._read(request)
        tokenizer, text = served.model.tokenizer, fields.text("content")
        if text is None:
            raise fields.fail("content", "a text")
        check_length(served, [text], "content")
        ids = await asyncio.to_thread(tokenizer.encode, text, fields.flag("add_special"))
        if fields.flag("with_pieces"):
            return JSONResponse({"tokens": [{"id": i, "piece": tokenizer.piece(i)} for i in ids]})
        return JSONResponse({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        fields, served = await self._read(request)
        ids = fields.get("tokens")
        if not isinstance(ids, list):
            raise fields.fail("tokens", "a list of token ids")
        return JSONResponse({"content": served.model.tokenizer.decode(ids)})

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"status": "ok"})

    async def slots(self, request: Request) -> Response:  # noqa: ARG002
        found = []
        for name, served in self._models.loaded.items():
            for i, task in enumerate(served.scheduler.tasks()):
                figures = task.figures
                found.append(
                    {
                        "id": i,
                        "model": name,
                        "n_ctx": served.model.context,
                        "is_processing": not task.paused,  # but waits for its client to read
                        "prompt_tokens": figures.prompt_tokens,
                        "cached_tokens": figures.cached_tokens,
                        "read_tokens": len(task.held),
                        "tokens": figures.tokens,
                        "seconds": time.monotonic() - task.began,
                    }
                )
        return JSONResponse(found)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        lines = []
        rows: list[tuple[str, str, str, Callable[[Served], float]]] = [
            (
                "prompt_tokens_total",
                "counter",
                "Tokens of prompts that were read.",
                lambda s: s.scheduler.counts.prompt_tokens,
            ),
            (
                "cached_tokens_total",
                "counter",
                "Tokens of prompts that were read before.",
                lambda s: s.scheduler.counts.cached_tokens,
            ),
            ("tokens_predicted_total", "counter", "Tokens that were written.", lambda s: s.scheduler.counts.tokens),
            ("passes_total", "counter", "Passes through the model.", lambda s: s.scheduler.counts.passes),
            ("pass_seconds_total", "counter", "Seconds that they took.", lambda s: s.scheduler.counts.seconds),
            ("requests_processing", "gauge", "Answers being worked on.", lambda s: s.scheduler.load[0]),
            ("requests_deferred", "gauge", "Answers that wait for their turn.", lambda s: s.scheduler.load[1]),
            ("prefixes", "gauge", "Sequences that are kept.", lambda s: len(s.scheduler.prefixes)),
            ("prefix_bytes", "gauge", "Bytes that they take.", lambda s: s.scheduler.prefixes.nbytes),
        ]
        for metric, kind, words, value in rows:
            lines += [f"# HELP bezel_{metric} {words}", f"# TYPE bezel_{metric} {kind}"]
            lines += [
                f"bezel_{metric}{{model={json.dumps(name)}}} {value(served):g}"
                for name, served in self._models.loaded.items()
            ]
        lines += ["# HELP bezel_answers_total Answers that ended, and how.", "# TYPE bezel_answers_total counter"]
        for name, served in self._models.loaded.items():
            ended = served.scheduler.counts.ended.items()
            lines += [f'bezel_answers_total{{model={json.dumps(name)},finish="{finish}"}} {n}' for finish, n in ended]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def version(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"version": bezel_version()})


async def attended(request: Request, answers: Sequence[Answer], work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, as long as the client is there."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        for answer in answers:
            answer.cancel()


def events(path: str, answers: Sequence[Answer], parts: Parts, done: bool = True) -> Response:
    """A stream of server-sent events; the answers end when the client leaves."""

    async def lines() -> AsyncIterator[str]:
        pending: asyncio.Future[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(parts))
                ready, _ = await asyncio.wait([pending], timeout=_PING_SECONDS)
                if not ready:
                    yield ": ping\n\n"
                    continue
                try:
                    part = pending.result()
                except StopAsyncIteration:
                    break
                finally:
                    pending = None
                yield _line(part)
            if done:
                yield "data: [DONE]\n\n"
        except Exception as error:
            yield _line(told_in_stream(path, *explain(error)))
        finally:
            if pending is not None:
                pending.cancel()
            for answer in answers:
                answer.cancel()

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def _line(part: Json) -> str:
    name = part.pop("event", None)  # which not every API gives
    return (f"event: {name}\n" if name else "") + f"data: {dumps(part)}\n\n"


def explain(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of an error, and what its sender is told of it."""
    if isinstance(error, BadRequest):
        kind = "invalid_request_error" if error.status < 500 else "unavailable_error"
        return error.status, error_of(str(error), kind, error.code, error.param)
    if isinstance(error, InvalidRequest):
        return 400, error_of(str(error), "invalid_request_error")
    if isinstance(error, (BezelError, MemoryError, OSError)):
        return 500, error_of(str(error) or "not enough memory", "server_error")
    _log.error("%r", error)
    return 500, error_of("an error of the server's own", "server_error")


async def _tell(request: Request, error: Exception) -> Response:
    status, found = explain(error)
    headers = {"retry-after": "1"} if status == 503 else None
    return JSONResponse(told(request.url.path, status, found), status, headers)


async def _left(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=499)


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path = request.url.path
    return problem(path, status, f"{request.method} {path[:200]}: {getattr(error, 'detail', 'no such endpoint')}")


def make_app(models: Models, *, most_begun: int, **guard: Any) -> Starlette:
    """The application behind a `Guard` with these options; it closes the models when it ends."""
    server = Server(models, most_begun)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(models.close)

    get = [
        ("/health", server.health),
        ("/v1/health", server.health),
        ("/v1/models", server.list_models),
        ("/v1/models/{name:path}", server.show_model),
        ("/slots", server.slots),
        ("/metrics", server.metrics),
        ("/version", server.version),
    ]
    post = [
        ("/v1/chat/completions", server.chat_completions),
        ("/v1/completions", server.completions),
        ("/v1/responses", server.responses),
        ("/v1/embeddings", server.embeddings),
        ("/v1/messages", server.messages),
        ("/v1/messages/count_tokens", server.count_tokens),
        ("/tokenize", server.tokenize),
        ("/detokenize", server.detokenize),
    ]
    handlers: dict[Any, Any] = {
        BadRequest: _tell,
        BezelError: _tell,
        OSError: _tell,
        MemoryError: _tell,
        ClientDisconnect: _left,
        404: _unknown,
        405: _unknown,
        Exception: _tell,
    }
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in get]
    routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in post]
    routes += page_routes()
    return Starlette(
        routes=routes, middleware=[Middleware(Guard, **guard)], exception_handlers=handlers, lifespan=lifespan
    )
