/* The device building blocks of flashcore.h and flashcore_wmma.cuh, each alone, in one warp or block, before any kernel uses them. */
#include "flashcore_wmma.cuh"
#include "report.h"

#include <algorithm>
#include <cmath>
#include <string.h>
#include <random>
#include <set>
#include <vector>

namespace fc = flashcore;

/* Inputs to the device, one kernel of one warp (or block), outputs back. */
template <typename In, typename Out, typename Kernel>
static std::vector<Out> on_device(Kernel kernel, const std::vector<In> &in, size_t outputs, int threads = 32) {
  In *device_in = nullptr;
  Out *device_out = nullptr;
  std::vector<Out> out(outputs);
  CUDA_OK(cudaMalloc(&device_in, in.size() * sizeof(In)));
  CUDA_OK(cudaMalloc(&device_out, outputs * sizeof(Out)));
  CUDA_OK(cudaMemcpy(device_in, in.data(), in.size() * sizeof(In), cudaMemcpyHostToDevice));
  CUDA_OK(cudaMemset(device_out, 0xff, outputs * sizeof(Out)));
  kernel<<<1, threads>>>(device_in, (int)in.size(), device_out);
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaMemcpy(out.data(), device_out, outputs * sizeof(Out), cudaMemcpyDeviceToHost));
  CUDA_OK(cudaFree(device_in));
  CUDA_OK(cudaFree(device_out));
  return out;
}

/* A reproducible spread of floats in (-1, 1). */
static std::vector<float> spread(size_t count) {
  std::vector<float> x(count);
  uint32_t state = 12345;
  for (float &v : x) state = state * 1664525u + 1013904223u, v = (float)(int32_t)state / 2147483648.f;
  return x;
}

/* ---- ex2 and reductions -------------------------------------------------------------------------------------------------------- */

static __global__ void ex2_kernel(const float *x, int count, float *y) {
  for (int i = threadIdx.x; i < count; i += 32) y[i] = fc::ex2(x[i]);
}

static void test_ex2() {
  std::vector<float> x = spread(20000);
  for (float &v : x) v *= 125.f;
  const std::vector<float> y = on_device<float, float>(ex2_kernel, x, x.size());
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::fabs((double)y[i] / std::exp2((double)x[i]) - 1));
  report().expect("ex2_is_within_2^-22", worst <= std::ldexp(1.0, -22), format("relative error %.3g", worst));
  const std::vector<float> exact = on_device<float, float>(ex2_kernel, std::vector<float>{-INFINITY, 0.f, 1.f, -3.f, INFINITY, NAN}, 6);
  report().expect("ex2_is_exact_at_whole_numbers_and_infinities",
                  exact[0] == 0.f && exact[1] == 1.f && exact[2] == 2.f && exact[3] == 0.125f && exact[4] == INFINITY && std::isnan(exact[5]),
                  format("%g %g %g %g %g %g", exact[0], exact[1], exact[2], exact[3], exact[4], exact[5]));
}

static __global__ void reduction_kernel(const float *x, int, float *y) {
  const int lane = threadIdx.x;
  y[lane] = fc::quad_max(x[lane]);
  y[32 + lane] = fc::quad_sum(x[lane]);
  y[64 + lane] = fc::warp_max(x[lane]);
  y[96 + lane] = fc::warp_sum(x[lane]);
}

static void test_reductions() {
  const std::vector<float> x = spread(32);
  const std::vector<float> y = on_device<float, float>(reduction_kernel, x, 128);
  bool quad = true, warp = true;
  double total = 0;
  for (float v : x) total += v;
  for (int lane = 0; lane < 32; ++lane) {
    const float *mine = &x[(size_t)(lane / 4 * 4)];
    quad &= y[(size_t)lane] == *std::max_element(mine, mine + 4);
    quad &= std::fabs(y[(size_t)(32 + lane)] - ((double)mine[0] + mine[1] + mine[2] + mine[3])) < 1e-6;
    warp &= y[(size_t)(64 + lane)] == *std::max_element(x.begin(), x.end());
    warp &= std::fabs(y[(size_t)(96 + lane)] - total) < 1e-5 && y[(size_t)(96 + lane)] == y[96];
  }
  report().expect("quad_reductions_stay_in_their_quad", quad, "a lane has another quad's value");
  report().expect("warp_reductions_reach_every_lane_with_the_same_bits", warp, "a lane differs");
}

