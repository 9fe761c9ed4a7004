/* Demonstrates that every refusal has its own status, names the field, and writes nothing.
 *   cc -std=c11 -I<repository> tests/host/test_validation.c -lm */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore.h"

#include "check.h"

#include <string.h>

static float q_data[256], k_data[256], v_data[256], o_data[256], lse_data[64], floats[64];
static int32_t ints[64];
static uint32_t mask_words[64];

/* An address one byte past an aligned one. */
static void *odd(void *p) { return (char *)p + 1; }

/* A small fp32 problem that is accepted: (2, 3 or 5, 4 or 2, 4). */
static flashcore_attention accepted(void) {
  flashcore_attention a;
  flashcore_init(&a);
  a.dtype = FLASHCORE_F32;
  a.batch = 2;
  a.heads_q = 4, a.heads_kv = 2;
  a.seq_q = 3, a.seq_kv = 5;
  a.dim_qk = a.dim_v = 4;
  a.q = flashcore_bshd(q_data, 3, 4, 4), a.k = flashcore_bshd(k_data, 5, 2, 4);
  a.v = flashcore_bshd(v_data, 5, 2, 4), a.o = flashcore_bshd(o_data, 3, 4, 4);
  a.lse = lse_data;
  return a;
}

static void pack_q(flashcore_attention *a) { a->cu_seqlens_q = ints, a->total_q = 6; }
static void pack_kv(flashcore_attention *a) { a->cu_seqlens_kv = ints, a->total_kv = 10; }
static void page(flashcore_attention *a) { a->page_table = ints, a->page_size = 4, a->num_pages = 3, a->page_table_stride_b = 2; }
static void make_fp8(flashcore_attention *a) { a->dtype = FLASHCORE_E4M3, a->dtype_o = FLASHCORE_F32; }
static void make_fp8_o(flashcore_attention *a) { a->dtype_o = FLASHCORE_E5M2, a->o_amax = floats; }
static void wide(flashcore_attention *a) { a->batch = INT32_MAX, a->heads_q = 1 << 20, a->heads_kv = 1; }

#define FAR_AWAY ((int64_t)1 << 61)

