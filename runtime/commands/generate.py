"""The command `bezel run`, and what it shares with `bezel chat`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import InvalidRequest
from ..files.strict_json import parse_json
from .console import CLEARED, printable
from .model_path import MODEL, vision_option

if TYPE_CHECKING:
    from ..api import Model
    from ..session import Session
    from ..text.chat import Content
    from ..text.grammar import Grammar
    from ..text.sampling import Sampling

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = [
    click.option(
        "--temperature", "--temp", type=float, help="0 always takes the likeliest token.  [default: MODEL's, or 1.0]"
    ),
    click.option("--top-k", type=int, help="Choose among the k likeliest tokens; 0 is off.  [default: MODEL's, or 64]"),
    click.option(
        "--top-p", type=float, help="… among the likeliest that reach p together.  [default: MODEL's, or 0.95]"
    ),
    click.option(
        "--min-p", type=float, help="… among those with p times the best one's chance.  [default: MODEL's, or 0]"
    ),
    click.option("--repetition-penalty", type=float, help="Above 1 discourages repeating.  [default: MODEL's, or 1.0]"),
    click.option("--seed", type=int, help="Same seed, same text; -1 is another one each time."),
    click.option("--max-tokens", "-n", type=click.IntRange(min=1), help="Stop after this many tokens."),
    click.option("--context", "-c", type=int, help="Most tokens to hold.  [default: what the model was made for]"),
    click.option(
        "--kv",
        type=click.Choice(["f32", "f16", "int8"]),
        help="How keys and values are kept. int8 takes half the memory of f16 and is faster in long contexts; on "
        "Gemma 3 270M it costs 6e-4 nats a token, f16 3e-7.  [default: f16; with ort the export's]",
    ),
    click.option("--threads", type=int, help="Threads to compute with.  [default: the performance cores]"),
    click.option(
        "--engine",
        type=click.Choice(["native", "ort", "reference"]),
        help="The C++ kernels (for GGUF), onnxruntime (for ONNX), or NumPy in float32: slow, and what the others are "
        "tested against.  [default: native or ort, as MODEL needs]",
    ),
    click.option(
        "--activations",
        type=click.Choice(["int8", "f32"]),
        default="int8",
        show_default=True,
        help="What is multiplied with quantized weights; f32 is slow, for measuring.",
    ),
    vision_option,
    click.option(
        "--pan-and-scan",
        is_flag=True,
        help="Show parts of long or tall pictures, too, up to four, so that Gemma 3 sees what is small in them. Each "
        "takes as much of the context as a picture.",
    ),
    click.option("--system", help="Text that opens the first user turn."),
    click.option(
        "--on-full",
        type=click.Choice(["error", "slide"]),
        default="error",
        show_default=True,
        help="When the context is full: stop with an error, or drop what is oldest and say so.",
    ),
    click.option("--show-prompt", is_flag=True, help="Print what the model really sees."),
]


def generation_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("model", type=MODEL)
@click.argument("words", nargs=-1, metavar="[PROMPT]")
@click.option("--prompt", "-p", help="The prompt, instead of words of their own.")
@click.option(
    "--file",
    "-f",
    "prompt_file",
    type=click.Path(path_type=Path),
    help="The prompt from a file.",
)
@click.option(
    "--image",
    "-i",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A picture that the prompt is about; {} in the prompt says where it belongs, else it comes first. May be "
    "given several times.",
)
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text instead of answering it in a chat.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Answer with JSON that this file, a JSON schema, describes.",
)
@click.option("--regex", help="Answer with text that this regular expression matches as a whole.")
@click.option("--stop", multiple=True, help="Stop before this text. May be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print text, token counts and times as JSON, at the end.")
@generation_options
def run(
    model: Path,
    words: tuple[str, ...],
    prompt: str | None,
    prompt_file: Path | None,
    images: tuple[Path, ...],
    raw: bool,
    json_schema: Path | None,
    regex: str | None,
    stop: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with MODEL: a GGUF file, an exported ONNX folder, or a name that `bezel list` shows.

    A PROMPT of - is read from standard input. A model without a chat template continues PROMPT as plain text. Ctrl-C
    stops the answer.

    \b
    Examples:
      bezel run gemma.gguf "Write a limerick about a llama."
      bezel run google/gemma-3-1b-it "Write a limerick about a llama."
      bezel run gemma.gguf --raw "Once upon a time" --max-tokens 200 --seed 1
      cat report.txt | bezel run gemma.gguf - --system "Summarise this text."
      bezel run gemma.gguf "Who wrote Faust?" --json-schema person.json
      bezel run gemma-3-4b-it.gguf "What is this?" --image cat.jpg
      bezel run gemma-3-4b-it.gguf "First {}, then {}: what changed?" --image before.png --image after.png
    """
    text = _prompt(words, prompt, prompt_file)
    loaded = load_model(model, options)
    ids = _prompt_ids(loaded, text, images, raw, options)
    show_prompt(loaded, ids, options)
    form = _form(loaded, json_schema, regex)
    answer = _answer(loaded, ids, form, stop, options, silent=as_json)
    if as_json:
        click.echo(json.dumps(asdict(answer), ensure_ascii=False))
    elif form and answer.finish == "length":
        note(f"cut off after {answer.tokens} tokens, before the form was complete: --max-tokens or --context")
    if answer.finish == "cancelled":
        raise SystemExit(130)


