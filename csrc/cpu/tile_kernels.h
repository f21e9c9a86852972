// The arithmetic on tiles for one instruction set: packing, the sweep over the pairs of one or two tiles, and the
// gradient through the row transform. Each kernels_*.cpp includes this once and exports kTileKernels.
//
// A pair of tiles (I, J) takes three matrix products on one micro-kernel, C = beta C + alpha A B, where A is read by
// broadcast with any two strides and B is a panel of kPanel columns:
//   S = X_I X_J^T      A, B: feature-major packs
//   G_I += W X_J       A: W by rows, B: token-major pack of J
//   G_J += W^T X_I     A: W by columns, B: token-major pack of I
// W overwrites S in a tile that stays in the second-level cache.
#pragma once

#include <float.h>
#include <math.h>

#include <type_traits>

#include "dispersion.h"
#include "simd.h"

namespace dk {
namespace {

// Assumptions behind the sizes of arrays.
static_assert(round_up(kLargestTile, kPanel) <= kLargestPadded, "arrays of a tile's tokens hold a padded tile");
static_assert(kPanel % kRows == 0, "a product's rows lie within one panel");
static_assert(kLargestTile % (2 * kRows) == 0, "a tile is no longer in whole products");
static_assert(kRows < kPanel, "Scratch::rows holds a product's rows, and one more");

// ---- fetching ahead

constexpr int kLine = 64 / sizeof(float);
// Prefetch of the memory `offset` floats from p, to the first-level cache (near) or the second (far). It may be beyond
// p's array, where no pointer may point, so the address is an integer. The empty asm is there because GCC takes a
// function that only prefetches for one without effect and drops its calls.
DK_INLINE void prefetch_near(const float* p, int64_t offset) {
  __asm__ volatile("");
  __builtin_prefetch((const void*)((uintptr_t)p + uintptr_t(offset) * sizeof(float)), 0, 3);
}
DK_INLINE void prefetch_far(const float* p, int64_t offset) {
  __asm__ volatile("");
  __builtin_prefetch((const void*)((uintptr_t)p + uintptr_t(offset) * sizeof(float)), 0, 2);
}

// ---- input rows

// A row in fp32, padded with zeros: in place if it has this form already, else copied to `out`. The address of z may be
// odd; the address returned is aligned for floats.
DK_INLINE const float* read_row(const Job& job, int64_t row, float* out) {
  const dk_args& args = *job.args;
  const int64_t features = args.features, whole = features / kLanes * kLanes;
  const int64_t first = row * args.row_stride;
  if (args.dtype == DK_FLOAT32) {
    const float* in = (const float*)args.z + first;
    if (features == job.padded_features && (uintptr_t)in % alignof(float) == 0) return in;
    memcpy(out, in, size_t(features) * sizeof(float));
  } else {
    const uint16_t* in = (const uint16_t*)args.z + first;
    uint16_t tail[kLanes] = {};
    memcpy(tail, in + whole, size_t(features - whole) * sizeof(uint16_t));
    if (args.dtype == DK_BFLOAT16) {
      for (int64_t k = 0; k < whole; k += kLanes) store(out + k, load_bfloat16(in + k));
      if (whole < features) store(out + whole, load_bfloat16(tail));
    } else {
      for (int64_t k = 0; k < whole; k += kLanes) store(out + k, load_float16(in + k));
      if (whole < features) store(out + whole, load_float16(tail));
    }
  }
  for (int64_t k = features; k < job.padded_features; ++k) out[k] = 0.0f;
  return out;
}

// Number of rows that are prefetched: rows come in any order, which no hardware prefetcher follows.
constexpr int kRowsAhead = 8;

DK_INLINE void prefetch_row(const Job& job, int64_t row) {
  const int64_t size = job.args->dtype == DK_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
  const char* first = (const char*)job.args->z + row * job.args->row_stride * size;
  for (int64_t byte = 0; byte < job.args->features * size; byte += 64) prefetch_near((const float*)(first + byte), 0);
}

void add_rows(const Job& job, const Tile& tile, Scratch& scratch, float* sums) {
  for (int64_t k = 0; k < job.padded_features; ++k) sums[k] = 0.0f;
  for (int t = 0; t < tile.tokens; ++t) {
    const float* z = read_row(job, tile.rows[t], scratch.rows);
    for (int64_t k = 0; k < job.padded_features; k += kLanes) store(sums + k, load(sums + k) + load(z + k));
  }
}

// ---- packing

// Sum of squares of one padded row; in double where fp32 would overflow or underflow, which also decides whether a
// value is infinite or NaN.
DK_INLINE double square_sum(const float* row, int64_t padded_features) {
  Pack s = splat_pack(0.0f);
  for (int64_t k = 0; k < padded_features; k += kPanel) {
    const Pack x = load_pack(row + k);
    s = madd(x, x, s);
  }
  const float fast = sum(sum_vectors(s));
  if (fast > 1e-30f && fast < 1e38f) return fast;
  double slow = 0.0;
  for (int64_t k = 0; k < padded_features; ++k) slow += double(row[k]) * row[k];
  return slow;
}

// Hash of a padded row's bits, in [0, 2^24).
DK_INLINE float row_key(const float* row, int64_t padded_features) {
  uvec lanes = {};
  for (int64_t k = 0; k < padded_features; k += kLanes) {
    lanes = (lanes ^ (uvec)as_bits(load(row + k))) * 0x9E3779B1u;
    lanes ^= lanes >> 15;  // a product leaves a flipped sign in the highest bit, where two of them cancel
  }
  uint32_t hash = 0;
  for (int n = 0; n < kLanes; ++n) hash = (hash ^ lanes[n]) * 0x85EBCA6Bu + (hash >> 15);
  return float(hash >> 8);
}

// x = z - mean over the features, computed in double, so that a constant row becomes exactly zero.
DK_INLINE void centre_row(const float* z, float* x, int64_t features, int64_t padded_features) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t whole = features / kSums * kSums;
  for (int64_t k = 0; k < whole; k += kSums)
    for (int n = 0; n < kSums; ++n) sums[n] += z[k + n];
  for (int64_t k = whole; k < features; ++k) sums[0] += z[k];
  for (int n = 1; n < kSums; ++n) sums[0] += sums[n];
  const double mean = sums[0] / double(features);
  for (int64_t k = 0; k < features; ++k) x[k] = float(z[k] - mean);
  for (int64_t k = features; k < padded_features; ++k) x[k] = 0.0f;
}

// A row of the tile: `factor` times `row`.
struct ScaledRow {
  const float* row;
  float factor;
};

// Transformed token t; its statistics go to the tile. `out` has room for a padded row.
DK_INLINE ScaledRow transform_row(const Job& job, Tile& tile, int t, float* out) {
  const int64_t features = job.args->features, padded_features = job.padded_features;
  tile.row_sum[t] = 0.0f;
  if (t >= tile.tokens) {
    memset(out, 0, size_t(padded_features) * sizeof(float));
    tile.norm[t] = tile.inverse[t] = tile.square[t] = tile.key[t] = 0.0f;
    return {out, 1.0f};
  }
  const float* z = read_row(job, tile.rows[t], out);
  tile.key[t] = job.square_factor ? row_key(z, padded_features) : 0.0f;
  if (job.transform == Transform::kCentre) {
    const double raw = square_sum(z, padded_features);
    const float* mean = job.population_means + tile.population * padded_features;
    for (int64_t k = 0; k < padded_features; k += kLanes) store(out + k, load(z + k) - load(mean + k));
    const double centred = square_sum(out, padded_features);
    tile.square_sum += raw;
    tile.square[t] = float(job.square_factor * centred);
    // A distance beyond the range of fp32 is lost: the loss becomes NaN rather than a wrong number.
    tile.finite = tile.finite && isfinite(raw) && centred < 1e37 && isfinite(tile.square[t]);
    return {out, 1.0f};
  }
  if (job.transform == Transform::kCentredNormalize) {
    centre_row(z, out, features, padded_features);
    z = out;
  }
  double norm = sqrt(square_sum(z, padded_features));
  if (norm < FLT_MIN) norm = 0.0;  // the inverse would be beyond the range of fp32
  const double inverse = norm + job.eps > 0.0 ? 1.0 / (norm + job.eps) : 0.0;
  tile.norm[t] = float(norm);
  tile.finite = tile.finite && isfinite(tile.norm[t]);
  tile.inverse[t] = float(inverse);
  tile.square[t] = 0.0f;
  if (inverse < 1e30) {
    const float factor = float(inverse);
    if (!job.square_factor) return {z, factor};
    for (int64_t k = 0; k < padded_features; k += kLanes) store(out + k, load(z + k) * factor);
  } else {
    for (int64_t k = 0; k < padded_features; ++k) out[k] = float(z[k] * inverse);
  }
  tile.square[t] = float(job.square_factor * square_sum(out, padded_features));
  return {out, 1.0f};
}

void pack(const Job& job, Tile& tile, Scratch& scratch) {
  // Features of a panel that are transposed at a time: so few that they stay in the first-level cache meanwhile.
  constexpr int64_t kFeatures = 2 * kPanel, kStride = kFeatures + 16;
  static_assert(kPanel % 4 == 0, "four tokens are transposed at a time");
  const int64_t features = job.args->features, padded_features = job.padded_features;
  alignas(64) float block[kPanel * kStride];
  ScaledRow rows[kPanel];
  tile.finite = true;
  tile.square_sum = 0.0;
  for (int t = 0; t < kRowsAhead && t < tile.tokens; ++t) prefetch_row(job, tile.rows[t]);
  for (int first = 0; first < tile.padded; first += kPanel) {
    for (int t = 0; t < kPanel; ++t) {
      if (first + t + kRowsAhead < tile.tokens) prefetch_row(job, tile.rows[first + t + kRowsAhead]);
      rows[t] = transform_row(job, tile, first + t, scratch.rows + t * spare_stride(padded_features));
    }
    float* out = tile.feature_major + first * features;
    for (int64_t begin = 0; begin < padded_features; begin += kFeatures) {
      const int64_t width = padded_features - begin < kFeatures ? padded_features - begin : kFeatures;
      for (int t = 0; t < kPanel; ++t) {
        float* in_block = block + t * kStride;
        for (int64_t k = 0; k < width; k += kPanel) {
          const Pack x = load_pack(rows[t].row + begin + k) * rows[t].factor;
          store_pack(in_block + k, x);
          if (job.gradient) store_pack(tile.token_major + (begin + k) * tile.padded + (first + t) * kPanel, x);
        }
      }
      const int64_t left = features - begin < width ? features - begin : width, whole = left / 4 * 4;
      for (int64_t k = 0; k < whole; k += 4) {
        for (int t = 0; t < kPanel; t += 4) {
          const float* in = block + t * kStride + k;
          quad a, b, c, d;
          memcpy(&a, in, sizeof a);
          memcpy(&b, in + kStride, sizeof b);
          memcpy(&c, in + 2 * kStride, sizeof c);
          memcpy(&d, in + 3 * kStride, sizeof d);
          transpose(a, b, c, d);
          float* to = out + (begin + k) * kPanel + t;
          memcpy(to, &a, sizeof a);
          memcpy(to + kPanel, &b, sizeof b);
          memcpy(to + 2 * kPanel, &c, sizeof c);
          memcpy(to + 3 * kPanel, &d, sizeof d);
        }
      }
      for (int64_t k = whole; k < left; ++k)
        for (int t = 0; t < kPanel; ++t) out[(begin + k) * kPanel + t] = block[t * kStride + k];
    }
  }
}

// ---- products

// Operands of a product. Left, A: element (i, k) is at[i * row + k * step]. Right, B: row k, of kPanel columns, begins
// at at[k * step].
struct Left {
  const float* at;
  int64_t row, step;
};
struct Right {
  const float* at;
  int64_t step;
};

// C[0:kHeight, column:column+kWidth*kLanes] = beta C + alpha A B; c holds the rows of C, which is not read if beta is 0.
// kNear: C need not be prefetched, and alpha is 1. kWidth: vectors in a row of C and of B; the first vector of B is at
// right.at. ahead(n) is called every kBlock steps and prefetches the operands of the next calls: tiles come from the
// last-level cache, whose latency out-of-order execution does not hide.
constexpr int kBlock = 8;

template <bool kNear, int kWidth = kVectors, int kHeight = kRows, class Ahead>
DK_INLINE void micro_kernel(int64_t depth, Left left, Right right, float* const* c, int64_t column, float alpha,
                            float beta, const Ahead& ahead) {
  static_assert(kWidth >= 1 && kWidth * kHeight <= kVectors * kRows, "the sums are in registers");
  vec acc[kHeight][kWidth];
  const bool scaled = alpha != 1.0f || beta != 1.0f;
  const float *a = left.at, *b = right.at;
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
    if (!kNear) {
      prefetch_near(c[i], column);
      prefetch_near(c[i], column + kWidth * kLanes - 1);
    }
#pragma GCC unroll 8
    for (int n = 0; n < kWidth; ++n) acc[i][n] = vec{};
  }
  const auto step = [&]() __attribute__((always_inline)) {
    vec operand[kWidth];
#pragma GCC unroll 8
    for (int n = 0; n < kWidth; ++n) operand[n] = keep_in_register(load(b + n * kLanes));
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i) {
      const vec factor = splat(a[i * left.row]);
#pragma GCC unroll 8
      for (int n = 0; n < kWidth; ++n) acc[i][n] += factor * operand[n];
    }
    a += left.step;
    b += right.step;
  };
  const int blocks = int(depth / kBlock);
  for (int block = 0; block < blocks; ++block) {
    ahead(block);
#pragma GCC unroll 8
    for (int n = 0; n < kBlock; ++n) step();
  }
  for (int64_t k = int64_t(blocks) * kBlock; k < depth; ++k) step();
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i) {
    float* out = c[i] + column;
#pragma GCC unroll 8
    for (int n = 0; n < kWidth; ++n) {
      vec result = acc[i][n];
      if (!scaled)
        result += load(out + n * kLanes);
      else if (beta != 0.0f)
        result = alpha * result + beta * load(out + n * kLanes);
      else if (!kNear)
        result *= alpha;
      store(out + n * kLanes, result);
    }
  }
}

