"""Chats as the ids that Gemma was trained on, and ids as something to look at.

A chat is put together from ids: turn markers by id, what people wrote by the tokenizer, which never gives
one. So no text can end its turn. A template that comes with a model is never executed; it is only recognised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeGuard

import numpy as np

from ..arguments import shown
from ..errors import InvalidRequest
from ..model.families import FAMILIES
from ..vision.eye import Eye, Picture, Scanned
from ..vision.image import Image
from .tokenizer import Tokenizer
from .vocabulary import END_OF_IMAGE, END_OF_TURN, START_OF_IMAGE, START_OF_TURN

Part = str | Image | Picture | Scanned
Content = str | Sequence[Part]
"""A text, or texts and pictures in any order."""

_AROUND_PICTURE = "\n\n"
# Gemma 3's processor has these around a picture that is shown in parts, too, and a blank between those.
_BEFORE_WHOLE, _BEFORE_CROPS = "Here is the original image ", " and here are some crops to help you see better "


@dataclass(frozen=True)
class Message:
    """One turn. `role` is "user", "model" (alias "assistant"), or "system" for the first message only."""

    role: str
    content: Content

    def __post_init__(self) -> None:
        if not isinstance(self.role, str):
            raise InvalidRequest(f"message: role: found {shown(self.role)}, expected text")
        if not isinstance(self.content, str) and not is_content(self.content):
            raise InvalidRequest(f"message: content: found {shown(self.content)}, expected text, or texts and pictures")

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def text(self) -> str:
        """What is said, without pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))


def is_content(value: object) -> TypeGuard[Sequence[Part]]:
    """Whether this is a list of texts and pictures, of which there is one at least."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(part, Part) for part in value)


def continued(tokenizer: Tokenizer, content: Content, eye: Eye | None) -> list[int]:
    """The ids of what is to be continued, one <bos> included.

    For PaliGemma's eye: pictures, <bos>, the text and a newline. Raises InvalidRequest as `render` does.
    """
    message = Message("user", content)
    if eye is None or not eye.config.reads_prefix or isinstance(content, str):
        return [tokenizer.bos_id, *_encode(tokenizer, message.parts, eye)]
    pictures = [part for part in message.parts if isinstance(part, (Image, Picture))]
    if any(isinstance(part, Scanned) or (isinstance(part, Image) and part.pan_and_scan) for part in message.parts):
        raise InvalidRequest("prompt: pan and scan is Gemma 3's; this model was made to see pictures whole")
    if any(isinstance(part, str) for part in _trimmed(message.parts)[: len(pictures)]):
        raise InvalidRequest(
            "prompt: found text before a picture; this model takes pictures first, then a line of text"
        )
    if "\n" in message.text.strip():
        raise InvalidRequest("prompt: found a line break; this model takes one line of text after a picture")
    return [
        *(token for picture in pictures for token in eye.look(picture).ids),
        *(tokenizer.bos_id, *tokenizer.encode(f"{message.text.strip()}\n")),
    ]


def _encode(tokenizer: Tokenizer, parts: Iterable[Part], eye: Eye | None) -> list[int]:
    """Texts and pictures, these between their markers and blank lines. Raises InvalidRequest where none can be seen."""
    ids: list[int] = []
    text = ""
    for part in _spread(parts):
        if isinstance(part, str):
            text += part
            continue
        start, end = tokenizer.start_of_image_id, tokenizer.end_of_image_id
        if eye is None:
            raise InvalidRequest(f"{part.name}: this model sees no pictures")
        if eye.config.reads_prefix:
            raise InvalidRequest(
                f"{part.name}: this model takes pictures before one line of text, and not in a chat: `bezel run "
                "--raw`, or raw=True in Python"
            )
        if start is None or end is None:
            raise InvalidRequest(f"{part.name}: this model's vocabulary lacks {START_OF_IMAGE} or {END_OF_IMAGE}")
        ids += [*tokenizer.encode(f"{text}{_AROUND_PICTURE}"), start, *eye.look(part).ids, end]
        text = _AROUND_PICTURE
    return [*ids, *tokenizer.encode(text)]


def _spread(parts: Iterable[Part]) -> Iterator[str | Image | Picture]:
    """The same with what is shown in parts as Gemma 3's processor words it."""
    for part in parts:
        scanned = part if isinstance(part, Scanned) else None
        if isinstance(part, Image) and part.pan_and_scan and (crops := part.crops()):
            scanned = Scanned(part, tuple(crops))
        if scanned is None:
            assert not isinstance(part, Scanned)
            yield part
            continue
        yield from (_BEFORE_WHOLE, scanned.whole, _BEFORE_CROPS)
        for i, crop in enumerate(scanned.crops):
            yield from ((" ", crop) if i else (crop,))


