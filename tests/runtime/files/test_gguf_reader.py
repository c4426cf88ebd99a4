"""The GGUF reader: agrees with the gguf package on sound files, and refuses hostile ones by name."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from bezel.quant.formats import FORMATS
from bezel.runtime.errors import InvalidConfig, InvalidModelFile, InvalidRequest, UnsupportedModelFile
from bezel.runtime.files.gguf import StringArray
from bezel.runtime.files.gguf_model import GGUFModel
from bezel.runtime.model.families.gguf import read_gguf_config
from bezel.runtime.model.families.hf import read_hf_config
from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    GEMMA2,
    SHAPES,
    STRING,
    TOKENS,
    U8,
    U32,
    key,
    pack,
    string,
    string_array,
    tensor,
    write_gemma2,
)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "gemma2.gguf"
    write_gemma2(path)
    return path


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


# Sound files


def test_tensors_agree_with_the_gguf_package(gemma2: Path) -> None:
    oracle = gguf.GGUFReader(gemma2)
    with GGUFModel(gemma2) as file:
        assert list(file.tensors) == [t.name for t in oracle.tensors] == list(SHAPES)
        for want in oracle.tensors:
            got = file.tensors[want.name]
            assert got.shape == tuple(int(n) for n in want.shape[::-1]) == SHAPES[want.name]
            assert (got.offset, got.nbytes) == (want.data_offset, want.n_bytes)
            assert got.format.gguf_type == want.tensor_type
            data, raw = file.data(want.name), want.data.view(np.uint8)
            np.testing.assert_array_equal(data, raw.reshape(data.shape))
            assert data.shape == (math.prod(got.shape[:-1]), got.format.row_bytes(got.shape[-1]))
            floats = gguf.quants.dequantize(want.data, want.tensor_type).reshape(got.shape)
            np.testing.assert_array_equal(file.dequantize(want.name), floats)


def test_chosen_rows(gemma2: Path) -> None:
    with GGUFModel(gemma2) as file:
        whole = file.dequantize("token_embd.weight")
        ids = np.array([5, 0, 63, 5])
        np.testing.assert_array_equal(file.dequantize("token_embd.weight", ids), whole[ids])
        np.testing.assert_array_equal(file.dequantize("token_embd.weight", slice(10, 12)), whole[10:12])
        with pytest.raises(IndexError):
            file.dequantize("token_embd.weight", np.array([64]))


def test_every_value_type_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    for kind, low, high in [
        ("uint8", 0, 2**8 - 1),
        ("int8", -(2**7), 2**7 - 1),
        ("uint16", 0, 2**16 - 1),
        ("int16", -(2**15), 2**15 - 1),
        ("uint32", 0, 2**32 - 1),
        ("int32", -(2**31), 2**31 - 1),
        ("uint64", 0, 2**64 - 1),
        ("int64", -(2**63), 2**63 - 1),
        ("float32", -0.0, 1.5e-30),
        ("float64", math.pi, math.inf),
        ("bool", False, True),
        ("string", "\0control", "ä🙂"),
    ]:
        value_type = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(f"{kind}.low", low, value_type)
        writer.add_key_value(f"{kind}.high", high, value_type)
        for pad in "", "x", "xx", "xxx":  # arrays start at every alignment
            writer.add_key_value(f"{kind}.array{pad}", [low, high, low], gguf.GGUFValueType.ARRAY, value_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    oracle = gguf.GGUFReader(path)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    file = GGUFModel(path)
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        got, want = file.metadata[name], field.contents()
        if isinstance(want, list):
            assert len(got) == len(want)
            assert list(got) == want, name
            if isinstance(got, np.ndarray):
                assert got.flags.aligned
                assert not got.flags.writeable
            else:
                assert isinstance(got, StringArray)
        else:
            # type, and bits where == is not enough: -0.0
            assert (type(got), repr(got)) == (type(want), repr(want)), name


def test_bools_are_bools(tmp_path: Path) -> None:
    flags = key("flags", ARRAY, struct.pack("<IQ3B", BOOL, 3, 1, 0, 1))
    file = GGUFModel(write(tmp_path / "f", pack([flags, key("flag", BOOL, b"\1")])))
    assert file.metadata["flag"] is True
    assert file.metadata["flags"].dtype == np.bool_
    assert file.metadata["flags"].tolist() == [True, False, True]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    keys = [key("general.alignment", U32, struct.pack("<I", alignment))]
    infos = [tensor("b", (2,), offset=alignment), tensor("a", (1, 2))]  # data in another order than the infos
    first, second = np.array([[1.0], [2.0]], "<f4"), np.array([3.0, 4.0], "<f4")
    data = first.tobytes().ljust(alignment, b"\0") + second.tobytes()
    file = GGUFModel(write(tmp_path / "f", pack(keys, infos, data, version=version, alignment=alignment)))
    np.testing.assert_array_equal(file.dequantize("a"), first)
    np.testing.assert_array_equal(file.dequantize("b"), second)
    assert file.tensors["a"].offset % alignment == 0


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    data = np.random.default_rng(3).integers(0, 256, (6, kind.row_bytes(512)), np.uint8)
    infos = [tensor("t", (512, 2, 3), kind.gguf_type)]
    file = GGUFModel(write(tmp_path / "f", pack([], infos, data.tobytes())))
    assert file.tensors["t"].shape == (3, 2, 512)
    np.testing.assert_array_equal(file.data("t"), data)
    np.testing.assert_array_equal(file.dequantize("t"), kind.dequantize(data).reshape(3, 2, 512))


def test_string_array(gemma2: Path) -> None:
    tokens = GGUFModel(gemma2).metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(TOKENS) == 64
    assert list(tokens) == TOKENS
    assert [tokens[i] for i in range(64)] == TOKENS
    assert (tokens[-1], tokens[-64]) == (TOKENS[-1], TOKENS[0])
    assert tokens[4:7] == TOKENS[4:7]
    assert "🙂" in tokens
    for i in 64, -65:
        with pytest.raises(IndexError):
            tokens[i]


def test_strings_are_decoded_when_read(tmp_path: Path) -> None:
    raw = pack([key("tokens", ARRAY, string_array([b"", b"good", b"b\xffd"]))])
    tokens = GGUFModel(write(tmp_path / "f", raw)).metadata["tokens"]
    assert (tokens[0], tokens[1]) == ("", "good")
    for read in (lambda: tokens[2], lambda: list(tokens)):
        with pytest.raises(InvalidModelFile, match="string 2 of an array is not UTF-8") as caught:
            read()
        assert caught.value.offset == raw.index(b"\xff")


def test_data_is_a_read_only_view(gemma2: Path) -> None:
    with GGUFModel(gemma2) as file:
        data = file.data("token_embd.weight")
        assert not data.flags.owndata
        assert file.data("output_norm.weight").shape == (1, 64 * 4)
        with pytest.raises(ValueError, match="read-only"):
            data[0, 0] = 1
        with pytest.raises(InvalidModelFile, match="no tensor 'missing'"):
            file.data("missing")
        before = data.copy()
    np.testing.assert_array_equal(data, before)  # an array outlives its file
    with pytest.raises(InvalidRequest, match="closed"):
        file.data("token_embd.weight")
    with pytest.raises(InvalidRequest, match="closed"):
        file.fingerprint()


def test_fingerprint(gemma2: Path, tmp_path: Path) -> None:
    raw = bytearray(gemma2.read_bytes())
    with GGUFModel(gemma2) as file:
        same, at = file.fingerprint(), file.tensors["blk.0.attn_q.weight"].offset
    assert len(same) == 64

    def fingerprint(change: int | None, tail: bytes = b"") -> str:
        other = raw.copy()
        if change is not None:
            other[change] ^= 1
        return GGUFModel(write(tmp_path / "other", bytes(other) + tail)).fingerprint()

    assert fingerprint(None) == same  # the path does not count
    in_token = raw.index("naïve".encode())
    others = [fingerprint(in_token), fingerprint(at), fingerprint(at + 4095), fingerprint(None, b"\0")]
    assert len({same, *others}) == 5
    assert fingerprint(at + 4096) == same  # past what is sampled


# Config and tensors


def test_config(gemma2: Path, tmp_path: Path) -> None:
    with GGUFModel(gemma2) as file:
        config = file.config()
        file.check_tensors(config)
    assert (config.vocab_size, config.hidden_size, config.n_layers, config.tied_head) == (64, 64, 2, True)
    assert [layer.window for layer in config.layers] == [8, None]
    write_gemma2(tmp_path / "untied", extra={"output.weight": (64, 64)})
    with GGUFModel(tmp_path / "untied") as file:
        assert not file.config().tied_head
        file.check_tensors(file.config())


@pytest.mark.parametrize(
    ("drop", "extra", "words"),
    [
        (("blk.1.ffn_up.weight",), {}, ["'blk.1.ffn_up.weight'", "found nothing", "expected shape 96 × 64"]),
        (
            (),
            {"blk.1.attn_k.weight": (64, 32)},
            ["'blk.1.attn_k.weight'", "found shape 64 × 32", "expected shape 32 × 64"],
        ),
        ((), {"blk.2.attn_q.weight": (64, 64)}, ["'blk.2.attn_q.weight'", "no such tensor"]),
        ((), {"rope_freqs.weight": (16,)}, ["'rope_freqs.weight'", "no scaled RoPE"]),
    ],
)
def test_wrong_tensors(
    tmp_path: Path, drop: tuple[str, ...], extra: dict[str, tuple[int, ...]], words: list[str]
) -> None:
    write_gemma2(tmp_path / "f", drop=drop, extra=extra)
    with GGUFModel(tmp_path / "f") as file, pytest.raises(InvalidModelFile) as caught:
        file.check_tensors(file.config())
    assert all(word in str(caught.value) for word in words), caught.value


def test_config_needs_an_embedding_matrix(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match=r"no tensor 'token_embd\.weight'"):
        GGUFModel(write(tmp_path / "f", pack())).config()
    flat = pack([], [tensor("token_embd.weight", (8,))], bytes(32))
    with pytest.raises(InvalidModelFile, match=r"'token_embd\.weight': found shape 8, expected a matrix"):
        GGUFModel(write(tmp_path / "f", flat)).config()


_NUMBER_ARRAY = [np.array(values, dtype) for dtype in ("<i8", "<f4", "?") for values in ([], [1], [2, 2], [8, 0])]
_WILD = [
    *(0, -1, 1, 3, 2**31, 2**32, 2**63, 2**64 - 1, 10**400, True, False, None),
    *(
        0.0,
        -0.0,
        -1.0,
        1e-45,
        1e-60,
        3.5e38,
        1e300,
        math.inf,
        -math.inf,
        math.nan,
        "",
        "none",
        "gemma",
        "9" * 9999,
    ),
    *_NUMBER_ARRAY,
]
_OPTIONAL = [
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "vocab_size",
    "unheard_of",
    "\x1b[2Junheard_of" + 65000 * "f",
]
_SOUND: dict[str, dict[str, object]] = {
    "gemma2": GEMMA2,
    "gemma3": {
        **{key.replace("gemma2", "gemma3"): value for key, value in GEMMA2.items() if "softcapping" not in key},
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.final_logit_softcapping": 30.0,
    },
}


def test_gemma_2_without_soft_caps_has_those_of_llama_cpp() -> None:
    silent = {key: value for key, value in _SOUND["gemma2"].items() if "softcapping" not in key}
    silent["general.architecture"] = "gemma2"
    config = read_gguf_config(silent, vocab_size=64, tied_head=True, source="f.gguf")
    assert (config.attn_softcap, config.final_softcap) == (50.0, 30.0)
    none = silent | {"gemma2.attn_logit_softcapping": 0.0, "gemma2.final_logit_softcapping": 0.0}
    config = read_gguf_config(none, vocab_size=64, tied_head=True, source="f.gguf")
    assert (config.attn_softcap, config.final_softcap) == (None, None)


def _config_or_complaint(metadata: dict[str, object]) -> str | None:
    try:
        config = read_gguf_config(metadata, vocab_size=64, tied_head=True, source="f.gguf")
    except InvalidConfig as error:
        return str(error)
    factors = [config.query_scale, config.embedding_scale, config.rms_eps, config.layers[0].rope_base]
    factors += [cap for cap in (config.attn_softcap, config.final_softcap) if cap is not None]
    assert all(type(x) is float and 0 < x < math.inf for x in factors), config
    assert all(w.window is None or type(w.window) is int for w in config.layers)
    return None


@pytest.mark.parametrize("arch", _SOUND)
def test_config_of_wild_metadata(arch: str, tmp_path: Path) -> None:
    sound = {"general.architecture": arch, **_SOUND[arch]}
    assert _config_or_complaint(sound) is None
    strings = write(tmp_path / "f", pack([key("strings", ARRAY, string_array([b"gemma2", b"\xff"]))]))
    wild = [*_WILD, GGUFModel(strings).metadata["strings"]]
    # A complaint about these may name what they contradict instead.
    indirect = {
        "general.architecture",
        *(f"{arch}.attention.{k}" for k in ("head_count", "head_count_kv", "key_length")),
    }
    optional = [f"{arch}.{key}" for key in _OPTIONAL]
    optional += ["bezel.attention.query_pre_attn_scalar", "bezel.attention.layer_windows"]
    refused = 0
    for name in [*sound, *optional]:
        for value in wild:
            complaint = _config_or_complaint({**sound, name: value})
            if complaint is not None:
                refused += 1
                assert repr(name[:80])[1:-1] in complaint or name in indirect, (name, complaint)
                assert len(complaint) < 400
                assert "\x1b" not in complaint
        if name in GEMMA2 and "softcapping" not in name:
            assert name in str(_config_or_complaint({k: v for k, v in sound.items() if k != name}))
    assert refused > 0.8 * len(wild) * (len(sound) + len(optional))


def test_query_scale_of_the_27b_rule_is_never_infinite() -> None:
    metadata = {
        "general.architecture": "gemma2",
        **GEMMA2,
        "gemma2.block_count": 46,
        "gemma2.attention.head_count": 128,
    }
    assert "too many for a hidden size of 64" in str(_config_or_complaint(metadata))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_activation": ["gelu"]},
        {"layer_types": [["sliding_attention"], {}]},
        {"pruned_heads": [1]},
        {"rope_theta": 10**400},
        {"rms_norm_eps": 1e-60},
    ],
)
def test_config_json_of_wild_values(change: dict[str, object]) -> None:
    raw = {
        "model_type": "gemma2",
        "num_hidden_layers": 2,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
    }
    read_hf_config(raw)
    with pytest.raises(InvalidConfig, match=next(iter(change))):
        read_hf_config({**raw, **change})


# Hostile files

HUGE = (1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _one(*dims: int, type_id: int = 0, offset: int = 0, name: str | bytes = "t", data: int = 4096) -> bytes:
    return pack([], [tensor(name, dims, type_id, offset)], bytes(data))


def _aligned(value: bytes, type_id: int = U32) -> bytes:
    return pack([key("general.alignment", type_id, value)], [tensor("t", (8,))], bytes(64))


_HEADER = b"GGUF" + _u32(3)
_KEY = _HEADER + _u64(0) + _u64(1)
_TENSOR = _HEADER + _u64(1) + _u64(0)

ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "safetensors": (_u64(9) + b'{"a":{}}  ', "safetensors"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "html": (b"<!DOCTYPE html><html>", "web page"),
    "ggjt": (b"tjgg" + bytes(64), "before GGUF"),
    "text": (b"hello, world", "it begins with b'hell'"),
    "version 0": (b"GGUF" + _u32(0) + bytes(64), "version 0"),
    "version 1": (b"GGUF" + _u32(1) + bytes(64), "version 1; bezel reads versions 2 and 3"),
    "version 4": (pack(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    **{f"{n} tensors": (_HEADER + _u64(n) + _u64(0) + bytes(64), f"{n} tensors; there can be 2 at most") for n in HUGE},
    **{f"{n} keys": (_HEADER + _u64(0) + _u64(n) + bytes(64), f"{n} metadata keys; there") for n in HUGE},
    **{f"key of {n} bytes": (_KEY + _u64(n) + b"k" * 64, f"key 0 is {n} bytes long") for n in HUGE},
    **{f"string of {n} bytes": (pack([key("k", STRING, _u64(n) + b"x")]), f"key 'k' is {n} bytes long") for n in HUGE},
    **{
        f"array of {n} {kind}": (
            pack([key("k", ARRAY, _u32(type_id) + _u64(n) + bytes(64))]),
            "key 'k' takes",
        )
        for n in HUGE
        for kind, type_id in {"bytes": U8, "floats": F32, "strings": STRING}.items()
    },
    **{
        f"token of {n} bytes": (
            pack([key("k", ARRAY, _u32(STRING) + _u64(2) + string("a") + _u64(n) + bytes(64))]),
            f"string 1 of key 'k' is {n} bytes long",
        )
        for n in HUGE
    },
    "too few tokens": (
        pack([key("k", ARRAY, _u32(STRING) + _u64(3) + string(b"x" * 20) + string("a"))]),
        "string 2 of key 'k' lies past the end",
    ),
    "empty key": (pack([key("", STRING, string("x"))]), "name of key 0 is empty"),
    "key too long": (pack([key("k" * 65536, U8, b"\0")]), "key 0 is 65536 bytes long, expected 65535"),
    "key not UTF-8": (pack([key(b"k\xff", U8, b"\0")]), "name of key 0 is not UTF-8"),
    "value not UTF-8": (pack([key("k", STRING, string(b"\xc3"))]), "key 'k' is not UTF-8"),
    "lone surrogate": (pack([key("k", STRING, string(b"\xed\xa0\x80"))]), "key 'k' is not UTF-8"),
    "duplicate key": (
        pack([key("k", U8, b"\0"), key("k", U8, b"\1")]),
        "duplicate name: key 1 is called 'k'",
    ),
    "unknown value type": (pack([key("k", 13, bytes(8))]), "unknown value type 13"),
    "unknown array type": (
        pack([key("k", ARRAY, _u32(4096) + _u64(0) + bytes(8))]),
        "unknown value type 4096",
    ),
    "nested array": (pack([key("k", ARRAY, (_u32(ARRAY) + _u64(1)) * 1000)]), "nested array"),
    "bool of 2": (pack([key("k", BOOL, b"\2")]), "bool of 2, expected 0 or 1"),
    "bool of 255": (pack([key("k", ARRAY, _u32(BOOL) + _u64(3) + b"\0\1\xff")]), "bool of 255"),
    **{
        f"alignment {n}": (_aligned(_u32(n)), f"'general.alignment': found {n}, expected a power of two")
        for n in (0, 1, 4, 7, 33, 1 << 20, 1 << 31, (1 << 32) - 1)
    },
    "alignment a bool": (_aligned(b"\1", BOOL), "'general.alignment': found True"),
    "alignment a float": (_aligned(struct.pack("<f", 32), F32), "'general.alignment': found 32.0"),
    "alignment a string": (_aligned(string("32"), STRING), "'general.alignment': found '32'"),
    "alignment an array": (
        _aligned(_u32(U32) + _u64(1) + _u32(32), ARRAY),
        "'general.alignment': found array([32]",
    ),
    "empty tensor name": (_one(8, name=""), "name of tensor 0 is empty"),
    "tensor name too long": (_one(8, name="t" * 65), "tensor 0 is 65 bytes long, expected 64"),
    "tensor name not UTF-8": (_one(8, name=b"\xfe"), "name of tensor 0 is not UTF-8"),
    "duplicate tensor": (
        pack([], [tensor("t", (8,)), tensor("t", (8,), offset=32)], bytes(64)),
        "duplicate name: tensor 1 is called 't'",
    ),
    "no dimension": (_one(), "'t' has 0 dimensions"),
    "5 dimensions": (_one(1, 1, 1, 1, 1), "'t' has 5 dimensions, expected 1 to 4"),
    **{f"{n} dimensions": (_TENSOR + string("t") + _u32(n) + bytes(64), f"'t' has {n} dim") for n in HUGE[:1]},
    "zero rows": (_one(8, 0), "'t' has shape 0 × 8: a dimension is zero"),
    "zero columns": (_one(0, 8), "a dimension is zero"),
    "zero in the middle": (_one(8, 0, 1 << 63), "a dimension is zero"),
    "size past 2^63": (_one(1 << 61, 2), "more than the whole file"),
    "size 0 modulo 2^64": (_one(1 << 32, 1 << 32), "takes over 2^66 bytes, more than the whole file"),
    "size 64 modulo 2^64": (_one(16, (1 << 60) + 1), "more than the whole file"),
    "weights 2^256": (_one(*4 * [(1 << 64) - 1]), "more than the whole file"),
    "blocks overflow": (_one((1 << 64) - 32, type_id=2), "more than the whole file"),
    "negative dimension": (_one((1 << 64) - 1, 2), "more than the whole file"),
    "ragged blocks": (_one(33, type_id=2), "'t' has rows of 33 weights, q4_0 needs a multiple of 32"),
    "ragged rows": (_one(16, 2, type_id=8), "'t' has rows of 16 weights, q8_0 needs a multiple of 32"),
    "past the end": (_one(8, 129), "'t' takes 4128 bytes from byte 96, past the end of the file at 4192"),
    "offset past the end": (_one(8, offset=4096), "'t' takes 32 bytes from byte 4160, past the end"),
    **{f"offset {n}": (_one(8, offset=n & ~31), "past the end of the file") for n in HUGE},
    "misaligned offset": (_one(8, offset=33), "'t' has offset 33, expected a multiple of the alignment 32"),
    "overlap": (
        pack([], [tensor("a", (16,)), tensor("b", (8,), offset=32)], bytes(64)),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "same data twice": (pack([], [tensor("a", (8,)), tensor("b", (8,))], bytes(64)), "overlaps"),
    "no data": (pack([], [tensor("t", (8,))]), "past the end of the file"),
    "terminal escapes": (_one(8, 0, name="\x1b[2J\n"), r"tensor '\x1b[2J\n' has shape"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(tmp_path: Path, name: str) -> None:
    raw, words = ATTACKS[name]
    path = write(tmp_path / "hostile.gguf", raw)
    with pytest.raises(InvalidModelFile) as caught:
        GGUFModel(path)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{path}: invalid model file at byte ")
    assert len(message) < len(str(path)) + 400
    assert caught.value.offset is not None


@pytest.mark.parametrize(
    ("type_id", "name"),
    [(9, "Q8_1"), (27, "I64"), (41, "Q1_0"), *((n, f"of the unknown type {n}") for n in (42, 1000, (1 << 32) - 1))],
)
def test_a_type_that_bezel_has_no_code_for_is_not_supported(type_id: int, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "other.gguf", _one(256, type_id=type_id))
    with pytest.raises(UnsupportedModelFile) as caught:
        GGUFModel(path)
    assert str(caught.value).startswith(f"{path}: not supported: tensor 't' is {name}; bezel reads f32, ")


def test_not_a_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "b")
    places = {tmp_path: "not a file", tmp_path / "none": "no such file", tmp_path / "a.zip": "zip archive"}
    places[tmp_path / "nul\0"] = "cannot be opened"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # to open one waits for its writer; this one has written, lest the test hang
        os.write(os.open(tmp_path / "pipe", os.O_RDWR), bytes(64))
        places[tmp_path / "pipe"] = "not a file"
    for place, words in places.items():
        with pytest.raises(InvalidModelFile, match=words):
            GGUFModel(place)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    keys = [
        key("general.architecture", STRING, string("gemma2")),
        key("tokens", ARRAY, string_array([b"a", b"", "é".encode()])),
        key("scores", ARRAY, _u32(F32) + _u64(2) + bytes(8)),
        key("flag", BOOL, b"\1"),
    ]
    infos = [tensor("a", (32, 2), 8), tensor("b", (3,), offset=96)]
    raw = pack(keys, infos, bytes(range(96 + 12)))
    path = tmp_path / "f"
    assert list(GGUFModel(write(path, raw)).tensors) == ["a", "b"]
    for length in range(len(raw)):
        with pytest.raises(InvalidModelFile) as caught:
            GGUFModel(write(path, raw[:length]))
        assert caught.value.offset is not None


def _mutants(raw: bytes, header: int, count: int) -> list[bytes]:
    """A sound file, damaged in one of nine ways, nearly always in its header."""
    rng = random.Random(20240627)
    extremes = [0, 1, 7, 255, 2**16, 2**31 - 1, *HUGE, len(raw), len(raw) - header, 2**64 - header]

    def place() -> int:
        return rng.randrange(4, header if rng.random() < 0.95 else len(raw))

    def flip(b: bytearray) -> None:
        for _ in range(rng.choice([1, 1, 2, 8])):
            b[place()] ^= 1 << rng.randrange(8)

    def integer(b: bytearray) -> None:
        at, size = place(), rng.choice([1, 4, 8, 8])
        b[at : at + size] = (rng.choice(extremes) % (1 << 8 * size)).to_bytes(size, "little")

    def length(b: bytearray) -> None:  # where an integer is known to be: before a name
        at = raw.index(rng.choice(names)) - 8
        b[at : at + 8] = _u64(rng.choice(extremes))

    def info(b: bytearray) -> None:  # dimensions, type and offset of a tensor
        name = rng.choice(names[len(GEMMA2) :])
        at = raw.index(name) + len(name) + 4 * rng.randrange(8)
        b[at : at + 8] = _u64(rng.choice(extremes))

    def cut(b: bytearray) -> None:
        del b[rng.choice([place(), rng.randrange(len(b))]) :]

    def drop(b: bytearray) -> None:
        at = place()
        del b[at : at + rng.choice([1, 4, 8, 64])]

    def repeat(b: bytearray) -> None:
        at = place()
        b[at:at] = b[at : at + rng.choice([1, 8, 40, 400])]

    def swap(b: bytearray) -> None:
        at, to, size = place(), place(), rng.choice([4, 8, 40])
        b[at : at + size], b[to : to + size] = b[to : to + size], b[at : at + size]

    def noise(b: bytearray) -> None:
        at, size = place(), rng.choice([8, 64])
        b[at : at + size] = rng.randbytes(size)

    names = [name.encode() for name in (*GEMMA2, *SHAPES)]
    kinds = [flip, integer, length, info, cut, drop, repeat, swap, noise]
    out = []
    for i in range(count):
        b = bytearray(raw)
        kinds[i % len(kinds)](b)
        out.append(bytes(b))
    return out


def _costly() -> dict[str, tuple[bytes, int]]:
    """Headers that are sound, or nearly, and made to cost as much as they can; and the sizes of the files."""
    limit, gib = 16 << 20, 1 << 30
    room = limit - 100
    emoji = "🙂".encode()
    return {
        "many empty strings": (pack([key("k", ARRAY, _u32(STRING) + _u64(room // 8))]), gib),
        "too many empty strings": (pack([key("k", ARRAY, _u32(STRING) + _u64(gib // 9))]), gib),
        "many short strings": (pack([key("k", ARRAY, string_array([emoji + b"x"] * (room // 13)))]), gib),
        "one long string": (pack([key("k", STRING, string(b"x" * (room - 4) + emoji))]), limit),
        "too long a string": (pack([key("k", STRING, _u64(gib))]), 2 * gib),
        "many keys": (pack([key(f"{i}", U8, b"\0") for i in range(1 << 16)]), gib),
        "too many keys": (pack([], n_keys=1 << 20), gib),
        "many tensors": (pack([], [tensor(f"{i}", (8,), offset=32 * i) for i in range(1 << 16)]), gib),
        "too many tensors": (pack([], n_tensors=1 << 20), gib),
        "zeros": (_HEADER + _u64(60000) + _u64(60000), gib),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_damaged_files_are_refused_cheaply(gemma2: Path, tmp_path: Path) -> None:
    raw = gemma2.read_bytes()
    with GGUFModel(gemma2) as file:
        header = min(info.offset for info in file.tensors.values())
    paths = [gemma2]
    for i, mutant in enumerate(_mutants(raw, header, 900)):
        paths.append(write(tmp_path / f"{i}.gguf", mutant))
    for name, (start, size) in _costly().items():
        paths.append(write(tmp_path / name, start))
        os.truncate(paths[-1], max(size, len(start)))

    program = Path(__file__).parents[2] / "gguf_files.py"
    child = subprocess.run(
        [sys.executable, str(program)],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"after {lines[-1] if lines else 'nothing'}: {child.stderr[-2000:]}"
    verdicts = {Path(path).name: json.loads(said) for path, said in (line.split("\t") for line in lines)}
    assert len(verdicts) == len(paths)
    assert verdicts.pop(gemma2.name) == "sound"
    # Most damage shows; what hits the data, a name that nothing reads or a token's letters does not.
    complaints = [said for said in verdicts.values() if said != "sound"]
    assert len(complaints) > 0.6 * len(paths)
    assert {said.split(":")[0] for said in complaints} == {"InvalidModelFile", "InvalidConfig", "UnsupportedModelFile"}
    assert "16 MiB, bezel's limit for a header" in verdicts["too many empty strings"]
    assert all("65536 at most" in verdicts[name] for name in ("too many keys", "too many tensors"))
