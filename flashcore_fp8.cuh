/* flashcore_fp8.cuh · FlashCore 0.1.0 · MIT licence · fp8: quantisers, and attention on the fp8 tensor cores of Ada (sm_89) and Hopper (sm_90a)
 *
 * Use:  #include this, after those of flashcore_wmma.cuh and flashcore_wgmma.cuh whose backends shall be in the same file, in one of the files that
 *       define FLASHCORE_IMPLEMENTATION (quantisers and attention) or FLASHCORE_BACKEND_IMPLEMENTATION (attention), compiled for sm_89, sm_90a
 *       (both FLASHCORE_NO_E4M3 and FLASHCORE_NO_E5M2: quantisers alone):
 *         nvcc -gencode arch=compute_89,code=sm_89 -gencode arch=compute_90a,code=sm_90a ...
 *       Callers, C or C++, include it for the declarations. From fp16, fp32 or bf16 tensors to attention, q.dtype_out = FLASHCORE_E4M3:
 *
 *   flashcore_fp8_quantise_args x;
 *   flashcore_fp8_quantise_init(&x);
 *   x.dtype = FLASHCORE_F16;  x.batch = 2;  x.rows = 512;  x.heads = 8;  x.dim = 64;
 *   x.x = flashcore_bshd(q16, 512, 8, 64);  x.out = flashcore_bshd(q8, 512, 8, 64);  x.descale = q_scales;     (2 * 8 floats)
 *   flashcore_fp8_quantise(&x, stream, &why);                                                                  (the same for K and V)
 *   a.dtype = FLASHCORE_E4M3;  a.q_descale.data = q_scales;  a.q_descale.stride_b = 8;  a.q_descale.stride_h = 1;   ...
 *   flashcore_forward(&a, stream, &why);                                                                       (O is bf16 unless dtype_o says so)
 *
 * Contents                                                       backend   element type         dims (smaller multiples of 16 are padded)   from
 *   1  C API of the quantisers
 *   2  fp8 on the device; quantiser kernels                      -         f32, f16, bf16 in    multiples of 16 up to 512                   sm_75
 *   3  mma.sync: fp8 products, and fp16 ones of fp8 K and V      QMMA      e4m3, e5m2; or Q:    64, 128, 256                                sm_89,
 *   4  mma.sync: one struct describes one kernel                           f16, bf16; O: f16,                                               CUDA 12.4
 *   5  mma.sync: one warp's rows                                           bf16
 *   6  mma.sync: kernel
 *   7  wgmma: fp8 products                                       QGMMA     e4m3, e5m2           64, 128, 256                                sm_90a
 *   8  wgmma: one struct describes one kernel                              O: the same, f16, bf16
 *   9  wgmma: the producer and the transposers
 *  10  wgmma: the consumers' mainloop                            not served: O in fp32, page tables, key splits, addresses and strides that are no
 *  11  wgmma: kernel                                             multiples of 16 bytes; QGMMA: negative strides, K and V without keys
 *  12  wgmma: 16-bit Q beside fp8 K and V                        QGMMA     Q: f16, bf16         64, 128, 256                                sm_90a
 *  13  quantisers: validation, launch, CPU reference                       K, V: e4m3, e5m2
 *  14  attention: plan and launch                                          O: f16, bf16         Q, O: as WGMMA; K, V: of whole 16 bytes
 *
 *   option, in the implementing file           what it does
 *   FLASHCORE_FP8_FAST                         QGMMA in the fast mode (qgmma_mode) instead of the accurate one; needs CUDA 12.4
 *   FLASHCORE_NO_E4M3, _NO_E5M2                leave that type's attention out
 *   FLASHCORE_NO_F32, _NO_F16, _NO_BF16        leave the quantisers of that type out, and attention with Q of that type
 *
 * The algorithm is that of flashcore_wmma.cuh and flashcore_wgmma.cuh, whose work lists, rings and rules are shared, but for what fp8 changes:
 *   V      fp8 products want both operands K-major. mma.sync: its bytes are sorted on the way from shared memory to registers. wgmma: TMA brings V as
 *          it is, and three warps beside the producer transpose it within shared memory
 *   p      rounded to e4m3, whatever V is. m follows the row's maximum, so that its largest p is 2^8 exactly: where few keys matter, the rounding of
 *          the largest p would be the error
 *   o      the tensor cores keep some 14 bits of a sum. It is taken over few keys and added up in f32: mma.sync in registers after every step, wgmma
 *          in shared memory after every 512 keys
 *   scale  descales of Q and K join c, that of V the division by l; what is stored of an fp8 O has been multiplied with 1 / o_descale
 * Mixed, which is fp16 or bf16 Q beside fp8 K and V (a cache), is exact where fp8 is not: mma.sync gets K and V as fp16, which holds them all, and P as
 * fp16. bf16 Q becomes fp16 too, each row in units of a power of two, so that one kernel serves both.
 *
 * Barrier ledger. mma.sync: as in flashcore_wmma.cuh, two stages; where warps share rows, __syncthreads before bf16 Q is changed and after, and at the
 * end, when K and V were read and when each warp's part of O lies where they were.
 * wgmma: beside that of flashcore_wgmma.cuh, where the producer is the planner too:
 *   barrier               arrivals per phase         who waits           parity in round i   what it hands over
 *   raw_full[st]          the producer + its bytes   the transposers     i & 1               a block of V has landed
 *   raw_free[st]          1 per transposing warp     the producer        (i & 1) ^ 1         it was read
 *   v_full[st]            1 per transposing warp     all consumer warps  i & 1               a block of V is there, transposed
 *   v_free[st]            1 per consumer warp        the transposers     (i & 1) ^ 1         it was read
 * Beside 16-bit Q, three warps widen K and V (wgmma_mixed_converter):
 *   k_full, v_full[st]    1 per batch of rows        all consumer warps  i & 1               a block of K or V is there, widened
 *   k_free, v_free[st]    1 per consumer warp        the converters      (i & 1) ^ 1         it was read                                      */
#ifndef FLASHCORE_FP8_CUH
#define FLASHCORE_FP8_CUH
#include "flashcore.h"

/* ================================================================================================================================
 * 1  C API of the quantisers
 * ================================================================================================================================
 * stored = x * (1 / descale), reciprocal and product in fp32, rounded to nearest even; what is too large, infinity included, becomes the largest number
 * (448 or 57344); NaN stays NaN. descale = amax / largest, amax over the finite values, but at least 2^-60: a tensor of zeros has a scale too.
 * Before that, on request: K without its mean over the rows, and Q and K rotated by blocks of a Hadamard matrix (orthogonal: Q K^T does not feel it),
 * which spreads what one dim has too much of over its block.
 * K without its mean moves all logits of a row by scale * q . mean. Softmax does not feel it, but all that compares logits with something else does: the
 * LSE lacks it, so that parts of the keys with means of their own do not merge, and softcap and sinks give another result. */

#if defined(FLASHCORE_PREFIX)
#define flashcore_fp8_quantise           FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_fp8_quantise)
#define flashcore_fp8_quantise_reference FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_fp8_quantise_reference)
#endif

/* How many values share a scale, and how `descale` lies in memory. */
typedef enum flashcore_fp8_granularity {
  FLASHCORE_FP8_PER_HEAD = 0,   /* (batch, heads): as flashcore_attention takes them */
  FLASHCORE_FP8_PER_TENSOR = 1, /* one: likewise, with strides 0 */
  FLASHCORE_FP8_PER_BLOCK = 2,  /* (batch, heads, rows / block_rows): for kernels of your own, flashcore_attention has no place for them */
  FLASHCORE_FP8_GIVEN = 3       /* `scale`, which the host knows; stored to one float where descale is not NULL */
} flashcore_fp8_granularity;

/* One tensor to quantise. Set up with flashcore_fp8_quantise_init, then fill by name. Device pointers (host pointers for the reference). */
typedef struct flashcore_fp8_quantise_args {
  size_t struct_size;              /* set by flashcore_fp8_quantise_init */
  int32_t dtype, dtype_out;        /* F32, F16 or BF16; E4M3 (default) or E5M2 */
  int32_t batch, rows, heads, dim; /* dim: a multiple of 16 up to 512 */
  flashcore_tensor x, out;         /* 16-byte aligned, strides too; packed sequences are one batch entry. Outputs overlap nothing else */
  const int32_t *seqlens;          /* rows in use per batch entry, the rest is neither read nor written; NULL: all */
  int32_t granularity, block_rows; /* flashcore_fp8_granularity; rows per scale for PER_BLOCK, must divide `rows` */
  float scale;                     /* for GIVEN: 2^-126 to 2^126 */
  float *descale;                  /* the scales: x = stored * descale */
  float *mean;                     /* (batch, heads, dim), 16-byte aligned: receives the means over the rows (of finite values), which are
                                    * subtracted: not with softcap, sinks or an LSE that is looked at. NULL: they are not */
  int32_t rotation;                /* size of the Hadamard blocks, a power of two from 16 on that divides dim; 0: no rotation */
  int32_t transposed;              /* 1: out is (batch, heads, dim, rows), as kernels of your own may want V; flashcore_attention wants it as it is.
                                    * out.stride_s is then from dim to dim, rows are contiguous; block_rows a multiple of 16 */
} flashcore_fp8_quantise_args;

#if !defined(__CUDACC_RTC__) && (!defined(FLASHCORE_STATIC) || defined(FLASHCORE_IMPLEMENTATION))

static inline void flashcore_fp8_quantise_init(flashcore_fp8_quantise_args *q) {
  memset(q, 0, sizeof *q);
  q->struct_size = sizeof *q;
  q->dtype_out = FLASHCORE_E4M3;
}

/* Quantise. Asynchronous on `stream`: one kernel for PER_BLOCK and GIVEN, else one that takes amax before it, and with `mean` one more.
 * Conditions, errors and threads: as for flashcore_forward. Compiled, like the reference, where FLASHCORE_IMPLEMENTATION is defined. */
FLASHCORE_API flashcore_status flashcore_fp8_quantise(const flashcore_fp8_quantise_args *q, flashcore_stream stream, flashcore_error *error);

/* The same on the CPU, bit for bit. */
FLASHCORE_API flashcore_status flashcore_fp8_quantise_reference(const flashcore_fp8_quantise_args *q, flashcore_error *error);
#endif

/* x / y, whatever -use_fast_math says. */
FLASHCORE_INLINE float flashcore_fp8_divide(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}
/* The scale for values up to amax. */
#define FLASHCORE_FP8_LEAST_AMAX 8.67361738e-19f /* 2^-60 */
FLASHCORE_INLINE float flashcore_fp8_descale(float amax, int32_t dtype) {
  return flashcore_fp8_divide(amax > FLASHCORE_FP8_LEAST_AMAX ? amax : FLASHCORE_FP8_LEAST_AMAX, dtype == FLASHCORE_E4M3 ? 448.f : 57344.f);
}
/* The mean of `count` values with that sum; 0 of none, and where the sum is past fp32. */
FLASHCORE_INLINE float flashcore_fp8_mean(float sum, int32_t count) {
  return count > 0 && fabsf(sum) < INFINITY ? flashcore_fp8_divide(sum, (float)count) : 0.f;
}
/* What makes a Hadamard matrix of that size orthogonal. */
FLASHCORE_INLINE float flashcore_fp8_unit(int32_t rotation) { return rotation ? (float)(1.0 / sqrt((double)rotation)) : 1.f; }
/* Scales of a head: PER_BLOCK has one per block. */
FLASHCORE_INLINE int32_t flashcore_fp8_blocks(const flashcore_fp8_quantise_args *q) {
  return q->granularity == FLASHCORE_FP8_PER_BLOCK ? q->rows / q->block_rows : 1;
}
/* Rows in use of batch entry b. */
FLASHCORE_INLINE int32_t flashcore_fp8_rows(const flashcore_fp8_quantise_args *q, int32_t b) {
  return q->seqlens ? flashcore_clamp(q->seqlens[b], 0, q->rows) : q->rows;
}
#define FLASHCORE_FP8_MEAN_LANES 64 /* a mean is added up in so many parts: rows r, r + 64, ..., and these in pairs, neighbours first */

#if defined(__CUDACC__)
/* The building blocks of the other headers, without their backends. */
#if !defined(__CUDACC_RTC__)
#if !defined(FLASHCORE_WMMA_CUH)
#define FLASHCORE_WMMA_PARTS_ONLY
#endif
#if !defined(FLASHCORE_WGMMA_CUH)
#define FLASHCORE_WGMMA_PARTS_ONLY
#endif
#pragma push_macro("FLASHCORE_IMPLEMENTATION")
#pragma push_macro("FLASHCORE_BACKEND_IMPLEMENTATION")
#undef FLASHCORE_IMPLEMENTATION
#undef FLASHCORE_BACKEND_IMPLEMENTATION
#endif
#include "flashcore_wgmma.cuh"
#include "flashcore_wmma.cuh"
#if !defined(__CUDACC_RTC__)
#pragma pop_macro("FLASHCORE_BACKEND_IMPLEMENTATION")
#pragma pop_macro("FLASHCORE_IMPLEMENTATION")
#endif

/* Does this arch convert to fp8 in one instruction? Always 0 or 1. sm_89 has it from PTX 8.1, CUDA 12.1 on. */
#if defined(__CUDA_ARCH__)
#define FLASHCORE_HAS_FP8_CVT (__CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ == 890 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201))
#else
#define FLASHCORE_HAS_FP8_CVT 0
#endif

/* Are there fp8 products by mma.sync? Always defined, 0 or 1 (0 in the host pass). sm_89 has them from PTX 8.4, CUDA 12.4 on. */
#define FLASHCORE_QMMA_COMPILER (__CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204)
#if defined(__CUDA_ARCH__)
#define FLASHCORE_HAS_QMMA (__CUDA_ARCH__ >= 890 && FLASHCORE_QMMA_COMPILER)
#else
#define FLASHCORE_HAS_QMMA 0
#endif

namespace flashcore {
inline namespace v0_1_0 {

/* ================================================================================================================================
 * 2  fp8 on the device; quantiser kernels
 * ================================================================================================================================ */

/* Element types that are nothing but their name. */
struct e4m3 {
  static constexpr int kDtype = FLASHCORE_E4M3;
};
struct e5m2 {
  static constexpr int kDtype = FLASHCORE_E5M2;
};
template <> struct element<e4m3> : e4m3 {};
template <> struct element<e5m2> : e5m2 {};

/* The nearest fp8 number, ties to even, saturating; NaN: 0x7f. In integer arithmetic, on any side. */
template <typename F8> FLASHCORE_INLINE uint32_t fp8_encode(float x) {
  constexpr bool kE4m3 = F8::kDtype == FLASHCORE_E4M3;
  constexpr int kMantissa = kE4m3 ? 3 : 2, kLeastExponent = kE4m3 ? -6 : -14; /* of a normal number */
  constexpr uint32_t kLargest = kE4m3 ? 0x7e : 0x7b, kDropped = 23 - kMantissa;
  union {
    float value;
    uint32_t bits;
  } u = {x}, magic;
  const uint32_t sign = u.bits >> 24 & 0x80, size = u.bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7f;
  uint32_t rounded;
  if (size < (uint32_t)(127 + kLeastExponent) << 23) { /* subnormal: the last place of `magic` is the step between them */
    magic.bits = (uint32_t)(127 + 23 + kLeastExponent - kMantissa) << 23;
    const uint32_t zero = magic.bits;
    u.bits = size;
    magic.value += u.value;
    rounded = magic.bits - zero;
  } else rounded = ((size + (1u << (kDropped - 1)) - 1 + (size >> kDropped & 1)) >> kDropped) - ((uint32_t)(126 + kLeastExponent) << kMantissa);
  return sign | (rounded < kLargest ? rounded : kLargest);
}

/* Four floats rounded to fp8, a in the lowest byte.   ptx  cvt.rn.satfinite.{e4m3x2,e5m2x2}.f32, sm_89, PTX 8.1 (sm_90: 7.8); below: integers */
template <typename F8> FLASHCORE_DEVICE uint32_t pack4(float a, float b, float c, float d) {
#if FLASHCORE_HAS_FP8_CVT
  uint32_t r;
  if constexpr (F8::kDtype == FLASHCORE_E4M3)
    asm("{\n\t.reg .b16 l, h;\n\tcvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\n\tcvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n\tmov.b32 %0, {l, h};\n\t}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  else
    asm("{\n\t.reg .b16 l, h;\n\tcvt.rn.satfinite.e5m2x2.f32 l, %2, %1;\n\tcvt.rn.satfinite.e5m2x2.f32 h, %4, %3;\n\tmov.b32 %0, {l, h};\n\t}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
#else
  return fp8_encode<F8>(a) | fp8_encode<F8>(b) << 8 | fp8_encode<F8>(c) << 16 | fp8_encode<F8>(d) << 24;
#endif
}

/* Selectors of prmt: bytes 0, 1 and 2, 3 of a word as the upper bytes of two halves. */
static constexpr uint32_t kFp8LowHalves = 0x1404, kFp8HighHalves = 0x3424;

#if FLASHCORE_HAS_FP8_CVT || !defined(__CUDA_ARCH__)
/* Four fp8 numbers as f16, exact; NaN and infinity stay.   ptx  cvt.rn.f16x2.e4m3x2, sm_89, PTX 8.1 (sm_90: 7.8); e5m2 is f16's upper byte */
template <typename F8> FLASHCORE_DEVICE void widen4(uint32_t x, uint32_t &low, uint32_t &high) {
  if constexpr (F8::kDtype == FLASHCORE_E4M3)
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, l;\n\tcvt.rn.f16x2.e4m3x2 %1, h;\n\t}"
        : "=r"(low), "=r"(high)
        : "r"(x));
  else {
    low = __byte_perm(x, 0, kFp8LowHalves);
    high = __byte_perm(x, 0, kFp8HighHalves);
  }
}
#endif

/* A head's factor for what is stored; 1 where there is none, NaN where it is negative. */
FLASHCORE_DEVICE float fp8_descale(const flashcore_descale &d, int32_t batch, int32_t head) {
  const float x = d.data ? d.data[batch * d.stride_b + head * d.stride_h] : 1.f;
  return x >= 0.f ? x : __int_as_float(0x7fc00000);
}
/* A factor of products, as a normal number: 0 * -inf would make a masked key NaN. What is negative, or NaN, gives NaN. */
FLASHCORE_DEVICE float fp8_normal(float x) { return x >= 0.f ? fminf(fmaxf(x, 1.1754944e-38f), 3.402823466e+38f) : __int_as_float(0x7fc00000); }

/* Quantiser kernels. A thread works on pieces of 16 dims of a row. A tile is whole rows of one head, kPieces pieces for each thread of a block, which
 * asks for all of them before it uses the first.
 *   quantise_mean_kernel     a block per 64 bytes of a head's rows: means over all of its rows, in an order that the reference follows
 *   quantise_amax_kernel     a tile: the scale that it wants; the largest goes to `descale` (scales are positive: they compare as integers do)
 *   quantise_kernel          PER_BLOCK: the scale of block_rows rows, then these to fp8, the last tile from registers, the others read again;
 *                            else a tile, whose scale is there
 * Each kernel goes through the rows the other way than the one before: it starts with what L2 still holds. */
struct quantise_tile {
  static constexpr int kPiece = 16, kPieces = 4, kThreads = 128, kBlocksPerSm = 4; /* 64 KiB of 16-bit elements on their way to an SM */
  static constexpr int kMeanThreads = 256, kMeanColumns = kMeanThreads / FLASHCORE_FP8_MEAN_LANES, kMeanLoads = 8;
};

/* How rows fall on blocks of threads: heads fastest, since their rows are often neighbours in memory, then batch, then rows. */
struct quantise_plan {
  divisor heads, units;    /* units: heads * batch */
  divisor pieces;          /* in a row */
  divisor tile;            /* rows */
  divisor strips;          /* of 16 rows in a tile: transposed alone */
  int32_t block_rows;      /* rows of a block of threads */
  int32_t step;            /* rows that its threads take at once, a piece each */
  int32_t threads, blocks; /* blocks: of threads, per head */
  int32_t backwards;       /* 1: last rows first */
  float unit;              /* 1 / sqrt(rotation) */
};
FLASHCORE_INLINE quantise_plan make_quantise_plan(const flashcore_fp8_quantise_args &q, bool backwards) {
  const bool own_rows = q.granularity == FLASHCORE_FP8_PER_BLOCK;
  const int32_t pieces = q.dim / quantise_tile::kPiece, rows = own_rows ? q.block_rows : q.rows;
  const int32_t whole = q.transposed ? 16 / quantise_tile::kPieces : 1; /* the step is a multiple of it: a transposed tile is whole strips */
  const int32_t most = quantise_tile::kThreads / pieces / whole * whole, enough = ((rows - 1) / (quantise_tile::kPieces * whole) + 1) * whole;
  quantise_plan p;
  p.step = enough < most ? enough : most;
  p.heads = make_divisor(q.heads);
  p.units = make_divisor(q.heads * q.batch);
  p.pieces = make_divisor(pieces);
  p.tile = make_divisor(p.step * quantise_tile::kPieces);
  p.strips = make_divisor(p.tile.d < 16 ? 1 : p.tile.d / 16);
  p.block_rows = own_rows ? rows : p.tile.d;
  p.threads = (p.step * pieces + 31) / 32 * 32;
  p.blocks = (q.rows - 1) / p.block_rows + 1;
  p.backwards = backwards;
  p.unit = flashcore_fp8_unit(q.rotation);
  return p;
}

/* What a thread works on: the piece at `dim` of rows row, row + step, ... of its block's rows. */
struct quantise_share {
  int32_t batch, head, block; /* block: of rows, within the head */
  int32_t row0, rows;         /* the block's first row, and how many are in use */
  int32_t row, dim;           /* a thread too many has a row past all others */
};
FLASHCORE_DEVICE quantise_share quantise_share_of(const flashcore_fp8_quantise_args &q, const quantise_plan &p) {
  const int32_t index = (int32_t)(p.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x), thread = (int32_t)threadIdx.x;
  quantise_share s;
  s.block = p.units.quotient(index);
  const int32_t unit = index - s.block * p.units.d;
  s.batch = p.heads.quotient(unit);
  s.head = unit - s.batch * q.heads;
  s.row0 = s.block * p.block_rows;
  s.rows = max(0, min(flashcore_fp8_rows(&q, s.batch) - s.row0, p.block_rows));
  s.row = p.pieces.quotient(thread);
  s.dim = (thread - s.row * p.pieces.d) * quantise_tile::kPiece;
  if (s.row >= p.step) s.row = 1 << 30;
  return s;
}

/* 16 bytes of elements as fp32. */
template <typename T> FLASHCORE_DEVICE void quantise_unpack(const uint4 &words, float *x) {
  T values[16 / sizeof(T)];
  memcpy(values, &words, 16);
#pragma unroll
  for (int i = 0; i < 16 / (int)sizeof(T); ++i) x[i] = element<T>::load(values[i]);
}
FLASHCORE_DEVICE void quantise_subtract(const float *mean, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 m = __ldg(reinterpret_cast<const float4 *>(mean + i));
    x[i] -= m.x, x[i + 1] -= m.y, x[i + 2] -= m.z, x[i + 3] -= m.w;
  }
}
/* x becomes x H unit, H the Hadamard matrix of size block, whose blocks span block / 16 neighbouring lanes.   callers  a warp, converged */
FLASHCORE_DEVICE void quantise_rotate(float (&x)[16], int32_t block, float unit) {
#pragma unroll
  for (int h = 1; h < 16; h *= 2)
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (!(i & h)) {
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
  for (int lanes = 1; lanes < block / 16; lanes *= 2) {
    const float sign = threadIdx.x & lanes ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xffffffffu, x[i], lanes));
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] *= unit;
}

