/* Demonstrates who takes which tile of the wgmma kernel's persistent grid, which tile that is, and what the kernel refuses, in which words. Needs nvcc,
 * no GPU.
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
static double walk(const flashcore_attention &a, int block_q, int blocks, int pack = 1) {
  const flashcore::wgmma_schedule s = flashcore::make_wgmma_schedule(a, block_q, pack, false, blocks);
  const int tiles = (a.seq_q * pack + block_q - 1) / block_q, units = a.batch * a.heads_q / pack;
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
            flashcore_attention a = sized(1, units, units, seq, seq, dim);
            a.causal = causal;
            walk(a, block_q, std::min(132, (seq + block_q - 1) / block_q * units));
            a.heads_q *= 4;
            walk(a, block_q, std::min(132, (4 * seq + block_q - 1) / block_q * units), 4);
          }
}

static void causal_blocks_have_about_the_same_work() { /* batch * seq = 16384, heads * dim = 2048 on 132 SMs: 1.032 is the last of 7.76 rounds */
  for (int dim : {64, 128, 256})
    for (int seq = 512; seq <= 16384; seq *= 2) {
      flashcore_attention a = sized(16384 / seq, 2048 / dim, 2048 / dim, seq, seq, dim);
      a.causal = 1;
      const double worst = walk(a, dim == 64 ? 256 : dim == 128 && seq > 1024 ? 192 : 128, 132);
      if (!CHECK(worst < 1.05)) printf("  dim %d, seq %d: %.3f\n", dim, seq, worst);
    }
}

static void heads_are_packed_where_that_saves_tiles() {
  const struct {
    int heads_q, heads_kv, seq_q, seq_kv, dim, pack;
  } cases[] = {
      {32, 8, 1, 4096, 128, 4},   {32, 8, 32, 4096, 128, 4},  {32, 8, 64, 4096, 128, 2},  {32, 8, 128, 4096, 128, 1},
      {32, 8, 130, 4096, 128, 4}, {32, 32, 16, 4096, 128, 1}, {28, 4, 16, 4096, 128, 1},  {24, 2, 16, 4096, 128, 4},
      {128, 1, 1, 4096, 128, 64}, {256, 1, 3, 4096, 64, 32},  {32, 8, 4096, 4096, 64, 1}, {32, 8, 1100, 4096, 64, 1},
  };
  for (const auto &x : cases) {
    const flashcore_attention a = sized(2, x.heads_q, x.heads_kv, x.seq_q, x.seq_kv, x.dim);
    flashcore_plan plan;
    if (!CHECK(plan_on(90, a, FLASHCORE_BACKEND_WGMMA, &plan, nullptr) == FLASHCORE_OK && plan.d.packed_group == x.pack))
      printf("  %d over %d heads, %d queries: %d packed, tiles of %d rows\n", x.heads_q, x.heads_kv, x.seq_q, (int)plan.d.packed_group,
             (int)plan.d.block_q);
  }
}

static void rows_of_a_tile_fit_the_grid() {
  const struct {
    int batch, heads, seq, dim, causal, rows;
  } cases[] = {
      {32, 32, 512, 64, 0, 256},  {1, 96, 512, 64, 0, 128},   {1, 96, 512, 64, 1, 256},   {4, 16, 512, 64, 0, 256},
      {4, 20, 1024, 96, 0, 128},  {4, 20, 4096, 96, 0, 192},  {4, 16, 4096, 128, 0, 128}, {4, 16, 4096, 128, 1, 192},
      {1, 16, 4096, 128, 1, 128}, {1, 32, 1024, 128, 1, 128}, {4, 10, 4096, 192, 1, 128}, {4, 8, 4096, 256, 1, 128},
  };
  for (const auto &x : cases) {
    flashcore_attention a = sized(x.batch, x.heads, x.heads, x.seq, x.seq, x.dim);
    flashcore_plan plan;
    a.causal = x.causal;
    if (!CHECK(plan_on(90, a, FLASHCORE_BACKEND_WGMMA, &plan, nullptr) == FLASHCORE_OK)) continue;
    if (!CHECK(plan.d.block_q == x.rows)) printf("  %d heads, seq %d, dim %d: %d rows\n", x.heads, x.seq, x.dim, (int)plan.d.block_q);
  }
}

