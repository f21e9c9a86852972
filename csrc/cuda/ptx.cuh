// The PTX instructions that C++ lacks, and the swizzled panels of shared memory that they read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace dk {

#define DK_DEVICE __device__ __forceinline__

// ---- asynchronous copies

DK_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Asynchronous copy of 16 bytes to shared memory; the first `bytes` are read, the others are zeros.
DK_DEVICE void copy_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Asynchronous copy of 4 bytes, as copy_async_16.
DK_DEVICE void copy_async_4(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

DK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the thread's groups of copies are under way.
template <int kPending>
DK_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- panels: rows of kRowBytes bytes, whose 16-byte chunks are permuted so that the eight rows of one chunk column,
// which ldmatrix reads at a time, are in different banks

template <int kRowBytes>
DK_DEVICE uint32_t panel_offset(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "a permutation is written for these two");
  const int permutation = kRowBytes == 128 ? row & 7 : (row >> 1) & 3;
  return uint32_t(row * kRowBytes + ((chunk ^ permutation) << 4));
}

// Loads four matrices of 8 x 8 16-bit elements (or 8 x 4 32-bit ones); lane l gives the address of row l % 8 of matrix
// l / 8.
DK_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

DK_DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Transpose of an 8 x 8 matrix of 16-bit elements that a warp holds.
DK_DEVICE uint32_t transpose_matrix(uint32_t fragment) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// ---- numbers

DK_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// ---- element types: the stored type, and the tensor cores' product of a 16-row A and an 8-column B, both 32 bytes
// along the summed dimension

struct BFloat16 {
  using Stored = uint16_t;
  static DK_DEVICE float to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
  static DK_DEVICE uint16_t from_float(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static DK_DEVICE uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static DK_DEVICE float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  static DK_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  using Stored = uint16_t;
  static DK_DEVICE float to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static DK_DEVICE uint16_t from_float(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static DK_DEVICE uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static DK_DEVICE float2 unpack(uint32_t pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }
  static DK_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

DK_DEVICE void multiply_tf32(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// fp32 rounded to the ten bits that tf32 keeps.
struct TF32 {
  using Stored = float;
  static DK_DEVICE float to_float(float x) { return x; }
  static DK_DEVICE float from_float(float x) { return x; }
  static DK_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t rounded[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) rounded[n] = round_to_tf32(__uint_as_float(a[n]));
    multiply_tf32(sums, rounded, round_to_tf32(__uint_as_float(b0)), round_to_tf32(__uint_as_float(b1)));
  }
};

// fp32 as the sum of two tf32 numbers, large and small: three products; the fourth, small times small, is below the
// precision of fp32. The two products with a small part have separate sums; see Products.
struct TF32x3 {
  using Stored = float;
  static DK_DEVICE float to_float(float x) { return x; }
  static DK_DEVICE void multiply(float (&large_sums)[4], float (&small_sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
    uint32_t large[4], small[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) split(a[n], large[n], small[n]);
    uint32_t large_b0, small_b0, large_b1, small_b1;
    split(b0, large_b0, small_b0);
    split(b1, large_b1, small_b1);
    multiply_tf32(small_sums, small, large_b0, large_b1);
    multiply_tf32(small_sums, large, small_b0, small_b1);
    multiply_tf32(large_sums, large, large_b0, large_b1);
  }

 private:
  static DK_DEVICE void split(uint32_t bits, uint32_t& large, uint32_t& small) {
    const float x = __uint_as_float(bits);
    large = round_to_tf32(x);
    small = round_to_tf32(x - __uint_as_float(large));
  }
};

// ---- sums of products: kM blocks of 16 rows and kN of 8 columns

template <class T, int kM, int kN>
struct Products {
  static constexpr int kRegisters = 1;  // registers per element
  float sums[kM][kN][4] = {};

  DK_DEVICE void add(int m, int n, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    T::multiply(sums[m][n], a, b0, b1);
  }
  DK_DEVICE void flush() {}
};

// Tensor cores truncate when they add to a sum, so that a sum becomes too small, the more the longer it is. Their sums
// are therefore short, and flush() adds them to `sums` with rounding. Products with a small part have separate sums,
// whose truncation error is small like the sums themselves.
template <int kM, int kN>
struct Products<TF32x3, kM, kN> {
  static constexpr int kRegisters = 3;
  float sums[kM][kN][4] = {}, large[kM][kN][4] = {}, small[kM][kN][4] = {};

  DK_DEVICE void add(int m, int n, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    TF32x3::multiply(large[m][n], small[m][n], a, b0, b1);
  }
  DK_DEVICE void flush() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[m][n][e] += large[m][n][e] + small[m][n][e];
          large[m][n][e] = small[m][n][e] = 0.0f;
        }
  }
};

// Number of 32-bit features after which products are flushed.
constexpr int kFeaturesOfFlush = 64;

}  // namespace dk
