"""The one description of a model that the forward pass reads.

Built strictly from a Hugging Face `config.json` or from GGUF metadata: a missing key is an error, and so is a
key that bezel does not know, because it might change the mathematics. Layer kinds are derived here and nowhere
else. Real numbers are rounded to float32, the type that GGUF stores, so that both sources give equal configs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np

from ..errors import InvalidConfig


@dataclass(frozen=True)
class LayerConfig:
    """What differs between layers. `window` counts the query itself; None sees every earlier position."""

    window: int | None
    rope_base: float


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a Gemma text model; `layers` has one entry a layer.

    `query_scale` multiplies q·k, `embedding_scale` the looked-up embedding; a soft-cap of None is no soft-cap.
    `post_norms` adds a norm after attention and after the feed-forward (Gemma 2).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    rms_eps: float
    query_pre_attn_scalar: float
    attn_softcap: float | None
    final_softcap: float | None
    post_norms: bool
    tied_head: bool
    layers: tuple[LayerConfig, ...]

    @property
    def query_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """From a parsed Hugging Face `config.json`; `source` names it in errors. Raises InvalidConfig."""
        return _from_hf(_Keys(raw, source))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads and transformers too. Raises InvalidConfig for a model that has none.

        Only a GGUF file can describe such a model: one whose layers have windows of several lengths, say.
        """
        gemma2 = self.family == "gemma2"
        out: dict[str, Any] = {
            "architectures": ["Gemma2ForCausalLM" if gemma2 else "GemmaForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": _shortest(self.rms_eps),
            "rope_theta": _shortest(self.layers[0].rope_base),
            "attention_bias": False,
            "tie_word_embeddings": self.tied_head,
            "hidden_activation" if gemma2 else "hidden_act": "gelu_pytorch_tanh",
        }
        if gemma2:
            scalar = _shortest(self.query_pre_attn_scalar)
            windows = [layer.window for layer in self.layers]
            out |= {
                "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
                "attn_logit_softcapping": _shortest(self.attn_softcap),
                "final_logit_softcapping": _shortest(self.final_softcap),
                "sliding_window": max(window or 0 for window in windows) or self.context_length,
                "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
            }
        read = ModelConfig.from_hf(out)
        for field in fields(self):
            if getattr(read, field.name) != getattr(self, field.name):
                raise InvalidConfig(f"a {self.family} config.json cannot express this model's {field.name}")
        return out

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, vocab_size: int, tied_head: bool, source: str) -> ModelConfig:
        """From GGUF metadata, llama.cpp's files included. Raises InvalidConfig.

        What GGUF has no standard key for is read from `bezel.*`, else follows the family's published rule.
        """
        return _from_gguf(_Keys(metadata, source), vocab_size, tied_head)

    def to_gguf(self) -> dict[str, int | float | list[int]]:
        """The metadata that `from_gguf` reads: ints are uint32, floats float32, lists arrays of uint32."""
        arch = self.family
        windows = [layer.window or 0 for layer in self.layers]
        out: dict[str, int | float | list[int]] = {
            f"{arch}.context_length": self.context_length,
            f"{arch}.embedding_length": self.hidden_size,
            f"{arch}.block_count": self.n_layers,
            f"{arch}.feed_forward_length": self.intermediate_size,
            f"{arch}.attention.head_count": self.n_heads,
            f"{arch}.attention.head_count_kv": self.n_kv_heads,
            f"{arch}.attention.key_length": self.head_dim,
            f"{arch}.attention.value_length": self.head_dim,
            f"{arch}.attention.layer_norm_rms_epsilon": self.rms_eps,
            f"{arch}.rope.freq_base": self.layers[0].rope_base,
            "bezel.attention.query_pre_attn_scalar": self.query_pre_attn_scalar,
            "bezel.attention.layer_windows": windows,
        }
        if arch == "gemma2":
            out["gemma2.attn_logit_softcapping"] = self.attn_softcap or 0.0
            out["gemma2.final_logit_softcapping"] = self.final_softcap or 0.0
            out["gemma2.attention.sliding_window"] = max(windows) or self.context_length
        return out


