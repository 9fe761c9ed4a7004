/* What attention must be, property by property, on every backend that takes the case. Each line "ok mma.some_property  # 24 cases" stands for
 * that many problems compared with the fp64 oracle in poisoned memory (harness.cuh). A failure prints a test_sweep command that repeats it.
 *
 *   test_attention [--quick] [--only TEXT]      --only: tests whose name holds TEXT */
#include "broken.cuh"
#include "properties.cuh"

static const int kBackends[] = {FLASHCORE_BACKEND_SIMT, FLASHCORE_BACKEND_WMMA, FLASHCORE_BACKEND_MMA, FLASHCORE_BACKEND_WGMMA};
static const int kTypes16[] = {FLASHCORE_F16, FLASHCORE_BF16};
static const int kTypes[] = {FLASHCORE_F16, FLASHCORE_BF16, FLASHCORE_F32};

/* A backend, and a tile of its: what the dispatcher picks depends on size and GPU, and every tile must be right on every problem. */
struct Target {
  const char *name;
  int backend, tile;
};
static const Target kTargets[] = {
    {"simt", FLASHCORE_BACKEND_SIMT, TILE_AUTO},
    {"wmma", FLASHCORE_BACKEND_WMMA, TILE_AUTO},
    {"mma", FLASHCORE_BACKEND_MMA, TILE_AUTO},
    {"mma.wide", FLASHCORE_BACKEND_MMA, TILE_WIDE},
    {"mma.compact", FLASHCORE_BACKEND_MMA, TILE_COMPACT},
    {"mma.narrow", FLASHCORE_BACKEND_MMA, TILE_NARROW},
    {"wgmma", FLASHCORE_BACKEND_WGMMA, TILE_AUTO},
};

/* False: the problem does not have the target's tile, or an earlier target has it too. */
static bool aim(Problem &p, const Target &target) {
  p.c.tile = target.tile;
  return target.tile == TILE_AUTO || p.has_tile(target.tile);
}

/* Every case on every target that differs from those before it, sharing the tensors and the oracle. */
static void check(const std::string &name, const std::vector<Case> &cases) {
  if (!wanted(name)) return;
  Tally tallies[std::size(kTargets)];
  for (const Case &c : cases) {
    Problem problem(c);
    for (size_t k = 0; k < std::size(kTargets); ++k) {
      if (!aim(problem, kTargets[k])) continue;
      tallies[k].add(problem.run(kTargets[k].backend), problem.reproduce_on(kTargets[k].backend));
    }
  }
  for (size_t k = 0; k < std::size(kTargets); ++k) tallies[k].tell(std::string(kTargets[k].name) + "." + name);
}

/* ---- shapes -------------------------------------------------------------------------------------------------------------------- */

static void test_shapes() {
  std::vector<Case> edges, primes, single, longer_q, no_keys;
  const int around[] = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129};
  int turn = 0;
  for (int q : around) {
    for (int kv : around) {
      Case c = sized(kTypes16[turn / 3 % 2], 1, 2, 1, q, kv, turn % 2 ? 64 : 128);
      c.causal = turn++ % 3;
      edges.push_back(c);
    }
  }
  check("lengths_around_tile_edges", edges);

  const int pairs[][2] = {{7, 13}, {31, 97}, {101, 211}, {257, 263}, {509, 521}, {1021, 1031}};
  for (const auto &p : pairs) {
    for (int causal = 0; causal < 3; ++causal) {
      for (int dim : {64, 128, 256}) {
        Case c = sized(kTypes[(dim / 64 + causal) % 3], 2, 3, 3, p[0], p[1], dim);
        c.causal = causal;
        primes.push_back(c);
      }
    }
  }
  check("prime_lengths", primes);

  for (int dim : {8, 64, 128, 512}) {
    for (int dtype : kTypes) single.push_back(sized(dtype, 1, 1, 1, 1, 1, dim));
  }
  check("one_query_one_key", single);

  for (int dtype : kTypes) {
    for (int causal = 0; causal < 3; ++causal) {
      for (int sink = 0; sink < 2; ++sink) {
        Case c = sized(dtype, 2, 2, 1, 200, 67, 64);
        c.causal = causal, c.sink = sink;
        longer_q.push_back(c);
        c.seq_kv = 0;
        no_keys.push_back(c);
      }
    }
  }
  check("more_queries_than_keys", longer_q);
  check("no_keys_give_zero_and_lse_minus_inf_or_sink", no_keys);
}

/* Some kernels change their tile where keys are many. */
static void test_many_keys() {
  std::vector<Case> cases;
  for (int dtype : kTypes16) {
    for (int dim : {64, 128, 192, 256}) {
      Case c = sized(dtype, 1, 2, 1, 333, 8209, dim);
      cases.push_back(c);
      c.data = DATA_STD16, c.causal = 1;
      cases.push_back(c);
      c.data = DATA_RAMP, c.causal = 0;
      cases.push_back(c);
    }
  }
  check("many_keys", cases);
}

