/* Speed as a property: the backend that flashcore_forward picks is within 5 % of the fastest that serves, on the grid of the speed tables.
 *
 * Times are medians of CUDA-graph replays on normal random data. A pick that looks slower is timed twice more, contenders in turn, and the best of its
 * times counts: a test of speed on a shared chip must not fail by chance. */
#include "flashcore.h"

#include "../../examples/common/timing.h"
#include "report.h"

#include <algorithm>
#include <cuda_fp16.h>
#include <random>
#include <vector>

static constexpr size_t kMostElements = (size_t)16384 * 2048;

static cudaStream_t stream() { /* graphs are not captured from the default one */
  static cudaStream_t the_stream = nullptr;
  if (!the_stream) CUDA_OK(cudaStreamCreate(&the_stream));
  return the_stream;
}

static double microseconds(flashcore_attention a, int backend) {
  double us = 0;
  a.backend = backend;
  if (flashcore_supported(&a, -1, nullptr) != FLASHCORE_OK) return 0;
  if (time_forward(&a, stream(), &us)) fatal("timing", current_case());
  return us;
}

/* "" or which backend is how much faster than the pick. */
static std::string judge(const flashcore_attention &a) {
  const int backends[] = {FLASHCORE_BACKEND_WMMA, FLASHCORE_BACKEND_MMA, FLASHCORE_BACKEND_WGMMA};
  flashcore_description picked;
  if (flashcore_describe(&a, -1, &picked, nullptr) != FLASHCORE_OK) return "the problem is refused";
  std::string wrong;
  for (int backend : backends) {
    if (backend == picked.backend) continue;
    double pick = 0, other = 0;
    for (int attempt = 0; attempt < 3 && (attempt == 0 || pick > 1.05 * other); ++attempt) {
      const double p = microseconds(a, picked.backend), o = microseconds(a, backend);
      if (o == 0) break; /* does not serve it */
      pick = attempt ? std::min(p, pick) : p;
      other = attempt ? std::min(o, other) : o;
    }
    if (pick > 1.05 * other)
      wrong += format("%s takes %.2f us, %s %.2f us; ", flashcore_backend_string((flashcore_backend)picked.backend), pick,
                      flashcore_backend_string((flashcore_backend)backend), other);
  }
  return wrong;
}

static __half *random_elements(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<__half> values(1 << 20);
  for (__half &x : values) x = __float2half(normal(random));
  __half *device;
  CUDA_OK(cudaMalloc(&device, kMostElements * sizeof(__half)));
  for (size_t i = 0; i < kMostElements; i += values.size())
    CUDA_OK(cudaMemcpy(device + i, values.data(), values.size() * sizeof(__half), cudaMemcpyHostToDevice));
  return device;
}

int main() {
  __half *const q = random_elements(1), *const k = random_elements(2), *const v = random_elements(3), *const o = random_elements(4);
  struct shape {
    int batch, heads, seq, dim, heads_kv = heads, seq_kv = seq;
  };
  std::vector<shape> shapes = {{1, 8, 512, 64},  {2, 8, 256, 64},    {2, 8, 512, 64},   {32, 8, 128, 64},  {32, 8, 512, 64},
                               {1, 96, 512, 64}, {16, 16, 2048, 64}, {1, 32, 512, 128}, {1, 32, 2048, 128}};
  for (int dim : {64, 96, 128, 192, 256})
    for (int seq = 512; seq <= 16384; seq *= 2) shapes.push_back({16384 / seq, 2048 / dim, seq, dim});
  for (const shape &x : {shape{4, 32, 64, 128, 8, 4096}, shape{8, 64, 16, 128, 8, 4096}, shape{4, 28, 40, 128, 4, 4096},
                         shape{16, 32, 128, 64, 4, 2048}, shape{4, 32, 100, 256, 4, 4096}, shape{2, 32, 300, 128, 8, 4096},
                         shape{8, 32, 1, 128, 8, 4096}, shape{1, 32, 1, 128, 8, 16384}, shape{4, 64, 7, 64, 8, 1024}})
    shapes.push_back(x);                /* few queries, many keys: heads that share K and V share tiles */
  shapes.push_back({4, 16, 4096, 100}); /* rows that are copied 8 bytes at a time, 2 bytes at a time */
  shapes.push_back({4, 32, 1024, 33});
  for (const shape &x : shapes)
    for (int causal = 0; causal < 2; ++causal) {
      flashcore_attention a;
      flashcore_init(&a);
      a.dtype = FLASHCORE_F16;
      a.batch = x.batch, a.heads_q = x.heads, a.heads_kv = x.heads_kv, a.seq_q = x.seq, a.seq_kv = x.seq_kv;
      a.dim_qk = a.dim_v = x.dim, a.causal = causal;
      a.q = flashcore_bshd(q, x.seq, x.heads, x.dim);
      a.k = flashcore_bshd(k, x.seq_kv, x.heads_kv, x.dim);
      a.v = flashcore_bshd(v, x.seq_kv, x.heads_kv, x.dim);
      a.o = flashcore_bshd(o, x.seq, x.heads, x.dim);
      const std::string keys = x.seq_kv == x.seq ? "" : format("_over_h%d_s%d", x.heads_kv, x.seq_kv);
      const std::string name = format("pick_is_near_the_fastest_b%d_h%d_s%d_d%d", x.batch, x.heads, x.seq, x.dim) + keys + (causal ? "_causal" : "");
      current_case() = name;
      const std::string wrong = judge(a);
      report().expect(name, wrong.empty(), wrong);
    }
  return report().finish();
}
