/* check_rows.h · compares chosen rows of an attention output with the CPU reference, each as a problem of one query, so that large outputs can be
 * checked in little time. C11 and C++17. */
#ifndef FLASHCORE_EXAMPLES_CHECK_ROWS_H
#define FLASHCORE_EXAMPLES_CHECK_ROWS_H

#include "../../flashcore.h"
#include "npy.h"

typedef struct row_check {
  int rows, failed;
  double max_error, max_lse_error; /* worst |o - reference|, |lse - reference| */
} row_check;

static inline const char *dtype_name(int32_t dtype) { return dtype == FLASHCORE_F32 ? "f32" : dtype == FLASHCORE_F16 ? "f16" : "bf16"; }

static inline float element_as_float(const void *data, int32_t dtype, int64_t i) {
  if (dtype == FLASHCORE_F32) return ((const float *)data)[i];
  const uint16_t h = ((const uint16_t *)data)[i];
  return dtype == FLASHCORE_F16 ? float_from_f16(h) : float_from_bf16(h);
}

static inline const void *element_at(const void *data, int32_t dtype, int64_t i) { return (const char *)data + i * flashcore_dtype_bytes(dtype); }

/* The keys that query i sees are contiguous, so its row alone is a problem of one query without causal rule or window over just those keys.
 *   a          host pointers; fp32, fp16 or bf16; bias fp32; no pages, mask bits or descales
 *   row_bias   room for seq_kv floats: bias and ALiBi of this row;   o: dim_v floats;   lse: one */
static inline flashcore_attention row_problem(const flashcore_attention *a, int32_t b, int32_t head, int32_t i, float *row_bias, float *o,
                                              float *lse) {
  flashcore_attention bounds = *a, r = *a;
  if (!a->window || a->window_left < 0) bounds.window_left = FLASHCORE_UNBOUNDED;
  if (!a->window || a->window_right < 0) bounds.window_right = FLASHCORE_UNBOUNDED;
  const flashcore_sequence s = flashcore_sequence_at(a, b);
  const flashcore_range keys = flashcore_visible_keys(&bounds, i, s.len_q, s.len_kv);
  const int32_t head_kv = head / (a->heads_q / a->heads_kv);
  const float slope = a->alibi_slopes ? a->alibi_slopes[b * a->alibi_stride_b + head] : 0.f;
  const float *bias = (const float *)a->bias;
  for (int32_t j = keys.first; j < keys.last; ++j) {
    float x = bias ? bias[b * a->bias_stride_b + head * a->bias_stride_h + i * a->bias_stride_q + j * a->bias_stride_kv] : 0.f;
    row_bias[j - keys.first] = x - slope * (float)llabs((long long)i + s.len_kv - s.len_q - j);
  }
  r.batch = r.heads_q = r.heads_kv = r.seq_q = 1;
  r.seq_kv = keys.last > keys.first ? keys.last - keys.first : 0;
  r.q.data = (void *)element_at(a->q.data, a->dtype, s.q + i * a->q.stride_s + head * a->q.stride_h);
  r.k.data = (void *)element_at(a->k.data, a->dtype, s.k + keys.first * a->k.stride_s + head_kv * a->k.stride_h);
  r.v.data = (void *)element_at(a->v.data, a->dtype, s.v + keys.first * a->v.stride_s + head_kv * a->v.stride_h);
  r.o = flashcore_bshd(o, 1, 1, a->dim_v);
  r.dtype_o = FLASHCORE_F32;
  r.lse = lse;
  r.causal = FLASHCORE_CAUSAL_NONE;
  r.window = 0;
  r.alibi_slopes = NULL;
  r.bias = bias || a->alibi_slopes ? row_bias : NULL;
  r.bias_dtype = FLASHCORE_F32;
  r.bias_stride_b = r.bias_stride_h = r.bias_stride_q = 0;
  r.bias_stride_kv = 1;
  if (a->sink) r.sink = a->sink + head;
  r.seqlens_q = r.seqlens_kv = NULL;
  return r;
}

/* Unit of rounding of P and O. fp32 kernels use ex2.approx and sum in fp32, hence more than 2^-24. */
static inline double rounding_unit(int32_t dtype) { return dtype == FLASHCORE_F16 ? 1.0 / 2048 : dtype == FLASHCORE_BF16 ? 1.0 / 256 : 1.0 / 65536; }

/* bound[d]: what rounding may cost element d of a row. Rounding P moves each of its terms p_j v_jd by up to u of itself, independently, so their sum by a
 * few u times the root of the sum of squares; rounding O costs u of o_d.   r: as row_problem makes it;   o, lse: its result */