static __global__ void transpose_kernel(const uint32_t *, int, uint32_t *y) {
  uint32_t x[4];
  for (uint32_t j = 0; j < 4; ++j) x[j] = 4 * threadIdx.x + j;
  fc::quad_transpose(x);
  for (uint32_t j = 0; j < 4; ++j) y[4 * threadIdx.x + j] = x[j];
}

static void test_transpose() {
  const std::vector<uint32_t> y = on_device<uint32_t, uint32_t>(transpose_kernel, {0}, 128);
  bool right = true;
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t j = 0; j < 4; ++j) right &= y[4 * lane + j] == 4 * (lane / 4 * 4 + j) + lane % 4;
  report().expect("quad_transpose_stays_in_its_quad", right, "a word is not where it belongs");
}

/* ---- cp_async ------------------------------------------------------------------------------------------------------------------ */

/* Lanes alternate between a copy and a zero-fill; words in between must stay as they were. */
template <int kBytes> static __global__ void cp_async_kernel(const uint32_t *src, int, uint32_t *out) {
  constexpr int kWords = kBytes / 4, kPitch = 2 * kWords;
  __shared__ __align__(16) uint32_t tile[32 * kPitch];
  for (int i = threadIdx.x; i < 32 * kPitch; i += 32) tile[i] = 0xabcdef01u;
  __syncwarp();
  const int lane = threadIdx.x;
  fc::cp_async<kBytes>(fc::shared_address(&tile[lane * kPitch]), src + lane * kWords, lane % 2 == 0);
  fc::cp_async_wait_all();
  __syncthreads();
  for (int i = lane; i < 32 * kPitch; i += 32) out[i] = tile[i];
}

template <int kBytes> static void test_cp_async() {
  constexpr int kWords = kBytes / 4, kPitch = 2 * kWords;
  std::vector<uint32_t> src(32 * kWords);
  for (size_t i = 0; i < src.size(); ++i) src[i] = 0x10000u + (uint32_t)i;
  const std::vector<uint32_t> out = on_device<uint32_t, uint32_t>(cp_async_kernel<kBytes>, src, 32 * kPitch);
  bool copied = true, zeroed = true, kept = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int w = 0; w < kWords; ++w) {
      const uint32_t got = out[(size_t)(lane * kPitch + w)];
      if (lane % 2 == 0) copied &= got == src[(size_t)(lane * kWords + w)];
      else zeroed &= got == 0;
      kept &= out[(size_t)(lane * kPitch + kWords + w)] == 0xabcdef01u;
    }
  }
  report().expect(format("cp_async_%d_copies_when_valid", kBytes), copied, "the words differ");
  report().expect(format("cp_async_%d_writes_zeros_when_not_valid", kBytes), zeroed, "not zero");
  report().expect(format("cp_async_%d_writes_no_more", kBytes), kept, "a neighbour was written");
}

/* ---- mbarrier ------------------------------------------------------------------------------------------------------------------ */

constexpr int kMbarrierRounds = 6, kMbarrierThreads = 128;

/* Two stages, handed round as the mma kernel's loose stages are: every thread copies a word of the next round, waits for this round's, and reads its
 * opposite's. A wait that passes too early, or a parity that is off, shows as a word of another round. */
static __global__ void mbarrier_kernel(const uint32_t *src, int, uint32_t *out) {
#if FLASHCORE_HAS_SM80
  __shared__ uint32_t stages[2][kMbarrierThreads];
  __shared__ uint64_t full[2], free[2];
  const int me = threadIdx.x, opposite = kMbarrierThreads - 1 - me;
  if (me < 2) {
    fc::mbarrier_init(fc::shared_address(&full[me]), kMbarrierThreads);
    fc::mbarrier_init(fc::shared_address(&free[me]), kMbarrierThreads / 32);
  }
  __syncthreads();
  const auto fill = [&](int round) {
    const int stage = round % 2;
    fc::mbarrier_wait(fc::shared_address(&free[stage]), (uint32_t)(round / 2 & 1) ^ 1u);
    fc::cp_async<4>(fc::shared_address(&stages[stage][me]), src + round * kMbarrierThreads + me, true);
    fc::cp_async_arrive(fc::shared_address(&full[stage]));
  };
  fill(0);
  for (int round = 0; round < kMbarrierRounds; ++round) {
    if (round + 1 < kMbarrierRounds) fill(round + 1);
    fc::mbarrier_wait(fc::shared_address(&full[round % 2]), (uint32_t)(round / 2 & 1));
    if (me / 32 == round % 4) __nanosleep(2000); /* one warp is late: the others must not fill what it still reads */
    out[round * kMbarrierThreads + me] = stages[round % 2][opposite];
    __syncwarp();
    if (me % 32 == 0) fc::mbarrier_arrive(fc::shared_address(&free[round % 2]));
  }
#endif
}

