/* Demonstrates that the reference's element types are exact when read and rounded to nearest, ties to even, when written.
 *   cc -std=c11 -I<repository> tests/host/test_dtypes.c -lm */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore.h"

#include "check.h"

typedef struct format { /* as their definitions state them, apart from the library's own table */
  int32_t dtype, exponent_bits, mantissa_bits, bias;
  int has_infinity, saturates;
  double largest;
} format;

static const format formats[] = {
    {FLASHCORE_F16, 5, 10, 15, 1, 0, 65504.0},
    {FLASHCORE_BF16, 8, 7, 127, 1, 0, 3.3895313892515355e38},
    {FLASHCORE_E4M3, 4, 3, 7, 0, 1, 448.0},
    {FLASHCORE_E5M2, 5, 2, 15, 1, 1, 57344.0},
};
enum { kFormats = 4 };

static uint32_t sign_bit(const format *f) { return 1u << (f->exponent_bits + f->mantissa_bits); }

/* The value of a pattern, by definition. */
static double value_of(const format *f, uint32_t bits) {
  const double sign = bits & sign_bit(f) ? -1.0 : 1.0;
  const uint32_t mantissa = bits & ((1u << f->mantissa_bits) - 1), top = (1u << f->exponent_bits) - 1;
  const uint32_t exponent = (bits >> f->mantissa_bits) & top;
  const double fraction = mantissa / pow(2.0, f->mantissa_bits);
  if (f->has_infinity && exponent == top) return mantissa ? (double)NAN : sign * (double)INFINITY;
  if (!f->has_infinity && exponent == top && mantissa == (1u << f->mantissa_bits) - 1) return (double)NAN;
  if (exponent == 0) return sign * fraction * pow(2.0, 1 - f->bias);
  return sign * (1.0 + fraction) * pow(2.0, (int)exponent - f->bias);
}

/* The largest finite pattern without sign. */
static uint32_t largest_bits(const format *f) {
  uint32_t bits = 0;
  while (!isnan(value_of(f, bits + 1)) && !isinf(value_of(f, bits + 1))) ++bits;
  return bits;
}

static void every_pattern_decodes_to_its_definition(void) {
  for (int i = 0; i < kFormats; ++i)
    for (uint32_t bits = 0; bits < 2 * sign_bit(&formats[i]); ++bits) {
      const double expected = value_of(&formats[i], bits), got = flashcore_decode(formats[i].dtype, bits);
      CHECK(isnan(expected) ? isnan(got) : got == expected && !signbit(got) == !signbit(expected));
    }
}

static void every_finite_pattern_survives_a_round_trip(void) {
  for (int i = 0; i < kFormats; ++i)
    for (uint32_t bits = 0; bits < 2 * sign_bit(&formats[i]); ++bits) {
      const double x = flashcore_decode(formats[i].dtype, bits);
      const uint32_t back = flashcore_encode(formats[i].dtype, x);
      if (isnan(x)) CHECK(isnan(flashcore_decode(formats[i].dtype, back)));
      else if (isinf(x) && formats[i].saturates) CHECK(fabs(flashcore_decode(formats[i].dtype, back)) == formats[i].largest);
      else CHECK(back == bits);
    }
}

static void between_two_neighbours_the_nearer_wins_and_ties_go_to_even(void) {
  for (int i = 0; i < kFormats; ++i) {
    const format *f = &formats[i];
    const uint32_t top = largest_bits(f);
    for (uint32_t bits = 0; bits < top; ++bits) {
      const double middle = 0.5 * (value_of(f, bits) + value_of(f, bits + 1)); /* exact in double */
      const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
      CHECK(flashcore_encode(f->dtype, middle) == even);
      CHECK(flashcore_encode(f->dtype, -middle) == (even | sign_bit(f)));
      CHECK(flashcore_encode(f->dtype, nextafter(middle, 0.0)) == bits);
      CHECK(flashcore_encode(f->dtype, nextafter(middle, (double)INFINITY)) == bits + 1);
    }
  }
}

static void too_large_becomes_infinity_or_saturates(void) {
  for (int i = 0; i < kFormats; ++i) {
    const format *f = &formats[i];
    const uint32_t top = largest_bits(f);
    const double step = value_of(f, top) - value_of(f, top - 1), edge = f->largest + 0.5 * step;
    const uint32_t over = f->saturates ? top : top + 1;
    CHECK(value_of(f, top) == f->largest);
    CHECK(flashcore_encode(f->dtype, nextafter(edge, 0.0)) == top);
    CHECK(flashcore_encode(f->dtype, edge) == over); /* a tie between an odd number and the next power of two */
    CHECK(flashcore_encode(f->dtype, 1e300) == over);
    CHECK(flashcore_encode(f->dtype, (double)INFINITY) == over);
    CHECK(flashcore_encode(f->dtype, -(double)INFINITY) == (over | sign_bit(f)));
  }
}

static void known_patterns_have_their_known_values(void) {
  CHECK(flashcore_decode(FLASHCORE_F16, 0x3c00) == 1.0);
  CHECK(flashcore_decode(FLASHCORE_F16, 0x7bff) == 65504.0);
  CHECK(flashcore_decode(FLASHCORE_F16, 0x0001) == ldexp(1.0, -24));
  CHECK(flashcore_decode(FLASHCORE_BF16, 0xc049) == -3.140625);
  CHECK(flashcore_decode(FLASHCORE_E4M3, 0x7e) == 448.0);
  CHECK(flashcore_decode(FLASHCORE_E4M3, 0x01) == ldexp(1.0, -9));
  CHECK(flashcore_decode(FLASHCORE_E5M2, 0x7b) == 57344.0);
  CHECK(flashcore_encode(FLASHCORE_F16, 0.1) == 0x2e66);
  CHECK(flashcore_encode(FLASHCORE_BF16, 3.14159265) == 0x4049);
}

static void rounding_is_done_once_and_not_through_float(void) {
  /* Just above a tie of f16: rounding to float first would land on the tie, and then go to even. */
  const double x = 1.0 + ldexp(1.0, -11) + ldexp(1.0, -40);
  CHECK((double)(float)x == 1.0 + ldexp(1.0, -11));
  CHECK(flashcore_encode(FLASHCORE_F16, x) == 0x3c01);
}

static void memory_access_uses_each_types_width(void) {
  const int32_t dtypes[] = {FLASHCORE_F32, FLASHCORE_F16, FLASHCORE_BF16, FLASHCORE_E4M3, FLASHCORE_E5M2};
  for (int i = 0; i < 5; ++i) {
    float memory[4] = {0.f, 0.f, 0.f, 0.f}; /* aligned for each type */
    for (int j = 0; j < 4; ++j) flashcore_store(memory, dtypes[i], j, j - 1.5);
    for (int j = 0; j < 4; ++j) CHECK(flashcore_load(memory, dtypes[i], j) == j - 1.5);
    if (flashcore_dtype_bytes(dtypes[i]) <= 2) CHECK(memory[2] == 0.f && memory[3] == 0.f);
    if (flashcore_dtype_bytes(dtypes[i]) == 1) CHECK(memory[1] == 0.f);
  }
}

int main(void) {
  RUN(every_pattern_decodes_to_its_definition);
  RUN(every_finite_pattern_survives_a_round_trip);
  RUN(between_two_neighbours_the_nearer_wins_and_ties_go_to_even);
  RUN(too_large_becomes_infinity_or_saturates);
  RUN(known_patterns_have_their_known_values);
  RUN(rounding_is_done_once_and_not_through_float);
  RUN(memory_access_uses_each_types_width);
  return check_end();
}
