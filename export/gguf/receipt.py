"""Receipts: what was measured of a GGUF file, in the file itself.

The exporter leaves room for it, `bezel.receipt.*` keys of fixed width; `stamp` fills them in, once the file has been
measured, without moving a byte of anything else. Texts are padded with spaces.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import InvalidRequest
from ...runtime.files.gguf import RECEIPT
from ...runtime.files.gguf_model import GGUFModel
from .header import encode_value

_FIGURES = ("kld_mean", "kld_p999", "top1", "perplexity_ratio", "kld_mean_low", "kld_mean_high")
_WIDTHS = {
    "date": 20,
    "tool": 32,
    "protocol": 32,
    "engine": 48,
    "text_sha256": 64,
    "reference": 64,
    "reference_sha256": 64,
}

# What the exporter writes: no figure yet.
PLACEHOLDERS: dict[str, Any] = {
    **{f"{RECEIPT}{name}": math.nan for name in _FIGURES},
    f"{RECEIPT}tokens": 0,
    **{f"{RECEIPT}{name}": " " * width for name, width in _WIDTHS.items()},
}


@dataclass(frozen=True)
class Receipt:
    """What was measured of a file, and on what: `tokens` positions of texts with these hashes, against `reference`.

    KLD is in nats per token, `top1` a share of positions. Texts that are too long are cut.
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


def check_room(file: GGUFModel) -> None:
    """Raises InvalidRequest unless the file has room for a receipt, empty or filled in."""
    for key, placeholder in PLACEHOLDERS.items():
        found, span = file.metadata.get(key), file.receipt_spans.get(key, slice(0, 0))
        if type(found) is not type(placeholder) or span.stop - span.start != len(encode_value(key, placeholder)):
            raise InvalidRequest(
                f"{file.path}: key '{key}': found {'nothing' if found is None else repr(found)[:80]}, expected room "
                "for a receipt; export the model again with this version of bezel"
            )


def stamp(path: str | Path, receipt: Receipt) -> None:
    """Write the receipt into the GGUF file `path`, which it is of.

    Raises InvalidModelFile, InvalidRequest for a file without room for a receipt, and OSError; the file is then as
    it was.
    """
    path = Path(path)
    values = _values(receipt)
    with GGUFModel(path) as file:
        check_room(file)
        before, spans = file.fingerprint(), file.receipt_spans
    start, end = min(s.start for s in spans.values()), max(s.stop for s in spans.values())
    with path.open("r+b", buffering=0) as raw:
        raw.seek(start)
        old = raw.read(end - start)
        new = bytearray(old)
        for key, value in values.items():
            new[spans[key].start - start : spans[key].stop - start] = encode_value(key, value)

        def write(block: bytes) -> None:
            raw.seek(start)
            raw.write(block)
            os.fsync(raw.fileno())

        try:
            write(bytes(new))
            with GGUFModel(path) as file:
                if file.fingerprint() != before:
                    raise InvalidRequest(f"{path}: another program changed the file; measure it again")
        except BaseException:  # Ctrl-C too
            write(old)
            raise


def model_sha256(model: Path) -> str:
    """Which model this is: a GGUF file's fingerprint; of a folder, the SHA-256 of its weight files."""
    if model.is_file():
        with GGUFModel(model) as file:
            return file.fingerprint()
    hashes = []
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.onnx*")]):
        digest = hashlib.sha256()
        with path.open("rb") as raw:
            while block := raw.read(1 << 20):
                digest.update(block)
        hashes.append(digest.hexdigest())
    return _of_all(hashes)


def _values(receipt: Receipt) -> dict[str, Any]:
    found = {**asdict(receipt), "text_sha256": _of_all(receipt.text_sha256)}
    values = {
        **{name: math.nan if found[name] is None else float(found[name]) for name in _FIGURES},
        "tokens": receipt.tokens,
        **{name: _padded(found[name], width) for name, width in _WIDTHS.items()},
    }
    return {RECEIPT + name: value for name, value in values.items()}


def _padded(text: str, width: int) -> str:
    """The text in `width` bytes of UTF-8, cut between two characters or padded with spaces."""
    cut = text.encode("utf-8", "replace")[:width].decode("utf-8", "ignore")
    return cut + " " * (width - len(cut.encode()))


def _of_all(hashes: Sequence[str]) -> str:
    """The hash of one thing is its own; that of several is the SHA-256 of their hashes, one a line."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(f"{h}\n" for h in hashes).encode()).hexdigest()
