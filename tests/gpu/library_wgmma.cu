/* The wgmma backend, compiled in a file of its own beside library.cu: the two build in parallel. */
#define FLASHCORE_BACKEND_IMPLEMENTATION
#include "flashcore_wgmma.cuh"
