/* Demonstrates that the CPU reference computes attention as the numerics contract states it: against a softmax written out here, and closed forms.
 *   cc -std=c11 -I<repository> tests/host/test_reference.c -lm */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore.h"

#include "check.h"

#include <string.h>

enum { kBatch = 2, kHeadsQ = 4, kHeadsKv = 2, kSeqQ = 5, kSeqKv = 7, kDimQk = 3, kDimV = 8 };

static float q[kBatch * kSeqQ * kHeadsQ * kDimQk], k[kBatch * kSeqKv * kHeadsKv * kDimQk], v[kBatch * kSeqKv * kHeadsKv * kDimV];
static float o[kBatch * kSeqQ * kHeadsQ * kDimV], lse[kBatch * kHeadsQ * kSeqQ];
static float other_o[kBatch * kSeqQ * kHeadsQ * kDimV], other_lse[kBatch * kHeadsQ * kSeqQ];
static float bias[kBatch * kHeadsQ * kSeqQ * kSeqKv], slopes[kHeadsQ], sinks[kHeadsQ];
static uint32_t mask[kBatch * kHeadsQ * kSeqQ];
#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

static uint32_t random_state = 1;
static float random_normalish(void) { /* sum of four uniforms: mean 0, deviation about 1.2 */
  float sum = 0.f;
  for (int i = 0; i < 4; ++i) {
    random_state = random_state * 1664525u + 1013904223u;
    sum += (float)(random_state >> 8) / 8388608.f - 1.f;
  }
  return sum;
}
static void randomize(float *x, int count) {
  for (int i = 0; i < count; ++i) x[i] = random_normalish();
}
static void fill(float *x, int count, float value) {
  for (int i = 0; i < count; ++i) x[i] = value;
}

/* A plain problem on the arrays above, filled with random numbers; outputs hold NaN. */
static flashcore_attention problem(void) {
  flashcore_attention a;
  randomize(q, COUNT(q)), randomize(k, COUNT(k)), randomize(v, COUNT(v));
  randomize(bias, COUNT(bias)), randomize(slopes, COUNT(slopes)), randomize(sinks, COUNT(sinks));
  fill(o, COUNT(o), NAN), fill(lse, COUNT(lse), NAN);
  fill(other_o, COUNT(other_o), NAN), fill(other_lse, COUNT(other_lse), NAN);
  flashcore_init(&a);
  a.dtype = FLASHCORE_F32;
  a.batch = kBatch, a.heads_q = kHeadsQ, a.heads_kv = kHeadsKv;
  a.seq_q = kSeqQ, a.seq_kv = kSeqKv, a.dim_qk = kDimQk, a.dim_v = kDimV;
  a.q = flashcore_bshd(q, kSeqQ, kHeadsQ, kDimQk), a.k = flashcore_bshd(k, kSeqKv, kHeadsKv, kDimQk);
  a.v = flashcore_bshd(v, kSeqKv, kHeadsKv, kDimV), a.o = flashcore_bshd(o, kSeqQ, kHeadsQ, kDimV);
  a.lse = lse;
  return a;
}

static void forward(const flashcore_attention *a) {
  flashcore_error error;
  if (!CHECK(flashcore_reference_forward(a, &error) == FLASHCORE_OK)) printf("  %s\n", error.message);
}

static float *o_row(int b, int i, int h) { return o + ((b * kSeqQ + i) * kHeadsQ + h) * kDimV; }
static float *v_row(int b, int j, int h) { return v + ((b * kSeqKv + j) * kHeadsKv + h) * kDimV; }
static float *k_row(int b, int j, int h) { return k + ((b * kSeqKv + j) * kHeadsKv + h) * kDimQk; }
static float *lse_at(int b, int h, int i) { return lse + (b * kHeadsQ + h) * kSeqQ + i; }

/* O and LSE are the same numbers, or NaN in the same places. */
static int same(const float *x, const float *y, int count) {
  for (int i = 0; i < count; ++i)
    if (x[i] != y[i] && !(isnan(x[i]) && isnan(y[i]))) return 0;
  return 1;
}

/* The same problem with its output in the other arrays. */
static flashcore_attention twin(const flashcore_attention *a) {
  flashcore_attention t = *a;
  t.o.data = other_o;
  t.lse = other_lse;
  return t;
}
static int twins_agree(void) { return same(o, other_o, COUNT(o)) && same(lse, other_lse, COUNT(lse)); }

/* Every V row holds a single 1 in column j: O then is the row of probabilities. Needs kSeqKv <= kDimV. */
static void make_v_show_probabilities(void) {
  fill(v, COUNT(v), 0.f);
  for (int b = 0; b < kBatch; ++b)
    for (int j = 0; j < kSeqKv; ++j)
      for (int h = 0; h < kHeadsKv; ++h) v_row(b, j, h)[j] = 1.f;
}

