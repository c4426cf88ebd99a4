"""The command `bezel chat`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BezelError, ContextFull, InvalidRequest
from ..files.user_cache import cache_folder
from .console import printable, unforeseen
from .generate import generation_options, interruptible, load_model, look_at_pictures, note, sampling_of, show_prompt
from .model_path import MODEL

if TYPE_CHECKING:
    from ..api import Model
    from ..text.chat import Content
    from ..text.generation import Generation
    from ..text.sampling import Sampling
    from ..vision.image import Image

_HELP = """\
/image FILE shows a picture with the next message, /image alone takes back those that wait for it; /undo takes back the
last exchange, /regenerate answers it anew, /reset starts anew, /system TEXT as well, with TEXT for instructions;
/save FILE and /load FILE keep and bring back the chat, /context tells how full it is, /bye (or Ctrl-D) leaves. A line
that ends in a backslash goes on in the next; between \"\"\" and \"\"\" there may be any number of them, and what is
pasted is one message. Ctrl-C stops an answer.""".replace("\n", " ")

_QUOTES = '"""'


@click.command()
@click.argument("model", type=MODEL)
@generation_options
def chat(model: Path, **options: Any) -> None:
    """Talk with MODEL: a GGUF file, an exported ONNX folder, or a name that `bezel list` shows.

    \b
    /image FILE   shows a picture with the next message; /image takes back those that wait
    /undo         takes back the last exchange
    /regenerate   answers it anew
    /reset        starts anew
    /system TEXT  starts anew with other instructions
    /save FILE    keeps the chat, /load FILE brings it back
    /context      tells how full the context is
    /bye          leaves, as Ctrl-D does; Ctrl-C stops an answer

    \b
    Examples:
      bezel chat gemma.gguf
      bezel chat gemma.gguf --system "Answer like a pirate." --on-full slide
    """
    loaded = load_model(model, options)
    if not loaded.is_chat_model:
        raise InvalidRequest(f"{model}: has no chat template; use `bezel run --raw` to continue a text with it")
    talk = _Chat(loaded, options)
    if sys.stdin.isatty():
        _line_editing()
        click.echo(printable(f"{loaded.name}, context {loaded.context}. /help shows the commands."))
    for text, is_quoted in _messages():
        try:
            if not talk.take(text, is_quoted):
                return
        except KeyboardInterrupt:
            note("stopped")
        except ContextFull as error:
            itself = ", as --on-full slide does by itself" if options["on_full"] == "error" else ""
            note(f"error: {error}; /undo or /reset makes room{itself}")
        except (BezelError, OSError, MemoryError) as error:
            note(f"error: {error}")
        except Exception as error:  # whatever it is, the chat goes on
            note(f"error: {unforeseen(error)}")


