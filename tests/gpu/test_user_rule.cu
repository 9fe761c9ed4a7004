/* A rule of the user's own, in each kernel that takes one, gives what the oracle gives when the descriptor says the same; so do a prologue and an
 * epilogue of the user's own that bring Q from, and O to, where the descriptor does not say.
 *
 * The oracle sees the whole descriptor. The kernel gets it without the part in question (bias or ALiBi), and a rule that does that part: so
 * batch, head, query, key and lengths that the rule is told must be right, and a rule must never be asked about a row or key that is not there
 * (the bias is poison beyond them). The file implements nothing of the library: kernels come from the headers, as in a user's file. */
#include "flashcore_wgmma.cuh"
#include "flashcore_wmma.cuh"
#include "harness.cuh"

namespace fc = flashcore;

/* ---- rules --------------------------------------------------------------------------------------------------------------------- */

struct bias_by_user {
  const float *data;
  int64_t stride_b, stride_h, stride_q, stride_kv;
  __device__ float operator()(const flashcore_attention &, float x, const fc::score_position &p) const {
    return x + data[p.batch * stride_b + p.head * stride_h + p.query * stride_q + p.key * stride_kv];
  }
  static bias_by_user take(flashcore_attention &a) {
    const bias_by_user rule = {(const float *)a.bias, a.bias_stride_b, a.bias_stride_h, a.bias_stride_q, a.bias_stride_kv};
    a.bias = nullptr;
    return rule;
  }
};

struct alibi_by_user {
  const float *slopes;
  int64_t stride_b;
  __device__ float operator()(const flashcore_attention &, float x, const fc::score_position &p) const {
    return x - slopes[p.batch * stride_b + p.head] * fabsf((float)(p.query + p.len_kv - p.len_q - p.key));
  }
  static alibi_by_user take(flashcore_attention &a) {
    const alibi_by_user rule = {a.alibi_slopes, a.alibi_stride_b};
    a.alibi_slopes = nullptr;
    return rule;
  }
};

/* Does nothing: what the tests must be able to tell from the rules above. */
template <typename Rule> struct forgotten {
  __device__ float operator()(const flashcore_attention &, float x, const fc::score_position &) const { return x; }
  static forgotten take(flashcore_attention &a) {
    Rule::take(a);
    return {};
  }
};

/* ---- launches ------------------------------------------------------------------------------------------------------------------ */

/* What kernels expect of a descriptor: the defaults filled in. */
static flashcore_attention resolved(flashcore_attention a) {
  if (!(a.scale > 0)) a.scale = 1.f / sqrtf((float)a.dim_qk);
  if (!a.dtype_kv) a.dtype_kv = a.dtype;
  if (!a.dtype_o) a.dtype_o = a.dtype;
  if (!a.bias_dtype) a.bias_dtype = a.dtype;
  if (!a.window || a.window_left < 0) a.window_left = FLASHCORE_UNBOUNDED;
  if (!a.window || a.window_right < 0) a.window_right = FLASHCORE_UNBOUNDED;
  return a;
}

static void allow_shared(const void *kernel, int bytes) { CUDA_OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)); }

static int ceil_div(int x, int y) { return (x + y - 1) / y; }

/* mma.sync, with packed heads where the queries are few, as the library's plan does it. */
template <typename Tile> struct with_mma {
  static constexpr const char *kName = "mma";
  static constexpr int kDim = Tile::kHeadDimQk, kType = fc::element<typename Tile::T>::kDtype, kMinArch = 80, kMaxArch = 999;
  static constexpr bool kAnyAlignment = true;

  template <typename Rule> static void launch(const flashcore_attention &a, const Rule &rule, int align) {
    const int group = a.heads_q / a.heads_kv, pack = a.seq_q * group <= Tile::kBlockQ ? group : 1;
    int64_t blocks;
    const fc::mma_schedule plan = fc::make_mma_schedule(a, Tile::kBlockQ, true, pack, fc::kLongestFirst, align, blocks);
    allow_shared((const void *)fc::mma_kernel<Tile, Rule>, Tile::kSharedBytes);
    fc::mma_kernel<Tile, Rule><<<(unsigned)blocks, Tile::kThreads, Tile::kSharedBytes>>>(a, plan, rule);
  }
};

