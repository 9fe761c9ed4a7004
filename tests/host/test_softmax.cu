/* Demonstrates the algebra of the online softmax on the host: order, grouping and empty sets do not matter. Needs nvcc, no GPU.
 *   nvcc -std=c++17 -I<repository> tests/host/test_softmax.cu */
#include "flashcore.h"

#include "check.h"

using flashcore::softmax_finish;
using flashcore::softmax_merge;
using flashcore::softmax_raise;
using flashcore::softmax_state;

static const softmax_state kEmpty = {FLASHCORE_EMPTY_MAX, 0.f};

static double seed = 0.5;
static double random_unit() { return seed = fmod(seed * 997.0 + 0.1234567, 1.0); }

/* State of `count` logits (log2 units), and an O of one dim along the way. */
struct row {
  softmax_state s = kEmpty;
  double o = 0.0;
  void add(float x, double value) {
    o *= softmax_raise(s, x);
    const float p = exp2f(x - s.m);
    s.l += p;
    o += p * value;
  }
};

static row join(const row &a, const row &b) {
  row r;
  float fa, fb;
  r.s = softmax_merge(a.s, b.s, fa, fb);
  r.o = a.o * fa + b.o * fb;
  return r;
}

static double output(const row &r, double *lse) {
  float found;
  const float factor = softmax_finish(r.s, false, 0.f, false, found);
  *lse = found;
  return r.o * factor;
}

static row random_row(int count, double spread) {
  row r;
  for (int i = 0; i < count; ++i) r.add((float)(spread * (random_unit() - 0.5)), random_unit());
  return r;
}

static void one_row_equals_the_softmax_written_out() {
  for (int count = 1; count < 50; ++count) {
    double l = 0.0, o = 0.0, lse;
    row r;
    for (int i = 0; i < count; ++i) {
      const float x = (float)(20.0 * (random_unit() - 0.5));
      const double value = random_unit();
      r.add(x, value);
      l += exp2((double)x);
      o += exp2((double)x) * value;
    }
    CHECK_NEAR(output(r, &lse), o / l, 1e-6);
    CHECK_NEAR(lse, log(l), 1e-6);
  }
}

static void merge_is_associative_and_commutative() {
  for (int trial = 0; trial < 200; ++trial) {
    const double spread = trial % 2 ? 200.0 : 4.0;
    const row a = random_row(trial % 7, spread), b = random_row(3, spread), c = random_row(trial % 5, spread);
    double lse_left, lse_right, lse_swapped;
    const double left = output(join(join(a, b), c), &lse_left), right = output(join(a, join(b, c)), &lse_right);
    const double swapped = output(join(c, join(b, a)), &lse_swapped);
    CHECK_NEAR(left, right, 1e-6);
    CHECK_NEAR(left, swapped, 1e-6);
    CHECK_NEAR(lse_left, lse_right, 1e-6);
    CHECK_NEAR(lse_left, lse_swapped, 1e-6);
  }
}

static void the_empty_state_is_neutral() {
  const row none, some = random_row(9, 30.0);
  double lse, lse_joined;
  const double alone = output(some, &lse);
  CHECK(output(join(none, some), &lse_joined) == alone && lse_joined == lse);
  CHECK(output(join(some, none), &lse_joined) == alone && lse_joined == lse);
  CHECK(output(join(none, none), &lse_joined) == 0.0 && lse_joined == -INFINITY);
}

static void masked_keys_leave_the_empty_state_empty() {
  row r;
  for (int i = 0; i < 5; ++i) r.add(-INFINITY, 1.0);
  double lse;
  CHECK(r.s.l == 0.f);
  CHECK(output(r, &lse) == 0.0 && lse == -INFINITY);
}

static void large_logits_neither_overflow_nor_vanish() {
  double lse;
  row up, down;
  up.add(-360000.f, 1.0), up.add(360000.f, 3.0);
  CHECK_NEAR(output(up, &lse), 3.0, 1e-6);
  CHECK_NEAR(lse, 360000.0 * FLASHCORE_LN2, 1e-6);
  down.add(-360000.f, 5.0);
  CHECK_NEAR(output(down, &lse), 5.0, 1e-6);
  CHECK_NEAR(lse, -360000.0 * FLASHCORE_LN2, 1e-6);
}

static void a_sink_joins_the_denominator_only() {
  for (int trial = 0; trial < 100; ++trial) {
    const row r = random_row(6, 20.0);
    const float sink = (float)(60.0 * (random_unit() - 0.5));
    double lse;
    float with;
    const double plain = output(r, &lse), l = exp(lse);
    const float factor = softmax_finish(r.s, true, sink, false, with);
    CHECK_NEAR(r.o * factor, plain * l / (l + exp((double)sink)), 1e-5);
    CHECK_NEAR(with, log(l + exp((double)sink)), 1e-5);
  }
}

static void a_sink_alone_gives_zero_and_its_own_lse() {
  float lse;
  CHECK(softmax_finish(kEmpty, true, 1.5f, false, lse) == 0.f);
  CHECK_NEAR(lse, 1.5, 1e-6);
  CHECK(softmax_finish(kEmpty, true, -INFINITY, false, lse) == 0.f);
  CHECK(lse == -INFINITY);
}

static void base_2_is_the_same_number_in_another_unit() {
  const row r = random_row(11, 20.0);
  float natural, base2;
  CHECK(softmax_finish(r.s, false, 0.f, false, natural) == softmax_finish(r.s, false, 0.f, true, base2));
  CHECK_NEAR(natural * FLASHCORE_LOG2E, base2, 1e-6);
}

int main() {
  RUN(one_row_equals_the_softmax_written_out);
  RUN(merge_is_associative_and_commutative);
  RUN(the_empty_state_is_neutral);
  RUN(masked_keys_leave_the_empty_state_empty);
  RUN(large_logits_neither_overflow_nor_vanish);
  RUN(a_sink_joins_the_denominator_only);
  RUN(a_sink_alone_gives_zero_and_its_own_lse);
  RUN(base_2_is_the_same_number_in_another_unit);
  return check_end();
}
