"""Calibration: what a text sends through a model's linears, in a file that quantizing can use again and again.

The file is a safetensors file: for each site (`noting.py`) the second moments of its inputs, `blk.N.attn`,
`blk.N.attn_output`, `blk.N.ffn`, `blk.N.ffn_down` and `head`, float32 (n, n), and in its metadata what they come from.
A row whose output a norm divides by its root mean square r counts 1 / r²: that much an error weighs there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...quant.formats import F32
from ...runtime.arrays import Arrays, Floats, Ints
from ...runtime.errors import InvalidCheckpoint, InvalidRequest
from ...runtime.files.atomic import atomic
from ...runtime.files.safetensors import encode_header
from ...runtime.files.text_file import read_text_file
from ...runtime.model.config import ModelConfig
from ...runtime.model.tensors import tensor_specs
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.version import bezel_version
from ..kept import work_on
from ..sources.checkpoint import Checkpoint, TensorSource
from ..sources.safetensors import read_header, read_metadata
from ..whole import WholeSequences, run_layers
from .noting import HEAD, NotingOps, moments, widths
from .sweep import Sweep

SEQUENCE = 512
_VERSION = "2"
_FEWEST = 16  # different tokens
_TOKENS, _TOKENS_OF_SMALL = 10_240, 102_400
_WEIGHTS = 2.6e9  # of Gemma 2 2B, which so many tokens take about 40 minutes with

Progress = Callable[[int, int], None]  # layers done, and in all


@dataclass(frozen=True)
class CalibrationText:
    """`sequences` begin with <bos> and are spread evenly over the text."""

    path: Path
    sha256: str
    sequences: tuple[Ints, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Origin:
    """Where moments come from: the text, how many of its tokens, the checkpoint's files, bezel's version."""

    text_sha256: str
    tokens: int
    source_sha256: str
    tool: str


def default_tokens(config: ModelConfig) -> int:
    """How many tokens to calibrate on: 10,240 for Gemma 2 2B and larger models; for a smaller one as many more as take
    the same time, but no more than 102,400, past which little is gained.
    """
    weights = sum(math.prod(spec.shape) for spec in tensor_specs(config))
    return min(max(_TOKENS, int(_TOKENS * _WEIGHTS / weights)), _TOKENS_OF_SMALL)


def read_text(checkpoint: Checkpoint, path: Path, tokens: int | None = None) -> CalibrationText:
    """So many tokens of the text, or `default_tokens`; all of a text that has fewer.

    Raises InvalidRequest for a file that is not UTF-8, or has too few tokens, or too few different ones.
    """
    tokens = tokens or default_tokens(checkpoint.config)
    text, sha256 = read_text_file(path)
    ids = np.array(Tokenizer(checkpoint.vocabulary(), str(checkpoint.path)).encode(text, bos=True), np.int64)
    length = min(SEQUENCE, checkpoint.config.context_length)
    whole = len(ids) // length
    if not whole:
        raise InvalidRequest(f"{path}: found {len(ids)} tokens, expected at least {length} to calibrate on")
    wanted = max(1, min(whole, tokens // length))
    starts = [i * whole // wanted * length for i in range(wanted)]
    sequences = [np.concatenate([ids[:1], ids[start + 1 : start + length]]) for start in starts]
    different = len(np.unique(np.concatenate(sequences)))
    if different < _FEWEST:
        raise InvalidRequest(
            f"{path}: found {different} different tokens, expected {_FEWEST} at least: weights that are rounded for so "
            "few would serve no other text"
        )
    return CalibrationText(path, sha256, tuple(sequences))


def source_sha256(source: TensorSource) -> str:
    """Of the names and sizes of the source's files and each tensor's first row: quick, and tells models apart."""
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    for spec in source.specs:
        rows = source.rows(spec, 0, 1)
        digest.update(f"{spec.gguf} {spec.shape}\n".encode() + rows.tobytes())
    return digest.hexdigest()


def calibrate(checkpoint: Checkpoint, text: CalibrationText, out: Path, progress: Progress | None = None) -> Origin:
    """Write the moments of the linears of `checkpoint` on `text` to the file `out`.

    Work is kept beside `out` until that is complete: broken off, the same call goes on from the last whole layer.
    """
    config, sites = checkpoint.config, widths(checkpoint.config)
    origin = Origin(text.sha256, text.tokens, source_sha256(checkpoint), f"bezel {bezel_version()}")

    def passing(start: int, streams: Arrays) -> Iterator[tuple[Arrays, Arrays]]:
        rows, ops = WholeSequences(config.layers, text.sequences), NotingOps(config, checkpoint.rows)
        for i, (x, h) in enumerate(run_layers(config, ops, rows, start, streams.get("x")), start):
            found = {site: moments(note.inputs, note.weight)[0] for site, note in ops.taken()}
            if i == config.n_layers - 1:
                found[HEAD] = moments(h)[0]
            if progress:
                progress(i + 1, config.n_layers)
            yield {"x": x}, found

    with work_on(out, {"moments": 2, **asdict(origin)}) as kept, atomic(out) as file, checkpoint.unchanged():
        tensors = {site: ("F32", (n, n)) for site, n in sites.items()}
        labels = {"bezel_calibration": _VERSION, **{key: str(value) for key, value in asdict(origin).items()}}
        digests = dict.fromkeys((f"sha256.{site}" for site in sites), "0" * 64)
        header, places = encode_header(tensors, labels | digests)
        file.write(header)
        sweep = Sweep(kept, passing, config.n_layers)
        for i in range(config.n_layers):
            for site, array in sweep.layer(i).items():
                data = array.astype("<f4").tobytes()
                digests[f"sha256.{site}"] = hashlib.sha256(data).hexdigest()
                file.seek(places[site])
                file.write(data)
        file.seek(0)
        file.write(encode_header(tensors, labels | digests)[0])  # as long as before
    return origin


def is_calibration(path: Path) -> bool:
    """Whether a file is one of moments, not a text: no text begins with eight bytes that are a length."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[5:8] == bytes(3)


