"""Hashes of files that need not fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from hashlib import _Hash

_BLOCK = 1 << 20


def fed(digest: _Hash, file: BinaryIO) -> _Hash:
    """The digest, once it has taken all that is left of a file."""
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest
