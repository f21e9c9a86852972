#define DK_ELEMENT Float16
#define DK_NAME fp16
#define DK_TABLE float16_kernels
#define DK_WGMMA
#include "instantiate.cuh"
