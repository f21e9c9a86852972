// Similarities, potential and slope over pairs of tiles of tokens; the slopes go to a workspace, for the library's
// matrix products.
#pragma once

#include "tiles.cuh"

namespace dk {

enum class PairTiles { kLoss, kOnline, kWrite };

// What the epilogue needs of the tokens on one side of a tile.
template <int kBlock>
struct Side {
  float inverse[kBlock], extra[kBlock], weight[kBlock];
  int group[kBlock];
};

template <class T>
struct PairTilesShape {
  static constexpr int kBlock = sizeof(typename T::Stored) == 2 ? 128 : 64;
  static constexpr int kRowBytes = sizeof(typename T::Stored) == 2 ? 64 : 128;
  static constexpr int kStages = 3;
  static constexpr int kWarpsI = 2, kWarpsJ = sizeof(typename T::Stored) == 2 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarpsI * kWarpsJ;
  static constexpr int kPanel = kBlock * kRowBytes;
  static constexpr int kPanels = kStages * 2 * kPanel;
  static constexpr int kShared = kPanels + 2 * int(sizeof(Side<kBlock>));
  static_assert(kBlock * kBlock * int(sizeof(typename T::Stored)) <= kPanels, "the slopes are staged over the panels");
};

// Where a tile's slopes wait for stores of 16 bytes.
template <class T>
struct Staging {
  static constexpr int kBlock = PairTilesShape<T>::kBlock;
  static constexpr int kBytes = int(sizeof(typename T::Stored));
  static constexpr int kChunks = kBlock * kBytes / 16;

  // Chunks are permuted so that the fragments' rows lie in different banks, as they come and transposed.
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

  // To the workspace, as far as there are tokens; its rows are padded to whole chunks.
  static DK_DEVICE void store(const char* staging, bool transposed, typename T::Stored* to, int64_t stride, int rows,
                              int columns) {
    for (int place = threadIdx.x; place < kBlock * kChunks; place += PairTilesShape<T>::kThreads) {
      const int row = place / kChunks, chunk = place % kChunks;
      if (row < rows && chunk * 16 < columns * kBytes)
        *reinterpret_cast<uint4*>(reinterpret_cast<char*>(to + row * stride) + chunk * 16) =
            *reinterpret_cast<const uint4*>(staging + offset(row, chunk, transposed));
    }
  }

