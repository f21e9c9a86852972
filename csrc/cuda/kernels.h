// The compiled kernels, by name, for the host.
#pragma once

#include <stdint.h>

namespace dk {

constexpr int kMaxLayers = 64;

// Of each layer from the first, in bytes.
struct LayerOffsets {
  int64_t of_layer[kMaxLayers];
};

// Tokens of a block of the kernels of single tokens, a warp each.
constexpr int kTokensOfProgram = 4;

// The boxes of tokens that Hopper's copy engine brings.
constexpr int kHopperTokens = 128, kHopperRowBytes = 128;

// A CUtensorMap, which says to the copy engine of Hopper where a layer is.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
struct TensorMaps {
  TensorMap of_layer[kMaxLayers];
};

struct Kernel {
  const char* name;
  const void* function;
  int threads;
  int shared_bytes;
  int slice;  // the features of the gradient that a block has; 0 for kernels without
};

struct Kernels {
  const Kernel* kernels;
  int count;
};

// Of each element type: pair_tiles and row_sweep.
Kernels bfloat16_kernels();
Kernels float16_kernels();
Kernels tf32_kernels();
Kernels tf32x3_kernels();
// Of single tokens.
Kernels token_kernels();

}  // namespace dk
