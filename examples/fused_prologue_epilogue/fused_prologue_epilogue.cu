// Demonstrates what fusion saves: rotary embedding of Q as a prologue and a sigmoid gate on O as an epilogue, both inside the Hopper kernel.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a examples/fused_prologue_epilogue/fused_prologue_epilogue.cu -o fused
//   ./fused
//
// Q comes as the projection left it, K is rotated already, as it lies in a cache, and every element of O has a gate. Two ways:
//
//   fused     one kernel: Q is rotated where it lies in shared memory, O is gated before it leaves the registers
//   unfused   three: Q is rotated out of place, attention, O is gated in place
//
// Both are checked against a plain fp64 loop on a small problem, against each other on a large one, and timed there. No building block needs the C
// API, so nothing but this file is compiled. Exit code: 0 right, or no GPU with sm_90 to try it on; 1 wrong; 2 a CUDA error.
#include "../../flashcore_wgmma.cuh"
#include "../common/gpu_problem.cuh"

#include <algorithm>
#include <cmath>
#include <vector>

constexpr int kDim = 128, kChunks = kDim / 16; // of 8 dims, in each half of a row: dim i is paired with dim i + kDim / 2

struct alignas(16) half8 {
  uint32_t x[4];
};
static __device__ __forceinline__ float2 unpack(uint32_t x) { return __half22float2(*reinterpret_cast<const __half2 *>(&x)); }
static __device__ __forceinline__ uint32_t pack(float x, float y) {
  const __half2 h = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t *>(&h);
}

// WHY fmaf by name: the compiler has nothing left to contract, and all ways of rotating give the same bits.
static __host__ __device__ inline void rotate(float &x, float &y, float cosine, float sine) {
  const float turned = fmaf(x, cosine, -(y * sine));
  y = fmaf(y, cosine, x * sine);
  x = turned;
}

// Where in the table cos and sin of dims 8 chunk + 2 i and the next are: [seq][4][kChunks] of float4. Lanes that share a row read side by side so.
static __host__ __device__ inline int turn_at(int position, int chunk, int i) { return (position * 4 + i) * kChunks + chunk; }

// The chunk at `low` and the one that is paired with it, at `high`. turns: from turn_at(position, chunk, 0) on
static __device__ __forceinline__ void rotate_chunks(const __half *low, const __half *high, const float4 *turns, __half *to_low, __half *to_high) {
  half8 x = *reinterpret_cast<const half8 *>(low), y = *reinterpret_cast<const half8 *>(high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 turn = __ldg(turns + i * kChunks); // WHY: a plain load would wait for the stores of the row before
    float2 u = unpack(x.x[i]), v = unpack(y.x[i]);
    rotate(u.x, v.x, turn.x, turn.y);
    rotate(u.y, v.y, turn.z, turn.w);
    x.x[i] = pack(u.x, u.y), y.x[i] = pack(v.x, v.y);
  }
  *reinterpret_cast<half8 *>(to_low) = x, *reinterpret_cast<half8 *>(to_high) = y;
}

// 8 values times the sigmoid of their gates, rounded and stored.
static __device__ __forceinline__ void store_gated(const float (&x)[8], const half8 &gate, __half *to) {
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 g = unpack(gate.x[i]);
    y[i] = pack(__fdividef(x[2 * i], 1.f + __expf(-g.x)), __fdividef(x[2 * i + 1], 1.f + __expf(-g.y)));
  }
  __stcs(reinterpret_cast<uint4 *>(to), make_uint4(y[0], y[1], y[2], y[3]));
}

// [readme:hooks]
// Rotates Q in shared memory: 64 rows, shared out over the 128 threads of a warpgroup.
struct rope_on_q {
  static constexpr bool kActive = true;
  const float4 *table; // cos and sin by position, see turn_at
  const __half *gate;  // laid out as Q is

  __device__ void operator()(const flashcore_attention &a, const flashcore::wgmma_q_rows<__half> &q) const {
    const int thread = (int)(threadIdx.x % 128), chunk = thread % kChunks;
    // The tile's gates will be wanted when it ends: into L2 meanwhile. A row of them is two lines of 128 bytes.
    if (thread / 2 < q.live) asm volatile("prefetch.global.L2 [%0];" ::"l"(gate + q.offset + thread / 2 * a.q.stride_s + thread % 2 * 64));
#pragma unroll 2 // the angles of two rows are on their way at a time
    for (int row = thread / kChunks; row < q.live; row += 128 / kChunks) {
      __half *low = q.chunk(row, chunk), *high = q.chunk(row, chunk + kChunks);
      rotate_chunks(low, high, table + turn_at(q.query + row, chunk, 0), low, high);
    }
  }
};

