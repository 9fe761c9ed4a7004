/* fp8: attention on its tensor cores against the fp64 oracle on the values as stored, in poisoned memory (harness.cuh), and the quantiser kernels
 * against their reference, bit for bit. FLASHCORE_FP8_FAST: the fast mode (test_fp8_fast.cu).
 *
 *   test_fp8 [--quick] [--only TEXT]      --only: tests whose name holds TEXT */
#define FLASHCORE_STATIC /* a library of its own, with the reference of the quantisers */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore_fp8.cuh"

#include "properties.cuh"

static const int kBackends[] = {FLASHCORE_BACKEND_QGMMA, FLASHCORE_BACKEND_QMMA};
static const int kTypes[] = {FLASHCORE_E4M3, FLASHCORE_E5M2};
static const int kDims[] = {64, 128, 256};

/* Is it compiled in, and for this GPU? */
static bool present(int backend) {
  Case c;
  c.dtype = FLASHCORE_E4M3, c.backend = backend;
  return must_serve(c, backend);
}

static void check(const std::string &name, const std::vector<Case> &cases) {
  for (int backend : kBackends)
    if (present(backend)) check_with_and_without_lse(name_of(backend) + "." + name, backend, cases);
}

/* ---- attention ----------------------------------------------------------------------------------------------------------------- */

static void test_shapes() {
  std::vector<Case> plain, edges, primes, dims, unequal;
  for (int dtype : kTypes)
    for (int dim : kDims)
      for (int seq : {64, 128, 512}) plain.push_back(sized(dtype, 1, 2, 2, seq, seq, dim));
  check("plain", plain);
  int turn = 0;
  for (int q : {1, 63, 64, 65, 127, 128, 129, 191, 192, 193})
    for (int kv : {0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257}) {
      Case c = sized(kTypes[turn / 2 % 2], 1, 2, 1, q, kv, kDims[turn / 3 % 3]);
      c.causal = turn++ % 3;
      edges.push_back(c);
    }
  check("lengths_around_tile_edges", edges);
  const int pairs[][2] = {{7, 13}, {31, 97}, {101, 211}, {257, 263}, {509, 521}, {1021, 1031}, {200, 67}};
  for (const auto &p : pairs)
    for (int causal = 0; causal < 3; ++causal)
      for (int dim : kDims) {
        Case c = sized(kTypes[(dim / 64 + causal) % 2], 2, 3, 3, p[0], p[1], dim);
        c.causal = causal, c.dtype_o = causal ? FLASHCORE_F16 : 0, c.sink = causal % 2;
        primes.push_back(c);
      }
  check("prime_lengths", primes);
  for (int dim : {16, 32, 48, 80, 96, 112, 144, 160, 192, 208, 240, 272})
    for (int dtype : kTypes) {
      Case c = sized(dtype, 1, 2, 2, 77, 149, dim);
      c.causal = dim / 16 % 2;
      dims.push_back(c);
    }
  check("every_head_dim", dims);
  const int unlike[][2] = {{192, 128}, {64, 128}, {128, 64}, {32, 64}, {48, 256}, {256, 16}};
  for (const auto &p : unlike) {
    Case c = sized(FLASHCORE_E4M3, 1, 4, 2, 70, 131, p[0]);
    c.dim_v = p[1], c.causal = 1;
    unequal.push_back(c);
  }
  check("unequal_head_dims", unequal);
}

