"""Opens what is exported, of whichever kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...runtime.errors import InvalidCheckpoint
from ...runtime.files.gguf_model import GGUFModel
from ...runtime.files.models import find_model
from ...runtime.model.tensors import tensor_specs
from ...runtime.text.sampling import read_sampling
from ...runtime.text.vocabulary import Vocabulary
from ..metadata import CALIBRATION
from .checkpoint import Checkpoint
from .folder import open_folder
from .safetensors import StoredTensor


def open_checkpoint(path: str | Path, quantized: bool = False) -> Checkpoint:
    """A Hugging Face folder (safetensors, one file or sharded) or a GGUF file, which may be `quantized` if asked for.

    A packaged model may be given by name; see `models.find_model`. Checks everything but the numbers: files, names,
    shapes, extents. Raises InvalidCheckpoint, InvalidConfig, and InvalidModelFile for a damaged GGUF file.
    """
    path = find_model(path)
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        checkpoint = _open_gguf(path)
        if not quantized:
            checkpoint.check_unquantized()
        return checkpoint
    raise InvalidCheckpoint(f"{path}: no such file or folder; expected a checkpoint folder or a GGUF file")


def _open_gguf(path: Path) -> Checkpoint:
    with GGUFModel(path) as gguf:
        config = gguf.config()
        gguf.check_tensors(config)
        tensors = (gguf.tensors[spec.gguf] for spec in tensor_specs(config))
        stored = {i.name: StoredTensor(gguf.home(i.name), i.format, i.shape, i.offset) for i in tensors}
        files = gguf.paths
        metadata = gguf.metadata
        generation_config, complaints = read_sampling(metadata)
        if (stops := metadata.get("bezel.generation.stop_token_ids")) is not None:
            generation_config["eos_token_id"] = np.asarray(stops).tolist()
        template = metadata.get("tokenizer.chat_template")
        name = metadata.get("general.name")

    def load_vocabulary() -> Vocabulary:
        with GGUFModel(path) as gguf:
            return gguf.vocabulary()

    return Checkpoint(
        path,
        name if isinstance(name, str) and name else path.stem,
        config,
        stored,
        files,
        load_vocabulary,
        norm_offset=0.0,  # GGUF holds weight + 1 already
        warnings=tuple(complaints),
        generation_config=generation_config,
        chat_template=template if isinstance(template, str) else None,
        calibration={
            key: value
            for key, value in metadata.items()
            if key.startswith(CALIBRATION) and isinstance(value, str | int)
        },
    )
