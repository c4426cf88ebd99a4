"""What the reference itself writes: texts that are the model's own, as its users read them."""

from __future__ import annotations

import numpy as np

from ...runtime.arrays import Ints
from ...runtime.text.sampling import Sampler, Sampling
from .subjects import Subject


def written(subject: Subject, ids: Ints, n: int, temperature: float, seed: int) -> Ints:
    """The n ids that a model writes after `ids` (at least one), drawn from all but the special tokens."""
    engine = subject.start(len(ids) + n)
    none = dict.fromkeys(subject.tokenizer.special_ids, -np.inf)
    sampler = Sampler(Sampling(temperature, top_k=0, top_p=1.0, seed=seed, logit_bias=none))
    for start in range(0, len(ids), engine.chunk):
        logits = engine.forward(ids[start : start + engine.chunk], 1)
    out = [sampler(logits[-1], ())]
    while len(out) < n:
        out.append(sampler(engine.forward(np.array(out[-1:]), 1)[-1], ()))
    return np.array(out, np.int64)
