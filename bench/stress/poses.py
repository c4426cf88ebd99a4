"""The sides from which a text can be seen: parameters that leave it what it says, or nearly, and make it odd.

Every change draws as many numbers whatever its level: a higher one changes what a lower one did, and more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random

Pose = Mapping[str, float]
"""The parameters that are turned and how far, above 0 each; none of them is the text as it is."""

Change = Callable[[str, float, Random], str]
"""A text at a level."""

_TWINS = str.maketrans("aceiopsxyABCEHIKMOPTX", "асеіорѕхуАВСЕНІКМОРТХ")  # Cyrillic, and look the same
_WORD = re.compile(r"\S{1,12}")  # or a part of one: some scripts have no spaces
_AFTER_SENTENCE = re.compile(r"((?<=[.!?])[\"'”’)]*\s+|(?<=[。！？])[”」』]*\s*)")


def case(text: str, share: float, random: Random) -> str:
    """Words in capitals."""
    return re.sub(r"\S+", lambda word: word[0].upper() if random.random() < share else word[0], text)


def typos(text: str, rate: float, random: Random) -> str:
    """Letters that are left out, written twice, or changed with the next."""
    letters = list(text)
    for i, letter in enumerate(text):
        drawn, kind = random.random(), random.randrange(3)
        if drawn >= rate or not letter.isalpha():
            continue
        if kind == 0:
            letters[i] = ""
        elif kind == 1 or i + 1 == len(letters):
            letters[i] *= 2
        else:
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def spacing(text: str, rate: float, random: Random) -> str:
    """Spaces that are left out, doubled, or become a new line."""

    def changed(space: re.Match[str]) -> str:
        drawn, instead = random.random(), random.choice(("", "  ", "\n"))
        return instead if drawn < rate else space[0]

    return re.sub(" ", changed, text)


def homoglyphs(text: str, rate: float, random: Random) -> str:
    """Latin letters that become the Cyrillic ones that look the same."""
    return "".join(letter.translate(_TWINS) if random.random() < rate else letter for letter in text)


def digits(text: str, rate: float, random: Random) -> str:
    """Words that become numbers of as many digits."""

    def changed(word: re.Match[str]) -> str:
        drawn, number, length = random.random(), random.random(), len(word[0])
        return f"{int(number * 10**length):0{length}}" if drawn < rate else word[0]

    return _WORD.sub(changed, text)


def repetition(text: str, times: float, random: Random) -> str:  # noqa: ARG001
    """Every sentence so many times more."""
    parts = [*_AFTER_SENTENCE.split(text), ""]
    return "".join(
        (sentence + after) * (1 + round(times)) for sentence, after in zip(parts[::2], parts[1::2], strict=True)
    )


def shuffle(text: str, share: float, random: Random) -> str:
    """Sentences that change places with each other."""
    parts = _AFTER_SENTENCE.split(text)
    sentences = parts[::2]
    drawn = [(random.random(), i) for i in range(len(sentences))]
    places = [(random.random(), i) for i in range(len(sentences))]
    moved = [i for rate, i in drawn if rate < share]
    order = [i for _, i in sorted(places[i] for i in moved)]
    for to, i in zip(moved, order, strict=True):
        parts[2 * to] = sentences[i]
    return "".join(parts)


TEXT_CHANGES: dict[str, Change] = {
    "shuffle": shuffle,
    "repetition": repetition,
    "digits": digits,
    "case": case,
    "typos": typos,
    "homoglyphs": homoglyphs,
    "spacing": spacing,
}
"""Parameters of the text itself, in the order in which they are applied."""


def posed(text: str, pose: Pose, seed: str) -> str:
    """A text in a pose, of which what is not the text's own is left out; the same for the same `seed`."""
    for name, change in TEXT_CHANGES.items():
        if pose.get(name):
            text = change(text, pose[name], Random(f"{seed} {name}"))
    return text