/* name of the change, status, field, the change */
#define REFUSALS(X)                                                                                                                                  \
  X(struct_size_of_another_version, FLASHCORE_INVALID_STRUCT_SIZE, "struct_size", a->struct_size -= 8)                                               \
  X(struct_never_initialised, FLASHCORE_INVALID_STRUCT_SIZE, "struct_size", a->struct_size = 0)                                                      \
  X(dtype_missing, FLASHCORE_INVALID_DTYPE, "dtype", a->dtype = 0)                                                                                   \
  X(dtype_unknown, FLASHCORE_INVALID_DTYPE, "dtype", a->dtype = 6)                                                                                   \
  X(dtype_kv_unknown, FLASHCORE_INVALID_DTYPE, "dtype_kv", a->dtype_kv = -1)                                                                         \
  X(dtype_o_unknown, FLASHCORE_INVALID_DTYPE, "dtype_o", a->dtype_o = 9)                                                                             \
  X(bias_dtype_fp8, FLASHCORE_INVALID_DTYPE, "bias_dtype", a->bias_dtype = FLASHCORE_E4M3)                                                           \
  X(bias_dtype_fp8_by_default, FLASHCORE_INVALID_DTYPE, "bias_dtype", make_fp8(a); a->bias = floats)                                                 \
  X(batch_zero, FLASHCORE_INVALID_SIZE, "batch", a->batch = 0)                                                                                       \
  X(batch_negative, FLASHCORE_INVALID_SIZE, "batch", a->batch = -2)                                                                                  \
  X(heads_q_zero, FLASHCORE_INVALID_SIZE, "heads_q", a->heads_q = 0)                                                                                 \
  X(heads_kv_zero, FLASHCORE_INVALID_SIZE, "heads_kv", a->heads_kv = 0)                                                                              \
  X(seq_q_zero, FLASHCORE_INVALID_SIZE, "seq_q", a->seq_q = 0)                                                                                       \
  X(seq_q_above_limit, FLASHCORE_INVALID_SIZE, "seq_q", a->seq_q = FLASHCORE_MAX_SEQ + 1)                                                            \
  X(seq_kv_negative, FLASHCORE_INVALID_SIZE, "seq_kv", a->seq_kv = -1)                                                                               \
  X(seq_kv_above_limit, FLASHCORE_INVALID_SIZE, "seq_kv", a->seq_kv = FLASHCORE_MAX_SEQ + 1)                                                         \
  X(dim_qk_zero, FLASHCORE_INVALID_SIZE, "dim_qk", a->dim_qk = 0)                                                                                    \
  X(dim_qk_above_limit, FLASHCORE_INVALID_SIZE, "dim_qk", a->dim_qk = 513)                                                                           \
  X(dim_v_zero, FLASHCORE_INVALID_SIZE, "dim_v", a->dim_v = 0)                                                                                       \
  X(dim_v_above_limit, FLASHCORE_INVALID_SIZE, "dim_v", a->dim_v = 513)                                                                              \
  X(rows_above_limit, FLASHCORE_INVALID_SIZE, "batch", wide(a))                                                                                      \
  X(group_that_does_not_divide, FLASHCORE_INVALID_GROUP, "heads_kv", a->heads_kv = 3)                                                                \
  X(more_kv_heads_than_q_heads, FLASHCORE_INVALID_GROUP, "heads_kv", a->heads_kv = 8)                                                                \
  X(q_null, FLASHCORE_NULL_POINTER, "q.data", a->q.data = NULL)                                                                                      \
  X(k_null, FLASHCORE_NULL_POINTER, "k.data", a->k.data = NULL)                                                                                      \
  X(v_null, FLASHCORE_NULL_POINTER, "v.data", a->v.data = NULL)                                                                                      \
  X(o_null, FLASHCORE_NULL_POINTER, "o.data", a->o.data = NULL)                                                                                      \
  X(q_misaligned, FLASHCORE_MISALIGNED, "q.data", a->q.data = odd(q_data))                                                                           \
  X(k_misaligned, FLASHCORE_MISALIGNED, "k.data", a->k.data = odd(k_data))                                                                           \
  X(v_misaligned_for_two_bytes, FLASHCORE_MISALIGNED, "v.data", a->dtype_kv = FLASHCORE_BF16; a->v.data = odd(v_data))                               \
  X(o_misaligned, FLASHCORE_MISALIGNED, "o.data", a->o.data = odd(o_data))                                                                           \
  X(lse_misaligned, FLASHCORE_MISALIGNED, "lse", a->lse = (float *)odd(lse_data))                                                                    \
  X(sink_misaligned, FLASHCORE_MISALIGNED, "sink", a->sink = (float *)odd(floats))                                                                   \
  X(alibi_misaligned, FLASHCORE_MISALIGNED, "alibi_slopes", a->alibi_slopes = (float *)odd(floats))                                                  \
  X(bias_misaligned, FLASHCORE_MISALIGNED, "bias", a->bias = odd(floats))                                                                            \
  X(mask_misaligned, FLASHCORE_MISALIGNED, "mask_bits", a->mask_bits = (uint32_t *)odd(mask_words))                                                  \
  X(cu_seqlens_q_misaligned, FLASHCORE_MISALIGNED, "cu_seqlens_q", pack_q(a); a->cu_seqlens_q = (int32_t *)odd(ints))                                \
  X(cu_seqlens_kv_misaligned, FLASHCORE_MISALIGNED, "cu_seqlens_kv", pack_kv(a); a->cu_seqlens_kv = (int32_t *)odd(ints))                            \
  X(seqlens_q_misaligned, FLASHCORE_MISALIGNED, "seqlens_q", a->seqlens_q = (int32_t *)odd(ints))                                                    \
  X(seqlens_kv_misaligned, FLASHCORE_MISALIGNED, "seqlens_kv", a->seqlens_kv = (int32_t *)odd(ints))                                                 \
  X(page_table_misaligned, FLASHCORE_MISALIGNED, "page_table", page(a); a->page_table = (int32_t *)odd(ints))                                        \
  X(descale_misaligned, FLASHCORE_MISALIGNED, "q_descale", make_fp8(a); a->q_descale.data = (float *)odd(floats))                                    \
  X(o_descale_misaligned, FLASHCORE_MISALIGNED, "o_descale", make_fp8_o(a); a->o_descale.data = (float *)odd(floats))                                \
  X(o_amax_misaligned, FLASHCORE_MISALIGNED, "o_amax", make_fp8_o(a); a->o_amax = (float *)odd(floats))                                              \
  X(o_stride_b_zero, FLASHCORE_INVALID_STRIDE, "o.stride_b", a->o.stride_b = 0)                                                                      \
  X(o_stride_s_zero, FLASHCORE_INVALID_STRIDE, "o.stride_s", a->o.stride_s = 0)                                                                      \
  X(o_stride_h_zero, FLASHCORE_INVALID_STRIDE, "o.stride_h", a->o.stride_h = 0)                                                                      \
  X(o_stride_s_zero_in_packed_rows, FLASHCORE_INVALID_STRIDE, "o.stride_s", pack_q(a); a->seq_q = 1; a->o.stride_s = 0)                              \
  X(q_stride_b_overflows, FLASHCORE_OFFSET_OVERFLOW, "q.stride_b", a->q.stride_b = FAR_AWAY)                                                         \
  X(q_stride_s_overflows, FLASHCORE_OFFSET_OVERFLOW, "q.stride_s", a->q.stride_s = -FAR_AWAY)                                                        \
  X(q_stride_h_overflows, FLASHCORE_OFFSET_OVERFLOW, "q.stride_h", a->q.stride_h = INT64_MAX)                                                        \
  X(k_stride_b_overflows, FLASHCORE_OFFSET_OVERFLOW, "k.stride_b", a->k.stride_b = INT64_MIN)                                                        \
  X(k_stride_s_overflows, FLASHCORE_OFFSET_OVERFLOW, "k.stride_s", a->k.stride_s = FAR_AWAY / 4)                                                     \
  X(k_stride_h_overflows, FLASHCORE_OFFSET_OVERFLOW, "k.stride_h", a->k.stride_h = FAR_AWAY)                                                         \
  X(v_stride_b_overflows, FLASHCORE_OFFSET_OVERFLOW, "v.stride_b", a->v.stride_b = FAR_AWAY)                                                         \
  X(v_stride_s_overflows, FLASHCORE_OFFSET_OVERFLOW, "v.stride_s", a->v.stride_s = FAR_AWAY)                                                         \
  X(v_stride_h_overflows, FLASHCORE_OFFSET_OVERFLOW, "v.stride_h", a->v.stride_h = FAR_AWAY)                                                         \
  X(o_stride_b_overflows, FLASHCORE_OFFSET_OVERFLOW, "o.stride_b", a->o.stride_b = FAR_AWAY)                                                         \
  X(o_stride_s_overflows, FLASHCORE_OFFSET_OVERFLOW, "o.stride_s", a->o.stride_s = FAR_AWAY)                                                         \
  X(o_stride_h_overflows, FLASHCORE_OFFSET_OVERFLOW, "o.stride_h", a->o.stride_h = FAR_AWAY)                                                         \
  X(packed_q_stride_s_overflows, FLASHCORE_OFFSET_OVERFLOW, "q.stride_s", pack_q(a); a->total_q = INT32_MAX; a->q.stride_s = FAR_AWAY >> 30)         \
  X(page_stride_overflows, FLASHCORE_OFFSET_OVERFLOW, "k.stride_b", page(a); a->num_pages = INT32_MAX; a->k.stride_b = FAR_AWAY >> 30)               \
  X(page_table_stride_overflows, FLASHCORE_OFFSET_OVERFLOW, "page_table_stride_b", page(a); a->page_table_stride_b = FAR_AWAY)                       \
  X(alibi_stride_overflows, FLASHCORE_OFFSET_OVERFLOW, "alibi_stride_b", a->alibi_slopes = floats; a->alibi_stride_b = FAR_AWAY)                     \
  X(bias_stride_b_overflows, FLASHCORE_OFFSET_OVERFLOW, "bias_stride_b", a->bias = floats; a->bias_stride_b = FAR_AWAY)                              \
  X(bias_stride_h_overflows, FLASHCORE_OFFSET_OVERFLOW, "bias_stride_h", a->bias = floats; a->bias_stride_h = FAR_AWAY)                              \
  X(bias_stride_q_overflows, FLASHCORE_OFFSET_OVERFLOW, "bias_stride_q", a->bias = floats; a->bias_stride_q = FAR_AWAY)                              \
  X(bias_stride_kv_overflows, FLASHCORE_OFFSET_OVERFLOW, "bias_stride_kv", a->bias = floats; a->bias_stride_kv = FAR_AWAY)                           \
  X(mask_stride_b_overflows, FLASHCORE_OFFSET_OVERFLOW, "mask_stride_b", a->mask_bits = mask_words; a->mask_stride_b = FAR_AWAY)                     \
  X(mask_stride_h_overflows, FLASHCORE_OFFSET_OVERFLOW, "mask_stride_h", a->mask_bits = mask_words; a->mask_stride_h = FAR_AWAY)                     \
  X(mask_stride_q_overflows, FLASHCORE_OFFSET_OVERFLOW, "mask_stride_q", a->mask_bits = mask_words; a->mask_stride_q = FAR_AWAY)                     \
  X(descale_stride_overflows, FLASHCORE_OFFSET_OVERFLOW, "v_descale", make_fp8(a); a->v_descale.data = floats; a->v_descale.stride_h = FAR_AWAY)     \
  X(o_descale_stride_overflows, FLASHCORE_OFFSET_OVERFLOW, "o_descale", make_fp8_o(a); a->o_descale.data = floats + 1;                               \
    a->o_descale.stride_b = FAR_AWAY)                                                                                                                \
  X(scale_negative, FLASHCORE_INVALID_SCALE, "scale", a->scale = -1.f)                                                                               \
  X(scale_infinite, FLASHCORE_INVALID_SCALE, "scale", a->scale = INFINITY)                                                                           \
  X(scale_nan, FLASHCORE_INVALID_SCALE, "scale", a->scale = NAN)                                                                                     \
  X(softcap_negative, FLASHCORE_INVALID_SCALE, "softcap", a->softcap = -1.f)                                                                         \
  X(softcap_infinite, FLASHCORE_INVALID_SCALE, "softcap", a->softcap = INFINITY)                                                                     \
  X(softcap_nan, FLASHCORE_INVALID_SCALE, "softcap", a->softcap = NAN)                                                                               \
  X(lse_base_neither_0_nor_1, FLASHCORE_INVALID_SCALE, "lse_base2", a->lse_base2 = 2)                                                                \
  X(q_descale_without_fp8, FLASHCORE_INVALID_SCALE, "q_descale", a->q_descale.data = floats)                                                         \
  X(k_descale_without_fp8, FLASHCORE_INVALID_SCALE, "k_descale", a->k_descale.data = floats)                                                         \
  X(v_descale_without_fp8_keys, FLASHCORE_INVALID_SCALE, "v_descale", make_fp8(a); a->dtype_kv = FLASHCORE_F16; a->v_descale.data = floats)          \
  X(o_descale_without_fp8_o, FLASHCORE_INVALID_SCALE, "o_descale", a->o_descale.data = floats)                                                       \
  X(o_descale_of_a_default_o, FLASHCORE_INVALID_SCALE, "o_descale", a->dtype = FLASHCORE_E4M3; a->o_descale.data = floats)                           \
  X(o_amax_without_fp8_o, FLASHCORE_INVALID_SCALE, "o_amax", make_fp8(a); a->o_amax = floats)                                                        \
  X(causal_unknown, FLASHCORE_INVALID_MASK, "causal", a->causal = 3)                                                                                 \
  X(causal_negative, FLASHCORE_INVALID_MASK, "causal", a->causal = -1)                                                                               \
  X(window_neither_0_nor_1, FLASHCORE_INVALID_MASK, "window", a->window = 128)                                                                       \
  X(window_left_below_minus_1, FLASHCORE_INVALID_MASK, "window_left", a->window = 1; a->window_left = -2)                                            \
  X(window_right_below_minus_1, FLASHCORE_INVALID_MASK, "window_right", a->window = 1; a->window_right = -2)                                         \
  X(packed_q_without_total, FLASHCORE_INVALID_LENGTHS, "total_q", a->cu_seqlens_q = ints)                                                            \
  X(packed_kv_without_total, FLASHCORE_INVALID_LENGTHS, "total_kv", a->cu_seqlens_kv = ints)                                                         \
  X(packed_q_total_past_its_offsets, FLASHCORE_INVALID_LENGTHS, "total_q", pack_q(a); a->total_q = (int64_t)1 << 31)                                 \
  X(page_table_without_page_size, FLASHCORE_INVALID_PAGE_TABLE, "page_size", page(a); a->page_size = 0)                                              \
  X(page_table_without_pages, FLASHCORE_INVALID_PAGE_TABLE, "num_pages", page(a); a->num_pages = 0)                                                  \
  X(page_table_stride_negative, FLASHCORE_INVALID_PAGE_TABLE, "page_table_stride_b", page(a); a->page_table_stride_b = -1)                           \
  X(page_table_with_packed_keys, FLASHCORE_INVALID_PAGE_TABLE, "page_table", page(a); pack_kv(a))                                                    \
  X(num_splits_negative, FLASHCORE_INVALID_SPLIT, "num_splits", a->num_splits = -1)                                                                  \
  X(split_len_negative, FLASHCORE_INVALID_SPLIT, "split_len", a->split_len = -64)                                                                    \
  X(split_len_not_a_multiple_of_64, FLASHCORE_INVALID_SPLIT, "split_len", a->split_len = 100)                                                        \
  X(both_kinds_of_split, FLASHCORE_INVALID_SPLIT, "num_splits", a->split_len = 64; a->num_splits = 2)                                                \
  X(splits_beyond_any_workspace, FLASHCORE_INVALID_SPLIT, "num_splits", a->batch = 1 << 28; a->num_splits = INT32_MAX)                               \
  X(o_is_q, FLASHCORE_ALIASED_OUTPUT, "o.data", a->o.data = a->q.data)                                                                               \
  X(o_is_k, FLASHCORE_ALIASED_OUTPUT, "o.data", a->o.data = a->k.data)                                                                               \
  X(o_is_v, FLASHCORE_ALIASED_OUTPUT, "o.data", a->o.data = a->v.data)                                                                               \
  X(o_amax_is_o, FLASHCORE_ALIASED_OUTPUT, "o_amax", make_fp8_o(a); a->o_amax = o_data)                                                              \
  X(o_amax_is_lse, FLASHCORE_ALIASED_OUTPUT, "o_amax", make_fp8_o(a); a->o_amax = lse_data)                                                          \
  X(o_amax_is_o_descale, FLASHCORE_ALIASED_OUTPUT, "o_amax", make_fp8_o(a); a->o_descale.data = floats)                                              \
  X(o_amax_is_sink, FLASHCORE_ALIASED_OUTPUT, "o_amax", make_fp8_o(a); a->sink = a->o_amax)                                                          \
  X(o_amax_is_workspace, FLASHCORE_ALIASED_OUTPUT, "o_amax", make_fp8_o(a); a->workspace = a->o_amax)                                                \
  X(backend_unknown, FLASHCORE_INVALID_BACKEND, "backend", a->backend = 7)                                                                           \
  X(backend_negative, FLASHCORE_INVALID_BACKEND, "backend", a->backend = -1)