using quantise_values = float[quantise_tile::kPieces][16];

/* The thread's pieces of the tile at row `first` of the block, as they will be rounded; zeros past the last row.   callers  a warp, converged */
template <typename T>
FLASHCORE_DEVICE void quantise_read(const flashcore_fp8_quantise_args &q, const quantise_plan &p, const quantise_share &s, int32_t first,
                                    quantise_values &x) {
  constexpr int kLoads = (int)sizeof(T), kPerLoad = 16 / kLoads, kPieces = quantise_tile::kPieces;
  const T *const base = static_cast<const T *>(q.x.data) + s.batch * q.x.stride_b + s.head * q.x.stride_h + s.dim;
  uint4 words[kPieces][kLoads];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int32_t row = first + s.row + k * p.step;
    const bool live = row < s.rows;
    const uint4 *const from = reinterpret_cast<const uint4 *>(base + (live ? s.row0 + row : 0) * q.x.stride_s);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[k][i] = live ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) quantise_unpack<T>(words[k][i], x[k] + i * kPerLoad);
    if (q.mean && first + s.row + k * p.step < s.rows) quantise_subtract(q.mean + ((int64_t)s.batch * q.heads + s.head) * q.dim + s.dim, x[k]);
    if (q.rotation) quantise_rotate(x[k], q.rotation, p.unit);
  }
}

/* The largest finite size among them. fmaxf knows no NaN; infinities are rare enough for a second look. */
FLASHCORE_DEVICE float quantise_largest(const quantise_values &x) {
  float all = 0.f, finite = 0.f;
#pragma unroll
  for (int i = 0; i < quantise_tile::kPieces * 16; ++i) all = fmaxf(all, fabsf(x[i / 16][i % 16]));
  if (all < INFINITY) return all;
#pragma unroll
  for (int i = 0; i < quantise_tile::kPieces * 16; ++i)
    if (fabsf(x[i / 16][i % 16]) < INFINITY) finite = fmaxf(finite, fabsf(x[i / 16][i % 16]));
  return finite;
}
/* The scale that the block's rows want, in all threads. x: the last tile.   callers  the block, once */
template <typename T>
FLASHCORE_DEVICE float quantise_scale(const flashcore_fp8_quantise_args &q, const quantise_plan &p, const quantise_share &s, quantise_values &x) {
  __shared__ float of_warp[quantise_tile::kThreads / 32];
  float amax = 0.f;
  for (int32_t first = 0; first < s.rows; first += p.tile.d) {
    quantise_read<T>(q, p, s, first, x);
    amax = fmaxf(amax, quantise_largest(x));
  }
  amax = warp_max(amax);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < quantise_tile::kThreads / 32; ++warp) amax = fmaxf(amax, warp < p.threads / 32 ? of_warp[warp] : 0.f);
  return flashcore_fp8_descale(amax, q.dtype_out);
}
/* Where the scale of the rows lies. */
FLASHCORE_DEVICE int64_t quantise_scale_index(const flashcore_fp8_quantise_args &q, const quantise_plan &p, const quantise_share &s) {
  if (q.granularity == FLASHCORE_FP8_PER_TENSOR || q.granularity == FLASHCORE_FP8_GIVEN) return 0;
  const int64_t unit = (int64_t)s.batch * q.heads + s.head;
  return q.granularity == FLASHCORE_FP8_PER_HEAD ? unit : unit * p.blocks + s.block;
}

template <typename F8> FLASHCORE_DEVICE uint4 quantise_pack(const float (&x)[16], float factor) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack4<F8>(x[4 * i] * factor, x[4 * i + 1] * factor, x[4 * i + 2] * factor, x[4 * i + 3] * factor);
  return make_uint4(words[0], words[1], words[2], words[3]);
}
/* Rows of a tile to `out`, as rows. */
FLASHCORE_DEVICE void quantise_store(const flashcore_fp8_quantise_args &q, const quantise_plan &p, const quantise_share &s, int32_t first,
                                     const uint4 (&pieces)[quantise_tile::kPieces]) {
  uint8_t *const out = static_cast<uint8_t *>(q.out.data) + s.batch * q.out.stride_b + s.head * q.out.stride_h + s.dim;
#pragma unroll
  for (int k = 0; k < quantise_tile::kPieces; ++k) {
    const int32_t row = first + s.row + k * p.step;
    if (row < s.rows) *reinterpret_cast<uint4 *>(out + (s.row0 + row) * q.out.stride_s) = pieces[k];
  }
}

/* Byte i of word j becomes byte j of word i. */
FLASHCORE_DEVICE void quantise_transpose_bytes(uint32_t (&x)[4]) {
  const uint32_t a = __byte_perm(x[0], x[1], 0x5140), b = __byte_perm(x[2], x[3], 0x5140); /* bytes 0 and 1 of both */
  const uint32_t c = __byte_perm(x[0], x[1], 0x7362), d = __byte_perm(x[2], x[3], 0x7362); /* bytes 2 and 3 */
  x[0] = __byte_perm(a, b, 0x5410), x[1] = __byte_perm(a, b, 0x7632), x[2] = __byte_perm(c, d, 0x5410), x[3] = __byte_perm(c, d, 0x7632);
}
/* Rows of a tile to `out`, transposed through shared memory: a thread reads four dims of a strip of 16 rows, and writes 16 bytes for each dim; threads
 * next to each other have strips next to each other. Rows are a word longer than their bytes, which spreads a warp's words over the banks.
 *   callers  the block; all its tiles start at multiples of 16 rows */
FLASHCORE_DEVICE void quantise_store_transposed(const flashcore_fp8_quantise_args &q, const quantise_plan &p, const quantise_share &s, int32_t first,
                                                const uint4 (&pieces)[quantise_tile::kPieces], uint32_t *tile) {
  const int pitch = q.dim / 4 + 1;
  __syncthreads(); /* the tile before is on its way */
#pragma unroll
  for (int k = 0; k < quantise_tile::kPieces; ++k)
    if (s.row < p.step) {
      uint32_t *const to = tile + (s.row + k * p.step) * pitch + s.dim / 4;
      to[0] = pieces[k].x, to[1] = pieces[k].y, to[2] = pieces[k].z, to[3] = pieces[k].w;
    }
  __syncthreads();
  uint8_t *const out = static_cast<uint8_t *>(q.out.data) + s.batch * q.out.stride_b + s.head * q.out.stride_h + s.row0 + first;
  for (int i = (int)threadIdx.x; i < q.dim / 4 * p.strips.d; i += (int)blockDim.x) {
    const int quad = p.strips.quotient(i), strip = i - quad * p.strips.d, live = s.rows - first - 16 * strip;
    const uint32_t *const from = tile + 16 * strip * pitch + quad;
    uint8_t *const to = out + 4 * quad * q.out.stride_s + 16 * strip;
    if (live >= 16) {
      uint32_t words[4][4]; /* of four rows each; then of four dims, whose bytes are rows */
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int row = 0; row < 4; ++row) words[n][row] = from[(4 * n + row) * pitch];
        quantise_transpose_bytes(words[n]);
      }
#pragma unroll
      for (int d = 0; d < 4; ++d)
        *reinterpret_cast<uint4 *>(to + d * q.out.stride_s) = make_uint4(words[0][d], words[1][d], words[2][d], words[3][d]);
    } else {
      for (int row = 0; row < live; ++row)
#pragma unroll
        for (int d = 0; d < 4; ++d) to[d * q.out.stride_s + row] = (uint8_t)(from[row * pitch] >> 8 * d);
    }
  }
}

/* A thread's rows of a head, dims dim and on: their sum for each dim. kSkips: of finite values alone; what it leaves out, it counts. */
template <typename T, bool kSkips>
FLASHCORE_DEVICE void quantise_sum(const T *x, int64_t stride, int32_t row, int32_t rows, float (&sum)[16 / sizeof(T)], int32_t *skipped) {
  constexpr int kLanes = FLASHCORE_FP8_MEAN_LANES, kLoads = kSkips ? 1 : quantise_tile::kMeanLoads, kPerLoad = 16 / (int)sizeof(T);
#pragma unroll
  for (float &of_dim : sum) of_dim = 0.f;
  for (; row < rows; row += kLoads * kLanes) {
    uint4 words[kLoads];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int32_t at = row + n * kLanes;
      words[n] = at < rows ? __ldg(reinterpret_cast<const uint4 *>(x + at * stride)) : make_uint4(0, 0, 0, 0); /* to add 0 changes no sum */
    }
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      float values[kPerLoad];
      quantise_unpack<T>(words[n], values);
#pragma unroll
      for (int i = 0; i < kPerLoad; ++i)
        if (!kSkips || fabsf(values[i]) < INFINITY) sum[i] += values[i];
        else atomicAdd(skipped + i, 1);
    }
  }
}
/* callers  heads * batch * ceil(dim bytes / 64) blocks of quantise_tile::kMeanThreads */
template <typename T>
FLASHCORE_KERNEL void __launch_bounds__(quantise_tile::kMeanThreads, quantise_tile::kBlocksPerSm)
    quantise_mean_kernel(const __grid_constant__ flashcore_fp8_quantise_args q) {
  constexpr int kColumns = quantise_tile::kMeanColumns, kPerLoad = 16 / (int)sizeof(T), kDims = kColumns * kPerLoad;
  constexpr int kWarps = quantise_tile::kMeanThreads / 32;
  __shared__ float part[kWarps][kDims];
  __shared__ int32_t skipped[kDims];
  const int slices = (q.dim + kDims - 1) / kDims, unit = (int)blockIdx.x / slices, b = unit / q.heads, head = unit % q.heads;
  const int thread = (int)threadIdx.x, lane = thread / kColumns, d = thread % kColumns * kPerLoad, dim0 = (int)blockIdx.x % slices * kDims;
  const int rows = flashcore_fp8_rows(&q, b), live_rows = dim0 + d < q.dim ? rows : 0;
  const T *const x = static_cast<const T *>(q.x.data) + b * q.x.stride_b + head * q.x.stride_h + dim0 + d;
  if (thread < kDims) skipped[thread] = 0;
  __syncthreads();
  float sum[kPerLoad];
  quantise_sum<T, false>(x, q.x.stride_s, lane, live_rows, sum, skipped + d);
  bool finite = true; /* as long as the sums are, nothing was to be skipped */
#pragma unroll
  for (int i = 0; i < kPerLoad; ++i) finite = finite && fabsf(sum[i]) < INFINITY;
  if (!finite) quantise_sum<T, true>(x, q.x.stride_s, lane, live_rows, sum, skipped + d);
#pragma unroll
  for (int i = 0; i < kPerLoad; ++i) {
#pragma unroll
    for (int lanes = kColumns; lanes < 32; lanes *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], lanes);
    if (thread % 32 < kColumns) part[thread / 32][d + i] = sum[i];
  }
  __syncthreads();
  if (thread >= kDims || dim0 + thread >= q.dim) return;
  float of_warp[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) of_warp[w] = part[w][thread];
#pragma unroll
  for (int step = 1; step < kWarps; step *= 2)
#pragma unroll
    for (int w = 0; w < kWarps; w += 2 * step) of_warp[w] += of_warp[w + step];
  q.mean[(int64_t)unit * q.dim + dim0 + thread] = flashcore_fp8_mean(of_warp[0], rows - skipped[thread]);
}
/* callers  heads * batch * plan.blocks blocks of plan.threads; `descale` is zero before */
template <typename T>
FLASHCORE_KERNEL void __launch_bounds__(quantise_tile::kThreads, quantise_tile::kBlocksPerSm)
    quantise_amax_kernel(const __grid_constant__ flashcore_fp8_quantise_args q, const __grid_constant__ quantise_plan plan) {
  const quantise_share s = quantise_share_of(q, plan);
  quantise_values x;
  const float descale = quantise_scale<T>(q, plan, s, x);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<int *>(q.descale) + quantise_scale_index(q, plan, s), __float_as_int(descale));
}
/* callers  heads * batch * plan.blocks blocks of plan.threads; kTransposed: as q.transposed */
template <typename T, bool kTransposed>
FLASHCORE_KERNEL void __launch_bounds__(quantise_tile::kThreads, quantise_tile::kBlocksPerSm)
    quantise_kernel(const __grid_constant__ flashcore_fp8_quantise_args q, const __grid_constant__ quantise_plan plan) {
  const quantise_share s = quantise_share_of(q, plan);
  const bool own_scale = q.granularity == FLASHCORE_FP8_PER_BLOCK, given = q.granularity == FLASHCORE_FP8_GIVEN;
  quantise_values x;
  float descale = q.scale;
  if (own_scale) descale = quantise_scale<T>(q, plan, s, x);
  else if (!given) descale = q.descale[quantise_scale_index(q, plan, s)];
  if (threadIdx.x == 0 && (own_scale || (given && blockIdx.x == 0 && q.descale))) q.descale[quantise_scale_index(q, plan, s)] = descale;
  const float factor = flashcore_fp8_divide(1.f, descale);
  const int32_t last = plan.tile.quotient(max(s.rows - 1, 0)) * plan.tile.d;
  for (int32_t first = last; first >= 0; first -= plan.tile.d) {
    if (!own_scale || first < last) quantise_read<T>(q, plan, s, first, x);
    uint4 pieces[quantise_tile::kPieces];
#pragma unroll
    for (int k = 0; k < quantise_tile::kPieces; ++k)
      pieces[k] = q.dtype_out == FLASHCORE_E4M3 ? quantise_pack<e4m3>(x[k], factor) : quantise_pack<e5m2>(x[k], factor);
    if constexpr (kTransposed) {
      __shared__ uint32_t tile[quantise_tile::kThreads * quantise_tile::kPieces * 5]; /* rows of 16 dims are the longest, with their word more */
      quantise_store_transposed(q, plan, s, first, pieces, tile);
    } else quantise_store(q, plan, s, first, pieces);
  }
}

/* ================================================================================================================================
 * 3  mma.sync: fp8 products
 * ================================================================================================================================
 * To ldmatrix, two neighbouring fp8 elements are one of 16 bits, and the fragments of Q and K are those of a 16-bit matrix of pairs (section 6 of
 * flashcore.h). V comes transposed, as a matrix whose elements are pairs of dims; its bytes are sorted by dim in registers.
 *
 *   m16n8k32: lane L, g = L / 4, t = L % 4      A 16x32, four bytes each:      k 4t..4t+3   k 16+4t..       B 32x8:                n g
 *                                                                      row g   [  a0           a2 ]            k 4t..4t+3     [ b0 ]
 *                                                                      row g+8 [  a1           a3 ]            k 16+4t..      [ b1 ]
 * A product over keys does not ask in which order they come. Position 4t + 2b + e of each 16 holds key 8b + 2t + e: then a lane's accumulators of S
 * are the bytes of A that it has to supply (qmma_pack_p), and its words of transposed V hold the bytes of B (qmma_split_dims).
 *
 *   ldmatrix.trans, lane (g, t)    byte 0              1            2              3
 *     matrix b: keys 8b .. 8b+7    key 8b+2t, dim 2g   same, 2g+1   key 8b+2t+1, dim 2g   same, 2g+1
 * So of 16 dims the even ones are columns of one product, the odd ones of the next: column n of product x is dim 2n + x.
 *
 * With fp16 Q the same words of K and V become fp16 on the way to m16n8k16 (fragments: section 6 of flashcore.h), two words each. Of K's, dims 4t and
 * 4t + 1 are where the product has positions 2t, 2t + 1, and dims 4t + 2, 4t + 3 at 2t + 8, 2t + 9: a lane then wants 8 bytes of Q side by side. Of V's,
 * split by dim, keys 2t, 2t + 1 are at positions 2t, 2t + 1, and keys 8 + 2t, 9 + 2t at 2t + 8, 2t + 9: in order, as the accumulators of S have them. */

/* Where things lie, for the kernel and its tests. x: which of two column tiles of 8 (or of P: which of four registers). */
struct qmma_order {
  static FLASHCORE_MEMBER int key(int position) { return position / 16 * 16 + position % 4 / 2 * 8 + position % 16 / 4 * 2 + position % 2; }
  static FLASHCORE_MEMBER int mixed_dim(int position) { /* of Q and K, where Q is fp16 */
    return position / 16 * 16 + position % 8 / 2 * 4 + position % 16 / 8 * 2 + position % 2;
  }
  static FLASHCORE_MEMBER int dim(int column, int x) { return 2 * column + x; }
  /* The accumulators of S, of 32 keys in four column tiles, that become byte `byte` of A's register x: their column tile and element. */
  static FLASHCORE_MEMBER int p_tile(int x, int byte) { return x / 2 * 2 + byte / 2; }
  static FLASHCORE_MEMBER int p_element(int x, int byte) { return x % 2 * 2 + byte % 2; }
};

/* Address of chunk c of a row, from that of chunk 0: an exclusive or within a swizzle span (row starts leave its bits 0), a constant beyond. */
template <typename SwizzledTile> FLASHCORE_INLINE uint32_t qmma_along(uint32_t address, int c) {
  constexpr int kSpan = SwizzledTile::kSpan;
  return (address ^ (uint32_t)(c % kSpan * 16)) + (uint32_t)(c / kSpan * kSpan * 16);
}

/* Powers of two, one the inverse of the other, for a row of bf16 whose largest element has that size: times `inverse`, it lies in [2^14, 2^15). */
struct qmma_unit {
  float unit, inverse;
};
FLASHCORE_INLINE qmma_unit qmma_unit_of(float largest) {
  union {
    float value;
    uint32_t bits;
  } size = {largest}, unit, inverse;
  const uint32_t exponent = size.bits >> 23 > 15 ? size.bits >> 23 : 15; /* biased; less would be out of range, and fits as it is */
  unit.bits = (exponent - 14) << 23;
  inverse.bits = (268 - exponent) << 23;
  return {unit.value, inverse.value};
}

/* Selectors of prmt. Bytes 0, 2 and 1, 3 of two words of transposed V: two keys of each, of dim 2g and of dim 2g + 1. */
static constexpr uint32_t kQmmaEvenDims = 0x6420, kQmmaOddDims = 0x7531;

#if FLASHCORE_HAS_QMMA || !defined(__CUDA_ARCH__)

/* d += a b, f32 accumulators of which about 14 bits take part in each sum. P, of type e4m3, meets V of either type.
 *   ptx      mma.sync.aligned.m16n8k32.row.col.f32.{e4m3,e5m2}.{e4m3,e5m2}.f32, sm_89, PTX 8.4; on sm_90 and sm_100 made of 16-bit products
 *   callers  all 32 lanes, converged */
template <typename A, typename B> FLASHCORE_DEVICE void qmma_m16n8k32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FLASHCORE_QMMA(a_type, b_type)                                                                                                               \
  asm("mma.sync.aligned.m16n8k32.row.col.f32." a_type "." b_type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (A::kDtype == FLASHCORE_E5M2) FLASHCORE_QMMA("e5m2", "e5m2");
  else if constexpr (B::kDtype == FLASHCORE_E5M2) FLASHCORE_QMMA("e4m3", "e5m2");
  else FLASHCORE_QMMA("e4m3", "e4m3");
#undef FLASHCORE_QMMA
}

/* 8 or 16 bytes, aligned to that, from shared memory or into it.   ptx  ld.shared.v2.b32, ld.shared.v4.b32, st.shared.v4.b32 */
FLASHCORE_DEVICE void load_shared_8(uint32_t &x, uint32_t &y, uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x), "=r"(y) : "r"(address) : "memory");
}
FLASHCORE_DEVICE void load_shared_16(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
FLASHCORE_DEVICE void store_shared_16(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

/* The smaller of the two; NaN if one is NaN.   ptx  min.NaN.f32, sm_80, PTX 7.0 */
FLASHCORE_DEVICE float qmma_min(float x, float y) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}

/* The B operands of 32 keys by 16 dims from four words of transposed V (keys 0-7, 8-15, 16-23, 24-31): even dims, odd dims. */
FLASHCORE_DEVICE void qmma_split_dims(const uint32_t (&v)[4], uint32_t (&even)[2], uint32_t (&odd)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    even[i] = __byte_perm(v[2 * i], v[2 * i + 1], kQmmaEvenDims);
    odd[i] = __byte_perm(v[2 * i], v[2 * i + 1], kQmmaOddDims);
  }
}

/* The A operand of 32 keys from their four accumulators. */
FLASHCORE_DEVICE void qmma_pack_p(const float (&s)[4][4], uint32_t (&p)[4]) {
  using order = qmma_order;
#pragma unroll
  for (int x = 0; x < 4; ++x)
    p[x] = pack4<e4m3>(s[order::p_tile(x, 0)][order::p_element(x, 0)], s[order::p_tile(x, 1)][order::p_element(x, 1)],
                       s[order::p_tile(x, 2)][order::p_element(x, 2)], s[order::p_tile(x, 3)][order::p_element(x, 3)]);
}

/* What a kernel multiplies with, 32 dims or keys at a time: A of Q or P, kWords registers, by B of K or V, half as many. Here all are fp8.
 *   kTop     log2 of a row's largest p: the largest power of two that P's type holds, or less by as much as a reference may be too low
 *   kCap     no p is larger than 2^kCap; what is, because a large reference was rounded down, becomes that
 *   kUsual   references up to here are exact enough to go without the cap */
template <typename TQ, typename T> struct qmma_products {
  static constexpr int kWords = 4;
  static constexpr float kTop = 8.f, kCap = 8.f, kUsual = 1024.f; /* at 1024 the largest p is off by 2^-13 at most, and rounds to 2^kTop */

  static __forceinline__ __device__ void operand(uint32_t (&b)[kWords / 2], uint32_t x0, uint32_t x1) { b[0] = x0, b[1] = x1; }
  static __forceinline__ __device__ void q_by_k(float (&d)[4], const uint32_t (&q)[kWords], const uint32_t (&k)[kWords / 2]) {
    qmma_m16n8k32<T, T>(d, q, k[0], k[1]);
  }
  static __forceinline__ __device__ void p_by_v(float (&d)[4], const uint32_t (&p)[kWords], const uint32_t (&v)[kWords / 2]) {
    qmma_m16n8k32<e4m3, T>(d, p, v[0], v[1]);
  }
  static __forceinline__ __device__ void pack_p(const float (&s)[4][4], uint32_t (&p)[kWords]) { qmma_pack_p(s, p); }
};

/* fp16 Q and P beside fp8 K and V, which become fp16 in registers: two products of 16 each. */
template <typename T> struct qmma_products<__half, T> {
  static constexpr int kWords = 8;
  static constexpr float kTop = 14.f, kCap = 15.f, kUsual = 16384.f; /* see exponentiate in section 6 of flashcore_wmma.cuh */

  static __forceinline__ __device__ void operand(uint32_t (&b)[kWords / 2], uint32_t x0, uint32_t x1) {
    widen4<T>(x0, b[0], b[1]);
    widen4<T>(x1, b[2], b[3]);
  }
  static __forceinline__ __device__ void q_by_k(float (&d)[4], const uint32_t (&q)[kWords], const uint32_t (&k)[kWords / 2]) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const uint32_t a[4] = {q[4 * x], q[4 * x + 1], q[4 * x + 2], q[4 * x + 3]};
      mma_m16n8k16<__half>(d, a, k[2 * x], k[2 * x + 1]);
    }
  }
  static __forceinline__ __device__ void p_by_v(float (&d)[4], const uint32_t (&p)[kWords], const uint32_t (&v)[kWords / 2]) { q_by_k(d, p, v); }
  static __forceinline__ __device__ void pack_p(const float (&s)[4][4], uint32_t (&p)[kWords]) {
#pragma unroll
    for (int x = 0; x < kWords; ++x) p[x] = pack2<__half>(s[x / 2][x % 2 * 2], s[x / 2][x % 2 * 2 + 1]);
  }
};

