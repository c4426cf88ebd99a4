from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from bezel.bench.loss.intervals import FEWEST_UNITS, Bootstrap, Interval

ROUNDS, POSITIONS = 400, 20
# Three standard deviations of a share of .95 that ROUNDS rounds show.
NOISE = 3 * np.sqrt(0.95 * 0.05 / ROUNDS)


def texts(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """KLD as it is: log-normal within a chunk, and chunks differ. (values, units); log-scale variances .3 and .7."""
    level = random.normal(0, 0.3**0.5, n)
    values = np.exp(level[:, None] + random.normal(0, 0.7**0.5, (n, POSITIONS)))
    return values.ravel(), np.repeat(np.arange(n), POSITIONS)


def coverage(interval: Callable[[np.ndarray, np.ndarray], Interval], truth: float, n: int) -> float:
    random = np.random.default_rng(n)
    found = (interval(*texts(random, n)) for _ in range(ROUNDS))
    return float(np.mean([i.low <= truth <= i.high for i in found]))  # type: ignore[operator]


def test_intervals_of_means_cover_as_often_as_they_say() -> None:
    truth, bootstrap = np.exp(0.5), Bootstrap(30, resamples=500)
    share = coverage(lambda values, units: bootstrap.mean(values, units, 0), truth, 30)
    assert 0.95 - NOISE - 0.01 < share < 0.95 + NOISE  # the tail of a log-normal costs about a hundredth
    # Were neighbouring tokens taken as independent, the interval would be much too narrow.
    tokens = Bootstrap(30 * POSITIONS, resamples=500)
    assert coverage(lambda values, units: tokens.mean(values, np.arange(len(values)), 0), truth, 30) < 0.8  # noqa: ARG005


@pytest.mark.parametrize(("level", "truth"), [(0.5, 1.0), (0.9, np.exp(1.2815515594600038))])
def test_intervals_of_quantiles_cover_as_often_as_they_say(level: float, truth: float) -> None:
    bootstrap = Bootstrap(40, resamples=300)
    share = coverage(lambda values, units: bootstrap.quantiles(values, units, [level])[0][0], truth, 40)
    assert 0.95 - NOISE - 0.02 < share < 0.95 + NOISE + 0.01


def test_intervals_of_paired_differences_cover_as_often_as_they_say() -> None:
    """Two candidates that suffer from the same chunks: a is 10 % worse, give or take."""
    bootstrap = Bootstrap(30, resamples=500)
    noise = np.random.default_rng(0)

    def difference(values: np.ndarray, units: np.ndarray) -> Interval:
        other = values * noise.normal(1.1, 0.2, len(values))
        return bootstrap.mean(other - values, units)

    share = coverage(difference, 0.1 * np.exp(0.5), 30)
    assert 0.95 - NOISE - 0.01 < share < 0.95 + NOISE


def test_the_mean_weighs_positions_not_chunks() -> None:
    values, units = np.array([1.0, 1, 1, 5]), np.array([0, 0, 0, 1])
    assert Bootstrap(2).mean(values, units).value == 2


def test_what_does_not_vary_has_an_interval_of_no_width() -> None:
    units = np.repeat(np.arange(20), 3)
    assert Bootstrap(20).mean(np.zeros(60), units, 0) == Interval(0, 0, 0)
    assert Bootstrap(20).mean(np.ones(60, bool), units, 0, 1) == Interval(1, 1, 1)


def test_intervals_stay_within_bounds() -> None:
    values, units = np.zeros(60), np.repeat(np.arange(20), 3)
    values[4] = 1
    found = Bootstrap(20).mean(values, units, 0, 1)
    assert found.low == 0
    assert found.high is not None
    assert found.value < found.high <= 1


def test_few_units_have_no_interval() -> None:
    n = FEWEST_UNITS - 1
    bootstrap, values = Bootstrap(n), np.arange(n) + 1.0
    (median,), _ = bootstrap.quantiles(values, np.arange(n), [0.5])
    for found in (bootstrap.mean(values, np.arange(n)), median):
        assert (found.low, found.high) == (None, None)


def test_quantiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(1).standard_normal(1000)
    levels = [0.001, 0.1, 0.5, 0.9, 0.999, 1.0]
    found, drawn = Bootstrap(10).quantiles(values, np.arange(1000) % 10, levels)
    assert [i.value for i in found] == np.quantile(values, levels, method="inverted_cdf").tolist()
    assert drawn.shape[1] == len(levels)


def test_draws_are_the_same_every_time() -> None:
    values, units = texts(np.random.default_rng(2), 20)
    assert Bootstrap(20).mean(values, units) == Bootstrap(20).mean(values, units)
