"""What the reference itself writes: texts that are the model's own, as its users read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ...runtime.text.sampling import Sampler, Sampling
from ..progress import Progress
from .passages import Passage
from .state import KeptResults
from .subjects import Subject, forward

Ids = npt.NDArray[np.int64]


def continuation(
    writer: Subject, ids: Ids, n: int, temperature: float, seed: int, ends: Collection[int] = frozenset()
) -> Ids:
    """At most n ids that a model writes after `ids` (at least one), drawn from all but the special tokens.

    One of `ends`, which may be special, is the last.
    """
    engine = writer.start(len(ids) + n)
    none = dict.fromkeys(writer.tokenizer.special_ids.difference(ends), -np.inf)
    sampler = Sampler(Sampling(temperature, top_k=0, top_p=1.0, seed=seed, logit_bias=none))
    out = [sampler(forward(engine, ids, 1, eye=writer.eye)[-1], ())]
    while len(out) < n and out[-1] not in ends:
        out.append(sampler(engine.forward(np.array(out[-1:]), 1)[-1], ()))
    return np.array(out, np.int64)


def with_answers(
    writer: Subject, passages: Mapping[int, Passage], chunk: int, kept: KeptResults, progress: Progress
) -> dict[int, Passage]:
    """The passages as far as they are only read, and then what the writer goes on with, at temperature 1, to the end
    of its turn or of `chunk` tokens; all of that is scored. What is in `kept` is not written again.
    """
    end = writer.tokenizer.end_of_turn_id
    ends = frozenset(() if end is None else (end,))
    out = {}
    for done, (number, passage) in enumerate(passages.items()):
        found = kept.load(number)
        begun = writer.ids_of(passage)[: passage.first + 1]
        if found is None:
            progress(done, len(passages), "the reference writes")
            found = {"ids": continuation(writer, begun, chunk - len(begun), 1.0, number, ends)}
            kept.save(number, found)
        out[number] = replace(passage, ids=np.concatenate([begun, found["ids"]]))
    return out
