/* A seeded random sweep over the whole feature space, on every backend and on the automatic choice, descriptors that must be refused included.
 *
 *   test_sweep [--seed N] [--count N] [--tiny]      --tiny: sizes for compute-sanitizer
 *   test_sweep --case "heads_q=4 causal=1 ..."      one case, as a failure prints it */
#include "broken.cuh"
#include "harness.cuh"

/* Small helpers around one generator; the same seed gives the same case on every machine. */
struct Dice {
  std::mt19937 rng;
  explicit Dice(uint32_t seed) : rng(seed) {}
  int below(int n) { return (int)(rng() % (uint32_t)n); }
  int between(int low, int high) { return low + below(high - low + 1); }
  bool one_in(int n) { return below(n) == 0; }
  template <size_t kCount> int pick(const int (&list)[kCount]) { return list[below((int)kCount)]; }
};

static int random_length(Dice &dice, bool tiny) {
  static const int edges[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 191, 192, 193};
  if (tiny) return dice.between(1, 90);
  if (dice.one_in(3)) return dice.pick(edges);
  return dice.between(1, dice.one_in(6) ? 700 : 200);
}

static int random_dim(Dice &dice, bool tiny) {
  static const int served[] = {8, 16, 32, 40, 64, 64, 64, 72, 80, 96, 112, 128, 128, 128, 160, 192, 200, 256, 320, 512};
  if (tiny) return dice.pick({32, 64, 64, 80, 128, 128, 256});
  return dice.one_in(10) ? dice.between(1, 300) : dice.pick(served);
}

static void random_sizes(Dice &dice, bool tiny, Case &c) {
  static const int types[] = {FLASHCORE_F16, FLASHCORE_F16, FLASHCORE_BF16, FLASHCORE_BF16, FLASHCORE_F32};
  c.dtype = dice.pick(types);
  if (dice.one_in(12)) c.dtype_o = dice.pick({FLASHCORE_F32, FLASHCORE_F16, FLASHCORE_BF16});
  c.batch = dice.between(1, tiny ? 2 : 4);
  c.heads_kv = dice.between(1, tiny ? 2 : 3);
  c.heads_q = c.heads_kv * (dice.one_in(2) ? 1 : dice.between(1, tiny ? 3 : 9));
  c.seq_q = dice.one_in(5) ? dice.between(1, 8) : random_length(dice, tiny);
  c.seq_kv = dice.one_in(4) ? c.seq_q : random_length(dice, tiny);
  if (dice.one_in(60)) c.seq_kv = 0;
  c.dim_qk = c.dim_v = random_dim(dice, tiny);
  if (dice.one_in(6)) c.dim_v = random_dim(dice, tiny);
  if (dice.one_in(20)) c.dim_qk = 192, c.dim_v = 128;
}

static void random_rules(Dice &dice, Case &c) {
  c.lse = dice.below(3);
  if (dice.one_in(2)) c.causal = dice.between(1, 2);
  if (dice.one_in(4)) {
    c.window = 1;
    if (!dice.one_in(3)) c.left = dice.between(0, c.seq_kv + 10);
    if (!dice.one_in(3)) c.right = dice.between(0, c.seq_kv / 2 + 5);
  }
  if (dice.one_in(5)) c.softcap = 1.f + (float)dice.below(50);
  if (dice.one_in(5)) c.alibi = dice.between(1, 2);
  if (dice.one_in(5)) c.bias = dice.between(1, BIAS_COUNT - 1), c.bias_dtype = dice.pick({0, FLASHCORE_F32, FLASHCORE_F16, FLASHCORE_BF16});
  if (dice.one_in(6)) c.mask = dice.between(1, MASK_COUNT - 1);
  if (dice.one_in(4)) c.sink = 1;
  if (dice.one_in(5)) c.scale = 0.01f + 0.001f * (float)dice.below(400);
}

/* Without what makes the mma kernel general: only then has it more than one tile. */
static void plain(Case &c) {
  c.softcap = 0, c.alibi = c.bias = c.mask = 0, c.page = c.splits = c.split_len = 0;
  if (c.layout == LAYOUT_SLICE) c.layout = LAYOUT_BSHD;
}

/* K and V become fp8, in dims that its kernels serve. */
static void cache_in_fp8(Dice &dice, Case &c) {
  c.dtype_kv = dice.pick({FLASHCORE_E4M3, FLASHCORE_E5M2});
  c.descale = dice.below(3);
  c.dim_qk = (c.dim_qk + 15) / 16 * 16, c.dim_v = (c.dim_v + 15) / 16 * 16;
  if (!dice.one_in(4)) c.page = c.splits = c.split_len = 0;
}

