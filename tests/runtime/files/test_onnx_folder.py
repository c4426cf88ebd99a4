"""ONNX folders: read as onnx reads them, and refused by name before onnxruntime could open what a hostile one names."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from bezel.runtime.errors import BezelError, InvalidConfig, InvalidModelFile
from bezel.runtime.files.onnx_folder import OnnxFolder
from bezel.runtime.files.onnx_model import DATA_TYPES
from bezel.runtime.files.protobuf import varint_bytes
from bezel.runtime.model.families.gguf import read_gguf_config, write_gguf_config
from bezel.runtime.model.families.hf import read_hf_config, write_hf_config
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from onnx_files import DATA, external, place, read_everything, set_external, write_folder, write_manifest, write_model
from tiny import CONFIGS, DEMO

# Sound folders


@pytest.fixture(params=["flat", "inner"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """With graph and weights beside the rest, and in the folder `onnx/`."""
    write_folder(tmp_path / "model", request.param == "inner")
    return tmp_path / "model"


@pytest.fixture
def inner_folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "inner", inner=True)
    return tmp_path / "inner"


def test_reads_what_onnx_reads(folder: Path) -> None:
    onnx.checker.check_model(str(place(folder, "model.onnx")), full_check=True)
    oracle = onnx.load(place(folder, "model.onnx"))
    with OnnxFolder(folder) as opened:
        assert opened.model.opsets == {"": 24, "com.microsoft": 1}
        assert opened.model.operators == {("", "Constant"): 1, ("", "If"): 1, ("", "MatMul"): 2, ("", "Add"): 1}
        assert list(opened.initializers) == [tensor.name for tensor in oracle.graph.initializer]
        for want in oracle.graph.initializer:
            found = opened.initializers[want.name]
            array = numpy_helper.to_array(want)
            assert (found.shape, found.dtype, found.nbytes) == (array.shape, array.dtype.name, array.nbytes)
            if want.name != "axes":  # no weight is stored as a list of numbers
                np.testing.assert_array_equal(opened.data(want.name), array.view(np.uint8).reshape(-1))
                assert not opened.data(want.name).flags.writeable
        assert opened.metadata["general.name"] == "small"
        assert opened.config() == read_hf_config(json.loads((DEMO / "config.json").read_text()))
        assert len(opened.vocabulary().pieces) == opened.config().vocab_size
        opened.check_unchanged()
        opened.check_hashes()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_round_trip(name: str) -> None:
    config = read_hf_config(CONFIGS[name])
    assert read_hf_config(json.loads(json.dumps(write_hf_config(config)))) == config


def test_config_json_of_other_windows_is_refused() -> None:
    config = read_hf_config(CONFIGS["gemma2-gqa"])
    metadata = write_gguf_config(config) | {
        "general.architecture": "gemma2",
        "bezel.attention.layer_windows": [8, 0, 4, 0],
    }
    other = read_gguf_config(metadata, vocab_size=4096, tied_head=True, source="x")
    with pytest.raises(InvalidConfig, match="layers"):
        write_hf_config(other)


def test_fingerprint_knows_models_apart(folder: Path) -> None:
    def fingerprint() -> str:
        with OnnxFolder(folder) as opened:
            return opened.fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    raw = bytearray(place(folder, DATA).read_bytes())
    raw[5] ^= 1
    place(folder, DATA).write_bytes(raw)
    assert fingerprint() != before


def test_hashes(folder: Path) -> None:
    raw = bytearray(place(folder, DATA).read_bytes())
    raw[-1] ^= 1
    place(folder, DATA).write_bytes(raw)
    with OnnxFolder(folder) as opened, pytest.raises(InvalidModelFile, match=r"model\.onnx\.data.*found SHA-256"):
        opened.check_hashes()


# Hostile graphs. Each changes a sound model, or gives the bytes of another.

Change = Callable[[onnx.ModelProto], bytes | None]
ATTACKS: dict[str, tuple[Change, str]] = {}


def attack(words: str, name: str | None = None) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        ATTACKS[name or change.__name__.replace("_", " ")] = (change, words)
        return change

    return register


def places(location: str) -> Change:
    return lambda model: set_external(model.graph.initializer[0], location=location)


# CVE-2022-25882, CVE-2024-27318, CVE-2026-34446, CVE-2026-34447 and their kin: another place than the folder.
for _location in (
    "/etc/passwd",
    "../secret",
    "sub/../../secret",
    "./model.onnx.data",
    "..",
    ".",
    "",
    "sub/data",
    "..\\secret",
    "C:\\secret",
    "C:secret",
    "\\\\server\\share",
    "file:///etc/passwd",
    "model.onnx.data\0.txt",
    "model.onnx.data:stream",
    "~/secret",
    "%HOME%",
    "*/_ORT_MEM_ADDR_/*",  # with this, onnxruntime takes the offset for an address in memory
    ".hidden",
    "a" * 300,
    "mödel",
    "model.onnx.data ",
    "model.onnx.data\n",
    "model.onnx.data.",
):
    attack("found the location", f"location {_location[:30]!r}")(places(_location))

for _key, _value in (
    ("offset", "-1"),
    ("offset", "+0"),
    ("offset", "0x10"),
    ("offset", " 4096"),
    ("offset", "1e3"),
    ("offset", ""),
    ("offset", "00"),
    ("offset", "٣"),
    ("offset", str(1 << 64)),
    ("length", "-512"),
    ("length", "512 "),
    ("length", str(1 << 63)),
):
    attack(f"found the {_key} ", f"{_key} {_value!r}")(
        lambda model, key=_key, value=_value: set_external(model.graph.initializer[0], **{key: value})
    )
for _offset in (4096 * 2, 1 << 32, 1 << 52, 10**17):
    attack("where the file ends", f"offset {_offset}")(
        lambda model, offset=_offset: set_external(model.graph.initializer[0], offset=str(offset))
    )


@attack("found the offset 2, expected a multiple of 4")
def misaligned_offset(model: onnx.ModelProto) -> None:
    set_external(model.graph.initializer[0], offset="2")


@attack("found 511 bytes of external data, expected 512")
def short_length(model: onnx.ModelProto) -> None:
    set_external(model.graph.initializer[0], length="511")


@attack("found 4096 bytes of external data")
def long_length(model: onnx.ModelProto) -> None:
    set_external(model.graph.initializer[0], length="4096")


@attack("external data's key 'location'")
def location_twice(model: onnx.ModelProto) -> None:
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "../secret"


@attack("external data's key 'basepath'")
def unknown_key(model: onnx.ModelProto) -> None:
    set_external(model.graph.initializer[0], basepath="/etc")


@attack("external data's key 'prepacked_0'")
def prepacked_weights(model: onnx.ModelProto) -> None:
    set_external(model.graph.initializer[0], prepacked_0="w|9999999|100")


@attack("found location, length of its external data")
def no_offset(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0].external_data[1]


@attack("no data or more than one kind")
def external_without_entries(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("external_data")


@attack("no data or more than one kind")
def entries_without_external(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("data_location")


@attack("no data or more than one kind")
def data_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = bytes(512)


@attack("a tensor in another file")
def external_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].t.CopyFrom(external("t", np.zeros(4, np.float32), "../secret", 0))


@attack("a tensor in another file")
def external_in_a_subgraph(model: onnx.ModelProto) -> None:
    model.graph.node[1].attribute[0].g.initializer.append(external("t", np.zeros(4, np.float32), "../secret", 0))


@attack("a tensor in another file")
def external_attribute_in_a_subgraph(model: onnx.ModelProto) -> None:
    value = external("t", np.zeros(4, np.float32), "../secret", 0)
    node = model.graph.node[1].attribute[1].g.node.add(op_type="Constant", output=["c"])
    node.attribute.append(helper.make_attribute("value", value))


@attack("field 15 of GraphProto")
def sparse_initialiser(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("t", np.zeros(4, np.float32), "../secret", 0))


@attack("field 10 of AttributeProto")
def attribute_of_tensors(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].tensors.append(external("t", np.zeros(4, np.float32), "../secret", 0))


@attack("field 22 of AttributeProto")
def sparse_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].sparse_tensor.values.CopyFrom(external("t", np.zeros(4, np.float32), "../x", 0))


@attack("field 25 of ModelProto")
def function(model: onnx.ModelProto) -> None:
    body = model.functions.add(name="f", domain="")
    value = external("t", np.zeros(4, np.float32), "../secret", 0)
    body.node.add(op_type="Constant").attribute.append(helper.make_attribute("value", value))


@attack("field 20 of ModelProto")
def training(model: onnx.ModelProto) -> None:
    tensors = model.training_info.add().initialization.initializer
    tensors.append(external("t", np.zeros(4, np.float32), "../secret", 0))


@attack("field 3 of TensorProto")
def segment(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].segment.end = 1 << 40


@attack("model.graph: found twice")
def second_graph(model: onnx.ModelProto) -> bytes:
    """Libraries merge the two, so that the first one's tensors are the second one's too."""
    other = onnx.ModelProto()
    other.graph.initializer.append(external("t", np.zeros(4, np.float32), "../secret", 0))
    return model.SerializeToString() + other.SerializeToString()


@attack("data_location: found twice")
def second_data_location(model: onnx.ModelProto) -> bytes:
    tensor = model.graph.initializer[2]
    twice = tensor.SerializeToString() + b"\x70\x00" + b"\x70\x01"
    graph = onnx.GraphProto.FromString(model.graph.SerializeToString())
    graph.ClearField("initializer")
    raw = graph.SerializeToString() + b"\x2a" + varint_bytes(len(twice)) + twice
    return b"\x3a" + varint_bytes(len(raw)) + raw


@attack("found data location 4294967297")
def data_location_past_32_bits(_: onnx.ModelProto) -> bytes:
    """Libraries keep the lower 32 bits, which say that the tensor lies elsewhere."""
    tensor = b"\x08\x01\x10\x01\x42\x01t" + b"\x70" + varint_bytes((1 << 32) + 1)
    raw = b"\x2a" + varint_bytes(len(tensor)) + tensor
    return b"\x3a" + varint_bytes(len(raw)) + raw


@attack("found data type 4294967297")
def data_type_past_32_bits(_: onnx.ModelProto) -> bytes:
    raw = b"\x08\x01\x10" + varint_bytes((1 << 32) + 1) + b"\x42\x01t\x4a\x04abcd"
    return b"\x3a" + varint_bytes(len(raw) + 2) + b"\x2a" + varint_bytes(len(raw)) + raw


@attack("found data type 8")
def strings(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.STRING


@attack("plausible sizes")
def negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -16


@attack("plausible sizes")
def many_dimensions(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims.extend([1] * 8)


@attack("of external data, expected")
def size_0_modulo_2_to_64(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 40, 1 << 24])


@attack("found 32 bytes, expected")
def inline_data_that_is_too_short(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].dims[0] = 1 << 40


@attack("data for 2 numbers at most")
def few_numbers_for_a_large_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[3].dims[0] = 1 << 40


@attack("data for 0 numbers at most")
def no_data_at_all(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].ClearField("raw_data")


@attack("initialiser 1 is called 'w', expected a plain name of its own")
def name_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].name = "w"


@attack("initialiser 1 is called")
def long_name(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].name = "w" * 300


@attack("initialiser 1 is called")
def name_of_terminal_escapes(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].name = "\x1b[2J"


@attack("found the domain 'evil'")
def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].domain = "evil"


@attack("found the domain 'evil'")
def foreign_operator_in_a_subgraph(model: onnx.ModelProto) -> None:
    model.graph.node[1].attribute[0].g.node[0].domain = "evil"


@attack("found the domain 'evil'")
def foreign_operator_set(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="evil", version=1)


@attack("two operator sets")
def operator_set_twice(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="ai.onnx", version=7)


@attack("compiled part for other hardware")
def compiled_context(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type, model.graph.node[2].domain = "EPContext", "com.microsoft"


@attack("messages nested more than")
def deep_nesting(model: onnx.ModelProto) -> None:
    graph = model.graph
    for _ in range(20):
        attribute = graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        graph = attribute.g


@attack("more than 262144 fields")
def many_empty_nodes(_: onnx.ModelProto) -> bytes:
    nodes = b"\x0a\x00" * (1 << 19)
    return b"\x3a" + varint_bytes(len(nodes)) + nodes


@attack("more than 262144 numbers")
def many_dims(_: onnx.ModelProto) -> bytes:
    dims = b"\x0a" + varint_bytes(1 << 19) + b"\x01" * (1 << 19)
    raw = b"\x2a" + varint_bytes(len(dims)) + dims
    return b"\x3a" + varint_bytes(len(raw)) + raw


@attack("onnxruntime's own format")
def onnxruntimes_own_format(model: onnx.ModelProto) -> bytes:
    """An ONNX model whose bytes 4 … 7, its producer, onnxruntime takes for the mark of another format."""
    return b"\x08\x0a\x12\x04ORTM" + model.SerializeToString()


@attack("found no graph")
def empty_model(_: onnx.ModelProto) -> bytes:
    return b""


@attack("field 13 of ModelProto")
def text_file(_: onnx.ModelProto) -> bytes:
    return b"hello, world\n"


@attack("not an ONNX model, or cut short")
def cut_short(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString()[:-1]


@attack("not an ONNX model")
def group(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString() + b"\x1b\x1c"


@attack("wire type 0, expected 2")
def graph_of_another_wire_type(_: onnx.ModelProto) -> bytes:
    return b"\x38\x01"


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(folder: Path, name: str) -> None:
    model = onnx.load(place(folder, "model.onnx"), load_external_data=False)
    change, words = ATTACKS[name]
    raw = change(model)
    write_model(folder, model if raw is None else raw)
    (folder.parent / "secret").write_bytes(bytes(1 << 13))
    with outside_of(folder) as opened, pytest.raises(InvalidModelFile) as caught:
        OnnxFolder(folder)
    assert opened == []
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{place(folder, 'model.onnx')}: invalid model file: ")
    assert message.isprintable()
    assert len(message) < len(str(folder)) + 400


# Whatever Python opens while a test listens; what it imports is its own business.
_listeners: list[list[str]] = []


def _listen(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and not isinstance(args[0], int):  # a number is a file that is open
        for seen in _listeners:
            seen.append(str(args[0]))


sys.addaudithook(_listen)


@contextmanager
def outside_of(folder: Path) -> Iterator[list[str]]:
    """The files outside of a folder that are opened meanwhile."""
    seen: list[str] = []
    found: list[str] = []
    _listeners.append(seen)
    try:
        yield found
    finally:
        _listeners.remove(seen)
        found += [
            name
            for name in seen
            if Path(name).parent not in (folder, folder / "onnx") and not name.endswith((".py", ".pyc", ".so"))
        ]


# Hostile folders


def link(file: Path, outside: Path) -> None:
    os.replace(file, outside)
    file.symlink_to(outside)


def link_inside(file: Path, outside: Path) -> None:  # noqa: ARG001
    os.replace(file, file.with_name("other"))
    file.symlink_to("other")


def hard_link(file: Path, outside: Path) -> None:
    outside.hardlink_to(file)


def pipe(file: Path, outside: Path) -> None:  # noqa: ARG001
    file.unlink()
    os.mkfifo(file)


def directory(file: Path, outside: Path) -> None:  # noqa: ARG001
    file.unlink()
    file.mkdir()


def empty(file: Path, outside: Path) -> None:  # noqa: ARG001
    file.write_bytes(b"")


def missing(file: Path, outside: Path) -> None:  # noqa: ARG001
    file.unlink()


DAMAGES = {
    link: "it is a symbolic link",
    link_inside: "it is a symbolic link",
    hard_link: "it is a hard link, one of 2",  # CVE-2026-27489
    pipe: "this is not a file",
    directory: "this is not a file",
    missing: "there is no such file",
    empty: "",
}


@pytest.mark.skipif(sys.platform == "win32", reason="makes links and pipes")
@pytest.mark.parametrize("name", ["model.onnx", DATA, "config.json", "tokenizer.model", "bezel.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_folder(folder: Path, damage: Callable[[Path, Path], None], name: str) -> None:
    file = place(folder, name)
    damage(file, folder.parent / name)
    if name != "bezel.json":
        listed = file.relative_to(folder).as_posix()
        before = json.loads((folder / "bezel.json").read_text())["files"][listed]
        write_manifest(folder)
        manifest = json.loads((folder / "bezel.json").read_text())
        manifest["files"].setdefault(listed, before)
        (folder / "bezel.json").write_text(json.dumps(manifest))
    complaint = read_everything(folder)
    assert complaint.startswith(f"InvalidModelFile: {folder}")
    assert DAMAGES[damage] in complaint or (damage is missing and name == "bezel.json")


WILD_NAMES = (
    *("../x", "..", "onnx/../x", "onnx/..", "onnx/", "onnx//x", "onnx/onnx/x", "/onnx/x", "./onnx/x", "onnx/./x"),
    *("onnx\\x", "onnx\\..\\x", "other/x", "ONNX/x", "onnx/.hidden", "onnx/a:b", "onnx/a\0", "../onnx/x", ""),
)


@pytest.mark.parametrize("name", WILD_NAMES)
def test_wild_name(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "bezel.json").read_text())
    (folder / "bezel.json").write_text(
        json.dumps(manifest | {"files": manifest["files"] | {name: {"bytes": 1, "sha256": ""}}})
    )
    with pytest.raises(InvalidModelFile, match="key 'files': found"):
        OnnxFolder(folder)


def inner_is_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "onnx")
    (folder / "onnx").touch()


def inner_is_a_link(folder: Path) -> None:
    (folder / "onnx").rename(folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")


def inner_is_missing(folder: Path) -> None:
    shutil.rmtree(folder / "onnx")


def weights_are_outside(folder: Path) -> None:
    (folder / "onnx" / DATA).rename(folder / DATA)


def graph_is_outside(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").rename(folder / "model.onnx")


def weights_are_cut_short(folder: Path) -> None:
    os.truncate(folder / "onnx" / DATA, (folder / "onnx" / DATA).stat().st_size - 1)


@pytest.mark.parametrize("relisted", [False, True])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (inner_is_a_file, "this is not a folder, or a link to one"),
        (inner_is_a_link, "this is not a folder, or a link to one"),
        (inner_is_missing, "there is no such file"),
        (weights_are_outside, "there is no such file"),
        (graph_is_outside, "there is no such file"),
        (weights_are_cut_short, "is the copy"),
    ],
)
def test_damaged_inner_folder(damage: Callable[[Path], None], words: str, relisted: bool, inner_folder: Path) -> None:
    """Also where the manifest was written for what lies there, by whoever damaged it."""
    manifest = json.loads((inner_folder / "bezel.json").read_text())
    damage(inner_folder)
    if relisted:
        write_manifest(inner_folder)
        found = json.loads((inner_folder / "bezel.json").read_text())
        listed = {**manifest["files"], **found["files"]}
        (inner_folder / "bezel.json").write_text(json.dumps(found | {"graph": manifest["graph"], "files": listed}))
    with outside_of(inner_folder) as opened, pytest.raises(InvalidModelFile, match=words):
        OnnxFolder(inner_folder)
    assert opened == []


def test_sizes_are_those_of_the_manifest(folder: Path) -> None:
    with open(place(folder, DATA), "ab") as file:
        file.write(b"more")
    with pytest.raises(InvalidModelFile, match=r"expected 4608 by bezel\.json; is the copy of the folder complete"):
        OnnxFolder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"bezel_onnx": 3},
        {"bezel_onnx": True},
        {"metadata": []},
        {"quant": None},
        {"target": 3},
        {"files": "all"},
        {"files": {"model.onnx": {"bytes": -1.5, "sha256": ""}}},
        {"files": {"model.onnx": {"bytes": True, "sha256": ""}}},
        {"files": {"model.onnx": 3}},
    ],
    ids=str,
)
def test_wild_manifest(folder: Path, change: dict[str, object]) -> None:
    write_manifest(folder, **change)
    with pytest.raises(InvalidModelFile, match=next(iter(change))):
        OnnxFolder(folder)


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff", b"[]", b"{"])
def test_wild_json(folder: Path, raw: bytes) -> None:
    (folder / "bezel.json").write_bytes(raw)
    with pytest.raises(InvalidModelFile):
        OnnxFolder(folder)


def test_a_file_that_is_replaced_after_it_was_checked(folder: Path) -> None:
    for name in (DATA, "model.onnx"):
        with OnnxFolder(folder) as opened:
            opened.check_unchanged()
            secret = folder.parent / "secret"
            shutil.copy2(place(folder, name), secret)  # as large, as old
            os.replace(secret, place(folder, name))
            with pytest.raises(InvalidModelFile, match="changed while it was being opened"):
                opened.check_unchanged()


def test_what_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match=r"this is a checkpoint.*bezel export"):
        OnnxFolder(DEMO)
    with pytest.raises(InvalidModelFile, match="without bezel"):
        OnnxFolder(tmp_path)
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(InvalidModelFile, match="onnxruntime-genai"):
        OnnxFolder(tmp_path)
    with pytest.raises(InvalidModelFile, match="no such folder"):
        OnnxFolder(tmp_path / "none")


def _mutants(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """A file, damaged in one of six ways."""
    rng = random.Random(seed)
    for i in range(count):
        b = bytearray(raw)
        at = rng.randrange(len(b))
        size = rng.choice([1, 2, 8, 40])
        if i % 6 == 0:
            for _ in range(rng.choice([1, 1, 2, 8])):
                b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
        elif i % 6 == 1:
            b[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif i % 6 == 2:
            del b[at : at + size]
        elif i % 6 == 3:
            b[at:at] = b[at : at + size]
        elif i % 6 == 4:
            b[at : at + size] = rng.randbytes(size)
        else:
            del b[at:]
        yield bytes(b)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("folder", ["inner"], indirect=True)
def test_damaged_folders_are_refused_cheaply(folder: Path, tmp_path: Path) -> None:
    counts = {"model.onnx": 600, "tokenizer.model": 60, "config.json": 60, "bezel.json": 120}
    lines = []
    for seed, (name, count) in enumerate(counts.items()):
        for i, mutant in enumerate(_mutants(place(folder, name).read_bytes(), count, seed)):
            path = tmp_path / f"{name}.{i}"
            path.write_bytes(mutant)
            lines.append(f"{name}\t{path}")
    program = Path(__file__).parents[2] / "onnx_files.py"
    child = subprocess.run(
        [sys.executable, str(program), str(folder)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = child.stdout.splitlines()
    assert child.returncode == 0, f"after {said[-1] if said else 'nothing'}: {child.stderr[-2000:]}"
    verdicts = {Path(path).name: json.loads(words) for path, words in (line.split("\t") for line in said)}
    assert len(verdicts) == len(lines)
    complaints = [words for words in verdicts.values() if words != "sound"]
    assert len(complaints) > 0.4 * len(lines)  # names of nodes and the like may be anything
    assert {words.split(":")[0] for words in complaints} == {"InvalidModelFile", "InvalidConfig"}


@pytest.mark.parametrize("folder", ["flat"], indirect=True)
def test_damaged_graphs_are_to_onnx_what_they_are_to_bezel(folder: Path) -> None:
    """Whatever is let through, onnx itself finds no other tensor in it, and none in another place."""
    checked = 0
    for mutant in _mutants(place(folder, "model.onnx").read_bytes(), 3000, 99):
        write_model(folder, mutant)
        try:
            with OnnxFolder(folder) as opened:
                found = list(opened.initializers.values())
            model = onnx.ModelProto.FromString(mutant)
        except (BezelError, DecodeError):
            continue
        checked += 1
        for ours, theirs in zip(found, model.graph.initializer, strict=True):
            assert (ours.name, ours.shape) == (theirs.name, tuple(theirs.dims))
            assert DATA_TYPES[theirs.data_type][0] == ours.dtype
            entries = {"location": DATA, "offset": str(ours.offset), "length": str(ours.nbytes)}
            external = theirs.data_location == TensorProto.EXTERNAL
            assert {e.key: e.value for e in theirs.external_data} == (entries if external else {})
            assert ours.offset + ours.nbytes <= place(folder, DATA).stat().st_size
    assert checked > 300
