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

The loss is log(P / n), its gradient G / P: P and G are unbiased, their logarithm and quotient biased by
about Var P / P^2, one part in the number of visited pairs.

The order is an index: no copy of the tokens is made in it. Two backends sample in their own kernels, where the rank is
RANK: the CPU's does all of it at once, unless a clique is too large for it or the exponents need a running maximum;
Triton's do all but the fit, unless the exponents need a running maximum, there are more sequences than a launch has
rows, or, on AMD's processors, psi is no exponential. The rest is :mod:`dispersion_kernels.composed`'s.

With a share of 0 no pairs but those of the fit are visited: G_i is the first sum alone, in time O(L F), or O(L F^2) at
full rank, and its bias sum_j (h_ij - slope(c_ij)) x_j.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.cliques import Plan, clique_tokens, equal_parts, of_sequences, plan_of
from dispersion_kernels.control_variates import (
    FIT_GROUPS,
    FIT_TOKENS,
    RANK,
    Fit,
    fit_of,
    noise_of,
    of_all_tokens,
)
from dispersion_kernels.native import Sampled
from dispersion_kernels.potentials import Potential
from dispersion_kernels.segments import uniform
from dispersion_kernels.sweep import accumulation_dtype, loss_weight, sum_of_tokens

# Tokens of a sequence up to which all pairs take no longer than a share of them.
_SHORT = 512


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


# What samples; None for what it leaves to the next. The noise that it does not state is that of the request's fit.
Sampler = Callable[["Request"], Sampled | None]


def visits_all(share: float, control_variate: str, z: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the shape of tokens ``[B, L, F]`` says to visit all pairs: there is none, a clique would be a whole
    sequence, or sampling saves nothing."""
    length = z.shape[1] if cu_seqlens is None else z.shape[1] // max(1, cu_seqlens.numel() - 1)
    return z.shape[0] == 0 or length <= clique_tokens(share, length) or (control_variate == "auto" and length <= _SHORT)


def draw(layers: Sequence[Tensor], share: float, rank: int, generator: torch.Generator | None) -> Draws:
    """For a share of the pairs of tokens ``[B, L, F]`` of each layer, and so many directions."""
    (batch, length, features), device, count = layers[0].shape, layers[0].device, len(layers)
    groups = FIT_GROUPS * (2 if RANK < rank < features else 1)
    fit = uniform(count, groups, 1 + FIT_TOKENS, device=device, generator=generator)
    if share == 0:
        return Draws(fit.new_empty(count, 0, 0, dtype=torch.int64), fit)
    if device.type != "cpu":
        return Draws(uniform(count, batch, length, device=device, generator=generator).argsort(2), fit)
    # On a CPU sorting takes seven times as long as this.
    if torch.compiler.is_compiling() and generator is None:
        orders = torch.ops.dispersion_kernels.permutations(count * batch, length)
    else:
        orders = _permutations(count * batch, length, generator)
    return Draws(orders.view(count, batch, length), fit)


def _permutations(count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """``[count, length]`` int64 on the CPU: random orders."""
    orders = torch.empty(count, length, dtype=torch.int64, device="cpu")
    for order in orders.unbind():
        torch.randperm(length, generator=generator, out=order)
    return orders


# An operator, because torch.compile would unroll the loop, and compile it again for every other number of sequences.
_library = torch.library.Library("dispersion_kernels", "FRAGMENT")
_library.define(
    "permutations(SymInt count, SymInt length) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
_library.impl("permutations", _permutations, "CompositeExplicitAutograd")


@torch.library.register_fake("dispersion_kernels::permutations")
def _permutations_fake(count: int, length: int) -> Tensor:
    return torch.empty(count, length, dtype=torch.int64, device="cpu")


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
    samplers: Sequence[Sampler],
) -> Estimate:
    """Loss and gradient of tokens ``[B, L, F]``, alike in all layers, from a ``share`` of their pairs; ``groups`` and
    ``cu_seqlens`` as in :mod:`dispersion_kernels.segments`, None where the share is 0. Of ``samplers`` the first that
    can does it."""
    first = layers[0]
    if first.shape[2] <= min(rank, RANK):
        rank = RANK  # which span all features, in the kernels as here
    # Layers of whole sequences are one larger batch.
    whole = groups is None and cu_seqlens is None and equal_parts(share, first.shape[1]) > 0
    at_once = len(layers) if whole else 1
    grad = None
    if with_grad and at_once < len(layers):
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
        sampled = next(sampled for sampler in samplers if (sampled := sampler(request)) is not None)
        parts.append(_with_error(request, sampled))
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


def _with_error(request: Request, sampled: Sampled) -> Estimate:
    plan = request.plan
    loss, per_pair, grad, scale, noise = sampled
    error = torch.zeros(len(request.layers), dtype=torch.float32, device=loss.device)
    if request.with_error and grad is not None and scale is not None:
        if noise is not None:
            unit, squares, counted = noise.unbind(2)
            squares = per_pair[plan.sequence_of_unit[unit.long()]].square() * squares
            error = _relative_error(grad, scale, of_all_tokens(squares, counted, plan))
        elif request.fit is not None:
            error = _relative_error(grad, scale, noise_of(request.fit, plan, per_pair, request.share))
    return Estimate(loss, grad, scale, error)


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
    losses = (mean.log() + potential.loss_offset if logarithmic else mean).masked_fill(empty, 0.0)
    slope = 1 / mean if logarithmic else torch.ones_like(mean)
    loss = losses.view(len(request.layers), -1).sum(0) if request.reduction == "none" else losses.sum()
    return loss * request.weight, 2 * request.weight * slope.masked_fill(empty, 0.0) / pairs


def _relative_error(grad: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """``[Y]``: from the gradient's factors and, ``[Y]``, the square of its error."""
    of_tokens = torch.linalg.vector_norm(grad.view(-1, grad.shape[-1]), dim=1) * scale.flatten()
    squares = sum_of_tokens(of_tokens.to(noise.dtype).square().view(noise.numel(), -1))
    error: Tensor = (noise / (squares - noise).clamp(min=torch.finfo(grad.dtype).tiny)).sqrt()
    return error
