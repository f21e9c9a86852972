"""Which tokens meet where a share of the pairs is visited: units, the cliques they are cut into, and sums over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dispersion_kernels.native import row_stride
from dispersion_kernels.segments import on_device, order_of, segment_of_token
from dispersion_kernels.sweep import wide_dtype

# The sweep of smaller cliques costs as much as that of these.
_SMALLEST_CLIQUE = 16

# What a run of rows has in common: their number, where it is the same for all, or the bounds of the runs.
Runs = int | Tensor


@dataclass(frozen=True)
class Rows:
    """The cliques that are a part of their unit and not all of it, as rows of ``shape``, padded where they differ in
    length. (Of a unit that is one clique all pairs are visited, and the model has nothing to add.)"""

    shape: tuple[int, int]
    table: Tensor | None
    """``[R, size]``: the place of each token in the order of the plan, N for none; None: as they follow."""
    of_unit: Runs
    """The rows of each unit that has rows."""
    unit: Tensor
    """``[R]``: which of these units."""
    of_sequence: Runs
    """The rows of each sequence."""
    clique: Tensor
    """``[R]``."""
    inverse_share: Tensor
    """``[R]``: 1/p of the unit, 0 where nothing is visited."""


@dataclass(frozen=True)
class Plan:
    """Which tokens meet: N tokens in K cliques, of S sequences."""

    order: Tensor | None
    """``[N]``: the tokens, those of a clique side by side; None: as they are."""
    bounds: Tensor | None
    """``[K + 1]`` of the cliques in that order; None: the rows."""
    groups: Tensor | None
    """``[1, N]``: negative for the tokens that are left out."""
    taking_part: Tensor | None
    """``[N]``, boolean; None: all."""
    pairs: Tensor
    """``[S]`` int64: of each sequence."""
    with_pairs: int | Tensor
    """How many of these are not 0."""
    weight: Tensor
    """``[K]``: what the mean over the pairs of a clique counts in the mean of its sequence."""
    cliques_of_sequence: Runs
    sequence_of_clique: Tensor
    clique_of_token: Tensor
    sequence_of_row: Tensor
    """``[N]``, of the tokens as they are."""
    sequence_of_unit: Tensor
    unit_begins: Tensor
    unit_tokens: Tensor
    unit_cliques: Tensor
    """``[U]``: the first token, the number of tokens and of cliques of each unit, in the order above."""
    unit_inverse_share: Tensor
    """``[U]``: 1/p, 0 where nothing is visited."""
    units: Tensor
    """``[U + 1]``: their bounds."""
    cliques: Tensor
    """The bounds of the cliques of tokens that take part."""
    rows: Rows


def plan_of(
    layers: Sequence[Tensor], shuffle: Tensor, groups: Tensor | None, cu_seqlens: Tensor | None, share: float
) -> Plan:
    batch, length = layers[0].shape[:2]
    if groups is None and cu_seqlens is None and (cliques := equal_parts(share, length)):
        # Kept where no stream and no graph owns memory.
        make = _kept_plan if layers[0].is_cpu else _of_equal_parts
        plan = make(len(layers) * batch, length, cliques, share > 0, layers[0].device)
        if share == 0:
            return plan
        return replace(plan, order=(shuffle.flatten(0, 1) + plan.unit_begins.unsqueeze(1)).flatten())
    assert len(layers) == 1
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    size = clique_tokens(share, batch * length // max(1, sequences))
    return _ragged_cliques(groups, cu_seqlens, shuffle[0], size)


def equal_parts(share: float, length: int) -> int:
    """Into how many cliques of the same size ``length`` tokens are cut; 0 where there is no such number near."""
    if share == 0:
        return 1
    most = max(1, length // clique_tokens(share, length))
    return next((k for k in range(most, most * 3 // 4, -1) if length % k == 0), 0)


def clique_tokens(share: float, length: int) -> int:
    """How many tokens a clique has at most, in sequences of ``length`` tokens."""
    return max(_SMALLEST_CLIQUE, math.ceil(share * length))


def _of_equal_parts(sequences: int, length: int, cliques: int, visited: bool, device: torch.device) -> Plan:
    """Every sequence a unit, and all cliques of the same size; tokens in no order yet."""
    wide, size = wide_dtype(device), length // cliques
    number = torch.arange(sequences * cliques, device=device)
    sequence = torch.arange(sequences, device=device)
    begins = sequence * length
    tokens = torch.full_like(begins, length)
    inverse_share = torch.full_like(begins, (length - 1) / max(1, size - 1) if visited else 0.0, dtype=wide)
    rows = Rows(
        shape=(sequences * cliques, size),
        table=None,
        of_unit=cliques,
        unit=number // cliques,
        of_sequence=cliques,
        clique=number,
        inverse_share=inverse_share[number // cliques],
    )
    return Plan(
        order=None,
        bounds=None,
        groups=None,
        taking_part=None,
        pairs=tokens * (length - 1),
        with_pairs=sequences if length > 1 else 0,
        weight=torch.full_like(number, 1 / cliques, dtype=wide),
        cliques_of_sequence=cliques,
        sequence_of_clique=rows.unit,
        clique_of_token=number.repeat_interleave(size),
        sequence_of_row=sequence.repeat_interleave(length),
        sequence_of_unit=sequence,
        unit_begins=begins,
        unit_tokens=tokens,
        unit_cliques=torch.full_like(begins, cliques),
        unit_inverse_share=inverse_share,
        units=torch.arange(sequences + 1, device=device) * length,
        cliques=torch.arange(sequences * cliques + 1, device=device) * size,
        rows=rows,
    )


_kept_plan = functools.lru_cache(maxsize=16)(_of_equal_parts)


def _ragged_cliques(groups: Tensor | None, cu_seqlens: Tensor | None, shuffle: Tensor, size: int) -> Plan:
    """Units of any length, each cut into the fewest cliques of at most ``size`` tokens that differ by one at most.

    On an accelerator the number of units and cliques is not read: bounds of it, known from shapes, take its place, and
    the rest are empty.
    """
    batch, length = shuffle.shape
    count, device, wide = shuffle.numel(), shuffle.device, wide_dtype(shuffle.device)
    read = may_read(device)
    if cu_seqlens is None:
        sequences, sequence_of_row = batch, torch.arange(batch, device=device).repeat_interleave(length)
    else:
        sequences, sequence_of_row = cu_seqlens.numel() - 1, segment_of_token(on_device(cu_seqlens, device), count)

    # Sorted by sequence, and in it by group and at random, with the tokens that are left out at the end.
    order = (shuffle + torch.arange(batch, device=device).unsqueeze(1) * length).flatten()
    if groups is None:
        order = order[sequence_of_row[order].argsort(stable=True)]
        taking_part, taken = None, torch.full((), count, device=device)
    else:
        ids = groups.flatten()[order]
        order = order[order_of(sequence_of_row[order].masked_fill(ids < 0, sequences), ids)]
        taking_part = groups.flatten()[order] >= 0
        taken = taking_part.sum()
    sequence = sequence_of_row[order]
    new = torch.ones(count, dtype=torch.bool, device=device)
    new[1:] = sequence[1:] != sequence[:-1]
    if groups is not None:
        ids = groups.flatten()[order]
        new[1:] |= ids[1:] != ids[:-1]
    unit = new.cumsum(0) - 1
    if taking_part is not None:
        unit = unit.masked_fill(~taking_part, count)
    bound = sequences if groups is None else count
    units = max(1, int(new[: int(taken)].sum())) if read else bound
    begins = torch.searchsorted(unit, torch.arange(units + 1, device=device))
    begins, tokens = begins[:-1], begins.diff()
    sequence_of_unit = sequence[begins.clamp(max=count - 1)]

    cliques = (tokens + size - 1) // size
    last = cliques.cumsum(0)
    number = torch.arange(int(last[-1]) if read else units + count // size, device=device)
    there = number < last[-1:]
    unit_of = torch.searchsorted(last, number, right=True).clamp(max=units - 1)
    within, pieces = tokens[unit_of], cliques[unit_of].clamp(min=1)
    first = begins[unit_of] + (number - (last - cliques)[unit_of]) * within // pieces
    bounds = torch.cat([torch.where(there, first, taken), taken.view(1), torch.full_like(taken, count).view(1)])
    met = bounds.diff()
    met[-1] = 0  # the tokens that are left out

    per_unit = tokens * (tokens - 1)
    pairs = per_unit.new_zeros(sequences).index_add_(0, sequence_of_unit, per_unit)
    quotient, larger = tokens // cliques.clamp(min=1), tokens % cliques.clamp(min=1)
    visited = larger * (quotient + 1) * quotient + (cliques - larger) * quotient * (quotient - 1)
    inverse_share = per_unit / visited.clamp(min=1).to(wide)
    sequence_of_clique = torch.full_like(met, max(0, sequences - 1))
    sequence_of_clique[:-1] = torch.where(there, sequence_of_unit[unit_of], sequence_of_clique[:-1])
    weight = (met * (met - 1)) / pairs[sequence_of_clique].clamp(min=1).to(wide)
    weight[:-1] *= inverse_share[unit_of]

    partial = there & (cliques[unit_of] > 1)
    index = (~partial).int().argsort(stable=True)
    index = index[: int(partial.sum()) if read else 2 * count // size + 1]
    partial, unit_of = partial[index], unit_of[index]
    table = bounds[index].unsqueeze(1) + torch.arange(size, device=device)
    table = table.masked_fill((table >= bounds[index + 1].unsqueeze(1)) | ~partial.unsqueeze(1), count)
    # The rows that are none, at the end, count as one unit: as many of them may be of as many units.
    dense = ((partial[1:] & (unit_of.diff() != 0)) | (partial.diff() != 0)).cumsum(0)
    dense = torch.cat([dense.new_zeros(min(1, index.numel())), dense])
    of_unit = int(dense[-1]) + 1 if read and dense.numel() else min(count // size, units) + 1
    last_sequence = torch.full_like(index, max(0, sequences - 1))
    of_row = torch.where(partial, sequence_of_clique[index], last_sequence)
    rows = Rows(
        shape=(index.numel(), size),
        table=table,
        of_unit=torch.searchsorted(dense, torch.arange(of_unit + 1, device=device)),
        unit=dense,
        of_sequence=torch.searchsorted(of_row, torch.arange(sequences + 1, device=device)),
        clique=index,
        inverse_share=inverse_share[unit_of],
    )
    return Plan(
        order=order,
        bounds=bounds,
        groups=None if taking_part is None else taking_part.long().unsqueeze(0) - 1,
        taking_part=taking_part,
        pairs=pairs,
        with_pairs=(pairs > 0).sum(),
        weight=weight,
        cliques_of_sequence=torch.searchsorted(sequence_of_clique, torch.arange(sequences + 1, device=device)),
        sequence_of_clique=sequence_of_clique,
        clique_of_token=segment_of_token(bounds, count),
        sequence_of_row=sequence_of_row,
        sequence_of_unit=sequence_of_unit,
        unit_begins=begins,
        unit_tokens=tokens,
        unit_cliques=cliques,
        unit_inverse_share=inverse_share,
        units=torch.nn.functional.pad(tokens.cumsum(0), (1, 0)),
        cliques=bounds[:-1],
        rows=rows,
    )


def may_read(device: torch.device) -> bool:
    """Whether reading a value costs nothing; elsewhere it would synchronise."""
    return device.type == "cpu"


def of_sequences(values: Tensor, plan: Plan) -> Tensor:
    """``[Y S]`` from ``[Y]``."""
    return values.repeat_interleave(plan.pairs.numel() // values.numel())


def select(z: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """``[n, F]``, in ``out`` where it is given: the tokens of ``z`` ``[B, L, F]`` with these numbers, which are read
    where they lie, whatever the strides."""
    if row_stride(z) is not None:
        selected: Tensor = torch.index_select(z.flatten(0, 1), 0, index, out=out)
        return selected
    rows = z[index // z.shape[1], index % z.shape[1]]  # flattening might copy all of z
    return rows if out is None else out.copy_(rows)


def sum_of_runs(values: Tensor, runs: Runs) -> Tensor:
    """``[runs, ...]`` from ``[R, ...]``."""
    if isinstance(runs, int):
        return values.view(-1, runs, *values.shape[1:]).sum(1)
    of_runs: Tensor = torch.segment_reduce(values, "sum", offsets=runs, axis=0, unsafe=True)
    return of_runs
