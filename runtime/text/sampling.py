"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import is_whole
from ..arrays import Floats
from ..errors import InvalidRequest


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults are those that Google publishes for Gemma.

    Applied in this order: `repetition_penalty` (Keskar et al. 2019: seen tokens' logits are divided by it, or
    multiplied if negative), `presence_penalty` and `frequency_penalty` (taken from the logits of tokens that were
    written already, once and for each time, as OpenAI's API has them), `logit_bias` (added, by token),
    `temperature` (0 takes the likeliest token), `top_k` (0 = off), `top_p` (smallest set that reaches this
    probability), `min_p` (at least this share of the likeliest token's probability).
    The same `seed` gives the same text; None draws a fresh one. Raises InvalidRequest for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self) if one.name != "logit_bias"):
            value, counts = getattr(self, name), name in ("top_k", "seed")
            drawn = name == "seed" and value is None
            if not (is_whole(value) or drawn or (isinstance(value, float) and not counts)):
                want = "a whole number" if counts else "a number"
                raise InvalidRequest(f"{name}: found {value!r:.80}, expected {want}")
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        if not all(is_whole(token) and (is_whole(x) or isinstance(x, float)) and x == x for token, x in bias):
            raise InvalidRequest(f"logit_bias: found {self.logit_bias!r:.80}, expected numbers by token")
        checks = [
            ("temperature", 0 <= self.temperature < np.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0 (1 is off)"),
            ("presence_penalty", abs(self.presence_penalty) < np.inf, "a finite number"),
            ("frequency_penalty", abs(self.frequency_penalty) < np.inf, "a finite number"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
        ]
        for name, fine, want in checks:
            if not fine:
                raise InvalidRequest(f"{name}: found {getattr(self, name)}, expected {want}")


_HUGE = 1e300
# Where GGUF files keep what their makers recommend; llama.cpp reads these.
_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def write_sampling(values: Mapping[str, Any]) -> dict[str, int | float]:
    """What a generation config (transformers) says about sampling, as metadata. Raises InvalidRequest for nonsense."""
    chosen = {name: values[name] for name in _KEYS if values.get(name) is not None}
    if values.get("do_sample") is False:
        chosen["temperature"] = 0.0
    Sampling(**chosen)
    return {_KEYS[name]: value if name == "top_k" else float(value) for name, value in chosen.items()}


def read_sampling(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What metadata say of `Sampling`'s fields, and a complaint about each value that cannot be used."""
    usable: dict[str, Any] = {}
    complaints = []
    for name, key in _KEYS.items():
        value = metadata.get(key)
        if value is None:
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            Sampling(**{name: value})
        except InvalidRequest as error:
            complaints.append(f"key '{key}' is ignored: {error}")
        else:
            usable[name] = value
    return usable, complaints


class Sampler:
    """Draws tokens; keeps the random state, so one Sampler serves one generation."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: Floats, seen: Sequence[int], written: Sequence[int] = ()) -> int:
        """The next token's id, from logits (vocab,).

        `seen` are the ids that the repetition penalty acts on, `written` those that the other two do.
        """
        s = self._sampling
        if s.repetition_penalty != 1 and len(seen):
            logits = logits.astype(np.float64)
            ids = np.unique(np.asarray(seen))
            with np.errstate(over="ignore"):
                logits[ids] *= np.where(logits[ids] > 0, 1 / s.repetition_penalty, s.repetition_penalty)
            logits = logits.clip(-_HUGE, _HUGE)
        if (s.presence_penalty or s.frequency_penalty) and len(written):
            logits = logits.astype(np.float64)
            ids, times = np.unique(np.asarray(written), return_counts=True)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * times
        if s.logit_bias:
            logits = logits.astype(np.float64)
            for token, bias in s.logit_bias.items():
                if 0 <= token < len(logits):
                    logits[token] += bias
        if s.temperature == 0:
            return int(np.argmax(logits))
        ids, p = candidates(logits, s)
        return int(
            ids[np.searchsorted(np.cumsum(p), self._random.random() * p.sum(), side="right").clip(0, len(p) - 1)]
        )


def candidates(logits: Floats, s: Sampling) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The ids that temperature, top-k, top-p and min-p leave, likeliest first, and their probabilities (unscaled)."""
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # far below the likeliest is as good as never
        scaled = (logits - logits.max()) / s.temperature
    limited = 0 < s.top_k < len(logits)
    ids = np.argpartition(scaled, -s.top_k)[-s.top_k :] if limited else np.arange(len(logits))
    ids = ids[np.lexsort((ids, -scaled[ids]))]  # ties by id, so that a seed means the same text everywhere
    p = np.exp(scaled[ids])
    p /= p.sum()
    kept = max(1, int(np.count_nonzero(np.cumsum(p) - p < s.top_p)))
    kept = min(kept, max(1, int(np.count_nonzero(p >= s.min_p * p[0]))))
    return ids[:kept], p[:kept]
