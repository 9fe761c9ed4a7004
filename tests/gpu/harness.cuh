/* The harness: from one Case (every choice of a problem, printable and parsable) to tensors, a run of the library, and a verdict.
 *
 * Memory is hostile: every allocation, guard bands included, starts as one NaN pattern; data is written only where the contract lets a kernel
 * read. After a run each live output is compared and put back to the pattern, and then the whole allocation must be the pattern again: this
 * one check covers guard bands, gaps between strided rows, and rows past the end of a sequence. Inputs must be unchanged. */
#ifndef FLASHCORE_TESTS_HARNESS_CUH
#define FLASHCORE_TESTS_HARNESS_CUH

#include "oracle.cuh"
#include "report.h"

#include <algorithm>
#include <cmath>
#include <string.h>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

/* ---- the case ------------------------------------------------------------------------------------------------------------------ */

enum Layout {
  LAYOUT_BSHD,
  LAYOUT_BHSD,
  LAYOUT_PACKED,   // Q, K, V side by side in each row of one allocation
  LAYOUT_SLICE,    // odd offset and odd strides: aligned to an element only
  LAYOUT_HEAD0,    // all KV heads are one (stride 0)
  LAYOUT_BATCH0,   // all batch entries share K and V (stride 0)
  LAYOUT_NEGATIVE, // Q, K, V stored last row first
  LAYOUT_PADDED,   // 16-byte aligned, with gaps after dims, heads and rows
  LAYOUT_FAR,      // rows so far apart that offsets pass 2^31 elements
  LAYOUT_COUNT
};

enum Data {
  DATA_NORMAL,
  DATA_STD16,      // logits of standard deviation 16
  DATA_RAMP,       // +10 nats every 64 keys
  DATA_LAST,       // the last key is 20 nats above the rest
  DATA_FIRST,      // the first key is: processed last by a kernel that goes backwards
  DATA_HUGE,       // logits of +-2.5e5
  DATA_CONSTANT,   // all logits equal, all values of a dim equal
  DATA_NAN_ROW,    // one query row is NaN
  DATA_EQUAL_4E8,  // all logits of a row are equal, up to 4e8: fp32 numbers are then 32 apart, and exp2 of a rounding error overflows
  DATA_EQUAL_3E9,  // the same, up to 3e9
  DATA_BACKGROUND, // the first and last key are 10 nats above the rest, which are all equal, and have positive values: their roundings add up
  DATA_POSITIVE,   // values of one sign, |normal| + 0.5: an accumulator that drops low bits then loses what is small beside the sum
  DATA_COUNT
};

/* Only where the logits stay equal is there a right answer in fp32: no bias and no ALiBi beside these, and no splits, since the LSE of a part does
 * not tell how many keys it had. */
static __host__ __device__ inline bool equal_logits(int data) { return data == DATA_EQUAL_4E8 || data == DATA_EQUAL_3E9; }

enum Lengths { SEQLENS_KV = 1, SEQLENS_Q = 2, CU_SEQLENS_KV = 4, CU_SEQLENS_Q = 8 };
enum Bias { BIAS_NONE, BIAS_DENSE, BIAS_SHARED, BIAS_PER_KEY, BIAS_HIDING, BIAS_TRANSPOSED, BIAS_COUNT };
enum Mask { MASK_NONE, MASK_DENSE, MASK_SHARED, MASK_COUNT };
enum Tile { TILE_AUTO, TILE_WIDE, TILE_COMPACT, TILE_NARROW, TILE_COUNT }; // of the mma backend, where the problem may have it

struct Case {
  int dtype = FLASHCORE_F16, dtype_kv = 0, dtype_o = 0;
  int batch = 1, heads_q = 1, heads_kv = 1, seq_q = 64, seq_kv = 64, dim_qk = 64, dim_v = 64;
  int lse = 1; // 0 not wanted, 1 natural, 2 base 2
  int causal = 0, window = 0, left = -1, right = -1;
  int alibi = 0; // 1 shared by the batch, 2 per batch entry
  int bias = 0, bias_dtype = 0, mask = 0, sink = 0;
  int lengths = 0; // bits of Lengths
  int page = 0;    // page size
  int splits = 0, split_len = 0;
  int descale = 0; // of fp8 tensors: 1 one for each, 2 per batch entry and head; likewise, but two of three are NaN or negative: 3 of O, 4 of all
  int amax = 0;    // 1: wanted, where O is fp8
  int backend = 0, tile = 0, layout = 0, data = 0, broken = 0, seed = 1;
  float scale = 0, softcap = 0;
};

using WholeField = int Case::*;
using RealField = float Case::*;
struct CaseField { // one of the two pointers is set
  const char *name;
  WholeField whole;
  RealField real;
};

inline const std::vector<CaseField> &case_fields() {
  static const std::vector<CaseField> fields = {
      {"dtype", &Case::dtype, nullptr},     {"dtype_kv", &Case::dtype_kv, nullptr}, {"dtype_o", &Case::dtype_o, nullptr},
      {"batch", &Case::batch, nullptr},     {"heads_q", &Case::heads_q, nullptr},   {"heads_kv", &Case::heads_kv, nullptr},
      {"seq_q", &Case::seq_q, nullptr},     {"seq_kv", &Case::seq_kv, nullptr},     {"dim_qk", &Case::dim_qk, nullptr},
      {"dim_v", &Case::dim_v, nullptr},     {"lse", &Case::lse, nullptr},           {"causal", &Case::causal, nullptr},
      {"window", &Case::window, nullptr},   {"left", &Case::left, nullptr},         {"right", &Case::right, nullptr},
      {"alibi", &Case::alibi, nullptr},     {"bias", &Case::bias, nullptr},         {"bias_dtype", &Case::bias_dtype, nullptr},
      {"mask", &Case::mask, nullptr},       {"sink", &Case::sink, nullptr},         {"lengths", &Case::lengths, nullptr},
      {"page", &Case::page, nullptr},       {"splits", &Case::splits, nullptr},     {"split_len", &Case::split_len, nullptr},
      {"descale", &Case::descale, nullptr}, {"amax", &Case::amax, nullptr},         {"backend", &Case::backend, nullptr},
      {"tile", &Case::tile, nullptr},       {"layout", &Case::layout, nullptr},     {"data", &Case::data, nullptr},
      {"broken", &Case::broken, nullptr},   {"seed", &Case::seed, nullptr},         {"scale", nullptr, &Case::scale},
      {"softcap", nullptr, &Case::softcap},
  };
  return fields;
}

/* 16-bit Q beside fp8 K and V? */
inline bool is_mixed(const Case &c) { return oracle::is_fp8(c.dtype_kv) && !oracle::is_fp8(c.dtype); }

/* "heads_q=4 causal=1 ...": the fields that differ from the defaults. */
inline std::string to_string(const Case &c) {
  const Case defaults;
  std::string text;
  for (const CaseField &f : case_fields()) {
    if (f.whole && c.*f.whole != defaults.*f.whole) text += format("%s%s=%d", text.empty() ? "" : " ", f.name, c.*f.whole);
    if (f.real && c.*f.real != defaults.*f.real) text += format("%s%s=%.9g", text.empty() ? "" : " ", f.name, (double)(c.*f.real));
  }
  return text;
}

inline std::string reproduce(const Case &c) { return "test_sweep --case \"" + to_string(c) + "\""; }

