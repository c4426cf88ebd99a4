"""The official clients against a running server."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from bezel.runtime import Message, Model, Sampling, load
from bezel.runtime.serve import answers
from bezel.runtime.serve import anthropic as messages_form
from bezel.runtime.serve.tools import Call, Calls, told_calls
from serving import serving

TOLD = [{"role": "user", "content": "A story about a fox."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["fox", "king"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "describe", "description": "Describe somebody.", "parameters": SCHEMA}}
]


@pytest.fixture(scope="module")
def file(gguf_of: Callable[..., Path]) -> Path:
    return gguf_of("demo", "q4_0")


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[Model]:
    with load(file, kv="int8", threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def address(file: Path) -> Iterator[str]:
    with serving({"fairy": file, "again": file}) as address:
        yield address


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def alone(model: Model, text: str = "A story about a fox.", max_tokens: int = 20, **sampling: Any) -> str:
    return "".join(model.generate(text, max_tokens=max_tokens, sampling=Sampling(**sampling)))


def test_a_chat(client: openai.OpenAI, model: Model) -> None:
    found = client.chat.completions.create(model="fairy", messages=TOLD, max_tokens=20, temperature=0)
    assert found.choices[0].message.content == alone(model, temperature=0)
    assert found.choices[0].finish_reason == "length"
    assert found.usage
    assert found.usage.prompt_tokens == len(model.prompt_ids("A story about a fox."))
    assert (found.usage.completion_tokens, found.object, found.model) == (20, "chat.completion", "fairy")


def test_a_chat_streamed(client: openai.OpenAI, model: Model) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fairy",
            messages=TOLD,
            max_completion_tokens=20,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == alone(model, seed=3)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 20
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_many_at_once(address: str, model: Model) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="fairy", messages=TOLD, max_tokens=30, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    assert asyncio.run(all_of_them()) == [alone(model, max_tokens=30, seed=seed) for seed in range(12)]


def test_several_answers_and_stop_strings(client: openai.OpenAI, model: Model) -> None:
    for streamed in (False, True):
        asked: dict[str, Any] = {
            "model": "fairy",
            "messages": TOLD,
            "max_tokens": 40,
            "seed": 5,
            "n": 3,
            "stop": ["the"],
        }
        if streamed:
            texts, finishes = ["", "", ""], ["", "", ""]
            for chunk in client.chat.completions.create(**asked, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    finishes[choice.index] = choice.finish_reason or finishes[choice.index]
        else:
            found = client.chat.completions.create(**asked)
            texts = [choice.message.content or "" for choice in found.choices]
            finishes = [choice.finish_reason for choice in found.choices]
        for i, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            whole = alone(model, max_tokens=40, seed=5 + i)
            assert text == whole.partition("the")[0]
            assert finish == ("stop" if "the" in whole else "length")


def test_several_long_answers_are_whole(client: openai.OpenAI, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them waits for its turn to be read, and is taken for one that nobody reads."""
    monkeypatch.setattr(answers, "_STALLED_SECONDS", 0.05)
    found = client.chat.completions.create(model="fairy", messages=TOLD, max_tokens=200, seed=5, n=4)
    told = [choice.message.content for choice in found.choices]
    assert told == [alone(model, max_tokens=200, seed=5 + i) for i in range(4)]


def test_a_system_message_and_earlier_turns(client: openai.OpenAI, model: Model) -> None:
    told = [
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("model", "Good day."),
        Message("user", "A story."),
    ]
    roles = {"model": "assistant"}
    messages: list[Any] = [
        {"role": roles.get(m.role, m.role), "content": [{"type": "text", "text": m.text}]} for m in told
    ]
    found = client.chat.completions.create(model="fairy", messages=messages, max_tokens=12, temperature=0)
    expected = "".join(model.generate(told, max_tokens=12, sampling=Sampling(temperature=0)))
    assert found.choices[0].message.content == expected


def test_penalties_and_biases(client: openai.OpenAI, model: Model) -> None:
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "max_tokens": 30, "temperature": 0}
    text = client.chat.completions.create(**asked, frequency_penalty=2, presence_penalty=1).choices[0].message.content
    assert text == alone(model, max_tokens=30, temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0)
    (token,) = model.tokenizer.encode("fox")[-1:]
    biased = client.chat.completions.create(**asked, logit_bias={str(token): 100}).choices[0].message.content
    assert biased == model.tokenizer.decode([token] * 30)


