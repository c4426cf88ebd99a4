"""Requests and answers as OpenAI's API has them: chat completions, completions, models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InvalidRequest
from ..text import chat
from ..text.generation import Chance, Constraint, Writer
from ..text.sampling import Sampling
from ..text.tokenizer import BYTE, SPACE, Tokenizer
from .answers import Answer, together
from .fields import BadRequest, Fields
from .models import Served

MOST_ANSWERS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASED = 16, 16, 20, 1024
MOST_TOKENS = 1 << 30
Json = dict[str, Any]


@dataclass
class Ask:
    """What a request asks of a model, whatever its form."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    n: int = 1
    logprobs: int | None = None
    scored: int | None = None  # likeliest tokens to tell of the prompt's
    constraint: Callable[[], Constraint] | None = None


def start(served: Served, ask: Ask) -> list[Answer]:
    """Begin the answers that are asked for. Raises BadRequest where the prompt does not fit."""
    model = served.model
    if len(ask.prompt) > model.context:
        raise BadRequest(
            f"the prompt has {len(ask.prompt)} tokens, and the context of {served.name} {model.context}: shorten it, "
            "or serve the model with a larger --context",
            "messages",
            code="context_length_exceeded",
        )
    answers = []
    for i in range(ask.n):
        sampling = ask.sampling
        if sampling.seed is not None and i:
            sampling = replace(sampling, seed=sampling.seed + i)
        writer = Writer(
            model.tokenizer,
            sampling,
            model.stop_ids,
            max_tokens=ask.max_tokens,
            stop=ask.stop,
            constraint=ask.constraint() if ask.constraint else None,
            logprobs=ask.logprobs,
        )
        answer = Answer(served.scheduler, ask.prompt, writer, ask.scored)
        served.scheduler.submit(answer.task)
        answers.append(answer)
    return answers


# --- what requests say


def sampling_of(fields: Fields, served: Served) -> Sampling:
    """The file's own sampling, with what the request says in its place."""
    chosen: Json = {
        "temperature": fields.number("temperature", 0, 100),
        "top_k": fields.whole("top_k", 0, MOST_TOKENS),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "seed": fields.whole("seed", -(1 << 63), (1 << 64) - 1),
        "logit_bias": _logit_bias(fields, served.model.tokenizer.vocab_size),
    }
    if chosen["top_p"] == 0:  # as others take it: the likeliest token alone
        chosen["top_p"] = 1e-9
    if chosen["seed"] is not None:
        chosen["seed"] %= 1 << 64
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(served.model.default_sampling, **given)


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float] | None:
    value = fields.get("logit_bias")
    if value is None:
        return None
    want = f"up to {MOST_BIASED} numbers from -100 to 100, by token from 0 to {vocab_size - 1}"
    if not isinstance(value, dict) or len(value) > MOST_BIASED:
        raise fields.fail("logit_bias", want)
    found = {}
    for token, bias in value.items():
        sound = token.isdecimal() and len(token) < 10 and int(token) < vocab_size
        if not sound or isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise fields.fail("logit_bias", want)
        found[int(token)] = float(bias)
    return found


def limits_of(fields: Fields) -> Json:
    """What all kinds of requests say of length and number."""
    return {
        "max_tokens": fields.whole("max_tokens", 0, MOST_TOKENS),
        "stop": fields.texts("stop", MOST_STOPS),
        "n": fields.whole("n", 1, MOST_ANSWERS) or 1,
    }


def messages_of(entries: Sequence[Fields], where: str = "messages") -> list[chat.Message]:
    """A chat's messages; several system messages are one."""
    if not entries:
        raise BadRequest(f"{where}: expected one message or more", where)
    found = []
    for entry in entries:
        role = entry.choice("role", ("system", "developer", "user", "assistant", "tool", "function")) or "user"
        role = "system" if role == "developer" else role
        found.append(chat.Message(role, content_of(entry, "content", optional=role == "assistant")))
    system = [message.text for message in found if message.role == "system"]
    others = [message for message in found if message.role != "system"]
    return [chat.Message("system", "\n\n".join(system)), *others] if system else others


