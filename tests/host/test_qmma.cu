/* Demonstrates where the bytes of Q, K, P, V and O lie in the registers of the qmma kernel, in fp8 and with fp16 Q, in what units bf16 Q becomes fp16, how
 * many keys the accumulators of fp8 are good for, what is planned, and what is refused, in which words. Needs nvcc, no GPU: the instructions are emulated after the PTX manual's description.
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
template <int kDim> using mixed_wide = fc::qmma_mixed_tile_for<fc::e5m2, kDim, fc::kWide>;
template <int kDim> using mixed_narrow = fc::qmma_mixed_tile_for<fc::e5m2, kDim, fc::kNarrow>;
template <int kDim> using mixed_short = fc::qmma_mixed_tile_for<fc::e5m2, kDim, fc::kShort>;

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

/* The same with fp16 Q. Of a product m16n8k16, what element e of register x of a lane is taken for. */
static element_at a_operand_16(int lane, int x, int e) { return {lane / 4 + x % 2 * 8, lane % 4 * 2 + e + x / 2 * 8}; } /* row, k */
static element_at b_operand_16(int lane, int x, int e) { return {lane % 4 * 2 + e + x * 8, lane / 4}; }                 /* k, column */

/* Q as load_shared_8 reads it, K as ldmatrix does, widened: position k of step `step` means dim step * 16 + mixed_dim(k) in both. */
template <int kDim> static void mixed_q_meets_k() {
  using tile = fc::swizzled_tile<kDim>;
  using tile_q = fc::swizzled_tile<2 * kDim>;
  using order = fc::qmma_order;
  const memory m = swizzled<kDim>(64), m_q = swizzled<2 * kDim>(64); /* of Q, two bytes make a dim */
  for (int k = 0; k < kDim / 32; ++k)
    for (int row0 = 0; row0 < 64; row0 += 16) {
      uint32_t address[32];
      for (int lane = 0; lane < 32; ++lane)
        address[lane] = fc::qmma_along<tile>(tile::offset(row0 + lane % 8 + lane / 16 * 8, 0), 2 * k + lane / 8 % 2);
      for (int lane = 0; lane < 32; ++lane) {
        word fk[4];
        ldmatrix(m, address, false, lane, fk);
        const uint32_t q0 = tile_q::offset(row0 + lane / 4, lane % 4 / 2) + (uint32_t)(lane % 2 * 8); /* as qmma_warp::init has it */
        for (int step = 0; step < 2; ++step) {
          const uint32_t q = fc::qmma_along<tile_q>(q0, 2 * (2 * k + step));
          for (int x = 0; x < 4; ++x)
            for (int e = 0; e < 2; ++e) {
              const element_at a = a_operand_16(lane, x, e), found = m_q[q + (uint32_t)(x % 2 * 8 * 2 * kDim + x / 2 * 4 + 2 * e)];
              CHECK(found.row == row0 + a.row && found.col / 2 == k * 32 + step * 16 + order::mixed_dim(a.col) && found.col % 2 == 0);
            }
          for (int tile_of_8 = 0; tile_of_8 < 2; ++tile_of_8)
            for (int x = 0; x < 2; ++x)
              for (int e = 0; e < 2; ++e) { /* widen4: bytes 0, 1 and 2, 3 */
                const element_at b = b_operand_16(lane, x, e), found = fk[2 * tile_of_8 + step].byte[2 * x + e];
                CHECK(same(found, {row0 + tile_of_8 * 8 + b.col, k * 32 + step * 16 + order::mixed_dim(b.row)}));
              }
        }
      }
    }
}
static void mixed_q_and_k_agree_on_dims() {
  mixed_q_meets_k<64>();
  mixed_q_meets_k<128>();
  mixed_q_meets_k<256>();
  std::vector<int> seen(16);
  for (int i = 0; i < 16; ++i) ++seen[(size_t)fc::qmma_order::mixed_dim(i)];
  CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
}