// micro_kernel at the edge of C, where only rows x columns of its elements exist.
template <int64_t kARow, int64_t kAStep, int kWidth, int kHeight>
void edge_kernel(int64_t depth, const float* a, const float* b, float* const* c, int64_t column, float alpha,
                 float beta, int rows, int64_t columns) {
  float product[kHeight][kWidth * kLanes];
  float* product_rows[kHeight];
  for (int i = 0; i < kHeight; ++i) product_rows[i] = product[i];
  micro_kernel<false, kWidth, kHeight>(depth, {a, kARow, kAStep}, {b, kPanel}, product_rows, 0, alpha, 0.0f,
                                       [](int) {});
  for (int i = 0; i < rows; ++i) {
    float* out = c[i] + column;
    for (int64_t j = 0; j < columns; ++j) out[j] = beta != 0.0f ? beta * out[j] + product[i][j] : product[i][j];
  }
}

// S = X_I X_J^T for all rows of I. With `upper`, for a tile with itself, only the products that reach the upper
// triangle.
void similarities(const Job& job, const Tile& tile, const Tile& other, bool upper, float* weights) {
  // Depth, in features, of a slice of B that fits the first-level cache together with its part of A.
  constexpr int64_t kDepth = 192;
  constexpr int kHalf = kVectors / 2;  // vectors that a row of the upper triangle leaves out of its last panel
  const int64_t features = job.args->features;
  const int64_t slices = (features + kDepth - 1) / kDepth;
  float* rows[kLargestTile];
  for (int i = 0; i < int(round_up(tile.tokens, kRows)); ++i) rows[i] = weights + i * kWeightStride;
  for (int column = 0; column < other.padded; column += kPanel) {
    const int last_row = upper ? (column + kPanel < tile.tokens ? column + kPanel : tile.tokens) : tile.tokens;
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t begin = features * slice / slices, end = features * (slice + 1) / slices, depth = end - begin;
      const float* b = other.feature_major + column * features + begin * kPanel;
      for (int i = 0; i < last_row; i += kRows) {
        const int panel = i / kPanel * kPanel, within_panel = i - panel;
        const float* panel_slice = tile.feature_major + panel * features + begin * kPanel;
        const Left a = {panel_slice + within_panel, 1, kPanel};
        const float beta = slice ? 1.0f : 0.0f;
        // Each kernel call on this panel of A prefetches a part of the next slice of B and, the first time through A, a
        // part of A's next panel.
        const int64_t next_b = depth * kPanel + i * depth * kPanel / last_row;
        if (upper && i >= column + kHalf * kLanes) {
          micro_kernel<true, kVectors - kHalf>(depth, a, {b + kHalf * kLanes, kPanel}, rows + i,
                                               column + kHalf * kLanes, 1.0f, beta,
                                               [&](int block) { prefetch_far(b, next_b + block * kLine); });
        } else if (column == 0 && !upper) {
          const int64_t next_a = kPanel * features + within_panel * depth;
          micro_kernel<true>(depth, a, {b, kPanel}, rows + i, column, 1.0f, beta, [&](int block) {
            prefetch_far(b, next_b + block * kLine);
            for (int n = 0; n < kBlock * kRows; n += kLine)
              prefetch_far(panel_slice, next_a + block * kBlock * kRows + n);
          });
        } else {
          micro_kernel<true>(depth, a, {b, kPanel}, rows + i, column, 1.0f, beta,
                             [&](int block) { prefetch_far(b, next_b + block * kLine); });
        }
      }
    }
  }
}