static void test_mbarrier() {
  std::vector<uint32_t> src(kMbarrierRounds * kMbarrierThreads);
  for (size_t i = 0; i < src.size(); ++i) src[i] = 7 * (uint32_t)i + 1;
  const std::vector<uint32_t> out = on_device<uint32_t, uint32_t>(mbarrier_kernel, src, src.size(), kMbarrierThreads);
  bool right = true;
  for (int round = 0; round < kMbarrierRounds; ++round)
    for (int i = 0; i < kMbarrierThreads; ++i)
      right &= out[(size_t)(round * kMbarrierThreads + i)] == src[(size_t)((round + 1) * kMbarrierThreads - 1 - i)];
  report().expect("mbarriers_hand_two_stages_round", right, "a word of another round was read");
}

/* ---- swizzle ------------------------------------------------------------------------------------------------------------------- */

/* offset() as the device computes it, for 64 rows. */
template <int kRowBytes> static __global__ void swizzle_kernel(const int *, int, uint32_t *out) {
  constexpr int kChunks = fc::swizzled_tile<kRowBytes>::kChunks;
  for (int i = threadIdx.x; i < 64 * kChunks; i += 32) out[i] = fc::swizzled_tile<kRowBytes>::offset(i / kChunks, i % kChunks);
}

template <int kRowBytes> static void test_swizzle() {
  constexpr int kChunks = kRowBytes / 16, kRows = 64;
  const std::vector<uint32_t> at = on_device<int, uint32_t>(swizzle_kernel<kRowBytes>, std::vector<int>(1), kRows * kChunks);
  std::set<uint32_t> seen;
  bool in_row = true, free_of_conflicts = true;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint32_t offset = at[(size_t)(row * kChunks + chunk)];
      seen.insert(offset);
      in_row &= offset % 16 == 0 && (int)(offset / kRowBytes) == row;
    }
  }
  for (int first = 0; first < kRows; first += 8) { // ldmatrix reads eight 16-byte rows at once: they must cover the 128 bytes of banks
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      std::set<uint32_t> banks;
      for (int row = first; row < first + 8; ++row) banks.insert(at[(size_t)(row * kChunks + chunk)] / 16 % 8);
      free_of_conflicts &= banks.size() == 8;
    }
  }
  const bool bijective = seen.size() == (size_t)(kRows * kChunks) && in_row;
  report().expect(format("swizzle_%d_is_a_permutation_of_each_rows_chunks", kRowBytes), bijective, "two chunks share a place or leave their row");
  report().expect(format("swizzle_%d_is_free_of_bank_conflicts_for_ldmatrix", kRowBytes), free_of_conflicts, "eight rows share a bank");
}

/* ---- online softmax ------------------------------------------------------------------------------------------------------------ */

struct SoftmaxResult {
  fc::softmax_state raised, merged;
  float factor, fa, fb, scale, lse, scale_sink, lse_sink;
};

/* x[0 .. 7]: logits in log2 units; the first four raise one state, the others a second; then they are merged and finished. */
FLASHCORE_INLINE SoftmaxResult softmax_walk(const float *x) {
  SoftmaxResult r;
  fc::softmax_state s[2] = {{FLASHCORE_EMPTY_MAX, 0.f}, {FLASHCORE_EMPTY_MAX, 0.f}};
  r.factor = 1.f;
  for (int i = 0; i < 8; ++i) {
    r.factor = fc::softmax_raise(s[i / 4], x[i]);
    s[i / 4].l += fc::softmax_exp2(x[i] - s[i / 4].m);
  }
  r.raised = s[0];
  r.merged = fc::softmax_merge(s[0], s[1], r.fa, r.fb);
  r.scale = fc::softmax_finish(r.merged, false, 0.f, false, r.lse);
  r.scale_sink = fc::softmax_finish(r.merged, true, 0.7f, true, r.lse_sink);
  return r;
}

