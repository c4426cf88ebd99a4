"""Chats about drawn pictures, as ids whose answers are learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...runtime.text.tokenizer import Tokenizer
from .draw import KINDS, TASKS, draw, example, question, scene

PIECES, ROWS = 1024, 16  # of the vocabulary; that a picture becomes
QUESTIONS = 2  # about each picture

SMALL_TALK = {
    "Hello!": "Hello! Show me a picture.",
    "Who are you?": "A very small model that looks at pictures of shapes.",
    "What can you do?": "I say what shapes, colours and numbers I see.",
    "Thank you.": "You are welcome.",
}


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
