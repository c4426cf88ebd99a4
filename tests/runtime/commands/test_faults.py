"""What users, files and callers may do wrong is answered by bezel's own words, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Message, load
from bezel.runtime.commands import chat as chat_command
from bezel.runtime.commands import generate
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest, InvalidSession
from bezel.runtime.files.gguf import GGUFFile
from bezel.runtime.text.chat import template_is_known
from bezel.runtime.text.sampling import Sampler, Sampling
from click.testing import CliRunner
from gguf_files import edited
from tiny import DEMO

BEZEL = [sys.executable, "-c", "from bezel.runtime.commands.main import main; main(prog_name='bezel')"]


@pytest.fixture(scope="module")
def demo(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q8_0")


def bezel(*args: object, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run([*BEZEL, *map(str, args)], input=stdin, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def apart(source: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, as a signal is for all of it."""
    source = "import signal, sys\n" + dedent(source)
    command = [sys.executable, "-X", "faulthandler", "-c", source, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def chat(demo: Path, *lines: str) -> str:
    """What a chat says beside the answers; it has to live to its end."""
    code, out, err = bezel("chat", demo, "--max-tokens", 2, "--seed", 1, stdin="\n".join([*lines, "/help"]).encode())
    assert code == 0
    assert "/reset starts anew" in out
    return err


# --- a chat outlives its commands


@pytest.mark.skipif(os.name == "nt", reason="no pipes of this kind")
def test_saving_and_loading_what_cannot_be(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_bytes(b"precious")
    os.mkfifo(tmp_path / "pipe")
    places = ["/nonexistent/x", ".", "/", "/proc/x", "~nobody/x", f"{tmp_path}/thesis", f"{tmp_path}/pipe", str(demo)]
    before = demo.read_bytes()
    said = chat(demo, "Once", *(f"/save {place}" for place in places), *(f"/load {place}" for place in places))
    assert said.count("error: ") == 2 * len(places)
    assert (tmp_path / "thesis").read_bytes() == b"precious"
    assert demo.read_bytes() == before


def test_a_session_replaces_a_session(demo: Path, tmp_path: Path) -> None:
    said = chat(demo, "Once", f"/save {tmp_path}/s", "Twice", f"/save {tmp_path}/s", f"/load {tmp_path}/s")
    assert "load: " in said
    assert "2 exchanges" in said


def test_the_home_folder_is_known(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    chat(demo, "Once", "/save ~/s")
    assert (tmp_path / "s").exists()


def test_the_unforeseen_ends_no_chat(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("so it is")

    monkeypatch.setattr(chat_command._Chat, "_answer", fail)
    done = CliRunner().invoke(main, ["chat", str(demo)], input="Once\n/help\n")
    assert "ZeroDivisionError: so it is). It is a fault of bezel; please report it" in done.output
    assert "/reset starts anew" in done.output
    assert done.exit_code == 0


def test_a_slash_that_is_no_command(demo: Path) -> None:
    said = chat(demo, "/what", "//usr/bin is where?", "/undo")
    assert "/what is no command; for a message that begins with a slash, type two" in said
    assert "0 exchanges left" in said


def test_a_line_that_goes_on_is_sent_where_input_ends(demo: Path) -> None:
    done = CliRunner().invoke(main, ["chat", str(demo), "-n", "1", "--show-prompt"], input="A story\\\nof a cat\\\n")
    assert "A story\nof a cat<end_of_turn>" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_stops_an_answer_once_and_at_once_the_second_time(demo: Path) -> None:
    done = apart(
        """
        from bezel.runtime import load
        from bezel.runtime.commands.generate import interruptible

        before = signal.getsignal(signal.SIGINT)
        with load(sys.argv[1]) as model, interruptible(model.session(), 1) as cancel:
            assert not cancel()
            signal.raise_signal(signal.SIGINT)
            assert cancel()
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                print("at once")
        assert signal.getsignal(signal.SIGINT) is before
        """,
        demo,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "at once\n", "")
    done = apart(
        """
        from bezel.runtime.commands.main import main
        from bezel.runtime.text.sampling import Sampler

        def interrupted(*args, draw=Sampler.__call__):
            signal.raise_signal(signal.SIGINT)
            return draw(*args)

        Sampler.__call__ = interrupted
        main(["run", sys.argv[1], "A story.", "--seed", "1"])
        """,
        demo,
    )
    assert (done.returncode, len(done.stdout.split()), done.stderr) == (130, 1, "")


def test_a_damaged_session(demo: Path, tmp_path: Path) -> None:
    with load(demo) as model:
        session = model.session()
        session.prefill([2, 300, 301])
        session.save(tmp_path / "s")
        raw = bytearray((tmp_path / "s").read_bytes())
        raw[-9] ^= 1
        (tmp_path / "s").write_bytes(raw)
        with pytest.raises(InvalidSession, match="checksum"):
            session.restore(tmp_path / "s")
        assert session.ids == [2, 300, 301]


# --- the funnel


def test_memory_that_torch_does_not_get_is_no_fault_of_bezel(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.importorskip("torch").empty(1 << 50)

    monkeypatch.setattr(generate, "load_model", fail)
    done = CliRunner().invoke(main, ["run", str(demo), "Once"])
    assert (done.exit_code, done.output) == (1, "Error: not enough memory for PyTorch\n")


def test_the_unforeseen_is_told_in_a_sentence(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("so it is")

    monkeypatch.setattr(generate, "load_model", fail)
    done = CliRunner().invoke(main, ["run", str(demo), "Once"])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert "ZeroDivisionError: so it is). It is a fault of bezel; please report it" in done.output
    monkeypatch.setenv("BEZEL_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(main, ["run", str(demo), "Once"]).exception, ZeroDivisionError)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_a_terminated_export_leaves_nothing(tmp_path: Path) -> None:
    done = apart(
        """
        import os
        from contextlib import nullcontext
        from bezel.export.commands import export
        from bezel.runtime.commands.main import main

        def end(done, total):
            print(*os.listdir(os.path.dirname(sys.argv[2])))
            signal.raise_signal(signal.SIGTERM)

        export.progress_bar = lambda *_: nullcontext(end)
        main(["export", *sys.argv[1:]])
        """,
        DEMO,
        tmp_path / "out.gguf",
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert "out.gguf" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_input_that_is_no_utf8(demo: Path) -> None:
    code, _, err = bezel("run", demo, "-", stdin=b"caf\xe9 au lait")
    assert code == 1
    assert "the byte 0xe9 is no UTF-8, after 'user\\ncaf'" in err
    code, out, err = bezel("chat", demo, "--max-tokens", 2, stdin=b"caf\xe9\nOnce\n")
    assert code == 0
    assert "no UTF-8" in err
    assert out.strip()


def test_output_that_takes_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = subprocess.run([*BEZEL, "run", "--help"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert b"? among the likeliest" in done.stdout


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**10])
def test_threads_that_no_machine_has(threads: int, demo: Path) -> None:
    code, _, err = bezel("run", demo, "Once", "--threads", threads)
    assert code == 1
    assert f"threads: found {threads}, expected 1 to 1024" in err


# --- files


HOSTILE = {
    "name of numbers": {"general.name": np.array([1, 2, 3], np.uint32)},
    "sources that are a number": {"bezel.provenance.source_files": 5},
    "sources of numbers": {"bezel.provenance.source_files": [1], "bezel.provenance.source_sha256": [1.0]},
    "receipt of texts": {"bezel.receipt.kld_mean": "x", "bezel.receipt.tokens": [1]},
    "stops of texts": {"bezel.generation.stop_token_ids": ["a"]},
    "sampling of texts": {"general.sampling.top_k": "many", "general.sampling.temp": [1.0]},
    "template of numbers": {"tokenizer.chat_template": 7},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_metadata_of_another_type(changes: dict[str, Any], demo: Path, tmp_path: Path) -> None:
    file = edited(demo, tmp_path / "m.gguf", changes)
    for more in ([], ["--json"]):
        code, out, err = bezel("inspect", file, *more)
        assert code == 0, err
        if more:
            json.loads(out)
    code, _, err = bezel("run", file, "Once", "--max-tokens", 1)
    assert code == 0, err


def test_texts_of_a_file_command_no_terminal(demo: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;pwned\x07\x1b[2J\x9bEVIL\rover"
    changes = {"general.name": evil, "bezel.provenance.note": evil, "bezel.receipt.kld_mean": 0.5}
    file = edited(demo, tmp_path / "m.gguf", changes | {"bezel.receipt.reference": evil})
    _, out, _ = bezel("inspect", file)
    assert out.count("EVIL") == 3
    assert not any(c in out for c in "\x1b\x07\x9b\r")


def test_what_a_file_recommends(demo: Path, tmp_path: Path) -> None:
    changes = {"general.sampling.top_k": 40.0, "general.sampling.top_p": 0.0, "general.sampling.penalty_repeat": 1.5}
    file = edited(demo, tmp_path / "m.gguf", changes)
    with load(file) as model:
        assert model.default_sampling == Sampling(top_k=40, repetition_penalty=1.5)
        none = dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "seed"))
        assert generate.sampling_of(model, {**none, "top_k": 3}) == Sampling(top_k=3, repetition_penalty=1.5)
        assert generate.sampling_of(model, {**none, "top_k": None, "seed": -1}) == model.default_sampling
    for options in ((), ("--top-p", 0.9), ("--temperature", 0)):
        code, _, err = bezel("run", file, "Once", "--max-tokens", 1, *options)
        assert code == 0
        assert "key 'general.sampling.top_p' is ignored: top_p: found 0.0, expected above 0" in err


@pytest.mark.parametrize("kv", ["f16", "int8", "f32"])
@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("blk.2.attn_k.weight", "first seen in keys or values of layer 2"),
        ("blk.2.attn_q.weight", "first seen in keys or values of layer 3"),
        ("output_norm.weight", "seen behind the last layer"),
    ],
)
def test_a_number_that_is_none_is_told_and_where(tensor: str, where: str, kv: str, demo: Path, tmp_path: Path) -> None:
    raw = bytearray(demo.read_bytes())
    with GGUFFile(demo) as file:
        at = file.info(tensor).offset
    raw[at : at + 4] = np.float32([np.nan]).tobytes() if "norm" in tensor else np.float16([np.nan, 1]).tobytes()
    (tmp_path / "m.gguf").write_bytes(raw)
    code, out, err = bezel("run", tmp_path / "m.gguf", "Once", "--raw", "--kv", kv)
    assert (code, out.strip()) == (1, "")
    assert f"gives logits that are not finite, {where}" in err
    assert ("--kv f32 helps" in err) == (kv == "f16" and "layer" in where and "last" not in where)


@pytest.mark.skipif(os.name == "nt", reason="Windows cuts no file short that is mapped")
def test_a_file_that_is_cut_short_while_it_is_used(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo, tmp_path / "m.gguf")
    chat = subprocess.Popen(
        [*BEZEL, "chat", tmp_path / "m.gguf", "--max-tokens", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"Once\n")
    chat.stdin.flush()
    chat.stdout.readline()
    os.truncate(tmp_path / "m.gguf", 4096)
    _, err = chat.communicate(b"Twice\n", timeout=60)
    assert chat.returncode == 1
    assert b"Error: a model file was cut short or changed by another program while it was in use" in err


def test_templates_are_looked_at_once() -> None:
    """Each of these took a time that grew with the square of its length: minutes."""
    for text in ("%}" + "\n" * 1_000_000, "\n" * 1_000_000 + "x", "%}" * 300_000 + " " * 300_000):
        assert not template_is_known(text)


# --- callers


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.generate(b"Once"), "prompt: found bytes"),
        (lambda m: m.generate([1.5, 2.0]), "prompt: found float, expected"),
        (lambda m: m.generate([2, "a"]), "prompt: found int, str, expected"),
        (lambda m: m.generate([True]), "prompt: found bool"),
        (lambda m: m.generate([]), "prompt: found nothing"),
        (lambda m: m.generate(None), "prompt: found NoneType"),
        (lambda m: m.generate(5.0), "prompt: found float"),
        (lambda m: m.generate("Once", stop="end"), "stop: found 'end', expected a list"),
        (lambda m: m.generate("Once", stop=[1]), "stop: found"),
        (lambda m: m.generate("Once", max_tokens=-1), "max_tokens: found -1"),
        (lambda m: m.generate("Once", max_tokens=2.0), "max_tokens: found 2.0"),
        (lambda m: m.session().rewind(1.5), "rewind: found float 1.5"),
        (lambda m: m.session().prefill([1.5]), "token ids: found float64"),
        (lambda m: m.session().prefill(["a"]), "token ids: found"),
        (lambda m: m.tokenizer.encode(b"Once"), "text: found bytes"),
        (lambda m: m.generate("Once", sampling=0.5), "sampling: found float 0.5, expected a Sampling"),
        (lambda m: m.generate("Once", stop=5), "stop: found 5, expected a list"),
        (lambda _: Message("user", 5), "message: content: found int 5, expected text"),
        (lambda _: load(["a"]), "path: found list"),
        (lambda _: load("a\0b"), "path: found str"),
        (lambda _: load(DEMO, context="long"), "context: found str 'long', expected a whole number"),
        (lambda _: load(DEMO, threads=1.5), "threads: found float 1.5"),
        (lambda _: load(DEMO, engine=["native"]), "engine: found"),
        (lambda m: load(m.file.path, kv=8), "kv: found int 8"),
        (lambda m: m.session().save(5), "path: found int 5"),
        (lambda m: m.session().restore(None), "path: found NoneType None"),
        (lambda m: m.session().go_to(["a"]), "token ids: found str 'a'"),
        (lambda m: m.tokenizer.decode([1.5]), "token ids: found float 1.5"),
        (lambda m: m.tokenizer.decode("abc"), "token ids: found str 'abc'"),
        (lambda _: Sampling(temperature="hot"), "temperature: found 'hot', expected a number"),
        (lambda _: Sampling(top_k=1.5), "top_k: found 1.5, expected a whole number"),
        (lambda _: Sampling(temperature=float("nan")), "temperature: found nan"),
        (lambda _: Sampling(seed=1.5), "seed: found 1.5, expected a whole number"),
    ],
)
def test_misuse_is_answered(call: Callable[[Any], Any], said: str, demo: Path) -> None:
    with load(demo) as model, pytest.raises(InvalidRequest, match=said):
        call(model)


@pytest.mark.parametrize("sampling", [Sampling(temperature=5e-324), Sampling(repetition_penalty=1e-300)])
def test_extreme_sampling_gives_sound_tokens(sampling: Sampling) -> None:
    logits = np.float32([-3, 2, 80, 79, 0])
    with np.errstate(all="raise", under="ignore"):
        assert Sampler(sampling)(logits, [1, 2]) in (1, 2)


# --- what a chat is for


def test_commands_of_a_chat(demo: Path, tmp_path: Path) -> None:
    saved = tmp_path / "s"
    lines = [
        '"""',
        "A story",
        "of a cat.",
        '"""',
        "/regenerate",
        f"/save {saved}",
        "/context",
        "/system Be brief.",
        "/context",
        "/system",
        "A song.",
        "/regenerate",
        f"/load {saved}",
        "/bye",
        "never said",
    ]
    options = ["chat", str(demo), "-n", "4", "--seed", "1", "--show-prompt"]
    done = CliRunner().invoke(main, options, input="\n".join(lines))
    assert done.exit_code == 0
    said = done.stderr
    assert said.count("<start_of_turn>user\nA story\nof a cat.<end_of_turn>") == 2
    assert said.count("<start_of_turn>user\nBe brief.\n\nA song.<end_of_turn>") == 2
    assert "of 2048 tokens (1%), 1 exchange; keys and values take" in said
    assert "0 of 2048 tokens (0%), 0 exchanges" in said
    assert "instructions: Be brief." in said
    assert "> A story\nof a cat.\n" in said  # of what is loaded, the transcript
    assert "never said" not in said


def test_a_loaded_chat_keeps_its_instructions(demo: Path, tmp_path: Path) -> None:
    lines = ["/system Be brief.", "A story.", f"/save {tmp_path}/s", "/bye"]
    options = ["chat", str(demo), "-n", "4", "--seed", "1", "--show-prompt"]
    assert CliRunner().invoke(main, options, input="\n".join(lines)).exit_code == 0
    lines = [f"/load {tmp_path}/s", "/system", "/undo", "A song.", "/reset", "A poem."]
    said = CliRunner().invoke(main, options, input="\n".join(lines)).stderr
    assert "\ninstructions: Be brief.\n> A story.\n" in said  # the transcript
    assert said.count("instructions: Be brief.\n") == 2
    assert "a new chat\n" in said
    for text in ("A song.", "A poem."):
        assert f"<start_of_turn>user\nBe brief.\n\n{text}<end_of_turn>" in said


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"""A story', "of a cat.", 'and a dog."""', "/bye"], "A story\nof a cat.\nand a dog."),
        (['"""', "/undo", '"""', "/bye"], "/undo"),
        (['"""A "quoted" story."""', "/bye"], 'A "quoted" story.'),
        (['A story """of', "/bye"], 'A story """of'),
    ],
)
def test_quoted_messages(lines: list[str], message: str, demo: Path) -> None:
    done = CliRunner().invoke(main, ["chat", str(demo), "-n", "1", "--show-prompt"], input="\n".join(lines))
    assert f"<start_of_turn>user\n{message}<end_of_turn>" in done.stderr


@pytest.mark.parametrize("pasted", ['"""Doc."""\ndef f(): pass', "/* one */\nint main() {}", "// two\nint main() {}"])
def test_what_is_pasted_is_one_message(pasted: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As readline gives it: in one."""
    lines = iter([pasted, "/bye"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    done = CliRunner().invoke(main, ["chat", str(demo), "-n", "1", "--show-prompt"])
    assert f"<start_of_turn>user\n{pasted}<end_of_turn>" in done.stderr


def test_half_a_quoted_message_is_not_sent(demo: Path) -> None:
    done = CliRunner().invoke(main, ["chat", str(demo), "-n", "1", "--show-prompt"], input='"""A story\n')
    assert "<start_of_turn>" not in done.stderr
    assert 'not sent, for no """ ended it: A story' in done.stderr


def test_a_new_answer_is_another_one_and_its_failure_loses_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "system")), "seed": 1}
    with load(demo) as model:
        talk = chat_command._Chat(model, {**options, "on_full": "error", "max_tokens": 20, "show_prompt": False})
        talk.take("A story.")
        session = talk._conversation.session
        first = list(session.ids)
        talk.take("/regenerate")
        second = list(session.ids)
        assert second != first
        assert second[: len(model.prompt_ids("A story."))] == model.prompt_ids("A story.")

        def fail(*_: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(Sampler, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            talk.take("/regenerate")
        assert session.ids == second


def test_lines_are_broken_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    out = chat_command._Wrapped()
    out._width = 10
    for piece in ("The ki", "ng went in", "to the\nwoods, ", "incomprehensibly"):
        out.write(piece)
    out.end()
    assert capsys.readouterr().out == "The king \nwent into \nthe\nwoods, \nincomprehe\nnsibly\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_anywhere_ends_no_chat(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("take", "_load", "_answer"):
        with monkeypatch.context() as patch:
            patch.setattr(chat_command._Chat, place, interrupted)
            done = CliRunner().invoke(main, ["chat", str(demo), "-n", "2"], input=f"A story.\n/load {tmp_path}/s\n")
        assert (done.exit_code, "stopped" in done.stderr) == (0, True)


def test_a_slide_that_does_not_help_is_not_announced(demo: Path) -> None:
    text, options = "A story.\n" + "A story. " * 60, ["-n", "4", "-c", "100", "--on-full", "slide"]
    done = CliRunner().invoke(main, ["chat", str(demo), *options], input=text)
    assert "this exchange alone fills the context" in done.stderr
    assert "dropped the oldest" not in done.stderr
    assert "--on-full slide does" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such shell")
@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["run", "chat"])
def test_what_is_closed_is_no_fault_of_bezel(command: str, closed: str, demo: Path) -> None:
    words = f"{command} {demo}" + (" Once -n 2" if command == "run" else "")
    code = "from bezel.runtime.commands.main import main; main()"
    shell = f"{sys.executable} -c '{code}' {words} {closed}"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert "should not have happened" not in done.stderr
    assert "Traceback" not in done.stderr


def test_names_command_no_terminal(demo: Path, tmp_path: Path) -> None:
    file = edited(demo, tmp_path / "m\x1b[31m.gguf", {"general.architecture": "a\x1b]0;EVIL\x07b"})
    done = CliRunner().invoke(main, ["run", str(file), "Once"])
    assert done.exit_code == 1
    assert not {"\x1b", "\x07"} & set(done.output)
