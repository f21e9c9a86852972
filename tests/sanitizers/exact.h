// The losses and gradients of csrc/cpu/dispersion.h in float64, pair by pair, from the formulas and without the
// kernel's code: what the driver compares the kernel with.
#pragma once

#include <stdint.h>

#include <vector>

namespace exact {

// A dk_potential and its parameters.
struct Potential {
  int32_t kind;
  std::vector<double> params;
};

// Tokens that pair with each other: rows begin to end of the order of a call.
struct Segment {
  int64_t begin, end, sequence;
};

struct Answer {
  std::vector<double> loss;  // [sequences]
  std::vector<double> grad;  // [rows, features]
};

// z [rows, features]; token i of a segment is row order[i].
Answer dispersion(const Potential& potential, const std::vector<double>& z, int64_t features,
                  const std::vector<int64_t>& order, const std::vector<Segment>& segments, int64_t sequences,
                  double weight);

// Tokens of one layer that pair with each other, and the bounds of their blocks; no bounds: no pair is visited.
struct Population {
  int64_t begin, end, sequence;
  std::vector<int64_t> blocks;
  double inverse_probability;
};

// A layer's fit: rows [kGroups * kGroupTokens] of z.
constexpr int kGroups = 4, kGroupTokens = 32;

// z [layers * rows, features]; `fit` has the rows of each layer's fit, or nothing. A population's layer is
// order[begin] / rows. `pairs` [sequences], `loss` [sequences / layers].
Answer sampled(const Potential& potential, const std::vector<double>& z, int64_t features, int64_t layers,
               const std::vector<int64_t>& order, const std::vector<Population>& populations, const std::vector<int64_t>& pairs,
               bool model, const std::vector<std::vector<int64_t>>& fit);

}  // namespace exact