/* False where a word is not name=number with a known name. */
inline bool parse(const std::string &text, Case *c) {
  std::istringstream words(text);
  std::string word;
  while (words >> word) {
    const size_t equals = word.find('=');
    bool known = false;
    for (const CaseField &f : case_fields()) {
      if (equals == std::string::npos || word.substr(0, equals) != f.name) continue;
      if (f.whole) c->*f.whole = atoi(word.c_str() + equals + 1);
      else c->*f.real = (float)atof(word.c_str() + equals + 1);
      known = true;
    }
    if (!known) return false;
  }
  return true;
}

/* ---- memory -------------------------------------------------------------------------------------------------------------------- */

constexpr uint32_t kPoison = 0x7fef7fefu;  // a NaN as fp32, as two fp16 and as two bf16; as an integer far out of every range
constexpr uint32_t kPoison8 = 0x7fff7fffu; // for fp8 tensors: a NaN in each byte, e4m3 or e5m2
constexpr size_t kGuardBytes = 16384;

static __global__ void fill_words(uint32_t *words, int64_t count, uint32_t value) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) words[i] = value;
}

/* result[0]: words that differ from `value`; result[1]: a sum that changes when any word changes. */
static __global__ void inspect_words(const uint32_t *words, int64_t count, uint32_t value, unsigned long long *result) {
  unsigned long long differing = 0, sum = 0;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    differing += words[i] != value;
    sum += (words[i] + 1ull) * (2ull * (unsigned long long)i + 1ull);
  }
  if (differing) atomicAdd(&result[0], differing);
  atomicAdd(&result[1], sum);
}

inline unsigned grid_for(int64_t items) { return (unsigned)std::min<int64_t>(std::max<int64_t>((items + 255) / 256, 1), 4096); }

/* Counters that kernels add to; read after a synchronisation. */
template <typename T> struct Scalar {
  T *device = nullptr;
  explicit Scalar(int byte = 0) {
    CUDA_OK(cudaMalloc(&device, sizeof(T)));
    CUDA_OK(cudaMemset(device, byte, sizeof(T)));
  }
  ~Scalar() { cudaFree(device); }
  Scalar(const Scalar &) = delete;
  T read() const {
    T value;
    CUDA_OK(cudaMemcpy(&value, device, sizeof(T), cudaMemcpyDeviceToHost));
    return value;
  }
};

struct Words {
  unsigned long long differing, sum;
};

/* One device allocation between two guard bands, all of it poison at first. */
struct Memory {
  char *base = nullptr;
  size_t bytes = 0; // guards included; whole words
  uint32_t value;

  explicit Memory(size_t payload, uint32_t poison_ = kPoison) : bytes(2 * kGuardBytes + (payload + 255) / 256 * 256), value(poison_) {
    CUDA_OK(cudaMalloc(&base, bytes));
    poison();
  }
  ~Memory() { cudaFree(base); }
  Memory(const Memory &) = delete;

