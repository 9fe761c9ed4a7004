// Demonstrates fp8 attention on a real encoder's Q, K and V: quantise them, run, and see what each way of quantising costs.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_89,code=sm_89 -gencode arch=compute_90a,code=sm_90a examples/fp8/fp8.cu -o fp8
//   ./fp8 [folder of minilm_q.npy, minilm_k.npy, minilm_v.npy]      plot.py beside this file draws what it prints
//
// On Ada and Hopper the quantisers and the attention are kernels; elsewhere the CPU reference takes their place. Errors are relative norms:
//   kernel    O against fp64 math on the fp8 values as stored: what the fp8 tensor cores cost
//   all       O against fp64 math on the fp16 values: what fp8 costs in all
// Exit code: 0 right, 1 an error that fp8 does not explain, 2 a file or CUDA error.
#define FLASHCORE_IMPLEMENTATION
#include "../../flashcore_fp8.cuh"
#include "../common/npy.h"

#include <string>

static bool has_gpu = false;

static void stop(const std::string &what, const char *why) {
  fprintf(stderr, "%s: %s\n", what.c_str(), why);
  exit(2);
}

// Memory that the CPU, and the GPU if there is one, can use.
template <typename T> static T *allocate(size_t count) {
  void *p = nullptr;
  if (has_gpu && cudaMallocManaged(&p, count * sizeof(T)) != cudaSuccess) p = nullptr;
  if (!has_gpu) p = aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (!p) stop("memory", "there is not enough");
  return static_cast<T *>(p);
}

struct Shape {
  int batch, seq, heads, dim;
  size_t count() const { return (size_t)batch * seq * heads * dim; }
  flashcore_tensor view(const void *data) const { return flashcore_bshd(data, seq, heads, dim); }
};

static uint16_t *load(const std::string &path, Shape *shape) {
  npy_array a;
  const char *why = npy_read(path.c_str(), &a);
  if (why || a.dims != 4 || strcmp(a.type, "f2")) stop(path, why ? why : "not a (batch, seq, heads, dim) array of fp16");
  *shape = {(int)a.shape[0], (int)a.shape[1], (int)a.shape[2], (int)a.shape[3]};
  uint16_t *data = allocate<uint16_t>(shape->count());
  memcpy(data, a.data, 2 * shape->count());
  free(a.data);
  return data;
}

// A tensor in fp8, with a scale per head of each batch entry, or one for all.
struct Quantised {
  uint8_t *data;
  float *scales;
};

// One way of quantising. K without its mean: a row's logits all change by the same, which softmax alone does not feel (softcap and sinks do). Q and K
// rotated: their products do not change.
struct Way {
  const char *name;
  int granularity;
  bool smooth, rotate;
};

static void quantise(const Shape &s, const uint16_t *x, const Way &way, bool is_k, bool is_v, Quantised *to) {
  flashcore_fp8_quantise_args q;
  flashcore_error why;
  flashcore_fp8_quantise_init(&q);
  q.dtype = FLASHCORE_F16;
  q.batch = s.batch, q.rows = s.seq, q.heads = s.heads, q.dim = s.dim;
  q.x = s.view(x), q.out = s.view(to->data);
  q.granularity = way.granularity, q.descale = to->scales;
  q.mean = way.smooth && is_k ? allocate<float>((size_t)s.batch * s.heads * s.dim) : nullptr;
  q.rotation = way.rotate && !is_v ? s.dim : 0;
  const flashcore_status status = has_gpu ? flashcore_fp8_quantise(&q, nullptr, &why) : flashcore_fp8_quantise_reference(&q, &why);
  if (status != FLASHCORE_OK) stop("quantise", why.message);
}

// A problem without its tensors' data.
static flashcore_attention problem(const Shape &s) {
  flashcore_attention a;
  flashcore_init(&a);
  a.batch = s.batch, a.heads_q = a.heads_kv = s.heads, a.seq_q = a.seq_kv = s.seq, a.dim_qk = a.dim_v = s.dim;
  return a;
}

