#include "exact.h"

#include <math.h>

#include <algorithm>
#include <array>
#include <limits>

#include "../../csrc/cpu/dispersion.h"

namespace exact {
namespace {

const double kPi = acos(-1.0);

using Matrix = std::vector<std::vector<double>>;

double dot(const double* a, const double* b, int64_t count) {
  double total = 0.0;
  for (int64_t k = 0; k < count; ++k) total += a[k] * b[k];
  return total;
}

// ---- rows

// x of a row, and what its gradient needs.
struct Row {
  std::vector<double> x;
  double norm = 0.0, inverse = 1.0;
};

bool of_distance(const Potential& p) { return p.kind == DK_L2_REPEL || p.kind == DK_DISPERSIVE_L2; }

Row transform(const Potential& p, const double* z, int64_t features) {
  Row row;
  row.x.assign(z, z + features);
  if (of_distance(p)) return row;
  double eps = 0.0;
  if (p.kind == DK_ANGULAR_SPREAD || p.kind == DK_ORTHOGONALIZATION) eps = p.params[2];
  if (p.kind == DK_DECORRELATION) {
    double mean = 0.0;
    for (const double value : row.x) mean += value / double(features);
    for (double& value : row.x) value -= mean;
  }
  row.norm = sqrt(dot(row.x.data(), row.x.data(), features));
  row.inverse = row.norm + eps > 0.0 ? 1.0 / (row.norm + eps) : 0.0;
  for (double& value : row.x) value *= row.inverse;
  return row;
}

// d loss / dz from d loss / dx, which is changed.
void through_transform(const Potential& p, const Row& row, std::vector<double>& g, double* grad) {
  const int64_t features = int64_t(g.size());
  if (!of_distance(p)) {
    double mean = 0.0;
    if (p.kind == DK_DECORRELATION)
      for (const double value : g) mean += value / double(features);
    const double length = row.norm * row.inverse;
    const double along = length > 0.0 ? dot(row.x.data(), g.data(), features) / length : 0.0;
    for (int64_t k = 0; k < features; ++k) g[size_t(k)] = row.inverse * (g[size_t(k)] - along * row.x[size_t(k)] - mean);
  }
  for (int64_t k = 0; k < features; ++k) grad[k] += g[size_t(k)];
}

// ---- pairs

bool logarithmic(const Potential& p) { return p.kind != DK_ORTHOGONALIZATION && p.kind != DK_DECORRELATION; }

double loss_offset(const Potential& p) {
  return p.kind == DK_ANGULAR_SPREAD ? p.params[2] : p.kind == DK_L2_REPEL ? p.params[1] : 0.0;
}

bool includes_diagonal(const Potential& p) {
  return (p.kind == DK_L2_REPEL && p.params[3] != 0.0) || (p.kind == DK_DISPERSIVE_L2 && p.params[1] != 0.0);
}

// The factor a of exp(-a |x_i - x_j|^2).
double rate(const Potential& p, int64_t features) {
  if (p.kind == DK_UNIFORMITY) return p.params[0];
  return p.kind == DK_L2_REPEL ? 1.0 / p.params[0] : 1.0 / (p.params[0] * double(features));
}

// psi = exp(exponent) with its slope by c = x_i . x_j over psi; or psi and its slope.
struct Pair {
  double psi, slope;
  bool exponential;
};

Pair weigh(const Potential& p, const double* x, const double* y, int64_t features) {
  const double c = dot(x, y, features);
  switch (p.kind) {
    case DK_ANGULAR_SPREAD: {
      const double inside = std::min(std::max(c, p.params[1] - 1.0), 1.0 - p.params[1]);
      return {-acos(inside) / (kPi * p.params[0]), 1.0 / (kPi * p.params[0] * sqrt(1.0 - inside * inside)), true};
    }
    case DK_ORTHOGONALIZATION: {
      const double inside = std::min(std::max(c, p.params[1] - 1.0), 1.0 - p.params[1]);
      const double excess = std::max(p.params[0] - acos(inside) / kPi, 0.0);
      return {excess * excess, 2.0 * excess / (kPi * sqrt(1.0 - inside * inside)), false};
    }
    case DK_DECORRELATION: return {c * c, 2.0 * c, false};
    default: {
      const double a = rate(p, features);
      double square = 0.0;
      for (int64_t k = 0; k < features; ++k) square += (x[k] - y[k]) * (x[k] - y[k]);
      return {-a * square, 2.0 * a, true};
    }
  }
}

}  // namespace

Answer dispersion(const Potential& p, const std::vector<double>& z, int64_t features,
                  const std::vector<int64_t>& order, const std::vector<Segment>& segments, int64_t sequences,
                  double weight) {
  Answer answer{std::vector<double>(size_t(sequences)), std::vector<double>(z.size())};
  std::vector<Row> rows(z.size() / size_t(features));
  for (const int64_t row : order) rows[size_t(row)] = transform(p, &z[size_t(row * features)], features);
  const double own = includes_diagonal(p) ? 1.0 : 0.0;
  for (int64_t s = 0; s < sequences; ++s) {
    std::vector<Segment> paired;
    double pairs = 0.0, tokens = 0.0, shift = own > 0.0 ? 0.0 : -std::numeric_limits<double>::infinity();
    for (const Segment& segment : segments)
      if (segment.sequence == s && segment.end - segment.begin >= 2) paired.push_back(segment);
    if (paired.empty()) continue;
    std::vector<Matrix> g(paired.size());
    std::vector<std::vector<Pair>> weights(paired.size());  // above the diagonal
    for (size_t n = 0; n < paired.size(); ++n) {
      const int64_t length = paired[n].end - paired[n].begin;
      tokens += double(length);
      pairs += double(length) * (double(length) - 1.0 + own);
      for (int64_t i = 0; i < length; ++i)
        for (int64_t j = i + 1; j < length; ++j) {
          const Row &a = rows[size_t(order[size_t(paired[n].begin + i)])], &b = rows[size_t(order[size_t(paired[n].begin + j)])];
          weights[n].push_back(weigh(p, a.x.data(), b.x.data(), features));
          if (weights[n].back().exponential) shift = std::max(shift, weights[n].back().psi);
        }
      g[n].assign(size_t(length), std::vector<double>(size_t(features)));
    }
    if (!logarithmic(p)) shift = 0.0;
    double psi = own * tokens * exp(-shift);
    for (size_t n = 0; n < paired.size(); ++n) {
      const int64_t length = paired[n].end - paired[n].begin;
      const Pair* pair = weights[n].data();
      for (int64_t i = 0; i < length; ++i)
        for (int64_t j = i + 1; j < length; ++j, ++pair) {
          const std::vector<double>&x = rows[size_t(order[size_t(paired[n].begin + i)])].x,
              &y = rows[size_t(order[size_t(paired[n].begin + j)])].x;
          const double value = pair->exponential ? exp(pair->psi - shift) : pair->psi;
          const double slope = pair->exponential ? value * pair->slope : pair->slope;
          psi += 2.0 * value;
          // Of distances what is along x is not taken away by a transform.
          const double of_own = of_distance(p) ? 1.0 : 0.0;
          for (int64_t k = 0; k < features; ++k) {
            const size_t f = size_t(k);
            g[n][size_t(i)][f] += 2.0 * slope * (y[f] - of_own * x[f]);
            g[n][size_t(j)][f] += 2.0 * slope * (x[f] - of_own * y[f]);
          }
        }
    }
    double& loss = answer.loss[size_t(s)];
    double of_psi = weight / pairs;
    if (logarithmic(p)) {
      loss = shift + log(psi / pairs) + loss_offset(p);
      of_psi = weight / psi;
    } else {
      loss = psi / pairs;
    }
    const double norm_weight = p.kind == DK_L2_REPEL ? p.params[2] : 0.0, elements = tokens * double(features);
    for (size_t n = 0; n < paired.size(); ++n)
      for (int64_t i = 0; i < paired[n].end - paired[n].begin; ++i) {
        const int64_t row = order[size_t(paired[n].begin + i)];
        std::vector<double>& of_row = g[n][size_t(i)];
        const double* of_z = &z[size_t(row * features)];
        loss += norm_weight * dot(of_z, of_z, features) / elements;
        for (int64_t k = 0; k < features; ++k)
          of_row[size_t(k)] = of_psi * of_row[size_t(k)] + 2.0 * weight * norm_weight * of_z[k] / elements;
        through_transform(p, rows[size_t(row)], of_row, &answer.grad[size_t(row * features)]);
      }
    loss *= weight;
  }
  return answer;
}

// ---- sampled pairs

namespace {

constexpr int kRank = 16, kSquared = 3, kFitted = kGroups * kGroupTokens;
// eps^(3/4) of float64 and of float32, which make the systems regular.
const double kRegular = pow(std::numeric_limits<double>::epsilon(), 0.75);
const double kRegularFloat = pow(double(std::numeric_limits<float>::epsilon()), 0.75);

Pair in_units(Pair pair) {
  if (!pair.exponential) return pair;
  const double psi = exp(pair.psi);
  return {psi, psi * pair.slope, false};
}

// Solves in place by Gauss and Jordan, with the largest pivot.
void solve(Matrix matrix, std::vector<double>& right) {
  const size_t n = right.size();
  for (size_t a = 0; a < n; ++a) {
    size_t pivot = a;
    for (size_t b = a + 1; b < n; ++b)
      if (fabs(matrix[b][a]) > fabs(matrix[pivot][a])) pivot = b;
    std::swap(matrix[a], matrix[pivot]);
    std::swap(right[a], right[pivot]);
    for (size_t b = 0; b < n; ++b) {
      if (b == a) continue;
      const double times = matrix[b][a] / matrix[a][a];
      for (size_t k = a; k < n; ++k) matrix[b][k] -= times * matrix[a][k];
      right[b] -= times * right[a];
    }
  }
  for (size_t a = 0; a < n; ++a) right[a] /= matrix[a][a];
}

// Orthonormal directions near the principal ones of x.
Matrix directions_of(const Matrix& x) {
  const size_t features = x[0].size();
  Matrix products(kFitted, std::vector<double>(kFitted));
  for (int i = 0; i < kFitted; ++i)
    for (int j = 0; j < kFitted; ++j) products[i][j] = dot(x[i].data(), x[j].data(), int64_t(features));
  Matrix span;
  for (int r = 0; r < kRank; ++r) {
    std::vector<double> coefficients = products[r * (kFitted / kRank)];
    for (int iteration = 0; r < kSquared && iteration < 2; ++iteration) {
      std::vector<double> next(kFitted);
      for (int j = 0; j < kFitted; ++j)
        for (int k = 0; k < kFitted; ++k) next[k] += coefficients[j] * products[j][k];
      coefficients = next;
    }
    std::vector<double> direction(features);
    for (int j = 0; j < kFitted; ++j)
      for (size_t f = 0; f < features; ++f) direction[f] += coefficients[j] * x[j][f];
    const double norm = sqrt(dot(direction.data(), direction.data(), int64_t(features)));
    for (double& value : direction) value /= std::max(norm, 1e-12);
    span.push_back(direction);
  }
  Matrix factor(kRank, std::vector<double>(kRank));
  for (int r = 0; r < kRank; ++r)
    for (int s = 0; s <= r; ++s) {
      double left = dot(span[r].data(), span[s].data(), int64_t(features)) + (r == s ? kRegular : 0.0);
      for (int k = 0; k < s; ++k) left -= factor[r][k] * factor[s][k];
      factor[r][s] = r == s ? sqrt(left) : left / factor[s][s];
    }
  for (int r = 0; r < kRank; ++r) {
    for (int s = 0; s < r; ++s)
      for (size_t f = 0; f < features; ++f) span[r][f] -= factor[r][s] * span[s][f];
    for (double& value : span[r]) value /= factor[r][r];
  }
  return span;
}

// h_ij = b0 + b1 p + b2 q + b3 q^2, with p the product of two tokens' components along the directions and q of their
// first few.
struct Fit {
  double mean_psi = 0.0, mean_c = 0.0, psi_slope = 0.0;
  std::vector<double> b = {0.0, 0.0, 0.0, 0.0};
  Matrix directions;