template <typename Tile> struct with_wgmma {
  static constexpr const char *kName = "wgmma";
  static constexpr int kDim = Tile::kHeadDimQk, kType = fc::element<typename Tile::T>::kDtype, kMinArch = 90, kMaxArch = 90;
  static constexpr bool kAnyAlignment = true;

  template <typename Rule> static void launch(const flashcore_attention &a, const Rule &rule, int) {
    CUDA_OK(fc::wgmma_launch<Tile>(a, nullptr, rule));
  }
};

template <typename Traits> struct with_wmma {
  static constexpr const char *kName = "wmma";
  static constexpr int kDim = Traits::kHeadDim, kType = fc::element<typename Traits::T>::kDtype, kMinArch = kType == FLASHCORE_F16 ? 75 : 80,
                       kMaxArch = 999;
  static constexpr bool kAnyAlignment = false;

  template <typename Rule> static void launch(const flashcore_attention &a, const Rule &rule, int) {
    const int blocks = ceil_div(a.seq_q, Traits::kBlockQ) * a.heads_q * a.batch, bytes = Traits::shared_bytes(device_arch() >= 80 ? 2 : 1);
    allow_shared((const void *)fc::wmma_kernel<Traits, Rule>, bytes);
    fc::wmma_kernel<Traits, Rule><<<(unsigned)blocks, Traits::kThreads, (size_t)bytes>>>(a, rule);
  }
};

template <typename T> struct with_simt {
  static constexpr const char *kName = "simt";
  static constexpr int kDim = 80, kType = fc::element<T>::kDtype, kMinArch = 75, kMaxArch = 999;
  static constexpr bool kAnyAlignment = true;

  template <typename Rule> static void launch(const flashcore_attention &a, const Rule &rule, int) {
    using tile = fc::simt_tile;
    const int blocks = ceil_div(a.seq_q, tile::kBlockQ) * a.heads_q * a.batch;
    const int bytes = (int)sizeof(fc::simt_memory<T>) + tile::kBlockQ * fc::simt_stride_q(a.dim_qk) * 4;
    allow_shared((const void *)fc::simt_kernel<T, Rule>, bytes);
    fc::simt_kernel<T, Rule><<<(unsigned)blocks, tile::kThreads, (size_t)bytes>>>(a, rule, 0, 0);
  }
};

/* ---- cases --------------------------------------------------------------------------------------------------------------------- */

/* Awkward lengths, groups, masks, lengths on the device; options of the descriptor that stay beside the rule. */
static std::vector<Case> cases(int dtype, int dim, bool any_alignment) {
  std::vector<Case> list;
  const int shapes[][5] = {{2, 6, 2, 77, 149}, {1, 4, 4, 257, 263}, {2, 8, 2, 5, 301}, {1, 2, 1, 130, 67}, {1, 1, 1, 1, 1}};
  for (const auto &s : shapes) {
    for (int causal = 0; causal < 3; ++causal) {
      Case c;
      c.dtype = dtype, c.dim_qk = c.dim_v = dim, c.causal = causal;
      c.batch = s[0], c.heads_q = s[1], c.heads_kv = s[2], c.seq_q = s[3], c.seq_kv = s[4];
      c.seed = 1 + (int)list.size();
      if (causal == 1) c.lengths = SEQLENS_KV | SEQLENS_Q, c.layout = LAYOUT_PADDED;
      if (causal == 2) c.lengths = CU_SEQLENS_KV | CU_SEQLENS_Q, c.sink = 1, c.dim_v = dim - 8;
      list.push_back(c);
      c.window = 1, c.left = 40, c.right = 9, c.softcap = 3.f, c.lse = 2, c.scale = 0.3f;
      if (any_alignment) c.layout = LAYOUT_SLICE;
      list.push_back(c);
    }
  }
  return list;
}

