"""The command `bezel serve`."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import InvalidRequest
from .model_path import MODEL_SPEC, vision_option

_DRAIN_SECONDS = 30.0  # in which answers on their way may end
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size(context: click.Context, param: click.Parameter, text: str) -> int:  # noqa: ARG001
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"found {text!r}, expected a size such as 500M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=MODEL_SPEC)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; any but this computer needs a key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="BEZEL_API_KEY", help="What clients must know.  [env: BEZEL_API_KEY]")
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="A site whose pages may call the server.")
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=8, show_default=True, help="Answers at a time; others wait."
)
@click.option(
    "--cache-ram",
    default="1G",
    callback=_size,
    show_default=True,
    help="Memory for what was read, each model's: prompts that begin alike are not read again.",
)
@click.option(
    "--cache-dir",
    "cache_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for it between runs, written after 30 seconds without work and at the end; it takes as much there.",
)
@click.option("--context", "-c", type=int, help="Most tokens of an answer and its prompt.  [default: the model's]")
@click.option("--kv", type=click.Choice(["f32", "f16", "int8"]), help="How keys and values are kept.  [default: f16]")
@click.option("--threads", type=int, help="Threads to compute with.  [default: the performance cores]")
@click.option(
    "--activations", type=click.Choice(["int8", "f32"]), default="int8", show_default=True, help="See `bezel run`."
)
@vision_option
def serve(
    models: Sequence[str],
    host: str,
    port: int,
    api_key: str | None,
    origins: Sequence[str],
    parallel: int,
    cache_ram: int,
    cache_folder: Path | None,
    **options: Any,
) -> None:
    """Serve MODELs to OpenAI's clients, and a page to chat with at /.

    A model is a GGUF file, a name that `bezel list` shows, or NAME=FILE; the first is loaded at once, others when they
    are asked for. An answer does not depend on who else is being served: it is the one that `bezel run` gives, to the
    bit.

    \b
    Examples:
      bezel serve gemma.gguf
      bezel serve small=gemma3-270m large=gemma-2-2b.gguf --parallel 4
      curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    try:
        import uvicorn

        from ..serve.app import make_app
        from ..serve.connections import Connection, Server
        from ..serve.guard import is_loopback, origin_of
        from ..serve.models import Models, Setting
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise InvalidRequest(f"`bezel serve` needs {error.name}: pip install 'bezel-lm[serve]'") from None
    import asyncio

    if api_key is not None and not api_key.strip():
        raise InvalidRequest("--api-key: is empty; leave it out, or give one")
    if api_key is None and not is_loopback(host):
        raise InvalidRequest(f"--host {host}: others can reach it, so clients must have a key: give --api-key")
    try:
        allowed = [origin_of(site) for site in origins]
    except ValueError as error:
        raise InvalidRequest(f"--allow-origin: {error}") from None
    paths = _named(models)
    _check_vision(options["vision"], list(paths.values()))
    registry = Models(paths, Setting(options, parallel, cache_ram, cache_folder))
    app = make_app(
        registry,
        key=api_key,
        origins=allowed,
        local=is_loopback(host),
        most_bytes=64 << 20,  # pictures come in the body
        most_begun=256,
    )
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=1024,
    )
    with _listening(host, port) as listener:

        async def run() -> None:
            await registry.get(None)
            for name, facts in registry.facts.items():
                if not facts.chat:
                    click.echo(f"{name} has no chat template: it continues texts, by /v1/completions", err=True)
            where = f"[{host}]" if ":" in host else host
            click.echo(
                f"serving {', '.join(paths)} at http://{where}:{listener.getsockname()[1]} (Ctrl-C stops)", err=True
            )
            await Server(config, registry, _DRAIN_SECONDS).serve([listener])

        try:
            asyncio.run(run())
        except KeyboardInterrupt:  # as the line above said
            sys.exit(130)


def _listening(host: str, port: int) -> socket.socket:
    """Raises InvalidRequest where that is not possible."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InvalidRequest(f"cannot listen at {host}, port {port}: {error.strerror}") from None
    return listener


def _named(models: Sequence[str]) -> dict[str, Path]:
    """Name → path. Raises InvalidRequest for two of a name, or for no file."""
    from ..files.models import find_model

    found: dict[str, Path] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or Path(model).exists():
            name, path = "", model
        file = find_model(path)
        if not file.exists():
            raise InvalidRequest(f"{path}: there is no such file")
        name = name or (Path(path).stem if Path(path).exists() else path)
        if name in found:
            raise InvalidRequest(f"{name}: two models of this name; give one another: NAME={path}")
        found[name] = file
    return found


def _check_vision(vision: Path | None, models: Sequence[Path]) -> None:
    """Raises InvalidRequest for a vision tower that could be any model's."""
    from ..files.models import eye_path

    if vision is not None and len(models) > 1:
        beside = " or ".join(eye_path(model).name for model in models)
        raise InvalidRequest(
            f"--vision {vision}: found {len(models)} models, expected the one that it belongs to; beside its model, as "
            f"{beside}, it is found by itself"
        )
