/* Demonstrates which tile of the qgmma kernel a problem gets, what the kernel refuses, in which words, and that fp8 rounding on the device is the
 * reference's. Needs nvcc, no GPU.
 *   nvcc -std=c++17 -arch=compute_90a -I<repository> tests/host/test_qgmma.cu */
#define FLASHCORE_IMPLEMENTATION
#define FLASHCORE_NO_F32 /* few element types compile sooner */
#define FLASHCORE_NO_BF16
#define FLASHCORE_NO_E5M2
#include "flashcore_fp8.cuh"

#include "check.h"
#include "plan.h"

static flashcore_attention accepted8(int32_t seq, int32_t dim = 64) {
  flashcore_attention a = sized(2, 2, 2, seq, seq, dim);
  a.dtype = FLASHCORE_E4M3;
  return a;
}

template <typename F8> static bool rounds_as_the_reference(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return flashcore::fp8_encode<F8>(x) == flashcore_encode(F8::kDtype, (double)x);
}
static void every_float_is_rounded_as_the_reference_does() { /* every exponent, and mantissas around ties of both types */
  for (uint32_t high = 0; high < 0x10000; ++high)
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0xffffu}) {
      const uint32_t bits = high << 16 | low;
      if (!CHECK(rounds_as_the_reference<flashcore::e4m3>(bits) && rounds_as_the_reference<flashcore::e5m2>(bits))) printf("  %08x\n", bits);
    }
}

static void keys_and_dims_choose_the_tile() {
  const struct {
    int seq, dim;
    bool rule, lse;
    const char *kernel;
  } cases[] = {
      {512, 64, false, false, "qgmma e4m3 d64 q256 kv64 accurate"},          {4096, 64, false, false, "qgmma e4m3 d64 q192 kv128 accurate"},
      {512, 16, true, false, "qgmma e4m3 d64 q128 kv64 accurate general"},   {2048, 128, false, false, "qgmma e4m3 d128 q128 kv128 accurate"},
      {8192, 80, false, false, "qgmma e4m3 d128 q192 kv96 accurate"},        {8192, 80, false, true, "qgmma e4m3 d128 q128 kv64 accurate exact"},
      {512, 256, false, false, "qgmma e4m3 d256 q128 kv64 accurate"},        {1024, 144, false, false, "qgmma e4m3 d256 q128 kv64 accurate"},
      {2048, 144, false, false, "qgmma e4m3 d256 q128 kv96 accurate"},       {1024, 256, false, true, "qgmma e4m3 d256 q128 kv32 accurate exact"},
      {1024, 256, true, true, "qgmma e4m3 d256 q128 kv32 accurate general"},
  };
  for (const auto &x : cases) {
    flashcore_attention a = accepted8(x.seq, x.dim);
    flashcore_plan plan;
    flashcore_error error = {};
    a.softcap = x.rule ? 2.f : 0.f, a.lse = x.lse ? (float *)4096 : nullptr;
    CHECK(plan_on(90, a, FLASHCORE_BACKEND_QGMMA, &plan, &error) == FLASHCORE_OK);
    if (!CHECK(!strcmp(plan.d.kernel, x.kernel))) printf("  %s, not %s %s\n", plan.d.kernel, x.kernel, error.message);
  }
}

static void every_output_type_but_fp32_is_served_by_the_same_kernel() {
  for (int32_t dtype_o = FLASHCORE_F16; dtype_o <= FLASHCORE_E5M2; ++dtype_o) {
    flashcore_attention a = accepted8(2048, 128);
    flashcore_plan plan;
    flashcore_error error = {};
    a.dtype_o = dtype_o;
    if (flashcore_is_fp8(dtype_o)) a.o_descale.data = (const float *)20480, a.o_amax = (float *)24576;
    if (!CHECK(plan_on(90, a, FLASHCORE_BACKEND_QGMMA, &plan, &error) == FLASHCORE_OK)) printf("  %d: %s\n", (int)dtype_o, error.message);
    else CHECK(!strcmp(plan.d.kernel, "qgmma e4m3 d128 q128 kv128 accurate"));
  }
}