#endif /* FLASHCORE_HAS_QMMA */

/* ================================================================================================================================
 * 4  mma.sync: one struct describes one kernel
 * ================================================================================================================================ */

/* TQ: of Q, T or __half (then P is fp16, too, and Q may come as bf16); T: of K and V; kHeadDim: of all of them, smaller ones are zero-padded to it
 * kRowTiles: 16-row query tiles per warp      kRowWarps: warps, each with rows of its own     kBlockKv: keys per shared-memory stage
 * kStep: keys per softmax step, and per sum of fp8 products that is added to O in fp32        kBlocksPerSm: what the register cap is made for
 * kKeyWarps: warps that share rows, and take the steps of a stage in turn
 * The names are those of mma_tile, whose ring, loaders, schedule and masks serve here too. */
template <typename TQ_, typename T_, int kHeadDim_, int kRowTiles_, int kRowWarps_, int kBlockKv_, int kStep_, mma_q_source kQ_, int kBlocksPerSm_,
          int kKeyWarps_ = 1>
struct qmma_tile {
  using TQ = TQ_;
  using T = T_;
  static constexpr int kHeadDimQk = kHeadDim_, kHeadDimV = kHeadDim_, kRowTiles = kRowTiles_, kRowWarps = kRowWarps_;
  static constexpr int kColumnWarps = 1, kBlockKv = kBlockKv_, kStep = kStep_, kStages = 2, kBlocksPerSm = kBlocksPerSm_;
  static constexpr mma_q_source kQ = kQ_;
  static constexpr int kKeyWarps = kKeyWarps_;

  static constexpr int kThreads = kRowWarps * kKeyWarps * 32, kWarpRows = kRowTiles * 16, kBlockQ = kWarpRows * kRowWarps, kColumns = kHeadDimV;
  static constexpr bool kLoose = false, kMixed = sizeof(TQ) == 2;
  static constexpr int kRowBytesQ = kHeadDimQk * (int)sizeof(TQ), kRowBytesQk = kHeadDimQk, kRowBytesV = kHeadDimV; /* kRowBytesQk: of K */

  /* Shared memory: Q [kBlockQ][kHeadDim], then per stage K [kBlockKv][kHeadDim] and V [kBlockKv][kHeadDim]. */
  static constexpr int kBytesQ = kBlockQ * kRowBytesQ, kBytesK = kBlockKv * kRowBytesQk, kBytesV = kBlockKv * kRowBytesV;
  static constexpr int kOffsetQ = 0, kOffsetKv = kBytesQ, kSharedBytes = kOffsetKv + kStages * (kBytesK + kBytesV);

  static_assert(sizeof(T) == 1 && (kMixed ? element<TQ>::kDtype == FLASHCORE_F16 : element<TQ>::kDtype == T::kDtype),
                "fp8 K and V; Q as they are, or fp16");
  static_assert(kHeadDimQk % 64 == 0, "a row's stores go by 32 dims, and the loaders by rows of 64 bytes or more");
  static_assert(kRowBytesQ % 128 == 0 || !kMixed, "a lane's place in a row of Q, and in the row eight below, follows from the first by constants");
  static_assert(kBlockKv % kStep == 0 && kStep % 32 == 0, "softmax steps tile the stage, products of P are 32 keys deep");
  static_assert(kStep <= 256, "the accumulators of fp8 products are good for so many keys: tests/host/test_qmma.cu");
  static_assert(kQ != kQRegistersReuse, "Q has shared memory of its own");
  static_assert(kSharedBytes + kThreads / 32 * 128 + 32 <= 99 * 1024, "with mma_shared, fits the L4");

  /* Where warps share rows, all but the first leave m, l and O of theirs where K and V were: 16 bytes of every lane at a time. */
  static constexpr int kBytesPart = kRowTiles * (1 + kHeadDimV / 8) * 512;
  static_assert((kKeyWarps - 1) * kBytesPart <= kStages * (kBytesK + kBytesV), "they fit there");
  static_assert(kKeyWarps == 1 || (kRowWarps == 1 && kBlockKv % (kStep * kKeyWarps) == 0), "a share of each stage for every warp");
};

/* The tiles in use. wide: throughput. narrow: grids that do not fill the chip with wide tiles, and score rules, which want registers. */
template <typename T, int kHeadDim, mma_shape kShape> struct qmma_tile_for;
#define FLASHCORE_QMMA_TILE(dim, shape, ...)                                                                                                         \
  template <typename T> struct qmma_tile_for<T, dim, shape> : qmma_tile<T, T, dim, __VA_ARGS__> {}

/* Registers decide, and on an L4 the 100 KiB of an SM, which as many blocks can share as the registers allow. Two row tiles per warp halve what it
 * reads from shared memory and sorts by dim; 256 dims leave registers for one. On sm_89 nothing spills up to 128 dims, 20 to 120 bytes do at 256.
 *                   dim         row tiles, warps, keys, step, Q, blocks per SM */
FLASHCORE_QMMA_TILE(64, kWide, 2, 4, 64, 64, kQShared, 3);
FLASHCORE_QMMA_TILE(64, kNarrow, 1, 4, 64, 64, kQRegisters, 4);
FLASHCORE_QMMA_TILE(128, kWide, 2, 4, 64, 64, kQShared, 2);
FLASHCORE_QMMA_TILE(128, kNarrow, 1, 4, 64, 64, kQRegisters, 2);
FLASHCORE_QMMA_TILE(256, kWide, 1, 8, 64, 64, kQRegisters, 1);
FLASHCORE_QMMA_TILE(256, kNarrow, 1, 4, 32, 32, kQRegisters, 2);

/* The same with fp16 Q, and short: up to 16 rows, as a query has in a group of heads, so that keys are all there is to share out among warps.
 * Rows of Q are twice as long here: at 128 dims a wide tile has stages of half as many keys, for two blocks on an L4's SM.
 *                         dim         row tiles, row warps, keys, step, Q, blocks per SM, key warps */
template <typename T, int kHeadDim, mma_shape kShape> struct qmma_mixed_tile_for;
#define FLASHCORE_QMMA_MIXED_TILE(dim, shape, ...)                                                                                                   \
  template <typename T> struct qmma_mixed_tile_for<T, dim, shape> : qmma_tile<__half, T, dim, __VA_ARGS__> {}
FLASHCORE_QMMA_MIXED_TILE(64, kWide, 2, 4, 64, 64, kQRegisters, 2);
FLASHCORE_QMMA_MIXED_TILE(64, kNarrow, 1, 4, 64, 64, kQRegisters, 3);
FLASHCORE_QMMA_MIXED_TILE(64, kShort, 1, 1, 256, 64, kQRegisters, 1, 4);
FLASHCORE_QMMA_MIXED_TILE(128, kWide, 2, 4, 32, 32, kQShared, 2);
FLASHCORE_QMMA_MIXED_TILE(128, kNarrow, 1, 4, 64, 64, kQRegisters, 2);
FLASHCORE_QMMA_MIXED_TILE(128, kShort, 1, 1, 128, 32, kQRegisters, 1, 4);
FLASHCORE_QMMA_MIXED_TILE(256, kWide, 1, 8, 32, 32, kQRegisters, 1);
FLASHCORE_QMMA_MIXED_TILE(256, kNarrow, 1, 4, 32, 32, kQRegisters, 1);
FLASHCORE_QMMA_MIXED_TILE(256, kShort, 1, 1, 64, 32, kQRegisters, 1, 2);

/* ================================================================================================================================
 * 5  mma.sync: one warp's rows
 * ================================================================================================================================ */

#if FLASHCORE_HAS_QMMA || !defined(__CUDA_ARCH__)

/* What a warp keeps in registers. Rows, softmax state, masks and the end of a row are mma_warp's; products, probabilities and O are fp8's own:
 * o[i][2c], o[i][2c + 1] are the even and the odd ones of dims 16c .. 16c + 15. Of q, half is used. */
template <typename Tile> struct qmma_warp : mma_warp<Tile> {
  using base = mma_warp<Tile>;
  using products = qmma_products<typename Tile::TQ, typename Tile::T>;
  using tile_q = swizzled_tile<Tile::kRowBytesQ>;
  using base::lane, base::row_of, base::o, base::m, base::l, base::q, base::q_address, base::kRowTiles, base::kStep, base::kTilesO;
  using typename base::tile_v;
  static constexpr int kDepthQk = Tile::kHeadDimQk / 32, kTilesS = kStep / 8, kWords = products::kWords;
  static constexpr bool kAlwaysCaps = Tile::kHeadDimV > 128;                /* WHY: two ways to the same registers spill 900 bytes there */
  static constexpr bool kLsePays = !Tile::kMixed || Tile::kHeadDimQk > 128; /* whoever wants the LSE pays for its last bits */

  static __forceinline__ __device__ int key_warp() { return threadIdx.x / 32 / Tile::kRowWarps; } /* among those that share rows */

  float scale[kRowTiles][2]; /* of the products of rows g, g + 8, with the descales: to log2 units; with a rule, to natural units */

  /* As mma_warp's, and the scales of the rows, which may be of several heads. */
  __forceinline__ __device__ void init(const flashcore_attention &a, const mma_schedule &plan, mma_work &w, mma_shared<Tile> &block, uint32_t shared,
                                       bool general) {
    base::init(a, plan, w, block, shared);
    base::v_address = tile_v::offset(lane(), 0);
    if constexpr (Tile::kMixed) q_address = shared + Tile::kOffsetQ + tile_q::offset(base::row0() + lane() / 4, lane() % 4 / 2) + lane() % 2 * 8;
    const int kv_head = plan.group.quotient(w.head);
    if (lane() == 0) { /* bytes are elements */
      block.work().k = static_cast<const char *>(a.k.data) + w.seq.k + kv_head * a.k.stride_h;
      block.work().v = static_cast<const char *>(a.v.data) + w.seq.v + kv_head * a.v.stride_h;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float qk = descale_of(a, plan, w, i, h);
        scale[i][h] = general ? a.scale * qk : qk >= 0.f ? fp8_normal(plan.scale_log2 * qk) : 1.f;
      }
  }
  /* Of Q and K, for row g + 8 h of row tile i. WHY finish, and not the scale, makes NaN of it: NaN * -inf would give a key to a row that sees none. */
  static __forceinline__ __device__ float descale_of(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w, int i, int h) {
    const int row = min(row_of(w, i, h), w.rows - 1), head = w.head + row - plan.pack.quotient(row) * plan.pack.d;
    return fp8_descale(a.q_descale, w.batch, head) * fp8_descale(a.k_descale, w.batch, plan.group.quotient(w.head));
  }

  /* ---- loading ---- */

  /* The tile's rows of Q. Rows past the end become zeros and are never stored. */
  __forceinline__ __device__ void load_q(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w, uint32_t shared) {
    using loader = tile_loader<Tile::kBlockQ, Tile::kRowBytesQ, Tile::kThreads>;
    constexpr int kBytes = sizeof(typename Tile::TQ);
    const char *src = static_cast<const char *>(a.q.data) + kBytes * (w.seq.q + w.head * a.q.stride_h);
    const int chunks = a.dim_qk * kBytes / 16, rows = w.rows - w.row0;
    if (plan.pack.d == 1)
      return loader::load_edge(shared + Tile::kOffsetQ, src + kBytes * (w.row0 * a.q.stride_s), (int32_t)a.q.stride_s * kBytes, rows, chunks);
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kBlockQ * tile_q::kChunks; i += Tile::kThreads) {
      const int r = i / tile_q::kChunks, chunk = i % tile_q::kChunks, query = plan.pack.quotient(w.row0 + r);
      const int64_t offset = query * a.q.stride_s + (w.row0 + r - query * plan.pack.d) * a.q.stride_h;
      cp_async<16>(shared + Tile::kOffsetQ + tile_q::offset(r, chunk), src + kBytes * offset + chunk * 16, r < rows && chunk < chunks);
    }
  }
  /* Keys from `key` on of K and V into the stage at `dst`; what is past the end becomes zeros, since 0 * NaN is NaN. */
  static __forceinline__ __device__ void load_kv(const flashcore_attention &a, const mma_work &w, uint32_t dst, int key) {
    using loader = tile_loader<Tile::kBlockKv, Tile::kRowBytesQk, Tile::kThreads>;
    const int32_t k_stride = (int32_t)a.k.stride_s, v_stride = (int32_t)a.v.stride_s, keys = w.seq.len_kv - key;
    const char *k = w.k + (int64_t)key * k_stride, *v = w.v + (int64_t)key * v_stride;
    if (key + Tile::kBlockKv <= w.full_keys) {
      loader::load(dst, k, k_stride);
      loader::load(dst + Tile::kBytesK, v, v_stride);
    } else {
      loader::load_edge(dst, k, k_stride, keys, a.dim_qk / 16);
      loader::load_edge(dst + Tile::kBytesK, v, v_stride, keys, a.dim_v / 16);
    }
  }

  /* ---- the two products ---- */

  /* Q from bf16 to fp16 in shared memory, every warp its own rows, each in a unit of its own, which joins its scale. Elements more than 2^31 times
   * smaller than the row's largest lose bits, by 2^-39 of the largest at most.
   *   callers  all threads of the block
   *   implies  __syncwarp, or where warps share rows barriers of the block */
  __forceinline__ __device__ void q_from_bf16(uint32_t shared, bool general) {
#pragma unroll 1
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int row = base::row0() + 8 * r + lane() / 4;
      float largest = 0.f, lo, hi;
      uint32_t x[4];
      const auto chunk = [&](int c) { return shared + Tile::kOffsetQ + tile_q::offset(row, c); };
      for (int c = lane() % 4; c < tile_q::kChunks; c += 4) {
        load_shared_16(x, chunk(c));
        for (int n = 0; n < 4; ++n) {
          unpack2<__nv_bfloat16>(x[n], lo, hi);
          largest = fmaxf(largest, fmaxf(fabsf(lo), fabsf(hi)));
        }
      }
      const qmma_unit of_row = qmma_unit_of(quad_max(largest));
      if (Tile::kKeyWarps > 1) __syncthreads(); /* all have seen the row, one changes it */
      for (int c = key_warp() == 0 ? lane() % 4 : tile_q::kChunks; c < tile_q::kChunks; c += 4) {
        load_shared_16(x, chunk(c));
        for (int n = 0; n < 4; ++n) {
          unpack2<__nv_bfloat16>(x[n], lo, hi);
          x[n] = pack2<__half>(lo * of_row.inverse, hi * of_row.inverse);
        }
        store_shared_16(chunk(c), x);
      }
#pragma unroll
      for (int n = 0; n < 2 * kRowTiles; ++n)
        if (n == r) scale[n / 2][n % 2] = general ? scale[n / 2][n % 2] * of_row.unit : fp8_normal(scale[n / 2][n % 2] * of_row.unit);
    }
    if (Tile::kKeyWarps > 1) __syncthreads();
    else __syncwarp();
  }
  /* A's registers for 32 dims of the 16 rows of row tile i. */
  __forceinline__ __device__ void q_fragment(uint32_t (&f)[kWords], int i, int k) const {
    if constexpr (Tile::kMixed) {
#pragma unroll
      for (int x = 0; x < 2; ++x) { /* row g: registers 0, 2; row g + 8: 1, 3 */
        const uint32_t address = qmma_along<tile_q>(q_address, 2 * (2 * k + x)) + i * 16 * Tile::kRowBytesQ;
        load_shared_8(f[4 * x], f[4 * x + 2], address);
        load_shared_8(f[4 * x + 1], f[4 * x + 3], address + 8 * Tile::kRowBytesQ);
      }
    } else base::q_fragment(f, i, k);
  }
  __forceinline__ __device__ void hold_q() {
    if constexpr (base::kQHeld) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int k = 0; k < kDepthQk; ++k) {
          uint32_t f[kWords];
          q_fragment(f, i, k);
#pragma unroll
          for (int x = 0; x < kWords; ++x) q[i][k * (kWords / 4) + x / 4][x % 4] = f[x];
        }
    }
  }
  /* s += q k of 32 dims; kExact: added in fp32. */
  template <bool kExact>
  static __forceinline__ __device__ void add_product(float (&s)[4], const uint32_t (&q)[kWords], const uint32_t (&k)[kWords / 2]) {
    if (!kExact) return products::q_by_k(s, q, k);
    float part[4] = {};
    products::q_by_k(part, q, k);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] += part[j];
  }
  /* s = Q K^T for kStep keys at `k_tile`.   [16 kRowTiles][kStep] f32
   *   kExact   sums over 32 dims are added up in fp32. O does not feel that the accumulators of fp8 products keep about 14 bits, since its P has four,
   *            but the LSE of large logits does, by up to 2^-10 of them. Those of fp16 products lose a little with each, which shows beyond 128 dims */
  template <bool kExact> __forceinline__ __device__ void gemm_qk(float (&s)[kRowTiles][kTilesS][4], uint32_t k_tile) {
    constexpr int kUnroll = kExact && !base::kQHeld ? 1 : kDepthQk; /* WHY: all at once, exact sums spill 340 bytes at 128 dims */
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.f;
#pragma unroll kUnroll
    for (int k = 0; k < kDepthQk; ++k) {
      uint32_t fq[kRowTiles][kWords];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (base::kQHeld) {
#pragma unroll
          for (int x = 0; x < kWords; ++x) fq[i][x] = q[i][k * (kWords / 4) + x / 4][x % 4];
        } else q_fragment(fq[i], i, k);
      }
#pragma unroll
      for (int n = 0; n < kTilesS / 2; ++n) {
        uint32_t fk[4];
        base::template k_fragment<kTilesS>(fk, k_tile, k * (kTilesS / 2) + n);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          uint32_t b[kWords / 2];
          products::operand(b, fk[2 * x], fk[2 * x + 1]);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) add_product<kExact>(s[i][2 * n + x], fq[i], b);
        }
      }
    }
  }
  /* o = factor o + P V for kStep keys at `v_tile`.   [16 kRowTiles][kHeadDimV] f32
   * WHY sums from zero: the accumulator of an fp8 product keeps about 14 bits, so that a long sum loses its last terms. So many keys lose nothing that
   * shows, and the rescaling of O comes with the addition. */
  __forceinline__ __device__ void gemm_pv(const uint32_t (&p)[kRowTiles][kStep / 32][kWords], const float (&factor)[kRowTiles][2], uint32_t v_tile) {
#pragma unroll
    for (int c = 0; c < kTilesO / 2; ++c) {
      float part[kRowTiles][2][4] = {};
#pragma unroll
      for (int k = 0; k < kStep / 32; ++k) {
        uint32_t v[4], dims[2][2];
        ldmatrix_x4_trans(v, qmma_along<tile_v>(v_tile + base::v_address, c) + k * 32 * Tile::kRowBytesV);
        qmma_split_dims(v, dims[0], dims[1]);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          uint32_t b[kWords / 2];
          products::operand(b, dims[x][0], dims[x][1]);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) products::p_by_v(part[i][x], p[i][k], b);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          float &sum = o[i][2 * c + x / 4][x % 4];
          sum = fmaf(sum, factor[i][x % 4 / 2], part[i][x / 4][x % 4]);
        }
    }
  }

  /* ---- scores to probabilities ---- */

  /* The score rule on every element: raw products become logits in log2 units. */
  template <typename Rule>
  __forceinline__ __device__ void apply_rule(float (&s)[kRowTiles][kTilesS][4], const flashcore_attention &a, const mma_schedule &plan,
                                             const mma_work &w, int key, const Rule &rule) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = min(row_of(w, i, h), w.rows - 1), query = plan.pack.quotient(row);
        score_position at = {w.batch, w.head + row - query * plan.pack.d, query, 0, w.seq.len_q, w.seq.len_kv};
#pragma unroll
        for (int n = 0; n < kTilesS; ++n)
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            at.key = min(key + n * 8 + 2 * (lane() % 4) + x, w.seq.len_kv - 1); /* past the end: masked later, but a rule may read memory */
            s[i][n][2 * h + x] = softmax_log2_units(rule(a, s[i][n][2 * h + x] * scale[i][h], at));
          }
      }
  }
  /* Each row's reference m follows its maximum; `factor`: what l and O must be multiplied with.
   * WHY the exact maximum: where a few keys have nearly all the weight, the rounding of the largest term would be the error.
   *   returns  true: some reference of the warp is so large that its last bit weighs, and terms need a cap
   *   edge     a row with no visible key yet has m = FLASHCORE_EMPTY_MAX
   *   callers  all 32 lanes, converged */
  template <bool kGeneral> __forceinline__ __device__ bool raise(const float (&s)[kRowTiles][kTilesS][4], float (&factor)[kRowTiles][2]) {
    bool unusual = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float top = fmaxf(m[i][h], __fadd_rd(base::reference_for(s, i, h, kGeneral ? 1.f : scale[i][h]), -products::kTop));
        factor[i][h] = ex2(m[i][h] - top);
        m[i][h] = top;
        unusual |= fabsf(top) > products::kUsual;
      }
    return __any_sync(0xffffffffu, unusual);
  }
  /* s becomes p = exp2(s c - m), rounded; l follows, of what p was before.
   *   kCapped  a large reference was rounded down, so that the largest terms come out too large: they become 2^kCap
   *   edge     a row with no visible key has p = 0, l = 0; NaN stays
   *   edge     mixed: beside such a reference the largest term is no power of two, and l counts what O gets: a row of one key is that key's V */
  template <bool kGeneral, bool kCapped>
  __forceinline__ __device__ void exponentiate(float (&s)[kRowTiles][kTilesS][4], uint32_t (&p)[kRowTiles][kStep / 32][kWords],
                                               const float (&factor)[kRowTiles][2]) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum[2];
#pragma unroll
        for (int n = 0; n < kTilesS; ++n)
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            float &e = s[i][n][2 * h + x];
            const float y = fmaf(e, kGeneral ? 1.f : scale[i][h], -m[i][h]);
            e = ex2(kCapped ? qmma_min(y, products::kCap) : y);
            if (kCapped && Tile::kMixed && fabsf(m[i][h]) > products::kUsual) e = element<__half>::load(element<__half>::store(e));
            sum[x] = n == 0 ? e : sum[x] + e;
          }
        l[i][h] = fmaf(l[i][h], factor[i][h], sum[0] + sum[1]);
      }
