"""A GGUF file with a Gemma in it, llama.cpp's files included."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

from ..cache.caches import LARGEST_CHUNK
from ..cache.store import KV_TYPES
from ..errors import InvalidModelFile
from ..model.config import ModelConfig
from ..model.families.gguf import read_gguf_config
from ..model.tensors import tensor_specs
from ..text.tokenizer import Vocabulary
from .gguf import GGUFFile, shape_text

_SAMPLE = 4096  # bytes of each tensor that the fingerprint covers


class GGUFModel(GGUFFile):
    """The `ModelFile` that is a GGUF file."""

    kind = "a GGUF file"
    engines = ("native", "reference")
    largest_chunk = LARGEST_CHUNK

    def kv_types(self, engine: str) -> tuple[str, ...]:  # noqa: ARG002
        return KV_TYPES

    def config(self) -> ModelConfig:
        """The model's description. Raises InvalidConfig, or InvalidModelFile where there is no embedding."""
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
        for name, shape in expected.items():
            found = self.tensors.get(name)
            if found is None or found.shape != shape:
                what = "nothing" if found is None else f"shape {shape_text(found.shape)}"
                raise InvalidModelFile(self.path, f"tensor {name!r}: found {what}, expected shape {shape_text(shape)}")
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
        digest.update(self.header())
        for name in self.tensors:
            digest.update(self.data(name).reshape(-1)[:_SAMPLE].data)
        return digest.hexdigest()

    def check_hashes(self) -> None:
        """A GGUF file holds no hashes of itself."""

    def facts(self) -> dict[str, Any]:
        """Nothing but what every model file has."""
        return {}
