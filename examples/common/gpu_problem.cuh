// gpu_problem.cuh · a random attention problem on the GPU, and the comparison of its output with FlashCore's plain CUDA (SIMT) kernel.
#pragma once

#include "check_rows.h"
#include "timing.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector>

struct problem_shape {
  int dtype, batch, heads_q, heads_kv, seq_q, seq_kv, dim_qk, dim_v;
  int causal; // flashcore_causal
};

struct gpu_problem {
  flashcore_attention a; // device pointers
  void *o_simt;
  double *sums; // of (o - o_simt)^2 and o_simt^2
};

// 2 (dim_qk + dim_v) per visible pair; a square causal problem counts as exactly half, as everywhere in the literature.
static inline double problem_flop(const problem_shape &s) {
  double pairs = (double)s.seq_q * s.seq_kv * (s.causal ? 0.5 : 1.0);
  if (s.causal && s.seq_q != s.seq_kv) {
    flashcore_attention a;
    flashcore_init(&a);
    a.causal = s.causal;
    a.window_left = a.window_right = FLASHCORE_UNBOUNDED;
    pairs = 0;
    for (int32_t i = 0; i < s.seq_q; ++i) {
      const int32_t last = flashcore_visible_keys(&a, i, s.seq_q, s.seq_kv).last;
      pairs += last > 0 ? last : 0;
    }
  }
  return 2.0 * s.batch * s.heads_q * pairs * (s.dim_qk + s.dim_v);
}

static __device__ float uniform(uint64_t x) { // in (0, 1): a 64-bit mix of the counter
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return ((x >> 40) + 0.5f) * (1.f / 16777216.f);
}

template <typename T> static __global__ void fill_normal(T *data, int64_t items, uint64_t seed) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < items; i += (int64_t)gridDim.x * blockDim.x) {
    const float a = uniform((seed << 40) + 2 * i + 1), b = uniform((seed << 40) + 2 * i + 2);
    data[i] = T(sqrtf(-2.f * logf(a)) * cospif(2.f * b));
  }
}

template <typename T> static __global__ void sum_squares(const T *o, const T *o_simt, int64_t items, double *sums) {
  double difference = 0, size = 0;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < items; i += (int64_t)gridDim.x * blockDim.x) {
    const double x = float(o[i]), y = float(o_simt[i]);
    difference += (x - y) * (x - y);
    size += y * y;
  }
  atomicAdd(&sums[0], difference);
  atomicAdd(&sums[1], size);
}

static inline int fill(void *data, int dtype, int64_t items, uint64_t seed) {
  if (dtype == FLASHCORE_F32) fill_normal<<<512, 256>>>((float *)data, items, seed);
  if (dtype == FLASHCORE_F16) fill_normal<<<512, 256>>>((__half *)data, items, seed);
  if (dtype == FLASHCORE_BF16) fill_normal<<<512, 256>>>((__nv_bfloat16 *)data, items, seed);
  CUDA_TRY(cudaGetLastError());
  return 0;
}

static inline int make_problem(const problem_shape &s, gpu_problem *p) {
  flashcore_attention &a = p->a;
  flashcore_init(&a);
  a.dtype = s.dtype;
  a.batch = s.batch;
  a.heads_q = s.heads_q;
  a.heads_kv = s.heads_kv;
  a.seq_q = s.seq_q;
  a.seq_kv = s.seq_kv;
  a.dim_qk = s.dim_qk;
  a.dim_v = s.dim_v;
  a.causal = s.causal;
  const int64_t rows_q = (int64_t)s.batch * s.seq_q * s.heads_q, rows_kv = (int64_t)s.batch * s.seq_kv * s.heads_kv;
  const int64_t items[5] = {rows_q * s.dim_qk, rows_kv * s.dim_qk, rows_kv * s.dim_v, rows_q * s.dim_v, rows_q * s.dim_v};
  void *data[5];
  for (int n = 0; n < 5; ++n) {
    CUDA_TRY(cudaMalloc(&data[n], items[n] * flashcore_dtype_bytes(s.dtype)));
    if (n < 3 && fill(data[n], s.dtype, items[n], n + 1)) return 2;
  }
  a.q = flashcore_bshd(data[0], s.seq_q, s.heads_q, s.dim_qk);
  a.k = flashcore_bshd(data[1], s.seq_kv, s.heads_kv, s.dim_qk);
  a.v = flashcore_bshd(data[2], s.seq_kv, s.heads_kv, s.dim_v);
  a.o = flashcore_bshd(data[3], s.seq_q, s.heads_q, s.dim_v);
  p->o_simt = data[4];
  CUDA_TRY(cudaMalloc(&a.lse, rows_q * sizeof(float)));
  CUDA_TRY(cudaMalloc(&p->sums, 2 * sizeof(double)));
  gpu_problem simt = *p;
  simt.a.backend = FLASHCORE_BACKEND_SIMT;
  simt.a.num_splits = 1;
  simt.a.o.data = p->o_simt;
  flashcore_error error;
  const flashcore_status status = flashcore_forward(&simt.a, nullptr, &error);
  if (status != FLASHCORE_OK) return refused(status, &error);
  CUDA_TRY(cudaDeviceSynchronize());
  return 0;
}

