// Demonstrates attention of your own, in a file of your own: a mask and a score that FlashCore does not have, and an epilogue.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90,code=sm_90 examples/score_rule/score_rule.cu -o score_rule
//   ./score_rule
//
// Several documents are packed into one sequence. A token sees the tokens of its own document up to itself; every head has learned a score for each
// distance between query and key; and every head's output is multiplied with a sigmoid gate of its token. No building block needs the C API, so
// nothing but this file is compiled. Two ways:
//
//   1  the kernel of flashcore_wmma.cuh with a rule of your own in it
//   2  a kernel of your own around the library's mainloop, for an epilogue (or a Q producer) of your own
//
// Both are checked against a plain fp64 loop. Exit code: 0 right, or no GPU to try it on; 1 wrong; 2 a CUDA error.
#include "../../flashcore_wmma.cuh"
#include "../common/timing.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

constexpr int kDistances = 64; // further keys share the last score

// [readme:rule]
// Any copyable struct with this operator is a rule. x: the logit, already scaled; the result is what the softmax sees; -INFINITY hides the key.
struct document_rule {
  const int32_t *document; // [batch][seq]: which document a token belongs to
  const float *score;      // [heads][kDistances]: learned, by distance

  __host__ __device__ float operator()(const flashcore_attention &a, float x, const flashcore::score_position &at) const {
    const int32_t *mine = document + (int64_t)at.batch * a.seq_q;
    if (mine[at.query] != mine[at.key]) return -INFINITY;
    const int distance = at.query > at.key ? at.query - at.key : 0; // the causal mask hides the others; a rule may be asked about them
    return x + score[at.head * kDistances + (distance < kDistances ? distance : kDistances - 1)];
  }
};
// [readme:end]

// ---- the second way: a kernel of your own ------------------------------------------------------------------------------------------

// gate: [batch][seq][heads], before the sigmoid
template <typename Tile, typename Rule>
static __global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gated_attention(const __grid_constant__ flashcore_attention a, const __grid_constant__ flashcore::mma_schedule plan, Rule rule,
                    const float *gate) {
#if FLASHCORE_HAS_SM80
  extern __shared__ __align__(128) unsigned char gated_attention_shared[];
  __shared__ flashcore::mma_shared<Tile> block;
  const uint32_t shared = flashcore::shared_address(gated_attention_shared);
  flashcore::mma_work found;
  if (!flashcore::mma_find_work<Tile>(a, plan, (int32_t)blockIdx.x, found)) return;
  flashcore::mma_warp<Tile> warp;
  warp.template load_q<true>(a, plan, found, shared); // true: with a rule
  warp.init(a, plan, found, block, shared);
  warp.mainloop(a, plan, block, shared, rule);
  const flashcore::mma_work &work = block.work(); // this warp's
  warp.finish(a, plan, work);                     // warp.o is the result now: [kRowTiles][kTilesO] accumulators of 16 rows and 8 columns

#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) { // rows g and g + 8 of the accumulators
      const int query = min(warp.row_of(work, i, h), work.rows - 1);
      const float x = gate[((int64_t)work.batch * a.seq_q + query) * a.heads_q + work.head], g = 1.f / (1.f + __expf(-x));
#pragma unroll
      for (int n = 0; n < warp.kTilesO; ++n) {
        warp.o[i][n][2 * h] *= g;
        warp.o[i][n][2 * h + 1] *= g;
      }
    }
  warp.template store<true>(a, plan, work);
#else
  __trap();
#endif
}

// ---- the launch --------------------------------------------------------------------------------------------------------------------

// [readme:launch]
// gate NULL: the library's kernel; else the one above.
template <typename Tile> static cudaError_t launch(const flashcore_attention &a, const document_rule &mine, const float *gate, cudaStream_t stream) {
  using rule = flashcore::user_rule<document_rule>; // what the descriptor asks for (softcap, bias, ALiBi ...), then yours
  int64_t blocks;
  const flashcore::mma_schedule plan =
      flashcore::make_mma_schedule(a, Tile::kBlockQ, true, 1, flashcore::kTileFastest, flashcore_row_align(&a), blocks);
  const void *kernel = gate ? (const void *)gated_attention<Tile, rule> : (const void *)flashcore::mma_kernel<Tile, rule>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  if (gate) gated_attention<Tile, rule><<<(unsigned)blocks, Tile::kThreads, Tile::kSharedBytes, stream>>>(a, plan, rule{mine}, gate);
  else flashcore::mma_kernel<Tile, rule><<<(unsigned)blocks, Tile::kThreads, Tile::kSharedBytes, stream>>>(a, plan, rule{mine});
  return cudaGetLastError();
}
// [readme:end]

// ---- a problem, on the host and on the device --------------------------------------------------------------------------------------

