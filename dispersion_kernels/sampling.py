"""The loss from a share of the pairs: the tokens in random groups, and a control variate for the rest.

The tokens that pair with each other, a *unit* (a sequence, or a document in it), are shuffled and cut into *cliques* of
share * L tokens, and only the pairs within a clique are visited: that share of the work, every token with as many
partners as any other, and nothing that a backend would have to know, because to it a clique is a short sequence of its
own. Any two tokens of a unit of n share a clique with the same probability p = (pairs within cliques) / (n (n - 1)), so
that, with S_i the partners of i in its clique,

    G_i = sum_{j != i} h_ij x_j + 1/p sum_{j in S_i} (slope(c_ij) - h_ij) x_j

is an unbiased estimate of sum_{j != i} slope(c_ij) x_j for every h that does not depend on the shuffle. Its variance is
that of a mean over a sample without replacement: with m partners in S_i,

    Var G_i = (n - 1)^2 / m (1 - m / (n - 1)) Var_j((slope(c_ij) - h_ij) x_j),

which of the designs with m partners a token is taken, cliques or blocks at random distances, does not matter to it.

The model h_ij = sum_k b_k phi_ik phi_jk is of low rank, so that its sums over *all* pairs, and over those of a clique,
are thin matrix products: sum_j h_ij x_j = sum_k b_k phi_ik sum_j phi_jk x_j. ``constant`` has phi = 1. ``low_rank`` has
h_ij = b0 + b1 p_ij + b2 q_ij + b3 q_ij^2, a parabola in an estimate of c: p is the product of the two tokens'
projections to _RANK directions, near the principal ones, and q that of their projections to the first _SQUARED of
them; phi are 1, the components along the directions, and the products of two of the first. Directions and coefficients
are from the pairs of a few random tokens, drawn independently of the shuffle. psi has the control variate d1 c, whose
mean over all pairs is known from |sum_j x_j|^2.

The loss is log(P / n + eps), its gradient G / (P + n eps): P and G are unbiased, their logarithm and quotient biased by
about Var P / P^2, one part in the number of visited pairs.

With a share of 0 no pairs but those of the fit are visited: G_i is the first sum alone, in time O(L F), and its bias
sum_j (h_ij - slope(c_ij)) x_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.potentials import Potential
from dispersion_kernels.segments import order_of, segment_of_token
from dispersion_kernels.sweep import accumulation_dtype, transform, wide_dtype

CONTROL_VARIATES = ("auto", "none", "constant", "low_rank")
# Directions of ``low_rank``, and those of them whose products of two are features, too.
_RANK, _SQUARED = 16, 3
# The fit sees the pairs within this many groups of this many tokens.
_FIT_GROUPS, _FIT_TOKENS = 4, 32
# The sweep of smaller cliques costs as much as that of these.
_SMALLEST_CLIQUE = 16


class Draws(NamedTuple):
    """What is random, uniform in [0, 1)."""

    shuffle: Tensor
    """``[B, L]``: the order of the tokens."""
    fit: Tensor
    """``[_FIT_GROUPS, 1 + _FIT_TOKENS]``: a unit each, and tokens of it."""


class Estimate(NamedTuple):
    """What the sampled pairs give."""

    loss: Tensor
    """``[S]`` in :func:`wide_dtype`; 0 for a sequence without a pair."""
    pairs: Tensor
    """``[S]`` int64: the ordered pairs of each sequence, visited or not."""
    grad: Tensor | None
    """``[B, L, F]``: d loss of its sequence / d z, but for its scale; None where it was not asked for."""
    scale: Tensor | None
    """``[B, L]``."""
    error: Tensor
    """``[]``: the relative error of the gradient to expect; 0 where it was not asked for, or no gradient."""


# A backend's sweep of tokens ``[R, L, F]``, each row a sequence, or packed ones ``[1, N, F]`` with groups and bounds:
# the loss of each, and of its gradient the two factors, as ``autograd.py`` has them.
Sweep = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def draw(z: Tensor, generator: torch.Generator | None) -> Draws:
    """For tokens ``[B, L, F]``."""
    return Draws(
        torch.rand(z.shape[:2], device=z.device, generator=generator),
        torch.rand(_FIT_GROUPS, 1 + _FIT_TOKENS, device=z.device, generator=generator),
    )


def clique_tokens(share: float, length: int) -> int:
    """How many tokens a clique has at most, in sequences of ``length`` tokens."""
    return max(_SMALLEST_CLIQUE, math.ceil(share * length))


def estimate(
    z: Tensor,
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    draws: Draws,
    share: float,
    control_variate: str,
    with_grad: bool,
    with_error: bool,
    sweep: Sweep,
) -> Estimate:
    """Loss and gradient of tokens ``[B, L, F]`` from a ``share`` of their pairs; ``groups`` and ``cu_seqlens`` as in
    :mod:`dispersion_kernels.segments`, None where the share is 0."""
    plan = _plan(z, groups, cu_seqlens, draws.shuffle, share)
    rows, wide, dtype = plan.rows, wide_dtype(z.device), accumulation_dtype(z.dtype)
    tokens = z.flatten(0, 1) if plan.order is None else z.flatten(0, 1).index_select(0, plan.order)

    # The mean of psi over the pairs of each sequence: from the cliques, and from what the model has of all pairs.
    logarithmic = potential.reduction == "log_mean"
    pairs = plan.pairs.clamp(min=1).to(wide)
    losses = grad = scale = None
    if share > 0:
        equal = plan.bounds is None
        losses, grad, scale = sweep(rows.of(tokens) if equal else tokens.unsqueeze(0), plan.groups, plan.bounds)
        losses = losses.to(wide)
        means = losses.exp() - potential.log_eps if logarithmic else losses
        mean = _sum_of_runs(plan.weight * means, plan.cliques_of_sequence)

    norm = torch.linalg.vector_norm(tokens, dim=1, dtype=dtype)
    nonfinite = ~norm.isfinite()
    left_out = nonfinite if plan.taking_part is None else nonfinite | ~plan.taking_part
    transformed, statistics = transform(
        tokens.unsqueeze(0),
        norm.masked_fill(left_out, 0.0)[None, :, None],
        potential,
        left_out.unsqueeze(0),
        in_place=plan.order is not None and tokens.dtype == dtype,
    )
    assert statistics is not None  # a potential of the cosine or the correlation
    x, inverse, ratio = transformed[0], statistics.inverse[0, :, 0], statistics.ratio[0, :, 0]
    fit = sums = None
    if control_variate != "none" or with_error:
        fit = _fit(x, plan, draws.fit, potential, control_variate)
        if fit.form is not None and rows.shape[0] > 0:
            sums = _model_sums(x, ratio, fit, fit.form, rows)
        if share == 0:
            mean = fit.mean_psi.masked_fill(nonfinite.view(z.shape[:2]).any(1), math.nan)
    if fit is not None and sums is not None:
        missed = _sum_of_runs(sums.products, rows.of_sequence) / pairs
        corrected = mean + fit.psi_slope * (missed if share > 0 else missed - fit.mean_c)
        # Where a correction is larger than psi itself, a line says nothing of it.
        mean = torch.where(corrected <= 0, mean, corrected) if logarithmic else corrected
    empty = plan.pairs == 0
    loss = ((mean + potential.log_eps).log() if logarithmic else mean).masked_fill(empty, 0.0)
    error = loss.new_zeros(())
    if not with_grad:
        return Estimate(loss, plan.pairs, None, None, error)

    # d loss / dx_i = per_pair sum_j slope(c_ij) x_j.
    slope = (1 / (mean + potential.log_eps) if logarithmic else torch.ones_like(mean)).masked_fill(empty, 0.0)
    per_pair = 2 * slope / pairs
    if grad is None or scale is None or losses is None:
        assert sums is not None
        grad = torch.empty_like(x)
        scale = per_pair.to(dtype).repeat_interleave(z.shape[1]) * inverse
        sums.add_to(grad, torch.ones_like(scale[: rows.shape[0]]), onto_nothing=True)
    else:
        grad, of_sweep = grad.flatten(0, 1), scale.flatten()
        of_clique = plan.weight * slope[plan.sequence_of_clique]
        if logarithmic:
            of_clique = of_clique * losses.exp()  # undoes the logarithm of a clique in its gradient
        scale = of_clique.to(dtype)[plan.clique_of_token] * of_sweep
        if sums is not None:
            # The sweep's sums are in units of their own, the same for the tokens of a clique.
            unit = (rows.of(of_sweep) / rows.of(inverse)).nan_to_num(0.0, 0.0, 0.0).amax(1).to(wide)
            unit = unit * of_clique[rows.clique] / per_pair[plan.sequence_of_clique][rows.clique]
            sums.add_to(grad, torch.where(unit > 0, 1 / unit, 0.0).to(dtype))
    if fit is not None and with_error:
        signal = (torch.linalg.vector_norm(grad, dim=1) * scale).to(wide).square().sum()
        noise = _noise(fit, plan, per_pair.to(dtype)[plan.sequence_of_token] * inverse, share)
        error = (noise / (signal - noise).clamp(min=torch.finfo(dtype).tiny)).sqrt()
    if plan.order is not None:
        place = torch.empty_like(plan.order)
        place[plan.order] = torch.arange(place.numel(), device=z.device)
        # x has done its work.
        grad, scale = torch.index_select(grad, 0, place, out=x), scale[place]
    return Estimate(loss, plan.pairs, grad.view(z.shape), scale.view(z.shape[:2]), error)


# What a run of rows has in common: their number, where it is the same for all, or the bounds of the runs.
_Runs = int | Tensor


@dataclass(frozen=True)
class _Rows:
    """The cliques that are a part of their unit and not all of it, as rows of ``shape``, padded where they differ in
    length. (Of a unit that is one clique all pairs are visited, and the model has nothing to add.)"""

    shape: tuple[int, int]
    table: Tensor | None
    """``[R, size]``: the place of each token in the order of the plan, N for none; None: as they follow."""
    of_unit: _Runs
    """The rows of each unit that has rows."""
    unit: Tensor
    """``[R]``: which of these units."""
    of_sequence: _Runs
    """The rows of each sequence."""
    clique: Tensor
    """``[R]``."""
    inverse_share: Tensor
    """``[R]``: 1/p of the unit, 0 where nothing is visited."""

    def of(self, values: Tensor) -> Tensor:
        """``[R, size, ...]`` from ``[N, ...]``, 0 where there is no token."""
        if self.table is None:
            return values.view(*self.shape, *values.shape[1:])
        padded = torch.cat([values, torch.zeros_like(values[:1])])
        return padded.index_select(0, self.table.flatten()).view(*self.shape, *values.shape[1:])

    def add_to(self, values: Tensor, of_rows: Tensor) -> None:
        """Adds ``[R, size, ...]`` to ``[N, ...]``."""
        assert self.table is not None
        place = torch.full((values.shape[0] + 1,), self.table.numel(), device=values.device)
        place[self.table] = torch.arange(self.table.numel(), device=values.device).view(self.shape)
        flat = of_rows.flatten(0, 1)
        values += torch.cat([flat, torch.zeros_like(flat[:1])]).index_select(0, place[:-1])


@dataclass(frozen=True)
class _Plan:
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
    weight: Tensor
    """``[K]``: what the mean over the pairs of a clique counts in the mean of its sequence."""
    cliques_of_sequence: _Runs
    sequence_of_clique: Tensor
    clique_of_token: Tensor
    sequence_of_token: Tensor
    unit_begins: Tensor
    unit_tokens: Tensor
    unit_cliques: Tensor
    """``[U]``: the first token, the number of tokens and of cliques of each unit, in the order above."""
    rows: _Rows


def _plan(z: Tensor, groups: Tensor | None, cu_seqlens: Tensor | None, shuffle: Tensor, share: float) -> _Plan:
    batch, length, _ = z.shape
    if groups is None and cu_seqlens is None:
        cliques = 1 if share == 0 else equal_cliques(share, length)
        if length % cliques == 0:
            return _equal_cliques(batch, length, cliques, shuffle, visited=share > 0)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    return _ragged_cliques(groups, cu_seqlens, shuffle, clique_tokens(share, batch * length // max(1, sequences)))


def equal_cliques(share: float, length: int) -> int:
    """Into how many cliques ``length`` tokens are cut: a divisor of it, where one is near."""
    most = max(1, length // clique_tokens(share, length))
    return next((k for k in range(most, most * 3 // 4, -1) if length % k == 0), most)


def _equal_cliques(batch: int, length: int, cliques: int, shuffle: Tensor, visited: bool) -> _Plan:
    """Every sequence a unit, and all cliques of the same size."""
    device, wide = shuffle.device, wide_dtype(shuffle.device)
    size = length // cliques
    number = torch.arange(batch * cliques, device=device)
    sequence = torch.arange(batch, device=device)
    begins = sequence * length
    tokens = torch.full_like(begins, length)
    rows = _Rows(
        shape=(batch * cliques, size),
        table=None,
        of_unit=cliques,
        unit=number // cliques,
        of_sequence=cliques,
        clique=number,
        inverse_share=torch.full_like(number, (length - 1) / max(1, size - 1) if visited else 0.0, dtype=wide),
    )
    return _Plan(
        order=(shuffle.argsort(1) + begins.unsqueeze(1)).flatten() if visited else None,
        bounds=None,
        groups=None,
        taking_part=None,
        pairs=tokens * (length - 1),
        weight=torch.full_like(number, 1 / cliques, dtype=wide),
        cliques_of_sequence=cliques,
        sequence_of_clique=rows.unit,
        clique_of_token=number.repeat_interleave(size),
        sequence_of_token=sequence.repeat_interleave(length),
        unit_begins=begins,
        unit_tokens=tokens,
        unit_cliques=torch.full_like(begins, cliques),
        rows=rows,
    )


def _ragged_cliques(groups: Tensor | None, cu_seqlens: Tensor | None, shuffle: Tensor, size: int) -> _Plan:
    """Units of any length, each cut into the fewest cliques of at most ``size`` tokens that differ by one at most.

    On an accelerator the number of units and cliques is not read: bounds of it, known from shapes, take its place, and
    the rest are empty.
    """
    batch, length = shuffle.shape
    count, device, wide = shuffle.numel(), shuffle.device, wide_dtype(shuffle.device)
    read = _may_read(device)
    if cu_seqlens is None:
        sequences, sequence = batch, torch.arange(batch, device=device).repeat_interleave(length)
    else:
        sequences, sequence = cu_seqlens.numel() - 1, segment_of_token(cu_seqlens.to(device), count)

    # Sorted by sequence, and in it by group and at random, with the tokens that are left out at the end.
    order = shuffle.flatten().argsort()
    if groups is None:
        order = order[sequence[order].argsort(stable=True)]
        taking_part, taken = None, torch.full((), count, device=device)
    else:
        ids = groups.flatten()[order]
        order = order[order_of(sequence[order].masked_fill(ids < 0, sequences), ids)]
        taking_part = groups.flatten()[order] >= 0
        taken = taking_part.sum()
    sequence = sequence[order]
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
    dense = ((unit_of.diff() != 0) | (partial.diff() != 0)).cumsum(0)
    dense = torch.cat([dense.new_zeros(min(1, index.numel())), dense])
    of_unit = int(dense[-1]) + 1 if read and dense.numel() else count // size + 2
    last_sequence = torch.full_like(index, max(0, sequences - 1))
    sequence_of_row = torch.where(partial, sequence_of_clique[index], last_sequence)
    rows = _Rows(
        shape=(index.numel(), size),
        table=table,
        of_unit=torch.searchsorted(dense, torch.arange(of_unit + 1, device=device)),
        unit=dense,
        of_sequence=torch.searchsorted(sequence_of_row, torch.arange(sequences + 1, device=device)),
        clique=index,
        inverse_share=inverse_share[unit_of],
    )
    return _Plan(
        order=order,
        bounds=bounds,
        groups=None if taking_part is None else taking_part.long().unsqueeze(0) - 1,
        taking_part=taking_part,
        pairs=pairs,
        weight=weight,
        cliques_of_sequence=torch.searchsorted(sequence_of_clique, torch.arange(sequences + 1, device=device)),
        sequence_of_clique=sequence_of_clique,
        clique_of_token=segment_of_token(bounds, count),
        sequence_of_token=sequence,
        unit_begins=begins,
        unit_tokens=tokens,
        unit_cliques=cliques,
        rows=rows,
    )


def _may_read(device: torch.device) -> bool:
    """Whether reading a value costs nothing; elsewhere it would synchronise."""
    return device.type == "cpu"


@dataclass(frozen=True)
class _Fit:
    """A model of the slope and of psi, and the pairs that they are from."""

    form: Tensor | None
    """b ``[k]``; None where there is no model."""
    directions: Tensor | None
    """``[_RANK, F]``, of ``low_rank``."""
    psi_slope: Tensor
    mean_psi: Tensor
    mean_c: Tensor
    tokens: Tensor
    """``[groups, tokens, F]``."""
    positions: Tensor
    unit: Tensor
    """``[groups]``."""
    pairs: Tensor
    """``[groups, tokens, tokens]``: 1 where there is a pair."""
    slope: Tensor
    basis: Tensor | None
    """``[n, groups, tokens, tokens]``: what h is linear in, 0 where there is no pair; so is ``slope``."""
    coefficients: Tensor | None

    def features(self, x: Tensor) -> Tensor:
        """phi ``[N, k]``."""
        one = torch.ones_like(x[:, :1])
        if self.directions is None:
            return one
        y = x @ self.directions.T
        first, second = torch.triu_indices(_SQUARED, _SQUARED, device=x.device)
        return torch.cat([one, y, y[:, first] * y[:, second]], 1)


def _fit(x: Tensor, plan: _Plan, uniform: Tensor, potential: Potential, control_variate: str) -> _Fit:
    wide = wide_dtype(x.device)
    # A group is of one unit, which is drawn as the unit of a token. What is a place in the order is a token that does
    # not depend on the shuffle.
    anchor = (uniform[:, 0] * plan.unit_tokens.sum()).long()
    unit = (torch.searchsorted(plan.unit_begins, anchor, right=True) - 1).clamp(min=0)
    within = (uniform[:, 1:] * plan.unit_tokens[unit].unsqueeze(1)).long()
    within = torch.minimum(within, (plan.unit_tokens[unit] - 1).clamp(min=0).unsqueeze(1))
    positions = (plan.unit_begins[unit].unsqueeze(1) + within).clamp(max=x.shape[0] - 1)
    tokens = x.index_select(0, positions.flatten()).unflatten(0, positions.shape)
    c = tokens @ tokens.mT
    there = positions.unsqueeze(1) != positions.unsqueeze(2)
    there = there.to(wide)
    count = there.sum().clamp(min=1)
    psi, slope = potential.value(c).to(wide), potential.slope(c).to(wide) * there
    c = c.to(wide)
    mean_psi, mean_c = (psi * there).sum() / count, (c * there).sum() / count
    deviation = (c - mean_c) * there
    variance = deviation.square().sum()
    psi_slope = torch.where(variance > 0, (deviation * psi).sum() / variance, 0.0)

    # Of slope x_j the token i sees what is orthogonal to it, sqrt(1 - c^2) of its length.
    weight = there * (1 - c.square()).clamp(min=0)
    form = directions = basis = b = None
    if control_variate == "constant":
        basis = there.unsqueeze(0)
        b = (slope * weight).sum().view(1) / weight.sum().clamp(min=torch.finfo(wide).tiny)
        form = b
    elif control_variate == "low_rank":
        directions = _directions(tokens.flatten(0, 1).to(wide))
        y = tokens.to(wide) @ directions.T
        few = y[:, :, :_SQUARED]
        product = few @ few.mT
        basis = torch.stack([torch.ones_like(c), y @ y.mT, product, product.square()]) * there
        flat, weighted = basis.flatten(1), (basis * weight).flatten(1)
        b = _solve(weighted @ flat.T, weighted @ slope.view(-1, 1)).flatten()
        # A product of two different components is in the square of the product twice.
        twice = [1 + (i < j) for i in range(_SQUARED) for j in range(i, _SQUARED)]
        form = torch.cat([b[:1], b[1] + b[2].expand(_SQUARED), b[1].expand(_RANK - _SQUARED), b[3] * b.new_tensor(twice)])
        directions = directions.to(x.dtype)
    return _Fit(
        form=None if form is None else form.to(x.dtype),
        directions=directions,
        psi_slope=psi_slope,
        mean_psi=mean_psi,
        mean_c=mean_c,
        tokens=tokens,
        positions=positions,
        unit=unit,
        pairs=there,
        slope=slope,
        basis=basis,
        coefficients=b,
    )


def _directions(tokens: Tensor) -> Tensor:
    """``[_RANK, F]``, orthonormal: near the principal directions of ``tokens`` ``[N, F]``, the first ones nearest."""
    # A power iteration from some of the tokens; and in the span of what it gives, for the first few, two more.
    some = tokens[:: tokens.shape[0] // _RANK][:_RANK]
    span = torch.nn.functional.normalize((some @ tokens.T) @ tokens, dim=1)
    y, products = tokens @ span.T, span @ span.T
    iteration = _solve(products, y.T @ y)
    basis = torch.eye(_RANK, dtype=tokens.dtype, device=tokens.device)
    basis[:, :_SQUARED] = iteration @ iteration[:, :_SQUARED]
    scaled, scale = _unit_diagonal(basis.T @ products @ basis)
    factor = torch.linalg.cholesky_ex(scaled).L
    coordinates = torch.linalg.solve_triangular(factor, (basis * scale).T, upper=False)
    return coordinates @ span


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a symmetric system, not negative; one of them where there are many, 0 for an unknown whose row is
    0."""
    scaled, scale = _unit_diagonal(matrix)
    # Without a check of what it finds, it does not synchronise.
    solution: Tensor = torch.linalg.solve_ex(scaled, right * scale.unsqueeze(1)).result
    return solution * scale.unsqueeze(1)