/* The contract written out for full-length sequences in the arrays above: every logit is formed, then one softmax. */
static double oracle_logit(const flashcore_attention *a, int b, int h, int i, int j) {
  const float *x = q + ((b * kSeqQ + i) * kHeadsQ + h) * kDimQk, *y = k_row(b, j, h * kHeadsKv / kHeadsQ);
  const int diagonal = i + kSeqKv - kSeqQ;
  double dot = 0.0;
  for (int d = 0; d < kDimQk; ++d) dot += (double)x[d] * (double)y[d];
  double logit = dot * (a->scale > 0.f ? (double)a->scale : 1.0 / sqrt((double)kDimQk));
  if (a->softcap > 0.f) logit = (double)a->softcap * tanh(logit / (double)a->softcap);
  if (a->bias) logit += (double)bias[((b * kHeadsQ + h) * kSeqQ + i) * kSeqKv + j];
  if (a->alibi_slopes) logit += -(double)slopes[h] * fabs((double)(diagonal - j));
  if (a->causal == FLASHCORE_CAUSAL_BOTTOM_RIGHT && j > diagonal) return -INFINITY;
  if (a->causal == FLASHCORE_CAUSAL_TOP_LEFT && j > i) return -INFINITY;
  if (a->window && (j < diagonal - a->window_left || j > diagonal + a->window_right)) return -INFINITY;
  if (a->mask_bits && !(mask[(b * kHeadsQ + h) * kSeqQ + i] >> j & 1u)) return -INFINITY;
  return logit;
}

static void compare_row(const flashcore_attention *a, int b, int h, int i) {
  double sum[kDimV] = {0.0}, l = a->sink ? exp((double)sinks[h]) : 0.0;
  for (int j = 0; j < kSeqKv; ++j) {
    const double p = exp(oracle_logit(a, b, h, i, j));
    l += p;
    for (int d = 0; d < kDimV; ++d) sum[d] += p * (double)v_row(b, j, h * kHeadsKv / kHeadsQ)[d];
  }
  for (int d = 0; d < kDimV; ++d) CHECK_NEAR((double)o_row(b, i, h)[d], l > 0.0 ? sum[d] / l : 0.0, 1e-6);
  CHECK_NEAR((double)*lse_at(b, h, i), a->lse_base2 ? log2(l) : log(l), 1e-6);
}

static void compare(const flashcore_attention *a) {
  for (int b = 0; b < kBatch; ++b)
    for (int h = 0; h < kHeadsQ; ++h)
      for (int i = 0; i < kSeqQ; ++i) compare_row(a, b, h, i);
}

static void every_combination_of_options_equals_the_softmax_written_out(void) {
  for (int options = 0; options < 3 * 128; ++options) {
    flashcore_attention a = problem();
    const int bits = options / 3;
    a.causal = options % 3;
    if (bits & 1) a.window = 1, a.window_left = 2, a.window_right = 1;
    if (bits & 2) a.softcap = 1.5f;
    if (bits & 4) a.alibi_slopes = slopes;
    if (bits & 8) {
      a.bias = bias;
      a.bias_stride_b = kHeadsQ * kSeqQ * kSeqKv, a.bias_stride_h = kSeqQ * kSeqKv, a.bias_stride_q = kSeqKv, a.bias_stride_kv = 1;
    }
    if (bits & 16) {
      for (int i = 0; i < COUNT(mask); ++i) mask[i] = (uint32_t)i * 2654435761u >> 7;
      a.mask_bits = mask, a.mask_stride_b = kHeadsQ * kSeqQ, a.mask_stride_h = kSeqQ, a.mask_stride_q = 1;
    }
    if (bits & 32) a.sink = sinks;
    if (bits & 64) a.lse_base2 = 1, a.scale = 0.7f;
    forward(&a);
    compare(&a);
  }
}

static void equal_logits_give_the_mean_of_v_and_the_log_of_the_count(void) {
  flashcore_attention a = problem();
  fill(q, COUNT(q), 0.f);
  forward(&a);
  for (int d = 0; d < kDimV; ++d) {
    double mean = 0.0;
    for (int j = 0; j < kSeqKv; ++j) mean += (double)v_row(1, j, 1)[d] / (double)kSeqKv;
    CHECK_NEAR((double)o_row(1, 3, 2)[d], mean, 1e-6);
  }
  CHECK_NEAR((double)*lse_at(1, 2, 3), log((double)kSeqKv), 1e-6);
  a.lse_base2 = 1;
  forward(&a);
  CHECK_NEAR((double)*lse_at(1, 2, 3), log2((double)kSeqKv), 1e-6);
}

