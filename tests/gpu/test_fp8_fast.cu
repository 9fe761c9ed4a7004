/* test_fp8.cu for the fast mode, whose error may be 2.4 times as large. */
#define FLASHCORE_FP8_FAST
#include "test_fp8.cu"