static void test_head_dims() {
  std::vector<Case> equal, unequal, odd;
  for (int dim : {8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 200, 256, 320, 384, 512}) {
    for (int dtype : kTypes) {
      for (int causal = 0; causal < 2; ++causal) {
        Case c = sized(dtype, 1, 2, 2, 77, 149, dim);
        c.causal = causal, c.layout = dim % 16 ? LAYOUT_PADDED : LAYOUT_BSHD;
        equal.push_back(c);
      }
    }
  }
  check("every_head_dim", equal);
  const int pairs[][2] = {{192, 128}, {64, 128}, {128, 64}, {32, 64}, {40, 72}, {96, 256}, {512, 8}};
  for (const auto &p : pairs) {
    for (int dtype : kTypes16) {
      Case c = sized(dtype, 1, 4, 2, 70, 131, p[0]);
      c.dim_v = p[1], c.causal = 1;
      unequal.push_back(c);
    }
  }
  check("unequal_head_dims", unequal);
  for (int dim : {1, 3, 33, 77, 511}) {
    for (int dtype : kTypes) {
      Case c = sized(dtype, 1, 2, 1, 37, 75, dim);
      odd.push_back(c);
      c.dim_v = 129;
      odd.push_back(c);
    }
  }
  check("odd_head_dims", odd);
}

static void test_groups() {
  std::vector<Case> cases;
  for (int group : {1, 2, 3, 5, 7, 8, 16}) {
    for (int seq_q : {1, 3, 17, 130}) {
      for (int dtype : kTypes16) {
        Case c = sized(dtype, 2, 2 * group, 2, seq_q, 150, group % 2 ? 64 : 128);
        c.causal = seq_q % 3, c.lengths = seq_q == 17 ? SEQLENS_Q | SEQLENS_KV : 0;
        cases.push_back(c);
      }
    }
  }
  check("any_group_size", cases);
  cases.clear();
  for (int group : {32, 64, 128}) { /* more heads than a warp has rows, or a tile */
    for (int seq_q : {1, 2, 5}) {
      Case c = sized(kTypes16[seq_q % 2], 2, group, 1, seq_q, 300, group == 64 ? 128 : 64);
      c.causal = seq_q % 3, c.sink = 1, c.lengths = seq_q == 5 ? CU_SEQLENS_Q | CU_SEQLENS_KV : 0;
      cases.push_back(c);
      c.window = 1, c.left = 70, c.alibi = 1;
      cases.push_back(c);
    }
  }
  check("many_heads_in_a_group", cases);
}

static void test_many_heads() {
  check("more_than_65535_heads", {sized(FLASHCORE_F16, 1001, 70, 35, 3, 5, 32)});
  std::vector<Case> many; // more tiles than blocks at once; causal, heads come in sets of 32 or 64: whole sets, and a rest
  for (int heads : {31, 32, 33, 65}) {
    for (int dim : {64, 128, 256}) {
      Case c = sized(kTypes16[heads % 2], 2, heads, 1, 700, 700, dim);
      many.push_back(c);
      c.causal = 1;
      many.push_back(c);
    }
  }
  check("many_heads", many);
  std::vector<Case> ragged; // the same with lengths that only the device knows
  for (int lengths : {(int)(SEQLENS_Q | SEQLENS_KV), (int)(CU_SEQLENS_Q | CU_SEQLENS_KV)}) {
    for (int dim : {64, 128, 256}) {
      Case c = sized(FLASHCORE_F16, 40, 4, 4, 600, 300, dim);
      c.lengths = lengths, c.causal = dim / 64 % 3;
      ragged.push_back(c);
    }
  }
  check("many_heads_of_any_length", ragged);
}

/* ---- options ------------------------------------------------------------------------------------------------------------------- */

static std::vector<Option> options() {
  auto window = [](int left, int right) { return [=](Case &c) { c.window = 1, c.left = left, c.right = right; }; };
  return {
      {"causal_bottom_right", [](Case &c) { c.causal = 1; }},
      {"causal_top_left", [](Case &c) { c.causal = 2; }},
      {"window_both_sides", window(20, 9)},
      {"window_left", window(40, -1)},
      {"window_right", window(-1, 13)},
      {"window_zero", window(0, 0)},
      {"softcap", [](Case &c) { c.softcap = 5.f; }},
      {"alibi", [](Case &c) { c.alibi = 1; }},
      {"alibi_per_batch", [](Case &c) { c.alibi = 2; }},
      {"bias_dense", [](Case &c) { c.bias = BIAS_DENSE; }},
      {"bias_shared_f32", [](Case &c) { c.bias = BIAS_SHARED, c.bias_dtype = FLASHCORE_F32; }},
      {"bias_per_key", [](Case &c) { c.bias = BIAS_PER_KEY; }},
      {"bias_minus_inf_hides", [](Case &c) { c.bias = BIAS_HIDING; }},
      {"bias_transposed", [](Case &c) { c.bias = BIAS_TRANSPOSED; }},
      {"mask_bits", [](Case &c) { c.mask = MASK_DENSE; }},
      {"mask_bits_shared", [](Case &c) { c.mask = MASK_SHARED; }},
      {"sink", [](Case &c) { c.sink = 1; }},
      {"scale", [](Case &c) { c.scale = 0.37f; }},
      {"lse_base2", [](Case &c) { c.lse = 2; }},
      {"no_lse", [](Case &c) { c.lse = 0; }},
      {"group", [](Case &c) { c.heads_q = 6; }},
      {"seqlens", [](Case &c) { c.lengths |= SEQLENS_Q | SEQLENS_KV; }},
      {"seqlens_kv", [](Case &c) { c.lengths |= SEQLENS_KV; }},
      {"cu_seqlens", [](Case &c) { c.lengths |= CU_SEQLENS_Q | CU_SEQLENS_KV; }},
      {"cu_seqlens_q", [](Case &c) { c.lengths |= CU_SEQLENS_Q; }},
      {"pages", [](Case &c) { c.page = 16; }},
      {"splits", [](Case &c) { c.splits = 3; }},
      {"split_len", [](Case &c) { c.split_len = 64; }},
      {"output_f32", [](Case &c) { c.dtype_o = FLASHCORE_F32; }},
  };
}