@dataclass(frozen=True)
class _Answer:
    """What `--json` prints."""

    text: str
    finish: str | None
    prompt_tokens: int
    tokens: int
    seconds_to_first_token: float
    seconds: float


def _answer(
    model: Model, ids: list[int], form: Grammar | None, stop: tuple[str, ...], options: dict[str, Any], silent: bool
) -> _Answer:
    """Answer a prompt, and unless `silent` print the answer as it is written."""
    from ..text.conversation import keep_prompt
    from ..text.generation import Generation

    session = model.session()
    make_room = keep_prompt(len(ids), model, note) if options["on_full"] == "slide" else None
    started, first, pieces = time.perf_counter(), None, []
    try:
        look_at_pictures(model, ids)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    with interruptible(session, len(ids)) as cancel:
        generation = Generation(
            session,
            ids,
            sampling_of(model, options),
            max_tokens=options["max_tokens"],
            stop=stop,
            make_room=make_room,
            cancel=cancel,
            constraint=form.constraint() if form else None,
        )
        try:
            for piece in generation:
                first = first or time.perf_counter()
                pieces.append(piece)
                if not silent:
                    click.echo(piece, nl=False)
        finally:
            if not silent:
                click.echo()
    ended = time.perf_counter()
    return _Answer(
        text="".join(pieces),
        finish=generation.finish,
        prompt_tokens=len(ids),
        tokens=len(generation.ids),
        seconds_to_first_token=(first or ended) - started,
        seconds=ended - started,
    )


def _prompt_ids(model: Model, text: str, images: tuple[Path, ...], raw: bool, options: dict[str, Any]) -> list[int]:
    """What the model sees of a prompt, its pictures and the system text."""
    from ..text.chat import Message

    system = options["system"]
    if system and (raw or not model.is_chat_model):
        raise InvalidRequest("--system needs a chat, and this is plain text; put it into the prompt")
    content = _with_images(text, images, options["pan_and_scan"])
    return model.prompt_ids([Message("system", system), Message("user", content)] if system else content, raw or None)


def _form(model: Model, schema: Path | None, regex: str | None) -> Grammar | None:
    """What an answer must look like."""
    if schema is not None and regex is not None:
        raise click.UsageError("--json-schema and --regex: give one of them.")
    if schema is not None:
        reason = f"{schema}: expected a JSON schema, an object"
        return model.grammars.json_schema(
            parse_json(schema.read_bytes(), lambda why: InvalidRequest(f"{reason}: {why}"))
        )
    return None if regex is None else model.grammars.regex(regex)


