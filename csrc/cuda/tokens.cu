// The kernels that read each token by itself, one warp per token, for every element type; and the sums of sequences.
#include "kernels.h"
#include "tiles.cuh"

namespace dk {

template <class T>
struct Token {
  const typename T::Stored* z;
  int features;

  DK_DEVICE float operator[](int feature) const { return T::to_float(z[feature]); }
};

template <class T>
DK_DEVICE Token<T> token_at(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l, int row,
                            int batch, int token, int features) {
  const char* layer = z + layers.offset[row / batch];
  return {reinterpret_cast<const typename T::Stored*>(layer) + row % batch * stride_b + token * stride_l, features};
}

// Least norm whose squares and products fp32 holds.
constexpr float kLeastNorm = 0x1p-50f;
// Largest |z|^2, and q |z|^2, of potentials of the distance: sums of four stay finite.
constexpr float kLargestSquare = 0.03f * FLT_MAX;

// Hash of a feature's place and bits, the same for 0 and -0; the sum over the features distinguishes tokens.
DK_DEVICE uint32_t key_of(float x, int feature) {
  const uint32_t bits = __float_as_uint(x + 0.0f), place = uint32_t(feature + 1) * 0x9E3779B1u;
  return (bits ^ (bits >> 15)) * ((place ^ (place >> 15)) | 1u);
}

// Statistics of each token for the epilogue: its norm r, the inverse it is multiplied by, and a second number, extra.
// kNormalize: r = |z|, inverse 1 / (r + eps) or 0, extra a tiny number that equal tokens share and other tokens hardly
// ever do, or -q for a zero token. kStandardize: r = |z - mean|, inverse 1 / r, or 0 for a constant token, extra mean
// sqrt(F). kNone: r = |z|, inverse 1, extra q r^2. r is infinite, and the loss NaN, where later results leave the range
// of fp32. With `partners`, which may be null, all three are 0 for a token without a partner, and inverse and extra for
// one that is not finite; the tokens, these as 0, are copied to `cleaned`, [B, L, F] of each layer, if it is not null.
template <class T>
DK_DEVICE void row_statistics(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l,
                              const int* partners, float* norms, float* inverses, float* extras, char* cleaned,
                              const LayerOffsets& cleaned_layers, int64_t cleaned_stride, int batch, int length,
                              int features, float eps, float q, int transform) {
  const int lane = threadIdx.x % 32, row = blockIdx.y;
  const int token = blockIdx.x * kTokensOfProgram + int(threadIdx.x) / 32;
  if (token >= length) return;
  const Token<T> x = token_at<T>(z, layers, stride_b, stride_l, row, batch, token, features);
  const bool standardize = Transform(transform) == Transform::kStandardize;
  float mean = 0.0f;
  bool constant = true;
  if (standardize) {
    float total = 0.0f;
    for (int f = lane; f < features; f += 32) {
      total += x[f];
      // The rounded mean of a constant token may differ from its features; the difference must not be scaled to length
      // 1.
      constant = constant && x[f] == x[0];
    }
    mean = sum_of_warp(total) / float(features);
    constant = __all_sync(0xffffffffu, constant);
  }
  float squares = 0.0f;
  uint32_t key = 0;
  for (int f = lane; f < features; f += 32) {
    squares = fmaf(x[f] - mean, x[f] - mean, squares);
    key += key_of(x[f], f);
  }
  squares = sum_of_warp(squares);
  key = sum_of_warp(key);
  float norm = sqrtf(squares), inverse = 1.0f, extra = squares * q;
  if (Transform(transform) == Transform::kNormalize) {
    // With a larger eps such a token counts as 0. A key of 0 means a zero token; another token has it once in 2^32.
    if (norm < kLeastNorm && eps < 0x1p24f * kLeastNorm && key != 0) norm = INFINITY;
    inverse = norm + eps > 0.0f ? 1.0f / (norm + eps) : 0.0f;
    // A float between 2^-90 and 2^-89, made from the key.
    extra = norm > 0.0f ? __uint_as_float(0x12800000u | (key * 0x9E3779B1u) >> 9) : -q;
  } else if (standardize) {
    norm = constant ? 0.0f : norm < kLeastNorm ? INFINITY : norm;
    inverse = norm > 0.0f ? 1.0f / norm : 0.0f;
    extra = mean * sqrtf(float(features));
  } else if (fmaxf(squares, extra) > kLargestSquare) {
    norm = INFINITY;
  }
  if (partners != nullptr) {
    const int64_t in_batch = int64_t(row % batch) * length + token;
    if (partners[in_batch] <= 0) norm = 0.0f;
    const bool left_out = partners[in_batch] <= 0 || !(norm < INFINITY);
    if (left_out) inverse = extra = 0.0f;
    if (cleaned != nullptr) {
      typename T::Stored* to =
          reinterpret_cast<typename T::Stored*>(cleaned + cleaned_layers.offset[row / batch]) + in_batch * cleaned_stride;
      for (int f = lane; f < features; f += 32) to[f] = left_out ? typename T::Stored() : x.z[f];
    }
  }
  if (lane != 0) return;
  const int64_t at = int64_t(row) * length + token;
  norms[at] = norm;
  inverses[at] = inverse;
  extras[at] = extra;
}

// Diagonal of the weights of a tile of tokens x (blockIdx.x) of a row: minus an estimate of x . G, which is the mean over
// the tile, times the inverse norm; gpu/launch.py, DiagonalCall, says what for. The estimate is from kDiagonalSample
// tokens of the tile and as many of the row. A warp has a part of those of the tile, and its lanes features.
template <class T>
DK_DEVICE void diagonal(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l,
                        const float* inverses, const float* extras, typename T::Stored* weights,
                        int64_t weights_row_stride, int64_t weights_stride, int first_row, int batch, int length,
                        int features, int transform) {
  constexpr int kWarps = kDiagonalTokens / 32, kPart = kDiagonalSample / kWarps;
  static_assert(kPart * kWarps == kDiagonalSample && kDiagonalTokens % kDiagonalSample == 0, "the warps have them all");
  __shared__ float per_warp[kWarps], paired_of_warp[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = first_row + int(blockIdx.y);
  weights += blockIdx.y * weights_row_stride;
  inverses += int64_t(row) * length;
  extras += int64_t(row) * length;
  int i[kPart], j[kDiagonalSample];
#pragma unroll
  for (int m = 0; m < kPart; ++m)
    i[m] = int(blockIdx.x) * kDiagonalTokens + (warp * kPart + m) * (kDiagonalTokens / kDiagonalSample);
#pragma unroll
  for (int n = 0; n < kDiagonalSample; ++n) j[n] = (2 * n + 1) * length / (2 * kDiagonalSample);
  float products[kPart][kDiagonalSample] = {};
  for (int f = lane; f < features; f += 32) {
    float y[kDiagonalSample];
#pragma unroll
    for (int n = 0; n < kDiagonalSample; ++n)
      y[n] = token_at<T>(z, layers, stride_b, stride_l, row, batch, j[n], features)[f];
#pragma unroll
    for (int m = 0; m < kPart; ++m) {
      const float x = token_at<T>(z, layers, stride_b, stride_l, row, batch, min(i[m], length - 1), features)[f];
#pragma unroll
      for (int n = 0; n < kDiagonalSample; ++n) products[m][n] = fmaf(x, y[n], products[m][n]);
    }
  }
  const bool standardize = Transform(transform) == Transform::kStandardize;
  float total = 0.0f, paired = 0.0f;
#pragma unroll
  for (int m = 0; m < kPart; ++m) {
    if (i[m] >= length) continue;
    const float inverse = inverses[i[m]];
    if (inverse > 0.0f) paired += 1.0f;
#pragma unroll
    for (int n = 0; n < kDiagonalSample; ++n) {
      const float means = standardize && lane == 0 ? extras[i[m]] * extras[j[n]] : 0.0f;
      total += T::to_float(weights[i[m] * weights_stride + j[n]]) * (products[m][n] - means) * inverse;
    }
  }
  total = sum_of_warp(total);
  if (lane == 0) {
    per_warp[warp] = total;
    paired_of_warp[warp] = paired;
  }
  __syncthreads();  // the weights have been read, too
  total = paired = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total += per_warp[w];
    paired += paired_of_warp[w];
  }
  const int64_t token = int64_t(blockIdx.x) * kDiagonalTokens + threadIdx.x;
  if (token >= length) return;
  const float along = total * float(length) / (float(kDiagonalSample) * fmaxf(paired, 1.0f));
  weights[token * (weights_stride + 1)] = T::from_float(-along * inverses[token]);
}

// w z - G, with w the sum of the token's weights, in place of G.
template <class T>
DK_DEVICE void differences(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l,
                           const float* weight_sums, float* gradient, const LayerOffsets& gradients, int batch,
                           int length, int features) {
  const int lane = threadIdx.x % 32, row = blockIdx.y;
  const int token = blockIdx.x * kTokensOfProgram + int(threadIdx.x) / 32;
  if (token >= length) return;
  const Token<T> x = token_at<T>(z, layers, stride_b, stride_l, row, batch, token, features);
  float* g = gradient + gradients.offset[row / batch] / int64_t(sizeof(float)) +
             (int64_t(row % batch) * length + token) * features;
  const float weight_sum = weight_sums[int64_t(row) * length + token];
  for (int f = lane; f < features; f += 32) g[f] = weight_sum * x[f] - g[f];
}

// Gradients of the tokens from G = u, [B, L, F] of each layer (blockIdx.y) in the type G: through the row transform,
// times `scales`, [layers, B, L], and `factors`, [B, L], in the type Out. kNormalize: u - z (z . u) / (|z| (|z| + eps));
// kStandardize: the same for u - mean(u) and z - mean(z); kNone: u. Tokens of scale 0 may be NaN; their gradient is 0.
template <class T, class G, class Out>
DK_DEVICE void token_gradients(const char* z, const LayerOffsets& layers, int64_t stride_b, int64_t stride_l,
                               const char* gradient, const LayerOffsets& gradients, const float* scales,
                               const float* factors, int64_t factor_stride_b, int64_t factor_stride_l, char* output,
                               const LayerOffsets& outputs, int batch, int length, int features, float eps,
                               int transform) {
  const int lane = threadIdx.x % 32, layer = blockIdx.y;
  const int64_t tokens = int64_t(batch) * length;
  const int64_t token = int64_t(blockIdx.x) * kTokensOfProgram + int(threadIdx.x) / 32;
  if (token >= tokens) return;
  const int64_t b = token / length, in_sequence = token % length;
  typename Out::Stored* to =
      reinterpret_cast<typename Out::Stored*>(output + outputs.offset[layer]) + token * features;
  const float token_scale = scales[layer * tokens + token];
  if (token_scale == 0.0f) {
    for (int f = lane; f < features; f += 32) to[f] = Out::from_float(0.0f);
    return;
  }
  const float scale = token_scale * factors[b * factor_stride_b + in_sequence * factor_stride_l];
  const Token<G> u = {
      reinterpret_cast<const typename G::Stored*>(gradient + gradients.offset[layer]) + token * features, features};
  const Token<T> x = {reinterpret_cast<const typename T::Stored*>(z + layers.offset[layer]) + b * stride_b +
                          in_sequence * stride_l,
                      features};
  if (Transform(transform) == Transform::kNone) {
    for (int f = lane; f < features; f += 32) to[f] = Out::from_float(u[f] * scale);
    return;
  }
  float mean_x = 0.0f, mean_u = 0.0f;
  if (Transform(transform) == Transform::kStandardize) {
    for (int f = lane; f < features; f += 32) {
      mean_x += x[f];
      mean_u += u[f];
    }
    mean_x = sum_of_warp(mean_x) / float(features);
    mean_u = sum_of_warp(mean_u) / float(features);
  }
  float product = 0.0f, squares = 0.0f;
  for (int f = lane; f < features; f += 32) {
    // z - mean(z) sums to 0, so its product with u equals its product with u - mean(u).
    product = fmaf(u[f], x[f] - mean_x, product);
    squares = fmaf(x[f] - mean_x, x[f] - mean_x, squares);
  }
  const float norm = sqrtf(sum_of_warp(squares)), denominator = norm * (norm + eps);
  product = sum_of_warp(product);
  const float along = denominator > 0.0f ? product / denominator : 0.0f;
  for (int f = lane; f < features; f += 32)
    to[f] = Out::from_float(((u[f] - mean_u) - (x[f] - mean_x) * along) * scale);
}

// dk_sequence_losses: loss of one sequence (blockIdx.x) of one row (blockIdx.y) and the scale of its tokens, from the
// total of the partial sums, in fp64, relative to the largest maximum, which goes to `shifts`; NaN if a norm is not
// finite. The order of additions is fixed. `maxima` (and with it `shifts`), `partners`, `bounds`, `counts`, `tokens` and
// `token_scales` may be null; the rest of the arguments are described in gpu/launch.py, SequenceLossesCall.
constexpr int kSumThreads = 256;
static_assert(kSumThreads % 32 == 0 && (kSumThreads & (kSumThreads - 1)) == 0, "halves are added, down to one thread");

DK_DEVICE double sum_of_threads(double x, double* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

}  // namespace dk

extern "C" __global__ void __launch_bounds__(dk::kSumThreads)
    dk_sequence_losses(const float* norms, const float* inverses, const int* partners, const float* sums,
                       const float* maxima, const int* bounds, const int64_t* counts, const int64_t* tokens,
                       double* losses, float* token_scales, float* shifts, int length, int64_t sums_stride, int batch,
                       int first_sequence, int all_sequences, int divisor, int of_tokens, int diagonal, int logarithm,
                       int divide_by_sequences, double constant, double factor) {
  __shared__ double thread_sums[dk::kSumThreads];
  const int64_t row = blockIdx.y;
  const int begin = bounds == nullptr ? 0 : bounds[blockIdx.x];
  const int end_token = bounds == nullptr ? length : bounds[blockIdx.x + 1];
  const int end = bounds == nullptr ? int(sums_stride) : end_token;
  float poison = 0.0f, largest = dk::kNoExponent;
  for (int n = begin + int(threadIdx.x); n < end_token; n += dk::kSumThreads)
    poison += norms[row * length + n] * 0.0f;
  if (maxima != nullptr) {
    __shared__ float warp_maxima[dk::kSumThreads / 32];
    for (int n = begin + int(threadIdx.x); n < end; n += dk::kSumThreads)
      largest = fmaxf(largest, maxima[row * sums_stride + n]);
    largest = dk::largest_of_warp(largest);
    if (threadIdx.x % 32 == 0) warp_maxima[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int w = 0; w < dk::kSumThreads / 32; ++w) largest = fmaxf(largest, warp_maxima[w]);
  }
  double total = poison;
  for (int n = begin + int(threadIdx.x); n < end; n += dk::kSumThreads) {
    const float scale = maxima == nullptr ? 1.0f : dk::exponential(maxima[row * sums_stride + n] - largest);
    total += double(sums[row * sums_stride + n] * scale);
  }
  total = dk::sum_of_threads(total, thread_sums);
  double weight = 1.0 / divisor;
  if (divide_by_sequences) {
    __syncthreads();  // all threads have read the total
    int counted = 0;
    for (int n = int(threadIdx.x); n < all_sequences; n += dk::kSumThreads) counted += counts[n] > 0;
    const double sequences = dk::sum_of_threads(counted, thread_sums);
    if (sequences > 1.0) weight /= sequences;
  }
  const int number = first_sequence + (bounds == nullptr ? int(row % batch) : int(blockIdx.x));
  double count = of_tokens ? length : double(length) * (length - 1), with_itself = length;
  if (counts != nullptr) {
    count = double(counts[number]);
    if (diagonal) with_itself = double(tokens[number]);
  }
  const bool nothing = count == 0.0;
  if (diagonal) {
    count += with_itself;
    total += with_itself;
  }
  if (count < 1.0) count = 1.0;
  double loss, scale;
  if (logarithm) {
    loss = log(total) - log(count) + constant;
    if (maxima != nullptr) loss += double(largest) * 0.6931471805599453;
    scale = factor / total;
  } else {
    loss = total / count;
    scale = factor / count;
  }
  if (loss != loss) scale = loss;
  if (threadIdx.x == 0) {
    const int64_t at = row * gridDim.x + blockIdx.x;
    losses[at] = nothing ? 0.0 : loss * weight;
    if (maxima != nullptr) shifts[at] = largest;
  }
  if (token_scales == nullptr) return;
  const float sequence_scale = nothing ? 0.0f : float(scale * weight);
  for (int n = begin + int(threadIdx.x); n < end_token; n += dk::kSumThreads) {
    const bool paired = partners == nullptr || partners[row % batch * length + n] > 0;
    token_scales[row * length + n] = paired ? sequence_scale * inverses[row * length + n] : 0.0f;
  }
}

#define DK_DEFINE(T, name)                                                                                            \
  extern "C" __global__ void __launch_bounds__(32 * dk::kTokensOfProgram) dk_row_statistics_##name(                   \
      const char* z, const __grid_constant__ dk::LayerOffsets layers, int64_t stride_b, int64_t stride_l,             \
      const int* partners, float* norms, float* inverses, float* extras, char* cleaned,                               \
      const __grid_constant__ dk::LayerOffsets cleaned_layers, int64_t cleaned_stride, int batch, int length,         \
      int features, float eps, float q, int transform) {                                                              \
    dk::row_statistics<dk::T>(z, layers, stride_b, stride_l, partners, norms, inverses, extras, cleaned,              \
                              cleaned_layers, cleaned_stride, batch, length, features, eps, q, transform);            \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * dk::kTokensOfProgram) dk_differences_##name(                      \
      const char* z, const __grid_constant__ dk::LayerOffsets layers, int64_t stride_b, int64_t stride_l,             \
      const float* weight_sums, float* gradient, const __grid_constant__ dk::LayerOffsets gradients, int batch,       \
      int length, int features) {                                                                                     \
    dk::differences<dk::T>(z, layers, stride_b, stride_l, weight_sums, gradient, gradients, batch, length, features); \
  }