// work(width), with the number of vectors that hold `columns` floats, at most kMost, as a constant.
template <int kMost, class Work>
DK_INLINE void with_width(int64_t columns, const Work& work) {
  if constexpr (kMost > 1)
    if (columns <= (kMost - 1) * kLanes) return with_width<kMost - 1>(columns, work);
  work(std::integral_constant<int, kMost>{});
}

// G = beta G + alpha A X for the columns of G, of which there are `columns`, from `column` on; kWidth vectors hold them.
// Narrow columns are multiplied with twice as many rows: with fewer sums than that, each would wait for its last product.
template <int64_t kARow, int64_t kAStep, int kWidth>
DK_INLINE void accumulate_columns(const Tile& tile, const Tile& other, const float* weights, float alpha, float beta,
                                  float* const* rows, int64_t column, int64_t columns) {
  constexpr int kHeight = 2 * kWidth <= kVectors ? 2 * kRows : kRows;
  const float* b = other.token_major + column * other.padded;
  for (int i = 0; i < tile.tokens; i += kHeight) {
    const float* a = weights + i * kARow;
    if (columns >= kWidth * kLanes && i + kHeight <= tile.tokens) {
      const int64_t next_b = other.padded * kPanel + i * (other.padded * kPanel / tile.tokens);
      float* const* next_rows = rows + i + kHeight;
      const auto ahead = [&](int block) {
        prefetch_far(b, next_b + block * kLine);
        // Prefetch of C with 16 lanes alone: where loads are the bottleneck, it costs more than it saves.
        if (kLanes == 16) prefetch_far(next_rows[block / 2 % kRows], column + (block & 1) * kLine);
      };
      micro_kernel<false, kWidth, kHeight>(other.tokens, {a, kARow, kAStep}, {b, kPanel}, rows + i, column, alpha, beta,
                                           ahead);
    } else {
      edge_kernel<kARow, kAStep, kWidth, kHeight>(other.tokens, a, b, rows + i, column, alpha, beta,
                                                  tile.tokens - i < kHeight ? tile.tokens - i : kHeight,
                                                  columns < kPanel ? columns : kPanel);
    }
  }
}