static bool conflict(const Case &c) { return c.splits > 1 && c.split_len > 0; }

static void test_options() {
  const std::vector<Option> all = options();
  std::vector<Case> pairs;
  for (size_t i = 0; i < all.size(); ++i) {
    std::vector<Case> alone;
    for (int dtype : kTypes) {
      for (int dim : {64, 128}) {
        Case c = sized(dtype, 3, 2, 2, 139, 181, dim);
        all[i].set(c);
        alone.push_back(c);
        c.seq_q = 1, c.seq_kv = 300;
        alone.push_back(c);
      }
    }
    check(std::string("option_") + all[i].name, alone);
    for (size_t j = i + 1; j < all.size(); ++j) {
      Case c = sized(kTypes16[(i + j) % 2], 3, 2, 2, 100 + (int)i, 170 - (int)j, j % 3 ? 64 : 128);
      all[i].set(c);
      all[j].set(c);
      c.seed += (int)(100 * i + j);
      if (!conflict(c)) pairs.push_back(c);
    }
  }
  check("options_in_pairs", pairs);
}

static void test_lengths() {
  std::vector<Case> cases;
  for (int seed = 1; seed <= 12; ++seed) {
    for (int lengths = 1; lengths < 16; ++lengths) {
      Case c = sized(kTypes16[seed % 2], 5, 4, 2, seed % 3 ? 150 : 9, 190, seed % 2 ? 64 : 128);
      c.lengths = lengths, c.causal = (seed + lengths) % 3, c.seed = 1000 * seed + lengths;
      cases.push_back(c);
    }
  }
  check("device_lengths_empty_full_and_out_of_range", cases);
}

static void test_pages() {
  std::vector<Case> cases;
  for (int page : {1, 3, 16, 17, 64, 256}) {
    for (int seed = 1; seed <= 6; ++seed) { // seed % 6: missing pages, shared prefixes, both, neither
      Case c = sized(kTypes16[seed % 2], 4, 4, 2, seed % 2 ? 1 : 50, 230, 64);
      c.page = page, c.seed = seed, c.lengths = SEQLENS_KV | (seed % 3 ? 0 : CU_SEQLENS_Q), c.causal = seed % 2;
      cases.push_back(c);
    }
  }
  check("pages_of_any_size_missing_and_shared", cases);
  std::vector<Case> backwards;
  for (int page : {1, 2, 16, 100}) {
    for (int dim : {1, 64}) { // with one head of one dim, key 1 of page 0 lies at offset -1
      for (int seed = 1; seed <= 3; ++seed) {
        Case c = sized(kTypes[seed % 3], 3, 1, 1, 5, 230, dim);
        c.page = page, c.seed = seed, c.layout = LAYOUT_NEGATIVE, c.lengths = SEQLENS_KV;
        backwards.push_back(c);
      }
    }
  }
  check("pages_whose_keys_lie_last_first", backwards);
}

static void test_splits() {
  std::vector<Case> cases;
  for (int splits : {1, 2, 3, 7, 40}) {
    for (int sink = 0; sink < 2; ++sink) {
      Case c = sized(FLASHCORE_F16, 2, 4, 2, 5, 333, 64);
      c.splits = splits, c.sink = sink, c.lengths = SEQLENS_KV | SEQLENS_Q, c.causal = 1, c.lse = 1 + sink;
      cases.push_back(c);
    }
  }
  for (int length : {64, 128, 1024}) {
    Case c = sized(FLASHCORE_BF16, 3, 2, 2, 19, 500, 128);
    c.split_len = length, c.lengths = CU_SEQLENS_Q | CU_SEQLENS_KV, c.sink = 1;
    cases.push_back(c);
  }
  check("splits_equal_the_whole", cases);
}

/* ---- data and layout ----------------------------------------------------------------------------------------------------------- */