static void one_key_gives_its_v_whatever_its_logit(void) {
  flashcore_attention a = problem();
  a.seq_kv = 1;
  for (int i = 0; i < COUNT(k); ++i) k[i] *= 1e6f;
  forward(&a);
  for (int h = 0; h < kHeadsQ; ++h) CHECK(same(o_row(1, 0, h), v_row(1, 0, h / 2), kDimV));
}

static void huge_logits_pick_the_largest_and_never_overflow(void) {
  flashcore_attention a = problem();
  make_v_show_probabilities();
  fill(q, COUNT(q), 500.f), fill(k, COUNT(k), -500.f);
  fill(k_row(0, 4, 0), kDimQk, 500.f);
  a.scale = 1.f;
  forward(&a);
  for (int j = 0; j < kSeqKv; ++j) CHECK(o_row(0, 2, 1)[j] == (j == 4 ? 1.f : 0.f));
  CHECK_NEAR((double)*lse_at(0, 1, 2), 750000.0, 1e-6);
  CHECK_NEAR((double)*lse_at(0, 2, 2), -750000.0 + log((double)kSeqKv), 1e-6);
}

static void fully_masked_row_gives_zero_and_lse_minus_inf(void) {
  flashcore_attention a = problem();
  a.mask_bits = mask, a.mask_stride_q = 1;
  fill(v, COUNT(v), NAN);
  memset(mask, 0, sizeof mask);
  forward(&a);
  for (int i = 0; i < COUNT(o); ++i) CHECK(o[i] == 0.f);
  for (int i = 0; i < COUNT(lse); ++i) CHECK(lse[i] == -INFINITY);
}

static void bias_of_minus_inf_hides_like_a_mask(void) {
  flashcore_attention a = problem();
  fill(bias, COUNT(bias), -INFINITY);
  bias[3] = 0.f;
  a.bias = bias, a.bias_stride_kv = 1;
  forward(&a);
  CHECK(same(o_row(0, 4, 1), v_row(0, 3, 0), kDimV));
  bias[3] = -INFINITY;
  forward(&a);
  CHECK(o_row(0, 4, 1)[0] == 0.f && *lse_at(0, 1, 4) == -INFINITY);
}

static void sink_only_row_gives_zero_and_the_sink_as_lse(void) {
  flashcore_attention a = problem();
  a.seq_kv = 0, a.k.data = a.v.data = NULL, a.sink = sinks;
  forward(&a);
  for (int i = 0; i < COUNT(o); ++i) CHECK(o[i] == 0.f);
  for (int h = 0; h < kHeadsQ; ++h) CHECK(*lse_at(1, h, 2) == sinks[h]);
  a.lse_base2 = 1;
  forward(&a);
  CHECK_NEAR((double)*lse_at(1, 3, 2), (double)sinks[3] / log(2.0), 1e-6);
  fill(sinks, COUNT(sinks), -INFINITY);
  forward(&a);
  CHECK(*lse_at(1, 3, 2) == -INFINITY && o[0] == 0.f);
}

static void no_keys_and_no_sink_give_zero_and_lse_minus_inf(void) {
  flashcore_attention a = problem();
  a.seq_kv = 0, a.k.data = a.v.data = NULL;
  forward(&a);
  for (int i = 0; i < COUNT(o); ++i) CHECK(o[i] == 0.f);
  for (int i = 0; i < COUNT(lse); ++i) CHECK(lse[i] == -INFINITY);
}

static int sees(int i, int j) { return o_row(1, i, 3)[j] > 0.f; }

static void windows_include_both_ends(void) {
  flashcore_attention a = problem();
  make_v_show_probabilities();
  a.window = 1, a.window_left = 1, a.window_right = 2;
  forward(&a);
  for (int i = 0; i < kSeqQ; ++i)
    for (int j = 0; j < kSeqKv; ++j) CHECK(sees(i, j) == (j >= i + 2 - 1 && j <= i + 2 + 2)); /* kSeqKv - kSeqQ = 2 */
  a.window_left = a.window_right = 0;
  forward(&a);
  for (int i = 0; i < kSeqQ; ++i) CHECK(o_row(1, i, 3)[i + 2] == 1.f);
  a.window_right = -1;
  forward(&a);
  for (int i = 0; i < kSeqQ; ++i)
    for (int j = 0; j < kSeqKv; ++j) CHECK(sees(i, j) == (j >= i + 2));
}

