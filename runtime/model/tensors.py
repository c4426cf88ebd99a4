"""The one table of tensors: role, name in GGUF, name in a Hugging Face checkpoint, shape, kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .config import LayerConfig, ModelConfig


class Kind(Enum):
    """What a tensor is for, which decides how it is stored."""

    MATRIX = "matrix"  # of a linear, or looked up by rows: what is quantized
    NORM = "norm"  # a factor: the checkpoint holds it less 1, GGUF whole, in float32
    EXACT = "exact"  # float32 in GGUF, too, as it is


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model. `shape` is row-major, outputs × inputs (GGUF lists it reversed).

    `role` is the name without layer and suffix ("attn_q", "ffn_norm", …), which recipes refer to.
    """

    role: str
    gguf: str
    hf: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None

    @property
    def is_matrix(self) -> bool:
        return self.kind is Kind.MATRIX

    @property
    def is_norm(self) -> bool:
        return self.kind is Kind.NORM


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order in which a forward pass meets them."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield TensorSpec("token_embd", "token_embd.weight", "model.embed_tokens.weight", vocabulary, Kind.MATRIX)
    for i, layer in enumerate(config.layers):
        for role, hf, shape, kind in _in_layer(layer, config.hidden_size):
            yield TensorSpec(role, f"blk.{i}.{role}.weight", f"model.layers.{i}.{hf}.weight", shape, kind, i)
    yield TensorSpec("output_norm", "output_norm.weight", "model.norm.weight", (config.hidden_size,), Kind.NORM)
    if not config.tied_head:
        yield TensorSpec("output", "output.weight", "lm_head.weight", vocabulary, Kind.MATRIX)


def _in_layer(c: LayerConfig, hidden: int) -> Iterator[tuple[str, str, tuple[int, ...], Kind]]:
    """Role, name in the checkpoint, shape and kind of a layer's tensors."""
    yield "attn_norm", "input_layernorm", (hidden,), Kind.NORM
    yield "attn_q", "self_attn.q_proj", (c.q_size, hidden), Kind.MATRIX
    yield "attn_k", "self_attn.k_proj", (c.kv_size, hidden), Kind.MATRIX
    yield "attn_v", "self_attn.v_proj", (c.kv_size, hidden), Kind.MATRIX
    if c.qk_norms:
        yield "attn_q_norm", "self_attn.q_norm", (c.head_dim,), Kind.NORM
        yield "attn_k_norm", "self_attn.k_norm", (c.head_dim,), Kind.NORM
    yield "attn_output", "self_attn.o_proj", (hidden, c.q_size), Kind.MATRIX
    yield "ffn_gate", "mlp.gate_proj", (c.intermediate_size, hidden), Kind.MATRIX
    yield "ffn_up", "mlp.up_proj", (c.intermediate_size, hidden), Kind.MATRIX
    yield "ffn_down", "mlp.down_proj", (hidden, c.intermediate_size), Kind.MATRIX
    if c.post_norms:
        yield "post_attention_norm", "post_attention_layernorm", (hidden,), Kind.NORM
        yield "ffn_norm", "pre_feedforward_layernorm", (hidden,), Kind.NORM
        yield "post_ffw_norm", "post_feedforward_layernorm", (hidden,), Kind.NORM
    else:  # what Gemma 1 calls post-attention is the norm before its feed-forward
        yield "ffn_norm", "post_attention_layernorm", (hidden,), Kind.NORM
