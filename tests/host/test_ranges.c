/* Demonstrates lengths, visible keys and offsets: against brute force, against hostile device data, and past 2^31 elements.
 *   cc -std=c11 -I<repository> tests/host/test_ranges.c -lm */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore.h"

#include "check.h"

static flashcore_attention with_rules(int causal, int window, int left, int right) {
  flashcore_attention a, resolved;
  flashcore_init(&a);
  a.dtype = FLASHCORE_F32;
  a.dim_qk = 64;
  a.causal = causal;
  a.window = window;
  a.window_left = left, a.window_right = right;
  flashcore_resolve(&a, &resolved);
  return resolved;
}

/* The contract's words: both ends of the window inclusive, -1 unbounded, causal aligned bottom-right or top-left. */
static int visible(int causal, int window, int left, int right, int i, int j, int len_q, int len_kv) {
  const int offset = len_kv - len_q;
  if (j < 0 || j >= len_kv) return 0;
  if (causal == FLASHCORE_CAUSAL_BOTTOM_RIGHT && j > i + offset) return 0;
  if (causal == FLASHCORE_CAUSAL_TOP_LEFT && j > i) return 0;
  if (window && left >= 0 && j < i + offset - left) return 0;
  if (window && right >= 0 && j > i + offset + right) return 0;
  return 1;
}

static void compare_rows(int causal, int window, int left, int right, int len_q, int len_kv) {
  const flashcore_attention a = with_rules(causal, window, left, right);
  flashcore_range before = {0, -1000};
  for (int i = 0; i < len_q; ++i) {
    const flashcore_range r = flashcore_visible_keys(&a, i, len_q, len_kv);
    for (int j = -2; j < len_kv + 2; ++j) CHECK((j >= r.first && j < r.last) == visible(causal, window, left, right, i, j, len_q, len_kv));
    CHECK(r.first >= before.first && r.last >= before.last);
    before = r;
  }
}

static void visible_keys_match_brute_force_and_never_fall(void) {
  for (int causal = 0; causal <= 2; ++causal)
    for (int window = 0; window <= 1; ++window)
      for (int left = -1; left <= 3; ++left)
        for (int right = -1; right <= 3; ++right)
          for (int len_q = 1; len_q <= 7; ++len_q)
            for (int len_kv = 0; len_kv <= 7; ++len_kv) compare_rows(causal, window, left, right, len_q, len_kv);
}

static void visible_keys_hold_at_the_longest_sequences(void) {
  const int32_t most = FLASHCORE_MAX_SEQ;
  flashcore_attention a = with_rules(FLASHCORE_CAUSAL_NONE, 1, INT32_MAX, INT32_MAX);
  flashcore_range r = flashcore_visible_keys(&a, most - 1, most, most);
  CHECK(r.first == 0 && r.last == most);
  r = flashcore_visible_keys(&a, 0, most, 1);
  CHECK(r.first == 0 && r.last == 1);
  a = with_rules(FLASHCORE_CAUSAL_BOTTOM_RIGHT, 0, 0, 0);
  r = flashcore_visible_keys(&a, 0, 1, most);
  CHECK(r.first == 0 && r.last == most);
  r = flashcore_visible_keys(&a, 0, most, 1);
  CHECK(r.first >= r.last);
}

static void sequences_without_lengths_have_the_sizes_of_the_descriptor(void) {
  flashcore_attention a = with_rules(0, 0, 0, 0);
  a.seq_q = 5, a.seq_kv = 9;
  a.q.stride_b = 10, a.k.stride_b = -20, a.v.stride_b = 0, a.o.stride_b = 40;
  const flashcore_sequence s = flashcore_sequence_at(&a, 3);
  CHECK(s.len_q == 5 && s.len_kv == 9);
  CHECK(s.q == 30 && s.k == -60 && s.v == 0 && s.o == 120);
}

