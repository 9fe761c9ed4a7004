/* Demonstrates where the bytes of Q, K, P, V and O lie in the registers of the qmma kernel, how many keys its accumulators are good for, what it plans
 * and what it refuses, in which words. Needs nvcc, no GPU: the instructions are emulated after the PTX manual's description.
 *   nvcc -std=c++17 -arch=compute_89 -I<repository> tests/host/test_qmma.cu */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore_fp8.cuh"

#include "check.h"
#include "plan.h"

#include <algorithm>
#include <random>
#include <vector>

namespace fc = flashcore;
template <int kDim> using wide = fc::qmma_tile_for<fc::e4m3, kDim, fc::kWide>;
template <int kDim> using narrow = fc::qmma_tile_for<fc::e4m3, kDim, fc::kNarrow>;

/* ---- fragments ------------------------------------------------------------------------------------------------------------------ */

/* A warp's registers: of each lane, words of four one-byte elements, each a (row, column) of the matrix that it came from. */
struct element_at {
  int row, col;
};
struct word {
  element_at byte[4];
};
using memory = std::vector<element_at>; /* of shared memory, byte by byte */

/* Rows of kRowBytes one-byte elements, as tile_loader lays them out. */
template <int kRowBytes> static memory swizzled(int rows) {
  memory m((size_t)(rows * kRowBytes));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kRowBytes; ++c) m[fc::swizzled_tile<kRowBytes>::offset(r, c / 16) + (size_t)(c % 16)] = {r, c};
  return m;
}

/* ldmatrix: lane i gives the address of row i % 8 of matrix i / 8; word j of lane (g, t) is row g, 16-bit columns 2t, 2t + 1, of matrix j; transposed,
 * rows 2t, 2t + 1 of column g. */
static void ldmatrix(const memory &m, const uint32_t (&address)[32], bool transposed, int lane, word (&r)[4]) {
  const int g = lane / 4, t = lane % 4;
  for (int j = 0; j < 4; ++j)
    for (int b = 0; b < 4; ++b) {
      const int row = transposed ? 2 * t + b / 2 : g, column = transposed ? g : 2 * t + b / 2;
      r[j].byte[b] = m[address[8 * j + row] + (uint32_t)(2 * column + b % 2)];
    }
}

static word prmt(const word &a, const word &b, uint32_t selector) {
  word r;
  for (int i = 0; i < 4; ++i) {
    const int from = (int)(selector >> (4 * i)) & 7;
    r.byte[i] = from < 4 ? a.byte[from] : b.byte[from - 4];
  }
  return r;
}

/* What mma.m16n8k32 takes byte `b` of register x of a lane for. */
static element_at a_operand(int lane, int x, int b) { return {lane / 4 + x % 2 * 8, lane % 4 * 4 + b + x / 2 * 16}; } /* row, k */
static element_at b_operand(int lane, int x, int b) { return {lane % 4 * 4 + b + x * 16, lane / 4}; }                 /* k, column */

static bool same(const element_at &x, const element_at &y) { return x.row == y.row && x.col == y.col; }

template <int kDim> static void q_and_k_are_operands() {
  using tile = fc::swizzled_tile<kDim>;
  const memory m = swizzled<kDim>(64);
  uint32_t q[32], k[32];
  for (int step = 0; step < kDim / 32; ++step)
    for (int row0 = 0; row0 < 64; row0 += 16) {
      for (int lane = 0; lane < 32; ++lane) { /* as mma_warp::init and along have it */
        q[lane] = fc::qmma_along<tile>(tile::offset(row0 + lane % 16, 0), 2 * step + lane / 16);
        k[lane] = fc::qmma_along<tile>(tile::offset(row0 + lane % 8 + lane / 16 * 8, 0), 2 * step + lane / 8 % 2);
      }
      for (int lane = 0; lane < 32; ++lane) {
        word fq[4], fk[4];
        ldmatrix(m, q, false, lane, fq);
        ldmatrix(m, k, false, lane, fk);
        for (int x = 0; x < 4; ++x)
          for (int b = 0; b < 4; ++b) {
            const element_at a = a_operand(lane, x, b), key = b_operand(lane, x % 2, b); /* registers 0, 1: keys 0-7; 2, 3: keys 8-15 */
            CHECK(same(fq[x].byte[b], {row0 + a.row, step * 32 + a.col}));
            CHECK(same(fk[x].byte[b], {row0 + x / 2 * 8 + key.col, step * 32 + key.row}));
          }
      }
    }
}

