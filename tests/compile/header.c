/* flashcore.h in a file of its own, included twice; compiled as C and as C++ under each macro that changes it. */
#include "flashcore.h"
#include "flashcore.h"
#if defined(FLASHCORE_TEST_QUANTISERS)
#include "flashcore_fp8.cuh"
#endif

/* Anything that a user writes without the implementation: types, enumerators, inline helpers, declarations. */
int use_flashcore_header(void);
int use_flashcore_header(void) {
  const flashcore_tensor t = flashcore_bshd(0, 5, 3, 2);
  const flashcore_status status = FLASHCORE_OK;
  return t.stride_b == 30 && status == FLASHCORE_OK && flashcore_clamp(7, 0, 3) == 3 ? FLASHCORE_VERSION : 0;
}
