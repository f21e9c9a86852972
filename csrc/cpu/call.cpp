// The start of every call of the CPU kernel: the choice of the instruction set, and the potential with its constants.

#include "../scalar.h"  // before potentials.h

#include "call.h"

#include <math.h>

#if !defined(__aarch64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <functional>
#include <mutex>
#include <vector>

namespace dk {

// ---- the instruction set

#if !defined(__aarch64__)
namespace {

// Whether the processor has F16C, from leaf 1 of cpuid: not every Clang knows "f16c" in __builtin_cpu_supports (14 does
// not). cpuid runs once per process: in a virtual machine it traps to the hypervisor, which takes 20 us or more.
bool read_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_f16c() {
  static const bool has = read_f16c();
  return has;
}

}  // namespace
#endif

int32_t resolve_isa(int32_t requested) {
#if defined(__aarch64__)
  return requested == DK_ISA_BEST || requested == DK_ISA_NEON ? DK_ISA_NEON : 0;
#else
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (requested == DK_ISA_BEST || requested == DK_ISA_AVX512)) return DK_ISA_AVX512;
  if (avx2 && (requested == DK_ISA_BEST || requested == DK_ISA_AVX2)) return DK_ISA_AVX2;
  return 0;
#endif
}

const TileKernels& kernels_of(int32_t isa) {
#if defined(__aarch64__)
  (void)isa;
  return kNeonKernels;
#else
  return isa == DK_ISA_AVX512 ? kAvx512Kernels : kAvx2Kernels;
#endif
}

// ---- the potential with its constants

namespace {

// Chebyshev interpolation of f on [low, high]: the polynomial of the lowest degree whose error, in exact arithmetic, is
// at most `tolerance`. False if no degree up to kMaxDegree is enough.
bool fit(const std::function<double(double)>& f, double low, double high, double tolerance, Polynomial& result) {
  constexpr int kNodes = 64, kChecks = 101;
  const double pi = acos(-1.0), middle = 0.5 * (low + high), half = 0.5 * (high - low);
  double value[kNodes], chebyshev[Polynomial::kMaxDegree + 1];
  for (int i = 0; i < kNodes; ++i) value[i] = f(middle + half * cos(pi * (i + 0.5) / kNodes));
  for (int k = 0; k <= Polynomial::kMaxDegree; ++k) {
    chebyshev[k] = 0.0;
    for (int i = 0; i < kNodes; ++i) chebyshev[k] += value[i] * cos(pi * k * (i + 0.5) / kNodes);
    chebyshev[k] *= (k ? 2.0 : 1.0) / kNodes;
  }
  // Powers of x from Chebyshev polynomials of (x - middle) / half, by Clenshaw's recurrence on coefficient vectors.
  for (int degree = 1; degree <= Polynomial::kMaxDegree; ++degree) {
    std::vector<double> current(degree + 2, 0.0), next(degree + 2, 0.0);
    for (int k = degree; k >= 0; --k) {
      std::vector<double> step(degree + 2, 0.0);
      const double factor = k ? 2.0 : 1.0;
      for (int n = 0; n <= degree; ++n) {
        step[n + 1] += factor * current[n] / half;
        step[n] -= factor * current[n] * middle / half + next[n];
      }
      step[0] += chebyshev[k];
      next = current;
      current = step;
    }
    result.degree = degree;
    for (int n = 0; n <= degree; ++n) result.coefficient[n] = float(current[n]);
    bool good = true;
    for (int i = 0; i < kChecks && good; ++i) {
      const double x = low + (high - low) * i / (kChecks - 1);
      double exact = 0.0;
      for (int n = degree; n >= 0; --n) exact = exact * x + current[n];
      good = fabs(exact - f(x)) <= tolerance;
    }
    if (good) return true;
  }
  return false;
}

// Error bounds of a fit over the band, relative to |psi| + floor: kTruncation for its polynomials in exact arithmetic,
// kEvaluation for their evaluation in fp32.
constexpr double kTruncation = 2e-8, kEvaluation = 3e-7;

template <class Fit>
bool holds(const Fit& fitted, double floor, const std::function<double(double)>& psi) {
  constexpr int kChecks = 101;
  for (int i = 0; i < kChecks; ++i) {
    const float s = fitted.low + (fitted.high - fitted.low) * float(i) / float(kChecks - 1);
    const double expected = psi(s);
    const double error = fabs(fitted.evaluate(s, 0.0f, 0.0f, 0.0f).psi - expected);
    if (!(error <= kEvaluation * (fabs(expected) + floor))) return false;
  }
  return true;
}

double angle_of(double cosine) { return acos(std::min(cosine, 1.0)); }

bool make_fit(double tau, AngularSpreadFit& fitted) {
  const double rate = 1.0 / (acos(-1.0) * tau), high = fitted.high, narrowest = sqrt(1.0 - high * high);
  const double tolerance = kTruncation * exp(-rate * asin(high));
  const auto even = [&](double cosine) { return cosh(rate * angle_of(cosine)); };
  const auto odd = [&](double cosine) {
    const double angle = angle_of(cosine);
    return angle > 1e-6 ? sinh(rate * angle) / sin(angle) : rate;
  };
  return fit(even, narrowest, 1.0, tolerance, fitted.even) && fit(odd, narrowest, 1.0, tolerance, fitted.odd) &&
         holds(fitted, 0.0, [&](double s) { return exp(rate * asin(s)); });
}

bool make_fit(double margin, OrthogonalizationFit& fitted) {
  const double pi = acos(-1.0), high = fitted.high;
  const auto turns = [&](double cosine) {
    const double angle = angle_of(cosine);
    return angle > 1e-6 ? angle / (pi * sin(angle)) : 1.0 / pi;
  };
  fitted.margin = float(margin);
  return fit(turns, sqrt(1.0 - high * high), 1.0, 0.1 * kTruncation, fitted.turns) &&
         holds(fitted, 0.1, [&](double s) {
           const double excess = std::max(margin - acos(s) / pi, 0.0);
           return excess * excess;
         });
}

// The fit for the band [low, high]; false if no fit is accurate enough. The last fit is cached, because training calls
// with the same parameters every time. A band up to high = 1 has no fit: at s = 1 the cosine that the slope is divided
// by is 0.
template <class Fit>
bool cached_fit(double parameter, float low, float high, Fit& result) {
  struct Entry {
    double parameter;
    bool known = false, good = false;
    Fit fit = {};
  };
  static std::mutex mutex;
  static Entry entry;
  if (!(high < 1.0f)) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!entry.known || entry.parameter != parameter || entry.fit.high != high) {
    entry.parameter = parameter;
    entry.fit.low = low;
    entry.fit.high = high;
    entry.good = make_fit(parameter, entry.fit);
    entry.known = true;
  }
  result = entry.fit;
  return entry.good;
}

