"""What sets one family of models apart, as data. `hf.py` and `gguf.py` read and write by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """`name` is the architecture in GGUF, `title` what people call it.

    In config.json the model is of the type `hf_type` and the class `hf_class`, perhaps as "text_config" of the type
    `hf_outer`, which sees pictures; `hf_activation` is the key of the activation, and `hf_activations` are its values
    that mean gelu_tanh. `hf_defaults` has what published configs leave out, `hf_outer_defaults` those around an eye,
    `hf_must_be` the only values of keys that change the result. `hf_outer_sees_prefix`: with pictures, the text up to
    the first end of a line is seen whole.

    Every `period`-th layer is global, those between are local; None: all are global. `local_rope_base` is RoPE's base
    in local layers where it is another one than in global layers; those may then have a factor, too.
    `softcaps` lists what may have one, "attn" and "final": each must be said, if only as none, where `says_softcaps`.
    `gguf_softcaps` are llama.cpp's, where a GGUF file is silent.
    `says_query_scalar`: config.json has the number by whose root queries are divided, which is otherwise head_dim. In
    GGUF it is head_dim, too, but hidden size / heads in models of so many layers as `scales_by_width` holds.
    `unties`: llama.cpp reads a head of its own, where a file has one.
    `chat_templates` are the published ones, as `chat.template_hash` makes them.
    """

    name: str
    title: str
    hf_type: str
    hf_class: str
    hf_outer: str | None = None
    hf_activation: str = "hidden_activation"
    hf_activations: tuple[str, ...] = ("gelu_pytorch_tanh",)
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_outer_defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_outer_sees_prefix: bool = False
    hf_must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    period: int | None = None
    rope_base: float = 10000.0
    local_rope_base: float | None = None
    post_norms: bool = False
    qk_norms: bool = False
    softcaps: tuple[str, ...] = ()
    says_softcaps: bool = False
    gguf_softcaps: Mapping[str, float] = field(default_factory=dict)
    says_query_scalar: bool = True
    scales_by_width: frozenset[int] = frozenset()
    unties: bool = False
    chat_templates: frozenset[str] = frozenset()

    def windows(self, n_layers: int, window: int | None) -> tuple[int | None, ...]:
        """The published layer pattern, with `window` in the local layers."""
        local = (self.period is not None and (i + 1) % self.period != 0 for i in range(n_layers))
        return tuple(window if is_local else None for is_local in local)
