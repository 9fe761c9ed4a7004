/* Demonstrates which file answers when several hold one backend with different element types, by backends that only pretend. Needs nvcc, no GPU.
 *   nvcc -std=c++17 -I<repository> tests/host/test_dispatch.cu */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore.h"

#include "check.h"

/* A backend that holds one element type and refuses more than 64 dims. */
static flashcore_status pretend(int32_t dtype, const flashcore_attention *a, flashcore_plan *plan, flashcore_error *error) {
  if (a->dim_qk > 64) return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DIM, "dim_qk", a->dim_qk, 64, "dim_qk is too large");
  if (a->dtype != dtype) return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0, "dtype is not in this file");
  plan->d.block_q = dtype;
  return FLASHCORE_OK;
}
static flashcore_status plan_f16(const flashcore_attention *a, const flashcore_device *, flashcore_plan *plan, flashcore_error *error) {
  return pretend(FLASHCORE_F16, a, plan, error);
}
static flashcore_status plan_bf16(const flashcore_attention *a, const flashcore_device *, flashcore_plan *plan, flashcore_error *error) {
  return pretend(FLASHCORE_BF16, a, plan, error);
}

static flashcore_backend_ops f16_file = {FLASHCORE_BACKEND_MMA, plan_f16, nullptr, nullptr};
static flashcore_backend_ops bf16_file = {FLASHCORE_BACKEND_MMA, plan_bf16, nullptr, nullptr};

static flashcore_status ask(int32_t backend, int32_t dtype, int32_t dim, const flashcore_backend_ops **ops, flashcore_plan *plan,
                            flashcore_error *error) {
  const flashcore_device device = {0, 89, 58, 100 * 1024};
  flashcore_attention a;
  flashcore_init(&a);
  a.dtype = a.dtype_kv = a.dtype_o = dtype;
  a.dim_qk = a.dim_v = dim;
  return flashcore_plan_backend(&a, backend, &device, plan, ops, error);
}

/* What a question that is to be refused with `status` gets for an answer. */
static flashcore_error refusal(int32_t backend, int32_t dtype, int32_t dim, flashcore_status status) {
  const flashcore_backend_ops *ops;
  flashcore_plan plan;
  flashcore_error error = {};
  CHECK(ask(backend, dtype, dim, &ops, &plan, &error) == status);
  return error;
}

static void backend_without_a_file_is_refused_by_name() {
  const flashcore_error error = refusal(FLASHCORE_BACKEND_WGMMA, FLASHCORE_F16, 64, FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(!strcmp(error.field, "backend") && error.value == FLASHCORE_BACKEND_WGMMA);
}

static void file_with_the_element_type_answers() {
  for (int32_t dtype = FLASHCORE_F16; dtype <= FLASHCORE_BF16; ++dtype) {
    const flashcore_backend_ops *ops;
    flashcore_plan plan;
    CHECK(ask(FLASHCORE_BACKEND_MMA, dtype, 64, &ops, &plan, nullptr) == FLASHCORE_OK);
    CHECK(ops == (dtype == FLASHCORE_F16 ? &f16_file : &bf16_file) && plan.d.block_q == dtype);
  }
}

static void refusal_by_one_file_stands() {
  const flashcore_error error = refusal(FLASHCORE_BACKEND_MMA, FLASHCORE_F16, 72, FLASHCORE_UNSUPPORTED_DIM);
  CHECK(!strcmp(error.field, "dim_qk") && error.value == 72 && error.limit == 64);
}

static void element_type_in_no_file_is_refused_in_words() {
  const flashcore_error error = refusal(FLASHCORE_BACKEND_MMA, FLASHCORE_F32, 64, FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(!strcmp(error.field, "dtype") && error.value == FLASHCORE_F32);
}

int main() {
  flashcore_register_backend(&f16_file);
  flashcore_register_backend(&bf16_file);
  RUN(backend_without_a_file_is_refused_by_name);
  RUN(file_with_the_element_type_answers);
  RUN(refusal_by_one_file_stands);
  RUN(element_type_in_no_file_is_refused_in_words);
  return check_end();
}
