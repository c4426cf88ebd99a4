"""What requests ask of a model, whatever their form, and how answers begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from ..text.generation import Constraint, Writer
from ..text.sampling import Sampling
from ..vision.eye import Picture
from .answers import Answer
from .fields import BadRequest
from .models import Served
from .talks import Talk, next_prompt


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
