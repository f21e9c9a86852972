"""Reference of the dispersion loss: its formulas with materialised L x L matrices and the gradient by autograd.

It is the oracle of the tests (in float64) and the naive version of the benchmarks. Any device, any floating dtype;
every operation runs in the dtype of ``z``, as in published training code. Bounds of packed sequences are read on the
host.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dispersion_kernels.potentials import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
)
from dispersion_kernels.segments import check_cu_seqlens


def dispersion_loss(
    z: Tensor, potential: Potential, pair_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of each sequence, differentiable any number of times, and its number of ordered pairs.

    Args:
        z: ``[B, L, F]``; ``[1, T, F]`` with ``cu_seqlens``.
        potential: potential of the pairs.
        pair_ids: integers ``[B, L]``: tokens of a row pair where their ids are equal and not negative; None where all
            tokens pair.
        cu_seqlens: bounds ``[S + 1]`` of the packed sequences.

    Returns:
        Losses ``[B]`` or ``[S]`` in the dtype of ``z``, 0 for a sequence without a pair; and int64 numbers of pairs of
        the same shape.
    """
    if cu_seqlens is None:
        sequences = [(z[b], None if pair_ids is None else pair_ids[b]) for b in range(z.shape[0])]
    else:
        check_cu_seqlens(cu_seqlens, z.shape[1])
        bounds = cu_seqlens.tolist()
        sequences = [
            (z[0, begin:end], None if pair_ids is None else pair_ids[0, begin:end])
            for begin, end in itertools.pairwise(bounds)
        ]
    losses, counts = [], []
    for tokens, ids in sequences:
        loss, count = _sequence_loss(tokens, potential, ids)
        losses.append(loss)
        counts.append(count)
    # The sum over no token keeps the graph, and a zero gradient, where no sequence has a pair.
    stacked = torch.stack(losses) if losses else z.new_zeros(0)
    return stacked + 0 * z[:0].sum(), torch.tensor(counts, dtype=torch.int64, device=z.device)


def _sequence_loss(z: Tensor, potential: Potential, pair_ids: Tensor | None) -> tuple[Tensor, int]:
    """Loss of one sequence ``[L, F]``, and its number of ordered pairs."""
    if pair_ids is not None:
        has_partner = ((pair_ids[:, None] == pair_ids[None, :]).sum(1) > 1) & (pair_ids >= 0)
        z, pair_ids = z[has_partner], pair_ids[has_partner]
    length = z.shape[0]
    if length < 2:
        return z.new_zeros(()), 0
    left_out = torch.zeros(length, length, dtype=torch.bool, device=z.device)
    count = length * length
    if not getattr(potential, "include_diagonal", False):
        left_out = torch.eye(length, dtype=torch.bool, device=z.device)
        count -= length
    if pair_ids is not None:
        left_out = left_out | (pair_ids[:, None] != pair_ids[None, :])
        count = int((~left_out).sum())
    return _loss_over_pairs(z, potential, left_out, count), count


