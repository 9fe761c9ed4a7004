/* One vendored copy of the library, private to this file. The command line gives FLASHCORE_PREFIX or FLASHCORE_STATIC, and FLASHCORE_TEST_CHECK,
 * the name of the one function that the rest of the program sees. */
#define FLASHCORE_IMPLEMENTATION
#include "all_headers.h"

extern "C" int FLASHCORE_TEST_CHECK(void) {
  flashcore_attention a;
  flashcore_init(&a);
  flashcore_error error;
  a.struct_size = 0;
  return flashcore_version() == FLASHCORE_VERSION && flashcore_reference_forward(&a, &error) == FLASHCORE_INVALID_STRUCT_SIZE;
}