static void causal_is_aligned_bottom_right_or_top_left(void) {
  flashcore_attention a = problem();
  make_v_show_probabilities();
  a.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
  forward(&a);
  for (int i = 0; i < kSeqQ; ++i)
    for (int j = 0; j < kSeqKv; ++j) CHECK(sees(i, j) == (j <= i + 2));
  a.causal = FLASHCORE_CAUSAL_TOP_LEFT;
  forward(&a);
  for (int i = 0; i < kSeqQ; ++i)
    for (int j = 0; j < kSeqKv; ++j) CHECK(sees(i, j) == (j <= i));
  a.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT, a.seq_kv = 3; /* fewer keys than queries: the first two rows see none */
  a.k.stride_b = a.v.stride_b = 0;
  forward(&a);
  for (int i = 0; i < kSeqQ; ++i) CHECK((*lse_at(0, 0, i) == -INFINITY) == (i < 2));
}

static void query_heads_read_the_kv_head_of_their_group(void) {
  flashcore_attention a = problem();
  for (int b = 0; b < kBatch; ++b)
    for (int j = 0; j < kSeqKv; ++j)
      for (int h = 0; h < kHeadsKv; ++h) fill(v_row(b, j, h), kDimV, (float)(10 * b + h));
  forward(&a);
  for (int b = 0; b < kBatch; ++b)
    for (int h = 0; h < kHeadsQ; ++h) CHECK_NEAR((double)o_row(b, 4, h)[5], 10.0 * b + h / 2, 1e-6);
}

static void paged_keys_equal_unpaged_keys(void) {
  enum { kPage = 2, kPages = 10, kPerSequence = 4 };
  static float k_pages[kPages * kPage * kHeadsKv * kDimQk], v_pages[kPages * kPage * kHeadsKv * kDimV];
  const int32_t table[kBatch * kPerSequence] = {9, 0, 4, 2, 7, 1, 3, 8};
  flashcore_attention a = problem(), paged = twin(&a);
  fill(k_pages, COUNT(k_pages), NAN), fill(v_pages, COUNT(v_pages), NAN); /* unused pages and the tail of the last page */
  for (int b = 0; b < kBatch; ++b)
    for (int j = 0; j < kSeqKv; ++j) {
      const int row = table[b * kPerSequence + j / kPage] * kPage + j % kPage;
      memcpy(k_pages + row * kHeadsKv * kDimQk, k_row(b, j, 0), sizeof(float) * kHeadsKv * kDimQk);
      memcpy(v_pages + row * kHeadsKv * kDimV, v_row(b, j, 0), sizeof(float) * kHeadsKv * kDimV);
    }
  paged.k = flashcore_bshd(k_pages, kPage, kHeadsKv, kDimQk), paged.v = flashcore_bshd(v_pages, kPage, kHeadsKv, kDimV);
  paged.page_table = table, paged.page_table_stride_b = kPerSequence, paged.page_size = kPage, paged.num_pages = kPages;
  forward(&a), forward(&paged);
  CHECK(twins_agree());
}

static void keys_of_missing_pages_are_invisible(void) {
  const int32_t table[] = {0, -1, 4, 3}; /* keys 2..5 are on pages that do not exist */
  flashcore_attention a = problem();
  make_v_show_probabilities();
  a.batch = 1, a.k.stride_b = 2 * kHeadsKv * kDimQk, a.v.stride_b = 2 * kHeadsKv * kDimV; /* page p holds the rows of keys 2p and 2p + 1 */
  a.page_table = table, a.page_size = 2, a.num_pages = 4;
  forward(&a);
  for (int j = 0; j < kSeqKv; ++j) CHECK((o_row(0, 1, 2)[j] > 0.f) == (j < 2 || j == 6));
}

static void packed_sequences_equal_separate_calls(void) {
  enum { kRowsQ = 2 * kSeqQ, kRowsKv = 2 * kSeqKv };
  const int32_t cu_q[] = {0, 3, 8}, cu_kv[] = {0, 6, 13};
  flashcore_attention a = problem(), packed = twin(&a);
  packed.cu_seqlens_q = cu_q, packed.cu_seqlens_kv = cu_kv, packed.total_q = kRowsQ, packed.total_kv = kRowsKv;
  packed.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
  forward(&packed);
  for (int b = 0; b < kBatch; ++b) {
    a.batch = 1, a.seq_q = cu_q[b + 1] - cu_q[b], a.seq_kv = cu_kv[b + 1] - cu_kv[b];
    a.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
    a.q.data = q + cu_q[b] * kHeadsQ * kDimQk, a.o.data = o + cu_q[b] * kHeadsQ * kDimV;
    a.k.data = k + cu_kv[b] * kHeadsKv * kDimQk, a.v.data = v + cu_kv[b] * kHeadsKv * kDimV;
    forward(&a); /* its LSE is (1, heads, its own length) */
    for (int h = 0; h < kHeadsQ; ++h) {
      CHECK(same(lse + h * a.seq_q, other_lse + (b * kHeadsQ + h) * kSeqQ, a.seq_q));
      for (int i = a.seq_q; i < kSeqQ; ++i) CHECK(isnan(other_lse[(b * kHeadsQ + h) * kSeqQ + i])); /* past its length: not written */
    }
  }
  CHECK(same(o, other_o, COUNT(o)));
  for (int i = 8 * kHeadsQ * kDimV; i < COUNT(o); ++i) CHECK(isnan(other_o[i]));
}

