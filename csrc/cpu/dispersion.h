// The C interface of the CPU kernel, and what dispersion.cpp shares with the kernels of each instruction set.
#pragma once

#include <stdint.h>

#include "../potentials.h"

#if defined(_WIN32)
#define DK_EXPORT extern "C" __declspec(dllexport)
#else
#define DK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define DK_ABI_VERSION 7

extern "C" {

// PyTorch's torch_parallel_for: calls body on disjoint ranges that cover [begin, end), returns 0 on success.
typedef int32_t (*dk_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                   void* context);

enum dk_status { DK_OK = 0, DK_INVALID = 1, DK_OUT_OF_MEMORY = 2, DK_UNSUPPORTED = 3 };
enum dk_isa { DK_ISA_BEST = 0, DK_ISA_AVX2 = 1, DK_ISA_AVX512 = 2, DK_ISA_NEON = 3 };
enum dk_dtype { DK_FLOAT32 = 0, DK_BFLOAT16 = 1, DK_FLOAT16 = 2 };

// The parameters (params) of each potential, in this order; design and formulas in potentials.h.
enum dk_potential {
  DK_ANGULAR_SPREAD = 0,     // tau, clamp, eps
  DK_ORTHOGONALIZATION = 1,  // margin, clamp, eps
  DK_DECORRELATION = 2,      // none
  DK_UNIFORMITY = 3,         // t
  DK_L2_REPEL = 4,           // tau, eps, norm_weight, include_diagonal
  DK_DISPERSIVE_L2 = 5       // tau, include_diagonal
};

typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;       // dk_dtype
  const void* z;       // [rows, features], features contiguous; at any address, odd or not
  int64_t row_stride;  // in elements
  int64_t rows;
  const int64_t* index;  // [tokens]: token i is row index[i], no row twice; NULL: row i
  int64_t tokens, features;
  const int64_t* begins;  // [segments]: tokens begins[k] <= i < ends[k] pair with each other; ascending, disjoint
  const int64_t* ends;
  const int64_t* sequence;  // [segments]: the loss the segment's pairs belong to; non-decreasing
  int64_t segments, sequences;
  const double* params;
  double weight;      // of every loss, and so of its gradient
  int32_t potential;  // dk_potential
  int32_t reserved;
  // dloss_s/dz = scale * grad of each row. Kept apart: the caller has another factor to multiply in, and doing both at
  // once saves reading and writing all of it. Rows that are not in `index` are left untouched. NULL: no gradient.
  float* grad;   // [rows, features]: 0 without a partner
  float* scale;  // [rows]: 0 without a partner, NaN in a sequence that is not finite
  double* loss;  // [sequences]: 0 without a pair, NaN if a paired token is not finite; or NULL
  float* total;  // their sum; or NULL
} dk_args;

// The pairs within blocks of tokens, and a model of the rest: docs/sampling.md has the formulas. The exponents of the
// potential, of the cosine or the correlation, must need no running maximum.
typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;              // dk_dtype
  const void* const* layers;  // [layer_count]: z of each, [rows, features], features contiguous; at any address
  int64_t layer_count, rows, row_stride, features;
  const int64_t* order;  // [tokens]: token i is row order[i], counted through all layers, no row twice; NULL: row i
  int64_t tokens;
  const int64_t* populations;  // [population_count + 1]: bounds of the tokens of a layer that pair with each other;
                               // ascending
  int64_t population_count;
  const int64_t* blocks;  // [block_count + 1]: bounds of at most kLargestTile tokens whose pairs are visited, ascending
                          // through all populations
  int64_t block_count;    // 0: no pair is visited, and blocks NULL
  const double* inverse_probability;  // [population_count]: of the visited pairs
  const int64_t* sequence;            // [population_count]: whose loss the pairs belong to; as many for each layer
  const int64_t* pairs;               // [sequence_count]: ordered, visited or not
  int64_t sequence_count;
  const double* params;
  int32_t potential;  // dk_potential
  // [layer_count, fit_groups, 1 + fit_tokens] in [0, 1): a population and tokens of it, whose pairs the model is fitted
  // to; NULL: no model. dk::kFitGroups and dk::kFitTokens. With draws, all layers have as many tokens.
  int32_t fit_groups, fit_tokens;
  const float* draws;
  double* loss;      // [sequence_count]: 0 without a pair, NaN if a token is not finite
  double* per_pair;  // [sequence_count]: d loss / dx_i = per_pair sum_j slope(c_ij) x_j
  // d loss / dz = scale * grad of each row. Rows that are in no population are left untouched. NULL: no gradient.
  float* grad;   // [layer_count * rows, features]
  float* scale;  // [layer_count * rows]
} dk_sampled_args;