/* name, the change: at the edge of what is allowed */
#define ACCEPTED(X)                                                                                                                                  \
  X(no_lse, a->lse = NULL)                                                                                                                           \
  X(no_keys, a->seq_kv = 0; a->k.data = a->v.data = NULL)                                                                                            \
  X(broadcast_inputs, a->q.stride_b = a->k.stride_h = a->v.stride_b = 0)                                                                             \
  X(o_stride_zero_where_never_stepped, a->batch = 1; a->o.stride_b = 0)                                                                              \
  X(stride_of_a_single_batch_is_ignored, a->batch = 1; a->q.stride_b = FAR_AWAY)                                                                     \
  X(packed_rows_ignore_the_batch_stride, pack_q(a); a->q.stride_b = 0; a->o.stride_b = 0)                                                            \
  X(windows_unbounded, a->window = 1; a->window_left = a->window_right = -1)                                                                         \
  X(window_sides_ignored_when_off, a->window_left = a->window_right = -7)                                                                            \
  X(one_split_with_a_split_length, a->num_splits = 1; a->split_len = 128)                                                                            \
  X(paged, page(a))                                                                                                                                  \
  X(packed, pack_q(a); pack_kv(a))                                                                                                                   \
  X(odd_address_for_one_byte, make_fp8(a); a->q.data = odd(q_data))                                                                                  \
  X(descales_for_fp8_keys_only, a->dtype_kv = FLASHCORE_E5M2; a->k_descale.data = a->v_descale.data = floats)                                        \
  X(descale_and_amax_of_an_fp8_o, make_fp8_o(a); a->o_descale.data = floats + 1; a->o_descale.stride_b = 4; a->o_descale.stride_h = 1)               \
  X(unused_strides_are_not_read, a->bias_stride_b = a->mask_stride_b = a->alibi_stride_b = FAR_AWAY)

