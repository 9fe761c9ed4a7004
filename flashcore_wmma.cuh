/* flashcore_wmma.cuh · FlashCore 0.1.0 · MIT licence · warp-level tensor-core attention: nvcuda::wmma (sm_75+) and mma.sync (sm_80 .. sm_120)
 *
 * Use:  #include this instead of flashcore.h in the file that defines FLASHCORE_IMPLEMENTATION; flashcore_forward then picks these kernels.
 * Or take the pieces: mma_find_work, mma_warp::load_q, init, mainloop, finish, store make a kernel of your own (examples/score_rule).
 *
 * Contents                                                       backend   element type   dims (smaller ones are padded; WMMA: by 8)    from
 *   1  nvcuda::wmma: traits, kernel                              WMMA      f16            <= 32, 64, 128                                sm_75
 *   2  nvcuda::wmma: plan and launch                                       bf16           same                                          sm_80
 *   3  mma.sync: one struct describes one kernel                 MMA       f16, bf16      <= 32, 64, 80, 96, 128, 192, 256, 512,         sm_80
 *   4  mma.sync: loaders                                                                  (192, 128)
 *   5  mma.sync: which rows and keys a block works on            not served by either: fp32, fp8, page tables, key splits (SIMT serves
 *   6  mma.sync: the mainloop                                    all of them but fp8)
 *   7  mma.sync: kernel
 *   8  mma.sync: plan and launch                                 FLASHCORE_NO_F16, FLASHCORE_NO_BF16 leave an element type out
 *
 * The algorithm of section 6, for 16 kRowTiles query rows per warp; m: reference, l: sum of terms, in the letters of the code:
 *   for each stage of keys:   s = Q K^T           mma, accumulators in registers
 *                             p = exp2(s c - m)   against the reference as it stands; the row sums bound every term
 *                             if a sum is large:  m = max(m, max s c + headroom); o, l scaled along; p again   (rare)
 *                             l += sum p;  o += P V                                                        P never leaves the registers
 *   o / l, stored from the registers
 *
 * Barrier ledger of section 6:
 *   barrier                  arrivals per stage    who waits     what it hands over
 *   cp.async.wait_all        this thread's copies  each thread   its own chunks of K and V of this stage have landed
 *   kStageBarrier            all warps             all warps     two stages: everybody's chunks have landed, and the other stage may be filled again
 *   full[stage]              all threads (async)   all warps     loose stages: all chunks have landed              parity: of the round
 *   free[stage]              1 per warp            all warps     loose stages: it was read and may be filled again   parity: of the round before
 *   __syncthreads (start)    all warps             all warps     loose: full and free exist; kQRegistersReuse: K and V may go where Q was        */
#if defined(FLASHCORE_WMMA_PARTS_ONLY) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))
#error "include flashcore_wmma.cuh before flashcore_fp8.cuh, which takes its building blocks alone"
#endif
#ifndef FLASHCORE_WMMA_CUH
#define FLASHCORE_WMMA_CUH
#include "flashcore.h"
#if defined(__CUDACC__)

#include <mma.h>

namespace flashcore {
inline namespace v0_1_0 {

/* ================================================================================================================================
 * 1  nvcuda::wmma: traits and kernel
 * ================================================================================================================================
 * Written on the portable fragments alone, whose layout CUDA does not disclose: it runs from Turing on, and it is the kernel to read first.
 *
 *   a warp owns kRowTiles x 16 whole query rows; Q and O stay in its fragments, so both products use every warp and no row crosses warps
 *   for each tile of keys:   S = Q K^T          fragments, stored as f32 to the warp's private strip of shared memory
 *                            P = exp2(S - m)    two lanes per row read the strip; P goes back into the strip in the element type
 *                            O = O * factor     only when some row of the warp raised its reference m
 *                            O += P V           P from the strip, V from the stage
 *
 * A 16-row strip; lane 2r + h serves row r, columns 8i + 4h .. 8i + 4h + 3, which is free of bank conflicts with the padding below:
 *
 *        column  0..3   4..7   8..11  12..15 ...
 *   row 0        lane 0 lane 1 lane 0 lane 1          then P in the same bytes, [16][kBlockKv] elements,
 *   row 1        lane 2 lane 3 lane 2 lane 3          and behind both one factor per row, [16] f32
 *
 *   barrier          arrivals     who waits     what it hands over
 *   __syncthreads    all          all           K/V of this tile have landed; the other stage is free (one stage: a second one frees it)
 *   __syncwarp       32 lanes     32 lanes      the strip: S written, S read, P written, P read                                       */
template <typename T_, int kHeadDim_> struct wmma_traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_; /* dim_qk and dim_v are zero-padded to it */
  static constexpr int kWarps = 4, kThreads = kWarps * 32;

  /* Two row tiles let every K and V fragment serve two products; at 128 dims O alone would take 128 registers, so one. */
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kWarpRows = kRowTiles * 16, kBlockQ = kWarps * kWarpRows;
  /* 16 scores per lane and row tile: with O and Q in registers, more would spill. Small enough for two blocks on Turing (one stage) and on an L4. */
  static constexpr int kBlockKv = 32;
  static constexpr int kTilesD = kHeadDim / 16, kTilesKv = kBlockKv / 16;
  static constexpr int kValues = kBlockKv / 2, kPairs = kValues / 2; /* of one row, per lane */

  /* Row strides in elements. An odd multiple of 16 bytes puts 8 rows of 16 bytes in distinct banks (loads of fragments), an odd multiple of
   * 32 bytes 4 rows of 32 bytes (stores of S, and two lanes per row reading it). */
  static constexpr int kLdKv = kHeadDim + 8, kLdS = kBlockKv + 8, kLdP = kBlockKv + 8;
  static constexpr int kDimsQ = kHeadDim < 64 ? kHeadDim : 64, kLdQ = kDimsQ + 8; /* Q passes through the strips, this many dims at a time */

  /* Shared memory: the problem, per stage K [kBlockKv][kLdKv] and V [kBlockKv][kLdKv], then per warp its strips with
   * their factors and its view. */
  static constexpr int kBytesProblem = 64;
  static constexpr int kBytesK = kBlockKv * kLdKv * 2, kBytesStage = 2 * kBytesK;
  static constexpr int kOffsetFactors = 16 * kLdS * 4, kBytesStrip = kOffsetFactors + 16 * 4, kOffsetView = kRowTiles * kBytesStrip;
  static constexpr int kBytesWarp = kOffsetView + 32;
  static FLASHCORE_MEMBER constexpr int shared_bytes(int stages) { return kBytesProblem + stages * kBytesStage + kWarps * kBytesWarp; }

  /* 12 or 16 warps per SM hide the strip's latency; the register limit is what remains for each. */
  static constexpr int kBlocksPerSm = kHeadDim == 32 ? 4 : 3, kMaxRegisters = 65536 / (kThreads * kBlocksPerSm) / 8 * 8;

  static constexpr bool kIsBf16 = element<T>::kDtype == FLASHCORE_BF16;
  static constexpr bool kHasBody = !kIsBf16 || FLASHCORE_HAS_SM80; /* nvcuda::wmma has no bf16 on Turing */

  static_assert(sizeof(T) == 2, "16-bit elements");
  static_assert(kHeadDim == 32 || kHeadDim == 64 || kHeadDim == 128, "tile sizes were chosen for these");
  static_assert(kBlockKv % (kThreads * 8 / kHeadDim) == 0, "the block loads whole rows in whole passes");
  static_assert(kLdKv * 2 % 32 == 16 && kLdP * 2 % 32 == 16 && kLdQ * 2 % 32 == 16, "8 rows of 16 bytes in distinct banks");
  static_assert(kLdS * 4 % 64 == 32, "4 rows of 32 bytes in distinct banks");
  static_assert(kBytesK % 32 == 0 && kBytesStrip % 32 == 0 && kBytesWarp % 32 == 0, "fragments are loaded from 32-byte aligned addresses");
  static_assert(kLdP * 2 <= kLdS * 4, "P fits where S was");
  static_assert(kWarpRows * kLdQ * 2 <= kOffsetView, "a warp's Q fits its strips");
  static_assert(shared_bytes(2) <= 64 * 1024, "fits every GPU from sm_75 on");
};

/* ================================================================================================================================
 * nvcuda::wmma: the problem of one block, and its loader
 * ================================================================================================================================ */

/* The same for all threads and seldom read, so it lies in shared memory: in registers it would be spilled. */
struct wmma_problem {
  flashcore_sequence seq;
  int32_t batch, head, q0; /* q0: first query row of the block */
  flashcore_range keys;    /* that any live row of the block sees */
};

/* 1-D grid: query tile fastest, so that neighbours share K and V in L2; under a causal mask the last tile sees most and goes first. */
template <typename Traits> FLASHCORE_DEVICE wmma_problem wmma_problem_of(const flashcore_attention &a, uint32_t block) {
  wmma_problem p;
  const uint32_t tiles = ((uint32_t)a.seq_q + Traits::kBlockQ - 1) / Traits::kBlockQ, heads = (uint32_t)a.heads_q;
  const uint32_t tile = a.causal == FLASHCORE_CAUSAL_NONE ? block % tiles : tiles - 1 - block % tiles;
  p.q0 = (int32_t)tile * Traits::kBlockQ;
  p.head = (int32_t)(block / tiles % heads);
  p.batch = (int32_t)(block / tiles / heads);
  p.seq = flashcore_sequence_at(&a, p.batch);
  const int32_t end = p.q0 + Traits::kBlockQ < p.seq.len_q ? p.q0 + Traits::kBlockQ : p.seq.len_q;
  p.keys.first = flashcore_visible_keys(&a, p.q0, p.seq.len_q, p.seq.len_kv).first;
  p.keys.last = flashcore_visible_keys(&a, end - 1, p.seq.len_q, p.seq.len_kv).last;
  return p;
}

/* Keys that some row of a warp sees, and keys that every row of it sees. */
struct wmma_view {
  flashcore_range some, all;
};

template <typename Traits> FLASHCORE_DEVICE wmma_view wmma_view_of(const flashcore_attention &a, const wmma_problem &p, int32_t first_row) {
  const flashcore_range top = flashcore_visible_keys(&a, first_row, p.seq.len_q, p.seq.len_kv);
  const flashcore_range bottom = flashcore_visible_keys(&a, first_row + Traits::kWarpRows - 1, p.seq.len_q, p.seq.len_kv);
  return {{top.first, first_row < p.seq.len_q ? bottom.last : 0}, {bottom.first, top.last}};
}

/* A thread copies the same 16-byte chunk column of every kRowsPerPass-th row. */
template <typename Traits> struct wmma_loader {
  using T = typename Traits::T;
  static constexpr int kChunks = Traits::kHeadDim / 8, kRowsPerPass = Traits::kThreads / kChunks, kPasses = Traits::kBlockKv / kRowsPerPass;

  const T *k, *v;    /* this thread's chunk of its first row in the next tile */
  int32_t keys;      /* that are left from that row on */
  bool has_k, has_v; /* the chunk lies within dim_qk, dim_v */
  uint32_t destination;

  __forceinline__ __device__ wmma_loader(const flashcore_attention &a, const wmma_problem &problem, unsigned char *shared, int32_t k0) {
    const int chunk = (int)threadIdx.x % kChunks, row = (int)threadIdx.x / kChunks;
    const int32_t head_kv = problem.head / (a.heads_q / a.heads_kv);
    k = static_cast<const T *>(a.k.data) + problem.seq.k + head_kv * a.k.stride_h + (k0 + row) * a.k.stride_s + chunk * 8;
    v = static_cast<const T *>(a.v.data) + problem.seq.v + head_kv * a.v.stride_h + (k0 + row) * a.v.stride_s + chunk * 8;
    keys = problem.seq.len_kv - k0 - row;
    has_k = chunk * 8 < a.dim_qk;
    has_v = chunk * 8 < a.dim_v;
    destination = shared_address(shared) + (uint32_t)(row * Traits::kLdKv + chunk * 8) * 2;
  }

  /* Starts the copies of the next kBlockKv keys into a stage; rows past the sequence and dims past the tensor become zeros. */
  __forceinline__ __device__ void load(const flashcore_attention &a, int stage) {
    const uint32_t dst = destination + (uint32_t)(stage * Traits::kBytesStage);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t at = dst + (uint32_t)(i * kRowsPerPass * Traits::kLdKv * 2);
      cp_async<16>(at, k, keys > 0 && has_k);
      cp_async<16>(at + Traits::kBytesK, v, keys > 0 && has_v);
      k += kRowsPerPass * a.k.stride_s;
      v += kRowsPerPass * a.v.stride_s;
      keys -= kRowsPerPass;
    }
  }
};