static void test_hostile_data() {
  static const char *names[DATA_COUNT] = {
      "normal",    "logits_of_std_16",    "ramp_of_10_nats_every_64_keys", "dominant_last_key",   "dominant_first_key", "logits_of_250000",
      "all_equal", "nan_row_stays_alone", "equal_logits_of_4e8",           "equal_logits_of_3e9", "equal_background",   "values_of_one_sign"};
  for (int data = 0; data < DATA_COUNT; ++data) {
    std::vector<Case> cases;
    for (int dtype : kTypes) {
      for (int dim : {32, 64, 128, 256}) {
        for (int causal = 0; causal < 2; ++causal) {
          Case c = sized(dtype, 2, 4, 2, 190, 517, dim);
          c.data = data, c.causal = causal && data != DATA_BACKGROUND, c.sink = dim == 64, c.lengths = dim == 128 ? SEQLENS_KV : 0;
          cases.push_back(c);
          c.seq_q = 2, c.seq_kv = 1300;
          if (dim == 64 || dim == 128) cases.push_back(c);
          c.alibi = dim == 64 && !equal_logits(data), c.window = dim == 128, c.left = 100;
          if (dim == 64 || dim == 128) cases.push_back(c);
        }
      }
    }
    check(std::string("data_") + names[data], cases);
  }
  std::vector<Case> cases; /* long enough for the background to weigh as much as the key before it */
  for (int dtype : kTypes16) {
    for (int dim : {64, 128, 256}) {
      Case c = sized(dtype, 1, 2, 1, 40, 20000, dim);
      c.data = DATA_BACKGROUND;
      cases.push_back(c);
    }
  }
  check("many_equal_keys_weigh_beside_dominant_ones", cases);
}

static void test_layouts() {
  static const char *names[] = {"bshd", "bhsd", "packed_qkv", "odd_slice", "one_kv_head_by_stride_0", "shared_kv_by_stride_0", "negative_stride",
                                "gaps"};
  for (int layout = 0; layout < LAYOUT_FAR; ++layout) {
    std::vector<Case> cases;
    for (int dtype : kTypes) {
      for (int dim : {40, 64, 128}) {
        for (int lengths : {0, (int)SEQLENS_KV, CU_SEQLENS_Q | CU_SEQLENS_KV}) {
          Case c = sized(dtype, 2, 4, 2, 130, 130, dim);
          c.layout = layout, c.lengths = lengths, c.causal = dim == 64;
          cases.push_back(c);
        }
      }
    }
    check(std::string("layout_") + names[layout], cases);
  }
}

static void test_far_tensor() {
  const std::string name = "tensors_over_2^31_elements";
  if (!wanted(name)) return;
  size_t free_bytes = 0, total = 0;
  CUDA_OK(cudaMemGetInfo(&free_bytes, &total));
  const size_t needed = 4 * (2ull << 31) + (1ull << 30); // Q, K, V, O in 16 bits
  if (quick || free_bytes < needed) {
    printf("skip %s: %s\n", name.c_str(), quick ? "--quick" : format("needs %zu MiB, %zu are free", needed >> 20, free_bytes >> 20).c_str());
    return;
  }
  Case c = sized(FLASHCORE_F16, 1, 2, 2, 150, 200, 64);
  c.layout = LAYOUT_FAR, c.causal = 1;
  check(name, {c});
}

/* ---- determinism, graphs, streams ---------------------------------------------------------------------------------------------- */

static __global__ void count_differing(const uint32_t *x, const uint32_t *y, int64_t count, unsigned long long *differing) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    if (x[i] != y[i]) atomicAdd(differing, 1ull);
  }
}

static void compare_bits(const Memory &x, const char *first, unsigned long long *differing) {
  count_differing<<<grid_for(x.words()), 256>>>((const uint32_t *)x.base, (const uint32_t *)first, x.words(), differing);
}

/* "": the same bits every time. */
static std::string rerun(Problem &p, int backend, int times) {
  const Outcome outcome = p.launch(backend);
  if (outcome.what == Outcome::REFUSED && !must_serve(p.c, backend)) return "refused";
  if (outcome.what != Outcome::PASSED) return outcome.why;
  p.wait();
  Memory first_o(p.output().bytes), first_lse(p.lse_output()->bytes);
  CUDA_OK(cudaMemcpy(first_o.data(), p.output().base, p.output().bytes, cudaMemcpyDeviceToDevice));
  CUDA_OK(cudaMemcpy(first_lse.data(), p.lse_output()->base, p.lse_output()->bytes, cudaMemcpyDeviceToDevice));
  Scalar<unsigned long long> differing;
  for (int n = 0; n < times; ++n) {
    if (p.forward(nullptr, nullptr) != FLASHCORE_OK) return "a rerun was refused";
    compare_bits(p.output(), first_o.data<char>(), differing.device);
    compare_bits(*p.lse_output(), first_lse.data<char>(), differing.device);
  }
  const unsigned long long words = differing.read();
  const std::string wrong = p.judge(); // in any case: it leaves the outputs poisoned for the next target
  return words ? format("%llu words differed in %d reruns", words, times) : wrong;
}

