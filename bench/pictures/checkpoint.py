"""The small model that sees as Hugging Face has one: sizes, tokenizer, template, and what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...export.sources.tokenizer_json import write_tokenizer_json
from ...runtime.text.sentencepiece_model import read_vocabulary_file
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.text.vocabulary import CONTROL_PIECES, END_OF_IMAGE, START_OF_IMAGE
from .draw import COLOURS, KINDS, NUMBERS, PLACES, SHAPES, SIZE, question, scene
from .samples import PIECES, ROWS, SMALL_TALK

SEED = 20261128
TEXT_SIZE = 256  # numbers in a row

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 14,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}
TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": PIECES + 64,
    "hidden_size": TEXT_SIZE,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 64,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# What Gemma 3's template does, in this project's own words.
TEMPLATE = """\
{{ bos_token }}{% set opening = namespace(text="") %}{% for message in messages %}
{%- if message.role == "system" %}
{%- set opening.text = (message.content if message.content is string else message.content[0].text) | trim + "\\n\\n" %}
{%- else %}<start_of_turn>{{ "model" if message.role == "assistant" else message.role }}
{{ opening.text }}{% set opening.text = "" %}{% if message.content is string %}{{ message.content | trim }}
{%- else %}{% for part in message.content %}
{%- if part.type == "image" %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}
{%- endfor %}{% endif %}<end_of_turn>
{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def train_tokenizer(folder: Path) -> Tokenizer:
    """A SentencePiece vocabulary as Gemma 3's is laid out, over what is said of pictures and some tales, in a file."""
    from sentencepiece import SentencePieceTrainer

    random = np.random.default_rng(SEED)
    lines = [*SMALL_TALK, *SMALL_TALK.values(), *COLOURS, *SHAPES, *NUMBERS, *PLACES]
    for i in range(4000):
        things = scene(random, int(random.integers(1, 5)))
        asked = question(things, KINDS[i % len(KINDS)], random)
        lines += [asked.text, asked.answer]
    tales = (Path(__file__).parents[1] / "data" / "fairy-heldout.txt").read_text(encoding="utf-8")
    lines += [line for line in tales.splitlines() if line.strip()][:400]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=[*CONTROL_PIECES[3:], *("\n" * n for n in range(1, 5))],
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return Tokenizer(read_vocabulary_file(folder / "tokenizer.model"), str(folder))


def new_model() -> Any:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(SEED)
    config: Any = Gemma3Config
    config = config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=ROWS,
        image_token_index=PIECES,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=config.vision_config.hidden_size**-0.5)  # which is left at zero
    return model


def save(model: Any, folder: Path) -> None:
    """The weights in bfloat16."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def write_companions(folder: Path) -> None:
    """What Hugging Face's libraries read beside weights and config, made from tokenizer.model, which then goes."""
    vocabulary = read_vocabulary_file(folder / "tokenizer.model")
    tokenizer = write_tokenizer_json(vocabulary)
    soft = {"id": PIECES, "content": "<image_soft_token>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append(soft | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    eyes = {"boi_token": START_OF_IMAGE, "eoi_token": END_OF_IMAGE, "image_token": soft["content"]}
    special = {
        name: f"<{name.removesuffix('_token')}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    files: dict[str, Any] = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": TEXT["max_position_embeddings"],
            "extra_special_tokens": eyes,
            **special,
        },
        "generation_config.json": {
            "bos_token_id": vocabulary.bos_id,
            "eos_token_id": [vocabulary.eos_id, vocabulary.turn_ids()[1]],
            "pad_token_id": vocabulary.pad_id,
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": SIZE, "width": SIZE},
            "resample": 2,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": ROWS},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "tokenizer.model").unlink()
