"""What requests ask of a model, whatever their form."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..errors import InvalidRequest
from ..text import chat
from ..text.generation import Constraint, Writer
from ..text.grammar import ANY_JSON, Grammar, Grammars
from ..text.sampling import Sampling
from ..vision.eye import Picture
from ..vision.image import Image, from_data_url
from . import tools
from .answers import Answer
from .fields import BadRequest, Fields
from .models import Served
from .shapes import Json

_log = logging.getLogger("bezel.serve")

MOST_ANSWERS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASED = 16, 16, 20, 1024
MOST_TOKENS = 1 << 30


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
    talk: Talk | None = None
    pictures: list[Picture] = field(default_factory=list)  # held until it is answered

    @property
    def calls(self) -> bool:
        """Whether an answer may be calls of functions."""
        return self.talk is not None and self.talk.may_call


def start(served: Served, ask: Ask) -> list[Answer]:
    """Begin the answers that are asked for. Raises BadRequest where the prompt does not fit."""
    model = served.model
    if len(ask.prompt) > model.context:
        raise BadRequest(
            f"the prompt has {len(ask.prompt)} tokens, and the context of {served.name} {model.context}: shorten it, "
            "or serve the model with a larger --context",
            "prompt" if ask.talk is None else "messages",
            code="context_length_exceeded",
        )
    room = model.context - len(ask.prompt) + 1  # the last token needs no position
    most = room if ask.max_tokens is None else min(ask.max_tokens, room)
    answers = []
    for i in range(ask.n):
        sampling = ask.sampling
        if sampling.seed is not None and i:
            sampling = replace(sampling, seed=sampling.seed + i)
        writer = Writer(
            model.tokenizer,
            sampling,
            model.stop_ids,
            max_tokens=most,
            stop=ask.stop,
            constraint=ask.constraint() if ask.constraint else None,
            logprobs=ask.logprobs,
        )
        following = partial(next_prompt, served, ask.talk) if ask.talk is not None and ask.n == 1 else None
        answer = Answer(served.scheduler, ask.prompt, writer, scored=ask.scored, following=following)
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
    if chosen["seed"] == -1:  # as on the command line: another one each time
        chosen["seed"] = None
    elif chosen["seed"] is not None:
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


def text_of(entry: Fields, name: str, optional: bool = False) -> str:
    """A text, or parts that are texts."""
    content = content_of(entry, name, optional)
    if not isinstance(content, str):
        raise BadRequest(f"{name}: found a picture, expected text: pictures go into a user's messages", name)
    return content


def content_of(entry: Fields, name: str, optional: bool = False) -> chat.Content:
    """A text, or parts that are texts and pictures."""
    value = entry.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        raise entry.fail(name, "a text or a list of parts")
    return content_from([_part(part) for part in entry.objects(name)])


def content_from(parts: Sequence[chat.Part]) -> chat.Content:
    """Parts as a message holds them: text alone as one."""
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _part(part: Fields) -> chat.Part:
    kind = part.text("type", "text")
    if kind in ("text", "input_text", "output_text"):
        return part.text("text", "") or ""
    if kind not in ("image_url", "input_image"):
        name = f"{part.path}.type"
        raise BadRequest(f"{name}: found {kind!r:.60}: this model reads texts and pictures", name)
    nested = part.get("image_url")
    holder, name = (part.object("image_url") or part, "url") if isinstance(nested, dict) else (part, "image_url")
    url = holder.text(name)
    if url is None:
        raise holder.fail(name, "a picture, data:image/…;base64,…")
    pan_and_scan = holder.text("detail") == "high"
    return picture_of(url, f"{holder.path}.{name}", pan_and_scan)


def picture_of(url: str, param: str, pan_and_scan: bool = False) -> Image:
    """A picture that a request holds, which is decoded only when it is known to fit. Raises BadRequest."""
    try:
        return from_data_url(url, param, pan_and_scan)
    except InvalidRequest as error:
        raise BadRequest(str(error), param) from None


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


async def constraint_of(served: Served, talk: Talk) -> Callable[[], Constraint] | None:
    """What an answer must look like, by the functions that it may call and by its form.

    Raises BadRequest for what no answer can look like.
    """
    kind, source = _form_of(talk.form)
    form = talk.form.path if talk.form is not None else ""
    try:
        if talk.may_call:
            if kind not in ("text", "json") and talk.choice == "auto":
                raise BadRequest(f"{form}.type: found {kind!r}, expected a JSON schema beside tools", f"{form}.type")
            if kind == "json":  # by itself first: its faults are its own
                await served.compiled(lambda grammars: grammars.json_schema(source))
            return (await _calls(served, talk, source if kind == "json" else None)).constraint
        if kind == "text":
            return None
        makers: dict[str, Callable[[Grammars, Any], Grammar]] = {
            "json": Grammars.json_schema,
            "regex": Grammars.regex,
            "grammar": Grammars.lark,
        }
        return (await served.compiled(lambda grammars: makers[kind](grammars, source))).constraint
    except InvalidRequest as error:
        raise BadRequest(f"{form}: {error}", form) from None


async def _calls(served: Served, talk: Talk, form: Json | None) -> Grammar:
    named = [tool for tool in talk.functions if talk.choice == f"call {tool.name}"]
    try:
        return await served.compiled(
            lambda grammars: tools.grammar(
                grammars,
                named or talk.functions,
                required=talk.choice != "auto",
                parallel=talk.parallel and not named,
                form=form,
            )
        )
    except InvalidRequest as error:
        raise BadRequest(f"tools: {error}", "tools") from None


def _form_of(form: Fields | None) -> tuple[str, Any]:
    """What a `response_format` asks for: "text", "json" by a schema, "regex" or "grammar", and the source of it."""
    kind = form.choice("type", ("text", "json_object", "json_schema", "regex", "grammar")) if form is not None else None
    if form is None or kind in (None, "text"):
        return "text", None
    if kind == "json_object":
        return "json", ANY_JSON
    if kind == "json_schema":
        within = form if "schema" in form or form.path != "response_format" else form.object("json_schema")
        if within is None:
            raise form.fail("json_schema", "an object with a schema")
        schema = within.get("schema")
        if not isinstance(schema, dict):
            raise within.fail("schema", "a JSON schema, an object")
        return "json", schema
    name = "pattern" if kind == "regex" else "grammar"
    source = form.text(name)
    if source is None:
        raise form.fail(name, "a text")
    return kind, source


def json_text(entry: Fields, name: str, text: str) -> str:
    """JSON in a text, as the model would write it. Raises BadRequest where it is none."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        raise entry.fail(name, "JSON") from None


