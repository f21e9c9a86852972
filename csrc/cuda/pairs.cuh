// The common part of the kernels over pairs of tiles, whatever computes the similarities: the pair of tiles of a block,
// the statistics of its tokens, and the epilogue.
//
// A `Shape` describes which thread holds which element of a tile: the block's first kThreads threads, which meet at
// sync(), have the elements c[m][n][2 h + e] of token row() + kStepI m + 8 h + lane / 4 of I and token column() + 8 n +
// lane % 4 * 2 + e of J.
#pragma once

#include "tiles.cuh"

namespace dk {

enum class PairTiles { kLoss, kOnline, kWrite };

// Arguments of a launch; see pair_tiles.
template <class T>
struct PairTilesCall {
  using Stored = typename T::Stored;
  const char* z;
  const LayerOffsets& layers;
  int64_t stride_b, stride_l;
  const float *inverse, *weight_inverse, *extra, *shift;
  const int* pair_ids;
  Stored *weights, *mirror;
  int64_t weights_row_stride, weights_stride;
  float *sums, *maxima;
  int64_t sums_stride;
  int first_sum, first_row, batch, length, features, first_i, first_j, tiles_i, tiles_j, triangle;
  float p0, p1, p2, p3;
};

// The pair of tiles of a block.
struct PairOfBlock {
  int tile_i, tile_j, begin_i, begin_j, in_round, row, layer, b;
  int64_t sum_at;
  bool diagonal;
  bool paired;  // whether the block has a pair of tiles at all
};

// Statistics, for the epilogue, of the tokens on one side of a tile.
template <int kBlock>
struct Side {
  float inverse[kBlock], extra[kBlock], weight[kBlock];
  int pair_id[kBlock];
};

template <class Shape>
struct Scratch {
  Side<Shape::kBlock> i, j;
  float per_warp[Shape::kThreads / 32];
};

template <class T, int kBlock>
DK_DEVICE PairOfBlock pair_of_block(const PairTilesCall<T>& call) {
  PairOfBlock pair;
  const int number = blockIdx.x, tiles_i = call.tiles_i;
  pair.in_round = blockIdx.y;
  pair.row = call.first_row + pair.in_round;
  pair.paired = true;
  if (call.triangle) {
    // Line n of the rectangle is line n of the triangle, followed by line tiles_i - 1 - n.
    const int line = number / (tiles_i + 1), place = number % (tiles_i + 1);
    const bool second = place >= tiles_i - line;
    pair.tile_i = second ? tiles_i - 1 - line : line;
    pair.tile_j = second ? place - 1 : line + place;
    pair.paired = !second || pair.tile_i != line;  // the middle line of an odd number has no partner
  } else {
    pair.tile_i = number / call.tiles_j;
    pair.tile_j = number % call.tiles_j;
  }
  pair.begin_i = call.first_i + pair.tile_i * kBlock;
  pair.begin_j = call.first_j + pair.tile_j * kBlock;
  pair.diagonal = pair.begin_i == pair.begin_j;
  pair.layer = pair.row / call.batch;
  pair.b = pair.row % call.batch;
  pair.sum_at = pair.row * call.sums_stride + call.first_sum + number;
  return pair;
}

// Least and largest pair id of a tile; the least is above the largest where no token pairs. Every warp reads them all:
// waiting for another would take as long.
template <int kBlock>
DK_DEVICE int2 range_of_pair_ids(const int* pair_ids, int begin, int length) {
  int least = INT_MAX, largest = -1;
#pragma unroll
  for (int n = 0; n < kBlock / 32; ++n) {
    const int token = begin + 32 * n + int(threadIdx.x) % 32, pair_id = token < length ? pair_ids[token] : -1;
    if (pair_id >= 0) least = min(least, pair_id);
    largest = max(largest, pair_id);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    least = min(least, __shfl_xor_sync(0xffffffffu, least, lanes));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  return make_int2(least, largest);
}

// Whether the two tiles may have tokens of the same pair id.
template <class T, int kBlock>
DK_DEVICE bool pair_ids_overlap(const PairTilesCall<T>& call, const PairOfBlock& pair) {
  if (call.pair_ids == nullptr) return true;
  const int* pair_ids = call.pair_ids + int64_t(pair.b) * call.length;
  const int2 i = range_of_pair_ids<kBlock>(pair_ids, pair.begin_i, call.length);
  const int2 j = range_of_pair_ids<kBlock>(pair_ids, pair.begin_j, call.length);
  return i.x <= j.y && j.x <= i.y;
}

// Shared memory in which a tile's slopes are arranged for stores of 16 bytes.
template <class T, class Shape>
struct Staging {
  static constexpr int kBlock = Shape::kBlock;
  static constexpr int kBytes = int(sizeof(typename T::Stored));
  static constexpr int kChunks = kBlock * kBytes / 16;
  static_assert(kChunks % 8 == 0, "a permutation, of eight chunks, stays within its row");
  static_assert(kBlock * kBlock * kBytes <= Shape::kPanels, "the slopes are staged over the panels");
  static constexpr int kUnrolled = 4;  // a full unroll would keep more addresses than there are registers

  // Offset of a 16-byte chunk, in bytes. Chunks are permuted so that the fragments' rows are in different banks, both
  // as they are and transposed.
  static DK_DEVICE uint32_t offset(int row, int chunk, bool transposed) {
    const int permutation = kBytes == 2 || transposed ? row & 7 : (row & 3) << 1;
    return uint32_t(row * kBlock * kBytes + ((chunk ^ permutation) << 4));
  }

  static DK_DEVICE void put(char* staging, const float (&c)[4], int row, int column, float scale_0, float scale_1) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = row + 8 * half + lane / 4;
      const float x = c[2 * half] * scale_0, y = c[2 * half + 1] * scale_1;
      if constexpr (kBytes == 2) {
        *reinterpret_cast<uint32_t*>(staging + offset(to, column / 8, false) + lane % 4 * 4) = T::pack(x, y);
      } else {
        *reinterpret_cast<float2*>(staging + offset(to, column / 4 + lane % 4 / 2, false) + lane % 2 * 8) =
            make_float2(x, y);
      }
    }
  }