#pragma unroll
      for (int k = 0; k < kStep / 32; ++k) {
        const float(&s_of_k)[4][4] = *reinterpret_cast<const float(*)[4][4]>(&s[i][4 * k]);
        products::pack_p(s_of_k, p[i][k]);
      }
    }
  }

  /* ---- the loop ---- */

  /* The warp's keys of one stage, kStep at a time; key0: the stage's first. */
  template <typename Rule>
  __forceinline__ __device__ void take_tile(uint32_t k_tile, uint32_t v_tile, const flashcore_attention &a, const mma_schedule &plan,
                                            const mma_work &w, int key0, const Rule &rule) {
#pragma unroll 1
    for (int c = key_warp() * kStep; c < Tile::kBlockKv; c += Tile::kKeyWarps * kStep) {
      const int key = key0 + c;
      if (key >= w.warp_last || key + kStep <= w.warp_first) continue;
      float s[kRowTiles][kTilesS][4], factor[kRowTiles][2];
      uint32_t p[kRowTiles][kStep / 32][kWords];
      if (kLsePays && a.lse) gemm_qk<true>(s, k_tile + c * Tile::kRowBytesQk);
      else gemm_qk<false>(s, k_tile + c * Tile::kRowBytesQk);
      if constexpr (Rule::kActive) apply_rule(s, a, plan, w, key, rule);
      if (key + kStep > w.full_last || key < w.full_first) base::mask(s, a, plan, w, key);
      if (raise<Rule::kActive>(s, factor) || kAlwaysCaps) exponentiate<Rule::kActive, true>(s, p, factor);
      else exponentiate<Rule::kActive, false>(s, p, factor);
      gemm_pv(p, factor, v_tile + c * Tile::kRowBytesV);
    }
  }
  /* All keys of the block's rows.
   *   callers  all threads of the block, after load_q and init
   *   implies  barriers of the whole block; on return other warps may still read shared memory */
  template <typename Rule>
  __forceinline__ __device__ void mainloop(const flashcore_attention &a, const mma_schedule &plan, mma_shared<Tile> &block, uint32_t shared,
                                           const Rule &rule) {
    const mma_work &w = block.work(); /* in shared memory: bounds, too, are read from there */
    mma_ring<Tile> ring{block};
    int tile = w.tile_begin - 1;
    const auto stage_at = [&](int stage) { return shared + Tile::kOffsetKv + stage * (Tile::kBytesK + Tile::kBytesV); };
    const auto fill_next = [&] {
      if (tile + 1 < w.tile_end) load_kv(a, w, stage_at(ring.next(tile)), (tile + 1) * Tile::kBlockKv);
    };
    const auto next_tile = [&] {
      ring.advance();
      if (++tile < w.tile_end) ring.wait_full();
    };
    if (w.tile_begin >= w.tile_end) return cp_async_wait_all(); /* Q was for nothing */
    fill_next();
    next_tile();
    if (Tile::kMixed && a.dtype == FLASHCORE_BF16) q_from_bf16(shared, Rule::kActive);
    hold_q();
    for (; tile < w.tile_end; next_tile()) {
      fill_next();
      const uint32_t k_tile = stage_at(ring.here(tile));
      take_tile(k_tile, k_tile + Tile::kBytesK, a, plan, w, tile * Tile::kBlockKv, rule);
    }
  }

  /* ---- the end ---- */

  /* As mma_warp's; a row that saw a key feels a descale that is NaN.   callers  all 32 lanes, converged */
  __forceinline__ __device__ void finish(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(l[i][h]), qk = descale_of(a, plan, w, i, h);
        if (sum != 0.f && isnan(qk)) l[i][h] = qk;
      }
    base::finish(a, plan, w);
  }
  /* Where warps share rows: the first gathers what all have, in their order.   returns  false: nothing left to do for this warp
   *   callers  all threads of the block, after mainloop
   *   implies  barriers of the block */
  __forceinline__ __device__ bool gather(uint32_t shared) {
    if constexpr (Tile::kKeyWarps == 1) return true;
    const uint32_t parts = shared + Tile::kOffsetKv + lane() * 16;
    __syncthreads(); /* K and V were read */
    if (key_warp() > 0) put_part(parts + (key_warp() - 1) * Tile::kBytesPart);
    __syncthreads();
    if (key_warp() > 0) return false;
#pragma unroll 1
    for (int other = 0; other < Tile::kKeyWarps - 1; ++other) add_part(parts + other * Tile::kBytesPart);
    return true;
  }
  /* m and l of row tile i, then its O, 16 bytes each. */
  static __forceinline__ __device__ uint32_t place(uint32_t part, int i, int n) { return part + (i * (1 + kTilesO) + n) * 512; }
  __forceinline__ __device__ void put_part(uint32_t part) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      put_four(place(part, i, 0), m[i][0], m[i][1], l[i][0], l[i][1]);
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) put_four(place(part, i, 1 + n), o[i][n][0], o[i][n][1], o[i][n][2], o[i][n][3]);
    }
  }
  static __forceinline__ __device__ void put_four(uint32_t address, float a, float b, float c, float d) {
    store_shared_16(address, {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)});
  }
  __forceinline__ __device__ void add_part(uint32_t part) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t x[4];
      float mine[2], theirs[2];
      load_shared_16(x, place(part, i, 0));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const softmax_state both = softmax_merge({m[i][h], l[i][h]}, {__uint_as_float(x[h]), __uint_as_float(x[2 + h])}, mine[h], theirs[h]);
        m[i][h] = both.m, l[i][h] = both.l;
      }
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
        load_shared_16(x, place(part, i, 1 + n));
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][n][j] = fmaf(__uint_as_float(x[j]), theirs[j / 2], o[i][n][j] * mine[j / 2]);
      }
    }
  }

  /* O of live rows and dims, after finish; v_scale: V's descale, which a row without keys does not feel. Of dims 16c .. 16c + 15, the even ones in one
   * accumulator and the odd ones in the next, lane t has 4t .. 4t + 3; even lanes then give what they have of odd c to the odd lane beside them, for what
   * it has of even c: 16 bytes each.
   *   callers  all 32 lanes, converged */
  template <typename Out>
  __forceinline__ __device__ void store(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w, float v_scale) const {
    const bool is_odd = lane() % 2;
    const int column = lane() % 2 * 16 + lane() % 4 / 2 * 8;
    Out *const out = static_cast<Out *>(a.o.data) + w.seq.o + w.head * a.o.stride_h + column;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(w, i, h), query = plan.pack.quotient(row), dims = row < w.rows ? a.dim_v - column : 0;
        Out *const dst = out + query * a.o.stride_s + (row - query * plan.pack.d) * a.o.stride_h;
        const float factor = quad_sum(l[i][h]) == 0.f ? 0.f : v_scale;
#pragma unroll
        for (int n = 0; n < kTilesO; n += 4) {
          uint32_t x[4]; /* dims 4t, 4t + 1; 4t + 2, 4t + 3; the same of the next 16 dims */
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = pack2<Out>(o[i][n + j / 2 * 2][2 * h + j % 2] * factor, o[i][n + j / 2 * 2 + 1][2 * h + j % 2] * factor);
          const uint32_t low = __shfl_xor_sync(0xffffffffu, is_odd ? x[0] : x[2], 1), high = __shfl_xor_sync(0xffffffffu, is_odd ? x[1] : x[3], 1);
          if (n * 8 < dims) *reinterpret_cast<uint4 *>(dst + n * 8) = is_odd ? make_uint4(low, high, x[2], x[3]) : make_uint4(x[0], x[1], low, high);
        }
      }
  }
};

#endif /* FLASHCORE_HAS_QMMA */

/* ================================================================================================================================
 * 6  mma.sync: kernel
 * ================================================================================================================================ */

/* O = softmax(rule(Q K^T)) V for one tile of query rows. */
template <typename Tile, typename Rule>
FLASHCORE_KERNEL void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    qmma_kernel(const __grid_constant__ flashcore_attention a, const __grid_constant__ mma_schedule plan, const Rule rule) {
#if FLASHCORE_HAS_QMMA
  extern __shared__ __align__(128) unsigned char flashcore_shared[];
  const uint32_t shared = shared_address(flashcore_shared);
  __shared__ mma_shared<Tile> block;
  mma_work work;
  if (!mma_find_work<Tile>(a, plan, blockIdx.x, work)) return;
  qmma_warp<Tile> warp;
  warp.load_q(a, plan, work, shared);
  warp.init(a, plan, work, block, shared, Rule::kActive);
  warp.mainloop(a, plan, block, shared, rule);
  if (!warp.gather(shared)) return;
  warp.finish(a, plan, block.work());
  const mma_work &w = block.work();
  const float v_scale = fp8_descale(a.v_descale, w.batch, plan.group.quotient(w.head));
  if (a.dtype_o == FLASHCORE_F16) warp.template store<__half>(a, plan, w, v_scale);
  else warp.template store<__nv_bfloat16>(a, plan, w, v_scale);
#else
  __trap();
#endif
}

/* ================================================================================================================================
 * 7  wgmma: fp8 products
 * ================================================================================================================================
 * To TMA, to wgmma's addresses and to ldmatrix, two neighbouring fp8 elements are one of 16 bits: rows of 128 bytes in 128-byte swizzle, k steps of 32
 * bytes. So Q and K go the way of flashcore_wgmma.cuh, with dims counted in pairs. */

#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)

/* d = a b, or d += a b: a 64 x 32, b 32 x kN, both K-major (fp8 has no other), f32 accumulators of which some 14 bits are kept. Asynchronous.
 *   ptx      wgmma.mma_async.sync.aligned.m64nNk32.f32.{e4m3,e5m2}.{e4m3,e5m2}, sm_90a, PTX 8.0
 *   shapes   ss: a and b in shared memory; rs: a in registers, a 16-bit fragment of pairs; p: the same with a of type e4m3, whatever b is
 *   callers  as for 16-bit types (section 2 of flashcore_wgmma.cuh) */
#define FLASHCORE_QGMMA(T, type, n, list, outputs, i0, i1, i2, i3, i4, i5)                                                                           \
  template <> struct wgmma<T, n> {                                                                                                                   \
    static __forceinline__ __device__ void ss(float (&d)[n / 8][4], uint64_t a, uint64_t b, bool accumulate) {                                       \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #i2 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n "k32.f32." type "." type " {" list    \
                   "}, %" #i0 ", %" #i1 ", p, 1, 1;\n\t}"                                                                                            \
                   : outputs                                                                                                                         \
                   : "l"(a), "l"(b), "r"((int)accumulate));                                                                                          \
    }                                                                                                                                                \
    template <int kTransB> static __forceinline__ __device__ void rs(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {    \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #i5 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n "k32.f32." type "." type " {" list    \
                   "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1;\n\t}"                                                               \
                   : outputs                                                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));                                                      \
    }                                                                                                                                                \
    static __forceinline__ __device__ void p(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                            \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #i5 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n "k32.f32."                            \
                   "e4m3"                                                                                                                            \
                   "." type " {" list "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1;\n\t}"                                            \
                   : outputs                                                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));                                                      \
    }                                                                                                                                                \
  };
#define FLASHCORE_L16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FLASHCORE_QGMMA_OF(T, type)                                                                                                                  \
  FLASHCORE_QGMMA(T, type, 32, FLASHCORE_L16, FLASHCORE_D16(0), 16, 17, 18, 19, 20, 21)                                                              \
  FLASHCORE_QGMMA(T, type, 64, FLASHCORE_L32, FLASHCORE_D32(0), 32, 33, 34, 35, 36, 37)                                                              \
  FLASHCORE_QGMMA(T, type, 96, FLASHCORE_L48, FLASHCORE_D48(0), 48, 49, 50, 51, 52, 53)                                                              \
  FLASHCORE_QGMMA(T, type, 128, FLASHCORE_L64, FLASHCORE_D64(0), 64, 65, 66, 67, 68, 69)                                                             \
  FLASHCORE_QGMMA(T, type, 256, FLASHCORE_L128, FLASHCORE_D128(0), 128, 129, 130, 131, 132, 133)
FLASHCORE_QGMMA_OF(e4m3, "e4m3")
FLASHCORE_QGMMA_OF(e5m2, "e5m2")

#if FLASHCORE_QMMA_COMPILER
/* d += a b by one warp, as wgmma_warp asks for it: the fragments of a 16-bit product, of pairs. Rare here, and on sm_90 made of 16-bit products. */
template <> __forceinline__ __device__ void mma_m16n8k16<e4m3>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  qmma_m16n8k32<e4m3, e4m3>(d, a, b0, b1);
}
template <> __forceinline__ __device__ void mma_m16n8k16<e5m2>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  qmma_m16n8k32<e5m2, e5m2>(d, a, b0, b1);
}
#endif
#endif /* FLASHCORE_HAS_SM90A */

/* ================================================================================================================================
 * 8  wgmma: one struct describes one kernel
 * ================================================================================================================================ */

/* How much is spent on accuracy.
 *   accurate   a row's reference is its maximum so far, so that its largest p is exactly 2^8; O is added up in f32 after every 512 keys
 *   fast       the reference stays where the first block has put it while no term gets too large for e4m3; O: after every 1024 keys */
enum qgmma_mode { kAccurate, kFast };

/* T: e4m3 or e5m2; kHeadDim: of Q, K and V, smaller ones are zero-padded to it; the others as in wgmma_tile
 * kRawStages: blocks of V as it came, before it is transposed
 * Kept: float or __half, what the older part of O is kept as while the tensor cores add to the newer one
 * kExact: S is added up in f32 after every 32 dims. The LSE of large logits would show the bits that the tensor cores drop; O, whose P has four, does
 *         not */
template <typename T_, qgmma_mode kMode_, int kHeadDim_, int kGroups_, int kBlockKv_, int kStages_, int kRawStages_, wgmma_q kQ_, typename Kept_,
          wgmma_turns kTurns_, bool kExact_ = false>
struct qgmma_tile {
  using T = T_;
  using Kept = Kept_;
  static constexpr qgmma_mode kMode = kMode_;
  static constexpr bool kExact = kExact_, kScaled = false; /* its factors are in qgmma_scales */
  /* Q and K in pairs. Rows have 128 bytes at dim 64 too: half of them are zeros that cost no memory traffic, and every tile is swizzled alike. */
  static constexpr int kHeadDimQk = kHeadDim_ / 2, kHeadDimV = kHeadDim_;
  static constexpr int kGroups = kGroups_, kBlockKv = kBlockKv_, kStages = kStages_, kRawStages = kRawStages_, kParts = 1;
  static constexpr bool kOverlapsTiles = kQ_ != kQOnce, kQHeld = kQ_ == kQFragments, kTrustsSums = kMode == kFast;
  static constexpr int kQStages = kQ_ == kQTwice ? 2 : 1;
  static constexpr int kTransposers = 3, kEdgeRows = 64;
  static constexpr wgmma_turns kTurns = kTurns_;
  static constexpr int kBlockQ = 64 * kGroups, kThreads = 128 * (kGroups + 1), kConsumerWarps = 4 * kGroups;
  static constexpr int kPromoteBlocks = (kMode == kAccurate ? 512 : 1024) / kBlockKv;
  /* While the tensor cores compute S, which costs no time but registers: not where O has to be scaled and packed, too. */
  static constexpr bool kPromotesEarly = sizeof(Kept) == 4;

  /* Shared memory, from a multiple of 1024 on: Q [kQStages][kGroups], K [kStages], raw V [kRawStages], each [pairs / 64][rows][128 bytes];
   * V transposed [kStages], each [kBlockKv / kRowV][dims][kRowV keys]; the older part of O [kGroups]. */
  static constexpr int kColumns = (kHeadDimQk + 63) / 64 * 64, kRowV = kBlockKv % 128 == 0 ? 128 : kBlockKv % 64 == 0 ? 64 : 32; /* pairs; bytes */
  static constexpr int kBytesQ = 64 * kColumns * 2, kBytesK = kBlockKv * kColumns * 2, kBytesV = kBlockKv * kHeadDimV;
  static constexpr int kBytesKept = 64 * kHeadDimV * (int)sizeof(Kept);
  static constexpr int kOffsetK = kQStages * kGroups * kBytesQ, kOffsetRaw = kOffsetK + kStages * kBytesK;
  static constexpr int kOffsetV = kOffsetRaw + kRawStages * kBytesK, kOffsetKept = kOffsetV + kStages * kBytesV;
  static constexpr int kOffsetBarriers = kOffsetKept + kGroups * kBytesKept, kBytesBarriers = 512,
                       kSharedBytes = kOffsetBarriers + kBytesBarriers + 1024;

  /* Transposing takes registers that 16-bit producers give away. */
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = kGroups == 2 ? 224 : kGroups == 3 ? 152 : 104;

  static_assert(kHeadDim_ % 64 == 0 && kBlockKv % 32 == 0, "whole swizzled rows of V transposed");
  static_assert(kGroups >= 2 && kGroups <= 4, "registers are shared out for these");
  static_assert(kPromoteBlocks >= 1, "O is added up after whole blocks");
  static_assert(kStages > ((kGroups - 1) * 64 + kBlockKv - 1) / kBlockKv && kStages >= 2, "more stages than blocks that a group skips");
  static_assert(kProducerRegisters * 128 + kConsumerRegisters * kGroups * 128 <= 65536, "registers of an SM");
};

/* The tiles in use
 *   wide      most
 *   long      many keys: more rows, so that K and V are read less often
 *   short     few keys: blocks that leave little remainder
 *   exact     who wants the LSE waits for its last bits
 *   general   with a score rule, which needs registers
 * WHY __half: where f32 would not fit, or leave no room for stages. Its values are kept in units of the row's sum: an error of 2^-12 each time. */
enum qgmma_shape { kWideFp8, kLongFp8, kShortFp8, kExactFp8, kGeneralFp8 };

template <typename T, qgmma_mode kMode, int kHeadDim, qgmma_shape kShape> struct qgmma_tile_for;
#define FLASHCORE_QGMMA_TILE(mode, dim, shape, keys, ...)                                                                                            \
  template <typename T> struct qgmma_tile_for<T, mode, dim, shape> : qgmma_tile<T, mode, dim, __VA_ARGS__> { static constexpr int kKeys = keys; }

/*                   mode, dim, shape, keys (long: from so many on; short: below), then groups, keys of a block, stages, raw stages, Q, kept, turns,
 *                   exact; the last two shapes serve both modes */
FLASHCORE_QGMMA_TILE(kAccurate, 64, kWideFp8, 0, 3, 128, 3, 2, kQFragments, float, kProductTurns);
FLASHCORE_QGMMA_TILE(kAccurate, 64, kShortFp8, 2048, 4, 64, 4, 2, kQTwice, float, kProductTurns);
FLASHCORE_QGMMA_TILE(kAccurate, 64, kExactFp8, 0, 2, 64, 4, 2, kQFragments, float, kTermTurns, true);
FLASHCORE_QGMMA_TILE(kAccurate, 64, kGeneralFp8, 0, 2, 64, 4, 2, kQFragments, float, kTermTurns, true);
FLASHCORE_QGMMA_TILE(kAccurate, 128, kWideFp8, 0, 2, 128, 3, 2, kQFragments, float, kTermTurns);
FLASHCORE_QGMMA_TILE(kAccurate, 128, kLongFp8, 8192, 3, 96, 3, 2, kQTwice, __half, kProductTurns);
FLASHCORE_QGMMA_TILE(kAccurate, 128, kExactFp8, 0, 2, 64, 4, 2, kQFragments, float, kTermTurns, true);
FLASHCORE_QGMMA_TILE(kAccurate, 128, kGeneralFp8, 0, 2, 64, 4, 2, kQFragments, float, kTermTurns, true);
FLASHCORE_QGMMA_TILE(kAccurate, 256, kWideFp8, 0, 2, 96, 2, 1, kQOnce, __half, kTermTurns);
FLASHCORE_QGMMA_TILE(kAccurate, 256, kShortFp8, 1536, 2, 64, 2, 2, kQOnce, __half, kTermTurns);
FLASHCORE_QGMMA_TILE(kAccurate, 256, kExactFp8, 0, 2, 32, 3, 2, kQOnce, __half, kNoTurns, true); /* more keys have no registers */
FLASHCORE_QGMMA_TILE(kAccurate, 256, kGeneralFp8, 0, 2, 32, 3, 2, kQOnce, __half, kNoTurns, true);
FLASHCORE_QGMMA_TILE(kFast, 64, kWideFp8, 0, 4, 64, 4, 2, kQTwice, float, kNoTurns);
FLASHCORE_QGMMA_TILE(kFast, 64, kLongFp8, 8192, 3, 128, 3, 2, kQFragments, float, kProductTurns);
FLASHCORE_QGMMA_TILE(kFast, 128, kWideFp8, 0, 3, 96, 3, 2, kQTwice, __half, kNoTurns);
FLASHCORE_QGMMA_TILE(kFast, 128, kShortFp8, 2048, 2, 128, 3, 2, kQFragments, float, kTermTurns);
FLASHCORE_QGMMA_TILE(kFast, 256, kWideFp8, 0, 2, 96, 2, 1, kQOnce, __half, kNoTurns);
FLASHCORE_QGMMA_TILE(kFast, 256, kShortFp8, 6144, 2, 64, 2, 2, kQOnce, __half, kProductTurns);

#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)

/* The barriers of wgmma_barriers, and those between TMA and the transposing warps. */
template <typename Tile> struct qgmma_barriers : wgmma_barriers<Tile> {
  using shared = wgmma_barriers<Tile>;
  static constexpr int kBytes = shared::kBytes + 16 * Tile::kRawStages;
  static_assert(kBytes <= Tile::kBytesBarriers, "fits the place that the tile keeps for it");
  __forceinline__ __device__ uint32_t raw_full(int stage) const { return shared::base + shared::kBytes + 8 * stage; }
  __forceinline__ __device__ uint32_t raw_free(int stage) const { return raw_full(Tile::kRawStages + stage); }

  /* callers  one thread, then a barrier of the block */
  __forceinline__ __device__ void init() const {
    for (int i = 0; i < Tile::kRawStages; ++i) {
      mbarrier_init(raw_full(i), 1);
      mbarrier_init(raw_free(i), Tile::kTransposers);
    }
    shared::init(1, Tile::kTransposers);
  }
};

/* Of a tile's scores and values, with the descales. */
struct qgmma_scales {
  float natural, log2, v; /* products to logits; to logits in log2 units (1 behind a rule, or if NaN); what O is multiplied with */
  float o;                /* and with this, where it is stored in fp8 */
};
template <typename Tile> struct qgmma_shared : wgmma_shared<Tile> { qgmma_scales scales[2]; /* of tiles 0, 2, ... and 1, 3, ... */ };

/* ================================================================================================================================
 * 9  wgmma: the producer and the transposers
 * ================================================================================================================================ */

/* What the consumers have to know of a tile: lane i works it out for consumer warp i. more: there is a tile.   callers  one warp, converged */
template <typename Tile, typename Rule>
FLASHCORE_DEVICE void qgmma_plan_tile(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_work &w, int tile, bool more,
                                      qgmma_shared<Tile> &block, uint32_t shared) {
  const qgmma_barriers<Tile> barriers = {{shared + Tile::kOffsetBarriers}};
  const int lane = threadIdx.x % 32, row_in_tile = lane * 16;
  mbarrier_wait(barriers.work_free(tile), (tile / 2 & 1) ^ 1);
  if (lane < Tile::kConsumerWarps) {
    wgmma_walk &walk = block.walks[tile % 2][lane];
    if (more) wgmma_find_walk<Tile>(a, plan, w, row_in_tile / 64 * 64, row_in_tile, walk);
    else walk.blocks = 0;
    if (more && lane == 0) {
      const int kv_head = plan.group.quotient(w.head);
      const float qk = fp8_descale(a.q_descale, w.batch, w.head) * fp8_descale(a.k_descale, w.batch, kv_head);
      block.scales[tile % 2] = {a.scale * qk, Rule::kActive || isnan(qk) ? 1.f : fp8_normal(plan.scale_log2 * qk),
                                fp8_descale(a.v_descale, w.batch, kv_head), __frcp_rn(fp8_descale(a.o_descale, w.batch, w.head))};
    }
    mbarrier_arrive(barriers.work_full(tile));
  }
  __syncwarp();
}

/* All Q, K and V of the block's tiles, and their plan.   callers  one warp, converged
 *   WHY the plan behind the first K: it takes a while, and waits until the tile before the last is done, which needs nothing that is not on its way */
