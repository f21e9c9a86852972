// The kernels over pairs of tokens for one element type: DK_ELEMENT, the type; DK_NAME, its name in the kernels' names;
// DK_TABLE, the function that returns their table. Each pairs_*.cu includes this once.
#include "pair_tiles.cuh"
#include "pair_tiles_wgmma.cuh"
#include "row_sweep.cuh"

#define DK_PAIR_TILES_PARAMETERS                                                                                       \
  const char *z, const __grid_constant__ dk::LayerOffsets layers, int64_t stride_b, int64_t stride_l,                  \
      const float *inverse, const float *weight_inverse, const float *extra, const float *shift, const int *pair_ids,  \
      dk::DK_ELEMENT::Stored *weights, dk::DK_ELEMENT::Stored *mirror,                                                 \
      int64_t weights_row_stride, int64_t weights_stride, float *sums, float *maxima, int64_t sums_stride,             \
      int first_sum, int first_row, int batch, int length, int features, int first_i, int first_j, int tiles_i,        \
      int tiles_j, int triangle, float p0, float p1, float p2, float p3
#define DK_PAIR_TILES_ARGUMENTS                                                                                        \
  z, layers, stride_b, stride_l, inverse, weight_inverse, extra, shift, pair_ids, weights, mirror,                     \
      weights_row_stride, weights_stride, sums, maxima, sums_stride, first_sum, first_row, batch, length, features,    \
      first_i, first_j, tiles_i, tiles_j, triangle, p0, p1, p2, p3

#define DK_ROW_SWEEP_PARAMETERS                                                                                        \
  const char *z, const __grid_constant__ dk::LayerOffsets layers, int64_t stride_b, int64_t stride_l,                  \
      const float *inverse, const float *weight_inverse, const float *extra, const float *shift, const int *pair_ids,  \
      const int *tile_ranges, const float *largest, const float *total, const float *expected, const float *average,   \
      float *sums, float *maxima, float *weight_sums, float *gradient,                                                 \
      const __grid_constant__ dk::LayerOffsets gradients, int batch, int length, int features, float p0, float p1,     \
      float p2, float p3
#define DK_ROW_SWEEP_ARGUMENTS                                                                                         \
  z, layers, stride_b, stride_l, inverse, weight_inverse, extra, shift, pair_ids, tile_ranges, largest, total,         \
      expected, average, sums, maxima, weight_sums, gradient, gradients, batch, length, features, p0, p1, p2, p3

#define DK_JOIN_(a, b, c, d) a##_##b##_##c##_##d
#define DK_JOIN(a, b, c, d) DK_JOIN_(a, b, c, d)
#define DK_STRING_(a) #a
#define DK_STRING(a) DK_STRING_(a)

// Lists of all kernels: name of the epilogue, potential, name of the mode, mode.
#define DK_OF_EVERY_POTENTIAL(X, ...)                         \
  X(angular_spread_narrow, AngularSpreadNarrow, __VA_ARGS__)  \
  X(angular_spread, AngularSpread, __VA_ARGS__)               \
  X(orthogonalization_narrow, OrthogonalizationNarrow, __VA_ARGS__) \
  X(orthogonalization, Orthogonalization, __VA_ARGS__)        \
  X(decorrelation, Decorrelation, __VA_ARGS__)                \
  X(gaussian, DistinctGaussian, __VA_ARGS__)
#define DK_OF_EVERY_EXPONENTIAL(X, ...)                      \
  X(angular_spread_narrow, AngularSpreadNarrow, __VA_ARGS__) \
  X(angular_spread, AngularSpread, __VA_ARGS__)              \
  X(gaussian, DistinctGaussian, __VA_ARGS__)
#define DK_EVERY_PAIR_TILES(X)                \
  DK_OF_EVERY_POTENTIAL(X, loss, kLoss)       \
  DK_OF_EVERY_POTENTIAL(X, write, kWrite)     \
  DK_OF_EVERY_EXPONENTIAL(X, online, kOnline)
#define DK_EVERY_ROW_SWEEP(X)                                          \
  DK_OF_EVERY_POTENTIAL(X, loss, kLoss, false)                         \
  DK_OF_EVERY_EXPONENTIAL(X, online, kOnline, false)                   \
  DK_OF_EVERY_POTENTIAL(X, gradient, kGradient, false)                 \
  DK_OF_EVERY_POTENTIAL(X, gradient_resident, kGradient, true)         \
  X(gaussian, DistinctGaussian, partition, kPartition, false)                  \
  X(gaussian, DistinctGaussian, entropy, kEntropy, false)                      \
  X(gaussian, DistinctGaussian, entropy_gradient, kEntropyGradient, false)     \
  X(gaussian, DistinctGaussian, entropy_gradient_resident, kEntropyGradient, true)

