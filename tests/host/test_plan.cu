/* Demonstrates what the tensor-core backends of flashcore_wmma.cuh refuse, in which words, and which strides they look at. Needs nvcc, no GPU: a plan is
 * arithmetic.
 *   nvcc -std=c++17 -arch=compute_89 -I<repository> tests/host/test_plan.cu */
#define FLASHCORE_IMPLEMENTATION
#define FLASHCORE_NO_F32  /* one element type compiles sooner */
#define FLASHCORE_NO_BF16 /* what is said of bf16 here is said before a kernel is looked for */
#include "flashcore_wmma.cuh"

#include "check.h"
#include "plan.h"

static const int32_t tensor_core[] = {FLASHCORE_BACKEND_WMMA, FLASHCORE_BACKEND_MMA};

static void page(flashcore_attention &a) {
  static int32_t table[2];
  a.page_table = table, a.page_size = 2, a.num_pages = 2;
}

static const refusal refusals[] = {
    {"fp32", [](flashcore_attention &a) { a.dtype = FLASHCORE_F32; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", FLASHCORE_F32, 0},
    {"fp8", [](flashcore_attention &a) { a.dtype = FLASHCORE_E4M3; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", FLASHCORE_E4M3, 0},
    {"K and V of another type", [](flashcore_attention &a) { a.dtype_kv = FLASHCORE_BF16; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_kv",
     FLASHCORE_BF16, FLASHCORE_F16},
    {"O of another type", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_F32; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", FLASHCORE_F32,
     FLASHCORE_F16},
    {"bf16 on Turing", [](flashcore_attention &a) { a.dtype = FLASHCORE_BF16; }, 75, FLASHCORE_UNSUPPORTED_ARCH, "device", 75, 80},
    {"an arch without code", [](flashcore_attention &a) { a.dtype = FLASHCORE_BF16; }, 90, FLASHCORE_BACKEND_NOT_COMPILED, "device", 90, 80},
    {"pages", page, 89, FLASHCORE_UNSUPPORTED_FEATURE, "page_table", 1, 0},
    {"num_splits", [](flashcore_attention &a) { a.num_splits = 3; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits", 3, 1},
    {"split_len", [](flashcore_attention &a) { a.split_len = 64; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "split_len", 64, 0},
};

static void accepted_problem_is_planned() {
  for (const int32_t backend : tensor_core) {
    flashcore_plan plan;
    CHECK(plan_on(89, accepted(2), backend, &plan, nullptr) == FLASHCORE_OK && plan.kernel && plan.d.backend == backend);
  }
}

static void tensor_core_backends_refuse_alike_and_by_name() {
  for (const int32_t backend : tensor_core)
    for (const refusal &x : refusals) check_refusal(x, accepted(2), backend);
}

static void simt_refuses_an_arch_by_name() {
  flashcore_plan plan;
  flashcore_error error = {};
  CHECK(plan_on(70, accepted(2), FLASHCORE_BACKEND_SIMT, &plan, &error) == FLASHCORE_UNSUPPORTED_ARCH);
  CHECK(!strcmp(error.field, "device") && error.value == 70 && error.limit == 75 && strstr(error.message, "the simt kernel"));
  CHECK(plan_on(90, accepted(2), FLASHCORE_BACKEND_SIMT, &plan, &error) == FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(!strcmp(error.field, "device") && error.value == 90 && error.limit == 75 && strstr(error.message, "the simt kernel"));
}

/* wmma: needs every row address on 16 bytes; mma: plans for the bytes that they are on. */
static void expect_aligned(const flashcore_attention &a) {
  flashcore_plan plan = {};
  flashcore_error error = {};
  if (!CHECK(plan_on(89, a, FLASHCORE_BACKEND_WMMA, &plan, &error) == FLASHCORE_OK)) printf("  %s\n", error.message);
  if (!CHECK(plan_on(89, a, FLASHCORE_BACKEND_MMA, &plan, &error) == FLASHCORE_OK)) printf("  %s\n", error.message);
  CHECK(plan.param[FLASHCORE_MMA_ALIGN] == 16 && !plan.param[FLASHCORE_MMA_GENERAL]);
}
static void expect_misaligned(const flashcore_attention &a, const char *field, int64_t stride, int32_t bytes) {
  flashcore_plan plan = {};
  flashcore_error error = {};
  CHECK(plan_on(89, a, FLASHCORE_BACKEND_WMMA, &plan, &error) == FLASHCORE_MISALIGNED);
  CHECK(error.field && !strcmp(error.field, field) && error.value == stride && error.limit == 8);
  CHECK(plan_on(89, a, FLASHCORE_BACKEND_MMA, &plan, nullptr) == FLASHCORE_OK);
  CHECK(plan.param[FLASHCORE_MMA_ALIGN] == bytes && plan.param[FLASHCORE_MMA_GENERAL]);
}

static void stride_along_a_dim_of_extent_1_needs_no_alignment() {
  for (int odd = 0; odd < 3; ++odd) {
    flashcore_attention a = accepted(2);
    if (odd == 0) a.batch = 1;
    if (odd == 1) a.seq_q = a.seq_kv = 1;
    if (odd == 2) a.heads_q = a.heads_kv = 1;
    for (flashcore_tensor *t : {&a.q, &a.k, &a.v, &a.o}) (odd == 0 ? t->stride_b : odd == 1 ? t->stride_s : t->stride_h) = 129;
    expect_aligned(a);
  }
}

static void stride_along_any_other_dim_needs_it() {
  const char *names[] = {"q", "k", "v", "o"};
  for (int i = 0; i < 4; ++i)
    for (int odd = 0; odd < 3; ++odd) {
      flashcore_attention a = accepted(2);
      flashcore_tensor *tensors[] = {&a.q, &a.k, &a.v, &a.o}, *t = tensors[i];
      (odd == 0 ? t->stride_b : odd == 1 ? t->stride_s : t->stride_h) = 514;
      expect_misaligned(a, names[i], 514, 4);
    }
}

static void packed_rows_are_as_many_as_their_total() { /* sequences of one row still step along the rows */
  static const int32_t offsets[3] = {0, 1, 2};
  flashcore_attention a = accepted(2);
  a.cu_seqlens_q = a.cu_seqlens_kv = offsets, a.total_q = a.total_kv = 2;
  a.seq_q = a.seq_kv = 1;
  for (flashcore_tensor *t : {&a.q, &a.k, &a.v, &a.o}) t->stride_b = 3;
  expect_aligned(a);
  a.k.stride_s = 129;
  expect_misaligned(a, "k", 129, 2);
  a.k.stride_s = 128, a.o.stride_s = 132;
  expect_misaligned(a, "o", 132, 8);
  a.batch = 1, a.total_q = 1;
  expect_aligned(a);
}

int main() {
  RUN(accepted_problem_is_planned);
  RUN(tensor_core_backends_refuse_alike_and_by_name);
  RUN(simt_refuses_an_arch_by_name);
  RUN(stride_along_a_dim_of_extent_1_needs_no_alignment);
  RUN(stride_along_any_other_dim_needs_it);
  RUN(packed_rows_are_as_many_as_their_total);
  return check_end();
}