static void device_side_lengths_equal_shorter_tensors(void) {
  const int32_t used_q[] = {3, 3}, used_kv[] = {4, 4};
  flashcore_attention a = problem(), shorter = twin(&a);
  a.causal = shorter.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
  a.alibi_slopes = shorter.alibi_slopes = slopes;
  a.seqlens_q = used_q, a.seqlens_kv = used_kv;
  shorter.seq_q = 3, shorter.seq_kv = 4, shorter.lse = NULL;
  forward(&a), forward(&shorter);
  CHECK(same(o, other_o, COUNT(o))); /* rows 3 and 4 stay NaN in both */
  CHECK(isnan(o_row(0, 3, 0)[0]) && isnan(*lse_at(0, 0, 3)) && !isnan(*lse_at(0, 0, 2)));
}

static void broadcast_and_negative_strides_read_what_they_say(void) {
  flashcore_attention a = problem(), copied = twin(&a);
  static float q_backwards[COUNT(q)], k_same[COUNT(k)];
  for (int b = 0; b < kBatch; ++b)
    for (int i = 0; i < kSeqQ; ++i)
      memcpy(q_backwards + (b * kSeqQ + i) * kHeadsQ * kDimQk, q + (b * kSeqQ + kSeqQ - 1 - i) * kHeadsQ * kDimQk, sizeof(float) * kHeadsQ * kDimQk);
  for (int row = 0; row < kBatch * kSeqKv * kHeadsKv; ++row)
    memcpy(k_same + row * kDimQk, k_row(0, row / kHeadsKv % kSeqKv, 1), sizeof(float) * kDimQk);
  a.q.data = q + (kSeqQ - 1) * kHeadsQ * kDimQk, a.q.stride_s = -kHeadsQ * kDimQk;
  a.k.data = k + kDimQk, a.k.stride_b = 0, a.k.stride_h = 0;
  copied.q.data = q_backwards, copied.k.data = k_same;
  forward(&a), forward(&copied);
  CHECK(twins_agree());
}

static void heads_before_sequence_is_only_another_layout(void) {
  flashcore_attention a = problem(), moved = twin(&a);
  static float v_moved[COUNT(v)], o_moved[COUNT(o)];
  for (int b = 0; b < kBatch; ++b)
    for (int h = 0; h < kHeadsKv; ++h)
      for (int j = 0; j < kSeqKv; ++j) memcpy(v_moved + ((b * kHeadsKv + h) * kSeqKv + j) * kDimV, v_row(b, j, h), sizeof(float) * kDimV);
  moved.v = flashcore_bhsd(v_moved, kSeqKv, kHeadsKv, kDimV), moved.o = flashcore_bhsd(o_moved, kSeqQ, kHeadsQ, kDimV);
  forward(&a), forward(&moved);
  for (int b = 0; b < kBatch; ++b)
    for (int h = 0; h < kHeadsQ; ++h)
      for (int i = 0; i < kSeqQ; ++i) CHECK(same(o_row(b, i, h), o_moved + ((b * kHeadsQ + h) * kSeqQ + i) * kDimV, kDimV));
}

static void nan_in_unused_keys_never_reaches_an_output(void) {
  const int32_t used[] = {4, 5};
  flashcore_attention a = problem(), poisoned = twin(&a);
  a.seqlens_kv = poisoned.seqlens_kv = used;
  a.window = poisoned.window = 1, a.window_left = poisoned.window_left = 2;
  forward(&a);
  for (int b = 0; b < kBatch; ++b)
    for (int j = used[b]; j < kSeqKv; ++j) fill(k_row(b, j, 0), kHeadsKv * kDimQk, NAN), fill(v_row(b, j, 0), kHeadsKv * kDimV, NAN);
  forward(&poisoned);
  CHECK(twins_agree() && !isnan(o[0]));
  fill(k_row(0, 0, 0), kDimQk, NAN), fill(v_row(0, 0, 0), kDimV, NAN); /* live, but below the window of the last row, which is keys 1 to 3 */
  forward(&poisoned);
  CHECK(same(o_row(0, 4, 0), other_o + 4 * kHeadsQ * kDimV, kDimV));
}

