/* fp16 and bf16 Q beside fp8 K and V (a cache) against the fp64 oracle on the values as stored, in poisoned memory (harness.cuh). The error rule is that
 * of 16-bit types.
 *
 *   test_mixed [--quick] [--only TEXT]      --only: tests whose name holds TEXT */
#include "properties.cuh"

static const int kBackends[] = {FLASHCORE_BACKEND_QGMMA, FLASHCORE_BACKEND_QMMA};
static const int kDims[] = {64, 128, 256};

/* Of Q, and of K and V; turn: counts the cases. */
static Case mixed(int turn, int batch, int heads_q, int heads_kv, int seq_q, int seq_kv, int dim) {
  static const int types[][2] = {
      {FLASHCORE_F16, FLASHCORE_E4M3}, {FLASHCORE_BF16, FLASHCORE_E5M2}, {FLASHCORE_BF16, FLASHCORE_E4M3}, {FLASHCORE_F16, FLASHCORE_E5M2}};
  Case c = sized(types[turn % 4][0], batch, heads_q, heads_kv, seq_q, seq_kv, dim);
  c.dtype_kv = types[turn % 4][1];
  return c;
}

static void check(const std::string &name, const std::vector<Case> &cases) {
  for (int backend : kBackends)
    if (must_serve(mixed(0, 1, 1, 1, 64, 64, 64), backend)) check_with_and_without_lse(name_of(backend) + ".mixed." + name, backend, cases);
}

static void test_shapes() {
  std::vector<Case> edges, primes, dims, unequal;
  int turn = 0;
  for (int q : {1, 63, 64, 65, 127, 128, 129})
    for (int kv : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
      edges.push_back(mixed(turn, 1, 2, 1, q, kv, kDims[turn % 3]));
      edges.back().causal = turn++ / 3 % 3;
    }
  check("lengths_around_tile_edges", edges);
  const int pairs[][2] = {{7, 13}, {31, 97}, {101, 211}, {257, 263}, {509, 521}, {1021, 1031}, {200, 67}};
  for (const auto &p : pairs)
    for (int causal = 0; causal < 3; ++causal)
      for (int dim : kDims) {
        primes.push_back(mixed(turn++, 2, 3, 3, p[0], p[1], dim));
        primes.back().causal = causal, primes.back().sink = causal % 2;
        primes.back().dtype_o = causal == 0 ? 0 : causal == 1 ? FLASHCORE_F16 : FLASHCORE_BF16;
      }
  check("prime_lengths", primes);
  for (int dim = 16; dim <= 256; dim += 16)
    for (int n = 0; n < 4; ++n) {
      dims.push_back(mixed(n, 1, 2, 2, 77, 149, dim));
      dims.back().causal = dim / 16 % 2;
    }
  check("every_head_dim", dims);
  const int unlike[][2] = {{192, 128}, {64, 128}, {128, 64}, {32, 64}, {48, 256}, {256, 16}};
  for (const auto &p : unlike) {
    unequal.push_back(mixed(turn++, 1, 4, 2, 70, 131, p[0]));
    unequal.back().dim_v = p[1], unequal.back().causal = 1;
    unequal.push_back(unequal.back()); // few rows, which warps share
    unequal.back().seq_q = 5;
  }
  check("unequal_head_dims", unequal);
}

/* As in test_fp8. */
static void test_spoiled_descales() {
  std::vector<Case> cases;
  for (int dim : kDims)
    for (int turn = 0; turn < 8; ++turn)
      for (int seq_q : {80, 200}) { // 13 rows see no key, or 133
        Case c = mixed(turn, 2, 4, 2, seq_q, 67, dim);
        c.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT, c.descale = 4;
        c.sink = turn / 2 % 2, c.softcap = turn % 4 == 3 ? 5.f : 0.f, c.lengths = turn < 4 ? 0 : SEQLENS_Q | SEQLENS_KV;
        cases.push_back(c);
      }
  check("spoiled_descales", cases);
}

