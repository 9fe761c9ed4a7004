/* Demonstrates what the quantisers make of a tensor, on the CPU reference that the kernels follow bit for bit, and what they refuse, in which words.
 *   cc -std=c11 -I<repository> -x c tests/host/test_fp8.c -lm */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore_fp8.cuh"

#include "check.h"

#include <stdalign.h>

enum { kBatch = 2, kRows = 24, kHeads = 3, kDim = 32, kCount = kBatch * kRows * kHeads * kDim };

alignas(16) static float input[kCount];
alignas(16) static uint8_t output[kCount];
static float descale[kBatch * kHeads * kRows];
alignas(16) static float mean[kBatch * kHeads * kDim];

/* A number from -1 to 1 that looks random. */
static float noise(uint32_t i) {
  i = i * 2654435761u + 12345u;
  i ^= i >> 15;
  i *= 2246822519u;
  return (float)(int32_t)(i ^ (i >> 13)) / 2147483648.f;
}

static int index_of(int b, int row, int h, int d) { return ((b * kRows + row) * kHeads + h) * kDim + d; }

/* Heads of very different size, dims with a mean. */
static flashcore_fp8_quantise_args problem(void) {
  flashcore_fp8_quantise_args q;
  for (int b = 0; b < kBatch; ++b)
    for (int row = 0; row < kRows; ++row)
      for (int h = 0; h < kHeads; ++h)
        for (int d = 0; d < kDim; ++d) {
          const int i = index_of(b, row, h, d);
          input[i] = (noise((uint32_t)i) + (float)(d % 3)) * (float)(1 << (4 * h + 2 * b));
        }
  memset(output, 0xa5, sizeof output);
  for (int i = 0; i < kBatch * kHeads * kRows; ++i) descale[i] = (float)NAN;
  flashcore_fp8_quantise_init(&q);
  q.dtype = FLASHCORE_F32;
  q.batch = kBatch;
  q.rows = kRows;
  q.heads = kHeads;
  q.dim = kDim;
  q.x = flashcore_bshd(input, kRows, kHeads, kDim);
  q.out = flashcore_bshd(output, kRows, kHeads, kDim);
  q.descale = descale;
  return q;
}

static int quantised(const flashcore_fp8_quantise_args *q) {
  flashcore_error error;
  const flashcore_status status = flashcore_fp8_quantise_reference(q, &error);
  if (!CHECK(status == FLASHCORE_OK)) printf("  %s\n", error.message);
  return status == FLASHCORE_OK;
}

static int scale_index(const flashcore_fp8_quantise_args *q, int b, int row, int h) {
  const int unit = b * kHeads + h;
  if (q->granularity == FLASHCORE_FP8_PER_HEAD) return unit;
  return q->granularity == FLASHCORE_FP8_PER_BLOCK ? unit * (kRows / q->block_rows) + row / q->block_rows : 0;
}

/* Every value comes back within half a step of its size, and none of its group's is above the largest. */
static void values_come_back_within_half_a_step(void) {
  const int granularities[] = {FLASHCORE_FP8_PER_HEAD, FLASHCORE_FP8_PER_TENSOR, FLASHCORE_FP8_PER_BLOCK, FLASHCORE_FP8_GIVEN};
  for (int kind = 0; kind < 8; ++kind) {
    flashcore_fp8_quantise_args q = problem();
    const int e4m3 = kind % 2;
    q.granularity = granularities[kind / 2];
    q.dtype_out = e4m3 ? FLASHCORE_E4M3 : FLASHCORE_E5M2;
    q.block_rows = 8;
    q.scale = 32.f;
    if (!quantised(&q)) continue;
    for (int b = 0; b < kBatch; ++b)
      for (int row = 0; row < kRows; ++row)
        for (int h = 0; h < kHeads; ++h)
          for (int d = 0; d < kDim; ++d) {
            const int i = index_of(b, row, h, d);
            const double scale = (double)descale[scale_index(&q, b, row, h)], x = (double)input[i];
            const double step = e4m3 ? fmax(fabs(x) / 16, scale / 1024) : fmax(fabs(x) / 8, scale / 131072);
            CHECK(fabs(flashcore_decode(q.dtype_out, output[i]) * scale - x) <= step * 1.0001);
          }
  }
}

