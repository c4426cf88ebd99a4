"""What `bezel inspect` shows of an eye, by itself or beside its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BezelError
from ..files.vision_file import VisionFile, eyes_beside, vision_beside
from .inspect_facts import MIB, echo, print_formats, print_provenance, print_tensors, tensor_facts


def facts_beside(path: Path, hidden_size: int) -> dict[str, Any] | None:
    """The eye beside a model's file, or under "error" why none of the files there is its; None where there are none."""
    if not eyes_beside(path):
        return None
    try:
        return eye_facts(vision_beside(path), hidden_size)
    except BezelError as error:
        return {"error": str(error)}


def eye_facts(path: Path, hidden_size: int | None = None) -> dict[str, Any]:
    """What is in the file of an eye, for JSON. Raises as VisionFile does."""
    with VisionFile(path, hidden_size) as file:
        c = file.config
        return {
            "file": str(path),
            "file_bytes": file.file_bytes,
            "name": name if isinstance(name := file.metadata.get("general.name"), str) else None,
            "family": c.projector,
            "config": {
                "image_size": c.image_size,
                "patch_size": c.patch_size,
                "patches": c.n_patches,
                "rows": c.n_rows,
                "layers": c.n_layers,
                "hidden_size": c.hidden_size,
                "intermediate_size": c.intermediate_size,
                "heads": c.n_heads,
                "text_size": c.text_size,
                "eps": c.eps,
                "mean": list(c.mean),
                "std": list(c.std),
            },
        } | tensor_facts(file)


def print_eye(facts: dict[str, Any], tensors: bool) -> None:
    """What there is to say of an eye's file."""
    echo(f"{facts['file']}: {facts['name'] or 'unnamed'}, the eye of a {facts['family']} model")
    print_formats(facts)
    echo("\nPictures")
    _print_config(facts["config"])
    print_provenance(facts)
    if tensors:
        print_tensors(facts)


def print_beside(facts: dict[str, Any] | None) -> None:
    """The same as a part of what there is to say of a model."""
    if facts is None:
        return
    echo("\nPictures")
    if "error" in facts:
        echo(f"  sees none: {facts['error']}")
        return
    formats = ", ".join(f"{row['bytes'] / MIB:,.1f} MiB {name}" for name, row in facts["formats"].items())
    echo(f"  {'eye':<22} {Path(facts['file']).name}: {formats}")
    _print_config(facts["config"])


def _print_config(c: dict[str, Any]) -> None:
    lines = {
        "picture": f"{c['image_size']} × {c['image_size']} pixels",
        "patches": f"{c['patches']} of {c['patch_size']} × {c['patch_size']}",
        "becomes": f"{c['rows']} rows, each a position of the context",
        "layers": f"{c['layers']}, {c['hidden_size']} wide, {c['heads']} heads, feed-forward {c['intermediate_size']}",
        "for a text model of": f"hidden size {c['text_size']}",
    }
    for title, text in lines.items():
        echo(f"  {title:<22} {text}")
