// The kernel over pairs of tiles for every GPU: similarities by mma.sync, psi and slope; the slopes go to a workspace,
// for the library's matrix products.
#pragma once

#include "pairs.cuh"

namespace dk {

template <class T>
struct PairTilesShape {
  static constexpr int kBlock = sizeof(typename T::Stored) == 2 ? 128 : 64;
  static constexpr int kRowBytes = sizeof(typename T::Stored) == 2 ? 64 : 128;
  static constexpr int kStages = 3;
  // Least number of blocks per multiprocessor; 0 leaves it to the compiler. For fp32 the compiler would spill rather
  // than use more than 96 registers, and with three registers per element it spills at the 168 that three blocks leave.
  static constexpr int kBlocksOfSM = sizeof(typename T::Stored) == 2 ? 0 : Products<T, 1, 1>::kRegisters == 1 ? 3 : 2;
  static constexpr int kWarpsI = 2, kWarpsJ = sizeof(typename T::Stored) == 2 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarpsI * kWarpsJ;
  static constexpr int kM = kBlock / kWarpsI / 16, kN = kBlock / kWarpsJ / 8, kStepI = 16;
  static constexpr int kPanel = kBlock * kRowBytes;
  static constexpr int kPanels = kStages * 2 * kPanel;
  static constexpr int kShared = kPanels + int(sizeof(Scratch<PairTilesShape>));
  static_assert(kWarpsI * 16 * kM == kBlock && kWarpsJ * 8 * kN == kBlock, "the warps' parts are the tile");

  static DK_DEVICE int row() { return int(threadIdx.x) / 32 / kWarpsJ * (16 * kM); }
  static DK_DEVICE int column() { return int(threadIdx.x) / 32 % kWarpsJ * (8 * kN); }
  static DK_DEVICE void sync() { __syncthreads(); }
};

// Kernel body for one pair of tiles of tokens (I, J) of one row: the sum of psi over its pairs, in both orders, and,
// with kWrite, the slopes times the inverse norm of the column, to `weights`, and those of (J, I), to `mirror`. With
// kOnline the sum is relative to the largest exponent of the tile, which goes to `maxima`.
//
// blockIdx.x numbers the pairs of tiles: of the upper triangle of tiles_i x tiles_i, folded to a rectangle, or, without
// `triangle`, of tiles_i x tiles_j. Tile 0 begins at token first_i or first_j. blockIdx.y + first_row is the row.
// `shift`, `pair_ids` and `mirror` may be null.
template <class T, class Potential, PairTiles kMode>
DK_DEVICE void pair_tiles(const PairTilesCall<T>& call) {
  using Shape = PairTilesShape<T>;
  using Stored = typename T::Stored;
  constexpr int kBlock = Shape::kBlock, kRowBytes = Shape::kRowBytes, kStages = Shape::kStages;
  extern __shared__ __align__(128) char shared[];
  Scratch<Shape>& scratch = *reinterpret_cast<Scratch<Shape>*>(shared + Shape::kPanels);

  const PairOfBlock pair = pair_of_block<T, kBlock>(call);
  if (!pair.paired || !pair_ids_overlap<T, kBlock>(call, pair)) return leave_nothing<T, Shape, kMode>(call, pair);
  load_sides<T, Potential, kMode>(scratch, call, pair);

  const char* tokens = call.z + call.layers.offset[pair.layer] + pair.b * call.stride_b * int64_t(sizeof(Stored));
  const int64_t stride_bytes = call.stride_l * int64_t(sizeof(Stored));
  const int feature_bytes = call.features * int(sizeof(Stored));
  const int steps = (feature_bytes + kRowBytes - 1) / kRowBytes;
  const uint32_t panels = shared_address(shared);
  const auto copy_step = [&](int step) {
    if (step < steps) {
      const uint32_t panel = panels + step % kStages * 2 * Shape::kPanel;
      copy_panel<kBlock, kRowBytes, Shape::kThreads>(panel, tokens, stride_bytes, pair.begin_i, call.length,
                                                     step * kRowBytes, feature_bytes);
      copy_panel<kBlock, kRowBytes, Shape::kThreads>(panel + Shape::kPanel, tokens, stride_bytes, pair.begin_j,
                                                     call.length, step * kRowBytes, feature_bytes);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  Products<T, Shape::kM, Shape::kN> c;
  constexpr int kStepsOfFlush = kFeaturesOfFlush * 4 / kRowBytes;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step's panels have arrived, and all threads are done with those of the step before
    copy_step(step + kStages - 1);
    const uint32_t panel = panels + step % kStages * 2 * Shape::kPanel;
    multiply_panels<T, kRowBytes, Shape::kM, Shape::kN>(c, panel, Shape::row(), panel + Shape::kPanel, Shape::column());
    if (step % kStepsOfFlush == kStepsOfFlush - 1) c.flush();
  }
  c.flush();
  wait_for_copies<0>();
  apply_potential<T, Potential, kMode>(c.sums, scratch, shared, call, pair);
}

}  // namespace dk