  template <typename T = void> T *data() const { return reinterpret_cast<T *>(base + kGuardBytes); }
  int64_t words() const { return (int64_t)(bytes / 4); }
  void poison() { fill_words<<<grid_for(words()), 256>>>((uint32_t *)base, words(), value); }
  Words inspect() const {
    Scalar<Words> result;
    inspect_words<<<grid_for(words()), 256>>>((const uint32_t *)base, words(), value, (unsigned long long *)result.device);
    return result.read();
  }
  template <typename T> void upload(const std::vector<T> &values) {
    CUDA_OK(cudaMemcpy(data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
};

/* ---- data ---------------------------------------------------------------------------------------------------------------------- */

/* A number from a seed and a place: the same on every run and whatever the order of the threads. */
static __host__ __device__ inline uint64_t hash(uint64_t seed, uint64_t x) {
  x += 0x9e3779b97f4a7c15ull * (seed + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

static __device__ inline float normal(uint64_t seed, uint64_t x) {
  const uint64_t bits = hash(seed, x);
  const float u = ((float)(bits >> 40) + 0.5f) * 0x1p-24f, angle = (float)(bits & 0xffffff) * 0x1p-24f;
  return sqrtf(-2.f * logf(u)) * cospif(2.f * angle);
}

static __device__ inline void write_element(void *p, int dtype, int64_t i, float x) {
  if (oracle::is_fp8(dtype)) static_cast<uint8_t *>(p)[i] = oracle::to_fp8(dtype, x);
  else if (dtype == FLASHCORE_F32) static_cast<float *>(p)[i] = x;
  else if (dtype == FLASHCORE_F16) static_cast<__half *>(p)[i] = __float2half_rn(x);
  else static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(x);
}

enum Role { ROLE_Q, ROLE_K, ROLE_V, ROLE_O };

/* What a kernel needs to visit the live rows of one tensor. */
struct Walk {
  flashcore_tensor t;
  int dtype, batch, rows, heads, dim; // rows: capacity of one sequence
  const int32_t *len;                 // live rows of each sequence, as the host worked them out
  const int32_t *cu;                  // packed: first row of each sequence
  const int32_t *pages;               // paged: the table
  int64_t pages_stride;
  int page_size, num_pages;
};

/* Offset of (b, row, head, 0); oracle::kMissing where that row is not live. */
static __device__ inline int64_t place(const Walk &w, int b, int row, int head) {
  if (row >= w.len[b]) return oracle::kMissing;
  const int64_t at = head * w.t.stride_h;
  if (w.cu) return at + ((int64_t)w.cu[b] + row) * w.t.stride_s;
  if (!w.pages) return at + b * w.t.stride_b + row * w.t.stride_s;
  const int page = w.pages[b * w.pages_stride + row / w.page_size];
  return page < 0 || page >= w.num_pages ? oracle::kMissing : at + page * w.t.stride_b + row % w.page_size * w.t.stride_s;
}

struct Content {
  int role, data;
  uint64_t seed;
  float lead, step; // the structured part of a logit is q[0] * k[0]: lead on the query side, in steps on the key side
  int nan_b, nan_h, nan_i;
};

static __device__ inline float content_at(const Content &c, int b, int row, int head, int d, int len, int64_t address) {
  const float x = normal(c.seed * 4 + c.role, (uint64_t)address);
  const bool equal = c.data == DATA_CONSTANT || (c.data == DATA_BACKGROUND && row > 0 && row < len - 1);
  if (c.role == ROLE_V) return equal ? 1.f + (float)(d % 7) / 8.f : c.data == DATA_POSITIVE ? fabsf(x) + 0.5f : x;
  if (c.data == DATA_CONSTANT) return c.role == ROLE_Q ? 1.f : 0.5f;
  if (equal_logits(c.data)) return c.role == ROLE_Q ? c.lead * (float)(16 + row % 16) / 32.f : c.step;
  if (c.data == DATA_STD16) return c.role == ROLE_Q ? 16.f * x : x;
  if (c.data == DATA_NAN_ROW) return c.role == ROLE_Q && b == c.nan_b && head == c.nan_h && row == c.nan_i ? NAN : x;
  if (c.data == DATA_BACKGROUND && c.role == ROLE_K) return d == 0 && (row == 0 || row == len - 1) ? c.step : 0.f;
  if (c.data == DATA_NORMAL || c.data == DATA_POSITIVE || d > 0) return x;
  if (c.role == ROLE_Q) return c.lead;
  if (c.data == DATA_RAMP) return c.step * (float)row;
  if (c.data == DATA_LAST) return row == len - 1 ? c.step : 0.f;
  if (c.data == DATA_FIRST) return row == 0 ? c.step : 0.f;
  return hash(c.seed, (uint64_t)row) & 1 ? c.step : -c.step; // DATA_HUGE
}

static __global__ void fill_tensor(Walk w, Content c) {
  const int64_t total = (int64_t)w.batch * w.rows * w.heads * w.dim;
  for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < total; n += (int64_t)gridDim.x * blockDim.x) {
    const int d = (int)(n % w.dim), head = (int)(n / w.dim % w.heads);
    const int row = (int)(n / w.dim / w.heads % w.rows), b = (int)(n / w.dim / w.heads / w.rows);
    const int64_t at = place(w, b, row, head);
    if (at != oracle::kMissing) write_element(w.t.data, w.dtype, at + d, content_at(c, b, row, head, d, w.len[b], at + d));
  }
}

struct BiasWalk {
  void *data;
  int dtype, mode, batch, heads, seq_q, seq_kv;
  int64_t stride_b, stride_h, stride_q, stride_kv;
  const int32_t *len_q, *len_kv;
  uint64_t seed;
};

static __global__ void fill_bias(BiasWalk w) {
  const int64_t total = (int64_t)w.batch * w.heads * w.seq_q * w.seq_kv;
  for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < total; n += (int64_t)gridDim.x * blockDim.x) {
    const int j = (int)(n % w.seq_kv), i = (int)(n / w.seq_kv % w.seq_q);
    const int h = (int)(n / w.seq_kv / w.seq_q % w.heads), b = (int)(n / w.seq_kv / w.seq_q / w.heads);
    if (i >= w.len_q[b] || j >= w.len_kv[b]) continue;
    const int64_t at = b * w.stride_b + h * w.stride_h + i * w.stride_q + j * w.stride_kv;
    const bool hide = w.mode == BIAS_HIDING && hash(w.seed + 1, (uint64_t)at) % 5 == 0;
    write_element(w.data, w.dtype, at, hide ? -INFINITY : normal(w.seed, (uint64_t)at));
  }
}

/* Random visibility, about 3 keys of 4; one row of eight hides everything. */
static __global__ void fill_mask(uint32_t *words, int64_t count, int64_t words_per_row, uint64_t seed) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    const uint64_t bits = hash(seed, (uint64_t)i);
    words[i] = hash(seed + 1, (uint64_t)(i / words_per_row)) % 8 == 0 ? 0u : (uint32_t)(bits | (bits >> 32));
  }
}

/* ---- comparison ---------------------------------------------------------------------------------------------------------------- */

struct Errors {
  unsigned long long live, max_out, max_low, max_round, max_ref, max_peak; // maxima are bits of non-negative doubles, which compare as integers do
  double sum_out, sum_low;
};
constexpr unsigned long long kNone = ~0ull; // no index

static __device__ inline bool same_kind(double x, double y) {
  if (isnan(x) || isnan(y)) return isnan(x) && isnan(y);
  return isinf(x) || isinf(y) ? x == y : true;
}

/* What adding and subtracting 0.3 costs in the output type: the scale of rounding that no kernel can be blamed for. */
static __device__ inline double rounding_noise(int dtype, double ref) {
  const float r = oracle::round_to(dtype, (float)ref), c = oracle::round_to(dtype, 0.3f);
  return fabs((double)oracle::round_to(dtype, oracle::round_to(dtype, r + c) - c) - (double)r);
}

/* Element n of (batch, heads, rows, dim), and where it lies in the tensor. */
struct Spot {
  int b, head, row, d;
  int64_t at; // oracle::kMissing where it is not live
};

static __device__ inline Spot spot(const Walk &w, int64_t n) {
  Spot s;
  s.d = (int)(n % w.dim);
  s.row = (int)(n / w.dim % w.rows);
  s.head = (int)(n / w.dim / w.rows % w.heads);
  s.b = (int)(n / w.dim / w.rows / w.heads);
  s.at = place(w, s.b, s.row, s.head);
  if (s.at != oracle::kMissing) s.at += s.d;
  return s;
}

static __host__ __device__ inline int64_t elements(const Walk &w) { return (int64_t)w.batch * w.heads * w.rows * w.dim; }

/* Launch with oracle::kThreads threads a block. */
static __global__ void gather_errors(Walk w, oracle::Output ref, Errors *errors) {
  __shared__ double scratch[oracle::kThreads];
  double largest[5] = {0, 0, 0, 0, 0}, sum[3] = {0, 0, 0}; // out, low, round, ref, peak; out, low, live
  for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < elements(w); n += (int64_t)gridDim.x * blockDim.x) {
    const Spot s = spot(w, n);
    if (s.at == oracle::kMissing) continue;
    const double out = oracle::read(w.t.data, w.dtype, s.at), exact = ref.o[n];
    sum[2] += 1;
    if (!isfinite(exact) || !isfinite(out)) continue; // find_bad_output judges these
    const double seen[5] = {fabs(out - exact), fabs((double)ref.low[n] - exact), rounding_noise(w.dtype, exact), fabs(exact), ref.peak[n / w.dim]};
    for (int k = 0; k < 5; ++k) largest[k] = fmax(largest[k], seen[k]);
    sum[0] += seen[0];
    sum[1] += seen[1];
  }
  for (double &x : largest) x = oracle::over_block(x, scratch, [](double a, double b) { return fmax(a, b); });
  for (double &x : sum) x = oracle::over_block(x, scratch, [](double a, double b) { return a + b; });
  if (threadIdx.x > 0) return;
  unsigned long long *maxima[5] = {&errors->max_out, &errors->max_low, &errors->max_round, &errors->max_ref, &errors->max_peak};
  for (int k = 0; k < 5; ++k) atomicMax(maxima[k], (unsigned long long)__double_as_longlong(largest[k]));
  atomicAdd(&errors->sum_out, sum[0]);
  atomicAdd(&errors->sum_low, sum[1]);
  atomicAdd(&errors->live, (unsigned long long)sum[2]);
}

/* The first live output further than `limit` from ref64, or NaN or infinite where ref64 is not, or the other way round. */
static __global__ void find_bad_output(Walk w, oracle::Output ref, double limit, unsigned long long *first) {
  for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < elements(w); n += (int64_t)gridDim.x * blockDim.x) {
    const Spot s = spot(w, n);
    if (s.at == oracle::kMissing) continue;
    const double out = oracle::read(w.t.data, w.dtype, s.at);
    if (!same_kind(out, ref.o[n]) || fabs(out - ref.o[n]) > limit) atomicMin(first, (unsigned long long)n);
  }
}

/* An LSE is wrong that is further off than absolute + relative * |LSE|. */
static __global__ void find_bad_lse(Walk w, const float *lse, oracle::Output ref, double absolute, double relative, unsigned long long *first) {
  for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < elements(w); n += (int64_t)gridDim.x * blockDim.x) {
    const Spot s = spot(w, n);
    if (s.at == oracle::kMissing || s.d > 0) continue;
    const double out = lse[n / w.dim], exact = ref.lse[n / w.dim];
    if (!same_kind(out, exact) || fabs(out - exact) > absolute + relative * fabs(exact)) atomicMin(first, (unsigned long long)n);
  }
}

