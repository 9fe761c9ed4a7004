/* Demonstrates that division by a run-time constant, as kernels do it, is division on the host too. Needs nvcc, no GPU.
 *   nvcc -std=c++17 -I<repository> tests/host/test_divisor.cu */
#include "flashcore.h"

#include "check.h"

static uint64_t state = 1;
static int32_t random_positive() { /* of any magnitude below 2^31 */
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)((state >> 33) >> ((state >> 20) % 31u));
}

static void check_division(const flashcore::divisor &divisor, int64_t n) {
  if (n < 0 || n > INT32_MAX) return;
  if (!CHECK(divisor.quotient((int32_t)n) == (int32_t)n / divisor.d)) printf("  %lld / %d\n", (long long)n, (int)divisor.d);
}

static void check_edges(int32_t d) {
  const flashcore::divisor divisor = flashcore::make_divisor(d);
  const int64_t last = INT32_MAX / d * (int64_t)d; /* the largest multiple */
  const int64_t numbers[] = {0, 1, (int64_t)d - 1, d, (int64_t)d + 1, 2 * (int64_t)d - 1, last - 1, last, last + 1, INT32_MAX};
  CHECK(divisor.d == d);
  for (const int64_t n : numbers) check_division(divisor, n);
}

static void quotient_is_division_at_the_edges() {
  for (int32_t d = 1; d <= 5000; ++d) check_edges(d);
  for (int bit = 12; bit < 31; ++bit)
    for (int32_t offset = -1; offset <= 1; ++offset) check_edges((int32_t)((1u << bit) + (uint32_t)offset));
  check_edges(INT32_MAX);
  check_edges(INT32_MAX - 1);
}

static void quotient_is_division_everywhere_for_small_numbers() {
  for (int32_t d = 1; d <= 300; ++d) {
    const flashcore::divisor divisor = flashcore::make_divisor(d);
    for (int32_t n = 0; n < 2000; ++n) check_division(divisor, n);
  }
}

static void quotient_is_division_for_random_numbers() {
  for (int trial = 0; trial < 3000; ++trial) {
    const flashcore::divisor divisor = flashcore::make_divisor(1 + random_positive() % INT32_MAX);
    for (int i = 0; i < 100; ++i) check_division(divisor, random_positive());
  }
}

int main() {
  RUN(quotient_is_division_at_the_edges);
  RUN(quotient_is_division_everywhere_for_small_numbers);
  RUN(quotient_is_division_for_random_numbers);
  return check_end();
}
