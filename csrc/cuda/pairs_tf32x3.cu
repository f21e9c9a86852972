#define DK_ELEMENT TF32x3
#define DK_NAME tf32x3
#define DK_TABLE tf32x3_kernels
#include "instantiate.cuh"
