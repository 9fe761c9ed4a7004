/* For programs that check properties, each on many cases: what their command line selects, and the line that tells of a property's cases. */
#ifndef FLASHCORE_TESTS_PROPERTIES_CUH
#define FLASHCORE_TESTS_PROPERTIES_CUH

#include <functional>

#include "harness.cuh"

static bool quick = false;
static std::string only;

/* [--quick] [--only TEXT]; false: something else was there. */
static bool read_options(int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--quick") quick = true;
    else if (word == "--only" && i + 1 < argc) only = argv[++i];
    else return fprintf(stderr, "usage: %s [--quick] [--only TEXT]\n", argv[0]), false;
  }
  return true;
}

static bool wanted(const std::string &name) { return only.empty() || name.find(only) != std::string::npos; }

static std::string name_of(int backend) { return flashcore_backend_string((flashcore_backend)backend); }

struct Tally {
  int served = 0, refused = 0, failed = 0;
  std::string why;

  void add(const Outcome &outcome, const std::string &command) {
    if (outcome.what == Outcome::PASSED) ++served;
    if (outcome.what == Outcome::REFUSED) ++refused;
    if (outcome.what != Outcome::FAILED) return;
    if (failed++ < 3) why += (why.empty() ? "" : "\n     ") + outcome.why + "\n     " + command;
  }
  void tell(const std::string &name) const {
    if (failed) report().fail(name, format("%d of %d cases: ", failed, served + refused + failed) + why);
    else if (served) report().ok(name, format("%d cases", served) + (refused ? format(", %d refused", refused) : ""));
    else if (refused) printf("skip %s: all %d cases refused\n", name.c_str(), refused);
  }
};

/* One field or a few of a case, by name. */
struct Option {
  const char *name;
  std::function<void(Case &)> set;
};

/* From now on without the LSE: other kernels serve those who do not want it. */
inline void drop_lse(Problem &p) { p.c.lse = 0, p.a.lse = nullptr; }

/* Every case on a backend, with the LSE and without, sharing the tensors and the oracle. */
inline void check_with_and_without_lse(const std::string &name, int backend, const std::vector<Case> &cases) {
  if (!wanted(name)) return;
  Tally tally;
  for (const Case &c : cases) {
    Problem problem(c);
    for (int turn = 0; turn < (c.lse ? 2 : 1); ++turn) {
      if (turn == 1) drop_lse(problem);
      const Outcome outcome = problem.run(backend);
      tally.add(outcome, problem.reproduce_on(backend));
    }
  }
  tally.tell(name);
}

/* The same launch again and again: every output must be the first, bit for bit. */
inline void check_reruns(const std::string &name, Problem &p, int backend, int runs) {
  unsigned long long first = 0;
  std::string why;
  for (int n = 0; n < runs && why.empty(); ++n) {
    const Outcome outcome = p.launch(backend);
    if (outcome.what != Outcome::PASSED) why = outcome.why;
    p.wait();
    const unsigned long long sum = p.output().inspect().sum;
    if (n == 0) first = sum;
    if (sum != first) why = format("run %d differs", n);
  }
  report().expect(name, why.empty(), why);
}

static Case sized(int dtype, int batch, int heads_q, int heads_kv, int seq_q, int seq_kv, int dim) {
  Case c;
  c.dtype = dtype, c.batch = batch, c.heads_q = heads_q, c.heads_kv = heads_kv;
  c.seq_q = seq_q, c.seq_kv = seq_kv, c.dim_qk = c.dim_v = dim;
  c.seed = 1 + batch + 3 * heads_q + 7 * seq_q + 11 * seq_kv + 13 * dim;
  return c;
}

#endif
