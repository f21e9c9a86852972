"""Partition of the tokens into populations, whose tokens all pair, and of populations into random blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dispersion_kernels.backends.cpu import row_stride
from dispersion_kernels.numerics import statistics_dtype
from dispersion_kernels.segments import on_device, order_of, segment_of_token

# Smallest size of a block, in tokens: the sweep of a smaller block costs as much.
_SMALLEST_BLOCK = 16

# Consecutive runs of rows: the number of rows per run, if equal for all runs, or the bounds of the runs.
Runs = int | Tensor


@dataclass(frozen=True)
class Partition:
    """Partition of N tokens in S sequences into U populations and K blocks. A population is a sequence, or a document
    in a sequence."""

    order: Tensor | None
    """``[N]`` int64: order of the tokens in which blocks are contiguous; None for the order in memory."""
    left_out: Tensor | None
    """``[N]`` boolean in that order: tokens of no population, which come last; None where there are none."""
    populations: Tensor
    """``[U + 1]``: bounds of the populations in that order."""
    sequence: Tensor
    """``[U]``: sequence of each population."""
    blocks: Tensor
    """``[U]``: number of blocks of each population; 1 where no pair is evaluated."""
    inverse_probability: Tensor
    """``[U]`` in :func:`statistics_dtype`: 1 / p for the probability p that a pair is evaluated; 0 where no pair is."""
    bounds: Tensor
    """``[K + 1]``: bounds of the blocks."""
    population: Tensor
    """``[K]``: population of each block."""
    size: int
    """Upper bound of the tokens per block."""
    same_size: bool
    """Whether all blocks have equally many tokens, and all populations equally many blocks."""
    pairs: Tensor
    """``[S]`` int64: ordered pairs of each sequence, evaluated or not."""
    with_pairs: int | Tensor
    """Number of sequences that have a pair."""

    @property
    def tokens(self) -> Tensor:
        """``[U]``: number of tokens of each population."""
        return self.populations.diff()


@dataclass(frozen=True)
class Rows:
    """Blocks that are a proper part of their population, as R rows of ``size`` tokens. A population of one block has
    all pairs evaluated, and needs no model."""

    shape: tuple[int, int]
    """(R, size)."""
    places: Tensor | None
    """``[R, size]``: place of each token in the order of the partition, N for padding; None for consecutive places."""
    block: Tensor
    """``[R]``: block of each row."""
    population: Tensor
    """``[R]``: number shared by the rows of a population, ascending from 0."""
    population_runs: Runs
    """Runs of rows of the same ``population``."""
    sequence_runs: Runs
    """Runs of rows of each sequence."""


def partition_of(
    layers: Sequence[Tensor], shuffle: Tensor, pair_ids: Tensor | None, cu_seqlens: Tensor | None, fraction: float
) -> Partition:
    """Partition of the tokens ``[B, L, F]`` of ``layers`` by their random order ``shuffle`` ``[layers, B, L]``. Several
    layers are allowed only where all blocks have the same size; their rows then form one batch."""
    batch, length = layers[0].shape[:2]
    if pair_ids is None and cu_seqlens is None and (blocks := blocks_of_same_size(fraction, length)):
        # Cached only on a CPU, where no stream and no CUDA graph owns the memory.
        make = _kept_partition if layers[0].is_cpu else _whole_sequences
        found = make(len(layers) * batch, length, blocks, fraction > 0, layers[0].device)
        if fraction == 0:
            return found
        return replace(found, order=(shuffle.flatten(0, 1) + found.populations[:-1].unsqueeze(1)).flatten())
    assert len(layers) == 1
    size = block_tokens(fraction, mean_length(layers[0], cu_seqlens))
    return _populations_of_any_length(pair_ids, cu_seqlens, shuffle[0], size)


def mean_length(z: Tensor, cu_seqlens: Tensor | None) -> int:
    """Mean number of tokens of the sequences of ``z`` ``[B, L, F]``, from shapes alone; it sets the size of a block."""
    return z.shape[1] if cu_seqlens is None else z.shape[1] // max(1, cu_seqlens.numel() - 1)


def blocks_of_same_size(fraction: float, length: int) -> int:
    """Number of blocks of equal size into which ``length`` tokens are cut; 0 where no divisor of ``length`` is within a
    quarter below the desired number."""
    if fraction == 0:
        return 1
    most = max(1, length // block_tokens(fraction, length))
    return next((k for k in range(most, most * 3 // 4, -1) if length % k == 0), 0)


def block_tokens(fraction: float, length: int) -> int:
    """Desired number of tokens per block for a sequence of ``length`` tokens."""
    return max(_SMALLEST_BLOCK, math.ceil(fraction * length))


def _whole_sequences(sequences: int, length: int, blocks: int, evaluated: bool, device: torch.device) -> Partition:
    """Partition whose populations are the sequences and whose blocks have equal size, with ``order`` still None."""
    sequence = torch.arange(sequences, device=device)
    populations = torch.arange(sequences + 1, device=device) * length
    found = _cut(populations, sequence, sequences, torch.full_like(sequence, blocks), sequences * blocks)
    return replace(
        found,
        inverse_probability=found.inverse_probability * evaluated,
        size=length // blocks,
        same_size=True,
        with_pairs=sequences if length > 1 else 0,
    )


_kept_partition = functools.lru_cache(maxsize=16)(_whole_sequences)


def _populations_of_any_length(
    pair_ids: Tensor | None, cu_seqlens: Tensor | None, shuffle: Tensor, size: int
) -> Partition:
    """Partition of populations of any length, each into the fewest blocks of at most ``size`` tokens, whose sizes
    differ by at most one.

    Upper bounds from shapes replace the numbers of populations and blocks on an accelerator, where reading the numbers
    would synchronise; the surplus populations and blocks are empty.
    """
    (batch, length), count, device = shuffle.shape, shuffle.numel(), shuffle.device
    if cu_seqlens is None:
        sequences, sequence = batch, torch.arange(batch, device=device).repeat_interleave(length)
    else:
        sequences, sequence = cu_seqlens.numel() - 1, segment_of_token(on_device(cu_seqlens, device), count)
    ids = torch.zeros_like(sequence) if pair_ids is None else pair_ids.flatten()

    # Order by sequence, then by pair id, then at random; tokens that are left out come last.
    order = (shuffle + torch.arange(batch, device=device).unsqueeze(1) * length).flatten()
    order = order[order_of(sequence.masked_fill(ids < 0, sequences)[order], ids[order])]
    ids, sequence = ids[order], sequence[order]
    left_out = ids < 0
    first = ~left_out
    first[1:] &= (sequence[1:] != sequence[:-1]) | (ids[1:] != ids[:-1])
    number = max(1, int(first.sum())) if may_read(device) else sequences if pair_ids is None else count
    population = (first.cumsum(0) - 1).masked_fill(left_out, count)
    populations = torch.searchsorted(population, torch.arange(number + 1, device=device))
    begins = populations[:-1]
    sequence = sequence[begins.clamp(max=count - 1)].masked_fill(begins >= populations[-1:], max(0, sequences - 1))
    blocks = (populations.diff() + size - 1) // size
    total = max(1, int(blocks.sum())) if may_read(device) else number + count // size
    found = _cut(populations, sequence, sequences, blocks, total)
    return replace(found, order=order, left_out=None if pair_ids is None else left_out, size=size)


def _cut(populations: Tensor, sequence: Tensor, sequences: int, blocks: Tensor, total: int) -> Partition:
    """Partition of each population into ``blocks`` ``[U]`` blocks, at most ``total`` in all, whose sizes differ by at
    most one token."""
    tokens, last = populations.diff(), blocks.cumsum(0)
    number = torch.arange(total, device=blocks.device)
    population = torch.searchsorted(last, number, right=True).clamp(max=blocks.numel() - 1)
    pieces = blocks.clamp(min=1)
    within = (number - (last - blocks)[population]) * tokens[population] // pieces[population]
    begins = torch.where(number < last[-1:], populations[population] + within, populations[-1:])
    per_population = tokens * (tokens - 1)
    pairs = per_population.new_zeros(sequences).index_add_(0, sequence, per_population)
    least, larger = tokens // pieces, tokens % pieces
    evaluated = larger * (least + 1) * least + (blocks - larger) * least * (least - 1)
    return Partition(
        order=None,
        left_out=None,
        populations=populations,
        sequence=sequence,
        blocks=blocks,
        inverse_probability=per_population / evaluated.clamp(min=1).to(statistics_dtype(blocks.device)),
        bounds=torch.cat([begins, populations[-1:]]),
        population=population,
        size=0,
        same_size=False,
        pairs=pairs,
        with_pairs=(pairs > 0).sum(),
    )


def rows_of(partition: Partition) -> Rows:
    """Rows of a partition whose pairs are evaluated, or whose populations are whole sequences."""
    count, blocks = partition.populations.numel() - 1, partition.blocks[partition.population]
    total, sequences, size = blocks.numel(), partition.pairs.numel(), partition.size
    block = torch.arange(total, device=blocks.device)
    if partition.same_size:
        population = partition.population
        return Rows((total, size), None, block, population, total // count, total // sequences)
    assert partition.order is not None
    bounds, tokens, last = partition.bounds, partition.order.numel(), max(0, sequences - 1)
    partial = (bounds.diff() > 0) & (blocks > 1)
    block = (~partial).int().argsort(stable=True)
    block = block[: int(partial.sum()) if may_read(block.device) else 2 * tokens // size + 1]
    # Surplus rows, at the end, form one more population and belong to the last sequence.
    partial, population = partial[block], partition.population[block]
    sequence = torch.where(partial, partition.sequence[population], last)
    population = population.masked_fill(~partial, count)
    population = torch.nn.functional.pad((population.diff() != 0).cumsum(0), (min(1, block.numel()), 0))
    places = bounds[block].unsqueeze(1) + torch.arange(size, device=block.device)
    padding = (places >= bounds[block + 1].unsqueeze(1)) | ~partial.unsqueeze(1)
    return Rows(
        shape=(block.numel(), size),
        places=places.masked_fill(padding, tokens),
        block=block,
        population=population,
        population_runs=torch.searchsorted(population, torch.arange(block.numel() + 1, device=block.device)),
        sequence_runs=torch.searchsorted(sequence, torch.arange(sequences + 1, device=block.device)),
    )


def may_read(device: torch.device) -> bool:
    """Whether the host may read values of tensors on ``device``: on a CPU alone, because others would synchronise."""
    return device.type == "cpu"


def select(z: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[n, F]`` of ``z`` ``[B, L, F]`` at the flat ``index`` ``[n]``; copies no more of ``z``, for any
    strides."""
    if row_stride(z) is not None:
        return z.flatten(0, 1).index_select(0, index)
    return z[index // z.shape[1], index % z.shape[1]]  # flattening might copy all of z


def sum_of_runs(values: Tensor, runs: Runs) -> Tensor:
    """Sums ``[runs, ...]`` over each run of ``values`` ``[R, ...]``."""
    if isinstance(runs, int):
        return values.view(-1, runs, *values.shape[1:]).sum(1)
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=runs, axis=0, unsafe=True)
    return sums
