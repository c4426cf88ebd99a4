"""Connections, and when they end."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType
from typing import Protocol

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger("bezel.serve")
_HEAD_SECONDS = 10.0
_TELL_SECONDS = 2.0  # in which clients should have read that their answers are ended


class Answering(Protocol):
    """What answers come from; see `Models`."""

    def drain(self) -> int: ...
    def stop(self) -> None: ...


class Server(uvicorn.Server):
    """uvicorn's, which ends well: when it is to end, it begins no more answers; `drain` seconds later, or when it is
    to end for the second time, it ends those that there are, and tells their clients.
    """

    def __init__(self, config: uvicorn.Config, models: Answering, drain: float) -> None:
        super().__init__(config)
        self._models, self._drain = models, drain
        self._loop = asyncio.get_running_loop()
        config.timeout_graceful_shutdown = int(drain + 2 * _TELL_SECONDS)  # never reached

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._stop)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if n := self._models.drain():
            _log.warning("answers on their way: %d; they have %g seconds (Ctrl-C ends them now)", n, self._drain)
        late = self._loop.call_later(self._drain, self._stop)
        await super().shutdown(sockets)
        late.cancel()

    def _stop(self) -> None:
        self._models.stop()
        self._loop.call_later(_TELL_SECONDS, self._drop)

    def _drop(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class Connection(H11Protocol):
    """uvicorn's, closed where the head of a request is not whole so long after the connection or its first byte: they
    are limited in number, and others wait for theirs.

    Where a body breaks HTTP, one answer goes out, and not the application's after it.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._late = self.loop.call_later(_HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # a body is wrong whose request is being answered
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