/* P as packed and V as split and widened: position k of a step of 16 keys means key k in both. */
template <int kDim> static void mixed_p_meets_v() {
  using tile = fc::swizzled_tile<kDim>;
  const memory m = swizzled<kDim>(32);
  for (int c = 0; c < kDim / 16; ++c) {
    uint32_t address[32];
    for (int lane = 0; lane < 32; ++lane) address[lane] = fc::qmma_along<tile>(tile::offset(lane, 0), c);
    for (int lane = 0; lane < 32; ++lane) {
      word v[4];
      ldmatrix(m, address, true, lane, v);
      for (int step = 0; step < 2; ++step)
        for (int e = 0; e < 2; ++e) {
          for (int x = 0; x < 4; ++x) { /* word 4 step + x of P: two elements of one accumulator */
            const int word = 4 * step + x, n = word / 2, element = word % 2 * 2 + e;
            const element_at a = a_operand_16(lane, x, e);
            CHECK(fc::mma_accumulator::row(lane, element) == a.row && 8 * n + fc::mma_accumulator::col(lane, element) == 16 * step + a.col);
          }
          for (int parity = 0; parity < 2; ++parity)
            for (int x = 0; x < 2; ++x) {
              const word w = prmt(v[2 * step], v[2 * step + 1], parity ? fc::kQmmaOddDims : fc::kQmmaEvenDims);
              const element_at b = b_operand_16(lane, x, e);
              CHECK(same(w.byte[2 * x + e], {16 * step + b.row, 16 * c + fc::qmma_order::dim(b.col, parity)}));
            }
        }
    }
  }
}
static void mixed_p_and_v_agree_on_keys_and_dims() {
  mixed_p_meets_v<64>();
  mixed_p_meets_v<128>();
  mixed_p_meets_v<256>();
}

static void e5m2_is_the_upper_byte_of_f16() {
  const word x = {{{0, 0}, {0, 1}, {0, 2}, {0, 3}}}, zero = {{{1, 0}, {1, 0}, {1, 0}, {1, 0}}};
  for (int n = 0; n < 2; ++n) {
    const word halves = prmt(x, zero, n ? fc::kFp8HighHalves : fc::kFp8LowHalves);
    for (int i = 0; i < 2; ++i) CHECK(halves.byte[2 * i].row == 1 && same(halves.byte[2 * i + 1], {0, 2 * n + i}));
  }
  for (uint32_t b = 0; b < 256; ++b) {
    const double as_f16 = flashcore_decode(FLASHCORE_F16, b << 8), as_fp8 = flashcore_decode(FLASHCORE_E5M2, b);
    CHECK(as_f16 == as_fp8 || (as_f16 != as_f16 && as_fp8 != as_fp8));
  }
}

/* Every exponent of bf16, and its largest mantissa: what scales a row and what undoes it are finite and inverse; every element of at least 2^-29 of the
 * row's largest becomes the same number in fp16, and smaller ones are off by 2^-39 of the largest at most. */
static void bf16_rows_fit_f16_in_their_units() {
  for (uint32_t bits = 1; bits < 0x7f80; bits += bits % 0x80 == 0 ? 0x7f : 1) {
    const float largest = (float)flashcore_decode(FLASHCORE_BF16, bits);
    const fc::qmma_unit u = fc::qmma_unit_of(largest);
    if (!CHECK(u.unit * u.inverse == 1.f && largest * u.inverse < 32768.f && (largest * u.inverse >= 16384.f || bits < 15 << 7))) return;
    for (uint32_t down = 0; down < 45 && down << 7 < bits; ++down) {
      const float x = (float)flashcore_decode(FLASHCORE_BF16, bits - (down << 7));
      const double f16 = flashcore_decode(FLASHCORE_F16, flashcore_encode(FLASHCORE_F16, x * u.inverse)) * u.unit;
      if (!CHECK(down <= 29 && bits >= 15 << 7 ? f16 == x : fabs(f16 - x) <= ldexp(largest, -39))) return;
    }
  }
  const fc::qmma_unit zero = fc::qmma_unit_of(0.f), infinity = fc::qmma_unit_of(INFINITY);
  CHECK(zero.unit * zero.inverse == 1.f && infinity.unit * infinity.inverse == 1.f);
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
  CHECK(fits<mixed_wide<64>>(mixed_wide<64>::kBlocksPerSm));
  CHECK(fits<mixed_wide<128>>(mixed_wide<128>::kBlocksPerSm));
  CHECK(fits<mixed_wide<256>>(mixed_wide<256>::kBlocksPerSm));
  CHECK(fits<mixed_narrow<64>>(mixed_narrow<64>::kBlocksPerSm));
  CHECK(fits<mixed_narrow<128>>(mixed_narrow<128>::kBlocksPerSm));
  CHECK(fits<mixed_narrow<256>>(mixed_narrow<256>::kBlocksPerSm));
  CHECK(fits<mixed_short<64>>(mixed_short<64>::kBlocksPerSm));
  CHECK(fits<mixed_short<128>>(mixed_short<128>::kBlocksPerSm));
  CHECK(fits<mixed_short<256>>(mixed_short<256>::kBlocksPerSm));
}

