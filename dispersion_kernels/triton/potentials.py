"""The pairwise potentials as Triton functions of the similarity c of two tokens.

Each takes ``(c, q_i, q_j, shift, p0, p1, p2, p3)``, where c is a tile ``[BLOCK_M, BLOCK_N]``, q the second statistic of
its rows and columns (:func:`dispersion_kernels.triton.kernels.row_statistics_kernel`) and p four numbers, and gives
``(u, v)``: psi and its slope, or, where the :class:`Epilogue` is exponential, log2 psi less the shift (taken off before
the large part of it is rounded) and the slope over psi. Constant factors of the slope are left out
(``Epilogue.kappa``) and multiplied in once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

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


@triton.jit
def arcsine_narrow(c):
    """asin(c) for |c| <= 0.75: absolute error below 1e-7, no square root. The polynomial is a minimax fit of
    (asin(c) / c - 1) / c^2 in c^2."""
    y = c * c
    r = y * 0.17995834350585938 + -0.2181084156036377
    r = r * y + 0.1675553023815155
    r = r * y + -0.016236959025263786
    r = r * y + 0.05257529392838478
    r = r * y + 0.07434581965208054
    r = r * y + 0.16668610274791718
    return (c * y) * r + c


@triton.jit
def arcsine(c):
    """asin(c) on [-1, 1]: absolute error below 2e-7, an ulp and a half of pi/2. Above 1/2 it is pi/2 - 2 asin(sqrt((1 -
    |c|) / 2)); the root is the hardware's reciprocal one and a Newton step."""
    a = tl.abs(c)
    half = 0.5 - 0.5 * a
    inverse_root = tl.rsqrt(tl.maximum(half, 1e-30))
    root = half * inverse_root
    root += 0.5 * inverse_root * (half - root * root)
    large = a > 0.5
    x = tl.where(large, root, a)
    y = tl.where(large, half, c * c)
    r = y * 0.043730199337005615 + 0.023164859041571617
    r = r * y + 0.04570223018527031
    r = r * y + 0.07493134588003159
    r = r * y + 0.16666819155216217
    s = (x * y) * r + x
    s = tl.where(large, 1.5707963267948966 - 2.0 * s, s)
    return tl.where(c < 0, -s, s)


# p0, p1: the clip; log2 psi = p2 asin(c) + p3
@triton.jit
def angular_spread_narrow(c, q_i, q_j, shift, p0, p1, p2, p3):
    c = tl.minimum(tl.maximum(c, p0), p1)
    return arcsine_narrow(c) * p2 + (p3 - shift), tl.rsqrt(1.0 - c * c)


@triton.jit
def angular_spread(c, q_i, q_j, shift, p0, p1, p2, p3):
    c = tl.minimum(tl.maximum(c, p0), p1)
    # With clamp = 0 the slope is infinite at |c| = 1, and held at what fp32 resolves of c.
    return arcsine(c) * p2 + (p3 - shift), tl.rsqrt(tl.maximum(1.0 - c * c, 1.1920928955078125e-07))


# p0, p1: the clip; margin - D = asin(c) / pi + p2
@triton.jit
def orthogonalization_narrow(c, q_i, q_j, shift, p0, p1, p2, p3):
    c = tl.minimum(tl.maximum(c, p0), p1)
    excess = tl.maximum(arcsine_narrow(c) * 0.3183098861837907 + p2, 0.0)
    return excess * excess, excess * tl.rsqrt(1.0 - c * c)


@triton.jit
def orthogonalization(c, q_i, q_j, shift, p0, p1, p2, p3):
    c = tl.minimum(tl.maximum(c, p0), p1)
    excess = tl.maximum(arcsine(c) * 0.3183098861837907 + p2, 0.0)
    return excess * excess, excess * tl.rsqrt(tl.maximum(1.0 - c * c, 1.1920928955078125e-07))


@triton.jit
def decorrelation(c, q_i, q_j, shift, p0, p1, p2, p3):
    return c * c, c


# log2 psi = p0 c - (q_i + q_j) + p1: the same bits for (i, j) and (j, i), and no distance that rounding made negative
@triton.jit
def gaussian(c, q_i, q_j, shift, p0, p1, p2, p3):
    return tl.minimum(c * p0 - (q_i + q_j), 0.0) + (p1 - shift), 1.0


@dataclass(frozen=True)
class Epilogue:
    """What the kernels need to know of a potential."""

    function: Any
    """One of the functions above, or a user's own."""
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
    """The factor of the second statistic of a token: of |x|^2, or, for ``"normalize"``, of 1 (0 for a zero token)."""
    shift: float = 0.0
    """psi is larger than the kernels' by exp(shift)."""
    online: bool = False
    """Whether the exponent may span more than the accumulators do: its maximum is then found first."""
    own: bool = False
    """Whether ``function`` is a user's: ``(c, p0, p1, p2, p3) -> (psi, slope)``."""


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
            function=angular_spread_narrow if narrow else angular_spread,
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
            online=online,
        )
    if isinstance(potential, Orthogonalization):
        narrow = potential.clamp >= _NARROW_CLAMP
        return Epilogue(
            function=orthogonalization_narrow if narrow else orthogonalization,
            transform="normalize",
            exponential=False,
            p=(potential.clamp - 1, 1 - potential.clamp, potential.margin - 0.5, 0.0),
            kappa=2 / math.pi,
            eps=potential.eps,
        )
    if isinstance(potential, Decorrelation):
        return Epilogue(decorrelation, "standardize", False, (0.0, 0.0, 0.0, 0.0), 2.0)
    if isinstance(potential, Uniformity):
        low, high = potential.exponent_range()
        online = high - low > safe
        shift = 0.0 if online else (low + high) / 2
        return Epilogue(
            function=gaussian,
            transform="normalize",
            exponential=True,
            p=(2 * potential.t * _LOG2_E, -shift * _LOG2_E, 0.0, 0.0),
            kappa=potential.slope_factor,
            q=potential.t * _LOG2_E,
            shift=shift,
            online=online,
        )
    if isinstance(potential, DistancePotential):
        # With the diagonal, where the exponent is 0, that is its maximum.
        return _of_distance(potential.distance_scale(features), online=not potential.include_diagonal)
    if isinstance(potential, PerplexityEntropy):
        return _of_distance(potential.sigma2, online=True)
    p0, p1, p2, p3 = (*potential.params(), 0.0, 0.0, 0.0, 0.0)[:4]
    return Epilogue(
        function=type(potential).triton,
        transform=potential.row_transform,
        exponential=False,
        p=(p0, p1, p2, p3),
        kappa=1.0,
        eps=potential.norm_eps,
        own=True,
    )


def _of_distance(scale: float, online: bool) -> Epilogue:
    """exp(-|z_i - z_j|^2 / scale)."""
    return Epilogue(
        function=gaussian,
        transform="none",
        exponential=True,
        p=(2 * _LOG2_E / scale, 0.0, 0.0, 0.0),
        kappa=-2 / scale,
        q=_LOG2_E / scale,
        online=online,
    )