// G = beta G + alpha A X, A = W or W^T [tile.tokens, other.tokens].
template <int64_t kARow, int64_t kAStep>
void accumulate(const Job& job, const Tile& tile, const Tile& other, const float* weights, float alpha, float beta) {
  const int64_t features = job.args->features;
  // Rows of whole products, and of one product more, which the last one prefetches.
  float* rows[kLargestTile + 2 * kRows];
  for (int i = 0; i < int(round_up(tile.tokens, 2 * kRows)) + kRows; ++i)
    rows[i] = job.args->grad + tile.rows[i < tile.tokens ? i : 0] * features;
  int64_t column = 0;
  for (; column + kPanel <= features; column += kPanel)
    accumulate_columns<kARow, kAStep, kVectors>(tile, other, weights, alpha, beta, rows, column, kPanel);
  if (column < features)
    with_width<kVectors>(features - column, [&](auto width) {
      accumulate_columns<kARow, kAStep, width>(tile, other, weights, alpha, beta, rows, column, features - column);
    });
}

// ---- the potential on a tile

struct Region {
  int rows, columns;
  const int32_t* partner_end;  // NULL between two tiles: every column is a partner

  int begin(int i) const { return partner_end ? i + 1 : 0; }
  int end(int i) const { return partner_end ? partner_end[i] : columns; }
};

// Largest exponent of the region; -inf without a pair.
template <class P>
float largest_exponent(const P& potential, const Region& region, const float* weights, const float* q_row,
                       const float* q_column) {
  Pack best = splat_pack(-INFINITY);
  for (int i = 0; i < region.rows; ++i) {
    const int begin = region.begin(i), end = region.end(i);
    const Pack q_i = splat_pack(q_row[i]);
    for (int j = begin / kPanel * kPanel; j < end; j += kPanel) {
      Pack e = potential.exponent(load_pack(weights + i * kWeightStride + j), q_i, load_pack(q_column + j), 0.0f);
      if (j < begin || j + kPanel > end) e = keep_columns(e, j, begin, end, -INFINITY);
      best = maximum(e, best);
    }
  }
  vec m = best.v[0];
  for (int n = 1; n < kVectors; ++n) m = best.v[n] > m ? best.v[n] : m;
  return largest(m);
}

// Replaces the similarities of the region by the slopes and returns the sum of psi. Columns that are no partners of
// their row get weight 0, up to the end of the tile. Sums of the weights are added to row_sum and column_sum.
// For distances equal tokens, known by equal keys and the psi of distance 0, get weight 0: they add 0 to each other's
// gradient, and beside their psi of 1 fp32 would round away the psi of pairs far apart.
template <class P, bool kGradient, bool kRowSums>
double apply_potential(const P& potential, float shift, const Region& region, const Tile& tile, const Tile& other,
                       float* weights, float* row_sum, float* column_sum) {
  const float *q_row = tile.square, *q_column = other.square;
  const vec largest = exponential(splat_pack(-shift)).v[0];
  double total = 0.0;
  Pack partial = splat_pack(0.0f);
  for (int i = 0; i < region.rows; ++i) {
    const int begin = region.begin(i), end = region.end(i);
    float* row = weights + i * kWeightStride;
    const Pack q_i = splat_pack(q_row[i]);
    Pack row_total = splat_pack(0.0f);
    int j = begin / kPanel * kPanel;
    for (; j < end; j += kPanel) {
      Weights<Pack> w = potential.evaluate(load_pack(row + j), q_i, load_pack(q_column + j), shift);
      if constexpr (kGradient && std::is_same_v<P, Gaussian>) {
        DK_FOR_VECTORS {
          const auto equal = (load(other.key + j + n * kLanes) == tile.key[i]) & (w.psi.v[n] == largest);
          w.slope.v[n] = equal ? vec{} : w.slope.v[n];
        }
      }
      if (j < begin || j + kPanel > end) {
        w.psi = keep_columns(w.psi, j, begin, end, 0.0f);
        if (kGradient) w.slope = keep_columns(w.slope, j, begin, end, 0.0f);
      }
      partial = partial + w.psi;
      if (kGradient) store_pack(row + j, w.slope);
      if (kRowSums) {
        row_total = row_total + w.slope;
        store_pack(column_sum + j, load_pack(column_sum + j) + w.slope);
      }
    }
    if (kGradient)
      for (; j < region.columns; j += kPanel) store_pack(row + j, splat_pack(0.0f));
    if (kRowSums) row_sum[i] += sum(sum_vectors(row_total));
    // The fp32 partial sums are flushed every eight rows, so that they stay short.
    if (i % 8 == 7 || i + 1 == region.rows) {
      for (int n = 0; n < kVectors; ++n) total += double(sum(partial.v[n]));
      partial = splat_pack(0.0f);
    }
  }
  return total;
}

struct TileSum {
  double psi, shift;
};