/* One case: "" or what is wrong. */
template <typename Kernel, typename Rule> static std::string run(Problem &problem) {
  flashcore_attention a = resolved(problem.a);
  const Rule rule = Rule::take(a);
  const int align = problem.c.layout == LAYOUT_SLICE ? 2 : 16;
  Kernel::template launch<fc::user_rule<Rule>>(a, fc::user_rule<Rule>{rule}, align);
  CUDA_OK(cudaGetLastError());
  return problem.judge();
}

/* set: what makes the descriptor say what Rule does. */
template <typename Kernel, typename Rule, typename Set> static void check(const char *name, Set set) {
  if (device_arch() < Kernel::kMinArch || device_arch() > Kernel::kMaxArch) return;
  int count = 0, noticed = 0;
  std::string why;
  for (Case c : cases(Kernel::kType, Kernel::kDim, Kernel::kAnyAlignment)) {
    set(c);
    Problem problem(c);
    const std::string wrong = run<Kernel, Rule>(problem);
    if (!wrong.empty() && why.empty()) why = wrong + "\n     " + to_string(c);
    noticed += !run<Kernel, forgotten<Rule>>(problem).empty();
    ++count;
  }
  const char *type = Kernel::kType == FLASHCORE_F16 ? "f16" : Kernel::kType == FLASHCORE_BF16 ? "bf16" : "f32";
  const std::string prefix = format("%s.%s_d%d_", Kernel::kName, type, Kernel::kDim);
  report().expect(prefix + name, why.empty(), why);
  report().expect(prefix + name + "_and_a_missing_rule_is_noticed", 2 * noticed > count, format("in %d of %d cases only", noticed, count));
}

template <typename Kernel> static void test_kernel() {
  const auto dense = [](Case &c) { c.bias = BIAS_DENSE, c.bias_dtype = FLASHCORE_F32; };
  const auto hiding = [](Case &c) { c.bias = BIAS_HIDING, c.bias_dtype = FLASHCORE_F32, c.mask = c.seed % 2 ? MASK_DENSE : MASK_NONE; };
  const auto alibi = [](Case &c) { c.alibi = 2; };
  check<Kernel, bias_by_user>("users_rule_equals_the_same_bias", dense);
  check<Kernel, bias_by_user>("users_rule_that_hides_keys_equals_the_same_bias", hiding);
  check<Kernel, alibi_by_user>("users_rule_that_knows_lengths_equals_alibi", alibi);
}

/* ---- prologue and epilogue ------------------------------------------------------------------------------------------------------ */

template <typename T> struct q_from_elsewhere {
  static constexpr bool kActive = true;
  flashcore_tensor q;
  int *wrong;
  __device__ void operator()(const flashcore_attention &a, const fc::wgmma_q_rows<T> &rows) const {
    const int64_t first = a.cu_seqlens_q ? a.cu_seqlens_q[rows.batch] : 0, batch = a.cu_seqlens_q ? 0 : rows.batch;
    const int64_t offset = batch * a.q.stride_b + (first + rows.query) * a.q.stride_s + rows.head * a.q.stride_h;
    if (offset != rows.offset || rows.live < 0 || rows.live > 64) atomicAdd(wrong, 1);
    for (int i = (int)threadIdx.x % 128; i < rows.live * (a.dim_qk / 8); i += 128) {
      const int row = i / (a.dim_qk / 8), chunk = i % (a.dim_qk / 8);
      const T *src = (const T *)q.data + batch * q.stride_b + (first + rows.query + row) * q.stride_s + rows.head * q.stride_h + chunk * 8;
      *(uint4 *)rows.chunk(row, chunk) = *(const uint4 *)src;
    }
  }
};
template <typename T> struct o_to_elsewhere {
  static constexpr bool kActive = true;
  flashcore_tensor o;
  int *wrong;
  template <int kChunks> __device__ void operator()(const flashcore_attention &a, const float (&x)[kChunks][8], const fc::wgmma_output &at) const {
    const int64_t first = a.cu_seqlens_q ? a.cu_seqlens_q[at.batch] * o.stride_s : at.batch * o.stride_b;
    const int64_t offset = first + at.query * o.stride_s + at.head * o.stride_h + at.dim;
    if (offset != at.offset) atomicAdd(wrong, 1);
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      for (int n = 0; n < 8 && at.dim + 32 * i < a.dim_v; ++n) ((T *)o.data)[offset + 32 * i + n] = fc::element<T>::store(x[i][n]);
  }
};

