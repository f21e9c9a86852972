// The pairwise potentials: one definition for every backend.
//
// A potential sees the product s = x_i . x_j of two transformed rows and gives psi and the part of dpsi/ds that varies
// from pair to pair (the slope); the constant part is applied once, to the finished sum (see dispersion.cpp, kappa).
// The scalar type V is float on a GPU and a pack of lanes on a CPU. V must provide, found by argument-dependent lookup
// or as a plain overload: + - * with V and float, madd(a, b, c) = a b + c, minimum, maximum, absolute, rsqrt,
// exponential, and select_less(x, bound, a, b) = x < bound ? a : b.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DK_FUNCTION __host__ __device__ __forceinline__
#else
#define DK_FUNCTION inline __attribute__((always_inline))
#endif

namespace dk {

constexpr float kPi = 3.14159265358979f;
constexpr float kInversePi = 0.318309886183791f;

template <class V>
struct Weights {
  V psi, slope;
};

template <class V>
DK_FUNCTION V clip(V s, float low, float high) {
  return minimum(maximum(s, low), high);
}

// arccos on [-1, 1], relative error below 2e-7: asin(x) = x Q(x^2) on [0, 1/2], where Q is a Chebyshev fit, and
// arccos(x) = 2 asin(sqrt((1 - x) / 2)) above.
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

// A polynomial fitted on the clamped band when the call starts; dispersion.cpp checks its error before it is used.
struct Polynomial {
  static constexpr int kMaxDegree = 24;
  int degree;
  float coefficient[kMaxDegree + 1];

  template <class V>
  DK_FUNCTION V operator()(V x) const {
    V y = madd(x, coefficient[degree], coefficient[degree - 1]);
    for (int k = degree - 2; k >= 0; --k) y = madd(y, x, coefficient[k]);
    return y;
  }
};

// psi = exp(-arccos(clip(s)) / (pi tau)), slope psi / sqrt(1 - clip(s)^2), kappa 1 / (pi tau).
struct AngularSpread {
  static constexpr bool kExponential = true;
  float low, high, inverse_pi_tau;

  template <class V>
  DK_FUNCTION V exponent(V s, V, V) const {
    return arccos(clip(s, low, high)) * -inverse_pi_tau;
  }
  template <class V>
  DK_FUNCTION Weights<V> weigh(V s, V q_i, V q_j, float shift) const {
    const V c = clip(s, low, high);
    const V psi = exponential(exponent(s, q_i, q_j) - shift);
    return {psi, psi * rsqrt(madd(c * -1.0f, c, 1.0f))};
  }
};

// The same with exp(0.5 / tau) psi as a polynomial in s: the fixed shift is -0.5 / tau.
struct AngularSpreadFit {
  static constexpr bool kExponential = false;
  float low, high;
  Polynomial scaled_psi;

  template <class V>
  DK_FUNCTION Weights<V> weigh(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V psi = scaled_psi(c);
    return {psi, psi * rsqrt(madd(c * -1.0f, c, 1.0f))};
  }
};

// psi = max(0, margin - D)^2 with D = arccos(clip(s)) / pi, slope max(0, margin - D) / sqrt(1 - clip(s)^2), kappa 2 /
// pi.
struct Orthogonalization {
  static constexpr bool kExponential = false;
  float low, high, margin;

  template <class V>
  DK_FUNCTION Weights<V> weigh(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V excess = maximum(madd(arccos(c), -kInversePi, margin), 0.0f);
    return {excess * excess, excess * rsqrt(madd(c * -1.0f, c, 1.0f))};
  }
};

// The same with margin - D as a polynomial in s.
struct OrthogonalizationFit {
  static constexpr bool kExponential = false;
  float low, high;
  Polynomial excess_angle;

  template <class V>
  DK_FUNCTION Weights<V> weigh(V s, V, V, float) const {
    const V c = clip(s, low, high);
    const V excess = maximum(excess_angle(c), 0.0f);
    return {excess * excess, excess * rsqrt(madd(c * -1.0f, c, 1.0f))};
  }
};

// psi = s^2 of standardised rows of unit length (s is their correlation), slope s, kappa 2.
struct Decorrelation {
  static constexpr bool kExponential = false;

  template <class V>
  DK_FUNCTION Weights<V> weigh(V s, V, V, float) const {
    return {s * s, s};
  }
};

// psi = exp(-a |x_i - x_j|^2) of uniformity (unit rows), l2_repel and dispersive_l2, slope psi, kappa 2 a.
// q = a |x|^2 comes scaled by a; rounding must not make a distance negative.
struct Gaussian {
  static constexpr bool kExponential = true;
  float twice_a;

  template <class V>
  DK_FUNCTION V exponent(V s, V q_i, V q_j) const {
    return minimum(madd(s, twice_a, q_i * -1.0f) - q_j, 0.0f);
  }
  template <class V>
  DK_FUNCTION Weights<V> weigh(V s, V q_i, V q_j, float shift) const {
    const V psi = exponential(exponent(s, q_i, q_j) - shift);
    return {psi, psi};
  }
};

}  // namespace dk