/* Long enough for O to be added up in f32 several times, on many tiles per block. */
static void test_many() {
  std::vector<Case> keys, heads;
  for (int dtype : kTypes)
    for (int dim : kDims)
      for (int data : {(int)DATA_NORMAL, (int)DATA_STD16, (int)DATA_RAMP}) {
        Case c = sized(dtype, 1, 2, 1, 333, 5003, dim);
        c.data = data, c.causal = data == DATA_STD16, c.descale = data == DATA_RAMP ? 2 : 0;
        keys.push_back(c);
        c.seq_kv = 8209;
        keys.push_back(c);
      }
  check("many_keys", keys);
  std::vector<Case> edges; // of the tiles for many keys
  int turn = 0;
  for (int dim : {128, 256})
    for (int q : {1, 65, 193})
      for (int kv : {1055, 1056, 1057, 2113, 4097, 8191, 8193, 8257, 8353, 8449}) {
        Case c = sized(kTypes[turn % 2], 1, 2, 1, q, kv, dim);
        c.causal = turn++ % 3, c.lengths = turn % 4 == 0 ? SEQLENS_KV : 0;
        edges.push_back(c);
      }
  check("many_keys_around_tile_edges", edges);
  for (int n : {31, 33, 65})
    for (int dim : kDims) {
      Case c = sized(kTypes[n % 2], 2, n, 1, 700, 700, dim);
      heads.push_back(c);
      c.causal = 1, c.descale = 2;
      heads.push_back(c);
    }
  for (int lengths : {(int)(SEQLENS_Q | SEQLENS_KV), (int)(CU_SEQLENS_Q | CU_SEQLENS_KV)})
    for (int dim : kDims) {
      Case c = sized(FLASHCORE_E4M3, 40, 4, 4, 600, 300, dim);
      c.lengths = lengths, c.causal = dim / 64 % 3, c.descale = 2;
      heads.push_back(c);
    }
  check("many_heads", heads);
}

static const Option kOptions[] = {
    {"causal_bottom_right", [](Case &c) { c.causal = 1; }},
    {"causal_top_left", [](Case &c) { c.causal = 2; }},
    {"window_both_sides", [](Case &c) { c.window = 1, c.left = 20, c.right = 9; }},
    {"window_left", [](Case &c) { c.window = 1, c.left = 40; }},
    {"window_zero", [](Case &c) { c.window = 1, c.left = c.right = 0; }},
    {"softcap", [](Case &c) { c.softcap = 5.f; }},
    {"alibi", [](Case &c) { c.alibi = 2; }},
    {"bias", [](Case &c) { c.bias = BIAS_DENSE, c.bias_dtype = FLASHCORE_F16; }},
    {"bias_minus_inf_hides", [](Case &c) { c.bias = BIAS_HIDING, c.bias_dtype = FLASHCORE_F32; }},
    {"mask_bits", [](Case &c) { c.mask = MASK_DENSE; }},
    {"sink", [](Case &c) { c.sink = 1; }},
    {"scale", [](Case &c) { c.scale = 0.37f; }},
    {"lse_base2", [](Case &c) { c.lse = 2; }},
    {"no_lse", [](Case &c) { c.lse = 0; }},
    {"group", [](Case &c) { c.heads_q = 6; }},
    {"seqlens", [](Case &c) { c.lengths |= SEQLENS_Q | SEQLENS_KV; }},
    {"cu_seqlens", [](Case &c) { c.lengths |= CU_SEQLENS_Q | CU_SEQLENS_KV; }},
    {"descale", [](Case &c) { c.descale = 1; }},
    {"descale_per_head", [](Case &c) { c.descale = 2; }},
    {"output_f16", [](Case &c) { c.dtype_o = FLASHCORE_F16; }},
    {"output_e4m3", [](Case &c) { c.dtype_o = FLASHCORE_E4M3; }},
    {"output_e5m2", [](Case &c) { c.dtype_o = FLASHCORE_E5M2, c.amax = 1; }},
    {"pages", [](Case &c) { c.page = 16; }},
    {"splits", [](Case &c) { c.splits = 3; }},
    {"output_f32", [](Case &c) { c.dtype_o = FLASHCORE_F32; }},
};