// Gets a lane's share of a row of O in f32, and stores it times its gates.
struct gate_on_o {
  static constexpr bool kActive = true;
  const __half *gate; // before the sigmoid; laid out as O is

  template <int kChunks>
  __device__ void operator()(const flashcore_attention &a, const float (&x)[kChunks][8], const flashcore::wgmma_output &at) const {
    half8 g[kChunks]; // all on their way before the first is needed
#pragma unroll
    for (int i = 0; i < kChunks; ++i) g[i] = *reinterpret_cast<const half8 *>(gate + at.offset + 32 * i);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) store_gated(x[i], g[i], static_cast<__half *>(a.o.data) + at.offset + 32 * i);
  }
};
// [readme:end]

// [readme:hooks_launch]
template <typename Prologue, typename Epilogue>
static cudaError_t attend(const flashcore_attention &a, const Prologue &prologue, const Epilogue &epilogue, cudaStream_t stream) {
  using tile = flashcore::wgmma_tile_for<__half, kDim, kDim, flashcore::kLongTile>;
  return flashcore::wgmma_launch<tile>(a, stream, flashcore::no_rule(), prologue, epilogue);
}
// [readme:end]

// ---- the same in kernels of their own ----------------------------------------------------------------------------------------------

// x rotated to y: [rows = batch, seq, heads][kDim]
static __global__ void __launch_bounds__(256) rope(const __half *x, __half *y, const float4 *table, int rows, int seq, int heads) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), chunk = i % kChunks, row = i / kChunks;
  if (row >= rows) return;
  const int64_t low = (int64_t)row * kDim + 8 * chunk, high = low + kDim / 2;
  rotate_chunks(x + low, x + high, table + turn_at(row / heads % seq, chunk, 0), y + low, y + high);
}

static __global__ void __launch_bounds__(256) gate_in_place(__half *o, const __half *gate, int64_t chunks) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i >= chunks) return;
  const half8 g = *reinterpret_cast<const half8 *>(gate + 8 * i), x = *reinterpret_cast<const half8 *>(o + 8 * i);
  const float2 y[4] = {unpack(x.x[0]), unpack(x.x[1]), unpack(x.x[2]), unpack(x.x[3])};
  store_gated({y[0].x, y[0].y, y[1].x, y[1].y, y[2].x, y[2].y, y[3].x, y[3].y}, g, o + 8 * i);
}

// ---- a problem on the device -------------------------------------------------------------------------------------------------------

struct rope_problem {
  flashcore_attention a = {}; // Q as it came; a descriptor that kernels get directly needs no flashcore_init
  int64_t items_q, items_kv;
  __half *q, *q_rotated, *k, *k_rotated, *v, *o, *gate;
  float4 *table;

  cudaError_t rotate_heads(const __half *x, __half *y, int heads, cudaStream_t stream) const {
    const int rows = a.batch * a.seq_q * heads;
    rope<<<(unsigned)(rows * kChunks + 255) / 256, 256, 0, stream>>>(x, y, table, rows, a.seq_q, heads);
    return cudaGetLastError();
  }
  cudaError_t rotate_q(cudaStream_t stream) const { return rotate_heads(q, q_rotated, a.heads_q, stream); }
  cudaError_t attend_only(cudaStream_t stream) const {
    flashcore_attention plain = a;
    plain.q.data = q_rotated;
    return attend(plain, flashcore::no_prologue{}, flashcore::no_epilogue{}, stream);
  }
  cudaError_t gate_o(cudaStream_t stream) const {
    gate_in_place<<<(unsigned)((items_q / 8 + 255) / 256), 256, 0, stream>>>(o, gate, items_q / 8);
    return cudaGetLastError();
  }
  cudaError_t unfused(cudaStream_t stream) const {
    cudaError_t error = rotate_q(stream);
    if (error == cudaSuccess) error = attend_only(stream);
    return error == cudaSuccess ? gate_o(stream) : error;
  }
  cudaError_t fused(cudaStream_t stream) const { return attend(a, rope_on_q{table, gate}, gate_on_o{gate}, stream); }
  cudaError_t without_rope(cudaStream_t stream) const { return attend(a, flashcore::no_prologue{}, gate_on_o{gate}, stream); }
  cudaError_t without_gate(cudaStream_t stream) const { return attend(a, rope_on_q{table, gate}, flashcore::no_epilogue{}, stream); }
};
using launcher = cudaError_t (rope_problem::*)(cudaStream_t) const;

