#include "tile_kernels.h"

namespace dk {
const TileKernels kAvx2Kernels = kTileKernels;
}
