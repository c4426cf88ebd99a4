"""What requests say of how answers are sampled, of their length and their number."""

from __future__ import annotations

from dataclasses import replace

from ..text.sampling import Sampling
from .fields import Fields
from .models import Served
from .shapes import Json

MOST_ANSWERS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASED = 16, 16, 20, 1024
MOST_TOKENS = 1 << 30


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
