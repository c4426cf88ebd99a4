"""Answers in a form: JSON, a regular expression, a grammar. By llguidance, behind `generation.Constraint`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import InvalidRequest
from .sampling import Bits
from .tokenizer import Tokenizer

ANY_JSON = {"type": "object"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
MOST_BYTES = 1 << 18  # of a schema, an expression or a grammar
_COMPACT: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # free white space need not end


class Grammars:
    """What compiles grammars for a tokenizer and its stop tokens. Making one takes a while; it serves any number.

    Raises InvalidRequest where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError:
            raise InvalidRequest("answers in a form need llguidance: pip install 'bezel-lm[serve]'") from None
        self._vocab_size = tokenizer.vocab_size
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Pieces(tokenizer)),
            n_vocab=tokenizer.vocab_size,
            eos_token=sorted(stop_ids),
            # Tokens that many states allow as a whole: those of JSON's strings, and of expressions for words.
            slices=[*LLTokenizer.json_slices(), "[a-z ]{1,10}"],
        )

    def json_schema(self, schema: Mapping[str, Any], *, lenient: bool = False) -> Grammar:
        """JSON that a schema describes.

        Raises InvalidRequest for a schema that cannot be followed; where that is for a keyword of it that no grammar
        can see to, a `lenient` one does without.
        """
        from llguidance import LLMatcher

        text = _json(schema)
        options: Any = {**_COMPACT, "lenient": lenient, "coerce_one_of": lenient}
        return self._compiled("JSON schema", text, lambda: LLMatcher.grammar_from_json_schema(text, overrides=options))

    def json_or(self, schema: Mapping[str, Any], other: Mapping[str, Any] | None) -> Grammar:
        """JSON of a schema, taken leniently, or of another one; where that is None, or text without a brace first."""
        first = _json({**schema, "x-guidance": {**_COMPACT, "lenient": True, "coerce_one_of": True}})
        second = "TEXT" if other is None else f"%json {_json({**other, 'x-guidance': _COMPACT})}"
        source = f"start: first | second\nfirst: %json {first}\nsecond: {second}\nTEXT: /([^{{](.|\\n)*)?/\n"
        return self._compiled("JSON schema", source, lambda: source)

    def regex(self, expression: str) -> Grammar:
        """Text that a regular expression matches as a whole. Raises InvalidRequest for one that is none."""
        from llguidance import LLMatcher

        return self._compiled("regular expression", expression, lambda: LLMatcher.grammar_from_regex(expression))

    def lark(self, grammar: str) -> Grammar:
        """Text of a Lark grammar (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md)."""
        from llguidance import LLMatcher

        return self._compiled("grammar", grammar, lambda: LLMatcher.grammar_from_lark(grammar))

    def _compiled(self, what: str, source: str, grammar: Callable[[], str]) -> Grammar:
        from llguidance import LLMatcher

        if len(source) > MOST_BYTES:
            raise InvalidRequest(f"{what}: {len(source)} characters, expected at most {MOST_BYTES}")
        try:
            matcher = LLMatcher(self._tokenizer, grammar(), log_level=0)
        except (ValueError, TypeError, RecursionError) as error:  # lone surrogates are one
            raise InvalidRequest(f"{what}: {_first_line(str(error))}") from None
        if matcher.is_error():
            raise InvalidRequest(f"{what}: {_first_line(matcher.get_error())}")
        made = Grammar(matcher, self._vocab_size)
        try:
            made.constraint().allowed()  # some faults show here only, and nobody shall wait for an answer until then
        except InvalidRequest as error:
            raise InvalidRequest(f"{what}: {error}") from None
        return made


class Grammar:
    """A compiled grammar, for any number of answers."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def constraint(self) -> Matching:
        """For one answer."""
        return Matching(self._matcher.deep_copy(), self._vocab_size)


class Matching:
    """An answer that follows a grammar: a `Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)

    def allowed(self) -> Bits:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return self._bits.view(np.uint8)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if tokens:
            self._matcher.consume_tokens(tokens)
            self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"an answer cannot go on in this form: {_first_line(self._matcher.get_error())}")


class _Pieces:
    """A vocabulary as llguidance takes it: the bytes of each token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        # The byte before a special one says that no text is meant.
        marks = (b"\xff" * (i in tokenizer.special_ids) for i in range(tokenizer.vocab_size))
        self.tokens = [mark + tokenizer.bytes_of(i) for i, mark in enumerate(marks)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _json(schema: Mapping[str, Any]) -> str:
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            for name in _BOUNDS & part.keys():
                if isinstance(part[name], (int, float)) and abs(part[name]) >= 1 << 63:  # which llguidance would cut
                    raise InvalidRequest(f"JSON schema: {name}: found {str(part[name])[:20]}, expected less than 2^63")
            left += part.values()
        elif isinstance(part, list):
            left += part
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"JSON schema: {error}") from None


def _first_line(text: str) -> str:
    """The beginning of what llguidance says, on one line, without the state that it is in."""
    said = " ".join(text.partition("<state>")[0].split()).partition(". Enable ")[0][:300]
    return {"NoExtensionBias": "nothing may come next"}.get(said, said)
