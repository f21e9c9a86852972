"""Batches ``[R, N, F]`` of runs of tokens that pair with each other, each batch of runs of similar length.

A sweep in PyTorch takes a few dozen operators per batch, whatever its size: a thousand short sequences take a hundred
times as long one by one as together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.segments import HostSegments

# Largest batch, in pairs, that runs of different lengths share: padding so small takes no longer than the operators of
# another batch.
_FEW_PAIRS = 2**17


class Batch(NamedTuple):
    """R runs of at most N tokens each."""

    shape: tuple[int, int]
    """Numbers R of runs and N of tokens."""
    tokens: slice | Tensor
    """Rows of the flattened z, ``[n]``, run after run."""
    places: Tensor | None
    """Place of each token in ``[R * N]``, ``[n]``; None if all runs have N tokens."""
    sequence: Tensor
    """Sequence of each run, ``[R]``."""

    def gathered(self, z: Tensor) -> Tensor:
        """Values ``[R, N, ...]`` of the batch from values ``[T, ...]`` of all tokens; padding is arbitrary."""
        rows = z[self.tokens]
        if self.places is not None:
            padded = z.new_zeros(self.shape[0] * self.shape[1], *z.shape[1:])
            rows = padded.index_copy_(0, self.places, rows)
        return rows.view(*self.shape, *z.shape[1:])

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Writes values ``[R, N, ...]`` of the batch to their rows of ``out`` ``[T, ...]``; inverse of ``gathered``."""
        rows = values.flatten(0, 1)
        out[self.tokens] = rows if self.places is None else rows[self.places]

    @property
    def pair_ids(self) -> Tensor | None:
        """Pair ids ``[R, N]``: 0 for tokens and -1 for padding; None without padding."""
        if self.places is None:
            return None
        pair_ids = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.int64, device="cpu")
        return pair_ids.index_fill_(0, self.places, 0).view(self.shape)


def batches(segments: HostSegments) -> Iterator[Batch]:
    """Batches of all runs of at least two tokens, the longest first."""
    lengths = segments.ends - segments.begins
    order = lengths.argsort(descending=True, stable=True)
    lengths_of_runs, counts = lengths[order].unique_consecutive(return_counts=True)
    first = number = size = 0
    for length, count in zip(lengths_of_runs.tolist(), counts.tolist(), strict=True):
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
