// The tables of compiled kernels, by name, for the host.
#pragma once

#include <stdint.h>

namespace dk {

constexpr int kMaxLayers = 64;

// Offset of each layer from the first, in bytes.
struct LayerOffsets {
  int64_t offset[kMaxLayers];
};

// Tokens per block of the kernels that read each token by itself; each token has one warp.
constexpr int kTokensOfProgram = 4;

// Tokens per block of the kernel for the diagonal of the weights, and those of a block, and of a row, that it reads.
constexpr int kDiagonalTokens = 128, kDiagonalSample = 16;

// Size of a box that Hopper's copy engine brings: tokens, and bytes of each.
constexpr int kHopperTokens = 128, kHopperRowBytes = 128;

// A CUtensorMap, which describes the layout of a layer to Hopper's copy engine.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
struct TensorMaps {
  TensorMap map[kMaxLayers];
};

struct Kernel {
  const char* name;
  const void* function;
  int threads;
  int shared_bytes;
  int slice;  // features of the gradient per block; 0 for kernels without a gradient
};

struct Kernels {
  const Kernel* kernels;
  int count;
};

// Tables of the kernels over pairs, pair_tiles and row_sweep, one for each element type.
Kernels bfloat16_kernels();
Kernels float16_kernels();
Kernels tf32_kernels();
Kernels tf32x3_kernels();
// Table of the kernels that read each token by itself.
Kernels token_kernels();

}  // namespace dk