template <class P>
TileSum apply_to_region(const Job& job, const P& potential, const Region& region, Scratch& scratch, const Tile& tile,
                     const Tile& other, float* row_sum) {
  float shift = job.potential.shift;
  bool empty = false;
  if constexpr (P::kExponential) {
    if (job.potential.online) {
      shift = largest_exponent(potential, region, scratch.weights, tile.square, other.square);
      empty = shift == -INFINITY;
      if (empty) shift = 0.0f;
    }
  }
  double psi;
  if (!job.gradient)
    psi = apply_potential<P, false, false>(potential, shift, region, tile, other, scratch.weights, nullptr, nullptr);
  else if (!job.potential.row_sums)
    psi = apply_potential<P, true, false>(potential, shift, region, tile, other, scratch.weights, nullptr, nullptr);
  else
    psi = apply_potential<P, true, true>(potential, shift, region, tile, other, scratch.weights, row_sum,
                                         scratch.column_sum);
  return {psi, empty ? -INFINITY : double(shift)};
}

// work(potential), with the potential in its own type.
template <class Work>
DK_INLINE auto with_potential(const Potential& p, const Work& work) {
  switch (p.kind) {
    case Potential::Kind::kAngularSpread: return work(p.angular_spread);
    case Potential::Kind::kAngularSpreadFit: return work(p.angular_spread_fit);
    case Potential::Kind::kOrthogonalization: return work(p.orthogonalization);
    case Potential::Kind::kOrthogonalizationFit: return work(p.orthogonalization_fit);
    case Potential::Kind::kDecorrelation: return work(Decorrelation{});
    case Potential::Kind::kGaussian: break;
  }
  return work(p.gaussian);
}

TileSum apply_to_tile(const Job& job, const Region& region, Scratch& scratch, const Tile& tile, const Tile& other,
                   float* row_sum) {
  return with_potential(job.potential, [&](const auto& potential) {
    return apply_to_region(job, potential, region, scratch, tile, other, row_sum);
  });
}

// ---- the sweep

// Factors that bring two sums, in units of exp(shift) and exp(other), to units of the larger, which `shift` becomes.
struct Rescaling {
  double kept, added;
};
DK_INLINE Rescaling rescale(double& shift, double other) {
  const double before = shift;
  if (other > shift) shift = other;
  if (shift == -INFINITY) return {0.0, 0.0};
  return {before == shift ? 1.0 : exp(before - shift), other == shift ? 1.0 : exp(other - shift)};
}

// Completes the weights of a tile with itself from those above the diagonal: 0 on it, the transpose below.
void mirror(const Tile& tile, float* weights) {
  for (int i = 0; i < tile.tokens; ++i) {
    weights[i * kWeightStride + i] = 0.0f;
    for (int j = 0; j < i; ++j) weights[i * kWeightStride + j] = weights[j * kWeightStride + i];
  }
}

void within(const Job& job, Tile& tile, Scratch& scratch) {
  const Region region{tile.tokens, tile.padded, tile.partner_end};
  float* weights = scratch.weights;
  similarities(job, tile, tile, true, weights);
  if (job.potential.row_sums) memset(scratch.column_sum, 0, sizeof(float) * size_t(tile.padded));
  const TileSum sum = apply_to_tile(job, region, scratch, tile, tile, tile.row_sum);
  tile.psi_sum = 2.0 * sum.psi;
  tile.psi_shift = tile.shift = sum.shift;
  if (!job.gradient) return;
  mirror(tile, weights);
  if (job.potential.row_sums)
    for (int t = 0; t < tile.tokens; ++t) tile.row_sum[t] += scratch.column_sum[t];
  accumulate<kWeightStride, 1>(job, tile, tile, weights, 1.0f, 0.0f);
}

void between(const Job& job, Tile& tile, Tile& other, Scratch& scratch) {
  const Region region{tile.tokens, other.tokens, nullptr};
  float* weights = scratch.weights;
  similarities(job, tile, other, false, weights);
  float row_sum[kLargestTile];
  if (job.potential.row_sums) {
    memset(row_sum, 0, sizeof row_sum);
    memset(scratch.column_sum, 0, sizeof(float) * size_t(other.padded));
  }
  const TileSum sum = apply_to_tile(job, region, scratch, tile, other, row_sum);

  const Rescaling psi = rescale(tile.psi_shift, sum.shift);
  tile.psi_sum = tile.psi_sum * psi.kept + 2.0 * sum.psi * psi.added;
  if (!job.gradient) return;
  const Rescaling left = rescale(tile.shift, sum.shift), right = rescale(other.shift, sum.shift);
  accumulate<kWeightStride, 1>(job, tile, other, weights, float(left.added), float(left.kept));
  accumulate<1, kWeightStride>(job, other, tile, weights, float(right.added), float(right.kept));
  if (job.potential.row_sums) {
    for (int t = 0; t < tile.tokens; ++t)
      tile.row_sum[t] = tile.row_sum[t] * float(left.kept) + row_sum[t] * float(left.added);
    for (int t = 0; t < other.tokens; ++t)
      other.row_sum[t] = other.row_sum[t] * float(right.kept) + scratch.column_sum[t] * float(right.added);
  }
}

// ---- the gradient through the row transform

// Projection of one token's sum G_i = sum_j w_ij x_j. For distances: G_i - x_i sum_j w_ij. Else, with x = z / (r +
// eps): dz = (G - x (x . G) / |x|^2 r / (r + eps)) / (r + eps), whose last division is left to the scale. It is applied
// as soon as the tile's last pair is summed, while much of the tile is still in the cache. u is G, padded, in the
// gradient itself or in memory that may be overwritten. x is in panels of features, x_step floats apart, and is
// multiplied by `factor`.
DK_INLINE void project_row(const Job& job, const Tile& tile, int t, const float* x, int64_t x_step, float factor,
                           float* u) {
  const int64_t features = job.args->features, padded_features = job.padded_features;
  float own, mean = 0.0f;
  if (job.transform == Transform::kCentre) {
    own = -tile.row_sum[t];
  } else {
    Pack dot = splat_pack(0.0f), square = splat_pack(0.0f), total = splat_pack(0.0f);
    const float* xk = x;
    for (int64_t k = 0; k < padded_features; k += kPanel, xk += x_step) {
      const Pack scaled = load_pack(xk) * factor, uk = load_pack(u + k);
      dot = madd(scaled, uk, dot);
      square = madd(scaled, scaled, square);
      total = total + uk;
    }
    // |x|^2 equals length^2 up to rounding; dividing by |x|^2 as computed leaves no part of u along x.
    const float norm = tile.norm[t], squares = sum(sum_vectors(square));
    const float length = norm > 0.0f ? norm / (norm + float(job.eps)) : 0.0f;
    own = squares > 0.0f ? -sum(sum_vectors(dot)) * length / squares : 0.0f;
    // Correction for the term h x that u contains: its projection is h x - x (x . h x) / |x|.
    if (tile.own) own -= tile.own[t] * (1.0f - length);
    if (job.transform == Transform::kCentredNormalize) mean = sum(sum_vectors(total)) / float(features);
  }
  own *= factor;
  float* grad = job.args->grad + tile.rows[t] * features;
  float* out = features == padded_features ? grad : u;
  for (int64_t k = 0; k < padded_features; k += kPanel, x += x_step)
    store_pack(out + k, madd(load_pack(x), own, load_pack(u + k)) - mean);
  if (out != grad) memcpy(grad, out, size_t(features) * sizeof(float));
}

