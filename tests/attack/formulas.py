"""The potentials pair by pair in float64, and how far rounding in another dtype may move loss and gradient.

Written from the formulas alone: distances are computed by differences, no matrix product stands for one, and the
derivative by c or by d^2 is PyTorch's of a scalar function.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
)


class Exact(NamedTuple):
    """Of one sequence."""

    loss: float
    grad: Tensor
    """``[L, F]`` float64."""
    loss_bound: float
    grad_bound: Tensor
    """``[L]``: of the largest error among a token's features."""
    in_range: bool
    """Whether no squared distance or exponent leaves the range of the dtype."""


def sequence(z: Tensor, potential: Potential, pair_ids: Tensor | None, dtype: torch.dtype) -> Exact:
    """Loss and gradient of the tokens ``[L, F]``, float64, and the bounds of an implementation that rounds c and d^2,
    computed as inner products, and exponents and weights to ``dtype``."""
    taking_part = torch.ones(z.shape[0], dtype=torch.bool)
    if pair_ids is not None:
        taking_part = (pair_ids >= 0) & ((pair_ids[:, None] == pair_ids).sum(1) > 1)
    grad, bound = torch.zeros_like(z), z.new_zeros(z.shape[0])
    tokens = z[taking_part]
    if len(tokens) < 2:
        return Exact(0.0, grad, 0.0, bound, True)
    ids = torch.zeros(len(tokens)) if pair_ids is None else pair_ids[taking_part]
    pairs = (ids[:, None] == ids) & ~torch.eye(len(tokens), dtype=torch.bool)
    loss, token_grad, weights_bound, in_range = _pairs(tokens, potential, pairs, dtype, None)
    loss_bound, grad_bound = 0.0, weights_bound
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        other_loss, other, other_bound, _ = _pairs(tokens, potential, pairs, dtype, generator)
        loss_bound = max(loss_bound, abs(other_loss - loss))
        grad_bound = torch.maximum(grad_bound, other_bound + (other - token_grad).abs().amax(1))
    grad[taking_part], bound[taking_part] = token_grad, grad_bound
    return Exact(loss, grad, loss_bound, bound, in_range)


def _pairs(
    z: Tensor, potential: Potential, pairs: Tensor, dtype: torch.dtype, generator: torch.Generator | None
) -> tuple[float, Tensor, Tensor, bool]:
    """Loss, gradient, what summing the pairs in ``dtype`` may add to it, and whether d^2 and exponents are in its
    range. With a generator c, d^2 and the exponents are rounded at random."""
    unit = torch.finfo(dtype).eps

    def rounding(like: Tensor) -> Tensor | float:
        return 0.0 if generator is None else unit * torch.randn(like.shape, dtype=torch.float64, generator=generator)

    if potential.row_transform == "none":
        squared = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()
        largest = z.abs().max().clamp(min=1e-300)
        x = (z - z.mean(0)) / largest
        squares = x.square().sum(1) * largest**2
        noise = rounding(squared)
        if generator is not None:
            noise = (noise + noise.T) * (squares[:, None] + squares)
        squared = (squared + noise).clamp(min=0).fill_diagonal_(0).requires_grad_()
        loss = _of_distances(squared, potential, pairs, z.shape[1], rounding)
        (slopes,) = torch.autograd.grad(loss, squared)
        both = slopes + slopes.T
        difference = (both.sum(1, keepdim=True) * x - both @ x) * 2 * largest
        moved = both.abs()
        if isinstance(potential, PerplexityEntropy):
            moved = _information_sizes(squared, potential, pairs)
        # What is left of a token after their mean has the rounding of the whole.
        lengths = squares.sqrt() + unit * z.norm(dim=1)
        bound = 2 * (moved @ lengths + moved.sum(1) * lengths)
        if isinstance(potential, L2Repel):
            loss = loss + potential.norm_weight * z.square().mean()
            difference = difference + 2 * potential.norm_weight / z.numel() * z
            bound = bound + (2 * potential.norm_weight / z.numel() * z).abs().amax(1)
        rate = 1 / (
            potential.sigma2 if isinstance(potential, PerplexityEntropy) else potential.distance_scale(z.shape[1])
        )
        in_range = squares.max().item() * max(1.0, rate) < 0.03 * torch.finfo(dtype).max
        return loss.item(), difference, 4 * unit * bound, in_range

    y = z - z.mean(1, keepdim=True) if isinstance(potential, Decorrelation) else z
    if isinstance(potential, Decorrelation):
        y = y.masked_fill((z == z[:, :1]).all(1, keepdim=True), 0.0)
    largest = y.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(y / largest, dim=1, keepdim=True) * largest
    divisor = norm + potential.norm_eps
    inverse = torch.where(divisor > 0, 1 / divisor, 0.0)
    x = y * inverse
    c = x @ x.T
    if generator is not None:
        # What is left of a token after its mean has the rounding of the whole.
        lengths = torch.where(norm > 0, z.norm(dim=1, keepdim=True) / norm.clamp(min=1e-300), 0.0).clamp(min=1)
        noise = rounding(c)
        c = c + (noise + noise.T) * (lengths + lengths.T)
    c.requires_grad_()
    loss = _of_cosines(c, potential, pairs, dtype, rounding, (norm > 0).squeeze(1))
    (slopes,) = torch.autograd.grad(loss, c)
    both = slopes + slopes.T
    u = both @ x
    direction = torch.where(norm > 0, y / torch.where(norm > 0, norm, 1.0), 0.0)
    ratio = torch.where(divisor > 0, norm * inverse, 0.0)
    through = u - direction * (direction * u).sum(1, keepdim=True) * ratio
    if isinstance(potential, Decorrelation):
        through = through - through.mean(1, keepdim=True)
    lengths = x.norm(dim=1)
    bound = both.abs() @ lengths
    if isinstance(potential, Uniformity):  # which may be computed by differences
        bound = bound + both.abs().sum(1) * lengths
    bound = bound * inverse.squeeze(1)
    return loss.item(), through * inverse, 4 * unit * bound, True


