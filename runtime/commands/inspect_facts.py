"""What `bezel inspect` tells of any file of tensors, a model's or an eye's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import click

from ..files.model_file import Tensor
from .console import printable

MIB = 1 << 20


class TensorFile(Protocol):
    """`ModelFile` or `VisionFile`."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


def tensor_facts(file: TensorFile) -> dict[str, Any]:
    """Weights and bytes by format, what the exporter wrote about itself, and every tensor, for JSON."""
    formats: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "weights": 0, "bytes": 0})
    for info in file.tensors.values():
        row = formats[info.format.name]
        row["tensors"] += 1
        row["weights"] += math.prod(info.shape)
        row["bytes"] += info.nbytes
    weights = sum(row["weights"] for row in formats.values())
    tensor_bytes = sum(row["bytes"] for row in formats.values())
    return {
        "weights": weights,
        "weight_bytes": tensor_bytes,
        "bits_per_weight": 8 * tensor_bytes / weights,
        "formats": dict(sorted(formats.items(), key=lambda item: -item[1]["bytes"])),
        "provenance": _provenance(file),
        "tensors": [
            {"name": info.name, "shape": info.shape, "format": info.format.name, "bytes": info.nbytes}
            for info in file.tensors.values()
        ],
    }


def _provenance(file: TensorFile) -> dict[str, Any]:
    """What the exporter wrote about itself and its source."""
    stored = {
        key.removeprefix("bezel.provenance."): v for key, v in file.metadata.items() if "bezel.provenance." in key
    }
    names, hashes = (_texts(stored.pop(key, None)) for key in ("source_files", "source_sha256"))
    plain = {key: value for key, value in stored.items() if isinstance(value, (str, int, float))}
    return plain | {"sources": dict(zip(names, hashes, strict=False))} if names else plain


def _texts(value: Any) -> list[str]:
    """An array of strings; nothing where a file has something else in its place."""
    is_array = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_array and all(isinstance(text, str) for text in value) else []


def print_formats(facts: dict[str, Any]) -> None:
    """How large it is, in all and by format."""
    echo(
        f"  {facts['weights'] / 1e6:,.1f} million weights, {facts['file_bytes'] / MIB:,.1f} MiB, "
        f"{facts['bits_per_weight']:.2f} bits per weight"
    )
    for name, row in facts["formats"].items():
        echo(f"  {name:>6} {row['tensors']:5} tensors {row['bytes'] / MIB:10,.1f} MiB")


def print_provenance(facts: dict[str, Any]) -> None:
    """Where it comes from, as far as that is told."""
    if not facts["provenance"]:
        return
    echo("\nProvenance")
    for key, value in facts["provenance"].items():
        if key != "sources":
            echo(f"  {key:<22} {value}")
    for name, sha256 in facts["provenance"].get("sources", {}).items():
        echo(f"  from {name:<33} sha256 {sha256}")


def print_tensors(facts: dict[str, Any]) -> None:
    echo("\nTensors")
    for row in facts["tensors"]:
        echo(f"  {row['name']:<36} {row['format']:>5} {' × '.join(map(str, row['shape']))}")


def echo(line: str) -> None:
    click.echo(printable(line))