/* S's accumulators, packed, against the words of V, split: position k of the product means the same key in both, and columns are the dims that they
 * should be. */
template <int kDim> static void p_meets_v() {
  using tile = fc::swizzled_tile<kDim>;
  using order = fc::qmma_order;
  const memory m = swizzled<kDim>(64);
  for (int key0 = 0; key0 < 64; key0 += 32)
    for (int c = 0; c < kDim / 16; ++c) {
      uint32_t address[32];
      for (int lane = 0; lane < 32; ++lane) address[lane] = fc::qmma_along<tile>(tile::offset(lane, 0), c) + (uint32_t)(key0 * kDim);
      for (int lane = 0; lane < 32; ++lane) {
        word v[4];
        ldmatrix(m, address, true, lane, v);
        for (int x = 0; x < 4; ++x)
          for (int b = 0; b < 4; ++b) {
            const element_at a = a_operand(lane, x, b);
            const int n = order::p_tile(x, b), e = order::p_element(x, b);
            CHECK(fc::mma_accumulator::row(lane, e) == a.row);
            CHECK(8 * n + fc::mma_accumulator::col(lane, e) == order::key(a.col));
          }
        for (int parity = 0; parity < 2; ++parity)
          for (int x = 0; x < 2; ++x) {
            const word w = prmt(v[2 * x], v[2 * x + 1], parity ? fc::kQmmaOddDims : fc::kQmmaEvenDims);
            for (int b = 0; b < 4; ++b) {
              const element_at k = b_operand(lane, x, b);
              CHECK(same(w.byte[b], {key0 + order::key(k.row), 16 * c + order::dim(k.col, parity)}));
            }
          }
      }
    }
}

static void operands_of_s_lie_where_the_product_wants_them() {
  q_and_k_are_operands<64>();
  q_and_k_are_operands<128>();
  q_and_k_are_operands<256>();
}
static void p_and_v_agree_on_keys_and_dims() {
  p_meets_v<64>();
  p_meets_v<128>();
  p_meets_v<256>();
}
static void the_order_of_keys_is_a_permutation() {
  std::vector<int> seen(32);
  for (int i = 0; i < 32; ++i) ++seen[(size_t)fc::qmma_order::key(i)];
  CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
}

/* qmma_warp::store: 32 dims of a row in four lanes, each with four words; after the exchange each lane holds 8 dims in order, at its column. */
static void stores_are_16_bytes_of_dims_in_order() {
  int words[4][4][2]; /* lane t, word j, half: a dim */
  for (int t = 0; t < 4; ++t)
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half) /* pack2 of elements j % 2 of the even and of the odd accumulator of chunk j / 2 */
        words[t][j][half] = j / 2 * 16 + fc::qmma_order::dim(fc::mma_accumulator::col(t, j % 2), half);
  for (int t = 0; t < 4; ++t) {
    const bool is_odd = t % 2;
    const int(&other)[4][2] = words[t ^ 1], (&mine)[4][2] = words[t];
    const int *given[2] = {is_odd ? other[2] : other[0], is_odd ? other[3] : other[1]}; /* what the other lane gives, seen from there */
    const int *chunk[4] = {is_odd ? given[0] : mine[0], is_odd ? given[1] : mine[1], is_odd ? mine[2] : given[0], is_odd ? mine[3] : given[1]};
    const int column = t % 2 * 16 + t / 2 * 8;
    for (int d = 0; d < 8; ++d) CHECK(chunk[d / 2][d % 2] == column + d);
  }
}

/* ---- accumulators --------------------------------------------------------------------------------------------------------------- */

/* A product of fp8 tensor cores: sum and terms are cut off, toward zero, so many bits below the leading bit of the largest among them. */
static double product(double sum, const double *terms, int count, int bits) {
  double largest = fabs(sum);
  for (int i = 0; i < count; ++i) largest = std::max(largest, fabs(terms[i]));
  int exponent;
  frexp(largest, &exponent);
  const double unit = ldexp(1.0, exponent - bits);
  double result = trunc(sum / unit) * unit;
  for (int i = 0; i < count; ++i) result += trunc(terms[i] / unit) * unit;
  return (float)result;
}
static double to_e4m3(double x) { return flashcore_decode(FLASHCORE_E4M3, flashcore_encode(FLASHCORE_E4M3, x)); }