static flashcore_attention problem8(const Shape &s, const Quantised (&x)[3], const Way &way) {
  flashcore_attention a = problem(s);
  const int64_t per_batch = way.granularity == FLASHCORE_FP8_PER_HEAD ? s.heads : 0, per_head = way.granularity == FLASHCORE_FP8_PER_HEAD;
  a.dtype = FLASHCORE_E4M3;
  a.q = s.view(x[0].data), a.k = s.view(x[1].data), a.v = s.view(x[2].data);
  a.q_descale = {x[0].scales, per_batch, per_head}, a.k_descale = {x[1].scales, per_batch, per_head},
  a.v_descale = {x[2].scales, per_batch, per_head};
  return a;
}

// The result in fp64 math, stored as fp32.
static float *exact(flashcore_attention a, const Shape &s) {
  float *o = allocate<float>(s.count());
  flashcore_error why;
  a.dtype_o = FLASHCORE_F32, a.o = s.view(o);
  if (flashcore_reference_forward(&a, &why) != FLASHCORE_OK) stop("reference", why.message);
  return o;
}

// |o - expected| / |expected|; o in bf16.
static double error_of(const uint16_t *o, const float *expected, size_t count) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < count; ++i) {
    const double x = (double)float_from_bf16(o[i]) - (double)expected[i];
    difference += x * x;
    size += (double)expected[i] * (double)expected[i];
  }
  return sqrt(difference / size);
}

int main(int argc, char **argv) {
  const std::string folder = argc > 1 ? argv[1] : "tests/data";
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  has_gpu = major == 9 || (major == 8 && minor == 9);
  Shape s;
  const uint16_t *x[3];
  for (int i = 0; i < 3; ++i) x[i] = load(folder + "/minilm_" + "qkv"[i] + ".npy", &s);
  flashcore_attention plain = problem(s);
  plain.dtype = FLASHCORE_F16, plain.q = s.view(x[0]), plain.k = s.view(x[1]), plain.v = s.view(x[2]);
  const float *const original = exact(plain, s);
  printf("%d batch entries, %d tokens, %d heads of %d dims, by %s\n", s.batch, s.seq, s.heads, s.dim, has_gpu ? "the GPU" : "the CPU reference");
  printf("%-32s    kernel       all\n", "scales");

  const Way ways[] = {{"one per tensor", FLASHCORE_FP8_PER_TENSOR, false, false},
                      {"one per head", FLASHCORE_FP8_PER_HEAD, false, false},
                      {"one per head, K without mean", FLASHCORE_FP8_PER_HEAD, true, false},
                      {"one per head, Q and K rotated", FLASHCORE_FP8_PER_HEAD, false, true},
                      {"one per head, both", FLASHCORE_FP8_PER_HEAD, true, true}};
  bool good = true;
  for (const Way &way : ways) {
    Quantised y[3];
    for (int i = 0; i < 3; ++i) {
      y[i] = {allocate<uint8_t>(s.count()), allocate<float>((size_t)s.batch * s.heads)};
      quantise(s, x[i], way, i == 1, i == 2, &y[i]);
    }
    flashcore_attention a = problem8(s, y, way);
    flashcore_error why;
    uint16_t *o = allocate<uint16_t>(s.count()); // bf16, what fp8 inputs give unless dtype_o says otherwise
    a.o = s.view(o);
    const flashcore_status status = has_gpu ? flashcore_forward(&a, nullptr, &why) : flashcore_reference_forward(&a, &why);
    if (status != FLASHCORE_OK) stop("attention", why.message);
    if (has_gpu && cudaDeviceSynchronize() != cudaSuccess) stop("attention", "the kernel failed");
    const double kernel = error_of(o, exact(a, s), s.count()), all = error_of(o, original, s.count());
    printf("%-32s  %.2e  %.2e\n", way.name, kernel, all);
    good &= kernel < 3e-2 && all < 0.2;
  }
  return good ? 0 : 1;
}