typedef void (*change_function)(flashcore_attention *);

#define DEFINE_REFUSAL(name, status, field, change)                                                                                                  \
  static void refused_##name(flashcore_attention *a) { change; }
#define DEFINE_ACCEPTED(name, change)                                                                                                                \
  static void accepted_##name(flashcore_attention *a) { change; }
REFUSALS(DEFINE_REFUSAL)
ACCEPTED(DEFINE_ACCEPTED)

#define LIST_REFUSAL(name, status, field, change) {#name, status, field, refused_##name},
#define LIST_ACCEPTED(name, change)               {#name, FLASHCORE_OK, "", accepted_##name},
static const struct {
  const char *name;
  flashcore_status status;
  const char *field;
  change_function change;
} refusals[] = {REFUSALS(LIST_REFUSAL)}, edges[] = {ACCEPTED(LIST_ACCEPTED)};
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static void fill_outputs(float x) {
  for (size_t i = 0; i < COUNT(o_data); ++i) o_data[i] = x;
  for (size_t i = 0; i < COUNT(lse_data); ++i) lse_data[i] = x;
}

static int outputs_are(float x) {
  int same = 1;
  for (size_t i = 0; i < COUNT(o_data); ++i) same &= o_data[i] == x;
  for (size_t i = 0; i < COUNT(lse_data); ++i) same &= lse_data[i] == x;
  return same;
}

