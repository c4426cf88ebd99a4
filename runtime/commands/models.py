"""The commands `bezel list` and `bezel rm`."""

from __future__ import annotations

import json
from typing import Any

import click

from ..errors import InvalidRequest
from ..files.models import (
    NamedModel,
    find_named,
    models_folder,
    named_models,
    remove,
    remove_unfinished,
    size_text,
    suggestion,
    unfinished,
)
from ..files.packaged import PACKAGED, installed
from .console import printable
from .model_path import complete_name


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def list_models(as_json: bool) -> None:
    """List the models in the models folder: what other commands take by name.

    The folder is in the user's data folder, or where the environment variable BEZEL_MODELS says. A GGUF file that you
    put there is listed, too, and so are models that Python packages brought.

    \b
    Examples:
      bezel list
      bezel list --json
    """
    models = [*(_facts(model) for model in named_models()), *map(_packaged_facts, installed())]
    if as_json:
        click.echo(json.dumps(models, indent=2))
        return
    if not models:
        click.echo(f"no models in {models_folder()}; `bezel pull google/gemma-3-1b-it` fetches one", err=True)
    rows = [("NAME", "SIZE", "FORMAT", "FROM", "PULLED")] if models else []
    for facts in models:
        origin = f"{facts['repo']}@{facts['commit'][:8]}" if facts["repo"] and facts["commit"] else "-"
        pulled = (facts["pulled"] or "-")[:10]  # the day
        rows.append((facts["name"], size_text(facts["bytes"]), facts["format"], origin, pulled))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(f"{cell:{'>' if i == 1 else '<'}{widths[i]}}" for i, cell in enumerate(row))
        click.echo(printable(line).rstrip())
    for name in unfinished():
        click.echo(f"not fetched to the end: {name}; `bezel pull` goes on, `bezel rm {name}` removes it", err=True)


def _facts(model: NamedModel) -> dict[str, Any]:
    """What is known of a model; null for what was not noted."""
    note = model.note()
    texts = {key: value if isinstance(value := note.get(key), str) else None for key in _NOTED}
    tag = model.name.partition(":")[2]
    form = "safetensors" if model.path.is_dir() else tag or "GGUF"
    return {"name": model.name, "path": str(model.path), "bytes": model.file_bytes, "format": form} | texts


def _packaged_facts(name: str) -> dict[str, Any]:
    """The same of a model that packages bring; its path is null, for there is no file of it before it is used."""
    model = PACKAGED[name]
    facts = {"name": name, "path": None, "bytes": model.size, "format": model.form}
    return facts | dict.fromkeys(_NOTED)


_NOTED = ("repo", "revision", "commit", "pulled")


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=complete_name, metavar="NAME...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def rm(names: tuple[str, ...], yes: bool) -> None:
    """Remove models from the models folder, or what is there of one that was not fetched to the end.

    \b
    Examples:
      bezel rm google/gemma-3-1b-it
      bezel rm somebody/gemma-3-1b-it-GGUF:Q4_K_M --yes
    """
    for name in names:
        model = find_named(name)
        if model is not None:
            what = f"{model.name}, {size_text(model.file_bytes)}, {model.place}"
        elif name in unfinished():
            what = f"what was fetched of {name}, {unfinished()[name]}"
        elif name in PACKAGED:
            packages = " ".join(package for package, _ in PACKAGED[name].parts).replace("_", "-")
            raise InvalidRequest(f"{name}: packages brought it; remove them: pip uninstall {packages}")
        else:
            raise InvalidRequest(printable(f"{name}: no such model in {models_folder()}{suggestion(name)}"))
        if not yes and not click.confirm(f"remove {what}?", err=True):
            click.echo("kept", err=True)
        elif model is not None:
            remove(model)
        else:
            remove_unfinished(name)
