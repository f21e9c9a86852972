// float as the scalar type V of potentials.h, on a GPU or, for tests, on a CPU. The base of `exponential` is 2.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define DK_SCALAR __host__ __device__ __forceinline__
#else
#define DK_SCALAR inline
#endif

namespace dk {

DK_SCALAR float madd(float a, float b, float c) { return fmaf(a, b, c); }
DK_SCALAR float minimum(float a, float b) { return fminf(a, b); }
DK_SCALAR float maximum(float a, float b) { return fmaxf(a, b); }
DK_SCALAR float absolute(float a) { return fabsf(a); }
DK_SCALAR float select_less(float x, float bound, float a, float b) { return x < bound ? a : b; }

// Special functions, on a GPU one instruction each, accurate to an ulp or two.
DK_SCALAR float rsqrt(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / sqrtf(x);
#endif
}
DK_SCALAR float exponential(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
DK_SCALAR float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

}  // namespace dk
