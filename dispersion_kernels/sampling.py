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
projections to ``rank`` directions, near the principal ones, and q that of their projections to the first SQUARED of
them; phi are 1, the components along the directions, and the products of two of the first. At full rank, where p = c,
that part of the sum is b1 (X^T X) x_i: O(L F^2), and right for tokens without principal directions, too. Directions and
coefficients are from the pairs of a few random tokens, drawn independently of the shuffle, and those of more than RANK
directions from other tokens than the coefficients: p would be too good an estimate of c on tokens it was made from. psi
has the control variate d1 c, whose mean over all pairs is known from |sum_j x_j|^2.

The loss is log(P / n + eps), its gradient G / (P + n eps): P and G are unbiased, their logarithm and quotient biased by
about Var P / P^2, one part in the number of visited pairs.

A backend sees cliques as short sequences, and the model's sums are PyTorch's. Two samplers read the tokens where they
lie instead of a copy in order, where the rank is RANK: the CPU kernel does all of it at once, unless a clique is too
large for it or the exponents need a running maximum; the Triton kernels do all but the fit, unless the exponents need a
running maximum, there are more sequences than a launch has rows, or, on AMD's processors, psi is no exponential.

With a share of 0 no pairs but those of the fit are visited: G_i is the first sum alone, in time O(L F), or O(L F^2) at
full rank, and its bias sum_j (h_ij - slope(c_ij)) x_j.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.native import Sampled
from dispersion_kernels.potentials import Potential
from dispersion_kernels.segments import order_of, segment_of_token
from dispersion_kernels.sweep import accumulation_dtype, loss_weight, transform, wide_dtype

CONTROL_VARIATES = ("auto", "none", "constant", "low_rank")
# Directions of ``low_rank``, where nothing else is said, and those of them whose products of two are features, too:
# which two, and how often each product is in the square of a sum.
RANK, SQUARED = 16, 3
_PRODUCTS, _TIMES = ((0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)), (1.0, 2.0, 2.0, 1.0, 2.0, 1.0)
# The relative error of the gradient up to which "auto" leaves it at a constant, where it can know without waiting.
GOOD_ENOUGH = 0.02
# The fit sees the pairs within this many groups of this many tokens.
_FIT_GROUPS, _FIT_TOKENS = 4, 32
# The fewest directions, and the most: as many as the tokens that they are found from.
RANKS = (SQUARED, _FIT_GROUPS * _FIT_TOKENS)
# Layers are copied together up to so many numbers in all: on a CPU fewer, for its cache.
_AT_ONCE = {"cpu": 2**21, "else": 2**25}
# The sweep of smaller cliques costs as much as that of these.
_SMALLEST_CLIQUE = 16


class Draws(NamedTuple):
    """What is random, of Y layers."""

    shuffle: Tensor
    """``[Y, B, L]`` int64: the tokens of each sequence (of all packed ones) in random order; empty where no pair is
    visited."""
    fit: Tensor
    """``[Y, groups, 1 + _FIT_TOKENS]``, uniform in [0, 1): a unit each, and tokens of it. _FIT_GROUPS for the
    coefficients, and as many more for the directions where they are from other tokens."""


class Estimate(NamedTuple):
    """What the sampled pairs give, of Y layers."""

    loss: Tensor
    """The mean over the layers of their reduced loss, ``[S]`` for "none", in any dtype; of a sequence without a pair
    0."""
    grad: Tensor | None
    """``[Y, B, L, F]``: d loss (of its sequence) / d z, but for its scale; None where it was not asked for."""
    scale: Tensor | None
    """``[Y, B, L]``."""
    error: Tensor
    """``[Y]``: the relative error of the gradient to expect; 0 where it was not asked for, or no gradient."""


# A backend's sweep of tokens ``[R, L, F]``, each row a sequence, or packed ones ``[1, N, F]`` with groups and bounds:
# the loss of each, and of its gradient the two factors, as ``autograd.py`` has them.
Sweep = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]
# A kernel that samples by itself and reads the tokens where they lie; None for what it leaves to the sweep. The noise
# that it does not state is that of the request's fit.
Sampler = Callable[["Request"], Sampled | None]