def _prompt(words: tuple[str, ...], prompt: str | None, file: Path | None) -> str:
    """What was said in one of these ways, or comes from standard input."""
    if bool(words) + (prompt is not None) + (file is not None) > 1:
        raise click.UsageError("PROMPT, --prompt and --file: give one of them.")
    if file is not None:
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    elif words and words != ("-",):
        text = " ".join(words)
    elif prompt is not None:
        text = prompt
    elif words or not sys.stdin.isatty():
        text = sys.stdin.read()
    else:
        raise click.UsageError("PROMPT is missing; - reads it from standard input.")
    if not text.strip():
        raise click.UsageError("PROMPT is empty.")
    return text


def _with_images(text: str, paths: tuple[Path, ...], pan_and_scan: bool) -> Content:
    """The prompt with its pictures in their places."""
    if not paths:
        return text
    from ..vision.image import Image

    places = text.count("{}")
    if places not in (0, len(paths)):
        raise click.UsageError(f"the prompt has {{}} {places} times, and --image is given {len(paths)} times.")
    images = [Image(path, pan_and_scan) for path in paths]
    if not places:
        return [*images, text]
    first, *others = text.split("{}")
    return [first, *(part for pair in zip(images, others, strict=True) for part in pair)]


def look_at_pictures(model: Model, ids: list[int]) -> None:
    """Compute what the model makes of the pictures in a prompt, which takes a while, and say so on a terminal."""
    import numpy as np

    for picture in model.eye.pictures(np.array(ids, np.int64)) if model.eye else ():
        tells = sys.stderr.isatty() and not picture.is_seen
        if tells:
            click.echo(f"{CLEARED}looking at {printable(picture.name)}", nl=False, err=True)
        try:
            picture.see()
        finally:
            if tells:
                click.echo(CLEARED, nl=False, err=True)


def load_model(path: Path, options: dict[str, Any]) -> Model:
    from ..api import load
    from ..text.chat import template_is_known

    names = ("engine", "context", "kv", "threads", "activations", "vision")
    model = load(path, **{name: options[name] for name in names})
    if model.is_chat_model and not template_is_known(model.chat_template):
        note(f"warning: {path} has a chat template that is not one of Gemma's; Gemma's own format is used instead")
    return model


def sampling_of(model: Model, options: dict[str, Any]) -> Sampling:
    from ..text.sampling import Sampling, read_sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    chosen = {n: options[n] for n in names if options[n] is not None}
    if chosen.get("seed") == -1:
        del chosen["seed"]
    stored, complaints = read_sampling(model.file.metadata)
    for complaint in complaints:
        note(f"warning: {model.file.path}: {complaint}")
    return Sampling(**{**stored, **chosen})


def show_prompt(model: Model, ids: list[int], options: dict[str, Any]) -> None:
    if options["show_prompt"]:
        from ..text.chat import show

        click.echo(show(model.tokenizer, ids), err=True)


def note(text: str) -> None:
    """Say something beside the answer; on a terminal, with lines broken between words."""
    text = printable(text)
    if sys.stderr.isatty():
        fill = TextWrapper(shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False).fill
        text = "\n".join(map(fill, text.split("\n")))
    click.echo(text if "NO_COLOR" in os.environ else click.style(text, dim=True), err=True)


@contextmanager
def interruptible(session: Session, n_prompt: int) -> Iterator[Callable[[], bool]]:
    """A `cancel` that turns true on Ctrl-C; a second Ctrl-C interrupts at once. Shows a long prompt's progress."""
    pressed = False
    long_prompt = sys.stderr.isatty() and n_prompt - session.position > session.engine.chunk

    def on_interrupt(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def cancel() -> bool:
        nonlocal long_prompt
        if long_prompt:
            long_prompt = session.position < n_prompt
            line = f"reading the prompt: {session.position} of {n_prompt} tokens" if long_prompt else ""
            click.echo(f"{CLEARED}{line}", nl=False, err=True)
        return pressed

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, previous)