def _gathered(parts: Sequence[Part]) -> list[Part]:
    """What `_spread` made its own of, a text first."""
    found: list[Part] = []
    rest = list(parts)
    while rest:
        match rest:
            case [str(text), Picture() as whole, str(words), Picture() as crop, *others] if (
                text.endswith(_BEFORE_WHOLE) and words == _BEFORE_CROPS
            ):
                crops = [crop]
                while len(others) > 1 and others[0] == " " and isinstance(following := others[1], Picture):
                    crops.append(following)
                    others = others[2:]
                found += [text.removesuffix(_BEFORE_WHOLE), Scanned(whole, tuple(crops))]
                rest = others
            case _:
                found.append(rest.pop(0))
    return found


def render(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True, eye: Eye | None = None) -> list[int]:
    """The ids of a chat, one <bos> included; with `reply`, the model's turn is opened at the end.

    As Gemma's templates do it: `<start_of_turn>{role}\\n{text}<end_of_turn>\\n` for each turn, text trimmed. A system
    message opens the first user turn, before a blank line, as Gemma 3's has it; those before refuse one. Pictures are
    seen by the `eye`. Raises InvalidRequest where there is none, and unless user and model take turns, the user first
    (and last, where a reply is due).
    """
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    if start is None or end is None:
        raise InvalidRequest(
            f"this model's vocabulary lacks {START_OF_TURN} or {END_OF_TURN}, so it cannot chat; use an "
            "instruction-tuned model (-it)"
        )
    turns = _turns(messages)
    if reply and turns[-1].role == "model":
        raise InvalidRequest("the last message is the model's already; a reply needs a user message before it")
    ids, end_of_turn = [tokenizer.bos_id], turn_end(tokenizer)
    for turn in turns:
        ids += [start, *_encode(tokenizer, (f"{turn.role}\n", *turn.parts), eye), *end_of_turn]
    return [*ids, start, *tokenizer.encode("model\n")] if reply else ids


def read(tokenizer: Tokenizer, ids: Sequence[int], eye: Eye | None = None) -> list[Message]:
    """The turns that ids hold, as `render` made them; one that has only been opened is none."""
    found = []
    parts: list[list[int]] = []
    for token in ids:
        if token == tokenizer.start_of_turn_id:
            parts.append([])
        elif parts:
            parts[-1].append(token)
    for part in parts:
        if tokenizer.end_of_turn_id in part:
            part = part[: part.index(tokenizer.end_of_turn_id)]
        first, *others = _decode(tokenizer, part, eye)
        assert isinstance(first, str)
        role, _, text = first.partition("\n")
        content = [one for one in (text, *others) if one != ""]
        if content or role == "user":
            found.append(Message(role, content if others else text))
    return found


def _decode(tokenizer: Tokenizer, ids: Sequence[int], eye: Eye | None) -> list[Part]:
    """Texts and pictures that `_encode` made ids of, a text first."""
    parts: list[Part] = []
    at, rest = 0, np.array(ids, np.int64)
    for start in np.flatnonzero(rest == tokenizer.start_of_image_id).tolist():
        picture = eye.find(rest[start + 1 :]) if eye is not None and start + 1 < len(rest) else None
        if picture is None:  # the marker alone
            continue
        before = tokenizer.decode(ids[at:start]).removesuffix(_AROUND_PICTURE)
        parts += [before.removeprefix(_AROUND_PICTURE) if at else before, picture]
        at = start + len(picture.ids) + 2
    text = tokenizer.decode([token for token in ids[at:] if token >= 0])
    return _gathered([*parts, text.removeprefix(_AROUND_PICTURE) if at else text])


