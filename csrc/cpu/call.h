// What every call begins with.
#pragma once

#include <new>

#include "dispersion.h"

namespace dk {

// The dk_isa that a call would use; 0: this processor has none.
int32_t resolve_isa(int32_t requested);
const TileKernels& kernels_of(int32_t isa);

// The dk_status of work(kernels), or why there is none. `valid` reads no argument of another version.
template <class Args, class Valid, class Work>
int32_t with_kernels(const Args& args, const Valid& valid, const Work& work) {
  if (args.abi_version != DK_ABI_VERSION || !valid(args)) return DK_INVALID;
  const int32_t isa = resolve_isa(args.isa);
  if (!isa) return DK_UNSUPPORTED;
  try {
    return work(kernels_of(isa));
  } catch (const std::bad_alloc&) {
    return DK_OUT_OF_MEMORY;
  }
}

// kappa: the constant factor of dpsi/ds; loss = log(mean psi) + offset or mean psi.
struct Reduction {
  bool logarithm;
  double offset;
  double kappa;
  bool include_diagonal;
  double norm_weight;
};

// The potential in `job`, and how it is reduced; false where a parameter is out of range.
bool describe(int32_t potential, const double* params, int64_t features, Job& job, Reduction& reduction);

}  // namespace dk
