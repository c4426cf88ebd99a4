"""GGUF's metadata about a model, read strictly, as llama.cpp writes it too, and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import InvalidConfig
from ..config import LayerConfig, ModelConfig
from ..keys import Keys, f32, is_int, is_positive
from . import FAMILIES, Family, other_model

# What GGUF has no key for.
_SCALAR, _WINDOWS = "bezel.attention.query_pre_attn_scalar", "bezel.attention.layer_windows"


def read_gguf_config(metadata: Mapping[str, Any], *, vocab_size: int, tied_head: bool, source: str) -> ModelConfig:
    """From GGUF metadata, llama.cpp's files included; `source` names it in errors. Raises InvalidConfig.

    What GGUF has no standard key for is read from `bezel.*`, else follows the family's published rule.
    """
    keys = Keys(metadata, source)
    want = f"one of {', '.join(FAMILIES)}: {other_model(metadata.get('general.architecture'))}"
    arch = keys.get("general.architecture", want, lambda v: isinstance(v, str) and v in FAMILIES)
    family = FAMILIES[arch]
    n_layers = keys.count(f"{arch}.block_count", 1024)
    hidden_size = keys.count(f"{arch}.embedding_length")
    n_heads = keys.count(f"{arch}.attention.head_count", 1024)
    head_dim = keys.count(f"{arch}.attention.key_length", 4096)
    same_dim = (f"{head_dim} as key_length", lambda v: v == head_dim)
    keys.get(f"{arch}.attention.value_length", *same_dim)
    if f"{arch}.rope.dimension_count" in metadata:
        keys.get(f"{arch}.rope.dimension_count", *same_dim)
    if f"{arch}.vocab_size" in metadata:
        keys.get(f"{arch}.vocab_size", f"{vocab_size}, the number of tokens", lambda v: v == vocab_size)
    if _SCALAR in metadata:
        scalar = keys.positive(_SCALAR)
    else:
        scalar = f32(hidden_size // n_heads if n_layers in family.scales_by_width else head_dim)

    ropes = _ropes(keys, family)
    layer = LayerConfig(
        window=None,
        n_heads=n_heads,
        n_kv_heads=keys.count(f"{arch}.attention.head_count_kv", 1024),
        head_dim=head_dim,
        intermediate_size=keys.count(f"{arch}.feed_forward_length"),
        rope_base=0,
        rope_factor=1,
        post_norms=family.post_norms,
        qk_norms=family.qk_norms,
    )
    windows = _windows(keys, family, n_layers)
    config = ModelConfig(
        family=arch,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        context_length=keys.count(f"{arch}.context_length"),
        rms_eps=keys.positive(f"{arch}.attention.layer_norm_rms_epsilon"),
        embedding_scale=math.sqrt(hidden_size),
        query_pre_attn_scalar=scalar,
        attn_softcap=_softcap(keys, family, "attn"),
        final_softcap=_softcap(keys, family, "final"),
        tied_head=tied_head,
        layers=tuple(
            replace(layer, window=window, rope_base=base, rope_factor=factor)
            for window in windows
            for base, factor in [ropes[window is not None]]
        ),
    )
    others = {key for key in metadata if not key.startswith((f"{arch}.", "bezel.attention."))}
    keys.refuse_unknown(others)
    return config.checked(source)


def _softcap(keys: Keys, family: Family, what: str) -> float | None:
    """A soft-cap as GGUF stores it; 0 is none. Early files of llama.cpp's leave it out, which takes a number for it."""
    key = f"{family.name}.{what}_logit_softcapping"
    if key not in keys.raw and what in family.gguf_softcaps:
        return family.gguf_softcaps[what]
    if what not in family.softcaps or (not family.says_softcaps and key not in keys.raw):
        return None
    accept = lambda v: is_positive(v) or (v == 0 and not isinstance(v, bool))  # noqa: E731
    return f32(keys.get(key, "a positive float32, or 0 for none", accept)) or None


def _ropes(keys: Keys, family: Family) -> dict[bool, tuple[float, float]]:
    """Base and factor of the global layers (False) and of the local ones (True).

    llama.cpp's rules: the base is 10000 where the file is silent, and a factor is for the global layers alone.
    """

    def base(key: str) -> float:
        return keys.positive(f"{family.name}.{key}") if f"{family.name}.{key}" in keys.raw else 10000.0

    scaling, factor = f"{family.name}.rope.scaling.type", 1.0
    if family.local_rope_base is None:
        keys.must_be(scaling, ("none",), ": this family scales no RoPE")
        return dict.fromkeys((False, True), (base("rope.freq_base"), 1.0))
    keys.must_be(scaling, ("none", "linear"), ": bezel knows no other scaling here")
    for key in (f"{family.name}.rope.scale_linear", f"{family.name}.rope.scaling.factor"):  # the second is the newer
        if key in keys.raw:
            factor = keys.positive(key)
    if keys.raw.get(scaling) == "none":
        factor = 1.0
    return {False: (base("rope.freq_base"), factor), True: (base("rope.freq_base_swa"), 1.0)}


