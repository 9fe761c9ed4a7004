/* The oracle: attention on the GPU in fp64, and beside it the same in the precision a kernel has.
 *
 * Written from the numerics contract alone. It shares the descriptor struct with the library and nothing else: lengths, addresses, masks and
 * rules are decoded here once more, in the plainest way, so that a mistake in the library's helpers cannot hide. One block per
 * (batch, head, query row); keys by threads for the logits, output dims by threads for the values.
 *
 *   o      ref64: everything in fp64; where O is fp8, in the units it is stored in, and no larger than its largest number
 *   lse    ref64, in the base that the descriptor asks for
 *   peak   the largest |logit| of the row
 *   low    "lowref": logits and l in fp32 (fp8 Q: products added up as the tensor cores do it, those with V in fp32 after every 512 keys), exact row
 *          maximum, P rounded to the type of Q (fp8: to e4m3, its maximum as largest_p), O summed in fp32 and
 *          rounded to the output type; the maximum is subtracted before log2(e) is multiplied in, so the largest term is 1 however large the logits
 *          are
 *   amax   over all live rows, in O's own units: the largest finite |O|, and the largest error of lowref before it is rounded */
#ifndef FLASHCORE_TESTS_ORACLE_CUH
#define FLASHCORE_TESTS_ORACLE_CUH

#include "flashcore.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

namespace oracle {

struct Output { // all (batch, heads_q, seq_q, dim_v) or without the last dim, contiguous; rows at or past len_q are not written
  double *o, *lse, *peak;
  float *low;
  unsigned long long *amax; // [2]: bits of non-negative doubles, which compare as integers do
  float largest_p = 256;    // what fp8 kernels store a row's largest weight as: smaller ones are lost from 2^-10 on
};

constexpr int kThreads = 128, kMaxDim = 512, kDimsPerThread = kMaxDim / kThreads;
constexpr int64_t kMissing = INT64_MIN; // strides may be negative, so any other number can be an offset

static __host__ __device__ inline bool is_fp8(int dtype) { return dtype == FLASHCORE_E4M3 || dtype == FLASHCORE_E5M2; }
static __host__ __device__ inline int output_dtype(int dtype, int dtype_o) { return dtype_o ? dtype_o : is_fp8(dtype) ? FLASHCORE_BF16 : dtype; }

static __device__ uint8_t to_fp8(int dtype, float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, dtype == FLASHCORE_E4M3 ? __NV_E4M3 : __NV_E5M2);
}
static __device__ float from_fp8(int dtype, uint8_t x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x, dtype == FLASHCORE_E4M3 ? __NV_E4M3 : __NV_E5M2)));
}