/* One query or a few, heads of a group in the rows of a tile, keys whose number the device knows. */
static void test_decoding() {
  std::vector<Case> decoding;
  int turn = 0;
  for (int group : {1, 2, 4, 7, 8, 16})
    for (int seq_q : {1, 3, 8})
      for (int dim : kDims) {
        Case c = mixed(turn, 3, 2 * group, 2, seq_q, 1100 + turn, dim);
        ++turn;
        c.causal = 1, c.lengths = turn % 3 ? SEQLENS_KV : 0, c.descale = 2;
        decoding.push_back(c);
        c.softcap = 20.f, c.sink = 1;
        decoding.push_back(c);
      }
  check("decoding", decoding);
}

/* Few queries on a cache whose heads are shared: the rows of a group are packed. */
static void test_groups() {
  std::vector<Case> groups;
  for (int n = 0; n < 4; ++n)
    for (int dim : kDims)
      for (int seq_q : {1, 3, 16, 65})
        for (int group : {2, 3, 4, 8, 16, 128}) {
          if (seq_q * group > 600) continue;
          groups.push_back(mixed(n, 2, 2 * group, 2, seq_q, 531, dim));
          Case &c = groups.back();
          c.descale = 2, c.causal = seq_q % 2, c.sink = group == 4, c.softcap = group == 16 ? 9.f : 0.f, c.lengths = group == 8 ? SEQLENS_KV : 0;
        }
  check("groups", groups);
}

/* So many rows that the tiles are wide, on a chip of up to 148 SMs. */
static void test_many_rows() {
  std::vector<Case> rows;
  int turn = 0;
  for (int dim : kDims)
    for (int causal = 0; causal < 3; ++causal)
      for (int n = 0; n < 4; ++n) {
        Case c = mixed(turn++, 4, 16, 4, 611, causal ? 500 : 129, dim);
        c.causal = causal, c.descale = 2, c.sink = n % 2;
        if (n == 2) c.lengths = SEQLENS_KV;
        if (n == 3) c.window = 1, c.left = 70, c.right = 40;
        rows.push_back(c);
      }
  check("many_rows", rows);
  std::vector<Case> keys;
  for (int dim : kDims)
    for (int data : {(int)DATA_NORMAL, (int)DATA_STD16, (int)DATA_RAMP, (int)DATA_POSITIVE}) {
      keys.push_back(mixed(turn++, 1, 2, 1, 77, 8209, dim));
      keys.back().data = data;
    }
  check("many_keys", keys);
}

static const Option kOptions[] = {
    {"causal_bottom_right", [](Case &c) { c.causal = 1; }},
    {"causal_top_left", [](Case &c) { c.causal = 2; }},
    {"window_both_sides", [](Case &c) { c.window = 1, c.left = 20, c.right = 9; }},
    {"window_left", [](Case &c) { c.window = 1, c.left = 40; }},
    {"softcap", [](Case &c) { c.softcap = 5.f; }},
    {"alibi", [](Case &c) { c.alibi = 2; }},
    {"bias", [](Case &c) { c.bias = BIAS_DENSE; }},
    {"bias_minus_inf_hides", [](Case &c) { c.bias = BIAS_HIDING, c.bias_dtype = FLASHCORE_F32; }},
    {"mask_bits", [](Case &c) { c.mask = MASK_DENSE; }},
    {"sink", [](Case &c) { c.sink = 1; }},
    {"scale", [](Case &c) { c.scale = 0.37f; }},
    {"lse_base2", [](Case &c) { c.lse = 2; }},
    {"group", [](Case &c) { c.heads_q = 6; }},
    {"seqlens", [](Case &c) { c.lengths |= SEQLENS_Q | SEQLENS_KV; }},
    {"cu_seqlens", [](Case &c) { c.lengths |= CU_SEQLENS_Q | CU_SEQLENS_KV; }},
    {"descale", [](Case &c) { c.descale = 1; }},
    {"descale_per_head", [](Case &c) { c.descale = 2; }},
    {"other_output", [](Case &c) { c.dtype_o = c.dtype == FLASHCORE_F16 ? FLASHCORE_BF16 : FLASHCORE_F16; }},
    {"pages", [](Case &c) { c.page = 16; }},
    {"splits", [](Case &c) { c.splits = 3; }},
    {"output_f32", [](Case &c) { c.dtype_o = FLASHCORE_F32; }},
};

