"""The model that stands for the pairs that are not visited, fitted to those of a few random tokens, and the noise that
it leaves. :mod:`dispersion_kernels.sampling` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.cliques import Plan, may_read, select
from dispersion_kernels.potentials import ExponentialPotential, Potential
from dispersion_kernels.sweep import token_norms, transform, wide_dtype

CONTROL_VARIATES = ("auto", "none", "constant", "low_rank")
# Directions of ``low_rank``, where nothing else is said, and those of them whose products of two are features, too:
# which two, and how often each product is in the square of a sum.
RANK, SQUARED = 16, 3
_PRODUCTS, _TIMES = ((0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)), (1.0, 2.0, 2.0, 1.0, 2.0, 1.0)
# The relative error of the gradient up to which "auto" leaves it at a constant, where it can know without waiting.
GOOD_ENOUGH = 0.02
# The fit sees the pairs within this many groups of this many tokens.
FIT_GROUPS, FIT_TOKENS = 4, 32
# The fewest directions, and the most: as many as the tokens that they are found from.
RANKS = (SQUARED, FIT_GROUPS * FIT_TOKENS)


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

    def features(self, x: Tensor, layers: slice) -> Tensor:
        """phi ``[N, k]`` of tokens ``[N, F]``, as many of each of these layers."""
        if self.directions is None:
            return torch.ones_like(x[:, :1])
        directions = self.directions[layers]
        y = (x.view(directions.shape[0], -1, x.shape[1]) @ directions.mT).flatten(0, 1)
        one, other = _PRODUCTS
        return torch.cat([torch.ones_like(y[:, :1]), y, y[:, one] * y[:, other]], 1)


def fit_of(
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
    drawn = torch.cat([select(z, rows) for z, rows in zip(layers, of_layers, strict=True)])
    taking_part = None if plan.taking_part is None else plan.taking_part[positions].flatten()
    x, inverse, _, _ = transformed(drawn, potential, taking_part)
    tokens, inverse = x.unflatten(0, positions.shape), inverse.view(positions.shape)
    of_directions = tokens[:, -FIT_GROUPS:].flatten(1, 2)
    tokens, inverse, positions, unit, of_unit = (
        values[:, :FIT_GROUPS] for values in (tokens, inverse, positions, unit, of_unit)
    )
    c = tokens @ tokens.mT
    there = (positions.unsqueeze(2) != positions.unsqueeze(3)).to(x.dtype)
    number = _of_layer(there).clamp(min=1)
    similarity = c
    if isinstance(potential, ExponentialPotential) and potential.distance_rate(x.shape[1]) is not None:
        # By whose c that of two unit vectors has the distance that these have; a zero token has another.
        squares = c.diagonal(dim1=2, dim2=3)
        similarity = c + (1 - (squares.unsqueeze(2) + squares.unsqueeze(3)) / 2)
    psi, slope = potential.value(similarity), potential.slope(similarity) * there
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
    if control_variate == "auto" and may_read(x.device) and share > 0:
        others = (of_unit - 1).clamp(min=1)
        factor = (others * inverse.to(wide_dtype(x.device))).square()
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


def transformed(
    tokens: Tensor, potential: Potential, taking_part: Tensor | None, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x of tokens ``[N, F]``, 0 for those that are left out or not finite; and ``[N]``: the inverse length, its ratio
    to that of the derivative, and which are not finite."""
    norm = token_norms(tokens).squeeze(1)
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


def noise_of(fit: Fit, plan: Plan, per_pair: Tensor, share: float) -> Tensor:
    """``[Y]``: the expected square of the gradient's error, summed over all tokens, from that of the fit's tokens.
    ``per_pair`` ``[S]`` and the inverse length are what G is multiplied by."""
    others = (plan.unit_tokens[fit.unit] - 1).clamp(min=1).unsqueeze(2)
    factor = per_pair[plan.sequence_of_unit[fit.unit]].unsqueeze(2) * fit.inverse
    of_token = _noise_of_tokens(_moments(fit.residual, fit.tokens, fit.c, fit.pairs), others, plan, fit.unit, share)
    squares, counted = (others * factor).square() * of_token, fit.pairs.sum(3) > 1
    return of_all_tokens(squares.flatten(1).to(wide_dtype(squares.device)), counted.flatten(1), plan)


def _noise_of_tokens(moments: _Moments, others: Tensor, plan: Plan, unit: Tensor, share: float) -> Tensor:
    """``[Y, groups, tokens]``: the expected square of the error of G / others, where the units have ``others`` tokens
    more."""
    if share == 0:
        return moments.mean_squared
    others = others.to(moments.variance.dtype)
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


def of_all_tokens(squares: Tensor, counted: Tensor, plan: Plan) -> Tensor:
    """``[Y]``: a sum over all tokens from that over those of the fit."""
    return squares.sum(1) / counted.sum(1).clamp(min=1) * (plan.unit_tokens.sum() // squares.shape[0])
