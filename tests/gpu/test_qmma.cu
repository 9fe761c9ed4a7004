/* What attention with fp8 K and V on mma.sync must be, property by property, for all types of Q and every tile of the qmma backend, against the CPU
 * reference in fp64.
 * It stands alone: the tiles that the dispatcher would not pick on this GPU, or for so small a problem, are planned as for a chip of another size.
 *   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I<repository> tests/gpu/test_qmma.cu
 *
 * Memory is hostile: inputs lie between NaN, in gaps, tails and guard bands alike, and O and LSE, filled with one pattern, must keep it wherever they
 * are not due. On sm_90 fp8's instruction is made of 16-bit products, so there this shows layout, masks and rounding of P, not the accumulator. */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore_fp8.cuh"

#include "report.h"

#include <algorithm>
#include <math.h>
#include <memory>
#include <random>
#include <string.h>
#include <vector>

enum Data {
  DATA_NORMAL,
  DATA_SAME_SIGN, /* V = |normal| + 0.5 */
  DATA_PEAKED,    /* logits of standard deviation 9 */
  DATA_RAMP,      /* logits that rise with the key: the reference moves all the time */
  DATA_EQUAL,     /* all logits of a row are equal, and as large as the type allows */
  DATA_NAN_ROW,   /* one query row is NaN */
};
enum Lengths { CU_SEQLENS = 1, SEQLENS = 2 };
enum Rules { SOFTCAP = 1, ALIBI = 2, BIAS = 4, MASK = 8, SINK = 16 }; /* the last is none: every tile serves it */
enum Layout { DENSE, PADDED, BACKWARDS };

struct Case {
  int dtype = FLASHCORE_E4M3, dtype_kv = FLASHCORE_E4M3, dtype_o = 0, batch = 1, heads_q = 2, heads_kv = 1, seq_q = 64, seq_kv = 64, dim_qk = 64,
      dim_v = 64;
  int causal = 0, left = -1, right = -1; /* a window where one of the two is not -1 */
  int rules = 0, lengths = 0, layout = DENSE, data = DATA_NORMAL;
  int descale = 1, lse = 1; /* lse: 0 not wanted, 1 natural, 2 base 2 */
};
/* NaN or negative: that of the first head of Q, or of K where Q is not fp8. */
enum Descales { NO_DESCALES, DESCALES, NAN_DESCALE, NEGATIVE_DESCALE, NAN_DESCALE_OF_V };

static bool is_mixed(const Case &c) { return c.dtype != c.dtype_kv; }

static std::string to_string(const Case &c) {
  return format("dtype %d, KV %d, O %d, batch %d, heads %d/%d, seq %d/%d, dims %d/%d, causal %d, window %d %d, rules %d, lengths %d, layout %d, data "
                "%d, lse %d",
                c.dtype, c.dtype_kv, c.dtype_o, c.batch, c.heads_q, c.heads_kv, c.seq_q, c.seq_kv, c.dim_qk, c.dim_v, c.causal, c.left, c.right,
                c.rules, c.lengths, c.layout, c.data, c.lse);
}

/* Bytes on both sides, with a guard band before and behind. */
struct Buffer {
  static constexpr size_t kGuard = 4096;
  std::vector<uint8_t> host;
  uint8_t *device = nullptr;

