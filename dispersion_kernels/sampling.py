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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.cliques import Plan, Rows, equal_parts, of_sequences, plan_of, sum_of_runs
from dispersion_kernels.control_variates import (
    FIT_GROUPS,
    FIT_TOKENS,
    RANK,
    Fit,
    fit_of,
    noise_of,
    of_all_tokens,
    transformed,
)
from dispersion_kernels.native import Sampled
from dispersion_kernels.potentials import Potential
from dispersion_kernels.sweep import accumulation_dtype, loss_weight, wide_dtype

# Layers are copied together up to so many numbers in all: on a CPU fewer, for its cache.
_AT_ONCE = {"cpu": 2**21, "else": 2**25}


class Draws(NamedTuple):
    """What is random, of Y layers."""

    shuffle: Tensor
    """``[Y, B, L]`` int64: the tokens of each sequence (of all packed ones) in random order; empty where no pair is
    visited."""
    fit: Tensor
    """``[Y, groups, 1 + FIT_TOKENS]``, uniform in [0, 1): a unit each, and tokens of it. FIT_GROUPS for the
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
    groups = FIT_GROUPS * (2 if RANK < rank < features else 1)
    fit = torch.rand(count, groups, 1 + FIT_TOKENS, device=device, generator=generator)
    if share == 0:
        return Draws(fit.new_empty(count, 0, 0, dtype=torch.int64), fit)
    if device.type == "cpu":  # where sorting takes seven times as long
        orders = [torch.randperm(length, device=device, generator=generator) for _ in range(count * batch)]
        return Draws(torch.stack(orders).view(count, batch, length), fit)
    return Draws(torch.rand(count, batch, length, device=device, generator=generator).argsort(2), fit)


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
    if groups is None and cu_seqlens is None and equal_parts(share, first.shape[1]):
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
        plan = plan_of(of_part, shuffle, groups, cu_seqlens, share)
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
        return fit_of(self.layers, self.plan, self.uniform, self.potential, self.control_variate, self.rank, self.share)


def _sampled(request: Request, sampled: Sampled) -> Estimate:
    """What a kernel made of it."""
    plan = request.plan
    loss, per_pair, grad, scale, noise = sampled
    error = torch.zeros(len(request.layers), device=loss.device)
    if request.with_error and grad is not None and scale is not None:
        if noise is not None:
            unit, squares, counted = noise.unbind(2)
            squares = per_pair[plan.sequence_of_unit[unit.long()]].square() * squares
            error = _relative_error(grad, scale, of_all_tokens(squares, counted, plan))
        elif request.fit is not None:
            error = _relative_error(grad, scale, noise_of(request.fit, plan, per_pair, request.share))
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
    x, inverse, ratio, nonfinite = transformed(
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
        error = _relative_error(grad, scale, noise_of(fit, plan, per_pair, share))
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
