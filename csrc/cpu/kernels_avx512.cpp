#include "tile_kernels.h"

namespace dk {
const TileKernels kAvx512Kernels = kTileKernels;
}
