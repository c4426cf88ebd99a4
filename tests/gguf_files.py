"""Builders of GGUF files for tests: byte by byte, so that every field can lie, or a small sound Gemma 2.

Run as a program, it opens the files that are named on standard input and reads all there is in them, under a
limit on memory and on time for each file; see `test_gguf_reader.py`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bezel.export.gguf.header import TensorRecord, aligned, encode_header
from bezel.runtime.errors import BezelError
from bezel.runtime.files.gguf import GGUFFile, StringArray
from bezel.runtime.files.gguf_model import GGUFModel

U8, U32, F32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9
MEMORY, SECONDS = 200 << 20, 20.0  # the costliest takes 1.4; what is quadratic in a count, minutes


def string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, type_id: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", type_id) + payload


def string_array(values: list[bytes]) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(string, values))


def tensor(name: str | bytes, dims: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    """A tensor info; `dims` in GGUF's order, inputs first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def pack(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data if data else header


GEMMA2 = {
    "gemma2.context_length": 128,
    "gemma2.embedding_length": 64,
    "gemma2.block_count": 2,
    "gemma2.feed_forward_length": 96,
    "gemma2.attention.head_count": 2,
    "gemma2.attention.head_count_kv": 1,
    "gemma2.attention.key_length": 32,
    "gemma2.attention.value_length": 32,
    "gemma2.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma2.attention.sliding_window": 8,
    "gemma2.attn_logit_softcapping": 50.0,
    "gemma2.final_logit_softcapping": 30.0,
}
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "▁naïve", "\n\n", "🙂"] + [f"t{i}" for i in range(57)]
_LAYER = {
    "attn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "post_attention_norm": (64,),
    "ffn_norm": (64,),
    "ffn_gate": (96, 64),
    "ffn_up": (96, 64),
    "ffn_down": (64, 96),
    "post_ffw_norm": (64,),
}
SHAPES = {
    "token_embd.weight": (64, 64),
    **{f"blk.{i}.{role}.weight": shape for i in range(2) for role, shape in _LAYER.items()},
    "output_norm.weight": (64,),
}


def write_gemma2(
    path: Path, *, drop: tuple[str, ...] = (), extra: dict[str, tuple[int, ...]] | None = None
) -> dict[str, np.ndarray]:
    """A sound two-layer Gemma 2 in mixed formats, written by the gguf package; returns the stored bytes."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "gemma2")
    for name, value in GEMMA2.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.scores", [-float(i) for i in range(len(TOKENS))])
    writer.add_array("tokenizer.ggml.token_type", [1] * len(TOKENS))
    types = {"token_embd": "Q8_0", "attn_v": "Q4_0", "ffn_down": "F16", "ffn_up": "Q5_0"}
    stored = {}
    for name, shape in {**SHAPES, **(extra or {})}.items():
        if name in drop:
            continue
        kind = gguf.GGMLQuantizationType[types.get(name.split(".")[-2], "F32")]
        stored[name] = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(name, stored[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def edited(path: Path, out: Path, changes: Mapping[str, Any], alignment: int = 32) -> Path:
    """A copy of a GGUF file with other metadata, whose offsets are multiples of `alignment` already."""
    with GGUFFile(path) as file:
        infos = list(file.tensors.values())
        start = min(info.offset for info in infos)
        records = [TensorRecord(i.name, i.shape, i.format.gguf_type, i.offset - start) for i in infos]
        header = encode_header(dict(file.metadata) | dict(changes), records)
        out.write_bytes(header + bytes(-len(header) % alignment) + path.read_bytes()[start:])
    return out


def split(path: Path, folder: Path, count: int, **changes: Any) -> list[Path]:
    """A GGUF file in parts: the first has all metadata, the others only which they are."""
    with GGUFFile(path) as file:
        names = list(file.tensors)
        out = []
        for i in range(count):
            mine = names[i * len(names) // count : (i + 1) * len(names) // count]
            keys: dict[str, Any] = dict(file.metadata) if i == 0 else {}
            keys |= {"split.no": i, "split.count": count, "split.tensors.count": len(names), **changes}
            records, data = [], b""
            for name in mine:
                info = file.info(name)
                records.append(TensorRecord(name, info.shape, info.format.gguf_type, len(data)))
                data += file.data(name).tobytes()
                data += bytes(aligned(len(data)) - len(data))
            out.append(folder / f"demo-{i + 1:05}-of-{count:05}.gguf")
            out[-1].write_bytes(encode_header(keys, records) + data)
    return out


def read_everything(path: str) -> str:
    """What bezel says about a file of which all is read: its first complaint, or "sound"."""
    complaints = []

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except BezelError as error:
            complaints.append(f"{type(error).__name__}: {error}")

    def read() -> None:
        with GGUFModel(path) as file:
            for value in file.metadata.values():
                attempt(partial(list, value) if isinstance(value, StringArray) else partial(repr, value))
            for name in file.tensors:
                attempt(partial(file.dequantize, name))
            attempt(file.fingerprint)
            attempt(lambda: file.check_tensors(file.config()))

    attempt(read)
    return complaints[0] if complaints else "sound"


def _main() -> None:
    import resource
    import signal

    paths = sys.stdin.read().split("\n")
    read_everything(paths[0])  # what is imported late belongs to the start
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))
    for path in paths:
        print(path, end="\t", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # processor time; when it is used up, it ends the process
        print(json.dumps(read_everything(path)), flush=True)


if __name__ == "__main__":
    _main()