def content_of(entry: Fields, name: str, optional: bool = False) -> str:
    """A text, or parts that are texts."""
    value = entry.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        raise entry.fail(name, "a text or a list of parts")
    texts = []
    for part in entry.objects(name):
        kind = part.text("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise BadRequest(f"{name}: found a part of the type {kind!r:.60}: this model reads text only", name)
        texts.append(part.text("text", "") or "")
    return "".join(texts)


def chat_ask(fields: Fields, served: Served) -> Ask:
    messages = messages_of(fields.objects("messages"))
    limits = limits_of(fields)
    if "max_completion_tokens" in fields:
        limits["max_tokens"] = fields.whole("max_completion_tokens", 0, MOST_TOKENS)
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    wanted = fields.flag("logprobs")
    if top is not None and not wanted:
        raise BadRequest("top_logprobs: needs logprobs to be true", "top_logprobs")
    return Ask(
        prompt=chat_prompt(served, messages),
        sampling=sampling_of(fields, served),
        logprobs=(top or 0) if wanted else None,
        **limits,
    )


def chat_prompt(served: Served, messages: list[chat.Message]) -> list[int]:
    if not served.model.is_chat_model:
        raise BadRequest(f"{served.name} has no chat template: it continues texts, by /v1/completions", "model")
    try:
        return served.model.prompt_ids(messages)
    except InvalidRequest as error:
        raise BadRequest(str(error), "messages") from None


def completion_prompts(fields: Fields, served: Served) -> list[list[int]]:
    """The prompts of a completion: texts or ids, one or several."""
    value = fields.get("prompt")
    many = isinstance(value, list) and value and isinstance(value[0], (str, list))
    prompts = []
    for prompt in value if many else [value if value is not None else ""]:
        if isinstance(prompt, str):
            prompts.append(served.model.tokenizer.encode(prompt, bos=True))
        elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            prompts.append(prompt)
        else:
            raise fields.fail("prompt", "texts, or lists of token ids")
    if len(prompts) > MOST_ANSWERS:
        raise BadRequest(f"prompt: found {len(prompts)}, expected up to {MOST_ANSWERS}", "prompt")
    return prompts


def completion_asks(fields: Fields, served: Served) -> list[Ask]:
    if "suffix" in fields:
        raise BadRequest("suffix: Gemma models cannot fill in the middle", "suffix")
    limits = limits_of(fields)
    if limits["max_tokens"] is None:
        limits["max_tokens"] = 16  # as the API has it
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    sampling, scored = sampling_of(fields, served), logprobs if fields.flag("echo") else None
    return [
        Ask(prompt=prompt, sampling=sampling, logprobs=logprobs, scored=scored, **limits)
        for prompt in completion_prompts(fields, served)
    ]


# --- what answers say


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def finish_of(answer: Answer) -> str:
    return "length" if answer.writer.finish == "length" else "stop"


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


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    piece = tokenizer.piece(token)
    if tokenizer.kind(token) == BYTE:
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    raw = _bytes(tokenizer, token)
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

    def __init__(self, served: Served, fields: Fields, chat: bool) -> None:
        self._served, self._chat = served, chat
        self._head = {"id": new_id("chatcmpl" if chat else "cmpl"), "created": int(time.time())}
        options = fields.object("stream_options")
        self._usage = options is not None and options.flag("include_usage")
        self._echo = not chat and fields.flag("echo")

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
        for i, answer in enumerate(answers):
            text, chances = await answer.text(), answer.writer.chances
            if self._chat:
                content: Json = {"message": {"role": "assistant", "content": text, "refusal": None}}
            else:
                content = {"text": text}
            if self._echo:
                before, read = self._prompt(answer)
                content, chances = {"text": before + text}, [*read, *chances]
            logprobs = self._logprobs(answer, chances, 0)
            choices.append({"index": i, **content, "logprobs": logprobs, "finish_reason": finish_of(answer)})
        return {**self._object(False), "choices": choices, "usage": usage_of(answers), "timings": timings_of(answers)}

    def _part(self, index: int, text: str | None, logprobs: Json | None = None, finish: str | None = None) -> Json:
        if self._chat:
            content: Json = {"delta": {} if text is None else {"content": text}}
        else:
            content = {"text": text or ""}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._object(True), "choices": [choice], **({"usage": None} if self._usage else {})}

    async def parts(self, answers: Sequence[Answer]) -> AsyncIterator[Json]:
        """The chunks of a stream."""
        told, offsets = [0] * len(answers), [0] * len(answers)
        for i in range(len(answers) if self._chat else 0):
            first = self._part(i, "")
            first["choices"][0]["delta"]["role"] = "assistant"
            yield first
        begun = set[int]()
        async for i, text, n in together(answers):
            answer, chances = answers[i], answers[i].writer.chances[told[i] : n]
            told[i] = n
            if self._echo and i not in begun:
                before, read = self._prompt(answer)
                text, chances = before + text, [*read, *chances]
                begun.add(i)
            yield self._part(i, text, self._logprobs(answer, chances, offsets[i]))
            offsets[i] += len(text)
        for i, answer in enumerate(answers):
            left = answer.writer.chances[told[i] :]
            logprobs = self._logprobs(answer, left, offsets[i]) if left else None
            text = self._prompt(answer)[0] if self._echo and i not in begun else None
            last = self._part(i, text, logprobs, finish_of(answer))
            yield last if self._usage else {**last, "timings": timings_of(answers)}
        if self._usage:
            yield {**self._object(True), "choices": [], "usage": usage_of(answers), "timings": timings_of(answers)}


def dumps(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