static void packed_sequences_start_at_their_rows(void) {
  const int32_t cu_q[] = {0, 3, 3, 8}, cu_kv[] = {0, 4, 10, 11}, used[] = {2, 5, 0};
  flashcore_attention a = with_rules(0, 0, 0, 0);
  a.seq_q = 5, a.seq_kv = 6, a.total_q = 8, a.total_kv = 11;
  a.cu_seqlens_q = cu_q, a.cu_seqlens_kv = cu_kv;
  a.q.stride_s = 7, a.k.stride_s = 11, a.v.stride_s = 13, a.o.stride_s = 17;
  a.q.stride_b = a.k.stride_b = a.v.stride_b = a.o.stride_b = 100000; /* not for packed tensors */
  flashcore_sequence s = flashcore_sequence_at(&a, 1);
  CHECK(s.len_q == 0 && s.len_kv == 6 && s.q == 3 * 7 && s.k == 4 * 11 && s.v == 4 * 13 && s.o == 3 * 17);
  a.seqlens_kv = used;
  s = flashcore_sequence_at(&a, 1);
  CHECK(s.len_kv == 5);
  s = flashcore_sequence_at(&a, 2);
  CHECK(s.len_q == 5 && s.len_kv == 0 && s.q == 3 * 7);
}

static void hostile_lengths_stay_inside_the_tensors(void) {
  const int32_t hostile[] = {INT32_MIN, -5, -1, 0, 1, 7, 8, 9, 1000, INT32_MAX};
  const int n = (int)(sizeof hostile / sizeof hostile[0]);
  flashcore_attention a = with_rules(0, 0, 0, 0);
  a.seq_q = 5, a.seq_kv = 6, a.total_q = 8, a.total_kv = 9;
  a.q.stride_s = a.k.stride_s = a.v.stride_s = a.o.stride_s = 1;
  for (int first = 0; first < n; ++first)
    for (int second = 0; second < n; ++second)
      for (int used = 0; used < n; ++used) {
        const int32_t cu[2] = {hostile[first], hostile[second]};
        a.cu_seqlens_q = a.cu_seqlens_kv = cu;
        a.seqlens_q = a.seqlens_kv = &hostile[used];
        const flashcore_sequence s = flashcore_sequence_at(&a, 0);
        CHECK(s.len_q >= 0 && s.len_q <= 5 && s.q >= 0 && s.q + s.len_q <= 8 && s.o == s.q);
        CHECK(s.len_kv >= 0 && s.len_kv <= 6 && s.k >= 0 && s.k + s.len_kv <= 9 && s.v == s.k);
      }
}

static void offsets_pass_2_to_the_31(void) {
  const int32_t pages[] = {0, 70000, 3};
  flashcore_attention a = with_rules(0, 0, 0, 0);
  a.q.stride_b = (int64_t)1 << 33;
  a.k.stride_s = 4096;
  CHECK(flashcore_sequence_at(&a, 1000).q == (int64_t)1000 << 33);
  CHECK(flashcore_key_offset(&a, &a.k, 5, 0, FLASHCORE_MAX_SEQ - 1) == 5 + ((int64_t)FLASHCORE_MAX_SEQ - 1) * 4096);
  a.k.stride_s = -4096;
  CHECK(flashcore_key_offset(&a, &a.k, 5, 0, FLASHCORE_MAX_SEQ - 1) == 5 - ((int64_t)FLASHCORE_MAX_SEQ - 1) * 4096);
  a.page_table = pages, a.page_size = 16, a.num_pages = 70001;
  a.k.stride_b = 65536, a.k.stride_s = 4096;
  CHECK(flashcore_key_offset(&a, &a.k, 0, 0, 16 + 5) == (int64_t)70000 * 65536 + 5 * 4096);
}

