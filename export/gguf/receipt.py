"""Receipts: what was measured of a GGUF file, in the file itself, under `bezel.receipt.*` keys."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import atomic
from ...runtime.files.gguf import RECEIPT
from ...runtime.files.gguf_model import GGUFModel
from ...runtime.files.hashing import fed
from .header import encode_entry

_MOST = 64  # bytes of a text


@dataclass(frozen=True)
class Receipt:
    """What was measured of a file, and on what: `tokens` positions of texts with these hashes, against `reference`.

    KLD is in nats per token, `top1` a share of positions. Texts of more than 64 bytes are cut.
    """

    date: str
    tool: str
    protocol: str
    engine: str
    text_sha256: tuple[str, ...]
    reference: str
    reference_sha256: str
    tokens: int
    kld_mean: float
    kld_mean_low: float | None
    kld_mean_high: float | None
    kld_p999: float
    top1: float
    perplexity_ratio: float


def stamp(path: str | Path, receipt: Receipt) -> None:
    """Write the receipt into the GGUF file `path`, which it is of, in place of an earlier one.

    The file is written anew, so that it is whole at any time. Raises InvalidModelFile, InvalidRequest and OSError; the
    file is then as it was.
    """
    path = Path(path)
    with GGUFModel(path) as file:
        before, start = file.fingerprint(), file.data_start
        header = file.header([encode_entry(RECEIPT + key, value) for key, value in _values(receipt).items()])
    free = shutil.disk_usage(path.resolve().parent).free
    if free < path.stat().st_size + len(header):
        raise InvalidRequest(f"{path}: no room on the disk to write it anew with its receipt")
    with atomic(path) as new, path.open("rb") as old:
        new.write(header)
        old.seek(start)
        shutil.copyfileobj(old, new, 1 << 20)
        with GGUFModel(path) as file:
            if file.fingerprint() != before:
                raise InvalidRequest(f"{path}: another program changed the file; measure it again")


def model_sha256(model: Path) -> str:
    """Which model this is: a GGUF file's fingerprint; of a folder, the SHA-256 of its weight files."""
    if model.is_file():
        with GGUFModel(model) as file:
            return file.fingerprint()
    hashes = []
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.onnx*")]):
        with path.open("rb") as raw:
            hashes.append(fed(hashlib.sha256(), raw).hexdigest())
    return _of_all(hashes)


def _values(receipt: Receipt) -> dict[str, str | int | float]:
    found = {**asdict(receipt), "text_sha256": _of_all(receipt.text_sha256)}
    return {key: _cut(value) if isinstance(value, str) else value for key, value in found.items() if value is not None}


def _cut(text: str) -> str:
    """The text in 64 bytes of UTF-8 at most, cut between two characters."""
    return text.encode("utf-8", "replace")[:_MOST].decode("utf-8", "ignore")


def _of_all(hashes: Sequence[str]) -> str:
    """The hash of one thing is its own; that of several is the SHA-256 of their hashes, one a line."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(f"{h}\n" for h in hashes).encode()).hexdigest()
