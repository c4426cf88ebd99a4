"""The command `bezel`. Verbs are found by name when they are called, so that each loads only what it uses."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from .. import _native
from ..errors import BezelError
from .console import printable, unforeseen

# Verb → its module and the line that `bezel --help` shows, which is so known without importing the module.
_VERBS = {
    "pull": ("bezel.export.commands.pull", "Fetch a model from the Hugging Face Hub."),
    "list": ("bezel.runtime.commands.models", "List the models that can be given by name."),
    "rm": ("bezel.runtime.commands.models", "Remove models from the models folder."),
    "export": ("bezel.export.commands.export", "Convert a checkpoint to a GGUF file or an ONNX folder."),
    "calibrate": ("bezel.export.commands.calibrate", "Gather what a text sends through a model, for export."),
    "write": ("bezel.runtime.commands.write", "Let a model write texts from nothing, to calibrate on."),
    "run": ("bezel.runtime.commands.generate", "Answer one prompt, or continue a text."),
    "chat": ("bezel.runtime.commands.chat", "Talk with a model."),
    "serve": ("bezel.runtime.commands.serve", "Serve models to OpenAI's clients, and a page to chat with."),
    "inspect": ("bezel.runtime.commands.inspect", "Show what a model file holds and how much memory it takes."),
    "verify": ("bezel.bench.commands.verify", "Compare a model, and what it computes, with what it came from."),
    "bench": ("bezel.bench.commands.bench", "Measure speed and memory, next to llama.cpp if asked."),
    "measure": ("bezel.bench.commands.measure", "Measure what quantization cost, against a reference."),
    "sensitivity": ("bezel.bench.commands.sensitivity", "Measure which tensors suffer from quantization, for export."),
    "stress": ("bezel.bench.commands.stress", "Measure what quantization costs where texts are odd."),
    "tasks": ("bezel.bench.commands.tasks", "Answer multiple-choice questions, and compare models by them."),
    "demo": ("bezel.bench.commands.demo", "Do it all on the bundled model, in under a minute."),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _VERBS:
            return None
        found = vars(import_module(_VERBS[cmd_name][0])).values()
        return next(item for item in found if isinstance(item, click.Command) and item.name == cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            close = get_close_matches(args[0], _VERBS, 1)
            meant = f" Did you mean {close[0]!r}?" if close else " `bezel --help` lists them."
            raise click.UsageError(f"{printable(args[0])!r} is no command.{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in _VERBS.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by who called
                setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        # What is no UTF-8 comes in as lone surrogates, which the tokenizer refuses, and goes out as question marks.
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors=errors)
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _end)
            if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal is gone
                signal.signal(signal.SIGHUP, _end)
        _native.explain_bus_errors()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BezelError as error:
            raise click.ClickException(printable(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has left: click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(printable(f"{where}{error.strerror or error}")) from error
        except MemoryError as error:
            raise click.ClickException(f"not enough memory: {error}") from error
        except (click.exceptions.Exit, click.exceptions.Abort, click.ClickException):
            raise
        except Exception as error:
            if "BEZEL_TRACEBACK" in os.environ:
                raise
            if "DefaultCPUAllocator" in str(error):  # what torch says instead of a MemoryError
                raise click.ClickException("not enough memory for PyTorch") from error
            raise click.ClickException(printable(unforeseen(error))) from error


def _end(signal_number: int, _: object) -> NoReturn:
    """SIGTERM ends the program as Ctrl-C would: what is half written goes."""
    sys.exit(128 + signal_number)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="bezel-lm", prog_name="bezel")
def main() -> None:
    """Run Gemma on this computer, offline, from one file.

    \b
    Examples:
      bezel demo
      bezel pull google/gemma-3-1b-it
      bezel export gemma-2-2b-it/ gemma.gguf --quant q4_0
      bezel run gemma.gguf "Why is the sky blue?"
    """
