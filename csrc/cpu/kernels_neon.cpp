#include "tile_kernels.h"

namespace dk {
const TileKernels kNeonKernels = kTileKernels;
}