static void nan_in_a_query_row_stays_in_that_row(void) {
  flashcore_attention a = problem(), poisoned = twin(&a);
  forward(&a);
  q[(2 * kHeadsQ + 1) * kDimQk] = NAN; /* batch 0, row 2, head 1 */
  forward(&poisoned);
  for (int i = 0; i < COUNT(o); ++i) CHECK(i / kDimV == 2 * kHeadsQ + 1 ? isnan(other_o[i]) : other_o[i] == o[i]);
  for (int i = 0; i < COUNT(lse); ++i) CHECK(i == kSeqQ + 2 ? isnan(other_lse[i]) : other_lse[i] == lse[i]);
}

static void two_halves_merged_by_lse_equal_the_whole(void) {
  enum { kFirst = 3 };
  static float half_o[2][COUNT(o)], half_lse[2][COUNT(lse)];
  flashcore_attention a = problem();
  forward(&a);
  for (int half = 0; half < 2; ++half) {
    flashcore_attention part = a;
    part.seq_kv = half ? kSeqKv - kFirst : kFirst;
    part.k.data = half ? k_row(0, kFirst, 0) : k, part.v.data = half ? v_row(0, kFirst, 0) : v;
    part.o.data = half_o[half], part.lse = half_lse[half];
    forward(&part);
  }
  for (int i = 0; i < COUNT(o); ++i) {
    const int row = i / kDimV, h = row % kHeadsQ, n = row / kHeadsQ % kSeqQ, b = row / kHeadsQ / kSeqQ, at = (b * kHeadsQ + h) * kSeqQ + n;
    const double w0 = exp((double)half_lse[0][at]), w1 = exp((double)half_lse[1][at]);
    CHECK_NEAR((w0 * (double)half_o[0][i] + w1 * (double)half_o[1][i]) / (w0 + w1), (double)o[i], 1e-6);
    CHECK_NEAR(log(w0 + w1), (double)lse[at], 1e-6);
  }
}

/* x becomes the values that a narrow type can hold, packed beside it. */
static void narrow(int32_t dtype, float *x, void *packed, int count) {
  for (int i = 0; i < count; ++i) {
    flashcore_store(packed, dtype, i, (double)x[i]);
    x[i] = (float)flashcore_load(packed, dtype, i);
  }
}

static void narrow_inputs_give_what_their_values_give(void) {
  static float q_narrow[COUNT(q)], k_narrow[COUNT(k)], v_narrow[COUNT(v)];
  for (int32_t dtype = FLASHCORE_F16; dtype <= FLASHCORE_E5M2; ++dtype)
    for (int32_t dtype_kv = FLASHCORE_F16; dtype_kv <= FLASHCORE_E5M2; ++dtype_kv) {
      flashcore_attention a = problem(), typed = twin(&a);
      narrow(dtype, q, q_narrow, COUNT(q)), narrow(dtype_kv, k, k_narrow, COUNT(k)), narrow(dtype_kv, v, v_narrow, COUNT(v));
      typed.q.data = q_narrow, typed.k.data = k_narrow, typed.v.data = v_narrow;
      typed.dtype = dtype, typed.dtype_kv = dtype_kv, typed.dtype_o = FLASHCORE_F32;
      forward(&a), forward(&typed);
      CHECK(twins_agree());
    }
}

static void outputs_are_rounded_to_their_type(void) {
  static float o_narrow[COUNT(o)];
  for (int32_t dtype_o = FLASHCORE_F16; dtype_o <= FLASHCORE_E5M2; ++dtype_o) {
    flashcore_attention a = problem(), typed = a;
    typed.o.data = o_narrow, typed.dtype_o = dtype_o;
    forward(&a), forward(&typed);
    const double relative = dtype_o == FLASHCORE_F16 ? 5e-4 : dtype_o == FLASHCORE_BF16 ? 4e-3 : dtype_o == FLASHCORE_E4M3 ? 0.0626 : 0.126;
    for (int i = 0; i < COUNT(o); ++i) {
      const double got = flashcore_load(o_narrow, dtype_o, i);
      CHECK(fabs(got - (double)o[i]) <= relative * fabs((double)o[i]) + 1e-3);
    }
  }
}