/* Relative error (in norm, over some rows) of O with V of one sign, |normal| + 0.5, after 16384 keys of normal logits, if O's products are added up in
 * fp32 after every `keys`. */
static double error_of(int keys, int bits) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  double error = 0, norm = 0;
  for (int row = 0; row < 16; ++row) {
    std::vector<double> s(16384), v(s.size());
    for (double &x : s) x = normal(random);
    for (double &x : v) x = to_e4m3(fabs(normal(random)) + 0.5);
    const double m = *std::max_element(s.begin(), s.end());
    double l = 0, exact = 0, part = 0;
    float o = 0;
    for (size_t j = 0; j < s.size(); j += 32) {
      double terms[32];
      for (size_t i = 0; i < 32; ++i) {
        const double p = 256 * exp(s[j + i] - m);
        l += p;
        exact += p * v[j + i];
        terms[i] = to_e4m3(p) * v[j + i];
      }
      part = product(part, terms, 32, bits);
      if ((j + 32) % (size_t)keys == 0) o += (float)part, part = 0;
    }
    const double difference = (o + part - exact) / l;
    error += difference * difference;
    norm += exact / l * (exact / l);
  }
  return sqrt(error / norm);
}

/* On a Hopper GPU's fp8 tensor cores: 0.25 without promotion, 3.4e-2 every 2048 keys, 1.5e-2, 6.3e-3, and 2.5e-3 every 256. */
static void model_of_14_bits_repeats_what_was_measured() {
  const double measured[] = {2.5e-3, 6.3e-3, 1.5e-2, 3.4e-2};
  for (int i = 0; i < 4; ++i) CHECK_NEAR(error_of(256 << i, 14) / measured[i], 1.0, 0.15);
  CHECK_NEAR(error_of(16384, 14) / 0.25, 1.0, 0.15);
}

template <typename Tile> static void promotes_often_enough() {
  if (!CHECK(error_of(Tile::kStep, 14) < 1e-3 && error_of(Tile::kStep, 12) < 1e-2))
    printf("  every %d keys: %.2e, with 12 bits %.2e\n", Tile::kStep, error_of(Tile::kStep, 14), error_of(Tile::kStep, 12));
}
static void every_tile_promotes_often_enough_even_with_12_bits() {
  promotes_often_enough<wide<64>>();
  promotes_often_enough<wide<128>>();
  promotes_often_enough<wide<256>>();
  promotes_often_enough<narrow<64>>();
  promotes_often_enough<narrow<128>>();
  promotes_often_enough<narrow<256>>();
  CHECK(error_of(256, 14) < 1e-2); /* as qmma_tile allows at most */
}

/* The largest error of the LSE of 512 keys, over 32 rows, over what it may be; logits of that standard deviation, S added up in fp32 after every
 * `every` dims. */
static double lse_error_of(size_t dims, double deviation, size_t every) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal(0, sqrt(deviation));
  double worst = 0;
  std::vector<double> k(512 * dims), q(dims);
  for (double &x : k) x = to_e4m3(normal(random));
  for (int row = 0; row < 32; ++row) {
    double l = 0, l_low = 0, largest = 0;
    for (double &x : q) x = to_e4m3(normal(random));
    for (size_t j = 0; j < 512; ++j) {
      double s = 0, part = 0;
      float s_low = 0;
      for (size_t d = 0; d < dims; d += 32) {
        double terms[32];
        for (size_t i = 0; i < 32; ++i) s += terms[i] = q[d + i] * k[j * dims + d + i];
        part = product(part, terms, 32, 14);
        if ((d + 32) % every == 0) s_low += (float)part, part = 0;
      }
      const double scale = 1 / sqrt((double)dims);
      l += exp(s * scale), l_low += exp(s_low * scale);
      largest = std::max(largest, fabs(s * scale));
    }
    worst = std::max(worst, fabs(log(l_low) - log(l)) / (2e-3 + ldexp(largest, -13)));
  }
  return worst;
}

