// Vectors of one instruction set, and the pack of lanes on which the potentials are evaluated.
//
// Included by one kernels_*.cpp per instruction set; everything is in an unnamed namespace, so that the linker cannot
// merge code that was compiled for different processors.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DK_INLINE inline __attribute__((always_inline))

namespace dk {
namespace {

// Size of a product tile, kRows x kPanel: kRows * kVectors accumulators, kVectors operands and one broadcast fill the
// registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 3, kRows = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 6, kRows = 4;
#endif
constexpr int kPanel = kLanes * kVectors;

typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t half_uvec __attribute__((vector_size(2 * kLanes)));
typedef float quad __attribute__((vector_size(16)));
typedef float octet __attribute__((vector_size(32)));

DK_INLINE vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
// Barrier against GCC's habit of loading a value again for every use where registers are scarce.
DK_INLINE vec keep_in_register(vec v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __asm__("" : "+x"(v));
#endif
  return v;
}
DK_INLINE void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
DK_INLINE vec splat(float x) { return x - vec{}; }
DK_INLINE ivec as_bits(vec v) { return (ivec)v; }
DK_INLINE vec from_bits(ivec v) { return (vec)v; }

DK_INLINE vec lane_numbers() {
  vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = float(i);
  return v;
}

// Sum over the lanes, pairwise: the halves are added, then the halves of the result, and so on.
DK_INLINE float sum(quad v) {
#if defined(__aarch64__)
  return vaddv_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v)));
#else
  v += (quad)_mm_movehl_ps(v, v);
  return v[0] + v[1];
#endif
}
DK_INLINE float sum(octet v) {
  quad halves[2];
  memcpy(halves, &v, sizeof v);
  return sum(halves[0] + halves[1]);
}
#if defined(__AVX512F__)
DK_INLINE float sum(vec v) {
  octet halves[2];
  memcpy(halves, &v, sizeof v);
  return sum(halves[0] + halves[1]);
}
#endif

DK_INLINE float largest(vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// 1 / sqrt(x): the processor's estimate, refined to the accuracy of fp32 by Newton steps.
DK_INLINE vec rsqrt(vec x) {
#if defined(__AVX512F__)
  vec y = _mm512_rsqrt14_ps(x);
  constexpr int kSteps = 1;
#elif defined(__AVX2__)
  vec y = _mm256_rsqrt_ps(x);
  constexpr int kSteps = 1;
#else
  vec y = vrsqrteq_f32(x);
  constexpr int kSteps = 2;
#endif
  for (int step = 0; step < kSteps; ++step) y += 0.5f * y * (1.0f - x * y * y);
  return y;
}

// Widening of 16-bit floats.
DK_INLINE vec load_bfloat16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vec)vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16);
#endif
}
DK_INLINE vec load_float16(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}