static __global__ void softmax_kernel(const float *x, int count, SoftmaxResult *out) {
  for (int i = threadIdx.x; i < count / 8; i += 32) out[i] = softmax_walk(x + 8 * i);
}

static bool near(float x, double y) { return std::isinf(x) || std::isinf(y) ? x == y : std::fabs(x - y) <= 2e-6 * std::max(1.0, std::fabs(y)); }

static void test_softmax() {
  std::vector<float> x = spread(8 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= i / 8 % 4 == 0 ? 3.f : i / 8 % 4 == 1 ? 60.f : 3e5f;
  for (size_t i = 0; i < x.size(); ++i) {
    if (i / 8 % 4 == 3) x[i] = -INFINITY;              // nothing visible
    if (i / 8 % 8 == 4 && i % 8 < 4) x[i] = -INFINITY; // nothing visible in the first half
  }
  const std::vector<SoftmaxResult> out = on_device<float, SoftmaxResult>(softmax_kernel, x, x.size() / 8);
  bool agree = true, right = true, empty = true;
  for (size_t row = 0; row < out.size(); ++row) {
    const float *mine = &x[8 * row];
    const SoftmaxResult &d = out[row], h = softmax_walk(mine);
    agree &=
        near(d.raised.m, h.raised.m) && near(d.raised.l, h.raised.l) && near(d.merged.l, h.merged.l) && near(d.factor, h.factor) && near(d.fa, h.fa);
    agree &= near(d.fb, h.fb) && near(d.scale, h.scale) && near(d.lse, h.lse) && near(d.scale_sink, h.scale_sink) && near(d.lse_sink, h.lse_sink);
    const double m = *std::max_element(mine, mine + 8), sink = 0.7 * 1.4426950408889634, top = std::max(m, sink);
    double l = 0;
    for (int i = 0; i < 8; ++i) l += std::isinf(mine[i]) ? 0 : std::exp2(mine[i] - m);
    const double l_sink = (l > 0 ? l * std::exp2(m - top) : 0) + std::exp2(sink - top);
    if (l > 0) right &= near(d.lse, (m + std::log2(l)) * 0.6931471805599453) && near(d.scale, 1 / l) && near(d.lse_sink, top + std::log2(l_sink));
    else empty &= d.scale == 0.f && d.lse == -INFINITY && near(d.lse_sink, sink) && d.scale_sink == 0.f;
  }
  report().expect("softmax_state_is_the_same_on_device_and_host", agree, "they differ by more than 2e-6");
  report().expect("softmax_of_merged_halves_gives_the_lse_of_all_keys", right, "wrong sum or LSE");
  report().expect("softmax_fully_masked_row_gives_zero_and_lse_minus_inf_or_sink", empty, "NaN or a number");
}

/* ---- divisor ------------------------------------------------------------------------------------------------------------------- */

struct Division {
  fc::divisor divisor;
  int32_t n;
};

static __global__ void divisor_kernel(const Division *in, int count, int32_t *out) {
  for (int i = threadIdx.x; i < count; i += 32) out[i] = in[i].divisor.quotient(in[i].n);
}

static void test_divisor() {
  std::mt19937 random(7);
  std::vector<int32_t> divisors = {1,        2, 3, 5, 6, 7, 10, 12, 48, 63, 64, 65, 1000, 65535, 65536, 65537, (1 << 30) - 1, 1 << 30, (1 << 30) + 1,
                                   INT32_MAX};
  for (int i = 0; i < 100; ++i) divisors.push_back(1 + (int32_t)(random() >> (1 + random() % 30)));
  std::vector<Division> in;
  for (int32_t d : divisors) {
    const fc::divisor divisor = fc::make_divisor(d);
    const int64_t last = INT32_MAX / d * (int64_t)d; // the largest multiple
    for (int64_t n : {(int64_t)0, (int64_t)1, (int64_t)d - 1, (int64_t)d, (int64_t)d + 1, last - 1, last, last + 1, (int64_t)INT32_MAX})
      if (n <= INT32_MAX) in.push_back({divisor, (int32_t)n});
    for (int i = 0; i < 200; ++i) in.push_back({divisor, (int32_t)(random() >> (1 + random() % 30))});
  }
  const std::vector<int32_t> out = on_device<Division, int32_t>(divisor_kernel, in, in.size());
  std::string why;
  for (size_t i = 0; i < in.size(); ++i) {
    const int32_t n = in[i].n, d = in[i].divisor.d;
    if (out[i] != n / d && why.empty()) why = format("%d / %d = %d, not %d", n, d, n / d, out[i]);
  }
  report().expect("divisor_quotient_is_division_on_the_device", why.empty(), why);
}

/* ---- fragments of flashcore_wmma.cuh ------------------------------------------------------------------------------------------- */

/* Element (row, col) of matrix j carries the number j * 64 + row * 8 + col. Rows lie 48 bytes apart. */
template <bool kTransposed> static __global__ void ldmatrix_kernel(const uint16_t *in, int count, uint32_t *out) {
#if FLASHCORE_HAS_SM80
  __shared__ __align__(16) uint16_t rows[32 * 24];
  for (int i = threadIdx.x; i < count; i += 32) rows[i / 8 * 24 + i % 8] = in[i];
  __syncwarp();
  uint32_t r[4];
  const uint32_t address = fc::shared_address(&rows[threadIdx.x * 24]);
  if (kTransposed) fc::ldmatrix_x4_trans(r, address);
  else fc::ldmatrix_x4(r, address);
  for (int j = 0; j < 4; ++j) out[j * 32 + threadIdx.x] = r[j];
#endif
}

template <bool kTransposed> static void test_ldmatrix() {
  std::vector<uint16_t> in(256);
  for (size_t i = 0; i < in.size(); ++i) in[i] = (uint16_t)i;
  const std::vector<uint32_t> out = on_device<uint16_t, uint32_t>(ldmatrix_kernel<kTransposed>, in, 128);
  bool right = true;
  for (uint32_t j = 0; j < 4; ++j) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t along = 2 * (lane % 4), across = lane / 4;
      const uint32_t low = j * 64 + (kTransposed ? along * 8 + across : across * 8 + along), high = low + (kTransposed ? 8 : 1);
      right &= out[j * 32 + lane] == (low | high << 16);
    }
  }
  report().expect(kTransposed ? "ldmatrix_x4_trans_gives_the_documented_elements" : "ldmatrix_x4_gives_the_documented_elements", right,
                  "a lane has another element");
}

