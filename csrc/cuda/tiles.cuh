// The common part of all kernels over pairs of tokens: potentials made from their four numbers, pair ids, and tiles of
// tokens on their way to the tensor cores.
//
// A *row* is one sequence of L tokens of one layer: row r is batch r % batch of layer r / batch. Similarities are
// products of the raw tokens; the inverse norms are multiplied in by the epilogue, in fp32. Tokens of a tile beyond L
// are read as token L - 1 and masked in the epilogue.
#pragma once

#include <float.h>
#include <limits.h>

#include "../scalar.h"
// after scalar.h, whose functions it calls
#include "../potentials.h"
#include "kernels.h"
#include "ptx.cuh"

namespace dk {

// Largest exponent of an empty set of pairs: less than any exponent, and finite.
constexpr float kNoExponent = -FLT_MAX;

// ---- potentials

// Gaussian, but with slope 0 between equal tokens: the slope would multiply x_i - x_j, which rounding makes nonzero,
// and the slopes of other pairs may be far smaller. The sum of the scaled squares of two tokens is q_i + q_j +
// `common`.
struct DistinctGaussian {
  static constexpr bool kExponential = true;
  float twice_a, common, resolution;

  // The exponent without the shift; 0 for equal tokens alone, which evaluate() recognises by it: a predicate per pair
  // would take registers.
  DK_DEVICE float unshifted(float s, float q_i, float q_j) const {
    const float q_sum = (q_i + common) + q_j, e = fmaf(s, twice_a, -q_sum);
    return q_i == q_j && e >= -resolution * q_sum ? 0.0f : fminf(e, -1e-37f);
  }
  DK_DEVICE float exponent(float s, float q_i, float q_j, float shift) const {
    return unshifted(s, q_i, q_j) - shift;
  }
  DK_DEVICE Weights<float> evaluate(float s, float q_i, float q_j, float shift) const {
    const float e = unshifted(s, q_i, q_j), psi = exponential(e - shift);
    return {psi, e == 0.0f ? 0.0f : psi};
  }
};

enum class Transform { kNormalize, kStandardize, kNone };

// A potential as the kernels use it. kUsesExtra: whether it reads `extra`; kCentred: whether similarities are of
// centred tokens; kLong: its arithmetic needs registers that a gradient of 256 features beside it does not leave.
template <class Potential>
struct Epilogue;

// offset(): term added to the potential's exponent; p3, or p1 for the Gaussian, in gpu/epilogues.py.
template <>
struct Epilogue<AngularSpreadNarrow> {
  static constexpr bool kUsesExtra = false, kCentred = false, kLong = false;
  static DK_DEVICE AngularSpreadNarrow potential(float p0, float p1, float p2, float) { return {p0, p1, p2}; }
  static DK_DEVICE float offset(float, float, float, float p3) { return p3; }
};
template <>
struct Epilogue<AngularSpread> {
  static constexpr bool kUsesExtra = false, kCentred = false, kLong = true;
  static DK_DEVICE AngularSpread potential(float p0, float p1, float p2, float) {
    // With clamp = 0 the slope is infinite at |c| = 1; c is clipped to the largest number below 1.
    return {fmaxf(p0, -0.99999994f), fminf(p1, 0.99999994f), p2};
  }
  // The potential's exponent has -arccos(c) = asin(c) - pi / 2 in place of asin(c).
  static DK_DEVICE float offset(float, float, float p2, float p3) { return fmaf(0.5f * kPi, p2, p3); }
};
template <>
struct Epilogue<OrthogonalizationNarrow> {
  static constexpr bool kUsesExtra = false, kCentred = false, kLong = false;
  static DK_DEVICE OrthogonalizationNarrow potential(float p0, float p1, float p2, float) {
    return {p0, p1, p2 + 0.5f};
  }
  static DK_DEVICE float offset(float, float, float, float) { return 0.0f; }
};
template <>
struct Epilogue<Orthogonalization> {
  static constexpr bool kUsesExtra = false, kCentred = false, kLong = true;
  static DK_DEVICE Orthogonalization potential(float p0, float p1, float p2, float) {
    return {fmaxf(p0, -0.99999994f), fminf(p1, 0.99999994f), p2 + 0.5f};
  }
  static DK_DEVICE float offset(float, float, float, float) { return 0.0f; }
};
template <>
struct Epilogue<Decorrelation> {
  static constexpr bool kUsesExtra = true, kCentred = true, kLong = false;
  static DK_DEVICE Decorrelation potential(float, float, float, float) { return {}; }
  static DK_DEVICE float offset(float, float, float, float) { return 0.0f; }
};
template <>
struct Epilogue<DistinctGaussian> {
  static constexpr bool kUsesExtra = true, kCentred = false, kLong = false;
  static DK_DEVICE DistinctGaussian potential(float p0, float, float p2, float p3) { return {p0, p2, p3}; }
  static DK_DEVICE float offset(float, float p1, float, float) { return p1; }
};

// Similarity of two tokens from the product of their features.
template <class Potential>
DK_DEVICE float similarity(float product, float inverse_i, float inverse_j, float extra_i, float extra_j) {
  if (Epilogue<Potential>::kCentred) product = fmaf(-extra_i, extra_j, product);
  return product * inverse_i * inverse_j;
}

// ---- pair ids: tokens of equal ids pair; beyond the last token, and for a token without partners, the id differs
// between the row side (-2) and the column side (-1)

DK_DEVICE int row_pair_id(const int* pair_ids, int token, int length) {
  if (token >= length) return -2;
  if (pair_ids == nullptr) return 0;
  const int pair_id = pair_ids[token];
  return pair_id < 0 ? -2 : pair_id;
}

DK_DEVICE int column_pair_id(const int* pair_ids, int token, int length) {
  if (token >= length) return -1;
  if (pair_ids == nullptr) return 0;
  const int pair_id = pair_ids[token];
  return pair_id < 0 ? -1 : pair_id;
}

// ---- tiles of tokens

// Copies kRowBytes bytes of features, from `first_byte` on, of kTokens tokens to a panel; zeros beyond the last
// feature.
template <int kTokens, int kRowBytes, int kThreads>
DK_DEVICE void copy_panel(uint32_t panel, const char* row, int64_t stride_bytes, int first_token, int length,
                          int first_byte, int feature_bytes) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kTokens * kChunks % kThreads == 0, "every thread copies as many chunks");