def draw(layers: Sequence[Tensor], share: float, rank: int, generator: torch.Generator | None) -> Draws:
    """For a share of the pairs of tokens ``[B, L, F]`` of each layer, and so many directions."""
    (batch, length, features), device, count = layers[0].shape, layers[0].device, len(layers)
    groups = _FIT_GROUPS * (2 if RANK < rank < features else 1)
    fit = torch.rand(count, groups, 1 + _FIT_TOKENS, device=device, generator=generator)
    if share == 0:
        return Draws(fit.new_empty(count, 0, 0, dtype=torch.int64), fit)
    if device.type == "cpu":  # where sorting takes seven times as long
        orders = [torch.randperm(length, device=device, generator=generator) for _ in range(count * batch)]
        return Draws(torch.stack(orders).view(count, batch, length), fit)
    return Draws(torch.rand(count, batch, length, device=device, generator=generator).argsort(2), fit)


def clique_tokens(share: float, length: int) -> int:
    """How many tokens a clique has at most, in sequences of ``length`` tokens."""
    return max(_SMALLEST_CLIQUE, math.ceil(share * length))


def estimate(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    draws: Draws,
    share: float,
    control_variate: str,
    rank: int,
    reduction: str,
    with_grad: bool,
    with_error: bool,
    sweep: Sweep,
    sampler: Sampler | None = None,
) -> Estimate:
    """Loss and gradient of tokens ``[B, L, F]``, alike in all layers, from a ``share`` of their pairs; ``groups`` and
    ``cu_seqlens`` as in :mod:`dispersion_kernels.segments`, None where the share is 0. Of ``sampler`` and ``sweep`` the
    first does what it can."""
    first = layers[0]
    if first.shape[2] <= min(rank, RANK):
        rank = RANK  # which span all features, in the kernels as here
    if rank != RANK:
        sampler = None
    # Layers of whole sequences are one larger batch: of any size where nothing is written but the gradient.
    at_once = 1
    if groups is None and cu_seqlens is None and _equal_parts(share, first.shape[1]):
        of_copies = _AT_ONCE["cpu" if first.is_cpu else "else"] // first.numel()
        at_once = max(1, of_copies) if sampler is None else len(layers)
    grad = scratch = None
    if at_once < len(layers):
        # New memory takes longer than what is done with it.
        if share > 0 and sampler is None:
            scratch = first.new_empty(at_once * first.shape[0] * first.shape[1], first.shape[2])
        if with_grad:
            grad = first.new_empty(len(layers), *first.shape, dtype=accumulation_dtype(first.dtype))
    parts = []
    for n in range(0, len(layers), at_once):
        of_part, shuffle = layers[n : n + at_once], draws.shuffle[n : n + at_once]
        plan = _plan(of_part, shuffle, groups, cu_seqlens, share)
        request = Request(
            layers=of_part,
            plan=plan,
            potential=potential,
            share=share,
            control_variate=control_variate,
            rank=rank,
            uniform=draws.fit[n : n + at_once] if control_variate != "none" or with_error else None,
            reduction=reduction,
            weight=loss_weight(len(layers), reduction, plan.with_pairs // len(of_part)),
            with_grad=with_grad,
            with_error=with_error,
            out=None if grad is None else grad[n : n + at_once],
        )
        sampled = None if sampler is None else sampler(request)
        parts.append(_swept(request, sweep, scratch) if sampled is None else _sampled(request, sampled))
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    return Estimate(
        torch.stack([part.loss for part in parts]).sum(0),
        grad,
        torch.cat(scales) if scales else None,
        torch.cat([part.error for part in parts]),
    )


@dataclass(frozen=True)
class Request:
    """What is asked for, of layers that are taken together."""

    layers: Sequence[Tensor]
    plan: Plan
    potential: Potential
    share: float
    control_variate: str
    rank: int
    uniform: Tensor | None
    """``Draws.fit``; None where there is nothing to fit."""
    reduction: str
    weight: float | Tensor
    """What the loss of each sequence is multiplied by."""
    with_grad: bool
    with_error: bool
    out: Tensor | None
    """``[Y, B, L, F]``: where the gradient goes; None: to new memory."""

    @functools.cached_property
    def fit(self) -> Fit | None:
        if self.uniform is None:
            return None
        return _fit(self.layers, self.plan, self.uniform, self.potential, self.control_variate, self.rank, self.share)


def _sampled(request: Request, sampled: Sampled) -> Estimate:
    """What a kernel made of it."""
    plan = request.plan
    loss, per_pair, grad, scale, noise = sampled
    error = torch.zeros(len(request.layers), device=loss.device)
    if request.with_error and grad is not None and scale is not None:
        if noise is not None:
            unit, squares, counted = noise.unbind(2)
            squares = per_pair[plan.sequence_of_unit[unit.long()]].square() * squares
            error = _relative_error(grad, scale, _of_all(squares, counted, plan))
        elif request.fit is not None:
            error = _relative_error(grad, scale, _noise(request.fit, plan, per_pair, request.share))
    return Estimate(loss, grad, scale, error)


def _swept(request: Request, sweep: Sweep, scratch: Tensor | None) -> Estimate:
    """From a sweep of the cliques. ``scratch`` ``[N or more, F]``: where the tokens go; None: to new memory."""
    layers, plan, potential, share, out = request.layers, request.plan, request.potential, request.share, request.out
    first, count, fit = layers[0], len(layers), request.fit
    rows, wide, dtype = plan.rows, wide_dtype(first.device), accumulation_dtype(first.dtype)
    tokens = _in_order(layers, plan.order, scratch)

    # The mean of psi over the pairs of each sequence: from the cliques, and from what the model has of all pairs.
    logarithmic = potential.reduction == "log_mean"
    losses = grad = scale = None
    if share > 0:
        equal = plan.bounds is None
        losses, grad, scale = sweep(rows.of(tokens) if equal else tokens.unsqueeze(0), plan.groups, plan.bounds)
        losses = losses.to(wide)
        means = losses.exp() - potential.log_eps if logarithmic else losses
        mean = sum_of_runs(plan.weight * means, plan.cliques_of_sequence)
    x, inverse, ratio, nonfinite = _transformed(
        tokens, potential, plan.taking_part, in_place=tokens.dtype == dtype and (plan.order is not None or count > 1)
    )
    sums = missed = None
    if fit is not None and fit.b is not None and rows.shape[0] > 0:
        sums = _model_sums(x, ratio, fit, fit.b, rows)
        missed = sum_of_runs(sums.products, rows.of_sequence)
    if share == 0:
        assert fit is not None
        mean = of_sequences(fit.mean_psi, plan).masked_fill(nonfinite.view(plan.pairs.numel(), -1).any(1), math.nan)
    loss, per_pair = losses_of(request, mean, missed)
    error = loss.new_zeros(count)
    if not request.with_grad:
        return Estimate(loss, None, None, error)

    if grad is None or scale is None or losses is None:
        assert sums is not None
        grad = torch.empty_like(x) if out is None else out.view(x.shape)
        scale = per_pair.to(dtype)[plan.sequence_of_row] * inverse
        sums.write_to(grad)
    else:
        grad, of_sweep = grad.flatten(0, 1), scale.flatten()
        of_clique = plan.weight * (per_pair * plan.pairs / 2)[plan.sequence_of_clique]
        if logarithmic:
            of_clique = of_clique * losses.exp()  # undoes the logarithm of a clique in its gradient
        scale = of_clique.to(dtype)[plan.clique_of_token] * of_sweep
        if sums is not None:
            # The sweep's sums are in units of their own, the same for the tokens of a clique.
            unit = (rows.of(of_sweep) / rows.of(inverse)).nan_to_num(0.0, 0.0, 0.0).amax(1).to(wide)
            unit = unit * of_clique[rows.clique] / per_pair[plan.sequence_of_clique][rows.clique]
            sums.add_to(grad, torch.where(unit > 0, 1 / unit, 0.0).to(dtype))
    if fit is not None and request.with_error:
        error = _relative_error(grad, scale, _noise(fit, plan, per_pair, share))
    if plan.order is not None:
        place = torch.empty_like(plan.order)
        place[plan.order] = torch.arange(place.numel(), device=first.device)
        # x has done its work.
        out = x if out is None else out.view(x.shape)
        grad, scale = torch.index_select(grad, 0, place, out=out), scale[place]
    return Estimate(loss, grad.view(count, *first.shape), scale.view(count, *first.shape[:2]), error)


def losses_of(request: Request, mean: Tensor, missed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss as in :class:`Estimate`, and ``[Y S]``: d loss / dx_i over sum_j slope(c_ij) x_j. ``mean`` ``[Y S]``:
    that of psi, from the pairs visited or from the fit. ``missed`` ``[Y S]``: the sum of c over all pairs less its
    estimate from those visited, for the control variate."""
    plan, potential, fit = request.plan, request.potential, request.fit
    pairs = plan.pairs.clamp(min=1).to(mean.dtype)
    logarithmic = potential.reduction == "log_mean"
    if missed is not None and fit is not None:
        missed = missed / pairs
        if request.share == 0:
            missed = missed - of_sequences(fit.mean_c, plan)
        corrected = mean + of_sequences(fit.psi_slope, plan) * missed
        # Where a correction is larger than psi itself, a line says nothing of it.
        mean = torch.where(corrected <= 0, mean, corrected) if logarithmic else corrected
    empty = plan.pairs == 0
    losses = ((mean + potential.log_eps).log() if logarithmic else mean).masked_fill(empty, 0.0)
    slope = 1 / (mean + potential.log_eps) if logarithmic else torch.ones_like(mean)
    loss = losses.view(len(request.layers), -1).sum(0) if request.reduction == "none" else losses.sum()
    return loss * request.weight, 2 * request.weight * slope.masked_fill(empty, 0.0) / pairs


def _relative_error(grad: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """``[Y]``: from the gradient's factors and, ``[Y]``, the square of its error."""
    of_tokens = torch.linalg.vector_norm(grad.view(-1, grad.shape[-1]), dim=1) * scale.flatten()
    squares = of_tokens.to(noise.dtype).square().view(noise.numel(), -1).sum(1)
    error: Tensor = (noise / (squares - noise).clamp(min=torch.finfo(grad.dtype).tiny)).sqrt()
    return error


def _of_all(squares: Tensor, counted: Tensor, plan: Plan) -> Tensor:
    """``[Y]``: a sum over all tokens from that over those of the fit."""
    return squares.sum(1) / counted.sum(1).clamp(min=1) * (plan.unit_tokens.sum() / squares.shape[0])


def of_sequences(values: Tensor, plan: Plan) -> Tensor:
    """``[Y S]`` from ``[Y]``."""
    return values.repeat_interleave(plan.pairs.numel() // values.numel())


def _transformed(
    tokens: Tensor, potential: Potential, taking_part: Tensor | None, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x of tokens ``[N, F]``, 0 for those that are left out or not finite; and ``[N]``: the inverse length, its ratio
    to that of the derivative, and which are not finite."""
    norm = torch.linalg.vector_norm(tokens, dim=1, dtype=accumulation_dtype(tokens.dtype))
    nonfinite = ~norm.isfinite()
    left_out = nonfinite if taking_part is None else nonfinite | ~taking_part
    transformed, statistics = transform(
        tokens.unsqueeze(0),
        norm.masked_fill(left_out, 0.0)[None, :, None],
        potential,
        left_out.unsqueeze(0),
        in_place=in_place,
    )
    assert statistics is not None  # a potential of the cosine or the correlation
    return transformed[0], statistics.inverse[0, :, 0], statistics.ratio[0, :, 0], nonfinite


def _in_order(layers: Sequence[Tensor], order: Tensor | None, scratch: Tensor | None) -> Tensor:
    """``[N, F]``: the tokens of all layers, one after the other: a copy, but for those of one layer as they are."""
    flat = [layer.flatten(0, 1) for layer in layers]
    if order is None:
        return flat[0] if len(flat) == 1 else torch.cat(flat)
    count, features = flat[0].shape
    tokens = flat[0].new_empty(order.numel(), features) if scratch is None else scratch[: order.numel()]
    for n, (out, of_layer) in enumerate(zip(tokens.split(count), order.split(count), strict=True)):
        torch.index_select(flat[n], 0, of_layer - n * count, out=out)
    return tokens


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


def _plan(
    layers: Sequence[Tensor], shuffle: Tensor, groups: Tensor | None, cu_seqlens: Tensor | None, share: float
) -> Plan:
    batch, length = layers[0].shape[:2]
    if groups is None and cu_seqlens is None and (cliques := _equal_parts(share, length)):
        # Kept where no stream and no graph owns memory.
        make = _kept_plan_of if layers[0].is_cpu else _plan_of
        plan = make(len(layers) * batch, length, cliques, share > 0, layers[0].device)
        if share == 0:
            return plan
        return replace(plan, order=(shuffle.flatten(0, 1) + plan.unit_begins.unsqueeze(1)).flatten())
    assert len(layers) == 1
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    size = clique_tokens(share, batch * length // max(1, sequences))
    return _ragged_cliques(groups, cu_seqlens, shuffle[0], size)


def _equal_parts(share: float, length: int) -> int:
    """Into how many cliques of the same size ``length`` tokens are cut; 0 where there is no such number near."""
    if share == 0:
        return 1
    most = max(1, length // clique_tokens(share, length))
    return next((k for k in range(most, most * 3 // 4, -1) if length % k == 0), 0)


def _plan_of(sequences: int, length: int, cliques: int, visited: bool, device: torch.device) -> Plan:
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


_kept_plan_of = functools.lru_cache(maxsize=16)(_plan_of)


def _ragged_cliques(groups: Tensor | None, cu_seqlens: Tensor | None, shuffle: Tensor, size: int) -> Plan:
    """Units of any length, each cut into the fewest cliques of at most ``size`` tokens that differ by one at most.

    On an accelerator the number of units and cliques is not read: bounds of it, known from shapes, take its place, and
    the rest are empty.
    """
    batch, length = shuffle.shape
    count, device, wide = shuffle.numel(), shuffle.device, wide_dtype(shuffle.device)
    read = _may_read(device)
    if cu_seqlens is None:
        sequences, sequence_of_row = batch, torch.arange(batch, device=device).repeat_interleave(length)
    else:
        sequences, sequence_of_row = cu_seqlens.numel() - 1, segment_of_token(cu_seqlens.to(device), count)

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


def _may_read(device: torch.device) -> bool:
    """Whether reading a value costs nothing; elsewhere it would synchronise."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Fit:
    """A model of the slope and of psi for each of Y layers, and the pairs that they are from."""

    b: Tensor | None
    """``[Y, k]``, of the features; None where there is no model."""
    directions: Tensor | None
    """``[Y, rank, F]``, of ``low_rank``; ``[Y, SQUARED, F]`` at full rank."""
    b_of_c: Tensor | None
    """``[Y]``: the coefficient of c itself, at full rank."""
    psi_slope: Tensor
    mean_psi: Tensor
    mean_c: Tensor
    """``[Y]``."""
    tokens: Tensor
    """``[Y, groups, tokens, F]``: their x."""
    inverse: Tensor
    """``[Y, groups, tokens]``: x / z."""
    c: Tensor
    """``[Y, groups, tokens, tokens]``: their products."""
    unit: Tensor
    """``[Y, groups]``."""
    pairs: Tensor
    """``[Y, groups, tokens, tokens]``: 1 where there is a pair."""
    residual: Tensor
    """What the model misses of the slope, 0 where there is no pair."""

    def features(self, x: Tensor) -> Tensor:
        """phi ``[N, k]`` of tokens ``[N, F]``."""
        if self.directions is None:
            return torch.ones_like(x[:, :1])
        y = (x.view(self.directions.shape[0], -1, x.shape[1]) @ self.directions.mT).flatten(0, 1)
        one, other = _PRODUCTS
        return torch.cat([torch.ones_like(y[:, :1]), y, y[:, one] * y[:, other]], 1)


def _fit(
    layers: Sequence[Tensor],
    plan: Plan,
    uniform: Tensor,
    potential: Potential,
    control_variate: str,
    rank: int,
    share: float,
) -> Fit:
    count, of_layer = len(layers), layers[0].shape[0] * layers[0].shape[1]
    # A group is of one unit, which is drawn as the unit of a token. What is a place in the order is a token that does
    # not depend on the shuffle.
    begins = torch.arange(count, device=uniform.device) * of_layer
    anchor = begins.unsqueeze(1) + (uniform[:, :, 0] * (plan.unit_tokens.sum() // count)).long()
    unit = (torch.searchsorted(plan.unit_begins, anchor, right=True) - 1).clamp(min=0)
    of_unit = plan.unit_tokens[unit].unsqueeze(2)
    within = torch.minimum((uniform[:, :, 1:] * of_unit).long(), (of_unit - 1).clamp(min=0))
    positions = (plan.unit_begins[unit].unsqueeze(2) + within).clamp(max=count * of_layer - 1)
    order = positions if plan.order is None else plan.order[positions]
    of_layers = (order.flatten(1) - begins.unsqueeze(1)).unbind()
    drawn = torch.cat([z.flatten(0, 1).index_select(0, rows) for z, rows in zip(layers, of_layers, strict=True)])
    taking_part = None if plan.taking_part is None else plan.taking_part[positions].flatten()
    x, inverse, _, _ = _transformed(drawn, potential, taking_part)
    tokens, inverse = x.unflatten(0, positions.shape), inverse.view(positions.shape)
    of_directions = tokens[:, -_FIT_GROUPS:].flatten(1, 2)
    tokens, inverse, positions, unit, of_unit = (
        values[:, :_FIT_GROUPS] for values in (tokens, inverse, positions, unit, of_unit)
    )
    c = tokens @ tokens.mT
    there = (positions.unsqueeze(2) != positions.unsqueeze(3)).to(x.dtype)
    number = _of_layer(there).clamp(min=1)
    psi, slope = potential.value(c), potential.slope(c) * there
    mean_psi, mean_c = _of_layer(psi * there) / number, _of_layer(c * there) / number
    # Of psi, too: of nearly equal tokens c varies as little as its mean is rounded.
    deviation = (c - mean_c.to(x.dtype).view(-1, 1, 1, 1)) * there
    of_psi = psi - mean_psi.to(x.dtype).view(-1, 1, 1, 1)
    variance = _of_layer(deviation.square())
    psi_slope = torch.where(variance > 0, _of_layer(deviation * of_psi) / variance, 0.0)

    # Of slope x_j the token i sees what is orthogonal to it, sqrt(1 - c^2) of its length.
    weight = there * (1 - c.square()).clamp(min=0)
    directions = b = b_of_c = None
    residual = slope
    if control_variate in ("constant", "auto"):
        constant = _of_layer(slope * weight) / _of_layer(weight).clamp(min=torch.finfo(x.dtype).tiny)
        b = constant.to(x.dtype).unsqueeze(1)
        residual = slope - b.view(-1, 1, 1, 1) * there
    if control_variate == "auto" and _may_read(x.device) and share > 0:
        others = (of_unit - 1).clamp(min=1)
        factor = (others * inverse).square()
        noise = _of_layer(factor * _noise_of_tokens(_moments(residual, tokens, c, there), others, plan, unit, share))
        signal = _of_layer(factor * _moments(slope, tokens, c, there).mean_squared)
        control_variate = "constant" if (noise <= GOOD_ENOUGH**2 * signal).all() else "low_rank"
    if control_variate in ("low_rank", "auto"):
        full = rank >= x.shape[1] > RANK
        directions = _directions(of_directions, SQUARED if full else rank)
        y = tokens @ directions.unsqueeze(1).mT
        few = y[:, :, :, :SQUARED]
        products = few @ few.mT
        basis = torch.stack([there, (c if full else y @ y.mT) * there, products * there, products.square() * there], 1)
        flat, weighted = basis.flatten(2), (basis * weight.unsqueeze(1)).flatten(2)
        of_basis = _solve(weighted @ flat.mT, weighted @ slope.view(count, -1, 1))
        residual = slope - (of_basis.mT @ flat).view(slope.shape)
        one, all_of_them, few_of_them, squares = of_basis.unbind(1)
        squares = squares * squares.new_tensor(_TIMES)
        if full:
            b_of_c = all_of_them.squeeze(1)
            b = torch.cat([one, few_of_them.expand(-1, SQUARED), squares], 1)
        else:
            of_few = (all_of_them + few_of_them).expand(-1, SQUARED)
            b = torch.cat([one, of_few, all_of_them.expand(-1, rank - SQUARED), squares], 1)
    return Fit(
        b=b,
        directions=directions,
        b_of_c=b_of_c,
        psi_slope=psi_slope,
        mean_psi=mean_psi,
        mean_c=mean_c,
        tokens=tokens,
        inverse=inverse,
        c=c,
        unit=unit,
        pairs=there,
        residual=residual,
    )


def _of_layer(values: Tensor) -> Tensor:
    """The sum over all dimensions but the first, in :func:`wide_dtype`."""
    return values.flatten(1).sum(1, dtype=wide_dtype(values.device))


def _directions(tokens: Tensor, rank: int) -> Tensor:
    """``[Y, rank, F]``, orthonormal: near the principal directions of ``tokens`` ``[Y, N, F]``, the first nearest."""
    # Power iterations from some of the tokens: one, and two more for the first few.
    products = tokens @ tokens.mT
    some = products[:, :: tokens.shape[1] // rank][:, :rank]
    few = some[:, :SQUARED] @ products @ products
    span = torch.cat([few, some[:, SQUARED:]], 1) @ tokens
    span = torch.nn.functional.normalize(span, dim=2).to(wide_dtype(tokens.device))
    # Orthonormal by Gram and Schmidt, in the form that needs no check of what it finds, and so does not synchronise.
    factor = torch.linalg.cholesky_ex(_regular(span @ span.mT)).L
    directions: Tensor = torch.linalg.solve_triangular(factor, span, upper=False)
    return directions.to(tokens.dtype)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solutions of symmetric systems, not negative; one of them where there are many, 0 for an unknown whose row is
    0."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    solution: Tensor = torch.linalg.solve_ex(_regular(matrix * scale * scale.mT), right * scale).result
    return solution * scale


def _regular(matrix: Tensor) -> Tensor:
    """Matrices with ones on the diagonal, made regular."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(matrix.dtype).eps ** 0.75)
    return matrix


@dataclass(frozen=True)
class _ModelSums:
    """What the model has of all pairs, less 1/p times what it has of those visited: the sum over j of h_ij x_j is the
    sum over k of b_k phi_ik T_k, and at full rank b1 (X^T X) x_i."""

    rows: Rows
    x: Tensor
    """``[R, size, F]``."""
    weighted: Tensor
    """``[R, size, k]``: b_k phi_ik."""
    missed: Tensor
    """``[R, k, F]``: T."""
    b_of_c: Tensor | None
    """``[R]``: b1, at full rank."""
    ratio: Tensor
    """``[R, size]``: of the row transform, 1 / |x|, or 0."""
    squares: Tensor
    """``[R, size]``: |x|^2."""
    own: Tensor
    """``[R, size]``: h_ii, which is among both sums and is no pair."""
    products: Tensor
    """``[R]``: the same difference of the sums of c_ij, the unit's divided among its rows."""

    def write_to(self, grad: Tensor) -> None:
        """Puts them, seen through the row transform, into ``grad``, in which nothing is."""
        out = grad.view(self.x.shape)
        torch.bmm(self.weighted, self.missed, out=out)
        if self.b_of_c is not None:
            _add_moments(out, self.x, self.b_of_c, self.rows)
        out.addcmul_(self.x, self._along(self.own, torch.linalg.vecdot(out, self.x)), value=-1)

    def add_to(self, grad: Tensor, factor: Tensor) -> None:
        """Adds them times ``factor`` ``[R]``, seen through the row transform, to the sums of the visited pairs."""
        if self.b_of_c is not None:
            of_rows = torch.empty_like(self.x)
            self.write_to(of_rows)
            if self.rows.table is None:
                grad.view(self.x.shape).addcmul_(of_rows, factor.view(-1, 1, 1))
            else:
                self.rows.add_to(grad, of_rows.mul_(factor.view(-1, 1, 1)))
            return
        weighted, own = self.weighted * factor.view(-1, 1, 1), self.own * factor.unsqueeze(1)
        along = self._along(own, (weighted.mT * (self.missed @ self.x.mT)).sum(1))
        if self.rows.table is None:
            grad.view(self.x.shape).baddbmm_(weighted, self.missed).addcmul_(self.x, along, value=-1)
        else:
            self.rows.add_to(grad, torch.bmm(weighted, self.missed).addcmul_(self.x, along, value=-1))

    def _along(self, own: Tensor, inner: Tensor) -> Tensor:
        """What to take away of x: h_ii, and what of the rest, whose product with x is ``inner``, is along it."""
        return (own + self.ratio * (inner - own * self.squares)).unsqueeze(2)


def _model_sums(x: Tensor, ratio: Tensor, fit: Fit, b: Tensor, rows: Rows) -> _ModelSums:
    wide = wide_dtype(x.device)
    phi, row_x, ratio = rows.of(fit.features(x)), rows.of(x), rows.of(ratio)
    squares = torch.where(ratio > 0, ratio.square().reciprocal(), 0.0)
    sums = phi.mT @ row_x
    of_units = sum_of_runs(sums, rows.of_unit)
    share = rows.inverse_share.to(x.dtype).view(-1, 1, 1)
    if isinstance(rows.of_unit, int):
        by_unit = sums.unflatten(0, (-1, rows.of_unit))
        share_of_unit = share.unflatten(0, (-1, rows.of_unit))
        missed = torch.addcmul(of_units.unsqueeze(1), by_unit, share_of_unit, value=-1).flatten(0, 1)
    else:
        missed = torch.addcmul(of_units[rows.unit], sums, share, value=-1)
    # phi begins with 1.
    of_row = squares.to(wide).sum(1)
    products = sums[:, 0].to(wide).square().sum(1) - of_row
    products_of_unit = of_units[:, 0].to(wide).square().sum(1) - sum_of_runs(of_row, rows.of_unit)
    number = sum_of_runs(torch.ones_like(of_row), rows.of_unit)
    rows_of_layer = phi.shape[0] // b.shape[0]
    b = b.repeat_interleave(rows_of_layer, 0)
    b_of_c = None if fit.b_of_c is None else fit.b_of_c.repeat_interleave(rows_of_layer)
    own = (phi.square() @ b.unsqueeze(2)).squeeze(2)
    if b_of_c is not None:
        own = torch.addcmul(own, b_of_c.unsqueeze(1), squares)
    return _ModelSums(
        rows=rows,
        x=row_x,
        weighted=phi * b.unsqueeze(1),
        missed=missed,
        b_of_c=b_of_c,
        ratio=ratio,
        squares=squares,
        own=own * (1 - share.squeeze(2)),
        products=(products_of_unit / number)[rows.unit] - products * rows.inverse_share,
    )


def _add_moments(out: Tensor, x: Tensor, b: Tensor, rows: Rows) -> None:
    """Adds ``b`` ``[R]`` times (X^T X) x_i, of the unit less 1/p times of the row, to ``out`` ``[R, size, F]``. Of a
    row it is (X X^T) X that is computed where that is less."""
    count, size, features = x.shape
    b = b.view(-1, 1, 1)
    share = rows.inverse_share.to(x.dtype).view(-1, 1, 1)
    if isinstance(rows.of_unit, int):
        if rows.of_unit > 1 and size < features:
            of_unit = x.view(count // rows.of_unit, -1, features)
            moments = (of_unit.mT @ of_unit).mul_(b[:: rows.of_unit])
            out.view(of_unit.shape).baddbmm_(of_unit, moments)
            out.baddbmm_((x @ x.mT).mul_(b * -share), x)
        else:
            moments = x.mT @ x
            of_units = sum_of_runs(moments, rows.of_unit).unsqueeze(1)
            moments.mul_(-share).unflatten(0, (-1, rows.of_unit)).add_(of_units)
            out.baddbmm_(x, moments.mul_(b))
        return
    # So many rows at a time that their matrices take no more memory than x.
    step = max(1, count * size // features)
    parts = [slice(n, n + step) for n in range(0, count, step)]
    of_units = x.new_zeros(rows.of_unit.numel() - 1, features, features)
    for part in parts:
        of_units += sum_of_runs(x[part].mT @ x[part], rows.of_unit.clamp(part.start, part.stop) - part.start)
    for part in parts:
        moments = of_units[rows.unit[part]]
        if size < features:
            out[part].baddbmm_((x[part] @ x[part].mT).mul_(b[part] * -share[part]), x[part])
        else:
            moments.baddbmm_(x[part].mT, x[part] * -share[part])
        out[part].baddbmm_(x[part], moments.mul_(b[part]))


def _noise(fit: Fit, plan: Plan, per_pair: Tensor, share: float) -> Tensor:
    """``[Y]``: the expected square of the gradient's error, summed over all tokens, from that of the fit's tokens.
    ``per_pair`` ``[S]`` and the inverse length are what G is multiplied by."""
    others = (plan.unit_tokens[fit.unit] - 1).clamp(min=1).unsqueeze(2)
    factor = per_pair[plan.sequence_of_unit[fit.unit]].unsqueeze(2).to(fit.inverse.dtype) * fit.inverse
    of_token = _noise_of_tokens(_moments(fit.residual, fit.tokens, fit.c, fit.pairs), others, plan, fit.unit, share)
    squares, counted = (others * factor).square() * of_token, fit.pairs.sum(3) > 1
    return _of_all(squares.flatten(1).to(wide_dtype(squares.device)), counted.flatten(1), plan)


def _noise_of_tokens(moments: _Moments, others: Tensor, plan: Plan, unit: Tensor, share: float) -> Tensor:
    """``[Y, groups, tokens]``: the expected square of the error of G / others, where the units have ``others`` tokens
    more."""
    if share == 0:
        return moments.mean_squared
    mates = (others + 1) / plan.unit_cliques[unit].clamp(min=1).unsqueeze(2) - 1
    return (1 / mates.clamp(min=1) - 1 / others) * moments.variance


class _Moments(NamedTuple):
    """Of factor_ij x_j over the partners j of i, in what is orthogonal to x_i, ``[Y, groups, tokens]``; 0 where there
    are fewer than two."""

    variance: Tensor
    mean_squared: Tensor


def _moments(factor: Tensor, tokens: Tensor, c: Tensor, pairs: Tensor) -> _Moments:
    """``factor`` ``[Y, groups, tokens, tokens]`` is 0 where there is no pair; ``c`` are the products of the tokens."""
    n = pairs.sum(3)
    squares = c.diagonal(dim1=2, dim2=3)
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    of_squares = (factor.square() * (squares.unsqueeze(2) - c.square() * inverse.unsqueeze(3))).sum(3)
    total = factor @ tokens
    of_total = total.square().sum(3) - (total * tokens).sum(3).square() * inverse
    variance = ((of_squares - of_total / n.clamp(min=1)) / (n - 1).clamp(min=1)).clamp(min=0) * (n > 1)
    mean_squared = (of_total / n.clamp(min=1).square() - variance / n.clamp(min=1)).clamp(min=0) * (n > 1)
    return _Moments(variance, mean_squared)


def sum_of_runs(values: Tensor, runs: Runs) -> Tensor:
    """``[runs, ...]`` from ``[R, ...]``."""
    if isinstance(runs, int):
        return values.view(-1, runs, *values.shape[1:]).sum(1)
    of_runs: Tensor = torch.segment_reduce(values, "sum", offsets=runs, axis=0, unsafe=True)
    return of_runs