  static DK_DEVICE void put_transposed(char* staging, const float (&c)[4], int row, int column,
                                       const float (&scale)[2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = c[2 * half] * scale[half], y = c[2 * half + 1] * scale[half];
      if constexpr (kBytes == 2) {
        const uint32_t pair = transpose_matrix(T::pack(x, y));
        *reinterpret_cast<uint32_t*>(staging + offset(column + lane / 4, row / 8 + half, true) + lane % 4 * 4) = pair;
      } else {
        const int chunk = row / 4 + 2 * half + lane / 16, word = lane / 4 % 4 * 4, to = column + lane % 4 * 2;
        *reinterpret_cast<float*>(staging + offset(to, chunk, true) + word) = x;
        *reinterpret_cast<float*>(staging + offset(to + 1, chunk, true) + word) = y;
      }
    }
  }

  // Copies the slopes of existing tokens to the workspace, whose rows are padded to whole chunks; `stride` in elements.
  static DK_DEVICE void store(const char* staging, bool transposed, typename T::Stored* to, int64_t stride, int rows,
                              int columns) {
    for_each_chunk(to, stride, rows, columns, [&](uint4* chunk_of, int row, int chunk) {
      *chunk_of = *reinterpret_cast<const uint4*>(staging + offset(row, chunk, transposed));
    });
  }

  static DK_DEVICE void clear(typename T::Stored* to, int64_t stride, int rows, int columns) {
    for_each_chunk(to, stride, rows, columns, [](uint4* chunk_of, int, int) { *chunk_of = make_uint4(0, 0, 0, 0); });
  }