static double angle(int position, int pair) { return position * std::pow(10000.0, -2.0 * pair / kDim); }

static std::vector<float4> make_table(int seq) {
  std::vector<float4> table((size_t)turn_at(seq, 0, 0));
  for (int position = 0; position < seq; ++position)
    for (int pair = 0; pair < kDim / 2; pair += 2) {
      const double x = angle(position, pair), y = angle(position, pair + 1);
      table[(size_t)turn_at(position, pair / 8, pair % 8 / 2)] = {(float)std::cos(x), (float)std::sin(x), (float)std::cos(y), (float)std::sin(y)};
    }
  return table;
}

static int make_rope_problem(int batch, int heads, int heads_kv, int seq, rope_problem *p) {
  flashcore_attention &a = p->a;
  a.dtype = a.dtype_kv = a.dtype_o = FLASHCORE_F16;
  a.batch = batch, a.heads_q = heads, a.heads_kv = heads_kv, a.seq_q = a.seq_kv = seq, a.dim_qk = a.dim_v = kDim;
  a.scale = 1.f / sqrtf((float)kDim);
  a.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
  a.window_left = a.window_right = FLASHCORE_UNBOUNDED; // what flashcore_forward would make of "no window"
  p->items_q = (int64_t)batch * seq * heads * kDim, p->items_kv = (int64_t)batch * seq * heads_kv * kDim;
  for (__half **x : {&p->q, &p->q_rotated, &p->o, &p->gate}) CUDA_TRY(cudaMalloc(x, (size_t)p->items_q * sizeof(__half)));
  for (__half **x : {&p->k, &p->k_rotated, &p->v}) CUDA_TRY(cudaMalloc(x, (size_t)p->items_kv * sizeof(__half)));
  if (fill(p->q, a.dtype, p->items_q, 1) || fill(p->gate, a.dtype, p->items_q, 2)) return 2;
  if (fill(p->k, a.dtype, p->items_kv, 3) || fill(p->v, a.dtype, p->items_kv, 4)) return 2;
  const std::vector<float4> table = make_table(seq);
  CUDA_TRY(cudaMalloc(&p->table, table.size() * sizeof(float4)));
  CUDA_TRY(cudaMemcpy(p->table, table.data(), table.size() * sizeof(float4), cudaMemcpyHostToDevice));
  CUDA_TRY(p->rotate_heads(p->k, p->k_rotated, heads_kv, nullptr));
  a.q = flashcore_bshd(p->q, seq, heads, kDim), a.k = flashcore_bshd(p->k_rotated, seq, heads_kv, kDim);
  a.v = flashcore_bshd(p->v, seq, heads_kv, kDim), a.o = flashcore_bshd(p->o, seq, heads, kDim);
  return 0;
}

// ---- the checks --------------------------------------------------------------------------------------------------------------------

constexpr double kUnit = 1.0 / 2048; // of fp16: what a rounding costs at most, as a part of the number;
constexpr double kStep = 1e-7;       // where numbers are small, three roundings cost less than this

static double rounded(double x) { return __half2float(__double2half(x)); }

// A row in fp64, straight from the definition, rounded.
static void rotate_row(double *x, int position) {
  for (int i = 0; i < kDim / 2; ++i) {
    const double low = x[i], high = x[i + kDim / 2], c = std::cos(angle(position, i)), s = std::sin(angle(position, i));
    x[i] = rounded(low * c - high * s), x[i + kDim / 2] = rounded(high * c + low * s);
  }
}

// Pairs, table and arithmetic, on the host. Limit: what f32 loses, which may also tip a rounding to the other side.
static bool rotation_is_right() {
  const int seq = 4096;
  const std::vector<float4> table = make_table(seq);
  double worst = 0;
  for (int position = 0; position < seq; position += 13) {
    float x[kDim];
    double expected[kDim];
    for (int d = 0; d < kDim; ++d) expected[d] = x[d] = (float)rounded(2 * std::sin(7.0 * d + position));
    rotate_row(expected, position);
    for (int i = 0; i < kDim / 2; i += 2) {
      const float4 turn = table[(size_t)turn_at(position, i / 8, i % 8 / 2)];
      rotate(x[i], x[i + kDim / 2], turn.x, turn.y);
      rotate(x[i + 1], x[i + 1 + kDim / 2], turn.z, turn.w);
    }
    for (int d = 0; d < kDim; ++d) worst = std::max(worst, std::fabs(rounded(x[d]) - expected[d]) / (2 * kUnit * std::fabs(expected[d]) + 1e-6));
  }
  printf("rotation on the host: error at most %.2f of its limit: %s\n", worst, worst <= 1 ? "right" : "WRONG");
  return worst <= 1;
}