static void the_bounds_of_a_given_scale_are_served(void) {
  const float scales[] = {0x1p-126f, 0x1p126f};
  for (int i = 0; i < 2; ++i) {
    flashcore_fp8_quantise_args q = problem();
    q.granularity = FLASHCORE_FP8_GIVEN;
    q.scale = scales[i];
    input[0] = 3.f, input[1] = -0.f;
    CHECK(quantised(&q) && descale[0] == scales[i] && output[0] == (i ? 0x00 : 0x7e) && output[1] == 0x80);
  }
}

static void a_scale_belongs_to_its_group_alone(void) {
  flashcore_fp8_quantise_args q = problem();
  q.granularity = FLASHCORE_FP8_PER_BLOCK;
  q.block_rows = 6;
  if (!quantised(&q)) return;
  for (int n = 0; n < kBatch * kHeads * 4; ++n) {
    const int b = n / 4 / kHeads, h = n / 4 % kHeads;
    float amax = 0.f;
    for (int row = n % 4 * 6; row < n % 4 * 6 + 6; ++row)
      for (int d = 0; d < kDim; ++d) amax = fmaxf(amax, fabsf(input[index_of(b, row, h, d)]));
    CHECK(descale[n] == amax / 448.f);
  }
}

static void zeros_nan_and_infinity_behave_as_documented(void) {
  flashcore_fp8_quantise_args q = problem();
  for (int i = 0; i < kCount; ++i) input[i] = 0.f;
  q.granularity = FLASHCORE_FP8_PER_TENSOR;
  quantised(&q);
  CHECK(descale[0] > 0.f && output[0] == 0);
  input[0] = 448.f, input[1] = (float)NAN, input[2] = INFINITY, input[3] = -INFINITY, input[4] = 0x1p-9f, input[5] = 0x1p-11f, input[6] = -0.f;
  quantised(&q);
  CHECK(descale[0] == 1.f);
  const uint8_t expected[7] = {0x7e, 0x7f, 0x7e, 0xfe, 0x01, 0x00, 0x80};
  for (int i = 0; i < 7; ++i) CHECK(output[i] == expected[i]);
  q.dtype_out = FLASHCORE_E5M2;
  input[0] = 57344.f;
  quantised(&q);
  CHECK(descale[0] == 1.f && output[0] == 0x7b && output[1] == 0x7f && output[2] == 0x7b && output[3] == 0xfb);
}

static void rows_past_the_length_are_neither_read_nor_written(void) {
  const int32_t lengths[kBatch] = {7, -2};
  flashcore_fp8_quantise_args q = problem();
  q.seqlens = lengths;
  q.mean = mean;
  for (int b = 0; b < kBatch; ++b)
    for (int row = lengths[b] < 0 ? 0 : lengths[b]; row < kRows; ++row)
      for (int i = index_of(b, row, 0, 0); i < index_of(b, row, 0, 0) + kHeads * kDim; ++i) input[i] = (float)NAN;
  quantised(&q);
  for (int i = 0; i < kBatch * kHeads; ++i) CHECK(descale[i] > 0.f && descale[i] < 1e3f);
  for (int i = 0; i < kBatch * kHeads * kDim; ++i) CHECK(fabsf(mean[i]) < 1e5f);
  for (int i = 0; i < kCount; ++i) CHECK((output[i] == 0xa5) == (i >= index_of(0, 7, 0, 0)));
}