struct packed_problem {
  flashcore_attention a = {}; // pointers are filled in by each side; a descriptor that kernels get directly needs no flashcore_init
  std::vector<__half> q, k, v;
  std::vector<int32_t> document;
  std::vector<float> score, gate;
};

static packed_problem make_problem(int batch, int heads, int heads_kv, int seq, int dim) {
  packed_problem p;
  flashcore_attention &a = p.a;
  a.dtype = a.dtype_kv = a.dtype_o = FLASHCORE_F16;
  a.batch = batch, a.heads_q = heads, a.heads_kv = heads_kv, a.seq_q = a.seq_kv = seq, a.dim_qk = a.dim_v = dim;
  a.scale = 1.f / sqrtf((float)dim);
  a.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
  a.window_left = a.window_right = FLASHCORE_UNBOUNDED; // what flashcore_forward would make of "no window"
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<__half> &x, int count) {
    x.resize((size_t)batch * seq * count * dim);
    for (__half &value : x) value = __float2half(normal(random));
  };
  fill(p.q, heads), fill(p.k, heads_kv), fill(p.v, heads_kv);
  for (int b = 0; b < batch; ++b) // documents of 1 to 300 tokens, the last one cut off
    for (int i = 0, id = 0, left = 0; i < seq; ++i, --left) {
      if (left == 0) left = 1 + (int)(random() % 300u), ++id;
      p.document.push_back(id);
    }
  for (int i = 0; i < heads * kDistances; ++i) p.score.push_back(0.5f * normal(random));
  for (int i = 0; i < batch * seq * heads; ++i) p.gate.push_back(2.f * normal(random));
  return p;
}

