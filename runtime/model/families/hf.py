"""A Hugging Face config.json, read strictly and written: a missing key is an error, and so is an unknown one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ...errors import InvalidConfig
from ..config import LayerConfig, ModelConfig
from ..keys import Keys, f32, shortest
from . import FAMILIES, Family, other_model

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# Keys that say nothing about the forward pass at inference.
_IRRELEVANT = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map "
    "bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id dtype eos_token_id "
    "finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range keys_to_ignore_at_inference "
    "label2id max_length output_attentions output_hidden_states pad_token_id prefix problem_type return_dict "
    "sep_token_id task_specific_params tokenizer_class torch_dtype transformers.js_config transformers_version "
    "unsloth_fixed unsloth_version use_cache".split()
)
# … and those around a "text_config", which tell of pictures or are the text's own said again.
_AROUND_TEXT = frozenset(
    "boi_token_index boi_token_id eoi_token_index eoi_token_id hidden_size ignore_index image_token_index "
    "image_token_id mm_tokens_per_image num_hidden_layers projection_dim vision_config vocab_size".split()
)
# Keys that change the mathematics unless they hold one of these values.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
}
_REMOVE_IT = "; remove it from the file if you know that it does not"


def read_hf_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """From a parsed config.json; `source` names it in errors. Raises InvalidConfig."""
    keys = Keys(raw, source)
    types = {name: f for f in FAMILIES.values() for name in (f.hf_type, f.hf_outer) if name}
    want = f"one of {', '.join(types)}: {other_model(raw.get('model_type'))}"
    kind = keys.get("model_type", want, lambda v: isinstance(v, str) and v in types)
    family = types[kind]
    if kind != family.hf_outer:
        return _read(Keys({**family.hf_defaults, **keys.raw}, source), family)
    text = _text_config(keys, family)
    defaults = {**family.hf_defaults, **family.hf_outer_defaults}
    if text.has("rope_parameters"):
        defaults.pop("rope_theta", None)
    return _read(Keys({**defaults, **text.raw}, text.source), family)


def text_name(name: str, raw: Mapping[str, Any]) -> str | None:
    """What a tensor of a checkpoint with this config.json is called where there is text only; None: it is of pictures.

    Versions of transformers name the parts of a model that sees pictures in two ways.
    """
    if not sees_pictures(raw):
        return name
    if name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    nested = "model.language_model."
    return f"model.{name.removeprefix(nested)}" if name.startswith(nested) else name.removeprefix("language_model.")


def sees_pictures(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json describes a model with an eye."""
    return raw.get("model_type") in {f.hf_outer for f in FAMILIES.values()} - {None} and "vision_config" in raw


def _text_config(keys: Keys, family: Family) -> Keys:
    text = keys.get("text_config", "the text model's config", lambda v: isinstance(v, dict))
    if "tie_word_embeddings" in keys.raw and "tie_word_embeddings" not in text:
        text = {**text, "tie_word_embeddings": keys.flag("tie_word_embeddings")}
    if family.hf_outer_sees_prefix:  # what these say of the prefix is the eye's business
        text = {
            key: value for key, value in text.items() if key not in ("use_bidirectional_attention", "num_image_tokens")
        }
    keys.used.add("tie_word_embeddings")
    keys.refuse_unknown(_IRRELEVANT | _AROUND_TEXT, _REMOVE_IT)
    return Keys({"model_type": family.hf_type, **text}, f"{keys.source}: text_config")


def _read(keys: Keys, family: Family) -> ModelConfig:
    keys.get("model_type", repr(family.hf_type), lambda v: v == family.hf_type)
    n_layers = keys.count("num_hidden_layers", 1024)
    _check_activation(keys, family)
    for key, values in {**_MUST_BE, **family.hf_must_be}.items():
        keys.must_be(key, values)
    windows, ropes = _windows(keys, family, n_layers), _ropes(keys, family)
    layer = LayerConfig(
        window=None,
        n_heads=keys.count("num_attention_heads", 1024),
        n_kv_heads=keys.count("num_key_value_heads", 1024),
        head_dim=keys.count("head_dim", 4096),
        intermediate_size=keys.count("intermediate_size"),
        rope_base=0,
        rope_factor=1,
        post_norms=family.post_norms,
        qk_norms=family.qk_norms,
    )
    hidden_size = keys.count("hidden_size")
    config = ModelConfig(
        family=family.name,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        context_length=keys.count("max_position_embeddings"),
        rms_eps=keys.positive("rms_norm_eps"),
        embedding_scale=math.sqrt(hidden_size),
        query_pre_attn_scalar=keys.positive("query_pre_attn_scalar") if family.says_query_scalar else layer.head_dim,
        attn_softcap=_softcap(keys, family, "attn"),
        final_softcap=_softcap(keys, family, "final"),
        # Published configs leave this key out and mean a tied head.
        tied_head=keys.flag("tie_word_embeddings") if keys.has("tie_word_embeddings") else True,
        layers=tuple(
            replace(layer, window=window, rope_base=base, rope_factor=factor)
            for window in windows
            for base, factor in [ropes[_GLOBAL if window is None else _LOCAL]]
        ),
    )
    keys.refuse_unknown({*_IRRELEVANT, "tie_word_embeddings"}, _REMOVE_IT)
    return config.checked(keys.source)