/* in: A [16][16], B [16][16], C [16][16], E [16][8], whole numbers small enough to be exact in T. out: A B + C [16][16], then (A B + C) E [16][8],
 * for which two accumulators side by side become the A operand. */
template <typename T> static __global__ void mma_kernel(const float *in, int, float *out) {
#if FLASHCORE_HAS_SM80
  const float *a = in, *b = in + 256, *c = in + 512, *e = in + 768;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t fa[4], fs[4];
  for (int i = 0; i < 4; ++i) {
    const float *at = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    fa[i] = fc::pack2<T>(at[0], at[1]);
  }
  float s[2][4], d[4] = {};
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) s[n][i] = c[fc::mma_accumulator::row(lane, i) * 16 + 8 * n + fc::mma_accumulator::col(lane, i)];
    uint32_t fb[2];
    for (int h = 0; h < 2; ++h) fb[h] = fc::pack2<T>(b[(2 * t + 8 * h) * 16 + 8 * n + g], b[(2 * t + 8 * h + 1) * 16 + 8 * n + g]);
    fc::mma_m16n8k16<T>(s[n], fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) out[fc::mma_accumulator::row(lane, i) * 16 + 8 * n + fc::mma_accumulator::col(lane, i)] = s[n][i];
  }
  for (int i = 0; i < 4; ++i) fs[i] = fc::pack2<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
  uint32_t fe[2];
  for (int h = 0; h < 2; ++h) fe[h] = fc::pack2<T>(e[(2 * t + 8 * h) * 8 + g], e[(2 * t + 8 * h + 1) * 8 + g]);
  fc::mma_m16n8k16<T>(d, fs, fe[0], fe[1]);
  for (int i = 0; i < 4; ++i) out[256 + fc::mma_accumulator::row(lane, i) * 8 + fc::mma_accumulator::col(lane, i)] = d[i];
