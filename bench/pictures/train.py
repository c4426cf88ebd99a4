"""Trains the bundled model that sees pictures: `python -m bezel.bench.pictures.train OUT`, on torch and transformers.

SigLIP's tower and Gemma 3's decoder, both small, from nothing: on pictures that `draw` makes as they are needed, with
questions, and as runs of examples without one. Written as Hugging Face has a Gemma 3 that sees.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...export.sources.tokenizer_json import write_tokenizer_json
from ...runtime.text.tokenizer import CONTROL_PIECES, END_OF_IMAGE, START_OF_IMAGE, Tokenizer, Vocabulary
from .draw import COLOURS, KINDS, NUMBERS, PLACES, SHAPES, SIZE, TASKS, Thing, draw, example, question, scene

SEED, RATE = 20261128, 1e-3
TOWER_STEPS, NAMING_STEPS, STEPS = 700, 220, 3000
BATCH, TOWER_BATCH = 16, 48
QUESTIONS = 2  # about each picture
PIECES, ROWS, TEXT_SIZE = 1024, 16, 256  # of the vocabulary; that a picture becomes; numbers in each

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
SMALL_TALK = {
    "Hello!": "Hello! Show me a picture.",
    "Who are you?": "A very small model that looks at pictures of shapes.",
    "What can you do?": "I say what shapes, colours and numbers I see.",
    "Thank you.": "You are welcome.",
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
    return Tokenizer(Vocabulary.from_model_file(folder / "tokenizer.model"), str(folder))


class Samples:
    """Chats about pictures as ids, whose last part is learned: answers."""

    def __init__(self, tokenizer: Tokenizer, random: np.random.Generator) -> None:
        self._tokenizer, self._random = tokenizer, random

    def _turn(self, role: str, text: str, with_picture: bool = False) -> list[int]:
        t = self._tokenizer
        assert t.start_of_turn_id is not None
        ids = [t.start_of_turn_id]
        if not with_picture:
            return [*ids, *t.encode(f"{role}\n{text}")]
        assert t.start_of_image_id is not None
        assert t.end_of_image_id is not None
        soft = [t.vocab_size] * ROWS
        return [
            *(*ids, *t.encode(f"{role}\n\n\n"), t.start_of_image_id, *soft, t.end_of_image_id),
            *t.encode(f"\n\n{text}"),
        ]

    def make(self, n_pictures: int) -> tuple[list[int], list[int], list[NDArray[np.uint8]]]:
        """Ids, labels and pictures of a chat about so many."""
        random, t = self._random, self._tokenizer
        assert t.end_of_turn_id is not None
        end, newline = t.end_of_turn_id, t.encode("\n")
        ids, labels, pictures = [t.bos_id], [-100], list[NDArray[np.uint8]]()

        def add(asked: str, answer: str, picture: NDArray[np.uint8] | None) -> None:
            before = [*self._turn("user", asked, picture is not None), end, *newline, *self._turn("model", "")]
            said = [*t.encode(answer), end]
            ids.extend([*before, *said, *newline])
            labels.extend([*[-100] * len(before), *said, *[-100] * len(newline)])
            if picture is not None:
                pictures.append(picture)

        if not n_pictures:
            for _ in range(2):
                asked = str(random.choice(list(SMALL_TALK)))
                add(asked, SMALL_TALK[asked], None)
        elif n_pictures > 1 and random.random() < 0.8:
            task = str(random.choice(list(TASKS)))
            for i in range(n_pictures):
                picture, answer = example(task, random)
                add("", answer, picture)
                if not i:  # before an example nobody can know what is wanted
                    labels[-len(t.encode(answer)) - 2 :] = [-100] * (len(t.encode(answer)) + 2)
        else:
            for _ in range(n_pictures):
                things = scene(random, int(random.integers(1, 5)))
                picture = draw(things, random)
                if random.random() < 0.08:  # a picture and no word
                    add("", question(things, "describe", random).answer, picture)
                    continue
                kinds = ["describe", *random.choice(KINDS[:-1], QUESTIONS - 1, replace=False)]
                random.shuffle(kinds)
                for i, kind in enumerate(kinds):  # several questions about a picture
                    one = question(things, str(kind), random)
                    add(one.text, one.answer, picture if not i else None)
        return ids, labels, pictures


def batches(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """What the model's forward takes, BATCH chats at a time, all about as many pictures."""
    import torch

    random = np.random.default_rng(SEED)
    samples = Samples(tokenizer, random)
    while True:
        n_pictures = int(random.choice(6, p=[0.02, 0.58, 0.1, 0.05, 0.05, 0.2]))
        size = max(4, BATCH // max(1, (n_pictures + 1) // 2))
        rows = [samples.make(n_pictures) for _ in range(size)]
        length = max(len(ids) for ids, _, _ in rows)
        ids = torch.zeros((size, length), dtype=torch.long)
        labels = torch.full((size, length), -100)
        for i, (row, wanted, _) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(wanted)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}
        batch["token_type_ids"] = (ids == tokenizer.vocab_size).long()
        pictures = [picture for _, _, seen in rows for picture in seen]
        if pictures:
            batch["pixel_values"] = _pixels(pictures)
        yield batch


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


