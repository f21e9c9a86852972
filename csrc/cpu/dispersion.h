// The C interface of the CPU kernel, and the types that its calls share with the kernels of each instruction set.
#pragma once

#include <stdint.h>

#include "../potentials.h"

#if defined(_WIN32)
#define DK_EXPORT extern "C" __declspec(dllexport)
#else
#define DK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define DK_ABI_VERSION 9
// Number of equal bins over [-1, 1] of dk_cosines; a bin holds its lower edge, and the last one its upper edge, too.
#define DK_COSINE_BINS 200

extern "C" {

// PyTorch's torch_parallel_for: calls body on disjoint ranges that cover [begin, end); returns 0 on success.
typedef int32_t (*dk_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                   void* context);

enum dk_status { DK_OK = 0, DK_INVALID = 1, DK_OUT_OF_MEMORY = 2, DK_UNSUPPORTED = 3 };
enum dk_isa { DK_ISA_BEST = 0, DK_ISA_AVX2 = 1, DK_ISA_AVX512 = 2, DK_ISA_NEON = 3 };
enum dk_dtype { DK_FLOAT32 = 0, DK_BFLOAT16 = 1, DK_FLOAT16 = 2 };

// Potentials, each with its parameters in the order of `params`; formulas in potentials.h.
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
  const void* z;       // [rows, features], features contiguous; the address may be odd
  int64_t row_stride;  // in elements
  int64_t rows;
  const int64_t* index;  // [tokens]: token i is row index[i], no row twice; NULL: row i
  int64_t tokens, features;
  const int64_t* begins;  // [segments]: tokens begins[k] <= i < ends[k] pair with each other; ascending, disjoint
  const int64_t* ends;
  const int64_t* sequence;  // [segments]: the sequence whose loss the segment's pairs belong to; non-decreasing
  int64_t segments, sequences;
  const double* params;
  double weight;      // factor of every loss and of its gradient
  int32_t potential;  // dk_potential
  int32_t reserved;
  // Gradient as two factors: dloss_s/dz = scale * grad for each row. They are kept apart because the caller multiplies
  // in another factor, and one pass for both saves reading and writing grad once more. Rows that are not in `index` are
  // left untouched. NULL: no gradient.
  float* grad;   // [rows, features]: 0 without a partner
  float* scale;  // [rows]: 0 without a partner, NaN in a sequence that is not finite
  double* loss;  // [sequences]: 0 without a pair, NaN if a paired token is not finite; or NULL
  float* total;  // sum of the losses; or NULL
} dk_args;

// Arguments of dk_sampled: the pairs within blocks of tokens, and a model of all other pairs (formulas in
// docs/sampling.md). The potential must be a function of the cosine or the correlation whose exponents need no running
// maximum.
typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;              // dk_dtype
  const void* const* layers;  // [layer_count]: z of each layer, [rows, features], features contiguous; at any address
  int64_t layer_count, rows, row_stride, features;
  const int64_t* order;  // [tokens]: token i is row order[i], counted through all layers, no row twice; NULL: row i
  int64_t tokens;
  const int64_t* populations;  // [population_count + 1]: bounds of the populations, whose tokens pair with each other
                               // and are of one layer; ascending
  int64_t population_count;
  const int64_t* blocks;  // [block_count + 1]: bounds of the blocks, at most kLargestTile tokens each, whose pairs are
                          // evaluated; ascending through all populations
  int64_t block_count;    // 0: no pair is evaluated, and blocks is NULL
  const double* inverse_probability;  // [population_count]: 1 / probability that a pair is evaluated
  const int64_t* sequence;            // [population_count]: sequence whose loss the pairs belong to; every layer has as
                                      // many sequences
  const int64_t* pairs;               // [sequence_count]: ordered pairs, evaluated or not
  int64_t sequence_count;
  const double* params;
  int32_t potential;  // dk_potential
  int32_t fit_groups, fit_tokens;  // dk::kFitGroups and dk::kFitTokens
  // Random numbers in [0, 1), [layer_count, fit_groups, 1 + fit_tokens]: for each group a population and tokens of it,
  // to whose pairs the model is fitted; NULL: no model. With draws, all layers have the same number of tokens.
  const float* draws;
  double* loss;      // [sequence_count]: 0 without a pair, NaN if a token is not finite
  double* per_pair;  // [sequence_count]: d loss / dx_i = per_pair sum_j slope(c_ij) x_j
  // Gradient as two factors: d loss / dz = scale * grad for each row. Rows that are in no population are left
  // untouched. NULL: no gradient.
  float* grad;   // [layer_count * rows, features]
  float* scale;  // [layer_count * rows]
} dk_sampled_args;

