"""The one description of a model that the forward pass reads: what each layer is, and what all share.

Nothing but `families/` knows where it comes from. Real numbers are rounded to float32, the type that GGUF stores, so
that a checkpoint and a file of it give equal configs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidConfig


@dataclass(frozen=True)
class LayerConfig:
    """All that a layer is.

    `window` counts the query itself; None sees every earlier position. RoPE turns by angles of base `rope_base`, of
    positions divided by `rope_factor`. `post_norms` adds a norm behind attention and behind the feed-forward,
    `qk_norms` one over each head of queries and of keys, before RoPE.
    """

    window: int | None
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_base: float
    rope_factor: float
    post_norms: bool
    qk_norms: bool

    @property
    def q_size(self) -> int:
        """Numbers in a position's queries."""
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Numbers in a position's keys, and in its values."""
        return self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a text model; `layers` has one entry a layer, `family` is a key of `families.FAMILIES`.

    `query_scale` multiplies q·k, `embedding_scale` the looked-up embedding; a soft-cap of None is no soft-cap.
    """

    family: str
    vocab_size: int
    hidden_size: int
    context_length: int
    rms_eps: float
    embedding_scale: float
    query_pre_attn_scalar: float
    attn_softcap: float | None
    final_softcap: float | None
    tied_head: bool
    layers: tuple[LayerConfig, ...]

    @property
    def query_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def checked(self, source: str) -> ModelConfig:
        """This config, once it is known to make sense; `source` says where it comes from. Raises InvalidConfig."""
        for layer in self.layers:
            if layer.n_heads % layer.n_kv_heads:
                heads = f"{layer.n_heads} query heads cannot share {layer.n_kv_heads} KV heads evenly"
                raise InvalidConfig(f"{source}: {heads}")
            if self.query_pre_attn_scalar == 0:  # by the rule of hidden size / heads
                heads = f"{layer.n_heads} query heads are too many for a hidden size of {self.hidden_size}"
                raise InvalidConfig(f"{source}: {heads}")
            if layer.head_dim % 2:
                raise InvalidConfig(f"{source}: head_dim {layer.head_dim} is odd; RoPE turns pairs")
        return self