def train_tower(model: Any) -> None:
    """Teach the tower alone to tell what is in each place, with a head that is thrown away.

    From answers in words it learns that, too, but only after many times as many pictures.
    """
    import torch

    names: list[list[str | None]] = [[None, *COLOURS], [None, *SHAPES]]
    head = torch.nn.Linear(ROWS // len(PLACES) * TEXT_SIZE, sum(map(len, names)))
    optimizer = _optimizer(*_eye(model), *head.parameters())
    random = np.random.default_rng([SEED, 1])
    began = time.time()
    for step in range(TOWER_STEPS):
        _set_rate(optimizer, step, TOWER_STEPS)
        scenes = _scenes(random, TOWER_BATCH)
        places = _by_place(model, scenes, random).flatten(2)
        loss = torch.zeros(())
        for known, found, of in zip(
            names, head(places).split([*map(len, names)], -1), ("colour", "shape"), strict=True
        ):
            wanted = torch.zeros((len(scenes), len(PLACES)), dtype=torch.long)
            for i, things in enumerate(scenes):
                for thing in things:
                    wanted[i, thing.place] = known.index(getattr(thing, of))
            loss = loss + torch.nn.functional.cross_entropy(found.flatten(0, 1), wanted.flatten())
        _step(optimizer, loss)
        if step % 50 == 0:
            print(
                f"tower: step {step} of {TOWER_STEPS}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True
            )


def _eye(model: Any) -> list[Any]:
    return [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]


def _optimizer(*parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)


def _scenes(random: np.random.Generator, count: int) -> list[list[Thing]]:
    return [scene(random, int(random.integers(1, 5))) for _ in range(count)]


def _set_rate(optimizer: Any, step: int, steps: int) -> None:
    """Up in a straight line, down in half a wave."""
    wave = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1.0, (step + 1) / 50) * wave


def _step(optimizer: Any, loss: Any) -> None:
    import torch

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _pixels(pictures: list[NDArray[np.uint8]]) -> Any:
    """As the tower takes them, (n, 3, SIZE, SIZE)."""
    import torch

    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def name_rows(model: Any, tokenizer: Tokenizer) -> None:
    """Teach the tower that the rows of a place point where the decoder's embeddings of its colour and shape do, with
    and without a space before them: what the decoder then has to say, it finds there, and learns to see at once.
    """
    import torch

    normalize = torch.nn.functional.normalize
    words = normalize(model.model.language_model.embed_tokens.weight.detach(), dim=-1)
    optimizer = _optimizer(*_eye(model))
    random = np.random.default_rng([SEED, 2])
    for step in range(NAMING_STEPS):
        _set_rate(optimizer, step, NAMING_STEPS)
        scenes = _scenes(random, TOWER_BATCH)
        logits = 20 * normalize(_by_place(model, scenes, random), dim=-1) @ words.T
        wanted = torch.full(logits.shape[:3], tokenizer.encode(".")[0])
        for i, things in enumerate(scenes):
            for thing in things:
                said = (thing.colour, thing.shape, f" {thing.colour}", f" {thing.shape}")
                wanted[i, thing.place] = torch.tensor([tokenizer.encode(word)[0] for word in said])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), wanted.flatten())
        _step(optimizer, loss)
        if step % 50 == 0:
            print(f"naming: step {step} of {NAMING_STEPS}: loss {loss.item():.3f}", flush=True)


def _by_place(model: Any, scenes: list[list[Thing]], random: np.random.Generator) -> Any:
    """The rows of drawn pictures (n, places, rows of a place, hidden): two by two rows are a place."""
    rows = model.model.get_image_features(_pixels([draw(things, random) for things in scenes])).pooler_output
    places = rows.view(-1, 2, 2, 2, 2, rows.shape[-1]).transpose(2, 3)
    return places.reshape(len(scenes), len(PLACES), ROWS // len(PLACES), -1)


def train_decoder(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    import torch

    optimizer = _optimizer(*model.parameters())
    began, shown = time.time(), 0.0
    for step, batch in zip(range(STEPS), batches(tokenizer), strict=False):
        _set_rate(optimizer, step, STEPS)
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        _step(optimizer, loss)
        shown = loss.item() if not step else 0.98 * shown + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} of {STEPS}: loss {shown:.3f}, {time.time() - began:.0f} s", flush=True)
        if step % 100 == 99:
            save(model, folder)
    save(model, folder)


def train(folder: Path) -> None:
    tokenizer = train_tokenizer(folder)
    model = new_model().train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million weights", flush=True)
    train_tower(model)
    name_rows(model, tokenizer)
    train_decoder(model, tokenizer, folder)
    write_companions(folder)


def save(model: Any, folder: Path) -> None:
    """The weights in bfloat16."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def write_companions(folder: Path) -> None:
    """What Hugging Face's libraries read beside weights and config, made from tokenizer.model, which then goes."""
    vocabulary = Vocabulary.from_model_file(folder / "tokenizer.model")
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


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    train(out)