def test_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "fairy",
        "messages": TOLD,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    found = client.chat.completions.create(**asked).choices[0]
    assert found.logprobs
    content = found.logprobs.content
    assert content
    assert "".join(one.token for one in content) == found.message.content
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob < 0
        assert len(one.top_logprobs) == 3
        assert bytes(one.bytes or ()).decode() == one.token
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, stream=True)
        for one in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
    ]
    assert streamed == content


def test_logprobs_end_where_a_stop_string_cuts(client: openai.OpenAI, model: Model) -> None:
    """And none is told before its text is."""
    whole, told = alone(model, max_tokens=60, seed=2), 0
    for stop in {whole[i : i + 3] for i in range(0, 60, 7)}:
        asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "max_tokens": 60, "seed": 2, "logprobs": True}
        found = client.chat.completions.create(**asked, stop=stop).choices[0]
        text = found.message.content or ""
        assert text == whole.partition(stop)[0]
        tokens = [one.token for one in (found.logprobs and found.logprobs.content) or []]
        assert "".join(tokens).startswith(text)
        assert len("".join(tokens[:-1])) < len(text) or not tokens
        told += len(tokens)
        seen, given, ended = "", "", False
        for chunk in client.chat.completions.create(**asked, stop=stop, stream=True):
            choice = chunk.choices[0]
            given += choice.delta.content or ""
            seen += "".join(one.token for one in (choice.logprobs and choice.logprobs.content) or [])
            assert not ended or choice.finish_reason
            ended = len(seen) > len(given)  # the token that the stop string cuts is the last
        assert seen == "".join(tokens)
    assert told