#endif
}

template <typename T> static void test_mma(const char *type) {
  std::mt19937 random(3);
  std::vector<float> in(768 + 128), s(256), d(128);
  for (float &x : in) x = (float)(random() % 5u) - 2.f; // sums stay within +-66: exact in bf16 too
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 16; ++j) {
      s[i * 16 + j] = in[512 + i * 16 + j];
      for (size_t k = 0; k < 16; ++k) s[i * 16 + j] += in[i * 16 + k] * in[256 + k * 16 + j];
    }
    for (size_t j = 0; j < 8; ++j)
      for (size_t k = 0; k < 16; ++k) d[i * 8 + j] += s[i * 16 + k] * in[768 + k * 8 + j];
  }
  const std::vector<float> out = on_device<float, float>(mma_kernel<T>, in, 384);
  const bool product = std::equal(s.begin(), s.end(), out.begin()), chain = std::equal(d.begin(), d.end(), out.begin() + 256);
  report().expect(format("mma_m16n8k16_%s_adds_the_product_where_row_and_col_say", type), product, "an element differs from the CPU's");
  report().expect(format("mma_m16n8k16_%s_takes_two_packed_accumulators_as_its_a_operand", type), chain, "an element differs from the CPU's");
}

template <typename T> static __global__ void pack2_kernel(const float2 *in, int count, uint32_t *out) {
#if FLASHCORE_HAS_SM80
  for (int i = threadIdx.x; i < count; i += 32) {
    float lo, hi;
    out[i] = fc::pack2<T>(in[i].x, in[i].y);
    fc::unpack2<T>(out[i], lo, hi);
    out[count + 2 * i] = __float_as_uint(lo);
    out[count + 2 * i + 1] = __float_as_uint(hi);
  }
#endif
}

/* The host's conversion is the judge: round to nearest, ties to even. */
template <typename T> static void test_pack2(const char *type) {
  const bool half = fc::element<T>::kDtype == FLASHCORE_F16;
  const float ulp = half ? 0x1p-10f : 0x1p-7f; // of 1
  std::vector<float2> in = {{0.f, -0.f},         {INFINITY, -INFINITY}, {65504.f, 65519.f},
                            {65520.f, -65520.f}, {0x1p-24f, 0x1p-25f},  {0x1.8p-25f, 0x1p-30f}};
  for (int i = 0; i < 64; ++i) in.push_back({1.f + (0.5f + (float)i) * ulp, -1.f - (1.5f + (float)i) * ulp}); // ties
  const std::vector<float> x = spread(4000);
  for (size_t i = 0; i + 1 < x.size(); i += 2) in.push_back({x[i] * 100.f, x[i + 1]});
  const std::vector<uint32_t> out = on_device<float2, uint32_t>(pack2_kernel<T>, in, 3 * in.size());
  std::string why;
  bool unpacked = true;
  for (size_t i = 0; i < in.size(); ++i) {
    const T pair[2] = {fc::element<T>::store(in[i].x), fc::element<T>::store(in[i].y)};
    uint32_t expected;
    memcpy(&expected, pair, sizeof expected);
    const float floats[2] = {fc::element<T>::load(pair[0]), fc::element<T>::load(pair[1])};
    unpacked &= memcmp(floats, &out[in.size() + 2 * i], sizeof floats) == 0;
    if (out[i] != expected && why.empty()) why = format("(%a, %a) became %08x, not %08x", in[i].x, in[i].y, out[i], expected);
  }
  report().expect(format("pack2_%s_rounds_to_nearest_even_and_puts_lo_low", type), why.empty(), why);
  report().expect(format("unpack2_%s_gives_what_pack2_made", type), unpacked, "a float differs");
}

/* ---- pieces of rows, and the loaders of flashcore_wmma.cuh --------------------------------------------------------------------- */

/* Lane i copies the 16 bytes at i * 32 + align of `in`, as if only the first live_bytes(i) were there; then elements_out(i) elements of the chunk go
 * back out at the same place. */