// Narrowing to 16-bit floats: to the nearest, ties to even; NaN stays NaN.
DK_INLINE void store_bfloat16(uint16_t* p, vec v) {
  const uvec bits = (uvec)as_bits(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uvec kept = v == v ? rounded : (bits >> 16) | 0x40;
  const half_uvec narrow = __builtin_convertvector(kept, half_uvec);
  memcpy(p, &narrow, sizeof narrow);
}
DK_INLINE void store_float16(uint16_t* p, vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#endif
}

// In-place transpose of a 4 x 4 matrix.
DK_INLINE void transpose(quad& a, quad& b, quad& c, quad& d) {
#if defined(__aarch64__)
  const float32x4x2_t ab = vtrnq_f32(a, b), cd = vtrnq_f32(c, d);
  a = vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
  b = vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
  c = vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
  d = vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
#else
  _MM_TRANSPOSE4_PS(a, b, c, d);
#endif
}

// One row of a panel: the scalar type V of the potentials.
struct Pack {
  vec v[kVectors];
};

#define DK_FOR_VECTORS for (int n = 0; n < kVectors; ++n)

DK_INLINE Pack splat_pack(float x) {
  Pack r;
  DK_FOR_VECTORS r.v[n] = splat(x);
  return r;
}
DK_INLINE Pack load_pack(const float* p) {
  Pack r;
  DK_FOR_VECTORS r.v[n] = load(p + n * kLanes);
  return r;
}
DK_INLINE void store_pack(float* p, const Pack& a) { DK_FOR_VECTORS store(p + n * kLanes, a.v[n]); }

DK_INLINE Pack operator+(Pack a, const Pack& b) {
  DK_FOR_VECTORS a.v[n] += b.v[n];
  return a;
}
DK_INLINE Pack operator-(Pack a, const Pack& b) {
  DK_FOR_VECTORS a.v[n] -= b.v[n];
  return a;
}
DK_INLINE Pack operator-(Pack a, float b) {
  DK_FOR_VECTORS a.v[n] -= b;
  return a;
}
DK_INLINE Pack operator*(Pack a, const Pack& b) {
  DK_FOR_VECTORS a.v[n] *= b.v[n];
  return a;
}
DK_INLINE Pack operator*(Pack a, float b) {
  DK_FOR_VECTORS a.v[n] *= b;
  return a;
}
DK_INLINE Pack madd(Pack a, const Pack& b, const Pack& c) {
  DK_FOR_VECTORS a.v[n] = a.v[n] * b.v[n] + c.v[n];
  return a;
}
DK_INLINE Pack madd(Pack a, const Pack& b, float c) {
  DK_FOR_VECTORS a.v[n] = a.v[n] * b.v[n] + c;
  return a;
}
DK_INLINE Pack madd(Pack a, float b, const Pack& c) {
  DK_FOR_VECTORS a.v[n] = a.v[n] * b + c.v[n];
  return a;
}
DK_INLINE Pack madd(Pack a, float b, float c) {
  DK_FOR_VECTORS a.v[n] = a.v[n] * b + c;
  return a;
}
DK_INLINE vec minimum(vec a, float b) { return a < b ? a : splat(b); }
DK_INLINE Pack minimum(Pack a, float b) {
  DK_FOR_VECTORS a.v[n] = minimum(a.v[n], b);
  return a;
}
DK_INLINE Pack maximum(Pack a, float b) {
  DK_FOR_VECTORS a.v[n] = a.v[n] > b ? a.v[n] : splat(b);
  return a;
}
DK_INLINE Pack maximum(Pack a, const Pack& b) {
  DK_FOR_VECTORS a.v[n] = a.v[n] > b.v[n] ? a.v[n] : b.v[n];
  return a;
}
DK_INLINE Pack absolute(Pack a) {
  DK_FOR_VECTORS a.v[n] = from_bits(as_bits(a.v[n]) & 0x7fffffff);
  return a;
}
DK_INLINE Pack select_less(const Pack& x, float bound, Pack a, const Pack& b) {
  DK_FOR_VECTORS a.v[n] = x.v[n] < bound ? a.v[n] : b.v[n];
  return a;
}
DK_INLINE Pack rsqrt(Pack a) {
  DK_FOR_VECTORS a.v[n] = rsqrt(a.v[n]);
  return a;
}
DK_INLINE vec sum_vectors(const Pack& a) {
  vec s = a.v[0];
  for (int n = 1; n < kVectors; ++n) s += a.v[n];
  return s;
}

// exp(x) for x <= 87 with relative error 1e-7; 0 for x <= -87. x = k ln 2 + r; exp(r) by a Chebyshev fit, 2^k through
// the exponent bits. Adding kMagic = 1.5 * 2^23 rounds to an integer, which is then in the low bits.
DK_INLINE Pack exponential(Pack x) {
  constexpr float kMagic = 12582912.0f;
  DK_FOR_VECTORS {
    const vec clipped = x.v[n] > -87.0f ? x.v[n] : splat(-87.0f);
    const vec shifted = clipped * 1.44269504f + kMagic;
    const vec k = shifted - kMagic;
    vec r = clipped - k * 0.693145751953125f;
    r -= k * 1.42860677e-06f;
    vec p = r * 0.00139411085f + 0.0083751264f;
    p = p * r + 0.0416663529f;
    p = p * r + 0.166664155f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // Unsigned addition, because the sum may carry out of the top bit, which is undefined for signed integers.
    const vec scaled = from_bits((ivec)((uvec)as_bits(p) + ((uvec)as_bits(shifted) << 23)));
    x.v[n] = x.v[n] > -87.0f ? scaled : vec{};
  }
  return x;
}

// The pack with `replacement` in the lanes whose column is outside [begin, end); lane 0 is column first_column.
DK_INLINE Pack keep_columns(Pack a, int first_column, int begin, int end, float replacement) {
  DK_FOR_VECTORS {
    const vec column = lane_numbers() + float(first_column + n * kLanes);
    a.v[n] = ((column >= float(begin)) & (column < float(end))) ? a.v[n] : splat(replacement);
  }
  return a;
}

}  // namespace
}  // namespace dk
