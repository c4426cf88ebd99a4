"""What a server refuses, and that it goes on after whatever it is sent."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bezel.runtime.commands.main import main
from bezel.runtime.serve import connections
from bezel.runtime.serve.guard import origin_of
from click.testing import CliRunner
from serving import serving

ASK = {"messages": [{"role": "user", "content": "A story."}], "max_tokens": 3}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def file(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q4_0")


@pytest.fixture(scope="module")
def address(file: Path) -> Iterator[str]:
    with serving({"fairy": file}, origins=("https://friend.example",)) as address:
        yield address


@pytest.fixture(scope="module")
def locked(file: Path) -> Iterator[str]:
    with serving({"fairy": file}, key="secret") as address:
        yield address


def test_a_name_of_a_site_that_may_call(address: str) -> None:
    """Such as a server before this one, which passes the name on that it is called by."""
    assert httpx.get(address + "/health", headers={"host": "friend.example"}).status_code == 200


def test_a_foreign_name_where_there_is_a_key(locked: str, file: Path) -> None:
    key = {"authorization": "Bearer secret"}
    assert httpx.get(locked + "/v1/models", headers={**key, "host": "evil.example"}).status_code == 403
    with serving({"fairy": file}, key="secret", local=False) as address:  # others can reach it, by its name
        assert httpx.get(address + "/v1/models", headers={**key, "host": "laptop.lan"}).status_code == 200


@pytest.mark.parametrize(
    ("site", "origin"),
    [
        ("https://Example.com/", "https://example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://example.com:443", "https://example.com"),
        ("http://[::1]:80", "http://[::1]"),
        *((wrong, None) for wrong in ("*", "https://*.example", "null", "example.com", "", "ftp://a", "http://a/b")),
        *((wrong, None) for wrong in ("http://a:x", "http://u@a", "http://a?b", "http://[a")),
    ],
)
def test_sites_that_may_call(site: str, origin: str | None, file: Path) -> None:
    if origin is not None:
        assert origin_of(site) == origin
        return
    done = CliRunner().invoke(main, ["serve", str(file), "--allow-origin", site])
    assert (done.exit_code, "Error: --allow-origin: " in done.output) == (1, True)


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nothing"])
@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("127.0.0.1:{port}", True),
        ("localhost:{port}", True),
        ("[::1]:{port}", True),
        ("127.0.0.1", True),
        ("evil.example", False),
        ("localhost.evil.example:{port}", False),
        ("evil.example:{port}@127.0.0.1", False),
        ("192.168.1.2", False),
        ("", False),
    ],
)
def test_a_name_that_is_not_this_computer_s(host: str, right: bool, path: str, address: str) -> None:
    """A foreign page may have its own name point here: the browser then takes the server for the page's."""
    port = address.rpartition(":")[2]
    status = httpx.get(address + path, headers={"host": host.format(port=port)}).status_code
    assert (status != 403) == right


@pytest.mark.parametrize(
    ("origin", "right"),
    [
        ("{address}", True),
        ("https://friend.example", True),
        ("https://evil.example", False),
        ("http://127.0.0.1:1", False),
        ("null", False),
    ],
)
def test_pages_of_other_sites(origin: str, right: bool, address: str) -> None:
    headers = {"origin": origin.format(address=address), "content-type": "text/plain"}  # as a plain form would send
    found = httpx.post(address + CHAT, headers=headers, json=ASK)
    assert (found.status_code == 200) == right
    preflight = httpx.options(address + CHAT, headers=headers)
    allowed = preflight.headers.get("access-control-allow-origin")
    assert allowed == ("https://friend.example" if origin == "https://friend.example" else None)


def test_what_a_site_s_page_may_send_and_read(file: Path) -> None:
    site = {"origin": "https://friend.example"}
    with serving({"fairy": file}, origins=("https://friend.example",), key="secret") as address:
        asked = {**site, "access-control-request-headers": "authorization,content-type,x-stainless-os"}
        allowed = httpx.options(address + CHAT, headers=asked).headers["access-control-allow-headers"]
        assert "x-stainless-os" in allowed
        refused = httpx.post(address + CHAT, headers=site, json=ASK)  # the page must see why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, site["origin"])


