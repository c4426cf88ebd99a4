"""Where a command takes a model: a path or a name, which the shell completes; and the file of its eye."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


def complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """The models in the models folder whose names begin so."""
    from ..files.models import short_names

    return [CompletionItem(name) for name in short_names() if name.startswith(incomplete)]


class ModelSpec(click.Path):
    """A path or a name, perhaps with settings: what `parse_spec` reads."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # Files come first: bash forgets what came before them.
        return [*super().shell_complete(ctx, param, incomplete), *complete_name(ctx, param, incomplete)]


class ModelPath(ModelSpec):
    """What there is under a path, or what opens the model of that name; a path where there is nothing stays one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from ..files.models import find_model

        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        return path if ctx and ctx.resilient_parsing else find_model(path)  # completion only looks


MODEL, MODEL_SPEC = ModelPath(), ModelSpec()

vision_option = click.option(
    "--vision",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The file of MODEL's vision tower.  [default: mmproj-….gguf beside MODEL]",
)