template <typename Tile> static void test_prologue_and_epilogue() {
  using T = typename Tile::T;
  using kernel = with_wgmma<Tile>;
  if (device_arch() != 90) return;
  int *wrong, misplaced = 0;
  CUDA_OK(cudaMalloc(&wrong, sizeof *wrong));
  CUDA_OK(cudaMemset(wrong, 0, sizeof *wrong));
  std::string why;
  for (const Case &c : cases(kernel::kType, kernel::kDim, false)) {
    if (c.softcap > 0) continue;
    Problem problem(c);
    flashcore_attention a = resolved(problem.a);
    const flashcore_tensor q = a.q, o = a.o;
    const size_t rows = a.cu_seqlens_q ? (size_t)a.total_q : (size_t)a.batch * a.seq_q, bytes = rows * a.heads_q * a.dim_qk * 2;
    void *zeros;
    CUDA_OK(cudaMalloc(&zeros, bytes));
    CUDA_OK(cudaMemset(zeros, 0, bytes));
    a.q = flashcore_bshd(zeros, a.seq_q, a.heads_q, a.dim_qk);
    a.o.data = nullptr;
    CUDA_OK(fc::wgmma_launch<Tile>(a, nullptr, fc::no_rule(), q_from_elsewhere<T>{q, wrong}, o_to_elsewhere<T>{o, wrong}));
    const std::string bad = problem.judge();
    if (!bad.empty() && why.empty()) why = bad + "\n     " + to_string(c);
    CUDA_OK(cudaFree(zeros));
  }
  CUDA_OK(cudaMemcpy(&misplaced, wrong, sizeof misplaced, cudaMemcpyDeviceToHost));
  CUDA_OK(cudaFree(wrong));
  const std::string name = format("wgmma.d%d_", kernel::kDim);
  report().expect(name + "users_prologue_and_epilogue_bring_q_and_take_o", why.empty(), why);
  report().expect(name + "hooks_are_told_the_offsets_of_q_and_o", misplaced == 0, format("%d calls with others", misplaced));
}

int main() {
  find_device();
  test_kernel<with_simt<float>>();
  test_kernel<with_simt<__half>>();
  test_kernel<with_wmma<fc::wmma_traits<__half, 64>>>();
  test_kernel<with_mma<fc::mma_tile_for<__half, 64, 64, fc::kNarrow>>>();
  test_kernel<with_mma<fc::mma_tile_for<__nv_bfloat16, 64, 64, fc::kWide>>>();
  test_kernel<with_mma<fc::mma_tile_for<__half, 128, 128, fc::kNarrow>>>();
  test_kernel<with_wgmma<fc::wgmma_tile_for<__half, 64, 64, fc::kGeneralTile>>>();
  test_kernel<with_wgmma<fc::wgmma_tile_for<__nv_bfloat16, 128, 128, fc::kWideTile>>>();
  test_prologue_and_epilogue<fc::wgmma_tile_for<__half, 64, 64, fc::kWideTile>>();
  test_prologue_and_epilogue<fc::wgmma_tile_for<__nv_bfloat16, 128, 128, fc::kLongTile>>();
  test_prologue_and_epilogue<fc::wgmma_tile_for<__half, 256, 256, fc::kWideTile>>();
  return report().finish();
}