static void the_mean_is_subtracted(void) {
  flashcore_fp8_quantise_args q = problem();
  q.mean = mean;
  quantised(&q);
  for (int b = 0; b < kBatch; ++b)
    for (int h = 0; h < kHeads; ++h)
      for (int d = 0; d < kDim; ++d) {
        double sum = 0.0, rest = 0.0;
        for (int row = 0; row < kRows; ++row) {
          sum += (double)input[index_of(b, row, h, d)];
          rest += flashcore_decode(FLASHCORE_E4M3, output[index_of(b, row, h, d)]) * (double)descale[b * kHeads + h];
        }
        const double unit = (double)(1 << (4 * h + 2 * b));
        CHECK_NEAR((double)mean[(b * kHeads + h) * kDim + d] / unit, sum / (double)kRows / unit, 1e-5);
        CHECK(fabs(rest / (double)kRows) < 0.02 * unit);
      }
}

/* What is no number in a row of K stays there: the other rows have the mean and the scale that they have among themselves. */
static void a_row_of_nan_and_infinity_spoils_no_other(void) {
  const float odd[2] = {(float)NAN, INFINITY};
  static float means[kBatch * kHeads * kDim];
  static uint8_t expected[kCount];
  for (int kind = 0; kind < 4; ++kind) {
    const int bad = kRows - 1 - kind / 2; /* the last row of a batch entry, or the one before */
    const int32_t lengths[kBatch] = {bad, bad};
    flashcore_fp8_quantise_args q = problem();
    q.mean = mean;
    q.seqlens = lengths; /* as if the rows from the bad one on were not there */
    if (!quantised(&q)) continue;
    memcpy(means, mean, sizeof means);
    memcpy(expected, output, sizeof expected);
    const int32_t all[kBatch] = {bad + 1, bad + 1};
    q.seqlens = all;
    for (int b = 0; b < kBatch; ++b)
      for (int i = index_of(b, bad, 0, 0); i < index_of(b, bad, 0, 0) + kHeads * kDim; ++i) input[i] = odd[kind % 2];
    if (!quantised(&q)) continue;
    CHECK(memcmp(means, mean, sizeof means) == 0);
    for (int b = 0; b < kBatch; ++b)
      CHECK(memcmp(expected + index_of(b, 0, 0, 0), output + index_of(b, 0, 0, 0), (size_t)(bad * kHeads * kDim)) == 0);
    CHECK(output[index_of(0, bad, 0, 0)] == (kind % 2 ? 0x7e : 0x7f));
  }
}

static void a_sum_past_fp32_leaves_the_mean_out(void) {
  flashcore_fp8_quantise_args q = problem();
  q.mean = mean;
  for (int row = 0; row < kRows; ++row) input[index_of(1, row, 2, 3)] = 3e38f;
  quantised(&q);
  CHECK(mean[(1 * kHeads + 2) * kDim + 3] == 0.f && output[index_of(1, 0, 2, 3)] == 0x7e && descale[1 * kHeads + 2] == 3e38f / 448.f);
}

/* The same bytes in another order: rows contiguous, dims stride_s apart; what lies between the last row and the next dim is left alone. */
static void transposed_is_the_same_in_another_order(void) {
  enum { kPitch = 32, kCells = kBatch * kHeads * kDim * kPitch };
  alignas(16) static uint8_t cells[kCells];
  const int granularities[] = {FLASHCORE_FP8_PER_HEAD, FLASHCORE_FP8_PER_TENSOR, FLASHCORE_FP8_PER_BLOCK};
  const int32_t lengths[kBatch] = {kRows, 5};
  for (int kind = 0; kind < 3; ++kind) {
    flashcore_fp8_quantise_args q = problem();
    q.granularity = granularities[kind];
    q.rows = q.granularity == FLASHCORE_FP8_PER_BLOCK ? 16 : kRows;
    q.block_rows = 16;
    q.seqlens = lengths;
    if (!quantised(&q)) continue;
    memset(cells, 0xa5, sizeof cells);
    q.transposed = 1;
    q.out = flashcore_strided(cells, kHeads * kDim * kPitch, kPitch, kDim * kPitch);
    if (!quantised(&q)) continue;
    for (int i = 0; i < kCells; ++i) {
      const int row = i % kPitch, d = i / kPitch % kDim, h = i / kPitch / kDim % kHeads, b = i / kPitch / kDim / kHeads;
      const int live = row < q.rows && row < lengths[b];
      CHECK(cells[i] == (live ? output[index_of(b, row, h, d)] : 0xa5));
    }
  }
}