class _Chat:
    """A conversation, and what its user types."""

    def __init__(self, model: Model, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._sampling, self._again = sampling_of(model, options), 0
        self._out: _Wrapped | None = None  # of the answer that is being written
        self._begin(options["system"])

    def _begin(self, system: str | None) -> None:
        self._images: list[Image] = []  # that go with the next message
        slide = self._options["on_full"] == "slide"
        self._conversation = self._model.conversation(system, slide=slide, announce=self._announce)

    def _announce(self, text: str) -> None:
        """Say something while an answer is written, on a line of its own."""
        if self._out is not None:
            self._out.fresh_line()
        note(text)

    def take(self, text: str, is_quoted: bool = False) -> bool:
        """A message, or a command, which what is quoted is not; False where it is the last."""
        command, _, argument = text.strip().partition(" ")
        argument = argument.strip()
        if is_quoted:
            self._send(text)
        elif not command.startswith("/") or command.startswith("//"):
            self._send(text.removeprefix("/"))
        elif command == "/image" and argument:
            self._show(argument)
        elif command == "/image":
            self._take_back()
        elif command == "/reset":
            self._begin(self._conversation.system)
            note("a new chat")
        elif command == "/system":
            self._set_system(argument)
        elif command == "/undo":
            self._conversation.undo()
            note(f"{self._exchanges()} left")
        elif command == "/regenerate":
            self._regenerate()
        elif command == "/context":
            self._tell_context()
        elif command == "/save" and argument:
            self._conversation.save(Path(argument).expanduser())
            note(f"save: {argument}, {self._exchanges()}")
        elif command == "/load" and argument:
            self._load(Path(argument).expanduser())
        elif command in ("/bye", "/exit", "/quit"):
            return False
        else:
            if command not in ("/help", "/save", "/load"):
                note(f"{command} is no command; for a message that begins with a slash, type two")
            _tell(_HELP)
        return True

    def _show(self, argument: str) -> None:
        """Take a picture, whose path may be quoted, as terminals write one that is dropped."""
        from ..text.chat import Message
        from ..vision.image import Image

        quoted = len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\""
        path = Path(argument[1:-1] if quoted else argument.replace("\\ ", " ")).expanduser()
        image = Image(path, self._options["pan_and_scan"])
        self._model.eye_for([Message("user", [image])])  # or that is said now
        self._images.append(image)
        width, height = image.size
        note(f"image: {image.name}, {width} × {height}; it goes with your next message")

    def _take_back(self) -> None:
        """Show none of the pictures that wait for the next message."""
        names = ", ".join(image.name for image in self._images)
        self._images = []
        note(f"taken back: {names}" if names else "no picture waits; /image FILE shows one with your next message")

    def _send(self, text: str) -> None:
        images, self._images = self._images, []
        try:
            self._answer([*images, text] if images else text, self._sampling)
        except BaseException:
            self._images = images + self._images
            raise

    def _set_system(self, text: str) -> None:
        if not text:
            note(f"instructions: {self._conversation.system or 'none'}")
            return
        self._begin(text)
        note("a new chat with these instructions")

    def _regenerate(self) -> None:
        conversation = self._conversation
        content, before = conversation.last_message(), list(conversation.session.ids)
        conversation.undo()
        seed = self._sampling.seed
        if seed is not None:  # the same one would give the same answer
            self._again += 1
            seed += self._again
        try:
            self._answer(content, replace(self._sampling, seed=seed))
        except BaseException:
            conversation.session.go_to(before)
            raise

    def _load(self, path: Path) -> None:
        self._conversation.restore(path)
        note(f"load: {path}, {self._exchanges()}")
        marks = {"user": "> ", "system": "instructions: "}
        for message in self._conversation.messages():
            shown = "".join(part if isinstance(part, str) else f"[{part.name}] " for part in message.parts)
            note(f"{marks.get(message.role, '')}{shown}")

    def _tell_context(self) -> None:
        session = self._conversation.session
        share = session.position / self._model.context
        note(
            f"{session.position} of {self._model.context} tokens ({share:.0%}), {self._exchanges()}; keys and values "
            f"take {session.engine.cache_bytes / 1e6:.1f} MB"
        )

    def _exchanges(self) -> str:
        n = self._conversation.turns()
        return "1 exchange" if n == 1 else f"{n} exchanges"

    def _answer(self, content: Content, sampling: Sampling) -> None:
        conversation, session = self._conversation, self._conversation.session
        prompt = conversation.prompt_ids(content)
        show_prompt(self._model, prompt, self._options)
        look_at_pictures(self._model, prompt)
        self._out = out = _Wrapped()
        began = first = time.perf_counter()
        with interruptible(session, session.position + len(prompt)) as cancel:
            generation: Generation = conversation.ask(content, sampling, self._options["max_tokens"], cancel)
            try:
                for piece in generation:
                    first = time.perf_counter() if first == began else first
                    out.write(piece)
            finally:
                out.end()
                self._out = None
        if generation.finish == "cancelled":
            note("stopped")
        elif sys.stdin.isatty() and len(generation.ids) > 1:
            speed = (len(generation.ids) - 1) / (time.perf_counter() - first)
            used = f"{session.position} of {self._model.context} tokens"
            note(f"{speed:.1f} tokens/s, first after {first - began:.1f} s; {used}")


class _Wrapped:
    """Text on the terminal, with lines broken between words; elsewhere as it is."""

    def __init__(self) -> None:
        self._width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        self._column, self._word = 0, ""

    def write(self, text: str) -> None:
        if not self._width:
            self._put(text)
            return
        for character in text:
            if character in " \n":
                self._put_word()
                self._put(character)
            else:
                self._word += character
                if len(self._word) >= self._width:
                    self._put_word()
        sys.stdout.flush()

    def _put_word(self) -> None:
        if self._word and self._column and self._column + len(self._word) > self._width:
            self._put("\n")
        self._put(self._word)
        self._word = ""

    def _put(self, text: str) -> None:
        click.echo(text, nl=False)
        _, newline, last = text.rpartition("\n")
        self._column = len(last) + (0 if newline else self._column)

    def fresh_line(self) -> None:
        """Have what comes next begin a line."""
        if self._column:
            self._put("\n")

    def end(self) -> None:
        self._put_word()
        self._put("\n")


def _tell(text: str) -> None:
    out = _Wrapped()
    out.write(text)
    out.end()


def _line_editing() -> None:
    """Editing, history that is kept between runs, and pasting of several lines as one message."""
    with suppress(ImportError):  # Windows has none
        import atexit
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
        with suppress(OSError):
            history = cache_folder() / "history"
            history.touch(0o600)
            readline.read_history_file(history)
            readline.set_history_length(1000)
            atexit.register(_save_history, history)


def _save_history(path: Path) -> None:
    import readline

    with suppress(OSError):
        readline.write_history_file(path)


def _messages() -> Iterator[tuple[str, bool]]:
    """What the user types, until end of input, and whether it was quoted, or several lines that were pasted.

    Ctrl-C at the prompt drops what was begun.
    """
    text, quoted = "", False
    while True:
        prompt = ("... " if text or quoted else "> ") if sys.stdin.isatty() else ""
        try:
            line = input(prompt)
        except EOFError:
            if quoted:
                note(f"not sent, for no {_QUOTES} ended it: {text.strip()[:60]}")
            elif text.strip():
                yield text, False
            return
        except KeyboardInterrupt:
            click.echo()
            text, quoted = "", False
            continue
        if "\n" in line and not text and not quoted:
            yield line, True
            continue
        begins = not text and not quoted and line.lstrip().startswith(_QUOTES)
        if begins:
            line = line.lstrip().removeprefix(_QUOTES)
        is_quoted = begins or quoted
        if is_quoted:
            quoted = not line.rstrip().endswith(_QUOTES)
            text += f"{line}\n" if quoted else line.rstrip().removesuffix(_QUOTES)
            if quoted:
                continue
        elif line.endswith("\\"):
            text += line[:-1] + "\n"
            continue
        else:
            text += line
        if text.strip():
            yield text.strip("\n"), is_quoted
        text = ""
