"""A server that is told to end: `bezel serve` as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import process, serving

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to one process")
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "A story."}], "logit_bias": {"1": -100, "5": -100}}
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SHUTTING_DOWN = "the server is shutting down"


class Asked:
    """A request on its way, in a thread: the status, and the lines of its answer as they come."""

    def __init__(self, address: str, path: str, **ask: Any) -> None:
        self.status, self.lines = 0, list[str]()
        self._thread = threading.Thread(target=self._run, args=(address + path, {**ASK, **ask}))
        self._thread.start()

    def _run(self, url: str, ask: dict[str, Any]) -> None:
        with httpx.stream("POST", url, json=ask, timeout=60) as answer:
            self.status = answer.status_code
            self.lines += answer.iter_lines()

    def wait(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        last = [line for line in self.lines if line][-1].removeprefix("data: ")
        return last if last == "[DONE]" else json.loads(last)


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def slots(address: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(address + "/slots").json()
    return found


@pytest.fixture
def file(gguf_of: Callable[..., Path]) -> str:
    return str(gguf_of("demo", "q4_0"))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_what_was_begun_ends_and_what_waits_is_refused(sent: int, file: str) -> None:
    with process(file, "--parallel", "1") as server:
        begun = Asked(server.address, CHAT, stream=True, max_tokens=1500)
        until(lambda: bool(slots(server.address)))
        waiting = [Asked(server.address, CHAT, stream=streamed, max_tokens=5) for streamed in (False, True)]
        until(lambda: 'requests_deferred{model="demo-q4_0"} 2' in httpx.get(server.address + "/metrics").text)
        server.send(sent)
        for one in waiting:
            assert one.wait()["error"]["message"] == SHUTTING_DOWN
        assert [one.status for one in waiting] == [503, 200]
        assert begun.wait() == "[DONE]"
        code, said = server.end(10)
    assert code == (130 if sent == signal.SIGINT else 143)
    assert said == "answers on their way: 1; they have 30 seconds (Ctrl-C ends them now)\n"


def test_a_second_signal_ends_all(file: str) -> None:
    with process(file) as server:
        forever = {"max_tokens": 1 << 20}
        chat = Asked(server.address, CHAT, stream=True, **forever)
        whole = Asked(server.address, CHAT, **forever)
        message = Asked(server.address, MESSAGES, stream=True, **forever)
        response = Asked(server.address, RESPONSES, stream=True, input="A story.", max_output_tokens=1 << 20)
        until(lambda: len(slots(server.address)) == 4)
        server.send(signal.SIGINT)
        time.sleep(0.5)
        server.send(signal.SIGINT)
        code, said = server.end(10)
        assert (code, len(said.splitlines())) == (130, 1)
        assert chat.wait()["error"]["message"] == SHUTTING_DOWN
        assert (whole.wait()["error"]["message"], whole.status) == (SHUTTING_DOWN, 503)
        told = message.wait()
        assert (told["type"], told["error"]["message"]) == ("error", SHUTTING_DOWN)
        assert "event: error" in message.lines
        assert (response.wait()["type"], response.wait()["message"]) == ("error", SHUTTING_DOWN)


def test_what_takes_too_long_ends_and_who_does_not_read_is_left(file: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving({"fairy": Path(file)}, drain=0.3) as address, socket.socket() as deaf:
        body = json.dumps({**ASK, "max_tokens": 1 << 20, "stream": True, "logprobs": True, "top_logprobs": 20})
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        deaf.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: [slot["is_processing"] for slot in slots(address)] == [False])
        asked = Asked(address, CHAT, stream=True, max_tokens=1 << 20)
        until(lambda: len(slots(address)) == 2)
    assert asked.wait()["error"]["message"] == SHUTTING_DOWN
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
