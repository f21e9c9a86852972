"""The published measurement of condensation, from one matrix of cosines for each layer, averaged over texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dispersion_kernels.condensation.cosine import Texts
from dispersion_kernels.condensation.intervals import scipy_stats
from dispersion_kernels.condensation.result import PUBLISHED_BINS, PublishedMeasurement

# Least norm that a token is divided by.
LEAST_NORM = 1e-3


class AveragedMatrix:
    """Matrix of cosines ``[L, L]`` of one layer, diagonal in, averaged entry by entry over texts of L tokens, in
    float64. The procedure needs the matrix: entries of different texts cancel before their histogram is taken."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._texts = 0

    def add(self, z: Tensor, texts: Texts) -> int | None:
        """Adds hidden states ``[rows, F]``; the number of the first text that is not finite, or None."""
        # The tokens in their order: Texts has those that are no content first.
        for text, (begin, end) in enumerate(zip(texts.begins.tolist(), texts.ends.tolist(), strict=True)):
            rows = texts.order[begin:end].sort().values
            x = z[rows.to(z.device)].to("cpu", torch.float64)
            if not x.isfinite().all():
                return text
            x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=LEAST_NORM)
            cosines = (x @ x.T).clamp_(-1, 1)
            if self._total is None:
                self._total = cosines
            elif self._total.shape == cosines.shape:
                self._total += cosines
            else:
                raise ValueError(
                    "published=True averages matrices entry by entry, which needs texts of one length, got "
                    f"{len(self._total)} and {len(cosines)} tokens; give longer texts, or max_length of the shortest"
                )
            self._texts += 1
        return None

    def mean(self) -> Tensor:
        if self._total is None:
            raise ValueError("published=True: no text was measured")
        return self._total / self._texts


def published_measurement(matrices: Sequence[AveragedMatrix]) -> PublishedMeasurement:
    """:class:`PublishedMeasurement` of the layers' matrices."""
    histograms, means = [], []
    for matrix in matrices:
        averaged = matrix.mean().numpy()
        density, _ = np.histogram(averaged, bins=PUBLISHED_BINS, range=(-1, 1), density=True)
        histograms.append(tuple(density.tolist()))
        means.append(float(averaged.mean()))
    stats, numbers = scipy_stats(), range(len(means))
    spearman, kendall = (float(f(numbers, means).statistic) for f in (stats.spearmanr, stats.kendalltau))
    return PublishedMeasurement(tuple(histograms), tuple(means), spearman, kendall)