def _log_mean(exponent: Tensor, counted: Tensor) -> Tensor:
    return torch.logsumexp(exponent.masked_fill(~counted, -math.inf), (0, 1)) - math.log(counted.sum().item())


def _of_distances(squared: Tensor, potential: Potential, pairs: Tensor, features: int, rounding: object) -> Tensor:
    assert callable(rounding)
    if isinstance(potential, PerplexityEntropy):
        e = (-squared / potential.sigma2).masked_fill(~pairs, -math.inf)
        e = e - e.amax(1, keepdim=True).detach()
        p = torch.softmax(e * (1 + rounding(e)), 1).masked_fill(~pairs, 0.0)
        return (p * torch.log2(p + potential.eps)).sum(1).mean()
    assert isinstance(potential, L2Repel | DispersiveL2)
    scale = potential.tau * (features if isinstance(potential, DispersiveL2) else 1)
    counted = pairs | torch.eye(len(pairs), dtype=torch.bool) if potential.include_diagonal else pairs
    exponent = -squared / scale
    log_mean = _log_mean(exponent * (1 + rounding(exponent)), counted)
    return log_mean + potential.eps if isinstance(potential, L2Repel) else log_mean


def _information_sizes(squared: Tensor, potential: PerplexityEntropy, pairs: Tensor) -> Tensor:
    """``[L, L]``: the sizes of the terms P (g - sum P g) / sigma^2 of both tokens' entropies, whose difference may be
    much less."""
    p = torch.softmax((-squared.detach() / potential.sigma2).masked_fill(~pairs, -math.inf), 1)
    average = 1 / pairs.sum(1, keepdim=True)
    h = torch.log2((p + potential.eps) / (average + potential.eps))
    g = h.abs() + p / (p + potential.eps) / math.log(2)
    sizes = p * (g + (p * g).sum(1, keepdim=True)) / potential.sigma2 / len(p)
    return sizes + sizes.T


def _of_cosines(
    c: Tensor, potential: Potential, pairs: Tensor, dtype: torch.dtype, rounding: object, there: Tensor
) -> Tensor:
    assert callable(rounding)
    if isinstance(potential, Decorrelation):
        return (c.square() * pairs).sum() / pairs.sum()
    if isinstance(potential, Uniformity):
        lengths = there.double()
        squared = lengths[:, None] + lengths - 2 * c
        exponent = -potential.t * (squared + (squared.clamp(min=0) - squared).detach())
        return _log_mean(exponent * (1 + rounding(exponent)), pairs)
    assert isinstance(potential, AngularSpread | Orthogonalization)
    bound = torch.tensor(1 - potential.clamp, dtype=dtype).item()
    clipped = c.detach().clamp(-bound, bound)
    # The slope is bounded by what the dtype resolves of 1 - c^2.
    slope = -1 / (1 - clipped.square()).clamp(min=torch.finfo(dtype).eps).sqrt()
    angle = (torch.arccos(clipped) + slope * (c - c.detach())) / math.pi
    if isinstance(potential, AngularSpread):
        exponent = -angle / potential.tau
        return _log_mean(exponent * (1 + rounding(exponent)), pairs) + potential.eps
    return ((potential.margin - angle).clamp(min=0).square() * pairs).sum() / pairs.sum()