static void each_bad_field_has_its_status_and_is_named(void) {
  for (size_t i = 0; i < COUNT(refusals); ++i) {
    flashcore_attention a = accepted();
    flashcore_error error;
    memset(&error, 0, sizeof error);
    refusals[i].change(&a);
    const flashcore_status status = flashcore_reference_supported(&a, &error);
    const int named = error.field && strcmp(error.field, refusals[i].field) == 0;
    if (!CHECK(status == refusals[i].status) || !CHECK(named))
      printf("  %s: status %d, field %s: %s\n", refusals[i].name, (int)status, error.field ? error.field : "none", error.message);
    CHECK(strlen(error.message) > 10 && strlen(error.message) < sizeof error.message - 1);
  }
}

static void a_refused_call_writes_nothing_and_takes_no_error_struct(void) {
  for (size_t i = 0; i < COUNT(refusals); ++i) {
    flashcore_attention a = accepted();
    refusals[i].change(&a);
    fill_outputs(-7.f);
    CHECK(flashcore_reference_forward(&a, NULL) == refusals[i].status);
    CHECK(outputs_are(-7.f));
  }
}

static void each_status_of_the_descriptor_is_provoked(void) {
  for (int status = FLASHCORE_INVALID_STRUCT_SIZE; status <= FLASHCORE_INVALID_BACKEND; ++status) {
    int provoked = status == FLASHCORE_INVALID_WORKSPACE; /* needs a backend */
    for (size_t i = 0; i < COUNT(refusals); ++i) provoked |= (int)refusals[i].status == status;
    CHECK(provoked);
  }
}

