/* Descriptors that must be refused: each entry spoils one thing of a good one, and says with which status every entry point and backend must
 * answer. Nothing may be launched or written. */
#ifndef FLASHCORE_TESTS_BROKEN_CUH
#define FLASHCORE_TESTS_BROKEN_CUH

#include "flashcore.h"

#include <math.h>
#include <string>
#include <vector>

struct Breakage {
  const char *name;
  flashcore_status expected;
  void (*apply)(flashcore_attention &a);
};

template <typename T> static T *off_by_one_byte(T *p) { return (T *)((char *)p + 1); }
/* An aligned pointer where one is wanted; a refused call never reads it. */
static const int32_t *some_words(const flashcore_attention &a) { return (const int32_t *)((uintptr_t)a.q.data / 4 * 4); }

inline const std::vector<Breakage> &breakages() {
  using A = flashcore_attention;
  static const std::vector<Breakage> list = {
      {"struct_size", FLASHCORE_INVALID_STRUCT_SIZE, [](A &a) { a.struct_size = 7; }},
      {"dtype", FLASHCORE_INVALID_DTYPE, [](A &a) { a.dtype = 9; }},
      {"dtype_kv", FLASHCORE_INVALID_DTYPE, [](A &a) { a.dtype_kv = -1; }},
      {"dtype_o", FLASHCORE_INVALID_DTYPE, [](A &a) { a.dtype_o = 6; }},
      {"batch_zero", FLASHCORE_INVALID_SIZE, [](A &a) { a.batch = 0; }},
      {"heads_q_negative", FLASHCORE_INVALID_SIZE, [](A &a) { a.heads_q = -1; }},
      {"group_does_not_divide", FLASHCORE_INVALID_GROUP, [](A &a) { a.heads_kv = a.heads_q + 1; }},
      {"seq_q_zero", FLASHCORE_INVALID_SIZE, [](A &a) { a.seq_q = 0; }},
      {"seq_kv_negative", FLASHCORE_INVALID_SIZE, [](A &a) { a.seq_kv = -1; }},
      {"seq_kv_too_long", FLASHCORE_INVALID_SIZE, [](A &a) { a.seq_kv = FLASHCORE_MAX_SEQ + 1; }},
      {"dim_qk_too_large", FLASHCORE_INVALID_SIZE, [](A &a) { a.dim_qk = FLASHCORE_MAX_DIM + 1; }},
      {"dim_v_zero", FLASHCORE_INVALID_SIZE, [](A &a) { a.dim_v = 0; }},
      {"q_null", FLASHCORE_NULL_POINTER, [](A &a) { a.q.data = nullptr; }},
      {"k_null", FLASHCORE_NULL_POINTER, [](A &a) { a.k.data = nullptr, a.seq_kv = a.seq_kv > 0 ? a.seq_kv : 1; }},
      {"v_null", FLASHCORE_NULL_POINTER, [](A &a) { a.v.data = nullptr, a.seq_kv = a.seq_kv > 0 ? a.seq_kv : 1; }},
      {"o_null", FLASHCORE_NULL_POINTER, [](A &a) { a.o.data = nullptr; }},
      {"q_misaligned", FLASHCORE_MISALIGNED, [](A &a) { a.q.data = off_by_one_byte((char *)a.q.data); }},
      {"o_misaligned", FLASHCORE_MISALIGNED, [](A &a) { a.o.data = off_by_one_byte((char *)a.o.data); }},
      {"lse_misaligned", FLASHCORE_MISALIGNED, [](A &a) { a.lse = (float *)off_by_one_byte((char *)a.q.data); }},
      {"alibi_misaligned", FLASHCORE_MISALIGNED, [](A &a) { a.alibi_slopes = (float *)off_by_one_byte((char *)a.q.data); }},
      {"q_offset_overflow", FLASHCORE_OFFSET_OVERFLOW,
       [](A &a) { a.q.stride_s = INT64_MAX / 2, a.seq_q = a.seq_q > 4 ? a.seq_q : 4, a.total_q = a.total_q > 4 ? a.total_q : 4; }},
      {"o_stride_zero", FLASHCORE_INVALID_STRIDE, [](A &a) { a.o.stride_s = 0, a.seq_q = a.seq_q > 1 ? a.seq_q : 2; }},
      {"o_is_q", FLASHCORE_ALIASED_OUTPUT, [](A &a) { a.o.data = a.q.data; }},
      {"scale_nan", FLASHCORE_INVALID_SCALE, [](A &a) { a.scale = NAN; }},
      {"scale_negative", FLASHCORE_INVALID_SCALE, [](A &a) { a.scale = -1.f; }},
      {"scale_infinite", FLASHCORE_INVALID_SCALE, [](A &a) { a.scale = INFINITY; }},
      {"softcap_negative", FLASHCORE_INVALID_SCALE, [](A &a) { a.softcap = -1.f; }},
      {"softcap_nan", FLASHCORE_INVALID_SCALE, [](A &a) { a.softcap = NAN; }},
      {"causal", FLASHCORE_INVALID_MASK, [](A &a) { a.causal = 3; }},
      {"window", FLASHCORE_INVALID_MASK, [](A &a) { a.window = 2; }},
      {"window_left", FLASHCORE_INVALID_MASK, [](A &a) { a.window = 1, a.window_left = -2; }},
      {"window_right", FLASHCORE_INVALID_MASK, [](A &a) { a.window = 1, a.window_right = -7; }},
      {"lse_base2", FLASHCORE_INVALID_SCALE, [](A &a) { a.lse_base2 = 2; }},
      {"bias_dtype", FLASHCORE_INVALID_DTYPE, [](A &a) { a.bias = a.q.data, a.bias_dtype = FLASHCORE_E4M3; }},
      {"total_q", FLASHCORE_INVALID_LENGTHS, [](A &a) { a.cu_seqlens_q = some_words(a), a.total_q = 0; }},
      {"page_size", FLASHCORE_INVALID_PAGE_TABLE, [](A &a) { a.page_table = some_words(a), a.page_size = 0, a.num_pages = 4; }},
      {"num_pages", FLASHCORE_INVALID_PAGE_TABLE, [](A &a) { a.page_table = some_words(a), a.page_size = 16, a.num_pages = 0; }},
      {"num_splits_negative", FLASHCORE_INVALID_SPLIT, [](A &a) { a.num_splits = -1; }},
      {"split_len_not_a_multiple", FLASHCORE_INVALID_SPLIT, [](A &a) { a.split_len = 63; }},
      {"both_splits", FLASHCORE_INVALID_SPLIT, [](A &a) { a.num_splits = 2, a.split_len = 64; }},
      {"amax_without_fp8_o", FLASHCORE_INVALID_SCALE, [](A &a) { a.o_amax = (float *)a.o.data; }},
      {"descale_without_fp8", FLASHCORE_INVALID_SCALE, [](A &a) { a.q_descale.data = (const float *)a.q.data; }},
  };
  return list;
}

/* "": the status that the breakage (counted from 1) must give. */
inline std::string wrong_refusal(int broken, flashcore_status status) {
  const Breakage &b = breakages()[(size_t)broken - 1];
  return status == b.expected ? "" : std::string(b.name) + " must give status " + std::to_string(b.expected) + ", not " + std::to_string(status);
}

#endif
