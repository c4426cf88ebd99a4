"""Pictures of a few shapes, drawn from a seed, and questions about them whose answers are known.

A picture has four places, top left to bottom right, and a shape or nothing in each. Some pairs of a colour and a shape
are held out: a model that is trained on the others shows with these whether it has learned the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 112  # pixels of a side

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (140, 50, 170),
    "orange": (240, 140, 40),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")

Mask = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.bool_]]
# Each where x and y, from −1 to 1 across the shape, are inside of it.
SHAPES: dict[str, Mask] = {
    "circle": lambda x, y: x * x + y * y < 1,
    "square": lambda x, y: (abs(x) < 0.85) & (abs(y) < 0.85),
    "triangle": lambda x, y: (y < 0.85) & (y > 2 * abs(x) - 0.95),
    "cross": lambda x, y: ((abs(x) < 0.32) & (abs(y) < 1)) | ((abs(y) < 0.32) & (abs(x) < 1)),
    "ring": lambda x, y: (x * x + y * y < 1) & (x * x + y * y > 0.35),
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
}
HELD_OUT = frozenset(
    {("red", "ring"), ("blue", "triangle"), ("green", "cross"), ("yellow", "circle"), ("white", "square")}
)


@dataclass(frozen=True)
class Thing:
    """A shape in one of the PLACES."""

    colour: str
    shape: str
    place: int

    def __str__(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    """What is asked, of which `kind`, and its answer."""

    kind: str
    text: str
    answer: str


def scene(random: np.random.Generator, count: int, held_out: bool = False) -> list[Thing]:
    """So many things in different places; with `held_out` all are of the pairs that training leaves out, else none."""
    things = []
    for place in sorted(random.choice(len(PLACES), count, replace=False).tolist()):
        while True:
            pair = str(random.choice(list(COLOURS))), str(random.choice(list(SHAPES)))
            if (pair in HELD_OUT) == held_out:
                break
        things.append(Thing(*pair, place))
    return things


def draw(things: list[Thing], random: np.random.Generator) -> NDArray[np.uint8]:
    """The picture (SIZE, SIZE, 3): grey noise behind, each shape in its place, moved and sized a little."""
    n = SIZE
    out = random.uniform(110, 200) + random.normal(0, 8, 3) + random.normal(0, 4, (n, n, 3))
    for thing in things:
        radius = random.uniform(0.16, 0.23) * n
        middle = np.array([thing.place // 2, thing.place % 2]) * n / 2 + n / 4
        cy, cx = middle + random.uniform(-1, 1, 2) * (n / 4 - radius)
        # Only around the shape is anything drawn.
        top, left = max(0, int(cy - radius)), max(0, int(cx - radius))
        y, x = np.mgrid[top : min(n, int(cy + radius) + 2), left : min(n, int(cx + radius) + 2)].astype(np.float32)
        inside = SHAPES[thing.shape](
            (x - np.float32(cx)) / np.float32(radius), (y - np.float32(cy)) / np.float32(radius)
        )
        out[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = (
            np.array(COLOURS[thing.colour]) + random.normal(0, 8, 3) + random.normal(0, 4, (inside.sum(), 3))
        )
    picture: NDArray[np.uint8] = out.clip(0, 255).astype(np.uint8)
    return picture


def described(things: list[Thing]) -> str:
    """A sentence: "A red circle at the top left and a blue square at the bottom right."."""
    parts = [f"{thing} at the {PLACES[thing.place]}" for thing in things]
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else "nothing"
    return f"{text[0].upper()}{text[1:]}."


KINDS = ("colour", "shape", "count", "count some", "place", "is there", "describe")


def question(things: list[Thing], kind: str, random: np.random.Generator) -> Question:
    """A question of one of the KINDS. What it asks for, there is once, where it asks for one thing."""
    thing = things[random.integers(len(things))]
    alike = [sum(other.shape == thing.shape for other in things), sum(other.colour == thing.colour for other in things)]
    if kind == "colour":
        asked = f"the {thing.shape}" if alike[0] == 1 else f"the shape at the {PLACES[thing.place]}"
        return Question(kind, f"What colour is {asked}?", thing.colour)
    if kind == "shape":
        asked = f"the {thing.colour} thing" if alike[1] == 1 else f"the thing at the {PLACES[thing.place]}"
        return Question(kind, f"What shape is {asked}?", thing.shape)
    if kind == "count":
        return Question(kind, "How many shapes are there?", NUMBERS[len(things)])
    if kind == "count some":
        if random.random() < 0.5:
            colour = thing.colour if random.random() < 0.7 else str(random.choice(list(COLOURS)))
            n = sum(other.colour == colour for other in things)
            return Question(kind, f"How many {colour} shapes are there?", NUMBERS[n])
        shape = thing.shape if random.random() < 0.7 else str(random.choice(list(SHAPES)))
        plural = f"{shape}es" if shape == "cross" else f"{shape}s"
        return Question(kind, f"How many {plural} are there?", NUMBERS[sum(other.shape == shape for other in things)])
    if kind == "place":
        unique = [one for one in things if sum((o.colour, o.shape) == (one.colour, one.shape) for o in things) == 1]
        if not unique:
            return question(things, "count", random)
        one = unique[random.integers(len(unique))]
        return Question(kind, f"Where is the {one.colour} {one.shape}?", PLACES[one.place])
    if kind == "is there":
        colour = thing.colour if random.random() < 0.7 else str(random.choice(list(COLOURS)))
        shape = thing.shape if random.random() < 0.7 else str(random.choice(list(SHAPES)))
        there = any((other.colour, other.shape) == (colour, shape) for other in things)
        sought = Thing(colour, shape, 0)
        return Question(kind, f"Is there {sought}?", "yes" if there else "no")
    return Question("describe", "Describe the picture.", described(things))


TASKS: dict[str, Callable[[list[Thing]], str]] = {
    "colour": lambda things: things[0].colour,
    "shape": lambda things: things[0].shape,
    "count": lambda things: NUMBERS[len(things)],
    "place": lambda things: PLACES[things[0].place],
}
"""What is to be said of a picture that comes without a question: examples show which it is."""


def example(task: str, random: np.random.Generator, held_out: bool = False) -> tuple[NDArray[np.uint8], str]:
    """A picture and what one of the TASKS says of it."""
    things = scene(random, int(random.integers(1, 5)) if task == "count" else 1, held_out)
    return draw(things, random), TASKS[task](things)