static __device__ double read(const void *p, int dtype, int64_t i) {
  if (is_fp8(dtype)) return from_fp8(dtype, static_cast<const uint8_t *>(p)[i]);
  if (dtype == FLASHCORE_F32) return static_cast<const float *>(p)[i];
  if (dtype == FLASHCORE_F16) return __half2float(static_cast<const __half *>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
}

static __device__ float round_to(int dtype, float x) {
  if (is_fp8(dtype)) return from_fp8(dtype, to_fp8(dtype, x));
  if (dtype == FLASHCORE_F16) return __half2float(__float2half_rn(x));
  if (dtype == FLASHCORE_BF16) return __bfloat162float(__float2bfloat16_rn(x));
  return x;
}

/* A weight, at most 1, as a kernel gives it to the tensor cores. */
static __device__ float round_weight(int dtype, float x, float largest) {
  return is_fp8(dtype) ? from_fp8(FLASHCORE_E4M3, to_fp8(FLASHCORE_E4M3, largest * x)) / largest : round_to(dtype, x);
}

static __device__ double descale(const flashcore_descale &d, int64_t b, int64_t h) {
  const double x = d.data ? d.data[b * d.stride_b + h * d.stride_h] : 1.0;
  return x < 0 ? NAN : x;
}

/* One query row, decoded. */
struct Row {
  int64_t b, h, i; // h: query head
  int64_t len_q, len_kv;
  int64_t start_q, start_kv; // rows; with packed sequences the tensors have no batch dim
};

static __device__ int64_t between(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

/* Length and first row of entry b of a packed tensor; whatever the offsets hold, the result stays within `total`. */
static __device__ int64_t packed_length(const int32_t *cu, int64_t b, int64_t total, int64_t longest, int64_t *start) {
  const int64_t first = between(cu[b], 0, total), end = between(cu[b + 1], 0, total);
  *start = first;
  return between(end - first, 0, longest);
}

static __device__ Row decode_row(const flashcore_attention &a, int64_t index) {
  Row r;
  r.i = index % a.seq_q;
  r.h = index / a.seq_q % a.heads_q;
  r.b = index / a.seq_q / a.heads_q;
  r.len_q = a.seq_q;
  r.len_kv = a.seq_kv;
  r.start_q = r.start_kv = 0;
  if (a.cu_seqlens_q) r.len_q = packed_length(a.cu_seqlens_q, r.b, a.total_q, a.seq_q, &r.start_q);
  if (a.cu_seqlens_kv) r.len_kv = packed_length(a.cu_seqlens_kv, r.b, a.total_kv, a.seq_kv, &r.start_kv);
  if (a.seqlens_q) r.len_q = between(a.seqlens_q[r.b], 0, r.len_q);
  if (a.seqlens_kv) r.len_kv = between(a.seqlens_kv[r.b], 0, r.len_kv);
  return r;
}

/* Element offset of key j in K or V; kMissing where its page is. */
static __device__ int64_t key_address(const flashcore_attention &a, const flashcore_tensor &t, const Row &r, int64_t j) {
  const int64_t head = r.h / (a.heads_q / a.heads_kv) * t.stride_h;
  if (a.page_table) {
    const int64_t page = a.page_table[r.b * a.page_table_stride_b + j / a.page_size];
    return page < 0 || page >= a.num_pages ? kMissing : page * t.stride_b + j % a.page_size * t.stride_s + head;
  }
  if (a.cu_seqlens_kv) return (r.start_kv + j) * t.stride_s + head;
  return r.b * t.stride_b + j * t.stride_s + head;
}

/* Offset of row i in Q or O. */
static __device__ int64_t query_address(const flashcore_attention &a, const flashcore_tensor &t, const Row &r) {
  return (a.cu_seqlens_q ? (r.start_q + r.i) * t.stride_s : r.b * t.stride_b + r.i * t.stride_s) + r.h * t.stride_h;
}

static __device__ bool visible(const flashcore_attention &a, const Row &r, int64_t j) {
  const int64_t diagonal = r.i + r.len_kv - r.len_q;
  if (j >= r.len_kv) return false;
  if (a.causal == FLASHCORE_CAUSAL_BOTTOM_RIGHT && j > diagonal) return false;
  if (a.causal == FLASHCORE_CAUSAL_TOP_LEFT && j > r.i) return false;
  if (a.window && a.window_left >= 0 && j < diagonal - a.window_left) return false;
  if (a.window && a.window_right >= 0 && j > diagonal + a.window_right) return false;
  if (a.mask_bits) {
    const uint32_t word = a.mask_bits[r.b * a.mask_stride_b + r.h * a.mask_stride_h + r.i * a.mask_stride_q + j / 32];
    if ((word >> (j % 32) & 1) == 0) return false;
  }
  return key_address(a, a.k, r, j) != kMissing;
}

/* Up to 32 terms added to `sum` as Hopper's tensor cores do it with fp8: of each, what lies below 2^-13 of the largest's power of two is dropped.
 * term(k): number k of `terms`. */
template <typename Term> static __device__ float add_as_fp8(float sum, int terms, Term term) {
  float x[32], largest = fabsf(sum);
#pragma unroll
  for (int k = 0; k < 32; ++k) x[k] = k < terms ? term(k) : 0.f, largest = fmaxf(largest, fabsf(x[k]));
  if (!(largest > 0 && largest < INFINITY)) return sum + largest;
  const float unit = ldexpf(1.f, ilogbf(largest) - 13), inverse = 1 / unit;
  float units = truncf(sum * inverse);
#pragma unroll
  for (int k = 0; k < 32; ++k) units += truncf(x[k] * inverse);
  return units * unit;
}

struct Logit {
  double exact;
  float low; // natural units too
};

/* The logit of key j: scale, softcap, bias, ALiBi, in this order; -inf: not visible. q: the query row in shared memory. */
static __device__ Logit logit(const flashcore_attention &a, const Row &r, const double *q, int64_t j) {
  if (!visible(a, r, j)) return {-INFINITY, -INFINITY};
  const int dtype = a.dtype_kv ? a.dtype_kv : a.dtype;
  const bool fp8 = is_fp8(a.dtype);
  const int64_t key = key_address(a, a.k, r, j);
  double exact = 0;
  float low = 0;
  for (int d = 0; d < a.dim_qk; ++d) {
    const double k = read(a.k.data, dtype, key + d);
    exact += q[d] * k;
    if (!fp8) low = fmaf((float)q[d], (float)k, low);
  }
  for (int d = 0; fp8 && d < a.dim_qk; d += 32)
    low = add_as_fp8(low, a.dim_qk - d < 32 ? a.dim_qk - d : 32, [&](int k) { return (float)(q[d + k] * read(a.k.data, dtype, key + d + k)); });
  double scale = a.scale > 0 ? (double)a.scale : 1 / sqrt((double)a.dim_qk);
  scale *= descale(a.q_descale, r.b, r.h) * descale(a.k_descale, r.b, r.h / (a.heads_q / a.heads_kv));
  exact *= scale;
  low *= (float)scale;
  if (a.softcap > 0) {
    exact = a.softcap * tanh(exact / a.softcap);
    low = a.softcap * tanhf(low / a.softcap);
  }
  if (a.bias) {
    const int64_t at = r.b * a.bias_stride_b + r.h * a.bias_stride_h + r.i * a.bias_stride_q + j * a.bias_stride_kv;
    const double bias = read(a.bias, a.bias_dtype ? a.bias_dtype : a.dtype, at);
    exact += bias;
    low += (float)bias;
  }
  if (a.alibi_slopes) {
    const float slope = a.alibi_slopes[r.b * a.alibi_stride_b + r.h];
    const int64_t distance = r.i + r.len_kv - r.len_q - j;
    exact -= (double)slope * (double)(distance < 0 ? -distance : distance);
    low -= slope * (float)(distance < 0 ? -distance : distance);
  }
  return {exact, low};
}

/* Combine one value per thread over the block; all threads get the result. */
template <typename T, typename Combine> static __device__ T over_block(T x, T *scratch, Combine combine) {
  scratch[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) scratch[threadIdx.x] = combine(scratch[threadIdx.x], scratch[threadIdx.x + half]);
    __syncthreads();
  }
  const T result = scratch[0];
  __syncthreads();
  return result;
}

/* Row sums of a row: o and l relative to the maximum m (natural units), exact and low. */
struct Sums {
  double m, peak, l, o[kDimsPerThread];
  float m_low, l_low, o_low[kDimsPerThread];
};

constexpr float kLog2e = 1.44269504f;

/* First pass over the keys: the row maxima. A NaN logit is ignored here and spoils the sums of the second pass, as it should. */
static __device__ void row_maxima(const flashcore_attention &a, const Row &r, const double *q, double *scratch, Sums &s) {
  double m = -INFINITY, m_low = -INFINITY, peak = 0;
  for (int64_t j = threadIdx.x; j < r.len_kv; j += kThreads) {
    const Logit x = logit(a, r, q, j);
    m = fmax(m, x.exact);
    m_low = fmax(m_low, (double)x.low);
    if (x.exact != -INFINITY) peak = fmax(peak, fabs(x.exact));
  }
  s.m = over_block(m, scratch, [](double x, double y) { return fmax(x, y); });
  s.peak = over_block(peak, scratch, [](double x, double y) { return fmax(x, y); });
  s.m_low = (float)over_block(m_low, scratch, [](double x, double y) { return fmax(x, y); });
}

/* Second pass: 128 keys at a time, their weights into shared memory, then every thread adds up its output dims. */
static __device__ void row_sums(const flashcore_attention &a, const Row &r, const double *q, float largest_p, double *scratch, Sums &s) {
  __shared__ double weight[kThreads];
  __shared__ float weight_low[kThreads];
  __shared__ int64_t value[kThreads];
  double l = 0;
  float l_low = 0, newer[kDimsPerThread] = {}; // newer: of the last 512 keys
  for (int64_t first = 0; first < r.len_kv; first += kThreads) {
    const int64_t j = first + threadIdx.x;
    const Logit x = logit(a, r, q, j);
    const bool hidden = x.exact == -INFINITY;
    const double p = hidden ? 0 : exp(x.exact - s.m);
    const float p_low = hidden ? 0 : exp2f((x.low - s.m_low) * kLog2e);
    l += p;
    l_low += p_low;
    weight[threadIdx.x] = p;
    weight_low[threadIdx.x] = round_weight(a.dtype, p_low, largest_p);
    value[threadIdx.x] = hidden ? kMissing : key_address(a, a.v, r, j);
    __syncthreads();
    for (int n = 0; n < kDimsPerThread; ++n) {
      const int d = threadIdx.x + n * kThreads, dtype = a.dtype_kv ? a.dtype_kv : a.dtype;
      if (d >= a.dim_v) break;
      for (int k = 0; k < kThreads; ++k) {
        if (value[k] == kMissing) continue;
        const double v = read(a.v.data, dtype, value[k] + d);
        s.o[n] += weight[k] * v;
        if (!is_fp8(a.dtype)) s.o_low[n] = fmaf(weight_low[k], (float)v, s.o_low[n]);
      }
      for (int at = 0; is_fp8(a.dtype) && at < kThreads; at += 32)
        newer[n] = add_as_fp8(newer[n], 32, [&](int k) {
          return value[at + k] == kMissing ? 0.f : weight_low[at + k] * (float)read(a.v.data, dtype, value[at + k] + d);
        });
      if (first % 512 == 512 - kThreads || first + kThreads >= r.len_kv) s.o_low[n] += newer[n], newer[n] = 0;
    }
    __syncthreads();
  }
  s.l = over_block(l, scratch, [](double x, double y) { return x + y; });
  s.l_low = (float)over_block((double)l_low, scratch, [](double x, double y) { return (double)((float)x + (float)y); });
}

/* What fp8 can hold of x, before it is rounded. */
static __device__ double saturate(int dtype, double x) {
  if (!is_fp8(dtype)) return x;
  const double largest = dtype == FLASHCORE_E4M3 ? 448 : 57344;
  return x > largest ? largest : x < -largest ? -largest : x;
}

static __device__ void raise(unsigned long long *largest, double x) {
  if (isfinite(x)) atomicMax(largest, (unsigned long long)__double_as_longlong(fabs(x)));
}

/* The sink joins the denominator; an empty row without one has O = 0, LSE = -inf. */
static __device__ void write_row(const flashcore_attention &a, const Row &r, int64_t index, const Sums &s, const Output &out) {
  double l = s.l, lse_max = s.m, factor = 1;
  float l_low = s.l_low, factor_low = 1;
  if (a.sink) {
    const double sink = a.sink[r.h];
    const float sink_low = a.sink[r.h], m_low = fmaxf(s.m_low, sink_low);
    lse_max = fmax(s.m, sink);
    factor = exp(s.m - lse_max);
    l = s.l * factor + exp(sink - lse_max);
    factor_low = exp2f((s.m_low - m_low) * kLog2e);
    l_low = s.l_low * factor_low + exp2f((sink_low - m_low) * kLog2e);
  }
  const int dtype_o = output_dtype(a.dtype, a.dtype_o);
  const double v_scale = descale(a.v_descale, r.b, r.h / (a.heads_q / a.heads_kv)), o_scale = 1 / descale(a.o_descale, r.b, r.h);
  for (int n = 0; n < kDimsPerThread; ++n) {
    const int d = threadIdx.x + n * kThreads;
    if (d >= a.dim_v) break;
    const double o = s.l == 0 ? 0 : s.o[n] * factor / l * v_scale;
    const float low = s.l_low == 0 ? 0 : s.o_low[n] * factor_low / l_low * (float)v_scale;
    out.o[index * a.dim_v + d] = s.l == 0 ? 0 : saturate(dtype_o, o * o_scale); // a row without keys feels no scale
    out.low[index * a.dim_v + d] = s.l_low == 0 ? 0 : round_to(dtype_o, low * (float)o_scale);
    raise(&out.amax[0], o);
    raise(&out.amax[1], low - o);
  }
  if (threadIdx.x > 0) return;
  const float m_low = a.sink ? fmaxf(s.m_low, a.sink[r.h]) : s.m_low;
  out.peak[index] = s.peak;
  out.lse[index] = (l == 0 ? -INFINITY : lse_max + log(l)) * (a.lse_base2 ? 1.4426950408889634 : 1.0);
}

static __global__ void rows(const __grid_constant__ flashcore_attention a, Output out) {
  __shared__ double q[kMaxDim], scratch[kThreads];
  const int64_t index = blockIdx.x;
  const Row r = decode_row(a, index);
  if (r.i >= r.len_q) return;
  const int64_t address = query_address(a, a.q, r);
  for (int d = threadIdx.x; d < a.dim_qk; d += kThreads) q[d] = read(a.q.data, a.dtype, address + d);
  __syncthreads();
  Sums s = {};
  row_maxima(a, r, q, scratch, s);
  row_sums(a, r, q, out.largest_p, scratch, s);
  write_row(a, r, index, s, out);
}

/* Everything the host must know: a descriptor as the caller filled it (not resolved), output arrays, the default stream. */
inline cudaError_t run(const flashcore_attention &a, const Output &out) {
  const int64_t rows_total = (int64_t)a.batch * a.heads_q * a.seq_q;
  const cudaError_t cleared = cudaMemsetAsync(out.amax, 0, 2 * sizeof *out.amax);
  if (cleared != cudaSuccess) return cleared;
  rows<<<(unsigned)rows_total, kThreads>>>(a, out);
  return cudaGetLastError();
}

} // namespace oracle

#endif