template <typename Tile, typename Rule>
FLASHCORE_DEVICE void qgmma_produce(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_maps &maps, qgmma_shared<Tile> &block,
                                    uint32_t shared) {
  const qgmma_barriers<Tile> barriers = {{shared + Tile::kOffsetBarriers}};
  const wgmma_input q_in = {maps.q, a.q, 0, 0, false}, k_in = {maps.k, a.k, 0, 0, false}, v_in = {maps.v, a.v, 0, 0, false}; /* TMA knows the rest */
  wgmma_ring<Tile::kQStages> q = {0, 0};
  wgmma_ring<Tile::kStages> k = {0, 0};
  wgmma_ring<Tile::kRawStages> v = {0, 0};
  wgmma_work w;
  int tile = 0;
  for (int32_t round = -1; wgmma_next_tile<Tile>(round, a, plan, w); ++tile) {
    const int q_batch = a.cu_seqlens_q ? 0 : w.batch, kv_batch = a.cu_seqlens_kv ? 0 : w.batch, kv_head = plan.group.quotient(w.head);
    for (int wg = 0; wg < Tile::kGroups; ++wg)
      wgmma_fill<Tile::kColumns, 64>(shared + (q.stage * Tile::kGroups + wg) * Tile::kBytesQ, q_in, 0, barriers.q_full(q.stage, wg),
                                     barriers.q_free(q.stage, wg), q.parity, w.q_row + w.row0 + 64 * wg, w.head, q_batch);
    q = q.next();
    for (int j = w.end - 1; j >= w.begin; --j) {
      const int row = w.kv_row + j * Tile::kBlockKv;
      wgmma_fill<Tile::kColumns, Tile::kBlockKv>(shared + Tile::kOffsetK + k.stage * Tile::kBytesK, k_in, 0, barriers.k_full(k.stage),
                                                 barriers.k_free(k.stage), k.parity, row, kv_head, kv_batch);
      if (j == w.end - 1) qgmma_plan_tile<Tile, Rule>(a, plan, w, tile, true, block, shared);
      wgmma_fill<Tile::kColumns, Tile::kBlockKv>(shared + Tile::kOffsetRaw + v.stage * Tile::kBytesK, v_in, 0, barriers.raw_full(v.stage),
                                                 barriers.raw_free(v.stage), v.parity, row, kv_head, kv_batch);
      k = k.next();
      v = v.next();
    }
  }
  qgmma_plan_tile<Tile, Rule>(a, plan, w, tile, false, block, shared);
}

/* V from [keys][dims] to [dims][keys] in items of 16 keys and up to 128 dims; no lane needs another's data but through ldmatrix and stmatrix:
 *   ldmatrix.trans   of 16-bit elements, which are pairs of dims: lane (g, t) gets dims 2g, 2g+1 of keys 2t, 2t+1 (r[0]) and 8+2t, 9+2t (r[1])
 *   prmt             even dims | odd dims:     k(2t) k(2t+1) k(8+2t) k(9+2t)
 *   stmatrix         row 16c + 8e + g of V transposed holds dim 16c + 2g + e; position 4t + 2b + e of 16 keys holds key 8b + 2t + e, which is the
 *                    order in which a lane's scores, rounded and packed, are the A operand of P V (qgmma_warp::pack_p) */
template <typename Tile> struct qgmma_transposer {
  static constexpr int kRowV = Tile::kRowV, kPieces = Tile::kHeadDimV < 128 ? Tile::kHeadDimV / 32 : 4; /* of 32 dims in an item */
  static constexpr int kColumns = Tile::kHeadDimV / (32 * kPieces), kItems = Tile::kBlockKv / 16 * kColumns, kStep = Tile::kTransposers;
  static_assert(Tile::kHeadDimV % (32 * kPieces) == 0 && Tile::kBlockKv % 16 == 0 && kItems >= kStep, "whole items, at least one for each warp");
  uint32_t from[kPieces]; /* this lane's offsets in an item */
  int lane;

  __forceinline__ __device__ qgmma_transposer() : lane((int)threadIdx.x % 32) {
#pragma unroll
    for (int c = 0; c < kPieces; ++c) from[c] = swizzled_tile<128>::offset(lane % 16, 2 * c + lane / 16);
  }
  /* keys: how many of the block are there; V is zero from there on, as 0 * NaN would be NaN. */
  __forceinline__ __device__ void load(uint32_t (&r)[kPieces][4], uint32_t raw, int item, int keys) const {
    const int key0 = item / kColumns * 16;
#pragma unroll
    for (int c = 0; c < kPieces; ++c) ldmatrix_x4_trans(r[c], raw + item % kColumns * Tile::kBlockKv * 128 + key0 * 128 + from[c]);
    if (key0 + 16 <= keys) return;
    const int live = keys - key0 - 2 * (lane % 4);
    const uint32_t low = live >= 2 ? ~0u : live == 1 ? 0xffffu : 0u, high = live >= 10 ? ~0u : live == 9 ? 0xffffu : 0u;
#pragma unroll
    for (int c = 0; c < kPieces; ++c) r[c][0] &= low, r[c][2] &= low, r[c][1] &= high, r[c][3] &= high;
  }
  __forceinline__ __device__ void store(const uint32_t (&r)[kPieces][4], uint32_t v, int item) const {
    const int keys = item / kColumns; /* a group of 16: one chunk of a row */
    const uint32_t to = v + keys / (kRowV / 16) * Tile::kHeadDimV * kRowV + item % kColumns * 32 * kPieces * kRowV +
                        swizzled_tile<kRowV>::offset(lane, keys % (kRowV / 16));
#pragma unroll
    for (int c = 0; c < kPieces; ++c)
      stmatrix(to + c * 32 * kRowV, {__byte_perm(r[c][0], r[c][1], kQmmaEvenDims), __byte_perm(r[c][0], r[c][1], kQmmaOddDims),
                                     __byte_perm(r[c][2], r[c][3], kQmmaEvenDims), __byte_perm(r[c][2], r[c][3], kQmmaOddDims)});
  }
  /* The items of one warp (0 .. kTransposers - 1), two in flight. */
  __forceinline__ __device__ void block(uint32_t raw, uint32_t v, int warp, int keys) const {
    uint32_t x[kPieces][4], y[kPieces][4];
    load(x, raw, warp, keys);
#pragma unroll 1
    for (int item = warp; item < kItems; item += 2 * kStep) {
      if (item + kStep < kItems) load(y, raw, item + kStep, keys);
      store(x, v, item);
      if (item + 2 * kStep < kItems) load(x, raw, item + 2 * kStep, keys);
      if (item + kStep < kItems) store(y, v, item + kStep);
    }
  }
};

/* Transposes all V of the block's tiles.   callers  Tile::kTransposers warps, each converged; warp: 0 .. kTransposers - 1 */
template <typename Tile> FLASHCORE_DEVICE void qgmma_transpose(const flashcore_attention &a, const wgmma_schedule &plan, uint32_t shared, int warp) {
  const qgmma_barriers<Tile> barriers = {{shared + Tile::kOffsetBarriers}};
  const qgmma_transposer<Tile> transposer;
  wgmma_ring<Tile::kRawStages> raw = {0, 0};
  wgmma_ring<Tile::kStages> v = {0, 0};
  wgmma_work w;
  for (int32_t round = -1; wgmma_next_tile<Tile>(round, a, plan, w);)
    for (int j = w.end - 1; j >= w.begin; --j) {
      mbarrier_wait(barriers.raw_full(raw.stage), raw.parity);
      mbarrier_wait(barriers.v_free(v.stage), v.parity ^ 1u);
      transposer.block(shared + Tile::kOffsetRaw + raw.stage * Tile::kBytesK, shared + Tile::kOffsetV + v.stage * Tile::kBytesV, warp,
                       w.len_kv - j * Tile::kBlockKv);
      fence_proxy_async();
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        mbarrier_arrive(barriers.v_full(v.stage));
        mbarrier_arrive(barriers.raw_free(raw.stage));
      }
      raw = raw.next();
      v = v.next();
    }
}

/* ================================================================================================================================
 * 10  wgmma: the consumers' mainloop
 * ================================================================================================================================ */

/* A warp's 16 rows: rings, Q, the product with K, masks and the end of a row are wgmma_warp's; the probabilities and O are fp8's own. */
template <typename Tile, typename Rule> struct qgmma_warp : wgmma_warp<Tile, Rule, no_prologue, no_epilogue> {
  using base = wgmma_warp<Tile, Rule, no_prologue, no_epilogue>;
  using T = typename Tile::T;
  using Kept = typename Tile::Kept;
  using base::at, base::o, base::s, base::m, base::l, base::factor, base::inverse, base::wg, base::lane;
  using typename base::ring;
  static constexpr int kBlockKv = Tile::kBlockKv, kTilesS = base::kTilesS, kTilesO = base::kTilesO;
  static constexpr bool kTrustsSums = Tile::kTrustsSums && !Rule::kActive;
  /* p of a term at the reference is 2^kTop, exact in e4m3. fast: e4m3 can hold what kSumLimit bounds; a lane's terms in a block of equal scores sum up to
   * 16 / 17 of it. WHY no more: a row whose largest p is not 2^kTop feels its rounding. */
  static constexpr float kTop = !kTrustsSums ? 8.f : kBlockKv > 64 ? 3.f : 4.f, kSumLimit = kBlockKv / 4 * (1 << (int)kTop) * 1.0625f;
  static_assert(!kTrustsSums || kSumLimit <= 448.f, "the largest number of e4m3");

  uint32_t p8[kBlockKv / 32][4]; /* the A operand of P V */
  float part[Tile::kExact ? kTilesS : 1][4];
  float peak[2];  /* the largest score of rows g, g + 8 so far, as products: what m follows (accurate) */
  float older[2]; /* what the part of O in shared memory must be multiplied with */
  bool has_older; /* is there such a part? */
  bool unusual;   /* some reference is so large that its last bit weighs, or there is none yet */
  int in_o;       /* blocks whose P V is in o */
  qgmma_shared<Tile> &block8;

  __forceinline__ __device__ qgmma_warp(qgmma_shared<Tile> &block_, uint32_t shared_, const Rule &rule_, const no_prologue &p, const no_epilogue &e)
      : base(block_, shared_, rule_, p, e), has_older(false), unusual(false), in_o(0), block8(block_) {}

  /* s = Q K^T of a block: issued, one group; exact: complete.   [64][kBlockKv] f32 per warpgroup */
  __forceinline__ __device__ void gemm_qk(ring r) {
    if constexpr (!Tile::kExact) {
      base::gemm_qk(r);
    } else {
      const uint64_t q_tile = wgmma_descriptor(base::q_address(), 0), k_tile = wgmma_descriptor(base::k_address(r), 0);
#pragma unroll
      for (int k = 0; k < base::kDepthQk; ++k) {
        const uint64_t k_step = k_tile + ((k / 4 * kBlockKv * 128 + k % 4 * 32) >> 4);
        wgmma_pin(part);
        wgmma_fence();
        if constexpr (Tile::kQHeld) wgmma<T, kBlockKv>::template rs<0>(part, base::q[k], k_step, false);
        else wgmma<T, kBlockKv>::ss(part, q_tile + ((k / 4 * 64 * 128 + k % 4 * 32) >> 4), k_step, false);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(part);
#pragma unroll
        for (int n = 0; n < kTilesS; ++n)
#pragma unroll
          for (int x = 0; x < 4; ++x) s[n][x] = k == 0 ? part[n][x] : s[n][x] + part[n][x];
      }
    }
  }

  /* ---- O ---- */

  /* o = P V of the block at hand, or o += P V: issued, one group.   [64][kHeadDimV] f32 per warpgroup */
  __forceinline__ __device__ void gemm_pv() {
    constexpr int kRowV = Tile::kRowV, kSteps = kRowV / 32; /* k steps in a row */
    const uint64_t v_tile = wgmma_descriptor<kRowV>(base::v_address(at), 0);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockKv / 32; ++k)
      wgmma<T, Tile::kHeadDimV>::p(o, p8[k], v_tile + ((k / kSteps * Tile::kHeadDimV * kRowV + k % kSteps * 32) >> 4), in_o > 0 || k > 0);
    wgmma_commit();
    ++in_o;
  }
  __forceinline__ __device__ uint32_t kept_address(int n) const {
    return base::shared + Tile::kOffsetKept + wg * Tile::kBytesKept + (n * 128 + (int)threadIdx.x % 128) * 4 * (int)sizeof(Kept);
  }
  __forceinline__ __device__ void keep(int n, const float (&unit)[2]) const {
    if constexpr (sizeof(Kept) == 4)
      asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(kept_address(n)), "f"(o[n][0]), "f"(o[n][1]), "f"(o[n][2]), "f"(o[n][3]) : "memory");
    else
      asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(kept_address(n)), "r"(pack2<Kept>(o[n][0] * unit[0], o[n][1] * unit[0])),
                   "r"(pack2<Kept>(o[n][2] * unit[1], o[n][3] * unit[1]))
                   : "memory");
  }
  __forceinline__ __device__ void load_kept(int n, float (&x)[4]) const {
    if constexpr (sizeof(Kept) == 4) {
      asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(kept_address(n)) : "memory");
    } else {
      uint32_t words[2];
      asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(kept_address(n)) : "memory");
      unpack2<Kept>(words[0], x[0], x[1]);
      unpack2<Kept>(words[1], x[2], x[3]);
    }
  }
  /* o += the older part of O, times `older`, for kBatch column tiles; as many loads are in flight. */
  static constexpr int kBatch = Tile::kPromotesEarly ? 4 : 8;
  __forceinline__ __device__ void add_kept(int first) {
    float x[kBatch][4];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) load_kept(first + n, x[n]);
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[first + n][i] = fmaf(x[n][i], older[i / 2], o[first + n][i]);
  }
  /* o joins the part of O in shared memory, which each thread has to itself.
   * WHY: the accumulator of an fp8 product keeps 14 bits, so that a long sum loses its last terms: values of one sign came out 25 % too small after
   * 16384 keys, and 0.6 % after 512 (H200). */
  __forceinline__ __device__ void promote() {
    float sum[2] = {1.f, 1.f}, unit[2] = {1.f, 1.f};
    if constexpr (sizeof(Kept) == 2) /* in units of the row's sum, no larger than V */
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[h] = quad_sum(l[h]), unit[h] = sum[h] > 0.f ? softmax_reciprocal(sum[h]) : sum[h];
#pragma unroll
    for (int first = 0; first < kTilesO; first += kBatch) {
      if (has_older) add_kept(first);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) keep(first + n, unit);
    }
    older[0] = sum[0], older[1] = sum[1];
    has_older = true;
    in_o = 0;
  }
  __forceinline__ __device__ void rescale_all() {
    base::rescale();
    older[0] *= factor[0], older[1] *= factor[1];
  }

  /* ---- scores to probabilities ---- */

  /* As in wgmma_warp, with this tile's scale. */
  __forceinline__ __device__ void apply_rule(const flashcore_attention &a, const wgmma_walk &w, int j, float scale) {
    const wgmma_work &tile = w.tile;
    if (tile.len_kv == 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      score_position position = {tile.batch, tile.head, min(base::row_of(w, h), tile.len_q - 1), 0, tile.len_q, tile.len_kv};
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          position.key = min(j * kBlockKv + n * 8 + 2 * (lane() % 4) + x, tile.len_kv - 1);
          s[n][2 * h + x] = softmax_log2_units(base::rule(a, s[n][2 * h + x] * scale, position));
        }
    }
  }
  /* The reference for a peak. */
  static __forceinline__ __device__ float reference(float x, float scale_log2) { return softmax_reference(x, scale_log2) - kTop; }
  __forceinline__ __device__ void move(int h, float to) {
    factor[h] = ex2(m[h] - to);
    m[h] = to;
    l[h] *= factor[h];
  }
  /* The reference of a row follows its maximum.   returns  whether one of the warp moved     callers  all 32 lanes, converged */
  __forceinline__ __device__ bool look(float scale_log2) {
    const float top[2] = {base::lane_max(0), base::lane_max(1)};
    if (!__any_sync(0xffffffffu, top[0] > peak[0] || top[1] > peak[1])) return false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      peak[h] = fmaxf(peak[h], quad_max(top[h]));
      move(h, fmaxf(m[h], reference(peak[h], scale_log2)));
    }
    unusual = base::has_unusual_reference();
    return true;
  }
  /* s holds terms, which in some lane add up to kSumLimit or more. They are still f32: a row's largest becomes 2^kTop, and the others follow.
   *   returns  false, with nothing changed, where a term has overflowed     callers  all 32 lanes, converged */
  __forceinline__ __device__ bool follow(float (&sum)[2]) {
    if (__any_sync(0xffffffffu, !(sum[0] + sum[1] < 0x1p100f))) return false; /* factor must not vanish; so is NaN */
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      move(h, fmaxf(m[h], m[h] + softmax_log2(quad_max(base::lane_max(h))) - kTop));
      sum[h] *= factor[h];
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) s[n][2 * h] *= factor[h], s[n][2 * h + 1] *= factor[h];
    }
    unusual = base::has_unusual_reference();
    return true;
  }
  /* What pack4 makes of a term that is normal in e4m3. */
  static __forceinline__ __device__ float rounded(float e) {
    const uint32_t bits = __float_as_uint(e);
    return __uint_as_float((bits + 0x7ffffu + (bits >> 20 & 1u)) & 0xfff00000u);
  }
  /* s becomes exp2(s c - m); sum: this lane's part of the rows' sums. */
  __forceinline__ __device__ void exponentiate(float (&sum)[2], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float part[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const float e = ex2(fmaf(s[n][2 * h + x], scale_log2, -m[h]));
          s[n][2 * h + x] = e;
          part[x] += e;
        }
      sum[h] = part[0] + part[1];
    }
  }
  /* Where a reference is so large that its last bit weighs, no term is larger than one at the reference, and l counts what O gets: one key gives its V. */
  __forceinline__ __device__ void cap(float (&sum)[2]) {
    constexpr float kLargest = 1 << (int)kTop;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool large = fabsf(m[h]) > base::kLargeReference && m[h] > FLASHCORE_EMPTY_MAX;
      float part[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          float &e = s[n][2 * h + x];
          if (large && e > kLargest) e = kLargest; /* NaN stays */
          part[x] += large ? rounded(e) : e;
        }
      sum[h] = part[0] + part[1];
    }
  }
  /* In turn, with the reference as it is, whatever it is. */
  __forceinline__ __device__ void exponentiate_any(float (&sum)[2], float scale_log2) {
    base::turn(kTermTurns);
    exponentiate(sum, scale_log2);
    if (unusual) cap(sum);
    base::pass(kTermTurns);
  }
  /* With a look at the maxima first.   returns  whether a reference moved     implies  P V of the block at hand is complete */
  __forceinline__ __device__ bool look_and_exponentiate(float (&sum)[2], float scale_log2) {
    const bool moved = look(scale_log2);
    exponentiate_any(sum, scale_log2);
    base::finish_products();
    return moved;
  }
  /* The same without a look, unless terms turn out to be too large.   returns  whether a reference moved
   *   implies  P V of the block at hand is complete, and K of block `next` released */
  __forceinline__ __device__ bool exponentiate_and_follow(ring next, float (&sum)[2], float scale_log2) {
    const bool looks = unusual; /* WHY: where the reference's last bit weighs, it cannot follow by as little as a term is too large */
    bool moved = looks && look(scale_log2);
    base::turn(kTermTurns);
    exponentiate(sum, scale_log2);
    base::pass(kTermTurns);
    base::finish_products();
    if (!looks && !__all_sync(0xffffffffu, sum[0] < kSumLimit && sum[1] < kSumLimit)) { /* NaN counts as large */
      moved = follow(sum);
      if (!moved) {
        base::gemm_qk_again(next);
        moved = look(scale_log2);
        exponentiate(sum, scale_log2);
      }
    }
    if (unusual) cap(sum);
    __syncwarp();
    base::release_k(next);
    return moved;
  }
  /* s of a tile's first block, just computed, to probabilities; the start of m and l. */
  __forceinline__ __device__ void first_block(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w, int blocks, bool edge,
                                              const qgmma_scales &scales) {
    if constexpr (Rule::kActive) apply_rule(a, w, w.begin + blocks - 1, scales.natural);
    if (edge) base::mask(a, plan, w, w.begin + blocks - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      peak[h] = quad_max(base::lane_max(h));
      m[h] = fmaxf(reference(peak[h], scales.log2), FLASHCORE_EMPTY_MAX);
    }
    unusual = base::has_unusual_reference();
    exponentiate_any(l, scales.log2);
  }
  /* p from s: four column tiles are one k step, in the order of keys that the transposer gives V.
   *   s[4k + n][2h + e], lane (g, t), is key 8n + 2t + e of the step; a[2i + h] holds bytes s[4k + 2i][2h], [2h + 1], s[4k + 2i + 1][2h], [2h + 1] */
  __forceinline__ __device__ void pack_p() {
    wgmma_pin(s);
#pragma unroll
    for (int k = 0; k < kBlockKv / 32; ++k)
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int n = 4 * k + x / 2 * 2, h = x % 2;
        p8[k][x] = pack4<e4m3>(s[n][2 * h], s[n][2 * h + 1], s[n + 1][2 * h], s[n + 1][2 * h + 1]);
      }
  }

  /* ---- the loop ---- */

  /* O is complete but for its older part: to memory. */
  __forceinline__ __device__ void end_tile(const flashcore_attention &a, const wgmma_walk &w, float o_scale) {
    base::release_v(at);
    if (has_older)
#pragma unroll
      for (int first = 0; first < kTilesO; first += kBatch) add_kept(first);
    if (a.dtype_o == FLASHCORE_F16) store<__half>(a, w);
    else if (a.dtype_o == FLASHCORE_BF16) store<__nv_bfloat16>(a, w);
    else {
      if (a.o_amax) raise_amax(a, w);
      if (a.dtype_o == FLASHCORE_E4M3) store_fp8<e4m3>(a, w, o_scale);
      else store_fp8<e5m2>(a, w, o_scale);
    }
  }
  /* See wgmma_warp::change_tiles. tile: the number of the one to start. */
  __forceinline__ __device__ void change_tiles(const flashcore_attention &a, const wgmma_schedule &plan, int tile, bool starting,
                                               const wgmma_walk &last, const wgmma_walk &next, int blocks, int skip, bool edge,
                                               const qgmma_scales &scales) {
    const bool ending = tile > 0;
    ring first = at;
    if (in_o == Tile::kPromoteBlocks) promote();
    if (Tile::kOverlapsTiles && starting) first = base::start_tile(a, next.tile, skip);
    if (starting) base::skip_turns(skip);
    base::turn(kProductTurns);
    if (Tile::kOverlapsTiles) {
      gemm_qk(first);
      if (Tile::kQHeld && starting) base::release_q();
    }
    if (ending) base::wait_v(at);
    gemm_pv();
    base::pass(kProductTurns);
    const qgmma_scales &before = block8.scales[(tile + 1) % 2];
    if (ending) base::finish(a, plan, last, before.natural, before.v);
    if (Tile::kOverlapsTiles) {
      wgmma_wait<1>();
      base::take_s();
      if (starting) first_block(a, plan, next, blocks, edge, scales);
    }
    wgmma_wait<0>();
    wgmma_pin(o);
    if (ending) end_tile(a, last, before.o);
    if (!Tile::kOverlapsTiles) {
      if (starting) first = base::start_tile(a, next.tile, skip);
      gemm_qk(first);
      wgmma_wait<0>();
      base::take_s();
      if (starting) first_block(a, plan, next, blocks, edge, scales);
    }
    if (starting) {
      base::release_k(first);
      base::skip_v(skip);
    }
    at = first;
    in_o = 0;
    has_older = false;
  }

  /* As in wgmma_warp. */
  __forceinline__ __device__ void multiply(ring next) {
    base::turn(kProductTurns);
    base::wait_k(next);
    gemm_qk(next);
    if (Tile::kPromotesEarly && in_o == Tile::kPromoteBlocks) promote();
    base::wait_v(at);
    gemm_pv();
    base::pass(kProductTurns);
    wgmma_wait<1>();
    base::take_s();
  }
  __forceinline__ __device__ void take(ring next, const float (&sum)[2], bool moved) {
    if (moved) rescale_all();
    l[0] += sum[0];
    l[1] += sum[1];
    pack_p();
    at = next;
  }

  /* All tiles of the block.   callers  all warps of the consumer warpgroups */
  __forceinline__ __device__ void consume(const flashcore_attention &a, const wgmma_schedule &plan) {
    base::start_turns();
    for (int tile = 0;; ++tile) {
      const wgmma_walk &w = base::block.walks[tile % 2][threadIdx.x / 32 - 4], &before = base::block.walks[(tile + 1) % 2][threadIdx.x / 32 - 4];
      mbarrier_wait(base::barriers().work_full(tile), tile / 2 & 1);
      const int blocks = warp_uniform(w.blocks), skip = warp_uniform(w.skip), first_edges = warp_uniform(w.first_edges);
      const int last_edges = warp_uniform(w.last_edges);
      const qgmma_scales scales = block8.scales[tile % 2];
      change_tiles(a, plan, tile, blocks > 0, before, w, blocks, skip, first_edges > 0 || blocks <= last_edges, scales);
      if (blocks == 0) return;
      __syncwarp();
      if (tile > 0 && lane() == 0) mbarrier_arrive(base::barriers().work_free(tile + 1));
      pack_p();

      /* WHY two loops: without the questions of the first, the second is 4 to 12 % faster at dim 64. The four warps of a group are in the same one, as
       * they issue each wgmma together: edges are the group's (kEdgeRows). */
      for (int left = blocks - 1; left > 0;) { /* blocks: the next is begin + left - 1 */
        if (!Tile::kPromotesEarly && in_o == Tile::kPromoteBlocks) promote();
        const bool edge = left <= last_edges || blocks - left < first_edges;
        if (Rule::kActive || edge) {
          const ring next = at.next();
          float sum[2];
          multiply(next);
          base::release_k(next);
          if constexpr (Rule::kActive) apply_rule(a, w, w.begin + left - 1, scales.natural);
          if (edge) base::mask(a, plan, w, w.begin + left - 1);
          const bool moved = look_and_exponentiate(sum, scales.log2);
          take(next, sum, moved);
          --left;
          continue;
        }
        if constexpr (!Rule::kActive) {
          do {
            const ring next = at.next();
            float sum[2];
            bool moved;
            multiply(next);
            if constexpr (kTrustsSums) {
              moved = exponentiate_and_follow(next, sum, scales.log2);
            } else {
              base::release_k(next);
              moved = look_and_exponentiate(sum, scales.log2);
            }
            take(next, sum, moved);
          } while (--left > last_edges && (Tile::kPromotesEarly || in_o < Tile::kPromoteBlocks));
        }
      }
      if (!Tile::kQHeld) base::release_q();
    }
  }

  /* ---- the end of a tile ---- */

  /* O of live rows and dims. Of the 16 dims of two column tiles, lane t of a quad has 4t .. 4t + 3. Of every four tiles, even lanes keep the first two
   * and odd lanes the last, and each gives the rest to its neighbour: 8 dims in a row for both. */
  template <typename Out> __forceinline__ __device__ void store(const flashcore_attention &a, const wgmma_walk &w) const {
    const bool odd = lane() % 2;
    const int column = lane() % 2 * 16 + lane() % 4 / 2 * 8, rows = w.tile.len_q - w.row - lane() / 4; /* to come, this lane's first included */
    Out *const out = static_cast<Out *>(a.o.data) + w.o + lane() / 4 * a.o.stride_s + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Out *const dst = out + 8 * h * a.o.stride_s;
      const int dims = 8 * h < rows ? a.dim_v - column : 0;
#pragma unroll
      for (int n = 0; n < kTilesO; n += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = pack2<Out>(o[n + i / 2 * 2][2 * h + i % 2] * inverse[h], o[n + i / 2 * 2 + 1][2 * h + i % 2] * inverse[h]);
        const uint32_t low = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[2], 1), high = __shfl_xor_sync(0xffffffffu, odd ? x[1] : x[3], 1);
        if (n * 8 < dims) __stcs(reinterpret_cast<uint4 *>(dst + n * 8), odd ? make_uint4(low, high, x[2], x[3]) : make_uint4(x[0], x[1], low, high));
      }
    }
  }
  /* The same in fp8, times o_scale: lane t has word t of each 16 dims, and of every four such chunks it gets the words of chunk t. */
  template <typename F8> __forceinline__ __device__ void store_fp8(const flashcore_attention &a, const wgmma_walk &w, float o_scale) const {
    const int column = lane() % 4 * 16, rows = w.tile.len_q - w.row - lane() / 4;
    uint8_t *const out = static_cast<uint8_t *>(a.o.data) + w.o + lane() / 4 * a.o.stride_s + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint8_t *const dst = out + 8 * h * a.o.stride_s;
      const int dims = 8 * h < rows ? a.dim_v - column : 0;
      const float unit = inverse[h] != 0.f ? o_scale : 1.f; /* a row without keys is 0, whatever the scale */
      const auto stored = [&](int n, int x) { return o[n][2 * h + x] * inverse[h] * unit; };
#pragma unroll
      for (int n = 0; n < kTilesO; n += 8) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int even = n + 2 * i, odd = even + 1;
          x[i] = pack4<F8>(stored(even, 0), stored(odd, 0), stored(even, 1), stored(odd, 1));
        }
        quad_transpose(x);
        if (n * 8 < dims) __stcs(reinterpret_cast<uint4 *>(dst + n * 8), make_uint4(x[0], x[1], x[2], x[3]));
      }
    }
  }
  /* The largest finite |O| of the warp's live rows joins that of the others; dims beyond dim_v are 0.   callers  all 32 lanes, converged */
  __forceinline__ __device__ void raise_amax(const flashcore_attention &a, const wgmma_walk &w) const {
    float amax = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float unit = 8 * h < w.tile.len_q - w.row - lane() / 4 ? inverse[h] : 0.f;
#pragma unroll
      for (int n = 0; n < kTilesO; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const float size = fabsf(o[n][2 * h + x] * unit);
          if (size < INFINITY) amax = fmaxf(amax, size);
        }
    }
    amax = warp_max(amax);
    if (lane() == 0) atomicMax(reinterpret_cast<int *>(a.o_amax), __float_as_int(amax)); /* floats that are not negative order as integers do */
  }
};

