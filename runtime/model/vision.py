"""The tower that looks at a picture, SigLIP's (Zhai et al. 2023), and the projector behind it: from pixels to rows that
stand among a text's embeddings.

`see` runs on any `VisionOps`. Shapes: n patches, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import Floats
from ..errors import InvalidConfig
from .forward import Weights
from .tensors import Kind, TensorSpec

GEMMA3, PALIGEMMA = "gemma3", "paligemma"
CHANNELS = 3


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of a tower and its projector, `projector`: GEMMA3 or PALIGEMMA.

    A picture of `image_size` squared is cut into patches of `patch_size` squared; of `pool` squared patches one row is
    made, of `text_size` numbers, the hidden size of the text model. Pixels from 0 to 1 are taken less `mean` and
    divided by `std`, a number a channel.
    """

    projector: str
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    eps: float
    pool: int
    text_size: int
    mean: tuple[float, ...] = (0.5,) * CHANNELS
    std: tuple[float, ...] = (0.5,) * CHANNELS

    @property
    def side(self) -> int:
        """Patches in a row of the picture."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        return self.side**2

    @property
    def n_rows(self) -> int:
        """Rows that a picture becomes."""
        return (self.side // self.pool) ** 2

    @property
    def patch_inputs(self) -> int:
        """Numbers in a patch."""
        return CHANNELS * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    @property
    def reads_prefix(self) -> bool:
        """Whether the text that comes with a picture is seen whole, too, up to the first end of a line (PaliGemma)."""
        return self.projector == PALIGEMMA

    @property
    def resample(self) -> str:
        """How a picture is brought to `image_size`: "bilinear" or "bicubic"."""
        return "bicubic" if self.projector == PALIGEMMA else "bilinear"

    def checked(self, source: str) -> VisionConfig:
        """This config, once it is known to make sense; `source` says where it comes from. Raises InvalidConfig."""
        whole = {
            f"an image of {self.image_size} pixels in patches of {self.patch_size}": self.image_size % self.patch_size,
            f"{self.side} patches a side in groups of {self.pool}": self.side % self.pool,
            f"a hidden size of {self.hidden_size} in {self.n_heads} heads": self.hidden_size % self.n_heads,
        }
        for what, left in whole.items():
            if left:
                raise InvalidConfig(f"{source}: {what} leaves {left} over")
        if self.head_dim % 2:
            raise InvalidConfig(f"{source}: heads of {self.head_dim} numbers, expected an even number")
        return self


class Seeing(Protocol):
    """A tower in the form that an engine takes. `rows` gives the rows (n_rows, text_size) that stand for normalised
    pixels (side, side, channels); `fingerprint` says which eye it is.
    """

    @property
    def config(self) -> VisionConfig: ...
    @property
    def fingerprint(self) -> str: ...
    def rows(self, pixels: Floats, /) -> Floats: ...


class VisionOps(Protocol):
    """What the tower is made of; `ops.py` says what each computes."""

    def linear(self, x: Any, /, *weights: Any) -> Any: ...
    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float, /) -> Any: ...
    def bias_gelu(self, x: Any, bias: Any, /) -> Any: ...
    def rms_norm(self, x: Any, weight: Any, eps: float, /) -> Any: ...
    def split_heads(self, x: Any, heads: int, /) -> Any: ...
    def join_heads(self, x: Any, /) -> Any: ...
    def mean_pool(self, x: Any, side: int, by: int, /) -> Any: ...
    def attend_all(self, q: Any, k: Any, v: Any, scale: float, /) -> Any: ...


def see(config: VisionConfig, ops: VisionOps, weights: Weights, patches: Any) -> Any:
    """The rows (n_rows, text_size) that a picture's patches (n, patch_inputs) become."""
    w, eps = weights.shared, config.eps
    (x,) = ops.linear(patches, w["v_patch"])
    x = x + w["v_patch_bias"] + w["v_positions"]  # (n, hidden)
    for layer in weights.layers:
        h = ops.layer_norm(x, layer["v_norm1"], layer["v_norm1_bias"], eps)
        q, k, v = ops.linear(h, layer["v_attn_q"], layer["v_attn_k"], layer["v_attn_v"])
        q, k, v = q + layer["v_attn_q_bias"], k + layer["v_attn_k_bias"], v + layer["v_attn_v_bias"]
        q, k, v = (ops.split_heads(one, config.n_heads) for one in (q, k, v))  # (n, H, D)
        h = ops.join_heads(ops.attend_all(q, k, v, config.head_dim**-0.5))
        (h,) = ops.linear(h, layer["v_attn_output"])
        x = x + h + layer["v_attn_output_bias"]
        h = ops.layer_norm(x, layer["v_norm2"], layer["v_norm2_bias"], eps)
        (h,) = ops.linear(h, layer["v_ffn_up"])
        (h,) = ops.linear(ops.bias_gelu(h, layer["v_ffn_up_bias"]), layer["v_ffn_down"])
        x = x + h + layer["v_ffn_down_bias"]
    x = ops.layer_norm(x, w["v_post_norm"], w["v_post_norm_bias"], eps)
    if config.projector == PALIGEMMA:
        (x,) = ops.linear(x, w["v_projection"])
        return x + w["v_projection_bias"]
    x = ops.mean_pool(x, config.side, config.pool)
    (x,) = ops.linear(ops.rms_norm(x, w["v_soft_norm"], eps), w["v_projection"])
    return x


