/* test_fp8.cu for attention of 16-bit Q on fp8 K and V. */
#define FLASHCORE_TEST_KV8
#include "test_fp8.cu"