static void test_options() {
  std::vector<Case> pairs;
  for (size_t i = 0; i < std::size(kOptions); ++i) {
    std::vector<Case> alone;
    for (int dtype : kTypes)
      for (int dim : kDims) {
        Case c = sized(dtype, 3, 2, 2, 139, 281, dim);
        kOptions[i].set(c);
        alone.push_back(c);
        c.seq_q = 1, c.seq_kv = 300;
        alone.push_back(c);
      }
    check(std::string("option_") + kOptions[i].name, alone);
    for (size_t j = i + 1; j < std::size(kOptions); ++j) {
      Case c = sized(kTypes[(i + j) % 2], 3, 2, 2, 100 + (int)i, 170 - (int)j, kDims[(i + j) % 3]);
      kOptions[i].set(c);
      kOptions[j].set(c);
      c.seed += (int)(100 * i + j);
      pairs.push_back(c);
    }
  }
  check("options_in_pairs", pairs);
  std::vector<Case> lengths;
  for (int seed = 1; seed <= (quick ? 2 : 6); ++seed)
    for (int bits = 1; bits < 16; ++bits) {
      Case c = sized(kTypes[seed % 2], 5, 4, 2, seed % 3 ? 150 : 9, 190, kDims[seed % 3]);
      c.lengths = bits, c.causal = (seed + bits) % 3, c.seed = 1000 * seed + bits, c.descale = 2;
      lengths.push_back(c);
    }
  check("device_lengths_empty_full_and_out_of_range", lengths);
}

/* O in fp8, with its amax: on every tile, stored whole or in part, with lengths, masks and descales that saturate some of it. */
static void test_outputs() {
  std::vector<Case> cases, hostile, layouts, heads;
  const int lengths[][2] = {{1, 300}, {63, 65}, {139, 281}, {200, 67}, {77, 1057}, {129, 2113}, {65, 8209}};
  const int bits[] = {0, SEQLENS_Q | SEQLENS_KV, CU_SEQLENS_Q | CU_SEQLENS_KV, 0};
  int turn = 0;
  for (int dtype_o : kTypes)
    for (int dim : {16, 48, 64, 80, 128, 144, 256})
      for (const auto &p : lengths) {
        Case c = sized(kTypes[turn % 2], 2, 4, 2, p[0], p[1], dim);
        c.dtype_o = dtype_o, c.amax = turn % 5 > 0, c.descale = turn % 4, c.causal = turn / 2 % 3, c.lengths = bits[turn / 3 % 4];
        if (turn % 6 == 0) c.softcap = 5.f;
        if (turn % 5 == 2) c.dim_v = 272 - dim;
        ++turn;
        cases.push_back(c);
      }
  check("fp8_outputs", cases);
  for (int data = 0; data < DATA_COUNT; ++data)
    for (int dim : kDims) {
      Case c = sized(kTypes[(data + dim / 64) % 2], 1, 2, 1, 150, 777, dim);
      c.data = data, c.causal = data % 2, c.dtype_o = kTypes[(data + dim / 128) % 2], c.amax = 1;
      if (data == DATA_NORMAL || data == DATA_LAST || data == DATA_FIRST) c.descale = 1 + data % 2; // descales of Q and K move logits
      hostile.push_back(c);
    }
  check("fp8_outputs_of_hostile_data", hostile);
  for (int layout : {(int)LAYOUT_BHSD, (int)LAYOUT_PACKED, (int)LAYOUT_HEAD0, (int)LAYOUT_PADDED, (int)LAYOUT_SLICE})
    for (int dim : kDims) {
      Case c = sized(kTypes[layout % 2], 2, 4, 2, 150, 150, dim);
      c.layout = layout, c.dtype_o = kTypes[(layout + dim / 64) % 2], c.amax = 1, c.descale = 2;
      layouts.push_back(c);
    }
  check("fp8_outputs_in_layouts", layouts);
  for (int dim : kDims) {
    Case c = sized(FLASHCORE_E4M3, 40, 4, 4, 600, 300, dim);
    c.lengths = SEQLENS_Q | SEQLENS_KV, c.causal = dim / 64 % 3, c.descale = 2, c.dtype_o = FLASHCORE_E4M3, c.amax = 1;
    heads.push_back(c);
  }
  check("fp8_outputs_of_many_heads", heads);
}