/* Put the poison back over every live output. */
static __global__ void forget_outputs(Walk w, uint32_t *lse) {
  for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < elements(w); n += (int64_t)gridDim.x * blockDim.x) {
    const Spot s = spot(w, n);
    if (s.at == oracle::kMissing) continue;
    uint8_t *const byte = static_cast<uint8_t *>(w.t.data) + s.at;
    if (oracle::is_fp8(w.dtype)) *byte = (uint8_t)(kPoison8 >> 8 * ((uintptr_t)byte % 4));
    else if (w.dtype == FLASHCORE_F32) static_cast<uint32_t *>(w.t.data)[s.at] = kPoison;
    else static_cast<uint16_t *>(w.t.data)[s.at] = (uint16_t)kPoison;
    if (lse && s.d == 0) lse[n / w.dim] = kPoison;
  }
}

/* ---- tiles ---------------------------------------------------------------------------------------------------------------------- */

/* In library.cu: the mma backend as on a chip with so many SMs and bytes of shared memory per SM (negative: as they are). */
extern "C" {
flashcore_status test_plan_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_description *d);
flashcore_status test_workspace_size_on(const flashcore_attention *a, int sm_count, int shared_per_sm, size_t *bytes, flashcore_error *error);
flashcore_status test_supported_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_error *error);
flashcore_status test_forward_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_stream stream, flashcore_error *error);
}

struct Chip {
  int sm_count, shared_per_sm;
};

/* The chip on which a problem of so many query rows gets the tile, if there is such a tile for its head dims: on one without SMs every problem is
 * a large one; the narrow tile is for problems that would fill 64 rows of each SM but not 256. */
inline Chip chip_for(int tile, int64_t rows) {
  if (tile == TILE_WIDE) return {0, 228 * 1024};
  if (tile == TILE_COMPACT) return {0, 100 * 1024};
  if (tile == TILE_NARROW) return {(int)(rows / 256) + 1, -1};
  return {-1, -1};
}

/* ---- the problem --------------------------------------------------------------------------------------------------------------- */

/* Where a tensor lies in its allocation: strides, the element of (0, 0, 0, 0), the elements spanned. */
struct Extent {
  int64_t batch, rows, heads, dim;
};
struct Placement {
  int64_t stride_b, stride_s, stride_h, origin, span;
};

/* row_width, column: LAYOUT_PACKED only, the elements in a row of the shared allocation and where this tensor's part starts. unit: elements of the
 * input type in 16 bytes, at least 8. */
inline Placement lay_out(int layout, const Extent &e, int role, int64_t row_width, int64_t column, int64_t unit) {
  const int64_t dense = e.heads * e.dim;
  const bool kv = role == ROLE_K || role == ROLE_V, input = role != ROLE_O;
  Placement p = {e.rows * dense, dense, e.dim, 0, 0};
  if (layout == LAYOUT_BHSD) p = {e.rows * dense, e.dim, e.rows * e.dim, 0, 0};
  if (layout == LAYOUT_PACKED && input) p = {e.rows * row_width, row_width, e.dim, column, 0};
  if (layout == LAYOUT_SLICE) p = {e.rows * (e.heads * (e.dim + 1) + 3) + 5, e.heads * (e.dim + 1) + 3, e.dim + 1, 1, 0};
  if (layout == LAYOUT_HEAD0 && kv) p = {e.rows * e.dim, e.dim, 0, 0, 0};
  if (layout == LAYOUT_BATCH0 && kv) p.stride_b = 0;
  if (layout == LAYOUT_NEGATIVE && input) p.stride_s = -dense, p.origin = std::max<int64_t>(e.rows - 1, 0) * dense;
  if (layout == LAYOUT_PADDED) {
    p.stride_h = (e.dim + unit - 1) / unit * unit + unit;
    p.stride_s = e.heads * p.stride_h + 16;
    p.stride_b = e.rows * p.stride_s + 32;
  }
  if (layout == LAYOUT_FAR) {
    p.stride_s = ((1ll << 31) / std::max<int64_t>(e.rows - 1, 1) + dense) / unit * unit + unit;
    p.stride_b = e.rows * p.stride_s;
  }
  p.span = p.origin + dense;
  if (e.batch > 1) p.span += (e.batch - 1) * p.stride_b;
  if (e.rows > 1 && p.stride_s > 0) p.span += (e.rows - 1) * p.stride_s;
  if (e.heads > 1) p.span += (e.heads - 1) * p.stride_h;
  return p;
}

inline int bytes_of(int dtype) { return dtype == FLASHCORE_F32 ? 4 : oracle::is_fp8(dtype) ? 1 : 2; }

/* The verdict on one run. Refused: `why` is the library's message. */
struct Outcome {
  enum { PASSED, REFUSED, FAILED } what;
  flashcore_status status;
  std::string why;
};

static __global__ void read_spot(Walk w, oracle::Output ref, int64_t n, double *pair) {
  pair[0] = oracle::read(w.t.data, w.dtype, spot(w, n).at);
  pair[1] = ref.o[n];
}

inline int &device_arch() {
  static int arch = 0;
  return arch;
}

inline void find_device() {
  cudaDeviceProp properties;
  CUDA_OK(cudaGetDeviceProperties(&properties, 0));
  device_arch() = 10 * properties.major + properties.minor;
  printf("# %s, sm_%d\n", properties.name, device_arch());
}

/* How many times the error of a careful kernel is allowed. */
inline double &error_factor() {
  static double factor = 1;
  return factor;
}

/* What an fp8 kernel stores a row's largest weight as. */
inline float &largest_weight() {
  static float largest = 256;
  return largest;
}

inline int kv_dtype(const Case &c) { return c.dtype_kv ? c.dtype_kv : c.dtype; }

/* What the backends promise to take: a refusal of these is a failure, so that "everything was refused" cannot pass. */
inline bool must_serve(const Case &c, int backend) {
  if (c.broken) return false;
  if (oracle::is_fp8(c.dtype_o) && (!oracle::is_fp8(c.dtype) || backend == FLASHCORE_BACKEND_QMMA)) return false;
  if (oracle::is_fp8(kv_dtype(c))) {
    if (c.dtype == FLASHCORE_F32 || c.dtype_o == FLASHCORE_F32 || c.dim_qk % 16 || c.dim_v % 16 || c.dim_qk > 256 || c.dim_v > 256) return false;
    if (c.page || c.splits > 1 || c.split_len) return false;
    const bool readable = c.layout != LAYOUT_NEGATIVE && c.layout != LAYOUT_SLICE && c.seq_kv > 0; /* by TMA */
    const bool qgmma = (is_mixed(c) || readable) && device_arch() == 90, qmma = c.layout != LAYOUT_SLICE && device_arch() >= 89;
    return backend == FLASHCORE_BACKEND_QGMMA  ? qgmma
           : backend == FLASHCORE_BACKEND_QMMA ? qmma
                                               : backend == FLASHCORE_BACKEND_AUTO && (qgmma || (qmma && !oracle::is_fp8(c.dtype_o)));
  }
  if (backend == FLASHCORE_BACKEND_QMMA || backend == FLASHCORE_BACKEND_QGMMA) return false;
  if (backend == FLASHCORE_BACKEND_SIMT || backend == FLASHCORE_BACKEND_AUTO) return device_arch() >= 75;
  if (c.dtype == FLASHCORE_F32 || (c.dtype_o && c.dtype_o != c.dtype)) return false;
  if (c.page || c.splits > 1 || c.split_len) return false;
  if (backend == FLASHCORE_BACKEND_MMA) return device_arch() >= 80;
  if (backend == FLASHCORE_BACKEND_WGMMA) return c.dim_qk <= 256 && c.dim_v <= 256 && device_arch() == 90;
  if (c.dim_qk % 8 || c.dim_v % 8) return false;
  return c.layout != LAYOUT_SLICE && c.dim_qk <= 128 && c.dim_v <= 128 && device_arch() >= (c.dtype == FLASHCORE_BF16 ? 80 : 75);
}

