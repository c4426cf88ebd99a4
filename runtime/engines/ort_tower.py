"""An ONNX folder's eye on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..arrays import Floats
from ..errors import InvalidModelFile
from ..files.onnx_eye import OnnxEye
from .tower import sound


class OrtTower:
    """The graph of an eye, in a session that `opened` makes when the first picture comes."""

    def __init__(self, file: OnnxEye, opened: Callable[[], ort.InferenceSession]) -> None:
        self.config, self._file, self._opened = file.config, file, opened

    @cached_property
    def fingerprint(self) -> str:
        """Which eye this is."""
        return self._file.fingerprint()

    @cached_property
    def _session(self) -> ort.InferenceSession:
        return self._opened()

    def rows(self, pixels: Floats) -> Floats:
        """The rows (n_rows, text_size) that stand for normalised pixels (side, side, channels).

        Raises InvalidModelFile where they are not finite, or of another shape.
        """
        options = ort.RunOptions()  # the memory that this takes is given back: there is no next picture for long
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        feeds = {"pixels": np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]}
        rows = run(self._file.path, self._session, feeds, options)
        want = (self.config.n_rows, self.config.text_size)
        if rows.shape != want:
            raise InvalidModelFile(
                self._file.path,
                f"output 'rows': found the shape {rows.shape}, expected {want} by config.json; export the model anew",
            )
        return sound(self._file.path, rows)


def run(
    path: Path,
    session: ort.InferenceSession,
    feeds: Mapping[str, npt.NDArray[Any]],
    options: ort.RunOptions | None = None,
) -> Floats:
    """The output `rows`, float32, of a graph, which `path` names in errors. Raises InvalidModelFile."""
    try:
        rows: Floats = session.run(["rows"], dict(feeds), options)[0]
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise InvalidModelFile(path, f"onnxruntime cannot run it: {str(error)[:500]}") from error
    return rows