// Arguments of dk_scale: out = grad * scale * factor for each row of each layer, rounded once. out may be grad if dtype
// is DK_FLOAT32.
typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;              // dk_dtype of out
  const float* const* grads;  // [layer_count]: [rows, features] each, or NULL
  const float* scale;         // [layer_count * rows]
  const float* factor;        // [rows / rows_per_factor]: one factor for rows_per_factor rows of every layer
  int64_t layer_count, rows, features, rows_per_factor;
  void* const* out;  // [layer_count]: [rows, features] each
} dk_scale_args;

// Arguments of dk_cosines: histogram and sums of z_i . z_j / (|z_i| |z_j|) over the pairs i < j of each text's tokens, in
// two parts: pairs whose token i is before the text's split, and all other pairs. A token of norm 0 has cosine 0.
typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;       // dk_dtype
  const void* z;       // [rows, features], features contiguous; the address may be odd
  int64_t row_stride;  // in elements
  int64_t rows;
  const int64_t* order;  // [tokens]: token i is row order[i]
  int64_t tokens, features;
  const int64_t* begins;  // [texts]: a text's tokens are begins[k] <= i < ends[k]; ascending, disjoint
  const int64_t* splits;  // [texts]: begins[k] <= splits[k] <= ends[k]
  const int64_t* ends;
  int64_t texts;
  int64_t* counts;  // [texts, 2, DK_COSINE_BINS]
  double* sums;     // [texts, 2, 2]: sums of the cosines and of their squares; NaN in a text of two tokens or more, one of
                    // which is not finite
} dk_cosines_args;

// Arguments of dk_moments, which adds the sums over tokens of x = z - shift, of x x^T and of |z| to what is there.
typedef struct {
  int32_t abi_version;           // DK_ABI_VERSION
  int32_t isa;                   // dk_isa
  dk_parallel_for parallel_for;  // NULL: one thread
  int32_t threads;
  int32_t dtype;       // dk_dtype
  const void* z;       // [rows, features], features contiguous; the address may be odd
  int64_t row_stride;  // in elements
  int64_t rows;
  const int64_t* order;  // [tokens]: token i is row order[i]
  int64_t tokens, features;
  const float* shift;  // [features]
  int64_t block_rows;
  double* total;          // [features]: sum of x
  double* const* blocks;  // sum of x x^T on and above the diagonal: block n, [block_rows, features - n block_rows], has
                          // the rows from n block_rows on, without the columns before that; the last may have fewer rows
  double* norms;          // [1]: sum of |z|
} dk_moments_args;

DK_EXPORT int32_t dk_abi_version(void);
DK_EXPORT int32_t dk_resolve_isa(int32_t requested);  // the dk_isa that a call uses; 0 if this processor has none
DK_EXPORT int32_t dk_dispersion(const dk_args* args);  // dk_status
DK_EXPORT int32_t dk_sampled(const dk_sampled_args* args);  // dk_status
DK_EXPORT int32_t dk_scale(const dk_scale_args* args);  // dk_status
DK_EXPORT int32_t dk_cosines(const dk_cosines_args* args);  // dk_status
DK_EXPORT int32_t dk_moments(const dk_moments_args* args);  // dk_status

}  // extern "C"