/* One case in device memory, with its oracle. Ready to run on any backend, any number of times. */
class Problem {
public:
  Case c;
  flashcore_attention a;

  explicit Problem(const Case &choices) : c(choices), rng((uint32_t)choices.seed) {
    current_case() = reproduce(c);
    set_sizes();
    add_lengths();
    add_tensors();
    add_rules();
    fill();
  }

  /* New lengths, page table, data and oracle in the same memory: what a captured graph may see on its next replay. */
  void fill() {
    for (auto &m : inputs) m->poison();
    upload_lengths();
    upload_rules();
    fill_data();
    o_memory->poison();
    if (lse_memory) lse_memory->poison();
    if (amax_memory) amax_memory->poison();
    CUDA_OK(oracle::run(a, ref));
    CUDA_OK(cudaDeviceSynchronize());
    fingerprint = sum_inputs();
  }

  /* The library's answers: through the front door, or, for the mma backend and a tile, as on another chip. */
  flashcore_status workspace_size(size_t *bytes, flashcore_error *error) const {
    const Chip chip = chip_for(c.tile, query_rows());
    return forced_tile() ? test_workspace_size_on(&a, chip.sm_count, chip.shared_per_sm, bytes, error)
                         : flashcore_workspace_size(&a, -1, bytes, error);
  }
  flashcore_status supported(flashcore_error *error) const {
    const Chip chip = chip_for(c.tile, query_rows());
    return forced_tile() ? test_supported_on(&a, chip.sm_count, chip.shared_per_sm, error) : flashcore_supported(&a, -1, error);
  }
  flashcore_status forward(flashcore_stream stream, flashcore_error *error) const {
    const Chip chip = chip_for(c.tile, query_rows());
    return forced_tile() ? test_forward_on(&a, chip.sm_count, chip.shared_per_sm, stream, error) : flashcore_forward(&a, stream, error);
  }

  /* The mma kernel that a choice of tile leads to; "" where the backend refuses. */
  std::string kernel_of(int tile) const {
    flashcore_attention mine = a;
    mine.backend = FLASHCORE_BACKEND_MMA;
    flashcore_description d = {};
    const Chip chip = chip_for(tile, query_rows());
    return test_plan_on(&mine, chip.sm_count, chip.shared_per_sm, &d) == FLASHCORE_OK ? d.kernel : "";
  }
  /* Does the choice lead to a kernel that none before it does? */
  bool has_tile(int tile) const {
    for (int other = 0; other < tile; ++other) {
      if (kernel_of(other) == kernel_of(tile)) return false;
    }
    return true;
  }

  /* Ask for the work on a stream, without waiting. PASSED: launched. Outputs must be poison before. */
  Outcome launch(int backend, cudaStream_t stream = nullptr) {
    a.backend = backend;
    flashcore_error size_error = {}, error = {}, error2 = {};
    size_t bytes = 0;
    const flashcore_status sized = workspace_size(&bytes, &size_error);
    if (sized == FLASHCORE_OK) provide_workspace(bytes);
    if (amax_memory) CUDA_OK(cudaMemsetAsync(amax_memory->data<float>(), 0, sizeof(float), stream));
    const cudaError_t before = cudaPeekAtLastError();
    const flashcore_status said = supported(&error);
    const flashcore_status did = forward(stream, &error2);
    if (cudaPeekAtLastError() != before) return {Outcome::FAILED, did, "the CUDA error state changed"};
    if (said != did) return {Outcome::FAILED, did, disagreement("supported", said, error, "forward", did, error2)};
    if (sized != FLASHCORE_OK && sized != did)
      return {Outcome::FAILED, did, disagreement("workspace_size", sized, size_error, "forward", did, error2)};
    if (sized == FLASHCORE_OK && did != FLASHCORE_OK) return {Outcome::FAILED, did, format("workspace_size accepts; %s", error2.message)};
    if (did == FLASHCORE_OK) return {Outcome::PASSED, did, ""};
    if (!error2.field || !error2.message[0]) return {Outcome::FAILED, did, format("refused with status %d and no message", did)};
    if (!error.field || strcmp(error.field, error2.field) || strcmp(error.message, error2.message) || error.value != error2.value)
      return {Outcome::FAILED, did, disagreement("supported", said, error, "forward", did, error2)};
    return {Outcome::REFUSED, did, error2.message};
  }

  /* Wait, compare with the oracle, check that nothing else was written, leave the outputs poisoned again. "": good. */
  std::string judge() {
    wait();
    std::string why = compare();
    const std::string why_amax = judge_amax(take_amax());
    if (why.empty()) why = why_amax;
    forget_outputs<<<grid_for(elements(walk_o())), 256>>>(walk_o(), (uint32_t *)a.lse);
    if (why.empty()) why = untouched();
    if (!why.empty()) {
      o_memory->poison();
      if (lse_memory) lse_memory->poison();
    }
    return why;
  }

  /* Launch, judge, and hold the backend to what it promises. */
  Outcome run(int backend, cudaStream_t stream = nullptr) {
    current_case() = reproduce_on(backend);
    Outcome outcome = launch(backend, stream);
    if (outcome.what == Outcome::PASSED) outcome.why = judge();
    else wait();
    if (outcome.what == Outcome::REFUSED) {
      const float amax = take_amax();
      const std::string touched = amax != 0 ? "o_amax was raised" : untouched();
      if (!touched.empty()) return {Outcome::FAILED, outcome.status, "a refused call: " + touched};
      const bool excused = !must_serve(c, backend);
      return {excused ? Outcome::REFUSED : Outcome::FAILED, outcome.status, (excused ? "" : "refused, but must be served: ") + outcome.why};
    }
    if (!outcome.why.empty()) outcome.what = Outcome::FAILED;
    return outcome;
  }

  std::string reproduce_on(int backend) const {
    Case mine = c;
    mine.backend = backend;
    return reproduce(mine);
  }

