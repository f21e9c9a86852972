// The start of every call of the CPU kernel.
#pragma once

#include <new>

#include "dispersion.h"

namespace dk {

// The dk_isa that a call with this request uses; 0 if this processor has none that fits.
int32_t resolve_isa(int32_t requested);
const TileKernels& kernels_of(int32_t isa);

// The dk_status of work(kernels), or the reason why it was not run. The version is checked before `valid` reads `args`,
// because another version has another layout.
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

// The hidden states of a call other than dk_dispersion, in the form that a Job reads.
template <class Args>
dk_args tokens_of(const Args& args) {
  dk_args tokens = {};
  tokens.z = args.z;
  tokens.row_stride = args.row_stride;
  tokens.rows = args.rows;
  tokens.features = args.features;
  tokens.dtype = args.dtype;
  return tokens;
}

// The reduction from psi to the loss: log(mean psi) + offset, or mean psi. kappa is the constant factor of dpsi/ds.
struct Reduction {
  bool logarithm;
  double offset;
  double kappa;
  bool include_diagonal;
  double norm_weight;
};

// Fills in the potential of `job` and its reduction; false if a parameter is out of range.
bool describe(int32_t potential, const double* params, int64_t features, Job& job, Reduction& reduction);

}  // namespace dk
