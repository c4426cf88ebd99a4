"""Trains the bundled model that sees pictures: `python -m bezel.bench.pictures.train OUT`, on torch and transformers.

SigLIP's tower and Gemma 3's decoder, both small, from nothing: on pictures that `draw` makes as they are needed, with
questions, and as runs of examples without one. Written as Hugging Face has a Gemma 3 that sees.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.text.tokenizer import Tokenizer
from .checkpoint import SEED, TEXT_SIZE, new_model, save, train_tokenizer, write_companions
from .draw import COLOURS, PLACES, SHAPES, Thing, draw, scene
from .samples import ROWS, Samples

RATE = 1e-3
TOWER_STEPS, NAMING_STEPS, STEPS = 700, 220, 3000
BATCH, TOWER_BATCH = 16, 48


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


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    train(out)