def test_a_folder_that_cannot_be_there(file: Path) -> None:
    done = CliRunner().invoke(main, ["serve", str(file), "--cache-dir", str(file / "kept"), "--port", "0"])
    assert (done.exit_code, f"Error: {file / 'kept'}: Not a directory" in done.output) == (1, True), done.output


def test_the_key(locked: str) -> None:
    for headers, right in (
        ({}, False),
        ({"authorization": "Bearer wrong"}, False),
        ({"authorization": "Bearer secret"}, True),
        ({"authorization": "bearer  secret"}, True),
        ({"authorization": "Basic secret"}, False),
        ({"x-api-key": "secret"}, True),
        ({"authorization": "Bearer sécret"}, False),
    ):
        found = httpx.post(locked + CHAT, headers={k: v.encode("latin-1") for k, v in headers.items()}, json=ASK)
        assert (found.status_code == 200) == right
        if not right:
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(locked + "/health").status_code == 200
    assert httpx.get(locked + "/slots").status_code == 401
    told = httpx.post(locked + "/v1/messages", json=ASK).json()["error"]["message"]
    assert told == "a key is required: x-api-key: KEY"
    told = httpx.post(locked + "/v1/messages", json=ASK, headers={"x-api-key": "x"}).json()["error"]["message"]
    assert told == "this is not the server's key"


def test_a_second_model_that_cannot_be_served(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:5000])
    done = CliRunner().invoke(main, ["serve", str(file), str(damaged), "--port", "0"])
    assert (done.exit_code, f"Error: {damaged}: invalid model file" in done.output) == (1, True)


def test_a_model_that_is_gone_when_it_is_asked_for(file: Path, tmp_path: Path) -> None:
    going = tmp_path / "going.gguf"
    going.write_bytes(file.read_bytes())
    with serving({"fairy": file, "going": going}) as address:
        told = httpx.get(address + "/v1/models").json()["data"]
        assert [model["meta"]["n_ctx"] for model in told] == [2048, 2048]
        going.unlink()
        found = httpx.post(address + CHAT, json={**ASK, "model": "going"})
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "model going cannot be loaded any more"


def raw(address: str, data: bytes, wait: float = 10.0) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_bodies_that_are_too_much(address: str) -> None:
    big = json.dumps({**ASK, "messages": [{"role": "user", "content": "x" * (2 << 20)}]})
    assert httpx.post(address + CHAT, content=big).status_code == 413
    deep = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    found = httpx.post(address + CHAT, content=deep)
    assert found.status_code == 400
    assert "nested too deeply" in found.json()["error"]["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 50_000

    assert httpx.post(address + CHAT, content=chunks()).status_code == 413


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
        {"$ref": "#"},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "string", "pattern": "(a|aa)+" * 50 + "$"},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"enum": ["x" * 1000 + str(i) for i in range(200)]},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "file:///etc/passwd"},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_schemas_that_are_too_much(schema: dict[str, Any], address: str) -> None:
    """Refused or followed, within seconds; others are served meanwhile."""
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    began = time.monotonic()
    found = httpx.post(address + CHAT, json={**ASK, "response_format": form}, timeout=30)
    assert found.status_code in (200, 400), found.text
    assert "root:" not in found.text
    assert time.monotonic() - began < 20
    assert httpx.post(address + CHAT, json=ASK).status_code == 200