// Largest distance of an exponent from the shift that is safe in fp32: sums of exp(40) stay finite, exp(-40) is normal.
constexpr double kSafeExponent = 40.0;
// Bound on the computed squared distance of equal tokens, which is rounding alone, relative to their squared norms.
constexpr float kResolution = 0x1p-19f;

}  // namespace

bool describe(int32_t potential, const double* params, int64_t features, Job& job, Reduction& reduction) {
  const double pi = acos(-1.0);
  Potential& p = job.potential;
  p.online = p.row_sums = false;
  p.shift = 0.0f;
  job.eps = 0.0;
  job.square_factor = 0.0f;
  reduction = {true, 0.0, 1.0, false, 0.0};
  switch (potential) {
    case DK_ANGULAR_SPREAD: {
      const double tau = params[0], clamp = params[1];
      if (!(tau > 0.0 && clamp >= 0.0 && clamp < 1.0 && params[2] >= 0.0)) return false;
      job.transform = Transform::kNormalize;
      job.eps = reduction.offset = params[2];
      reduction.kappa = 1.0 / (pi * tau);
      const float low = float(clamp - 1.0), high = float(1.0 - clamp);
      p.angular_spread = {low, high, float(1.0 / (pi * tau))};
      p.kind = Potential::Kind::kAngularSpread;
      p.online = asin(1.0 - clamp) / (pi * tau) > kSafeExponent;
      if (!p.online) {
        p.shift = float(-0.5 / tau);
        if (cached_fit(tau, low, high, p.angular_spread_fit)) p.kind = Potential::Kind::kAngularSpreadFit;
      }
      return true;
    }
    case DK_ORTHOGONALIZATION: {
      const double margin = params[0], clamp = params[1];
      if (!(clamp >= 0.0 && clamp < 1.0 && params[2] >= 0.0)) return false;
      job.transform = Transform::kNormalize;
      job.eps = params[2];
      reduction.logarithm = false;
      reduction.kappa = 2.0 / pi;
      const float low = float(clamp - 1.0), high = float(1.0 - clamp);
      p.orthogonalization = {low, high, float(margin)};
      p.kind = cached_fit(margin, low, high, p.orthogonalization_fit) ? Potential::Kind::kOrthogonalizationFit
                                                                      : Potential::Kind::kOrthogonalization;
      return true;
    }
    case DK_DECORRELATION:
      job.transform = Transform::kCentredNormalize;
      reduction.logarithm = false;
      reduction.kappa = 2.0;
      p.kind = Potential::Kind::kDecorrelation;
      return true;
    case DK_UNIFORMITY:
    case DK_L2_REPEL:
    case DK_DISPERSIVE_L2: {
      if (!(params[0] > 0.0)) return false;
      double a = params[0];
      if (potential == DK_UNIFORMITY) {
        job.transform = Transform::kNormalize;
        // |x_i - x_j|^2 lies in [0, 4]. Up to this bound no shift is needed: exp(-2 kSafeExponent) is normal, too.
        p.online = 2.0 * a > kSafeExponent;
      } else {
        job.transform = Transform::kCentre;
        p.online = p.row_sums = true;
        if (potential == DK_L2_REPEL) {
          a = 1.0 / params[0];
          if (!(params[1] >= 0.0)) return false;
          reduction.offset = params[1];
          reduction.norm_weight = params[2];
          reduction.include_diagonal = params[3] != 0.0;
        } else {
          a = 1.0 / (params[0] * double(features));
          reduction.include_diagonal = params[1] != 0.0;
        }
      }
      job.square_factor = float(a);
      reduction.kappa = 2.0 * a;
      p.gaussian = {float(2.0 * a), kResolution};
      p.kind = Potential::Kind::kGaussian;
      return true;
    }
    default: return false;
  }
}

}  // namespace dk
