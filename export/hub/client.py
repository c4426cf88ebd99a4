"""The Hugging Face Hub: what is in a repository, and its files. No other module asks it.

huggingface_hub knows the addresses, the token and what the hub's answers mean. It does not go on with a file that a
program before it began, and checks no file's hash, so the transfer is here. The token goes to the hub only: the client
drops it where the hub leads to another host.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from ...runtime.errors import HubError
from ...runtime.files.hashing import fed
from ...runtime.version import bezel_version

MOST_FILES = 10_000
_TRIES = 5  # in a row that bring nothing
_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.+-]*/){0,3}[A-Za-z0-9_][A-Za-z0-9_.+-]*")

# It would tell the hub which torch and which agent there is, and ask it for a list of agents.
constants.HF_HUB_DISABLE_TELEMETRY = True
# Its warnings repeat what servers say, and a terminal would obey that.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub lists it; `digest` is its SHA-256, or git's SHA-1 where it is small."""

    path: str
    size: int
    digest: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def matches(self, path: Path) -> bool:
        """Whether a file has this size and this content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        found = hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        with path.open("rb") as file:
            return fed(found, file).hexdigest() == self.digest


@dataclass(frozen=True)
class HubRepo:
    """A repository at a commit."""

    name: str
    commit: str
    files: tuple[HubFile, ...]


def look_up(name: str, revision: str | None = None) -> HubRepo:
    """What a repository holds. Files with names or hashes that no tool writes are left out. Raises HubError."""
    token = _token()
    with _in_plain_words(name, revision, token):
        api = HfApi(token=token or False, library_name="bezel", library_version=bezel_version())
        try:
            info = api.model_info(
                name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            commit = str(info.sha)
            listed = [
                (file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
                for file in info.siblings or ()
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HubError(f"{name}: the hub's answer makes no sense ({type(error).__name__})") from None
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise HubError(f"{name}: the hub's answer makes no sense: {commit[:80]!r} is no commit")
    if len(listed) > MOST_FILES:
        raise HubError(f"{name}: has {len(listed):,} files, expected a model, with at most {MOST_FILES:,}")
    return HubRepo(name, commit, tuple(file for values in listed if (file := _sound_file(*values))))


def _sound_file(path: Any, size: Any, digest: Any) -> HubFile | None:
    sound = isinstance(path, str) and len(path) <= 200 and _PATH.fullmatch(path) and type(size) is int and size >= 0
    known = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)
    return HubFile(path, size, digest) if sound and known else None


def fetch(repo: HubRepo, file: HubFile, part: Path, progress: Callable[[int], None]) -> None:
    """Append to `part` what it lacks of a file. `progress` is called with the bytes that it has.

    What comes is not believed: see `HubFile.matches`. Raises HubError.
    """
    token = _token()
    with _in_plain_words(repo.name, repo.commit, token), part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
            out.seek(0)
        headers = build_hf_headers(token=token or False, library_name="bezel", library_version=bezel_version()) | {
            "Accept-Encoding": "identity"
        }
        url = hf_hub_url(repo.name, file.path, revision=repo.commit)
        tries = 0
        while (begin := out.tell()) < file.size:
            try:
                _transfer(url, headers, file, out, progress)
            except httpx2.TransportError:
                if tries >= _TRIES:
                    raise
            tries = 0 if out.tell() > begin else tries + 1
            if tries > _TRIES:
                raise HubError(f"{file.path}: {file.size:,} bytes were promised, and no more than {begin:,} come")
            time.sleep(0.5 * tries)
        out.flush()
        os.fsync(out.fileno())


def _transfer(url: str, headers: dict[str, str], file: HubFile, out: BinaryIO, progress: Callable[[int], None]) -> None:
    """One request for the rest of a file, and as much of the answer as comes."""
    begin = out.tell()
    ask = headers | {"Range": f"bytes={begin}-{file.size - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # What breaks off is asked for again from where it broke, by our caller.
    with http_stream_backoff("GET", url, headers=ask, timeout=timeout, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        if begin and response.status_code != 206:  # all of it, from the start
            out.truncate(0)
            out.seek(0)
        for block in response.iter_bytes():
            if out.tell() + len(block) > file.size:
                raise HubError(f"{file.path}: is longer than the {file.size:,} bytes that the hub lists")
            out.write(block)
            progress(out.tell())


def _token() -> str | None:
    token: str | None = get_token()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise HubError("the hub's token, in HF_TOKEN or a file, has characters that no token has; set it anew")
    return token


@contextmanager
def _in_plain_words(name: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Raises HubError for what the hub, or the way there, has against it. Nothing that a server says is repeated."""
    page = f"{constants.ENDPOINT}/{name}"
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    log_in = f"set HF_TOKEN to a token from {tokens}, or run `hf auth login`"
    try:
        yield
    except GatedRepoError:
        who = (
            "the account of your token has not been let in, or the token may not read gated repositories"
            if token
            else f"then {log_in}"
        )
        raise HubError(
            f"{name}: its licence must be accepted first: open {page}, log in and accept it; {who}"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{name}: has no revision {revision!r}; {page}/tree/main shows what there is") from None
    except EntryNotFoundError:
        raise HubError(f"{name}: a file that the hub lists is not there; try again") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and token:  # a sound token gets a 404
            raise HubError(f"{name}: the hub does not accept your token, expired perhaps; {log_in}") from None
        if status == 401 or isinstance(error, RepositoryNotFoundError):
            private = "your token may not see it" if token else f"it is private; if so, {log_in}"
            raise HubError(f"{name}: there is no such repository on {constants.ENDPOINT}, or {private}") from None
        if status == 403:
            raise HubError(f"{name}: the hub does not let your token have this; see {page} and {tokens}") from None
        if status == 429:
            raise HubError(f"{name}: the hub says that these were too many requests; wait some minutes") from None
        raise HubError(f"{name}: the hub answers with the status {status}; try again later") from None
    except OfflineModeIsEnabled:
        raise HubError(f"{name}: HF_HUB_OFFLINE is set, so the hub is not asked") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise HubError(
            f"{name}: no connection to {constants.ENDPOINT}, or it broke off ({type(error).__name__}); once there is "
            "one, the same command goes on from here"
        ) from None