/* Descales that are NaN or negative make NaN of rows that see a key, and leave the others alone, beside a sink, too. */
static void test_spoiled_descales() {
  std::vector<Case> cases;
  for (int dtype_o : {0, (int)FLASHCORE_E4M3})
    for (int dim : kDims)
      for (int turn = 0; turn < 8; ++turn) {
        Case c = sized(kTypes[turn % 2], 2, 4, 2, 200, 67, dim);
        c.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT, c.descale = 4, c.dtype_o = dtype_o, c.amax = dtype_o != 0; // 133 rows see no key
        c.sink = turn / 2 % 2, c.softcap = turn % 4 == 3 ? 5.f : 0.f, c.lengths = turn < 4 ? 0 : SEQLENS_Q | SEQLENS_KV;
        cases.push_back(c);
      }
  check("spoiled_descales", cases);
}

static void test_data() {
  std::vector<Case> hostile, layouts;
  for (int data = 0; data < DATA_COUNT; ++data)
    for (int dim : kDims)
      for (int causal = 0; causal < 2; ++causal) {
        Case c = sized(kTypes[(data + dim / 64) % 2], 1, 2, 1, 150, 777, dim);
        c.data = data, c.causal = causal;
        hostile.push_back(c);
      }
  check("hostile_data", hostile);
  for (int layout = 0; layout < LAYOUT_FAR; ++layout)
    for (int dim : kDims) {
      Case c = sized(kTypes[layout % 2], 2, 4, 2, 70, 150, dim);
      c.layout = layout, c.causal = 1;
      if (layout == LAYOUT_PACKED) c.seq_q = c.seq_kv;
      layouts.push_back(c);
    }
  check("layouts", layouts);
}

static void test_reruns() {
  for (int backend : kBackends)
    for (int dim : kDims) {
      const std::string name = name_of(backend) + format(".reruns_are_bit_equal.d%d", dim);
      if (!wanted(name) || !present(backend)) continue;
      Case c = sized(FLASHCORE_E4M3, 2, 16, 4, 900, 1100, dim);
      c.causal = 1, c.descale = 2;
      Problem p(c);
      drop_lse(p);
      check_reruns(name, p, backend, quick ? 10 : 200);
    }
}

/* Norm of the error over the norm of the result. O: contiguous (batch, seq, heads, dim) bf16. */
static double relative_error(const Problem &p) {
  const Case &c = p.c;
  const size_t count = (size_t)c.batch * c.heads_q * c.seq_q * c.dim_v;
  std::vector<uint16_t> out(count);
  std::vector<double> exact(count);
  CUDA_OK(cudaMemcpy(out.data(), p.a.o.data, 2 * count, cudaMemcpyDeviceToHost));
  CUDA_OK(cudaMemcpy(exact.data(), p.expected().o, 8 * count, cudaMemcpyDeviceToHost));
  double difference = 0, size = 0;
  for (size_t n = 0; n < count; ++n) {
    const size_t d = n % c.dim_v, row = n / c.dim_v % c.seq_q, h = n / c.dim_v / c.seq_q % c.heads_q, b = n / c.dim_v / c.seq_q / c.heads_q;
    const double x = flashcore_decode(FLASHCORE_BF16, out[((b * c.seq_q + row) * c.heads_q + h) * c.dim_v + d]) - exact[n];
    difference += x * x;
    size += exact[n] * exact[n];
  }
  return std::sqrt(difference / size);
}

/* Largest error of the LSE beyond 2e-3, in units of 2^-13 max |S|: at most 1 where the data is not hostile. */
static double lse_error(const Problem &p) {
  const size_t rows = (size_t)p.c.batch * p.c.heads_q * p.c.seq_q;
  std::vector<float> out(rows);
  std::vector<double> exact(rows), peak(rows);
  CUDA_OK(cudaMemcpy(out.data(), p.a.lse, 4 * rows, cudaMemcpyDeviceToHost));
  CUDA_OK(cudaMemcpy(exact.data(), p.expected().lse, 8 * rows, cudaMemcpyDeviceToHost));
  CUDA_OK(cudaMemcpy(peak.data(), p.expected().peak, 8 * rows, cudaMemcpyDeviceToHost));
  const double unit = 0x1p-13 * *std::max_element(peak.begin(), peak.end());
  double worst = 0;
  for (size_t n = 0; n < rows; ++n) worst = std::max(worst, (std::fabs(out[n] - exact[n]) - 2e-3) / unit);
  return worst;
}

