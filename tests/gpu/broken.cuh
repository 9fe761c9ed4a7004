/* Descriptors that must be refused: each entry spoils one thing of a good one. Which status and field each gets is shown by the host tests;
 * here: the refusal comes from every entry point alike, and nothing is launched or written. */
#ifndef FLASHCORE_TESTS_BROKEN_CUH
#define FLASHCORE_TESTS_BROKEN_CUH

#include "flashcore.h"

#include <math.h>
#include <vector>

struct Breakage {
  const char *name;
  void (*apply)(flashcore_attention &a);
};

template <typename T> static T *off_by_one_byte(T *p) { return (T *)((char *)p + 1); }

inline const std::vector<Breakage> &breakages() {
  using A = flashcore_attention;
  static const std::vector<Breakage> list = {
      {"struct_size", [](A &a) { a.struct_size = 7; }},
      {"dtype", [](A &a) { a.dtype = 9; }},
      {"dtype_kv", [](A &a) { a.dtype_kv = -1; }},
      {"dtype_o", [](A &a) { a.dtype_o = 6; }},
      {"batch_zero", [](A &a) { a.batch = 0; }},
      {"heads_q_negative", [](A &a) { a.heads_q = -1; }},
      {"group_does_not_divide", [](A &a) { a.heads_kv = a.heads_q + 1; }},
      {"seq_q_zero", [](A &a) { a.seq_q = 0; }},
      {"seq_kv_negative", [](A &a) { a.seq_kv = -1; }},
      {"seq_kv_too_long", [](A &a) { a.seq_kv = FLASHCORE_MAX_SEQ + 1; }},
      {"dim_qk_too_large", [](A &a) { a.dim_qk = FLASHCORE_MAX_DIM + 1; }},
      {"dim_v_zero", [](A &a) { a.dim_v = 0; }},
      {"q_null", [](A &a) { a.q.data = nullptr; }},
      {"k_null", [](A &a) { a.k.data = nullptr, a.seq_kv = a.seq_kv > 0 ? a.seq_kv : 1; }},
      {"v_null", [](A &a) { a.v.data = nullptr, a.seq_kv = a.seq_kv > 0 ? a.seq_kv : 1; }},
      {"o_null", [](A &a) { a.o.data = nullptr; }},
      {"q_misaligned", [](A &a) { a.q.data = off_by_one_byte((char *)a.q.data); }},
      {"o_misaligned", [](A &a) { a.o.data = off_by_one_byte((char *)a.o.data); }},
      {"lse_misaligned", [](A &a) { a.lse = (float *)off_by_one_byte((char *)a.q.data); }},
      {"alibi_misaligned", [](A &a) { a.alibi_slopes = (float *)off_by_one_byte((char *)a.q.data); }},
      {"q_offset_overflow",
       [](A &a) { a.q.stride_s = INT64_MAX / 2, a.seq_q = a.seq_q > 4 ? a.seq_q : 4, a.total_q = a.total_q > 4 ? a.total_q : 4; }},
      {"o_stride_zero", [](A &a) { a.o.stride_s = 0, a.seq_q = a.seq_q > 1 ? a.seq_q : 2; }},
      {"o_is_q", [](A &a) { a.o.data = a.q.data; }},
      {"scale_nan", [](A &a) { a.scale = NAN; }},
      {"scale_negative", [](A &a) { a.scale = -1.f; }},
      {"scale_infinite", [](A &a) { a.scale = INFINITY; }},
      {"softcap_negative", [](A &a) { a.softcap = -1.f; }},
      {"softcap_nan", [](A &a) { a.softcap = NAN; }},
      {"causal", [](A &a) { a.causal = 3; }},
      {"window", [](A &a) { a.window = 2; }},
      {"window_left", [](A &a) { a.window = 1, a.window_left = -2; }},
      {"window_right", [](A &a) { a.window = 1, a.window_right = -7; }},
      {"lse_base2", [](A &a) { a.lse_base2 = 2; }},
      {"bias_dtype", [](A &a) { a.bias = a.q.data, a.bias_dtype = FLASHCORE_E4M3; }},
      {"total_q", [](A &a) { a.cu_seqlens_q = (const int32_t *)a.q.data, a.total_q = 0; }},
      {"page_size", [](A &a) { a.page_table = (const int32_t *)a.q.data, a.page_size = 0, a.num_pages = 4; }},
      {"num_pages", [](A &a) { a.page_table = (const int32_t *)a.q.data, a.page_size = 16, a.num_pages = 0; }},
      {"num_splits_negative", [](A &a) { a.num_splits = -1; }},
      {"split_len_not_a_multiple", [](A &a) { a.split_len = 63; }},
      {"both_splits", [](A &a) { a.num_splits = 2, a.split_len = 64; }},
      {"descale_without_fp8", [](A &a) { a.q_descale.data = (const float *)a.q.data; }},
  };
  return list;
}

#endif