  Buffer(size_t bytes, uint8_t pattern) : host(bytes + 2 * kGuard, pattern) { CUDA_OK(cudaMalloc(&device, host.size())); }
  ~Buffer() { cudaFree(device); }
  Buffer(const Buffer &) = delete;
  void upload() { CUDA_OK(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice)); }
  std::vector<uint8_t> download() const {
    std::vector<uint8_t> bytes(host.size());
    CUDA_OK(cudaMemcpy(bytes.data(), device, bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
};

/* One case in both memories, with its answer. */
class Problem {
public:
  const Case c;
  flashcore_attention host, device; /* the same problem; the host's O is fp32, for the reference */

  explicit Problem(const Case &choices) : c(choices), random(1 + c.seq_q + 7 * c.seq_kv + 31 * c.dim_qk + c.dtype) {
    current_case() = to_string(c);
    set_sizes();
    add_lengths();
    add_inputs();
    add_rules();
    add_outputs();
    for (auto &b : buffers) b->upload();
    solve();
  }

  /* On a chip with so many SMs: with none, every problem is a large one. "": right, and on a wide tile if `wide` says so. */
  std::string run(int sm_count, bool wide) {
    flashcore_attention resolved;
    flashcore_plan plan;
    flashcore_device chip;
    flashcore_error error = {};
    if (flashcore_validate(&device, &error) != FLASHCORE_OK || flashcore_query_device(-1, &chip, &error) != FLASHCORE_OK) return error.message;
    chip.sm_count = sm_count;
    flashcore_resolve(&device, &resolved);
    plan = flashcore_plan();
    if (flashcore_qmma_plan(&resolved, &chip, &plan, &error) != FLASHCORE_OK) return error.message;
    const bool is_short = is_mixed(c) && c.seq_q * (c.heads_q / c.heads_kv) <= 16;
    if (plan.d.block_q != (is_short ? 16 : wide && !flashcore_has_rule(&resolved) ? 128 : 64))
      return std::string("another tile was wanted than ") + plan.d.kernel;
    if (flashcore_qmma_launch(&resolved, &plan, nullptr, &error) != FLASHCORE_OK) return error.message;
    return judge();
  }
  /* Through the library's front door. */
  std::string run() {
    flashcore_error error = {};
    flashcore_description d;
    if (flashcore_supported(&device, -1, &error) != FLASHCORE_OK || flashcore_forward(&device, nullptr, &error) != FLASHCORE_OK) return error.message;
    const std::string why = judge();
    if (!why.empty()) return why;
    if (flashcore_describe(&device, -1, &d, &error) != FLASHCORE_OK) return error.message;
    const char *const name = !is_mixed(c) ? "qmma e" : c.dtype == FLASHCORE_F16 ? "qmma f16/e" : "qmma bf16/e";
    return d.backend == FLASHCORE_BACKEND_QMMA && !strncmp(d.kernel, name, strlen(name)) ? "" : std::string("described as ") + d.kernel;
  }

private:
  std::mt19937 random;
  std::normal_distribution<float> normal;
  std::vector<std::unique_ptr<Buffer>> buffers; /* inputs */
  std::unique_ptr<Buffer> o, lse;
  std::vector<float> exact, exact_lse, low; /* dense (batch, heads_q, seq_q, dim_v), (batch, heads_q, seq_q), as exact */
  std::vector<int> len_q, len_kv;
  double largest_logit = 0;

  /* An array's address in both memories. */
  template <typename T> struct Pair { const T *host, *device; };
  template <typename T> Pair<T> add(const std::vector<T> &values) {
    buffers.emplace_back(new Buffer(values.size() * sizeof(T), 0x7f));
    Buffer &b = *buffers.back();
    memcpy(b.host.data() + Buffer::kGuard, values.data(), values.size() * sizeof(T));
    return {reinterpret_cast<const T *>(b.host.data() + Buffer::kGuard), reinterpret_cast<const T *>(b.device + Buffer::kGuard)};
  }
  template <typename T> void add(const T *flashcore_attention::*field, const std::vector<T> &values) {
    const Pair<T> p = add(values);
    host.*field = p.host, device.*field = p.device;
  }
  /* spoiled: whether the first is what c.descale says. */
  void add_descale(flashcore_descale flashcore_attention::*field, int heads, bool spoiled) {
    std::vector<float> values((size_t)(c.batch * heads));
    for (float &x : values) x = 0.5f + (float)(random() % 100) / 100.f;
    if (spoiled) values[0] = c.descale == NEGATIVE_DESCALE ? -1.f : NAN;
    const Pair<float> p = add(values);
    host.*field = {p.host, heads, 1};
    device.*field = {p.device, heads, 1};
  }

  void set_sizes() {
    flashcore_attention a;
    flashcore_init(&a);
    a.dtype = c.dtype, a.dtype_kv = c.dtype_kv, a.batch = c.batch, a.heads_q = c.heads_q, a.heads_kv = c.heads_kv;
    a.seq_q = c.seq_q, a.seq_kv = c.seq_kv, a.dim_qk = c.dim_qk, a.dim_v = c.dim_v;
    a.causal = c.causal, a.window = c.left != -1 || c.right != -1, a.window_left = c.left, a.window_right = c.right;
    a.softcap = c.rules & SOFTCAP ? 2.f : 0.f, a.lse_base2 = c.lse == 2;
    a.backend = FLASHCORE_BACKEND_QMMA;
    a.dtype_o = FLASHCORE_F32;
    host = a;
    a.dtype_o = c.dtype_o;
    device = a;
  }

  std::vector<int> some_lengths(int longest) {
    std::vector<int> n((size_t)c.batch, longest);
    if (c.lengths)
      for (size_t b = 0; b < n.size(); ++b) n[b] = b == 1 ? 0 : (int)(random() % (unsigned)(longest + 1));
    return n;
  }
  void add_lengths() {
    len_q = some_lengths(c.seq_q);
    len_kv = some_lengths(c.seq_kv);
    if (c.lengths == CU_SEQLENS) {
      std::vector<int32_t> q(1, 2), kv(1, 1); /* the first rows of the packed tensors belong to nobody */
      for (int n : len_q) q.push_back(q.back() + n);
      for (int n : len_kv) kv.push_back(kv.back() + n);
      add(&flashcore_attention::cu_seqlens_q, q);
      add(&flashcore_attention::cu_seqlens_kv, kv);
      host.total_q = device.total_q = q.back() + 3, host.total_kv = device.total_kv = kv.back() + 3;
    }
    if (c.lengths == SEQLENS) {
      add(&flashcore_attention::seqlens_q, std::vector<int32_t>(len_q.begin(), len_q.end()));
      add(&flashcore_attention::seqlens_kv, std::vector<int32_t>(len_kv.begin(), len_kv.end()));
    }
  }

  /* Strides of the layout; `origin`: the element of (0, 0, 0, 0); returns the elements of the allocation. */
  size_t lay_out(bool query, int heads, int dim, flashcore_tensor *t, int64_t *origin) const {
    const bool packed = c.lengths == CU_SEQLENS;
    const int64_t rows = packed ? (query ? host.total_q : host.total_kv) : query ? c.seq_q : c.seq_kv, batch = packed ? 1 : c.batch;
    t->stride_h = c.layout == PADDED ? dim + 16 : dim;
    t->stride_s = heads * t->stride_h + (c.layout == PADDED ? 32 : 0);
    t->stride_b = rows * t->stride_s + (c.layout == PADDED ? 64 : 0);
    const size_t span = (size_t)(batch * t->stride_b);
    *origin = 0;
    if (c.layout == BACKWARDS && rows > 0) *origin = (rows - 1) * t->stride_s, t->stride_s = -t->stride_s;
    return span;
  }
  /* Calls visit(b, row, head, offset of its first element) for live rows. */
  template <typename Visit> void each_row(bool query, const flashcore_tensor &t, int heads, const Visit &visit) const {
    const int32_t *cu = query ? host.cu_seqlens_q : host.cu_seqlens_kv;
    for (int b = 0; b < c.batch; ++b)
      for (int row = 0; row < (query ? len_q : len_kv)[(size_t)b]; ++row)
        for (int head = 0; head < heads; ++head)
          visit(b, row, head, (cu ? (cu[b] + row) * t.stride_s : b * t.stride_b + row * t.stride_s) + head * t.stride_h);
  }

  float content(int role, int b, int row, int d) { /* role: 0 Q, 1 K, 2 V */
    const float x = normal(random);
    if (role == 2) return c.data == DATA_SAME_SIGN ? fabsf(x) + 0.5f : x;
    if (c.data == DATA_PEAKED) return 3.f * x;
    if (c.data == DATA_RAMP && d == 0) return role == 0 ? 8.f : (float)row / 16.f;
    if (c.data == DATA_EQUAL) return role == 0 ? ldexpf(1.f, row % 8 + 1) : c.dtype_kv == FLASHCORE_E4M3 ? 448.f : 57344.f;
    if (c.data == DATA_NAN_ROW && role == 0 && b == 0 && row == len_q[0] / 2) return NAN;
    return x;
  }
  void add_inputs() {
    using Field = flashcore_tensor flashcore_attention::*;
    const Field fields[3] = {&flashcore_attention::q, &flashcore_attention::k, &flashcore_attention::v};
    for (int role = 0; role < 3; ++role) {
      const int heads = role == 0 ? c.heads_q : c.heads_kv, dim = role == 2 ? c.dim_v : c.dim_qk, dtype = role == 0 ? c.dtype : c.dtype_kv;
      const size_t bytes = (size_t)flashcore_dtype_bytes(dtype);
      flashcore_tensor t = {};
      int64_t origin;
      buffers.emplace_back(new Buffer(bytes * lay_out(role == 0, heads, dim, &t, &origin), 0xff)); /* NaN in all types */
      Buffer &b = *buffers.back();
      t.data = b.host.data() + Buffer::kGuard + bytes * (size_t)origin;
      host.*fields[role] = t;
      each_row(role == 0, t, heads, [&](int batch, int row, int, int64_t at) {
        for (int d = 0; d < dim; ++d) flashcore_store(t.data, dtype, at + d, content(role, batch, row, d));
      });
      t.data = b.device + Buffer::kGuard + bytes * (size_t)origin;
      device.*fields[role] = t;
    }
    if (!c.descale) return;
    const bool spoils_logits = c.descale == NAN_DESCALE || c.descale == NEGATIVE_DESCALE;
    if (!is_mixed(c)) add_descale(&flashcore_attention::q_descale, c.heads_q, spoils_logits);
    add_descale(&flashcore_attention::k_descale, c.heads_kv, is_mixed(c) && spoils_logits);
    add_descale(&flashcore_attention::v_descale, c.heads_kv, c.descale == NAN_DESCALE_OF_V);
  }

  void add_rules() {
    const int64_t rows = (int64_t)c.heads_q * c.seq_q, pitch = c.seq_kv + 3, words = (c.seq_kv + 31) / 32 + 1;
    const auto numbers = [&](int64_t count, float size) {
      std::vector<float> x((size_t)count);
      for (float &value : x) value = size * normal(random);
      return x;
    };
    if (c.rules & ALIBI) add(&flashcore_attention::alibi_slopes, std::vector<float>((size_t)c.heads_q, 0.125f));
    if (c.rules & SINK) add(&flashcore_attention::sink, numbers(c.heads_q, 2.f));
    if (c.rules & BIAS) {
      const Pair<float> p = add(numbers(rows * pitch, 1.f));
      host.bias = p.host, device.bias = p.device;
      for (flashcore_attention *a : {&host, &device}) {
        a->bias_dtype = FLASHCORE_F32;
        a->bias_stride_h = c.seq_q * pitch, a->bias_stride_q = pitch, a->bias_stride_kv = 1;
      }
    }
    if (c.rules & MASK) {
      std::vector<uint32_t> bits((size_t)(rows * words));
      for (size_t i = 0; i < bits.size(); ++i) bits[i] = i / (size_t)words % 8 == 3 ? 0u : (uint32_t)(random() | random());
      add(&flashcore_attention::mask_bits, bits);
      host.mask_stride_h = device.mask_stride_h = c.seq_q * words, host.mask_stride_q = device.mask_stride_q = words;
    }
  }

  void add_outputs() {
    flashcore_tensor t = {};
    int64_t origin;
    o.reset(new Buffer(2 * lay_out(true, c.heads_q, c.dim_v, &t, &origin), 0xff));
    t.data = o->device + Buffer::kGuard + 2 * origin;
    device.o = t;
    const size_t rows = (size_t)c.batch * (size_t)c.heads_q * (size_t)c.seq_q;
    lse.reset(new Buffer(rows * 4, 0xff));
    o->upload();
    lse->upload();
    if (c.lse) device.lse = reinterpret_cast<float *>(lse->device + Buffer::kGuard);
    exact_lse.assign(rows, 0.f);
    host.lse = exact_lse.data();
  }

  /* The reference, and lowref: logits, P and l in fp32 against the row's maximum, P (fp8: in units of 2^-8) rounded to Q's type, O to its own. */
  void solve() {
    std::vector<float> reference(o->host.size() / 2, 0.f); /* where O's elements lie */
    host.o = device.o;
    host.o.data = reference.data() + (static_cast<uint8_t *>(device.o.data) - o->device) / 2;
    flashcore_error error = {};
    if (flashcore_reference_forward(&host, &error) != FLASHCORE_OK) fatal("reference", error.message);
    exact.assign(exact_lse.size() * (size_t)c.dim_v, 0.f);
    low = exact;
    flashcore_attention a;
    flashcore_resolve(&host, &a);
    each_row(true, host.o, c.heads_q, [&](int b, int row, int head, int64_t at) {
      const size_t index = (((size_t)b * (size_t)c.heads_q + (size_t)head) * (size_t)c.seq_q + (size_t)row) * (size_t)c.dim_v;
      memcpy(&exact[index], static_cast<float *>(host.o.data) + at, (size_t)c.dim_v * 4);
      solve_low(a, b, row, head, &low[index]);
    });
  }
  void solve_low(const flashcore_attention &a, int b, int row, int head, float *out) {
    static flashcore_row r;
    r.a = &a, r.b = b, r.h = head, r.i = row, r.h_kv = head / (c.heads_q / c.heads_kv), r.seq = flashcore_sequence_at(&a, b);
    r.scale = (double)a.scale * flashcore_descale_at(&a.q_descale, b, head) * flashcore_descale_at(&a.k_descale, b, r.h_kv);
    r.v_scale = flashcore_descale_at(&a.v_descale, b, r.h_kv);
    const int64_t q = r.seq.q + row * a.q.stride_s + head * a.q.stride_h;
    for (int d = 0; d < c.dim_qk; ++d) r.q[d] = flashcore_load(a.q.data, c.dtype, q + d);
    r.keys = flashcore_visible_keys(&a, row, r.seq.len_q, r.seq.len_kv);
    std::vector<float> s;
    float m = a.sink ? a.sink[head] : -INFINITY;
    for (int j = r.keys.first; j < r.keys.last; ++j) {
      s.push_back((float)flashcore_reference_logit(&r, j));
      m = fmaxf(m, s.back());
      if (isfinite(s.back())) largest_logit = std::max(largest_logit, (double)fabsf(s.back()));
    }
    float l = a.sink ? expf(a.sink[head] - m) : 0.f;
    std::vector<float> sum((size_t)c.dim_v, 0.f);
    for (size_t j = 0; j < s.size(); ++j) {
      if (s[j] == -INFINITY) continue;
      const float p = expf(s[j] - m), unit = is_mixed(c) ? 1.f : 256.f;
      const float rounded = (float)flashcore_decode(c.dtype, flashcore_encode(c.dtype, unit * p)) / unit;
      const int64_t v = r.seq.v + (r.keys.first + (int64_t)j) * a.v.stride_s + r.h_kv * a.v.stride_h;
      l += p;
      for (int d = 0; d < c.dim_v; ++d) sum[(size_t)d] += rounded * (float)flashcore_load(a.v.data, c.dtype_kv, v + d);
    }
    for (int d = 0; d < c.dim_v; ++d) out[d] = l == 0.f ? 0.f : round_o(sum[(size_t)d] / l * (float)r.v_scale);
  }
  int o_type() const { return c.dtype_o ? c.dtype_o : is_mixed(c) ? c.dtype : FLASHCORE_BF16; }
  float round_o(float x) const { return (float)flashcore_decode(o_type(), flashcore_encode(o_type(), x)); }

  /* Waits, compares, and fills the outputs anew. */
  std::string judge() {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) fatal("kernel", std::string(cudaGetErrorString(status)) + "; " + current_case());
    std::vector<uint8_t> found = o->download(), found_lse = lse->download();
    std::string why = compare(found);
    if (why.empty() && c.lse) why = compare_lse(found_lse);
    const auto untouched = [](const std::vector<uint8_t> &bytes) {
      return std::all_of(bytes.begin(), bytes.end(), [](uint8_t x) { return x == 0xff; });
    };
    if (why.empty() && !untouched(found)) why = "O was written outside its live rows";
    if (why.empty() && !untouched(found_lse)) why = "the LSE was written outside its live rows";
    for (auto &b : buffers)
      if (why.empty() && b->download() != b->host) why = "an input was written";
    o->upload();
    lse->upload();
    return why;
  }
  /* The error rule: per element 2 lowref's largest and 2 of what rounding O costs; in the mean 1.5 lowref's. Forgets what it has seen. */
  std::string compare(std::vector<uint8_t> &found) const {
    double largest = 0, largest_low = 0, noise = 0, sum = 0, sum_low = 0, size = 0;
    std::string why;
    const int64_t base = static_cast<uint8_t *>(device.o.data) - o->device;
    size_t live = 0;
    each_row(true, device.o, c.heads_q, [&](int b, int row, int head, int64_t at) {
      const size_t index = (((size_t)b * (size_t)c.heads_q + (size_t)head) * (size_t)c.seq_q + (size_t)row) * (size_t)c.dim_v;
      for (int d = 0; d < c.dim_v; ++d) {
        uint8_t *bytes = &found[(size_t)(base + 2 * (at + d))];
        const double x = flashcore_load(bytes, o_type(), 0), ref = exact[index + (size_t)d];
        bytes[0] = bytes[1] = 0xff;
        ++live;
        if (isnan(x) != isnan(ref) && why.empty()) why = format("batch %d, head %d, row %d, dim %d: %g, not %g", b, head, row, d, x, ref);
        if (isnan(x) || isnan(ref)) continue;
        const float r = round_o((float)ref), tenths = round_o(0.3f);
        largest = std::max(largest, fabs(x - ref)), sum += fabs(x - ref), size = std::max(size, fabs(ref));
        largest_low = std::max(largest_low, fabs(low[index + (size_t)d] - ref)), sum_low += fabs(low[index + (size_t)d] - ref);
        noise = std::max(noise, (double)fabsf(round_o(round_o(r + tenths) - tenths) - r));
      }
    });
    if (!why.empty()) return why;
    if (!(largest <= 2 * largest_low + 2 * noise)) return format("largest error %.3g, lowref's %.3g, noise %.3g", largest, largest_low, noise);
    if (!(sum <= 1.5 * sum_low + 1e-7 * std::max(1.0, size) * (double)live))
      return format("mean error %.3g, lowref's %.3g", sum / (double)live, sum_low / (double)live);
    return "";
  }
  std::string compare_lse(std::vector<uint8_t> &found) const {
    for (int b = 0; b < c.batch; ++b)
      for (int head = 0; head < c.heads_q; ++head)
        for (int row = 0; row < len_q[(size_t)b]; ++row) {
          const size_t index = ((size_t)b * (size_t)c.heads_q + (size_t)head) * (size_t)c.seq_q + (size_t)row;
          float x;
          memcpy(&x, &found[Buffer::kGuard + 4 * index], 4);
          memset(&found[Buffer::kGuard + 4 * index], 0xff, 4);
          const float ref = exact_lse[index];
          const double allowed = is_mixed(c) ? 2e-5 + 1e-6 * fabs(ref) : 2e-3 + ldexp(largest_logit, -13);
          const bool same = x == ref || (isnan(x) && isnan(ref)) || fabs((double)x - ref) <= allowed;
          if (!same) return format("LSE of batch %d, head %d, row %d: %g, not %g", b, head, row, x, ref);
        }
    return "";
  }
};

static bool mixed = false; /* is Q fp16 or bf16? */

/* Every case on every tile it may have. */
static void check(const std::string &property, const std::vector<Case> &cases) {
  const std::string name = (mixed ? "mixed_" : "") + property;
  int failed = 0, count = 0;
  std::string why;
  for (const Case &c : cases) {
    Problem p(c);
    for (int wide = 0; wide < 3; ++wide) { /* 2: whatever the dispatcher takes */
      const std::string wrong = wide == 2 ? p.run() : p.run(wide ? 0 : 1 << 20, wide);
      ++count;
      if (!wrong.empty() && failed++ < 3)
        why += format("\n     %s; ", wide == 2 ? "front door" : wide ? "wide" : "narrow") + wrong + "\n     " + to_string(c);
    }
  }
  if (failed) report().fail(name, format("%d of %d runs:", failed, count) + why);
  else report().ok(name, format("%d runs", count));
}

/* Of Q, and of K and V; the last four are mixed. */
static const int kTypes[][2] = {{FLASHCORE_E4M3, FLASHCORE_E4M3}, {FLASHCORE_E5M2, FLASHCORE_E5M2}, {FLASHCORE_F16, FLASHCORE_E4M3},
                                {FLASHCORE_BF16, FLASHCORE_E5M2}, {FLASHCORE_BF16, FLASHCORE_E4M3}, {FLASHCORE_F16, FLASHCORE_E5M2}};
static int types() { return mixed ? 4 : 2; }

static Case sized(int turn, int seq_q, int seq_kv, int dim) {
  Case c;
  const int(&type)[2] = kTypes[mixed ? 2 + turn % 4 : turn % 2];
  c.dtype = type[0], c.dtype_kv = type[1], c.seq_q = seq_q, c.seq_kv = seq_kv, c.dim_qk = c.dim_v = dim;
  return c;
}

static void test_shapes() {
  std::vector<Case> edges, dims;
  int turn = 0;
  for (int q : {1, 15, 17, 64, 65, 129})
    for (int kv : {1, 31, 33, 63, 64, 65, 130}) {
      edges.push_back(sized(turn, q, kv, 64 << turn % 3));
      edges.back().causal = turn++ / 2 % 3;
    }
  check("lengths_around_tile_edges", edges);
  for (int dim = 16; dim <= 256; dim += 16) {
    dims.push_back(sized(turn++, 70, 149, dim));
    dims.back().causal = 1;
  }
  for (const auto &pair : {std::pair<int, int>{64, 128}, {192, 128}, {128, 32}, {16, 256}}) {
    dims.push_back(sized(turn++, 70, 149, pair.first));
    dims.back().dim_v = pair.second;
  }
  check("every_head_dim", dims);
}

static void test_masks() {
  std::vector<Case> windows, empty;
  int turn = 0;
  for (int causal = 0; causal < 3; ++causal)
    for (const auto &w : {std::pair<int, int>{0, 0}, {20, 3}, {-1, 40}, {70, -1}, {1, 100}}) {
      windows.push_back(sized(turn, 150, 211, 64 << turn % 3));
      windows.back().causal = causal, windows.back().left = w.first, windows.back().right = w.second;
      ++turn;
    }
  check("causal_and_windows", windows);
  for (int causal = 1; causal < 3; ++causal) {
    empty.push_back(sized(turn++, 200, 67, 128)); /* rows at the top see nothing */
    empty.back().causal = causal;
  }
  empty.push_back(sized(turn++, 70, 0, 64));
  empty.push_back(sized(turn++, 70, 0, 64));
  empty.back().rules = SINK;
  empty.push_back(sized(turn++, 70, 100, 64));
  empty.back().rules = MASK;
  check("rows_without_keys_give_zero_and_lse_minus_inf_or_sink", empty);
}

static void test_options() {
  std::vector<Case> rules, groups, lengths, layouts, outputs;
  int turn = 0;
  for (const int bits : std::initializer_list<int>{SOFTCAP, ALIBI, BIAS, MASK, SINK, SOFTCAP | BIAS | MASK | SINK})
    for (int dim : {64, 128, 256}) {
      rules.push_back(sized(turn++, 75, 140, dim));
      rules.back().rules = bits, rules.back().causal = turn % 3;
    }
  check("rules_and_sinks", rules);
  for (int group : {1, 2, 3, 7, 8})
    for (int seq_q : {1, 5, 70}) { /* descales differ from head to head, in one tile too */
      groups.push_back(sized(turn, seq_q, 150, 64 << turn % 3));
      groups.back().heads_kv = 2, groups.back().heads_q = 2 * group, groups.back().causal = turn++ % 3;
      groups.back().rules = group == 3 ? BIAS : group == 8 ? SINK : 0;
    }
  check("any_group_size", groups);
  std::vector<Case> few;
  for (int kv : {1, 31, 33, 64, 65, 127, 129, 255, 257, 700}) /* up to 16 rows: warps of the mixed kernel that share them get few keys or none */
    for (int dim : {64, 128, 256})
      for (int seq_q : {1, 8}) {
        few.push_back(sized(turn++, seq_q, kv, dim));
        few.back().causal = turn % 3, few.back().rules = turn % 4 == 0 ? SINK : turn % 4 == 1 ? ALIBI | MASK : 0;
        if (turn % 5 == 0) few.back().left = 40, few.back().right = 3;
        if (turn % 7 == 0) few.back().batch = 3, few.back().lengths = SEQLENS;
      }
  check("few_rows", few);
  for (int kind : {CU_SEQLENS, SEQLENS})
    for (int dim : {64, 128, 256})
      for (int causal = 0; causal < 3; ++causal) {
        lengths.push_back(sized(turn++, 100, 190, dim));
        lengths.back().batch = 5, lengths.back().lengths = kind, lengths.back().causal = causal, lengths.back().rules = causal == 2 ? ALIBI : 0;
      }
  check("sequences_of_different_lengths", lengths);
  for (int layout : {PADDED, BACKWARDS})
    for (int dim : {48, 128, 208}) {
      layouts.push_back(sized(turn++, 67, 131, dim));
      layouts.back().batch = 2, layouts.back().heads_kv = 2, layouts.back().layout = layout, layouts.back().causal = 1;
    }
  check("strides", layouts);
  for (int type : {0, (int)FLASHCORE_BF16, (int)FLASHCORE_F16})
    for (int lse = 0; lse < 3; ++lse) {
      outputs.push_back(sized(turn++, 67, 131, 128));
      outputs.back().dtype_o = type, outputs.back().lse = lse, outputs.back().descale = lse ? DESCALES : NO_DESCALES;
    }
  check("output_types_lse_and_descales", outputs);
}

static void test_data() {
  std::vector<Case> hard, many;
  int turn = 0;
  for (int data : {DATA_PEAKED, DATA_RAMP, DATA_EQUAL, DATA_NAN_ROW, DATA_SAME_SIGN})
    for (int dim : {64, 128, 256})
      for (int n = 0; n < types(); ++n) {
        hard.push_back(sized(n, 66, 333, dim));
        hard.back().data = data, hard.back().descale = data != DATA_EQUAL;
      }
  check("peaked_rising_equal_and_nan_rows", hard);
  std::vector<Case> scales;
  for (int descale : {(int)NAN_DESCALE, (int)NEGATIVE_DESCALE, (int)NAN_DESCALE_OF_V})
    for (int rules : {0, (int)SOFTCAP})
      for (int seq_q : {5, 70}) { /* 5: heads of a group in one tile */
        scales.push_back(sized(turn++, seq_q, 100, 128));
        scales.back().descale = descale, scales.back().rules = rules, scales.back().causal = 2;
        scales.back().heads_q = 4, scales.back().heads_kv = 2;
      }
  check("nan_or_negative_descale_spoils_its_head_only", scales);
  std::vector<Case> empty;
  for (int descale : {(int)NAN_DESCALE, (int)NEGATIVE_DESCALE, (int)NAN_DESCALE_OF_V})
    for (int dim : {64, 128, 256})
      for (int seq_q : {8, 200}) {
        empty.push_back(sized(turn++, seq_q, seq_q / 3, dim)); /* rows at the top see nothing */
        empty.back().descale = descale, empty.back().causal = 1, empty.back().rules = turn % 4 == 0 ? SOFTCAP : 0;
      }
  check("nan_or_negative_descale_leaves_rows_without_keys_alone", empty);
  for (int dim : {64, 128, 256})
    for (int n = 0; n < types(); ++n) {
      many.push_back(sized(n, 8, 8209, dim));
      many.back().data = DATA_SAME_SIGN, many.back().heads_q = 1;
    }
  check("many_keys_of_one_sign", many);
}

int main() {
  cudaDeviceProp properties;
  CUDA_OK(cudaGetDeviceProperties(&properties, 0));
  printf("# %s, sm_%d%d\n", properties.name, properties.major, properties.minor);
  for (const bool with_16_bits : {false, true}) {
    mixed = with_16_bits;
    test_shapes();
    test_masks();
    test_options();
    test_data();
  }
  return report().finish();
}
