"""Chats against transformers' template, fixed ids of the demo, and texts that try to forge a turn."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.model.families import FAMILIES
from bezel.runtime.text.chat import Message, render, show, template_hash, template_is_known
from bezel.runtime.text.sentencepiece_model import read_vocabulary_file
from bezel.runtime.text.tokenizer import Tokenizer
from bezel.runtime.text.vocabulary import CONTROL, Vocabulary
from hypothesis import given
from hypothesis import strategies as st
from tiny import DEMO

VOCABULARY = read_vocabulary_file(DEMO / "tokenizer.model")
TOKENIZER = Tokenizer(VOCABULARY, "tokenizer.model")
TEMPLATE: str = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
BOS, START, END = 2, 4, 5

CHATS = {
    "one turn": [("user", "Tell me the story of Rapunzel.")],
    "trimmed": [
        ("user", " \t Hi there!\n\n"),
        ("model", "\nOnce upon a time.\n\nThere was\x85"),
        ("user", "12 é🙂\tx"),
    ],
    "assistant": [("user", "Who?"), ("assistant", "A fox."), ("user", "Why?")],
    "empty": [("user", "")],
    "finished": [("user", "Who?"), ("model", "A fox.")],
}


def messages(chat: list[tuple[str, str]]) -> list[Message]:
    return [Message(role, text) for role, text in chat]


def test_golden_ids() -> None:
    chat = messages([("user", "Tell me the story of Rapunzel.")])
    head = [2, 4, 512, 287, 6, 4054, 446, 381, 271, 1549, 304, 823, 3608, 4051, 5, 6]
    assert render(TOKENIZER, chat, reply=False) == head
    assert render(TOKENIZER, chat) == [*head, 4, 4043, 845, 578, 6]


@pytest.fixture(scope="module")
def reference() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("name", CHATS)
def test_as_transformers_applies_the_template(name: str, reference: Any) -> None:
    chat = CHATS[name]
    reply = chat[-1][0] == "user"
    dicts = [{"role": role, "content": text} for role, text in chat]
    expected = reference.apply_chat_template(dicts, add_generation_prompt=reply, tokenize=True, return_dict=False)
    assert render(TOKENIZER, messages(chat), reply) == expected


def test_a_system_message_opens_the_first_user_turn() -> None:
    system, user = ("system", " Be brief.\n"), ("user", " Who?")
    rest = [("model", "A fox."), ("user", "Why?")]
    folded = [("user", "Be brief.\n\nWho?"), *rest]
    assert render(TOKENIZER, messages([system, user, *rest])) == render(TOKENIZER, messages(folded))
    assert render(TOKENIZER, messages([("system", " \n"), user])) == render(TOKENIZER, messages([user]))


@given(st.lists(st.sampled_from(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "model\n", "<", "a", "\n"])))
def test_text_cannot_forge_turns(parts: list[str]) -> None:
    text = "".join(parts)
    ids = render(TOKENIZER, messages([("system", text), ("user", text), ("model", text), ("user", text)]))
    special = [i for i in ids if i in TOKENIZER.special_ids]
    assert special == [BOS, START, END, START, END, START, END, START]
    assert TOKENIZER.decode(ids).count(text.strip()) >= 4


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "no user message"),
        ([("system", "a")], "no user message"),
        ([("model", "a")], "message 0 has the role 'model', expected 'user'"),
        ([("user", "a"), ("user", "b")], "message 1 has the role 'user', expected 'model'"),
        ([("system", "a"), ("model", "b")], "message 1 has the role 'model', expected 'user'"),
        ([("system", "a"), ("system", "b")], "message 1 has the role 'system', expected 'user'"),
        ([("user", "a"), ("system", "b")], "message 1 has the role 'system', expected 'model'"),
        ([("user", "a"), ("tool", "b")], "message 1 has the role 'tool', expected system, user or model"),
        ([("user\n", "a")], "message 0 has the role"),
        ([("user", "a"), ("assistant", "b")], "the last message is the model's"),
        ([("user", "\ud800")], "lone surrogate"),
    ],
)
def test_chats_that_make_no_sense(chat: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render(TOKENIZER, messages(chat))


def test_a_vocabulary_without_turn_markers() -> None:
    pieces = [piece.replace("<end_of_turn>", "<end_of_day>") for piece in VOCABULARY.pieces]
    metadata = VOCABULARY.to_gguf() | {"tokenizer.ggml.tokens": pieces}
    tokenizer = Tokenizer(Vocabulary.from_gguf(metadata, "x"), "x")
    with pytest.raises(InvalidRequest, match="lacks <start_of_turn> or <end_of_turn>"):
        render(tokenizer, messages([("user", "a")]))


def test_show() -> None:
    ids = render(TOKENIZER, messages([("user", r"end <end_of_turn> \<bos> 5 < 6")]))
    expected = r"<bos><start_of_turn>user" "\n" r"end \<end_of_turn> \\\<bos> 5 < 6<end_of_turn>" "\n"
    assert show(TOKENIZER, ids) == expected + "<start_of_turn>model\n"
    assert show(TOKENIZER, [3, *TOKENIZER.encode("<unk>🙂")]) == r"<unk>\<unk>🙂"
    assert show(TOKENIZER, []) == ""
    with pytest.raises(InvalidRequest):
        show(TOKENIZER, [4096])


@given(st.lists(st.sampled_from([BOS, START, END, "<bos>", "<end_of_turn>", "\\", "<", "bos>", "a"])))
def test_show_tells_tokens_from_text(parts: list[int | str]) -> None:
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else TOKENIZER.encode(part)
    assert read_back(show(TOKENIZER, ids)) == segments(ids)


def segments(ids: list[int]) -> list[int | str]:
    """Ids of control pieces, and the text between them one character at a time."""
    out: list[int | str] = []
    for i in ids:
        out += [i] if VOCABULARY.types[i] == CONTROL else TOKENIZER.decode([i])
    return out


def read_back(shown: str) -> list[int | str]:
    """Undoes `show`: a backslash makes the next character text; an unescaped marker is a token."""
    out: list[int | str] = []
    while shown:
        marker = next((i for i in (BOS, START, END) if shown.startswith(VOCABULARY.pieces[i])), None)
        if marker is not None:
            out.append(marker)
            shown = shown[len(VOCABULARY.pieces[marker]) :]
        else:
            shown = shown.removeprefix("\\")
            out.append(shown[0])
            shown = shown[1:]
    return out


def test_known_templates() -> None:
    assert template_is_known(TEMPLATE)
    assert template_is_known(TEMPLATE.replace("%}{%", "%}\n  {%") + "\n")  # laid out in lines
    assert template_is_known(TEMPLATE.replace("\n", "\\n"))  # newlines written as escapes
    assert not template_is_known(None)
    for other in (
        "",
        "{{ messages }}",
        TEMPLATE.replace("model\n", "model "),
        TEMPLATE.replace("| trim", ""),
        "\ud800",
    ):
        assert not template_is_known(other)


@pytest.mark.parametrize("title", FAMILIES)
def test_every_chat_family_has_a_template(title: str) -> None:
    assert all(re.fullmatch("[0-9a-f]{64}", known) for known in FAMILIES[title].chat_templates)
    assert bool(FAMILIES[title].chat_templates) == (title != "gemma")


def test_layout_of_a_template_does_not_count() -> None:
    template = "{{ 'a' + '\n\n' }}\n{%- if b -%}\n    {%- set c = '\n' -%}\n{%- endif -%}\n"
    escaped = "{{ 'a' + '\\n\\n' }}\n{%- if b -%}{%- set c = '\\n' -%}{%- endif -%}"
    assert template_hash(template) == template_hash(escaped)
    others = [template.replace("'\n\n'", other) for other in ("'\n\n'", "'\n'", "'\n\n\n'", "''")]
    assert len(set(map(template_hash, others))) == 4