#endif /* FLASHCORE_HAS_SM90A */

/* ================================================================================================================================
 * 11  wgmma: kernel
 * ================================================================================================================================ */

/* O = v_descale softmax(rule(q_descale k_descale scale Q K^T)) V.
 *   shapes   maps: of Q, K and V in pairs (make_qgmma_maps)
 *   callers  a one-dimensional grid of as many blocks as the plan was made for, at most one per SM; Tile::kThreads threads, Tile::kSharedBytes of
 *            dynamic shared memory */
template <typename Tile, typename Rule>
FLASHCORE_KERNEL void __launch_bounds__(Tile::kThreads, 1)
    qgmma_kernel(const __grid_constant__ flashcore_attention a, const __grid_constant__ wgmma_schedule plan, const __grid_constant__ wgmma_maps maps,
                 const Rule rule) {
#if FLASHCORE_HAS_SM90A
  extern __shared__ __align__(128) unsigned char flashcore_shared[];
  const uint32_t shared = (shared_address(flashcore_shared) + 1023) & ~1023u;
  __shared__ qgmma_shared<Tile> block;
  if (threadIdx.x == 0) qgmma_barriers<Tile>{{shared + Tile::kOffsetBarriers}}.init();
  __syncthreads();
  const int warp_index = warp_uniform((int)threadIdx.x / 32);
  if (warp_index < 4) {
    setmaxnreg_dec<Tile::kProducerRegisters>();
    if (warp_index == 0) qgmma_produce<Tile, Rule>(a, plan, maps, block, shared);
    else qgmma_transpose<Tile>(a, plan, shared, warp_index - 1);
  } else {
    setmaxnreg_inc<Tile::kConsumerRegisters>();
    const no_prologue prologue;
    const no_epilogue epilogue;
    qgmma_warp<Tile, Rule> warp(block, shared, rule, prologue, epilogue);
    warp.consume(a, plan);
  }
#else
  __trap();
#endif
}

#if !defined(__CUDACC_RTC__)
/* The maps of a problem (resolved) for tiles of block_kv keys: of pairs, so that 16-bit boxes fit.   errors  as for make_wgmma_maps */
static inline CUresult make_qgmma_maps(const flashcore_attention &a, int block_kv, wgmma_maps &maps) {
  flashcore_attention pairs = a;
  pairs.dtype = FLASHCORE_F16; /* copied as bits */
  pairs.dim_qk /= 2;
  pairs.dim_v /= 2;
  flashcore_tensor *const tensors[3] = {&pairs.q, &pairs.k, &pairs.v};
  for (flashcore_tensor *t : tensors) t->stride_b /= 2, t->stride_s /= 2, t->stride_h /= 2;
  return make_wgmma_maps(pairs, block_kv, 1, maps);
}
#endif

/* ================================================================================================================================
 * 12  wgmma: 16-bit Q beside fp8 K and V
 * ================================================================================================================================
 * For caches of K and V in fp8. Consumers and products are those of flashcore_wgmma.cuh. On their way into the tiles three warps widen K to the type of Q,
 * and V to f16: exactly, as every fp8 number is one of f16 and of bf16. They come by cp.async, which writes zeros where a sequence ends. */

/* F8: of K and V; kSlots: batches of them that each converting warp has on their way; the others as in wgmma_tile */
template <typename Base, typename F8_, int kSlots_> struct wgmma_mixed_tile : Base {
  using F8 = F8_;
  static constexpr bool kScaled = true;
  static constexpr int kHeadDim = Base::kHeadDimV, kConverters = 3, kPieces = 8, kSlots = kSlots_;

  /* Shared memory: the slots, between the tiles and the barriers. */
  static constexpr int kBytesSlot = kPieces * 512, kOffsetSlots = Base::kOffsetBarriers,
                       kOffsetBarriers = kOffsetSlots + kConverters * kSlots * kBytesSlot,
                       kSharedBytes = kOffsetBarriers + Base::kBytesBarriers + 1024;

  /* Widening wants registers, of which O leaves few at 256 dims. */
  static constexpr bool kGives = Base::kGroups == 2 && kHeadDim <= 128;
  static constexpr int kProducerRegisters = kGives ? 40 : Base::kProducerRegisters, kConsumerRegisters = kGives ? 232 : Base::kConsumerRegisters;
  static constexpr int kLaunchRegisters = 65536 / Base::kThreads / 8 * 8; /* of a thread, until they are shared out */
  static_assert(Base::kHeadDimQk == Base::kHeadDimV, "K and V are shared out alike");
  static_assert(128 * (kProducerRegisters + Base::kGroups * kConsumerRegisters) <= kLaunchRegisters * Base::kThreads, "or setmaxnreg waits for ever");
};

template <typename T, typename F8, int kHeadDim, wgmma_shape kShape> struct wgmma_mixed_tile_for;
#define FLASHCORE_MIXED_TILE(dim, shape, slots, ...)                                                                                                 \
  template <typename T, typename F8> struct wgmma_mixed_tile_for<T, F8, dim, shape> : wgmma_mixed_tile<__VA_ARGS__, F8, slots> {}

/*                 dim, shape, slots, the 16-bit tile */
FLASHCORE_MIXED_TILE(64, kWideTile, 4, wgmma_tile_for<T, 64, 64, kWideTile>);
FLASHCORE_MIXED_TILE(64, kGeneralTile, 4, wgmma_tile_for<T, 64, 64, kGeneralTile>);
FLASHCORE_MIXED_TILE(128, kWideTile, 4, wgmma_tile<T, 128, 128, 2, 128, 2, kQFragments, kLookAtSums>); /* a stage less, for the slots */
FLASHCORE_MIXED_TILE(128, kGeneralTile, 4, wgmma_tile_for<T, 128, 128, kGeneralTile>);
FLASHCORE_MIXED_TILE(256, kWideTile, 2, wgmma_tile_for<T, 256, 256, kExactTile>); /* its LSE is right, and without it is hardly faster */
FLASHCORE_MIXED_TILE(256, kGeneralTile, 2, wgmma_tile_for<T, 256, 256, kGeneralTile>);

/* V and P are f16 beside bf16 Q, too. WHY: to bf16, widening takes twice as many instructions. */
template <typename F8, int kHeadDim, wgmma_shape kShape> struct wgmma_values<wgmma_mixed_tile_for<__nv_bfloat16, F8, kHeadDim, kShape>> {
  using type = __half;
};

#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)

/* Four fp8 numbers as two pairs of T. Exact. */
template <typename T, typename F8> FLASHCORE_DEVICE void fp8_widen(uint32_t x, uint32_t (&y)[2]) {
  widen4<F8>(x, y[0], y[1]);
  if constexpr (element<T>::kDtype == FLASHCORE_BF16)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float lo, hi;
      unpack2<__half>(y[i], lo, hi);
      y[i] = pack2<__nv_bfloat16>(lo, hi);
    }
}

/* What one converting warp brings: of the batches of K and V, in the order K V K V ..., every kConverters-th. A batch is kPieces pieces, a piece
 * kRows rows with 16 bytes a lane. kSlots batches are on their way, or there, in shared memory of the warp's own: a lane finds what it has asked for
 * itself, so that no barrier is needed, and the bytes on their way need no registers.
 *
 *   lane, row of the piece, chunk of 16 fp8:    lane % 4         chunk within 64 dims, which are two chunks of 16-bit elements in a swizzled row
 *                                               lane / 4 % 2     row's last bit: eight lanes in a row then store to distinct banks
 *                                               lane / 8         which 64 dims, and the row's other bits */
template <typename Tile> struct wgmma_mixed_converter {
  static constexpr int kPanels = Tile::kHeadDim / 64, kRows = 8 / kPanels, kPieces = Tile::kPieces, kBatchRows = kPieces * kRows;
  static constexpr int kBatches = Tile::kBlockKv / kBatchRows, kParts = 2 * kBatches; /* of K or V; of both */
  static constexpr int kTogether = Tile::kGives ? 2 : 1;                              /* pieces widened at once, as registers allow */
  static_assert(Tile::kHeadDim == 64 || Tile::kHeadDim == 128 || Tile::kHeadDim == 256, "lanes are shared out for these");
  static_assert(Tile::kBlockKv % kBatchRows == 0 && kBatchRows % 8 == 0, "whole batches of whole swizzle groups");
  static_assert(kBatches > 1 || Tile::kStages >= 3, "or a barrier's parity comes round while a warp looks away");

  const flashcore_attention &a;
  const wgmma_schedule &plan;
  const char *k, *v; /* this lane's chunk of the sequence's first row */
  wgmma_work w;
  int round, block, part; /* part: of kParts in the block of keys; the batch that is asked for */

  __forceinline__ __device__ wgmma_mixed_converter(const flashcore_attention &a_, const wgmma_schedule &plan_, int warp)
      : a(a_), plan(plan_), k(nullptr), v(nullptr), round(-1), block(0), part(kParts + warp - Tile::kConverters) {
    w.begin = 0; /* the first batch lies beyond a block that is not there */
  }
  static __forceinline__ __device__ int panel() { return (int)threadIdx.x % 32 / 8 % kPanels; }
  static __forceinline__ __device__ int chunk() { return 4 * panel() + threadIdx.x % 4; }
  static __forceinline__ __device__ int row() { return (int)threadIdx.x % 32 / 8 / kPanels * 2 + threadIdx.x / 4 % 2; }

  /* On to the next batch; false: there is none. */
  __forceinline__ __device__ bool advance() {
    part += Tile::kConverters;
#pragma unroll 1
    while (part >= kParts) {
      part -= kParts;
      if (--block >= w.begin) continue;
      if (!wgmma_next_tile<Tile>(round, a, plan, w)) return false;
      const int batch = a.cu_seqlens_kv ? 0 : w.batch, head = plan.group.quotient(w.head >> plan.pack_log2);
      k = static_cast<const char *>(a.k.data) + batch * a.k.stride_b + w.kv_row * a.k.stride_s + head * a.k.stride_h + 16 * chunk();
      v = static_cast<const char *>(a.v.data) + batch * a.v.stride_b + w.kv_row * a.v.stride_s + head * a.v.stride_h + 16 * chunk();
      block = w.end - 1;
    }
    return true;
  }
  /* Ask for the batch; zeros beyond the sequence and the dims: 0 * NaN would be NaN. */
  __forceinline__ __device__ void load(uint32_t slot) const {
    const bool is_v = part >= kBatches;
    const int first = block * Tile::kBlockKv + (is_v ? part - kBatches : part) * kBatchRows + row();
    const int live = 16 * chunk() < (is_v ? a.dim_v : a.dim_qk) ? w.len_kv - first : 0;
    const int64_t stride = is_v ? a.v.stride_s : a.k.stride_s, step = kRows * stride;
    const char *from = (is_v ? v : k) + first * stride;
#pragma unroll
    for (int i = 0; i < kPieces; ++i, from += step) cp_async<16>(slot + i * 512, from, i * kRows < live);
  }
  /* The batch in a slot, as T, to where it begins in a tile: [kPanels][kBlockKv][64], swizzled. */
  template <typename T> static __forceinline__ __device__ void store(uint32_t slot, uint32_t batch) {
    const uint32_t mine = batch + panel() * Tile::kBlockKv * 128 + swizzled_tile<128>::offset(row(), 2 * (chunk() % 4));
#pragma unroll
    for (int first = 0; first < kPieces; first += kTogether) {
      uint32_t x[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3])
                     : "r"(slot + (first + i) * 512)
                     : "memory");
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int rows = (first + i) * kRows; /* before the piece */
        const uint32_t to = (mine ^ (uint32_t)(rows % 8 << 4)) + rows * 128;
        store_wide<T>(to, x[i][0], x[i][1]);
        store_wide<T>(to ^ 16, x[i][2], x[i][3]);
      }
    }
  }
  template <typename T> static __forceinline__ __device__ void store_wide(uint32_t to, uint32_t x0, uint32_t x1) {
    uint32_t y[2], z[2];
    fp8_widen<T, typename Tile::F8>(x0, y);
    fp8_widen<T, typename Tile::F8>(x1, z);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(y[0]), "r"(y[1]), "r"(z[0]), "r"(z[1]) : "memory");
  }
};

/* All K and V of the block's tiles.   callers  Tile::kConverters warps, each converged; warp: 0 .. kConverters - 1 */
template <typename Tile>
FLASHCORE_DEVICE void wgmma_mixed_convert(const flashcore_attention &a, const wgmma_schedule &plan, uint32_t shared, int warp) {
  using converter = wgmma_mixed_converter<Tile>;
  const wgmma_barriers<Tile> barriers = {shared + Tile::kOffsetBarriers};
  const uint32_t slots = shared + Tile::kOffsetSlots + warp * Tile::kSlots * Tile::kBytesSlot + threadIdx.x % 32 * 16;
  converter source(a, plan, warp);
  wgmma_ring<Tile::kStages> at = {0, 0}; /* of the batch that is stored, and its part */
  int part = warp, waiting = 0;          /* batches asked for and not stored yet */
  bool more = true;
  for (int n = 0;; ++n) { /* batch n is asked for, batch n - (kSlots - 1) is stored */
    if (more) more = source.advance();
    if (more) {
      source.load(slots + n % Tile::kSlots * Tile::kBytesSlot);
      ++waiting;
    }
    cp_async_commit();
    if (n < Tile::kSlots - 1) continue;
    if (waiting-- == 0) return;
#pragma unroll 1
    for (; part >= converter::kParts; part -= converter::kParts) at = at.next();
    const bool is_v = part >= converter::kBatches;
    const uint32_t tile = shared + (is_v ? Tile::kOffsetV + at.stage * Tile::kBytesV : Tile::kOffsetK + at.stage * Tile::kBytesK);
    const uint32_t to = tile + (is_v ? part - converter::kBatches : part) * converter::kBatchRows * 128;
    const uint32_t slot = slots + (n + 1) % Tile::kSlots * Tile::kBytesSlot;
    cp_async_wait<Tile::kSlots - 1>();
    mbarrier_wait(is_v ? barriers.v_free(at.stage) : barriers.k_free(at.stage), at.parity ^ 1u);
    using T = typename Tile::T;
    using V = typename wgmma_values<Tile>::type;
    if (is_v || element<T>::kDtype == element<V>::kDtype) converter::template store<V>(slot, to);
    else converter::template store<T>(slot, to);
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(is_v ? barriers.v_full(at.stage) : barriers.k_full(at.stage));
    part += Tile::kConverters;
  }
}

/* What the consumers have to know of a tile: lane i works it out for consumer warp i. more: there is a tile.   callers  one warp, converged */
template <typename Tile, typename Rule>
FLASHCORE_DEVICE void wgmma_mixed_plan_tile(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_work &w, int tile, bool more,
                                            wgmma_shared<Tile> &block, uint32_t shared) {
  const wgmma_barriers<Tile> barriers = {shared + Tile::kOffsetBarriers};
  const int lane = threadIdx.x % 32, row_in_tile = lane * 16;
  mbarrier_wait(barriers.work_free(tile), (tile / 2 & 1) ^ 1);
  if (lane < Tile::kConsumerWarps) {
    wgmma_walk &walk = block.walks[tile % 2][lane];
    if (more) {
      const int kv_head = plan.group.quotient(w.head >> plan.pack_log2);
      const float k_scale = fp8_descale(a.k_descale, w.batch, kv_head);
      wgmma_find_walk<Tile>(a, plan, w, row_in_tile / 64 * 64, row_in_tile, walk);
      walk.scale = Rule::kActive ? a.scale * k_scale : fp8_normal(plan.scale_log2 * k_scale);
      walk.v_scale = fp8_descale(a.v_descale, w.batch, kv_head);
    } else walk.blocks = 0;
    mbarrier_arrive(barriers.work_full(tile));
  }
  __syncwarp();
}

/* Q of the block's tiles, and their plan.   callers  one warp, converged
 *   WHY the order: Q waits until the tile before has no use for it; where that is its end, the consumers would wait for the plan */
template <typename Tile, typename Rule>
FLASHCORE_DEVICE void wgmma_mixed_produce(const flashcore_attention &a, const wgmma_schedule &plan, const tensor_map &map, wgmma_shared<Tile> &block,
                                          uint32_t shared) {
  const wgmma_barriers<Tile> barriers = {shared + Tile::kOffsetBarriers};
  const wgmma_input in = {map, a.q, a.dim_qk, (int32_t)flashcore_extents_of(&a).rows_q, plan.pack_log2 > 0};
  const int copy = Rule::kActive ? plan.copy : 0;
  wgmma_ring<Tile::kQStages> q = {0, 0};
  wgmma_work w;
  int tile = 0;
  for (int32_t round = -1; wgmma_next_tile<Tile>(round, a, plan, w); ++tile) {
    if (!Tile::kOverlapsTiles) wgmma_mixed_plan_tile<Tile, Rule>(a, plan, w, tile, true, block, shared);
    for (int wg = 0; wg < Tile::kGroups; ++wg)
      wgmma_fill<Tile::kColumnsQk, 64>(shared + (q.stage * Tile::kGroups + wg) * Tile::kBytesQ, in, copy, barriers.q_full(q.stage, wg),
                                       barriers.q_free(q.stage, wg), q.parity, w.q_row + plan.query_of(w.row0 + 64 * wg), w.head >> plan.pack_log2,
                                       a.cu_seqlens_q ? 0 : w.batch);
    q = q.next();
    if (Tile::kOverlapsTiles) wgmma_mixed_plan_tile<Tile, Rule>(a, plan, w, tile, true, block, shared);
  }
  wgmma_mixed_plan_tile<Tile, Rule>(a, plan, w, tile, false, block, shared);
}