 private:
  template <class Function>
  static DK_DEVICE void for_each_chunk(typename T::Stored* to, int64_t stride, int rows, int columns, Function function) {
    static_assert(kBlock * kChunks % (kUnrolled * Shape::kThreads) == 0, "every thread has as many chunks");
#pragma unroll kUnrolled
    for (int n = 0; n < kBlock * kChunks / Shape::kThreads; ++n) {
      const int place = n * Shape::kThreads + int(threadIdx.x), row = place / kChunks, chunk = place % kChunks;
      if (row < rows && chunk * 16 < columns * kBytes)
        function(reinterpret_cast<uint4*>(to + row * stride) + chunk, row, chunk);
    }
  }
};

// Addresses in the workspace of the slopes of a pair of tiles, and of their mirror.
template <class T, class Shape>
DK_DEVICE typename T::Stored* weights_of(const PairTilesCall<T>& call, const PairOfBlock& pair) {
  return call.weights + pair.in_round * call.weights_row_stride +
         pair.tile_i * Shape::kBlock * call.weights_stride + pair.tile_j * Shape::kBlock;
}
template <class T, class Shape>
DK_DEVICE typename T::Stored* mirror_of(const PairTilesCall<T>& call, const PairOfBlock& pair) {
  return call.mirror + pair.in_round * call.weights_row_stride +
         pair.tile_j * Shape::kBlock * call.weights_stride + pair.tile_i * Shape::kBlock;
}

// The output of a block whose tiles have no pairs: sums and slopes of 0.
template <class T, class Shape, PairTiles kMode>
DK_DEVICE void leave_nothing(const PairTilesCall<T>& call, const PairOfBlock& pair) {
  if (threadIdx.x == 0) {
    call.sums[pair.sum_at] = 0.0f;
    if (kMode == PairTiles::kOnline) call.maxima[pair.sum_at] = kNoExponent;
  }
  if (kMode != PairTiles::kWrite || !pair.paired) return;
  const int rows = call.length - pair.begin_i, columns = call.length - pair.begin_j;
  Staging<T, Shape>::clear(weights_of<T, Shape>(call, pair), call.weights_stride, rows, columns);
  if (!pair.diagonal) Staging<T, Shape>::clear(mirror_of<T, Shape>(call, pair), call.weights_stride, columns, rows);
}

template <class T, class Potential, PairTiles kMode, class Shape>
DK_DEVICE void load_sides(Scratch<Shape>& scratch, const PairTilesCall<T>& call, const PairOfBlock& pair) {
  constexpr int kBlock = Shape::kBlock;
  const int64_t statistics = int64_t(pair.row) * call.length;
  const int* pair_ids = call.pair_ids == nullptr ? nullptr : call.pair_ids + int64_t(pair.b) * call.length;
  static_assert(2 * kBlock % Shape::kThreads == 0, "every thread has as many tokens");
#pragma unroll
  for (int turn = 0; turn < 2 * kBlock / Shape::kThreads; ++turn) {
    const int n = turn * Shape::kThreads + int(threadIdx.x);
    const bool is_i = n < kBlock;
    const int at = is_i ? n : n - kBlock, token = (is_i ? pair.begin_i : pair.begin_j) + at;
    const bool valid = token < call.length;
    Side<kBlock>& side = is_i ? scratch.i : scratch.j;
    side.inverse[at] = valid ? call.inverse[statistics + token] : 0.0f;
    if (Epilogue<Potential>::kUsesExtra) side.extra[at] = valid ? call.extra[statistics + token] : 0.0f;
    if (kMode == PairTiles::kWrite) side.weight[at] = valid ? call.weight_inverse[statistics + token] : 0.0f;
    side.pair_id[at] =
        is_i ? row_pair_id(pair_ids, token, call.length) : column_pair_id(pair_ids, token, call.length);
  }
}

