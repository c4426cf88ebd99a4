"""Requests and answers as Anthropic's Messages API has them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence

from ..text import chat
from ..vision.image import Image
from . import tools
from .answers import Answer, parts_of, whole_of
from .asks import Ask
from .contents import picture_of, text_of
from .fields import BadRequest, Fields
from .forms import constraint_of
from .functions import call_of, check_choice, functions_of
from .limits import MOST_STOPS, MOST_TOKENS, sampling_of
from .models import Served
from .shapes import Json, event, new_id
from .talks import Talk, seen_prompt


async def messages_ask(fields: Fields, served: Served) -> Ask:
    """What a message asks for."""
    talk = await asyncio.to_thread(talk_of, fields)
    max_tokens = fields.whole("max_tokens", 1, MOST_TOKENS)
    if max_tokens is None:
        raise fields.fail("max_tokens", "a whole number")
    prompt, pictures = await seen_prompt(served, talk)
    return Ask(
        prompt=prompt,
        pictures=pictures,
        sampling=sampling_of(fields, served),
        max_tokens=max_tokens,
        stop=fields.texts("stop_sequences", MOST_STOPS),
        constraint=await constraint_of(served, talk),
        talk=talk,
    )


def talk_of(fields: Fields) -> Talk:
    described = fields.objects("tools")
    for tool in described:
        if "input_schema" not in tool:
            raise tool.fail("input_schema", "a JSON schema, an object")
    functions = functions_of(described, "input_schema")
    messages = [chat.Message("system", text_of(fields, "system"))] if "system" in fields else []
    names: dict[str, str] = {}
    for entry in fields.objects("messages"):
        role = entry.choice("role", ("user", "assistant"))
        if role is None:
            raise entry.fail("role", "user or assistant")
        messages.append(chat.Message("model" if role == "assistant" else "user", _content(entry, names)))
    if not messages or messages[-1].role == "system":
        raise BadRequest("messages: expected one message or more", "messages")
    choice = fields.object("tool_choice")
    kind = choice.choice("type", ("auto", "any", "tool", "none")) if choice else "auto"
    wanted = {"any": "required", "none": "none", "tool": f"call {choice.text('name') if choice else ''}"}
    parallel = not (choice and choice.flag("disable_parallel_tool_use"))
    choice_of = check_choice(wanted.get(kind or "", "auto"), functions)
    output = fields.object("output_config")
    form = output.object("format") if output is not None else fields.object("output_format")
    return Talk(messages, functions, choice_of, parallel, form)


def _content(entry: Fields, names: dict[str, str]) -> chat.Content:
    """The texts and pictures of a message's blocks; `names` keeps the function of each call's id."""
    if isinstance(entry.get("content"), str):
        return entry.text("content") or ""
    parts: list[chat.Part] = []
    calls = []
    blocks = entry.objects("content")
    if not blocks and not isinstance(entry.get("content"), list):
        raise entry.fail("content", "a text or a list of blocks")
    for block in blocks:
        kind = block.text("type", "text")
        if kind == "text":
            parts.append(block.text("text", "") or "")
        elif kind == "image":
            parts.append(_picture(block))
        elif kind == "tool_use":
            name = block.text("name", "") or ""
            names[block.text("id", "") or ""] = name
            calls.append(tools.Call(name, json.dumps(block.get("input") or {}, ensure_ascii=False)))
        elif kind == "tool_result":
            name = call_of(block, "tool_use_id", names)
            parts.append(tools.told_result(name, text_of(block, "content", optional=True)))
        elif kind not in ("thinking", "redacted_thinking"):  # of earlier turns: Anthropic does not read them either
            what = "this model reads texts and pictures"
            raise BadRequest(f"content: found a block of the type {kind!r:.60}: {what}", "content")
    parts += [tools.told_calls(calls)] if calls else []
    if all(isinstance(part, str) for part in parts):
        return "\n\n".join(map(str, parts))
    return parts


def _picture(block: Fields) -> Image:
    source = block.object("source")
    if source is None or source.text("type") != "base64":
        raise block.fail("source", "an object of the type base64: nothing is fetched from elsewhere")
    kind, data = source.text("media_type", "image/png"), source.text("data", "")
    return picture_of(f"data:{kind};base64,{data}", f"{block.path}.source")


def _reason(answer: Answer, called: bool) -> tuple[str, str | None]:
    """Why an answer ended, and the stop sequence that ended it."""
    if answer.writer.finish == "length":
        return "max_tokens", None
    if answer.writer.stopped_by is not None:
        return "stop_sequence", answer.writer.stopped_by
    return ("tool_use" if called else "end_turn"), None


class Form:
    """How a message is told."""

    def __init__(self, served: Served, calls: bool) -> None:
        self._served, self._calls, self._id = served, calls, new_id("msg")

    def _message(self, answer: Answer, content: list[Json], called: bool) -> Json:
        reason, sequence = _reason(answer, called) if answer.writer.finish else (None, None)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._served.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(answer),
        }

    def _usage(self, answer: Answer) -> Json:
        figures = answer.task.figures
        return {
            "input_tokens": figures.prompt_tokens - figures.cached_tokens,
            "cache_read_input_tokens": figures.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": figures.tokens,
        }

    async def whole(self, answers: Sequence[Answer]) -> Json:
        (answer,) = answers
        calls, text = await whole_of(answer, self._calls)
        content = [_block(call) for call in calls] + ([_block(text)] if text or not calls else [])
        return self._message(answer, content, bool(calls))

    async def parts(self, answers: Sequence[Answer]) -> AsyncIterator[Json]:
        """The events of a stream."""
        (answer,) = answers
        yield event("message_start", message=self._message(answer, [], False))
        index, text_open, called = -1, False, False
        async for part in parts_of(answer, self._calls):
            if isinstance(part, tools.Call):
                called, index = True, index + 1
                start = {**_block(part), "input": {}}
                yield event("content_block_start", index=index, content_block=start)
                delta = {"type": "input_json_delta", "partial_json": part.arguments}
                yield event("content_block_delta", index=index, delta=delta)
                yield event("content_block_stop", index=index)
                continue
            if not text_open:
                text_open, index = True, index + 1
                yield event("content_block_start", index=index, content_block=_block(""))
            yield event("content_block_delta", index=index, delta={"type": "text_delta", "text": part})
        if text_open:
            yield event("content_block_stop", index=index)
        reason, sequence = _reason(answer, called)
        yield event(
            "message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=self._usage(answer)
        )
        yield event("message_stop")


def _block(part: str | tools.Call) -> Json:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    arguments = json.loads(part.arguments, parse_float=_finite)
    return {"type": "tool_use", "id": new_id("toolu"), "name": part.name, "input": arguments}


def _finite(text: str) -> float:
    """The number that is nearest: JSON's have no end, and floats do."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))