/* What the mode that is compiled promises. Logit std s: Q and K both times sqrt(s), here by the scale. */
static void test_accuracy() {
#if defined(FLASHCORE_FP8_FAST)
  const double factor[3] = {1.1, 2.4, 3e-2};
#else
  const double factor[3] = {1.02, 1.02, 1e-2};
#endif
  const struct {
    const char *name;
    int data, seq;
    float std;
    double limit;
  } cases[] = {{"normal_2048", DATA_NORMAL, 2048, 1.f, 2.5e-2 * factor[0]},
               {"normal_16384", DATA_NORMAL, 16384, 1.f, 2.6e-2 * factor[0]},
               {"logit_std_4", DATA_NORMAL, 4096, 4.f, 8.7e-3 * factor[1]},
               {"logit_std_9", DATA_NORMAL, 2048, 9.f, 5.8e-3 * factor[1]},
               {"values_of_one_sign", DATA_POSITIVE, 16384, 1.f, factor[2]}};
  for (int backend : kBackends)
    for (const auto &x : cases)
      for (int dim : kDims) {
        const std::string name = name_of(backend) + ".accuracy." + x.name + format(".d%d", dim);
        if (!wanted(name) || !present(backend)) continue;
        Case c = sized(FLASHCORE_E4M3, 1, 2, 2, 512, x.seq, dim);
        c.data = x.data, c.scale = x.std / std::sqrt((float)dim);
        Problem p(c);
        double error[2], lse = 0;
        bool launched = true;
        for (int turn = 0; turn < 2; ++turn) {
          launched &= p.launch(backend).what == Outcome::PASSED;
          p.wait();
          error[turn] = relative_error(p);
          if (turn == 1) continue;
          lse = lse_error(p);
          drop_lse(p);
        }
        const std::string figures = format("%.3g with the LSE, %.3g without, limit %.3g; LSE %.2f", error[0], error[1], x.limit, lse);
        report().expect(name, launched && std::max(error[0], error[1]) <= x.limit && lse <= 1, figures);
        printf("# %s: %s\n", name.c_str(), figures.c_str());
      }
}

/* ---- quantisers ---------------------------------------------------------------------------------------------------------------- */

struct QuantiseCase {
  int dtype, dtype_out, granularity, block_rows, smooth, rotation, dim, rows, lengths, bhsd, transposed;
};
static std::string describe(const QuantiseCase &x) {
  return format("dtype %d to %d, granularity %d, block_rows %d, smooth %d, rotation %d, dim %d, rows %d, lengths %d, bhsd %d, transposed %d", x.dtype,
                x.dtype_out, x.granularity, x.block_rows, x.smooth, x.rotation, x.dim, x.rows, x.lengths, x.bhsd, x.transposed);
}

/* One case, in host memory: normal numbers, some zeros and, rarely, what is no number. */
struct QuantiseProblem {
  static constexpr int kBatch = 2, kHeads = 3;
  std::vector<uint8_t> in, out;
  std::vector<float> descale, mean;
  std::vector<int32_t> lengths;
  flashcore_fp8_quantise_args q;

