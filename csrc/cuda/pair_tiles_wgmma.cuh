// The kernel over pairs of tiles for Hopper (sm_90a) and 16-bit tokens: one warp asks the copy engine (TMA) for the
// panels, and a warpgroup multiplies them (wgmma) as they arrive.
//
// A block has one multiplying warpgroup, whose registers hold a whole tile. Two blocks share a multiprocessor: while
// one is in its epilogue, the other has the tensor cores.
#pragma once

#include "hopper.cuh"
#include "pairs.cuh"

namespace dk {

template <class T>
struct PairTilesWgmmaShape {
  static_assert(sizeof(typename T::Stored) == 2, "fp32 has mma.sync's kernel");
  static constexpr int kBlock = kHopperTokens, kRowBytes = kHopperRowBytes, kStages = 3;
  static constexpr int kThreads = 128;       // threads that multiply
  static constexpr int kBlockThreads = 256;  // with the warpgroup that copies: registers move between whole warpgroups
  static constexpr int kBlocksOfSM = 2;
  // Registers per thread, multiples of eight; a multiprocessor has 65,536.
  static constexpr int kRegistersToCopy = 24, kRegistersToMultiply = 65536 / kBlocksOfSM / 128 - kRegistersToCopy;
  static constexpr int kM = 2, kN = kBlock / 8, kStepI = 64;
  static_assert(kThreads / 32 * 16 == kStepI && kM * kStepI == kBlock, "the warps' parts are the tile");
  static constexpr int kPanel = kBlock * kRowBytes;
  static constexpr int kPanels = kStages * 2 * kPanel;
  static constexpr int kShared = kPanels + int(sizeof(Scratch<PairTilesWgmmaShape>)) + 2 * kStages * 8;

  static DK_DEVICE int row() { return int(threadIdx.x) / 32 * 16; }
  static DK_DEVICE int column() { return 0; }
  static DK_DEVICE void sync() { sync_threads<1, kThreads>(); }
};

// Kernel body, as pair_tiles. `maps` describes the layers as [B, L, F] in boxes of one sequence, kBlock tokens and
// kRowBytes bytes of features, which arrive swizzled, with zeros beyond the last token and feature.
template <class T, class Potential, PairTiles kMode>
DK_DEVICE void pair_tiles_wgmma(const PairTilesCall<T>& call, const TensorMaps& maps) {
  using Shape = PairTilesWgmmaShape<T>;
  constexpr int kStages = Shape::kStages, kFeatures = Shape::kRowBytes / 2;
  extern __shared__ __align__(1024) char memory[];
  Scratch<Shape>& scratch = *reinterpret_cast<Scratch<Shape>*>(memory + Shape::kPanels);
  const uint32_t panels = shared_address(memory);
  // Barriers of each stage: `full`, its panels have arrived; `empty`, its panels have been read.
  const uint32_t full = shared_address(&scratch + 1), empty = full + kStages * 8;
  static_assert(sizeof(Scratch<Shape>) % 8 == 0, "the barriers are behind it");
  const bool multiplies = threadIdx.x < Shape::kThreads;

  const PairOfBlock pair = pair_of_block<T, Shape::kBlock>(call);
  if (!pair.paired || !pair_ids_overlap<T, Shape::kBlock>(call, pair)) {
    if (multiplies) leave_nothing<T, Shape, kMode>(call, pair);
    return;
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(full + stage * 8, 1);
      init_barrier(empty + stage * 8, Shape::kThreads);
    }
    publish_barriers();
  }
  __syncthreads();
  const int steps = (call.features + kFeatures - 1) / kFeatures;

  if (!multiplies) {
    release_registers<Shape::kRegistersToCopy>();
    if (threadIdx.x != Shape::kThreads) return;
    const TensorMap* map = &maps.map[pair.layer];
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, round = step / kStages;
      const uint32_t panel = panels + stage * 2 * Shape::kPanel, arrives = full + stage * 8;
      if (round > 0) wait_at_barrier(empty + stage * 8, (round - 1) & 1);
      expect_bytes(arrives, 2 * Shape::kPanel);
      copy_box(panel, map, step * kFeatures, pair.begin_i, pair.b, arrives);
      copy_box(panel + Shape::kPanel, map, step * kFeatures, pair.begin_j, pair.b, arrives);
    }
    return;
  }

  claim_registers<Shape::kRegistersToMultiply>();
  load_sides<T, Potential, kMode>(scratch, call, pair);
  float c[Shape::kM][Shape::kN][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t panel = panels + stage * 2 * Shape::kPanel;
    wait_at_barrier(full + stage * 8, step / kStages & 1);
    fence_products();
#pragma unroll
    for (int slab = 0; slab < Shape::kRowBytes / 32; ++slab)
#pragma unroll
      for (int m = 0; m < Shape::kM; ++m)
        multiply_async(T(), c[m], panel_descriptor(panel + m * Shape::kStepI * Shape::kRowBytes + slab * 32),
                       panel_descriptor(panel + Shape::kPanel + slab * 32));
    commit_products();
    // The products of the step before are done, so the stage before this one is free.
    wait_for_products<1>();
    if (step > 0) arrive_at_barrier(empty + (step - 1) % kStages * 8);
  }
  wait_for_products<0>();
  settle(c);
  Shape::sync();
  apply_potential<T, Potential, kMode>(c, scratch, memory, call, pair);
}

}  // namespace dk