#pragma unroll
  for (int n = 0; n < kTokens * kChunks / kThreads; ++n) {
    const int place = n * kThreads + int(threadIdx.x);
    const int token = place / kChunks, chunk = place % kChunks;
    const int byte = first_byte + chunk * 16;
    const int left = min(max(feature_bytes - byte, 0), 16);
    const char* from = row + min(first_token + token, length - 1) * stride_bytes + (left > 0 ? byte : 0);
    copy_async_16(panel + panel_offset<kRowBytes>(token, chunk), from, left);
  }
}

// C += A B^T over the width of two panels, for kM blocks of 16 rows of A from `row_a` on and kN blocks of 8 rows of B
// from `row_b` on.
template <class T, int kRowBytes, int kM, int kN>
DK_DEVICE void multiply_panels(Products<T, kM, kN>& c, uint32_t panel_a, int row_a, uint32_t panel_b, int row_b) {
  static_assert(kN % 2 == 0, "blocks of 8 rows of B are read two at a time");
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int slab = 0; slab < kRowBytes / 32; ++slab) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
      load_matrices(a[m], panel_a + panel_offset<kRowBytes>(row_a + 16 * m + lane % 16, 2 * slab + lane / 16));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_matrices(b, panel_b + panel_offset<kRowBytes>(row_b + 8 * n + lane % 8 + lane / 16 * 8,
                                                         2 * slab + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        c.add(m, n, a[m], b[0], b[1]);
        c.add(m, n + 1, a[m], b[2], b[3]);
      }
    }
  }
}

template <class Number>
DK_DEVICE Number sum_of_warp(Number x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

DK_DEVICE float largest_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

}  // namespace dk