  explicit QuantiseProblem(const QuantiseCase &x) : lengths{x.rows / 3, x.rows + 5} {
    const int count = kBatch * x.rows * kHeads * x.dim, pitch = (x.rows + 15) / 16 * 16 + 16;
    const double special[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e-30};
    std::mt19937 rng(99);
    std::normal_distribution<double> normal;
    in.resize((size_t)count * flashcore_dtype_bytes(x.dtype));
    for (int i = 0; i < count; ++i) {
      const int kind = (int)(rng() % 30001);
      flashcore_store(in.data(), x.dtype, i, kind < 6 ? special[kind] : normal(rng) * (1 + i % x.dim % 7) + i % 3);
    }
    out.assign((size_t)kBatch * kHeads * x.dim * std::max(x.rows, pitch), 0xa5);
    descale.assign((size_t)(kBatch * kHeads * x.rows), 7.f);
    mean.assign((size_t)(kBatch * kHeads * x.dim), 7.f);
    flashcore_fp8_quantise_init(&q);
    q.dtype = x.dtype, q.dtype_out = x.dtype_out, q.batch = kBatch, q.rows = x.rows, q.heads = kHeads, q.dim = x.dim;
    q.granularity = x.granularity, q.block_rows = x.block_rows, q.rotation = x.rotation, q.scale = 0.03f, q.transposed = x.transposed;
    q.x = x.bhsd ? flashcore_bhsd(nullptr, x.rows, kHeads, x.dim) : flashcore_bshd(nullptr, x.rows, kHeads, x.dim);
    q.out = x.transposed ? flashcore_strided(nullptr, kHeads * x.dim * pitch, pitch, x.dim * pitch)
            : x.bhsd     ? flashcore_bshd(nullptr, x.rows, kHeads, x.dim)
                         : flashcore_bhsd(nullptr, x.rows, kHeads, x.dim);
  }
  void point(const QuantiseCase &x, void *to_in, void *to_out, float *to_descale, float *to_mean, int32_t *to_lengths) {
    q.x.data = to_in, q.out.data = to_out, q.descale = to_descale;
    q.mean = x.smooth ? to_mean : nullptr, q.seqlens = x.lengths ? to_lengths : nullptr;
  }
};

