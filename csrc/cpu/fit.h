// The fit of a sampled call's model, from the pairs within a few groups of tokens of each layer; the same computation
// in PyTorch is `fit` of dispersion_kernels/sampling/control_variate.py. Included by tile_kernels.h.
#pragma once

namespace dk {
namespace {

// Assumptions behind the sizes of arrays.
static_assert(kFitTokens % kLanes == 0, "a group is whole vectors");
static_assert(kFitSize % kRows == 0 && kRank % kRows == 0, "a product's rows are all of them tokens, or directions");
static_assert(kFitSize <= kWeightStride, "Scratch::phi holds the features of a fit's tokens");

// Index of the first token of token i's group.
DK_INLINE int first_of_group(int i) { return i / kFitTokens * kFitTokens; }

// psi and slope of the pairs within groups, in units of exp(shift); whole panels, so some pairs beside them, too.
template <class P>
void evaluate_groups(const Job& job, const P& potential, const Tile& tile, const FitScratch& scratch) {
  for (int i = 0; i < kFitSize; ++i) {
    const Pack q_i = splat_pack(tile.square[i]);
    const int first = first_of_group(i);
    for (int j = first / kPanel * kPanel; j < first + kFitTokens; j += kPanel) {
      const int64_t at = i * kWeightStride + j;
      const Weights<Pack> w =
          potential.evaluate(load_pack(scratch.products + at), q_i, load_pack(tile.square + j), job.potential.shift);
      store_pack(scratch.psi + at, w.psi);
      store_pack(scratch.slope + at, w.slope);
    }
  }
}

// Term added to the unit diagonal of a matrix to make it regular: eps^(3/4), for matrices of doubles and of floats.
constexpr double kRegular = 1.8e-12, kRegularFloat = 6.4e-6;

DK_INLINE double dot(const double* a, const double* b, int64_t count) {
  static_assert(kPanel % 8 == 0, "count, a row's padded features, is a multiple of 8");
  double sums[8] = {};
  for (int64_t f = 0; f < count; f += 8)
    for (int n = 0; n < 8; ++n) sums[n] += a[f + n] * b[f + n];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// Orthonormal directions, [features][kRank], near the principal directions of the tile's tokens, the first kSquared of
// them the nearest: power iterations that start from every (kFitSize / kRank)-th token, one for all directions and two
// more for the first kSquared.
void find_directions(const Job& job, const Tile& tile, const FitScratch& scratch, float* directions) {
  float coefficients[kRank][kFitSize];
  for (int r = 0; r < kRank; ++r)
    memcpy(coefficients[r], scratch.products + r * (kFitSize / kRank) * kWeightStride, sizeof coefficients[r]);
  for (int iteration = 0; iteration < 2; ++iteration) {
    float next[kSquared][kFitSize] = {};
    for (int r = 0; r < kSquared; ++r)
      for (int j = 0; j < kFitSize; ++j)
        for (int k = 0; k < kFitSize; ++k) next[r][k] += coefficients[r][j] * scratch.products[j * kWeightStride + k];
    memcpy(coefficients, next, sizeof next);
  }
  const int64_t stride = job.padded_features;
  float* rows[kRank];
  for (int r = 0; r < kRank; ++r) rows[r] = scratch.span + r * stride;
  for (int64_t column = 0; column < stride; column += kPanel)
    for (int r = 0; r < kRank; r += kRows)
      micro_kernel<true>(kFitSize, {coefficients[r], kFitSize, 1},
                         {tile.token_major + column * tile.padded, kPanel}, rows + r, column, 1.0f, 0.0f, [](int) {});

  // Orthonormalization by the Cholesky factor L of the regularised Gram matrix: the inverse of L times the span.
  double* span[kRank];
  double factor[kRank][kRank];
  for (int r = 0; r < kRank; ++r) {
    span[r] = scratch.orthonormal + r * stride;
    for (int64_t f = 0; f < stride; ++f) span[r][f] = rows[r][f];
    const double inverse = 1.0 / fmax(sqrt(dot(span[r], span[r], stride)), 1e-12);
    for (int64_t f = 0; f < stride; ++f) span[r][f] *= inverse;
    for (int s = 0; s <= r; ++s) factor[r][s] = dot(span[r], span[s], stride) + (r == s ? kRegular : 0.0);
  }
  for (int r = 0; r < kRank; ++r) {
    for (int s = 0; s <= r; ++s) {
      for (int k = 0; k < s; ++k) factor[r][s] -= factor[r][k] * factor[s][k];
      factor[r][s] = r == s ? sqrt(factor[r][r]) : factor[r][s] / factor[s][s];
    }
    for (int s = 0; s < r; ++s)
      for (int64_t f = 0; f < stride; ++f) span[r][f] -= factor[r][s] * span[s][f];
    for (int64_t f = 0; f < stride; ++f) span[r][f] /= factor[r][r];
    for (int64_t f = 0; f < job.args->features; ++f) directions[f * kRank + r] = float(span[r][f]);
  }
}

// Solution of a positive semidefinite system, written to `right`: one of the solutions where there are many, 0 for an
// unknown whose row is 0.
template <int kUnknowns>
void solve(double (&matrix)[kUnknowns][kUnknowns], double (&right)[kUnknowns]) {
  double scale[kUnknowns];
  for (int a = 0; a < kUnknowns; ++a) scale[a] = matrix[a][a] > 0.0 ? 1.0 / sqrt(matrix[a][a]) : 0.0;
  for (int a = 0; a < kUnknowns; ++a) {
    right[a] *= scale[a];
    for (int b = 0; b < kUnknowns; ++b) matrix[a][b] *= scale[a] * scale[b];
    matrix[a][a] += kRegularFloat;
  }
  for (int a = 0; a < kUnknowns; ++a) {
    for (int b = a + 1; b < kUnknowns; ++b) {
      const double times = matrix[b][a] / matrix[a][a];
      for (int k = a; k < kUnknowns; ++k) matrix[b][k] -= times * matrix[a][k];
      right[b] -= times * right[a];
    }
  }
  for (int a = kUnknowns - 1; a >= 0; --a) {
    for (int k = a + 1; k < kUnknowns; ++k) right[a] -= matrix[a][k] * right[k];
    right[a] /= matrix[a][a];
  }
  for (int a = 0; a < kUnknowns; ++a) right[a] *= scale[a];
}

// One number per pair within the groups.
using GroupMatrix = float[kFitSize][kFitTokens];

// Adds to sums[n] the sum of terms(i, j)[n] over the pairs; terms(i, j) takes token i and the kLanes tokens of its
// group from the j-th on. Sums over a group are fp32, sums over groups fp64.
template <int kTerms, class Work>
void sum_pairs(const GroupMatrix& there, double (&sums)[kTerms], const Work& terms) {
  for (int first = 0; first < kFitSize; first += kFitTokens) {
    vec group_sums[kTerms] = {};
    for (int i = first; i < first + kFitTokens; ++i)
      for (int j = 0; j < kFitTokens; j += kLanes) {
        vec term[kTerms];
        terms(i, j, term);
        const vec one = load(there[i] + j);
        for (int n = 0; n < kTerms; ++n) group_sums[n] += one > 0.0f ? term[n] : vec{};
      }
    for (int n = 0; n < kTerms; ++n) sums[n] += double(sum(group_sums[n]));
  }
}

void fit(const Job& job, Tile& tile, Scratch& scratch, const FitScratch& matrices, float* directions, Fit& fit) {
  // Tokens that are not finite count as 0 in the fit; the loss becomes NaN elsewhere.
  for (int t = 0; t < kFitSize; ++t) {
    if (isfinite(tile.norm[t])) continue;
    for (int64_t f = 0; f < job.args->features; ++f)
      tile.feature_major[t / kPanel * kPanel * job.args->features + f * kPanel + t % kPanel] = 0.0f;
    for (int64_t f = 0; f < job.padded_features; ++f)
      tile.token_major[f / kPanel * kPanel * tile.padded + t * kPanel + f % kPanel] = 0.0f;
    tile.square[t] = tile.inverse[t] = 0.0f;
  }
  similarities(job, tile, tile, false, matrices.products);
  with_potential(job.potential, [&](const auto& potential) { evaluate_groups(job, potential, tile, matrices); });

  // Mask of the pairs, 1 or 0: a token that was drawn twice does not pair with itself.
  GroupMatrix there;
  for (int i = 0; i < kFitSize; ++i)
    for (int j = 0; j < kFitTokens; ++j) there[i][j] = tile.rows[i] != tile.rows[first_of_group(i) + j] ? 1.0f : 0.0f;
  const auto at = [](int i, int j) { return int64_t(i) * kWeightStride + first_of_group(i) + j; };
  const float *c = matrices.products, *psi = matrices.psi, *slope = matrices.slope;
  // Weight of a pair in the fit, 1 - c^2: only the part of slope x_j orthogonal to x_i, sqrt(1 - c^2) of its length,
  // reaches token i's gradient.
  const auto weight_of = [&](int64_t pair) {
    const vec squared = 1.0f - load(c + pair) * load(c + pair);
    return squared > 0.0f ? squared : vec{};
  };
  // Subtracted before c is summed, so that equal values of c have their exact mean and variance 0.
  const float first_c = c[at(0, 1)];
  double pair_sums[3] = {}, products[2] = {};
  sum_pairs(there, pair_sums, [&](int i, int j, vec* term) {
    term[0] = splat(1.0f), term[1] = load(psi + at(i, j)), term[2] = load(c + at(i, j)) - first_c;
  });
  const double pairs = fmax(pair_sums[0], 1.0);
  fit.mean_psi = pair_sums[1] / pairs;
  fit.mean_c = first_c + pair_sums[2] / pairs;
  // The mean is subtracted from psi, too: for nearly equal tokens c varies no more than the rounding of its mean.
  sum_pairs(there, products, [&, mean_c = float(fit.mean_c), mean_psi = float(fit.mean_psi)](int i, int j, vec* term) {
    const vec deviation = load(c + at(i, j)) - mean_c;
    term[0] = deviation * deviation, term[1] = deviation * (load(psi + at(i, j)) - mean_psi);
  });
  fit.psi_slope = products[0] > 0.0 ? products[1] / products[0] : 0.0;

  find_directions(job, tile, matrices, directions);
  Model model = {};
  model.directions = directions;
  float ones[kFitSize];
  for (float& one : ones) one = 1.0f;
  float* phi = scratch.phi;
  model_features(job, model, tile.token_major, kPanel, int64_t(tile.padded) * kPanel, kFitSize, ones, phi);
  float y[kRank][kFitSize];
  for (int r = 0; r < kRank; ++r)
    for (int t = 0; t < kFitSize; ++t) y[r][t] = phi[t * kModelFeatures + kModelGroup + r];
  GroupMatrix few, all;  // q, the product of two tokens over the first kSquared components, and p, over all kRank
  for (int i = 0; i < kFitSize; ++i) {
    for (int j = 0; j < kFitTokens; j += kLanes) {
      vec product = {};
      for (int r = 0; r < kRank; ++r) {
        product += y[r][i] * load(y[r] + first_of_group(i) + j);
        if (r == kSquared - 1) store(few[i] + j, product);
      }
      store(all[i] + j, product);
    }
  }
  // Least squares for h = b0 + b1 p + b2 q + b3 q^2.
  constexpr int kTerms = 4, kProducts = kTerms * (kTerms + 1) / 2;
  double sums[kProducts + kTerms] = {}, matrix[kTerms][kTerms], b[kTerms];
  sum_pairs(there, sums, [&](int i, int j, vec* out) {
    const vec p = load(all[i] + j), q = load(few[i] + j), weight = weight_of(at(i, j));
    const vec term[kTerms] = {splat(1.0f), p, q, q * q};
    for (int a = 0; a < kTerms; ++a)
      for (int k = a; k < kTerms; ++k) *out++ = weight * term[a] * term[k];
    for (int a = 0; a < kTerms; ++a) *out++ = weight * term[a] * load(slope + at(i, j));
  });
  const double* next = sums;
  for (int a = 0; a < kTerms; ++a)
    for (int k = a; k < kTerms; ++k) matrix[a][k] = matrix[k][a] = *next++;
  for (double& right : b) right = *next++;
  solve(matrix, b);
  float* out = fit.b;
  *out++ = float(b[0]);
  for (int one = 0; one < kSquared; ++one)
    for (int other = one; other < kSquared; ++other) *out++ = float(one == other ? b[3] : 2.0 * b[3]);
  while (out < fit.b + kModelGroup) *out++ = 0.0f;
  for (int r = 0; r < kRank; ++r) fit.b[kModelGroup + r] = float(b[1] + (r < kSquared ? b[2] : 0.0));
}

}  // namespace
}  // namespace dk
