"""The statistics against enumeration, published examples, closed forms, and simulated experiments."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

scipy_stats = pytest.importorskip("scipy.stats")

from dispersion_kernels.study import inference  # noqa: E402


@pytest.mark.parametrize("n", [2, 5, 9, 11])
def test_p_is_that_of_every_sign_vector(n: int) -> None:
    for seed in range(3):
        differences = np.random.default_rng(seed).normal(0.7, 1, n)
        means = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=n)]
        expected = np.mean(np.array(means) >= abs(differences.sum()) - 1e-12)
        assert inference.sign_flip_p(list(differences)) == pytest.approx(expected, abs=1e-12)
    assert inference.sign_flip_p([0.1] * n) == pytest.approx(inference.least_p(n))
    assert inference.sign_flip_p([0.0] * n) == 1


def test_p_is_fishers_of_darwins_plants() -> None:
    """Fisher, The Design of Experiments (1935), section 21: of 2^15 sign vectors, 863 have a sum as large as Darwin's
    15 pairs of plants (in eighths of an inch), and so many again one as small: p = 1726 / 32768."""
    plants = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert inference.sign_flip_p(plants) == pytest.approx(1726 / 32768, abs=1e-12)


def test_holm_by_hand() -> None:
    """Four p-values: 4 * .005 = .02; 3 * .01 = .03; 2 * .03 = .06; 1 * .04 = .04, raised to .06."""
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.6, 0.9]) == [1.0, 1.0]
    assert inference.holm([]) == []


def test_trend_is_every_order_of_every_row() -> None:
    """Page's test against all (3!)^3 orders of the rows, with the mean of Spearman's correlations as the statistic."""
    orders = list(itertools.permutations((1, 2, 3)))
    correlation = {order: scipy_stats.spearmanr((1, 2, 3), order).statistic for order in orders}
    everything = [sum(correlation[row] for row in rows) for rows in itertools.product(orders, repeat=3)]
    for rows in (
        [(1, 2, 3), (1, 3, 2), (1, 2, 3)],
        [(3, 2, 1), (3, 2, 1), (2, 3, 1)],
        [(1, 2, 3), (3, 2, 1), (2, 1, 3)],
    ):
        observed = sum(correlation[row] for row in rows)
        sides = [np.mean([side * value >= side * observed - 1e-9 for value in everything]) for side in (1, -1)]
        assert inference.trend_p(rows) == pytest.approx(min(1, 2 * min(sides)))
        assert sum(inference.rank_correlations((10, 20, 40), rows)) == pytest.approx(observed)


def test_the_least_number_of_seeds() -> None:
    assert [inference.seeds_needed(m) for m in (1, 2, 12)] == [6, 7, 9]
    assert inference.detectable_effect(5, 1) == math.inf
    assert math.isfinite(inference.detectable_effect(6, 1))


def test_effect_in_closed_form() -> None:
    """With 6 seeds the level of 0.05 is reached where all six differences have one sign: Phi(effect)^6 = 0.8, but for
    the other sign, whose probability is below 1e-9."""
    expected = scipy_stats.norm.ppf(0.8 ** (1 / 6))
    assert inference.detectable_effect(6, 1) == pytest.approx(expected, abs=0.06)


def test_interval_is_wider_than_the_percentile_one() -> None:
    values = list(np.random.default_rng(1).normal(0, 1, 10))
    low, high = inference.mean_interval(values)
    plain = scipy_stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert low < plain.confidence_interval.low < np.mean(values) < plain.confidence_interval.high < high
    assert (low, high) == inference.mean_interval(values)
    assert inference.mean_interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least"), [(5, 0.88), (10, 0.93), (20, 0.93)])
def test_coverage_of_the_interval(n: int, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RESAMPLES", 999)
    generator = np.random.default_rng(n)
    covered = 0
    for values in generator.normal(0.3, 2, (1000, n)):
        low, high = inference.mean_interval(list(values))
        covered += low <= 0.3 <= high
    print(f"{n} seeds: coverage {covered / 1000}")
    assert least <= covered / 1000 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 10])
def test_false_claims(n: int) -> None:
    """Three comparisons without an effect, one of whose differences are far from normal: any of them is claimed in at
    most 5% of 1,000 experiments, and four standard errors of that."""
    generator = np.random.default_rng(n)
    claims = 0
    for _ in range(1000):
        family = [generator.normal(0, 1, n), generator.standard_t(2, n), generator.laplace(0, 3, n)]
        claims += min(inference.holm([inference.sign_flip_p(list(values)) for values in family])) <= inference.LEVEL
    print(f"{n} seeds: false claims {claims / 1000}")
    assert 0.01 <= claims / 1000 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "comparisons"), [(8, 1), (10, 4), (13, 2)])
def test_power_of_the_effect(n: int, comparisons: int) -> None:
    effect = inference.detectable_effect(n, comparisons)
    generator = np.random.default_rng(n)
    found = [
        inference.sign_flip_p(list(values)) <= inference.LEVEL / comparisons
        for values in generator.normal(effect, 1, (600, n))
    ]
    print(f"{n} seeds, {comparisons} comparisons: effect {effect:.3f}, power {np.mean(found):.3f}")
    assert abs(np.mean(found) - inference.POWER) < 4 * math.sqrt(0.16 / 600)