static void descales_multiply_what_is_stored(void) {
  static float q_fp8[COUNT(q)], k_fp8[COUNT(k)], v_fp8[COUNT(v)];
  const float q_factor[kBatch * kHeadsQ] = {0.5f, 2.f, 0.25f, 1.f, 1.5f, 0.75f, 3.f, 0.125f}, k_factor[kHeadsKv] = {0.5f, 4.f},
                                v_factor[1] = {0.375f};
  flashcore_attention a = problem(), fp8 = twin(&a);
  narrow(FLASHCORE_E4M3, q, q_fp8, COUNT(q)), narrow(FLASHCORE_E4M3, k, k_fp8, COUNT(k)), narrow(FLASHCORE_E4M3, v, v_fp8, COUNT(v));
  for (int i = 0; i < COUNT(q); ++i) q[i] *= q_factor[i / (kSeqQ * kHeadsQ * kDimQk) * kHeadsQ + i / kDimQk % kHeadsQ];
  for (int i = 0; i < COUNT(k); ++i) k[i] *= k_factor[i / kDimQk % kHeadsKv];
  for (int i = 0; i < COUNT(v); ++i) v[i] *= v_factor[0];
  fp8.q.data = q_fp8, fp8.k.data = k_fp8, fp8.v.data = v_fp8;
  fp8.dtype = FLASHCORE_E4M3, fp8.dtype_o = FLASHCORE_F32;
  fp8.q_descale.data = q_factor, fp8.q_descale.stride_b = kHeadsQ, fp8.q_descale.stride_h = 1;
  fp8.k_descale.data = k_factor, fp8.k_descale.stride_h = 1;
  fp8.v_descale.data = v_factor;
  forward(&a), forward(&fp8);
  for (int i = 0; i < COUNT(o); ++i) CHECK_NEAR((double)other_o[i], (double)o[i], 1e-6);
  for (int i = 0; i < COUNT(lse); ++i) CHECK_NEAR((double)other_lse[i], (double)lse[i], 1e-6);
}

static void negative_or_nan_descale_gives_nan_where_a_key_is_seen(void) {
  static const int32_t keys[kBatch] = {kSeqKv, 0};
  static float k_fp8[COUNT(k)], v_fp8[COUNT(v)];
  const float bad[2] = {-1.f, NAN};
  for (int n = 0; n < 4; ++n) {
    flashcore_attention a = problem();
    flashcore_descale *d = n < 2 ? &a.k_descale : &a.v_descale;
    narrow(FLASHCORE_E4M3, k, k_fp8, COUNT(k)), narrow(FLASHCORE_E4M3, v, v_fp8, COUNT(v));
    a.k.data = k_fp8, a.v.data = v_fp8, a.dtype_kv = FLASHCORE_E4M3, a.seqlens_kv = keys;
    d->data = &bad[n % 2];
    forward(&a);
    for (int i = 0; i < COUNT(o) / kBatch; ++i) CHECK(isnan(o[i]) && o[COUNT(o) / kBatch + i] == 0.f);
    for (int i = 0; i < COUNT(lse) / kBatch; ++i) CHECK(isnan(lse[i]) == (n < 2) && lse[COUNT(lse) / kBatch + i] == -INFINITY);
  }
}

/* An fp8 O of factors per batch entry and head against an fp32 one that is divided here. */
static void output_descales_divide_before_the_rounding(void) {
  static uint8_t o_fp8[COUNT(o)];
  const float factor[kBatch * kHeadsQ] = {0.5f, 0.01f, 3.f, 1.f, 0.07f, 0.001f, 20.f, 1e-30f};
  for (int32_t dtype_o = FLASHCORE_E4M3; dtype_o <= FLASHCORE_E5M2; ++dtype_o) {
    const double largest = dtype_o == FLASHCORE_E4M3 ? 448.0 : 57344.0;
    int saturated = 0;
    flashcore_attention a = problem(), fp8 = a;
    fp8.o.data = o_fp8, fp8.dtype_o = dtype_o;
    fp8.o_descale.data = factor, fp8.o_descale.stride_b = kHeadsQ, fp8.o_descale.stride_h = 1;
    forward(&a), forward(&fp8);
    for (int i = 0; i < COUNT(o); ++i) {
      const double f = (double)factor[i / (kSeqQ * kHeadsQ * kDimV) * kHeadsQ + i / kDimV % kHeadsQ], x = (double)o[i] / f;
      const double got = flashcore_decode(dtype_o, o_fp8[i]), step = dtype_o == FLASHCORE_E4M3 ? 0.0626 : 0.126;
      saturated += fabs(got) == largest;
      if (fabs(x) >= largest) CHECK(got == (x > 0.0 ? largest : -largest));
      else CHECK(fabs(got - x) <= step * fabs(x) + 1e-3);
    }
    CHECK(saturated >= COUNT(o) / (kBatch * kHeadsQ)); /* the last head at least */
  }
}