static void edges_of_the_allowed_are_accepted(void) {
  for (size_t i = 0; i < COUNT(edges); ++i) {
    flashcore_attention a = accepted();
    flashcore_error error;
    edges[i].change(&a);
    if (!CHECK(flashcore_reference_supported(&a, &error) == FLASHCORE_OK)) printf("  %s: %s\n", edges[i].name, error.message);
  }
}

static void success_leaves_the_error_struct_alone(void) {
  flashcore_attention a = accepted();
  flashcore_error error, before;
  memset(&error, 0x5a, sizeof error);
  memset(&before, 0x5a, sizeof before);
  CHECK(flashcore_reference_supported(&a, &error) == FLASHCORE_OK);
  CHECK(flashcore_reference_forward(&a, &error) == FLASHCORE_OK);
  CHECK(memcmp(&error, &before, sizeof error) == 0);
}

static void value_limit_and_message_say_what_was_broken(void) {
  flashcore_attention a = accepted();
  flashcore_error error;
  a.heads_q = 8, a.heads_kv = 3;
  CHECK(flashcore_reference_supported(&a, &error) == FLASHCORE_INVALID_GROUP);
  CHECK(error.value == 3 && error.limit == 8);
  CHECK(strcmp(error.message, "heads_kv is 3: must divide heads_q = 8") == 0);
  a = accepted();
  a.dim_v = 600;
  CHECK(flashcore_reference_supported(&a, &error) == FLASHCORE_INVALID_SIZE);
  CHECK(error.value == 600 && error.limit == FLASHCORE_MAX_DIM);
  CHECK(strcmp(error.message, "dim_v is 600: must be at most 512") == 0);
}

