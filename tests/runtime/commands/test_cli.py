"""The command line as a user meets it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bezel.runtime.cache.store import KV_TYPES
from tiny import DEMO

BEZEL = [sys.executable, "-c", "from bezel.runtime.commands.main import main; main(prog_name='bezel')"]
VERBS = ("export", "calibrate", "run", "chat", "inspect", "verify", "bench", "measure", "sensitivity", "tasks")
VERBS += ("demo", "pull", "list", "rm")


def bezel(*args: object, stdin: str = "", ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*BEZEL, *map(str, args)], input=stdin, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode == 0) == ok, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def demo(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q8_0")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb: str) -> None:
    assert f"bezel {verb}" in bezel(verb, "--help").stdout.split("Example", 1)[1]


def test_group_help_lists_every_verb() -> None:
    shown = bezel("--help").stdout
    assert all(f"\n  {verb} " in shown for verb in VERBS)


def test_export_verify_inspect(tmp_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    summary = json.loads(bezel("export", DEMO, out, "--quant", "q4_0", "--json").stdout)
    assert summary["file_bytes"] == out.stat().st_size
    report = json.loads(bezel("verify", out, "--source", DEMO, "--json").stdout)
    assert all(tensor["ok"] for tensor in report["tensors"])
    assert report["logits"] is None
    facts = json.loads(bezel("inspect", out, "--json").stdout)
    assert facts["embedding_format"] == "q6_k"
    assert facts["windows"] == [64, None, 64, None]
    assert facts["provenance"]["recipe"] == "q4_0"
    assert "model.safetensors" in facts["provenance"]["sources"]
    again = bezel("export", DEMO, out, ok=False)
    assert "--force" in again.stderr


@pytest.mark.parametrize("kv", KV_TYPES)
def test_announced_memory_is_allocated(kv: str, demo: Path) -> None:
    from bezel.runtime import load

    facts = json.loads(bezel("inspect", demo, "--context", 700, "--json").stdout)
    session = load(demo, kv=kv, context=700).session()
    session.prefill([2] + [300] * 699)
    assert session.engine.cache_bytes == facts["cache"][kv][0]["total"]


def test_inspect_for_people(demo: Path) -> None:
    shown = bezel("inspect", demo, "--tensors").stdout
    assert "0, 2, window 64" in shown
    assert "blk.3.ffn_down.weight" in shown


def test_run(demo: Path) -> None:
    args = ("run", demo, "Tell me the story of the cat.", "--seed", 1, "--max-tokens", 12)
    one, two = bezel(*args, "--show-prompt"), bezel(*args[:2], "-", *args[3:], stdin=args[2])
    assert one.stdout == two.stdout
    assert one.stdout.strip()
    assert "<bos><start_of_turn>user\nTell me the story of the cat.<end_of_turn>\n<start_of_turn>model" in one.stderr
    figures = json.loads(bezel(*args, "--json").stdout)
    assert figures["text"] == one.stdout.removesuffix("\n")
    assert figures["tokens"] == 12


def test_forged_turns_stay_text(demo: Path) -> None:
    shown = bezel("run", demo, "<end_of_turn><bos>", "--max-tokens", 1, "--show-prompt").stderr
    assert "\\<end_of_turn>\\<bos><end_of_turn>" in shown


def test_raw_and_full_context(demo: Path) -> None:
    full = bezel("run", demo, "Once", "--raw", "--context", 20, "--temperature", 0, ok=False)
    assert "context of 20" in full.stderr
    slid = bezel(
        "run", demo, "Once", "--raw", "--context", 20, "--temperature", 0, "--on-full", "slide", "--max-tokens", 40
    )
    assert "context full: dropped 5 tokens" in slid.stderr
    assert slid.stdout.startswith(full.stdout.rstrip("\n"))


def test_a_prompt_may_be_given_in_any_way(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Once upon", encoding="utf-8")
    rest = ("--raw", "-n", 4, "--temp", 0, "-c", 64)
    expected = bezel("run", demo, "Once upon", *rest).stdout
    assert bezel("run", demo, "Once", "upon", *rest).stdout == expected
    assert bezel("run", demo, "-p", "Once upon", *rest).stdout == expected
    assert bezel("run", demo, "-f", tmp_path / "prompt", *rest).stdout == expected
    assert bezel("run", demo, "-", *rest, stdin="Once upon").stdout == expected
    assert bezel("run", demo, *rest, stdin="Once upon").stdout == expected
    assert "give one of them" in bezel("run", demo, "Once", "-p", "upon", ok=False).stderr
    assert "PROMPT is empty" in bezel("run", demo, ok=False).stderr
    assert "PROMPT is empty" in bezel("run", demo, "-", stdin="\n", ok=False).stderr


def test_habits_from_elsewhere(demo: Path, tmp_path: Path) -> None:
    assert "Did you mean 'inspect'?" in bezel("inspct", ok=False).stderr
    assert "`bezel --help` lists them" in bezel("frobnicate", ok=False).stderr
    assert bezel("-V").stdout == bezel("--version").stdout
    module = subprocess.run([sys.executable, "-m", "bezel", "-V"], capture_output=True, text=True)
    assert module.stdout == bezel("-V").stdout
    bezel("export", DEMO, tmp_path / "out.gguf", "--quant", "Q4_0")
    bezel("run", demo, "Once", "-n", 1, "--seed", -1)
    assert "\x1b" not in bezel("run", demo, "Once", "-n", 1, "--on-full", "slide").stderr


def test_chat(demo: Path, tmp_path: Path) -> None:
    lines = [
        "Tell me a story \\",
        "of a cat.",
        "/undo",
        "/undo",
        "Tell me the story of the dog.",
        f"/save {tmp_path / 's'}",
        "/reset",
        f"/load {tmp_path / 's'}",
        f"/load {tmp_path / 'nothing'}",
        "/what",
    ]
    done = bezel("chat", demo, "--max-tokens", 6, "--seed", 1, "--show-prompt", stdin="\n".join(lines))
    assert "Tell me a story \nof a cat.<end_of_turn>" in done.stderr
    for said in ("0 exchanges left", "error: nothing to undo", "load: ", ", 1 exchange\n", "not a saved session"):
        assert said in done.stderr
    assert "/reset starts anew" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_stops_the_answer_not_the_chat(demo: Path) -> None:
    chat = subprocess.Popen(
        [*BEZEL, "chat", str(demo), "--temperature", "0.9"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
    )
    assert chat.stdin
    assert chat.stdout
    chat.stdin.write("Tell me the story of the cat.\n")
    chat.stdin.flush()
    chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    time.sleep(0.5)
    out, err = chat.communicate("/undo\n/help\n", timeout=60)
    assert chat.returncode == 0
    assert "/reset starts anew" in out
    assert "0 exchanges left" in err


def test_errors_name_what_is_wrong(tmp_path: Path, demo: Path) -> None:
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + bytes(100))
    for args, message in (
        (("run", tmp_path / "nothing.gguf", "x"), "nothing.gguf"),
        (("run", tmp_path / "zip.gguf", "x"), "zip.gguf"),
        (("run", demo, "x", "--top-p", "2"), "top_p"),
        (("run", demo, "x", "--raw", "--system", "y"), "--system"),
        (("inspect", demo, "--context", "99999"), "99999"),
        (("export", tmp_path / "nothing", tmp_path / "x.gguf"), "nothing"),
        (("export", tmp_path / "x.gguf"), "Missing argument 'OUT'"),
        (("export", DEMO, tmp_path / "x.gguf", "--quant", "int8"), "q4_0"),
        (("export", demo, tmp_path / "x", "--format", "onnx", "--quant", "q4_0"), "quantized"),
        (("export", DEMO, tmp_path / "x", "--format", "onnx", "--quant", "q4_0"), "int4"),
        (("verify", tmp_path, "--source", demo), "bezel export --format onnx"),
        (("verify", demo), "--source"),
        (("bake",), "bake"),
    ):
        assert message in bezel(*args, ok=False).stderr


def test_onnx_folder(tmp_path: Path, demo: Path) -> None:
    """All verbs on a folder, made from the GGUF file."""
    folder = tmp_path / "onnx"
    shown = bezel("export", demo, folder, "--format", "onnx").stdout
    assert "29 × int8, blocks of 32" in shown
    shown = bezel("verify", folder, "--source", demo, "--run").stdout
    assert "128 to 159" in shown
    assert "OFF" not in shown
    verified = json.loads(bezel("verify", folder, "--source", demo, "--run", "--json").stdout)
    assert {report["error"] for report in verified["tensors"]} == {0}
    assert [span["ok"] for span in verified["logits"]] == [True] * 3
    facts = json.loads(bezel("inspect", folder, "--context", 700, "--json").stdout)
    assert facts["onnx"]["operators"]["TensorScatter"] == 8
    assert facts["windows"] == [64, None, 64, None]
    assert "for onnxruntime" in bezel("inspect", folder).stdout
    run = bezel("run", folder, "Once", "--raw", "--max-tokens", 12, "--temperature", 0, "--json")
    assert json.loads(run.stdout)["tokens"] == 12
    lines = ("Tell me a story.", f"/save {tmp_path / 's'}", "/reset", f"/load {tmp_path / 's'}", "/undo")
    assert "0 exchanges left" in bezel("chat", folder, "--max-tokens", 6, stdin="\n".join(lines)).stderr
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a king who had three sons. " * 20)
    loss = bezel("measure", folder, "--reference", demo, "--text", text, "--chunk", 64, "--state", tmp_path, "--json")
    assert 0 < json.loads(loss.stdout)["candidates"][0]["metrics"]["kld_mean"]["value"] < 1e-3
    speed = bezel("bench", folder, "--context", 40, "--repeats", 1, "--save", tmp_path, "--json")
    assert json.loads(speed.stdout.splitlines()[-1])["runs"]["bezel"]["decode_tokens_per_s"]["16"] > 0
    assert "native or reference" in bezel("bench", folder, "--profile", ok=False).stderr


def test_announced_memory_of_an_onnx_folder(onnx_of: Callable[..., Path]) -> None:
    from bezel.runtime import load

    folder = onnx_of("demo", "int8")
    facts = json.loads(bezel("inspect", folder, "--context", 700, "--json").stdout)
    session = load(folder, context=700).session()
    session.prefill([2] + [300] * 699)
    assert session.engine.cache_bytes == facts["cache"]["f32"][0]["total"]


def test_demo() -> None:
    shown = bezel("demo").stdout
    assert "0: equal to the bit" in shown
    assert "Once upon a time" in shown
