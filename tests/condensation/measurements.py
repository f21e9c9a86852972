"""Measurements made of cosines that a test gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dispersion_kernels.condensation import BINS, Condensation, CosineStatistics, Layer, Trend

NOWHERE = (math.nan, math.nan)


def condensation_of(
    cosines: Sequence[np.ndarray], model: str = "model", initialised: bool = False, content: bool = True
) -> Condensation:
    """Measurement of one layer for each array ``[texts, pairs]``, the embedding first."""
    layers = []
    for number, layer_cosines in enumerate(cosines):
        means = layer_cosines.mean(1)
        counts, _ = np.histogram(layer_cosines, BINS, (-1, 1))
        statistics = CosineStatistics(
            pairs=layer_cosines.size,
            mean=float(means.mean()),
            interval=(float(means.min()), float(means.max())),
            standard_deviation=float(layer_cosines.std()),
            quantiles=tuple(np.quantile(layer_cosines, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()),
            histogram=tuple(counts.tolist()),
            text_means=tuple(means.tolist()),
        )
        name = f"block {number}" if number else "embedding"
        layers.append(Layer(name, statistics, statistics if content else None, 7.5, 0.25, 3.0))
    trend = Trend(math.nan, NOWHERE, math.nan, NOWHERE)
    return Condensation(model, initialised, tuple(layers), trend, len(cosines[0]), 60, 0, {"max_length": 512})
