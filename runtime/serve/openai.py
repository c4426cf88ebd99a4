"""Answers as OpenAI's API has them: chat completions and completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from ..text import chat
from ..text.generation import Chance
from ..text.tokenizer import Tokenizer
from . import tools
from .answers import Answer, together, whole_of
from .asks import Ask
from .contents import content_of, text_of
from .fields import BadRequest, Fields
from .forms import constraint_of
from .functions import call_of, check_choice, functions_of, json_text
from .limits import MOST_LOGPROBS, MOST_TOKENS, limits_of, sampling_of
from .models import Served
from .shapes import Json, new_id
from .talks import Talk, seen_prompt


async def chat_ask(fields: Fields, served: Served) -> Ask:
    """What a chat completion asks for."""
    for name in ("functions", "function_call"):
        if name in fields:
            raise BadRequest(f"{name}: is of an older API: describe functions in tools", name)
    functions = functions_of([_function(tool) for tool in fields.objects("tools")])
    talk = Talk(
        await asyncio.to_thread(_messages, fields.objects("messages")),
        functions,
        check_choice(_choice(fields), functions),
        parallel=fields.get("parallel_tool_calls") is not False,
        form=fields.object("response_format"),
    )
    limits = limits_of(fields)
    if "max_completion_tokens" in fields:
        limits["max_tokens"] = fields.whole("max_completion_tokens", 0, MOST_TOKENS)
    top, wanted = fields.whole("top_logprobs", 0, MOST_LOGPROBS), fields.flag("logprobs")
    if top is not None and not wanted:
        raise BadRequest("top_logprobs: needs logprobs to be true", "top_logprobs")
    prompt, pictures = await seen_prompt(served, talk)
    return Ask(
        prompt=prompt,
        pictures=pictures,
        sampling=sampling_of(fields, served),
        logprobs=(top or 0) if wanted else None,
        constraint=await constraint_of(served, talk),
        talk=talk,
        **limits,
    )


def _function(tool: Fields) -> Fields:
    function = tool.object("function")
    if tool.text("type", "function") != "function" or function is None:
        raise tool.fail("type", "a function, described in 'function'")
    return function


def _choice(fields: Fields) -> str:
    if isinstance(fields.get("tool_choice"), dict):
        choice = fields.object("tool_choice") or fields
        if choice.text("type", "function") != "function":
            raise choice.fail("type", "function")
        function = choice.object("function")
        if function is None or not function.text("name"):
            raise choice.fail("function", "an object with the name of a function")
        return f"call {function.text('name')}"
    return fields.choice("tool_choice", ("none", "auto", "required")) or "auto"


def _messages(entries: Sequence[Fields]) -> list[chat.Message]:
    if not entries:
        raise BadRequest("messages: expected one message or more", "messages")
    found, names = [], dict[str, str]()
    for entry in entries:
        role = entry.choice("role", ("system", "developer", "user", "assistant", "tool"))
        if role is None:
            raise entry.fail("role", "system, developer, user, assistant or tool")
        if role == "user":
            found.append(chat.Message(role, content_of(entry, "content")))
            continue
        text = text_of(entry, "content", optional=role == "assistant")
        if role == "assistant":
            calls = []
            for call in entry.objects("tool_calls"):
                function = _function(call)
                name, arguments = function.text("name", "") or "", function.text("arguments", "{}") or "{}"
                names[call.text("id", "") or ""] = name
                calls.append(tools.Call(name, json_text(function, "arguments", arguments)))
            text = tools.told_calls(calls) if calls else text
        elif role == "tool":
            text = tools.told_result(call_of(entry, "tool_call_id", names), text)
        found.append(chat.Message({"assistant": "model", "tool": "user"}.get(role, "system"), text))
    return found


def finish_of(answer: Answer, called: bool) -> str:
    if answer.writer.finish == "length":
        return "length"
    return "tool_calls" if called else "stop"


def called(call: tools.Call, index: int | None = None) -> Json:
    """A call of a function, in a stream with its `index`."""
    place = {} if index is None else {"index": index}
    return {
        **place,
        "id": new_id("call"),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def usage_of(answers: Sequence[Answer]) -> Json:
    """Tokens read and written; answers to one prompt read it once."""
    figures = [answer.task.figures for answer in answers]
    prompts = {answer.task.prompt.tobytes(): answer.task.figures for answer in reversed(answers)}
    read, written = sum(f.prompt_tokens for f in prompts.values()), sum(f.tokens for f in figures)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(f.cached_tokens for f in prompts.values())},
    }


def timings_of(answers: Sequence[Answer]) -> Json:
    """Of the first answer, with the names that llama.cpp's server gives them."""
    f = answers[0].task.figures
    new = f.prompt_tokens - f.cached_tokens
    return {
        "cache_n": f.cached_tokens,
        "prompt_n": new,
        "prompt_ms": 1000 * f.prompt_seconds,
        "prompt_per_second": new / f.prompt_seconds if f.prompt_seconds else 0.0,
        "predicted_n": f.tokens,
        "predicted_ms": 1000 * f.seconds,
        "predicted_per_second": f.tokens / f.seconds if f.seconds else 0.0,
    }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    raw = tokenizer.bytes_of(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def chat_logprobs(tokenizer: Tokenizer, chances: Sequence[Chance]) -> Json:
    content = [
        {
            **_token(tokenizer, one.token, one.logprob),
            "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in one.likeliest],
        }
        for one in chances
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, chances: Sequence[Chance], offset: int) -> Json:
    """In the older form; `offset` is how long the text before is."""
    found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in chances:
        told = [_token(tokenizer, token, p) for token, p in ((one.token, one.logprob), *one.likeliest)]
        found["tokens"].append(told[0]["token"])
        found["token_logprobs"].append(None if one.first else told[0]["logprob"])
        found["top_logprobs"].append(None if one.first else {t["token"]: t["logprob"] for t in told})
        found["text_offset"].append(offset)
        offset += len(told[0]["token"])
    return found


class Form:
    """How a chat completion, or a completion, tells its answers."""

    def __init__(self, served: Served, fields: Fields, *, is_chat: bool, calls: bool = False) -> None:
        self._served, self._chat, self._calls = served, is_chat, calls
        self._head = {"id": new_id("chatcmpl" if is_chat else "cmpl"), "created": int(time.time())}
        options = fields.object("stream_options")
        self._usage = options is not None and options.flag("include_usage")
        self._echo = not is_chat and fields.flag("echo")

    def _object(self, chunk: bool) -> Json:
        name = "text_completion" if not self._chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {**self._head, "object": name, "model": self._served.name, "system_fingerprint": "bezel"}

    def _logprobs(self, answer: Answer, chances: Sequence[Chance], offset: int) -> Json | None:
        if not answer.writer.keeps_chances:
            return None
        tokenizer = self._served.model.tokenizer
        return chat_logprobs(tokenizer, chances) if self._chat else completion_logprobs(tokenizer, chances, offset)

    def _prompt(self, answer: Answer) -> tuple[str, list[Chance]]:
        """What `echo` puts before an answer: the prompt's text, and the chances of its tokens where they are told."""
        tokenizer, ids = self._served.model.tokenizer, answer.task.prompt.tolist()
        ids, chances = (ids[1:] if ids[0] == tokenizer.bos_id else ids), list(answer.task.chances)
        if answer.task.scored is not None and len(chances) < len(ids):  # nothing is before the first
            chances = [Chance(ids[0], 0.0, [], first=True), *chances]
        return tokenizer.decode(ids), chances

    async def whole(self, answers: Sequence[Answer]) -> Json:
        choices = []
        found = await asyncio.gather(*(whole_of(answer, self._calls) for answer in answers))  # unread, they wait
        for i, (answer, (calls, text)) in enumerate(zip(answers, found, strict=True)):
            chances = answer.writer.chances
            if self._chat:
                message: Json = {"role": "assistant", "content": None if calls else text, "refusal": None}
                if calls:
                    message["tool_calls"] = [called(call) for call in calls]
                content: Json = {"message": message}
            else:
                content = {"text": text}
            if self._echo:
                before, read = self._prompt(answer)
                content, chances = {"text": before + text}, [*read, *chances]
            logprobs = self._logprobs(answer, chances, 0)
            finish = finish_of(answer, bool(calls))
            choices.append({"index": i, **content, "logprobs": logprobs, "finish_reason": finish})
        return {**self._object(False), "choices": choices, "usage": usage_of(answers), "timings": timings_of(answers)}

    def _part(self, index: int, content: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._object(True), "choices": [choice], **({"usage": None} if self._usage else {})}

    async def parts(self, answers: Sequence[Answer]) -> AsyncIterator[Json]:
        """The chunks of a stream."""
        told, offsets, calls = [0] * len(answers), [0] * len(answers), [0] * len(answers)
        readers, begun = [tools.Calls(self._calls) for _ in answers], set[int]()
        for i in range(len(answers) if self._chat else 0):
            yield self._part(i, {"delta": {"role": "assistant", "content": "" if not self._calls else None}})
        async for i, text, n in together(answers):
            answer, chances = answers[i], answers[i].writer.chances[told[i] : n]
            told[i] = n
            if self._echo and i not in begun:
                before, read = self._prompt(answer)
                text, chances = before + text, [*read, *chances]
                begun.add(i)
            logprobs = self._logprobs(answer, chances, offsets[i])
            offsets[i] += len(text)
            for part in readers[i].push(text):
                if isinstance(part, tools.Call):
                    content: Json = {"delta": {"tool_calls": [called(part, calls[i])]}}
                    calls[i] += 1
                else:
                    content = {"delta": {"content": part}} if self._chat else {"text": part}
                yield self._part(i, content, logprobs)
                logprobs = None if self._calls else logprobs
        for i, answer in enumerate(answers):
            for rest in readers[i].end():
                yield self._part(i, {"delta": {"content": rest}})
            text, left = "", answer.writer.chances[told[i] :]
            if self._echo and i not in begun:
                text, read = self._prompt(answer)
                left = [*read, *left]
            logprobs = self._logprobs(answer, left, offsets[i]) if left else None
            content = {"delta": {}} if self._chat else {"text": text}
            last = self._part(i, content, logprobs, finish_of(answer, calls[i] > 0))
            yield last if self._usage else {**last, "timings": timings_of(answers)}
        if self._usage:
            yield {**self._object(True), "choices": [], "usage": usage_of(answers), "timings": timings_of(answers)}