template <typename T> static cudaError_t upload(const std::vector<T> &values, T **device) {
  const cudaError_t error = cudaMalloc(device, values.size() * sizeof(T));
  return error != cudaSuccess ? error : cudaMemcpy(*device, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
}

// ---- the check ---------------------------------------------------------------------------------------------------------------------

struct verdict {
  double o = 0, lse = 0; // largest errors
  bool right = true;
};

// One row in fp64. limit: what rounding may cost an element of O: half an ulp of each weight and of the result, four times over.
static double reference_row(const packed_problem &p, int b, int h, int i, std::vector<double> &o, std::vector<double> &limit) {
  const flashcore_attention &a = p.a;
  const int dim = a.dim_qk, h_kv = h / (a.heads_q / a.heads_kv);
  const double unit = 1.0 / 2048; // of fp16
  const document_rule rule = {p.document.data(), p.score.data()};
  const auto row = [&](const std::vector<__half> &x, int heads, int head, int at) { return &x[(((size_t)b * a.seq_q + at) * heads + head) * dim]; };
  std::vector<double> x((size_t)i + 1, -INFINITY);
  double m = -INFINITY, l = 0;
  for (int j = 0; j <= i; ++j) {
    const float added = rule(a, 0.f, {b, h, i, j, a.seq_q, a.seq_kv}); // -inf, or the score
    if (added == -INFINITY) continue;
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += (double)__half2float(row(p.q, a.heads_q, h, i)[d]) * __half2float(row(p.k, a.heads_kv, h_kv, j)[d]);
    m = std::max(m, x[(size_t)j] = dot * a.scale + added);
  }
  o.assign((size_t)dim, 0.0), limit.assign((size_t)dim, 0.0);
  for (const double logit : x) l += std::exp(logit - m);
  for (int j = 0; j <= i; ++j) {
    const double weight = std::exp(x[(size_t)j] - m) / l;
    for (int d = 0; d < dim && weight > 0; ++d) {
      const double term = weight * __half2float(row(p.v, a.heads_kv, h_kv, j)[d]);
      o[(size_t)d] += term;
      limit[(size_t)d] += term * term;
    }
  }
  for (int d = 0; d < dim; ++d)
    limit[(size_t)d] = 4 * unit * (std::sqrt(limit[(size_t)d]) + std::fabs(o[(size_t)d])) + 1e-7; // and fp16's smallest step
  return m + std::log(l);
}

// results[0]: the library's kernel; results[1]: the gated one.
static void compare(const packed_problem &p, const std::vector<__half> (&results)[2], const std::vector<float> (&lse)[2], verdict (&verdicts)[2]) {
  const flashcore_attention &a = p.a;
  std::vector<double> o, limit;
  for (int b = 0; b < a.batch; ++b)
    for (int h = 0; h < a.heads_q; ++h)
      for (int i = 0; i < a.seq_q; ++i) {
        const double expected_lse = reference_row(p, b, h, i, o, limit);
        const size_t token = ((size_t)b * a.seq_q + i) * a.heads_q + h;
        for (int n = 0; n < 2; ++n) {
          const double gate = n == 0 ? 1.0 : 1.0 / (1.0 + std::exp(-(double)p.gate[token]));
          for (int d = 0; d < a.dim_v; ++d) {
            const double error = std::fabs(__half2float(results[n][token * a.dim_v + d]) - gate * o[(size_t)d]);
            verdicts[n].o = std::max(verdicts[n].o, error);
            verdicts[n].right &= error <= gate * limit[(size_t)d] + 1e-7; // false for NaN
          }
          const double error = std::fabs(lse[n][((size_t)b * a.heads_q + h) * a.seq_q + i] - expected_lse);
          verdicts[n].lse = std::max(verdicts[n].lse, error);
          verdicts[n].right &= error <= 2e-5 + 1e-6 * std::fabs(expected_lse);
        }
      }
}

template <typename Tile> static int run(int batch, int heads, int heads_kv, int seq, bool *right) {
  const packed_problem p = make_problem(batch, heads, heads_kv, seq, Tile::kHeadDimQk);
  flashcore_attention a = p.a;
  document_rule rule;
  __half *q, *k, *v, *out;
  float *gate;
  std::vector<__half> o[2];
  std::vector<float> lse[2];
  verdict verdicts[2];
  float us[2];
  cudaEvent_t start, stop;
  CUDA_TRY(cudaEventCreate(&start));
  CUDA_TRY(cudaEventCreate(&stop));
  CUDA_TRY(upload(p.q, &q));
  CUDA_TRY(upload(p.k, &k));
  CUDA_TRY(upload(p.v, &v));
  CUDA_TRY(upload(p.document, const_cast<int32_t **>(&rule.document)));
  CUDA_TRY(upload(p.score, const_cast<float **>(&rule.score)));
  CUDA_TRY(upload(p.gate, &gate));
  CUDA_TRY(cudaMalloc(&out, p.q.size() * sizeof(__half)));
  CUDA_TRY(cudaMalloc(&a.lse, p.gate.size() * sizeof(float)));
  a.q = flashcore_bshd(q, seq, heads, a.dim_qk), a.k = flashcore_bshd(k, seq, heads_kv, a.dim_qk);
  a.v = flashcore_bshd(v, seq, heads_kv, a.dim_v), a.o = flashcore_bshd(out, seq, heads, a.dim_v);
  constexpr int kLaunches = 20;
  for (int n = 0; n < 2; ++n) {
    CUDA_TRY(cudaMemset(out, 0xff, p.q.size() * sizeof(__half))); // NaN
    CUDA_TRY(cudaMemset(a.lse, 0xff, p.gate.size() * sizeof(float)));
    CUDA_TRY(launch<Tile>(a, rule, n == 0 ? nullptr : gate, nullptr));
    CUDA_TRY(cudaEventRecord(start));
    for (int i = 0; i < kLaunches; ++i) CUDA_TRY(launch<Tile>(a, rule, n == 0 ? nullptr : gate, nullptr));
    CUDA_TRY(cudaEventRecord(stop));
    CUDA_TRY(cudaEventSynchronize(stop));
    CUDA_TRY(cudaEventElapsedTime(&us[n], start, stop));
    o[n].resize(p.q.size()), lse[n].resize(p.gate.size());
    CUDA_TRY(cudaMemcpy(o[n].data(), out, p.q.size() * sizeof(__half), cudaMemcpyDeviceToHost));
    CUDA_TRY(cudaMemcpy(lse[n].data(), a.lse, p.gate.size() * sizeof(float), cudaMemcpyDeviceToHost));
  }
  compare(p, o, lse, verdicts);
  for (int n = 0; n < 2; ++n) {
    printf("batch %d heads %d over %d, seq %4d, dim %3d  %-18s  %7.1f us  max error o %.2e, lse %.2e: %s\n", batch, heads, heads_kv, seq, a.dim_qk,
           n == 0 ? "library's kernel" : "own kernel, gated", 1e3f * us[n] / kLaunches, verdicts[n].o, verdicts[n].lse,
           verdicts[n].right ? "right" : "WRONG");
    *right &= verdicts[n].right;
  }
  return 0; // memory is given back by the end of the process
}

int main() {
  int devices = 0, major = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("score_rule: no GPU here, nothing was run\n");
    return 0;
  }
  CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (major < 8) {
    printf("score_rule: mma.sync with cp.async needs sm_80, nothing was run\n");
    return 0;
  }
  bool right = true;
  if (run<flashcore::mma_tile_for<__half, 64, 64, flashcore::kNarrow>>(2, 6, 2, 1037, &right)) return 2;
  if (run<flashcore::mma_tile_for<__half, 128, 128, flashcore::kNarrow>>(1, 4, 4, 997, &right)) return 2;
  if (run<flashcore::mma_tile_for<__half, 64, 64, flashcore::kNarrow>>(1, 1, 1, 1, &right)) return 2;
  return right ? 0 : 1;
}
