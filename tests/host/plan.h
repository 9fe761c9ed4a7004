/* For tests of what backends plan and refuse: a problem to start from, and the question. Include it behind the header that holds the backends. */
#ifndef FLASHCORE_TESTS_PLAN_H
#define FLASHCORE_TESTS_PLAN_H

#include "check.h"

/* A contiguous fp16 problem of those sizes. Nothing is read through its addresses. */
static inline flashcore_attention sized(int32_t batch, int32_t heads_q, int32_t heads_kv, int32_t seq_q, int32_t seq_kv, int32_t dim) {
  flashcore_attention a;
  flashcore_init(&a);
  a.dtype = FLASHCORE_F16;
  a.batch = batch, a.heads_q = heads_q, a.heads_kv = heads_kv;
  a.seq_q = seq_q, a.seq_kv = seq_kv;
  a.dim_qk = a.dim_v = dim;
  a.q = flashcore_bshd((void *)4096, seq_q, heads_q, dim), a.o = flashcore_bshd((void *)16384, seq_q, heads_q, dim);
  a.k = flashcore_bshd((void *)8192, seq_kv, heads_kv, dim), a.v = flashcore_bshd((void *)12288, seq_kv, heads_kv, dim);
  return a;
}

/* A problem that every tensor-core backend plans for. */
static inline flashcore_attention accepted(int32_t seq) { return sized(2, 2, 2, seq, seq, 64); }

/* What flashcore_forward would answer on a GPU of that arch: an H200 if 90, else with the SMs of an L4. */
static flashcore_status plan_on(int32_t arch, const flashcore_attention &a, int32_t backend, flashcore_plan *plan, flashcore_error *error) {
  const flashcore_device device = {0, arch, arch == 90 ? 132 : 58, (arch == 90 ? 228 : 100) * 1024};
  const flashcore_backend_ops *ops;
  flashcore_attention resolved;
  const flashcore_status status = flashcore_validate(&a, error);
  if (status != FLASHCORE_OK) return status;
  flashcore_resolve(&a, &resolved);
  return flashcore_plan_backend(&resolved, backend, &device, plan, &ops, error);
}

/* A problem spoiled in one way, and what the answer must say. */
struct refusal {
  const char *name;
  void (*change)(flashcore_attention &);
  int32_t arch;
  flashcore_status status;
  const char *field;
  int64_t value, limit;
};

/* Status, field and numbers, and a message that names the kernel. */
static void check_refusal(const refusal &x, flashcore_attention a, int32_t backend) {
  flashcore_plan plan;
  flashcore_error error = {};
  x.change(a);
  const char *name = flashcore_backend_string((flashcore_backend)backend);
  const flashcore_status status = plan_on(x.arch, a, backend, &plan, &error);
  const bool same = status == x.status && error.field && !strcmp(error.field, x.field) && error.value == x.value && error.limit == x.limit;
  char kernel[32];
  snprintf(kernel, sizeof kernel, "the %s kernel", name);
  if (!CHECK(same && strstr(error.message, kernel)))
    printf("  %s, %s: status %d, %s (%s, value %lld, limit %lld)\n", name, x.name, (int)status, error.message, error.field ? error.field : "no field",
           (long long)error.value, (long long)error.limit);
}

#endif
