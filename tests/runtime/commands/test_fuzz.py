"""Random metadata, command lines and chats: whatever they say, bezel answers in its own words.

BEZEL_FUZZ sets how many of each; 40 by default.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from bezel.runtime.commands.main import main
from bezel.runtime.files.gguf import GGUFFile
from click.testing import CliRunner
from gguf_files import edited
from seeing import drawn

COUNT = int(os.environ.get("BEZEL_FUZZ", "40"))
TEXTS = ["", "a", "ü🙂", "\x1b[2J", "x" * 5000, "-1", "1e309", "nan", "../../etc/passwd", "%s{}", "\n\n"]
NUMBERS = ["0", "1", "-1", "2", "64", "1e9", "nan", "x", "", "999999999999", "0.5", "1025"]
KEYS = [f"general.sampling.{key}" for key in ("temp", "top_k", "top_p", "min_p", "penalty_repeat")]
KEYS += ["bezel.generation.stop_token_ids", "bezel.receipt.kld_mean", "bezel.provenance.note", "general.alignment"]
KEYS += ["tokenizer.ggml.eot_token_id", "gemma2.rope.freq_base", "gemma2.vocab_size", "split.count", "split.no"]
NUMBERED = ["--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "-n", "-c", "--threads"]


@pytest.fixture(scope="module")
def demo(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q8_0")


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEZEL_TRACEBACK", "1")  # what is unforeseen comes through
    (tmp_path / "text.txt").write_text("Once upon a time " * 50)


def bezel(*args: object, stdin: bytes = b"") -> None:
    done = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), (args, stdin, done.exception)
    assert "fault of bezel" not in done.output, (args, stdin)


def some_value(rng: random.Random) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: rng.choice(TEXTS),
        lambda: rng.randrange(2**32),
        lambda: rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), 0.5, 40.0]),
        lambda: rng.random() < 0.5,
        lambda: [rng.choice(TEXTS) for _ in range(1 + rng.randrange(3))],
        lambda: [rng.randrange(100) for _ in range(1 + rng.randrange(4))],
        lambda: np.array([], np.float32),
        lambda: np.array([1, -2], np.int32),
        lambda: [True, False],
        lambda: rng.randrange(5),
    ]
    return rng.choice(makers)()


def test_metadata(demo: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    with GGUFFile(demo) as file:
        keys = [*file.metadata, *KEYS]
    for _ in range(COUNT):
        changes = {rng.choice(keys): some_value(rng) for _ in range(1 + (rng.random() < 0.3))}
        file = edited(demo, tmp_path / "m.gguf", changes)
        bezel("inspect", file, *rng.choice([[], ["--json"]]))
        bezel("run", file, "Once", "-n", 1, "--seed", 1)


def test_metadata_of_an_eye(shapes_of: Callable[..., Path], tmp_path: Path) -> None:
    rng = random.Random(4)
    model, eye = shapes_of(), tmp_path / "eye.gguf"
    PIL.Image.fromarray(drawn(1)).save(tmp_path / "a.png")
    with GGUFFile(model.with_name(f"mmproj-{model.name}")) as file:
        keys = [*file.metadata, "clip.has_audio_encoder", "clip.vision.projector_type", "general.alignment"]
    for _ in range(COUNT):
        changes = {rng.choice(keys): some_value(rng) for _ in range(1 + (rng.random() < 0.3))}
        edited(model.with_name(f"mmproj-{model.name}"), eye, changes)
        bezel("inspect", eye, *rng.choice([[], ["--json"], ["--tensors"]]))
        bezel("run", model, "What is it?", "-i", "a.png", "-n", 1, "--vision", eye)


def test_command_lines(demo: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    paths = [demo, tmp_path, "nothing.gguf", "nowhere/x", "~/x", "", ".", "text.txt"]

    def path() -> object:
        return rng.choice(paths)

    for _ in range(COUNT):
        verb = rng.choice(["run", "chat", "inspect", "verify", "export", "measure", "calibrate", "tasks", "frob"])
        args: list[object] = [verb, *([path()] if rng.random() < 0.95 else [])]
        if verb in ("run", "chat"):
            args += [rng.choice(TEXTS)] if rng.random() < 0.7 else []
            args += [part for _ in range(rng.randrange(3)) for part in (rng.choice(NUMBERED), rng.choice(NUMBERS))]
            args += rng.choice([[], ["--kv", "int8"], ["--raw"], ["--json"], ["--stop", "a"], ["-f", path()]])
            args += ["-i", path()] if verb == "run" and rng.random() < 0.2 else []
            args += ["-n", 1, "-c", 64]
        elif verb == "export":
            args += [path(), *rng.choice([[], ["--force"], ["--quant", rng.choice(["Q4_0", "x", "text.txt", ""])]])]
            args += rng.choice([[], ["--requantize"], ["--size", rng.choice(NUMBERS)], ["--calibration", path()]])
        elif verb == "verify":
            args += ["--source", path()]
        elif verb == "measure":
            args += ["--reference", path(), "--text", path(), "--chunks", rng.choice(["1", "0", "x"]), "--chunk", "32"]
        elif verb == "calibrate":
            args += ["--text", path(), "-o", rng.choice(["c.calib", "nowhere/x", ".", ""]), "--tokens", "64"]
        bezel(*args, stdin=rng.choice([b"Once\n", b"", b"\xff\xfe", b"a\r\nb"]))


def test_chats(demo: Path) -> None:
    rng = random.Random(3)
    words = ["Once", "/undo", "/reset", "/help", "/frob", "//x", "\\", "a\\", "  ", "/undo x", "x" * 300]
    places = ("", " s", " .", " nowhere/x", " text.txt", f" {demo}")
    words += [verb + place for verb in ("/save", "/load") for place in places]
    words += [f"/image{place}" for place in (*places, " 'a", ' "a.png"', " a\\ b.png", " a.png b.png")]
    before = demo.read_bytes()
    for _ in range(COUNT // 4):
        lines = [rng.choice(words) for _ in range(rng.randrange(1, 12))]
        options = ["-n", rng.choice([1, 5]), "-c", rng.choice([40, 200]), "--on-full", rng.choice(["slide", "error"])]
        bezel("chat", demo, *options, stdin="\n".join(lines).encode())
    assert demo.read_bytes() == before
    assert Path("text.txt").read_text() == "Once upon a time " * 50
