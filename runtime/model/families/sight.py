"""What describes a model's eye: `vision_config` in a Hugging Face config.json, the clip.* keys of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidConfig
from ..keys import Keys, is_positive, shortest
from ..vision import CHANNELS, GEMMA3, PALIGEMMA, VisionConfig

# SigLIP's own defaults, which published configs leave out.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": CHANNELS,
}
# Keys that say nothing of what becomes of a picture here: transformers' own, and those of the head, which is left out.
_IRRELEVANT = frozenset(
    "_attn_implementation _attn_implementation_autoset architectures attention_dropout dtype initializer_range "
    "model_type num_image_tokens num_positions projection_dim projector_hidden_act torch_dtype transformers_version "
    "vision_use_head".split()
)
_TOWER = "siglip_vision_model"
# What transformers calls the models, and what prepares pictures for them.
_CLASSES = {GEMMA3: "Gemma3ForConditionalGeneration", PALIGEMMA: "PaliGemmaForConditionalGeneration"}
_PROCESSORS = {GEMMA3: "Gemma3ImageProcessor", PALIGEMMA: "SiglipImageProcessor"}
_PROJECTOR_ARCHITECTURE = "clip"  # what llama.cpp calls the file of any eye


def read_hf_vision(raw: Mapping[str, Any], text_size: int, source: str, prepared: Mapping[str, Any]) -> VisionConfig:
    """From a parsed config.json around a text model of the hidden size `text_size`; `source` names it in errors.

    `prepared` is preprocessor_config.json. Raises InvalidConfig.
    """
    outer = Keys(raw, source)
    nested = outer.get("vision_config", "the vision tower's config", lambda v: isinstance(v, dict))
    keys = Keys({**_DEFAULTS, **nested}, f"{source}: vision_config")
    keys.get("hidden_act", "'gelu_pytorch_tanh'", lambda v: v == "gelu_pytorch_tanh")
    keys.get("num_channels", str(CHANNELS), lambda v: v == CHANNELS)
    if keys.has("model_type"):
        keys.get("model_type", repr(_TOWER), lambda v: v == _TOWER)
    projector = outer.get("model_type", f"'{GEMMA3}' or '{PALIGEMMA}'", lambda v: v in (GEMMA3, PALIGEMMA))
    image, patch = keys.count("image_size", 1 << 14), keys.count("patch_size", 1 << 10)
    pool = 1
    if projector == GEMMA3:
        n_rows = outer.count("mm_tokens_per_image", 1 << 16) if outer.has("mm_tokens_per_image") else 256
        side = math.isqrt(n_rows)
        pool = image // patch // side
        if side * side != n_rows or pool * side * patch != image:
            raise outer.fail("mm_tokens_per_image", f"a square number that divides {image // patch}² patches evenly")
    config = VisionConfig(
        projector=projector,
        image_size=image,
        patch_size=patch,
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        n_layers=keys.count("num_hidden_layers", 1024),
        n_heads=keys.count("num_attention_heads", 1024),
        eps=keys.positive("layer_norm_eps"),
        pool=pool,
        text_size=text_size,
        **_normalisation(Keys(prepared, "preprocessor_config.json"), "image_mean", "image_std"),
    )
    keys.refuse_unknown(_IRRELEVANT)
    _check_prepared(Keys(prepared, "preprocessor_config.json"), config)
    return config.checked(keys.source)


def _check_prepared(keys: Keys, config: VisionConfig) -> None:
    """Raises InvalidConfig for pictures that would be prepared in another way than bezel's."""
    _, want = write_hf_vision(config, {})
    for key in ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize"):
        expected = want[key]

        def same(found: Any, expected: Any = expected) -> bool:
            if isinstance(expected, float):
                return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-6)
            return bool(found == expected)

        if keys.has(key):  # null is what the processor has by itself
            keys.get(key, f"{expected!r}, as this model's pictures are prepared", same)