def _unit_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric matrix, not negative, scaled to ones on its diagonal, and made regular; and the scale of its rows."""
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    ridge = torch.finfo(matrix.dtype).eps ** 0.75
    return matrix * scale * scale.unsqueeze(1) + ridge * torch.eye(len(scale), dtype=matrix.dtype, device=matrix.device), scale


@dataclass(frozen=True)
class _ModelSums:
    """What the model has of all pairs, less 1/p times what it has of those visited: sum_j h_ij x_j = sum_k b_k phi_ik T_k."""

    rows: _Rows
    x: Tensor
    """``[R, size, F]``."""
    phi: Tensor
    """``[R, size, k]``."""
    coefficients: Tensor
    """``[R, k, F]``: b_k T_k."""
    ratio: Tensor
    """``[R, size]``: of the row transform, 1 / |x|, or 0."""
    squares: Tensor
    """``[R, size]``: |x|^2."""
    own: Tensor
    """``[R, size]``: h_ii, which is among both sums and is no pair."""
    products: Tensor
    """``[R]``: the same difference of the sums of c_ij, the unit's divided among its rows."""

    def add_to(self, grad: Tensor, factor: Tensor, onto_nothing: bool = False) -> None:
        """Adds them times ``factor`` ``[R]``, seen through the row transform, to the sums of the visited pairs."""
        coefficients = self.coefficients * factor.view(-1, 1, 1)
        own = self.own * factor.unsqueeze(1)
        inner = (self.phi.mT * (coefficients @ self.x.mT)).sum(1) - own * self.squares
        along = (own + self.ratio * inner).unsqueeze(2)
        if self.rows.table is None:
            out = grad.view(self.x.shape)
            out.baddbmm_(self.phi, coefficients, beta=0 if onto_nothing else 1).addcmul_(self.x, along, value=-1)
        else:
            self.rows.add_to(grad, torch.bmm(self.phi, coefficients).addcmul_(self.x, along, value=-1))