// Epilogue: from the products c of the features the sum of psi and, with kWrite, the slopes, which go to the workspace
// by way of `staging`; nothing else uses that memory once all threads are here. A sync() must come between load_sides
// and this.
template <class T, class Potential, PairTiles kMode, class Shape>
DK_DEVICE void apply_potential(float (&c)[Shape::kM][Shape::kN][4], Scratch<Shape>& scratch, char* staging,
                           const PairTilesCall<T>& call, const PairOfBlock& pair) {
  constexpr int kM = Shape::kM, kN = Shape::kN, kWarps = Shape::kThreads / 32;
  static_assert(Shape::kThreads % 32 == 0 && kM * kN * 4 * Shape::kThreads == Shape::kBlock * Shape::kBlock,
                "the threads have every pair of the tile once");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = Shape::row(), column = Shape::column();
  const Side<Shape::kBlock>&side_i = scratch.i, &side_j = scratch.j;
  const Potential potential = Epilogue<Potential>::potential(call.p0, call.p1, call.p2, call.p3);
  const float offset = Epilogue<Potential>::offset(call.p0, call.p1, call.p2, call.p3);
  const float shift = (call.shift == nullptr ? 0.0f : call.shift[pair.row]) - offset;
  // J is never before I, so tile I reaches beyond the last token only if J does.
  const bool masked = call.pair_ids != nullptr || pair.diagonal || pair.begin_j + Shape::kBlock > call.length;
  float total = 0.0f, largest = kNoExponent;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + Shape::kStepI * m + 8 * half + lane / 4;
      const float inverse_i = side_i.inverse[i], extra_i = Epilogue<Potential>::kUsesExtra ? side_i.extra[i] : 0.0f;
      const int pair_id_i = side_i.pair_id[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = column + 8 * n + lane % 4 * 2 + e;
          float& element = c[m][n][2 * half + e];
          const float extra_j = Epilogue<Potential>::kUsesExtra ? side_j.extra[j] : 0.0f;
          const float s = similarity<Potential>(element, inverse_i, side_j.inverse[j], extra_i, extra_j);
          const bool pairs = !masked || (pair_id_i == side_j.pair_id[j] && pair.begin_i + i != pair.begin_j + j);
          if constexpr (kMode == PairTiles::kOnline) {
            const float exponent = potential.exponent(s, extra_i, extra_j, shift);
            element = pairs ? exponent : -INFINITY;
            largest = fmaxf(largest, element);
          } else {
            const Weights<float> evaluated = potential.evaluate(s, extra_i, extra_j, shift);
            element = pairs ? evaluated.slope : 0.0f;
            total += pairs ? evaluated.psi : 0.0f;
          }
        }
      }
    }
  }
  if constexpr (kMode == PairTiles::kOnline) {
    largest = largest_of_warp(largest);
    if (lane == 0) scratch.per_warp[warp] = largest;
    Shape::sync();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, scratch.per_warp[w]);
    Shape::sync();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) total += exponential(c[m][n][e] - largest);
  }
  total = sum_of_warp(total);
  if (lane == 0) scratch.per_warp[warp] = total;
  Shape::sync();
  if (threadIdx.x == 0) {
    total = scratch.per_warp[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += scratch.per_warp[w];
    call.sums[pair.sum_at] = pair.diagonal ? total : 2.0f * total;
    if (kMode == PairTiles::kOnline) call.maxima[pair.sum_at] = largest;
  }

  // The slopes, then their mirror, to the workspace.
  if constexpr (kMode == PairTiles::kWrite) {
    const int rows = call.length - pair.begin_i, columns = call.length - pair.begin_j;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int j = column + 8 * n + lane % 4 * 2;
        Staging<T, Shape>::put(staging, c[m][n], row + Shape::kStepI * m, column + 8 * n, side_j.weight[j],
                               side_j.weight[j + 1]);
      }
    Shape::sync();
    Staging<T, Shape>::store(staging, false, weights_of<T, Shape>(call, pair), call.weights_stride, rows, columns);
    if (pair.diagonal) return;
    Shape::sync();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int i = row + Shape::kStepI * m + lane / 4;
      const float scale[2] = {side_i.weight[i], side_i.weight[i + 8]};
#pragma unroll
      for (int n = 0; n < kN; ++n)
        Staging<T, Shape>::put_transposed(staging, c[m][n], row + Shape::kStepI * m, column + 8 * n, scale);
    }
    Shape::sync();
    Staging<T, Shape>::store(staging, true, mirror_of<T, Shape>(call, pair), call.weights_stride, columns, rows);
  }
}

}  // namespace dk
