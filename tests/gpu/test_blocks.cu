/* The device building blocks of flashcore.h, each alone, in one warp, before any kernel uses them. */
#include "flashcore.h"
#include "report.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

namespace fc = flashcore;

/* Inputs to the device, one kernel of one warp, outputs back. */
template <typename In, typename Out, typename Kernel> static std::vector<Out> on_device(Kernel kernel, const std::vector<In> &in, size_t outputs) {
  In *device_in = nullptr;
  Out *device_out = nullptr;
  std::vector<Out> out(outputs);
  CUDA_OK(cudaMalloc(&device_in, in.size() * sizeof(In)));
  CUDA_OK(cudaMalloc(&device_out, outputs * sizeof(Out)));
  CUDA_OK(cudaMemcpy(device_in, in.data(), in.size() * sizeof(In), cudaMemcpyHostToDevice));
  CUDA_OK(cudaMemset(device_out, 0xff, outputs * sizeof(Out)));
  kernel<<<1, 32>>>(device_in, (int)in.size(), device_out);
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

/* ---- cp_async ------------------------------------------------------------------------------------------------------------------ */

/* Lanes alternate between a copy and a zero-fill; words in between must stay as they were. */
template <int kBytes> static __global__ void cp_async_kernel(const uint32_t *src, int, uint32_t *out) {
  constexpr int kWords = kBytes / 4, kPitch = 2 * kWords;
  __shared__ __align__(16) uint32_t tile[32 * kPitch];
  for (int i = threadIdx.x; i < 32 * kPitch; i += 32) tile[i] = 0xabcdef01u;
  __syncwarp();
  const int lane = threadIdx.x;
  fc::cp_async<kBytes>(fc::shared_address(&tile[lane * kPitch]), src + lane * kWords, lane % 2 == 0);
  fc::cp_async_commit();
  fc::cp_async_wait<0>();
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

/* ---- fragments of flashcore_wmma.cuh -------------------------------------------------------------------------------------------
 * PLACE FOR: flashcore::ldmatrix_x4, flashcore::ldmatrix_x4_trans, flashcore::mma_m16n8k16: that picture, code and hardware agree.
 * -------------------------------------------------------------------------------------------------------------------------------- */

int main() {
  test_ex2();
  test_reductions();
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
  return report().finish();
}