static inline int free_problem(gpu_problem *p) {
  void *data[] = {p->a.q.data, p->a.k.data, p->a.v.data, p->a.o.data, p->o_simt, p->a.lse, p->sums};
  for (void *x : data) CUDA_TRY(cudaFree(x));
  return 0;
}

// Choose a backend, give it a workspace, and run once into outputs that held NaN. *status: whether it takes the problem.
static inline int run_backend(gpu_problem *p, int backend, flashcore_status *status, flashcore_error *error) {
  flashcore_attention &a = p->a;
  a.backend = backend;
  a.workspace = nullptr;
  a.workspace_bytes = 0;
  *status = flashcore_workspace_size(&a, -1, &a.workspace_bytes, error);
  if (*status != FLASHCORE_OK) return 0;
  if (a.workspace_bytes) {
    CUDA_TRY(cudaMalloc(&a.workspace, a.workspace_bytes));
    CUDA_TRY(cudaMemset(a.workspace, 0, a.workspace_bytes));
  }
  const int64_t rows = (int64_t)a.batch * a.seq_q * a.heads_q;
  CUDA_TRY(cudaMemset(a.o.data, 0xff, rows * a.dim_v * flashcore_dtype_bytes(a.dtype)));
  CUDA_TRY(cudaMemset(a.lse, 0xff, rows * sizeof(float)));
  *status = flashcore_supported(&a, -1, error);
  if (*status == FLASHCORE_OK) *status = flashcore_forward(&a, nullptr, error);
  CUDA_TRY(cudaDeviceSynchronize());
  return 0;
}

// |o - o_simt| / |o_simt|, both as one long vector. Rounding of P and O costs about one rounding unit; three is the limit that callers use.
static inline int compare_with_simt(const gpu_problem &p, double *relative) {
  const int64_t items = (int64_t)p.a.batch * p.a.seq_q * p.a.heads_q * p.a.dim_v;
  double sums[2];
  CUDA_TRY(cudaMemset(p.sums, 0, sizeof sums));
  if (p.a.dtype == FLASHCORE_F32) sum_squares<<<512, 256>>>((const float *)p.a.o.data, (const float *)p.o_simt, items, p.sums);
  if (p.a.dtype == FLASHCORE_F16) sum_squares<<<512, 256>>>((const __half *)p.a.o.data, (const __half *)p.o_simt, items, p.sums);
  if (p.a.dtype == FLASHCORE_BF16) sum_squares<<<512, 256>>>((const __nv_bfloat16 *)p.a.o.data, (const __nv_bfloat16 *)p.o_simt, items, p.sums);
  CUDA_TRY(cudaGetLastError());
  CUDA_TRY(cudaMemcpy(sums, p.sums, sizeof sums, cudaMemcpyDeviceToHost));
  *relative = sqrt(sums[0] / sums[1]);
  return 0;
}

static inline bool close_to_simt(double relative, int dtype) { return relative <= 3 * rounding_unit(dtype); } // false for NaN

template <typename T> static int download(const void *device, int64_t items, std::vector<T> *host) {
  host->resize(items);
  CUDA_TRY(cudaMemcpy(host->data(), device, items * sizeof(T), cudaMemcpyDeviceToHost));
  return 0;
}

// `rows` rows of the last run against the CPU reference.
static inline int compare_with_reference(const gpu_problem &p, int rows, row_check *check) {
  flashcore_attention h = p.a;
  const int64_t bytes = flashcore_dtype_bytes(h.dtype), rows_q = (int64_t)h.batch * h.seq_q * h.heads_q,
                rows_kv = (int64_t)h.batch * h.seq_kv * h.heads_kv;
  std::vector<char> q, k, v, o;
  std::vector<float> lse;
  if (download(h.q.data, rows_q * h.dim_qk * bytes, &q) || download(h.k.data, rows_kv * h.dim_qk * bytes, &k) ||
      download(h.v.data, rows_kv * h.dim_v * bytes, &v) || download(h.o.data, rows_q * h.dim_v * bytes, &o) || download(h.lse, rows_q, &lse))
    return 2;
  h.q.data = q.data();
  h.k.data = k.data();
  h.v.data = v.data();
  h.o.data = o.data();
  h.lse = lse.data();
  flashcore_error error;
  const flashcore_status status = check_rows(&h, rows, check, &error);
  return status == FLASHCORE_OK ? 0 : refused(status, &error);
}