/* Rotated rows have the products of the unrotated ones, but for rounding. */
static void rotation_keeps_products(void) {
  for (int block = 16; block <= 32; block *= 2) {
    flashcore_fp8_quantise_args q = problem();
    q.rotation = block;
    quantised(&q);
    for (int h = 0; h < kHeads; ++h)
      for (int row = 0; row + 1 < kRows; ++row) {
        double exact = 0.0, rotated = 0.0, size = 0.0;
        for (int d = 0; d < kDim; ++d) {
          const int i = index_of(0, row, h, d), j = index_of(0, row + 1, h, d);
          exact += (double)input[i] * (double)input[j];
          size += fabs((double)input[i] * (double)input[j]);
          rotated += flashcore_decode(FLASHCORE_E4M3, output[i]) * flashcore_decode(FLASHCORE_E4M3, output[j]);
        }
        CHECK(fabs(rotated * (double)descale[h] * (double)descale[h] - exact) < 0.08 * size);
      }
  }
}

/* An outlier in one dim costs the others their low bits; rotated, it does not. */
static void rotation_spreads_an_outlier(void) {
  double errors[2] = {0.0, 0.0};
  for (int rotated = 0; rotated < 2; ++rotated) {
    flashcore_fp8_quantise_args q = problem();
    for (int i = 0; i < kCount; ++i) input[i] = noise((uint32_t)i) * (i % kDim == 5 ? 3e4f : 1.f);
    q.rotation = rotated ? 32 : 0;
    q.granularity = FLASHCORE_FP8_PER_TENSOR;
    quantised(&q);
    float x[FLASHCORE_MAX_DIM];
    for (int row = 0; row < kRows; ++row) {
      flashcore_fp8_row(&q, 0, 0, row, x);
      for (int d = 0; d < kDim; ++d) {
        const double back = flashcore_decode(FLASHCORE_E4M3, output[index_of(0, row, 0, d)]) * (double)descale[0];
        if (fabs((double)x[d]) > 0.0) errors[rotated] += fabs(back - (double)x[d]) / fabs((double)x[d]);
      }
    }
  }
  CHECK(errors[1] < 0.5 * errors[0]);
}