def _model_sums(x: Tensor, ratio: Tensor, fit: _Fit, form: Tensor, rows: _Rows) -> _ModelSums:
    wide = wide_dtype(x.device)
    phi, row_x, ratio = rows.of(fit.features(x)), rows.of(x), rows.of(ratio)
    squares = torch.where(ratio > 0, ratio.square().reciprocal(), 0.0)
    sums = phi.mT @ row_x
    of_units = _sum_of_runs(sums, rows.of_unit)[rows.unit]
    share = rows.inverse_share.to(x.dtype).view(-1, 1, 1)
    # phi begins with 1.
    of_row = squares.to(wide).sum(1)
    products = sums[:, 0].to(wide).square().sum(1) - of_row
    squares_of_unit = _sum_of_runs(of_row, rows.of_unit)[rows.unit]
    products_of_unit = of_units[:, 0].to(wide).square().sum(1) - squares_of_unit
    number = _sum_of_runs(torch.ones_like(of_row), rows.of_unit)[rows.unit]
    missed = products_of_unit / number - products * rows.inverse_share
    return _ModelSums(
        rows=rows,
        x=row_x,
        phi=phi,
        coefficients=form.unsqueeze(1) * (of_units - sums * share),
        ratio=ratio,
        squares=squares,
        own=(phi.square() @ form) * (1 - share.squeeze(2)),
        products=missed,
    )


