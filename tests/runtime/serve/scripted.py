"""A server for the chat page whose answers are told to it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from bezel.runtime.serve.web import page_routes
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 2">

[a](javascript:window.hit=3) [b](data:text/html,<script>window.hit=4</script>) [c](vbscript:x) [d](/v1/models)

![picture](https://evil.example/pixel.png) <iframe src="https://evil.example"></iframe> <a href="javascript:1">e</a>

```"><script>window.hit = 5</script>
</code></pre><script>window.hit = 6</script>
```

| <b onmouseover="window.hit = 7">x</b> |
|---|
| [j](JaVaScRiPt:alert(1)) |

<javascript:alert(1)> [t](https://a.example "\\" onmouseover=window.hit=8") javascript:alert(2)
"""


class Script:
    """What a server answers, in turn. A text comes in pieces of a few letters; an event is waited for."""

    def __init__(self) -> None:
        self.replies: list[list[str | threading.Event] | Response] = []
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()  # a client left before the end
        self.usage = {"prompt_tokens": 3180, "completion_tokens": 412, "prompt_tokens_details": {"cached_tokens": 3120}}
        self.finish: str | None = "stop"
        self.models: list[dict[str, Any]] = [{"id": "fairy", "meta": {"n_ctx": 8192}}]

    def app(self) -> Starlette:
        routes = [
            *page_routes(),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"data": self.models})

    async def _chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        reply = self.replies.pop(0) if self.replies else ["An answer."]
        if isinstance(reply, Response):
            return reply
        return StreamingResponse(self._stream(reply), media_type="text/event-stream")

    async def _stream(self, reply: list[str | threading.Event]) -> AsyncIterator[str]:
        def line(content: dict[str, Any], **rest: Any) -> str:
            choice = {"index": 0, "delta": content, "finish_reason": None}
            return f"data: {json.dumps({'model': 'fairy', 'choices': [choice | rest], 'usage': None})}\n\n"

        self.left.set()
        for part in reply:
            if isinstance(part, threading.Event):
                while not part.is_set():
                    await asyncio.sleep(0.01)
                continue
            size = max(5, len(part) // 500)
            for i in range(0, len(part), size):
                yield line({"content": part[i : i + size]})
        self.left.clear()
        if self.finish is not None:
            yield line({}, finish_reason=self.finish)
            last = {"model": "fairy", "choices": [], "usage": self.usage, "timings": {"predicted_per_second": 14.23}}
            yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