typedef flashcore_fp8_quantise_args args;
static void of_zero(args *q) { q->granularity = FLASHCORE_FP8_GIVEN; }
static void of_negative(args *q) { q->granularity = FLASHCORE_FP8_GIVEN, q->scale = -1.f; }
static void of_infinity(args *q) { q->granularity = FLASHCORE_FP8_GIVEN, q->scale = INFINITY; }
static void of_nan(args *q) { q->granularity = FLASHCORE_FP8_GIVEN, q->scale = (float)NAN; }
static void of_subnormal(args *q) { q->granularity = FLASHCORE_FP8_GIVEN, q->scale = 0x1p-127f; }
static void of_huge(args *q) { q->granularity = FLASHCORE_FP8_GIVEN, q->scale = 0x1.8p126f; }
static void undivided(args *q) { q->granularity = FLASHCORE_FP8_PER_BLOCK, q->block_rows = 7; }
static void no_block(args *q) { q->granularity = FLASHCORE_FP8_PER_BLOCK; }
static void no_granularity(args *q) { q->granularity = 4; }
static void odd_rotation(args *q) { q->rotation = 24; }
static void large_rotation(args *q) { q->rotation = 64; }
static void small_rotation(args *q) { q->rotation = 8; }
static void old_struct(args *q) { q->struct_size = 3; }
static void no_input(args *q) { q->x.data = NULL; }
static void no_output(args *q) { q->out.data = NULL; }
static void no_scales(args *q) { q->descale = NULL; }
static void in_place(args *q) { q->out.data = q->x.data; }
static void into_the_input(args *q) { q->out.data = (uint8_t *)input + sizeof input - 16; }
static void scales_in_output(args *q) { q->descale = (float *)(void *)(output + kCount - 4); }
static void scales_in_input(args *q) { q->granularity = FLASHCORE_FP8_PER_TENSOR, q->descale = input + kCount - 1; }
static void mean_in_output(args *q) { q->mean = (float *)(void *)output; }
static void mean_in_scales(args *q) { q->mean = mean, q->descale = mean + kBatch * kHeads * kDim - 1; }
static void scales_in_lengths(args *q) { q->seqlens = (int32_t *)(void *)descale; }
static void backwards_into_output(args *q) {
  q->x = flashcore_strided(output + sizeof output - kHeads * kDim * 4, -kRows * kHeads * kDim, -kHeads * kDim, kDim);
}
static void shifted(args *q) { q->x.data = input + 1; }
static void odd_scales(args *q) { q->descale = (float *)((char *)descale + 2); }
static void odd_mean(args *q) { q->mean = mean + 1; }
static void odd_lengths(args *q) { q->seqlens = (int32_t *)(void *)((char *)mean + 2); }
static void odd_stride(args *q) { q->out.stride_s += 8; }
static void vast_stride(args *q) { q->x.stride_b = (int64_t)1 << 60; }
static void wrapping_stride(args *q) { q->x.stride_s = (int64_t)1 << 62; } /* times 4 bytes, 0 */
static void twice_transposed(args *q) { q->transposed = 2; }
static void transposed_blocks(args *q) { q->transposed = 1, q->out.stride_s = 32, q->granularity = FLASHCORE_FP8_PER_BLOCK, q->block_rows = 8; }
static void transposed_rows(args *q) { q->transposed = 1, q->out.stride_s = kRows; }
static void flat_output(args *q) { q->out.stride_h = 0; }
static void from_fp8(args *q) { q->dtype = FLASHCORE_E4M3; }
static void from_nothing(args *q) { q->dtype = 17; }
static void to_nothing(args *q) { q->dtype_out = 99; }
static void to_fp16(args *q) { q->dtype_out = FLASHCORE_F16; }
static void no_batch(args *q) { q->batch = 0; }
static void odd_dim(args *q) { q->dim = 40; }
static void too_many(args *q) { q->batch = 1 << 20, q->heads = 1 << 10; }