DK_DEFINE(BFloat16, bf16)
DK_DEFINE(Float16, fp16)
DK_DEFINE(TF32, fp32)

extern "C" __global__ void __launch_bounds__(dk::kDiagonalTokens)
    dk_diagonal_bf16(const char* z, const __grid_constant__ dk::LayerOffsets layers, int64_t stride_b, int64_t stride_l,
                     const float* inverses, const float* extras, dk::BFloat16::Stored* weights,
                     int64_t weights_row_stride, int64_t weights_stride, int first_row, int batch, int length,
                     int features, int transform) {
  dk::diagonal<dk::BFloat16>(z, layers, stride_b, stride_l, inverses, extras, weights, weights_row_stride,
                             weights_stride, first_row, batch, length, features, transform);
}

#define DK_DEFINE_GRADIENTS(T, G, Out, name)                                                                          \
  extern "C" __global__ void __launch_bounds__(32 * dk::kTokensOfProgram) dk_token_gradients_##name(                  \
      const char* z, const __grid_constant__ dk::LayerOffsets layers, int64_t stride_b, int64_t stride_l,             \
      const char* gradient, const __grid_constant__ dk::LayerOffsets gradients, const float* scales,                  \
      const float* factors, int64_t factor_stride_b, int64_t factor_stride_l, char* output,                           \
      const __grid_constant__ dk::LayerOffsets outputs, int batch, int length, int features, float eps,               \
      int transform) {                                                                                                \
    dk::token_gradients<dk::T, dk::G, dk::Out>(z, layers, stride_b, stride_l, gradient, gradients, scales, factors,   \
                                               factor_stride_b, factor_stride_l, output, outputs, batch, length,      \
                                               features, eps, transform);                                             \
  }