static void pages_outside_the_pool_are_not_there(void) {
  const int32_t pages[] = {-1, 4, 3, INT32_MIN, INT32_MAX, 0};
  flashcore_attention a = with_rules(0, 0, 0, 0);
  a.page_table = pages, a.page_table_stride_b = 3, a.page_size = 2, a.num_pages = 4;
  a.k.stride_b = 100, a.k.stride_s = 10;
  CHECK(flashcore_key_offset(&a, &a.k, 0, 0, 0) == FLASHCORE_NO_KEY);
  CHECK(flashcore_key_offset(&a, &a.k, 0, 0, 3) == FLASHCORE_NO_KEY);
  CHECK(flashcore_key_offset(&a, &a.k, 0, 0, 5) == 310);
  CHECK(flashcore_key_offset(&a, &a.k, 0, 1, 1) == FLASHCORE_NO_KEY);
  CHECK(flashcore_key_offset(&a, &a.k, 0, 1, 2) == FLASHCORE_NO_KEY);
  CHECK(flashcore_key_offset(&a, &a.k, 0, 1, 5) == 10);
}

static void any_offset_may_be_a_key(void) { /* -1 too, where strides are negative */
  flashcore_attention a = with_rules(0, 0, 0, 0);
  a.k.stride_s = -1;
  CHECK(flashcore_key_offset(&a, &a.k, 0, 0, 1) == -1);
}

static void defaults_are_written_out_once(void) {
  flashcore_attention a = with_rules(0, 0, 3, 4);
  CHECK(a.window_left == FLASHCORE_UNBOUNDED && a.window_right == FLASHCORE_UNBOUNDED);
  CHECK(a.dtype_kv == FLASHCORE_F32 && a.dtype_o == FLASHCORE_F32 && a.bias_dtype == FLASHCORE_F32);
  CHECK(a.scale == 0.125f);
  a = with_rules(0, 1, 3, -1);
  CHECK(a.window_left == 3 && a.window_right == FLASHCORE_UNBOUNDED);
  flashcore_attention fp8, resolved;
  flashcore_init(&fp8);
  fp8.dtype = FLASHCORE_E4M3, fp8.dim_qk = 1, fp8.scale = 0.5f;
  flashcore_resolve(&fp8, &resolved);
  CHECK(resolved.dtype_kv == FLASHCORE_E4M3 && resolved.dtype_o == FLASHCORE_BF16 && resolved.scale == 0.5f);
}

static void strides_that_nothing_steps_along_become_0(void) {
  static int32_t ints[4];
  flashcore_attention a, r;
  flashcore_init(&a);
  a.dtype = FLASHCORE_F32, a.dim_qk = 8;
  a.batch = 1, a.heads_q = 4, a.heads_kv = 1, a.seq_q = 1, a.seq_kv = 2;
  a.q = a.k = a.v = a.o = flashcore_strided(ints, 3, 5, 7);
  flashcore_resolve(&a, &r);
  CHECK(r.q.stride_b == 0 && r.q.stride_s == 0 && r.q.stride_h == 7 && r.o.stride_b == 0 && r.o.stride_s == 0 && r.o.stride_h == 7);
  CHECK(r.k.stride_b == 0 && r.k.stride_s == 5 && r.k.stride_h == 0 && r.v.stride_b == 0 && r.v.stride_s == 5 && r.v.stride_h == 0);
  CHECK(r.q.data == ints && r.k.data == ints);

  a.batch = 2, a.cu_seqlens_q = ints, a.total_q = 2; /* packed: rows are counted in all, batch entries not at all */
  a.page_table = ints, a.num_pages = 3, a.page_size = 1;
  flashcore_resolve(&a, &r);
  CHECK(r.q.stride_b == 0 && r.q.stride_s == 5 && r.o.stride_b == 0 && r.o.stride_s == 5);
  CHECK(r.k.stride_b == 3 && r.k.stride_s == 0 && r.v.stride_b == 3 && r.v.stride_s == 0);
}

int main(void) {
  RUN(visible_keys_match_brute_force_and_never_fall);
  RUN(visible_keys_hold_at_the_longest_sequences);
  RUN(sequences_without_lengths_have_the_sizes_of_the_descriptor);
  RUN(packed_sequences_start_at_their_rows);
  RUN(hostile_lengths_stay_inside_the_tensors);
  RUN(offsets_pass_2_to_the_31);
  RUN(pages_outside_the_pool_are_not_there);
  RUN(any_offset_may_be_a_key);
  RUN(defaults_are_written_out_once);
  RUN(strides_that_nothing_steps_along_become_0);
  return check_end();
}