def turn_end(tokenizer: Tokenizer) -> list[int]:
    """The ids that `render` puts after a turn: `<end_of_turn>` and a newline."""
    end = tokenizer.end_of_turn_id
    return ([] if end is None else [end]) + tokenizer.encode("\n")


def _turns(messages: Sequence[Message]) -> list[Message]:
    """Trimmed turns of user and model, system text folded in."""
    roles = ["model" if message.role == "assistant" else message.role for message in messages]
    contents = [_trimmed(message.parts) for message in messages]
    for i, role in enumerate(roles):
        if role not in ("system", "user", "model"):
            raise InvalidRequest(f"message {i} has the role {role!r}, expected system, user or model")
    if roles[:1] == ["system"]:
        text = messages[0].text.strip()
        if any(not isinstance(part, str) for part in contents[0]):
            raise InvalidRequest("message 0, the system's: found a picture, expected text; show it in a user's message")
        if roles[1:2] == ["user"] and text:
            contents[1] = [f"{text}\n\n", *contents[1]] if contents[1] else [text]
        del roles[0], contents[0]
    if not roles:
        raise InvalidRequest("the chat has no user message")
    first = len(messages) - len(roles)
    for i, role in enumerate(roles):
        expected = ("user", "model")[i % 2]
        if role != expected:
            raise InvalidRequest(
                f"message {first + i} has the role {role!r}, expected {expected!r}: user and model take "
                "turns, the user first, and a system message can only stand before them"
            )
    return [Message(role, content or "") for role, content in zip(roles, contents, strict=True)]


def _trimmed(parts: Iterable[Part]) -> list[Part]:
    """Each text as templates trim it, and none that is empty."""
    trimmed = (part.strip() if isinstance(part, str) else part for part in parts)
    return [part for part in trimmed if part != ""]


def show(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The ids as readable text, for seeing what the model really sees.

    Control pieces stand as they are: `<bos>`, and so does `<256 rows of a picture>`. The rest is decoded, with a
    backslash before what merely looks like a control piece, and before each backslash: the text "<bos>" shows as
    `\\<bos>`.
    Raises InvalidRequest for an id outside the vocabulary.
    """
    names = sorted((tokenizer.piece(i) for i in tokenizer.special_ids), key=len, reverse=True)
    lookalike = re.compile("|".join(map(re.escape, ["\\", *names])))
    shown: list[str] = []
    text: list[int] = []

    def finish_text() -> None:
        shown.append(lookalike.sub(r"\\\g<0>", tokenizer.decode(text)))
        text.clear()

    for is_picture, run in groupby(ids, lambda token: token < 0):
        for token in () if is_picture else run:
            if token in tokenizer.special_ids:
                finish_text()
                shown.append(tokenizer.piece(token))
            else:
                text.append(token)
        finish_text()
        if is_picture:
            shown.append(f"<{sum(1 for _ in run)} rows of a picture>")
    return "".join(shown)


def template_is_known(template: str | None) -> bool:
    """Whether a model's chat template is one of Gemma's, which `render` follows; layout does not count."""
    known = {known for family in FAMILIES.values() for known in family.chat_templates}
    return template is not None and template_hash(template) in known


def template_hash(template: str) -> str:
    """SHA-256 (hex) of a template, whose layout does not count."""
    # A newline in a string may stand as itself or as \n; a line break between tags means nothing.
    # Each run of line breaks or spaces is looked at once: templates may be long, and hostile.
    form = re.sub(r"(?<!\n)\n+'", lambda found: "\\n" * (len(found[0]) - 1) + "'", template)
    form = re.sub(r"%\}\s+\{%", lambda found: "%}{%" if "\n" in found[0] else found[0], form)
    return hashlib.sha256(" ".join(form.split()).encode(errors="replace")).hexdigest()
