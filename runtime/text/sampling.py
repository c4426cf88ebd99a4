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
KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def write_sampling(values: Mapping[str, Any]) -> dict[str, int | float]:
    """What a generation config (transformers) says about sampling, as metadata. Raises InvalidRequest for nonsense."""
    chosen: dict[str, Any] = {name: values[name] for name in KEYS if values.get(name) is not None}
    if values.get("do_sample") is False:
        chosen["temperature"] = 0.0
    Sampling(**chosen)
    return {KEYS[name]: value if name == "top_k" else float(value) for name, value in chosen.items()}


def read_sampling(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What metadata say of `Sampling`'s fields, and a complaint about each value that cannot be used."""
    usable: dict[str, Any] = {}
    complaints = []
    for name, key in KEYS.items():
        value = metadata.get(key)
        if value is None:
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        given: dict[str, Any] = {name: value}
        try:
            Sampling(**given)
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

    def __call__(
        self,
        logits: Floats,
        seen: Sequence[int],
        written: Sequence[int] = (),
        allowed: Bits | None = None,
    ) -> int:
        """The next token's id, from logits (vocab,), of which those that are `allowed` count.

        `seen` are the ids that the repetition penalty acts on, `written` those that the other two do.
        """
        s = self._sampling
        changed = _changed(logits, s, seen, written)
        if s.temperature == 0 and changed is None and allowed is None:
            return int(np.argmax(logits))
        ids, p = candidates(logits, s, changed, allowed)
        if s.temperature == 0:
            return int(ids[0])
        return int(
            ids[np.searchsorted(np.cumsum(p), self._random.random() * p.sum(), side="right").clip(0, len(p) - 1)]
        )


Bits = npt.NDArray[np.uint8]
"""A bit for each token, eight to a byte, the first one lowest."""


def _have(bits: Bits, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether each of the ids has its bit set."""
    have: npt.NDArray[np.bool_] = (bits[ids >> 3] >> (ids & 7) & 1).astype(np.bool_)
    return have


Changed = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Ids, and logits that take the place of theirs."""


def _changed(logits: Floats, s: Sampling, seen: Sequence[int], written: Sequence[int]) -> Changed | None:
    """What penalties and biases make of logits; None where there are none."""
    repeated = np.unique(np.asarray(seen if s.repetition_penalty != 1 else (), np.int64))
    counted = written if s.presence_penalty or s.frequency_penalty else ()
    again, times = np.unique(np.asarray(counted, np.int64), return_counts=True)
    biased = np.array([token for token in s.logit_bias if 0 <= token < len(logits)], np.int64)
    ids = np.unique(np.concatenate([repeated, again, biased]))
    if not len(ids):
        return None
    x = logits[ids].astype(np.float64)
    at = np.searchsorted(ids, repeated)
    with np.errstate(over="ignore"):
        x[at] *= np.where(x[at] > 0, 1 / s.repetition_penalty, s.repetition_penalty)
    x = x.clip(-_HUGE, _HUGE)
    x[np.searchsorted(ids, again)] -= s.presence_penalty + s.frequency_penalty * times
    x[np.searchsorted(ids, biased)] += [s.logit_bias[token] for token in biased.tolist()]
    return ids, x


def candidates(
    logits: Floats, s: Sampling, changed: Changed | None = None, allowed: Bits | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The ids that temperature, top-k, top-p and min-p leave, likeliest first, and their probabilities (unscaled).

    At a temperature of 0 the likeliest alone.
    """
    top_k = 1 if s.temperature == 0 else s.top_k or len(logits)
    others = logits
    if changed is not None:
        others = logits.copy()
        others[changed[0]] = -np.inf
    ids = _largest(others, top_k) if allowed is None else _largest_of(allowed, others, top_k)
    x = others[ids].astype(np.float64)
    if changed is not None:
        which = slice(None) if allowed is None else _have(allowed, changed[0])
        ids, x = np.concatenate([ids, changed[0][which]]), np.concatenate([x, changed[1][which]])
    if changed is not None or allowed is not None:
        possible = x > -np.inf
        ids, x = ids[possible], x[possible]
    # Ties by id, so that a seed means the same text everywhere.
    best = _downwards(others[ids])[:top_k] if changed is None else np.lexsort((ids, -x))[:top_k]
    ids, x = ids[best], x[best]
    if s.temperature == 0:
        return ids, np.ones(1)
    with np.errstate(over="ignore"):  # far below the likeliest is as good as never
        p = np.exp((x - x[0]) / s.temperature)
    p /= p.sum()
    kept = max(1, int(np.count_nonzero(np.cumsum(p) - p < s.top_p)))
    kept = min(kept, max(1, int(np.count_nonzero(p >= s.min_p * p[0]))))
    return ids[:kept], p[:kept]


def _downwards(x: Floats) -> npt.NDArray[np.int64]:
    """Indices of x from the largest on, equal ones in order: a sort of numbers, which is faster than one of indices."""
    bits = (x + np.float32(0)).view(np.uint32)  # of -0 those of 0
    falling = np.where(bits >> 31, bits, bits ^ 0x7FFFFFFF)
    keys = falling.astype(np.uint64) << 32 | np.arange(len(x), dtype=np.uint64)
    keys.sort()
    return (keys & 0xFFFFFFFF).astype(np.int64)


def _largest_of(allowed: Bits, x: Floats, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k largest of those elements of x that are allowed, among a few others of them."""
    at = np.flatnonzero(allowed)
    if len(at) > len(allowed) // 8:  # so many that there are likely to be k of them among the largest 2 k of all
        ids = _largest(x, 2 * k)
        ids = ids[_have(allowed, ids)]
        if len(ids) >= k:
            return ids
    found = np.flatnonzero(np.unpackbits(allowed[at], bitorder="little"))
    ids = at[found >> 3] * 8 + (found & 7)
    best: npt.NDArray[np.int64] = ids[_largest(x[ids], k)]
    return best


def _largest(x: Floats, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k largest of x, among a few others: those of at least the k-th largest maximum of many pieces."""
    width = len(x) // (8 * k)
    if width < 2:
        return np.arange(len(x))
    n = len(x) // width
    peaks = x[: n * width].reshape(n, width).max(axis=1)
    return np.flatnonzero(x >= np.partition(peaks, n - k)[n - k])
