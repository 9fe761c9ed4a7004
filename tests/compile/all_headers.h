/* Every header that this version has. flashcore_fp8.cuh and flashcore_wgmma.cuh join by existing. */
#include "flashcore.h"
#if defined(__CUDACC__)
#if __has_include("flashcore_wmma.cuh")
#include "flashcore_wmma.cuh"
#endif
#if __has_include("flashcore_wgmma.cuh")
#include "flashcore_wgmma.cuh"
#endif
#if __has_include("flashcore_fp8.cuh")
#include "flashcore_fp8.cuh"
#endif
#endif