#define DK_DEFINE_PAIR_TILES(name, Potential, mode, kMode)                                              \
  extern "C" __global__ void __launch_bounds__(dk::PairTilesShape<dk::DK_ELEMENT>::kThreads,            \
                                               dk::PairTilesShape<dk::DK_ELEMENT>::kBlocksOfSM)         \
      DK_JOIN(dk_pair_tiles, DK_NAME, name, mode)(DK_PAIR_TILES_PARAMETERS) {                           \
    dk::pair_tiles<dk::DK_ELEMENT, dk::Potential, dk::PairTiles::kMode>({DK_PAIR_TILES_ARGUMENTS});     \
  }
#define DK_ROW_SWEEP_SHAPE(Potential, kMode, kResident) \
  dk::RowSweepShape<dk::DK_ELEMENT, dk::Potential, dk::RowSweep::kMode, kResident>
#define DK_DEFINE_ROW_SWEEP(name, Potential, mode, kMode, kResident)                                    \
  extern "C" __global__ void __launch_bounds__(DK_ROW_SWEEP_SHAPE(Potential, kMode, kResident)::kThreads, 1)                  \
      DK_JOIN(dk_row_sweep, DK_NAME, name, mode)(DK_ROW_SWEEP_PARAMETERS) {                             \
    dk::row_sweep<dk::DK_ELEMENT, dk::Potential, dk::RowSweep::kMode, kResident>(DK_ROW_SWEEP_ARGUMENTS); \
  }
// Without sm_90a the kernel is a stub whose bound, fewer threads than the kernel needs, tells the host so.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DK_WGMMA_BOUNDS \
  __launch_bounds__(dk::PairTilesWgmmaShape<dk::DK_ELEMENT>::kBlockThreads, \
                    dk::PairTilesWgmmaShape<dk::DK_ELEMENT>::kBlocksOfSM)
#define DK_WGMMA_CALL(...) __VA_ARGS__
#else
#define DK_WGMMA_BOUNDS __launch_bounds__(32)
#define DK_WGMMA_CALL(...) __trap()
#endif
#define DK_DEFINE_PAIR_TILES_WGMMA(name, Potential, mode, kMode)                                        \
  extern "C" __global__ void DK_WGMMA_BOUNDS DK_JOIN(dk_pair_tiles, DK_NAME, name, mode##_wgmma)(       \
      DK_PAIR_TILES_PARAMETERS, const __grid_constant__ dk::TensorMaps maps) {                          \
    DK_WGMMA_CALL(dk::pair_tiles_wgmma<dk::DK_ELEMENT, dk::Potential, dk::PairTiles::kMode>(            \
        {DK_PAIR_TILES_ARGUMENTS}, maps));                                                              \
  }
DK_EVERY_PAIR_TILES(DK_DEFINE_PAIR_TILES)
DK_EVERY_ROW_SWEEP(DK_DEFINE_ROW_SWEEP)
#ifdef DK_WGMMA
DK_EVERY_PAIR_TILES(DK_DEFINE_PAIR_TILES_WGMMA)
#endif

#define DK_LIST_PAIR_TILES(name, Potential, mode, kMode)                              \
  {DK_STRING(DK_JOIN(dk_pair_tiles, DK_NAME, name, mode)),                            \
   (const void*)DK_JOIN(dk_pair_tiles, DK_NAME, name, mode),                          \
   dk::PairTilesShape<dk::DK_ELEMENT>::kThreads, dk::PairTilesShape<dk::DK_ELEMENT>::kShared, 0},
#define DK_LIST_PAIR_TILES_WGMMA(name, Potential, mode, kMode)                        \
  {DK_STRING(DK_JOIN(dk_pair_tiles, DK_NAME, name, mode##_wgmma)),                    \
   (const void*)DK_JOIN(dk_pair_tiles, DK_NAME, name, mode##_wgmma),                  \
   dk::PairTilesWgmmaShape<dk::DK_ELEMENT>::kBlockThreads, dk::PairTilesWgmmaShape<dk::DK_ELEMENT>::kShared, 0},
#define DK_LIST_ROW_SWEEP(name, Potential, mode, kMode, kResident)                    \
  {DK_STRING(DK_JOIN(dk_row_sweep, DK_NAME, name, mode)),                             \
   (const void*)DK_JOIN(dk_row_sweep, DK_NAME, name, mode),                           \
   DK_ROW_SWEEP_SHAPE(Potential, kMode, kResident)::kThreads,                         \
   DK_ROW_SWEEP_SHAPE(Potential, kMode, kResident)::kShared,                          \
   DK_ROW_SWEEP_SHAPE(Potential, kMode, kResident)::kSlice},

dk::Kernels dk::DK_TABLE() {
  static const Kernel kernels[] = {
      DK_EVERY_PAIR_TILES(DK_LIST_PAIR_TILES) DK_EVERY_ROW_SWEEP(DK_LIST_ROW_SWEEP)
#ifdef DK_WGMMA
          DK_EVERY_PAIR_TILES(DK_LIST_PAIR_TILES_WGMMA)
#endif
  };
  return {kernels, int(sizeof kernels / sizeof *kernels)};
}
