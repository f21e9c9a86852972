"""The pairwise potentials as the GPU kernels take them: the name of an epilogue function and four numbers."""

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
# The polynomial of arcsine_narrow holds to |c| = 0.75.
_NARROW_CLAMP = 0.25
# 1 - c^2 as the kernels hold it from below, where with clamp = 0 the slope would be infinite.
_LEAST_SQUARE = 2.0**-23


@dataclass(frozen=True)
class Epilogue:
    """What the kernels need to know of a potential."""

    function: str
    """The name of an epilogue: ``angular_spread``, ``angular_spread_narrow``, ``orthogonalization``,
    ``orthogonalization_narrow``, ``decorrelation`` or ``gaussian``; empty for a user's own."""
    transform: str
    """``"normalize"``, ``"standardize"`` or ``"none"``: what of a token is compared."""
    exponential: bool
    """Whether ``function`` gives log2 psi."""
    p: tuple[float, float, float, float]
    kappa: float
    """The constant factor of the slope."""
    eps: float = 0.0
    """What is added to the norm of a token before it is divided by it."""
    q: float = 0.0
    """What a token adds to the exponent of ``gaussian``: times |x|^2, or, for ``"normalize"``, q itself, which is in
    ``p`` and which a zero token takes back."""
    shift: float = 0.0
    """psi is larger than the kernels' by exp(shift)."""
    largest_slope: float = 1.0
    """A bound on the magnitude of what ``function`` gives for the slope, times psi where it is over psi."""
    online: bool = False
    """Whether the exponent may span more than the accumulators do: its maximum is then found first."""
    own: Any = None
    """A user's own Triton function, ``(c, p0, p1, p2, p3) -> (psi, slope)``."""

    @property
    def weight_exponent(self) -> int:
        """Weights, a slope times an inverse norm, are below 2^15 times 2^e where the norms' inverses are below 2: e of
        the power of two that brings them up to there, and fp16 ends at 2^16."""
        return 14 - math.ceil(math.log2(self.largest_slope))


def epilogue_of(potential: Potential, features: int, narrow_range: bool) -> Epilogue:
    """The epilogue of ``potential`` for tokens with ``features`` features.

    ``narrow_range``: psi has to fit fp16 beside the inverse norms, and not fp32.
    """
    safe = 8.0 if narrow_range else 80.0
    if isinstance(potential, AngularSpread):
        low, high = potential.exponent_range()
        online = high - low > safe
        # log psi = (asin(c) - pi / 2) / (pi tau); without a maximum to come its middle is shifted to 0.
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
        # With the diagonal, where the exponent is 0, that is its maximum.
        return _of_distance(potential.distance_scale(features), features, online=not potential.include_diagonal)
    if isinstance(potential, PerplexityEntropy):
        # P_ij (g_ij - expected_i) and its mirror: P g and expected are below log2(L) + 1 / ln 2, L below 2^24.
        return replace(_of_distance(potential.sigma2, features, online=True), largest_slope=4 * (24 + _LOG2_E))
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


def _steepest_arccosine(clamp: float) -> float:
    """The largest 1 / sqrt(1 - c^2) of a clipped cosine."""
    return 1 / math.sqrt(max(1 - (1 - clamp) ** 2, _LEAST_SQUARE))


def _largest_slope(potential: Potential) -> float:
    """Of a user's own, on [-1, 1], with a factor of 2 for what lies between the places where it is asked."""
    slope = potential.slope(torch.linspace(-1, 1, 1025, dtype=torch.float64, device="cpu")).abs()
    largest = float(slope[slope.isfinite()].amax()) if slope.isfinite().any() else 1.0
    return 2 * max(largest, 2.0**-10)


def _of_distance(scale: float, features: int, online: bool) -> Epilogue:
    """exp(-|z_i - z_j|^2 / scale)."""
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
    """What rounding may leave of the squared distance of equal tokens, relative to their squared norms: tensor cores
    round a sum of 16-bit factors every 16 products."""
    return 2.0**-19 * max(1.0, features / 256)