/* ================================================================================================================================
 * nvcuda::wmma: one warp's rows
 * ================================================================================================================================ */

FLASHCORE_DEVICE uint32_t wmma_pack(__half, float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&pair);
}
FLASHCORE_DEVICE uint32_t wmma_pack(__nv_bfloat16, float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&pair);
}

/* All members: called by all 32 lanes, converged. */
template <typename Traits, typename Rule> struct wmma_warp {
  using T = typename Traits::T;
  using accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  using fragment_a = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, nvcuda::wmma::row_major>; /* of Q and P */
  using fragment_k = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, nvcuda::wmma::col_major>; /* K^T from rows of K */
  using fragment_v = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, nvcuda::wmma::row_major>;
  static constexpr int kRowTiles = Traits::kRowTiles, kTilesD = Traits::kTilesD, kTilesKv = Traits::kTilesKv;
  static_assert(accumulator::num_elements == 8, "row_of packs eight rows of four bits");

  fragment_a q[kRowTiles][kTilesD];
  accumulator o[kRowTiles][kTilesD];
  softmax_state state[kRowTiles]; /* of row lane / 2 */
  uint32_t row_of;                /* bits 4i .. 4i + 3: the row of element i of an accumulator */
  unsigned char *strips;
  int32_t row, half; /* lane / 2, lane % 2 */
  float unit;        /* logits times unit are in log2 units */

  /* Of this warp, within the sequence. */
  static __forceinline__ __device__ int32_t first_row(const wmma_problem &problem) {
    return problem.q0 + (int32_t)threadIdx.x / 32 * Traits::kWarpRows;
  }
  __forceinline__ __device__ float *strip(int r) const { return reinterpret_cast<float *>(strips + r * Traits::kBytesStrip); }
  __forceinline__ __device__ wmma_view *view() const { return reinterpret_cast<wmma_view *>(strips + Traits::kOffsetView); }
  __forceinline__ __device__ float *factors(int r) const { return strip(r) + Traits::kOffsetFactors / 4; }

  __forceinline__ __device__ wmma_warp(const flashcore_attention &a, const wmma_problem &problem, unsigned char *shared) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    strips = shared + warp * Traits::kBytesWarp;
    row = lane / 2;
    half = lane % 2;
    unit = Rule::kActive ? 1.f : flashcore_scale_log2(a.scale);
    if (threadIdx.x % 32 == 0) *view() = wmma_view_of<Traits>(a, problem, first_row(problem));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      state[r].m = FLASHCORE_EMPTY_MAX;
      state[r].l = 0.f;
#pragma unroll
      for (int n = 0; n < kTilesD; ++n) nvcuda::wmma::fill_fragment(o[r][n], 0.f);
    }
    learn_rows();
    load_q(a, problem);
  }

  /* Which row each element of an accumulator belongs to: load a tile whose elements are their own row numbers. */
  __forceinline__ __device__ void learn_rows() {
    for (int c = 0; c < 8; ++c) strip(0)[row * Traits::kLdS + 8 * half + c] = (float)row;
    __syncwarp();
    accumulator rows;
    nvcuda::wmma::load_matrix_sync(rows, strip(0), Traits::kLdS, nvcuda::wmma::mem_row_major);
    row_of = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) row_of |= (uint32_t)rows.x[i] << (4 * i);
    __syncwarp();
  }

  /* Q, kDimsQ columns at a time, through the strips into fragments; rows past the sequence and dims past the tensor are zeros. */
  __forceinline__ __device__ void load_q(const flashcore_attention &a, const wmma_problem &problem) {
    constexpr int kChunks = Traits::kDimsQ / 8, kRowsPerPass = 32 / kChunks;
    const int lane = (int)threadIdx.x % 32, chunk = lane % kChunks;
    const T *from = static_cast<const T *>(a.q.data) + problem.seq.q + problem.head * a.q.stride_h;
    const T *staged = reinterpret_cast<const T *>(strips);
#pragma unroll
    for (int dim0 = 0; dim0 < Traits::kHeadDim; dim0 += Traits::kDimsQ) {
      const int dim = dim0 + chunk * 8;
      for (int i = lane / kChunks; i < Traits::kWarpRows; i += kRowsPerPass) {
        const int32_t query = first_row(problem) + i;
        cp_async<16>(shared_address(staged + i * Traits::kLdQ + chunk * 8), from + query * a.q.stride_s + dim,
                     query < problem.seq.len_q && dim < a.dim_qk);
      }
      cp_async_wait_all();
      __syncwarp();
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int d = 0; d < Traits::kDimsQ / 16; ++d)
          nvcuda::wmma::load_matrix_sync(q[r][dim0 / 16 + d], staged + r * 16 * Traits::kLdQ + d * 16, Traits::kLdQ);
      __syncwarp();
    }
  }

  /* S = Q K^T of one tile of keys, raw, into the strips.   [kWarpRows][kBlockKv] f32 */
  __forceinline__ __device__ void scores(const T *k) {
#pragma unroll
    for (int n = 0; n < kTilesKv; ++n) {
      accumulator s[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) nvcuda::wmma::fill_fragment(s[r], 0.f);
#pragma unroll
      for (int d = 0; d < kTilesD; ++d) {
        fragment_k b;
        nvcuda::wmma::load_matrix_sync(b, k + n * 16 * Traits::kLdKv + d * 16, Traits::kLdKv);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) nvcuda::wmma::mma_sync(s[r], q[r][d], b, s[r]);
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) nvcuda::wmma::store_matrix_sync(strip(r) + n * 16, s[r], Traits::kLdS, nvcuda::wmma::mem_row_major);
    }
  }

  /* Masks and the rule on this lane's part of a row, where it lies in the strip: a rolled loop, since a rule may be long code.
   * Raw scores stay raw under no_rule and become logits under a rule. A row past the sequence sees nothing: a rule must not be asked about it. */
  __forceinline__ __device__ void apply_rule(int r, const flashcore_attention &a, const wmma_problem &problem, const Rule &rule, int32_t k0) const {
    score_position at = {problem.batch, problem.head, first_row(problem) + r * 16 + row, 0, problem.seq.len_q, problem.seq.len_kv};
    flashcore_range visible = flashcore_visible_keys(&a, at.query, at.len_q, at.len_kv);
    if (at.query >= at.len_q) visible.last = 0;
    float4 *s = reinterpret_cast<float4 *>(strip(r) + row * Traits::kLdS + 4 * half);
#pragma unroll 1
    for (int i = 0; i < Traits::kValues / 4; ++i) {
      float x[4];
      *reinterpret_cast<float4 *>(x) = s[2 * i];
      at.key = k0 + 8 * i + 4 * half;
#pragma unroll
      for (int c = 0; c < 4; ++c, ++at.key) {
        const bool hidden = at.key < visible.first || at.key >= visible.last;
        x[c] = hidden ? -INFINITY : Rule::kActive ? softmax_log2_units(rule(a, x[c] * a.scale, at)) : x[c];
      }
      s[2 * i] = *reinterpret_cast<const float4 *>(x);
    }
  }

  /* One online-softmax step on this lane's part of row `row` of strip r; p: its probabilities in pairs.
   *   edge     a row with no visible key so far keeps m = FLASHCORE_EMPTY_MAX and l = 0; a NaN logit makes p and l of its row NaN, never m
   *   returns  the factor for the row's O; exactly 1 when the reference stays */
  __forceinline__ __device__ float softmax(int r, const flashcore_attention &a, const wmma_problem &problem, const Rule &rule, int32_t k0,
                                           bool masked, uint32_t (&p)[Traits::kPairs]) {
    if (masked || Rule::kActive) apply_rule(r, a, problem, rule, k0);
    float x[Traits::kValues];
    const float *s = strip(r) + row * Traits::kLdS + 4 * half;
#pragma unroll
    for (int i = 0; i < Traits::kValues; i += 4) *reinterpret_cast<float4 *>(&x[i]) = *reinterpret_cast<const float4 *>(s + 2 * i);
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < Traits::kValues; ++i) top = fmaxf(top, x[i]);
    top = softmax_reference(fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1)), unit);
    const float factor = softmax_raise(state[r], top);
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < Traits::kValues; i += 2) {
      float p0 = softmax_term<15>(x[i], unit, state[r].m), p1 = softmax_term<15>(x[i + 1], unit, state[r].m);
      p[i / 2] = wmma_pack(T(), p0, p1);
      /* The last bit of so large a reference weighs: the largest term is not 1, and l counts what O gets. A row of one key is that key's V. */
      if (fabsf(state[r].m) > 16384.f) p0 = element<T>::load(element<T>::store(p0)), p1 = element<T>::load(element<T>::store(p1));
      sum[i / 2 % 2] += p0 + p1;
    }
    sum[0] += sum[1];
    state[r].l += sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 1);
    return factor;
  }

  /* O = diag(factors) O; the factors of both row tiles lie behind the strips. */
  __forceinline__ __device__ void scale_rows() {
    uint32_t rows = row_of;
    asm volatile("" : "+r"(rows)); /* WHY: otherwise the compiler keeps the eight unpacked rows in registers through the loop and spills */
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float factor = factors(r)[(rows >> (4 * i)) & 15];
#pragma unroll
        for (int n = 0; n < kTilesD; ++n) o[r][n].x[i] *= factor;
      }
  }

  /* O += P V of one tile of keys; P from the strips. */
  __forceinline__ __device__ void accumulate(const T *v) {
#pragma unroll
    for (int j = 0; j < kTilesKv; ++j) {
      fragment_a p[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) nvcuda::wmma::load_matrix_sync(p[r], reinterpret_cast<const T *>(strip(r)) + j * 16, Traits::kLdP);
#pragma unroll
      for (int n = 0; n < kTilesD; ++n) {
        fragment_v b;
        nvcuda::wmma::load_matrix_sync(b, v + j * 16 * Traits::kLdKv + n * 16, Traits::kLdKv);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) nvcuda::wmma::mma_sync(o[r][n], p[r], b, o[r][n]);
      }
    }
  }

  /* The whole work on one tile of keys. */
  __forceinline__ __device__ void step(const flashcore_attention &a, const wmma_problem &problem, const Rule &rule, const unsigned char *stage,
                                       int32_t k0) {
    const wmma_view keys = *view();
    if (k0 >= keys.some.last || k0 + Traits::kBlockKv <= keys.some.first) return;
    scores(reinterpret_cast<const T *>(stage));
    __syncwarp(); /* S is written */
    const bool masked = k0 < keys.all.first || k0 + Traits::kBlockKv > keys.all.last;
    bool raised = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t p[Traits::kPairs];
      const float factor = softmax(r, a, problem, rule, k0, masked, p);
      raised = raised || factor != 1.f; /* NaN counts as raised */
      __syncwarp();                     /* S of strip r is read */
      T *to = reinterpret_cast<T *>(strip(r)) + row * Traits::kLdP + 4 * half;
#pragma unroll
      for (int i = 0; i < Traits::kPairs; i += 2) *reinterpret_cast<uint2 *>(to + 4 * i) = make_uint2(p[i], p[i + 1]);
      if (half == 0) factors(r)[row] = factor;
    }
    __syncwarp(); /* P and the factors are written */
    if (__any_sync(0xffffffffu, raised)) scale_rows();
    accumulate(reinterpret_cast<const T *>(stage + Traits::kBytesK));
    __syncwarp(); /* P is read */
  }

  /* Normalises O, writes it and the LSE. */
  __forceinline__ __device__ void finish(const flashcore_attention &a, const wmma_problem &problem) {
    const float sink = a.sink ? a.sink[problem.head] : 0.f;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int32_t query = first_row(problem) + r * 16 + row;
      float lse;
      const float factor = softmax_finish(state[r], a.sink != nullptr, sink, a.lse_base2 != 0, lse);
      if (half == 0) {
        factors(r)[row] = factor;
        if (a.lse && query < problem.seq.len_q) a.lse[((int64_t)problem.batch * a.heads_q + problem.head) * a.seq_q + query] = lse;
      }
    }
    __syncwarp();
    scale_rows();
    T *o_head = static_cast<T *>(a.o.data) + problem.seq.o + problem.head * a.o.stride_h;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kTilesD; ++n) store_o(a, problem, o_head, r, n);
  }

  /* One 16 x 16 tile of O through the strip: a lane stores 8 neighbours of a row at once. */
  __forceinline__ __device__ void store_o(const flashcore_attention &a, const wmma_problem &problem, T *o_head, int r, int n) {
    nvcuda::wmma::store_matrix_sync(strip(r), o[r][n], Traits::kLdS, nvcuda::wmma::mem_row_major);
    __syncwarp();
    const int32_t query = first_row(problem) + r * 16 + row, dim = n * 16 + 8 * half;
    const float4 *from = reinterpret_cast<const float4 *>(strip(r) + row * Traits::kLdS + 8 * half);
    const float4 x = from[0], y = from[1];
    if (query < problem.seq.len_q && dim < a.dim_v)
      *reinterpret_cast<uint4 *>(o_head + query * a.o.stride_s + dim) =
          make_uint4(wmma_pack(T(), x.x, x.y), wmma_pack(T(), x.z, x.w), wmma_pack(T(), y.x, y.y), wmma_pack(T(), y.z, y.w));
    __syncwarp();
  }
};