static void plans_name_the_kernel_and_its_tile() {
  const struct {
    int dim, seq, heads, dtype, dtype_kv, softcap;
    const char *kernel;
  } cases[] = {
      {64, 4096, 32, FLASHCORE_E4M3, 0, 0, "qmma e4m3 d64 q128 kv64"},
      {16, 100, 2, FLASHCORE_E5M2, 0, 0, "qmma e5m2 d64 q64 kv64"},
      {128, 4096, 16, FLASHCORE_E5M2, 0, 0, "qmma e5m2 d128 q128 kv64"},
      {80, 100, 2, FLASHCORE_E4M3, 0, 0, "qmma e4m3 d128 q64 kv64"},
      {256, 4096, 8, FLASHCORE_E4M3, 0, 0, "qmma e4m3 d256 q128 kv64"},
      {144, 100, 2, FLASHCORE_E4M3, 0, 0, "qmma e4m3 d256 q64 kv32"},
      {128, 4096, 16, FLASHCORE_E4M3, 0, 1, "qmma e4m3 d128 q64 kv64 general"},
      {64, 4096, 32, FLASHCORE_F16, FLASHCORE_E4M3, 0, "qmma f16/e4m3 d64 q128 kv64"},
      {128, 4096, 16, FLASHCORE_BF16, FLASHCORE_E5M2, 0, "qmma bf16/e5m2 d128 q128 kv32"},
      {80, 100, 2, FLASHCORE_F16, FLASHCORE_E5M2, 0, "qmma f16/e5m2 d128 q64 kv64"},
      {256, 4096, 8, FLASHCORE_BF16, FLASHCORE_E4M3, 0, "qmma bf16/e4m3 d256 q128 kv32"},
      {256, 100, 2, FLASHCORE_F16, FLASHCORE_E4M3, 1, "qmma f16/e4m3 d256 q64 kv32 general"},
      {64, 16, 2, FLASHCORE_BF16, FLASHCORE_E4M3, 0, "qmma bf16/e4m3 d64 q16 kv256"},
      {96, 1, 2, FLASHCORE_F16, FLASHCORE_E5M2, 0, "qmma f16/e5m2 d128 q16 kv128"},
      {256, 17, 2, FLASHCORE_F16, FLASHCORE_E4M3, 0, "qmma f16/e4m3 d256 q64 kv32"},
      {256, 16, 2, FLASHCORE_F16, FLASHCORE_E4M3, 1, "qmma f16/e4m3 d256 q16 kv64 general"},
  };
  for (const auto &x : cases) {
    flashcore_attention a = fp8(x.dim, x.seq, x.heads);
    flashcore_plan plan = {};
    flashcore_error error = {};
    a.dtype = x.dtype, a.dtype_kv = x.dtype_kv, a.softcap = (float)x.softcap;
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
  a.dtype = FLASHCORE_F16, a.dtype_kv = FLASHCORE_E4M3, a.seq_q = 2;
  CHECK(plan_on(89, a, FLASHCORE_BACKEND_QMMA, &plan, nullptr) == FLASHCORE_OK && plan.d.packed_group == 8 && plan.d.grid == 2 * 2);
  CHECK(plan.d.block_q == 16 && plan.d.threads == 128);
}

static void any_16_byte_strides_are_served() {
  flashcore_attention a = fp8(64, 100);
  flashcore_plan plan;
  a.k.stride_s = a.v.stride_s = -128, a.q.stride_b = 0, a.k.stride_h = (int64_t)1 << 40, a.o.stride_h = 72, a.o.stride_s = 2 * 72;
  CHECK(plan_on(89, a, FLASHCORE_BACKEND_QMMA, &plan, nullptr) == FLASHCORE_OK);
}

static void types(flashcore_attention &a, int32_t q, int32_t kv, int32_t o) { a.dtype = q, a.dtype_kv = kv, a.dtype_o = o; }
static void mixed_rows_of_q_may_be_8_elements_apart() {
  flashcore_attention a = fp8(64, 100);
  flashcore_plan plan;
  types(a, FLASHCORE_BF16, FLASHCORE_E4M3, 0);
  a.q.stride_h = 72, a.q.stride_s = 2 * 72;
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
    {"fp32 beside fp8", [](flashcore_attention &a) { types(a, FLASHCORE_F32, FLASHCORE_E4M3, FLASHCORE_F16); }, 89, FLASHCORE_UNSUPPORTED_DTYPE,
     "dtype", FLASHCORE_F32, FLASHCORE_E4M3},
    {"fp16 beside bf16", [](flashcore_attention &a) { types(a, FLASHCORE_F16, FLASHCORE_BF16, 0); }, 89, FLASHCORE_UNSUPPORTED_DTYPE, "dtype",
     FLASHCORE_F16, FLASHCORE_E4M3},
    {"mixed, O of fp32", [](flashcore_attention &a) { types(a, FLASHCORE_F16, FLASHCORE_E4M3, FLASHCORE_F32); }, 89, FLASHCORE_UNSUPPORTED_DTYPE,
     "dtype_o", FLASHCORE_F32, FLASHCORE_BF16},
    {"mixed, stride of Q",
     [](flashcore_attention &a) {
       types(a, FLASHCORE_F16, FLASHCORE_E4M3, 0);
       a.q.stride_s += 4;
     },
     89, FLASHCORE_UNSUPPORTED_FEATURE, "q", 2 * 64 + 4, 8},
    {"mixed, rows of Q far apart",
     [](flashcore_attention &a) {
       types(a, FLASHCORE_F16, FLASHCORE_E4M3, 0);
       a.q.stride_s = (int64_t)1 << 30;
     },
     89, FLASHCORE_UNSUPPORTED_FEATURE, "q", (int64_t)1 << 30, INT32_MAX / 2},
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

/* What AUTO answers on a GPU with an L4's memory. */
static flashcore_status auto_on(int32_t arch, const flashcore_attention &a, flashcore_plan *plan, flashcore_error *error) {
  const flashcore_device device = {0, arch, 58, 100 * 1024};
  const flashcore_backend_ops *ops;
  flashcore_attention resolved;
  flashcore_resolve(&a, &resolved);
  return flashcore_plan_auto(&resolved, &device, plan, &ops, error);
}
static void auto_finds_it_and_refuses_in_its_words() {
  flashcore_attention a = fp8(64, 129);
  flashcore_plan plan;
  flashcore_error error = {};
  for (const int32_t q : {FLASHCORE_E4M3, FLASHCORE_F16, FLASHCORE_BF16}) {
    types(a, q, FLASHCORE_E4M3, 0);
    CHECK(auto_on(89, a, &plan, &error) == FLASHCORE_OK && plan.d.backend == FLASHCORE_BACKEND_QMMA);
    CHECK(auto_on(80, a, &plan, &error) == FLASHCORE_UNSUPPORTED_ARCH && error.limit == 89 && strstr(error.message, "the qmma kernel"));
    a.k.stride_s += 8;
    CHECK(auto_on(89, a, &plan, &error) == FLASHCORE_UNSUPPORTED_FEATURE && !strcmp(error.field, "k") && strstr(error.message, "the qmma kernel"));
    a.k.stride_s -= 8;
  }
  types(a, FLASHCORE_F32, FLASHCORE_E4M3, FLASHCORE_F16); /* no backend's types: the words are SIMT's */
  CHECK(auto_on(89, a, &plan, &error) == FLASHCORE_UNSUPPORTED_DTYPE && !strcmp(error.field, "dtype_kv") && strstr(error.message, "the simt kernel"));
}

int main() {
  RUN(operands_of_s_lie_where_the_product_wants_them);
  RUN(p_and_v_agree_on_keys_and_dims);
  RUN(the_order_of_keys_is_a_permutation);
  RUN(mixed_q_and_k_agree_on_dims);
  RUN(mixed_p_and_v_agree_on_keys_and_dims);
  RUN(e5m2_is_the_upper_byte_of_f16);
  RUN(bf16_rows_fit_f16_in_their_units);
  RUN(stores_are_16_bytes_of_dims_in_order);
  RUN(model_of_14_bits_repeats_what_was_measured);
  RUN(every_tile_promotes_often_enough_even_with_12_bits);
  RUN(lse_of_sums_over_32_dims_is_right);
  RUN(as_many_blocks_as_registers_allow_fit_the_shared_memory_of_an_l4);
  RUN(plans_name_the_kernel_and_its_tile);
  RUN(heads_of_a_group_share_a_tile);
  RUN(any_16_byte_strides_are_served);
  RUN(mixed_rows_of_q_may_be_8_elements_apart);
  RUN(refusals_name_the_field_and_the_kernel);
  RUN(auto_finds_it_and_refuses_in_its_words);
  return check_end();
}
