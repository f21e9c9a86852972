"""The pairwise potentials as Triton functions of the similarity c of two tokens.

Each function takes ``(c, q_i, q_j, shift, p0, p1, p2, p3)``, where c is a tile ``[BLOCK_M, BLOCK_N]``, q the second
statistic, ``extra``, of its rows and columns (``Statistics`` of ``gpu/launch.py``) and p four numbers. It returns
``(u, v)``: psi and its slope, or, if the ``Epilogue`` of ``gpu/epilogues.py`` is exponential, log2 psi minus the shift
(subtracted before the large part of log2 psi is rounded) and the slope over psi. Constant factors of the slope
(``Epilogue.kappa``) are left out and multiplied in once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arcsine_narrow(c):
    """asin(c) for |c| <= 0.75 with absolute error below 1e-7 and no square root: a minimax fit of
    (asin(c) / c - 1) / c^2 as a polynomial in c^2."""
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
    """asin(c) on [-1, 1] with absolute error below 2e-7, an ulp and a half of pi/2, so that the error of D = angle / pi
    is below 1e-7; the error of the approximation itself is below 1e-8. For |c| > 1/2, |asin(c)| is computed as pi/2 -
    2 asin(sqrt((1 - |c|) / 2)), with the hardware's reciprocal square root and a Newton step."""
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


# p0, p1: bounds of the clipped c; log2 psi = p2 asin(c) + p3
@triton.jit
def angular_spread_narrow(c, q_i, q_j, shift, p0, p1, p2, p3):
    c = tl.minimum(tl.maximum(c, p0), p1)
    return arcsine_narrow(c) * p2 + (p3 - shift), tl.rsqrt(1.0 - c * c)


@triton.jit
def angular_spread(c, q_i, q_j, shift, p0, p1, p2, p3):
    c = tl.minimum(tl.maximum(c, p0), p1)
    # With clamp = 0 the slope is infinite at |c| = 1; the bound 2^-23 on 1 - c^2 is the resolution of fp32 near c = 1.
    return arcsine(c) * p2 + (p3 - shift), tl.rsqrt(tl.maximum(1.0 - c * c, 1.1920928955078125e-07))


# p0, p1: bounds of the clipped c; margin - D = asin(c) / pi + p2
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


# log2 psi = p0 c - (q_i + q_j + p2) + p1, with the same bits for (i, j) and (j, i) and no distance that rounding makes
# negative. The distance is set to 0 where two tokens have the same q and a computed distance below p3 times q_i + q_j +
# p2, which for equal tokens is the rounding of the products alone. Their slope is 0, too: it would multiply x_i - x_j,
# which rounding makes nonzero, and the slopes of other pairs may be far smaller.
@triton.jit
def gaussian(c, q_i, q_j, shift, p0, p1, p2, p3):
    q_sum = (q_i + p2) + q_j
    e = tl.minimum(c * p0 - q_sum, 0.0)
    equal = (q_i == q_j) & (e + p3 * q_sum >= 0.0)
    return tl.where(equal, 0.0, e) + (p1 - shift), tl.where(equal, 0.0, 1.0)
