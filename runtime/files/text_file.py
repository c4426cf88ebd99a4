"""Texts that the user gives as files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import InvalidRequest


def read_text_file(path: Path) -> tuple[str, str]:
    """A file's text, without a byte order mark, and its SHA-256. Raises InvalidRequest for what is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: found a byte that is not UTF-8 at {error.start}, expected text") from None