def test_a_completion(client: openai.OpenAI, model: Model) -> None:
    found = client.completions.create(model="fairy", prompt=["Once upon", "A king"], max_tokens=8, temperature=0)
    for choice, prompt in zip(found.choices, ("Once upon", "A king"), strict=True):
        expected = "".join(model.generate(prompt, max_tokens=8, sampling=Sampling(temperature=0), raw=True))
        assert choice.text == expected
    ids = model.tokenizer.encode("Once upon", bos=True)
    assert client.completions.create(model="fairy", prompt=ids, max_tokens=8, temperature=0).choices[0].text == (
        found.choices[0].text
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_of_a_prompt(streamed: bool, client: openai.OpenAI, model: Model) -> None:
    import numpy as np

    prompt = "Once upon a time there was a king who had three sons, and they went into the wood to cut trees."
    asked: dict[str, Any] = {"model": "fairy", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}
    for max_tokens in (0, 3):
        asked["max_tokens"] = max_tokens
        if streamed:
            chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, temperature=0, stream=True)]
            text = "".join(chunk.text for chunk in chunks)
            told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
            for chunk in chunks:
                for name, values in told.items():
                    values += getattr(chunk.logprobs, name) if chunk.logprobs else []
        else:
            choice = client.completions.create(**asked, temperature=0).choices[0]
            text, told = choice.text, vars(choice.logprobs)
        ids = model.tokenizer.encode(prompt, bos=True)
        assert text.startswith(prompt)
        assert "".join(told["tokens"]) == text
        assert [text[at:].startswith(t) for at, t in zip(told["text_offset"], told["tokens"], strict=True)]
        logits = model.logits(ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = [logprobs[i, token] for i, token in enumerate(ids[1:])]
        np.testing.assert_allclose(told["token_logprobs"][: len(expected)], expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_by_a_schema(seed: int, client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(
        model="fairy", messages=TOLD, seed=seed, response_format=form, max_tokens=200
    )
    answer = json.loads(found.choices[0].message.content or "")
    assert answer.keys() == SCHEMA["properties"].keys()
    assert answer["kind"] in ("fox", "king")
    assert found.choices[0].finish_reason == "stop"


def test_tools(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "tools": TOOLS, "max_tokens": 300, "seed": 1}
    found = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls or []
    assert json.loads(call.function.arguments).keys() == SCHEMA["properties"].keys()
    named = {"type": "function", "function": {"name": "describe"}}
    chunks = list(client.chat.completions.create(**asked, tool_choice=named, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls] == ["describe"]
    assert json.loads(calls[0].function.arguments).keys() == SCHEMA["properties"].keys()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "a red fox"}
    messages = [*TOLD, found.message.to_dict(), result]
    text = client.chat.completions.create(model="fairy", messages=messages, max_tokens=8).choices[0].message.content
    assert text
    for choice in ("none", "auto"):
        free = client.chat.completions.create(**asked | {"max_tokens": 20}, tool_choice=choice).choices[0]
        assert bool(free.message.content) != bool(free.message.tool_calls)


@pytest.mark.parametrize("form", ["json_schema", "json_object"])
def test_tools_beside_a_form(form: str, client: openai.OpenAI) -> None:
    """What is no call has the form, and what has the form is no call, whatever keys it allows."""
    one = {"type": "object", "properties": {"a": {"$ref": "#/$defs/one"}}, "$defs": {"one": {"const": 1}}}
    one["additionalProperties"] = False
    kinds: dict[str, Any] = {"json_schema": {"json_schema": {"name": "one", "schema": one}}, "json_object": {}}
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "tools": TOOLS, "temperature": 2}
    asked |= {"max_tokens": 400, "response_format": {"type": form, **kinds[form]}, "parallel_tool_calls": False}
    told = set()
    for seed in range(12):
        found = client.chat.completions.create(**asked, seed=seed).choices[0]
        if found.finish_reason == "length":
            continue
        if found.message.tool_calls:
            (call,) = found.message.tool_calls
            assert call.type == "function"
            assert call.function.name == "describe"
            assert json.loads(call.function.arguments).keys() == SCHEMA["properties"].keys()
        else:
            assert "tool_calls" not in json.loads(found.message.content or "")
            streamed = list(client.chat.completions.create(**asked, seed=seed, stream=True))
            assert "".join(x.choices[0].delta.content or "" for x in streamed) == found.message.content
        told.add(found.finish_reason)
    assert "stop" in told
    assert form == "json_object" or "tool_calls" in told  # a free object's keys are many
    assert client.chat.completions.create(**asked, tool_choice="required", seed=1).choices[0].message.tool_calls


def test_a_response_with_tools_has_its_form(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **TOOLS[0]["function"]}
    form: Any = {"format": {"type": "json_schema", "name": "one", "schema": SCHEMA}}
    for seed in range(4):
        found = client.responses.create(
            model="fairy", input="A story.", tools=[tool], text=form, extra_body={"seed": seed}, max_output_tokens=400
        )
        assert (
            found.output[0].type == "function_call"
            or json.loads(found.output_text).keys() == SCHEMA["properties"].keys()
        )


@pytest.mark.parametrize(
    "form", [{"type": "regex", "pattern": "Once upon a time (a|the) [a-z]{3,8}"}, {"type": "json_object"}]
)
def test_logprobs_change_no_text(form: dict[str, Any], client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "max_tokens": 40, "response_format": form}
    for seed in range(4):
        texts = [
            client.chat.completions.create(**asked, seed=seed, logprobs=wanted).choices[0].message.content
            for wanted in (False, True)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["default", "const", "enum", "$id", "$ref", "properties"])
def test_a_parameter_may_have_any_name(name: str, client: openai.OpenAI) -> None:
    schema = {"properties": {name: {"$ref": "#/$defs/x"}}, "required": [name], "additionalProperties": False}
    schema["$defs"] = {"x": {"enum": ["p"]}}
    tool: Any = {"type": "function", "function": {"name": "ask", "parameters": schema}}
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "tools": [tool], "tool_choice": "required"}
    found = client.chat.completions.create(**asked, parallel_tool_calls=False, seed=1, max_tokens=300)
    (call,) = found.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {name: "p"}  # an object, which the schema does not say


def test_arguments_are_an_object(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "ask", "parameters": {"type": "string"}}}
    with pytest.raises(openai.BadRequestError, match="a JSON schema of an object"):
        client.chat.completions.create(model="fairy", messages=TOLD, tools=[tool])  # type: ignore[arg-type]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_that_is_cut_is_text(streamed: bool, address: str) -> None:
    """By a stop string, or the end of its tokens: what was written is not lost."""
    tool = {"type": "function", **TOOLS[0]["function"]}
    begun = '{"tool_calls": [{"name": "describe", "arg'
    for cut in ({"max_tokens": 30}, {"stop": ['"age"']}):
        body = {"messages": TOLD, "tools": TOOLS, "tool_choice": "required", "seed": 1, "stream": streamed, **cut}
        found = httpx.post(address + "/v1/chat/completions", json=body, timeout=60)
        assert told(found.text, "content").startswith(begun)
    body = {"input": "A", "tools": [tool], "tool_choice": "required", "max_output_tokens": 30, "stream": streamed}
    found = httpx.post(address + "/v1/responses", json=body, timeout=60)
    assert told(found.text, "delta" if streamed else "text").startswith(begun)
    tool = {"name": "describe", "input_schema": SCHEMA}
    body = {"messages": TOLD, "tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 30, "stream": streamed}
    found = httpx.post(address + "/v1/messages", json=body, timeout=60)
    assert told(found.text, "text").startswith(begun)


def told(text: str, name: str) -> str:
    """All strings of this name in a JSON text, or in the events of a stream."""
    found = re.findall(rf'"{name}": ?"((?:[^"\\]|\\.)*)"', text)
    return "".join(json.loads(f'"{part}"') for part in found)


def test_a_message_in_a_form(address: str) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    for asked in ({"output_config": {"format": form}}, {"output_format": form}):
        body = {"messages": TOLD, "max_tokens": 300, **asked}
        found = httpx.post(address + "/v1/messages", json=body, timeout=60).json()
        assert json.loads(found["content"][0]["text"]).keys() == SCHEMA["properties"].keys()


def test_a_tool_s_keywords_that_no_grammar_sees_to(client: openai.OpenAI) -> None:
    """They do not stand in the way, but where the arguments must be those of the schema."""
    many = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"enum": [1]}}}}
    function: dict[str, Any] = {"name": "count", "parameters": many | {"required": ["a"]}}
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "max_tokens": 100, "seed": 1}
    tools: list[Any] = [*TOOLS, {"type": "function", "function": function}]
    for choice in ("auto", {"type": "function", "function": {"name": "count"}}):
        client.chat.completions.create(**asked, tools=tools, tool_choice=choice)
    tools[1] = {"type": "function", "function": {**function, "strict": True}}
    with pytest.raises(openai.BadRequestError, match=r"count, which is strict: JSON schema: .*uniqueItems") as caught:
        client.chat.completions.create(**asked, tools=tools)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "expected one of fairy, again"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: found -1"),
        ({"temperature": "hot"}, openai.BadRequestError, 'temperature: found "hot"'),
        ({"messages": []}, openai.BadRequestError, "messages: expected one message"),
        ({"messages": [{"role": "king", "content": ""}]}, openai.BadRequestError, 'role: found "king"'),
        (
            {"messages": [{"role": "assistant", "content": "I"}]},
            openai.BadRequestError,
            "expected a user's message first",
        ),
        ({"messages": "Hello"}, openai.BadRequestError, 'messages: found "Hello", expected a list of objects'),
        ({"top_logprobs": 2}, openai.BadRequestError, "needs logprobs"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"n": 0}, openai.BadRequestError, "n: found 0"),
        ({"stop": [1]}, openai.BadRequestError, r"stop: found .1."),
        ({"stream": "yes"}, openai.BadRequestError, 'stream: found "yes"'),
        ({"tool_choice": "required"}, openai.BadRequestError, "asks for a call, and tools has none"),
        ({"extra_body": {"functions": []}}, openai.BadRequestError, "functions: is of an older API"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, openai.BadRequestError, r"name: found .a b"),
        (
            {"messages": [*TOLD, {"role": "tool", "tool_call_id": "x", "content": "1"}]},
            openai.BadRequestError,
            r'messages\[1\].tool_call_id: found "x", expected the id of a call',
        ),
        ({"seed": 10**500}, openai.BadRequestError, "found a number of 501 digits, expected at most 400"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format.json_schema: found"),
        (
            {"response_format": {"type": "grammar", "grammar": "start: start"}, "stream": True},
            openai.BadRequestError,
            "response_format: grammar: an answer cannot",
        ),
        (
            {"response_format": {"type": "regex", "pattern": "a"}, "tools": TOOLS},
            openai.BadRequestError,
            "beside tools",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
            openai.BadRequestError,
            "JSON schema: Invalid type: nope",
        ),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "the prompt has"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "found something else, 'x'",
        ),
    ],
)
def test_what_is_wrong_is_said(
    change: dict[str, Any], kind: type[Exception], words: str, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "max_tokens": 2}
    with pytest.raises(kind, match=words):
        client.chat.completions.create(**asked | change)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 400, "content: found null, expected a text"),
        ("/tokenize", [], 400, "the body is [], expected an object"),
        ("/v1/completions", {"prompt": "A", "best_of": 2}, 400, "best_of: found 2, expected n, 1"),
        ("/v1/embeddings", {"input": "A"}, 404, "none of these gives embeddings"),
        ("/v1/responses", {"input": "A", "include": ["message.output_text.logprobs"]}, 400, "logprobs: only /v1/chat"),
        ("/v1/responses", {"input": "A", "tool_choice": {"type": "web_search"}}, 400, "tool_choice.type: found"),
        ("/v1/responses", {"input": "A", "background": True}, 400, "background: nothing of responses is kept"),
        (
            "/v1/responses",
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]},
            400,
            "call_id: found",
        ),
        (
            "/v1/messages",
            {"messages": TOLD, "max_tokens": 1, "tools": [{"name": "a"}]},
            400,
            "tools[0].input_schema: found null",
        ),
    ],
)
def test_what_is_wrong_elsewhere_is_said(path: str, body: Any, status: int, words: str, address: str) -> None:
    found = httpx.post(address + path, json=body)
    assert (found.status_code, words in found.json()["error"]["message"]) == (status, True), found.text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fairy", "again"]
    assert client.models.retrieve("again").owned_by == "bezel"
    found = client.chat.completions.create(model="again", messages=TOLD, max_tokens=2)
    assert found.model == "again"