def _loss_over_pairs(z: Tensor, potential: Potential, left_out: Tensor, count: int) -> Tensor:
    """Loss over the ``count`` entries of the L x L matrices where ``left_out`` is False."""

    def log_mean_exp(exponent: Tensor) -> Tensor:
        """log(mean(exp(exponent))) + loss_offset, finite wherever the exponents are."""
        log_sum = torch.logsumexp(exponent.masked_fill(left_out, -math.inf), (0, 1))
        return log_sum - math.log(count) + potential.loss_offset

    def mean(psi: Tensor) -> Tensor:
        return psi.masked_fill(left_out, 0.0).sum() / count

    if isinstance(potential, PerplexityEntropy):
        p = torch.softmax((-_squared_distances(z) / potential.sigma2).masked_fill(left_out, -math.inf), dim=1)
        tiny = torch.finfo(p.dtype).tiny  # bounds the logarithm where P is 0 and eps underflows in the dtype
        return (p * torch.log2((p + potential.eps).clamp(min=tiny))).sum(1).mean()
    if isinstance(potential, L2Repel):
        penalty = potential.norm_weight * z.square().mean()
        return log_mean_exp(-_squared_distances(z) / potential.tau) + penalty
    if isinstance(potential, DispersiveL2):
        return log_mean_exp(-_squared_distances(z) / (z.shape[1] * potential.tau))
    if isinstance(potential, Uniformity):
        return log_mean_exp(-potential.t * _squared_distances(_normalize(z, 0.0)))
    if isinstance(potential, Decorrelation):
        x = _standardize(z)
        return mean((x @ x.T).square())

    x = _normalize(z, potential.norm_eps) if potential.row_transform == "normalize" else _standardize(z)
    # A token with itself has c = 1, where the slope of arccos is infinite, and 0 times infinity is NaN.
    c = (x @ x.T).masked_fill(left_out, 0.0)
    if isinstance(potential, AngularSpread):
        return log_mean_exp(-_clipped_angle(c, potential.clamp) / (math.pi * potential.tau))
    if isinstance(potential, Orthogonalization):
        angle = _clipped_angle(c, potential.clamp) / math.pi
        return mean((potential.margin - angle).clamp(min=0).square())

    # A user-defined potential has its value in forward and its slope in backward.
    constant = c.detach()
    psi = mean(potential.value(constant) + potential.slope(constant) * (c - constant))
    return torch.log(psi) + potential.loss_offset if potential.reduction == "log_mean" else psi


def _normalize(z: Tensor, eps: float) -> Tensor:
    """z / (|z| + eps). Tokens without a normal number among their features count as zero: result 0, gradient 1 / eps
    (0 where eps is 0)."""
    # Scaling by the largest feature keeps the squares in the dtype's range wherever the norms are.
    largest = z.detach().abs().amax(1, keepdim=True)
    zero = largest < torch.finfo(z.dtype).tiny
    largest = largest.masked_fill(zero | largest.isinf(), 1.0)
    squared = (z / largest).square().sum(1, keepdim=True).masked_fill(zero, 1.0)
    norm = (squared.sqrt() * largest).masked_fill(zero, 0.0)
    # 0 * norm turns a norm beyond the dtype's range into NaN instead of a zero token.
    return z / (norm + eps).masked_fill(zero, eps or math.inf) + 0 * norm


def _standardize(z: Tensor) -> Tensor:
    """(z - mean) / (std sqrt(F - 1)): standardised tokens of length 1, so that x_i . x_j is the correlation
    c_ij / (F - 1). Constant tokens give 0, although their rounded mean may differ from their features."""
    constant = (z == z[:, :1]).all(1, keepdim=True)
    return _normalize((z - z.mean(1, keepdim=True)).masked_fill(constant, 0.0), 0.0)


def _squared_distances(z: Tensor) -> Tensor:
    """Squared distances ``[L, L]`` from the inner products of the centred tokens. Centring changes neither distances
    nor derivatives and reduces cancellation. The squared norms come from the same matrix product, so that their
    rounding cancels for a token with itself or an equal one."""
    x = z - z.detach().mean(0, keepdim=True)
    products = x @ x.T
    squared = x.square().sum(1)
    squared = squared + (products.diagonal() - squared).detach()
    return (squared[:, None] + squared[None, :] - 2 * products).clamp(min=0)


def _clipped_angle(c: Tensor, clamp: float) -> Tensor:
    """arccos(clip(c)), straight-through: outside the band the slope is that at the boundary. 1 - clip(c)^2 is bounded
    below by the dtype's eps, its resolution of c near 1, because the slope is infinite at 0."""
    bounded = max(clamp, torch.finfo(c.dtype).eps / 2)
    angle = torch.arccos(c + (c.clamp(bounded - 1, 1 - bounded) - c).detach())
    if bounded == clamp:
        return angle
    return angle + (torch.arccos(c.clamp(clamp - 1, 1 - clamp)) - angle).detach()