static void test_options() {
  std::vector<Case> pairs;
  int turn = 0;
  for (size_t i = 0; i < std::size(kOptions); ++i) {
    std::vector<Case> alone;
    for (int n = 0; n < 4; ++n)
      for (int dim : kDims) {
        Case c = mixed(n, 3, 2, 2, 139, 281, dim);
        kOptions[i].set(c);
        alone.push_back(c);
        c.seq_q = 1, c.seq_kv = 300;
        alone.push_back(c);
      }
    check(std::string("option_") + kOptions[i].name, alone);
    for (size_t j = i + 1; j < std::size(kOptions); ++j) {
      Case c = mixed(turn, 3, 2, 2, 100 + (int)i, 170 - (int)j, kDims[turn % 3]);
      kOptions[i].set(c);
      kOptions[j].set(c);
      c.seed += ++turn;
      pairs.push_back(c);
    }
  }
  check("options_in_pairs", pairs);
  std::vector<Case> lengths;
  for (int seed = 1; seed <= (quick ? 2 : 6); ++seed)
    for (int bits = 1; bits < 16; ++bits) {
      Case c = mixed(turn++, 5, 4, 2, seed % 3 ? 150 : 9, 190, kDims[seed % 3]);
      c.lengths = bits, c.causal = (seed + bits) % 3, c.seed = 1000 * seed + bits, c.descale = 2;
      lengths.push_back(c);
    }
  check("device_lengths_empty_full_and_out_of_range", lengths);
}

static void test_data() {
  std::vector<Case> hostile, layouts;
  for (int data = 0; data < DATA_COUNT; ++data)
    for (int n = 0; n < 4; ++n)
      for (int dim : kDims) {
        hostile.push_back(mixed(n, 1, 2, 1, 150, 777, dim));
        hostile.back().data = data, hostile.back().causal = n / 2;
      }
  check("hostile_data", hostile);
  for (int layout = 0; layout < LAYOUT_FAR; ++layout)
    for (int dim : kDims) {
      layouts.push_back(mixed(layout + dim / 64, 2, 4, 2, 70, 150, dim));
      layouts.back().layout = layout, layouts.back().causal = 1;
    }
  check("layouts", layouts);
}

/* AUTO takes the same backends: no other knows these types. */
static void test_automatic_choice() {
  const std::string name = "mixed.automatic_choice_serves_it";
  if (!wanted(name) || device_arch() < 89) return;
  std::string why;
  for (int n = 0; n < 4; ++n) {
    Problem p(mixed(n, 2, 8, 2, 1, 500, 128));
    const Outcome outcome = p.run(FLASHCORE_BACKEND_AUTO);
    if (outcome.what != Outcome::PASSED) why = outcome.why;
  }
  report().expect(name, why.empty(), why);
}

static void test_reruns() {
  for (int backend : kBackends)
    for (int dim : kDims) {
      const std::string name = name_of(backend) + format(".mixed.reruns_are_bit_equal.d%d", dim);
      const Case c = mixed(1, 2, 16, 4, 900, 1100, dim);
      if (!wanted(name) || !must_serve(c, backend)) continue;
      Problem p(c);
      check_reruns(name, p, backend, quick ? 10 : 100);
    }
}

int main(int argc, char **argv) {
  if (!read_options(argc, argv)) return 2;
  find_device();
  for (auto group :
       {test_shapes, test_decoding, test_groups, test_many_rows, test_options, test_spoiled_descales, test_data, test_automatic_choice, test_reruns})
    group();
  return report().finish();
}