def look_bytes(config: VisionConfig) -> int:
    """Bytes that `see` takes at most beside the weights, where no op takes all scores of its attention at once.

    Of each patch: its pixels, twice; what goes through the layers, and the same normed; queries, keys and values, also
    with their biases and, but for queries, in a cache; what they answer; and what is wide in the feed-forward. Not all
    at one time, but memory that is let go of is not at once taken again.
    """
    numbers = 2 * config.patch_inputs + 11 * config.hidden_size + config.intermediate_size
    return 4 * config.n_patches * numbers


def patches_of(pixels: Floats, patch_size: int) -> Floats:
    """Patches (n, channels · patch_size²) of pixels (side, side, channels), as the patch embedding's weights lie."""
    side = len(pixels) // patch_size
    cut = pixels.reshape(side, patch_size, side, patch_size, pixels.shape[2])
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3)).reshape(side * side, -1)


def vision_specs(config: VisionConfig) -> Iterator[TensorSpec]:
    """Every tensor of the tower and the projector, in the order in which `see` meets them; `hf` is transformers 5's."""
    hidden, text = config.hidden_size, config.text_size
    patch = (hidden, CHANNELS, config.patch_size, config.patch_size)
    embeddings = "vision_tower.embeddings"
    exact, matrix = Kind.EXACT, Kind.MATRIX
    yield TensorSpec("v_patch", "v.patch_embd.weight", f"{embeddings}.patch_embedding.weight", patch, exact)
    yield TensorSpec("v_patch_bias", "v.patch_embd.bias", f"{embeddings}.patch_embedding.bias", (hidden,), exact)
    positions = f"{embeddings}.position_embedding.weight"
    yield TensorSpec("v_positions", "v.position_embd.weight", positions, (config.n_patches, hidden), exact)
    for i in range(config.n_layers):
        for role, gguf, hf, outputs, inputs in _in_layer(config):
            gguf, hf = f"v.blk.{i}.{gguf}", f"vision_tower.encoder.layers.{i}.{hf}"
            shape, kind = ((outputs, inputs), matrix) if inputs else ((outputs,), exact)
            yield TensorSpec(role, f"{gguf}.weight", f"{hf}.weight", shape, kind, i)
            yield TensorSpec(f"{role}_bias", f"{gguf}.bias", f"{hf}.bias", (outputs,), exact, i)
    yield TensorSpec("v_post_norm", "v.post_ln.weight", "vision_tower.post_layernorm.weight", (hidden,), exact)
    yield TensorSpec("v_post_norm_bias", "v.post_ln.bias", "vision_tower.post_layernorm.bias", (hidden,), exact)
    gguf, hf = "mm.input_projection", "multi_modal_projector"
    if config.projector == PALIGEMMA:
        yield TensorSpec("v_projection", f"{gguf}.weight", f"{hf}.linear.weight", (text, hidden), matrix)
        yield TensorSpec("v_projection_bias", f"{gguf}.bias", f"{hf}.linear.bias", (text,), exact)
    else:
        norm = f"{hf}.mm_soft_emb_norm.weight"
        yield TensorSpec("v_soft_norm", "mm.soft_emb_norm.weight", norm, (hidden,), Kind.NORM)
        # Turned round in checkpoints and in llama.cpp's files alike, and multiplied by the other way round.
        turned = f"{hf}.mm_input_projection_weight"
        yield TensorSpec("v_projection", f"{gguf}.weight", turned, (hidden, text), exact)


def _in_layer(c: VisionConfig) -> Iterator[tuple[str, str, str, int, int]]:
    """Role, name in GGUF and in a checkpoint, outputs and inputs of what has weight and bias; a norm has no inputs."""
    hidden, wide = c.hidden_size, c.intermediate_size
    yield "v_norm1", "ln1", "layer_norm1", hidden, 0
    yield "v_attn_q", "attn_q", "self_attn.q_proj", hidden, hidden
    yield "v_attn_k", "attn_k", "self_attn.k_proj", hidden, hidden
    yield "v_attn_v", "attn_v", "self_attn.v_proj", hidden, hidden
    yield "v_attn_output", "attn_out", "self_attn.out_proj", hidden, hidden
    yield "v_norm2", "ln2", "layer_norm2", hidden, 0
    yield "v_ffn_up", "ffn_up", "mlp.fc1", wide, hidden
    yield "v_ffn_down", "ffn_down", "mlp.fc2", hidden, wide


def is_multiplied(spec: TensorSpec) -> bool:
    """Whether a tensor of the tower is a factor of a product: the matrices, and two that are never quantized."""
    return spec.is_matrix or spec.role in ("v_patch", "v_projection")


def as_multiplied(config: VisionConfig, spec: TensorSpec, weights: Floats) -> Floats:
    """A tensor as (outputs, inputs): patches in a row, and Gemma 3's projection turned."""
    if spec.role == "v_patch":
        return weights.reshape(len(weights), -1)
    if spec.role == "v_projection" and config.projector == GEMMA3:
        return np.ascontiguousarray(weights.T)
    return weights
