"""The one table of tensors: role, name in GGUF, name in a Hugging Face checkpoint, shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model. `shape` is row-major, outputs × inputs (GGUF lists it reversed).

    `role` is the name without layer and suffix ("attn_q", "ffn_norm", …), which recipes refer to. A norm's
    GGUF tensor holds weight + 1, the factor that Gemma multiplies by; the checkpoint holds the weight.
    """

    role: str
    gguf: str
    hf: str
    shape: tuple[int, ...]
    layer: int | None = None

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order in which a forward pass meets them."""
    c = config
    q_size, kv_size = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    yield TensorSpec("token_embd", "token_embd.weight", "model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
    in_layer: list[tuple[str, str, tuple[int, ...]]] = [
        ("attn_norm", "input_layernorm", (c.hidden_size,)),
        ("attn_q", "self_attn.q_proj", (q_size, c.hidden_size)),
        ("attn_k", "self_attn.k_proj", (kv_size, c.hidden_size)),
        ("attn_v", "self_attn.v_proj", (kv_size, c.hidden_size)),
        ("attn_output", "self_attn.o_proj", (c.hidden_size, q_size)),
        ("ffn_gate", "mlp.gate_proj", (c.intermediate_size, c.hidden_size)),
        ("ffn_up", "mlp.up_proj", (c.intermediate_size, c.hidden_size)),
        ("ffn_down", "mlp.down_proj", (c.hidden_size, c.intermediate_size)),
    ]
    if c.post_norms:
        in_layer += [
            ("post_attention_norm", "post_attention_layernorm", (c.hidden_size,)),
            ("ffn_norm", "pre_feedforward_layernorm", (c.hidden_size,)),
            ("post_ffw_norm", "post_feedforward_layernorm", (c.hidden_size,)),
        ]
    else:  # what Gemma 1 calls post-attention is the norm before its feed-forward
        in_layer.append(("ffn_norm", "post_attention_layernorm", (c.hidden_size,)))
    for i in range(c.n_layers):
        for role, hf, shape in in_layer:
            yield TensorSpec(role, f"blk.{i}.{role}.weight", f"model.layers.{i}.{hf}.weight", shape, i)
    yield TensorSpec("output_norm", "output_norm.weight", "model.norm.weight", (c.hidden_size,))
    if not c.tied_head:
        yield TensorSpec("output", "output.weight", "lm_head.weight", (c.vocab_size, c.hidden_size))
