#define DK_ELEMENT TF32
#define DK_NAME tf32
#define DK_TABLE tf32_kernels
#include "instantiate.cuh"
