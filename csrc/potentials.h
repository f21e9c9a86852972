// The pairwise potentials: one definition for every compiled backend.
//
// A potential takes the product s = x_i . x_j of two transformed rows and gives psi and the slope, the factor of
// dpsi/ds that varies from pair to pair; the constant factor, kappa (call.cpp), is applied once, to the finished sum.
// The scalar type V is float (scalar.h, included before) on a GPU and a pack of lanes (cpu/simd.h) on a CPU. V must
// provide: + - * with V and float, madd(a, b, c) = a b + c, minimum, maximum, absolute, rsqrt, select_less(x, bound, a,
// b) = x < bound ? a : b, and exponential, whose base is the one that the factors of an exponent are given for: e on a
// CPU, 2 on a GPU.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DK_FUNCTION __host__ __device__ __forceinline__
#else
#define DK_FUNCTION inline __attribute__((always_inline))
#endif

namespace dk {

constexpr float kPi = 3.14159265358979f;
constexpr float kInversePi = 0.318309886183791f;
// Lower bound of 1 - c^2 in the slope 1 / sqrt(1 - c^2): the resolution of fp32 near c = 1, where the slope would be
// infinite.
constexpr float kLeastSquare = 0x1p-23f;

template <class V>
struct Weights {
  V psi, slope;
};

template <class V>
DK_FUNCTION V clip(V s, float low, float high) {
  return minimum(maximum(s, low), high);
}

// arccos(c) on [-1, 1] with relative error below 2e-7: asin(x) = x Q(x^2) on [0, 1/2], where Q is a Chebyshev fit, and
// arccos(x) = 2 asin(sqrt((1 - x) / 2)) above 1/2.
template <class V>
DK_FUNCTION V arccos(V c) {
  const V a = absolute(c);
  const V half_angle = madd(a, -0.5f, 0.5f);
  const V y = select_less(a, 0.5f, c * c, half_angle);
  const V root = select_less(a, 0.5f, a, half_angle * rsqrt(maximum(half_angle, 1e-30f)));
  V q = madd(y, 0.0424173738f, 0.0239939996f);
  q = madd(q, y, 0.0455206356f);
  q = madd(q, y, 0.0749469669f);
  q = madd(q, y, 0.16666782f);
  q = madd(q, y, 1.0f);
  const V asine = root * q;
  const V angle = select_less(a, 0.5f, madd(asine, -1.0f, 0.5f * kPi), asine + asine);
  return select_less(c, 0.0f, madd(angle, -1.0f, kPi), angle);
}

// asin(c) for |c| <= 3/4 with absolute error below 1e-7 and no square root: a minimax fit of (asin(c) / c - 1) / c^2 as
// a polynomial in c^2.
template <class V>
DK_FUNCTION V arcsine_narrow(V c) {
  const V y = c * c;
  V r = madd(y, 0.17995834350585938f, -0.2181084156036377f);
  r = madd(r, y, 0.1675553023815155f);
  r = madd(r, y, -0.016236959025263786f);
  r = madd(r, y, 0.05257529392838478f);
  r = madd(r, y, 0.07434581965208054f);
  r = madd(r, y, 0.16668610274791718f);
  return madd(c * y, r, c);
}

// Polynomial that is fitted when a call starts.
struct Polynomial {
  static constexpr int kMaxDegree = 12;
  int degree;
  float coefficient[kMaxDegree + 1];

  template <class V>
  DK_FUNCTION V operator()(V x) const {
    V y = madd(x, coefficient[degree], coefficient[degree - 1]);
    for (int k = degree - 2; k >= 0; --k) y = madd(y, x, coefficient[k]);
    return y;
  }
};

// angular_spread: psi = exp(-arccos(clip(s)) / (pi tau)), slope psi / sqrt(1 - clip(s)^2), kappa 1 / (pi tau). The
// shift is subtracted before the large part of the exponent is rounded.
struct AngularSpread {
  static constexpr bool kExponential = true;
  float low, high, inverse_pi_tau;

  template <class V>
  DK_FUNCTION V exponent(V s, V, V, float shift) const {
    return madd(arccos(clip(s, low, high)), -inverse_pi_tau, -shift);
  }
  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V q_i, V q_j, float shift) const {
    const V c = clip(s, low, high);
    const V psi = exponential(exponent(s, q_i, q_j, shift));
    return {psi, psi * rsqrt(maximum(madd(c * -1.0f, c, 1.0f), kLeastSquare))};
  }
};

// angular_spread for bands within [-3/4, 3/4], with exp(0.5 / tau) psi in place of psi: the exponent is asin(clip(s)) /
// (pi tau).
struct AngularSpreadNarrow {
  static constexpr bool kExponential = true;
  float low, high, inverse_pi_tau;

  template <class V>
  DK_FUNCTION V exponent(V s, V, V, float shift) const {
    return madd(arcsine_narrow(clip(s, low, high)), inverse_pi_tau, -shift);
  }
  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V q_i, V q_j, float shift) const {
    const V c = clip(s, low, high);
    const V psi = exponential(exponent(s, q_i, q_j, shift));
    return {psi, psi * rsqrt(madd(c * -1.0f, c, 1.0f))};
  }
};

