/* The one file of the GPU tests that compiles the library itself. */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore_wmma.cuh"