class Calibration:
    """A file that `calibrate` wrote; a site's moments are read when they are asked for.

    Raises InvalidRequest for a file of another kind, or of another checkpoint.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        try:
            metadata, stored = read_metadata(path), read_header(path)
        except InvalidCheckpoint as error:
            raise InvalidRequest(f"{error}; expected what `bezel calibrate` wrote") from None
        if metadata.get("bezel_calibration") != _VERSION:
            raise InvalidRequest(f"{path}: is no calibration of this version; expected what `bezel calibrate` wrote")
        expected = {name: (F32, (n, n)) for name, n in widths(checkpoint.config).items()}
        if {name: (s.format, s.shape) for name, s in stored.items()} != expected:
            raise InvalidRequest(f"{path}: holds the moments of a model of another shape; calibrate {checkpoint.path}")
        self.path, self._stored, self._metadata = path, stored, metadata
        self.origin = Origin(
            metadata["text_sha256"], int(metadata["tokens"]), metadata["source_sha256"], metadata["tool"]
        )
        if self.origin.source_sha256 != source_sha256(checkpoint):
            raise InvalidRequest(f"{path}: comes from another checkpoint; calibrate {checkpoint.path}")

    def moments(self, site: str) -> Floats:
        """The second moments of a site's inputs, float32 (n, n). Raises InvalidRequest where they are damaged."""
        stored = self._stored[site]
        flat = np.fromfile(stored.file, "<f4", math.prod(stored.shape), offset=stored.offset)
        if hashlib.sha256(flat.data).hexdigest() != self._metadata.get(f"sha256.{site}"):
            raise InvalidRequest(f"{self.path}: '{site}' is not what was written: the file is damaged; calibrate again")
        return flat.reshape(stored.shape).astype(np.float32, copy=False)
