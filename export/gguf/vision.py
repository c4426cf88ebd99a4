"""The eye of a checkpoint, in a GGUF file of its own, as llama.cpp has it: `mmproj-NAME.gguf` beside `NAME.gguf`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...quant.recipes import Recipe
from ...runtime.errors import InvalidRequest
from ...runtime.files.atomic import atomic
from ...runtime.files.models import eye_path
from ...runtime.model.families.sight import write_gguf_vision
from ..calibration.eye import CalibratedEye, read_pictures
from ..kept import work_on
from ..metadata import CALIBRATION
from ..recipe import find_recipe_of
from ..sources.checkpoint import Checkpoint
from ..summary import ExportSummary
from .writer import Layout, check_room, check_target, file_type, fill, plan_tensors, provenance, summary_of

VISION_FORMAT = "q8_0"  # nearly without loss, and the fastest


def vision_recipe(checkpoint: Checkpoint, given: str | None, text: Recipe) -> Recipe | None:
    """The formats of a checkpoint's eye: a preset or a recipe file that is `given`, or what suits the text model's.

    None where there is no eye. Raises InvalidRequest.
    """
    eye = checkpoint.vision
    if eye is None:
        if given is not None:
            raise InvalidRequest(
                f"--vision: {checkpoint.path} has no vision tower in it; from GGUF files none is made, copy theirs"
            )
        return None
    if given is None:
        given = text.default.name if text.default.block == 1 else VISION_FORMAT
    return find_recipe_of(eye.specs, eye.config.n_layers, given)


@contextmanager
def export_vision(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe | None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
    pictures: Path | None = None,
) -> Iterator[ExportSummary | None]:
    """Write the eye of a checkpoint, if it has one, for the text model in the file `out`, which is written inside.

    The eye's file appears once the block is left; nothing is left of it where that raises. `recipe` says its formats;
    with a folder of `pictures` its matrices are rounded for what those send through them: broken off after that, the
    same call need not do it again. Raises InvalidRequest and InvalidCheckpoint.
    """
    eye = checkpoint.vision
    if eye is None:
        yield None
        return
    start = time.monotonic()
    assert recipe is not None
    if recipe.default.block > 1:
        eye = eye.widened(recipe.default.block)
    out = eye_path(out)
    check_target(eye, out, force)
    plan = plan_tensors(eye.specs, recipe)
    metadata = {
        **write_gguf_vision(eye.config),
        **file_type(recipe, plan),
        "general.name": checkpoint.name,
        **provenance(eye, recipe),
    }
    with ExitStack() as stack:
        calibrated = None
        if pictures is not None:
            shown, formats = read_pictures(eye.config, pictures), {p.spec.gguf: p.format for p in plan}
            kept = stack.enter_context(work_on(out, CalibratedEye.key(eye, shown, formats)))
            calibrated, progress = CalibratedEye(eye, shown, formats, kept, progress), None
            metadata |= {
                CALIBRATION: CalibratedEye.method,
                f"{CALIBRATION}_pictures_sha256": shown.sha256,
                f"{CALIBRATION}_pictures": shown.count,
            }
        layout = Layout(plan, metadata)
        check_room(layout, out)
        with atomic(out) as file:
            vanished, _ = fill(file, eye, layout, progress, calibrated)
            yield summary_of(layout, out, vanished, start)