  static DK_DEVICE void clear(typename T::Stored* to, int64_t stride, int rows, int columns) {
    for (int place = threadIdx.x; place < kBlock * kChunks; place += PairTilesShape<T>::kThreads) {
      const int row = place / kChunks, chunk = place % kChunks;
      if (row < rows && chunk * 16 < columns * kBytes)
        *reinterpret_cast<uint4*>(reinterpret_cast<char*>(to + row * stride) + chunk * 16) = make_uint4(0, 0, 0, 0);
    }
  }
};

// One pair of tiles of tokens (I, J) of one row: the sum of psi over its pairs, in both orders, and, with kWrite, the
// slopes times the inverse norm of the column, to the workspace, and those of (J, I). With kOnline the sum is relative
// to the largest exponent of the tile, which goes to `maxima`.
//
// blockIdx.x is a pair of the upper triangle of tiles_i x tiles_i, folded to a rectangle, or, without `triangle`, of
// tiles_i x tiles_j; both count from the tokens first_i and first_j. blockIdx.y + first_row is the row. `shift`,
// `groups`, `group_ranges` and `mirror` may be null.
template <class T, class Potential, PairTiles kMode>
DK_DEVICE void pair_tiles(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l,
                          const float* inverse, const float* weight_inverse, const float* extra, const float* shift,
                          const int* groups, const int* group_ranges, typename T::Stored* weights,
                          typename T::Stored* mirror, int64_t weights_row_stride, int64_t weights_stride, float* sums,
                          float* maxima, int64_t sums_stride, int first_sum, int first_row, int batch, int length,
                          int features, int first_i, int first_j, int tiles_i, int tiles_j, int triangle, float p0,
                          float p1, float p2, float p3) {
  using Shape = PairTilesShape<T>;
  using Stored = typename T::Stored;
  constexpr int kBlock = Shape::kBlock, kRowBytes = Shape::kRowBytes, kThreads = Shape::kThreads;
  constexpr int kStages = Shape::kStages;
  constexpr int kM = kBlock / Shape::kWarpsI / 16, kN = kBlock / Shape::kWarpsJ / 8;
  extern __shared__ __align__(128) char shared[];
  __shared__ float of_warps[kThreads / 32];
  Side<kBlock>& side_i = *reinterpret_cast<Side<kBlock>*>(shared + Shape::kPanels);
  Side<kBlock>& side_j = *(&side_i + 1);

  const int number = blockIdx.x, in_round = blockIdx.y, row = first_row + in_round;
  int tile_i, tile_j;
  bool nobody = false;
  if (triangle) {
    // Line n of the rectangle is line n of the triangle and, behind it, line tiles - 1 - n.
    const int line = number / (tiles_i + 1), place = number % (tiles_i + 1);
    const bool second = place >= tiles_i - line;
    tile_i = second ? tiles_i - 1 - line : line;
    tile_j = second ? place - 1 : line + place;
    nobody = second && tile_i == line;  // the middle line of an odd number has no partner
  } else {
    tile_i = number / tiles_j;
    tile_j = number % tiles_j;
  }
  const int begin_i = first_i + tile_i * kBlock, begin_j = first_j + tile_j * kBlock;
  const bool diagonal = begin_i == begin_j;
  const int layer = row / batch, b = row % batch;
  const int64_t sum_at = row * sums_stride + first_sum + number;

  if (group_ranges != nullptr && !nobody) {
    const int* ranges = group_ranges + int64_t(b) * 2 * ((length + kBlock - 1) / kBlock);
    const int* range_i = ranges + 2 * (begin_i / kBlock);
    const int* range_j = ranges + 2 * (begin_j / kBlock);
    nobody = range_i[0] > range_j[1] || range_j[0] > range_i[1];
    if (nobody && kMode == PairTiles::kWrite) {
      const int64_t in_workspace = in_round * weights_row_stride;
      const int at_i = tile_i * kBlock, at_j = tile_j * kBlock;
      Staging<T>::clear(weights + in_workspace + at_i * weights_stride + at_j, weights_stride, length - begin_i,
                        length - begin_j);
      if (!diagonal)
        Staging<T>::clear(mirror + in_workspace + at_j * weights_stride + at_i, weights_stride, length - begin_j,
                          length - begin_i);
    }
  }
  if (nobody) {
    if (threadIdx.x == 0) {
      sums[sum_at] = 0.0f;
      if (kMode == PairTiles::kOnline) maxima[sum_at] = kNoExponent;
    }
    return;
  }

  // What the epilogue needs of the tokens.
  const int64_t statistics = int64_t(row) * length;
  const int* groups_b = groups == nullptr ? nullptr : groups + int64_t(b) * length;
  for (int n = threadIdx.x; n < 2 * kBlock; n += kThreads) {
    const bool of_i = n < kBlock;
    const int at = of_i ? n : n - kBlock, token = (of_i ? begin_i : begin_j) + at;
    const bool valid = token < length;
    Side<kBlock>& side = of_i ? side_i : side_j;
    side.inverse[at] = valid ? inverse[statistics + token] : 0.0f;
    if (Epilogue<Potential>::kUsesExtra) side.extra[at] = valid ? extra[statistics + token] : 0.0f;
    if (kMode == PairTiles::kWrite) side.weight[at] = valid ? weight_inverse[statistics + token] : 0.0f;
    side.group[at] = of_i ? group_of_row(groups_b, token, length) : group_of_column(groups_b, token, length);
  }

  // Similarities.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_i = warp / Shape::kWarpsJ * (16 * kM), row_j = warp % Shape::kWarpsJ * (8 * kN);
  const char* tokens = z + layers.of_layer[layer] + b * stride_b * int64_t(sizeof(Stored));
  const int64_t stride_bytes = stride_l * int64_t(sizeof(Stored));
  const int feature_bytes = features * int(sizeof(Stored));
  const int steps = (feature_bytes + kRowBytes - 1) / kRowBytes;
  const uint32_t panels = shared_address(shared);
  const auto copy_step = [&](int step) {
    if (step < steps) {
      const uint32_t panel = panels + step % kStages * 2 * Shape::kPanel;
      copy_panel<kBlock, kRowBytes, kThreads>(panel, tokens, stride_bytes, begin_i, length, step * kRowBytes,
                                              feature_bytes);
      copy_panel<kBlock, kRowBytes, kThreads>(panel + Shape::kPanel, tokens, stride_bytes, begin_j, length,
                                              step * kRowBytes, feature_bytes);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  float c[kM][kN][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step's panels have come, and everyone is done with those of the last
    copy_step(step + kStages - 1);
    const uint32_t panel = panels + step % kStages * 2 * Shape::kPanel;
    multiply_panels<T, kRowBytes, kM, kN>(c, panel, row_i, panel + Shape::kPanel, row_j);
  }

  // Potential and slope, in place.
  const Potential potential = Epilogue<Potential>::potential(p0, p1, p2, p3);
  const float offset = Epilogue<Potential>::offset(p0, p1, p2, p3);
  const float total_shift = (shift == nullptr ? 0.0f : shift[row]) - offset;
  // J is never before I, so I reaches beyond the last token only if J does.
  const bool masked = groups != nullptr || diagonal || begin_j + kBlock > length;
  float total = 0.0f, largest = kNoExponent;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row_i + 16 * m + 8 * half + lane / 4;
      const float inverse_i = side_i.inverse[i], extra_i = Epilogue<Potential>::kUsesExtra ? side_i.extra[i] : 0.0f;
      const int group_i = side_i.group[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = row_j + 8 * n + lane % 4 * 2 + e;
          float& element = c[m][n][2 * half + e];
          const float extra_j = Epilogue<Potential>::kUsesExtra ? side_j.extra[j] : 0.0f;
          const float s = similarity<Potential>(element, inverse_i, side_j.inverse[j], extra_i, extra_j);
          const bool pair = !masked || (group_i == side_j.group[j] && begin_i + i != begin_j + j);
          if constexpr (kMode == PairTiles::kOnline) {
            const float exponent = potential.exponent(s, extra_i, extra_j, total_shift);
            element = pair ? exponent : -INFINITY;
            largest = fmaxf(largest, element);
          } else {
            const Weights<float> of_pair = potential.weigh(s, extra_i, extra_j, total_shift);
            element = pair ? of_pair.slope : 0.0f;
            total += pair ? of_pair.psi : 0.0f;
          }
        }
      }
    }
  }
  if constexpr (kMode == PairTiles::kOnline) {
    largest = largest_of_warp(largest);
    if (lane == 0) of_warps[warp] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) largest = fmaxf(largest, of_warps[w]);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) total += exponential(c[m][n][e] - largest);
  }
  total = sum_of_warp(total);
  if (lane == 0) of_warps[warp] = total;
  wait_for_copies<0>();
  __syncthreads();  // the panels are free, too
  if (threadIdx.x == 0) {
    total = of_warps[0];
#pragma unroll
    for (int w = 1; w < kThreads / 32; ++w) total += of_warps[w];
    sums[sum_at] = diagonal ? total : 2.0f * total;
    if (kMode == PairTiles::kOnline) maxima[sum_at] = largest;
  }

  // Slopes to the workspace, and their mirror.
  if constexpr (kMode == PairTiles::kWrite) {
    const int64_t in_workspace = in_round * weights_row_stride;
    const int at_i = tile_i * kBlock, at_j = tile_j * kBlock;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int j = row_j + 8 * n + lane % 4 * 2;
        Staging<T>::put(shared, c[m][n], row_i + 16 * m, row_j + 8 * n, side_j.weight[j], side_j.weight[j + 1]);
      }
    __syncthreads();
    Staging<T>::store(shared, false, weights + in_workspace + at_i * weights_stride + at_j, weights_stride,
                      length - begin_i, length - begin_j);
    if (diagonal) return;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int i = row_i + 16 * m + lane / 4;
      const float scale[2] = {side_i.weight[i], side_i.weight[i + 8]};
#pragma unroll
      for (int n = 0; n < kN; ++n)
        Staging<T>::put_transposed(shared, c[m][n], row_i + 16 * m, row_j + 8 * n, scale);
    }
    __syncthreads();
    Staging<T>::store(shared, true, mirror + in_workspace + at_j * weights_stride + at_i, weights_stride,
                      length - begin_j, length - begin_i);
  }
}

}  // namespace dk
