// The kernel that sweeps one tile of tokens over all their partners and keeps no slope in memory.
#pragma once

#include "tiles.cuh"

namespace dk {

enum class RowSweep { kLoss, kOnline, kGradient, kPartition, kEntropy, kEntropyGradient };

template <class T, class Potential, RowSweep kPass, bool kResident>
struct RowSweepShape {
  static constexpr bool kGradient = kPass == RowSweep::kGradient || kPass == RowSweep::kEntropyGradient;
  static constexpr int kBytes = int(sizeof(typename T::Stored));
  static constexpr int kRows = 64, kColumns = kBytes == 2 ? 64 : 32;
  static constexpr int kWarps = kRows / 16, kThreads = 32 * kWarps, kStages = 3;
  static constexpr int kRowBytes = 128, kPanelFeatures = kRowBytes / kBytes;
  // Panels of the gradient in registers; fewer beside a long epilogue, which needs registers itself.
  static constexpr bool kLong = Epilogue<Potential>::kLong || kPass == RowSweep::kEntropyGradient;
  static constexpr int kPanels = kBytes == 4 || kResident ? 2 : kLong ? 3 : 4;
  static constexpr int kSlice = kGradient ? kPanels * kPanelFeatures : 0;
  static constexpr int kPanelI = kRows * kRowBytes, kPanelJ = kColumns * kRowBytes;
  // Bytes of a stage: all features of the tokens J, or one panel of them beside one of the tokens I.
  static constexpr int kStage = kResident ? kPanels * kPanelJ : kPanelI + kPanelJ;
  static constexpr int kStatistics = kResident ? kPanels * kPanelI + kStages * kStage : kStages * kStage;
  static constexpr int kShared = kStatistics + kStages * 3 * kColumns * int(sizeof(float));
  static_assert(kRows % 16 == 0, "a warp has 16 rows");
  static_assert(kRowBytes == 128, "multiply_weights adds to the features of 128 bytes");
};

// G += W B. A thread has the rows lane / 4 and lane / 4 + 8 of W in `weights`, in the layout of the products; row j of
// the panel, B, is the token of W's column j.
template <class T, int kColumns>
DK_DEVICE void multiply_weights(float (*g)[4], const float (&weights)[kColumns / 8][4], uint32_t panel) {
  static_assert(kColumns % 16 == 0, "columns are multiplied 16 (or 8) at a time");
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(typename T::Stored) == 2) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const uint32_t a[4] = {T::pack(weights[2 * k][0], weights[2 * k][1]),
                             T::pack(weights[2 * k][2], weights[2 * k][3]),
                             T::pack(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                             T::pack(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, panel + panel_offset<128>(16 * k + lane % 16, 2 * n + lane / 16));
        T::multiply(g[2 * n], a, b[0], b[1]);
        T::multiply(g[2 * n + 1], a, b[2], b[3]);
      }
    }
  } else {
    // The order of a sum's terms is free: the instruction's columns t and t + 4 are tokens 2t and 2t + 1, as in the
    // layout of the products.
    Products<T, 1, 4> sums;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.sums[0][n][e] = g[n][e];
#pragma unroll
    for (int k = 0; k < kColumns / 8; ++k) {
      const uint32_t a[4] = {__float_as_uint(weights[k][0]), __float_as_uint(weights[k][2]),
                             __float_as_uint(weights[k][1]), __float_as_uint(weights[k][3])};
      const int token = 8 * k + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int chunk = 2 * n + lane / 16;
        uint32_t b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          asm volatile("ld.shared.b32 %0, [%1];"
                       : "=r"(b[e])
                       : "r"(panel + panel_offset<128>(token + e, chunk) + lane / 4 % 4 * 4)
                       : "memory");
        sums.add(0, n, a, b[0], b[1]);
      }
    }
    sums.flush();
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) g[n][e] = sums.sums[0][n][e];
  }
}