static inline void row_bounds(const flashcore_attention *r, const float *o, float lse, double *bound) {
  const double scale = r->scale > 0.f ? (double)r->scale : 1.0 / sqrt((double)r->dim_qk);
  const double log_sum = (double)lse * (r->lse_base2 ? FLASHCORE_LN2 : 1.0), u = rounding_unit(r->dtype);
  for (int32_t d = 0; d < r->dim_v; ++d) bound[d] = 0;
  for (int32_t j = 0; j < r->seq_kv && log_sum > -1e300; ++j) {
    double x = 0;
    for (int32_t d = 0; d < r->dim_qk; ++d)
      x += (double)element_as_float(r->q.data, r->dtype, d) * (double)element_as_float(r->k.data, r->dtype, j * r->k.stride_s + d);
    x *= scale;
    if (r->softcap > 0.f) x = (double)r->softcap * tanh(x / (double)r->softcap);
    if (r->bias) x += (double)((const float *)r->bias)[j];
    const double p = exp(x - log_sum);
    for (int32_t d = 0; d < r->dim_v; ++d) {
      const double term = p * (double)element_as_float(r->v.data, r->dtype, j * r->v.stride_s + d);
      bound[d] += term * term;
    }
  }
  for (int32_t d = 0; d < r->dim_v; ++d) bound[d] = 4 * u * (sqrt(bound[d]) + fabs((double)o[d])) + 1e-7; /* 1e-7: fp16 subnormals */
}

/* Compare row i of a->o, and of a->lse unless it is NULL, with the reference's row. */
static inline void compare_row(const flashcore_attention *a, int32_t b, int32_t head, int32_t i, const float *o, float lse, const double *bound,
                               row_check *total) {
  const int32_t dtype_o = a->dtype_o ? a->dtype_o : a->dtype;
  const int64_t row = flashcore_sequence_at(a, b).o + i * a->o.stride_s + head * a->o.stride_h;
  int ok = 1;
  for (int32_t d = 0; d < a->dim_v; ++d) {
    const double e = fabs((double)element_as_float(a->o.data, dtype_o, row + d) - (double)o[d]);
    if (!(e <= bound[d])) ok = 0;                             /* a NaN fails */
    if (e > total->max_error || e != e) total->max_error = e; /* and stays */
  }
  if (a->lse) {
    const float found = a->lse[((int64_t)b * a->heads_q + head) * a->seq_q + i];
    const double e = found == lse ? 0.0 : fabs((double)found - (double)lse); /* both -inf: equal */
    if (!(e <= 2e-5 + 1e-6 * fabs((double)lse))) ok = 0;
    if (e > total->max_lse_error || e != e) total->max_lse_error = e;
  }
  ++total->rows;
  total->failed += !ok;
}

static inline flashcore_status check_row(const flashcore_attention *a, int32_t b, int32_t head, int32_t i, row_check *total, flashcore_error *error) {
  float o[FLASHCORE_MAX_DIM], lse = 0.f;
  double bound[FLASHCORE_MAX_DIM];
  float *row_bias = (float *)malloc(((size_t)a->seq_kv + 1) * sizeof(float));
  if (!row_bias) return FLASHCORE_INVALID_SIZE;
  const flashcore_attention r = row_problem(a, b, head, i, row_bias, o, &lse);
  const flashcore_status status = flashcore_reference_forward(&r, error);
  if (status == FLASHCORE_OK) {
    row_bounds(&r, o, lse, bound);
    compare_row(a, b, head, i, o, lse, bound, total);
  }
  free(row_bias);
  return status;
}

/* `rows` rows spread over batch, heads and queries by a fixed sequence; the first and last query of the problem are among them. */
static inline flashcore_status check_rows(const flashcore_attention *a, int32_t rows, row_check *total, flashcore_error *error) {
  memset(total, 0, sizeof *total);
  uint64_t x = 1;
  for (int32_t n = 0; n < rows; ++n) {
    const int32_t b = n == 0 ? 0 : n == 1 ? a->batch - 1 : (int32_t)((x >> 33) % (uint64_t)a->batch);
    x = x * 6364136223846793005u + 1442695040888963407u;
    const int32_t head = n == 0 ? 0 : n == 1 ? a->heads_q - 1 : (int32_t)((x >> 33) % (uint64_t)a->heads_q);
    x = x * 6364136223846793005u + 1442695040888963407u;
    const int32_t len_q = flashcore_sequence_at(a, b).len_q;
    if (len_q == 0) continue;
    const int32_t i = n == 0 ? 0 : n == 1 ? len_q - 1 : (int32_t)((x >> 33) % (uint64_t)len_q);
    x = x * 6364136223846793005u + 1442695040888963407u;
    const flashcore_status status = check_row(a, b, head, i, total, error);
    if (status != FLASHCORE_OK) return status;
  }
  return FLASHCORE_OK;
}

#endif