static std::vector<Case> race_prone() {
  std::vector<Case> cases = {
      sized(FLASHCORE_F16, 2, 8, 8, 1024, 1024, 64), sized(FLASHCORE_F16, 2, 8, 2, 777, 1311, 128),   sized(FLASHCORE_BF16, 1, 4, 4, 513, 2000, 256),
      sized(FLASHCORE_F16, 4, 16, 2, 1, 4096, 128),  sized(FLASHCORE_BF16, 3, 8, 8, 129, 65, 32),     sized(FLASHCORE_F16, 3, 6, 2, 300, 900, 80),
      sized(FLASHCORE_BF16, 1, 4, 4, 257, 513, 512), sized(FLASHCORE_BF16, 2, 65, 65, 700, 700, 128),
  };
  for (size_t i = 0; i < cases.size(); ++i) cases[i].causal = i % 2, cases[i].lengths = i == 5 ? CU_SEQLENS_Q | CU_SEQLENS_KV : 0;
  Case split = sized(FLASHCORE_F16, 2, 4, 2, 3, 3000, 64);
  split.splits = 8;
  cases.push_back(split);
  return cases;
}

static void test_reruns() {
  if (!wanted("reruns_are_bit_equal")) return;
  Tally tallies[std::size(kTargets)];
  for (const Case &c : race_prone()) {
    Problem p(c);
    for (size_t k = 0; k < std::size(kTargets); ++k) {
      if (!aim(p, kTargets[k])) continue;
      const std::string why = rerun(p, kTargets[k].backend, quick ? 20 : 1000);
      const Outcome outcome = {why.empty() ? Outcome::PASSED : why == "refused" ? Outcome::REFUSED : Outcome::FAILED, FLASHCORE_OK, why};
      tallies[k].add(outcome, p.reproduce_on(kTargets[k].backend));
    }
  }
  for (size_t k = 0; k < std::size(kTargets); ++k) tallies[k].tell(std::string(kTargets[k].name) + ".reruns_are_bit_equal");
}

/* Entry 0 of a batch of three, then the same entry alone: with a fixed split length its bits may not depend on its neighbours. */
static void test_batch_independence() {
  if (!wanted("split_len_makes_rows_independent_of_the_batch")) return;
  Case c = sized(FLASHCORE_F16, 3, 4, 2, 33, 700, 64);
  c.split_len = 128;
  for (int backend : kBackends) {
    Problem p(c);
    const std::string name = name_of(backend) + ".split_len_makes_rows_independent_of_the_batch";
    const Outcome outcome = p.launch(backend);
    if (outcome.what == Outcome::REFUSED && backend != FLASHCORE_BACKEND_SIMT) continue;
    p.wait();
    const size_t bytes = (size_t)(c.seq_q * c.heads_q * c.dim_v) * 2;
    std::vector<uint16_t> together(bytes / 2), alone(bytes / 2);
    CUDA_OK(cudaMemcpy(together.data(), p.a.o.data, bytes, cudaMemcpyDeviceToHost));
    p.a.batch = 1;
    const flashcore_status status = flashcore_forward(&p.a, nullptr, nullptr);
    p.wait();
    CUDA_OK(cudaMemcpy(alone.data(), p.a.o.data, bytes, cudaMemcpyDeviceToHost));
    report().expect(name, outcome.what == Outcome::PASSED && status == FLASHCORE_OK && together == alone,
                    "the bits differ; " + p.reproduce_on(backend));
  }
}

/* One call in a graph. why: what went wrong while it was captured; else launch may be called, any number of times. */
struct Captured {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  std::string why;