// Kernel body: sums of the tokens of tile blockIdx.x of row blockIdx.y over their pairs.
//
// kLoss: for each token the sum of psi over its pairs with tokens of its own tile and, counted twice, of later tiles.
// kOnline: the sum of kLoss, relative to the token's largest exponent, which goes to `maxima`.
// kGradient: the sum of psi over all of a token's pairs, and slice blockIdx.z, of kSlice features, of G_i = sum_j
// slope_ij x_j.
// Passes of perplexity_entropy, with P_ij = min(exp2(e_ij - largest_i), 1) / total_i, because one pass may round e_ij
// above the largest of another; p2 is eps, and the potential's p2 is 0:
// kPartition: total to `sums` and largest to `maxima`, over all pairs.
// kEntropy: sum_j P_ij h_ij to `sums` and sum_j P_ij g_ij to `maxima`.
// kEntropyGradient: G_i with the slopes P_ij (g_ij - expected_i) + P_ji (g_ji - expected_j).
//
// kResident: all features fit kSlice, so the tokens of I stay in shared memory, and those of J are read once for both
// products. `shift`, one number per token, `pair_ids`, `tile_ranges` and `weight_sums` may be null.
template <class T, class Potential, RowSweep kPass, bool kResident>
DK_DEVICE void row_sweep(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l,
                         const float* inverse, const float* weight_inverse, const float* extra, const float* shift,
                         const int* pair_ids, const int* tile_ranges, const float* largest, const float* total,
                         const float* expected, const float* average, float* sums, float* maxima, float* weight_sums,
                         float* gradient, const LayerOffsets& gradients, int batch, int length, int features, float p0,
                         float p1, float p2, float p3) {
  using Shape = RowSweepShape<T, Potential, kPass, kResident>;
  using Stored = typename T::Stored;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kStages = Shape::kStages, kRowBytes = Shape::kRowBytes, kPanels = Shape::kPanels;
  constexpr int kStepsOfFlush = kFeaturesOfFlush * 4 / kRowBytes;
  constexpr bool kGradient = Shape::kGradient;
  // Sums of the weights are needed where tokens are not normalized.
  constexpr bool kSumsWeights = Epilogue<Potential>::kUsesExtra && !Epilogue<Potential>::kCentred;
  constexpr bool kEntropies = kPass == RowSweep::kEntropy || kPass == RowSweep::kEntropyGradient;
  static_assert(kRows % kColumns == 0, "kLoss begins with the columns of its own rows");
  static_assert(kGradient || !kResident, "only the gradient keeps its tokens");
  extern __shared__ __align__(128) char shared[];

  const int row = blockIdx.y, layer = row / batch, b = row % batch, lane = threadIdx.x % 32;
  const int begin_i = blockIdx.x * kRows, row_i = int(threadIdx.x) / 32 * 16;
  const int first_byte = kGradient ? int(blockIdx.z) * kPanels * kRowBytes : 0;
  const int64_t statistics = int64_t(row) * length;
  const int* pair_ids_b = pair_ids == nullptr ? nullptr : pair_ids + int64_t(b) * length;
  int first_tile = 0, end_tile = (length + kColumns - 1) / kColumns;
  if (tile_ranges != nullptr) {
    const int* ranges = tile_ranges + 2 * (int64_t(b) * gridDim.x + blockIdx.x);
    first_tile = ranges[0];
    end_tile = ranges[1];
  }
  if (kPass == RowSweep::kLoss || kPass == RowSweep::kOnline)
    first_tile = max(first_tile, int(blockIdx.x) * (kRows / kColumns));

  // Statistics, for the epilogue, of the thread's two tokens of I.
  float inverse_i[2], extra_i[2], shift_i[2], largest_i[2], per_total_i[2], average_i[2], expected_i[2];
  int pair_id_i[2];
  const Potential potential = Epilogue<Potential>::potential(p0, p1, kEntropies ? 0.0f : p2, p3);
  const float offset = Epilogue<Potential>::offset(p0, p1, p2, p3);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = begin_i + row_i + 8 * half + lane / 4;
    const bool valid = token < length;
    const int64_t at = statistics + token;
    inverse_i[half] = valid ? inverse[at] : 0.0f;
    extra_i[half] = valid && Epilogue<Potential>::kUsesExtra ? extra[at] : 0.0f;
    shift_i[half] = (valid && shift != nullptr ? shift[at] : 0.0f) - offset;
    pair_id_i[half] = row_pair_id(pair_ids_b, token, length);
    if constexpr (kEntropies) {
      largest_i[half] = valid ? largest[at] : 0.0f;
      per_total_i[half] = 1.0f / (valid ? total[at] : 1.0f);
      average_i[half] = valid ? average[at] : 1.0f;
      expected_i[half] = kPass == RowSweep::kEntropyGradient && valid ? expected[at] : 0.0f;
    }
  }

  // Steps of copies for one tile J: one (resident), or one for each panel of features and then one for each panel of
  // the gradient. Copies run kStages - 1 steps ahead of the products.
  const char* tokens = z + layers.offset[layer] + b * stride_b * int64_t(sizeof(Stored));
  const int64_t stride_bytes = stride_l * int64_t(sizeof(Stored));
  const int feature_bytes = features * int(sizeof(Stored));
  const int products = kResident ? 1 : (feature_bytes + kRowBytes - 1) / kRowBytes;
  const int gradient_panels =
      !kGradient ? 0 : min(kPanels, (feature_bytes - first_byte + kRowBytes - 1) / kRowBytes);
  const int steps = products + (kResident ? 0 : gradient_panels);
  const uint32_t memory = shared_address(shared);
  const uint32_t stages = memory + (kResident ? kPanels * Shape::kPanelI : 0);
  float* const column_statistics = reinterpret_cast<float*>(shared + Shape::kStatistics);
  int copied_tile = first_tile, copied_step = 0, copied_stage = 0, slot = 0;
  const auto copy_step = [&] {
    if (copied_tile < end_tile) {
      const uint32_t stage = stages + copied_stage * Shape::kStage;
      const int begin_j = copied_tile * kColumns;
      if constexpr (kResident) {
#pragma unroll
        for (int p = 0; p < kPanels; ++p)
          if (p < gradient_panels)
            copy_panel<kColumns, kRowBytes, kThreads>(stage + p * Shape::kPanelJ, tokens, stride_bytes, begin_j,
                                                      length, p * kRowBytes, feature_bytes);
      } else {
        const bool product = copied_step < products;
        const int byte = product ? copied_step * kRowBytes : first_byte + (copied_step - products) * kRowBytes;
        if (product)
          copy_panel<kRows, kRowBytes, kThreads>(stage, tokens, stride_bytes, begin_i, length, byte, feature_bytes);
        copy_panel<kColumns, kRowBytes, kThreads>(stage + Shape::kPanelI, tokens, stride_bytes, begin_j, length, byte,
                                                  feature_bytes);
      }
      if (copied_step == 0) {
        const uint32_t to = shared_address(column_statistics) + slot * 3 * kColumns * 4;
        static_assert(kColumns <= kThreads, "a thread has at most one column");
        if (const int n = threadIdx.x; n < kColumns) {
          const int token = begin_j + n, bytes = token < length ? 4 : 0;
          const int64_t at = statistics + min(token, length - 1);
          copy_async_4(to + n * 4, inverse + at, bytes);
          if (Epilogue<Potential>::kUsesExtra) copy_async_4(to + (kColumns + n) * 4, extra + at, bytes);
          if (kGradient) copy_async_4(to + (2 * kColumns + n) * 4, weight_inverse + at, bytes);
        }
        slot = slot + 1 == kStages ? 0 : slot + 1;
      }
      if (++copied_step == steps) {
        copied_step = 0;
        ++copied_tile;
      }
      copied_stage = copied_stage + 1 == kStages ? 0 : copied_stage + 1;
    }
    commit_copies();
  };
  int stage_number = 0;
  // Waits for the panels of the next step and returns their stage; starts the copies of a later step.
  const auto next_stage = [&] {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    copy_step();
    const uint32_t stage = stages + stage_number * Shape::kStage;
    stage_number = stage_number + 1 == kStages ? 0 : stage_number + 1;
    return stage;
  };

  if constexpr (kResident) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      if (p < gradient_panels)
        copy_panel<kRows, kRowBytes, kThreads>(memory + p * Shape::kPanelI, tokens, stride_bytes, begin_i, length,
                                               p * kRowBytes, feature_bytes);
  }