def _check_activation(keys: Keys, family: Family) -> None:
    names = [name for name in ("hidden_activation", "hidden_act") if keys.has(name)]
    if not names:
        raise keys.fail("hidden_activation", "'gelu_pytorch_tanh'")
    for name in names:
        keys.get(name, "'gelu_pytorch_tanh'", family.hf_activations.__contains__)
    keys.used |= {"hidden_activation", "hidden_act"}


def _softcap(keys: Keys, family: Family, what: str) -> float | None:
    key = f"{what}_logit_softcapping"
    if what not in family.softcaps or (not family.says_softcaps and key not in keys.raw):
        return None
    keys.used.add(key)
    return None if key in keys.raw and keys.raw[key] is None else keys.positive(key)


def _windows(keys: Keys, family: Family, n_layers: int) -> tuple[int | None, ...]:
    if family.period is None:
        if "layer_types" in keys.raw:
            keys.get("layer_types", f"only '{_GLOBAL}'", lambda v: v is None or v == [_GLOBAL] * n_layers)
        return (None,) * n_layers
    window = keys.count("sliding_window")
    if keys.has("sliding_window_size") and keys.count("sliding_window_size") != window:
        raise keys.fail("sliding_window_size", f"{window} as in 'sliding_window'")
    keys.used |= {"sliding_window_size", "layer_types", "_sliding_window_pattern"}
    if keys.has("layer_types"):  # then the pattern says nothing
        keys.used.add("sliding_window_pattern")
        kinds: dict[str, int | None] = {_LOCAL: window, _GLOBAL: None}
        types = keys.raw["layer_types"]
        if not isinstance(types, list) or len(types) != n_layers or any(t not in tuple(kinds) for t in types):
            raise keys.fail("layer_types", f"{n_layers} entries, each one of {', '.join(kinds)}")
        return tuple(kinds[t] for t in types)
    if keys.has("_sliding_window_pattern") and not keys.has("sliding_window_pattern"):
        # transformers writes it beside layer_types, and reads it no more.
        raise keys.fail("_sliding_window_pattern", "'layer_types' beside it, which says what each layer is")
    if keys.has("sliding_window_pattern") and family.local_rope_base is not None:
        return replace(family, period=keys.count("sliding_window_pattern", 1024)).windows(n_layers, window)
    return family.windows(n_layers, window)


def _ropes(keys: Keys, family: Family) -> dict[str, tuple[float, float]]:
    """Base and factor by kind of layer: from `rope_parameters` as recent configs write them, or the older keys."""
    keys.used |= {"rope_theta", "rope_parameters", "rope_scaling"}
    if family.local_rope_base is None:
        base = _one_base(keys)
        return {_LOCAL: (base, 1.0), _GLOBAL: (base, 1.0)}
    keys.used.add("rope_local_base_freq")
    found = {}
    nested = keys.raw.get("rope_parameters") or {}
    sound = isinstance(nested, dict) and all(inner is None or isinstance(inner, dict) for inner in nested.values())
    if not sound or set(nested) - {_LOCAL, _GLOBAL}:
        raise keys.fail("rope_parameters", f"an entry for each of {_LOCAL}, {_GLOBAL}")
    old = {_GLOBAL: "rope_theta", _LOCAL: "rope_local_base_freq"}
    for kind, published in ((_GLOBAL, family.rope_base), (_LOCAL, family.local_rope_base)):
        inner, key = Keys(nested.get(kind) or {}, f"{keys.source}: rope_parameters: {kind}"), old[kind]
        base = keys.positive(key) if keys.has(key) else f32(published)
        if inner.has("rope_theta"):
            if keys.has(key) and inner.positive("rope_theta") != base:
                raise keys.fail(key, f"{inner.raw['rope_theta']:g} as in 'rope_parameters'")
            base = inner.positive("rope_theta")
        found[kind] = base, _factor(inner, allowed=kind == _GLOBAL)
    if keys.has("rope_scaling"):
        scaling = keys.get(
            "rope_scaling", "a type and a factor", lambda v: isinstance(v, dict) and "rope_theta" not in v
        )
        factor = _factor(Keys(scaling, f"{keys.source}: rope_scaling"), allowed=True)
        if found[_GLOBAL][1] not in (1.0, factor):
            raise keys.fail("rope_scaling", f"a factor of {found[_GLOBAL][1]:g} as in 'rope_parameters'")
        found[_GLOBAL] = found[_GLOBAL][0], factor
    return found