def family_windows(family: str, n_layers: int, window: int | None) -> tuple[int | None, ...]:
    """The published layer pattern: in Gemma 2 the even layers are local; Gemma 1 has no local layers."""
    if family == "gemma2":
        return tuple(window if i % 2 == 0 else None for i in range(n_layers))
    return (None,) * n_layers


_FAMILIES = ("gemma", "gemma2")
_PUBLISHED_ROPE_BASE = 10000.0
_F32_TINY, _F32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# Keys of config.json that say nothing about the forward pass at inference.
_HF_IRRELEVANT = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map "
    "bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id dtype eos_token_id "
    "finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range keys_to_ignore_at_inference "
    "label2id max_length output_attentions output_hidden_states pad_token_id prefix problem_type return_dict "
    "sep_token_id task_specific_params tokenizer_class torch_dtype transformers_version unsloth_fixed "
    "unsloth_version use_cache".split()
)
# Keys that change the mathematics unless they hold one of these values.
_HF_MUST_BE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "rope_scaling": (None,),
    "use_bidirectional_attention": (False, None),
}


class _Keys:
    """Checked look-ups in a mapping that remembers what was asked for."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source, self.used = raw, source, set[str]()

    def fail(self, key: str, want: str) -> InvalidConfig:
        got = repr(self.raw[key])[:80] if key in self.raw else "nothing"
        return InvalidConfig(f"{self.source}: key '{key}': found {got}, expected {want}")

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def get(self, key: str, want: str, accept: Callable[[Any], bool]) -> Any:
        self.used.add(key)
        # `accept` may compare the value with ==, which NumPy answers for each element of an array.
        if key not in self.raw or isinstance(self.raw[key], np.ndarray) or not accept(self.raw[key]):
            raise self.fail(key, want)
        return self.raw[key]

    def array(self, key: str, want: str, accept: Callable[[list[Any]], bool]) -> list[Any]:
        self.used.add(key)
        value = self.raw.get(key)
        values = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(values, list) or not accept(values):
            raise self.fail(key, want)
        return values

    def count(self, key: str, limit: int = 1 << 24) -> int:
        return int(self.get(key, f"an integer from 1 to {limit}", lambda v: _is_int(v) and 1 <= v <= limit))

    def positive(self, key: str) -> float:
        return _f32(self.get(key, "a positive float32", _is_positive))

    def flag(self, key: str) -> bool:
        return bool(self.get(key, "true or false", lambda v: isinstance(v, bool)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    """Whether a number stays positive and finite as a float32, and loses no digits to underflow."""
    return (_is_int(value) or isinstance(value, float)) and _F32_TINY <= value <= _F32_MAX


def _f32(value: float) -> float:
    return float(np.float32(value))


@overload
def _shortest(value: float) -> float: ...
@overload
def _shortest(value: float | None) -> float | None: ...
def _shortest(value: float | None) -> float | None:
    """The shortest decimal number that is this float32: 1e-06, not 9.999999974752427e-07."""
    return None if value is None else float(str(np.float32(value)))


def _from_hf(keys: _Keys) -> ModelConfig:
    raw = keys.raw
    family = keys.get("model_type", f"one of {', '.join(_FAMILIES)}", lambda v: v in _FAMILIES)
    n_layers = keys.count("num_hidden_layers", 1024)
    head_dim = keys.count("head_dim", 4096)
    _check_activation(keys, family)
    for key, values in _HF_MUST_BE.items():
        if key in raw:
            keys.get(key, " or ".join(map(repr, values)), values.__contains__)
    rope_base = _hf_rope_base(keys)

    if family == "gemma2":
        windows = _hf_windows(keys, n_layers)
        scalar = keys.positive("query_pre_attn_scalar")
        attn_softcap = _optional_positive(keys, "attn_logit_softcapping")
        final_softcap = _optional_positive(keys, "final_logit_softcapping")
    else:
        windows, scalar, attn_softcap, final_softcap = family_windows(family, n_layers, None), head_dim, None, None
        if "layer_types" in raw:
            all_global = lambda v: v is None or v == ["full_attention"] * n_layers  # noqa: E731
            keys.get("layer_types", "only 'full_attention'", all_global)

    config = ModelConfig(
        family=family,
        vocab_size=keys.count("vocab_size"),
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        n_heads=keys.count("num_attention_heads", 1024),
        n_kv_heads=keys.count("num_key_value_heads", 1024),
        head_dim=head_dim,
        context_length=keys.count("max_position_embeddings"),
        rms_eps=keys.positive("rms_norm_eps"),
        query_pre_attn_scalar=_f32(scalar),
        attn_softcap=attn_softcap,
        final_softcap=final_softcap,
        post_norms=family == "gemma2",
        # Published Gemma configs leave this key out and mean a tied head.
        tied_head=keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else True,
        layers=tuple(LayerConfig(window, rope_base) for window in windows),
    )
    unknown = sorted(set(raw) - keys.used - _HF_IRRELEVANT - {"tie_word_embeddings"})
    if unknown:
        raise InvalidConfig(
            f"{keys.source}: unknown key {unknown[0][:80]!r} = {repr(raw[unknown[0]])[:80]}: it may change "
            "what the model computes, so bezel does not guess; remove it from the file if you know that it "
            "does not"
        )
    return _checked(config, keys.source)


def _check_activation(keys: _Keys, family: str) -> None:
    # Gemma 1's first configs say "gelu" and mean the tanh approximation, as transformers reads them too.
    accepted = ("gelu_pytorch_tanh", "gelu") if family == "gemma" else ("gelu_pytorch_tanh",)
    names = [name for name in ("hidden_activation", "hidden_act") if keys.has(name)]
    if not names:
        raise keys.fail("hidden_activation", "'gelu_pytorch_tanh'")
    for name in names:
        keys.get(name, "'gelu_pytorch_tanh'", accepted.__contains__)
    keys.used |= {"hidden_activation", "hidden_act"}


def _hf_rope_base(keys: _Keys) -> float:
    """`rope_theta`, or nested in `rope_parameters` as recent configs write it; both must agree."""
    keys.used |= {"rope_theta", "rope_parameters"}
    bases = []
    if keys.has("rope_parameters"):
        nested = keys.raw["rope_parameters"]
        plain = isinstance(nested, dict) and nested.get("rope_type", "default") == "default"
        if not plain or set(nested) - {"rope_theta", "rope_type"}:
            raise keys.fail("rope_parameters", "{'rope_theta': …, 'rope_type': 'default'}: bezel has no scaled RoPE")
        bases.append(_Keys(nested, f"{keys.source}: rope_parameters").positive("rope_theta"))
    if keys.has("rope_theta"):
        bases.append(keys.positive("rope_theta"))
    if not bases:
        raise keys.fail("rope_theta", "the RoPE base, here or in 'rope_parameters'")
    if len(set(bases)) > 1:
        raise keys.fail("rope_theta", f"{bases[0]:g} as in 'rope_parameters'")
    return bases[0]


def _hf_windows(keys: _Keys, n_layers: int) -> tuple[int | None, ...]:
    window = keys.count("sliding_window")
    if keys.has("sliding_window_size") and keys.count("sliding_window_size") != window:
        raise keys.fail("sliding_window_size", f"{window} as in 'sliding_window'")
    keys.used |= {"sliding_window_size", "layer_types"}
    if not keys.has("layer_types"):
        return family_windows("gemma2", n_layers, window)
    kinds: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    types = keys.raw["layer_types"]
    if not isinstance(types, list) or len(types) != n_layers or any(t not in tuple(kinds) for t in types):
        raise keys.fail("layer_types", f"{n_layers} entries, each one of {', '.join(kinds)}")
    return tuple(kinds[t] for t in types)


def _optional_positive(keys: _Keys, key: str) -> float | None:
    keys.used.add(key)
    if key in keys.raw and keys.raw[key] is None:
        return None
    return keys.positive(key)


def _from_gguf(keys: _Keys, vocab_size: int, tied_head: bool) -> ModelConfig:
    raw = keys.raw
    family = keys.get("general.architecture", f"one of {', '.join(_FAMILIES)}", lambda v: v in _FAMILIES)
    n_layers = keys.count(f"{family}.block_count", 1024)
    hidden_size = keys.count(f"{family}.embedding_length")
    n_heads = keys.count(f"{family}.attention.head_count", 1024)
    head_dim = keys.count(f"{family}.attention.key_length", 4096)
    same_dim = (f"{head_dim} as key_length", lambda v: v == head_dim)
    keys.get(f"{family}.attention.value_length", *same_dim)
    if f"{family}.rope.dimension_count" in raw:
        keys.get(f"{family}.rope.dimension_count", *same_dim)
    if f"{family}.rope.scaling.type" in raw:
        keys.get(f"{family}.rope.scaling.type", "'none': bezel has no scaled RoPE", lambda v: v == "none")
    if f"{family}.vocab_size" in raw:
        keys.get(f"{family}.vocab_size", f"{vocab_size}, the number of tokens", lambda v: v == vocab_size)

    base_key = f"{family}.rope.freq_base"
    rope_base = keys.positive(base_key) if base_key in raw else _PUBLISHED_ROPE_BASE
    attn_softcap, final_softcap, window = None, None, None
    if family == "gemma2":
        attn_softcap = _softcap(keys, "gemma2.attn_logit_softcapping")
        final_softcap = _softcap(keys, "gemma2.final_logit_softcapping")
        window = keys.count("gemma2.attention.sliding_window")

    if "bezel.attention.query_pre_attn_scalar" in raw:
        scalar = keys.positive("bezel.attention.query_pre_attn_scalar")
    else:  # the 27B scales by hidden / heads; every other published Gemma 1 and 2 by head_dim
        scalar = hidden_size // n_heads if family == "gemma2" and n_layers == 46 else head_dim

    windows = family_windows(family, n_layers, window)
    if "bezel.attention.layer_windows" in raw:
        accept = lambda v: len(v) == n_layers and all(_is_int(w) and 0 <= w < 1 << 24 for w in v)  # noqa: E731
        want = f"{n_layers} windows, 0 for a global layer"
        windows = tuple(w or None for w in keys.array("bezel.attention.layer_windows", want, accept))

    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.count(f"{family}.feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=keys.count(f"{family}.attention.head_count_kv", 1024),
        head_dim=head_dim,
        context_length=keys.count(f"{family}.context_length"),
        rms_eps=keys.positive(f"{family}.attention.layer_norm_rms_epsilon"),
        query_pre_attn_scalar=_f32(scalar),
        attn_softcap=attn_softcap,
        final_softcap=final_softcap,
        post_norms=family == "gemma2",
        tied_head=tied_head,
        layers=tuple(LayerConfig(w, rope_base) for w in windows),
    )
    unknown = sorted({k for k in raw if k.startswith((f"{family}.", "bezel.attention."))} - keys.used)
    if unknown:
        raise InvalidConfig(
            f"{keys.source}: unknown key {unknown[0][:80]!r} = {repr(raw[unknown[0]])[:80]}: it may change "
            "what the model computes, so bezel does not guess"
        )
    return _checked(config, keys.source)


def _softcap(keys: _Keys, key: str) -> float | None:
    """A soft-cap as GGUF stores it; 0 is none."""
    accept = lambda v: _is_positive(v) or (v == 0 and not isinstance(v, bool))  # noqa: E731
    return _f32(keys.get(key, "a positive float32, or 0 for none", accept)) or None


def _checked(config: ModelConfig, source: str) -> ModelConfig:
    if config.n_heads % config.n_kv_heads:
        raise InvalidConfig(f"{source}: {config.n_heads} query heads cannot share {config.n_kv_heads} KV heads evenly")
    if config.query_pre_attn_scalar == 0:  # by the 27B's rule, hidden // heads
        raise InvalidConfig(
            f"{source}: {config.n_heads} query heads are too many for a hidden size of {config.hidden_size}"
        )
    if config.head_dim % 2:
        raise InvalidConfig(f"{source}: head_dim {config.head_dim} is odd; RoPE turns pairs")
    return config
