"""Chats that are to be answered, and the prompts that they are to a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import InvalidRequest
from ..text import chat
from ..vision.eye import Picture
from . import tools
from .contents import content_from
from .fields import BadRequest, Fields
from .models import Served

_log = logging.getLogger("bezel.serve")


@dataclass(frozen=True)
class Talk:
    """A chat to be answered, with functions that the answer may call, and the form that it has where it is no call.

    `choice` is "none", "auto", "required", or "call NAME".
    """

    messages: list[chat.Message]
    functions: list[tools.Tool] = field(default_factory=list)
    choice: str = "auto"
    parallel: bool = True
    form: Fields | None = None

    @property
    def may_call(self) -> bool:
        return bool(self.functions) and self.choice != "none"


def check_length(served: Served, texts: Sequence[str], param: str) -> None:
    """Raises BadRequest for texts that are far too long, before they are cut into tokens, which takes a while."""
    model, n = served.model, sum(map(len, texts))
    if n > model.context * model.tokenizer.longest_piece or len(texts) > model.context:
        raise BadRequest(
            f"{param}: {n} characters in {len(texts)} texts do not fit into the context of {served.name}, "
            f"{model.context} tokens",
            param,
            code="context_length_exceeded",
        )


def prompt_of(served: Served, talk: Talk) -> list[int]:
    """What the model sees of a chat: system messages first and as one, turns of the same side as one.

    Where the last turn is the model's, the answer goes on with it. Raises BadRequest for a chat that is none.
    """
    if not served.model.is_chat_model:
        raise BadRequest(f"no chat template: {served.name} continues texts, by /v1/completions", "model")
    check_length(served, [message.text for message in talk.messages], "messages")
    _check_pictures(served, talk)
    system = [message.text for message in talk.messages if message.role == "system"]
    if talk.may_call:
        in_json = talk.form is not None and talk.form.text("type") not in (None, "text")
        system.insert(0, tools.instructions(talk.functions, in_json))
    turns: list[chat.Message] = []
    for message in talk.messages:
        if message.role == "system":
            continue
        if turns and turns[-1].role == message.role:
            turns[-1] = chat.Message(message.role, _joined(turns[-1], message))
        else:
            turns.append(message)
    if not turns or turns[0].role != "user":
        raise BadRequest("messages: expected a user's message first, after system messages", "messages")
    begun = turns.pop().text if turns[-1].role == "model" else ""
    if system:
        turns.insert(0, chat.Message("system", "\n\n".join(system)))
    try:
        served.model.eye_for(turns)
    except InvalidRequest as error:  # which names files of this computer
        _log.warning("%s: %s", served.name, error)
        raise BadRequest("messages: this model sees no pictures", "messages") from None
    try:
        return served.model.prompt_ids(turns) + served.model.tokenizer.encode(begun)
    except InvalidRequest as error:
        raise BadRequest(str(error), "messages") from None


def _joined(one: chat.Message, other: chat.Message) -> chat.Content:
    """Two messages as one, a blank line between their texts."""
    (*before, last), (first, *after) = one.parts, other.parts
    if isinstance(last, str) and isinstance(first, str):
        return content_from([*before, f"{last}\n\n{first}", *after])
    return content_from([*one.parts, *other.parts])


def _check_pictures(served: Served, talk: Talk) -> None:
    """Raises BadRequest for more pictures than fit, before any is decoded."""
    eye, context = served.model.eye, served.model.context
    count = sum(not isinstance(part, str) for message in talk.messages for part in message.parts)
    if eye is not None and count * eye.config.n_rows > context:
        raise BadRequest(
            f"messages: {count} pictures of {eye.config.n_rows} positions do not fit into the context of "
            f"{served.name}, {context} tokens",
            "messages",
        )


async def seen_prompt(served: Served, talk: Talk) -> tuple[list[int], list[Picture]]:
    """`prompt_of`, and its pictures, which the model has looked at: in a thread, while others are answered."""

    def look() -> tuple[list[int], list[Picture]]:
        ids, eye = prompt_of(served, talk), served.model.eye
        pictures = [] if eye is None else eye.pictures(np.array(ids, np.int64))
        for picture in pictures:
            picture.see()
        return ids, pictures

    return await asyncio.to_thread(look)


def next_prompt(served: Served, talk: Talk, answer: str) -> list[int]:
    """What the prompt of the next turn begins with, after a chat and its answer."""
    if not answer or talk.messages[-1].role == "model":  # a client may join them in its own way
        return []
    messages = [*talk.messages, chat.Message("model", answer), chat.Message("user", "")]
    ids, start = prompt_of(served, replace(talk, messages=messages)), served.model.tokenizer.start_of_turn_id
    return ids[: [i for i, token in enumerate(ids) if token == start][-2]]  # up to the user's turn
