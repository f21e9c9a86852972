"""Confidence intervals by bootstrap over texts, and rank correlations with the depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dispersion_kernels.condensation.result import Trend

# Number of resamples of a bootstrap, and the seed of its random numbers: the same texts give the same interval.
RESAMPLES = 2000
SEED = 0

Array = npt.NDArray[np.float64]


def scipy_stats() -> Any:
    try:
        import scipy.stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("confidence intervals need scipy: pip install scipy", name=error.name) from error
    return scipy.stats


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of the values that are not NaN, by the bootstrap's percentiles; the mean twice where
    there is only one value or all are equal."""
    present = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if present.size < 2 or np.all(present == present[0]):
        mean = float(present.mean()) if present.size else math.nan
        return mean, mean
    return _bootstrap((present,), lambda sample, axis: np.mean(sample, axis=axis))


def trend_of(means: Array, depths: Sequence[int]) -> Trend:
    """:class:`Trend` of the mean over texts of ``means`` ``[layers, texts]`` with the layers' ``depths``."""
    layers, texts = means.shape
    nowhere = (math.nan, math.nan)
    if layers < 2:
        return Trend(math.nan, nowhere, math.nan, nowhere)
    values = []
    for correlation in (spearman, kendall):
        value = float(correlation(means.mean(1), np.asarray(depths)))

        def resampled(*rows: Array, axis: int, correlation: Any = correlation) -> Array:
            averaged = np.stack([row.mean(axis) for row in rows], -1)
            result: Array = correlation(averaged, np.asarray(depths))
            return result

        if texts < 2 or math.isnan(value):
            values.append((value, (value, value)))
        else:
            values.append((value, _bootstrap(tuple(means), resampled, paired=True)))
    (rho, rho_interval), (tau, tau_interval) = values
    return Trend(rho, rho_interval, tau, tau_interval)


def spearman(values: Array, depths: npt.NDArray[Any]) -> Any:
    """Spearman's correlation of ``values`` ``[..., layers]`` with ``depths`` ``[layers]``: Pearson's of the ranks; NaN
    where all values are equal."""
    ranks = scipy_stats().rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    depth_ranks = scipy_stats().rankdata(depths)
    depth_ranks = depth_ranks - depth_ranks.mean()
    return _ratio((ranks * depth_ranks).sum(-1), np.sqrt((ranks**2).sum(-1) * (depth_ranks**2).sum()))


def kendall(values: Array, depths: npt.NDArray[Any]) -> Any:
    """Kendall's tau-b of ``values`` ``[..., layers]`` with ``depths`` ``[layers]``, which differ from each other; NaN
    where all values are equal."""
    first, second = np.triu_indices(len(depths), 1)
    signs = np.sign(values[..., second] - values[..., first])
    depth_signs = np.sign(depths[second] - depths[first])
    return _ratio((signs * depth_signs).sum(-1), np.sqrt((signs != 0).sum(-1) * float(len(first))))


def _ratio(numerator: Any, denominator: Any) -> Any:
    return np.divide(numerator, denominator, out=np.full_like(denominator, np.nan), where=denominator > 0)


def _bootstrap(data: tuple[Array, ...], statistic: Any, *, paired: bool = False) -> tuple[float, float]:
    result = scipy_stats().bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        paired=paired,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    low, high = result.confidence_interval
    return float(low), float(high)
