"""Oracle of the measurement: matrices of all cosines in float64, in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dispersion_kernels.condensation.cosine import PairSums, Texts
from dispersion_kernels.condensation.result import BINS

Array = npt.NDArray[np.float64]
EDGES = np.linspace(-1, 1, BINS + 1)


def cosines(z: torch.Tensor) -> Array:
    """Matrix of the cosines of tokens ``[L, F]``, 0 for a token of norm 0."""
    x = z.to(torch.float64).numpy()
    largest = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(largest > 0, largest, 1)  # so that squares neither overflow nor underflow
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    x = x / np.where(norm > 0, norm, 1)
    return np.clip(x @ x.T, -1, 1)


def parts(z: torch.Tensor, texts: Texts) -> list[tuple[Array, Array]]:
    """Cosines of each text's pairs, of the two parts of :class:`PairSums`."""
    result = []
    for begin, split, end in zip(*(bound.tolist() for bound in texts[1:]), strict=True):
        matrix = cosines(z[texts.order[begin:end]])
        first, second = np.triu_indices(end - begin, 1)
        is_content = first >= split - begin
        values = matrix[first, second]
        result.append((values[~is_content], values[is_content]))
    return result


def assert_are(found: PairSums, expected: list[tuple[Array, Array]], error: float) -> None:
    """Counts and sums, where a cosine is in error by at most ``error`` and may fall into the bin beside its own."""
    assert found.counts.shape == (len(expected), 2, BINS)
    for counts, sums, text_values in zip(found.counts.numpy(), found.sums.numpy(), expected, strict=True):
        for part, values in enumerate(text_values):
            assert counts[part].sum() == len(values)
            below = np.concatenate([[0], np.cumsum(counts[part])])
            assert (below[1:-1] >= [(values < edge - error).sum() for edge in EDGES[1:-1]]).all()
            assert (below[1:-1] <= [(values < edge + error).sum() for edge in EDGES[1:-1]]).all()
            np.testing.assert_allclose(sums[part, 0], values.sum(), atol=error * (len(values) + 1))
            np.testing.assert_allclose(sums[part, 1], (values**2).sum(), atol=2 * error * (len(values) + 1))