def is_gguf_vision(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file says that it holds an eye."""
    found = metadata.get("general.architecture")
    return isinstance(found, str) and found == _PROJECTOR_ARCHITECTURE


def write_hf_vision(config: VisionConfig, text: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json around that of a text model, and the preprocessor_config.json, that `read_hf_vision` reads."""
    vision = {
        "model_type": _TOWER,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": CHANNELS,
        "layer_norm_eps": shortest(config.eps),
        "hidden_act": _DEFAULTS["hidden_act"],
        "vision_use_head": False,
    }
    around: dict[str, Any] = {"architectures": [_CLASSES[config.projector]], "model_type": config.projector}
    around |= {"mm_tokens_per_image": config.n_rows} if config.projector == GEMMA3 else {}
    prepared = {
        "image_processor_type": _PROCESSORS[config.projector],
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": {"bilinear": 2, "bicubic": 3}[config.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    return {**around, "text_config": dict(text), "vision_config": vision}, prepared


def read_gguf_vision(metadata: Mapping[str, Any], source: str) -> VisionConfig:
    """From GGUF metadata, llama.cpp's files included; `source` names it in errors. Raises InvalidConfig."""
    keys, v = Keys(metadata, source), "clip.vision"
    architecture = f"'{_PROJECTOR_ARCHITECTURE}', the vision part of a model"
    keys.get("general.architecture", architecture, lambda found: found == _PROJECTOR_ARCHITECTURE)
    if metadata.get("clip.has_audio_encoder") is True:
        raise keys.fail("clip.has_audio_encoder", "false: bezel hears nothing")
    kind = "clip.projector_type" if keys.has("clip.projector_type") else f"{v}.projector_type"
    known = f"'{GEMMA3}' or '{PALIGEMMA}': bezel sees with Gemma 3's eye and PaliGemma's"
    projector = keys.get(kind, known, lambda found: found in (GEMMA3, PALIGEMMA))
    if "clip.use_gelu" in metadata:
        keys.get("clip.use_gelu", "true", lambda found: found is True)
    pool = 4 if projector == GEMMA3 else 1  # llama.cpp's rule where the key is missing
    if keys.has(f"{v}.projector.scale_factor"):
        pool = keys.count(f"{v}.projector.scale_factor", 1 << 10)
    return VisionConfig(
        projector=projector,
        image_size=keys.count(f"{v}.image_size", 1 << 14),
        patch_size=keys.count(f"{v}.patch_size", 1 << 10),
        hidden_size=keys.count(f"{v}.embedding_length"),
        intermediate_size=keys.count(f"{v}.feed_forward_length"),
        n_layers=keys.count(f"{v}.block_count", 1024),
        n_heads=keys.count(f"{v}.attention.head_count", 1024),
        eps=keys.positive(f"{v}.attention.layer_norm_epsilon"),
        pool=pool,
        text_size=keys.count(f"{v}.projection_dim"),
        **_normalisation(keys, f"{v}.image_mean", f"{v}.image_std"),
    ).checked(source)


def write_gguf_vision(config: VisionConfig) -> dict[str, Any]:
    """The metadata that `read_gguf_vision` reads, and llama.cpp for Gemma 3's eye."""
    v = "clip.vision"
    return {
        "general.architecture": _PROJECTOR_ARCHITECTURE,
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": config.projector,
        "clip.use_gelu": True,
        f"{v}.image_size": config.image_size,
        f"{v}.patch_size": config.patch_size,
        f"{v}.embedding_length": config.hidden_size,
        f"{v}.feed_forward_length": config.intermediate_size,
        f"{v}.block_count": config.n_layers,
        f"{v}.attention.head_count": config.n_heads,
        f"{v}.attention.layer_norm_epsilon": shortest(config.eps),
        f"{v}.projection_dim": config.text_size,
        f"{v}.image_mean": list(config.mean),
        f"{v}.image_std": list(config.std),
        f"{v}.projector.scale_factor": config.pool,
    }


def _normalisation(keys: Keys, mean: str, std: str) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of a VisionConfig, as far as they are told."""
    found = {}
    for name, key in (("mean", mean), ("std", std)):
        if keys.raw.get(key) is None:
            continue
        want = f"{CHANNELS} {'positive ' if name == 'std' else ''}numbers"
        values = keys.array(key, want, lambda v: len(v) == CHANNELS and all(map(_is_number, v)))
        if name == "std" and not all(map(is_positive, values)):
            raise keys.fail(key, want)
        found[name] = tuple(shortest(value) for value in values)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6


def vision_name(name: str) -> str | None:
    """What a tensor of a checkpoint with an eye is called in `vision_specs`; None: it is of the text, or unused.

    Versions of transformers differ in the prefixes.
    """
    plain = name.removeprefix("model.")
    if not plain.startswith(("vision_tower.", "multi_modal_projector.")) or ".head." in plain:
        return None
    return plain.replace("vision_tower.vision_model.", "vision_tower.", 1)


def check_fits(vision: VisionConfig, hidden_size: int, source: str) -> None:
    """Raises InvalidConfig unless the eye's rows fit a text model of this hidden size."""
    if vision.text_size != hidden_size:
        raise InvalidConfig(
            f"{source}: makes rows of {vision.text_size} numbers for pictures, and the text model takes {hidden_size}: "
            "they belong to different models"
        )