template <int kAlign> static __host__ __device__ int live_bytes(int lane) { return lane % (16 / kAlign + 1) * kAlign; }
static __host__ __device__ int elements_out(int lane) { return lane / 3 % 9; }
template <int kAlign> static __global__ void chunk_kernel(const uint16_t *in, int, uint16_t *out) {
  __shared__ __align__(16) uint4 chunks[64];
  const int lane = threadIdx.x;
  chunks[2 * lane] = chunks[2 * lane + 1] = make_uint4(0xabcdabcdu, 0xabcdabcdu, 0xabcdabcdu, 0xabcdabcdu);
  __syncwarp();
  fc::copy_chunk(fc::shared_address(&chunks[2 * lane]), reinterpret_cast<const char *>(in) + lane * 32 + kAlign % 16, live_bytes<kAlign>(lane),
                 kAlign);
  fc::cp_async_wait_all();
  __syncwarp();
  fc::store_chunk(reinterpret_cast<char *>(out) + lane * 32 + kAlign % 16, chunks[2 * lane], elements_out(lane));
  out[32 * 16 + lane] = reinterpret_cast<const uint16_t *>(&chunks[2 * lane + 1])[0]; // must be as it was
}

template <int kAlign> static void test_chunks() {
  std::vector<uint16_t> in(32 * 16);
  for (size_t i = 0; i < in.size(); ++i) in[i] = (uint16_t)(i + 1);
  const std::vector<uint16_t> out = on_device<uint16_t, uint16_t>(chunk_kernel<kAlign>, in, in.size() + 32);
  bool copied = true, zeroed = true, kept = true;
  for (size_t i = 0; i < in.size(); ++i) {
    const int lane = (int)i / 16, within = (int)i % 16 - kAlign % 16 / 2;
    if (within < 0 || within >= elements_out(lane)) kept &= out[i] == 0xffff;
    else if (2 * within < live_bytes<kAlign>(lane)) copied &= out[i] == in[i];
    else zeroed &= out[i] == 0;
  }
  for (size_t lane = 0; lane < 32; ++lane) kept &= out[in.size() + lane] == 0xabcd;
  report().expect(format("copy_chunk_and_store_chunk_keep_16_bytes_aligned_to_%d", kAlign), copied, "a value differs");
  report().expect(format("copy_chunk_aligned_to_%d_writes_zeros_behind_what_is_live", kAlign), zeroed, "not zero");
  report().expect(format("copy_chunk_and_store_chunk_aligned_to_%d_write_no_more", kAlign), kept, "a neighbour was written");
}

/* How a tile is loaded: all of it; up to some row and byte; the same by pieces of `align` bytes. */
struct TileLoad {
  int32_t stride_bytes, rows, row_bytes, align; // align 0: load
  int64_t base;                                 // bytes into the array
};

constexpr int kTileThreads = 128;
template <int kRowBytes> constexpr int kTileRows = kRowBytes >= 512 ? 32 : 64;

/* in: the TileLoad, then words to load from. */
template <int kRowBytes> static __global__ void tile_kernel(const uint32_t *in, int, uint32_t *out) {
  constexpr int kRows = kTileRows<kRowBytes>;
  using loader = fc::tile_loader<kRows, kRowBytes, kTileThreads>;
  __shared__ __align__(128) uint32_t tile[kRows * kRowBytes / 4];
  for (int i = threadIdx.x; i < kRows * kRowBytes / 4; i += kTileThreads) tile[i] = 0xabcdef01u;
  __syncthreads();
  const TileLoad &how = *reinterpret_cast<const TileLoad *>(in);
  const char *base = reinterpret_cast<const char *>(in) + how.base;
  const uint32_t dst = fc::shared_address(tile);
  if (how.align == 0) loader::load(dst, base, how.stride_bytes);
  else if (how.align == 16) loader::load_edge(dst, base, how.stride_bytes, how.rows, how.row_bytes / 16);
  else loader::load_unaligned(dst, base, how.stride_bytes, how.rows, how.row_bytes, how.align);
  fc::cp_async_wait_all();
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kRowBytes / 4; i += kTileThreads) out[i] = tile[i];
}