def _windows(keys: Keys, family: Family, n_layers: int) -> tuple[int | None, ...]:
    """bezel's own list, else the file's pattern, which llama.cpp writes as flags or a period, else the family's."""
    window, pattern = None, f"{family.name}.attention.sliding_window_pattern"
    key = f"{family.name}.attention.sliding_window"
    silent = key not in keys.raw or (is_int(keys.raw[key]) and keys.raw[key] == 0)
    if family.period is not None and not (silent and family.local_rope_base is not None):
        window = keys.count(key)
    keys.used.add(key)
    windows = family.windows(n_layers, window)
    if pattern in keys.raw and family.local_rope_base is not None:
        if is_int(keys.raw[pattern]):
            windows = replace(family, period=keys.count(pattern, 1024)).windows(n_layers, window)
        else:
            want = f"a period, or {n_layers} flags, true for a local layer"
            flags = keys.array(pattern, want, lambda v: len(v) == n_layers and all(isinstance(f, bool) for f in v))
            windows = tuple(window if local else None for local in flags)
    if _WINDOWS in keys.raw:
        accept = lambda v: len(v) == n_layers and all(is_int(w) and 0 <= w < 1 << 24 for w in v)  # noqa: E731
        want = f"{n_layers} windows, 0 for a global layer"
        windows = tuple(w or None for w in keys.array(_WINDOWS, want, accept))
    return windows


Metadata = dict[str, int | float | str | list[int] | list[bool]]


def write_gguf_config(config: ModelConfig) -> Metadata:
    """The metadata that `read_gguf_config` reads: ints are uint32, floats float32, lists arrays of uint32 or of bool.

    Raises InvalidConfig for a model that GGUF has no keys for: one whose layers differ in what has one key, say.
    """
    family, layer, arch = FAMILIES[config.family], config.layers[0], config.family
    windows = tuple(layer.window for layer in config.layers)
    out: Metadata = {
        f"{arch}.context_length": config.context_length,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.n_layers,
        f"{arch}.feed_forward_length": layer.intermediate_size,
        f"{arch}.attention.head_count": layer.n_heads,
        f"{arch}.attention.head_count_kv": layer.n_kv_heads,
        f"{arch}.attention.key_length": layer.head_dim,
        f"{arch}.attention.value_length": layer.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_eps,
        **_written_ropes(config, family),
    }
    for what, cap in (("attn", config.attn_softcap), ("final", config.final_softcap)):
        if what in family.softcaps and (family.says_softcaps or cap is not None):
            out[f"{arch}.{what}_logit_softcapping"] = cap or 0.0
    window = max(window or 0 for window in windows)
    if family.period is not None and (window or family.local_rope_base is None):
        out[f"{arch}.attention.sliding_window"] = window or config.context_length
        if family.local_rope_base is not None and windows != family.windows(config.n_layers, window):
            out[f"{arch}.attention.sliding_window_pattern"] = [window is not None for window in windows]

    def read() -> ModelConfig:
        metadata = {"general.architecture": arch, **out}
        return read_gguf_config(metadata, vocab_size=config.vocab_size, tied_head=config.tied_head, source="metadata")

    if read().query_pre_attn_scalar != config.query_pre_attn_scalar:
        out[_SCALAR] = config.query_pre_attn_scalar
    if tuple(layer.window for layer in read().layers) != windows:
        out[_WINDOWS] = [window or 0 for window in windows]
    if read() != config:
        raise InvalidConfig(f"GGUF has no keys for such a {family.title} model: layers of several shapes, perhaps")
    return out


def _written_ropes(config: ModelConfig, family: Family) -> Metadata:
    arch = family.name
    if family.local_rope_base is None:
        return {f"{arch}.rope.freq_base": config.layers[0].rope_base}
    bases = {False: (family.rope_base, 1.0), True: (family.local_rope_base, 1.0)}
    for layer in config.layers:
        bases[layer.window is not None] = layer.rope_base, layer.rope_factor
    (base, factor), (local_base, _) = bases[False], bases[True]
    out: Metadata = {f"{arch}.rope.freq_base": base, f"{arch}.rope.freq_base_swa": local_base}
    if factor != 1:
        out |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": factor}
    return out