def functions_of(entries: Sequence[Fields], schema: str = "parameters") -> list[tools.Tool]:
    """The functions that a request describes, each an object with its name, description and a JSON schema."""
    found = []
    for entry in entries:
        name, parameters = entry.text("name"), entry.get(schema)
        if not name or not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name):
            raise entry.fail("name", "up to 128 letters, digits, dots, dashes and underscores")
        if parameters is not None and not (
            isinstance(parameters, dict) and parameters.get("type", "object") == "object"
        ):
            raise entry.fail(schema, "a JSON schema of an object")
        found.append(
            tools.Tool(
                name,
                entry.text("description", "") or "",
                {"type": "object", **(parameters or {})},
                entry.flag("strict"),
            )
        )
    if len({tool.name for tool in found}) < len(found):
        raise BadRequest("tools: two functions of the same name", "tools")
    return found


def call_of(entry: Fields, name: str, calls: Mapping[str, str]) -> str:
    """The function whose result this is, by the id of its call. Raises BadRequest for a call that there is none of."""
    call = entry.text(name)
    if call is None or call not in calls:
        raise entry.fail(name, "the id of a call that an earlier message has")
    return calls[call]


def check_choice(choice: str, functions: Sequence[tools.Tool]) -> str:
    """Raises BadRequest where a function must be called, and is not there."""
    names = [tool.name for tool in functions]
    if (choice == "required" and not names) or (choice[:5] == "call " and choice[5:] not in names):
        raise BadRequest(f"tool_choice: asks for a call, and tools has {', '.join(names) or 'none'}", "tool_choice")
    return choice


def completion_prompts(fields: Fields, served: Served) -> list[list[int]]:
    """The prompts of a completion: texts or ids, one or several."""
    value = fields.get("prompt")
    many = isinstance(value, list) and value and isinstance(value[0], (str, list))
    prompts = []
    asked = value if many else [value if value is not None else ""]
    if len(asked) > MOST_ANSWERS:
        raise BadRequest(f"prompt: found {len(asked)}, expected up to {MOST_ANSWERS}", "prompt")
    vocab_size = served.model.config.vocab_size
    for prompt in asked:
        if isinstance(prompt, str):
            check_length(served, [prompt], "prompt")
            prompts.append(served.model.tokenizer.encode(prompt, bos=True))
        elif isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t < vocab_size for t in prompt):
            prompts.append(prompt)
        else:
            raise fields.fail("prompt", f"texts, or lists of token ids from 0 to {vocab_size - 1}")
    return prompts


async def completion_asks(fields: Fields, served: Served) -> list[Ask]:
    if "suffix" in fields:
        raise BadRequest("suffix: Gemma models cannot fill in the middle", "suffix")
    limits = limits_of(fields)
    if fields.whole("best_of", 1, MOST_ANSWERS) not in (None, limits["n"]):
        raise fields.fail("best_of", f"n, {limits['n']}: all answers are told")
    if limits["max_tokens"] is None:
        limits["max_tokens"] = 16  # as the API has it
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    sampling, scored = sampling_of(fields, served), logprobs if fields.flag("echo") else None
    constraint = await constraint_of(served, Talk([], form=fields.object("response_format")))
    return [
        Ask(prompt=prompt, sampling=sampling, logprobs=logprobs, scored=scored, constraint=constraint, **limits)
        for prompt in await asyncio.to_thread(completion_prompts, fields, served)
    ]
