"""Statistics of paired differences over seeds: interval, test, correction, and the effect that the seeds could show."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
POWER = 0.8
# Resamples of the bootstrap, and sign vectors above which the test draws them at random: all 2^n up to n = 16.
RESAMPLES = 9999
SIGN_VECTORS = 1 << 16

Array = NDArray[np.float64]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of the mean: the expanded percentile bootstrap interval.

    The plain percentile interval of n values is too narrow, by about sqrt((n - 1) / n) and by the normal's quantile in
    place of Student's; the expanded one takes wider percentiles for both. n >= 2. Source: Hesterberg, "What Teachers
    Should Know About the Bootstrap", The American Statistician 69 (2015), section 4.
    """
    from scipy.stats import bootstrap, norm, t

    n = len(values)
    if min(values) == max(values):
        return values[0], values[0]
    beyond = norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(1 - LEVEL / 2, n - 1))
    interval = bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * beyond,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the permutation test that exchanges each pair, which flips the sign of its difference.

    The hypothesis is that the distribution of the differences is symmetric about 0. The statistic is the mean. Exact,
    over all 2^n sign vectors, for n <= 16.
    """
    from scipy.stats import permutation_test

    result = permutation_test(
        (np.asarray(differences, np.float64),),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_VECTORS,
        batch=1 << 12,
        rng=np.random.default_rng(0),
    )
    return float(min(result.pvalue, 1.0))


def trend_p(table: Sequence[Sequence[float]]) -> float:
    """Two-sided p-value of Page's test for a monotonic trend over the columns; a row is a seed.

    The hypothesis is that every order of a row's values is as likely. The statistic is a linear function of the mean of
    Spearman's correlations of the rows. Twice the smaller of the two one-sided p-values.
    """
    from scipy.stats import page_trend_test

    values = np.asarray(table, np.float64)
    both = [page_trend_test(side).pvalue for side in (values, -values)]
    return float(min(1.0, 2 * min(both)))


def rank_correlations(factor: Sequence[float], table: Sequence[Sequence[float]]) -> list[float]:
    """Spearman's correlation of each row with the factor; 0 for a row of equal values, which have no order."""
    from scipy.stats import spearmanr

    return [float(spearmanr(factor, row).statistic) if len(set(row)) > 1 else 0.0 for row in table]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's step-down correction, which bounds the probability of any false claim in the family."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def least_p(n: int) -> float:
    """Smallest p-value that the sign-flip test of ``n`` differences can give."""
    return 2.0 ** (1 - n)


def seeds_needed(comparisons: int) -> int:
    """Number of seeds from which the sign-flip test can reach LEVEL after Holm's correction over ``comparisons``."""
    n = 2
    while comparisons * least_p(n) > LEVEL:
        n += 1
    return n


@functools.cache
def detectable_effect(n: int, comparisons: int) -> float:
    """Smallest mean difference that the sign-flip test finds with probability POWER, in standard deviations.

    The differences of ``n`` seeds are normal; the level is LEVEL / ``comparisons``, that of Holm's first step. Found
    by bisection over the power in 4,000 simulated experiments, whose noise is the same at each effect. Infinite where
    no ``n`` differences reach the level.
    """
    level = LEVEL / comparisons
    if least_p(n) > level:
        return math.inf
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((4000, n))
    # A sign vector and its opposite give the same absolute mean, so that half of them do.
    half = n - 1
    if half <= 10:
        signs = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=half)], np.float64)
    else:
        signs = generator.choice([-1.0, 1.0], (max(1024, math.ceil(100 / level)), n))
        signs[0] = 1
    sums, shifts = noise @ signs.T, signs.sum(1)

    def power(effect: float) -> float:
        flipped = np.abs(sums + effect * shifts)
        observed = np.abs(noise.sum(1) + n * effect)
        # As scipy, with a tolerance for sums that differ by rounding.
        p_values = (flipped >= observed[:, None] * (1 - 1e-12)).mean(1)
        return float((p_values <= level).mean())

    low, high = 0.0, 1.0
    while power(high) < POWER:
        high *= 2
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high