namespace dk {

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

constexpr int kLargestTile = 256;  // tokens
// Most tokens of a tile that is padded to whole panels: 264 with panels of 24 columns, 256 with panels of 32.
constexpr int kLargestPadded = kLargestTile + 8;
// Row stride of the weights, in floats: 17 cache lines, so that a column walks through all sets of the cache.
constexpr int kWeightStride = kLargestTile + 16;
static_assert(kLargestPadded <= kWeightStride, "a row of the weights holds a padded tile");
// Row stride of Scratch::rows, in floats; not a power of two, so that rows do not compete for the same cache sets.
constexpr int64_t spare_stride(int64_t padded_features) { return padded_features + 16; }
// Features of the model of the slope, per token: 1, the products of two of the token's first kSquared components, zeros
// up to kModelGroup, and its components along kRank directions. kModelGroup is a multiple of the rows of a product for
// every instruction set.
constexpr int kRank = 16, kSquared = 3, kModelGroup = 8, kModelFeatures = kModelGroup + kRank;
static_assert(1 + kSquared * (kSquared + 1) / 2 <= kModelGroup);

// The model is fitted to the pairs within kFitGroups groups of kFitTokens tokens.
constexpr int kFitGroups = 4, kFitTokens = 32, kFitSize = kFitGroups * kFitTokens;
static_assert(kFitSize <= kLargestTile, "a fit's tokens are packed as a tile");
static_assert(kFitSize % kRank == 0, "every so many-th token of a fit begins a direction");

enum class Transform {
  kNormalize,         // x = z / (|z| + eps)
  kCentredNormalize,  // x = (z - mean over features) / |z - mean|
  kCentre,            // x = z - mean over the tokens of the population
};

// Up to kLargestTile tokens that are packed together. A tile is part of one long segment, or holds several whole short
// segments of one sequence; partner_end[t] is the end, within the tile, of the segment of token t.
struct Tile {
  int32_t tokens, padded;  // padded to whole panels
  int32_t sequence;        // number of the sequence within its group
  int32_t population;      // number of the population, the tokens centred together: a long segment, or a tile of
                           // short ones
  const int64_t* rows;     // [tokens]: rows of z
  const int32_t* partner_end;

