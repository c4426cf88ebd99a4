"""Requests and answers as OpenAI's Responses API has them; nothing of an earlier one is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from ..text import chat
from . import tools
from .answers import Answer, parts_of, whole_of
from .asks import Ask
from .contents import content_of, text_of
from .fields import BadRequest, Fields
from .forms import constraint_of
from .functions import call_of, check_choice, functions_of, json_text
from .limits import MOST_STOPS, MOST_TOKENS, sampling_of
from .models import Served
from .shapes import Json, event, new_id
from .talks import Talk, seen_prompt


async def responses_ask(fields: Fields, served: Served) -> Ask:
    """What a response asks for."""
    for name in ("previous_response_id", "conversation"):
        if name in fields:
            raise BadRequest(f"{name}: nothing of earlier responses is kept: send the whole conversation", name)
    include = fields.texts("include", MOST_STOPS)
    if fields.get("top_logprobs") or "message.output_text.logprobs" in include:
        raise BadRequest("logprobs: only /v1/chat/completions and /v1/completions tell them", "include")
    if fields.flag("background"):
        raise BadRequest("background: nothing of responses is kept: ask without it, or stream", "background")
    functions = functions_of([tool for tool in fields.objects("tools") if _is_function(tool)])
    text = fields.object("text")
    talk = Talk(
        await asyncio.to_thread(_messages, fields),
        functions,
        check_choice(_choice(fields), functions),
        parallel=fields.get("parallel_tool_calls") is not False,
        form=text.object("format") if text is not None else None,
    )
    prompt, pictures = await seen_prompt(served, talk)
    return Ask(
        prompt=prompt,
        pictures=pictures,
        sampling=sampling_of(fields, served),
        max_tokens=fields.whole("max_output_tokens", 1, MOST_TOKENS),
        constraint=await constraint_of(served, talk),
        talk=talk,
    )


def _is_function(tool: Fields) -> bool:
    kind = tool.text("type", "function")
    if kind != "function":
        raise BadRequest(f"tools: found the type {kind!r:.60}, expected function: this server has no tools of its own")
    return True


def _choice(fields: Fields) -> str:
    if isinstance(fields.get("tool_choice"), dict):
        choice = fields.object("tool_choice") or fields
        if choice.text("type") != "function":
            raise choice.fail("type", "function")
        return f"call {choice.text('name')}"
    return fields.choice("tool_choice", ("none", "auto", "required")) or "auto"


def _messages(fields: Fields) -> list[chat.Message]:
    found = [chat.Message("system", fields.text("instructions") or "")] if "instructions" in fields else []
    if isinstance(fields.get("input"), str):
        return [*found, chat.Message("user", fields.text("input") or "")]
    names: dict[str, str] = {}
    items = fields.objects("input")
    if not items:
        raise fields.fail("input", "a text, or a list of one item or more")
    for item in items:
        kind = item.text("type", "message")
        if kind == "message":
            role = item.choice("role", ("system", "developer", "user", "assistant")) or "user"
            role = {"developer": "system", "assistant": "model"}.get(role, role)
            told = content_of if role == "user" else text_of
            found.append(chat.Message(role, told(item, "content")))
        elif kind == "function_call":
            name = item.text("name", "") or ""
            names[item.text("call_id", "") or ""] = name
            arguments = json_text(item, "arguments", item.text("arguments", "{}") or "{}")
            found.append(chat.Message("model", tools.told_calls([tools.Call(name, arguments)])))
        elif kind == "function_call_output":
            name = call_of(item, "call_id", names)
            found.append(chat.Message("user", tools.told_result(name, text_of(item, "output"))))
        elif kind != "reasoning":
            raise BadRequest(f"input: found an item of the type {kind!r:.60}", "input")
    return found


class Form:
    """How a response is told."""

    def __init__(self, served: Served, fields: Fields, calls: bool) -> None:
        self._served, self._calls = served, calls
        self._created, self._id = time.time(), new_id("resp")
        self._given = {name: fields.get(name) for name in ("instructions", "temperature", "top_p", "max_output_tokens")}
        self._given |= {
            "metadata": fields.get("metadata") or {},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": fields.get("tools") or [],
            "parallel_tool_calls": fields.get("parallel_tool_calls") is not False,
            "text": fields.get("text") or {"format": {"type": "text"}},
        }

    def _response(self, answer: Answer, output: list[Json], status: str) -> Json:
        figures, cut = answer.task.figures, answer.writer.finish == "length"
        usage = {
            "input_tokens": figures.prompt_tokens,
            "input_tokens_details": {"cached_tokens": figures.cached_tokens},
            "output_tokens": figures.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": figures.prompt_tokens + figures.tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "incomplete" if cut else status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "model": self._served.name,
            "output": output,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **self._given,
            "usage": usage if status == "completed" else None,
        }

    async def whole(self, answers: Sequence[Answer]) -> Json:
        (answer,) = answers
        calls, text = await whole_of(answer, self._calls)
        items = [_item(call) for call in calls] + ([_item(text, _status(answer))] if text else [])
        return self._response(answer, items, "completed")

    async def parts(self, answers: Sequence[Answer]) -> AsyncIterator[Json]:
        """The events of a stream."""
        number = 0
        async for one in self._events(answers):
            yield {**one, "sequence_number": number}
            number += 1

    async def _events(self, answers: Sequence[Answer]) -> AsyncIterator[Json]:
        (answer,) = answers
        yield event("response.created", response=self._response(answer, [], "in_progress"))
        yield event("response.in_progress", response=self._response(answer, [], "in_progress"))
        output = list[Json]()
        message: Json | None = None
        async for part in parts_of(answer, self._calls):
            if isinstance(part, tools.Call):
                item = _item(part)
                place = {"output_index": len(output), "item_id": item["id"]}
                output.append(item)
                begun = {**item, "arguments": "", "status": "in_progress"}
                yield event("response.output_item.added", output_index=place["output_index"], item=begun)
                yield event("response.function_call_arguments.delta", **place, delta=part.arguments)
                yield event("response.function_call_arguments.done", **place, arguments=part.arguments, name=part.name)
                yield event("response.output_item.done", output_index=place["output_index"], item=item)
                continue
            if message is None:
                message = _item("")
                begun = {**message, "content": [], "status": "in_progress"}
                yield event("response.output_item.added", output_index=len(output), item=begun)
                output.append(message)
                yield event("response.content_part.added", **_place(message), part=_text(""))
            message["content"][0]["text"] += part
            yield event("response.output_text.delta", **_place(message), delta=part, logprobs=[])
        if message is not None:
            said = message["content"][0]["text"]
            yield event("response.output_text.done", **_place(message), text=said, logprobs=[])
            yield event("response.content_part.done", **_place(message), part=_text(said))
            message["status"] = _status(answer)
            yield event("response.output_item.done", output_index=0, item=message)
        done = self._response(answer, output, "completed")
        yield event(f"response.{done['status']}", response=done)


def _place(message: Json) -> Json:
    return {"item_id": message["id"], "output_index": 0, "content_index": 0}


def _text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(answer: Answer) -> str:
    """Of the text of an answer; calls are told whole, or not at all."""
    return "incomplete" if answer.writer.finish == "length" else "completed"


def _item(part: str | tools.Call, status: str = "completed") -> Json:
    if isinstance(part, tools.Call):
        return {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": new_id("call"),
            "name": part.name,
            "arguments": part.arguments,
        }
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text(part)],
    }
