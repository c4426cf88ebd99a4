"""Exports to ONNX that are ended by a signal: nothing is left of them, and what was there before stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bezel.export.onnx.npm import PACKAGES, package_files
from bezel.runtime.errors import InvalidRequest
from signals import heed_interrupts
from test_onnx_export import write
from tiny import DEMO

# Says when it is where it is to be ended, and waits there.
PROGRAM = """
import sys, time
from importlib import import_module
from bezel.runtime.commands.main import main

module, name, *arguments = sys.argv[1:]
found = import_module(f"bezel.export.onnx.{module}")
original = getattr(found, name)

def wait():
    print("here", flush=True)
    for _ in range(600):
        time.sleep(0.1)  # a signal just before a sleep does not end it

def waiting(*args):
    result = original(*args)
    if not hasattr(result, "__next__"):
        wait()
        return result
    return after_one(result)

def after_one(items):
    yield next(items)
    wait()
    yield from items

setattr(found, name, waiting)
main(arguments)
"""
# In the middle of the weights, with those on the disk, with a page around the model: by Ctrl-C or by who ends programs.
PLACES = {
    "transformers, weights": (signal.SIGINT, "transformers", "external_data", "_converted"),
    "transformers, end": (signal.SIGTERM, "transformers", "writer", "write_data"),
    "web, weights": (signal.SIGTERM, "web", "external_data", "_converted"),
    "web, page": (signal.SIGINT, "web", "page_writer", "write_files"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_left(place: str, tmp_path: Path) -> None:
    sent, target, *where = PLACES[place]
    if target == "web":
        try:
            for package in PACKAGES:
                package_files(package)
        except InvalidRequest as error:
            pytest.skip(str(error))
    before = contents(write(DEMO, tmp_path / "earlier", "int8", target="portable"))
    for out, options in (("new", []), ("earlier", ["--force"])):
        export = ["export", str(DEMO), str(tmp_path / out), "--target", target, "--quant", "int4", *options]
        started = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *where, *export],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )
        assert started.stdout is not None
        assert started.stdout.readline() == "here\n"
        assert len(os.listdir(tmp_path)) > 1  # half of it is there
        started.send_signal(sent)
        _, err = started.communicate(timeout=30)
        assert started.returncode == (130 if sent == signal.SIGINT else 143)
        assert "Traceback" not in err
        assert os.listdir(tmp_path) == ["earlier"]
        assert contents(tmp_path / "earlier") == before