static void amax_is_raised_to_the_largest_finite_output(void) {
  static const int32_t keys[kBatch] = {kSeqKv, 0};
  static uint8_t o_fp8[COUNT(o)];
  const float starts[3] = {0.f, -5.f, 1e6f}, half = 0.5f;
  for (int n = 0; n < 3; ++n) {
    flashcore_attention a = problem(), fp8 = a;
    float amax = starts[n], expected = starts[n];
    v_row(0, 1, 0)[2] = INFINITY; /* a dim of infinities, and one of NaN: they do not count */
    v_row(0, 1, 1)[3] = NAN;
    fill(v_row(1, 0, 0), kSeqKv * kHeadsKv * kDimV, 1e9f); /* nor do keys past the end */
    a.seqlens_kv = fp8.seqlens_kv = keys;
    fp8.o.data = o_fp8, fp8.dtype_o = FLASHCORE_E4M3, fp8.o_descale.data = &half, fp8.o_amax = &amax;
    forward(&a), forward(&fp8);
    for (int i = 0; i < COUNT(o); ++i)
      if (isfinite(o[i]) && fabsf(o[i]) > expected) expected = fabsf(o[i]);
    CHECK(amax == expected && (n == 2 || expected > 0.f));
    CHECK(o_fp8[2] == 0x7e && isnan(flashcore_decode(FLASHCORE_E4M3, o_fp8[(kHeadsQ - 1) * kDimV + 3])));
  }
}

static void negative_or_nan_output_descale_gives_nan_where_a_key_is_seen(void) {
  static const int32_t keys[kBatch] = {kSeqKv, 0};
  static uint8_t o_fp8[COUNT(o)];
  const float bad[2] = {-1.f, NAN};
  for (int n = 0; n < 4; ++n) {
    flashcore_attention a = problem();
    a.o.data = o_fp8, a.dtype_o = FLASHCORE_E5M2, a.seqlens_kv = keys, a.o_descale.data = &bad[n % 2], a.sink = n < 2 ? NULL : sinks;
    forward(&a);
    for (int i = 0; i < COUNT(o) / kBatch; ++i)
      CHECK(isnan(flashcore_decode(FLASHCORE_E5M2, o_fp8[i])) && flashcore_decode(FLASHCORE_E5M2, o_fp8[COUNT(o) / kBatch + i]) == 0.0);
  }
}

static void backend_splits_and_workspace_do_not_matter(void) {
  flashcore_attention a = problem(), forced = twin(&a);
  forced.backend = FLASHCORE_BACKEND_QGMMA, forced.num_splits = 4;
  forward(&a), forward(&forced);
  CHECK(twins_agree());
}

int main(void) {
  RUN(every_combination_of_options_equals_the_softmax_written_out);
  RUN(equal_logits_give_the_mean_of_v_and_the_log_of_the_count);
  RUN(one_key_gives_its_v_whatever_its_logit);
  RUN(huge_logits_pick_the_largest_and_never_overflow);
  RUN(fully_masked_row_gives_zero_and_lse_minus_inf);
  RUN(bias_of_minus_inf_hides_like_a_mask);
  RUN(sink_only_row_gives_zero_and_the_sink_as_lse);
  RUN(no_keys_and_no_sink_give_zero_and_lse_minus_inf);
  RUN(windows_include_both_ends);
  RUN(causal_is_aligned_bottom_right_or_top_left);
  RUN(query_heads_read_the_kv_head_of_their_group);
  RUN(paged_keys_equal_unpaged_keys);
  RUN(keys_of_missing_pages_are_invisible);
  RUN(packed_sequences_equal_separate_calls);
  RUN(device_side_lengths_equal_shorter_tensors);
  RUN(broadcast_and_negative_strides_read_what_they_say);
  RUN(heads_before_sequence_is_only_another_layout);
  RUN(nan_in_unused_keys_never_reaches_an_output);
  RUN(nan_in_a_query_row_stays_in_that_row);
  RUN(two_halves_merged_by_lse_equal_the_whole);
  RUN(narrow_inputs_give_what_their_values_give);
  RUN(outputs_are_rounded_to_their_type);
  RUN(descales_multiply_what_is_stored);
  RUN(negative_or_nan_descale_gives_nan_where_a_key_is_seen);
  RUN(output_descales_divide_before_the_rounding);
  RUN(amax_is_raised_to_the_largest_finite_output);
  RUN(negative_or_nan_output_descale_gives_nan_where_a_key_is_seen);
  RUN(backend_splits_and_workspace_do_not_matter);
  return check_end();
}