// O in fp64, and what rounding may cost each element: half an ulp of each weight and of the result, four times over. An element of Q or K that f32
// rounds the other way (one in thousands, by an ulp) is lost in that.
struct expectation {
  std::vector<double> o, limit;
};

static int expect(const rope_problem &p, expectation *e) {
  const int seq = p.a.seq_q, heads = p.a.heads_q, heads_kv = p.a.heads_kv;
  std::vector<__half> q, k, v, gate;
  if (download(p.q, p.items_q, &q) || download(p.k, p.items_kv, &k) || download(p.v, p.items_kv, &v) || download(p.gate, p.items_q, &gate)) return 2;
  std::vector<double> keys((size_t)seq * kDim), values(keys), x((size_t)seq);
  const auto load = [](const std::vector<__half> &from, size_t row, double *to) {
    for (int d = 0; d < kDim; ++d) to[d] = __half2float(from[row * kDim + (size_t)d]);
  };
  e->o.assign(q.size(), 0.0), e->limit.assign(q.size(), 0.0);
  for (int b = 0; b < p.a.batch; ++b)
    for (int h = 0; h < heads; ++h) {
      for (int j = 0; j < seq; ++j) {
        const size_t row = ((size_t)b * seq + j) * heads_kv + h / (heads / heads_kv);
        load(k, row, &keys[(size_t)j * kDim]), load(v, row, &values[(size_t)j * kDim]);
        rotate_row(&keys[(size_t)j * kDim], j);
      }
      for (int i = 0; i < seq; ++i) {
        const size_t row = ((size_t)b * seq + i) * heads + h;
        double query[kDim], gates[kDim], m = -INFINITY, l = 0, *o = &e->o[row * kDim], *limit = &e->limit[row * kDim];
        load(q, row, query), load(gate, row, gates);
        rotate_row(query, i);
        for (int j = 0; j <= i; ++j) {
          x[(size_t)j] = 0;
          for (int d = 0; d < kDim; ++d) x[(size_t)j] += query[d] * keys[(size_t)j * kDim + d] * p.a.scale;
          m = std::max(m, x[(size_t)j]);
        }
        for (int j = 0; j <= i; ++j) l += x[(size_t)j] = std::exp(x[(size_t)j] - m);
        for (int j = 0; j <= i; ++j)
          for (int d = 0; d < kDim; ++d) {
            const double term = x[(size_t)j] / l * values[(size_t)j * kDim + d];
            o[d] += term, limit[d] += term * term;
          }
        for (int d = 0; d < kDim; ++d) {
          const double g = 1 / (1 + std::exp(-gates[d]));
          o[d] *= g, limit[d] = 4 * kUnit * (g * std::sqrt(limit[d]) + std::fabs(o[d])) + kStep;
        }
      }
    }
  return 0;
}

// Into an O that held NaN.
static int run(const rope_problem &p, launcher launch, std::vector<__half> *o) {
  CUDA_TRY(cudaMemset(p.o, 0xff, (size_t)p.items_q * sizeof(__half)));
  CUDA_TRY((p.*launch)(nullptr));
  return download(p.o, p.items_q, o);
}

// Both ways against fp64; and what is left out is missed.
static int check_small(bool *right) {
  const struct {
    const char *name;
    launcher launch;
    bool whole;
  } variants[] = {{"fused", &rope_problem::fused, true},
                  {"unfused", &rope_problem::unfused, true},
                  {"without RoPE", &rope_problem::without_rope, false},
                  {"without gate", &rope_problem::without_gate, false}};
  rope_problem p;
  expectation e;
  std::vector<__half> o;
  if (make_rope_problem(2, 6, 2, 333, &p) || expect(p, &e)) return 2;
  for (const auto &variant : variants) {
    if (run(p, variant.launch, &o)) return 2;
    double worst = 0;
    bool within = true;
    for (size_t i = 0; i < o.size(); ++i) {
      const double part = std::fabs(__half2float(o[i]) - e.o[i]) / e.limit[i];
      worst = std::max(worst, part);
      within &= part <= 1; // false for NaN
    }
    printf("small problem, %-12s  error at most %.2f of its limit: %s\n", variant.name, worst,
           within != variant.whole ? "WRONG"
           : within                ? "right"
                                   : "differs, as it should");
    *right &= within == variant.whole;
  }
  return 0; // memory is given back by the end of the process
}

