"""The pairwise potentials in the form that the GPU kernels take: the name of an epilogue function and four numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dispersion_kernels.potentials import (
    AngularSpread,
    Decorrelation,
    DistancePotential,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
)

_LOG2_E = math.log2(math.e)
# Least clamp of the narrow epilogues: the polynomial of arcsine_narrow is accurate up to |c| = 0.75.
_NARROW_CLAMP = 0.25
# Lower bound of 1 - c^2 in the kernels: with clamp = 0 the slope would be infinite at |c| = 1.
_LEAST_SQUARE = 2.0**-23


@dataclass(frozen=True)
class Epilogue:
    """A potential in the form that the kernels take."""

    function: str
    """Name of an epilogue: ``angular_spread``, ``angular_spread_narrow``, ``orthogonalization``,
    ``orthogonalization_narrow``, ``decorrelation`` or ``gaussian``; empty for a user's own function."""
    transform: str
    """Transform of the tokens: ``"normalize"``, ``"standardize"`` or ``"none"``."""
    exponential: bool
    """Whether ``function`` gives log2 psi in place of psi."""
    p: tuple[float, float, float, float]
    kappa: float
    """Constant factor of the slope."""
    eps: float = 0.0
    """Term added to the norm of a token before the token is divided by it."""
    q: float = 0.0
    """Factor q of a token's term q |x|^2 in the exponent of ``gaussian``. With ``"normalize"`` every nonzero token's
    term is q, which is in ``p``, and a zero token's own statistic subtracts q again."""
    shift: float = 0.0
    """Logarithm of the ratio of psi to the kernels' psi."""
    largest_slope: float = 1.0
    """Bound on the magnitude of the slope in the kernels' units; of psi times the slope over psi, if exponential."""
    online: bool = False
    """Whether the exponent's range exceeds that of the accumulators; its maximum is then computed first."""
    own: Any = None
    """Triton function of a user's own potential, ``(c, p0, p1, p2, p3) -> (psi, slope)``."""

    @property
    def weight_exponent(self) -> int:
        """Exponent e of the power of two that weights are multiplied by for fp16. A weight is a slope times an inverse
        norm; with inverse norms below 2, weights times 2^e stay below 2^15, and fp16 ends at 2^16."""
        return 14 - math.ceil(math.log2(self.largest_slope))


def epilogue_of(potential: Potential, features: int, narrow_range: bool) -> Epilogue:
    """Epilogue of ``potential`` for tokens with ``features`` features.

    Args:
        potential: the potential.
        features: number F of features.
        narrow_range: whether psi times an inverse norm has to fit fp16, rather than fp32.
    """
    safe = 8.0 if narrow_range else 80.0
    if isinstance(potential, AngularSpread):
        low, high = potential.exponent_range()
        online = high - low > safe
        # log psi = (asin(c) - pi / 2) / (pi tau). Unless a maximum is computed first, the middle of its range is
        # shifted to 0.
        shift = 0.0 if online else (low + high) / 2
        narrow = potential.clamp >= _NARROW_CLAMP
        return Epilogue(
            function="angular_spread_narrow" if narrow else "angular_spread",
            transform="normalize",
            exponential=True,
            p=(
                potential.clamp - 1,
                1 - potential.clamp,
                potential.slope_factor * _LOG2_E,
                (-math.pi / 2 * potential.slope_factor - shift) * _LOG2_E,
            ),
            kappa=potential.slope_factor,
            eps=potential.eps,
            shift=shift,
            largest_slope=(1.0 if online else math.exp(high - shift)) * _steepest_arccosine(potential.clamp),
            online=online,
        )
    if isinstance(potential, Orthogonalization):
        narrow = potential.clamp >= _NARROW_CLAMP
        return Epilogue(
            function="orthogonalization_narrow" if narrow else "orthogonalization",
            transform="normalize",
            exponential=False,
            p=(potential.clamp - 1, 1 - potential.clamp, potential.margin - 0.5, 0.0),
            kappa=2 / math.pi,
            eps=potential.eps,
            largest_slope=max(1.0, potential.margin) * _steepest_arccosine(potential.clamp),
        )
    if isinstance(potential, Decorrelation):
        return Epilogue("decorrelation", "standardize", False, (0.0, 0.0, 0.0, 0.0), 2.0)
    if isinstance(potential, Uniformity):
        low, high = potential.exponent_range()
        online = high - low > safe
        shift = 0.0 if online else (low + high) / 2
        return Epilogue(
            function="gaussian",
            transform="normalize",
            exponential=True,
            p=(2 * potential.t * _LOG2_E, -shift * _LOG2_E, 2 * potential.t * _LOG2_E, _resolution(features)),
            kappa=potential.slope_factor,
            q=potential.t * _LOG2_E,
            shift=shift,
            largest_slope=1.0 if online else math.exp(high - shift),
            online=online,
        )
    if isinstance(potential, DistancePotential):
        # With the diagonal the maximum of the exponent is known: 0, the exponent on the diagonal.
        return _distance_epilogue(potential.distance_scale(features), features, online=not potential.include_diagonal)
    if isinstance(potential, PerplexityEntropy):
        # P_ij (g_ij - expected_i) and its mirror: P g and expected are below log2(L) + 1 / ln 2, L below 2^24.
        return replace(_distance_epilogue(potential.sigma2, features, online=True), largest_slope=4 * (24 + _LOG2_E))
    p0, p1, p2, p3 = (*potential.params(), 0.0, 0.0, 0.0, 0.0)[:4]
    return Epilogue(
        function="",
        transform=potential.row_transform,
        exponential=False,
        p=(p0, p1, p2, p3),
        kappa=1.0,
        eps=potential.norm_eps,
        largest_slope=_largest_slope(potential) if narrow_range else 1.0,
        own=potential.triton,
    )


def slope_ratio(potential: AngularSpread) -> float:
    """Ratio of the largest slope to the smallest, or a little more."""
    low, high = potential.exponent_range()
    return math.exp(min(high - low, 700.0)) * _steepest_arccosine(potential.clamp)


def _steepest_arccosine(clamp: float) -> float:
    """Largest 1 / sqrt(1 - c^2) of a clipped cosine c."""
    return 1 / math.sqrt(max(1 - (1 - clamp) ** 2, _LEAST_SQUARE))


def _largest_slope(potential: Potential) -> float:
    """Bound on the slope of a user's own potential on [-1, 1]: the largest value on a grid, times 2 for values between
    the grid's points."""
    slope = potential.slope(torch.linspace(-1, 1, 1025, dtype=torch.float64, device="cpu")).abs()
    largest = float(slope[slope.isfinite()].amax()) if slope.isfinite().any() else 1.0
    return 2 * max(largest, 2.0**-10)


def _distance_epilogue(scale: float, features: int, online: bool) -> Epilogue:
    """Epilogue of psi = exp(-|z_i - z_j|^2 / scale)."""
    return Epilogue(
        function="gaussian",
        transform="none",
        exponential=True,
        p=(2 * _LOG2_E / scale, 0.0, 0.0, _resolution(features)),
        kappa=-2 / scale,
        q=_LOG2_E / scale,
        online=online,
    )


def _resolution(features: int) -> float:
    """Bound on the computed squared distance of equal tokens, which is rounding alone, relative to their squared norms.

    It grows with F, because tensor cores round a sum of 16-bit factors every 16 products.
    """
    return 2.0**-19 * max(1.0, features / 256)