/* ================================================================================================================================
 * nvcuda::wmma: kernel
 * ================================================================================================================================ */

/*   shapes   grid: ceil(seq_q / kBlockQ) * heads_q * batch; block: kThreads; dynamic shared memory: shared_bytes(2), or (1) on sm_75
 *   a        resolved; bases and strides of Q, K, V, O are multiples of 16 bytes; dims are multiples of 8, at most kHeadDim */
template <typename Traits, typename Rule>
FLASHCORE_KERNEL void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    wmma_kernel(const __grid_constant__ flashcore_attention a, Rule rule) {
  if constexpr (Traits::kHasBody) {
    constexpr int kStages = FLASHCORE_HAS_SM80 ? 2 : 1; /* Turing's loads are synchronous: a second stage would only cost it a block per SM */
    extern __shared__ __align__(128) unsigned char wmma_shared[];
    static_assert(sizeof(wmma_problem) <= Traits::kBytesProblem, "the problem has its place");
    wmma_problem &problem = *reinterpret_cast<wmma_problem *>(wmma_shared);
    unsigned char *stages = wmma_shared + Traits::kBytesProblem, *strips = stages + kStages * Traits::kBytesStage;
    if (threadIdx.x == 0) problem = wmma_problem_of<Traits>(a, blockIdx.x);
    __syncthreads();
    if (problem.q0 >= problem.seq.len_q) return;
    int32_t k0 = problem.keys.first / Traits::kBlockKv * Traits::kBlockKv;
    const int32_t end = problem.keys.last;
    wmma_loader<Traits> loader(a, problem, stages, k0);
    if (k0 < end) loader.load(a, 0);
    wmma_warp<Traits, Rule> warp(a, problem, strips);
    for (int stage = 0; k0 < end; k0 += Traits::kBlockKv, stage ^= kStages - 1) {
      const int32_t next = k0 + Traits::kBlockKv;
      cp_async_wait_all();
      __syncthreads(); /* this tile has landed, and every warp is done with the one before */
      if (kStages == 2 && next < end) loader.load(a, stage ^ 1);
      warp.step(a, problem, rule, stages + stage * Traits::kBytesStage, k0);
      if (kStages == 1 && next < end) {
        __syncthreads();
        loader.load(a, 0);
      }
    }
    warp.finish(a, problem);
  } else {
    __trap(); /* bf16 on Turing: the plan refuses it */
  }
}

} /* namespace v0_1_0 */
} /* namespace flashcore */

/* ================================================================================================================================
 * 2  nvcuda::wmma: plan and launch
 * ================================================================================================================================ */
#if !defined(__CUDACC_RTC__) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))

enum { FLASHCORE_WMMA_MAX_DIM = 128 };

/* Kernels read and write rows in 16-byte pieces: base and strides must be multiples of 8 elements. */
static flashcore_status flashcore_wmma_aligned(const flashcore_tensor *t, const char *field, flashcore_error *error) {
  const int64_t address = (int64_t)(reinterpret_cast<uintptr_t>(t->data) & 15u);
  if (address)
    return flashcore_refuse(error, FLASHCORE_MISALIGNED, field, address, 16,
                            "%s: the wmma kernel needs a 16-byte aligned address (address %% 16 = %d)", field, (int)address);
  const int64_t strides[3] = {t->stride_b, t->stride_s, t->stride_h};
  for (int64_t stride : strides)
    if (stride % 8)
      return flashcore_refuse(error, FLASHCORE_MISALIGNED, field, stride, 8,
                              "%s: the wmma kernel needs strides that are multiples of 8 elements, not %lld", field, (long long)stride);
  return FLASHCORE_OK;
}

static flashcore_status flashcore_wmma_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  flashcore_status status = flashcore_check_tensor_core(a, device, "wmma", a->dtype == FLASHCORE_BF16 ? 80 : 75, error);
  if (status != FLASHCORE_OK) return status;
  const int32_t dims[2] = {a->dim_qk, a->dim_v};
  for (int i = 0; i < 2; ++i) {
    const char *field = i ? "dim_v" : "dim_qk";
    if (dims[i] % 8 || dims[i] > FLASHCORE_WMMA_MAX_DIM)
      return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DIM, field, dims[i], FLASHCORE_WMMA_MAX_DIM,
                              "%s: the wmma kernel serves multiples of 8 up to %d, not %d", field, (int)FLASHCORE_WMMA_MAX_DIM, (int)dims[i]);
  }
  const flashcore_tensor *tensors[4] = {&a->q, &a->k, &a->v, &a->o};
  const char *names[4] = {"q", "k", "v", "o"};
  for (int i = 0; i < 4; ++i) {
    status = flashcore_wmma_aligned(tensors[i], names[i], error);
    if (status != FLASHCORE_OK) return status;
  }
  return FLASHCORE_OK;
}

template <typename T, int kHeadDim> static void flashcore_wmma_instance(bool rule, int stages, flashcore_plan *plan) {
  using traits = flashcore::wmma_traits<T, kHeadDim>;
  plan->kernel = rule ? reinterpret_cast<const void *>(&flashcore::wmma_kernel<traits, flashcore::descriptor_rule>)
                      : reinterpret_cast<const void *>(&flashcore::wmma_kernel<traits, flashcore::no_rule>);
  plan->d.block_q = traits::kBlockQ;
  plan->d.block_kv = traits::kBlockKv;
  plan->d.stages = stages;
  plan->d.head_dim_qk = plan->d.head_dim_v = kHeadDim;
  plan->d.threads = traits::kThreads;
  plan->d.shared_bytes = traits::shared_bytes(stages);
}

template <typename T> static void flashcore_wmma_select(int dim, bool rule, int stages, flashcore_plan *plan) {
  if (dim <= 32) flashcore_wmma_instance<T, 32>(rule, stages, plan);
  else if (dim <= 64) flashcore_wmma_instance<T, 64>(rule, stages, plan);
  else flashcore_wmma_instance<T, 128>(rule, stages, plan);
}

static flashcore_status flashcore_wmma_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                            flashcore_error *error) {
  const flashcore_status status = flashcore_wmma_check(a, device, error);
  if (status != FLASHCORE_OK) return status;
  *plan = flashcore_plan();
  [[maybe_unused]] const int dim = a->dim_qk > a->dim_v ? a->dim_qk : a->dim_v, stages = device->arch >= 80 ? 2 : 1;
  const bool rule = flashcore_has_rule(a);
#if !defined(FLASHCORE_NO_F16)
  if (a->dtype == FLASHCORE_F16) flashcore_wmma_select<__half>(dim, rule, stages, plan);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (a->dtype == FLASHCORE_BF16) flashcore_wmma_select<__nv_bfloat16>(dim, rule, stages, plan);
#endif
  if (!plan->kernel)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0, "dtype: the wmma kernel was compiled without type %d",
                            (int)a->dtype);
  flashcore_description *d = &plan->d;
  d->backend = FLASHCORE_BACKEND_WMMA;
  d->packed_group = 1;
  d->splits = 1;
  snprintf(d->kernel, sizeof d->kernel, "wmma %s d%d q%d kv%d", a->dtype == FLASHCORE_F16 ? "f16" : "bf16", (int)d->head_dim_qk, (int)d->block_q,
           (int)d->block_kv);
  return flashcore_set_grid(a, ((int64_t)a->seq_q + d->block_q - 1) / d->block_q * a->heads_q, "wmma", plan, error);
}

static flashcore_status flashcore_wmma_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                              flashcore_error *error) {
  flashcore_attention args = *a;
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  void *kernel_args[2] = {&args, &rule};
  return flashcore_launch(plan, kernel_args, stream, error);
}

static flashcore_backend_ops flashcore_wmma_ops = {FLASHCORE_BACKEND_WMMA, flashcore_wmma_plan, flashcore_wmma_launch, nullptr};
static struct flashcore_wmma_registration {
  /* WHY: forced inline, the constructor leaves no weak symbol. An unnamed namespace would not help: nvcc gives it a name. */
  __forceinline__ flashcore_wmma_registration() { flashcore_register_backend(&flashcore_wmma_ops); }
} flashcore_wmma_registered;

#endif /* implementation */

