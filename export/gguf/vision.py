"""The eye of a checkpoint, in a GGUF file of its own, as llama.cpp has it: `mmproj-NAME.gguf` beside `NAME.gguf`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...quant.recipes import Recipe, preset
from ...runtime.files.atomic import atomic
from ...runtime.files.models import EYE
from ...runtime.model.families.sight import write_gguf_vision
from ..recipe import find_recipe_of
from ..sources.checkpoint import Checkpoint, VisionSource
from ..summary import ExportSummary, of_vanished
from .writer import Layout, check_room, check_target, file_type, fill, plan_tensors, provenance

VISION_FORMAT = "q8_0"  # nearly without loss, and the fastest


def vision_recipe(eye: VisionSource, given: str | None, text: Recipe) -> Recipe:
    """The formats of an eye: a preset or a recipe file that is `given`, or what suits the text model's.

    Raises InvalidRequest.
    """
    if given is None:
        given = text.default.name if text.default.block == 1 else VISION_FORMAT
    return find_recipe_of(eye.specs, eye.config.n_layers, given)


@contextmanager
def export_vision(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> Iterator[ExportSummary | None]:
    """Write the eye of a checkpoint, if it has one, for the text model in the file `out`, which is written inside.

    The eye's file appears once the block is left; nothing is left of it where that raises. `recipe` says its formats:
    by default `VISION_FORMAT`. Raises InvalidRequest and InvalidCheckpoint.
    """
    eye = checkpoint.vision
    if eye is None:
        yield None
        return
    start, recipe = time.monotonic(), recipe or preset(VISION_FORMAT, eye.config.n_layers)
    if recipe.default.block > 1:
        eye = eye.widened(recipe.default.block)
    out = out.with_name(f"{EYE}{out.name}")
    check_target(eye, out, force)
    plan = plan_tensors(eye.specs, recipe)
    metadata = {
        **write_gguf_vision(eye.config),
        **file_type(recipe, plan),
        "general.name": checkpoint.name,
        **provenance(eye, recipe),
    }
    layout = Layout(plan, metadata)
    size = check_room(layout, out)
    with atomic(out) as file:
        vanished, _ = fill(file, eye, layout, progress)
        yield ExportSummary(
            path=str(out),
            file_bytes=size,
            weights=layout.n_weights,
            bits_per_weight=layout.bits_per_weight,
            formats=dict(Counter(p.format.name for p in plan)),
            fallbacks=[],
            warnings=of_vanished(vanished),
            seconds=time.monotonic() - start,
        )