/* What TMA cannot read is copied by lanes, in pieces as large as all addresses and rows allow. */
static void loaders_are_a_ladder() {
  const struct {
    const char *name;
    void (*change)(flashcore_attention &);
    int copy;
  } cases[] = {
      {"aligned", [](flashcore_attention &) {}, 0},
      {"broadcast heads", [](flashcore_attention &a) { a.k.stride_h = 0; }, 0},
      {"padded rows", [](flashcore_attention &a) { a.q.stride_s += 8; }, 0},
      {"backwards", [](flashcore_attention &a) { a.q.stride_s = -a.q.stride_s; }, 16},
      {"no keys", [](flashcore_attention &a) { a.seq_kv = 0; }, 16},
      {"a huge step", [](flashcore_attention &a) { a.v.stride_b = (int64_t)1 << 39; }, 16},
      {"address of 8", [](flashcore_attention &a) { a.v.data = (void *)4104; }, 8},
      {"stride of 4", [](flashcore_attention &a) { a.o.stride_s += 4; }, 8},
      {"dim of 62", [](flashcore_attention &a) { a.dim_qk = 62; }, 4},
      {"odd dim", [](flashcore_attention &a) { a.dim_v = 33; }, 2},
      {"odd address", [](flashcore_attention &a) { a.k.data = (void *)4098; }, 2},
      {"a stride that no one steps along", [](flashcore_attention &a) { a.batch = 1, a.q.stride_b = 3; }, 0},
  };
  for (const auto &x : cases) {
    flashcore_attention a = accepted(300);
    flashcore_plan plan;
    x.change(a);
    if (!CHECK(plan_on(90, a, FLASHCORE_BACKEND_WGMMA, &plan, nullptr) == FLASHCORE_OK && plan.param[FLASHCORE_WGMMA_COPY] == x.copy))
      printf("  %s: %d bytes\n", x.name, (int)plan.param[FLASHCORE_WGMMA_COPY]);
  }
}

static const refusal refusals[] = {
    {"fp32", [](flashcore_attention &a) { a.dtype = FLASHCORE_F32; }, 90, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", FLASHCORE_F32, 0},
    {"Ada", [](flashcore_attention &) {}, 89, FLASHCORE_UNSUPPORTED_ARCH, "device", 89, 90},
    {"splits", [](flashcore_attention &a) { a.num_splits = 3; }, 90, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits", 3, 1},
    {"dim 264", [](flashcore_attention &a) { a.dim_v = 264; }, 90, FLASHCORE_UNSUPPORTED_DIM, "dim_v", 264, 256},
    {"pages", [](flashcore_attention &a) { a.page_table = (const int32_t *)4096, a.page_size = 300, a.num_pages = 2, a.page_table_stride_b = 1; }, 90,
     FLASHCORE_UNSUPPORTED_FEATURE, "page_table", 1, 0},
};

/* wgmma_launch has no words for it; with a rule, lanes copy what TMA cannot read. */
static void launches_of_ones_own_are_refused() {
  using tile = flashcore::wgmma_tile_for<__half, 64, 64, flashcore::kGeneralTile>;
  const struct {
    const char *name;
    void (*change)(flashcore_attention &);
    bool even_with_a_rule;
  } cases[] = {
      {"type", [](flashcore_attention &a) { a.dtype = FLASHCORE_BF16; }, true},
      {"type of O", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_F32; }, true},
      {"dim_qk", [](flashcore_attention &a) { a.dim_qk = 72; }, true},
      {"dim_v", [](flashcore_attention &a) { a.dim_v = 80; }, true},
      {"pages", [](flashcore_attention &a) { a.page_table = (const int32_t *)4096, a.page_size = 300, a.num_pages = 2; }, true},
      {"splits", [](flashcore_attention &a) { a.num_splits = 2; }, true},
      {"no tile", [](flashcore_attention &a) { a.batch = 0; }, true},
      {"too many tiles", [](flashcore_attention &a) { a.batch = a.heads_q = a.heads_kv = 1 << 16; }, true},
      {"odd address", [](flashcore_attention &a) { a.v.data = (void *)4104; }, false},
      {"odd dim", [](flashcore_attention &a) { a.dim_v = 60; }, false},
      {"backwards", [](flashcore_attention &a) { a.k.stride_s = -a.k.stride_s; }, false},
      {"no keys", [](flashcore_attention &a) { a.seq_kv = 0; }, false},
  };
  for (const auto &x : cases) {
    flashcore_attention a = accepted(300);
    x.change(a);
    if (!CHECK(flashcore::wgmma_launch<tile>(a, nullptr) == cudaErrorInvalidValue)) printf("  %s\n", x.name);
    if (x.even_with_a_rule && !CHECK(flashcore::wgmma_launch<tile>(a, nullptr, flashcore::descriptor_rule()) == cudaErrorInvalidValue))
      printf("  %s, with a rule\n", x.name);
  }
}

static void refusals_name_the_field_and_the_kernel() {
  for (const refusal &x : refusals) check_refusal(x, accepted(300), FLASHCORE_BACKEND_WGMMA);
}

int main() {
  RUN(every_tile_is_taken_once);
  RUN(causal_blocks_have_about_the_same_work);
  RUN(heads_are_packed_where_that_saves_tiles);
  RUN(rows_of_a_tile_fit_the_grid);
  RUN(loaders_are_a_ladder);
  RUN(launches_of_ones_own_are_refused);
  RUN(refusals_name_the_field_and_the_kernel);
  return check_end();
}
