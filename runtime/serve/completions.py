"""Completions: texts that a model continues."""

from __future__ import annotations

import asyncio

from .asks import Ask
from .fields import BadRequest, Fields
from .forms import constraint_of
from .limits import MOST_ANSWERS, MOST_LOGPROBS, limits_of, sampling_of
from .models import Served
from .talks import Talk, check_length


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
