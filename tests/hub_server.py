"""A small Hugging Face Hub on this computer, and the other host that its large files come from.

It speaks what huggingface_hub 2.4 asks for: a model's commit and files, small files from the hub, large ones by a
redirect, parts of files, and the hub's ways to say no. Anything of it can be made to lie or to break off.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".model", ".bin", "tokenizer.json")  # in git LFS


@dataclass
class Repo:
    """`listed` changes what the hub says of a file; `sent` is what is sent instead of its content."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    revisions: tuple[str, ...] = ("main",)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        names = json.dumps({name: _sha256(content) for name, content in self.files.items()}, sort_keys=True)
        return hashlib.sha1(names.encode()).hexdigest()

    def siblings(self) -> list[dict[str, Any]]:
        return [_sibling(name, content) | self.listed.get(name, {}) for name, content in self.files.items()]


@dataclass
class Hub:
    """`break_after`: bytes of each answer after which the other host closes the connection, one entry an answer."""

    url: str
    other_host: str
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, tuple[str, ...]] = field(default_factory=dict)  # each with the gated repositories it may read
    break_after: list[int] = field(default_factory=list)
    knows_ranges: bool = True
    status: int | None = None  # of every answer of the hub
    answer: bytes | None = None  # to every question about a repository
    on_chunk: Callable[[], None] = lambda: None
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)  # host, path, headers

    def fetched(self) -> list[str]:
        """The paths of the files that were asked for."""
        return [path.split("/resolve/")[1].partition("/")[2] for _, path, _ in self.requests if "/resolve/" in path]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub("", "")
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (kind,), {"hub": hub})) for kind in (_Hub, _Other)]
    hub.url, hub.other_host = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git_sha1(content)}
    if name.endswith(LARGE):
        found["lfs"] = {"size": len(content), "sha256": _sha256(content), "pointerSize": 134}
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked has left
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(self, host: str) -> None:
        self.hub.requests.append((host, self.path, {name.lower(): value for name, value in self.headers.items()}))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class _Hub(_Handler):
    def do_GET(self) -> None:
        self.note("hub")
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.hub.status is not None:
            self.answer(self.hub.status, b"\x1b[2Jsecret words", X_Error_Message="\x1b[2J", X_HF_Warning="a; \x1b[2J")
        elif not self._knows_the_token():
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif api:
            self._repo(api[1], api[2] or "main")
        elif file:
            self._file(*file.groups())
        else:
            self.answer(404)

    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        return given.removeprefix("Bearer ") if given else None

    def _knows_the_token(self) -> bool:
        return self._token() is None or self._token() in self.hub.tokens

    def _may_read(self, name: str) -> bool:
        return name in self.hub.tokens.get(self._token() or "", ())

    def _found(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._may_read(name)):
            # Who says nothing of themselves is not told whether there is such a thing.
            self.answer(404 if self._token() else 401, X_Error_Code="RepoNotFound", X_Error_Message="Not found")
            return None
        if revision not in (*repo.revisions, repo.commit):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            return None
        return repo

    def _repo(self, name: str, revision: str) -> None:
        repo = self._found(name, revision)
        if repo is None:
            return
        info: dict[str, Any] = {"id": name, "sha": repo.commit, "gated": "manual" if repo.gated else False}
        info |= {"siblings": repo.siblings(), "private": repo.private, "downloads": 0, "likes": 0, "tags": []}
        body = json.dumps(info).encode() if self.hub.answer is None else self.hub.answer
        self.answer(200, body, Content_Type="application/json")

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self._found(name, revision)
        if repo is None:
            return
        if repo.gated and not self._may_read(name):
            self.answer(403 if self._token() else 401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return
        if path not in repo.files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        content = repo.files[path]
        headers = {"X_Repo_Commit": repo.commit, "ETag": f'"{_git_sha1(content)}"', "Accept_Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{_sha256(content)}"'}
            self.answer(302, **headers, Location=f"{self.hub.other_host}/{name}/{path}?signature=1")
        else:
            self.answer(200, repo.sent.get(path, content), **headers)


class _Other(_Handler):
    """What large files come from."""

    def do_GET(self) -> None:
        self.note("other")
        owner, repo, path = unquote(urlsplit(self.path).path).lstrip("/").split("/", 2)
        found = self.hub.repos[f"{owner}/{repo}"]
        content = found.sent.get(path, found.files[path])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.hub.knows_ranges else None
        start, end = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        whole, content = len(content), content[:end]
        if start >= len(content) > 0:
            self.answer(416, Content_Range=f"bytes */{whole}")
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{whole}")
        self.end_headers()
        if self.command == "HEAD":
            return
        most = self.hub.break_after.pop(0) if self.hub.break_after else len(content)
        rest = memoryview(content)[start : start + most]
        for at in range(0, len(rest), 1 << 16):
            self.wfile.write(rest[at : at + (1 << 16)])
            self.hub.on_chunk()
        if most < len(content) - start:
            self.close_connection = True