@pytest.mark.parametrize("streamed", [False, True])
def test_responses(streamed: bool, client: openai.OpenAI, model: Model) -> None:
    asked: dict[str, Any] = {
        "model": "fairy",
        "input": "A story about a fox.",
        "max_output_tokens": 20,
        "temperature": 0,
    }
    if streamed:
        events = list(client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
        found = events[-1].response
        assert found.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    else:
        found = client.responses.create(**asked)
    assert found.output_text == alone(model, temperature=0)
    assert (found.status, found.incomplete_details and found.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    tool = {"type": "function", "strict": True, **TOOLS[0]["function"]}
    called = client.responses.create(
        model="fairy", input="A story.", tools=[tool], tool_choice="required", parallel_tool_calls=False, top_p=1
    )
    (call,) = called.output
    assert call.type == "function_call"
    assert json.loads(call.arguments).keys() == SCHEMA["properties"].keys()
    told = [{"role": "user", "content": "A story."}, call.to_dict()]
    told += [{"type": "function_call_output", "call_id": call.call_id, "output": "a red fox"}]
    assert client.responses.create(model="fairy", input=told, max_output_tokens=5).output_text
    with pytest.raises(openai.BadRequestError, match="nothing of earlier responses is kept"):
        client.responses.create(model="fairy", input="A", previous_response_id="resp_1")


@pytest.mark.parametrize("streamed", [False, True])
def test_messages(streamed: bool, address: str, model: Model) -> None:
    client = anthropic.Anthropic(base_url=address, api_key="any", max_retries=0)
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "max_tokens": 20, "extra_body": {"temperature": 0}}

    def answered(**options: Any) -> anthropic.types.Message:
        if not streamed:
            return client.messages.create(**asked | options)
        with client.messages.stream(**asked | options) as stream:
            for _ in stream:
                pass
            return stream.get_final_message()

    found = answered()
    assert found.content[0].text == alone(model, temperature=0)
    assert (found.stop_reason, found.usage.output_tokens) == ("max_tokens", 20)
    found = answered(stop_sequences=[" a"])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", " a")
    begun = answered(messages=[*TOLD, {"role": "assistant", "content": "Once upon"}])
    expected = model.prompt_ids("A story about a fox.") + model.tokenizer.encode("Once upon")
    assert begun.content[0].text == "".join(
        model.generate(expected, max_tokens=20, sampling=Sampling(temperature=0), raw=True)
    )
    tool = {"name": "describe", "description": "", "input_schema": SCHEMA}
    called = answered(tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=300)
    assert (called.stop_reason, called.content[0].type, called.content[0].name) == ("tool_use", "tool_use", "describe")
    assert called.content[0].input.keys() == SCHEMA["properties"].keys()
    result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "a red fox"}
    told = [*TOLD, {"role": "assistant", "content": called.to_dict()["content"]}, {"role": "user", "content": [result]}]
    assert answered(messages=told, system="Be brief.").content[0].text
    thought = {"type": "thinking", "thinking": "A fox is red.", "signature": "signed elsewhere"}
    answers = [{"role": "assistant", "content": [*t, {"type": "text", "text": "A fox."}]} for t in ([], [thought])]
    again = {"role": "user", "content": "Tell it again."}
    plain, thinking = (answered(messages=[*TOLD, answer, again]).content[0].text for answer in answers)
    assert thinking == plain
    with pytest.raises(anthropic.NotFoundError, match="expected one of fairy"):
        answered(model="nobody")
    assert client.messages.count_tokens(model="fairy", messages=TOLD).input_tokens == len(
        model.prompt_ids("A story about a fox.")
    )


