"""The control variate: a model of the slope, fitted to the pairs of a few random tokens, that stands for the pairs that
are not visited; the loss that it corrects, and the noise that it leaves. docs/sampling.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.numerics import token_norms, transform, wide_dtype
from dispersion_kernels.potentials import ExponentialPotential, Potential
from dispersion_kernels.sampling.partition import Partition, select

# Directions of the model, and those of them whose products of two are features, too: which two, and how often each
# product is in the square of a sum.
DIRECTIONS, SQUARED = 16, 3
_PRODUCTS, _TIMES = ((0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)), (1.0, 2.0, 2.0, 1.0, 2.0, 1.0)
# The fit sees the pairs within this many groups of this many tokens.
FIT_GROUPS, FIT_TOKENS = 4, 32


@dataclass(frozen=True)
class Fit:
    """The model of one layer, and the G groups of T tokens that it is fitted to. Sums are in :func:`wide_dtype`."""

    b: Tensor | None
    """``[k]``: coefficients of the features; None where there is no model."""
    directions: Tensor | None
    """``[DIRECTIONS, F]``; ``[SQUARED, F]`` at full rank."""
    b_of_c: Tensor | None
    """``[]``: the coefficient of c itself, at full rank."""
    psi_slope: Tensor
    """``[]``: the slope of a line through psi over c."""
    mean_psi: Tensor
    mean_c: Tensor
    tokens: Tensor
    """``[G, T, F]``: x."""
    inverse: Tensor
    """``[G, T]``: x / z."""
    c: Tensor
    """``[G, T, T]``: products of the tokens."""
    population: Tensor
    """``[G]``."""
    pairs: Tensor
    """``[G, T, T]``: 1 where there is a pair."""
    residual: Tensor
    """``[G, T, T]``: the slope less the model, 0 where there is no pair."""

    def features(self, x: Tensor) -> Tensor:
        """phi ``[N, k]`` of tokens ``[N, F]``."""
        assert self.directions is not None
        y = x @ self.directions.mT
        one, other = _PRODUCTS
        return torch.cat([torch.ones_like(y[:, :1]), y, y[:, one] * y[:, other]], 1)


def fit(z: Tensor, partition: Partition, uniform: Tensor, potential: Potential, control_variate: str) -> Fit:
    """The model of tokens ``[B, L, F]``; ``uniform`` ``[FIT_GROUPS, 1 + FIT_TOKENS]`` draws a population for each
    group, as that of a token, and tokens of it."""
    # What is a place in the order is a token that does not depend on the shuffle.
    begins, population_tokens = partition.populations[:-1], partition.tokens
    anchor = (uniform[:, 0] * population_tokens.sum()).long()
    population = (torch.searchsorted(begins.contiguous(), anchor, right=True) - 1).clamp(min=0)
    others = population_tokens[population].unsqueeze(1) - 1
    within = torch.minimum((uniform[:, 1:] * (others + 1)).long(), others.clamp(min=0))
    places = (begins[population].unsqueeze(1) + within).clamp(max=z.shape[0] * z.shape[1] - 1)
    drawn = places.flatten()
    left_out = None if partition.left_out is None else partition.left_out[drawn]
    drawn = drawn if partition.order is None else partition.order[drawn]
    rows = transformed(select(z, drawn), potential, left_out)
    tokens, inverse = rows.x.unflatten(0, places.shape), rows.inverse.view(places.shape)

    c = tokens @ tokens.mT
    pairs = (places.unsqueeze(1) != places.unsqueeze(2)).to(c.dtype)
    number = _total(pairs).clamp(min=1)
    similarity = c
    if isinstance(potential, ExponentialPotential) and potential.distance_rate(z.shape[2]) is not None:
        # By whose c that of two unit vectors has the distance that these have; a zero token has another.
        squares = c.diagonal(dim1=1, dim2=2)
        similarity = c + (1 - (squares.unsqueeze(1) + squares.unsqueeze(2)) / 2)
    psi, slope = potential.value(similarity), potential.slope(similarity) * pairs
    mean_psi, mean_c = _total(psi * pairs) / number, _total(c * pairs) / number
    # Of psi, too: of nearly equal tokens c varies as little as its mean is rounded.
    deviation = (c - mean_c.to(c.dtype)) * pairs
    variance = _total(deviation.square())
    covariance = _total(deviation * (psi - mean_psi.to(c.dtype)))

    directions = b = b_of_c = None
    residual = slope
    if control_variate != "none":
        # Up to DIRECTIONS features the directions span all of them.
        full = control_variate == "full_rank" and z.shape[2] > DIRECTIONS
        directions = _directions(tokens.flatten(0, 1), SQUARED if full else DIRECTIONS)
        y = tokens @ directions.mT
        few = y[:, :, :SQUARED]
        p, q = c if full else y @ y.mT, few @ few.mT
        basis = torch.stack([pairs, p * pairs, q * pairs, q.square() * pairs]).flatten(1)
        # Of slope x_j the token i sees what is orthogonal to it, sqrt(1 - c^2) of its length.
        weighted = basis * (pairs * (1 - c.square()).clamp(min=0)).flatten()
        solution = _solve(weighted @ basis.mT, weighted @ slope.view(-1, 1))
        residual = slope - (solution.mT @ basis).view(slope.shape)
        one, all_directions, first_few, squares = solution
        squares = squares * squares.new_tensor(_TIMES)
        if full:
            b_of_c = all_directions.squeeze(0)
            b = torch.cat([one, first_few.expand(SQUARED), squares])
        else:
            first, rest = (all_directions + first_few).expand(SQUARED), all_directions.expand(DIRECTIONS - SQUARED)
            b = torch.cat([one, first, rest, squares])
    return Fit(
        b=b,
        directions=directions,
        b_of_c=b_of_c,
        psi_slope=torch.where(variance > 0, covariance / variance, 0.0),
        mean_psi=mean_psi,
        mean_c=mean_c,
        tokens=tokens,
        inverse=inverse,
        c=c,
        population=population,
        pairs=pairs,
        residual=residual,
    )


class Transformed(NamedTuple):
    """Tokens ``[N, F]`` after the row transform."""

    x: Tensor
    """0 for tokens that are left out or not finite."""
    inverse: Tensor
    """``[N]``: x / z."""
    ratio: Tensor
    """``[N]``: 1 / |x|, or 0."""
    nonfinite: Tensor
    """``[N]`` boolean."""


def transformed(tokens: Tensor, potential: Potential, left_out: Tensor | None) -> Transformed:
    norm = token_norms(tokens).squeeze(1)
    nonfinite = ~norm.isfinite()
    zero = nonfinite if left_out is None else nonfinite | left_out
    x, rows = transform(tokens[None], norm.masked_fill(zero, 0.0)[None, :, None], potential, zero[None])
    assert rows is not None  # a potential of the cosine or the correlation
    return Transformed(x[0], rows.inverse[0, :, 0], rows.ratio[0, :, 0], nonfinite)


def _total(values: Tensor) -> Tensor:
    """``[]`` in :func:`wide_dtype`."""
    return values.flatten().sum(0, dtype=wide_dtype(values.device))


def _directions(tokens: Tensor, number: int) -> Tensor:
    """``[number, F]``, orthonormal: near the principal directions of ``tokens`` ``[N, F]``, the first nearest."""
    # Power iterations from some of the tokens: one, and two more for the first few.
    products = tokens @ tokens.mT
    some = products[:: len(tokens) // number][:number]
    span = torch.cat([some[:SQUARED] @ products @ products, some[SQUARED:]]) @ tokens
    span = torch.nn.functional.normalize(span, dim=1).to(wide_dtype(tokens.device))
    # Orthonormal by Gram and Schmidt, in the form that needs no check of what it finds, and so does not synchronise.
    factor = torch.linalg.cholesky_ex(_regular(span @ span.mT)).L
    directions: Tensor = torch.linalg.solve_triangular(factor, span, upper=False)
    return directions.to(tokens.dtype)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a symmetric system, not negative; one of them where there are many, 0 for an unknown whose row is
    0."""
    diagonal = matrix.diagonal().unsqueeze(1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    solution: Tensor = torch.linalg.solve_ex(_regular(matrix * scale * scale.mT), right * scale).result
    return solution * scale


def _regular(matrix: Tensor) -> Tensor:
    """A matrix with ones on the diagonal, made regular."""
    matrix.diagonal().add_(torch.finfo(matrix.dtype).eps ** 0.75)
    return matrix


def corrected_losses(
    partition: Partition, potential: Potential, mean: Tensor, missed: Tensor | None, fit: Fit | None, visited: bool
) -> tuple[Tensor, Tensor]:
    """The loss of each sequence, and the factor of ``sum_j slope(c_ij) x_j`` in its derivative by x_i, ``[S]``.
    ``mean`` ``[S]``: psi, of the pairs visited or of the fit. ``missed`` ``[S]``: the sum of c over all pairs, less its
    estimate from those visited; None without a control variate."""
    pairs = partition.pairs.clamp(min=1).to(mean.dtype)
    logarithmic = potential.reduction == "log_mean"
    if missed is not None and fit is not None:
        corrected = mean + fit.psi_slope * (missed / pairs - (0.0 if visited else fit.mean_c))
        # Where a correction is larger than psi itself, a line says nothing of it.
        mean = torch.where(corrected <= 0, mean, corrected) if logarithmic else corrected
    empty = partition.pairs == 0
    losses = (mean.log() + potential.loss_offset if logarithmic else mean).masked_fill(empty, 0.0)
    return losses, (2 / pairs / (mean if logarithmic else torch.ones_like(mean))).masked_fill(empty, 0.0)


def noise(fit: Fit, partition: Partition, per_pair: Tensor, visited: bool) -> Tensor:
    """``[]``: the expected square of the gradient's error, summed over all tokens, from that of the fit's tokens.
    ``per_pair`` ``[S]``: the factor of :func:`corrected_losses`."""
    # Of factor_ij x_j over the partners j of i, in what is orthogonal to x_i: the variance, and the square of the mean.
    n, total = fit.pairs.sum(2), fit.residual @ fit.tokens
    squares = fit.c.diagonal(dim1=1, dim2=2)
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    term_squares = (fit.residual.square() * (squares.unsqueeze(1) - fit.c.square() * inverse.unsqueeze(2))).sum(2)
    total_square = total.square().sum(2) - (total * fit.tokens).sum(2).square() * inverse
    variance = ((term_squares - total_square / n.clamp(min=1)) / (n - 1).clamp(min=1)).clamp(min=0) * (n > 1)
    others = (partition.tokens[fit.population] - 1).clamp(min=1).to(variance.dtype).unsqueeze(1)
    if visited:
        mates = (others + 1) / partition.blocks[fit.population].clamp(min=1).unsqueeze(1) - 1
        mean_noise = (1 / mates.clamp(min=1) - 1 / others) * variance
    else:
        mean_noise = (total_square / n.clamp(min=1).square() - variance / n.clamp(min=1)).clamp(min=0) * (n > 1)
    factor = others * per_pair[partition.sequence[fit.population]].unsqueeze(1) * fit.inverse
    return _total(factor.square() * mean_noise) / (n > 1).sum().clamp(min=1) * partition.tokens.sum()
