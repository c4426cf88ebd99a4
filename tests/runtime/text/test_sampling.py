from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bezel.runtime import Sampling
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.text.sampling import Sampler, candidates

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
    ],
)
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        Sampling(**bad)
