"""Chats as the ids that Gemma was trained on, and ids as something to look at.

A chat is put together from ids: turn markers by id, what people wrote by the tokenizer, which never gives
one. So no text can end its turn. A template that comes with a model is never executed; it is only recognised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..arguments import shown
from ..errors import InvalidRequest
from ..model.families import FAMILIES
from .tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer


@dataclass(frozen=True)
class Message:
    """One turn. `role` is "user", "model" (alias "assistant"), or "system" for the first message only."""

    role: str
    text: str

    def __post_init__(self) -> None:
        for name, value in (("role", self.role), ("text", self.text)):
            if not isinstance(value, str):
                raise InvalidRequest(f"message: {name}: found {shown(value)}, expected text")


def render(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True) -> list[int]:
    """The ids of a chat, one <bos> included; with `reply`, the model's turn is opened at the end.

    As Gemma's templates do it: `<start_of_turn>{role}\\n{text}<end_of_turn>\\n` for each turn, text trimmed. A system
    message opens the first user turn, before a blank line, as Gemma 3's has it; those before refuse one.
    Raises InvalidRequest unless user and model take turns, the user first (and last, where a reply is due).
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
        ids += [start, *tokenizer.encode(f"{turn.role}\n{turn.text}"), *end_of_turn]
    return [*ids, start, *tokenizer.encode("model\n")] if reply else ids


def read(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Message]:
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
        role, _, text = tokenizer.decode(part).partition("\n")
        if text or role == "user":
            found.append(Message(role, text))
    return found


def turn_end(tokenizer: Tokenizer) -> list[int]:
    """The ids that `render` puts after a turn: `<end_of_turn>` and a newline."""
    end = tokenizer.end_of_turn_id
    return ([] if end is None else [end]) + tokenizer.encode("\n")


def _turns(messages: Sequence[Message]) -> list[Message]:
    """Trimmed turns of user and model, system text folded in."""
    roles = ["model" if message.role == "assistant" else message.role for message in messages]
    texts = [message.text.strip() for message in messages]
    for i, role in enumerate(roles):
        if role not in ("system", "user", "model"):
            raise InvalidRequest(f"message {i} has the role {role!r}, expected system, user or model")
    if roles[:1] == ["system"]:
        if roles[1:2] == ["user"] and texts[0]:
            texts[1] = f"{texts[0]}\n\n{texts[1]}".rstrip()
        del roles[0], texts[0]
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
    return [Message(role, text) for role, text in zip(roles, texts, strict=True)]


def show(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The ids as readable text, for seeing what the model really sees.

    Control pieces stand as they are: `<bos>`. The rest is decoded, with a backslash before what merely looks
    like a control piece, and before each backslash: the text "<bos>" shows as `\\<bos>`.
    Raises InvalidRequest for an id outside the vocabulary.
    """
    names = sorted((tokenizer.piece(i) for i in tokenizer.special_ids), key=len, reverse=True)
    lookalike = re.compile("|".join(map(re.escape, ["\\", *names])))
    shown: list[str] = []
    text: list[int] = []

    def finish_text() -> None:
        shown.append(lookalike.sub(r"\\\g<0>", tokenizer.decode(text)))
        text.clear()

    for token in ids:
        if token in tokenizer.special_ids:
            finish_text()
            shown.append(tokenizer.piece(token))
        else:
            text.append(token)
    finish_text()
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