  explicit Captured(const Problem &p) {
    flashcore_error error = {};
    CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    const flashcore_status status = p.forward(stream, &error);
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (status != FLASHCORE_OK) why = format("capture gave status %d: %s", status, error.message);
    else if (ended != cudaSuccess) why = format("the call broke the capture: %s", cudaGetErrorString(ended));
    if (why.empty()) CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
    else cudaGetLastError(); // the next test shall not find it
  }
  ~Captured() {
    if (executable) cudaGraphExecDestroy(executable);
    if (graph) cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
  Captured(const Captured &) = delete;
  void launch() { CUDA_OK(cudaGraphLaunch(executable, stream)); }
};

static std::string replay_with_new_lengths(Problem &p, int backend) {
  const Outcome first = p.launch(backend); // also provides the workspace and loads the kernel
  if (first.what == Outcome::REFUSED && !must_serve(p.c, backend)) return "refused";
  if (first.what != Outcome::PASSED) return first.why;
  std::string why = p.judge();
  if (!why.empty()) return "before capture: " + why;
  Captured captured(p);
  if (!captured.why.empty()) return captured.why;
  for (int replay = 0; replay < 4 && why.empty(); ++replay) {
    p.fill();
    captured.launch();
    why = p.judge();
    if (!why.empty()) why = format("replay %d: ", replay) + why;
  }
  return why;
}

/* Runs before all other tests, so that no kernel of the library was loaded, nor its limit of 48 KiB of shared memory lifted. */
static void test_first_call_in_a_graph() {
  const std::string name = "mma.first_call_of_a_kernel_with_over_48_KiB_may_be_captured";
  if (!wanted(name) || device_arch() < 80) return;
  std::string why;
  for (int general = 0; general < 2; ++general) {
    Case c = sized(general ? FLASHCORE_F16 : FLASHCORE_BF16, 1, 2, 2, 150, 333, general ? 512 : 256);
    c.softcap = general ? 9.f : 0.f;
    Problem p(c);
    p.a.backend = FLASHCORE_BACKEND_MMA;
    Captured captured(p);
    if (captured.why.empty()) captured.launch();
    const std::string wrong = captured.why.empty() ? p.judge() : captured.why;
    if (!wrong.empty()) why = wrong + "; " + p.reproduce_on(p.a.backend);
    flashcore_description d = {};
    if (flashcore_describe(&p.a, -1, &d, nullptr) != FLASHCORE_OK || d.shared_bytes <= 48 * 1024) why += "; the kernel is not one with over 48 KiB";
  }
  report().expect(name, why.empty(), why);
}

static void test_graphs() {
  if (!wanted("graph_replays_follow_device_lengths")) return;
  for (int backend : kBackends) {
    Tally tally;
    for (int lengths : {SEQLENS_KV | SEQLENS_Q, CU_SEQLENS_Q | CU_SEQLENS_KV}) {
      for (int splits : {0, 4}) {
        for (int page : {0, 16}) {
          Case c = sized(FLASHCORE_F16, 4, 4, 2, 70, 300, 64);
          c.lengths = lengths, c.splits = splits, c.page = page, c.causal = 1;
          Problem p(c);
          const std::string why = replay_with_new_lengths(p, backend);
          tally.add({why.empty()        ? Outcome::PASSED
                     : why == "refused" ? Outcome::REFUSED
                                        : Outcome::FAILED,
                     FLASHCORE_OK, why},
                    p.reproduce_on(backend));
        }
      }
    }
    tally.tell(name_of(backend) + ".graph_replays_follow_device_lengths");
  }
}

static void test_two_streams() {
  if (!wanted("two_streams_do_not_disturb_each_other")) return;
  for (int backend : kBackends) {
    const std::string name = name_of(backend) + ".two_streams_do_not_disturb_each_other";
    Case c = sized(FLASHCORE_F16, 2, 4, 4, 500, 700, 64);
    c.splits = backend == FLASHCORE_BACKEND_SIMT ? 3 : 0; // with a workspace where the backend has splits
    Problem one(c);
    c.seed += 1, c.seq_kv = 650, c.causal = 1;
    Problem two(c);
    cudaStream_t streams[2];
    for (cudaStream_t &s : streams) CUDA_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    std::string why;
    bool refused = false;
    for (int n = 0; n < 10; ++n) {
      for (Problem *p : {&one, &two}) {
        const Outcome outcome = p->launch(backend, streams[p == &two]);
        refused |= outcome.what == Outcome::REFUSED;
        if (outcome.what != Outcome::PASSED) why = outcome.why;
      }
    }
    if (why.empty()) why = one.judge();
    if (why.empty()) why = two.judge();
    for (cudaStream_t s : streams) CUDA_OK(cudaStreamDestroy(s));
    if (refused && !must_serve(c, backend)) printf("skip %s: %s\n", name.c_str(), why.c_str());
    else report().expect(name, why.empty(), why);
  }
}

/* ---- refusals, describe, merge ------------------------------------------------------------------------------------------------- */

static void test_refusals() {
  int index = 0;
  for (const Breakage &b : breakages()) {
    ++index;
    const std::string name = std::string("refused_and_nothing_touched.") + b.name;
    if (!wanted(name)) continue;
    std::string why;
    for (int backend : {FLASHCORE_BACKEND_AUTO, FLASHCORE_BACKEND_SIMT, FLASHCORE_BACKEND_WMMA, FLASHCORE_BACKEND_MMA}) {
      Case c = sized(FLASHCORE_F16, 2, 4, 2, 33, 40, 64);
      c.broken = index;
      Problem p(c);
      b.apply(p.a);
      const Outcome outcome = p.run(backend);
      if (outcome.what == Outcome::PASSED) why = "served by " + name_of(backend);
      if (outcome.what == Outcome::FAILED) why = name_of(backend) + ": " + outcome.why;
      if (outcome.what == Outcome::REFUSED && !wrong_refusal(index, outcome.status).empty())
        why = name_of(backend) + ": " + wrong_refusal(index, outcome.status);
    }
    report().expect(name, why.empty(), why);
  }
}

static void test_error_state() {
  Problem p(sized(FLASHCORE_F16, 1, 2, 2, 20, 20, 64));
  const cudaError_t made = cudaSetDevice(99999); // leaves an error for the next cudaGetLastError
  p.a.dim_v = 0;
  const bool refused = flashcore_forward(&p.a, nullptr, nullptr) == FLASHCORE_INVALID_SIZE;
  const bool kept = cudaPeekAtLastError() == made && made != cudaSuccess;
  const bool bad_device = flashcore_supported(&p.a, 99999, nullptr) != FLASHCORE_OK && cudaPeekAtLastError() == made;
  cudaGetLastError();
  report().expect("a_refused_call_keeps_the_callers_cuda_error", refused && kept && bad_device, format("refused %d, kept %d", refused, kept));
  p.a.dim_v = 64;
  flashcore_error error = {};
  const flashcore_status status = flashcore_supported(&p.a, 99999, &error);
  report().expect("an_unknown_device_is_refused_cleanly",
                  status == FLASHCORE_INVALID_DEVICE && cudaPeekAtLastError() == cudaSuccess && error.message[0], format("status %d", status));
}

static void test_workspace() {
  Case c = sized(FLASHCORE_F16, 1, 2, 2, 20, 200, 64);
  c.splits = 2;
  Problem p(c);
  p.a.backend = FLASHCORE_BACKEND_SIMT;
  size_t bytes = 0;
  std::string why;
  if (flashcore_workspace_size(&p.a, -1, &bytes, nullptr) != FLASHCORE_OK || bytes == 0) why = "splits want no workspace";
  Memory memory(bytes + 256);
  const struct {
    char *data;
    size_t bytes;
  } bad[] = {{nullptr, bytes}, {memory.data<char>(), bytes - 1}, {memory.data<char>() + 16, bytes}};
  for (const auto &b : bad) {
    p.a.workspace = b.data, p.a.workspace_bytes = b.bytes;
    if (flashcore_supported(&p.a, -1, nullptr) != FLASHCORE_INVALID_WORKSPACE) why = "supported accepts a bad workspace";
    if (flashcore_forward(&p.a, nullptr, nullptr) != FLASHCORE_INVALID_WORKSPACE) why = "forward accepts a bad workspace";
  }
  p.wait();
  report().expect("missing_short_or_misaligned_workspace_is_refused", why.empty() && p.output().inspect().differing == 0, why);
}

static void test_describe() {
  for (int backend : kBackends) {
    Problem p(sized(FLASHCORE_F16, 2, 4, 2, 200, 300, 64));
    p.a.backend = backend;
    flashcore_description d = {};
    flashcore_error error = {};
    const flashcore_status status = flashcore_describe(&p.a, -1, &d, &error);
    if (!must_serve(p.c, backend)) continue;
    const bool good = status == FLASHCORE_OK && d.backend == backend && d.kernel[0] && d.block_q > 0 && d.block_kv > 0 && d.threads >= 32 &&
                      d.registers > 0 && d.blocks_per_sm > 0 && d.grid > 0 && d.head_dim_qk >= 64 && d.head_dim_v >= 64;
    report().expect(name_of(backend) + ".describe_names_a_kernel_that_fits", good, format("status %d: %s %s", status, d.kernel, error.message));
  }
}

/* A tensor-core kernel wherever one serves the problem, wgmma's where there is much to do, the plain one elsewhere. */
static void test_auto() {
  if (device_arch() < 80) return;
  const int dims[][2] = {{8, 8},     {32, 32},  {40, 40},   {64, 64},   {80, 80},   {96, 96}, {128, 128},
                         {192, 128}, {64, 128}, {200, 200}, {256, 256}, {512, 512}, {33, 33}, {64, 63}};
  std::string why;
  const auto expect = [&](const Case &c, int backend) {
    Problem p(c);
    flashcore_description d = {};
    const flashcore_status status = flashcore_describe(&p.a, -1, &d, nullptr);
    if (status != FLASHCORE_OK || d.backend != backend) why += format("\n     status %d, backend %d for ", status, d.backend) + to_string(c);
  };
  for (int dtype : kTypes) {
    for (const auto &dim : dims) {
      Case c = sized(dtype, 1, 2, 1, 20, 30, dim[0]);
      c.dim_v = dim[1];
      for (int layout : {(int)LAYOUT_BSHD, (int)LAYOUT_SLICE}) {
        c.layout = layout, c.causal = layout == LAYOUT_SLICE;
        expect(c, dtype == FLASHCORE_F32 ? FLASHCORE_BACKEND_SIMT : FLASHCORE_BACKEND_MMA);
      }
    }
  }
  Case paged = sized(FLASHCORE_F16, 1, 2, 1, 20, 30, 64);
  paged.page = 16;
  expect(paged, FLASHCORE_BACKEND_SIMT);
  for (int dim : {64, 128, 256}) {
    Case large = sized(FLASHCORE_BF16, 2, 40, 8, 600, 600, dim);
    expect(large, device_arch() == 90 ? FLASHCORE_BACKEND_WGMMA : FLASHCORE_BACKEND_MMA);
    large.softcap = 5.f;
    expect(large, device_arch() == 90 ? FLASHCORE_BACKEND_WGMMA : FLASHCORE_BACKEND_MMA);
  }
  report().expect("auto_takes_the_fastest_backend_that_serves", why.empty(), why);
}

/* Without this, a change of the dispatcher's rules could leave tiles untested unnoticed. General kernels (a rule, odd addresses) have one tile. */
static void test_tiles_are_reached() {
  if (device_arch() < 80) return;
  std::string why;
  for (int dtype : kTypes16) {
    for (int dim : {32, 64, 80, 96, 128, 192, 256, 512}) {
      for (int causal = 0; causal < 3; ++causal) {
        Case c = sized(dtype, 1, 2, 1, 100, 100, dim);
        c.causal = causal;
        const Problem p(c);
        const std::string wide = p.kernel_of(TILE_WIDE), compact = p.kernel_of(TILE_COMPACT), narrow = p.kernel_of(TILE_NARROW);
        if (wide.empty() || (dim <= 128 && narrow == wide)) why += "\n     no wide and narrow tile: " + to_string(c);
        if ((dim == 64 || dim == 128 || dim == 256) && compact == wide) why += "\n     no compact tile: " + to_string(c);
      }
    }
  }
  report().expect("tests_reach_every_tile_of_the_mma_kernel", why.empty(), why);
}

/* Three disjoint sets of keys, one of them empty with NaN for its O, merged: equals attention over all keys, sink included. */
static std::string merged_equals_whole(int dtype, int lse_base2) {
  Case c = sized(dtype, 2, 4, 2, 45, 200, 64);
  c.sink = 1, c.lse = 1 + lse_base2;
  Problem p(c);
  const int bounds[] = {0, 77, 77, 200};
  const int64_t rows = (int64_t)c.batch * c.heads_q * c.seq_q;
  Memory o_parts((size_t)(3 * rows * c.dim_v) * 4), lse_parts((size_t)(3 * rows) * 4);
  for (int part = 0; part < 3; ++part) {
    flashcore_attention a = p.a;
    a.backend = FLASHCORE_BACKEND_SIMT, a.dtype_o = FLASHCORE_F32, a.sink = nullptr, a.lse_base2 = 0;
    a.seq_kv = bounds[part + 1] - bounds[part];
    a.k.data = (char *)a.k.data + bounds[part] * a.k.stride_s * bytes_of(dtype);
    a.v.data = (char *)a.v.data + bounds[part] * a.v.stride_s * bytes_of(dtype);
    a.o = flashcore_bhsd(o_parts.data<float>() + part * rows * c.dim_v, c.seq_q, c.heads_q, c.dim_v);
    a.lse = lse_parts.data<float>() + part * rows;
    if (flashcore_forward(&a, nullptr, nullptr) != FLASHCORE_OK) return "a part was refused";
  }
  const int64_t part_words = rows * c.dim_v;
  fill_words<<<grid_for(part_words), 256>>>(o_parts.data<uint32_t>() + part_words, part_words, kPoison);
  flashcore_merge_args m = {};
  m.struct_size = sizeof m;
  m.o_parts = o_parts.data<float>(), m.lse_parts = lse_parts.data<float>();
  m.parts = 3, m.batch = c.batch, m.heads = c.heads_q, m.seq = c.seq_q, m.dim = c.dim_v;
  m.o = p.a.o, m.dtype_o = dtype, m.lse = p.a.lse, m.lse_base2 = lse_base2, m.sink = p.a.sink;
  flashcore_error error = {};
  if (flashcore_merge(&m, nullptr, &error) != FLASHCORE_OK) return error.message;
  return p.judge();
}

static void test_merge() {
  for (int dtype : kTypes) {
    const std::string why = merged_equals_whole(dtype, dtype == FLASHCORE_BF16);
    report().expect(format("merge_of_parts_equals_the_whole.dtype_%d", dtype), why.empty(), why);
  }
  flashcore_merge_args m = {};
  flashcore_error error = {};
  const flashcore_status status = flashcore_merge(&m, nullptr, &error);
  report().expect("merge_refuses_an_empty_descriptor", status != FLASHCORE_OK && error.message[0], format("status %d", status));
}

int main(int argc, char **argv) {
  if (!read_options(argc, argv)) return 2;
  find_device();
  const struct {
    const char *name;
    void (*test)();
  } single[] = {{"error_state", test_error_state}, {"workspace", test_workspace}, {"describe", test_describe}, {"auto", test_auto},
                {"tiles", test_tiles_are_reached}, {"merge", test_merge}};
  test_first_call_in_a_graph();
  for (const auto &s : single) {
    if (wanted(s.name)) s.test();
  }
  void (*const groups[])() = {test_refusals,     test_shapes,     test_head_dims,  test_groups, test_many_heads,
                              test_many_keys,    test_options,    test_lengths,    test_pages,  test_splits,
                              test_hostile_data, test_layouts,    test_far_tensor, test_reruns, test_batch_independence,
                              test_graphs,       test_two_streams};
  for (auto group : groups) group();
  return report().finish();
}