// out = grad * scale * factor of each row of each layer, rounded once. out may be grad where dtype is DK_FLOAT32.
typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;              // dk_dtype of out
  const float* const* grads;  // [layer_count]: [rows, features] each, or NULL
  const float* scale;         // [layer_count * rows]
  const float* factor;        // of so many rows of a layer each
  int64_t layer_count, rows, features, rows_per_factor;
  void* const* out;  // [layer_count]: [rows, features] each
} dk_scale_args;

DK_EXPORT int32_t dk_abi_version(void);
DK_EXPORT int32_t dk_resolve_isa(int32_t requested);  // the dk_isa a call would use; 0: this processor has none
DK_EXPORT int32_t dk_dispersion(const dk_args* args);  // dk_status
DK_EXPORT int32_t dk_sampled(const dk_sampled_args* args);  // dk_status
DK_EXPORT int32_t dk_scale(const dk_scale_args* args);  // dk_status

}  // extern "C"

namespace dk {

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

constexpr int kLargestTile = 256;  // tokens
// Tokens of a tile padded to whole panels, at most: 264 of 24 columns, 256 of 32.
constexpr int kLargestPadded = kLargestTile + 8;
// Row stride of the weights: 17 cache lines, so that a column walks through all sets of the cache.
constexpr int kWeightStride = kLargestTile + 16;
static_assert(kLargestPadded <= kWeightStride, "a row of the weights holds a padded tile");
// Row stride of Scratch::rows, which no power of two is to be.
constexpr int64_t spare_stride(int64_t padded_features) { return padded_features + 16; }
// The features of a model of the slope: 1, the products of two of a token's first components, zeros up to a group, and
// its components along kRank directions. Groups are as large as the rows of a product, for every instruction set.
constexpr int kRank = 16, kSquared = 3, kModelGroup = 8, kModelFeatures = kModelGroup + kRank;
static_assert(1 + kSquared * (kSquared + 1) / 2 <= kModelGroup);

// It is fitted to the pairs within so many groups of so many tokens.
constexpr int kFitGroups = 4, kFitTokens = 32, kFitSize = kFitGroups * kFitTokens;
static_assert(kFitSize <= kLargestTile, "a fit's tokens are packed as a tile");
static_assert(kFitSize % kRank == 0, "every so many-th token of a fit begins a direction");

enum class Transform {
  kNormalise,         // x = z / (|z| + eps)
  kCentredNormalise,  // x = (z - mean over features) / |z - mean|
  kCentre,            // x = z - mean over the tokens of the unit
};

// Up to kLargestTile tokens that are packed together. A tile is part of one long segment, or holds several whole short
// segments of one sequence; partner_end[t] is where the segment of token t ends within the tile.
struct Tile {
  int32_t tokens, padded;  // padded to whole panels
  int32_t sequence;        // within the group in flight
  int32_t unit;            // tiles of one segment, or one tile of short ones: what is centred together
  const int64_t* rows;     // rows of z
  const int32_t* partner_end;