  void wait() const {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) fatal("kernel", std::string(cudaGetErrorString(status)) + "; " + current_case());
  }

  const oracle::Output &expected() const { return ref; }
  const Memory &output() const { return *o_memory; }
  const Memory *lse_output() const { return lse_memory.get(); }

  Walk walk_o() const { return walk(a.o, oracle::output_dtype(c.dtype, c.dtype_o), c.heads_q, c.dim_v, true); }

  /* The error rule of the numerics contract. "": within it. */
  std::string compare() const {
    const Walk w = walk_o();
    Scalar<Errors> errors;
    gather_errors<<<grid_for(elements(w)), oracle::kThreads>>>(w, ref, errors.device);
    const Errors e = errors.read();
    const double max_out = as_double(e.max_out), max_low = as_double(e.max_low), max_round = as_double(e.max_round);
    const double tiny = 1e-7 * std::max(1.0, as_double(e.max_ref)), live = std::max(1.0, (double)e.live); // tiny: where lowref happens to be exact
    const double limit = error_factor() * 2 * max_low + 2 * max_round + (w.dtype == FLASHCORE_F32 ? 3 * tiny : 0);
    if (!std::isfinite(limit) || !std::isfinite(e.sum_low)) return "lowref is NaN or infinite where ref64 is not: it gives no limit";
    Scalar<unsigned long long> bad(0xff), bad_lse(0xff);
    find_bad_output<<<grid_for(elements(w)), 256>>>(w, ref, limit, bad.device);
    const bool fp8 = oracle::is_fp8(c.dtype);
    // Where few dims carry the logit, a single fp8 product of 32 dims already loses the others' bits.
    const bool tame = c.data == DATA_NORMAL || c.data == DATA_POSITIVE || c.data == DATA_CONSTANT || c.data == DATA_NAN_ROW;
    const double fp8_lse = 2e-3 + (tame ? 0x1p-13 : 0x1p-10) * as_double(e.max_peak);
    if (a.lse) find_bad_lse<<<grid_for(elements(w)), 256>>>(w, a.lse, ref, fp8 ? fp8_lse : 2e-5, fp8 ? 0 : 1e-6, bad_lse.device);
    const unsigned long long first = bad.read(), first_lse = bad_lse.read();
    if (first != kNone) return format("max error %.3g, allowed %.3g (lowref %.3g); ", max_out, limit, max_low) + describe_spot(w, (int64_t)first);
    // At 4e8 and more, fp32 logits are 32 apart: there the maximum rule is all that can be asked.
    if (!equal_logits(c.data) && e.sum_out / live > error_factor() * 1.5 * e.sum_low / live + tiny)
      return format("mean error %.3g, lowref's is %.3g", e.sum_out / live, e.sum_low / live);
    if (first_lse != kNone) return describe_lse(w, (int64_t)first_lse / w.dim);
    return "";
  }

  /* What o_amax was raised to, 0 where there is none; it is poison from then on. */
  float take_amax() const {
    float x = 0;
    if (!amax_memory) return x;
    CUDA_OK(cudaMemcpy(&x, amax_memory->data<float>(), sizeof x, cudaMemcpyDeviceToHost));
    amax_memory->poison();
    return x;
  }
  /* The error rule, with what it allows a bf16 O for its rounding. */
  std::string judge_amax(float x) const {
    if (!amax_memory) return "";
    unsigned long long expected[2];
    CUDA_OK(cudaMemcpy(expected, ref.amax, sizeof expected, cudaMemcpyDeviceToHost));
    const double amax = as_double(expected[0]), limit = error_factor() * 2 * as_double(expected[1]) + 0x1p-8 * amax;
    return std::fabs(x - amax) <= limit ? "" : format("o_amax is %.9g, expected %.9g within %.3g", x, amax, limit);
  }