static void bad_input_is_refused_by_name(void) {
  const struct {
    void (*spoil)(args *);
    flashcore_status status;
    const char *field;
  } cases[] = {
      {of_zero, FLASHCORE_INVALID_SCALE, "scale"},
      {of_negative, FLASHCORE_INVALID_SCALE, "scale"},
      {of_infinity, FLASHCORE_INVALID_SCALE, "scale"},
      {of_nan, FLASHCORE_INVALID_SCALE, "scale"},
      {of_subnormal, FLASHCORE_INVALID_SCALE, "scale"},
      {of_huge, FLASHCORE_INVALID_SCALE, "scale"},
      {undivided, FLASHCORE_INVALID_SIZE, "block_rows"},
      {no_block, FLASHCORE_INVALID_SIZE, "block_rows"},
      {no_granularity, FLASHCORE_INVALID_SCALE, "granularity"},
      {odd_rotation, FLASHCORE_INVALID_SIZE, "rotation"},
      {large_rotation, FLASHCORE_INVALID_SIZE, "rotation"},
      {small_rotation, FLASHCORE_INVALID_SIZE, "rotation"},
      {old_struct, FLASHCORE_INVALID_STRUCT_SIZE, "struct_size"},
      {no_input, FLASHCORE_NULL_POINTER, "x.data"},
      {no_output, FLASHCORE_NULL_POINTER, "out.data"},
      {no_scales, FLASHCORE_NULL_POINTER, "descale"},
      {in_place, FLASHCORE_ALIASED_OUTPUT, "out"},
      {into_the_input, FLASHCORE_ALIASED_OUTPUT, "out"},
      {scales_in_output, FLASHCORE_ALIASED_OUTPUT, "out"},
      {scales_in_input, FLASHCORE_ALIASED_OUTPUT, "descale"},
      {mean_in_output, FLASHCORE_ALIASED_OUTPUT, "out"},
      {mean_in_scales, FLASHCORE_ALIASED_OUTPUT, "descale"},
      {scales_in_lengths, FLASHCORE_ALIASED_OUTPUT, "descale"},
      {backwards_into_output, FLASHCORE_ALIASED_OUTPUT, "out"},
      {shifted, FLASHCORE_MISALIGNED, "x.data"},
      {odd_scales, FLASHCORE_MISALIGNED, "descale"},
      {odd_mean, FLASHCORE_MISALIGNED, "mean"},
      {odd_lengths, FLASHCORE_MISALIGNED, "seqlens"},
      {odd_stride, FLASHCORE_INVALID_STRIDE, "out.stride_s"},
      {flat_output, FLASHCORE_INVALID_STRIDE, "out.stride_h"},
      {vast_stride, FLASHCORE_OFFSET_OVERFLOW, "x.stride_b"},
      {wrapping_stride, FLASHCORE_OFFSET_OVERFLOW, "x.stride_s"},
      {twice_transposed, FLASHCORE_INVALID_STRIDE, "transposed"},
      {transposed_blocks, FLASHCORE_INVALID_SIZE, "block_rows"},
      {transposed_rows, FLASHCORE_INVALID_STRIDE, "out.stride_s"},
      {from_fp8, FLASHCORE_UNSUPPORTED_DTYPE, "dtype"},
      {from_nothing, FLASHCORE_INVALID_DTYPE, "dtype"},
      {to_nothing, FLASHCORE_INVALID_DTYPE, "dtype_out"},
      {to_fp16, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_out"},
      {no_batch, FLASHCORE_INVALID_SIZE, "batch"},
      {odd_dim, FLASHCORE_UNSUPPORTED_DIM, "dim"},
      {too_many, FLASHCORE_INVALID_SIZE, "batch"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    flashcore_fp8_quantise_args q = problem();
    flashcore_error error = {"", 0, 0, ""};
    cases[i].spoil(&q);
    const flashcore_status status = flashcore_fp8_quantise_reference(&q, &error);
    if (!CHECK(status == cases[i].status && !strcmp(error.field, cases[i].field) && strstr(error.message, cases[i].field)))
      printf("  case %d: status %d, field %s: %s\n", (int)i, (int)status, error.field, error.message);
    CHECK(flashcore_fp8_quantise(&q, NULL, NULL) == cases[i].status);
    CHECK(output[0] == 0xa5);
  }
  flashcore_fp8_quantise_args q = problem();
  flashcore_error error;
  too_many(&q);
  flashcore_fp8_quantise_reference(&q, &error);
  CHECK(strstr(error.message, "batch * heads is 1073741824") && error.value == 1 << 30);
  CHECK(flashcore_fp8_quantise_reference(NULL, NULL) == FLASHCORE_NULL_POINTER);
  const flashcore_fp8_quantise_args good = problem();
  CHECK(flashcore_fp8_quantise(&good, NULL, NULL) == FLASHCORE_BACKEND_NOT_COMPILED);
}

int main(void) {
  RUN(values_come_back_within_half_a_step);
  RUN(the_bounds_of_a_given_scale_are_served);
  RUN(a_scale_belongs_to_its_group_alone);
  RUN(zeros_nan_and_infinity_behave_as_documented);
  RUN(rows_past_the_length_are_neither_read_nor_written);
  RUN(the_mean_is_subtracted);
  RUN(a_row_of_nan_and_infinity_spoils_no_other);
  RUN(a_sum_past_fp32_leaves_the_mean_out);
  RUN(transposed_is_the_same_in_another_order);
  RUN(rotation_keeps_products);
  RUN(rotation_spreads_an_outlier);
  RUN(bad_input_is_refused_by_name);
  return check_end();
}