static void lse_of_sums_over_32_dims_is_right() {
  for (const size_t dims : {64, 128, 256})
    for (const double deviation : {1.0, 4.0, 9.0, 16.0}) {
      const double error = lse_error_of(dims, deviation, 32);
      if (!CHECK(error < 0.5)) printf("  %d dims, deviation %g: %.2f\n", (int)dims, deviation, error);
    }
  CHECK(lse_error_of(256, 9, 256) > 1.5); /* one sum would not do */
  CHECK(lse_error_of(256, 1, 256) < 0.1); /* but for ordinary logits */
}

/* ---- plans ---------------------------------------------------------------------------------------------------------------------- */

static flashcore_attention fp8(int32_t dim, int32_t seq, int32_t heads = 2) {
  flashcore_attention a = sized(2, heads, heads, seq, seq, dim);
  a.dtype = FLASHCORE_E4M3;
  return a;
}

/* Of an SM's 100 KiB, 1 is gone for each block; a block may have 99. */
template <typename Tile> static bool fits(int blocks) {
  const int bytes = Tile::kSharedBytes + (int)sizeof(fc::mma_shared<Tile>);
  return bytes <= 99 * 1024 && blocks * (bytes + 1024) <= 100 * 1024;
}
static void as_many_blocks_as_registers_allow_fit_the_shared_memory_of_an_l4() {
  CHECK(fits<wide<64>>(wide<64>::kBlocksPerSm));
  CHECK(fits<wide<128>>(wide<128>::kBlocksPerSm));
  CHECK(fits<wide<256>>(wide<256>::kBlocksPerSm));
  CHECK(fits<narrow<64>>(narrow<64>::kBlocksPerSm));
  CHECK(fits<narrow<128>>(narrow<128>::kBlocksPerSm));
  CHECK(fits<narrow<256>>(narrow<256>::kBlocksPerSm));
}

static void plans_name_the_kernel_and_its_tile() {
  const struct {
    int dim, seq, heads, dtype, softcap;
    const char *kernel;
  } cases[] = {
      {64, 4096, 32, FLASHCORE_E4M3, 0, "qmma e4m3 d64 q128 kv64"},          {16, 100, 2, FLASHCORE_E5M2, 0, "qmma e5m2 d64 q64 kv64"},
      {128, 4096, 16, FLASHCORE_E5M2, 0, "qmma e5m2 d128 q128 kv64"},        {80, 100, 2, FLASHCORE_E4M3, 0, "qmma e4m3 d128 q64 kv64"},
      {256, 4096, 8, FLASHCORE_E4M3, 0, "qmma e4m3 d256 q128 kv64"},         {144, 100, 2, FLASHCORE_E4M3, 0, "qmma e4m3 d256 q64 kv32"},
      {128, 4096, 16, FLASHCORE_E4M3, 1, "qmma e4m3 d128 q64 kv64 general"},
  };
  for (const auto &x : cases) {
    flashcore_attention a = fp8(x.dim, x.seq, x.heads);
    flashcore_plan plan = {};
    flashcore_error error = {};
    a.dtype = x.dtype, a.softcap = (float)x.softcap;
    if (!CHECK(plan_on(89, a, FLASHCORE_BACKEND_QMMA, &plan, &error) == FLASHCORE_OK)) printf("  %s\n", error.message);
    if (!CHECK(!strcmp(plan.d.kernel, x.kernel))) printf("  %s, not %s\n", plan.d.kernel, x.kernel);
    CHECK(plan.kernel && plan.d.backend == FLASHCORE_BACKEND_QMMA && plan.d.shared_bytes <= 98 * 1024);
    CHECK(plan.d.grid == (int64_t)(x.seq + plan.d.block_q - 1) / plan.d.block_q * x.heads * a.batch);
  }
}

static void heads_of_a_group_share_a_tile() {
  flashcore_attention a = fp8(128, 5, 16);
  flashcore_plan plan;
  a.heads_kv = 2;
  CHECK(plan_on(89, a, FLASHCORE_BACKEND_QMMA, &plan, nullptr) == FLASHCORE_OK && plan.d.packed_group == 8 && plan.d.grid == 2 * 2);
}

