"""A small sound ONNX folder for tests, to be damaged in every way.

Run as a program, it puts the files that are named on standard input into a folder, one after the other, and reads all
there is in it, under a limit on memory and on time for each; see `test_onnx_folder.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from bezel.runtime.errors import BezelError
from bezel.runtime.files.onnx_folder import OnnxFolder
from onnx import TensorProto, helper, numpy_helper
from tiny import DEMO

MEMORY, SECONDS = 300 << 20, 4.0
DATA = "model.onnx.data"
ALIGNMENT = 4096


def external(name: str, array: np.ndarray, location: str, offset: int) -> TensorProto:
    tensor = numpy_helper.from_array(array, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    set_external(tensor, location=location, offset=str(offset), length=str(array.nbytes))
    return tensor


def set_external(tensor: TensorProto, **entries: str) -> None:
    """Change or add entries of a tensor's external data."""
    found = {entry.key: entry for entry in tensor.external_data}
    for key, value in entries.items():
        entry = found.get(key) or tensor.external_data.add()
        entry.key, entry.value = key, value


def place(folder: Path, name: str) -> Path:
    """Where a file of the folder is: graph and weights may be in the folder `onnx/`."""
    inner = folder / "onnx"
    return inner / name if name.startswith("model.onnx") and inner.is_dir() else folder / name


def write_folder(folder: Path, inner: bool = False) -> onnx.ModelProto:
    """x @ w + b through an `If`, w and its twin in a file of their own, and the demo's config and tokenizer.

    `inner`: laid out for Hugging Face's libraries, graph and weights in `onnx/`.
    """
    (folder / "onnx" if inner else folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    arrays = {name: rng.standard_normal((16, 8)).astype(np.float32) for name in ("w", "twin")}
    raw, tensors = b"", []
    for name, array in arrays.items():
        raw += bytes(-len(raw) % ALIGNMENT)
        tensors.append(external(name, array, DATA, len(raw)))
        raw += array.tobytes()
    place(folder, DATA).write_bytes(raw)
    tensors.append(numpy_helper.from_array(np.arange(8, dtype=np.float32), "b"))
    tensors.append(helper.make_tensor("axes", TensorProto.INT64, [2], [0, 1]))
    branches = {}
    for branch, weight in (("then_branch", "w"), ("else_branch", "twin")):
        y = helper.make_tensor_value_info(f"{branch}.y", TensorProto.FLOAT, [1, 8])
        node = helper.make_node("MatMul", ["x", weight], [y.name], name=f"{branch}.matmul")
        branches[branch] = helper.make_graph([node], branch, [], [y], [])
    nodes = [
        helper.make_node("Constant", [], ["which"], name="which", value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["which"], ["xw"], name="choose", **branches),
        helper.make_node("Add", ["xw", "b"], ["y"], name="add", domain=""),
    ]
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", 16), ("y", 8))]
    graph = helper.make_graph(nodes, "small", io[:1], io[1:], tensors)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="test")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(DEMO / name, folder / name)
    write_model(folder, model)
    return model


def write_model(folder: Path, model: onnx.ModelProto | bytes) -> None:
    raw = model if isinstance(model, bytes) else model.SerializeToString()
    place(folder, "model.onnx").write_bytes(raw)
    write_manifest(folder)


def write_manifest(folder: Path, **change: object) -> None:
    """`bezel.json` for whatever lies in the folder, links and all: who damages a folder can do that too."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "bezel.json"
    }
    metadata = {"general.name": "small", "bezel.generation.stop_token_ids": [1, 5]}
    manifest = {
        "bezel_onnx": 2,
        "metadata": metadata,
        "quant": "f32",
        "target": "portable",
        "graph": place(folder, "model.onnx").relative_to(folder).as_posix(),
        "kv": "f32",
        "files": files,
        "formats": {},
    }
    (folder / "bezel.json").write_text(json.dumps(manifest | change))


def relist(folder: Path, **change: object) -> None:
    """Sizes and hashes of what there is, so that only what it means is wrong."""
    manifest = json.loads((folder / "bezel.json").read_text()) | change
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "bezel.json").write_text(json.dumps(manifest))


def read_everything(folder: Path) -> str:
    """What bezel says about a folder of which all is read: its first complaint, or "sound"."""
    complaints = []

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except BezelError as error:
            complaints.append(f"{type(error).__name__}: {error}")

    def read() -> None:
        with OnnxFolder(folder) as opened:
            for name, tensor in opened.initializers.items():
                if tensor.location is not None or tensor.raw is not None:
                    attempt(lambda name=name: opened.data(name).sum())
            for step in (opened.config, opened.vocabulary, opened.fingerprint, opened.check_unchanged):
                attempt(step)

    attempt(read)
    return complaints[0] if complaints else "sound"


def _main() -> None:
    import resource
    import signal

    folder = Path(sys.argv[1])
    read_everything(folder)  # what is imported late belongs to the start
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))
    for line in sys.stdin.read().split("\n"):
        name, content = line.split("\t")
        path = place(folder, name)
        sound = path.read_bytes()
        shutil.copy(content, path)
        if name != "bezel.json":
            write_manifest(folder)
        print(content, end="\t", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # processor time; when it is used up, it ends the process
        print(json.dumps(read_everything(folder)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.write_bytes(sound)
        write_manifest(folder)


if __name__ == "__main__":
    _main()