void project(const Job& job, const Tile& tile, Scratch& scratch) {
  const int64_t features = job.args->features, padded_features = job.padded_features;
  for (int t = 0; t < tile.tokens; ++t) {
    float* u = job.args->grad + tile.rows[t] * features;
    if (features != padded_features) {
      u = (float*)memcpy(scratch.rows, u, size_t(features) * sizeof(float));
      for (int64_t k = features; k < padded_features; ++k) u[k] = 0.0f;
    }
    project_row(job, tile, t, tile.token_major + t * kPanel, int64_t(tile.padded) * kPanel, 1.0f, u);
  }
}

// Sets the scale of each row once the sequence's loss is known, and adds the norm term, whose scale is another and
// which therefore takes a pass over the gradient.
void finish(const Job& job, const Tile& tile, const Finish& result, Scratch& scratch) {
  const int64_t features = job.args->features;
  for (int t = 0; t < tile.tokens; ++t) {
    float& scale = job.args->scale[tile.rows[t]];
    scale = job.transform == Transform::kCentre ? result.scale : result.scale * tile.inverse[t];
    if (result.square_scale == 0.0f) continue;
    float* grad = job.args->grad + tile.rows[t] * features;
    const float* z = read_row(job, tile.rows[t], scratch.rows);
    for (int64_t k = 0; k < features; ++k) grad[k] = scale * grad[k] + result.square_scale * z[k];
    if (scale == scale) scale = 1.0f;
  }
}

// ---- sampled pairs and the model of the rest

// Evenly spaced rows of up to kPanel tokens: token t is factor[t] times row t. `stride` is in floats.
struct EvenRows {
  const float* at;
  int64_t stride;
  float factor[kPanel];
};

// Tokens of a tile from `first` on, padded with zeros to whole groups of kRows: in place if the rows are evenly spaced
// by row_stride, else in `spare`.
EvenRows even_rows(const Job& job, Tile& tile, int first, float* spare) {
  const int64_t stride = spare_stride(job.padded_features);
  const int left = tile.tokens - first, count = left < kPanel ? int(round_up(left, kRows)) : kPanel;
  EvenRows rows = {nullptr, job.args->row_stride, {}};
  const float* at[kPanel];
  bool evenly = true;
  for (int t = 0; t < count; ++t) {
    if (first + t + kRowsAhead < tile.tokens) prefetch_row(job, tile.rows[first + t + kRowsAhead]);
    const ScaledRow row = transform_row(job, tile, first + t, spare + t * stride);
    at[t] = row.row;
    rows.factor[t] = row.factor;
    evenly = evenly && (uintptr_t)at[t] == (uintptr_t)at[0] + uintptr_t(t * rows.stride) * sizeof(float);
  }
  rows.at = at[0];
  if (evenly) return rows;
  for (int t = 0; t < count; ++t)
    if (at[t] != spare + t * stride) memcpy(spare + t * stride, at[t], size_t(job.padded_features) * sizeof(float));
  rows.at = spare;
  rows.stride = stride;
  return rows;
}

// Features phi, [count][kModelFeatures], of whole groups of kRows tokens. Token t is factor[t] times the row at x + t *
// x_row, which is in panels of features x_panel floats apart.
void model_features(const Job& job, const Model& model, const float* x, int64_t x_row, int64_t x_panel, int count,
                    const float* factor, float* phi) {
  static_assert(kRank % kLanes == 0 && kRank <= kPanel, "the components are whole vectors of a product");
  const int64_t features = job.args->features;
  for (int i = 0; i < count; i += kRows) {
    float* components[kRows];
    for (int t = 0; t < kRows; ++t) components[t] = phi + (i + t) * kModelFeatures + kModelGroup;
    for (int64_t column = 0; column < features; column += kPanel) {
      const int64_t depth = features - column < kPanel ? features - column : kPanel;
      micro_kernel<true, kRank / kLanes>(depth, {x + column / kPanel * x_panel + i * x_row, x_row, 1},
                                         {model.directions + column * kRank, kRank}, components, 0, 1.0f,
                                         column ? 1.0f : 0.0f, [](int) {});
    }
  }
  for (int t = 0; t < count; ++t) {
    float* token_phi = phi + t * kModelFeatures;
    float* y = token_phi + kModelGroup;
    for (int r = 0; r < kRank; ++r) y[r] *= factor[t];
    float* product = token_phi;
    *product++ = 1.0f;
    for (int a = 0; a < kSquared; ++a)
      for (int b = a; b < kSquared; ++b) *product++ = y[a] * y[b];
    while (product < y) *product++ = 0.0f;
  }
}