/* "": every chunk lies where swizzled_tile says, zeros from `rows` and `row_bytes` on. backwards: rows lie in memory last to first. */
template <int kRowBytes> static std::string load_tile(int align, int rows, int row_bytes, bool backwards) {
  using tile = fc::swizzled_tile<kRowBytes>;
  constexpr int kRows = kTileRows<kRowBytes>;
  const int64_t pitch = kRowBytes + 48, shift = align % 16; // gaps between rows; a first byte that is aligned to `align` only
  std::vector<uint32_t> in(64 / 4 + (size_t)(kRows * pitch + 16) / 4);
  for (size_t i = 0; i < in.size(); ++i) in[i] = 0x01010101u * (uint32_t)(i % 251) + (uint32_t)i * 65536u;
  const TileLoad how = {(int32_t)(backwards ? -pitch : pitch), rows, row_bytes, align, 64 + shift + (backwards ? (kRows - 1) * pitch : 0)};
  memcpy(in.data(), &how, sizeof how);
  const std::vector<uint32_t> out = on_device<uint32_t, uint32_t>(tile_kernel<kRowBytes>, in, kRows * kRowBytes / 4, kTileThreads);
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < tile::kChunks; ++chunk) {
      char expected[16] = {};
      const int there = align == 0 ? 16 : row < rows ? std::min(std::max(row_bytes - chunk * 16, 0), 16) : 0; // bytes
      memcpy(expected, (const char *)in.data() + how.base + row * (int64_t)how.stride_bytes + chunk * 16, (size_t)there);
      if (memcmp(expected, (const char *)out.data() + tile::offset(row, chunk), 16))
        return format("row %d, chunk %d: %d bytes are not at their place, or the rest not zero", row, chunk, there);
    }
  }
  return "";
}

template <int kRowBytes> static void test_tile_loader() {
  constexpr int kRows = kTileRows<kRowBytes>, kChunks = kRowBytes / 16;
  std::string whole = load_tile<kRowBytes>(0, kRows, kRowBytes, false), edge, unaligned;
  if (whole.empty()) whole = load_tile<kRowBytes>(0, kRows, kRowBytes, true);
  for (int rows : {-5, 0, 1, 17, kRows - 1, kRows, kRows + 9}) {
    for (int chunks : {1, kChunks - 1, kChunks}) {
      if (edge.empty()) edge = load_tile<kRowBytes>(16, rows, 16 * chunks, rows % 2 == 0);
      for (int align : {8, 4, 2})
        for (int missing : {0, align, 16 - align})
          if (unaligned.empty()) unaligned = load_tile<kRowBytes>(align, rows, 16 * chunks - missing, rows % 2 == 0);
    }
  }
  report().expect(format("tile_loader_%d_load_puts_every_chunk_at_its_swizzled_place", kRowBytes), whole.empty(), whole);
  report().expect(format("tile_loader_%d_load_edge_writes_zeros_past_the_last_row_and_chunk", kRowBytes), edge.empty(), edge);
  report().expect(format("tile_loader_%d_load_unaligned_does_the_same_at_8_4_and_2_bytes", kRowBytes), unaligned.empty(), unaligned);
}

static void test_tile_loaders() {
  test_tile_loader<64>();
  test_tile_loader<128>();
  test_tile_loader<160>();
  test_tile_loader<192>();
  test_tile_loader<256>();
  test_tile_loader<384>();
  test_tile_loader<512>();
  test_tile_loader<1024>();
}

static bool has_sm80() {
  int major = 0;
  CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major >= 8;
}

int main() {
  test_ex2();
  test_reductions();
  test_transpose();
  test_cp_async<4>();
  test_cp_async<8>();
  test_cp_async<16>();
  test_swizzle<32>();
  test_swizzle<48>();
  test_swizzle<64>();
  test_swizzle<96>();
  test_swizzle<128>();
  test_swizzle<160>();
  test_swizzle<192>();
  test_swizzle<256>();
  test_swizzle<384>();
  test_swizzle<512>();
  test_swizzle<1024>();
  test_softmax();
  test_divisor();
  test_chunks<16>();
  test_chunks<8>();
  test_chunks<4>();
  test_chunks<2>();
  test_tile_loaders();
  if (has_sm80()) {
    test_mbarrier();
    test_ldmatrix<false>();
    test_ldmatrix<true>();
    test_mma<__half>("f16");
    test_mma<__nv_bfloat16>("bf16");
    test_pack2<__half>("f16");
    test_pack2<__nv_bfloat16>("bf16");
  }
  return report().finish();
}
