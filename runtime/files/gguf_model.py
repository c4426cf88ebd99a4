"""A GGUF file with a Gemma in it, llama.cpp's files included."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.caches import LARGEST_CHUNK
from ..cache.store import KV_TYPES
from ..errors import InvalidModelFile
from ..model.config import ModelConfig
from ..model.families.gguf import read_gguf_config
from ..model.families.sight import is_gguf_vision
from ..model.tensors import tensor_specs
from ..text.vocabulary import Vocabulary
from .gguf import GGUFFile, shape_text


class GGUFModel(GGUFFile):
    """The `ModelFile` that is a GGUF file, or the first of several, which llama.cpp splits large ones into.

    Then `tensors` has those of all parts, each with its place in its own, whose path `home` gives.
    """

    kind = "a GGUF file"
    engines = ("native", "reference")
    largest_chunk = LARGEST_CHUNK
    vision = None  # it lies beside the file, if anywhere

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._parts: list[GGUFFile] = []
        self._homes: dict[str, GGUFFile] = {}
        count = self.metadata.get("split.count", 1)
        if type(count) is not int or count != 1:
            self._open_parts(count)

    def _open_parts(self, count: Any) -> None:
        name = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", self.path.name)
        number: Any = self.metadata.get("split.no")
        sound = type(number) is type(count) is int  # an array would answer == with one
        if not sound or name is None or (number, count) != (int(name[2]) - 1, int(name[3])):
            raise InvalidModelFile(
                self.path,
                f"keys 'split.no' and 'split.count': found {number!r:.20} and {count!r:.20}, which call for another "
                "name: parts are called NAME-00001-of-00002.gguf and so on",
            )
        names = [f"{name[1]}-{i:05}-of-{name[3]}.gguf" for i in range(1, count + 1)]
        if number != 0:
            raise InvalidModelFile(
                self.path, f"this is part {number + 1} of {count} of a model; give the first, {names[0]}"
            )
        for i, other in enumerate(names[1:], 1):
            part = GGUFFile(self.path.with_name(other))
            found = part.metadata.get("split.no"), part.metadata.get("split.count")
            if not all(type(x) is int for x in found) or found != (i, count):
                raise InvalidModelFile(
                    part.path,
                    f"is part {found[0]!r:.20} of {found[1]!r:.20}, counted from 0, expected {i} of {count}",
                )
            for tensor, info in part.tensors.items():
                if tensor in self.tensors:
                    raise InvalidModelFile(part.path, f"tensor {tensor!r} is in a part before this one, too")
                self.tensors[tensor], self._homes[tensor] = info, part
            self._parts.append(part)
            self.file_bytes += part.file_bytes

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that it consists of."""
        return (self.path, *(part.path for part in self._parts))

    def home(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._homes[name].path if name in self._homes else self.path

    def data(self, name: str) -> NDArray[np.uint8]:
        home = self._homes.get(name)
        return super().data(name) if home is None else home.data(name)

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.close()

    def kv_types(self, engine: str) -> tuple[str, ...]:  # noqa: ARG002
        return KV_TYPES

    def config(self) -> ModelConfig:
        """The model's description. Raises InvalidConfig, or InvalidModelFile where there is no embedding."""
        if is_gguf_vision(self.metadata):
            raise InvalidModelFile(
                self.path, "this is the vision tower of a model, which is found beside it: give the model's own file"
            )
        embedding = self.info("token_embd.weight")
        if len(embedding.shape) != 2:
            raise InvalidModelFile(
                self.path,
                f"tensor 'token_embd.weight': found shape {shape_text(embedding.shape)}, expected a matrix",
            )
        return read_gguf_config(
            self.metadata,
            vocab_size=embedding.shape[0],
            tied_head="output.weight" not in self.tensors,
            source=str(self.path),
        )

    def check_tensors(self, config: ModelConfig) -> None:
        """Raises InvalidModelFile unless the file holds exactly the tensors of `config`, in their shapes."""
        expected = {spec.gguf: spec.shape for spec in tensor_specs(config)}
        self.check_shapes(expected)
        for name, info in self.tensors.items():
            if name not in expected:
                scaled = name == "rope_freqs.weight"
                why = "bezel has no scaled RoPE" if scaled else f"a {config.family} model has no such tensor"
                raise InvalidModelFile(
                    self.path, f"tensor {name!r}: found shape {shape_text(info.shape)}, expected nothing: {why}"
                )

    def vocabulary(self) -> Vocabulary:
        """The tokenizer's pieces. Raises InvalidModelFile."""
        return Vocabulary.from_gguf(self.metadata, str(self.path))

    def fingerprint(self) -> str:
        """Which model this is: SHA-256 (hex) of the data's size, the header and the first 4 KiB of each tensor.

        Receipts do not count: what was measured of a model does not make it another.
        """
        digest = hashlib.sha256(struct.pack("<Q", self.file_bytes - self.data_start))
        for part in (self, *self._parts):
            digest.update(part.header())
        for sample in self.samples():
            digest.update(sample)
        return digest.hexdigest()

    def check_hashes(self) -> None:
        """A GGUF file holds no hashes of itself."""

    def facts(self) -> dict[str, Any]:
        """Nothing but what every model file has."""
        return {}