void model_sums(const Job& job, const Model& model, Tile& tile, Scratch& scratch, float* phi, float* sums) {
  tile.finite = true;
  for (int first = 0; first < tile.tokens; first += kPanel) {
    const EvenRows x = even_rows(job, tile, first, scratch.rows);
    const int count = tile.tokens - first < kPanel ? tile.tokens - first : kPanel;
    float features[kPanel * kModelFeatures];
    model_features(job, model, x.at, x.stride, kPanel, int(round_up(count, kRows)), x.factor, features);
    for (int t = 0; t < count; ++t) {
      float* token_phi = features + t * kModelFeatures;
      memcpy(phi + tile.rows[first + t] * kModelFeatures, token_phi, sizeof(float) * kModelFeatures);
      for (int k = 0; k < kModelFeatures; ++k) token_phi[k] *= x.factor[t];
    }
    for (int64_t column = 0; column < job.padded_features; column += kPanel) {
      static_assert(kModelFeatures % kRows == 0, "the features are whole products");
      float* rows[kModelFeatures];
      for (int k = 0; k < kModelFeatures; ++k) rows[k] = sums + column * kModelFeatures + k * kPanel;
      for (int k = 0; k < kModelFeatures; k += kRows)
        micro_kernel<true>(count, {features + k, 1, kModelFeatures}, {x.at + column, x.stride}, rows + k, 0, 1.0f,
                           first ? 1.0f : 0.0f, [](int) {});
    }
  }
}

// Weighted features b_k phi_ik of a tile, 0 up to whole groups of kRows tokens, to `weighted`, and h_ii to column_sum.
void weight_features(const Model& model, const Tile& tile, const float* phi, Scratch& scratch) {
  for (int t = 0; t < int(round_up(tile.tokens, kRows)); ++t) {
    float* weighted = scratch.weighted + t * kModelFeatures;
    if (t >= tile.tokens) {
      memset(weighted, 0, sizeof(float) * kModelFeatures);
      continue;
    }
    const float* token_phi = phi + tile.rows[t] * kModelFeatures;
    static_assert(sizeof(octet) == kModelGroup * sizeof(float) && kModelFeatures % kModelGroup == 0);
    octet own = {};
    for (int k = 0; k < kModelFeatures; k += kModelGroup) {
      octet b, phi_k;
      memcpy(&b, model.b + k, sizeof b);
      memcpy(&phi_k, token_phi + k, sizeof phi_k);
      b *= phi_k;
      own += b * phi_k;
      memcpy(weighted + k, &b, sizeof b);
    }
    scratch.column_sum[t] = sum(own);
  }
}

// Replaces the similarities above the diagonal by inverse_probability (slope - h), 0 between segments, and sums psi and
// c.
template <class P>
void evaluate_residuals(const Job& job, const P& potential, const Model& model, Tile& tile, Scratch& scratch,
                     float inverse_probability) {
  double psi = 0.0, c = 0.0;
  for (int i = 0; i < tile.tokens; ++i) {
    const int begin = i + 1, end = tile.partner_end[i];
    float* row = scratch.weights + i * kWeightStride;
    const float* weighted = scratch.weighted + i * kModelFeatures;
    const Pack q_i = splat_pack(tile.square[i]);
    Pack row_psi = splat_pack(0.0f), row_c = splat_pack(0.0f);
    int j = begin / kPanel * kPanel;
    for (; j < end; j += kPanel) {
      Pack s = load_pack(row + j);
      Weights<Pack> w = potential.evaluate(s, q_i, load_pack(tile.square + j), job.potential.shift);
      for (int k = 0; k < model.features; ++k)
        w.slope = madd(load_pack(scratch.phi + k * kWeightStride + j), -weighted[k], w.slope);
      w.slope = w.slope * inverse_probability;
      if (j < begin || j + kPanel > end) {
        s = keep_columns(s, j, begin, end, 0.0f);
        w.psi = keep_columns(w.psi, j, begin, end, 0.0f);
        w.slope = keep_columns(w.slope, j, begin, end, 0.0f);
      }
      row_psi = row_psi + w.psi;
      row_c = row_c + s;
      store_pack(row + j, w.slope);
    }
    for (; j < tile.padded; j += kPanel) store_pack(row + j, splat_pack(0.0f));
    psi += double(sum(sum_vectors(row_psi)));
    c += double(sum(sum_vectors(row_c)));
  }
  tile.psi_sum = 2.0 * psi;
  tile.c_sum = 2.0 * c;
}

// Sums u, [kRows][padded_features], of the tokens from i on: the part of the gradient from pairs with the tokens
// `begin` to `end` of the tile, and the part from the model.
void add_up(const Job& job, const Model& model, const Tile& tile, const Scratch& scratch, const float* sums, int i,
            int begin, int end, float* u) {
  float* rows[kRows];
  for (int t = 0; t < kRows; ++t) rows[t] = u + t * job.padded_features;
  for (int64_t column = 0; column < job.padded_features; column += kPanel) {
    if (begin < end)
      micro_kernel<true>(end - begin, {scratch.weights + i * kWeightStride + begin, kWeightStride, 1},
                         {tile.token_major + column * tile.padded + begin * kPanel, kPanel}, rows, column, 1.0f, 0.0f,
                         [](int) {});
    if (model.features)
      micro_kernel<true>(kModelFeatures, {scratch.weighted + i * kModelFeatures, kModelFeatures, 1},
                         {sums + column * kModelFeatures, kPanel}, rows, column, 1.0f, begin < end ? 1.0f : 0.0f,
                         [](int) {});
  }
}

void sample(const Job& job, const Model& model, Tile& tile, Scratch& scratch, const float* phi, const float* sums,
            float inverse_probability) {
  if (model.features) {
    weight_features(model, tile, phi, scratch);
    tile.own = scratch.column_sum;
  }
  for (int t = 0; t < tile.padded; ++t) {
    const float* token_phi = t < tile.tokens ? phi + tile.rows[t] * kModelFeatures : nullptr;
    for (int k = 0; k < model.features; ++k) scratch.phi[k * kWeightStride + t] = token_phi ? token_phi[k] : 0.0f;
  }
  similarities(job, tile, tile, true, scratch.weights);
  with_potential(job.potential, [&](const auto& potential) {
    evaluate_residuals(job, potential, model, tile, scratch, inverse_probability);
  });
  if (!job.args->grad) return;
  mirror(tile, scratch.weights);
  const int64_t x_step = int64_t(tile.padded) * kPanel;
  int begin = 0;  // first token of the segment of token i
  for (int i = 0; i < tile.tokens; i += kRows) {
    const int next = i + kRows < tile.tokens ? i + kRows : tile.tokens;
    while (tile.partner_end[begin] <= i) begin = tile.partner_end[begin];
    add_up(job, model, tile, scratch, sums, i, begin, tile.partner_end[next - 1], scratch.rows);
    for (int t = i; t < next; ++t)
      project_row(job, tile, t, tile.token_major + t * kPanel, x_step, 1.0f,
                  scratch.rows + (t - i) * job.padded_features);
  }
}