  std::vector<double> components(const std::vector<double>& x) const {
    std::vector<double> y;
    for (const std::vector<double>& direction : directions) y.push_back(dot(direction.data(), x.data(), int64_t(x.size())));
    return y;
  }
  std::array<double, 4> terms(const std::vector<double>& y, const std::vector<double>& other) const {
    const double p = dot(y.data(), other.data(), kRank), q = dot(y.data(), other.data(), kSquared);
    return {1.0, p, q, q * q};
  }
  double slope(const std::vector<double>& y, const std::vector<double>& other) const {
    const std::array<double, 4> t = terms(y, other);
    return b[0] * t[0] + b[1] * t[1] + b[2] * t[2] + b[3] * t[3];
  }
};

Fit fit_of(const Potential& p, const std::vector<Row>& rows, const std::vector<int64_t>& drawn) {
  Fit fit;
  Matrix x;
  for (const int64_t row : drawn) x.push_back(rows[size_t(row)].x);
  const int64_t features = int64_t(x[0].size());
  struct Drawn {
    int i, j;
    double c, weight;
    Pair pair;
  };
  std::vector<Drawn> all;
  for (int i = 0; i < kFitted; ++i)
    for (int j = i / kGroupTokens * kGroupTokens; j < (i / kGroupTokens + 1) * kGroupTokens; ++j) {
      if (drawn[size_t(i)] == drawn[size_t(j)]) continue;
      const double c = dot(x[size_t(i)].data(), x[size_t(j)].data(), features);
      all.push_back({i, j, c, std::max(1.0 - c * c, 0.0), in_units(weigh(p, x[size_t(i)].data(), x[size_t(j)].data(), features))});
    }
  const double count = std::max(double(all.size()), 1.0);
  for (const Drawn& d : all) {
    fit.mean_psi += d.pair.psi / count;
    fit.mean_c += d.c / count;
  }
  double variance = 0.0, covariance = 0.0;
  for (const Drawn& d : all) {
    variance += (d.c - fit.mean_c) * (d.c - fit.mean_c);
    covariance += (d.c - fit.mean_c) * (d.pair.psi - fit.mean_psi);
  }
  fit.psi_slope = variance > 0.0 ? covariance / variance : 0.0;
  fit.directions = directions_of(x);
  Matrix y;
  for (const std::vector<double>& of_token : x) y.push_back(fit.components(of_token));
  Matrix matrix(4, std::vector<double>(4));
  for (const Drawn& d : all) {
    const std::array<double, 4> terms = fit.terms(y[size_t(d.i)], y[size_t(d.j)]);
    for (size_t a = 0; a < 4; ++a) {
      for (size_t k = 0; k < 4; ++k) matrix[a][k] += d.weight * terms[a] * terms[k];
      fit.b[a] += d.weight * terms[a] * d.pair.slope;
    }
  }
  std::array<double, 4> scale;
  for (size_t a = 0; a < 4; ++a) scale[a] = matrix[a][a] > 0.0 ? 1.0 / sqrt(matrix[a][a]) : 0.0;
  for (size_t a = 0; a < 4; ++a) {
    for (size_t k = 0; k < 4; ++k) matrix[a][k] *= scale[a] * scale[k];
    matrix[a][a] += kRegularFloat;
    fit.b[a] *= scale[a];
  }
  solve(matrix, fit.b);
  for (size_t a = 0; a < 4; ++a) fit.b[a] *= scale[a];
  return fit;
}

}  // namespace

Answer sampled(const Potential& p, const std::vector<double>& z, int64_t features, int64_t layers,
               const std::vector<int64_t>& order, const std::vector<Population>& populations, const std::vector<int64_t>& pairs,
               bool model, const std::vector<std::vector<int64_t>>& drawn) {
  const size_t sequences = pairs.size(), of_layer = sequences / size_t(layers);
  Answer answer{std::vector<double>(sequences), std::vector<double>(z.size())};
  std::vector<Row> rows(z.size() / size_t(features));
  for (size_t row = 0; row < rows.size(); ++row) rows[row] = transform(p, &z[row * size_t(features)], features);
  std::vector<Fit> fits(static_cast<size_t>(layers));
  for (size_t l = 0; model && l < drawn.size(); ++l) fits[l] = fit_of(p, rows, drawn[l]);

  std::vector<double> psi(sequences), missed(sequences);
  std::vector<std::vector<double>> g(rows.size(), std::vector<double>(size_t(features)));
  bool visited = false;
  for (const Population& population : populations) {
    if (population.begin == population.end) continue;
    const Fit& fit = fits[size_t(order[size_t(population.begin)]) / (rows.size() / size_t(layers))];
    std::vector<std::vector<double>> y;
    for (int64_t i = population.begin; i < population.end; ++i) y.push_back(fit.components(rows[size_t(order[size_t(i)])].x));
    // A population that is one block is visited whole, and has no model.
    bool whole = false;
    for (size_t k = 0; k + 1 < population.blocks.size(); ++k)
      whole = whole || population.blocks[k + 1] - population.blocks[k] == population.end - population.begin;
    const auto block_of = [&](int64_t token) {
      return std::upper_bound(population.blocks.begin(), population.blocks.end(), token) - population.blocks.begin();
    };
    for (int64_t i = population.begin; i < population.end; ++i)
      for (int64_t j = i + 1; j < population.end; ++j) {
        const size_t row = size_t(order[size_t(i)]), other = size_t(order[size_t(j)]);
        double factor = 0.0;
        const double c = dot(rows[row].x.data(), rows[other].x.data(), features);
        const bool models = model && !whole;
        if (models) missed[size_t(population.sequence)] += 2.0 * c;
        if (models) factor = fit.slope(y[size_t(i - population.begin)], y[size_t(j - population.begin)]);
        if (!population.blocks.empty() && block_of(i) == block_of(j)) {
          visited = true;
          const Pair pair = in_units(weigh(p, rows[row].x.data(), rows[other].x.data(), features));
          factor += population.inverse_probability * (pair.slope - factor);
          psi[size_t(population.sequence)] += 2.0 * population.inverse_probability * pair.psi;
          if (models) missed[size_t(population.sequence)] -= 2.0 * population.inverse_probability * c;
        }
        for (size_t f = 0; f < size_t(features); ++f) {
          g[row][f] += factor * rows[other].x[f];
          g[other][f] += factor * rows[row].x[f];
        }
      }
  }
  std::vector<double> per_pair(sequences);
  for (size_t s = 0; s < sequences; ++s) {
    if (!pairs[s]) continue;
    const Fit& fit = fits[s / of_layer];
    const double count = double(pairs[s]);
    double mean = psi[s] / count;
    if (model) {
      const double corrected = mean + (visited ? 0.0 : fit.mean_psi) +
                               fit.psi_slope * (missed[s] / count - (visited ? 0.0 : fit.mean_c));
      if (!visited) mean += fit.mean_psi;
      if (!logarithmic(p) || corrected > 0.0) mean = corrected;
    }
    answer.loss[s] = logarithmic(p) ? log(mean) + loss_offset(p) : mean;
    per_pair[s] = 2.0 / count / (logarithmic(p) ? mean : 1.0);
  }
  for (const Population& population : populations)
    for (int64_t i = population.begin; i < population.end; ++i) {
      const size_t row = size_t(order[size_t(i)]);
      for (double& value : g[row]) value *= per_pair[size_t(population.sequence)];
      through_transform(p, rows[row], g[row], &answer.grad[row * size_t(features)]);
    }
  return answer;
}

}  // namespace exact