  float* feature_major;     // [panel of tokens][features][kPanel]
  float* token_major;       // [panel of features][padded][kPanel], only for the gradient
  float* norm;              // |z| before the transform
  float* inverse;           // x = z * inverse
  float* square;            // a |x|^2
  float* row_sum;           // sum of a token's weights, in units of exp(shift)
  double square_sum;        // of z
  double c_sum;             // of sampled pairs, as psi_sum
  double psi_sum;           // over ordered pairs, in units of exp(psi_shift)
  double psi_shift, shift;  // shift: log scale of this tile's rows of the gradient and of row_sum
  const float* own;         // what of x itself is among the sums of its gradient; or NULL
  bool finite;
  int32_t steps;  // of the sweep that the tile takes part in
};

struct Potential {
  enum class Kind {
    kAngularSpread,
    kAngularSpreadFit,
    kOrthogonalization,
    kOrthogonalizationFit,
    kDecorrelation,
    kGaussian
  } kind;
  bool online;  // rescale by each tile's largest psi; otherwise the shift is fixed
  bool row_sums;
  float shift;
  AngularSpread angular_spread;
  AngularSpreadFit angular_spread_fit;
  Orthogonalization orthogonalization;
  OrthogonalizationFit orthogonalization_fit;
  Gaussian gaussian;
};

struct Job {
  const dk_args* args;
  Transform transform;
  double eps;           // of the normalising transform
  float square_factor;  // a of Tile::square
  Potential potential;
  bool gradient;
  int64_t padded_features;
  const float* unit_means;  // [units][padded_features], only for kCentre
};

// h_ij = sum_k b_k phi_ik phi_jk for the tokens of one layer, in units of the kernel's slopes; or no model.
struct Model {
  int features;             // k: kModelFeatures, or 0
  const float* directions;  // [features of a token][kRank]
  float b[kModelFeatures];
};

// A worker's own memory.
struct Scratch {
  float* weights;     // [kLargestPadded][kWeightStride]
  float* column_sum;  // [kLargestPadded]
  float* rows;        // [panel][spare_stride(padded_features)]
  // Only of a sampled call:
  float* phi;       // [kModelFeatures][kWeightStride]: of a tile's tokens
  float* weighted;  // [kLargestPadded][kModelFeatures]: b_k phi_ik
};

// Of the tokens of a fit: [kFitSize][kWeightStride], and [kRank][padded_features].
struct FitScratch {
  float *products, *psi, *slope, *span;
  double* orthonormal;
};

// A layer's model, in units of the kernel's slopes and psi.
struct Fit {
  double psi_slope, mean_psi, mean_c;
  float b[kModelFeatures];
};

// What turns a tile's projected sum into the gradient.
struct Finish {
  float scale;
  float square_scale;  // of z: the norm term of l2_repel
};

struct TileKernels {
  int panel;
  void (*add_rows)(const Job&, const Tile&, Scratch&, float* sums);  // sums [padded_features] = sum of the tile's rows
  void (*pack)(const Job&, Tile&, Scratch&);
  void (*within)(const Job&, Tile&, Scratch&);          // pairs of one tile; starts its gradient
  void (*between)(const Job&, Tile&, Tile&, Scratch&);  // pairs of two tiles
  void (*project)(const Job&, const Tile&, Scratch&);   // the gradient through the row transform, but for its scale
  void (*finish)(const Job&, const Tile&, const Finish&, Scratch&);
  // Of a tile of kFitSize tokens; directions [features][kRank].
  void (*fit)(const Job&, Tile&, Scratch&, const FitScratch&, float* directions, Fit&);
  // Of a tile that is not packed, to phi [rows][kModelFeatures]; and to sums [panel of features][kModelFeatures][panel]:
  // sum over the tile of phi_k x.
  void (*model_sums)(const Job&, const Model&, Tile&, Scratch&, float* phi, float* sums);
  // Pairs within the segments of a packed tile, and what the model has of all; its finished gradient.
  void (*sample)(const Job&, const Model&, Tile&, Scratch&, const float* phi, const float* sums,
                 float inverse_probability);
  // The latter alone, of a tile that is not packed.
  void (*expand)(const Job&, const Model&, Tile&, Scratch&, const float* phi, const float* sums);
  void (*scale)(const dk_scale_args&, int64_t layer, int64_t begin, int64_t end);  // of these rows
};

#if defined(__aarch64__)
extern const TileKernels kNeonKernels;
#else
extern const TileKernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace dk
