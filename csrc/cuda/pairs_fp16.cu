#define DK_ELEMENT Float16
#define DK_NAME fp16
#define DK_TABLE float16_kernels
#include "instantiate.cuh"
