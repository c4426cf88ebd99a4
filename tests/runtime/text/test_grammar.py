"""Answers in a form, from a model that knows nothing of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bezel.runtime import Model, Sampling
from bezel.runtime.commands.main import main
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.text.generation import Generation
from bezel.runtime.text.grammar import Grammar, Matching
from click.testing import CliRunner

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "year": {"type": "integer", "minimum": 1800, "maximum": 2100},
        "kinds": {"type": "array", "items": {"enum": ["tale", "song"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["title", "year", "kinds"],
    "additionalProperties": False,
}


@pytest.fixture
def model(model_of: Callable[..., Model]) -> Model:
    return model_of("demo", "q8_0", engine="native")


def answer(model: Model, grammar: Grammar, **options: Any) -> str:
    sampling = Sampling(**{"seed": 1, **options})
    return "".join(model.generate("A story.", sampling=sampling, grammar=grammar, max_tokens=400))


@pytest.mark.parametrize("options", [{"temperature": 0}, *({"seed": i, "temperature": 2.0} for i in range(6))])
def test_json_by_a_schema(options: dict[str, Any], model: Model) -> None:
    found = json.loads(answer(model, model.grammars.json_schema(SCHEMA), **options))
    assert found.keys() == SCHEMA["properties"].keys()
    assert 1800 <= found["year"] <= 2100
    assert set(found["kinds"]) <= {"tale", "song"}


@pytest.mark.parametrize("seed", range(4))
def test_a_regular_expression_matches_the_whole(seed: int, model: Model) -> None:
    expression = r"[0-9]{3}-(fox|king|Ä)+"
    text = answer(model, model.grammars.regex(expression + r"\."), seed=seed)
    assert re.fullmatch(expression + r"\.", text)


def test_a_grammar(model: Model) -> None:
    text = answer(model, model.grammars.lark('start: "(" (start | /[a-z]{1,3}/) ")"'))
    assert re.fullmatch(r"\(+[a-z]{1,3}\)+", text)
    assert text.count("(") == text.count(")")


def test_json_or_text(model: Model) -> None:
    grammar = model.grammars.json_or(SCHEMA, None)
    texts = [answer(model, grammar, seed=seed) for seed in range(6)]
    assert not any(text.startswith("{") and json.loads(text).keys() != SCHEMA["properties"].keys() for text in texts)


@pytest.mark.parametrize("source", ["start: start", "start: /[^\\s\\S]/", "start: FOO\nFOO: /a/ & /b/"])
def test_a_grammar_that_no_answer_can_follow(source: str, model: Model) -> None:
    with pytest.raises(InvalidRequest, match=r"^grammar: an answer cannot go on in this form: nothing may come next$"):
        model.grammars.lark(source)


@pytest.mark.parametrize("bound", [10**399, -(1 << 63), 1e30])
def test_bounds_that_would_be_cut(bound: float, model: Model) -> None:
    with pytest.raises(InvalidRequest, match=r"^JSON schema: maximum: found .*, expected less than 2\^63$"):
        model.grammars.json_schema({"type": "object", "properties": {"a": {"type": "integer", "maximum": bound}}})


def test_keywords_that_no_grammar_sees_to(model: Model) -> None:
    schema = {"type": "array", "items": {"enum": ["a"]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        model.grammars.json_schema(schema)
    assert json.loads(answer(model, model.grammars.json_schema(schema, lenient=True))) == ["a", "a"]


def test_what_is_forced_takes_one_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text is the one that single steps give."""
    grammar, ids = model.grammars.json_schema(SCHEMA), model.prompt_ids("A story.")
    texts, passes = [], []
    for step_by_step in (False, True):
        session, fed = model.session(), list[int]()
        feed = session.feed
        monkeypatch.setattr(
            session, "feed", lambda ids, *rest, fed=fed, feed=feed: (fed.append(len(ids)), feed(ids, *rest))[1]
        )
        if step_by_step:
            monkeypatch.setattr(Matching, "forced", lambda _: [])
        sampling = Sampling(temperature=0)
        generation = Generation(session, ids, sampling, max_tokens=400, constraint=grammar.constraint())
        texts.append("".join(generation))
        passes.append(len(fed))
    assert texts[0] == texts[1]
    assert passes[0] < 0.8 * passes[1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda g: g.json_schema({"type": "nothing"}), "JSON schema: Invalid type: nothing"),
        (lambda g: g.json_schema({"$ref": "http://127.0.0.1:1/"}), "JSON schema: .*does not fetch"),
        (lambda g: g.regex("("), r"regular expression: .*regex parse error"),
        (lambda g: g.lark("start"), "grammar: "),
        (lambda g: g.regex("a" * (1 << 19)), "regular expression: 524288 characters, expected at most 262144"),
    ],
)
def test_what_is_no_form(make: Callable[[Any], Any], said: str, model: Model) -> None:
    with pytest.raises(InvalidRequest, match=said):
        make(model.grammars)


def test_without_llguidance(model_of: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"need llguidance: pip install 'bezel-lm\[serve\]'"):
        _ = model_of("demo", "q4_0").grammars


def test_the_command(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    file, schema = str(gguf_of("demo", "q8_0")), tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    done = CliRunner().invoke(main, ["run", file, "A story.", "--json-schema", str(schema), "--seed", "1"])
    assert json.loads(done.stdout).keys() == SCHEMA["properties"].keys()
    assert "cut off" not in done.stderr
    cut = CliRunner().invoke(main, ["run", file, "A story.", "--json-schema", str(schema), "--max-tokens", "2"])
    assert "cut off after 2 tokens, before the form was complete" in cut.stderr
    done = CliRunner().invoke(main, ["run", file, "A story.", "--regex", "[0-9]{4}", "--seed", "1"])
    assert re.fullmatch("[0-9]{4}\n", done.stdout)
    schema.write_text("[]")
    done = CliRunner().invoke(main, ["run", file, "A story.", "--json-schema", str(schema)])
    assert f"{schema}: expected a JSON schema, an object" in done.stderr
    done = CliRunner().invoke(main, ["run", file, "A", "--json-schema", str(schema), "--regex", "a"])
    assert "give one of them" in done.stderr
