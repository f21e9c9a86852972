"""Runs of tokens that pair, those of like length as one batch ``[R, N, F]``.

A sweep in PyTorch takes a few dozen operators a batch, whatever its size: a thousand short sequences one by one take a
hundred times as long as together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.segments import HostSegments

# Pairs up to which runs of different lengths share a batch: about as many as take no longer than a batch's operators.
_FEW_PAIRS = 2**17


class Batch(NamedTuple):
    """R runs, of at most N tokens."""

    shape: tuple[int, int]
    """R and N."""
    tokens: slice | Tensor
    """``[n]``: which rows of the flattened z these are, run after run."""
    places: Tensor | None
    """``[n]``: where each is in ``[R * N]``; None where all runs have N tokens."""
    sequence: Tensor
    """``[R]``: of each run."""

    def gathered(self, z: Tensor) -> Tensor:
        """``[R, N, ...]`` from ``[T, ...]``; what is in the places of no token is arbitrary."""
        rows = z[self.tokens]
        if self.places is not None:
            padded = z.new_zeros(self.shape[0] * self.shape[1], *z.shape[1:])
            rows = padded.index_copy_(0, self.places, rows)
        return rows.view(*self.shape, *z.shape[1:])

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """The inverse: ``[R, N, ...]`` to ``[T, ...]``."""
        rows = values.flatten(0, 1)
        out[self.tokens] = rows if self.places is None else rows[self.places]

    @property
    def groups(self) -> Tensor | None:
        """``[R, N]``: 0, and -1 in the places of no token; None where there are none."""
        if self.places is None:
            return None
        groups = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.int64, device="cpu")
        return groups.index_fill_(0, self.places, 0).view(self.shape)


def batches(segments: HostSegments) -> Iterator[Batch]:
    """The runs of two tokens and more, the longest first."""
    lengths = segments.ends - segments.begins
    order = lengths.argsort(descending=True, stable=True)
    of_length, counts = lengths[order].unique_consecutive(return_counts=True)
    first = number = size = 0
    for length, count in zip(of_length.tolist(), counts.tolist(), strict=True):
        if length < 2:
            break
        if number and (number + count) * size**2 > _FEW_PAIRS:
            yield _batch(segments, order[first : first + number], size)
            first, number = first + number, 0
        size = size if number else length
        number += count
    if number:
        yield _batch(segments, order[first : first + number], size)


def _batch(segments: HostSegments, runs: Tensor, size: int) -> Batch:
    place = torch.arange(size, device="cpu")
    index = segments.begins[runs].unsqueeze(1) + place
    there = place < (segments.ends - segments.begins)[runs].unsqueeze(1)
    places = None if there.all() else there.flatten().nonzero().flatten()
    index = index.flatten() if places is None else index.flatten()[places]
    if segments.rows is not None:
        index = segments.rows[index]
    begin, end = int(index[0]), int(index[-1]) + 1
    consecutive = end - begin == index.numel() and bool((index.diff() == 1).all())
    tokens = slice(begin, end) if consecutive else index
    return Batch((runs.numel(), size), tokens, places, segments.sequence[runs])
