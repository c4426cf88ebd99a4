"""A server on a port of its own: in this process, or `bezel serve` in another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from bezel.runtime.serve.app import make_app
from bezel.runtime.serve.connections import Connection, Server
from bezel.runtime.serve.models import Models, Setting
from starlette.types import ASGIApp


@contextmanager
def serving(paths: Mapping[str, Path], **options: Any) -> Iterator[str]:
    """The address of a server of these models."""
    setting = Setting(
        {"kv": options.pop("kv", "int8"), "threads": 2, "context": options.pop("context", None)},
        options.pop("parallel", 4),
        options.pop("cache_bytes", 64 << 20),
    )
    models, drain = Models(paths, setting), options.pop("drain", 5.0)
    app = make_app(
        models, **{"key": None, "origins": (), "local": True, "most_bytes": 1 << 20, "most_begun": 200, **options}
    )
    with running(app, models=models, drain=drain) as address:
        yield address


@contextmanager
def running(app: ASGIApp, port: int = 0, models: Models | None = None, drain: float = 5.0) -> Iterator[str]:
    """The address of a server of an application. After the block it is told to end, and is waited for."""
    config = uvicorn.Config(app, http=Connection, port=port, log_level="warning")
    servers: list[Server] = []

    async def serve() -> None:
        servers.append(Server(config, models or Models({}, Setting({}, 1, 0)), drain))
        await servers[0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
    yield f"http://127.0.0.1:{servers[0].servers[0].sockets[0].getsockname()[1]}"
    servers[0].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


class Process:
    """A running `bezel serve`; `end` waits for it and gives its exit code and what it said."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "bezel", "serve", *args, "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self.said = self._process.stderr.readline()
        self.address = self.said.partition(" at ")[2].partition(" (")[0]

    def send(self, signal_number: int) -> None:
        self._process.send_signal(signal_number)

    def end(self, seconds: float) -> tuple[int, str]:
        _, said = self._process.communicate(timeout=seconds)
        return self._process.returncode, said

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def process(*args: str) -> Iterator[Process]:
    made = Process(*args)
    try:
        yield made
    finally:
        made.kill()