/* 16-bit Q beside fp8 K and V. */
static flashcore_attention accepted_mixed(int32_t seq_q, int32_t seq_kv, int32_t dim = 64) {
  flashcore_attention a = sized(2, 8, 2, seq_q, seq_kv, dim);
  a.dtype_kv = FLASHCORE_E4M3;
  return a;
}

static void options_and_dims_choose_the_kernel_of_a_cache() {
  const struct {
    const char *what;
    int seq_q, seq_kv, dim;
    void (*change)(flashcore_attention &);
    const char *kernel;
    int packed;
  } cases[] = {
      {"plain", 512, 512, 64, [](flashcore_attention &) {}, "qgmma f16/e4m3 d64 q256 kv64", 1},
      {"O in bf16", 512, 512, 48, [](flashcore_attention &a) { a.dtype_o = FLASHCORE_BF16; }, "qgmma f16/e4m3 d64 q256 kv64", 1},
      {"a rule", 512, 512, 80, [](flashcore_attention &a) { a.softcap = 2.f; }, "qgmma f16/e4m3 d128 q128 kv64 general", 1},
      {"decoding", 1, 4096, 128, [](flashcore_attention &) {}, "qgmma f16/e4m3 d128 q128 kv128", 4},
      {"descales", 16, 4096, 128, [](flashcore_attention &a) { a.k_descale.data = a.v_descale.data = (const float *)4096; },
       "qgmma f16/e4m3 d128 q128 kv128", 4},
      {"LSE", 512, 512, 256, [](flashcore_attention &a) { a.lse = (float *)4096; }, "qgmma f16/e4m3 d256 q128 kv64", 1},
      {"no keys", 512, 0, 144, [](flashcore_attention &a) { a.k.data = a.v.data = nullptr; }, "qgmma f16/e4m3 d256 q128 kv64", 1},
      {"K backwards", 300, 300, 64, [](flashcore_attention &a) { a.k.stride_s = -a.k.stride_s; }, "qgmma f16/e4m3 d64 q256 kv64", 4},
      {"Q backwards", 300, 300, 64, [](flashcore_attention &a) { a.q.stride_s = -a.q.stride_s; }, "qgmma f16/e4m3 d64 q128 kv64 general, copied", 1},
      {"odd O", 300, 300, 64, [](flashcore_attention &a) { a.o.stride_s += 1; }, "qgmma f16/e4m3 d64 q128 kv64 general, copied", 1},
  };
  for (const auto &x : cases) {
    flashcore_attention a = accepted_mixed(x.seq_q, x.seq_kv, x.dim);
    flashcore_plan plan;
    flashcore_error error = {};
    x.change(a);
    CHECK(plan_on(90, a, FLASHCORE_BACKEND_QGMMA, &plan, &error) == FLASHCORE_OK);
    CHECK(plan.is_slow == (x.seq_q == 1)); /* few rows: AUTO goes on to qmma */
    if (!CHECK(!strcmp(plan.d.kernel, x.kernel) && plan.d.packed_group == x.packed))
      printf("  %s: %s, %d packed, not %s, %d %s\n", x.what, plan.d.kernel, (int)plan.d.packed_group, x.kernel, x.packed, error.message);
  }
}