def test_a_client_that_leaves_stops_costing(address: str) -> None:
    ask = {**ASK, "max_tokens": 100_000, "n": 16, "stream": True, "logit_bias": {"1": -100, "5": -100}}
    with httpx.stream("POST", address + CHAT, json=ask) as stream:
        lines = stream.iter_lines()
        while "content" not in next(lines):
            pass
        assert httpx.get(address + "/slots").json()
    until = time.monotonic() + 5
    while httpx.get(address + "/slots").json():
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + CHAT, json={**ask, "stream": False}, timeout=0.3)
    while httpx.get(address + "/slots").json():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_does_not_end(before: bytes, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends, the first request on it or not; one whose answer takes longer does not."""
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.1)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=4) as connection:  # less than uvicorn's own limit
        if before:
            connection.sendall(before)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow:")
        while connection.recv(65536):
            pass
    body = {"prompt": "Once", "max_tokens": 400, "logit_bias": {"1": -100}}
    began = time.monotonic()
    assert httpx.post(address + "/v1/completions", json=body, timeout=60).status_code == 200
    assert time.monotonic() - began > 0.1


def test_a_client_that_does_not_read_waits(file: Path) -> None:
    with serving({"fairy": file}, context=2048) as address:
        host, port = address.removeprefix("http://").split(":")
        ask = {**ASK, "max_tokens": 2000, "n": 4, "stream": True, "logit_bias": {"1": -100, "5": -100}}
        body = json.dumps({**ask, "logprobs": True, "top_logprobs": 20}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(head + body)
            seen = [-1]
            while len(seen) < 4 or seen[-1] != seen[-4]:
                time.sleep(0.3)
                seen.append(sum(slot["tokens"] for slot in httpx.get(address + "/slots").json()))
            assert 0 < seen[-1] < 8000
            assert httpx.post(address + CHAT, json=ASK).status_code == 200


def test_malformed_requests(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand of them: the right status each, no error of the server's own, and it is there afterwards."""
    draw = random.Random(4)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1.5,
        1e400,
        "",
        "x",
        [],
        [1],
        [None],
        {},
        {"a": 1},
        [[]],
        [{}],
        "\ud800",
        10**30,
    ]
    fields = (
        "model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p seed stop n logprobs "
        "top_logprobs logit_bias presence_penalty frequency_penalty response_format tools tool_choice stream echo "
        "stream_options parallel_tool_calls input instructions text max_output_tokens system stop_sequences suffix "
        "metadata"
    ).split()
    paths = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize", "/v1/nothing")
    with httpx.Client(base_url=address, timeout=30) as client:
        for i in range(1000):
            path = draw.choice(paths)
            body: dict[str, Any] = {**ASK, "prompt": "A", "input": "A", "max_tokens": 1, "max_output_tokens": 1}
            for _ in range(draw.randrange(1, 4)):
                body[draw.choice(fields)] = draw.choice(values)
            if draw.random() < 0.3:
                body["messages"] = [{draw.choice(["role", "content", "type"]): draw.choice(values)} for _ in range(2)]
            raw_body = json.dumps(body).encode()
            if draw.random() < 0.2:
                cut = bytearray(raw_body[: draw.randrange(len(raw_body) + 1)])
                for _ in range(draw.randrange(3)):
                    if cut:
                        cut[draw.randrange(len(cut))] = draw.randrange(256)
                raw_body = bytes(cut)
            found = client.post(path, content=raw_body)
            assert found.status_code in (200, 400, 404, 413), (i, path, raw_body, found.text)
            if found.status_code != 200:
                assert found.json()["error"]["message"], raw_body
                assert (found.json().get("type") == "error") == (path == "/v1/messages")
        chunked = b" /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n"
        for data in (
            b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"POST / HTTP/9\r\n\r\n",
            bytes(range(256)),
            b"GET /\0 HTTP/1.1\r\n\r\n",
            b"POST" + chunked,
            b"PUT" + chunked,
        ):
            assert b"200" not in raw(address, data)[:20]
        assert client.post(CHAT, json=ASK).status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_none(key: str, file: Path) -> None:
    done = CliRunner().invoke(main, ["serve", str(file), "--host", "0.0.0.0", "--api-key", key])
    assert (done.exit_code, "--api-key: is empty" in done.output) == (1, True)
    done = CliRunner().invoke(main, ["serve", str(file), "--host", "0.0.0.0"], env={"BEZEL_API_KEY": ""})
    assert (done.exit_code, "clients must have a key" in done.output) == (1, True)