namespace flashcore {
inline namespace v0_1_0 {

/* ================================================================================================================================
 * 3  mma.sync: one struct describes one kernel
 * ================================================================================================================================ */

/* Wait for kThreads threads of the block; warps may arrive from different places in the code, which __syncthreads does not allow.
 *   ptx      barrier.sync, sm_70     callers  whole warps     orders  shared memory among the threads that took part */
enum mma_barrier { kStageBarrier = 1 }; /* 0 belongs to __syncthreads */
template <mma_barrier kBarrier, int kThreads> FLASHCORE_DEVICE void barrier_sync() {
  asm volatile("barrier.sync %0, %1;" ::"n"((int)kBarrier), "n"(kThreads) : "memory");
}

enum mma_q_source {
  kQShared,         /* Q fragments are read again from shared memory for every key step */
  kQRegisters,      /* they stay in registers */
  kQRegistersReuse, /* and K/V take over Q's shared memory */
};

/* T: element; kHeadDimQk, kHeadDimV: dims of the instance, smaller ones are zero-padded to it
 * kRowTiles: 16-row query tiles per warp      kRowWarps: warps along the query rows      kColumnWarps: warps that share rows and split the dims of V
 * kBlockKv: keys per shared-memory stage      kStep: keys per softmax step               kStages: K/V stages
 * kQ: see above                               kBlocksPerSm: what the register cap is made for (its 65 536 registers / threads) */
template <typename T_, int kHeadDimQk_, int kHeadDimV_, int kRowTiles_, int kRowWarps_, int kColumnWarps_, int kBlockKv_, int kStep_, int kStages_,
          mma_q_source kQ_, int kBlocksPerSm_>
struct mma_tile {
  using T = T_;
  static constexpr int kHeadDimQk = kHeadDimQk_, kHeadDimV = kHeadDimV_, kRowTiles = kRowTiles_, kRowWarps = kRowWarps_;
  static constexpr int kColumnWarps = kColumnWarps_, kBlockKv = kBlockKv_, kStep = kStep_, kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr mma_q_source kQ = kQ_;

  static constexpr int kThreads = kRowWarps * kColumnWarps * 32;
  static constexpr int kWarpRows = kRowTiles * 16, kBlockQ = kWarpRows * kRowWarps;
  static constexpr int kColumns = kHeadDimV / kColumnWarps; /* of O, per warp */
  /* Products of the next step ahead of the exponentials of this one, where the registers hold O, Q and two steps of S. */
  static constexpr int kRegistersAhead = kRowTiles * (kColumns / 2 + (kQ == kQShared ? 0 : kHeadDimQk / 4) + kStep);
  static constexpr bool kAhead = kBlockKv > kStep &&kRegistersAhead <= 216;
  static constexpr bool kLoose = kStages > 2; /* each stage has barriers of its own, and warps may run a stage apart: see mma_ring */
  static constexpr int kRowBytesQk = kHeadDimQk * 2, kRowBytesV = kHeadDimV * 2;

  /* Shared memory: Q [kBlockQ][kHeadDimQk], then per stage K [kBlockKv][kHeadDimQk] and V [kBlockKv][kHeadDimV]. */
  static constexpr int kBytesQ = kBlockQ * kRowBytesQk, kBytesK = kBlockKv * kRowBytesQk, kBytesV = kBlockKv * kRowBytesV;
  static constexpr int kOffsetKv = kQ == kQRegistersReuse ? 0 : kBytesQ;
  static constexpr int kEndKv = kOffsetKv + kStages * (kBytesK + kBytesV), kSharedBytes = kEndKv > kBytesQ ? kEndKv : kBytesQ;
  static constexpr int kOffsetQ = kQ == kQRegistersReuse ? kSharedBytes - kBytesQ : 0; /* at the end, so that the first stage may land beside it */
  static constexpr bool kQBesideKv = kQ != kQRegistersReuse || (kLoose && kOffsetQ >= kBytesK + kBytesV); /* two stages may begin with the second */

  static_assert(sizeof(T) == 2, "16-bit elements");
  static_assert(kHeadDimQk % 16 == 0 && kColumns % 16 == 0, "an mma step is 16 wide");
  static_assert(kBlockKv % kStep == 0 && kStep % 16 == 0, "softmax steps tile the stage");
  static_assert(kStages >= 2, "one stage is filled while another is read");
  static_assert(kSharedBytes + kThreads / 32 * 128 + kStages * 16 <= 99 * 1024, "with mma_shared, fits every GPU from sm_80 on, the L4 among them");
};

/* The tiles in use. wide: throughput. compact: throughput where an SM has 100 KiB of shared memory (sm_86, sm_89, sm_120). narrow: grids that do not
 * fill the chip with wide tiles, short sequences at dim 256, and every general kernel (score rules, any alignment). short: grids of at most one narrow
 * block per SM. */
enum mma_shape { kWide, kCompact, kNarrow, kShort };

template <typename T, int kHeadDimQk, int kHeadDimV, mma_shape kShape> struct mma_tile_for;
#define FLASHCORE_MMA_TILE(qk, v, shape, ...)                                                                                                        \
  template <typename T> struct mma_tile_for<T, qk, v, shape> : mma_tile<T, qk, v, __VA_ARGS__> {}

/* Registers decide all of them: 255 per thread, for 256 threads on an SM. What sm_89 and sm_90 run does not spill below 256 dims; there it spills 4 to
 * 8 bytes, the general kernel 28. Spills elsewhere: sm_80's wide tiles of 128 and 256 dims, 4 and 8 bytes; sm_100 and sm_120, up to 144 in that general
 * kernel.
 *                  dims              row tiles, row warps, column warps, keys, step, stages, Q, blocks per SM */
FLASHCORE_MMA_TILE(32, 32, kWide, 2, 4, 1, 128, 32, 2, kQRegisters, 2);
FLASHCORE_MMA_TILE(32, 32, kNarrow, 1, 4, 1, 64, 64, 2, kQRegisters, 4);
FLASHCORE_MMA_TILE(64, 64, kWide, 2, 4, 1, 128, 32, 2, kQRegisters, 2);
FLASHCORE_MMA_TILE(64, 64, kCompact, 2, 4, 1, 64, 64, 2, kQRegisters, 2); /* 48 KiB: two blocks fit 100 KiB */
FLASHCORE_MMA_TILE(64, 64, kNarrow, 1, 4, 1, 64, 32, 2, kQRegisters, 4);
FLASHCORE_MMA_TILE(64, 64, kShort, 1, 4, 1, 128, 64, 2, kQRegisters, 2); /* alone on its SM: fewer barriers */
FLASHCORE_MMA_TILE(80, 80, kWide, 2, 4, 1, 64, 32, 2, kQShared, 2);
FLASHCORE_MMA_TILE(80, 80, kNarrow, 1, 4, 1, 64, 32, 2, kQRegisters, 3);
FLASHCORE_MMA_TILE(96, 96, kWide, 2, 4, 1, 64, 32, 2, kQShared, 2);
FLASHCORE_MMA_TILE(96, 96, kNarrow, 1, 4, 1, 64, 32, 2, kQRegisters, 3);
FLASHCORE_MMA_TILE(128, 128, kWide, 2, 4, 1, 64, 64, 2, kQShared, 2);            /* Q and S do not fit the registers beside 128 columns of O */
FLASHCORE_MMA_TILE(128, 128, kCompact, 2, 4, 1, 32, 16, 2, kQRegistersReuse, 2); /* 32 KiB; the registers allow two blocks */
FLASHCORE_MMA_TILE(128, 128, kNarrow, 1, 4, 1, 64, 32, 2, kQRegistersReuse, 2);
FLASHCORE_MMA_TILE(192, 128, kWide, 1, 4, 1, 32, 32, 2, kQRegisters, 2);
FLASHCORE_MMA_TILE(192, 192, kWide, 1, 4, 1, 32, 32, 2, kQRegisters, 2);
/* At 256 dims a warp has registers for 16 rows, and shared memory's bandwidth is what bounds it: eight warps share what they load. */
FLASHCORE_MMA_TILE(256, 256, kWide, 1, 8, 1, 32, 16, 3, kQRegistersReuse, 1);
FLASHCORE_MMA_TILE(256, 256, kNarrow, 1, 4, 1, 32, 32, 2, kQRegisters, 2); /* of two blocks on an SM, one works while the other starts or ends */
FLASHCORE_MMA_TILE(512, 512, kWide, 1, 2, 2, 16, 16, 2, kQShared, 1); /* O of 16 rows fills two warps' registers: each computes S, and half of O */

/* ================================================================================================================================
 * 4  mma.sync: loaders
 * ================================================================================================================================ */

/* kRows x kRowBytes from global memory into a swizzled tile by all threads of a block. A thread owns chunks of one column residue in every
 * kRowsPerPass-th row. Nothing of this lives in registers between tiles: they belong to O and S. */
template <int kRows, int kRowBytes, int kThreads> struct tile_loader {
  using tile = swizzled_tile<kRowBytes>;
  static constexpr int kLowBit = tile::kChunks & -tile::kChunks, kLanes = kLowBit < 32 ? kLowBit : 32; /* threads along a row */
  static constexpr int kRowsPerPass = kThreads / kLanes, kPasses = kRows / kRowsPerPass, kChunksPerLane = tile::kChunks / kLanes;
  static_assert(kRows % kRowsPerPass == 0, "the block covers the tile in whole passes");
  static_assert(kRowsPerPass % 8 == 0 || tile::kSpan == 8, "the swizzle of a later pass must follow from the first");

  static __forceinline__ __device__ int row0() { return threadIdx.x / kLanes; } /* this thread's first chunk */
  static __forceinline__ __device__ int chunk0() { return threadIdx.x % kLanes; }
  static __forceinline__ __device__ uint32_t offset(int pass, int c) { /* of pass 0's chunk, then by constants */
    return (tile::offset(row0(), chunk0()) ^ ((pass * kRowsPerPass & 7) << 4)) + pass * kRowsPerPass * kRowBytes + c * kLanes * 16;
  }
  /* Every row and column is there, 16-byte aligned. base: the tile's first row. */
  static __forceinline__ __device__ void load(uint32_t dst, const char *base, int32_t stride_bytes) {
    const char *src = base + (int64_t)row0() * stride_bytes + chunk0() * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i, src += (int64_t)stride_bytes * kRowsPerPass)
#pragma unroll
      for (int c = 0; c < kChunksPerLane; ++c) cp_async_16(dst + offset(i, c), src + c * kLanes * 16);
  }
  /* Rows from `rows` and chunks from `chunks` on become zeros and are not read. */
  static __forceinline__ __device__ void load_edge(uint32_t dst, const char *base, int32_t stride_bytes, int rows, int chunks) {
    const char *src = base + (int64_t)row0() * stride_bytes + chunk0() * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i, src += (int64_t)stride_bytes * kRowsPerPass)
#pragma unroll
      for (int c = 0; c < kChunksPerLane; ++c)
        cp_async<16>(dst + offset(i, c), src + c * kLanes * 16, i * kRowsPerPass + row0() < rows && c * kLanes + chunk0() < chunks);
  }
  /* The same at any alignment (8, 4 or 2 bytes) and row length: slow, for the general kernels only. */
  static __forceinline__ __device__ void load_unaligned(uint32_t dst, const char *base, int32_t stride_bytes, int rows, int row_bytes, int align) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * tile::kChunks; i += kThreads) {
      const int row = i / tile::kChunks, chunk = i % tile::kChunks;
      copy_chunk(dst + tile::offset(row, chunk), base + (int64_t)row * stride_bytes + chunk * 16, row < rows ? row_bytes - chunk * 16 : 0, align);
    }
  }
};

/* ================================================================================================================================
 * 5  mma.sync: which rows and keys a block works on
 * ================================================================================================================================ */

/* How the plan spreads the work; passed beside the descriptor. */
struct mma_schedule {
  int32_t tiles;    /* query tiles per unit (of the longest sequence) */
  divisor pack;     /* query heads packed into a tile's rows: row r is query r / pack of head r % pack; 1 or the group size */
  divisor heads;    /* heads_q / pack: units of work per batch entry */
  divisor together; /* units whose tiles are taken in turn: the first tiles of all of them, the second tiles ... */
  divisor last;     /* the same for what is left at the end */
  divisor set;      /* together * tiles */
  divisor group;    /* heads_q / heads_kv */
  float scale_log2; /* of the products, in log2 units; 1 in general kernels, whose rule scales */
  int32_t order;    /* mma_order */
  int32_t masked;   /* causal or a window: rows see different keys */
  int32_t align;    /* bytes that all rows of Q, K, V and O begin and end at multiples of: 16, 8, 4 or 2 */
};
enum mma_order {
  kTileFastest,  /* a unit's tiles one after another: they share K and V in L2 */
  kLongestFirst, /* longest tiles of many units first, so that the SMs end together; as many as K and V in L2 allow */
  kZigZag,       /* of all units, down through the tiles, then up: for grids of about two blocks per SM, so that a heavy and a light one meet */
};

/* The schedule of a problem (resolved), and its grid: one-dimensional, kThreads threads, kSharedBytes of dynamic shared memory.
 *   general  the kernel has a rule, which scales the logits itself
 *   pack     1, or heads_q / heads_kv
 *   order    mma_order; any is right for everything, the later two pay for causal problems
 *   align    flashcore_row_align: what every row's address and length is a multiple of, in bytes; below 16 only for kernels with a rule */
