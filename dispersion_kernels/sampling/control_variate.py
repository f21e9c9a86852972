"""Control variate of sampled pairs: a model of the slope, fitted to the pairs of a few random tokens, for the pairs
that are not evaluated; with the corrected loss and the remaining noise. docs/sampling.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.numerics import statistics_dtype, token_norms, transform
from dispersion_kernels.potentials import ExponentialPotential, Potential
from dispersion_kernels.sampling.partition import Partition, select

# Number of directions of the model, and of the first directions whose pairwise products are features, too. _PRODUCTS
# has the two directions of each product, _TIMES how often the product occurs in the square of the sum.
DIRECTIONS, SQUARED = 16, 3
_PRODUCTS, _TIMES = ((0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)), (1.0, 2.0, 2.0, 1.0, 2.0, 1.0)
# Number of groups and of tokens per group whose pairs the model is fitted to.
FIT_GROUPS, FIT_TOKENS = 4, 32


@dataclass(frozen=True)
class Fit:
    """Model of one layer, and the G groups of T tokens that it is fitted to. Sums are in :func:`statistics_dtype`."""

    b: Tensor | None
    """``[k]``: coefficients of the features; None without a model."""
    directions: Tensor | None
    """``[DIRECTIONS, F]``, or ``[SQUARED, F]`` at full rank: orthonormal directions; None without a model."""
    b_of_c: Tensor | None
    """``[]``: coefficient of c itself at full rank; None otherwise."""
    psi_slope: Tensor
    """``[]``: slope of the regression line of psi on c."""
    mean_psi: Tensor
    """``[]``: mean of psi over the pairs of the fit."""
    mean_c: Tensor
    """``[]``: mean of c over the pairs of the fit."""
    tokens: Tensor
    """``[G, T, F]``: row-transformed tokens x."""
    inverse: Tensor
    """``[G, T]``: factor x / z of the row transform."""
    c: Tensor
    """``[G, T, T]``: inner products of the tokens of a group."""
    population: Tensor
    """``[G]``: population of each group."""
    pairs: Tensor
    """``[G, T, T]``: 1 for a pair of different tokens, else 0."""
    residual: Tensor
    """``[G, T, T]``: slope minus model; 0 where there is no pair."""

    def features(self, x: Tensor) -> Tensor:
        """Features phi ``[N, k]`` of row-transformed tokens ``[N, F]``."""
        assert self.directions is not None
        y = x @ self.directions.mT
        one, other = _PRODUCTS
        return torch.cat([torch.ones_like(y[:, :1]), y, y[:, one] * y[:, other]], 1)


def fit(z: Tensor, partition: Partition, uniform: Tensor, potential: Potential, control_variate: str) -> Fit:
    """Model of the slope for tokens ``z`` ``[B, L, F]``.

    ``uniform`` ``[FIT_GROUPS, 1 + FIT_TOKENS]`` holds random numbers in [0, 1): the first of a group draws its
    population, as that of a random token, and the others draw tokens of the population.
    """
    # A uniform place in the order is a uniform token for every shuffle, so that the fit is independent of the blocks.
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
        # The cosine of two unit vectors at the distance of these tokens, which differs from c for zero tokens.
        squares = c.diagonal(dim1=1, dim2=2)
        similarity = c + (1 - (squares.unsqueeze(1) + squares.unsqueeze(2)) / 2)
    psi, slope = potential.value(similarity), potential.slope(similarity) * pairs
    mean_psi, mean_c = _total(psi * pairs) / number, _total(c * pairs) / number
    # psi is centred, too, because c of nearly equal tokens varies no more than its mean is rounded.
    deviation = (c - mean_c.to(c.dtype)) * pairs
    variance = _total(deviation.square())
    covariance = _total(deviation * (psi - mean_psi.to(c.dtype)))

    directions = b = b_of_c = None
    residual = slope
    if control_variate != "none":
        # With at most DIRECTIONS features the directions span all features, so that full rank adds nothing.
        full = control_variate == "full_rank" and z.shape[2] > DIRECTIONS
        directions = _directions(tokens.flatten(0, 1), SQUARED if full else DIRECTIONS)
        y = tokens @ directions.mT
        few = y[:, :, :SQUARED]
        p, q = c if full else y @ y.mT, few @ few.mT
        basis = torch.stack([pairs, p * pairs, q * pairs, q.square() * pairs]).flatten(1)
        # Weights 1 - c^2: token i sees the part of slope x_j that is orthogonal to x_i, sqrt(1 - c^2) of its length.
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
    """Row-transformed tokens with the factors of their transform."""

    x: Tensor
    """``[N, F]``: 0 for tokens that are left out or not finite."""
    inverse: Tensor
    """``[N]``: factor x / z of the row transform."""
    ratio: Tensor
    """``[N]``: 1 / |x|; 0 where x is 0."""
    nonfinite: Tensor
    """``[N]`` boolean: tokens whose norm is not finite."""


def transformed(tokens: Tensor, potential: Potential, left_out: Tensor | None) -> Transformed:
    norm = token_norms(tokens).squeeze(1)
    nonfinite = ~norm.isfinite()
    zero = nonfinite if left_out is None else nonfinite | left_out
    x, rows = transform(tokens[None], norm.masked_fill(zero, 0.0)[None, :, None], potential, zero[None])
    assert rows is not None  # a potential of the cosine or the correlation
    return Transformed(x[0], rows.inverse[0, :, 0], rows.ratio[0, :, 0], nonfinite)


def _total(values: Tensor) -> Tensor:
    """Sum ``[]`` of all values, in :func:`statistics_dtype`."""
    return values.flatten().sum(0, dtype=statistics_dtype(values.device))


def _directions(tokens: Tensor, number: int) -> Tensor:
    """Orthonormal directions ``[number, F]`` near the principal directions of ``tokens`` ``[N, F]``; the first SQUARED
    are the nearest."""
    # One power iteration from some of the tokens, and two more for the first SQUARED.
    products = tokens @ tokens.mT
    some = products[:: len(tokens) // number][:number]
    span = torch.cat([some[:SQUARED] @ products @ products, some[SQUARED:]]) @ tokens
    span = torch.nn.functional.normalize(span, dim=1).to(statistics_dtype(tokens.device))
    # Gram-Schmidt by Cholesky; cholesky_ex does not check its result, and so does not synchronise.
    factor = torch.linalg.cholesky_ex(_regular(span @ span.mT)).L
    directions: Tensor = torch.linalg.solve_triangular(factor, span, upper=False)
    return directions.to(tokens.dtype)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solution of a symmetric positive semidefinite system: any of several, with 0 for an unknown whose row is 0."""
    diagonal = matrix.diagonal().unsqueeze(1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    solution: Tensor = torch.linalg.solve_ex(_regular(matrix * scale * scale.mT), right * scale).result
    return solution * scale


def _regular(matrix: Tensor) -> Tensor:
    """``matrix``, whose diagonal is ones, with a small ridge added in place, which makes it regular."""
    matrix.diagonal().add_(torch.finfo(matrix.dtype).eps ** 0.75)
    return matrix


def corrected_losses(
    partition: Partition, potential: Potential, mean: Tensor, missed: Tensor | None, fit: Fit | None, evaluated: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each sequence ``[S]``, and ``per_pair`` ``[S]``, the factor of ``sum_j slope(c_ij) x_j`` in the
    derivative of the loss by x_i.

    ``mean`` ``[S]`` is the mean of psi over the evaluated pairs, or over those of the fit where none is evaluated.
    ``missed`` ``[S]`` is the sum of c over all pairs minus its estimate from the evaluated pairs; None without a
    control variate.
    """
    pairs = partition.pairs.clamp(min=1).to(mean.dtype)
    logarithmic = potential.reduction == "log_mean"
    if missed is not None and fit is not None:
        corrected = mean + fit.psi_slope * (missed / pairs - (0.0 if evaluated else fit.mean_c))
        # A correction larger than the mean of psi is dropped: the line does not describe psi there.
        mean = torch.where(corrected <= 0, mean, corrected) if logarithmic else corrected
    empty = partition.pairs == 0
    losses = (mean.log() + potential.loss_offset if logarithmic else mean).masked_fill(empty, 0.0)
    return losses, (2 / pairs / (mean if logarithmic else torch.ones_like(mean))).masked_fill(empty, 0.0)


def noise(fit: Fit, partition: Partition, per_pair: Tensor, evaluated: bool) -> Tensor:
    """Expected squared error ``[]`` of the gradient, summed over all tokens, extrapolated from the fit's tokens.
    ``per_pair`` ``[S]`` is the factor of :func:`corrected_losses`."""
    # Variance and squared mean of residual_ij x_j over the partners j of i, in the directions orthogonal to x_i.
    n, total = fit.pairs.sum(2), fit.residual @ fit.tokens
    squares = fit.c.diagonal(dim1=1, dim2=2)
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    term_squares = (fit.residual.square() * (squares.unsqueeze(1) - fit.c.square() * inverse.unsqueeze(2))).sum(2)
    total_square = total.square().sum(2) - (total * fit.tokens).sum(2).square() * inverse
    variance = ((term_squares - total_square / n.clamp(min=1)) / (n - 1).clamp(min=1)).clamp(min=0) * (n > 1)
    others = (partition.tokens[fit.population] - 1).clamp(min=1).to(variance.dtype).unsqueeze(1)
    if evaluated:
        mates = (others + 1) / partition.blocks[fit.population].clamp(min=1).unsqueeze(1) - 1
        mean_noise = (1 / mates.clamp(min=1) - 1 / others) * variance
    else:
        mean_noise = (total_square / n.clamp(min=1).square() - variance / n.clamp(min=1)).clamp(min=0) * (n > 1)
    factor = others * per_pair[partition.sequence[fit.population]].unsqueeze(1) * fit.inverse
    return _total(factor.square() * mean_noise) / (n > 1).sum().clamp(min=1) * partition.tokens.sum()
