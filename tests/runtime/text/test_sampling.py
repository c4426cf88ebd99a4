from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bezel.runtime import Sampling
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.text.sampling import Sampler, _changed, candidates
from hypothesis import given, settings
from hypothesis import strategies as st

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.05, 0.25], np.float32))
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def kept(**options: Any) -> list[int]:
    return candidates(LOGITS, Sampling(**OFF | options))[0].tolist()


def test_each_filter() -> None:
    assert kept() == [1, 4, 2, 0, 3]
    assert kept(top_k=2) == [1, 4]
    assert kept(top_p=0.65) == [1, 4]
    assert kept(top_p=0.66) == [1, 4, 2]
    assert kept(top_p=1e-9) == [1]
    assert kept(min_p=0.3) == [1, 4, 2]
    assert kept(min_p=1.0) == [1]
    # At temperature 0.5 the probabilities are squared: 0.16 : 0.0625 : 0.04 : …
    assert kept(temperature=0.5, min_p=0.3) == [1, 4]
    assert kept(temperature=0.5, top_p=0.59) == [1, 4]


def test_zero_temperature_takes_the_likeliest() -> None:
    assert {Sampler(Sampling(temperature=0, seed=s))(LOGITS, []) for s in range(5)} == {1}


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(**OFF, seed=3))
    n = 20_000
    counts = np.bincount([sampler(LOGITS, []) for _ in range(n)], minlength=5)
    p = np.exp(LOGITS)
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_repetition_penalty() -> None:
    greedy = {"temperature": 0.0, "seed": 0}
    logits = np.array([3.0, 2.0, -1.0, -2.0], np.float32)
    assert Sampler(Sampling(**greedy, repetition_penalty=2))(logits, [0, 0]) == 1
    only_negative = logits - 10
    assert Sampler(Sampling(**greedy, repetition_penalty=2))(only_negative, [0]) == 1
    assert logits[0] == 3  # the caller's array is its own


def plain(logits: np.ndarray, s: Sampling, seen: list[int], written: list[int], allowed: np.ndarray) -> Any:
    """`candidates` told straight on: everything sorted."""
    x = logits.astype(np.float64)
    for token in set(seen):
        x[token] *= 1 / s.repetition_penalty if x[token] > 0 else s.repetition_penalty
    for token in written:
        x[token] -= s.frequency_penalty
    for token in set(written):
        x[token] -= s.presence_penalty
    for token, bias in s.logit_bias.items():
        x[token] += bias
    order = [i for i in sorted(range(len(x)), key=lambda i: (-x[i], i)) if allowed[i]]
    order = order[: s.top_k or None]
    p = np.exp((x[order] - x[order[0]]) / s.temperature)
    p /= p.sum()
    before = np.cumsum(p) - p  # summed in this order, on which the last digit depends
    kept = [i for i in range(len(p)) if i == 0 or (before[i] < s.top_p and p[i] >= s.min_p * p[0])]
    return [order[i] for i in kept], p[: len(kept)]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_all_filters_and_penalties_at_once(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = int(draw.choice([5, 100, 3000, 5003]))
    logits = (draw.normal(size=n) * 3).astype(np.float32)
    if draw.random() < 0.3:
        logits = np.round(logits)  # ties
    s = Sampling(
        temperature=float(draw.choice([0.3, 1.0, 2.0])),
        top_k=int(draw.choice([0, 1, 5, 64])),
        top_p=float(draw.choice([0.5, 0.95, 1.0])),
        min_p=float(draw.choice([0.0, 0.1])),
        repetition_penalty=float(draw.choice([1.0, 1.3, 0.7])),
        presence_penalty=float(draw.choice([0.0, 1.5, -1.0])),
        frequency_penalty=float(draw.choice([0.0, 0.5])),
        logit_bias={int(i): float(draw.normal() * 20) for i in draw.integers(0, n, int(draw.choice([0, 3])))},
    )
    seen, written = (draw.integers(0, n, m).tolist() for m in draw.integers(0, 20, 2))
    allowed = draw.random(n) < draw.choice([0.01, 0.5, 1.1])
    allowed[draw.integers(0, n)] = True
    bits = np.packbits(allowed, bitorder="little")
    ids, p = candidates(logits, s, _changed(logits, s, seen, written), bits)
    expected, chances = plain(logits, s, seen, written, allowed)
    assert ids.tolist() == expected
    assert np.allclose(p, chances, rtol=1e-12)
    greedy = Sampler(replace(s, temperature=0.0))(logits, seen, written, bits)
    assert greedy == plain(logits, replace(s, top_k=1), seen, written, allowed)[0][0]


def test_same_seed_same_draws() -> None:
    draws = [[Sampler(Sampling(seed=seed))(LOGITS, []) for seed in range(50)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": "1"},
        {"logit_bias": {"1": 2}},
        {"logit_bias": [1]},
    ],
)
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        Sampling(**bad)