FLASHCORE_INLINE mma_schedule make_mma_schedule(const flashcore_attention &a, int32_t block_q, bool general, int32_t pack, int32_t order,
                                                int32_t align, int64_t &grid) {
  const int32_t tiles = (int32_t)(((int64_t)a.seq_q * pack + block_q - 1) / block_q), heads = a.heads_q / pack, units = heads * a.batch;
  /* Measured on the H200, causal, 512 to 16384 keys: 64 units are 1.04 to 1.08 times as fast as one, at 256 dims 32 are. More is no better. */
  const int32_t most = order == kTileFastest ? 1 : order == kZigZag ? units : a.dim_qk > 128 ? 32 : 64, together = most < units ? most : units;
  grid = (int64_t)tiles * units;
  mma_schedule s;
  s.tiles = tiles;
  s.pack = make_divisor(pack);
  s.heads = make_divisor(heads);
  s.together = make_divisor(together);
  s.last = make_divisor(units % together ? units % together : 1);
  s.set = make_divisor(together * tiles);
  s.group = make_divisor(a.heads_q / a.heads_kv);
  s.scale_log2 = general ? 1.f : flashcore_scale_log2(a.scale);
  s.order = order;
  s.masked = a.causal || a.window_left < FLASHCORE_UNBOUNDED || a.window_right < FLASHCORE_UNBOUNDED;
  s.align = align;
  return s;
}

/* How a problem's rows are spread over blocks of block_q rows. */
struct mma_spread {
  int32_t pack, order; /* as make_mma_schedule takes them */
  int64_t blocks;      /* per batch entry */
};
FLASHCORE_INLINE mma_spread make_mma_spread(const flashcore_attention &a, int32_t block_q, int32_t sm_count) {
  const int32_t group = a.heads_q / a.heads_kv;
  const int64_t tiles = ((int64_t)a.seq_q + block_q - 1) / block_q, packed_tiles = ((int64_t)a.seq_q * group + block_q - 1) / block_q;
  const bool pack = packed_tiles < tiles * group && (int64_t)a.seq_q * group <= FLASHCORE_MAX_SEQ;
  mma_spread s;
  s.pack = pack ? group : 1;
  s.blocks = (pack ? packed_tiles : tiles) * (a.heads_q / s.pack);
  s.order = !a.causal ? kTileFastest : s.blocks * a.batch <= 2 * sm_count ? kZigZag : kLongestFirst;
  return s;
}

/* May a warp take it that its references need not move? */
enum mma_trust {
  kTrusting,
  kProbing, /* the first tile of a long row is to tell */
  kWary,    /* no: one had to */
};

struct mma_work {
  int32_t batch, head, row0, rows; /* head: first query head; rows: of this unit in all, row0: the tile's first */
  int32_t tile_begin, tile_end;    /* K/V stages of which some row of the tile sees a key */
  int32_t inner_begin, inner_end;  /* stages that every row of this warp sees in full */
  int32_t warp_first, warp_last;   /* keys that some row of this warp sees */
  int32_t full_first, full_last;   /* keys that every row of this warp sees */
  int32_t full_keys;               /* tiles below it load without a look at rows and dims */
  int32_t trust;                   /* mma_trust; for want of registers, here */
  int32_t done;                    /* keys of the tile at hand that inner_tile has taken, where it left the others; else -1 */
  flashcore_sequence seq;
  const char *k, *v; /* key 0 of the head's K and V */
};

/* What a block keeps in static shared memory: its warps' work, which in registers would cost spills, and the barriers of loose stages. */
template <typename Tile> struct mma_shared {
  mma_work works[Tile::kThreads / 32];
  uint64_t full[Tile::kLoose ? Tile::kStages : 1], free[Tile::kLoose ? Tile::kStages : 1];
  __forceinline__ __device__ mma_work &work() { return works[threadIdx.x / 32]; } /* of this warp */
};

/* Tile, head and batch entry of a block. False: nothing to do (a tile past the end of a short sequence). */
template <typename Tile> FLASHCORE_DEVICE bool mma_find_work(const flashcore_attention &a, const mma_schedule &plan, int32_t block, mma_work &w) {
  const int32_t set = plan.set.quotient(block), first = set * plan.together.d, at = block - set * plan.set.d;
  const divisor together = plan.heads.d * a.batch - first < plan.together.d ? plan.last : plan.together;
  int32_t tile = together.quotient(at);
  const int32_t unit = first + at - tile * together.d;
  if (plan.order == kZigZag && tile >= plan.tiles / 2) tile = plan.tiles - 1 - (tile - plan.tiles / 2);
  if (a.causal) tile = plan.tiles - 1 - tile; /* longest first */
  w.batch = plan.heads.quotient(unit);
  w.head = (unit - w.batch * plan.heads.d) * plan.pack.d;
  w.seq = flashcore_sequence_at(&a, w.batch);
  w.rows = w.seq.len_q * plan.pack.d;
  w.row0 = tile * Tile::kBlockQ;
  return w.row0 < w.rows;
}

/* Which keys the tile's rows see, and where they lie. */
template <typename Tile> FLASHCORE_DEVICE void mma_find_keys(const flashcore_attention &a, const mma_schedule &plan, mma_work &w, int warp_row0) {
  const int32_t kv_head = plan.group.quotient(w.head);
  w.k = static_cast<const char *>(a.k.data) + 2 * (w.seq.k + kv_head * a.k.stride_h);
  w.v = static_cast<const char *>(a.v.data) + 2 * (w.seq.v + kv_head * a.v.stride_h);
  w.full_keys = a.dim_qk == Tile::kHeadDimQk && a.dim_v == Tile::kHeadDimV ? w.seq.len_kv : 0;
  flashcore_range block_top = {0, w.seq.len_kv}, block_bottom = block_top, top = block_top, bottom = block_top;
  if (plan.masked) { /* ranges never fall from row to row: first and last rows bound them */
    const auto visible = [&](int row) { return flashcore_visible_keys(&a, plan.pack.quotient(min(row, w.rows - 1)), w.seq.len_q, w.seq.len_kv); };
    block_top = visible(w.row0);
    block_bottom = visible(w.row0 + Tile::kBlockQ - 1);
    top = visible(w.row0 + warp_row0);
    bottom = visible(w.row0 + warp_row0 + Tile::kWarpRows - 1);
  }
  w.tile_begin = block_top.first / Tile::kBlockKv;
  w.tile_end = (block_bottom.last + Tile::kBlockKv - 1) / Tile::kBlockKv;
  w.warp_first = top.first, w.warp_last = bottom.last, w.full_first = bottom.first, w.full_last = top.last;
  w.inner_begin = (w.full_first + Tile::kBlockKv - 1) / Tile::kBlockKv;
  w.inner_end = w.full_last / Tile::kBlockKv;
  w.done = -1;
  w.trust = w.inner_begin <= w.tile_begin && w.inner_end - w.tile_begin >= 8 ? kProbing : kTrusting;
}

/* ================================================================================================================================
 * 6  mma.sync: the mainloop
 * ================================================================================================================================ */

#if FLASHCORE_HAS_SM80 || !defined(__CUDA_ARCH__)

/* The stages of K and V, between the threads that copy into them and the warps that read them. Each warp goes through the tiles of its block in turn:
 * wait_free, copies and filled for the next tile; then, for the tile at hand, reads and release; advance; wait_full.
 *   two stages   tiles alternate between them; one barrier of the block per tile says that one has landed and that all warps have read the other
 *   loose        full[] and free[] of each stage say so on their own: a warp waits for the slowest only where it is a whole stage ahead
 *   callers  whole warps, converged */
template <typename Tile> struct mma_ring {
  mma_shared<Tile> &block;
  int at = Tile::kStages - 1; /* loose: the stage of the tile at hand; the first is next */
  uint32_t parity = 1;        /* loose: of the rounds through the stages */

  __forceinline__ __device__ int here(int tile) const { return Tile::kLoose ? at : tile & 1; }
  __forceinline__ __device__ int next(int tile) const { return !Tile::kLoose ? (tile + 1) & 1 : at + 1 == Tile::kStages ? 0 : at + 1; }
  __forceinline__ __device__ uint32_t next_parity() const { return at + 1 == Tile::kStages ? parity ^ 1u : parity; }

  __forceinline__ __device__ void wait_free(int tile) const {
    if constexpr (Tile::kLoose) mbarrier_wait(shared_address(&block.free[next(tile)]), next_parity() ^ 1u);
  }
  /* plain: ordinary stores are among the copies */
  __forceinline__ __device__ void filled(int tile, bool plain) const {
    if constexpr (Tile::kLoose) {
      const uint32_t full = (uint32_t)warp_uniform((int32_t)shared_address(&block.full[next(tile)]));
      if (!plain) return cp_async_arrive(full);
      cp_async_wait_all();
      mbarrier_arrive(full);
    }
  }
  __forceinline__ __device__ void release() const {
    if constexpr (Tile::kLoose) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&block.free[at]));
    }
  }
  __forceinline__ __device__ void advance() {
    parity = next_parity();
    at = next(at);
  }
  __forceinline__ __device__ void wait_full() const {
    if constexpr (Tile::kLoose) return mbarrier_wait(shared_address(&block.full[at]), parity);
    cp_async_wait_all();
    barrier_sync<kStageBarrier, Tile::kThreads>();
  }
};