static const refusal refusals_mixed[] = {
    {"bf16 left out", [](flashcore_attention &a) { a.dtype = FLASHCORE_BF16; }, 90, FLASHCORE_BACKEND_NOT_COMPILED, "dtype_kv", FLASHCORE_E4M3, 0},
    {"e5m2 left out", [](flashcore_attention &a) { a.dtype_kv = FLASHCORE_E5M2; }, 90, FLASHCORE_BACKEND_NOT_COMPILED, "dtype_kv", FLASHCORE_E5M2, 0},
    {"fp32 Q", [](flashcore_attention &a) { a.dtype = FLASHCORE_F32; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", FLASHCORE_F32, FLASHCORE_E4M3},
    {"fp32 O", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_F32; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", FLASHCORE_F32, FLASHCORE_BF16},
    {"fp8 O", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_E4M3; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", FLASHCORE_E4M3, FLASHCORE_BF16},
    {"Ada", [](flashcore_attention &) {}, 89, FLASHCORE_UNSUPPORTED_ARCH, "device", 89, 90},
    {"splits", [](flashcore_attention &a) { a.num_splits = 3; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits", 3, 1},
    {"dim 56", [](flashcore_attention &a) { a.dim_qk = 56; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_qk", 56, 16},
    {"dim 272", [](flashcore_attention &a) { a.dim_v = 272; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_v", 272, 256},
    {"address", [](flashcore_attention &a) { a.v.data = (void *)4104; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "v", 4104, 16},
    {"odd stride", [](flashcore_attention &a) { a.k.stride_s += 8; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "k", 2 * 64 + 8, 16},
};

static const refusal refusals[] = {
    {"fp16", [](flashcore_attention &a) { a.dtype = FLASHCORE_F16; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", FLASHCORE_F16, FLASHCORE_E4M3},
    {"fp16 K", [](flashcore_attention &a) { a.dtype_kv = FLASHCORE_F16; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_kv", FLASHCORE_F16,
     FLASHCORE_E4M3},
    {"e5m2 left out", [](flashcore_attention &a) { a.dtype = FLASHCORE_E5M2; }, 90, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", FLASHCORE_E5M2, 0},
    {"fp32 O", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_F32; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", FLASHCORE_F32, FLASHCORE_E5M2},
    {"Ada", [](flashcore_attention &) {}, 89, FLASHCORE_UNSUPPORTED_ARCH, "device", 89, 90},
    {"splits", [](flashcore_attention &a) { a.num_splits = 3; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits", 3, 1},
    {"no keys", [](flashcore_attention &a) { a.seq_kv = 0; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "seq_kv", 0, 1},
    {"dim 56", [](flashcore_attention &a) { a.dim_qk = 56; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_qk", 56, 16},
    {"dim 272", [](flashcore_attention &a) { a.dim_v = 272; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_v", 272, 256},
    {"address", [](flashcore_attention &a) { a.v.data = (void *)4104; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "v", 4104, 16},
    {"odd stride", [](flashcore_attention &a) { a.k.stride_s += 8; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "k", 2 * 64 + 8, 16},
    {"odd stride of O", [](flashcore_attention &a) { a.o.stride_s += 4; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "o", 2 * 64 + 4, 8},
    {"odd stride of an fp8 O", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_E5M2, a.o.stride_s += 8; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "o",
     2 * 64 + 8, 16},
    {"odd address of an fp8 O", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_E4M3, a.o.data = (void *)4104; }, 90,
     FLASHCORE_UNSUPPORTED_FEATURE, "o", 4104, 16},
    {"backwards", [](flashcore_attention &a) { a.q.stride_s = -a.q.stride_s; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "q", -2 * 64,
     ((int64_t)1 << 40) - 16},
};

static void refusals_name_the_field_and_the_kernel() {
  for (const refusal &x : refusals) check_refusal(x, accepted8(300), FLASHCORE_BACKEND_QGMMA);
  for (const refusal &x : refusals_mixed) check_refusal(x, accepted_mixed(300, 300), FLASHCORE_BACKEND_QGMMA);
}

int main() {
  RUN(every_float_is_rounded_as_the_reference_does);
  RUN(keys_and_dims_choose_the_tile);
  RUN(every_output_type_but_fp32_is_served_by_the_same_kernel);
  RUN(options_and_dims_choose_the_kernel_of_a_cache);
  RUN(refusals_name_the_field_and_the_kernel);
  return check_end();
}