static void any_16_byte_strides_are_served() {
  flashcore_attention a = fp8(64, 100);
  flashcore_plan plan;
  a.k.stride_s = a.v.stride_s = -128, a.q.stride_b = 0, a.k.stride_h = (int64_t)1 << 40, a.o.stride_h = 72, a.o.stride_s = 2 * 72;
  CHECK(plan_on(89, a, FLASHCORE_BACKEND_QMMA, &plan, nullptr) == FLASHCORE_OK);
}

static void page(flashcore_attention &a) {
  static int32_t table[100];
  a.page_table = table, a.page_size = 2, a.num_pages = 2;
}

static const refusal refusals[] = {
    {"fp16", [](flashcore_attention &a) { a.dtype = FLASHCORE_F16; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", FLASHCORE_F16, FLASHCORE_E4M3},
    {"K and V of another type", [](flashcore_attention &a) { a.dtype_kv = FLASHCORE_E5M2; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_kv",
     FLASHCORE_E5M2, FLASHCORE_E4M3},
    {"O of fp8", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_E4M3; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", FLASHCORE_E4M3,
     FLASHCORE_BF16},
    {"O of fp32", [](flashcore_attention &a) { a.dtype_o = FLASHCORE_F32; }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", FLASHCORE_F32,
     FLASHCORE_BF16},
    {"Ampere", [](flashcore_attention &) {}, 86, FLASHCORE_UNSUPPORTED_ARCH, "device", 86, 89},
    {"an arch without code", [](flashcore_attention &) {}, 120, FLASHCORE_BACKEND_NOT_COMPILED, "device", 120, 89},
    {"pages", page, 89, FLASHCORE_UNSUPPORTED_FEATURE, "page_table", 1, 0},
    {"num_splits", [](flashcore_attention &a) { a.num_splits = 3; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits", 3, 1},
    {"split_len", [](flashcore_attention &a) { a.split_len = 64; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "split_len", 64, 0},
    {"dim 40", [](flashcore_attention &a) { a.dim_qk = 40; }, 89, FLASHCORE_UNSUPPORTED_DIM, "dim_qk", 40, 16},
    {"dim 272", [](flashcore_attention &a) { a.dim_v = 272; }, 89, FLASHCORE_UNSUPPORTED_DIM, "dim_v", 272, 256},
    {"address", [](flashcore_attention &a) { a.v.data = (void *)4104; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "v", 4104, 16},
    {"stride of K", [](flashcore_attention &a) { a.k.stride_s += 8; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "k", 2 * 64 + 8, 16},
    {"stride of O", [](flashcore_attention &a) { a.o.stride_s += 4; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "o", 2 * 64 + 4, 8},
    {"rows far apart", [](flashcore_attention &a) { a.k.stride_s = (int64_t)1 << 31; }, 89, FLASHCORE_UNSUPPORTED_FEATURE, "k", (int64_t)1 << 31,
     INT32_MAX},
    {"a grid too large",
     [](flashcore_attention &a) {
       a.batch = 1 << 20, a.heads_q = a.heads_kv = 1 << 10;
       a.q.stride_b = a.k.stride_b = a.v.stride_b = a.o.stride_b = (int64_t)1 << 20;
     },
     89, FLASHCORE_INVALID_SIZE, "batch", 1 << 20, INT32_MAX / (2 << 10)},
};
static void refusals_name_the_field_and_the_kernel() {
  for (const refusal &x : refusals) check_refusal(x, fp8(64, 129), FLASHCORE_BACKEND_QMMA);
}

int main() {
  RUN(operands_of_s_lie_where_the_product_wants_them);
  RUN(p_and_v_agree_on_keys_and_dims);
  RUN(the_order_of_keys_is_a_permutation);
  RUN(stores_are_16_bytes_of_dims_in_order);
  RUN(model_of_14_bits_repeats_what_was_measured);
  RUN(every_tile_promotes_often_enough_even_with_12_bits);
  RUN(lse_of_sums_over_32_dims_is_right);
  RUN(as_many_blocks_as_registers_allow_fit_the_shared_memory_of_an_l4);
  RUN(plans_name_the_kernel_and_its_tile);
  RUN(heads_of_a_group_share_a_tile);
  RUN(any_16_byte_strides_are_served);
  RUN(refusals_name_the_field_and_the_kernel);
  return check_end();
}