/* What a warp keeps in registers: its rows of O, their softmax state, Q's fragments, lane addresses. One object per thread. */
template <typename Tile> struct mma_warp {
  using T = typename Tile::T;
  using tile_qk = swizzled_tile<Tile::kRowBytesQk>;
  using tile_v = swizzled_tile<Tile::kRowBytesV>;
  static constexpr int kRowTiles = Tile::kRowTiles, kStep = Tile::kStep;
  static constexpr int kEdgeStep = kStep < 32 ? kStep : 32; /* finer at edges: less beyond the diagonal, and room for masks in the registers */
  static constexpr int kDepthQk = Tile::kHeadDimQk / 16, kTilesO = Tile::kColumns / 8;
  static constexpr bool kQHeld = Tile::kQ != kQShared;
  static constexpr bool kLsePays = kDepthQk > 8 && kDepthQk <= 16; /* whoever wants the LSE pays for its last bits; of 512 dims, everyone */
  /* A reference is put above the row's maximum by a headroom, so that it seldom has to move. f16 has no exponents to spend on that: its terms are
   * multiples of 2^-24, which beside a maximum of less than 1 would round a background of many keys away. Up to 2^kLimit no term overflows. */
  static constexpr float kHeadroom = element<T>::kDtype == FLASHCORE_BF16 ? 7.f : 0.f, kLimit = 15.f, kSumLimit = 32768.f; /* 2^kLimit */
  static constexpr bool kWaryLoop = Tile::kBlockKv > kEdgeStep; /* where a stage is one step, edge_tile is as good */
  /* Fragments that are read before something that takes time: copies, exponentials, a vote. As many as the registers allow. */
  static constexpr int kEarly = Tile::kHeadDimQk > 128 || !FLASHCORE_HAS_SM90 ? 3 : 4;
  struct fragments {
    uint32_t f[kEarly][4];
  };

  float o[kRowTiles][kTilesO][4]; /* accumulators, times l */
  float m[kRowTiles][2];          /* reference of rows g, g + 8: log2 units */
  float l[kRowTiles][2];          /* this lane's part of the row sum */
  uint32_t q[kQHeld ? kRowTiles : 1][kQHeld ? kDepthQk : 1][4];
  uint32_t q_address, k_address, v_address; /* this lane's ldmatrix addresses of the first fragment; K, V: within a stage */

  static __forceinline__ __device__ int lane() { return threadIdx.x & 31; }
  static __forceinline__ __device__ int row0() { return threadIdx.x / 32 % Tile::kRowWarps * Tile::kWarpRows; } /* of this warp within the block */

  /* Zeros, addresses, the warp's keys; `w` into the block's shared part.
   *   callers  all threads of the block, after mma_find_work
   *   implies  __syncwarp */
  __forceinline__ __device__ void init(const flashcore_attention &a, const mma_schedule &plan, mma_work &w, mma_shared<Tile> &block,
                                       uint32_t shared) {
    const int warp = warp_uniform((int)threadIdx.x / 32);
    const int column0 = warp / Tile::kRowWarps * Tile::kColumns;
    q_address = shared + Tile::kOffsetQ + tile_qk::offset(row0() + lane() % 16, lane() / 16);
    k_address = tile_qk::offset(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
    v_address = tile_v::offset(lane() % 16, lane() / 16) + column0 * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      m[i][0] = m[i][1] = FLASHCORE_EMPTY_MAX;
      l[i][0] = l[i][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.f;
    }
    mma_find_keys<Tile>(a, plan, w, row0());
    if (lane() == 0) block.work() = w;
    if (Tile::kLoose && threadIdx.x < Tile::kStages) {
      mbarrier_init(shared_address(&block.full[threadIdx.x]), Tile::kThreads);
      mbarrier_init(shared_address(&block.free[threadIdx.x]), Tile::kThreads / 32);
    }
    __syncwarp();
  }

  /* ---- loading ---- */

  /* The tile's rows of Q. Rows past the end become zeros and are never stored. */
  template <bool kGeneral>
  __forceinline__ __device__ void load_q(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w, uint32_t shared) {
    shared += Tile::kOffsetQ;
    const char *src = static_cast<const char *>(a.q.data) + 2 * (w.seq.q + w.head * a.q.stride_h);
    const int chunks = a.dim_qk / 8, rows = w.rows - w.row0;
    if (plan.pack.d == 1 && (!kGeneral || plan.align == 16)) {
      using loader = tile_loader<Tile::kBlockQ, Tile::kRowBytesQk, Tile::kThreads>;
      src += w.row0 * a.q.stride_s * 2;
      if (rows >= Tile::kBlockQ && chunks == tile_qk::kChunks) loader::load(shared, src, (int32_t)a.q.stride_s * 2);
      else loader::load_edge(shared, src, (int32_t)a.q.stride_s * 2, rows, chunks);
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kBlockQ * tile_qk::kChunks; i += Tile::kThreads) {
      const int r = i / tile_qk::kChunks, chunk = i % tile_qk::kChunks, query = plan.pack.quotient(w.row0 + r);
      const int64_t offset = query * a.q.stride_s + (w.row0 + r - query * plan.pack.d) * a.q.stride_h;
      const int live = r < rows ? 2 * a.dim_qk - chunk * 16 : 0; /* bytes */
      if (kGeneral && plan.align < 16) copy_chunk(shared + tile_qk::offset(r, chunk), src + 2 * offset + chunk * 16, live, plan.align);
      else cp_async<16>(shared + tile_qk::offset(r, chunk), src + 2 * offset + chunk * 16, live > 0);
    }
  }
  /* Keys from `key` on of K and V into the stage at `dst`. */
  template <bool kGeneral>
  static __forceinline__ __device__ void load_kv(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w, uint32_t dst, int key) {
    using k_loader = tile_loader<Tile::kBlockKv, Tile::kRowBytesQk, Tile::kThreads>;
    using v_loader = tile_loader<Tile::kBlockKv, Tile::kRowBytesV, Tile::kThreads>;
    const int32_t k_stride = (int32_t)a.k.stride_s * 2, v_stride = (int32_t)a.v.stride_s * 2, keys = w.seq.len_kv - key;
    const char *k = w.k + (int64_t)key * k_stride, *v = w.v + (int64_t)key * v_stride;
    if (kGeneral && plan.align < 16) {
      k_loader::load_unaligned(dst, k, k_stride, keys, 2 * a.dim_qk, plan.align);
      v_loader::load_unaligned(dst + Tile::kBytesK, v, v_stride, keys, 2 * a.dim_v, plan.align);
    } else if (key + Tile::kBlockKv <= w.full_keys) {
      k_loader::load(dst, k, k_stride);
      v_loader::load(dst + Tile::kBytesK, v, v_stride);
    } else {
      k_loader::load_edge(dst, k, k_stride, keys, a.dim_qk / 8);
      v_loader::load_edge(dst + Tile::kBytesK, v, v_stride, keys, a.dim_v / 8);
    }
  }

  /* ---- the two products ---- */

  /* Address of the fragment 2 i chunks along a row: an exclusive or within a swizzle span (row starts leave its bits 0), a constant beyond. */
  template <typename SwizzledTile> static __forceinline__ __device__ uint32_t along(uint32_t address, int i) {
    constexpr int kFragments = SwizzledTile::kSpan > 1 ? SwizzledTile::kSpan / 2 : 1; /* per span */
    return (address ^ (i % kFragments * 32)) + i / kFragments * (kFragments * 32);
  }
  __forceinline__ __device__ void q_fragment(uint32_t (&f)[4], int i, int k) const {
    ldmatrix_x4(f, along<tile_qk>(q_address, k) + i * 16 * Tile::kRowBytesQk);
  }
  __forceinline__ __device__ void hold_q() {
    if constexpr (kQHeld) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int k = 0; k < kDepthQk; ++k) q_fragment(q[i][k], i, k);
    }
  }
  /* Fragment i of K (pairs of column tiles within a depth step) and of V (pairs of dims within 16 keys), in the order of the products. */
  template <int kTiles> __forceinline__ __device__ void k_fragment(uint32_t (&f)[4], uint32_t k_tile, int i) const {
    ldmatrix_x4(f, along<tile_qk>(k_tile + k_address, i / (kTiles / 2)) + i % (kTiles / 2) * 16 * Tile::kRowBytesQk);
  }
  __forceinline__ __device__ void v_fragment(uint32_t (&f)[4], uint32_t v_tile, int i) const {
    ldmatrix_x4_trans(f, along<tile_v>(v_tile + v_address, i % (kTilesO / 2)) + i / (kTilesO / 2) * 16 * Tile::kRowBytesV);
  }
  template <int kTiles> __forceinline__ __device__ void early_k(fragments &early, uint32_t k_tile) const {
#pragma unroll
    for (int i = 0; i < kEarly && i < kDepthQk * kTiles / 2; ++i) k_fragment<kTiles>(early.f[i], k_tile, i);
  }
  __forceinline__ __device__ void early_v(fragments &early, uint32_t v_tile) const {
#pragma unroll
    for (int i = 0; i < kEarly && i < kTilesO / 2; ++i) v_fragment(early.f[i], v_tile, i);
  }
  /* s = Q K^T for 8 kTiles keys at `k_tile`; `early`: what early_k has read.   [16 kRowTiles][8 kTiles] f32
   *   kExact   long rows are added up in parts: an f32 accumulator loses a little with each product, which the LSE of large logits would show */
  template <int kTiles, bool kExact = false, bool kHasEarly = false>
  __forceinline__ __device__ void gemm_qk(float (&s)[kRowTiles][kTiles][4], uint32_t k_tile, const fragments &early = {}) {
    constexpr int kParts = kExact || kDepthQk > 16 ? (kDepthQk + 7) / 8 : 1;
    float sum[kParts][kRowTiles][kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDepthQk; ++k) {
      uint32_t fq[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (kQHeld) {
#pragma unroll
          for (int x = 0; x < 4; ++x) fq[i][x] = q[i][k][x];
        } else q_fragment(fq[i], i, k);
      }
#pragma unroll
      for (int n = 0; n < kTiles / 2; ++n) {
        const int at = k * (kTiles / 2) + n;
        uint32_t fk[4];
        if (kHasEarly && at < kEarly) {
#pragma unroll
          for (int x = 0; x < 4; ++x) fk[x] = early.f[at][x];
        } else k_fragment<kTiles>(fk, k_tile, at);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<T>(sum[k % kParts][i][2 * n], fq[i], fk[0], fk[1]);
          mma_m16n8k16<T>(sum[k % kParts][i][2 * n + 1], fq[i], fk[2], fk[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          s[i][n][x] = sum[0][i][n][x];
#pragma unroll
          for (int part = 1; part < kParts; ++part) s[i][n][x] += sum[part][i][n][x];
        }
  }
  /* o += P V for 8 kTiles keys at `v_tile`; `early`: what early_v has read.   [16 kRowTiles][kColumns] f32 */
  template <bool kHasEarly = false, int kTiles>
  __forceinline__ __device__ void gemm_pv(const uint32_t (&p)[kRowTiles][kTiles][2], uint32_t v_tile, const fragments &early = {}) {
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k)
#pragma unroll
      for (int n = 0; n < kTilesO / 2; ++n) {
        uint32_t fv[4];
        if (kHasEarly && k == 0 && n < kEarly) {
#pragma unroll
          for (int x = 0; x < 4; ++x) fv[x] = early.f[n][x];
        } else v_fragment(fv, v_tile, k * (kTilesO / 2) + n);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const uint32_t fp[4] = {p[i][2 * k][0], p[i][2 * k][1], p[i][2 * k + 1][0], p[i][2 * k + 1][1]};
          mma_m16n8k16<T>(o[i][2 * n], fp, fv[0], fv[1]);
          mma_m16n8k16<T>(o[i][2 * n + 1], fp, fv[2], fv[3]);
        }
      }
  }

  /* ---- scores to probabilities ---- */

  /* Row index within the unit of accumulator half h (rows g, g + 8) of row tile i. */
  static __forceinline__ __device__ int row_of(const mma_work &w, int i, int h) { return w.row0 + row0() + i * 16 + h * 8 + lane() / 4; }

  /* Edge tiles only: -inf where a row does not see a key. `key`: the step's first. */
  template <int kTiles>
  __forceinline__ __device__ void mask(float (&s)[kRowTiles][kTiles][4], const flashcore_attention &a, const mma_schedule &plan, const mma_work &w,
                                       int key) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = plan.pack.quotient(min(row_of(w, i, h), w.rows - 1));
        const flashcore_range r = flashcore_visible_keys(&a, query, w.seq.len_q, w.seq.len_kv);
        const int base = key + 2 * (lane() % 4), begin = r.first - base, end = r.last - base;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int x = 0; x < 2; ++x)
            if (n * 8 + x < begin || n * 8 + x >= end) s[i][n][2 * h + x] = -INFINITY;
      }
  }
  /* The score rule on every element: raw products become logits in log2 units (scale_log2 is 1 from then on). */
  template <int kTiles, typename Rule>
  __forceinline__ __device__ void apply_rule(float (&s)[kRowTiles][kTiles][4], const flashcore_attention &a, const mma_schedule &plan,
                                             const mma_work &w, int key, const Rule &rule) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = min(row_of(w, i, h), w.rows - 1);
        const int query = plan.pack.quotient(row);
        score_position at = {w.batch, w.head + row - query * plan.pack.d, query, 0, w.seq.len_q, w.seq.len_kv};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            at.key = min(key + n * 8 + 2 * (lane() % 4) + x, w.seq.len_kv - 1); /* past the end: masked later, but a rule may read memory */
            s[i][n][2 * h + x] = softmax_log2_units(rule(a, s[i][n][2 * h + x] * a.scale, at));
          }
      }
  }
  /* The largest of a lane's scores in row g + 8 h of row tile i. */
  template <int kTiles> static __forceinline__ __device__ float lane_max(const float (&s)[kRowTiles][kTiles][4], int i, int h) {
    float x = s[i][0][2 * h];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) x = fmaxf(x, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
    return x;
  }
  /* Will no term of these scores be larger than 2^kLimit? (Not with NaN.)   callers  all 32 lanes, converged */
  template <int kTiles> __forceinline__ __device__ bool terms_fit(const float (&s)[kRowTiles][kTiles][4], float scale_log2) const {
    bool fit = true;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) fit &= fmaf(lane_max(s, i, h), scale_log2, -m[i][h]) <= kLimit;
    return __all_sync(0xffffffffu, fit);
  }
  /* A reference for these scores, without headroom: the maximum of row g + 8 h of row tile i.   callers  all 32 lanes, converged */
  template <int kTiles>
  static __forceinline__ __device__ float reference_for(const float (&s)[kRowTiles][kTiles][4], int i, int h, float scale_log2) {
    return softmax_reference(quad_max(lane_max(s, i, h)), scale_log2);
  }
  /* Move every row's reference up to its maximum so far and the headroom; o and l follow.
   *   returns  false: some reference is so large that its last bit may take a term beyond the limit: edge_tile caps them
   *   callers  all 32 lanes, converged */
  template <int kTiles> __forceinline__ __device__ bool raise(const float (&s)[kRowTiles][kTiles][4], float scale_log2) {
    bool fine = true;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float top = fmaxf(m[i][h], reference_for(s, i, h, scale_log2) + kHeadroom), factor = ex2(m[i][h] - top);
        m[i][h] = top;
        fine &= fabsf(top) < 67108864.f;
        l[i][h] *= factor;
#pragma unroll
        for (int n = 0; n < kTilesO; ++n) {
          o[i][n][2 * h] *= factor;
          o[i][n][2 * h + 1] *= factor;
        }
      }
    return __all_sync(0xffffffffu, fine);
  }
  /* p = exp2(s - m) rounded to T; sum: this lane's part of the rows' sums, unrounded.   p[i][n][h]: column tile n, rows g + 8 h
   *   edge   terms are capped (see softmax_term); in an inner tile the sums tell, or the maxima
   *   edge   where a reference is so large that its last bit weighs, the largest term is not exact, and l counts what O gets: a row of one key is
   *          that key's V. (The LSE does not feel it, next to so large a number.) */
  template <bool kEdge, int kTiles>
  __forceinline__ __device__ void exponentiate(const float (&s)[kRowTiles][kTiles][4], uint32_t (&p)[kRowTiles][kTiles][2],
                                               float (&sum)[kRowTiles][2], float scale_log2) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      sum[i][0] = sum[i][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x0 = fmaf(s[i][n][2 * h], scale_log2, -m[i][h]), x1 = fmaf(s[i][n][2 * h + 1], scale_log2, -m[i][h]);
          float e0 = ex2(kEdge && x0 > kLimit ? kLimit : x0), e1 = ex2(kEdge && x1 > kLimit ? kLimit : x1); /* NaN stays */
          p[i][n][h] = pack2<T>(e0, e1);
          if (kEdge && fabsf(m[i][h]) > 16384.f) unpack2<T>(p[i][n][h], e0, e1);
          sum[i][h] += e0;
          sum[i][h] += e1;
        }
    }
  }
  /* Do these sums tell that no term was larger than 2^kLimit? (Not with NaN.)   callers  all 32 lanes, converged */
  static __forceinline__ __device__ bool sums_fit(const float (&sum)[kRowTiles][2]) {
    bool fits = true;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) fits &= sum[i][0] < kSumLimit && sum[i][1] < kSumLimit;
    return __all_sync(0xffffffffu, fits);
  }
  /* First references, from the maxima over 16 keys as far as rows see them: the first step need not run twice. */
  __forceinline__ __device__ void seed(uint32_t k_tile, const flashcore_attention &a, const mma_schedule &plan, const mma_work &w, int key) {
    float s[kRowTiles][2][4];
    gemm_qk(s, k_tile);
    if (key + 16 > w.full_last || key < w.full_first) mask(s, a, plan, w, key);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) m[i][h] = fmaxf(m[i][h], reference_for(s, i, h, plan.scale_log2) + kHeadroom);
  }

  /* inner_tile leaves what it has not taken to edge_tile. */
  static __forceinline__ __device__ bool leave_at(mma_work &w, int done) {
    if (lane() == 0) w.trust = kWary, w.done = done;
    __syncwarp();
    return false;
  }
  /* One K/V stage whose keys every row of the warp sees: s = Q K^T, p = exp2(s - m), o += P V. `fill` issues the copies of the next stage.
   *   trusting     no maximum at all: terms are taken against the reference as it stands, their sums bound them all, and from a step with a large sum
   *                on, the keys are left to edge_tile
   *   not          the maxima are looked at first, and where terms would be too large the reference moves
   *   exact        see gemm_qk
   * The products of the next step are issued before the exponentials of this one (kAhead), so that the tensor cores have work meanwhile.
   *   returns  false: only the first w.done keys were taken
   *   callers  all 32 lanes, converged; fill may wait for other warps */
  template <bool kTrusts, bool kExact, typename Fill>
  __forceinline__ __device__ bool inner_tile(uint32_t k_tile, uint32_t v_tile, float scale_log2, mma_work &w, const Fill &fill) {
    constexpr bool kAhead = Tile::kAhead;
    float s[kAhead ? 2 : 1][kRowTiles][kStep / 8][4], sum[kRowTiles][2];
    uint32_t p[kRowTiles][kStep / 8][2];
    fragments early;
    early_k<kStep / 8>(early, k_tile);
    fill();
    gemm_qk<kStep / 8, kExact, true>(s[0], k_tile, early);
#pragma unroll
    for (int c = 0; c < Tile::kBlockKv; c += kStep) {
      if (!kAhead && c > 0) gemm_qk<kStep / 8, kExact>(s[0], k_tile + c * Tile::kRowBytesQk);
      if (kAhead && c + kStep < Tile::kBlockKv) gemm_qk<kStep / 8, kExact>(s[(c / kStep + 1) % 2], k_tile + (c + kStep) * Tile::kRowBytesQk);
      const auto &now = s[kAhead ? c / kStep % 2 : 0];
      if (!kTrusts && !terms_fit(now, scale_log2)) {
        if (!raise(now, scale_log2)) return leave_at(w, c);
        if (lane() == 0) w.trust = kWary;
      }
      early_v(early, v_tile + c * Tile::kRowBytesV);
      exponentiate<false>(now, p, sum, scale_log2);
      if (kTrusts && !sums_fit(sum)) return leave_at(w, c);
      add_sums(sum);
      gemm_pv<true>(p, v_tile + c * Tile::kRowBytesV, early);
    }
    return true;
  }
  template <bool kTrusts, typename Fill>
  __forceinline__ __device__ bool take_inner(const flashcore_attention &a, uint32_t k_tile, uint32_t v_tile, float scale_log2, mma_work &w,
                                             const Fill &fill) {
    if (kLsePays && a.lse) return inner_tile<kTrusts, true>(k_tile, v_tile, scale_log2, w, fill);
    return inner_tile<kTrusts, false>(k_tile, v_tile, scale_log2, w, fill);
  }
  /* The keys of one stage from `done` on, step by step: at an edge, under a score rule, or where a term was too large. A step with a large sum runs
   * again after the reference has moved.
   *   edge     a row with no visible key yet has m = FLASHCORE_EMPTY_MAX, p = 0, l = 0 */
  template <typename Rule>
  __forceinline__ __device__ void edge_tile(uint32_t k_tile, uint32_t v_tile, const flashcore_attention &a, const mma_schedule &plan,
                                            const mma_work &w, int key0, int done, const Rule &rule) {
    float s[kRowTiles][kEdgeStep / 8][4], sum[kRowTiles][2];
    uint32_t p[kRowTiles][kEdgeStep / 8][2];
#pragma unroll 1
    for (int c = done; c < Tile::kBlockKv; c += kEdgeStep) {
      const int key = key0 + c;
      if (key >= w.warp_last || key + kEdgeStep <= w.warp_first) continue;
      bool look = Rule::kActive, again; /* a rule costs too much to run twice */
      do {
        if (kLsePays && a.lse) gemm_qk<kEdgeStep / 8, true>(s, k_tile + c * Tile::kRowBytesQk);
        else gemm_qk(s, k_tile + c * Tile::kRowBytesQk);
        if constexpr (Rule::kActive) apply_rule(s, a, plan, w, key, rule);
        if (key + kEdgeStep > w.full_last || key < w.full_first) mask(s, a, plan, w, key);
        if (look) raise(s, plan.scale_log2);
        exponentiate<true>(s, p, sum, plan.scale_log2);
        again = !look && !sums_fit(sum); /* a capped sum is large, too */
        look = true;
      } while (again);
      add_sums(sum);
      gemm_pv(p, v_tile + c * Tile::kRowBytesV);
    }
  }
  __forceinline__ __device__ void add_sums(const float (&sum)[kRowTiles][2]) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      l[i][0] += sum[i][0];
      l[i][1] += sum[i][1];
    }
  }

  /* ---- the loop ---- */

  /* All keys of the block's rows.
   *   callers  all threads of the block, after load_q and init
   *   implies  barriers of the whole block; on return other warps may still read shared memory */
  template <typename Rule>
  __forceinline__ __device__ void mainloop(const flashcore_attention &a, const mma_schedule &plan, mma_shared<Tile> &block, uint32_t shared,
                                           const Rule &rule) {
    constexpr bool kGeneral = Rule::kActive;
    mma_work &w = block.work(); /* in shared memory: bounds, too, are read from there */
    mma_ring<Tile> ring{block};
    int tile = w.tile_begin - 1;
    const auto k_at = [&](int stage) { return shared + Tile::kOffsetKv + stage * (Tile::kBytesK + Tile::kBytesV); };
    const auto v_at = [&](int stage) { return k_at(stage) + Tile::kBytesK; };
    const auto fill_next = [&] {
      if (tile + 1 >= w.tile_end) return;
      ring.wait_free(tile);
      load_kv<kGeneral>(a, plan, w, k_at(ring.next(tile)), (tile + 1) * Tile::kBlockKv);
      ring.filled(tile, kGeneral && plan.align < 16);
    };
    const auto next_tile = [&] {
      ring.advance();
      if (++tile < w.tile_end) ring.wait_full();
    };
    const auto end_tile = [&] {
      ring.release();
      next_tile();
    };
    if (Tile::kLoose) __syncthreads();                          /* the barriers exist */
    if (w.tile_begin >= w.tile_end) return cp_async_wait_all(); /* Q was for nothing */
    if constexpr (!Tile::kQBesideKv) {
      cp_async_wait_all();
      __syncthreads();
      hold_q();
      __syncthreads(); /* K and V go where Q was */
    }
    fill_next();
    next_tile();
    if constexpr (kQHeld && Tile::kQBesideKv) hold_q();
    if constexpr (Tile::kQ == kQRegistersReuse && Tile::kQBesideKv) __syncthreads(); /* the next stages go where Q was */
    if (!kGeneral) seed(k_at(ring.here(tile)), a, plan, w, tile * Tile::kBlockKv);
    /* Tiles that every row of this warp sees in full have loops of their own: their registers and instructions are the kernel's speed. */
    while (tile < w.tile_end) {
      if (!kGeneral && tile >= w.inner_begin) {
        for (; kWaryLoop && w.trust != kTrusting && tile < w.inner_end; end_tile()) {
          if (!take_inner<false>(a, k_at(ring.here(tile)), v_at(ring.here(tile)), plan.scale_log2, w, fill_next)) break;
          __syncwarp();
          if (w.trust == kProbing && lane() == 0) w.trust = kTrusting;
          __syncwarp();
        }
        if (w.done < 0)
          for (; tile < w.inner_end; end_tile())
            if (!take_inner<true>(a, k_at(ring.here(tile)), v_at(ring.here(tile)), plan.scale_log2, w, fill_next)) break;
        if (tile >= w.tile_end) break;
      }
      const int done = w.done;
      if (done < 0) fill_next();
      edge_tile(k_at(ring.here(tile)), v_at(ring.here(tile)), a, plan, w, tile * Tile::kBlockKv, max(done, 0), rule);
      __syncwarp();
      if (lane() == 0) w.done = -1;
      __syncwarp();
      end_tile();
    }
  }

  /* ---- the end ---- */

  /* Row sums over the quad, sink, LSE; o becomes the result. */
  __forceinline__ __device__ void finish(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w) {
    softmax_state state[kRowTiles][2];
    float factor[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(l[i][h]);
        state[i][h] = {sum == 0.f ? FLASHCORE_EMPTY_MAX : m[i][h], sum};
        factor[i][h] = 1.f;
      }
    if (a.sink || a.lse) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row_of(w, i, h), query = plan.pack.quotient(row), head = w.head + row - query * plan.pack.d;
          if (row >= w.rows) continue;
          if (a.sink) factor[i][h] = softmax_add_sink(state[i][h], a.sink[head]);
          if (a.lse && lane() % 4 == 0 && threadIdx.x < Tile::kRowWarps * 32)
            a.lse[((int64_t)w.batch * a.heads_q + head) * a.seq_q + query] = softmax_lse(state[i][h], a.lse_base2 != 0);
        }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[i][h] *= softmax_inverse(state[i][h]);