def test_what_llama_cpp_s_server_has_too(address: str, client: openai.OpenAI, model: Model) -> None:
    client.chat.completions.create(model="fairy", messages=TOLD, max_tokens=2)
    text = "Once upon a time, Ä"
    ids = httpx.post(f"{address}/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    assert ids == model.tokenizer.encode(text, bos=True)
    pieces = httpx.post(f"{address}/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [one["piece"] for one in pieces] == [model.tokenizer.piece(i) for i in ids[1:]]
    assert httpx.post(f"{address}/detokenize", json={"tokens": ids}).json() == {"content": text}
    assert httpx.post(f"{address}/detokenize", json={"tokens": [10**9]}).status_code == 400
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{address}/metrics").text
    for name in ("prompt_tokens_total", "tokens_predicted_total", "requests_processing", "prefix_bytes"):
        assert re.search(rf'^bezel_{name}{{model="fairy"}} [0-9.e+]+$', metrics, re.MULTILINE), name
    assert 'bezel_answers_total{model="fairy",finish="length"}' in metrics
    assert httpx.get(f"{address}/slots").json() == []


def test_references_of_a_tool_s_schema_hold(client: openai.OpenAI) -> None:
    """Where it is a part of another one; what only looks like a reference stays."""
    schema = {
        "$id": "https://example.com/tool",
        "type": "object",
        "properties": {"who": {"$ref": "#/$defs/who"}, "what": {"const": {"$ref": "#/x"}}},
        "required": ["who", "what"],
        "additionalProperties": False,
        "$defs": {"who": {"enum": ["fox", "king"]}},
    }
    tool: Any = {"type": "function", "function": {"name": "ask", "parameters": schema}}
    asked: dict[str, Any] = {"model": "fairy", "messages": TOLD, "tools": [tool], "tool_choice": "required"}
    found = client.chat.completions.create(**asked, parallel_tool_calls=False, seed=1, max_tokens=300)
    (call,) = found.choices[0].message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    assert arguments["who"] in ("fox", "king")
    assert arguments["what"] == {"$ref": "#/x"}


def test_calls_are_told_as_they_are_written() -> None:
    """Also numbers that no float holds."""
    written = told_calls([Call("ask", '{"x": 9e999}'), Call("b", "{}")])
    assert list(Calls(True).push(written)) == [Call("ask", '{"x": 9e999}'), Call("b", "{}")]
    assert messages_form._block(Call("ask", '{"x": -9e999}'))["input"]["x"] == -sys.float_info.max


def test_a_completion_by_a_regular_expression(client: openai.OpenAI) -> None:
    form = {"response_format": {"type": "regex", "pattern": "[0-9]{4}"}}
    found = client.completions.create(model="fairy", prompt="The year ", max_tokens=20, extra_body=form)
    assert re.fullmatch("[0-9]{4}", found.choices[0].text)


def test_what_is_forced_ends_with_the_context(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"schema": {"const": "abc " * 3000}}}
    found = client.chat.completions.create(model="fairy", messages=TOLD, response_format=form)
    assert found.choices[0].finish_reason == "length"
    assert found.usage
    assert found.usage.total_tokens <= 2048 + 1


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "regex", "pattern": "\ud800"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": float("inf")}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": nested(300)}}},
        {
            "tools": [{"type": "function", "function": {"name": "a", "parameters": nested(300)}}],
            "tool_choice": "required",
        },
        {"messages": [{"role": "user", "content": "word " * 40_000}]},
        {"messages": [{"role": "user", "content": ""}] * 3000},
    ],
)
def test_what_cannot_be_a_form_or_a_prompt_is_a_400(asked: dict[str, Any], address: str) -> None:
    body = {"model": "fairy", "messages": TOLD, "max_tokens": 2, **asked}
    found = httpx.post(f"{address}/v1/chat/completions", content=json.dumps(body), timeout=30)
    assert found.status_code == 400, found.text
    wrong = {"model": "fairy", "prompt": [2, 1 << 70]}
    assert httpx.post(f"{address}/v1/completions", json=wrong).status_code == 400


def test_more_answers_than_there_is_room_for_wait(address: str) -> None:
    body = {"model": "fairy", "prompt": ["A"] * 16, "n": 16, "max_tokens": 1}
    assert len(httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()["choices"]) == 256
