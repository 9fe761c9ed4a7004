/* Demonstrates who takes which tile of the wgmma kernel's persistent grid, and what the kernel refuses, in which words. Needs nvcc, no GPU.
 *   nvcc -std=c++17 -arch=compute_90a -I<repository> tests/host/test_wgmma.cu */
#define FLASHCORE_IMPLEMENTATION
#define FLASHCORE_NO_F32 /* one element type compiles sooner */
#define FLASHCORE_NO_BF16
#include "flashcore_wgmma.cuh"

#include "check.h"
#include "plan.h"

#include <algorithm>
#include <vector>

/* Every tile once; returns the most work of a block over the mean, in blocks of 64 keys and the start and end of a tile. */
static double walk(const flashcore_attention &a, int block_q, int blocks) {
  const flashcore::wgmma_schedule s = flashcore::make_wgmma_schedule(a, block_q, blocks);
  const int tiles = (a.seq_q + block_q - 1) / block_q, units = a.batch * a.heads_q;
  std::vector<int> taken((size_t)tiles * units);
  double most = 0, sum = 0;
  for (int block = 0; block < blocks; ++block) {
    double mine = 0;
    bool done = false;
    for (int round = 0; !done; ++round) {
      int32_t tile, unit;
      if (!s.tile_of(round, block, blocks, tile, unit, done)) continue;
      const bool exists = tile >= 0 && tile < tiles && unit >= 0 && unit < units;
      if (!CHECK(exists)) return 0;
      ++taken[(size_t)unit * tiles + tile];
      mine += (a.causal ? std::min(a.seq_q, (tile + 1) * block_q) : a.seq_q) / 64.0 + 2;
    }
    most = std::max(most, mine);
    sum += mine;
  }
  CHECK(std::all_of(taken.begin(), taken.end(), [](int n) { return n == 1; }));
  return most * blocks / sum;
}

static void every_tile_is_taken_once() {
  for (int causal = 0; causal < 2; ++causal)
    for (int seq : {1, 64, 200, 512, 700, 2048, 8192, 16384})
      for (int units : {1, 7, 32, 131, 132, 133, 512, 1000})
        for (int block_q : {128, 192, 256})
          for (int dim : {64, 256}) {
            flashcore_attention a = accepted(300);
            a.causal = causal, a.seq_q = a.seq_kv = seq, a.batch = 1, a.heads_q = a.heads_kv = units, a.dim_qk = a.dim_v = dim;
            walk(a, block_q, std::min(132, (seq + block_q - 1) / block_q * units));
          }
}

static void causal_blocks_have_about_the_same_work() { /* batch * seq = 16384, heads * dim = 2048 on 132 SMs: 1.032 is the last of 7.76 rounds */
  for (int dim : {64, 128, 256})
    for (int seq = 512; seq <= 16384; seq *= 2) {
      flashcore_attention a = accepted(300);
      a.causal = 1, a.seq_q = a.seq_kv = seq, a.batch = 16384 / seq, a.heads_q = a.heads_kv = 2048 / dim, a.dim_qk = a.dim_v = dim;
      const double worst = walk(a, dim == 64 ? 256 : dim == 128 && seq > 1024 ? 192 : 128, 132);
      if (!CHECK(worst < 1.05)) printf("  dim %d, seq %d: %.3f\n", dim, seq, worst);
    }
}

struct refusal {
  const char *name;
  void (*change)(flashcore_attention &);
  int32_t arch;
  flashcore_status status;
  const char *field;
};
static const refusal refusals[] = {
    {"fp32", [](flashcore_attention &a) { a.dtype = FLASHCORE_F32; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype"},
    {"Ada", [](flashcore_attention &) {}, 89, FLASHCORE_UNSUPPORTED_ARCH, "device"},
    {"softcap", [](flashcore_attention &a) { a.softcap = 1.f; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "softcap"},
    {"ALiBi", [](flashcore_attention &a) { a.alibi_slopes = (const float *)4096; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "alibi_slopes"},
    {"bias", [](flashcore_attention &a) { a.bias = (const void *)4096; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "bias"},
    {"mask bits", [](flashcore_attention &a) { a.mask_bits = (const uint32_t *)4096; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "mask_bits"},
    {"splits", [](flashcore_attention &a) { a.num_splits = 3; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits"},
    {"no keys", [](flashcore_attention &a) { a.seq_kv = 0; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "seq_kv"},
    {"dim 60", [](flashcore_attention &a) { a.dim_qk = 60; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_qk"},
    {"dim 264", [](flashcore_attention &a) { a.dim_v = 264; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_v"},
    {"address", [](flashcore_attention &a) { a.v.data = (void *)4104; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "v"},
    {"odd stride", [](flashcore_attention &a) { a.o.stride_s += 4; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "o"},
    {"broadcast", [](flashcore_attention &a) { a.k.stride_h = 0; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "k"},
    {"backwards", [](flashcore_attention &a) { a.q.stride_s = -a.q.stride_s; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "q"},
};

static void refusals_name_the_field_and_the_kernel() {
  for (const refusal &x : refusals) {
    flashcore_attention a = accepted(300);
    flashcore_plan plan;
    flashcore_error error = {};
    x.change(a);
    const flashcore_status status = plan_on(x.arch, a, FLASHCORE_BACKEND_WGMMA, &plan, &error);
    if (!CHECK(status == x.status && error.field && !strcmp(error.field, x.field) && strstr(error.message, "the wgmma kernel")))
      printf("  %s: status %d, %s\n", x.name, (int)status, error.message);
  }
}

int main() {
  RUN(every_tile_is_taken_once);
  RUN(causal_blocks_have_about_the_same_work);
  RUN(refusals_name_the_field_and_the_kernel);
  return check_end();
}