#pragma unroll
        for (int n = 0; n < kTilesO; ++n) {
          o[i][n][2 * h] *= factor[i][h];
          o[i][n][2 * h + 1] *= factor[i][h];
        }
      }
  }
  /* O of live rows and dims. The lanes of a quad trade words, so that each has a chunk of 16 bytes: of four column tiles, lane t gets tile t.
   *   callers  all 32 lanes, converged */
  template <bool kGeneral> __forceinline__ __device__ void store(const flashcore_attention &a, const mma_schedule &plan, const mma_work &w) {
    const int dim0 = (int)threadIdx.x / 32 / Tile::kRowWarps * Tile::kColumns + lane() % 4 * 8;
    T *const o_head = static_cast<T *>(a.o.data) + w.seq.o + w.head * a.o.stride_h + dim0;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(w, i, h), query = plan.pack.quotient(row), dims = row < w.rows ? a.dim_v - dim0 : 0;
        T *const dst = o_head + query * a.o.stride_s + (row - query * plan.pack.d) * a.o.stride_h;
#pragma unroll
        for (int n = 0; n < kTilesO; n += 4) {
          uint32_t x[4];
#pragma unroll
          for (int t = 0; t < 4; ++t) x[t] = n + t < kTilesO ? pack2<T>(o[i][n + t][2 * h], o[i][n + t][2 * h + 1]) : 0u;
          quad_transpose(x);
          if (n * 8 >= dims) continue;
          const uint4 chunk = make_uint4(x[0], x[1], x[2], x[3]);
          if (kGeneral && plan.align < 16) store_chunk(reinterpret_cast<char *>(dst + n * 8), chunk, dims - n * 8);
          else *reinterpret_cast<uint4 *>(dst + n * 8) = chunk;
        }
      }
  }
};