#pragma unroll
  for (int n = 0; n < kStages - 1; ++n) copy_step();

  float g[kGradient ? kPanels * Shape::kPanelFeatures / 8 : 1][4] = {};
  float sum[2] = {}, maximum[2] = {kNoExponent, kNoExponent}, g_sum[2] = {}, weight_sum[2] = {};
  int used_slot = 0;
  for (int tile_j = first_tile; tile_j < end_tile; ++tile_j) {
    const int begin_j = tile_j * kColumns;
    Products<T, 1, kColumns / 8> tile_products;
    uint32_t stage = 0;
    if constexpr (kResident) {
      stage = next_stage();
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
        if (p < gradient_panels)
          multiply_panels<T, kRowBytes, 1, kColumns / 8>(tile_products, memory + p * Shape::kPanelI, row_i,
                                                          stage + p * Shape::kPanelJ, 0);
    } else {
      for (int step = 0; step < products; ++step) {
        stage = next_stage();
        multiply_panels<T, kRowBytes, 1, kColumns / 8>(tile_products, stage, row_i, stage + Shape::kPanelI, 0);
        if (step % kStepsOfFlush == kStepsOfFlush - 1) tile_products.flush();
      }
    }
    tile_products.flush();
    float(&c)[1][kColumns / 8][4] = tile_products.sums;

    const float* inverse_j = column_statistics + used_slot * 3 * kColumns;
    const float* extra_j = inverse_j + kColumns;
    const float* weight_j = inverse_j + 2 * kColumns;
    used_slot = used_slot + 1 == kStages ? 0 : used_slot + 1;
    const bool own = begin_j < begin_i + kRows && begin_i < begin_j + kColumns;
    const bool masked = pair_ids != nullptr || own || begin_j + kColumns > length;
    float now[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = 8 * n + lane % 4 * 2 + e;
        const float q_j = Epilogue<Potential>::kUsesExtra ? extra_j[j] : 0.0f;
        const int pair_id_j = masked ? column_pair_id(pair_ids_b, begin_j + j, length) : 0;
        float largest_j = 0.0f, per_total_j = 0.0f, average_j = 1.0f, expected_j = 0.0f;
        if constexpr (kPass == RowSweep::kEntropyGradient) {
          if (begin_j + j < length) {
            const int64_t at = statistics + begin_j + j;
            largest_j = largest[at];
            per_total_j = 1.0f / total[at];
            average_j = average[at];
            expected_j = expected[at];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& element = c[0][n][2 * half + e];
          const float s = similarity<Potential>(element, inverse_i[half], inverse_j[j], extra_i[half], q_j);
          const bool pair =
              !masked || (pair_id_i[half] == pair_id_j && begin_i + row_i + 8 * half + lane / 4 != begin_j + j);
          if constexpr (kPass == RowSweep::kOnline || kPass == RowSweep::kPartition) {
            const float exponent = potential.exponent(s, extra_i[half], q_j, shift_i[half]);
            element = pair ? exponent : -INFINITY;
            now[half] = fmaxf(now[half], element);
          } else if constexpr (kEntropies) {
            const float exponent = potential.exponent(s, extra_i[half], q_j, shift_i[half]);
            const float p = pair ? fminf(exponential(exponent - largest_i[half]), 1.0f) * per_total_i[half] : 0.0f;
            const Information<float> information_i = information(p, average_i[half], p2);
            if constexpr (kPass == RowSweep::kEntropy) {
              sum[half] = fmaf(p, information_i.h, sum[half]);
              g_sum[half] = fmaf(p, information_i.g, g_sum[half]);
            } else {
              const float mirrored = pair ? fminf(exponential(exponent - largest_j), 1.0f) * per_total_j : 0.0f;
              const Information<float> information_j = information(mirrored, average_j, p2);
              element = p * (information_i.g - expected_i[half]) + mirrored * (information_j.g - expected_j);
            }
          } else {
            const Weights<float> evaluated = potential.evaluate(s, extra_i[half], q_j, shift_i[half]);
            const float psi = pair ? evaluated.psi : 0.0f;
            sum[half] += kPass == RowSweep::kGradient || own ? psi : 2.0f * psi;
            element = pair ? evaluated.slope : 0.0f;
          }
        }
      }
    }
    if constexpr (kPass == RowSweep::kOnline || kPass == RowSweep::kPartition) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) added += exponential(c[0][n][2 * half + e] - now[half]);
        if (kPass == RowSweep::kOnline && !own) added *= 2.0f;
        sum[half] = fmaf(sum[half], exponential(maximum[half] - now[half]), added);
        maximum[half] = now[half];
      }
    }
    if constexpr (kGradient) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = weight_j[8 * n + lane % 4 * 2 + e];
          c[0][n][e] *= weight;
          c[0][n][2 + e] *= weight;
        }
      if (kSumsWeights && weight_sums != nullptr) {
        // Sum of the rounded weights, which the product with z_j has, too, so that a part common to z_i and z_j
        // cancels.
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 pair = make_float2(c[0][n][2 * half], c[0][n][2 * half + 1]);
            if constexpr (sizeof(Stored) == 2) pair = T::unpack(T::pack(pair.x, pair.y));
            weight_sum[half] += pair.x + pair.y;
          }
      }
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
        if (p < gradient_panels) {
          const uint32_t panel = kResident ? stage + p * Shape::kPanelJ : next_stage() + Shape::kPanelI;
          multiply_weights<T, kColumns>(g + p * (Shape::kPanelFeatures / 8), c[0], panel);
        }
    }
  }
  wait_for_copies<0>();

  // Sums over the four threads that share a token's columns. The asm keeps the compiler from holding the addresses in
  // registers from the beginning.
  int end_row = begin_i + row_i;
  asm volatile("" : "+r"(end_row));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = end_row + 8 * half + lane / 4;
    const bool writes = token < length && lane % 4 == 0 && blockIdx.z == 0;
    if constexpr (kPass == RowSweep::kOnline || kPass == RowSweep::kPartition) {
      float largest_of_four = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 1));
      largest_of_four = fmaxf(largest_of_four, __shfl_xor_sync(0xffffffffu, largest_of_four, 2));
      sum[half] *= exponential(maximum[half] - largest_of_four);
      if (writes) maxima[statistics + token] = largest_of_four;
    }
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    if constexpr (kPass != RowSweep::kEntropyGradient)
      if (writes) sums[statistics + token] = sum[half];
    if constexpr (kPass == RowSweep::kEntropy) {
      g_sum[half] += __shfl_xor_sync(0xffffffffu, g_sum[half], 1);
      g_sum[half] += __shfl_xor_sync(0xffffffffu, g_sum[half], 2);
      if (writes) maxima[statistics + token] = g_sum[half];
    }
    if constexpr (kGradient) {
      weight_sum[half] += __shfl_xor_sync(0xffffffffu, weight_sum[half], 1);
      weight_sum[half] += __shfl_xor_sync(0xffffffffu, weight_sum[half], 2);
      if (kSumsWeights && writes && weight_sums != nullptr) weight_sums[statistics + token] = weight_sum[half];
      float* to = gradient + gradients.offset[layer] / int64_t(sizeof(float)) +
                  (int64_t(b) * length + token) * features;
#pragma unroll
      for (int n = 0; n < kPanels * Shape::kPanelFeatures / 8; ++n) {
        const int feature = first_byte / int(sizeof(Stored)) + 8 * n + lane % 4 * 2;
        if (token < length && feature < features) to[feature] = g[n][2 * half];
        if (token < length && feature + 1 < features) to[feature + 1] = g[n][2 * half + 1];
      }
    }
  }
}

}  // namespace dk