static Case random_case(uint32_t seed, bool tiny) {
  Dice dice(seed);
  Case c;
  c.seed = (int)(seed & 0x7fffffff);
  random_sizes(dice, tiny, c);
  random_rules(dice, c);
  if (dice.one_in(3)) c.lengths = dice.between(1, 15);
  if (dice.one_in(8)) c.page = dice.pick({1, 7, 16, 32, 64, 100, 128});
  if (dice.one_in(8)) c.splits = dice.between(1, 6);
  else if (dice.one_in(12)) c.split_len = 64 * dice.between(1, 3);
  if (dice.one_in(2)) c.layout = dice.below(LAYOUT_FAR);
  if (dice.one_in(3)) c.data = dice.below(DATA_COUNT);
  if (c.data == DATA_BACKGROUND) c.causal = c.window = 0; // whatever the direction, a kernel meets a dominant key first
  if (equal_logits(c.data)) c.bias = BIAS_NONE, c.alibi = c.splits = c.split_len = 0;
  c.tile = dice.below(TILE_COUNT);
  if (c.tile != TILE_AUTO && dice.one_in(2)) plain(c);
  if (dice.one_in(25)) c.broken = dice.between(1, (int)breakages().size());
  if (dice.one_in(4)) cache_in_fp8(dice, c);
  return c;
}

/* One case on one backend. Broken ones must be refused, with the right status. */
static Outcome run_on(Problem &p, int backend) {
  Outcome outcome = p.run(backend);
  if (!p.c.broken || outcome.what == Outcome::FAILED) return outcome;
  const std::string wrong = wrong_refusal(p.c.broken, outcome.status);
  if (!wrong.empty()) outcome = {Outcome::FAILED, outcome.status, wrong};
  return outcome;
}

static void apply_breakage(Problem &p) {
  const int count = (int)breakages().size();
  if (p.c.broken >= 1 && p.c.broken <= count) breakages()[(size_t)p.c.broken - 1].apply(p.a);
}

static int one_case(const std::string &text) {
  Case c;
  if (!parse(text, &c) || c.broken < 0 || c.broken > (int)breakages().size()) return fprintf(stderr, "not a case: %s\n", text.c_str()), 2;
  Problem p(c);
  apply_breakage(p);
  const Outcome outcome = run_on(p, c.backend);
  if (outcome.what == Outcome::FAILED) report().fail("case", outcome.why);
  else report().ok("case", outcome.what == Outcome::REFUSED ? "refused: " + outcome.why : "served");
  return report().finish();
}

static int sweep(uint32_t seed, int count, bool tiny) {
  static const int backends[] = {FLASHCORE_BACKEND_AUTO, FLASHCORE_BACKEND_SIMT,  FLASHCORE_BACKEND_WMMA,
                                 FLASHCORE_BACKEND_MMA,  FLASHCORE_BACKEND_WGMMA, FLASHCORE_BACKEND_QMMA};
  int served[std::size(backends)] = {}, refused[std::size(backends)] = {};
  for (int n = 0; n < count; ++n) {
    const Case c = random_case(seed + (uint32_t)n, tiny);
    Problem p(c);
    apply_breakage(p);
    std::string failures;
    for (size_t k = 0; k < std::size(backends); ++k) {
      const Outcome outcome = run_on(p, backends[k]);
      served[k] += outcome.what == Outcome::PASSED;
      refused[k] += outcome.what == Outcome::REFUSED;
      if (outcome.what != Outcome::FAILED) continue;
      failures += "\n     " + std::string(flashcore_backend_string((flashcore_backend)backends[k])) + ": " + outcome.why;
      failures += "\n     " + p.reproduce_on(backends[k]);
    }
    if (failures.empty()) ++report().passed;
    else report().fail(format("sweep_%u", seed + (uint32_t)n), failures);
  }
  for (size_t k = 0; k < std::size(backends); ++k)
    printf("# %s: %d served, %d refused\n", flashcore_backend_string((flashcore_backend)backends[k]), served[k], refused[k]);
  return report().finish();
}

int main(int argc, char **argv) {
  uint32_t seed = 1;
  int count = 2000;
  bool tiny = false;
  std::string text;
  bool has_text = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--seed" && i + 1 < argc) seed = (uint32_t)strtoul(argv[++i], nullptr, 10);
    else if (word == "--count" && i + 1 < argc) count = atoi(argv[++i]);
    else if (word == "--case" && i + 1 < argc) text = argv[++i], has_text = true;
    else if (word == "--tiny") tiny = true;
    else return fprintf(stderr, "usage: test_sweep [--seed N] [--count N] [--tiny] [--case TEXT]\n"), 2;
  }
  find_device();
  return has_text ? one_case(text) : sweep(seed, count, tiny);
}