def _factor(keys: Keys, allowed: bool) -> float:
    """What positions are divided by."""
    kinds = ("default", "linear") if allowed else ("default",)
    names = [name for name in ("rope_type", "type") if name in keys.raw]
    for name in names:
        keys.get(name, f"{' or '.join(map(repr, kinds))}: bezel knows no other scaling here", kinds.__contains__)
    if len({keys.raw[name] for name in names}) > 1:
        raise keys.fail("type", f"{keys.raw['rope_type']!r} as in 'rope_type'")
    linear = any(keys.raw[name] == "linear" for name in names)
    factor = keys.positive("factor") if linear else 1.0
    keys.refuse_unknown({"rope_theta"})
    return factor


def _one_base(keys: Keys) -> float:
    """`rope_theta`, or nested in `rope_parameters`; both must agree."""
    if keys.has("rope_scaling"):
        raise keys.fail("rope_scaling", "None")
    bases = []
    if keys.has("rope_parameters"):
        nested = keys.raw["rope_parameters"]
        plain = isinstance(nested, dict) and nested.get("rope_type", "default") == "default"
        if not plain or set(nested) - {"rope_theta", "rope_type"}:
            raise keys.fail("rope_parameters", "{'rope_theta': …, 'rope_type': 'default'}: this family scales no RoPE")
        bases.append(Keys(nested, f"{keys.source}: rope_parameters").positive("rope_theta"))
    if keys.has("rope_theta"):
        bases.append(keys.positive("rope_theta"))
    if not bases:
        raise keys.fail("rope_theta", "the RoPE base, here or in 'rope_parameters'")
    if len(set(bases)) > 1:
        raise keys.fail("rope_theta", f"{bases[0]:g} as in 'rope_parameters'")
    return bases[0]


def write_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json that `read_hf_config` reads and transformers too. Raises InvalidConfig for a model that has none.

    Only a GGUF file can describe such a model: one whose layers have windows of several lengths, say.
    """
    family, layer = FAMILIES[config.family], config.layers[0]
    out: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.hf_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": layer.n_heads,
        "num_key_value_heads": layer.n_kv_heads,
        "head_dim": layer.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": shortest(config.rms_eps),
        "attention_bias": False,
        "tie_word_embeddings": config.tied_head,
        family.hf_activation: "gelu_pytorch_tanh",
    }
    out |= _written_ropes(config, family)
    if family.says_query_scalar:
        scalar = shortest(config.query_pre_attn_scalar)
        out["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
    for what, cap in (("attn", config.attn_softcap), ("final", config.final_softcap)):
        if what in family.softcaps:
            out[f"{what}_logit_softcapping"] = None if cap is None else shortest(cap)
    if family.period is not None:
        windows = [layer.window for layer in config.layers]
        out["sliding_window"] = max(window or 0 for window in windows) or config.context_length
        out["layer_types"] = [_LOCAL if window else _GLOBAL for window in windows]
    read = read_hf_config(out)
    for field in fields(config):
        if getattr(read, field.name) != getattr(config, field.name):
            raise InvalidConfig(f"a {family.title} config.json cannot express this model's {field.name}")
    return out


def _written_ropes(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.local_rope_base is None:
        return {"rope_theta": shortest(config.layers[0].rope_base)}
    bases = {_GLOBAL: (family.rope_base, 1.0), _LOCAL: (family.local_rope_base, 1.0)}
    for layer in config.layers:
        bases[_GLOBAL if layer.window is None else _LOCAL] = layer.rope_base, layer.rope_factor
    return {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": shortest(base)}
            | ({"rope_type": "linear", "factor": shortest(factor)} if factor != 1 else {})
            for kind, (base, factor) in bases.items()
        }
    }