#endif /* FLASHCORE_HAS_SM90A */

/* O = v_descale softmax(rule(k_descale scale Q K^T)) V, of 16-bit Q and O.
 *   shapes   map: of Q; plan: its `ragged` is 0, as K and V past the end of a sequence are zeros already
 *   callers  as for wgmma_kernel */
template <typename Tile, typename Rule>
FLASHCORE_KERNEL void __launch_bounds__(Tile::kThreads, 1)
    wgmma_mixed_kernel(const __grid_constant__ flashcore_attention a, const __grid_constant__ wgmma_schedule plan,
                       const __grid_constant__ tensor_map map, const Rule rule) {
#if FLASHCORE_HAS_SM90A
  extern __shared__ __align__(128) unsigned char flashcore_shared[];
  const uint32_t shared = (shared_address(flashcore_shared) + 1023) & ~1023u;
  __shared__ wgmma_shared<Tile> block;
  if (threadIdx.x == 0) wgmma_barriers<Tile>{shared + Tile::kOffsetBarriers}.init(wgmma_mixed_converter<Tile>::kBatches);
  __syncthreads();
  const int warp_index = warp_uniform((int)threadIdx.x / 32);
  if (warp_index < 4) {
    setmaxnreg_dec<Tile::kProducerRegisters>();
    if (warp_index == 0) wgmma_mixed_produce<Tile, Rule>(a, plan, map, block, shared);
    else wgmma_mixed_convert<Tile>(a, plan, shared, warp_index - 1);
  } else {
    setmaxnreg_inc<Tile::kConsumerRegisters>();
    const no_prologue prologue;
    const no_epilogue epilogue;
    wgmma_warp<Tile, Rule, no_prologue, no_epilogue> warp(block, shared, rule, prologue, epilogue);
    warp.consume(a, plan);
  }
#else
  __trap();
#endif
}

} // namespace v0_1_0
} // namespace flashcore
#endif /* __CUDACC__ */

/* ================================================================================================================================
 * 13  Quantisers: validation, launch, CPU reference
 * ================================================================================================================================ */
#if !defined(__CUDACC_RTC__) && defined(FLASHCORE_IMPLEMENTATION)

static flashcore_status flashcore_fp8_validate_types(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_DTYPE, "dtype", q->dtype, FLASHCORE_F32, FLASHCORE_E5M2},
      {FLASHCORE_INVALID_DTYPE, "dtype_out", q->dtype_out, FLASHCORE_F32, FLASHCORE_E5M2},
      {FLASHCORE_UNSUPPORTED_DTYPE, "dtype", q->dtype, FLASHCORE_F32, FLASHCORE_BF16},
      {FLASHCORE_UNSUPPORTED_DTYPE, "dtype_out", q->dtype_out, FLASHCORE_E4M3, FLASHCORE_E5M2},
  };
  return flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error);
}

static flashcore_status flashcore_fp8_validate_sizes(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_SIZE, "batch", q->batch, 1, INT32_MAX},
      {FLASHCORE_INVALID_SIZE, "rows", q->rows, 1, FLASHCORE_MAX_SEQ},
      {FLASHCORE_INVALID_SIZE, "heads", q->heads, 1, INT32_MAX},
      {FLASHCORE_UNSUPPORTED_DIM, "dim", q->dim, 16, FLASHCORE_MAX_DIM},
      {FLASHCORE_INVALID_STRIDE, "transposed", q->transposed, 0, 1},
      {FLASHCORE_INVALID_SCALE, "granularity", q->granularity, FLASHCORE_FP8_PER_HEAD, FLASHCORE_FP8_GIVEN},
  };
  FLASHCORE_TRY(flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error));
  if (q->dim % 16 != 0)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DIM, "dim", q->dim, 16, "dim is %d: must be a multiple of 16", (int)q->dim);
  const int64_t heads = (int64_t)q->batch * q->heads, most = INT32_MAX / (q->rows < 32 ? 32 : q->rows); /* at least the blocks of any kernel */
  if (heads > most)
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "batch", heads, most, "batch * heads is %lld: must be at most %lld with rows = %d",
                            (long long)heads, (long long)most, (int)q->rows);
  if (q->rotation != 0 && (q->rotation < 16 || (q->rotation & (q->rotation - 1)) != 0 || q->dim % q->rotation != 0))
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "rotation", q->rotation, q->dim,
                            "rotation is %d: must be 0 or a power of two from 16 on that divides dim = %d", (int)q->rotation, (int)q->dim);
  return FLASHCORE_OK;
}

/* WHY the bounds: 1 / scale is a normal number too. */
static flashcore_status flashcore_fp8_validate_scales(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  const int32_t unit = q->transposed ? 16 : 1;
  if (q->granularity == FLASHCORE_FP8_PER_BLOCK && (q->block_rows < 1 || q->rows % q->block_rows != 0 || q->block_rows % unit != 0))
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "block_rows", q->block_rows, q->rows,
                            "block_rows is %d: must divide %d rows and be a multiple of %d", (int)q->block_rows, (int)q->rows, (int)unit);
  if (q->granularity == FLASHCORE_FP8_GIVEN && !(q->scale >= FLT_MIN && q->scale <= 1.f / FLT_MIN))
    return flashcore_refuse(error, FLASHCORE_INVALID_SCALE, "scale", q->scale < 0.f ? -1 : 0, 0, "scale is %g: must be from 2^-126 to 2^126",
                            (double)q->scale);
  return FLASHCORE_OK;
}

/* A tensor as bytes: along batch, the dim that stride_s steps along, heads, and last the contiguous one. */
typedef struct flashcore_fp8_view {
  const flashcore_tensor *tensor;
  int64_t extents[4];
  int32_t bytes; /* of an element */
} flashcore_fp8_view;

static flashcore_fp8_view flashcore_fp8_view_of(const flashcore_fp8_quantise_args *q, int is_output) {
  const int transposed = is_output && q->transposed;
  const flashcore_fp8_view view = {is_output ? &q->out : &q->x,
                                   {q->batch, transposed ? q->dim : q->rows, q->heads, transposed ? q->rows : q->dim},
                                   flashcore_dtype_bytes(is_output ? q->dtype_out : q->dtype)};
  return view;
}

static flashcore_status flashcore_fp8_validate_tensor(const flashcore_fp8_quantise_args *q, int is_output, flashcore_error *error) {
  const flashcore_fp8_view x = flashcore_fp8_view_of(q, is_output);
  const flashcore_stride strides[] = {
      {is_output ? "out.stride_b" : "x.stride_b", x.tensor->stride_b, x.extents[0], x.bytes},
      {is_output ? "out.stride_s" : "x.stride_s", x.tensor->stride_s, x.extents[1], x.bytes},
      {is_output ? "out.stride_h" : "x.stride_h", x.tensor->stride_h, x.extents[2], x.bytes},
  };
  const int32_t step = 16 / x.bytes;
  FLASHCORE_TRY((is_output ? flashcore_check_output_strides : flashcore_check_strides)(strides, FLASHCORE_COUNT(strides), error));
  for (int i = 0; i < FLASHCORE_COUNT(strides); ++i)
    if (strides[i].extent > 1 && strides[i].stride % step != 0)
      return flashcore_refuse(error, FLASHCORE_INVALID_STRIDE, strides[i].field, strides[i].stride, step, "%s is %lld: must be a multiple of %d",
                              strides[i].field, (long long)strides[i].stride, (int)step);
  return FLASHCORE_OK;
}

static flashcore_status flashcore_fp8_validate_tensors(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  const flashcore_pointer pointers[] = {
      {"x.data", q->x.data, 16, 1}, {"out.data", q->out.data, 16, 1}, {"descale", q->descale, 4, q->granularity != FLASHCORE_FP8_GIVEN},
      {"mean", q->mean, 16, 0},     {"seqlens", q->seqlens, 4, 0},
  };
  FLASHCORE_TRY(flashcore_check_pointers(pointers, FLASHCORE_COUNT(pointers), error));
  FLASHCORE_TRY(flashcore_fp8_validate_tensor(q, 0, error));
  return flashcore_fp8_validate_tensor(q, 1, error);
}

/* Addresses from the first to the last byte of something; none: low = high. */
typedef struct flashcore_fp8_span {
  const char *field;
  int64_t low, high;
} flashcore_fp8_span;

static flashcore_fp8_span flashcore_fp8_span_of_tensor(const flashcore_fp8_quantise_args *q, int is_output) {
  const flashcore_fp8_view x = flashcore_fp8_view_of(q, is_output);
  const int64_t strides[3] = {x.tensor->stride_b, x.tensor->stride_s, x.tensor->stride_h}, start = (int64_t)(uintptr_t)x.tensor->data;
  flashcore_fp8_span span = {is_output ? "out" : "x", start, start + x.extents[3] * x.bytes};
  for (int i = 0; i < 3; ++i) {
    const int64_t reach = x.extents[i] > 1 ? strides[i] * (x.extents[i] - 1) * x.bytes : 0;
    if (reach < 0) span.low += reach;
    else span.high += reach;
  }
  return span;
}
static flashcore_fp8_span flashcore_fp8_span_of_array(const char *field, const void *data, int64_t count) {
  const int64_t start = (int64_t)(uintptr_t)data;
  const flashcore_fp8_span span = {field, start, start + (data ? 4 * count : 0)};
  return span;
}

/* Outputs are written while inputs and other outputs are read. */
static flashcore_status flashcore_fp8_validate_aliases(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  const int64_t heads = (int64_t)q->batch * q->heads;
  const int one = q->granularity == FLASHCORE_FP8_PER_TENSOR || q->granularity == FLASHCORE_FP8_GIVEN;
  const flashcore_fp8_span spans[] = {
      flashcore_fp8_span_of_tensor(q, 1), /* outputs first */
      flashcore_fp8_span_of_array("descale", q->descale, one ? 1 : heads * flashcore_fp8_blocks(q)),
      flashcore_fp8_span_of_array("mean", q->mean, heads * q->dim),
      flashcore_fp8_span_of_tensor(q, 0),
      flashcore_fp8_span_of_array("seqlens", q->seqlens, q->batch),
  };
  for (int i = 0; i < 3; ++i)
    for (int j = i + 1; j < FLASHCORE_COUNT(spans); ++j)
      if (spans[i].low < spans[j].high && spans[j].low < spans[i].high && spans[i].low < spans[i].high && spans[j].low < spans[j].high)
        return flashcore_refuse(error, FLASHCORE_ALIASED_OUTPUT, spans[i].field, spans[i].low, spans[j].low,
                                "%s overlaps %s: an output's bytes, first to last, must be its own", spans[i].field, spans[j].field);
  return FLASHCORE_OK;
}

static flashcore_status flashcore_fp8_validate(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  if (!q) return flashcore_refuse(error, FLASHCORE_NULL_POINTER, "quantise_args", 0, 0, "quantise_args is null: a descriptor is needed");
  if (q->struct_size != sizeof *q)
    return flashcore_refuse(error, FLASHCORE_INVALID_STRUCT_SIZE, "struct_size", (int64_t)q->struct_size, (int64_t)sizeof *q,
                            "struct_size is %lld: must be %lld (call flashcore_fp8_quantise_init)", (long long)q->struct_size, (long long)sizeof *q);
  FLASHCORE_TRY(flashcore_fp8_validate_types(q, error));
  FLASHCORE_TRY(flashcore_fp8_validate_sizes(q, error));
  FLASHCORE_TRY(flashcore_fp8_validate_scales(q, error));
  FLASHCORE_TRY(flashcore_fp8_validate_tensors(q, error));
  return flashcore_fp8_validate_aliases(q, error);
}

#if defined(__CUDACC__)
static flashcore_status flashcore_fp8_launch(const void *kernel, int64_t blocks, int threads, const flashcore_fp8_quantise_args *q,
                                             const flashcore::quantise_plan *plan, flashcore_stream stream, flashcore_error *error) {
  flashcore_fp8_quantise_args args = *q;
  flashcore::quantise_plan its_plan = *plan;
  void *kernel_args[2] = {&args, &its_plan}; /* a kernel takes as many as it has parameters */
  const cudaError_t code = cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3((unsigned)threads), kernel_args, 0, stream);
  return code == cudaSuccess ? FLASHCORE_OK : flashcore_cuda_refuse(error, "cudaLaunchKernel", code);
}

template <typename T>
static flashcore_status flashcore_fp8_quantise_of(const flashcore_fp8_quantise_args *q, flashcore_stream stream, flashcore_error *error) {
  using namespace flashcore;
  const int64_t heads = (int64_t)q->batch * q->heads, slice = quantise_tile::kMeanColumns * 16 / (int64_t)sizeof(T);
  const bool two_passes = q->granularity == FLASHCORE_FP8_PER_TENSOR || q->granularity == FLASHCORE_FP8_PER_HEAD;
  quantise_plan plan = make_quantise_plan(*q, false);
  if (q->mean) {
    FLASHCORE_TRY(flashcore_fp8_launch(reinterpret_cast<const void *>(&quantise_mean_kernel<T>), heads * ((q->dim + slice - 1) / slice),
                                       quantise_tile::kMeanThreads, q, &plan, stream, error));
    plan.backwards = 1;
  }
  if (two_passes) {
    const size_t bytes = sizeof(float) * (q->granularity == FLASHCORE_FP8_PER_HEAD ? (size_t)heads : 1);
    const cudaError_t code = cudaMemsetAsync(q->descale, 0, bytes, stream);
    if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaMemsetAsync", code);
    FLASHCORE_TRY(
        flashcore_fp8_launch(reinterpret_cast<const void *>(&quantise_amax_kernel<T>), heads * plan.blocks, plan.threads, q, &plan, stream, error));
    plan.backwards = !plan.backwards;
  }
  const void *const kernel =
      q->transposed ? reinterpret_cast<const void *>(&quantise_kernel<T, true>) : reinterpret_cast<const void *>(&quantise_kernel<T, false>);
  return flashcore_fp8_launch(kernel, heads * plan.blocks, plan.threads, q, &plan, stream, error);
}

FLASHCORE_API flashcore_status flashcore_fp8_quantise(const flashcore_fp8_quantise_args *q, flashcore_stream stream, flashcore_error *error) {
  flashcore_device device;
  FLASHCORE_TRY(flashcore_fp8_validate(q, error));
  FLASHCORE_TRY(flashcore_query_device(-1, &device, error));
  FLASHCORE_TRY(flashcore_check_arch(&device, "quantise", 75, error));
#if !defined(FLASHCORE_NO_F32)
  if (q->dtype == FLASHCORE_F32) return flashcore_fp8_quantise_of<float>(q, stream, error);
#endif
#if !defined(FLASHCORE_NO_F16)
  if (q->dtype == FLASHCORE_F16) return flashcore_fp8_quantise_of<__half>(q, stream, error);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (q->dtype == FLASHCORE_BF16) return flashcore_fp8_quantise_of<__nv_bfloat16>(q, stream, error);
#endif
  return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", q->dtype, 0, "dtype: the quantiser was compiled without type %d",
                          (int)q->dtype);
}
#else
FLASHCORE_API flashcore_status flashcore_fp8_quantise(const flashcore_fp8_quantise_args *q, flashcore_stream stream, flashcore_error *error) {
  (void)stream;
  FLASHCORE_TRY(flashcore_fp8_validate(q, error));
  return flashcore_no_cuda(error);
}
#endif

/* The mean of dim d over the rows of a head, added up as the kernel does it. */
static float flashcore_fp8_mean_at(const flashcore_fp8_quantise_args *q, int32_t b, int32_t h, int32_t d) {
  const int32_t rows = flashcore_fp8_rows(q, b), lanes = FLASHCORE_FP8_MEAN_LANES;
  float part[FLASHCORE_FP8_MEAN_LANES] = {0.f};
  int32_t count = 0;
  for (int32_t row = 0; row < rows; ++row) {
    const float x = (float)flashcore_load(q->x.data, q->dtype, b * q->x.stride_b + row * q->x.stride_s + h * q->x.stride_h + d);
    if (!(fabsf(x) <= FLT_MAX)) continue;
    part[row % lanes] += x;
    ++count;
  }
  for (int32_t step = 1; step < lanes; step *= 2)
    for (int32_t lane = 0; lane < lanes; lane += 2 * step) part[lane] += part[lane + step];
  return flashcore_fp8_mean(part[0], count);
}
/* A row as it will be rounded. */
static void flashcore_fp8_row(const flashcore_fp8_quantise_args *q, int32_t b, int32_t h, int32_t row, float *x) {
  const int64_t at = b * q->x.stride_b + row * q->x.stride_s + h * q->x.stride_h;
  for (int32_t d = 0; d < q->dim; ++d) {
    x[d] = (float)flashcore_load(q->x.data, q->dtype, at + d);
    if (q->mean) x[d] -= q->mean[((int64_t)b * q->heads + h) * q->dim + d];
  }
  for (int32_t step = 1; step < q->rotation; step *= 2)
    for (int32_t d = 0; d < q->dim; ++d)
      if (!(d & step)) {
        const float low = x[d], high = x[d + step];
        x[d] = low + high;
        x[d + step] = low - high;
      }
  const float unit = flashcore_fp8_unit(q->rotation);
  for (int32_t d = 0; d < q->dim && q->rotation; ++d) x[d] *= unit;
}
static float flashcore_fp8_scale_of_rows(const flashcore_fp8_quantise_args *q, int32_t b, int32_t h, int32_t first, int32_t last) {
  float amax = 0.f, x[FLASHCORE_MAX_DIM];
  for (int32_t row = first; row < last; ++row) {
    flashcore_fp8_row(q, b, h, row, x);
    for (int32_t d = 0; d < q->dim; ++d)
      if (fabsf(x[d]) <= FLT_MAX && fabsf(x[d]) > amax) amax = fabsf(x[d]);
  }
  return flashcore_fp8_descale(amax, q->dtype_out);
}
/* The rows first .. last - 1 of a head, with one scale. */
static void flashcore_fp8_store_rows(const flashcore_fp8_quantise_args *q, int32_t b, int32_t h, int32_t first, int32_t last, float descale) {
  const float factor = 1.f / descale;
  float x[FLASHCORE_MAX_DIM];
  for (int32_t row = first; row < last; ++row) {
    flashcore_fp8_row(q, b, h, row, x);
    for (int32_t d = 0; d < q->dim; ++d) {
      const int64_t at = q->transposed ? d * q->out.stride_s + row : row * q->out.stride_s + d;
      const float scaled = x[d] * factor;
      flashcore_store(q->out.data, q->dtype_out, b * q->out.stride_b + h * q->out.stride_h + at, (double)scaled);
    }
  }
}

/* All scales first, each at the index where the kernels put it, then all rows. */
FLASHCORE_API flashcore_status flashcore_fp8_quantise_reference(const flashcore_fp8_quantise_args *q, flashcore_error *error) {
  FLASHCORE_TRY(flashcore_fp8_validate(q, error));
  const int32_t blocks = flashcore_fp8_blocks(q), block_rows = q->granularity == FLASHCORE_FP8_PER_BLOCK ? q->block_rows : q->rows;
  const int one = q->granularity == FLASHCORE_FP8_PER_TENSOR || q->granularity == FLASHCORE_FP8_GIVEN;
  const int64_t heads = (int64_t)q->batch * q->heads;
  float most = 0.f;
  for (int64_t unit = 0; q->mean && unit < heads; ++unit)
    for (int32_t d = 0; d < q->dim; ++d)
      q->mean[unit * q->dim + d] = flashcore_fp8_mean_at(q, (int32_t)(unit / q->heads), (int32_t)(unit % q->heads), d);
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t n = 0; n < heads * blocks; ++n) {
      const int32_t b = (int32_t)(n / blocks / q->heads), h = (int32_t)(n / blocks % q->heads), rows = flashcore_fp8_rows(q, b);
      const int32_t first = (int32_t)(n % blocks) * block_rows, last = first + block_rows < rows ? first + block_rows : rows;
      if (pass == 1) flashcore_fp8_store_rows(q, b, h, first, last, q->granularity == FLASHCORE_FP8_GIVEN ? q->scale : q->descale[one ? 0 : n]);
      else if (q->granularity != FLASHCORE_FP8_GIVEN) {
        const float descale = flashcore_fp8_scale_of_rows(q, b, h, first, last);
        most = descale > most ? descale : most;
        q->descale[one ? 0 : n] = one ? most : descale;
      } else if (q->descale) q->descale[0] = q->scale;
    }
  return FLASHCORE_OK;
}
#endif

#if !defined(__CUDACC_RTC__) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))
#define FLASHCORE_FP8_TRY(call)                                                                                                                      \
  do {                                                                                                                                               \
    const flashcore_status fp8_status = (call);                                                                                                      \
    if (fp8_status != FLASHCORE_OK) return fp8_status;                                                                                               \
  } while (0)
#endif

/* ================================================================================================================================
 * 14  Attention: plan and launch
 * ================================================================================================================================ */
#if defined(__CUDACC__) && !defined(__CUDACC_RTC__) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))

/* Is Q fp16 or bf16 beside fp8 K and V? */
static bool flashcore_fp8_is_mixed(const flashcore_attention *a) {
  return (a->dtype == FLASHCORE_F16 || a->dtype == FLASHCORE_BF16) && flashcore_is_fp8(a->dtype_kv);
}

/* What both fp8 kernels ask for: types, keys that are neither paged nor split, dims, addresses and strides of whole 16 bytes.
 *   mixed    the types are right already: Q is not fp8
 *   fp8_o    is an fp8 O served? */
static flashcore_status flashcore_fp8_check_attention(const flashcore_attention *a, const flashcore_device *device, const char *kernel, bool mixed,
                                                      bool fp8_o, int min_arch, flashcore_error *error) {
  if (!mixed && !flashcore_is_fp8(a->dtype))
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", a->dtype, FLASHCORE_E4M3, "dtype: the %s kernel serves fp8, not %d", kernel,
                            (int)a->dtype);
  if (!mixed && a->dtype_kv != a->dtype)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_kv", a->dtype_kv, a->dtype,
                            "dtype_kv: the %s kernel needs one type for Q, K and V (%d), not %d", kernel, (int)a->dtype, (int)a->dtype_kv);
  const int32_t last_o = fp8_o ? FLASHCORE_E5M2 : FLASHCORE_BF16;
  if (a->dtype_o < FLASHCORE_F16 || a->dtype_o > last_o)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", a->dtype_o, last_o, "dtype_o: the %s kernel writes %s, not %d", kernel,
                            fp8_o ? "fp16, bf16 and fp8" : "fp16 and bf16", (int)a->dtype_o);
  flashcore_attention other = *a; /* the rest is asked of 16-bit types too */
  other.dtype = other.dtype_kv = other.dtype_o = FLASHCORE_F16;
  FLASHCORE_FP8_TRY(flashcore_check_tensor_core(&other, device, kernel, min_arch, error));
  const int32_t dims[2] = {a->dim_qk, a->dim_v};
  for (int i = 0; i < 2; ++i)
    if (dims[i] % 16 || dims[i] > 256)
      return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DIM, i ? "dim_v" : "dim_qk", dims[i], dims[i] % 16 ? 16 : 256,
                              "%s: the %s kernel serves multiples of 16 up to 256, not %d", i ? "dim_v" : "dim_qk", kernel, (int)dims[i]);
  const flashcore_tensor *tensors[4] = {&a->q, &a->k, &a->v, &a->o};
  const char *names[4] = {"q", "k", "v", "o"};
  for (int i = 0; i < 4; ++i) {
    const bool wide = i == 3 ? !flashcore_is_fp8(a->dtype_o) : i == 0 && mixed;
    const int64_t address = (int64_t) reinterpret_cast<uintptr_t>(tensors[i]->data), step = wide ? 8 : 16;
    const int64_t strides[3] = {tensors[i]->stride_b, tensors[i]->stride_s, tensors[i]->stride_h};
    if (address % 16)
      return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, names[i], address, 16, "%s: the %s kernel needs a 16-byte aligned address",
                              names[i], kernel);
    for (const int64_t stride : strides)
      if (stride % step)
        return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, names[i], stride, step,
                                "%s: the %s kernel needs strides that are multiples of %d elements, not %lld", names[i], kernel, (int)step,
                                (long long)stride);
  }
  return FLASHCORE_OK;
}

