"""Receipts: what was measured of a GGUF file, in the file itself.

The exporter leaves room for it, `bezel.receipt.*` keys of fixed width; `stamp` fills them in, once the file has been
measured, without moving a byte of anything else. Texts are padded with spaces.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import InvalidRequest
from ...runtime.files.gguf import RECEIPT
from ...runtime.files.gguf_model import GGUFModel
from .header import encode_value

_FIGURES = ("kld_mean", "kld_p999", "top1", "perplexity_ratio")  # with the interval of the first
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
    **{f"{RECEIPT}{name}": math.nan for name in (*_FIGURES, "kld_mean_low", "kld_mean_high")},
    f"{RECEIPT}tokens": 0,
    **{f"{RECEIPT}{name}": " " * width for name, width in _WIDTHS.items()},
}


def check_room(file: GGUFModel) -> None:
    """Raises InvalidRequest unless the file has room for a receipt, empty or filled in."""
    for key, placeholder in PLACEHOLDERS.items():
        found, span = file.metadata.get(key), file.receipt_spans.get(key, slice(0, 0))
        if type(found) is not type(placeholder) or span.stop - span.start != len(encode_value(key, placeholder)):
            raise InvalidRequest(
                f"{file.path}: key '{key}': found {'nothing' if found is None else repr(found)[:80]}, expected room "
                "for a receipt; export the model again with this version of bezel"
            )


def stamp(path: str | Path, result: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Write what `candidate`, one of the candidates of the measurement `result`, has lost into its GGUF file `path`.

    Raises InvalidModelFile, InvalidRequest for a file without room for a receipt, and OSError; the file is then as
    it was.
    """
    path = Path(path)
    values = _values(result, candidate)
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


def _values(result: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    metrics, reference = candidate["metrics"], result["reference"]

    def figure(name: str, which: str = "value") -> float:
        value = metrics.get(name, {}).get(which)
        return math.nan if value is None else float(value)

    texts = {
        "date": result["time"],
        "tool": result["tool"],
        "protocol": f"{result['protocol']} of {result['chunk']}",
        "engine": f"{candidate['engine']}, {candidate['activations']} activations, {candidate['kv']} KV",
        "text_sha256": _of_all([text["sha256"] for text in result["texts"]]),
        "reference": reference["name"],
        "reference_sha256": reference.get("sha256") or _sha256_of(Path(reference["path"])),
    }
    values = {
        **{name: figure(name) for name in _FIGURES},
        "kld_mean_low": figure("kld_mean", "low"),
        "kld_mean_high": figure("kld_mean", "high"),
        "tokens": int(result["scored"]),
        **{name: _padded(str(text), _WIDTHS[name]) for name, text in texts.items()},
    }
    return {RECEIPT + name: value for name, value in values.items()}


def _padded(text: str, width: int) -> str:
    """The text in `width` bytes of UTF-8, cut between two characters or padded with spaces."""
    cut = text.encode("utf-8", "replace")[:width].decode("utf-8", "ignore")
    return cut + " " * (width - len(cut.encode()))


def _of_all(hashes: list[str]) -> str:
    """The hash of one thing is its own; that of several is the SHA-256 of their hashes, one a line."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(f"{h}\n" for h in hashes).encode()).hexdigest()


def _sha256_of(reference: Path) -> str:
    """A GGUF file's fingerprint; of a folder, the SHA-256 of its weight files."""
    if reference.is_file():
        with GGUFModel(reference) as file:
            return file.fingerprint()
    hashes = []
    for path in sorted([*reference.glob("*.safetensors"), *reference.glob("*.onnx*")]):
        digest = hashlib.sha256()
        with path.open("rb") as raw:
            while block := raw.read(1 << 20):
                digest.update(block)
        hashes.append(digest.hexdigest())
    return _of_all(hashes)
