// Demonstrates the one file of a project that compiles FlashCore in; every other file, C or CUDA, includes flashcore.h alone.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -c examples/common/library.cu
//
// [readme:library]
#define FLASHCORE_IMPLEMENTATION
#include "../../flashcore_wgmma.cuh"
#include "../../flashcore_wmma.cuh"
// [readme:end]