enum { FLASHCORE_MIXED_COPY, FLASHCORE_MIXED_GENERAL }; /* of flashcore_plan.param */

/* ---- wgmma, 16-bit Q beside fp8 K and V ---- */

/* The problem with Q for K and V, too: its copy tells how Q and O can be moved. */
static flashcore_attention flashcore_mixed_queries(const flashcore_attention *a) {
  flashcore_attention queries = *a;
  queries.k = queries.v = a->q;
  queries.heads_kv = a->heads_q;
  queries.seq_kv = a->seq_q;
  queries.cu_seqlens_kv = a->cu_seqlens_q;
  queries.total_kv = a->total_q;
  return queries;
}

/* What fp8 kernels ask of K and V; Q and O lie as they like. */
static flashcore_status flashcore_mixed_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  if (flashcore_is_fp8(a->dtype_o))
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", a->dtype_o, FLASHCORE_BF16,
                            "dtype_o: beside 16-bit Q the qgmma kernel writes fp16 and bf16, not %d", (int)a->dtype_o);
  flashcore_attention keys = *a;
  keys.dtype = a->dtype_kv;
  keys.q = keys.o = flashcore_tensor{};
  FLASHCORE_FP8_TRY(flashcore_fp8_check_attention(&keys, device, "qgmma", false, false, 90, error));
  if (device->arch != 90)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_ARCH, "device", device->arch, 90,
                            "the qgmma kernel runs on sm_90 alone, the device is sm_%d", (int)device->arch);
  return FLASHCORE_OK;
}

/* The instance a problem gets. */
template <typename T, typename F8, int kHeadDim> static void flashcore_mixed_use(bool general, flashcore_plan *plan) {
  using namespace flashcore;
  using wide = wgmma_mixed_tile_for<T, F8, kHeadDim, kWideTile>;
  using slim = wgmma_mixed_tile_for<T, F8, kHeadDim, kGeneralTile>;
  plan->kernel = general ? reinterpret_cast<const void *>(&wgmma_mixed_kernel<slim, descriptor_rule>)
                         : reinterpret_cast<const void *>(&wgmma_mixed_kernel<wide, no_rule>);
  plan->d.block_q = general ? slim::kBlockQ : wide::kBlockQ;
  plan->d.block_kv = general ? slim::kBlockKv : wide::kBlockKv;
  plan->d.stages = general ? slim::kStages : wide::kStages;
  plan->d.head_dim_qk = plan->d.head_dim_v = kHeadDim;
  plan->d.threads = general ? slim::kThreads : wide::kThreads;
  plan->d.shared_bytes = general ? slim::kSharedBytes : wide::kSharedBytes;
}
/* The smallest instance that holds both dims, at most 256. */
template <typename T, typename F8> static void flashcore_mixed_pick(const flashcore_attention *a, bool general, flashcore_plan *plan) {
  const int dim = a->dim_qk > a->dim_v ? a->dim_qk : a->dim_v;
  if (dim <= 64) flashcore_mixed_use<T, F8, 64>(general, plan);
  else if (dim <= 128) flashcore_mixed_use<T, F8, 128>(general, plan);
  else flashcore_mixed_use<T, F8, 256>(general, plan);
}
template <typename T>
static void flashcore_mixed_select([[maybe_unused]] const flashcore_attention *a, [[maybe_unused]] bool general,
                                   [[maybe_unused]] flashcore_plan *plan) {
#if !defined(FLASHCORE_NO_E4M3)
  if (a->dtype_kv == FLASHCORE_E4M3) flashcore_mixed_pick<T, flashcore::e4m3>(a, general, plan);
#endif
#if !defined(FLASHCORE_NO_E5M2)
  if (a->dtype_kv == FLASHCORE_E5M2) flashcore_mixed_pick<T, flashcore::e5m2>(a, general, plan);
#endif
}

static flashcore_status flashcore_mixed_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                             flashcore_error *error) {
  FLASHCORE_FP8_TRY(flashcore_mixed_check(a, device, error));
  const int32_t copy = flashcore::wgmma_copy_of(flashcore_mixed_queries(a));
  const bool general = copy || flashcore_has_rule(a);
#if !defined(FLASHCORE_NO_F16)
  if (a->dtype == FLASHCORE_F16) flashcore_mixed_select<__half>(a, general, plan);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (a->dtype == FLASHCORE_BF16) flashcore_mixed_select<__nv_bfloat16>(a, general, plan);
#endif
  if (!plan->kernel)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype_kv", a->dtype_kv, 0,
                            "dtype_kv: the qgmma kernel was compiled without type %d for Q, or %d for K and V", (int)a->dtype, (int)a->dtype_kv);
  if (flashcore::wgmma_lacks_body(plan->kernel, device->ordinal))
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "device", device->arch, 90,
                            "the qgmma kernel was compiled for sm_90: it needs sm_90a (-gencode arch=compute_90a,code=sm_90a)");
  flashcore_description *d = &plan->d;
  d->packed_group = copy ? 1 : flashcore::wgmma_pack_of(*a, d->block_q);
  const int64_t units = (int64_t)a->heads_q / d->packed_group * a->batch, rows = (int64_t)a->seq_q * d->packed_group;
  const int64_t tiles = (rows + d->block_q - 1) / d->block_q, most = INT32_MAX / 2 / tiles;
  if (units > most)
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "batch", units, most,
                            "batch * heads_q / %d is %lld: the qgmma kernel takes %lld of %lld tiles", (int)d->packed_group, (long long)units,
                            (long long)most, (long long)tiles);
  d->backend = FLASHCORE_BACKEND_QGMMA;
  d->splits = 1;
  plan->is_slow = (int64_t)a->seq_q * (a->heads_q / a->heads_kv) <= 16; /* decoding: qmma shares out the keys of so few rows to its warps */
  plan->param[FLASHCORE_MIXED_COPY] = copy;
  plan->param[FLASHCORE_MIXED_GENERAL] = general;
  d->grid = tiles * units < device->sm_count ? tiles * units : device->sm_count;
  snprintf(d->kernel, sizeof d->kernel, "qgmma %s/%s d%d q%d kv%d%s", a->dtype == FLASHCORE_F16 ? "f16" : "bf16",
           a->dtype_kv == FLASHCORE_E4M3 ? "e4m3" : "e5m2", (int)d->head_dim_v, (int)d->block_q, (int)d->block_kv,
           copy      ? " general, copied"
           : general ? " general"
                     : "");
  return FLASHCORE_OK;
}

static flashcore_status flashcore_mixed_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                               flashcore_error *error) {
  flashcore_attention args = *a;
  flashcore::wgmma_schedule schedule =
      flashcore::make_wgmma_schedule(*a, plan->d.block_q, plan->d.packed_group, plan->param[FLASHCORE_MIXED_GENERAL] != 0, plan->d.grid);
  flashcore::tensor_map map = {};
  CUresult code = CUDA_SUCCESS;
  schedule.copy = plan->param[FLASHCORE_MIXED_COPY];
  schedule.ragged = 0;
  if (!schedule.copy) code = flashcore::wgmma_encode(flashcore::wgmma_views_of(*a, plan->d.packed_group).q, a->dtype, 64, map);
  if (code != CUDA_SUCCESS)
    return flashcore_refuse(error, FLASHCORE_CUDA_ERROR, "cuTensorMapEncodeTiled", code, CUDA_SUCCESS, "cuTensorMapEncodeTiled: error %d", (int)code);
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  void *kernel_args[4] = {&args, &schedule, &map, &rule};
  return flashcore_launch(plan, kernel_args, stream, error);
}

/* ---- wgmma ---- */

/* Besides, inputs that TMA can read: strides not negative and less than 2^40 bytes, and a key. */
static flashcore_status flashcore_qgmma_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  FLASHCORE_FP8_TRY(flashcore_fp8_check_attention(a, device, "qgmma", false, true, 90, error));
  if (device->arch != 90)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_ARCH, "device", device->arch, 90,
                            "the qgmma kernel runs on sm_90 alone, the device is sm_%d", (int)device->arch);
  if (a->seq_kv == 0) return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, "seq_kv", 0, 1, "seq_kv: the qgmma kernel needs a key");
  const flashcore::wgmma_views views = flashcore::wgmma_views_of(*a, 1);
  const flashcore::wgmma_view *inputs[3] = {&views.q, &views.k, &views.v};
  const int64_t limit = ((int64_t)1 << 40) - 16;
  for (const flashcore::wgmma_view *x : inputs) {
    const int64_t strides[3] = {x->tensor.stride_b, x->tensor.stride_s, x->tensor.stride_h};
    for (const int64_t stride : strides)
      if (stride < 0 || stride > limit)
        return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, x->field, stride, limit,
                                "%s: the qgmma kernel needs strides of 0 to 2^40 - 16 elements, not %lld", x->field, (long long)stride);
  }
  return FLASHCORE_OK;
}

#if defined(FLASHCORE_FP8_FAST)
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1204
#error "FLASHCORE_FP8_FAST needs CUDA 12.4: it recomputes scores with fp8 mma.sync"
#endif
#define FLASHCORE_FP8_MODE flashcore::kFast
#else
#define FLASHCORE_FP8_MODE flashcore::kAccurate
#endif

/* The instance a problem gets. */
template <typename T, int kHeadDim, flashcore::qgmma_shape kShape> static void flashcore_qgmma_use(flashcore_plan *plan) {
  constexpr bool kBothModes = kShape == flashcore::kExactFp8 || kShape == flashcore::kGeneralFp8;
  using tile = flashcore::qgmma_tile_for<T, kBothModes ? flashcore::kAccurate : FLASHCORE_FP8_MODE, kHeadDim, kShape>;
  if constexpr (kShape == flashcore::kGeneralFp8)
    plan->kernel = reinterpret_cast<const void *>(&flashcore::qgmma_kernel<tile, flashcore::descriptor_rule>);
  else plan->kernel = reinterpret_cast<const void *>(&flashcore::qgmma_kernel<tile, flashcore::no_rule>);
  plan->d.block_q = tile::kBlockQ;
  plan->d.block_kv = tile::kBlockKv;
  plan->d.stages = tile::kStages;
  plan->d.head_dim_qk = plan->d.head_dim_v = kHeadDim;
  plan->d.threads = tile::kThreads;
  plan->d.shared_bytes = tile::kSharedBytes;
}
/* The tile for a head dim among those in the table, as measured on the H200. */
template <typename T, int kHeadDim> static void flashcore_qgmma_pick(const flashcore_attention *a, bool general, flashcore_plan *plan) {
  using namespace flashcore;
  if (general) return flashcore_qgmma_use<T, kHeadDim, kGeneralFp8>(plan);
  if (a->lse) return flashcore_qgmma_use<T, kHeadDim, kExactFp8>(plan);
  using longer = qgmma_tile_for<T, FLASHCORE_FP8_MODE, kHeadDim, kLongFp8>;
  using shorter = qgmma_tile_for<T, FLASHCORE_FP8_MODE, kHeadDim, kShortFp8>;
  if constexpr (wgmma_has_tile<longer>::value)
    if (a->seq_kv >= longer::kKeys) return flashcore_qgmma_use<T, kHeadDim, kLongFp8>(plan);
  if constexpr (wgmma_has_tile<shorter>::value)
    if (a->seq_kv < shorter::kKeys) return flashcore_qgmma_use<T, kHeadDim, kShortFp8>(plan);
  flashcore_qgmma_use<T, kHeadDim, kWideFp8>(plan);
}
/* The smallest instance that holds both dims, at most 256. */
template <typename T> static void flashcore_qgmma_select(const flashcore_attention *a, bool general, flashcore_plan *plan) {
  const int dim = a->dim_qk > a->dim_v ? a->dim_qk : a->dim_v;
  if (dim <= 64) flashcore_qgmma_pick<T, 64>(a, general, plan);
  else if (dim <= 128) flashcore_qgmma_pick<T, 128>(a, general, plan);
  else flashcore_qgmma_pick<T, 256>(a, general, plan);
}

static flashcore_status flashcore_qgmma_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                             flashcore_error *error) {
  if (flashcore_fp8_is_mixed(a)) return flashcore_mixed_plan(a, device, plan, error);
  FLASHCORE_FP8_TRY(flashcore_qgmma_check(a, device, error));
  const bool general = flashcore_has_rule(a);
#if !defined(FLASHCORE_NO_E4M3)
  if (a->dtype == FLASHCORE_E4M3) flashcore_qgmma_select<flashcore::e4m3>(a, general, plan);
#endif
#if !defined(FLASHCORE_NO_E5M2)
  if (a->dtype == FLASHCORE_E5M2) flashcore_qgmma_select<flashcore::e5m2>(a, general, plan);
#endif
  if (!plan->kernel)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0, "dtype: the qgmma kernel was compiled without type %d",
                            (int)a->dtype);
  if (flashcore::wgmma_lacks_body(plan->kernel, device->ordinal))
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "device", device->arch, 90,
                            "the qgmma kernel was compiled for sm_90: it needs sm_90a (-gencode arch=compute_90a,code=sm_90a)");
  flashcore_description *d = &plan->d;
  const int64_t heads = (int64_t)a->heads_q * a->batch, tiles = (a->seq_q + d->block_q - 1) / d->block_q, most = INT32_MAX / 2 / tiles;
  if (heads > most)
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "batch", heads, most, "batch * heads_q is %lld: the qgmma kernel takes %lld of %lld tiles",
                            (long long)heads, (long long)most, (long long)tiles);
  d->backend = FLASHCORE_BACKEND_QGMMA;
  d->splits = d->packed_group = 1;
  d->grid = tiles * heads < device->sm_count ? tiles * heads : device->sm_count;
  snprintf(d->kernel, sizeof d->kernel, "qgmma %s d%d q%d kv%d %s%s", a->dtype == FLASHCORE_E4M3 ? "e4m3" : "e5m2", (int)d->head_dim_qk,
           (int)d->block_q, (int)d->block_kv, FLASHCORE_FP8_MODE == flashcore::kFast && !general && !a->lse ? "fast" : "accurate",
           general  ? " general"
           : a->lse ? " exact"
                    : "");
  return FLASHCORE_OK;
}

static flashcore_status flashcore_qgmma_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                               flashcore_error *error) {
  if (flashcore_fp8_is_mixed(a)) return flashcore_mixed_launch(a, plan, stream, error);
  flashcore_attention args = *a;
  flashcore::wgmma_schedule schedule = flashcore::make_wgmma_schedule(*a, plan->d.block_q, 1, flashcore_has_rule(a), plan->d.grid);
  flashcore::wgmma_maps maps;
  const CUresult code = flashcore::make_qgmma_maps(*a, plan->d.block_kv, maps);
  if (code != CUDA_SUCCESS)
    return flashcore_refuse(error, FLASHCORE_CUDA_ERROR, "cuTensorMapEncodeTiled", code, CUDA_SUCCESS, "cuTensorMapEncodeTiled: error %d", (int)code);
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  void *kernel_args[4] = {&args, &schedule, &maps, &rule};
  return flashcore_launch(plan, kernel_args, stream, error);
}

static flashcore_backend_ops flashcore_qgmma_ops = {FLASHCORE_BACKEND_QGMMA, flashcore_qgmma_plan, flashcore_qgmma_launch, nullptr};
static struct flashcore_qgmma_registration {
  __forceinline__ flashcore_qgmma_registration() { flashcore_register_backend(&flashcore_qgmma_ops); }
} flashcore_qgmma_registered;

/* ---- mma.sync ---- */

/* Besides, rows less than 2 GiB apart. */
static flashcore_status flashcore_qmma_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  if (!FLASHCORE_QMMA_COMPILER)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "backend", __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__, 1204,
                            "backend: the qmma kernel needs CUDA 12.4, this was compiled with %d.%d", __CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__);
  FLASHCORE_FP8_TRY(flashcore_fp8_check_attention(a, device, "qmma", flashcore_fp8_is_mixed(a), false, 89, error));
  const flashcore_tensor *tensors[4] = {&a->q, &a->k, &a->v, &a->o};
  const char *names[4] = {"q", "k", "v", "o"};
  for (int i = 0; i < 4; ++i) {
    const int64_t limit = INT32_MAX / flashcore_dtype_bytes(i == 0 ? a->dtype : i == 3 ? a->dtype_o : a->dtype_kv), stride = tensors[i]->stride_s;
    if (stride > limit || stride < -limit)
      return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, names[i], stride, limit,
                              "%s: the qmma kernel needs rows less than 2 GiB apart, not %lld elements", names[i], (long long)stride);
  }
  return FLASHCORE_OK;
}

/* The instance a problem gets. */
template <typename Tile, bool kGeneral> static void flashcore_qmma_use(flashcore_plan *plan) {
  if constexpr (kGeneral) plan->kernel = reinterpret_cast<const void *>(&flashcore::qmma_kernel<Tile, flashcore::descriptor_rule>);
  else plan->kernel = reinterpret_cast<const void *>(&flashcore::qmma_kernel<Tile, flashcore::no_rule>);
  plan->d.block_q = Tile::kBlockQ;
  plan->d.block_kv = Tile::kBlockKv;
  plan->d.stages = Tile::kStages;
  plan->d.head_dim_qk = plan->d.head_dim_v = Tile::kHeadDimV;
  plan->d.threads = Tile::kThreads;
  plan->d.shared_bytes = Tile::kSharedBytes;
}
template <template <typename, int, flashcore::mma_shape> class TileFor, typename T, int kHeadDim>
static void flashcore_qmma_pick(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  using wide = TileFor<T, kHeadDim, flashcore::kWide>;
  using narrow = TileFor<T, kHeadDim, flashcore::kNarrow>;
  using few = TileFor<T, kHeadDim, flashcore::kShort>;
  if constexpr (flashcore::wgmma_has_tile<few>::value)
    if ((int64_t)a->seq_q * (a->heads_q / a->heads_kv) <= few::kBlockQ)
      return general ? flashcore_qmma_use<few, true>(plan) : flashcore_qmma_use<few, false>(plan);
  if (general) return flashcore_qmma_use<narrow, true>(plan);
  const int64_t rows = (int64_t)a->seq_q * a->heads_q * a->batch, enough = (int64_t)device->sm_count * wide::kBlocksPerSm * wide::kBlockQ;
  if (rows < enough) flashcore_qmma_use<narrow, false>(plan);
  else flashcore_qmma_use<wide, false>(plan);
}
/* The smallest instance of a table of tiles that holds both dims, at most 256. */
template <template <typename, int, flashcore::mma_shape> class TileFor, typename T>
static void flashcore_qmma_select(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  const int dim = a->dim_qk > a->dim_v ? a->dim_qk : a->dim_v;
  if (dim <= 64) flashcore_qmma_pick<TileFor, T, 64>(a, device, general, plan);
  else if (dim <= 128) flashcore_qmma_pick<TileFor, T, 128>(a, device, general, plan);
  else flashcore_qmma_pick<TileFor, T, 256>(a, device, general, plan);
}
/* The kernel for K and V of type T, with Q of the same type or of 16 bits; none where it was left out. One serves fp16 and bf16. */
template <typename T>
static void flashcore_qmma_select_for(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  if (a->dtype == a->dtype_kv) return flashcore_qmma_select<flashcore::qmma_tile_for, T>(a, device, general, plan);
#if !defined(FLASHCORE_NO_F16)
  if (a->dtype == FLASHCORE_F16) flashcore_qmma_select<flashcore::qmma_mixed_tile_for, T>(a, device, general, plan);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (a->dtype == FLASHCORE_BF16) flashcore_qmma_select<flashcore::qmma_mixed_tile_for, T>(a, device, general, plan);
#endif
}

enum { FLASHCORE_QMMA_ORDER, FLASHCORE_QMMA_GENERAL }; /* plan->param */

static flashcore_status flashcore_qmma_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                            flashcore_error *error) {
  const flashcore_status status = flashcore_qmma_check(a, device, error);
  if (status != FLASHCORE_OK) return status;
  const bool general = flashcore_has_rule(a);
#if !defined(FLASHCORE_NO_E4M3)
  if (a->dtype_kv == FLASHCORE_E4M3) flashcore_qmma_select_for<flashcore::e4m3>(a, device, general, plan);
#endif
#if !defined(FLASHCORE_NO_E5M2)
  if (a->dtype_kv == FLASHCORE_E5M2) flashcore_qmma_select_for<flashcore::e5m2>(a, device, general, plan);
#endif
  if (!plan->kernel)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0,
                            "dtype: the qmma kernel was compiled without Q of type %d beside K and V of type %d", (int)a->dtype, (int)a->dtype_kv);
  const flashcore::mma_spread spread = flashcore::make_mma_spread(*a, plan->d.block_q, device->sm_count);
  const char *const q_type = a->dtype == FLASHCORE_F16 ? "f16/" : a->dtype == FLASHCORE_BF16 ? "bf16/" : "";
  plan->d.backend = FLASHCORE_BACKEND_QMMA;
  plan->d.splits = 1;
  plan->d.packed_group = spread.pack;
  plan->param[FLASHCORE_QMMA_ORDER] = spread.order;
  plan->param[FLASHCORE_QMMA_GENERAL] = general;
  snprintf(plan->d.kernel, sizeof plan->d.kernel, "qmma %s%s d%d q%d kv%d%s", q_type, a->dtype_kv == FLASHCORE_E4M3 ? "e4m3" : "e5m2",
           (int)plan->d.head_dim_v, (int)plan->d.block_q, (int)plan->d.block_kv, general ? " general" : "");
  return flashcore_set_grid(a, spread.blocks, "qmma", plan, error);
}

static flashcore_status flashcore_qmma_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                              flashcore_error *error) {
  flashcore_attention args = *a;
  int64_t grid;
  flashcore::mma_schedule schedule = flashcore::make_mma_schedule(*a, plan->d.block_q, plan->param[FLASHCORE_QMMA_GENERAL] != 0, plan->d.packed_group,
                                                                  plan->param[FLASHCORE_QMMA_ORDER], 16, grid);
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  void *kernel_args[3] = {&args, &schedule, &rule};
  return flashcore_launch(plan, kernel_args, stream, error);
}

static flashcore_backend_ops flashcore_qmma_ops = {FLASHCORE_BACKEND_QMMA, flashcore_qmma_plan, flashcore_qmma_launch, nullptr};
static struct flashcore_qmma_registration {
  __forceinline__ flashcore_qmma_registration() { flashcore_register_backend(&flashcore_qmma_ops); }
} flashcore_qmma_registered;

#endif

/* MIT licence: see LICENSE. Copyright (c) 2026 FlashCore authors. */
#endif /* FLASHCORE_FP8_CUH */
