/* For programs that check properties, each on many cases: what their command line selects, and the line that tells of a property's cases. */
#ifndef FLASHCORE_TESTS_PROPERTIES_CUH
#define FLASHCORE_TESTS_PROPERTIES_CUH

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

static Case sized(int dtype, int batch, int heads_q, int heads_kv, int seq_q, int seq_kv, int dim) {
  Case c;
  c.dtype = dtype, c.batch = batch, c.heads_q = heads_q, c.heads_kv = heads_kv;
  c.seq_q = seq_q, c.seq_kv = seq_kv, c.dim_qk = c.dim_v = dim;
  c.seed = 1 + batch + 3 * heads_q + 7 * seq_q + 11 * seq_kv + 13 * dim;
  return c;
}

#endif