  float* feature_major;     // [panel of tokens][features][kPanel]
  float* token_major;       // [panel of features][padded][kPanel]; only for the gradient
  float* norm;              // [padded]: |z| before the transform
  float* inverse;           // [padded]: 1 / (|z| + eps), so that x = z * inverse
  float* square;            // [padded]: a |x|^2
  float* key;               // [padded]: hash of the bits of z, the same for equal tokens; 0 unless the potential is of
                            // the distance
  float* row_sum;           // [padded]: sum of the token's weights, in units of exp(shift)
  double square_sum;        // sum of |z|^2 over the tile
  double c_sum;             // sum of the similarities of the evaluated ordered pairs; sampled calls alone
  double psi_sum;           // sum of psi over ordered pairs, in units of exp(psi_shift)
  double psi_shift, shift;  // shift: log scale of this tile's rows of the gradient and of row_sum
  const float* own;         // [padded]: coefficient with which x_i itself is in its sum; or NULL
  bool finite;
  int32_t steps;  // steps of the sweep that the tile takes part in
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
  bool online;  // whether sums are rescaled to each tile's largest psi; otherwise the shift is fixed
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
  double eps;           // eps of the normalizing transform
  float square_factor;  // factor a of Tile::square
  Potential potential;
  bool gradient;
  int64_t padded_features;
  const float* population_means;  // [populations][padded_features], only for kCentre
};

// Model of the slope of one layer's pairs, h_ij = sum_k b_k phi_ik phi_jk, in units of the kernel's slopes; or no
// model.
struct Model {
  int features;             // number of features k: kModelFeatures, or 0 without a model
  const float* directions;  // [features of a token][kRank]
  float b[kModelFeatures];
};

// Memory of one worker.
struct Scratch {
  float* weights;     // [kLargestPadded][kWeightStride]
  float* column_sum;  // [kLargestPadded]
  float* rows;        // [panel][spare_stride(padded_features)]
  // Sampled calls alone:
  float* phi;       // [kModelFeatures][kWeightStride]: phi_ik of a tile's tokens
  float* weighted;  // [kLargestPadded][kModelFeatures]: b_k phi_ik
};

// Memory for the fit of a model: products, psi and slope are [kFitSize][kWeightStride], span and orthonormal
// [kRank][padded_features].
struct FitScratch {
  float *products, *psi, *slope, *span;
  double* orthonormal;
};

// Fitted numbers of a layer's model, in units of the kernel's slopes and psi.
struct Fit {
  double psi_slope, mean_psi, mean_c;
  float b[kModelFeatures];
};

// Factors that turn a tile's projected sum into the gradient.
struct Finish {
  float scale;
  float square_scale;  // factor of z, for the norm term of l2_repel
};

// Counts and sums of the cosines of one tile's or two tiles' pairs, in the two parts of dk_cosines.
struct CosineSums {
  // Copies of the counts, which neighbouring pairs take in turn: cosines of condensed tokens share a bin, and an addition
  // would wait for the one before it.
  static constexpr int kCopies = 4;
  uint32_t counts[2][kCopies][DK_COSINE_BINS];
  double sums[2][2];
};
static_assert(int64_t(kLargestTile) * kLargestTile < INT32_MAX, "a tile's pairs are counted in 32 bits");

struct TileKernels {
  int panel;
  void (*add_rows)(const Job&, const Tile&, Scratch&, float* sums);  // sums [padded_features] = sum of the tile's rows
  void (*pack)(const Job&, Tile&, Scratch&);
  void (*within)(const Job&, Tile&, Scratch&);          // pairs of one tile; starts its gradient
  void (*between)(const Job&, Tile&, Tile&, Scratch&);  // pairs of two tiles
  void (*project)(const Job&, const Tile&, Scratch&);   // the gradient through the row transform, without its scale
  void (*finish)(const Job&, const Tile&, const Finish&, Scratch&);
  // Fits the model to a packed tile of kFitSize tokens; directions is [features][kRank].
  void (*fit)(const Job&, Tile&, Scratch&, const FitScratch&, float* directions, Fit&);
  // Features of a tile that is not packed, to phi [rows][kModelFeatures], and their sums over the tile, of phi_k x, to
  // sums [panel of features][kModelFeatures][panel].
  void (*model_sums)(const Job&, const Model&, Tile&, Scratch&, float* phi, float* sums);
  // Sums over the pairs within the segments of a packed tile, and the gradient, without its scale, of these pairs and
  // of the model, over all pairs.
  void (*sample)(const Job&, const Model&, Tile&, Scratch&, const float* phi, const float* sums,
                 float inverse_probability);
  // Gradient, without its scale, from the model alone, for a tile that is not packed.
  void (*expand)(const Job&, const Model&, Tile&, Scratch&, const float* phi, const float* sums);
  void (*scale)(const dk_scale_args&, int64_t layer, int64_t begin, int64_t end);  // rows begin <= row < end
  // Adds the pairs of two packed tiles, or those i < j of one, to `result`; tokens before `split` are of part 0.
  void (*cosines)(const Job&, const Tile&, const Tile& other, int split, Scratch&, CosineSums& result);
  // Packs x = z - shift of `count` tokens to `panels`, [panel of features][stride][panel]; sums [padded_features] = sum
  // of x, norms [count] = |z|.
  void (*pack_features)(const Job&, const float* shift, const int64_t* order, int64_t count, Scratch&, float* panels,
                        int64_t stride, float* sums, double* norms);
  // Adds the products of the features of two tiles, or of one on and above the diagonal, to `rows`. The "tokens" of
  // these tiles are features, and their features tokens.
  void (*add_products)(const Job&, const Tile&, const Tile& other, Scratch&, double* const* rows);
};

#if defined(__aarch64__)
extern const TileKernels kNeonKernels;
#else
extern const TileKernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace dk