private:
  std::mt19937 rng;
  std::vector<std::unique_ptr<Memory>> inputs, others; // what the library reads; what only the tests use
  std::unique_ptr<Memory> o_memory, lse_memory, amax_memory, workspace;
  oracle::Output ref = {};
  unsigned long long fingerprint = 0;
  std::vector<int32_t> len_q, len_kv, pages;
  Memory *len_q_memory = nullptr, *len_kv_memory = nullptr;

  bool forced_tile() const { return c.tile != TILE_AUTO && a.backend == FLASHCORE_BACKEND_MMA; }
  int64_t query_rows() const { return (int64_t)c.batch * c.heads_q * c.seq_q; }

  static double as_double(unsigned long long bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }

  static std::string disagreement(const char *one, flashcore_status s1, const flashcore_error &e1, const char *two, flashcore_status s2,
                                  const flashcore_error &e2) {
    return format("%s says %d (%s), %s says %d (%s)", one, s1, e1.message, two, s2, e2.message);
  }

  template <typename T> T *add(std::vector<std::unique_ptr<Memory>> &to, int64_t count, uint32_t poison = kPoison) {
    to.emplace_back(new Memory((size_t)std::max<int64_t>(count, 1) * sizeof(T), poison));
    return to.back()->data<T>();
  }

  template <typename T> void upload(const T *device, const std::vector<T> &values) {
    CUDA_OK(cudaMemcpy(const_cast<T *>(device), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }

  int below(int n) { return (int)(rng() % (uint32_t)n); }

  void set_sizes() {
    flashcore_init(&a);
    a.dtype = c.dtype, a.dtype_kv = c.dtype_kv, a.dtype_o = c.dtype_o;
    a.batch = c.batch, a.heads_q = c.heads_q, a.heads_kv = c.heads_kv;
    a.seq_q = c.seq_q, a.seq_kv = c.seq_kv, a.dim_qk = c.dim_qk, a.dim_v = c.dim_v;
    a.scale = c.scale, a.softcap = c.softcap, a.lse_base2 = c.lse == 2;
    a.causal = c.causal, a.window = c.window, a.window_left = c.left, a.window_right = c.right;
    a.num_splits = c.splits, a.split_len = c.split_len;
  }

  int pages_per_sequence() const { return c.page ? (c.seq_kv + c.page - 1) / c.page : 0; }

  void add_lengths() {
    if (c.lengths & CU_SEQLENS_Q) a.cu_seqlens_q = add<int32_t>(inputs, c.batch + 1), a.total_q = (int64_t)c.batch * c.seq_q + 3;
    if (c.lengths & CU_SEQLENS_KV && !c.page) a.cu_seqlens_kv = add<int32_t>(inputs, c.batch + 1), a.total_kv = (int64_t)c.batch * c.seq_kv + 3;
    if (c.lengths & SEQLENS_Q) a.seqlens_q = add<int32_t>(inputs, c.batch);
    if (c.lengths & SEQLENS_KV) a.seqlens_kv = add<int32_t>(inputs, c.batch);
    if (c.page) {
      a.page_table_stride_b = pages_per_sequence() + 1;
      a.page_table = add<int32_t>(inputs, c.batch * a.page_table_stride_b);
      a.page_size = c.page, a.num_pages = c.batch * pages_per_sequence() + 3;
    }
    add<int32_t>(others, c.batch);
    len_q_memory = others.back().get();
    add<int32_t>(others, c.batch);
    len_kv_memory = others.back().get();
  }

  Extent extent_of(int role) const {
    const bool query = role == ROLE_Q || role == ROLE_O;
    Extent e = {c.batch, query ? c.seq_q : c.seq_kv, query ? c.heads_q : c.heads_kv, role == ROLE_V || role == ROLE_O ? c.dim_v : c.dim_qk};
    if (query && a.cu_seqlens_q) e.batch = 1, e.rows = a.total_q;
    if (!query && a.cu_seqlens_kv) e.batch = 1, e.rows = a.total_kv;
    if (!query && a.page_table) e.batch = a.num_pages, e.rows = a.page_size;
    return e;
  }

  int dtype_of(int role) const { return role == ROLE_O ? oracle::output_dtype(c.dtype, c.dtype_o) : role == ROLE_Q ? c.dtype : kv_dtype(c); }
  static uint32_t poison_for(int dtype) { return oracle::is_fp8(dtype) ? kPoison8 : kPoison; }
  /* fp8 K and V beside 16-bit Q and O that are aligned to an element only are aligned themselves: no kernel serves others. */
  int layout_of(int role) const { return c.layout == LAYOUT_SLICE && is_mixed(c) && (role == ROLE_K || role == ROLE_V) ? LAYOUT_PADDED : c.layout; }

  /* data: an allocation to share, or NULL for one of its own. */
  flashcore_tensor add_tensor(int role, int64_t row_width, int64_t column, char *data) {
    const int dtype = dtype_of(role), bytes = bytes_of(dtype);
    const bool wide_unit = oracle::is_fp8(c.dtype) || oracle::is_fp8(dtype);
    const Placement p = lay_out(layout_of(role), extent_of(role), role, row_width, column, wide_unit ? 16 : 8);
    if (!data && role == ROLE_O) o_memory.reset(new Memory((size_t)(p.span * bytes), poison_for(dtype))), data = o_memory->data<char>();
    if (!data) data = add<char>(inputs, p.span * bytes, poison_for(dtype));
    return flashcore_strided(data + p.origin * bytes, p.stride_b, p.stride_s, p.stride_h);
  }

  void add_tensors() {
    const int64_t q_width = (int64_t)c.heads_q * c.dim_qk, k_width = (int64_t)c.heads_kv * c.dim_qk;
    const int64_t width = q_width + k_width + (int64_t)c.heads_kv * c.dim_v;
    char *shared = nullptr, *q_shared = nullptr;
    if (c.layout == LAYOUT_PACKED) {
      const Extent q = extent_of(ROLE_Q), k = extent_of(ROLE_K);
      shared = add<char>(inputs, k.batch * k.rows * width * bytes_of(kv_dtype(c)), poison_for(kv_dtype(c)));
      if (q.batch == k.batch && q.rows == k.rows && kv_dtype(c) == c.dtype) q_shared = shared;
    }
    a.q = add_tensor(ROLE_Q, width, 0, q_shared);
    a.k = add_tensor(ROLE_K, width, q_width, shared);
    a.v = add_tensor(ROLE_V, width, q_width + k_width, shared);
    a.o = add_tensor(ROLE_O, 0, 0, nullptr);
    const int64_t rows = (int64_t)c.batch * c.heads_q * c.seq_q;
    if (c.lse) lse_memory.reset(new Memory((size_t)rows * 4)), a.lse = lse_memory->data<float>();
    if (c.amax && oracle::is_fp8(dtype_of(ROLE_O))) amax_memory.reset(new Memory(sizeof(float))), a.o_amax = amax_memory->data<float>();
    ref.o = add<double>(others, rows * c.dim_v);
    ref.low = add<float>(others, rows * c.dim_v);
    ref.lse = add<double>(others, rows);
    ref.peak = add<double>(others, rows);
    ref.amax = add<unsigned long long>(others, 2);
    ref.largest_p = largest_weight();
  }

  void add_rules() {
    if (c.alibi) a.alibi_slopes = add<float>(inputs, (int64_t)c.batch * c.heads_q), a.alibi_stride_b = c.alibi == 2 ? c.heads_q : 0;
    if (c.sink) a.sink = add<float>(inputs, c.heads_q);
    flashcore_descale *const descales[4] = {&a.q_descale, &a.k_descale, &a.v_descale, &a.o_descale};
    for (int role = ROLE_Q; role <= ROLE_O && c.descale; ++role) {
      const int64_t heads = role == ROLE_Q || role == ROLE_O ? c.heads_q : c.heads_kv;
      if (!oracle::is_fp8(dtype_of(role))) continue;
      descales[role]->data = add<float>(inputs, c.descale >= 2 ? c.batch * heads : 1);
      if (c.descale >= 2) descales[role]->stride_b = heads, descales[role]->stride_h = 1;
    }
    const int64_t pitch = c.seq_kv + 3, heads = c.heads_q;
    if (c.bias) {
      a.bias_dtype = c.bias_dtype;
      a.bias = add<char>(inputs, c.batch * heads * (c.seq_q + 1) * pitch * bytes_of(c.bias_dtype ? c.bias_dtype : c.dtype));
      a.bias_stride_kv = 1, a.bias_stride_q = pitch, a.bias_stride_h = c.seq_q * pitch, a.bias_stride_b = heads * a.bias_stride_h;
      if (c.bias == BIAS_SHARED) a.bias_stride_h = a.bias_stride_b = 0;
      if (c.bias == BIAS_PER_KEY) a.bias_stride_q = 0;
      if (c.bias == BIAS_TRANSPOSED) a.bias_stride_kv = c.seq_q, a.bias_stride_q = 1;
    }
    if (c.mask) {
      a.mask_stride_q = words_per_row();
      a.mask_stride_h = c.mask == MASK_SHARED ? 0 : c.seq_q * a.mask_stride_q;
      a.mask_stride_b = heads * a.mask_stride_h;
      a.mask_bits = add<uint32_t>(inputs, mask_words());
    }
  }

  int64_t words_per_row() const { return (c.seq_kv + 31) / 32 + 1; }
  int64_t mask_words() const { return c.batch * (int64_t)c.heads_q * c.seq_q * words_per_row(); }

  /* A length that likes the edges: empty, one, full. */
  int32_t some_length(int longest) {
    const int kind = below(8);
    return kind == 0 ? 0 : kind == 1 ? std::min(1, longest) : kind == 2 ? longest : below(longest + 1);
  }

  /* Lengths of one side. What lies on the device may be out of range (it is clamped), so some are written so. */
  std::vector<int32_t> upload_side(int longest, const int32_t *cu, const int32_t *seqlens) {
    std::vector<int32_t> len((size_t)c.batch, longest), offsets(1, 0), stored;
    for (int32_t &n : len) {
      if (cu) n = some_length(longest), offsets.push_back(offsets.back() + n);
      if (!seqlens) continue;
      const int32_t used = some_length(longest);
      const bool out_of_range = below(4) == 0;
      stored.push_back(used == 0 && out_of_range ? -3 : used == longest && out_of_range ? longest + 1000 : used);
      n = std::min(n, used);
    }
    if (cu) upload(cu, offsets);
    if (seqlens) upload(seqlens, stored);
    return len;
  }

  void upload_lengths() {
    len_q = upload_side(c.seq_q, a.cu_seqlens_q, a.seqlens_q);
    len_kv = upload_side(c.seq_kv, a.cu_seqlens_kv, a.seqlens_kv);
    upload(len_q_memory->data<int32_t>(), len_q);
    upload(len_kv_memory->data<int32_t>(), len_kv);
    if (c.page) upload_pages();
  }

  /* Pages in random order; an odd seed leaves one of eight out; entries past the length are garbage; sequences may share a prefix. */
  void upload_pages() {
    std::vector<int32_t> order((size_t)a.num_pages), table((size_t)(c.batch * a.page_table_stride_b), (int32_t)kPoison);
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int32_t)i;
    std::shuffle(order.begin(), order.end(), rng);
    for (int b = 0; b < c.batch; ++b) {
      for (int p = 0; p * c.page < len_kv[(size_t)b]; ++p) {
        int32_t &entry = table[(size_t)(b * a.page_table_stride_b + p)];
        entry = order[(size_t)(b * pages_per_sequence() + p)];
        if (b > 0 && p == 0 && c.seed % 3 == 0 && len_kv[0] > 0) entry = table[0];
        if (c.seed % 2 && below(8) == 0) entry = below(2) ? -1 : a.num_pages + 7;
      }
    }
    upload(a.page_table, table);
  }

  void upload_rules() {
    std::normal_distribution<float> normal_number;
    std::vector<float> slopes((size_t)(c.batch * c.heads_q)), sinks((size_t)c.heads_q);
    for (float &x : slopes) x = 0.5f * (float)below(1000) / 1000.f;
    for (float &x : sinks) x = 2.f * normal_number(rng);
    if (c.alibi) upload(a.alibi_slopes, slopes);
    if (c.sink) upload(a.sink, sinks);
    for (const flashcore_descale *d : {&a.q_descale, &a.k_descale, &a.v_descale, &a.o_descale}) {
      if (!d->data) continue;
      const float unit = d != &a.o_descale ? 1.f : c.dtype_o == FLASHCORE_E4M3 ? 0x1p-10f : 0x1p-17f; // some of O, not all, is too large then
      std::vector<float> factors(d->stride_h ? (size_t)(c.batch * d->stride_b) : 1);
      for (float &x : factors) x = (0.25f + (float)below(1000) / 500.f) * unit;
      const bool spoiled = c.descale == 4 || (c.descale == 3 && d == &a.o_descale);
      for (size_t n = 0; spoiled && n < factors.size(); ++n)
        if (n % 3) factors[n] = n % 3 == 1 ? NAN : -1.f;
      upload(d->data, factors);
    }
    const uint64_t seed = 100 + (uint64_t)c.seed;
    if (c.mask) fill_mask<<<grid_for(mask_words()), 256>>>(const_cast<uint32_t *>(a.mask_bits), mask_words(), words_per_row(), seed);
    if (!c.bias) return;
    BiasWalk w = {};
    w.data = const_cast<void *>(a.bias), w.dtype = c.bias_dtype ? c.bias_dtype : c.dtype, w.mode = c.bias;
    w.batch = c.batch, w.heads = c.heads_q, w.seq_q = c.seq_q, w.seq_kv = c.seq_kv;
    w.stride_b = a.bias_stride_b, w.stride_h = a.bias_stride_h, w.stride_q = a.bias_stride_q, w.stride_kv = a.bias_stride_kv;
    w.len_q = len_q_memory->data<int32_t>(), w.len_kv = len_kv_memory->data<int32_t>();
    w.seed = seed;
    fill_bias<<<grid_for((int64_t)c.batch * c.heads_q * c.seq_q * c.seq_kv), 256>>>(w);
  }

  Walk walk(const flashcore_tensor &t, int dtype, int heads, int dim, bool query) const {
    Walk w = {t, dtype, c.batch, query ? c.seq_q : c.seq_kv, heads, dim, nullptr, nullptr, nullptr, 0, 0, 0};
    w.len = (query ? len_q_memory : len_kv_memory)->data<int32_t>();
    w.cu = query ? a.cu_seqlens_q : a.cu_seqlens_kv;
    if (!query) w.pages = a.page_table, w.pages_stride = a.page_table_stride_b, w.page_size = a.page_size, w.num_pages = a.num_pages;
    return w;
  }

  /* Query and key elements that make all products the same and their fp32 sum exact (four significant bits), within the range of fp16. */
  float equal_element(float logit, float scale) const {
    int exponent;
    const float fraction = frexpf(std::min(sqrtf(logit / (scale * (float)c.dim_qk)), 57344.f), &exponent);
    return ldexpf(roundf(16.f * fraction), exponent - 4);
  }

  void fill_data() {
    const float scale = c.scale > 0 ? c.scale : 1.f / sqrtf((float)c.dim_qk);
    Content content = {ROLE_Q, c.data, (uint64_t)c.seed, std::min(std::max(1.f / scale, 0.5f), 64.f), 0.f, c.batch / 2, c.heads_q / 2, 0};
    if (c.data == DATA_RAMP) content.step = 10.f / 64.f / (scale * content.lead);
    if (c.data == DATA_LAST || c.data == DATA_FIRST) content.step = 20.f / (scale * content.lead);
    if (c.data == DATA_BACKGROUND) content.step = 10.f / (scale * content.lead);
    if (c.data == DATA_HUGE) content.lead = content.step = sqrtf(2.5e5f / scale);
    if (equal_logits(c.data)) content.lead = content.step = equal_element(c.data == DATA_EQUAL_4E8 ? 4e8f : 3e9f, scale);
    content.nan_i = len_q[(size_t)content.nan_b] / 2;
    const Walk walks[3] = {walk(a.q, c.dtype, c.heads_q, c.dim_qk, true), walk(a.k, kv_dtype(c), c.heads_kv, c.dim_qk, false),
                           walk(a.v, kv_dtype(c), c.heads_kv, c.dim_v, false)};
    for (content.role = ROLE_Q; content.role <= ROLE_V; ++content.role) {
      const Walk &w = walks[content.role];
      fill_tensor<<<grid_for(elements(w)), 256>>>(w, content);
    }
    CUDA_OK(cudaGetLastError());
  }

  unsigned long long sum_inputs() const {
    Scalar<Words> result;
    for (auto &m : inputs)
      inspect_words<<<grid_for(m->words()), 256>>>((uint32_t *)m->base, m->words(), kPoison, (unsigned long long *)result.device);
    return result.read().sum;
  }

  /* Zeroed once, as the contract asks of the caller. */
  void provide_workspace(size_t bytes) {
    if (bytes == 0 || (workspace && a.workspace_bytes >= bytes)) return;
    workspace.reset(new Memory(bytes));
    CUDA_OK(cudaMemset(workspace->data(), 0, bytes));
    a.workspace = workspace->data(), a.workspace_bytes = bytes;
  }

  /* Outputs are all poison (call after forget_outputs), inputs are as they were, and the workspace's guard bands too. */
  std::string untouched() const {
    if (o_memory->inspect().differing) return "O was written outside its live rows";
    if (lse_memory && lse_memory->inspect().differing) return "the LSE was written outside its live rows";
    if (amax_memory && amax_memory->inspect().differing) return "something beside o_amax was written";
    if (sum_inputs() != fingerprint) return "an input was written";
    if (!workspace) return "";
    const int64_t guard = (int64_t)kGuardBytes / 4;
    Scalar<Words> result;
    for (const char *at : {workspace->base, workspace->base + workspace->bytes - kGuardBytes})
      inspect_words<<<grid_for(guard), 256>>>((const uint32_t *)at, guard, kPoison, (unsigned long long *)result.device);
    return result.read().differing ? "a guard band of the workspace was written" : "";
  }

  std::string describe_spot(const Walk &w, int64_t n) const {
    struct Pair {
      double out, ref;
    };
    Scalar<Pair> pair;
    read_spot<<<1, 1>>>(w, ref, n, (double *)pair.device);
    const Pair p = pair.read();
    return format("first at batch %lld head %lld query %lld dim %lld: %.9g, expected %.9g", (long long)(n / w.dim / w.rows / w.heads),
                  (long long)(n / w.dim / w.rows % w.heads), (long long)(n / w.dim % w.rows), (long long)(n % w.dim), p.out, p.ref);
  }

  std::string describe_lse(const Walk &w, int64_t row) const {
    float out;
    double expected;
    CUDA_OK(cudaMemcpy(&out, a.lse + row, sizeof out, cudaMemcpyDeviceToHost));
    CUDA_OK(cudaMemcpy(&expected, ref.lse + row, sizeof expected, cudaMemcpyDeviceToHost));
    return format("LSE at batch %lld head %lld query %lld: %.9g, expected %.9g", (long long)(row / w.rows / w.heads),
                  (long long)(row / w.rows % w.heads), (long long)(row % w.rows), (double)out, expected);
  }
};

#endif
