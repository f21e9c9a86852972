// What every call begins with.
#pragma once

#include "dispersion.h"

namespace dk {

// The dk_isa that a call would use; 0: this processor has none.
int32_t resolve_isa(int32_t requested);
const TileKernels& kernels_of(int32_t isa);

// kappa: the constant factor of dpsi/ds; loss = log(mean psi + eps) or mean psi.
struct Reduction {
  bool logarithm;
  double eps;
  double kappa;
  bool include_diagonal;
  double norm_weight;
};

// The potential in `job`, and how it is reduced; false where a parameter is out of range.
bool describe(int32_t potential, const double* params, int64_t features, Job& job, Reduction& reduction);

}  // namespace dk