// Three roundings lie between them: each rounds its result, the unfused one also O before the gate. Four are allowed.
static int compare_large(const rope_problem &p, bool *right) {
  std::vector<__half> fused, unfused;
  if (run(p, &rope_problem::fused, &fused) || run(p, &rope_problem::unfused, &unfused)) return 2;
  double worst = 0;
  bool within = true;
  for (size_t i = 0; i < fused.size(); ++i) {
    const double x = __half2float(fused[i]), difference = std::fabs(x - __half2float(unfused[i]));
    worst = std::max(worst, difference);
    within &= difference <= 4 * kUnit * std::fabs(x) + kStep;
  }
  printf("large problem, fused and unfused differ by at most %.2e: %s\n", worst, within ? "right" : "WRONG");
  *right &= within;
  return 0;
}

// ---- the times ---------------------------------------------------------------------------------------------------------------------

enum { kLaunches = 4, kRounds = 21 };

static int capture(const rope_problem &p, launcher launch, cudaStream_t stream, cudaGraphExec_t *exec) {
  cudaGraph_t graph;
  CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) CUDA_TRY((p.*launch)(stream));
  CUDA_TRY(cudaStreamEndCapture(stream, &graph));
  CUDA_TRY(cudaGraphInstantiate(exec, graph, 0));
  CUDA_TRY(cudaGraphDestroy(graph));
  return 0;
}

// Replays of CUDA graphs in turn; the median of the rounds after one to warm up.
static int time_large(const rope_problem &p, const char *gpu) {
  struct {
    const char *name;
    launcher launch;
    cudaGraphExec_t exec;
    float ms[1 + kRounds];
    double us;
  } contenders[] = {{"fused", &rope_problem::fused, {}, {}, 0},
                    {"unfused, all three", &rope_problem::unfused, {}, {}, 0},
                    {"unfused, RoPE", &rope_problem::rotate_q, {}, {}, 0},
                    {"unfused, attention", &rope_problem::attend_only, {}, {}, 0},
                    {"unfused, gate", &rope_problem::gate_o, {}, {}, 0}};
  cudaStream_t stream;
  cudaEvent_t start, stop;
  CUDA_TRY(cudaStreamCreate(&stream));
  CUDA_TRY(cudaEventCreate(&start));
  CUDA_TRY(cudaEventCreate(&stop));
  for (auto &c : contenders)
    if (capture(p, c.launch, stream, &c.exec)) return 2;
  for (int round = 0; round <= kRounds; ++round)
    for (auto &c : contenders)
      if (time_replay(c.exec, stream, start, stop, &c.ms[round])) return 2;
  for (auto &c : contenders) {
    qsort(c.ms + 1, kRounds, sizeof c.ms[0], compare_floats);
    c.us = 1e3 * c.ms[1 + kRounds / 2] / kLaunches;
    printf("%s  %-18s %8.1f us\n", gpu, c.name, c.us);
  }
  printf("%s  %-18s %8.1f %%\n", gpu, "saved by fusing", 100 * (1 - contenders[0].us / contenders[1].us));
  return 0;
}

int main() {
  int devices = 0;
  cudaDeviceProp device;
  rope_problem large;
  bool right = rotation_is_right();
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("fused_prologue_epilogue: no GPU here, nothing else was run\n");
    return right ? 0 : 1;
  }
  CUDA_TRY(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9 || device.minor != 0) {
    printf("fused_prologue_epilogue: wgmma needs sm_90, this GPU is sm_%d%d; nothing else was run\n", device.major, device.minor);
    return right ? 0 : 1;
  }
  if (check_small(&right)) return 2;
  if (make_rope_problem(4, 16, 16, 4096, &large) || compare_large(large, &right)) return 2;
  printf("batch %d, heads %d, seq %d, dim %d, causal, fp16:\n", large.a.batch, large.a.heads_q, large.a.seq_q, kDim);
  if (time_large(large, device.name)) return 2;
  return right ? 0 : 1;
}