/* Bytes, scales and means of the kernels against the reference's, and what they must not write. "": equal. */
static std::string quantise_differs(const QuantiseCase &x) {
  QuantiseProblem p(x);
  Memory in(p.in.size(), kPoison8), out(p.out.size()), descale(p.descale.size() * 4), mean(p.mean.size() * 4), lengths(8);
  in.upload(p.in), out.upload(p.out), descale.upload(p.descale), mean.upload(p.mean), lengths.upload(p.lengths);
  flashcore_error error = {};
  p.point(x, p.in.data(), p.out.data(), p.descale.data(), p.mean.data(), p.lengths.data());
  if (flashcore_fp8_quantise_reference(&p.q, &error) != FLASHCORE_OK) return std::string("reference: ") + error.message;
  p.point(x, in.data(), out.data(), descale.data<float>(), mean.data<float>(), lengths.data<int32_t>());
  if (flashcore_fp8_quantise(&p.q, nullptr, &error) != FLASHCORE_OK) return error.message;
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<uint8_t> got(p.out.size());
  std::vector<float> got_descale(p.descale.size()), got_mean(p.mean.size());
  CUDA_OK(cudaMemcpy(got.data(), out.data(), got.size(), cudaMemcpyDeviceToHost));
  CUDA_OK(cudaMemcpy(got_descale.data(), descale.data(), 4 * got_descale.size(), cudaMemcpyDeviceToHost));
  CUDA_OK(cudaMemcpy(got_mean.data(), mean.data(), 4 * got_mean.size(), cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < got_descale.size(); ++i)
    if (memcmp(&got_descale[i], &p.descale[i], 4)) return format("scale %zu is %g, not %g", i, got_descale[i], p.descale[i]);
  for (size_t i = 0; i < got_mean.size(); ++i)
    if (memcmp(&got_mean[i], &p.mean[i], 4)) return format("mean %zu is %g, not %g", i, got_mean[i], p.mean[i]);
  for (size_t i = 0; i < got.size(); ++i)
    if (got[i] != p.out[i]) return format("byte %zu is 0x%02x, not 0x%02x", i, got[i], p.out[i]);
  return "";
}

/* A case of every choice, at random but for types and granularity. */
static QuantiseCase random_case(std::mt19937 &rng, int dtype, int dtype_out, int granularity) {
  const int dims[] = {16, 48, 64, 80, 96, 128, 192, 256, 496, 512}, rows[] = {1, 16, 63, 64, 130, 300, 1104},
            rotations[] = {0, 0, 16, 32, 64, 128, 256, 512};
  QuantiseCase x = {};
  x.dtype = dtype, x.dtype_out = dtype_out, x.granularity = granularity;
  x.dim = dims[rng() % std::size(dims)], x.rows = rows[rng() % std::size(rows)];
  x.smooth = rng() % 2, x.lengths = rng() % 3 == 0, x.bhsd = rng() % 2;
  x.rotation = rotations[rng() % std::size(rotations)];
  if (x.rotation && x.dim % x.rotation) x.rotation = 16;
  x.block_rows = x.rows % 48 == 0 ? x.rows / 3 : x.rows % 2 || rng() % 2 ? x.rows : x.rows / 2;
  x.transposed = rng() % 3 == 0 && (granularity != FLASHCORE_FP8_PER_BLOCK || x.block_rows % 16 == 0);
  return x;
}

static void test_quantisers() {
  for (int granularity = 0; granularity < 4; ++granularity) {
    const std::string name = format("quantiser_kernels_equal_the_reference.granularity_%d", granularity);
    if (!wanted(name)) continue;
    std::mt19937 rng((unsigned)granularity);
    std::string why;
    int cases = 0;
    for (int dtype : {FLASHCORE_F32, FLASHCORE_F16, FLASHCORE_BF16})
      for (int dtype_out : {FLASHCORE_E4M3, FLASHCORE_E5M2})
        for (int n = 0; n < (quick ? 10 : 40) && why.empty(); ++n, ++cases) {
          const QuantiseCase x = random_case(rng, dtype, dtype_out, granularity);
          why = quantise_differs(x);
          if (!why.empty()) why += "; " + describe(x);
        }
    if (why.empty()) report().ok(name, format("%d cases", cases));
    else report().fail(name, why);
  }
}

/* wide: 256 elements of T. One block of 64 threads, each with four codes. */
template <typename T, typename F8> static __global__ void widen_all(T *wide) {
#if FLASHCORE_HAS_SM90A
  const uint32_t first = 4 * threadIdx.x;
  uint32_t pairs[2];
  flashcore::fp8_widen<T, F8>(first | (first + 1) << 8 | (first + 2) << 16 | (first + 3) << 24, pairs);
  memcpy(wide + first, pairs, 8);
#endif
}

template <typename T, typename F8> static void check_widening(const char *name) {
  const int dtype = flashcore::element<T>::kDtype;
  std::vector<uint16_t> wide(256);
  Memory memory(512);
  std::string why;
  widen_all<T, F8><<<1, 64>>>(memory.data<T>());
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaMemcpy(wide.data(), memory.data(), 512, cudaMemcpyDeviceToHost));
  for (uint32_t code = 0; code < 256 && why.empty(); ++code) {
    const double x = flashcore_decode(dtype, wide[code]), exact = flashcore_decode(F8::kDtype, code);
    const bool same = std::isnan(exact) ? std::isnan(x) : x == exact && std::signbit(x) == std::signbit(exact);
    if (!same) why = format("0x%02x becomes %g, not %g", code, x, exact);
  }
  report().expect(name, why.empty(), why);
}

static void test_widening() {
  if (!wanted("widening") || !present(FLASHCORE_BACKEND_QGMMA)) return;
  check_widening<__half, flashcore::e4m3>("widening_e4m3_to_f16_is_exact");
  check_widening<__half, flashcore::e5m2>("widening_e5m2_to_f16_is_exact");
  check_widening<__nv_bfloat16, flashcore::e4m3>("widening_e4m3_to_bf16_is_exact");
  check_widening<__nv_bfloat16, flashcore::e5m2>("widening_e5m2_to_bf16_is_exact");
}

int main(int argc, char **argv) {
  if (!read_options(argc, argv)) return 2;
  find_device();
#if defined(FLASHCORE_FP8_FAST)
  error_factor() = 2.4; // what the mode promises for peaked rows
  largest_weight() = 8; // kTop of qgmma_warp: less than 2^-13 of a row's largest weight is lost
#endif
  for (auto group : {test_quantisers, test_widening, test_shapes, test_accuracy, test_options, test_outputs, test_spoiled_descales, test_data,
                     test_many, test_reruns})
    group();
  return report().finish();
}
