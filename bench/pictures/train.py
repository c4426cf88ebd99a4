"""Trains the small picture model that is bundled: `python -m bezel.bench.pictures.train OUT`, with torch and transformers.

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

from ...runtime.text.tokenizer import CONTROL_PIECES, Tokenizer, Vocabulary
from .draw import COLOURS, KINDS, NUMBERS, PLACES, SHAPES, SIZE, TASKS, draw, example, question, scene

STEPS, BATCH, RATE, SEED = 2200, 16, 1e-3, 20261128
PIECES, ROWS = 1024, 16  # of the vocabulary; that a picture becomes
_TURN_END = 100  # label of what is not learned: torch's own

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
    "hidden_size": 256,
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
TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
"""


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
        end = [t.end_of_turn_id, *t.encode("\n")]
        ids, labels, pictures = [t.bos_id], [-100], list[NDArray[np.uint8]]()

        def add(asked: str, answer: str, picture: NDArray[np.uint8] | None) -> None:
            before = [*self._turn("user", asked, picture is not None), *end, *self._turn("model", "")]
            said = [*t.encode(answer), t.end_of_turn_id]
            after = t.encode("\n")
            ids.extend([*before, *said, *after])
            labels.extend([*[-100] * len(before), *said, *[-100] * len(after)])
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
                for i in range(3):  # several questions about a picture
                    asked = question(things, str(random.choice(KINDS)), random)
                    add(asked.text, asked.answer, picture if not i else None)
        return ids, labels, pictures


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[dict[str, Any]]:
    """What the model's forward takes, BATCH chats at a time, all about as many pictures."""
    import torch

    random = np.random.default_rng(seed)
    samples = Samples(tokenizer, random)
    while True:
        n_pictures = int(random.choice(6, p=[0.02, 0.5, 0.1, 0.1, 0.08, 0.2]))
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
            pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float()
            batch["pixel_values"] = pixels / 127.5 - 1
        yield batch


def new_model() -> Any:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(SEED)
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=ROWS,
        image_token_index=PIECES,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=VISION["hidden_size"] ** -0.5)  # which is left at zero
    return model


def train(folder: Path) -> None:
    import torch

    tokenizer = train_tokenizer(folder)
    model = new_model().train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million weights", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    began, shown = time.time(), 0.0
    for step, batch in zip(range(STEPS), batches(tokenizer, SEED), strict=False):
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = loss.item() if not step else 0.98 * shown + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} of {STEPS}: loss {shown:.3f}, {time.time() - began:.0f} s", flush=True)
        if step % 400 == 399:
            save(model, folder)
    save(model, folder)


def save(model: Any, folder: Path) -> None:
    """The weights in bfloat16 and what goes with them."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 2, "eos_token_id": [1, PIECES_END_OF_TURN], "pad_token_id": 0, "do_sample": False})
    )


PIECES_END_OF_TURN = 5  # <end_of_turn>, behind the four special pieces and <start_of_turn>


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    train(out)