// angular_spread with exp(0.5 / tau) psi = exp(a / (pi tau)), a = asin(clip(s)), in place of psi, as cosh + sinh: two
// polynomials in cos a, in which both are smooth far beyond the band. The slope needs the square root in cos a anyway.
// The fixed shift is -0.5 / tau.
struct AngularSpreadFit {
  static constexpr bool kExponential = false;
  float low, high;
  Polynomial even;  // cosh(a / (pi tau))
  Polynomial odd;   // sinh(a / (pi tau)) / sin a

  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V square = madd(c * -1.0f, c, 1.0f);
    const V inverse = rsqrt(square);
    const V cosine = square * inverse;
    const V psi = madd(odd(cosine), c, even(cosine));
    return {psi, psi * inverse};
  }
};

// orthogonalization: psi = max(0, margin - D)^2 with D = arccos(clip(s)) / pi, slope max(0, margin - D) / sqrt(1 -
// clip(s)^2), kappa 2 / pi.
struct Orthogonalization {
  static constexpr bool kExponential = false;
  float low, high, margin;

  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V excess = maximum(madd(arccos(c), -kInversePi, margin), 0.0f);
    return {excess * excess, excess * rsqrt(maximum(madd(c * -1.0f, c, 1.0f), kLeastSquare))};
  }
};

// orthogonalization for bands within [-3/4, 3/4].
struct OrthogonalizationNarrow {
  static constexpr bool kExponential = false;
  float low, high, margin;

  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V excess = maximum(madd(arcsine_narrow(c), kInversePi, margin - 0.5f), 0.0f);
    return {excess * excess, excess * rsqrt(madd(c * -1.0f, c, 1.0f))};
  }
};

// orthogonalization with margin - D = margin - 1/2 + a / pi, a = asin(clip(s)), by a polynomial in cos a.
struct OrthogonalizationFit {
  static constexpr bool kExponential = false;
  float low, high, margin;
  Polynomial turns;  // a / (pi sin a)

  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V square = madd(c * -1.0f, c, 1.0f);
    const V inverse = rsqrt(square);
    const V excess = maximum(madd(turns(square * inverse), c, margin - 0.5f), 0.0f);
    return {excess * excess, excess * inverse};
  }
};

// decorrelation: psi = s^2 for standardized rows of unit length, whose product s is their correlation; slope s, kappa
// 2.
struct Decorrelation {
  static constexpr bool kExponential = false;

  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V, V, float) const {
    return {s * s, s};
  }
};

// uniformity (unit rows), l2_repel and dispersive_l2: psi = exp(-a |x_i - x_j|^2), slope psi, kappa 2 a. q = a |x|^2.
// Rounding must neither make a distance negative nor differ between (i, j) and (j, i). The distance is set to 0 where
// two tokens have the same q and a computed distance below `resolution` times q_i + q_j, which for equal tokens is the
// rounding of the products alone.
struct Gaussian {
  static constexpr bool kExponential = true;
  float twice_a, resolution;

  template <class V>
  DK_FUNCTION V exponent(V s, V q_i, V q_j, float shift) const {
    const V q_sum = q_i + q_j;
    const V e = minimum(madd(s, twice_a, q_sum * -1.0f), 0.0f);
    const V apart = maximum(absolute(q_i - q_j), madd(q_sum, -resolution, e * -1.0f));
    return select_less(apart, 1e-37f, maximum(e, 0.0f), e) - shift;
  }
  template <class V>
  DK_FUNCTION Weights<V> evaluate(V s, V q_i, V q_j, float shift) const {
    const V psi = exponential(exponent(s, q_i, q_j, shift));
    return {psi, psi};
  }
};

// perplexity_entropy, with P a softmax of Gaussian's exponents: h = log2((P + eps) / (average + eps)) and g = d(P h) /
// dP - 1 / ln 2 = h - eps / ((P + eps) ln 2). Both are finite at P = 0, so entries that are no pairs add 0. The
// constant 1 / ln 2 cancels in the gradient, because P sums to 1; with it g would lose digits where P is near its
// average. V must provide logarithm, of base 2, and division.
template <class V>
struct Information {
  V h, g;
};

template <class V>
DK_FUNCTION Information<V> information(V p, V average, float eps) {
  constexpr float kLog2E = 1.44269504088896f;
  constexpr float kTiny = 0x1p-126f;  // lower bound of P + eps: eps may be less, and P may be 0
  const V x = (p - average) / (average + eps);
  const V shifted = maximum(p + eps, kTiny);
  // log2(1 + x), as by log1p, keeps its digits where P is near its average, the logarithm of the quotient where P is
  // far below it.
  const V y = x < -0.5f ? maximum(shifted / (average + eps), kTiny) : x + 1.0f;
  const V rounded = y - 1.0f;
  const V near = rounded == 0.0f ? x * kLog2E : logarithm(y) * (x / rounded);
  const V h = x < -0.5f ? logarithm(y) : near;
  return {h, madd(eps / shifted, -kLog2E, h)};
}

}  // namespace dk
