/* The fp8 backends, compiled in a file of their own beside library.cu. */
#define FLASHCORE_BACKEND_IMPLEMENTATION
#include "flashcore_fp8.cuh"