#endif /* FLASHCORE_HAS_SM80 */

/* ================================================================================================================================
 * 7  mma.sync: kernel
 * ================================================================================================================================ */

/* O = softmax(rule(Q K^T)) V for one tile of query rows. */
template <typename Tile, typename Rule>
FLASHCORE_KERNEL void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    mma_kernel(const __grid_constant__ flashcore_attention a, const __grid_constant__ mma_schedule plan, const Rule rule) {
#if FLASHCORE_HAS_SM80
  extern __shared__ __align__(128) unsigned char flashcore_shared[];
  const uint32_t shared = shared_address(flashcore_shared);
  __shared__ mma_shared<Tile> block;
  mma_work work;
  if (!mma_find_work<Tile>(a, plan, blockIdx.x, work)) return;
  mma_warp<Tile> warp;
  warp.template load_q<Rule::kActive>(a, plan, work, shared);
  warp.init(a, plan, work, block, shared);
  warp.mainloop(a, plan, block, shared, rule);
  warp.finish(a, plan, block.work());
  warp.template store<Rule::kActive>(a, plan, block.work());
#else
  __trap();
#endif
}

} // namespace v0_1_0
} // namespace flashcore

/* ================================================================================================================================
 * 8  mma.sync: plan and launch
 * ================================================================================================================================ */
#if !defined(__CUDACC_RTC__) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))

static flashcore_status flashcore_mma_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  const flashcore_status status = flashcore_check_tensor_core(a, device, "mma", 80, error);
  if (status != FLASHCORE_OK) return status;
  const flashcore_tensor *tensors[4] = {&a->q, &a->k, &a->v, &a->o};
  const char *names[4] = {"q", "k", "v", "o"};
  for (int i = 0; i < 4; ++i)
    if (tensors[i]->stride_s > INT32_MAX / 2 || tensors[i]->stride_s < -(INT32_MAX / 2))
      return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, names[i], tensors[i]->stride_s, INT32_MAX / 2,
                              "%s: the mma kernel needs rows less than 2 GiB apart, not %lld elements", names[i], (long long)tensors[i]->stride_s);
  return FLASHCORE_OK;
}

/* The instance a problem gets. */
template <typename Tile, bool kGeneral> static void flashcore_mma_use(flashcore_plan *plan) {
  if constexpr (kGeneral) plan->kernel = reinterpret_cast<const void *>(&flashcore::mma_kernel<Tile, flashcore::descriptor_rule>);
  else plan->kernel = reinterpret_cast<const void *>(&flashcore::mma_kernel<Tile, flashcore::no_rule>);
  plan->d.block_q = Tile::kBlockQ;
  plan->d.block_kv = Tile::kBlockKv;
  plan->d.stages = Tile::kStages;
  plan->d.head_dim_qk = Tile::kHeadDimQk;
  plan->d.head_dim_v = Tile::kHeadDimV;
  plan->d.threads = Tile::kThreads;
  plan->d.shared_bytes = Tile::kSharedBytes;
}

/* The tile for head dims (kQk, kV), among the shapes it has. General kernels are narrow, for room in the registers; grids that would leave SMs idle
 * are narrow or short; the rest is wide, or compact where SMs are small. Where a wide block fills an SM, nothing hides its start and its end: rows of
 * few keys are narrow there, as long as two narrow blocks fit an SM. */
template <typename T, int kQk, int kV, bool kHasNarrow, bool kHasCompact, bool kHasShort>
static void flashcore_mma_pick(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  using namespace flashcore;
  using wide = mma_tile_for<T, kQk, kV, kWide>;
  const int64_t rows = (int64_t)a->seq_q * a->heads_q * a->batch;
  const bool small = device->shared_per_sm < 160 * 1024;
  if constexpr (kHasNarrow) {
    using narrow = mma_tile_for<T, kQk, kV, kNarrow>;
    if (general) return flashcore_mma_use<narrow, true>(plan);
    if constexpr (kHasShort)
      if (rows <= (int64_t)device->sm_count * narrow::kBlockQ) return flashcore_mma_use<mma_tile_for<T, kQk, kV, kShort>, false>(plan);
    if (rows < (int64_t)device->sm_count * wide::kBlocksPerSm * wide::kBlockQ) return flashcore_mma_use<narrow, false>(plan);
    if (wide::kBlocksPerSm == 1 && !small && a->seq_kv < (a->causal ? 2048 : 1024)) return flashcore_mma_use<narrow, false>(plan);
  } else if (general) return flashcore_mma_use<wide, true>(plan);
  if constexpr (kHasCompact)
    if (small) return flashcore_mma_use<mma_tile_for<T, kQk, kV, kCompact>, false>(plan);
  flashcore_mma_use<wide, false>(plan);
}

/* The smallest instance that holds both dims; false where there is none. */
template <typename T>
static bool flashcore_mma_select(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  const int qk = a->dim_qk, v = a->dim_v, dim = qk > v ? qk : v;
  if (dim <= 32) flashcore_mma_pick<T, 32, 32, true, false, false>(a, device, general, plan);
  else if (dim <= 64) flashcore_mma_pick<T, 64, 64, true, true, true>(a, device, general, plan);
  else if (dim <= 80) flashcore_mma_pick<T, 80, 80, true, false, false>(a, device, general, plan);
  else if (dim <= 96) flashcore_mma_pick<T, 96, 96, true, false, false>(a, device, general, plan);
  else if (dim <= 128) flashcore_mma_pick<T, 128, 128, true, true, false>(a, device, general, plan);
  else if (qk <= 192 && v <= 128) flashcore_mma_pick<T, 192, 128, false, false, false>(a, device, general, plan);
  else if (dim <= 192) flashcore_mma_pick<T, 192, 192, false, false, false>(a, device, general, plan);
  else if (dim <= 256) flashcore_mma_pick<T, 256, 256, true, false, false>(a, device, general, plan);
  else if (dim <= 512) flashcore_mma_pick<T, 512, 512, false, false, false>(a, device, general, plan);
  else return false;
  return true;
}

enum { FLASHCORE_MMA_ALIGN, FLASHCORE_MMA_ORDER, FLASHCORE_MMA_GENERAL }; /* plan->param */

static flashcore_status flashcore_mma_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                           flashcore_error *error) {
  const flashcore_status status = flashcore_mma_check(a, device, error);
  if (status != FLASHCORE_OK) return status;
  const int align = flashcore_row_align(a);
  const bool general = align < 16 || flashcore_has_rule(a);
  bool found = false;
#if !defined(FLASHCORE_NO_F16)
  if (a->dtype == FLASHCORE_F16) found = flashcore_mma_select<__half>(a, device, general, plan);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (a->dtype == FLASHCORE_BF16) found = flashcore_mma_select<__nv_bfloat16>(a, device, general, plan);
#endif
  if (!found)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0, "dtype: the mma kernel was compiled without type %d",
                            (int)a->dtype);
  const flashcore::mma_spread spread = flashcore::make_mma_spread(*a, plan->d.block_q, device->sm_count);
  plan->d.backend = FLASHCORE_BACKEND_MMA;
  plan->d.splits = 1;
  plan->d.packed_group = spread.pack;
  plan->param[FLASHCORE_MMA_ALIGN] = align;
  plan->param[FLASHCORE_MMA_ORDER] = spread.order;
  plan->param[FLASHCORE_MMA_GENERAL] = general;
  snprintf(plan->d.kernel, sizeof plan->d.kernel, "mma %s d%d,%d q%d kv%d%s", a->dtype == FLASHCORE_F16 ? "f16" : "bf16", (int)plan->d.head_dim_qk,
           (int)plan->d.head_dim_v, (int)plan->d.block_q, (int)plan->d.block_kv, general ? " general" : "");
  return flashcore_set_grid(a, spread.blocks, "mma", plan, error);
}

static flashcore_status flashcore_mma_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                             flashcore_error *error) {
  flashcore_attention args = *a;
  int64_t grid;
  flashcore::mma_schedule schedule = flashcore::make_mma_schedule(*a, plan->d.block_q, plan->param[FLASHCORE_MMA_GENERAL] != 0, plan->d.packed_group,
                                                                  plan->param[FLASHCORE_MMA_ORDER], plan->param[FLASHCORE_MMA_ALIGN], grid);
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  void *kernel_args[3] = {&args, &schedule, &rule};
  return flashcore_launch(plan, kernel_args, stream, error);
}

static flashcore_backend_ops flashcore_mma_ops = {FLASHCORE_BACKEND_MMA, flashcore_mma_plan, flashcore_mma_launch, nullptr};
static struct flashcore_mma_registration {
  __forceinline__ flashcore_mma_registration() { flashcore_register_backend(&flashcore_mma_ops); }
} flashcore_mma_registered;

#endif /* implementation */

#endif /* __CUDACC__ */

/* MIT licence: see LICENSE. Copyright (c) 2026 FlashCore authors. */
#endif /* FLASHCORE_WMMA_CUH */