DK_DEFINE_GRADIENTS(BFloat16, BFloat16, BFloat16, bf16_bf16_bf16)
DK_DEFINE_GRADIENTS(BFloat16, TF32, BFloat16, bf16_fp32_bf16)
DK_DEFINE_GRADIENTS(BFloat16, BFloat16, TF32, bf16_bf16_fp32)
DK_DEFINE_GRADIENTS(BFloat16, TF32, TF32, bf16_fp32_fp32)
DK_DEFINE_GRADIENTS(Float16, TF32, Float16, fp16_fp32_fp16)
DK_DEFINE_GRADIENTS(Float16, TF32, TF32, fp16_fp32_fp32)
DK_DEFINE_GRADIENTS(TF32, TF32, TF32, fp32_fp32_fp32)

#define DK_LIST(name) {#name, (const void*)name, 32 * dk::kTokensOfProgram, 0, 0}

dk::Kernels dk::token_kernels() {
  static const Kernel kernels[] = {DK_LIST(dk_row_statistics_bf16),
                                   DK_LIST(dk_row_statistics_fp16),
                                   DK_LIST(dk_row_statistics_fp32),
                                   DK_LIST(dk_differences_bf16),
                                   DK_LIST(dk_differences_fp16),
                                   DK_LIST(dk_differences_fp32),
                                   DK_LIST(dk_token_gradients_bf16_bf16_bf16),
                                   DK_LIST(dk_token_gradients_bf16_fp32_bf16),
                                   DK_LIST(dk_token_gradients_bf16_bf16_fp32),
                                   DK_LIST(dk_token_gradients_bf16_fp32_fp32),
                                   DK_LIST(dk_token_gradients_fp16_fp32_fp16),
                                   DK_LIST(dk_token_gradients_fp16_fp32_fp32),
                                   DK_LIST(dk_token_gradients_fp32_fp32_fp32),
                                   {"dk_diagonal_bf16", (const void*)dk_diagonal_bf16, dk::kDiagonalTokens, 0, 0},
                                   {"dk_sequence_losses", (const void*)dk_sequence_losses, kSumThreads, 0, 0}};
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}