static void null_descriptor_is_refused(void) {
  flashcore_error error;
  CHECK(flashcore_reference_supported(NULL, &error) == FLASHCORE_NULL_POINTER);
  CHECK(flashcore_reference_forward(NULL, NULL) == FLASHCORE_NULL_POINTER);
}

static void without_cuda_the_device_functions_say_so(void) {
  flashcore_attention a = accepted();
  flashcore_error error;
  flashcore_description description;
  flashcore_merge_args merge;
  size_t bytes = 0;
  memset(&error, 0, sizeof error);
  memset(&merge, 0, sizeof merge);
  CHECK(flashcore_supported(&a, -1, &error) == FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(error.field && strcmp(error.field, "backend") == 0 && strlen(error.message) > 10);
  CHECK(flashcore_forward(&a, NULL, NULL) == FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(flashcore_workspace_size(&a, 0, &bytes, NULL) == FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(flashcore_describe(&a, 0, &description, NULL) == FLASHCORE_BACKEND_NOT_COMPILED);
  CHECK(flashcore_merge(&merge, NULL, NULL) == FLASHCORE_BACKEND_NOT_COMPILED);
}

static void each_status_and_backend_has_words_of_its_own(void) {
  for (int i = 0; i <= FLASHCORE_CUDA_ERROR; ++i) {
    const char *words = flashcore_status_string((flashcore_status)i);
    CHECK(strlen(words) > 10 && words[strlen(words) - 1] == '.');
    for (int j = 0; j < i; ++j) CHECK(strcmp(words, flashcore_status_string((flashcore_status)j)) != 0);
  }
  for (int i = 0; i <= FLASHCORE_BACKEND_QGMMA; ++i)
    for (int j = 0; j < i; ++j) CHECK(strcmp(flashcore_backend_string((flashcore_backend)i), flashcore_backend_string((flashcore_backend)j)) != 0);
  CHECK(flashcore_version() == FLASHCORE_VERSION);
}

int main(void) {
  RUN(each_bad_field_has_its_status_and_is_named);
  RUN(a_refused_call_writes_nothing_and_takes_no_error_struct);
  RUN(each_status_of_the_descriptor_is_provoked);
  RUN(edges_of_the_allowed_are_accepted);
  RUN(success_leaves_the_error_struct_alone);
  RUN(value_limit_and_message_say_what_was_broken);
  RUN(null_descriptor_is_refused);
  RUN(without_cuda_the_device_functions_say_so);
  RUN(each_status_and_backend_has_words_of_its_own);
  return check_end();
}