def _noise(fit: _Fit, plan: _Plan, factor: Tensor, share: float) -> Tensor:
    """The expected square of the gradient's error, summed over all tokens: from the residuals of the fit's tokens with
    their partners there, of what is orthogonal to the token. ``factor`` ``[N]`` is what G is multiplied by."""
    wide = wide_dtype(factor.device)
    n = fit.pairs.sum(2)
    residual = fit.slope
    if fit.basis is not None and fit.coefficients is not None:
        residual = residual - (fit.coefficients.view(-1, 1, 1, 1) * fit.basis).sum(0)
    c = (fit.tokens @ fit.tokens.mT).to(wide)
    squares = c.diagonal(dim1=1, dim2=2)
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    second = (residual.square() * (squares.unsqueeze(1) - c.square() * inverse.unsqueeze(2))).sum(2)
    total = (residual.to(fit.tokens.dtype) @ fit.tokens).to(wide)
    first = total.square().sum(2) - (total * fit.tokens).sum(2).square() * inverse
    variance = ((second - first / n.clamp(min=1)) / (n - 1).clamp(min=1)).clamp(min=0)
    others = (plan.unit_tokens[fit.unit] - 1).clamp(min=1).to(wide).unsqueeze(1)
    if share > 0:
        cliques = plan.unit_cliques[fit.unit].clamp(min=1)
        mates = (plan.unit_tokens[fit.unit] / cliques.to(wide) - 1).unsqueeze(1).clamp(min=1)
        of_token = others.square() * (1 / mates - 1 / others) * variance
    else:
        of_token = others.square() * (first / n.clamp(min=1).square() - variance / n.clamp(min=1)).clamp(min=0)
    of_token = of_token * factor[fit.positions].to(wide).square() * (n > 1)
    return of_token.sum() / (n > 1).sum().clamp(min=1) * plan.unit_tokens.sum()


def _sum_of_runs(values: Tensor, runs: _Runs) -> Tensor:
    """``[runs, ...]`` from ``[R, ...]``."""
    if isinstance(runs, int):
        return values.view(-1, runs, *values.shape[1:]).sum(1)
    of_runs: Tensor = torch.segment_reduce(values, "sum", offsets=runs, axis=0, unsafe=True)
    return of_runs