void expand(const Job& job, const Model& model, Tile& tile, Scratch& scratch, const float* phi, const float* sums) {
  weight_features(model, tile, phi, scratch);
  tile.own = scratch.column_sum;
  float *u = scratch.rows, *x = u + kRows * job.padded_features;
  for (int i = 0; i < tile.tokens; i += kRows) {
    add_up(job, model, tile, scratch, sums, i, 0, 0, u);
    for (int t = i; t < i + kRows && t < tile.tokens; ++t) {
      if (t + kRowsAhead < tile.tokens) prefetch_row(job, tile.rows[t + kRowsAhead]);
      const ScaledRow row = transform_row(job, tile, t, x);
      project_row(job, tile, t, row.row, kPanel, row.factor, u + (t - i) * job.padded_features);
    }
  }
}

// ---- the histogram of cosines

void cosines(const Job& job, const Tile& tile, const Tile& other, int split, Scratch& scratch, CosineSums& result) {
  constexpr float kHalf = DK_COSINE_BINS / 2;
  const bool upper = &tile == &other;
  similarities(job, tile, other, upper, scratch.weights);
  for (int i = 0; i < tile.tokens; ++i) {
    const int part = i >= split, begin = upper ? i + 1 : 0, end = other.tokens;
    const float* row = scratch.weights + i * kWeightStride;
    auto& counts = result.counts[part];
    Pack total = splat_pack(0.0f), squares = splat_pack(0.0f);
    for (int j = begin / kPanel * kPanel; j < end; j += kPanel) {
      // Rounding may take a cosine beyond 1. A comparison with NaN is false, which leaves a bound.
      Pack c = minimum(maximum(load_pack(row + j), -1.0f), 1.0f);
      alignas(64) int32_t bins[kPanel];
      DK_FOR_VECTORS {
        const vec bin = minimum(c.v[n] * kHalf + kHalf, DK_COSINE_BINS - 1);
        const ivec truncated = __builtin_convertvector(bin, ivec);
        memcpy(bins + n * kLanes, &truncated, sizeof truncated);
      }
      const int first = begin > j ? begin - j : 0, last = end - j < kPanel ? end - j : kPanel;
      if (first == 0 && last == kPanel) {
#pragma GCC unroll 8
        for (int n = 0; n < kPanel; ++n) ++counts[n % CosineSums::kCopies][bins[n]];
      } else {
        c = keep_columns(c, j, begin, end, 0.0f);
        for (int n = first; n < last; ++n) ++counts[n % CosineSums::kCopies][bins[n]];
      }
      total = total + c;
      squares = madd(c, c, squares);
    }
    result.sums[part][0] += double(sum(sum_vectors(total)));
    result.sums[part][1] += double(sum(sum_vectors(squares)));
  }
}

// ---- moments of the features

void pack_features(const Job& job, const float* shift, const int64_t* order, int64_t count, Scratch& scratch,
                   float* panels, int64_t stride, float* sums, double* norms) {
  memset(sums, 0, size_t(job.padded_features) * sizeof(float));
  for (int64_t t = 0; t < count && t < kRowsAhead; ++t) prefetch_row(job, order[t]);
  for (int64_t t = 0; t < count; ++t, panels += kPanel) {
    if (t + kRowsAhead < count) prefetch_row(job, order[t + kRowsAhead]);
    const float* z = read_row(job, order[t], scratch.rows);
    const double norm = sqrt(square_sum(z, job.padded_features));
    norms[t] = norm < FLT_MIN ? 0.0 : norm;
    for (int64_t k = 0; k < job.padded_features; k += kPanel) {
      const Pack x = load_pack(z + k) - load_pack(shift + k);
      store_pack(panels + k * stride, x);
      store_pack(sums + k, load_pack(sums + k) + x);
    }
  }
}

void add_products(const Job& job, const Tile& tile, const Tile& other, Scratch& scratch, double* const* rows) {
  const bool upper = &tile == &other;
  similarities(job, tile, other, upper, scratch.weights);
  for (int i = 0; i < tile.tokens; ++i) {
    const float* row = scratch.weights + i * kWeightStride;
    double* to = rows[i];
    for (int j = upper ? i : 0; j < other.tokens; ++j) to[j] += double(row[j]);
  }
}

// ---- output rows

template <class T, class Narrow>
void scale_rows(const dk_scale_args& args, int64_t layer, int64_t begin, int64_t end, const Narrow& narrow) {
  const int64_t features = args.features, whole = features / kLanes * kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const float factor = args.scale[layer * args.rows + row] * args.factor[row / args.rows_per_factor];
    const float* grad = args.grads[layer] + row * features;
    T* out = (T*)args.out[layer] + row * features;
    for (int64_t k = 0; k < whole; k += kLanes) narrow(out + k, load(grad + k) * factor);
    if (whole == features) continue;
    float last[kLanes] = {};
    T narrowed[kLanes];
    memcpy(last, grad + whole, size_t(features - whole) * sizeof(float));
    narrow(narrowed, load(last) * factor);
    memcpy(out + whole, narrowed, size_t(features - whole) * sizeof(T));
  }
}

void scale(const dk_scale_args& args, int64_t layer, int64_t begin, int64_t end) {
  const auto as_float = [](float* p, vec v) { store(p, v); };
  const auto as_bfloat16 = [](uint16_t* p, vec v) { store_bfloat16(p, v); };
  const auto as_float16 = [](uint16_t* p, vec v) { store_float16(p, v); };
  switch (args.dtype) {
    case DK_FLOAT32: return scale_rows<float>(args, layer, begin, end, as_float);
    case DK_BFLOAT16: return scale_rows<uint16_t>(args, layer, begin, end, as_bfloat16);
    default: return scale_rows<uint16_t>(args, layer, begin, end, as_float16);
  }
}

}  // namespace
}  // namespace dk

#include "fit.h"

namespace dk {
namespace {

constexpr TileKernels kTileKernels = {kPanel, add_rows,   pack,   within, between, project, finish,
                                      fit,    model_sums, sample, expand, scale,   cosines, pack_features,
                                      add_products};

}  // namespace
}  // namespace dk
