#define DK_ELEMENT BFloat16
#define DK_NAME bf16
#define DK_TABLE bfloat16_kernels
#define DK_WGMMA
#include "instantiate.cuh"
