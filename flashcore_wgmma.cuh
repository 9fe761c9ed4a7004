/* flashcore_wgmma.cuh · FlashCore 0.1.0 · MIT licence · attention on Hopper's own instructions: TMA, mbarrier and wgmma (sm_90a)
 *
 * Use:  #include this beside flashcore_wmma.cuh in the file that defines FLASHCORE_IMPLEMENTATION, and compile for sm_90a:
 *         nvcc -gencode arch=compute_90a,code=sm_90a ...
 *       flashcore_forward then picks this kernel on an H100 or H200 where it is the fastest. Compiled for another arch it refuses, and dispatch goes on
 *       to the next backend. Or launch wgmma_kernel yourself, with a score rule, a prologue for Q and an epilogue for O of your own
 *       (examples/fused_prologue_epilogue).
 *
 * Contents                                                       backend   element type   dims (smaller ones are padded)                from
 *   1  TMA, barriers, registers: PTX wrappers                    WGMMA     f16, bf16      64, 96, 128, 192, 256, (192, 128)             sm_90a
 *   2  wgmma: descriptors, fragments, the instruction            not served: fp32, fp8, page tables, key splits
 *   3  one struct describes one kernel; hooks
 *   4  which rows and keys a tile works on
 *   5  the producer and the planner
 *   6  the consumers' mainloop
 *   7  kernel                                                    FLASHCORE_NO_F16, FLASHCORE_NO_BF16 leave an element type out
 *   8  tensor maps, and the launch of a kernel of your own
 *   9  plan and launch
 *
 * The algorithm. One block per SM walks over tiles of query rows. One warp, the producer, has TMA fill a ring of K and V blocks; another, the
 * planner, works out which rows and keys come next; two to four warpgroups, the consumers, own 64 rows each.
 * In the letters of the code, m: reference, l: sum of terms, c: scale in log2 units:
 *   for each block j of keys, the last first:
 *     s = Q K_j^T          wgmma, issued together with the one before it:   o += P_j+1 V_j+1
 *     p = exp2(s c - m)    while the tensor cores work on o; against the reference as it stands, and the row sums bound every term
 *     if a sum is large:   m = m + log2 max p + headroom; p, o, l scaled along   (rare; where p overflowed, s once more and its maximum)
 *     l += sum p
 *   o / l, straight from registers; meanwhile the next tile's first s is on its way
 *
 * Barrier ledger; i counts a ring's rounds, a warp waits with all its lanes:
 *   barrier               arrivals per phase         who waits           parity in round i   what it hands over
 *   q_full[stage][wg]     the producer + its bytes   warps of group wg   i & 1               64 rows of Q have landed
 *   q_free[stage][wg]     1 per warp of group wg     the producer        (i & 1) ^ 1         they were read for the last time, or are in registers
 *   k_full, v_full[st]    the producer + its bytes   all consumer warps  i & 1               a block of K or V has landed
 *   k_free, v_free[st]    1 per consumer warp        the producer        (i & 1) ^ 1         it was read and may be filled again
 *   work_full[tile & 1]   a lane per consumer warp   all consumer warps  (tile / 2) & 1      which rows and keys the tile has
 *   work_free[tile & 1]   1 per consumer warp        the planner         (tile / 2 & 1) ^ 1  the tile is done
 *   kGroupBarrier + wg    128 threads of group wg    the same            -                   the tail rows of a V block are zero
 *   those of turn()       64 threads of two warps,   the second          -                   what is done in turn (wgmma_turns)
 *                         or 256 of two groups
 *   __syncthreads         the block                  the block           -                   the barriers exist
 * Where lanes copy (wgmma_schedule::copy), three producers share the tensors out, and arrive on q_, k_, v_full without bytes, behind a proxy fence. */
#if defined(FLASHCORE_WGMMA_PARTS_ONLY) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))
#error "include flashcore_wgmma.cuh before flashcore_fp8.cuh, which takes its building blocks alone"
#endif
#ifndef FLASHCORE_WGMMA_CUH
#define FLASHCORE_WGMMA_CUH
#include "flashcore.h"
#if defined(__CUDACC__)
#if !defined(__CUDACC_RTC__)
#include <cuda.h> /* types of cuTensorMapEncodeTiled; nothing of the driver's library is linked */
#endif

/* wgmma and setmaxnreg belong to sm_90a alone: plain sm_90 does not have them. Always 0 or 1. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLASHCORE_HAS_SM90A 1
#else
#define FLASHCORE_HAS_SM90A 0
#endif

namespace flashcore {
inline namespace v0_1_0 {

/* ================================================================================================================================
 * 1  TMA, barriers, registers: PTX wrappers
 * ================================================================================================================================ */

/* What the driver's cuTensorMapEncodeTiled writes: a tensor's address, sizes, strides and box. Pass it as a __grid_constant__ const parameter. */
struct alignas(64) tensor_map {
  uint64_t words[16];
};
struct wgmma_maps {
  tensor_map q, k, v;
};

#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)

/* Makes mbarrier_init visible to TMA; a barrier of the block must follow.   ptx  fence.mbarrier_init.release.cluster, sm_90, PTX 8.0 */
FLASHCORE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* One arrival, and the phase also waits for so many bytes from TMA.
 *   ptx      mbarrier.arrive.expect_tx, sm_90, PTX 8.0
 *   callers  one thread, before the copies that bring the bytes */
FLASHCORE_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t tx_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(tx_bytes) : "memory");
}

/* An eviction priority in L2 for what TMA moves.   ptx  createpolicy.fractional.L2::{evict_first,evict_last}.b64, sm_80, PTX 7.4 */
struct l2_policy {
  uint64_t bits;
};
FLASHCORE_DEVICE l2_policy l2_evict_first() {
  l2_policy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy.bits));
  return policy;
}
FLASHCORE_DEVICE l2_policy l2_evict_last() {
  l2_policy policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy.bits));
  return policy;
}

/* Fetch a tensor map, before the first copy needs it.   ptx  prefetch.tensormap, sm_90, PTX 8.0     callers  one thread */
FLASHCORE_DEVICE void prefetch_tensormap(const tensor_map &map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

/* Copies of one box of a tensor of 2 to 5 dims; x0, the contiguous one, to x4: where the box begins, in elements, also below 0; x0 in whole 16 bytes
 * (an H200 takes anything else for an illegal instruction). Each with an L2 policy as last argument, or without.
 *   tma_load            global to shared memory; what lies outside the tensor arrives as zeros, and counts as bytes of the barrier
 *   tma_load_multicast  the same box to every block of the cluster whose rank is a bit of `blocks`: in its shared memory at the offset of dst, with the
 *                       bytes counted by its barrier at the offset of `barrier`
 *   tma_prefetch        global memory to L2
 *   tma_store           shared to global memory; what lies beyond the tensor is not written, but a row ends at whole 16 bytes (H200); no
 *                       coordinate is below 0 (another illegal instruction)
 *   ptx      cp.async.bulk.tensor.Nd.shared::cluster.global.mbarrier::complete_tx::bytes[.multicast::cluster][.L2::cache_hint],
 *            cp.async.bulk.prefetch.tensor.Nd.L2.global[...], cp.async.bulk.tensor.Nd.global.shared::cta.bulk_group[...], sm_90, PTX 8.0
 *   shapes   dst, src: shared address, 128-aligned; with a swizzle of W bytes a tile of rows of W bytes, as swizzled_tile<W>, aligned to 8 W
 *   callers  one thread
 *   orders   load: the bytes are visible to those who have waited for the barrier's phase
 *            store: who wrote to src calls fence_proxy_async, then a barrier; afterwards see tma_store_wait */
#define FLASHCORE_TMA(rank, x, box, operands, i0, i1, i2, i3)                                                                                        \
  FLASHCORE_DEVICE void tma_load(uint32_t dst, const tensor_map &map, uint32_t barrier, x) {                                                         \
    asm volatile(FLASHCORE_TMA_LOAD(rank) " [%" #i0 "], " box ", [%" #i1 "];" ::operands, "r"(dst), "r"(barrier) : "memory");                        \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_load(uint32_t dst, const tensor_map &map, uint32_t barrier, x, l2_policy policy) {                                       \
    asm volatile(FLASHCORE_TMA_LOAD(rank) ".L2::cache_hint [%" #i0 "], " box ", [%" #i1 "], %" #i2 ";" ::operands, "r"(dst), "r"(barrier),           \
                 "l"(policy.bits)                                                                                                                    \
                 : "memory");                                                                                                                        \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_load_multicast(uint32_t dst, const tensor_map &map, uint32_t barrier, uint16_t blocks, x) {                              \
    asm volatile(FLASHCORE_TMA_LOAD(rank) ".multicast::cluster [%" #i0 "], " box ", [%" #i1 "], %" #i2 ";" ::operands, "r"(dst), "r"(barrier),       \
                 "h"(blocks)                                                                                                                         \
                 : "memory");                                                                                                                        \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_load_multicast(uint32_t dst, const tensor_map &map, uint32_t barrier, uint16_t blocks, x, l2_policy policy) {            \
    asm volatile(FLASHCORE_TMA_LOAD(rank) ".multicast::cluster.L2::cache_hint [%" #i0 "], " box ", [%" #i1 "], %" #i2 ", %" #i3 ";" ::operands,      \
                 "r"(dst), "r"(barrier), "h"(blocks), "l"(policy.bits)                                                                               \
                 : "memory");                                                                                                                        \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_prefetch(const tensor_map &map, x) {                                                                                     \
    asm volatile("cp.async.bulk.prefetch.tensor." #rank "d.L2.global " box ";" ::operands : "memory");                                               \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_prefetch(const tensor_map &map, x, l2_policy policy) {                                                                   \
    asm volatile("cp.async.bulk.prefetch.tensor." #rank "d.L2.global.L2::cache_hint " box ", %" #i0 ";" ::operands, "l"(policy.bits) : "memory");    \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_store(const tensor_map &map, uint32_t src, x) {                                                                          \
    asm volatile(FLASHCORE_TMA_STORE(rank) " " box ", [%" #i0 "];" ::operands, "r"(src) : "memory");                                                 \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void tma_store(const tensor_map &map, uint32_t src, x, l2_policy policy) {                                                        \
    asm volatile(FLASHCORE_TMA_STORE(rank) ".L2::cache_hint " box ", [%" #i0 "], %" #i1 ";" ::operands, "r"(src), "l"(policy.bits) : "memory");      \
  }
#define FLASHCORE_TMA_LOAD(rank)  "cp.async.bulk.tensor." #rank "d.shared::cluster.global.mbarrier::complete_tx::bytes"
#define FLASHCORE_TMA_STORE(rank) "cp.async.bulk.tensor." #rank "d.global.shared::cta.bulk_group"
#define FLASHCORE_X2              int x0, int x1
#define FLASHCORE_X3              FLASHCORE_X2, int x2
#define FLASHCORE_X4              FLASHCORE_X3, int x3
#define FLASHCORE_X5              FLASHCORE_X4, int x4
#define FLASHCORE_R2              "l"(&map), "r"(x0), "r"(x1)
#define FLASHCORE_R3              FLASHCORE_R2, "r"(x2)
#define FLASHCORE_R4              FLASHCORE_R3, "r"(x3)
#define FLASHCORE_R5              FLASHCORE_R4, "r"(x4)
/* rank; its coordinates as parameters, in PTX, and as operands; the numbers of the operands behind them */
FLASHCORE_TMA(2, FLASHCORE_X2, "[%0, {%1, %2}]", FLASHCORE_R2, 3, 4, 5, 6)
FLASHCORE_TMA(3, FLASHCORE_X3, "[%0, {%1, %2, %3}]", FLASHCORE_R3, 4, 5, 6, 7)
FLASHCORE_TMA(4, FLASHCORE_X4, "[%0, {%1, %2, %3, %4}]", FLASHCORE_R4, 5, 6, 7, 8)
FLASHCORE_TMA(5, FLASHCORE_X5, "[%0, {%1, %2, %3, %4, %5}]", FLASHCORE_R5, 6, 7, 8, 9)

/* Close the group of the tma_store that this thread has issued; wait until at most kPending of its groups are in flight.
 *   ptx      cp.async.bulk.commit_group, cp.async.bulk.wait_group[.read], sm_90, PTX 8.0
 *   callers  the thread that stored
 *   orders   wait_read: shared memory was read and may be written; wait: the writes are done, and visible to this thread */
FLASHCORE_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending> FLASHCORE_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory"); }
template <int kPending> FLASHCORE_DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory"); }

/* This thread's ordinary stores to shared memory before it come before later reads by wgmma and TMA (of all who pass a barrier after it).
 *   ptx  fence.proxy.async.shared::cta, sm_90, PTX 8.0 */
FLASHCORE_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Set the registers per thread of the caller's warpgroup; what dec gives up, inc of another may take (and waits for).
 *   ptx      setmaxnreg.{dec,inc}.sync.aligned.u32, sm_90a, PTX 8.0
 *   callers  all 128 threads of a warpgroup, converged */
template <int kRegisters> FLASHCORE_DEVICE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters> FLASHCORE_DEVICE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

/* Barrier of one warpgroup.   ptx  barrier.sync, sm_70     callers  the 128 threads of group wg     orders  shared memory among them */
enum wgmma_barrier { kGroupBarrier = 1 }; /* first of one per warpgroup; 0 belongs to __syncthreads; behind them those of wgmma_warp::turn */
FLASHCORE_DEVICE void warpgroup_sync(int wg) { asm volatile("barrier.sync %0, 128;" ::"r"(kGroupBarrier + wg) : "memory"); }

/* Named barriers: sync waits until so many threads have come (a multiple of 32), arrive only counts as one of them. A warp counts as 32.
 *   ptx      barrier.{sync,arrive}, sm_70
 *   shapes   id: 0 to 15, 0 being that of __syncthreads; threads: the same number in all calls of a phase
 *   callers  whole warps
 *   orders   shared memory before sync or arrive comes before what follows a sync */
FLASHCORE_DEVICE void barrier_sync(int id, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FLASHCORE_DEVICE void barrier_arrive(int id, int threads) { asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* The block's rank in its cluster; the blocks of the cluster.   ptx  %cluster_ctarank, %cluster_nctarank, sm_90, PTX 7.8 */
FLASHCORE_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
FLASHCORE_DEVICE uint32_t cluster_size() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
/* The cluster's barrier, in two halves. Also needed before a block leaves whose shared memory or barriers others may still reach.
 *   ptx      barrier.cluster.arrive.release.aligned, barrier.cluster.wait.acquire.aligned, sm_90, PTX 8.0
 *   callers  all threads of all blocks of the cluster, warps converged
 *   orders   all memory before arrive comes before what follows wait */
FLASHCORE_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FLASHCORE_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/* The address, for shared::cluster instructions, of what lies at `address` in the shared memory of the cluster's block `rank`.
 *   ptx  mapa.shared::cluster.u32, sm_90, PTX 7.8 */
FLASHCORE_DEVICE uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
/* mbarrier_arrive on a barrier of any block of the cluster, and the wait for such arrivals on one's own.
 *   ptx      mbarrier.arrive.release.cluster.shared::cluster, mbarrier.try_wait.parity.acquire.cluster, looped, sm_90, PTX 8.0
 *   shapes   mapped: from map_shared; barrier, parity: as for mbarrier_wait
 *   callers  arrive: any thread; wait: whole warps, which return converged
 *   orders   memory accesses before arrive come before those after the wait */
FLASHCORE_DEVICE void mbarrier_arrive_cluster(uint32_t mapped) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}
FLASHCORE_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred p;\nPOLL:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n\t@!p bra POLL;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/* One, two or four 8x8 matrices of 16-bit elements to shared memory: what ldmatrix (flashcore.h) reads; lane i gives the address of row i % 8 of
 * matrix i / 8, lanes beyond the matrices any.
 *   ptx      stmatrix.sync.aligned.m8n8.{x1,x2,x4}[.trans].shared.b16, sm_90, PTX 7.8
 *   shapes   r[j]: matrix j, row lane / 4, columns 2 * (lane % 4) + {0, 1} (transposed: column lane / 4, rows ...)
 *   callers  all 32 lanes, converged */
#define FLASHCORE_STMATRIX(n, list, ...)                                                                                                             \
  FLASHCORE_DEVICE void stmatrix(uint32_t address, const uint32_t(&r)[n]) {                                                                          \
    asm volatile("stmatrix.sync.aligned.m8n8.x" #n ".shared.b16 [%0], {" list "};" ::"r"(address), __VA_ARGS__ : "memory");                          \
  }                                                                                                                                                  \
  FLASHCORE_DEVICE void stmatrix_trans(uint32_t address, const uint32_t(&r)[n]) {                                                                    \
    asm volatile("stmatrix.sync.aligned.m8n8.x" #n ".trans.shared.b16 [%0], {" list "};" ::"r"(address), __VA_ARGS__ : "memory");                    \
  }
FLASHCORE_STMATRIX(1, "%1", "r"(r[0]))
FLASHCORE_STMATRIX(2, "%1, %2", "r"(r[0]), "r"(r[1]))
FLASHCORE_STMATRIX(4, "%1, %2, %3, %4", "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]))

/* Programmatic dependent launch: a kernel launched with that attribute starts when all blocks of the one before it have called launch_dependents or
 * ended, and sees their memory after wait. Does nothing in other launches.
 *   ptx      griddepcontrol.{wait,launch_dependents}, sm_90, PTX 7.8
 *   callers  any thread; each waits on its own
 *   orders   all memory of the grids that this one depends on comes before what follows wait, which returns when they have ended */
FLASHCORE_DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
FLASHCORE_DEVICE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/* ================================================================================================================================
 * 2  wgmma: descriptors, fragments, the instruction
 * ================================================================================================================================ */

/* What a matrix in shared memory looks like to wgmma:
 *   bits  0-13  address / 16                     16-29  leading offset / 16
 *        32-45  stride offset / 16               62-63  swizzle: 1 = 128 bytes, 2 = 64, 3 = 32
 * A tile is stored as [columns / c][rows][c] elements of 16 bits, c = kRowBytes / 2: rows of kRowBytes in a swizzle of so many bytes (swizzled_tile);
 * eight of them make a group, to whose size, 1024 bytes with the widest swizzle, a tile is aligned.
 *   K-major (Q, K: the product runs along a row)       stride: from 8 rows to the next; leading: unused
 *     16 columns further: 32 bytes, after c columns the next [rows][c]
 *   MN-major (V: the product runs down the rows)       stride: from 8 rows to the next; leading: from c columns to the next
 *     16 rows further: 16 kRowBytes                                                                                          */
template <int kRowBytes = 128> FLASHCORE_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32, "the swizzles that there are");
  const uint32_t low = address >> 4 | leading_bytes >> 4 << 16;
  return low | (uint64_t)(8 * kRowBytes >> 4) << 32 | (uint64_t)(kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3) << 62;
}

/* Before the first wgmma of a group, and after registers that it uses were touched: orders them.   ptx  wgmma.fence.sync.aligned, sm_90a */
FLASHCORE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/* Close the group of the wgmma issued so far; wait until at most kPending groups are in flight.
 *   ptx      wgmma.commit_group, wgmma.wait_group.sync.aligned, sm_90a, PTX 8.0
 *   callers  a warpgroup, converged
 *   orders   accumulators of finished groups may be read, after wgmma_pin; their operands may be written */
FLASHCORE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> FLASHCORE_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }
/* Keeps the compiler from moving uses of accumulators across this point. No instruction. */
template <int kTiles> FLASHCORE_DEVICE void wgmma_pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

/* d = a b, or d += a b: a 64 x 16, b 16 x kN, f32 accumulators. Asynchronous.
 *   ptx      wgmma.mma_async.sync.aligned.m64nNk16.f32.{f16,bf16}.{f16,bf16}, sm_90a, PTX 8.0
 *   shapes   ss: a and b K-major in shared memory, both by descriptor (S = Q K^T)
 *            rs: a in registers, b in shared memory; kTransB 1: MN-major (O = P V), 0: K-major (S = Q K^T)
 *   callers  a warpgroup, converged; wgmma_fence before, wgmma_commit and wgmma_wait after
 *
 * Accumulator d[kN / 8][4]: warp w of the group has rows 16w .. 16w+15, where d[n] is mma.m16n8's accumulator of columns 8n .. 8n+7; the A operand in
 * registers is mma.m16n8k16's: two accumulators side by side, rounded and packed in pairs (section 6 of flashcore.h draws both). */
template <typename T, int kN> struct wgmma;

#define FLASHCORE_D4(i)   "+f"(d[(i) / 4][0]), "+f"(d[(i) / 4][1]), "+f"(d[(i) / 4][2]), "+f"(d[(i) / 4][3])
#define FLASHCORE_D16(i)  FLASHCORE_D4(i), FLASHCORE_D4(i + 4), FLASHCORE_D4(i + 8), FLASHCORE_D4(i + 12)
#define FLASHCORE_D32(i)  FLASHCORE_D16(i), FLASHCORE_D16(i + 16)
#define FLASHCORE_D48(i)  FLASHCORE_D32(i), FLASHCORE_D16(i + 32)
#define FLASHCORE_D64(i)  FLASHCORE_D48(i), FLASHCORE_D16(i + 48)
#define FLASHCORE_D96(i)  FLASHCORE_D64(i), FLASHCORE_D32(i + 64)
#define FLASHCORE_D128(i) FLASHCORE_D96(i), FLASHCORE_D32(i + 96)
#define FLASHCORE_L32     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FLASHCORE_L48     FLASHCORE_L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FLASHCORE_L64     FLASHCORE_L48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FLASHCORE_L96                                                                                                                                \
  FLASHCORE_L64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FLASHCORE_L128                                                                                                                               \
  FLASHCORE_L96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%"   \
                "122,%123,%124,%125,%126,%127"
/* n: kN; list, outputs: its n / 2 registers; i0 .. i6: the numbers of the operands behind them */
#define FLASHCORE_WGMMA(T, type, n, list, outputs, i0, i1, i2, i3, i4, i5, i6)                                                                       \
  template <> struct wgmma<T, n> {                                                                                                                   \
    static __forceinline__ __device__ void ss(float (&d)[n / 8][4], uint64_t a, uint64_t b, bool accumulate) {                                       \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #i2 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list    \
                   "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 0;\n\t}"                                                                                      \
                   : outputs                                                                                                                         \
                   : "l"(a), "l"(b), "r"((int)accumulate));                                                                                          \
    }                                                                                                                                                \
    template <int kTransB> static __forceinline__ __device__ void rs(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {    \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #i5 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list    \
                   "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n\t}"                                                     \
                   : outputs                                                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(kTransB));                                        \
    }                                                                                                                                                \
  };
#define FLASHCORE_WGMMA_OF(T, type)                                                                                                                  \
  FLASHCORE_WGMMA(T, type, 64, FLASHCORE_L32, FLASHCORE_D32(0), 32, 33, 34, 35, 36, 37, 38)                                                          \
  FLASHCORE_WGMMA(T, type, 96, FLASHCORE_L48, FLASHCORE_D48(0), 48, 49, 50, 51, 52, 53, 54)                                                          \
  FLASHCORE_WGMMA(T, type, 128, FLASHCORE_L64, FLASHCORE_D64(0), 64, 65, 66, 67, 68, 69, 70)                                                         \
  FLASHCORE_WGMMA(T, type, 192, FLASHCORE_L96, FLASHCORE_D96(0), 96, 97, 98, 99, 100, 101, 102)                                                      \
  FLASHCORE_WGMMA(T, type, 256, FLASHCORE_L128, FLASHCORE_D128(0), 128, 129, 130, 131, 132, 133, 134)
FLASHCORE_WGMMA_OF(__half, "f16")
FLASHCORE_WGMMA_OF(__nv_bfloat16, "bf16")

#endif /* FLASHCORE_HAS_SM90A */

/* ================================================================================================================================
 * 3  One struct describes one kernel; hooks
 * ================================================================================================================================ */

/* How a tile's Q reaches the product with K. */
enum wgmma_q {
  kQOnce,      /* one buffer: the next tile's Q is loaded while this tile's O is stored */
  kQTwice,     /* two buffers: it is there when this tile ends, and the next tile's first product overlaps this tile's last */
  kQFragments, /* so too, with one buffer: a tile begins by taking Q's fragments to registers */
};
/* When a row's reference is looked after. */
enum wgmma_reference {
  kLookAlways, /* every block: the maximum is taken first, and the reference moves when a term would be large */
  kLookAtSums, /* the sums of the terms tell afterwards: K must stay for the case that the products are needed again */
};

/* What consumers do in turn, so that one uses a unit of the SM while another waits for the tensor cores (figures: H200, CUDA 13.0).
 *   products   warpgroups issue theirs one after the other: in fp8 up to 10 % faster where there are three groups
 *   terms      of the warps that share a quarter of the SM, one exponentiates at a time: where there are two groups, and every block is looked at first,
 *              1 to 2 % faster at 256 dims, up to 10 % in fp8 */
enum wgmma_turns { kNoTurns, kProductTurns, kTermTurns };

/* T: element; kHeadDimQk, kHeadDimV: dims of the instance, smaller ones are zero-padded to it
 * kGroups: consumer warpgroups, 64 query rows each      kBlockKv: keys per block      kStages: blocks of K, and of V, in shared memory
 * kParts: 1 or 2, of the sum along a row of Q: an f32 accumulator loses a little with each product, which the LSE of large logits would show */
template <typename T_, int kHeadDimQk_, int kHeadDimV_, int kGroups_, int kBlockKv_, int kStages_, wgmma_q kQ_, wgmma_reference kReference_,
          int kParts_ = 1, wgmma_turns kTurns_ = kNoTurns>
struct wgmma_tile {
  using T = T_;
  static constexpr int kHeadDimQk = kHeadDimQk_, kHeadDimV = kHeadDimV_, kGroups = kGroups_, kBlockKv = kBlockKv_, kStages = kStages_,
                       kParts = kParts_;
  static constexpr bool kOverlapsTiles = kQ_ != kQOnce, kQHeld = kQ_ == kQFragments, kTrustsSums = kReference_ == kLookAtSums;
  static constexpr int kQStages = kQ_ == kQTwice ? 2 : 1;
  static constexpr wgmma_turns kTurns = kTurns_;
  static constexpr int kEdgeRows = 16; /* that ask for masks together: a warp's */

  static constexpr bool kScaled = false; /* each tile has factors of its own (wgmma_walk), and O a type of its own */

  static constexpr int kBlockQ = 64 * kGroups, kThreads = 128 * (kGroups + 1), kConsumerWarps = 4 * kGroups;

  /* Shared memory, from a multiple of 1024 on: Q [kQStages][kGroups], K [kStages], V [kStages]; each [columns / 64][rows][64]. */
  static constexpr int kColumnsQk = (kHeadDimQk + 63) / 64 * 64, kColumnsV = (kHeadDimV + 63) / 64 * 64;
  static constexpr int kBytesQ = 64 * kColumnsQk * 2, kBytesK = kBlockKv * kColumnsQk * 2, kBytesV = kBlockKv * kColumnsV * 2;
  static constexpr int kOffsetK = kQStages * kGroups * kBytesQ, kOffsetV = kOffsetK + kStages * kBytesK;
  static constexpr int kOffsetBarriers = kOffsetV + kStages * kBytesV, kBytesBarriers = 512, kSharedBytes = kOffsetBarriers + kBytesBarriers + 1024;

  /* Of the 65 536 registers, the producer keeps few: consumers need kBlockKv / 2 for S, kBlockKv / 4 for P, kHeadDimV / 2 for O, and some 30 more. */
  static constexpr int kProducerRegisters = kGroups == 2 ? 24 : 32, kConsumerRegisters = kGroups == 2 ? 240 : kGroups == 3 ? 160 : 112;

  static_assert(sizeof(T) == 2, "16-bit elements");
  static_assert(kHeadDimQk % 16 == 0 && kHeadDimV % 32 == 0 && kBlockKv % 64 == 0,
                "depth of a product; O is stored by 32 columns; whole boxes of keys");
  static_assert(kGroups >= 2 && kGroups <= 4, "registers are shared out for these");
  static_assert(kParts == 1 || !kTrustsSums, "gemm_qk_again adds up in one part");
  static_assert(kTurns == kNoTurns || (kTurns == kTermTurns && !kTrustsSums), "a turn is part of look_and_exponentiate");
  /* A group skips the blocks beyond its own diagonal while it still holds one of V: the producer must get past them. */
  static_assert(kStages > ((kGroups - 1) * 64 + kBlockKv - 1) / kBlockKv && kStages >= 2, "more stages than blocks that a group skips");
  static_assert(kProducerRegisters * 128 + kConsumerRegisters * kGroups * 128 <= 65536, "registers of an SM");
};

/* The tiles in use
 *   wide      most
 *   narrow    fewer rows, for grids that would leave SMs idle at the end
 *   long      causal rows of many keys, and dim 96: there it pays to read K and V less often
 *   exact     who wants the LSE of more than 128 dims pays for its last bits
 *   general   with a score rule, which needs registers */
enum wgmma_shape { kWideTile, kNarrowTile, kLongTile, kExactTile, kGeneralTile };

template <typename T, int kHeadDimQk, int kHeadDimV, wgmma_shape kShape> struct wgmma_tile_for;
#define FLASHCORE_WGMMA_TILE(qk, v, shape, ...)                                                                                                      \
  template <typename T> struct wgmma_tile_for<T, qk, v, shape> : wgmma_tile<T, qk, v, __VA_ARGS__> {}

/*                   dims               groups, keys, stages, Q, reference, parts, turns */
FLASHCORE_WGMMA_TILE(64, 64, kWideTile, 4, 64, 4, kQTwice, kLookAtSums); /* 256 rows: 512 and 1024 leave no remainder */
FLASHCORE_WGMMA_TILE(64, 64, kNarrowTile, 2, 128, 4, kQFragments, kLookAtSums);
FLASHCORE_WGMMA_TILE(64, 64, kGeneralTile, 2, 64, 4, kQTwice, kLookAlways);
FLASHCORE_WGMMA_TILE(96, 96, kWideTile, 2, 128, 3, kQFragments, kLookAtSums);
FLASHCORE_WGMMA_TILE(96, 96, kLongTile, 3, 64, 3, kQTwice, kLookAtSums);
FLASHCORE_WGMMA_TILE(96, 96, kGeneralTile, 2, 64, 3, kQTwice, kLookAlways);
FLASHCORE_WGMMA_TILE(128, 128, kWideTile, 2, 128, 3, kQFragments, kLookAtSums);
FLASHCORE_WGMMA_TILE(128, 128, kLongTile, 3, 64, 3, kQTwice, kLookAtSums); /* 192 rows: fewer bytes of K and V per product than 128 */
FLASHCORE_WGMMA_TILE(128, 128, kGeneralTile, 2, 64, 3, kQTwice, kLookAlways);
FLASHCORE_WGMMA_TILE(192, 128, kWideTile, 2, 128, 2, kQOnce, kLookAtSums);
FLASHCORE_WGMMA_TILE(192, 128, kExactTile, 2, 64, 3, kQOnce, kLookAlways, 2); /* S in two parts: registers for 64 keys */
FLASHCORE_WGMMA_TILE(192, 128, kGeneralTile, 2, 64, 3, kQOnce, kLookAlways, 2);
FLASHCORE_WGMMA_TILE(192, 192, kWideTile, 2, 64, 3, kQOnce, kLookAtSums);
FLASHCORE_WGMMA_TILE(192, 192, kExactTile, 2, 64, 3, kQOnce, kLookAlways, 2);
FLASHCORE_WGMMA_TILE(192, 192, kGeneralTile, 2, 64, 3, kQOnce, kLookAlways, 2);
FLASHCORE_WGMMA_TILE(256, 256, kWideTile, 2, 64, 2, kQOnce, kLookAlways, 1, kTermTurns); /* no room for Q twice, nor for a third stage to keep K in */
FLASHCORE_WGMMA_TILE(256, 256, kExactTile, 2, 64, 2, kQOnce, kLookAlways, 2);
FLASHCORE_WGMMA_TILE(256, 256, kGeneralTile, 2, 64, 2, kQOnce, kLookAlways, 2);

/* Is it in the table? */
template <typename Tile, typename = void> struct wgmma_has_tile { static constexpr bool value = false; };
template <typename Tile> struct wgmma_has_tile<Tile, decltype((void)Tile::kBlockQ)> { static constexpr bool value = true; };

/* The type of V, and of P, in shared memory: that of Q. flashcore_fp8.cuh knows tiles where it is not. */
template <typename Tile> struct wgmma_values { using type = typename Tile::T; };

/* ---- hooks: what a kernel of your own may do besides; a score rule is flashcore.h's ----
 *
 * A prologue changes Q where it lies in shared memory, before the first product. Any copyable type with kActive = true and
 *     __device__ void operator()(const flashcore_attention &a, const wgmma_q_rows<T> &q) const;
 *   callers  the 128 threads of a warpgroup, converged (threadIdx.x % 128 tells them apart); a barrier and a proxy fence follow
 * An epilogue gets O in f32 and stores it, in whatever form and place. Any copyable type with kActive = true and
 *     template <int kChunks> __device__ void operator()(const flashcore_attention &a, const float (&x)[kChunks][8], const wgmma_output &at) const;
 *   shapes   x[i]: dims at.dim + 32 i and the next 7 of one row; live where that is below dim_v
 *   callers  single lanes, for live rows */

/* 64 rows of Q in shared memory, of one batch entry and query head. */
template <typename T> struct wgmma_q_rows {
  int32_t batch, head, query, live; /* query: row 0's, within its sequence; live: rows that exist, 0 to 64 */
  int64_t offset;                   /* of row 0, in elements, from a.q.data by the strides of Q */
  uint32_t shared;

  /* Elements 8 chunk .. 8 chunk + 7 of a row; zeros beyond dim_qk. Generic address, 16 bytes. */
  __forceinline__ __device__ T *chunk(int row, int chunk) const {
    return static_cast<T *>(__cvta_shared_to_generic(shared + chunk / 8 * 64 * 128 + swizzled_tile<128>::offset(row, chunk % 8)));
  }
};
struct wgmma_output {
  int32_t batch, head, query, dim; /* dim: of x[0][0] */
  int64_t offset;                  /* of x[0][0], in elements, from a.o.data by the strides of O */
};

struct no_prologue {
  static constexpr bool kActive = false;
};
struct no_epilogue {
  static constexpr bool kActive = false;
};

/* ================================================================================================================================
 * 4  Which rows and keys a tile works on
 * ================================================================================================================================ */

/* In which order a block takes its tiles. No counter in memory: who does what follows from block and tile numbers alone. */
enum wgmma_order {
  kHeadsInTurn,  /* a head's tiles one after another: at any time the blocks read few heads, whose K and V stay in L2 */
  kPairedTiles,  /* causal, many heads: so too, but a head's longest tile with its shortest and so on: all pairs weigh the same */
  kThereAndBack, /* causal, few heads: longest tiles of all heads first, the blocks there and back, which gives them about the same sum */
};

/* How the plan spreads the work; passed beside the descriptor. */
struct wgmma_schedule {
  divisor tiles;            /* query tiles per head (of the longest sequence); kPairedTiles: pairs per head */
  divisor heads;            /* heads_q / pack: units of work per batch entry */
  divisor units;            /* heads * batch */
  divisor group;            /* units that share a head of K and V */
  int32_t last;             /* the last tile of a head */
  int32_t total;            /* tiles, or pairs, in all */
  int32_t order;            /* wgmma_order */
  float scale_log2;         /* of the products, in log2 units; 1 in kernels with a rule, which scales itself */
  int32_t pack_log2;        /* query heads packed into a tile's rows: row r is query r / pack of head r % pack. A power of two: a box of Q for TMA */
  int64_t o_step, lse_step; /* from a row to the eighth after it, in elements of O and of the LSE */
  int32_t masked;           /* causal or a window: rows see different keys */
  int32_t ragged;           /* lengths come from the device: what follows a sequence in memory is not zeros */
  int32_t copy;             /* 0: TMA reads Q, K and V. Else lanes do, this many bytes (16, 8, 4, 2) at a time, in kernels with a rule alone; below
                             * 16, O is stored by elements, too */

  FLASHCORE_MEMBER int32_t query_of(int32_t row) const { return row >> pack_log2; }
  FLASHCORE_MEMBER int32_t head_of(int32_t row) const { return row & ((1 << pack_log2) - 1); } /* of those packed */

  /* Tile and unit (packed heads of a batch entry) that a block has in its round; false: it has none in this round, or (`done`) none any more. */
  FLASHCORE_MEMBER bool tile_of(int32_t round, int32_t block, int32_t blocks, int32_t &tile, int32_t &unit, bool &done) const {
    const int32_t lap = order == kPairedTiles ? round / 2 : round;
    if (order == kThereAndBack && lap % 2) block = blocks - 1 - block;
    if (order == kPairedTiles) block = (block + lap) % blocks; /* or one block might get a single tile in each lap */
    const int32_t index = lap * blocks + block;
    done = index >= total;
    if (done) return false;
    if (order == kThereAndBack) {
      tile = units.quotient(index);
      unit = index - tile * units.d;
      tile = last - tile;
      return true;
    }
    unit = tiles.quotient(index);
    tile = index - unit * tiles.d;
    if (order == kPairedTiles && round % 2 == 0) tile = last - tile;
    return order != kPairedTiles || round % 2 == 0 || 2 * tile != last; /* of an odd number of tiles, the middle one is alone */
  }
};

/* The schedule of a problem (resolved) for tiles of block_q rows and a grid of so many blocks.
 *   pack     1, or a power of two up to 64 that divides heads_q / heads_kv (wgmma_pack_of); 1 beside a prologue, or where lanes copy
 *   general  the kernel has a rule */
FLASHCORE_INLINE wgmma_schedule make_wgmma_schedule(const flashcore_attention &a, int32_t block_q, int32_t pack, bool general, int64_t blocks) {
  const int32_t tiles = (int32_t)(((int64_t)a.seq_q * pack + block_q - 1) / block_q), heads = a.heads_q / pack, units = heads * a.batch;
  wgmma_schedule s;
  /* There and back, the blocks read many heads at once, and few tiles share what comes from memory. Measured on the H200, as ratios to cuDNN: 128
   * rows of 256 dims want pairs (1.16, not 1.00, at 2048 keys), 256 rows of 64 dims do not (1.34, not 1.30, at 8192: the last round is 3 % idle). */
  const int64_t pairs = (int64_t)((tiles + 1) / 2) * units, rounds = (pairs + blocks - 1) / blocks;
  const bool pair = 2 * units > blocks || (a.dim_qk > 128 && 20 * pairs >= 19 * rounds * blocks);
  s.order = a.causal == FLASHCORE_CAUSAL_NONE ? kHeadsInTurn : pair ? kPairedTiles : kThereAndBack;
  s.tiles = make_divisor(s.order == kPairedTiles ? (tiles + 1) / 2 : tiles);
  s.pack_log2 = 0;
  while (1 << s.pack_log2 < pack) ++s.pack_log2;
  s.o_step = pack <= 8 ? 8 / pack * a.o.stride_s : 8 * a.o.stride_h;
  s.lse_step = pack <= 8 ? 8 / pack : (int64_t)8 * a.seq_q;
  s.heads = make_divisor(heads);
  s.units = make_divisor(units);
  s.group = make_divisor(heads / a.heads_kv);
  s.last = tiles - 1;
  s.total = s.tiles.d * units;
  s.scale_log2 = general ? 1.f : flashcore_scale_log2(a.scale);
  s.masked = a.causal || a.window_left < FLASHCORE_UNBOUNDED || a.window_right < FLASHCORE_UNBOUNDED;
  s.ragged = a.cu_seqlens_kv || a.seqlens_kv;
  s.copy = 0;
  return s;
}

struct wgmma_work {
  int32_t batch, head; /* head: the first of those packed */
  int32_t row0, rows;  /* the tile's first row; rows of the sequence, live ones: len_q * pack */
  int32_t len_q, len_kv;
  int32_t q_row, kv_row; /* of the sequence's first query and key within the tensors that TMA reads */
  int32_t begin, end;    /* blocks of keys that some row of the tile sees */
};

/* What a consumer warp has to know of its tile besides: which blocks of keys, from the last one down. */
struct alignas(16) wgmma_walk {
  int32_t blocks;      /* that some row of the group sees; 0: there is no more tile */
  int32_t skip;        /* that come before these, for other groups */
  int32_t first_edges; /* at the start of the walk that some of the warp's rows (Tile::kEdgeRows) do not see in full */
  int32_t last_edges;  /* at its end */
  int32_t keys;        /* of the first block, before those that are not zeros but belong to another sequence */
  int32_t begin;       /* the block that comes last */
  int32_t row;         /* the warp's first row */
  int64_t o, lse;      /* offsets of that row, in elements */
  wgmma_work tile;
  float scale, v_scale; /* Tile::kScaled: of the products, in log2 units, or natural ones in kernels with a rule; of O */
};

/* The keys that a row sees; rows past the end count as the last. */
FLASHCORE_DEVICE flashcore_range wgmma_keys_of(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_work &w, int row) {
  return flashcore_visible_keys(&a, plan.query_of(min(row, w.rows - 1)), w.len_q, w.len_kv);
}
/* Blocks of keys that some of the rows [row, row + rows) see; at least one, so that every tile is a walk. */
template <typename Tile>
FLASHCORE_DEVICE flashcore_range wgmma_blocks(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_work &w, int row, int rows) {
  flashcore_range r = {0, w.len_kv};
  if (plan.masked) {
    r.first = wgmma_keys_of(a, plan, w, row).first;
    r.last = wgmma_keys_of(a, plan, w, row + rows - 1).last;
  }
  r.last = max(1, (r.last + Tile::kBlockKv - 1) / Tile::kBlockKv);
  r.first = min(r.first / Tile::kBlockKv, r.last - 1);
  return r;
}

/* Where tile `tile` of a unit lies, and which keys it sees. False: nothing to do (past the end of a short sequence). */
template <typename Tile>
FLASHCORE_DEVICE bool wgmma_find_work(const flashcore_attention &a, const wgmma_schedule &plan, int32_t tile, int32_t unit, wgmma_work &w) {
  w.batch = plan.heads.quotient(unit);
  w.head = (unit - w.batch * plan.heads.d) << plan.pack_log2;
  w.row0 = tile * Tile::kBlockQ;
  const flashcore_sequence seq = flashcore_sequence_at(&a, w.batch);
  w.len_q = seq.len_q;
  w.len_kv = seq.len_kv;
  w.rows = w.len_q << plan.pack_log2;
  if (w.row0 >= w.rows) return false;
  w.q_row = a.cu_seqlens_q ? flashcore_clamp(a.cu_seqlens_q[w.batch], 0, a.total_q) : 0;
  w.kv_row = a.cu_seqlens_kv ? flashcore_clamp(a.cu_seqlens_kv[w.batch], 0, a.total_kv) : 0;
  const flashcore_range blocks = wgmma_blocks<Tile>(a, plan, w, w.row0, Tile::kBlockQ);
  w.begin = blocks.first;
  w.end = blocks.last;
  return true;
}

/* The walk of a consumer warp, into shared memory at once: the planner has few registers. group_row, warp_row: first rows of its group and its own
 * within the tile. */
template <typename Tile>
FLASHCORE_DEVICE void wgmma_find_walk(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_work &w, int group_row, int warp_row,
                                      wgmma_walk &walk) {
  walk.tile = w;
  walk.row = w.row0 + warp_row;
  const int end = max(w.begin + 1, wgmma_blocks<Tile>(a, plan, w, w.row0 + group_row, 64).last);
  walk.blocks = end - w.begin;
  walk.skip = w.end - end;
  walk.begin = w.begin;
  walk.keys = plan.ragged ? min(w.len_kv - (end - 1) * Tile::kBlockKv, Tile::kBlockKv) : Tile::kBlockKv;
  flashcore_range all = {0, w.len_kv};
  if (plan.masked) {
    const int row = walk.row / Tile::kEdgeRows * Tile::kEdgeRows; /* tiles begin at a multiple of it */
    all.first = wgmma_keys_of(a, plan, w, row + Tile::kEdgeRows - 1).first;
    all.last = wgmma_keys_of(a, plan, w, row).last;
  }
  walk.first_edges = max(end - max(all.last, 0) / Tile::kBlockKv, 0);
  walk.last_edges = max((all.first + Tile::kBlockKv - 1) / Tile::kBlockKv - w.begin, 0);
  const int query = plan.query_of(walk.row), head = w.head + plan.head_of(walk.row);
  walk.o = (a.cu_seqlens_q ? 0 : w.batch * a.o.stride_b) + (int64_t)(w.q_row + query) * a.o.stride_s + head * a.o.stride_h;
  walk.lse = ((int64_t)w.batch * a.heads_q + head) * a.seq_q + query;
}

/* The block's next tile, which the producer and the planner find on their own; round: -1 to begin with. False: there is none. */
template <typename Tile>
FLASHCORE_DEVICE bool wgmma_next_tile(int32_t &round, const flashcore_attention &a, const wgmma_schedule &plan, wgmma_work &w) {
  for (;;) {
    int32_t tile, unit;
    bool done;
    if (plan.tile_of(++round, (int32_t)blockIdx.x, (int32_t)gridDim.x, tile, unit, done) && wgmma_find_work<Tile>(a, plan, tile, unit, w))
      return true;
    if (done) return false;
  }
}

#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)

/* A place in a ring of stages: which stage, and the parity of the round. */
template <int kStages> struct wgmma_ring {
  int stage;
  uint32_t parity;
  /* WHY one step at a time: a stage that is found by adding what came from memory would not stay in a uniform register. */
  __forceinline__ __device__ wgmma_ring next() const { return stage + 1 < kStages ? wgmma_ring{stage + 1, parity} : wgmma_ring{0, parity ^ 1u}; }
};

/* The barriers (see the ledger), by their 32-bit shared addresses.
 * WHY: behind the tiles in dynamic shared memory, at constants from a base that is in a register anyway. */
template <typename Tile> struct wgmma_barriers {
  static constexpr int kStages = Tile::kStages, kQs = Tile::kQStages * Tile::kGroups;
  uint32_t base;
  __forceinline__ __device__ uint32_t k_full(int stage) const { return base + 8 * stage; }
  __forceinline__ __device__ uint32_t k_free(int stage) const { return base + 8 * (kStages + stage); }
  __forceinline__ __device__ uint32_t v_full(int stage) const { return base + 8 * (2 * kStages + stage); }
  __forceinline__ __device__ uint32_t v_free(int stage) const { return base + 8 * (3 * kStages + stage); }
  __forceinline__ __device__ uint32_t q_full(int stage, int wg) const { return base + 8 * (4 * kStages + stage * Tile::kGroups + wg); }
  __forceinline__ __device__ uint32_t q_free(int stage, int wg) const { return q_full(stage, wg) + 8 * kQs; }
  __forceinline__ __device__ uint32_t work_full(int tile) const { return base + 8 * (4 * kStages + 2 * kQs + tile % 2); }
  __forceinline__ __device__ uint32_t work_free(int tile) const { return work_full(tile) + 16; }
  static constexpr int kBytes = 8 * (4 * kStages + 2 * kQs + 4);
  static_assert(kBytes <= Tile::kBytesBarriers, "fits the place that the tile keeps for it");

  /* kv_arrivals: at k_full, v_full in each phase     callers  one thread, then a barrier of the block */
  __forceinline__ __device__ void init(int kv_arrivals = 1) const { init(kv_arrivals, kv_arrivals); }
  __forceinline__ __device__ void init(int k_arrivals, int v_arrivals) const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(k_full(i), k_arrivals);
      mbarrier_init(v_full(i), v_arrivals);
      mbarrier_init(k_free(i), Tile::kConsumerWarps);
      mbarrier_init(v_free(i), Tile::kConsumerWarps);
    }
    for (int i = 0; i < kQs; ++i) {
      mbarrier_init(q_full(0, i), 1);
      mbarrier_init(q_free(0, i), 4);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(work_full(i), Tile::kConsumerWarps);
      mbarrier_init(work_free(i), Tile::kConsumerWarps);
    }
    fence_mbarrier_init();
  }
};

/* Static shared memory: each consumer warp's walk through tiles 0, 2, ... and of tiles 1, 3, ... */
template <typename Tile> struct wgmma_shared {
  wgmma_walk walks[2][Tile::kConsumerWarps];
  static_assert(Tile::kSharedBytes + sizeof walks <= 227 * 1024, "with the dynamic part, fits an SM");
};

/* ================================================================================================================================
 * 5  The producer and the planner
 * ================================================================================================================================ */

/* An input as the producer reads it. */
struct wgmma_input {
  const tensor_map &map;
  const flashcore_tensor &x;
  int32_t dim, rows; /* rows: of the tensor; what lies beyond them arrives as zeros */
  bool packed;       /* the map has a dim for the packed heads */
};
/* Rows [row, row + kRows) of a tensor that TMA cannot read, `align` bytes at a time. A lane has chunk lane % 8 of every fourth row.
 *   callers  a warp, converged */
template <int kColumns, int kRows>
FLASHCORE_DEVICE void wgmma_copy(uint32_t dst, const wgmma_input &from, int align, uint32_t full, int row, int head, int batch) {
  const int row0 = (int)threadIdx.x % 32 / 8, chunk = threadIdx.x % 8, rows = from.rows - row;
#pragma unroll 1
  for (int d = 0; d < kColumns; d += 64) {
    const int64_t offset = batch * from.x.stride_b + (row + row0) * from.x.stride_s + head * from.x.stride_h + d + 8 * chunk;
    const char *src = static_cast<const char *>(from.x.data) + 2 * offset;
    const int live = 2 * (from.dim - d - 8 * chunk);
#pragma unroll 1
    for (int r = row0; r < kRows; r += 4, src += 8 * from.x.stride_s)
      copy_chunk(dst + d * kRows * 2 + swizzled_tile<128>::offset(r, chunk), src, r < rows ? live : 0, align);
  }
  cp_async_wait_all();
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(full);
}
/* Wait until a stage is free, then fill it: [kColumns / 64][kRows][64].   copy: see wgmma_schedule     callers  a warp, converged */
template <int kColumns, int kRows>
FLASHCORE_DEVICE void wgmma_fill(uint32_t dst, const wgmma_input &from, int copy, uint32_t full, uint32_t free, uint32_t parity, int row, int head,
                                 int batch) {
  mbarrier_wait(free, parity ^ 1u);
  if (copy) return wgmma_copy<kColumns, kRows>(dst, from, copy, full, row, head, batch);
  if (threadIdx.x % 32 == 0) {
    mbarrier_arrive_expect_tx(full, kColumns * kRows * 2);
    if (from.packed) {
#pragma unroll
      for (int d = 0; d < kColumns; d += 64) tma_load(dst + d * kRows * 2, from.map, full, d, 0, row, head, batch);
    } else {
#pragma unroll
      for (int d = 0; d < kColumns; d += 64) tma_load(dst + d * kRows * 2, from.map, full, d, row, head, batch);
    }
  }
  __syncwarp();
}

/* All Q, K and V of the block's tiles.   callers  warp 0, converged; where there are copies to make, warps 0, 2 and 3: one for each tensor */
template <typename Tile, bool kCopies>
FLASHCORE_DEVICE void wgmma_produce(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_maps &maps, uint32_t shared, int warp) {
  const wgmma_barriers<Tile> barriers = {shared + Tile::kOffsetBarriers};
  const flashcore_extents extents = flashcore_extents_of(&a);
  const wgmma_input q_in = {maps.q, a.q, a.dim_qk, (int32_t)extents.rows_q, plan.pack_log2 > 0},
                    k_in = {maps.k, a.k, a.dim_qk, (int32_t)extents.rows_kv, false}, v_in = {maps.v, a.v, a.dim_v, (int32_t)extents.rows_kv, false};
  const int copy = kCopies ? plan.copy : 0;
  const bool for_q = !copy || warp == 0, for_k = !copy || warp == 2, for_v = !copy || warp == 3;
  wgmma_ring<Tile::kQStages> q = {0, 0};
  wgmma_ring<Tile::kStages> kv = {0, 0}; /* K and V have barriers of their own, but go through the stages alike */
  wgmma_work w;
  for (int32_t round = -1; wgmma_next_tile<Tile>(round, a, plan, w);) {
    const int q_batch = a.cu_seqlens_q ? 0 : w.batch, kv_batch = a.cu_seqlens_kv ? 0 : w.batch;
    const int unit = w.head >> plan.pack_log2, kv_head = plan.group.quotient(unit);
    for (int wg = 0; for_q && wg < Tile::kGroups; ++wg)
      wgmma_fill<Tile::kColumnsQk, 64>(shared + (q.stage * Tile::kGroups + wg) * Tile::kBytesQ, q_in, copy, barriers.q_full(q.stage, wg),
                                       barriers.q_free(q.stage, wg), q.parity, w.q_row + plan.query_of(w.row0 + 64 * wg), unit, q_batch);
    q = q.next();
    for (int j = w.end - 1; j >= w.begin; --j) {
      const int row = w.kv_row + j * Tile::kBlockKv;
      if (for_k)
        wgmma_fill<Tile::kColumnsQk, Tile::kBlockKv>(shared + Tile::kOffsetK + kv.stage * Tile::kBytesK, k_in, copy, barriers.k_full(kv.stage),
                                                     barriers.k_free(kv.stage), kv.parity, row, kv_head, kv_batch);
      if (for_v)
        wgmma_fill<Tile::kColumnsV, Tile::kBlockKv>(shared + Tile::kOffsetV + kv.stage * Tile::kBytesV, v_in, copy, barriers.v_full(kv.stage),
                                                    barriers.v_free(kv.stage), kv.parity, row, kv_head, kv_batch);
      kv = kv.next();
    }
  }
}

/* The consumers' tiles, one ahead of them: lane i works out what consumer warp i has to know. After the last tile comes one without blocks.
 *   callers  one warp, converged */
template <typename Tile>
FLASHCORE_DEVICE void wgmma_plan_tiles(const flashcore_attention &a, const wgmma_schedule &plan, wgmma_shared<Tile> &block, uint32_t shared) {
  const wgmma_barriers<Tile> barriers = {shared + Tile::kOffsetBarriers};
  const int lane = threadIdx.x % 32, row_in_tile = lane * 16;
  int32_t round = -1;
  bool more = true;
  for (int tile = 0; more; ++tile) {
    wgmma_work w;
    more = wgmma_next_tile<Tile>(round, a, plan, w);
    mbarrier_wait(barriers.work_free(tile), (tile / 2 & 1) ^ 1);
    if (lane < Tile::kConsumerWarps) {
      wgmma_walk &walk = block.walks[tile % 2][lane];
      if (more) wgmma_find_walk<Tile>(a, plan, w, row_in_tile / 64 * 64, row_in_tile, walk);
      else walk.blocks = 0;
      mbarrier_arrive(barriers.work_full(tile));
    }
    __syncwarp();
  }
}

/* ================================================================================================================================
 * 6  The consumers' mainloop
 * ================================================================================================================================ */

/* What a warp keeps in registers: its 16 rows of O, of S and of P, their softmax state, its place in the rings. One object per thread. */
template <typename Tile, typename Rule, typename Prologue, typename Epilogue> struct wgmma_warp {
  using T = typename Tile::T;
  using V = typename wgmma_values<Tile>::type;
  using tile_row = swizzled_tile<128>;
  static constexpr int kBlockKv = Tile::kBlockKv, kTilesS = kBlockKv / 8, kTilesO = Tile::kHeadDimV / 8, kDepthQk = Tile::kHeadDimQk / 16;
  /* A reference is put above the row's maximum by a headroom, so that it seldom has to move. f16 has no exponents to spend on that: its terms are
   * multiples of 2^-24, which beside a maximum of less than 1 would round a background of many keys away. Up to 2^kLimit no term overflows.
   * WHY 6 beside fp8 values: these are numbers of f16, so that O should be, too, where one key has all the weight; sooner there, m becomes its logit. */
  static constexpr float kHeadroom = element<V>::kDtype == FLASHCORE_BF16 ? 7.f : 0.f;
  static constexpr float kLimit = Tile::kScaled ? 6.f : 15.f, kSumLimit = Tile::kScaled ? 64.f : 32768.f; /* 2^kLimit */
  static constexpr float kLargeReference = 16384.f; /* its last bit is 2^-10: more than the rounding of a term to f16 */
  static constexpr int kWaryBlocks = 8;             /* so many blocks after a sum was too large, maxima are looked at first */

  static constexpr bool kTrustsSums = Tile::kTrustsSums && !Rule::kActive;

  float o[kTilesO][4], s[kTilesS][4]; /* accumulators; o is times l */
  uint32_t q[Tile::kQHeld ? kDepthQk : 1][4];
  float s_rest[Tile::kParts == 2 ? kTilesS : 1][4];
  uint32_t p[kBlockKv / 16][4];    /* the A operand of P V */
  float m[2];                      /* reference of rows g, g + 8: log2 units */
  float l[2];                      /* this lane's part of the row sum */
  float factor[2];                 /* what o must be multiplied with, where a reference has moved */
  float inverse[2];                /* from o to the result */
  int wary;                        /* blocks to come whose maxima are looked at first */
  int wg;                          /* the warpgroup */
  wgmma_ring<Tile::kQStages> q_at; /* Q of the tile */
  wgmma_ring<Tile::kStages> at;    /* the block whose P is in p; its K was used, its V comes next */
  uint32_t shared;
  wgmma_shared<Tile> &block;
  const Rule &rule;
  const Prologue &prologue;
  const Epilogue &epilogue;

  /* WHY: the group's number through a shuffle: the compiler then sees that it is uniform, and so are all addresses made of it. */
  __forceinline__ __device__ wgmma_warp(wgmma_shared<Tile> &block_, uint32_t shared_, const Rule &rule_, const Prologue &prologue_,
                                        const Epilogue &epilogue_)
      : wary(0), q_at{Tile::kQStages - 1, 1}, at{Tile::kStages - 1, 1}, wg(warp_uniform((int)threadIdx.x / 128 - 1)), shared(shared_), block(block_),
        rule(rule_), prologue(prologue_), epilogue(epilogue_) {}

  static __forceinline__ __device__ int lane() { return threadIdx.x & 31; }
  static __forceinline__ __device__ int warp_row0() { return (int)threadIdx.x / 32 % 4 * 16; } /* within the group */

  /* ---- rings ---- */

  using ring = wgmma_ring<Tile::kStages>;
  __forceinline__ __device__ wgmma_barriers<Tile> barriers() const { return {shared + Tile::kOffsetBarriers}; }
  __forceinline__ __device__ uint32_t q_address() const { return shared + (q_at.stage * Tile::kGroups + wg) * Tile::kBytesQ; }
  __forceinline__ __device__ uint32_t k_address(ring r) const { return shared + Tile::kOffsetK + r.stage * Tile::kBytesK; }
  __forceinline__ __device__ uint32_t v_address(ring r) const { return shared + Tile::kOffsetV + r.stage * Tile::kBytesV; }
  __forceinline__ __device__ void wait_k(ring r) const { mbarrier_wait(barriers().k_full(r.stage), r.parity); }
  __forceinline__ __device__ void wait_v(ring r) const { mbarrier_wait(barriers().v_full(r.stage), r.parity); }
  __forceinline__ __device__ void release_k(ring r) const {
    if (lane() == 0) mbarrier_arrive(barriers().k_free(r.stage));
  }
  __forceinline__ __device__ void release_v(ring r) const {
    if (lane() == 0) mbarrier_arrive(barriers().v_free(r.stage));
  }
  __forceinline__ __device__ void release_q() const {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(barriers().q_free(q_at.stage, wg));
  }

  /* ---- turns ---- */

  /* What the tile does in turn stands between these two.   callers  a warpgroup, or (terms) each of its warps, converged */
  static constexpr int kTurnThreads = Tile::kTurns == kTermTurns ? 64 : 256; /* who waits and who was before */
  static __forceinline__ __device__ int turn_barrier(int group) {
    static_assert(Tile::kTurns == kNoTurns || 1 + Tile::kGroups * (Tile::kTurns == kTermTurns ? 5 : 2) <= 16, "an SM has 16 named barriers");
    return kGroupBarrier + Tile::kGroups + (Tile::kTurns == kTermTurns ? (int)threadIdx.x / 32 % 4 * Tile::kGroups : 0) + group;
  }
  __forceinline__ __device__ void turn(wgmma_turns what) const {
    if (Tile::kTurns == what) barrier_sync(turn_barrier(wg), kTurnThreads);
  }
  __forceinline__ __device__ void pass(wgmma_turns what) const {
    if (Tile::kTurns == what) barrier_arrive(turn_barrier(wg + 1 == Tile::kGroups ? 0 : wg + 1), kTurnThreads);
  }
  /* The first turn is group 0's.   callers  all warps, once */
  __forceinline__ __device__ void start_turns() const {
    if (Tile::kTurns != kNoTurns && wg == Tile::kGroups - 1) pass(Tile::kTurns);
  }
  /* Blocks that only other groups work on are turns, too. */
  __forceinline__ __device__ void skip_turns(int skip) const {
    for (; Tile::kTurns != kNoTurns && skip > 0; --skip) turn(Tile::kTurns), pass(Tile::kTurns);
  }

  /* The next tile: its Q, at q_address(); K of its first block, which `at` + 1 + skip will be.
   * Blocks that the group has no use for must have landed before they are released: the release belongs to that phase. */
  __forceinline__ __device__ ring start_tile(const flashcore_attention &a, const wgmma_work &w, int skip) {
    q_at = q_at.next();
    mbarrier_wait(barriers().q_full(q_at.stage, wg), q_at.parity);
    if constexpr (Prologue::kActive) {
      const int row = w.row0 + 64 * wg;
      const int64_t offset = (a.cu_seqlens_q ? 0 : w.batch * a.q.stride_b) + (int64_t)(w.q_row + row) * a.q.stride_s + w.head * a.q.stride_h;
      prologue(a, wgmma_q_rows<T>{w.batch, w.head, row, max(0, min(w.len_q - row, 64)), offset, q_address()});
      fence_proxy_async();
      warpgroup_sync(wg);
    }
    if constexpr (Tile::kQHeld) {
#pragma unroll
      for (int k = 0; k < kDepthQk; ++k) q_fragment(q[k], k);
    }
    ring r = at.next();
    for (; skip > 0; --skip, r = r.next()) {
      wait_k(r);
      release_k(r);
    }
    wait_k(r);
    return r;
  }
  __forceinline__ __device__ void skip_v(int skip) const {
    for (ring r = at.next(); skip > 0; --skip, r = r.next()) {
      wait_v(r);
      release_v(r);
    }
  }

  /* ---- the two products ---- */

  /* s = Q K^T of a block: issued, one group.   [64][kBlockKv] f32 per warpgroup */
  __forceinline__ __device__ void gemm_qk(ring r) {
    const uint64_t q_tile = wgmma_descriptor(q_address(), 0), k_tile = wgmma_descriptor(k_address(r), 0);
    wgmma_pin(s);
    if constexpr (Tile::kParts == 2) wgmma_pin(s_rest);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepthQk; ++k) {
      const uint64_t q_step = q_tile + ((k / 4 * 64 * 128 + k % 4 * 32) >> 4), k_step = k_tile + ((k / 4 * kBlockKv * 128 + k % 4 * 32) >> 4);
      if constexpr (Tile::kParts == 2) wgmma<T, kBlockKv>::ss(k % 2 ? s_rest : s, q_step, k_step, k > 1);
      else if constexpr (Tile::kQHeld) wgmma<T, kBlockKv>::template rs<0>(s, q[k], k_step, k > 0);
      else wgmma<T, kBlockKv>::ss(s, q_step, k_step, k > 0);
    }
    wgmma_commit();
  }
  /* After the wait for gemm_qk: s may be read. */
  __forceinline__ __device__ void take_s() {
    wgmma_pin(s);
    if constexpr (Tile::kParts == 2) {
      wgmma_pin(s_rest);
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) s[n][x] += s_rest[n][x];
    }
  }
  /* o = P V of the block at hand, or o += P V: issued, one group.   [64][kHeadDimV] f32 per warpgroup */
  __forceinline__ __device__ void gemm_pv(bool accumulate) {
    const uint64_t v_tile = wgmma_descriptor(v_address(at), kBlockKv * 128);
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockKv / 16; ++k) wgmma<V, Tile::kHeadDimV>::template rs<1>(o, p[k], v_tile + (k * 2048 >> 4), accumulate || k > 0);
    wgmma_commit();
  }
  /* Fragment k of the warp's Q from shared memory. */
  __forceinline__ __device__ void q_fragment(uint32_t (&f)[4], int k) const {
    ldmatrix_x4(f, q_address() + k / 4 * 64 * 128 + tile_row::offset(warp_row0() + lane() % 16, k % 4 * 2 + lane() / 16));
  }
  /* s once more, by the warp alone: mma.sync has the same accumulator. */
  __forceinline__ __device__ void gemm_qk_again(ring r) {
#pragma unroll
    for (int n = 0; n < kTilesS; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
    for (int k = 0; k < kDepthQk; ++k) {
      uint32_t fq[4];
      if constexpr (Tile::kQHeld) {
#pragma unroll
        for (int x = 0; x < 4; ++x) fq[x] = q[k][x];
      } else q_fragment(fq, k);
      const uint32_t k_tile = k_address(r) + k / 4 * kBlockKv * 128;
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
        uint32_t fk[4];
        ldmatrix_x4(fk, k_tile + tile_row::offset(8 * n + lane() % 8 + lane() / 16 * 8, k % 4 * 2 + lane() / 8 % 2));
        mma_m16n8k16<T>(s[n], fq, fk[0], fk[1]);
        mma_m16n8k16<T>(s[n + 1], fq, fk[2], fk[3]);
      }
    }
  }
  /* Rows of V from key `keys` of the block at hand on become zeros: 0 * NaN would be NaN.   callers  a warpgroup, before gemm_pv
   *   WHY: each group does it for itself. That another writes the same zeros at the same time does no harm. */
  __forceinline__ __device__ void zero_tail(int keys) {
    wait_v(at);
    for (int i = (int)threadIdx.x % 128; i < (kBlockKv - keys) * (Tile::kColumnsV / 8); i += 128) {
      const int row = keys + i / (Tile::kColumnsV / 8), chunk = i % (Tile::kColumnsV / 8);
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(v_address(at) + chunk / 8 * kBlockKv * 128 + row * 128 + chunk % 8 * 16), "r"(0)
                   : "memory");
    }
    fence_proxy_async();
    warpgroup_sync(wg);
  }

  /* ---- scores to probabilities ---- */

  /* What the exponential multiplies scores with: in kernels with a rule, which has scaled them, 1. A factor that is NaN is left to finish: here it
   * would give a key, NaN * -inf, to a row that sees none. */
  static __forceinline__ __device__ float scale_log2_of(const wgmma_schedule &plan, const wgmma_walk &w) {
    if constexpr (Tile::kScaled && !Rule::kActive) return isnan(w.scale) ? 1.f : w.scale;
    else return plan.scale_log2;
  }
  /* Row of the sequence of accumulator half h (rows g, g + 8). */
  static __forceinline__ __device__ int row_of(const wgmma_walk &w, int h) { return w.row + lane() / 4 + 8 * h; }

  /* The score rule on every element: raw products become logits in log2 units (scale_log2 is 1 from then on). Rows past the end count as the last,
   * keys too: they are masked later, but a rule may read memory. */
  __forceinline__ __device__ void apply_rule(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w, int j) {
    const wgmma_work &tile = w.tile;
    if (tile.len_kv == 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(row_of(w, h), tile.rows - 1);
      score_position at = {tile.batch, tile.head + plan.head_of(row), plan.query_of(row), 0, tile.len_q, tile.len_kv};
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          at.key = min(j * kBlockKv + n * 8 + 2 * (lane() % 4) + x, tile.len_kv - 1);
          s[n][2 * h + x] = softmax_log2_units(rule(a, s[n][2 * h + x] * (Tile::kScaled ? w.scale : a.scale), at));
        }
    }
  }
  /* Edge blocks only: -inf where a row does not see a key. */
  __forceinline__ __device__ void mask(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w, int j) {
    const wgmma_work &tile = w.tile;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const flashcore_range r = wgmma_keys_of(a, plan, tile, row_of(w, h));
      const int base = j * kBlockKv + 2 * (lane() % 4), begin = r.first - base, end = r.last - base;
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x)
          if (n * 8 + x < begin || n * 8 + x >= end) s[n][2 * h + x] = -INFINITY;
    }
  }
  /* The largest of a lane's scores in row g + 8 h. */
  __forceinline__ __device__ float lane_max(int h) const {
    float x0 = s[0][2 * h], x1 = s[0][2 * h + 1];
#pragma unroll
    for (int n = 1; n < kTilesS; ++n) x0 = fmaxf(x0, s[n][2 * h]), x1 = fmaxf(x1, s[n][2 * h + 1]);
    return fmaxf(x0, x1);
  }
  /* Where a term would be larger than 2^kLimit, move the reference of every row up to its maximum and the headroom; l follows, o by `factor`.
   *   returns  whether it moved
   *   callers  all 32 lanes, converged */
  __forceinline__ __device__ bool look(float scale_log2) {
    const float top[2] = {lane_max(0), lane_max(1)};
    const bool fits = fmaf(top[0], scale_log2, -m[0]) <= kLimit && fmaf(top[1], scale_log2, -m[1]) <= kLimit;
    if (__all_sync(0xffffffffu, fits)) return false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float higher = fmaxf(m[h], softmax_reference(quad_max(top[h]), scale_log2) + kHeadroom);
      factor[h] = ex2(m[h] - higher);
      m[h] = higher;
      l[h] *= factor[h];
    }
    return true;
  }
  /* s holds terms, of which some are larger than 2^kLimit. They are still f32: the reference moves up to the largest, and they with it.
   *   returns  false, with nothing changed, where a term has overflowed, or a reference is so large that its last bit weighs
   *   callers  all 32 lanes, converged */
  __forceinline__ __device__ bool follow(float (&sum)[2]) {
    const bool overflowed = !(sum[0] + sum[1] < 0x1p100f); /* factor must not vanish; so is NaN */
    if (__any_sync(0xffffffffu, overflowed) || has_unusual_reference()) return false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float higher = fmaxf(m[h], m[h] + softmax_log2(quad_max(lane_max(h))) + kHeadroom);
      factor[h] = ex2(m[h] - higher);
      m[h] = higher;
      l[h] *= factor[h];
      sum[h] *= factor[h];
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) s[n][2 * h] *= factor[h], s[n][2 * h + 1] *= factor[h];
    }
    return true;
  }
  /* Of some row: beyond kLargeReference, or none yet. */
  __forceinline__ __device__ bool has_unusual_reference() const {
    return __any_sync(0xffffffffu, fabsf(m[0]) > kLargeReference || fabsf(m[1]) > kLargeReference);
  }
  /* s becomes exp2(s c - m); sum: this lane's part of the rows' sums.
   *   kUnusual: a reference may be so large that its last bit weighs: that row's terms are capped, and l counts what O gets: one key gives its V */
  template <bool kUnusual> __forceinline__ __device__ void exponentiate(float (&sum)[2], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool large = kUnusual && fabsf(m[h]) > kLargeReference && m[h] > FLASHCORE_EMPTY_MAX;
      float part[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < kTilesS; ++n)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const float y = fmaf(s[n][2 * h + x], scale_log2, -m[h]), e = ex2(large && y > kLimit ? kLimit : y); /* NaN stays */
          s[n][2 * h + x] = e;
          part[x] += large ? element<V>::load(element<V>::store(e)) : e;
        }
      sum[h] = part[0] + part[1];
    }
  }
  /* Scores to probabilities with the reference as it is, whatever it is. */
  __forceinline__ __device__ void exponentiate_any(float (&sum)[2], float scale_log2) {
    if (!has_unusual_reference()) return exponentiate<false>(sum, scale_log2);
    exponentiate<true>(sum, scale_log2);
    /* Rows without a key so far have no reference that the next block could do without a look. */
    if (wary == 0 && !__all_sync(0xffffffffu, m[0] > FLASHCORE_EMPTY_MAX && m[1] > FLASHCORE_EMPTY_MAX)) wary = 1;
  }
  /* s of block j becomes probabilities, with a look at the maxima first; sum as above.   returns  whether the reference moved */
  __forceinline__ __device__ bool look_and_exponentiate(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w, int j,
                                                        bool edge, float (&sum)[2]) {
    if constexpr (Rule::kActive) apply_rule(a, plan, w, j);
    if (edge) mask(a, plan, w, j);
    const float scale_log2 = scale_log2_of(plan, w);
    const bool moved = look(scale_log2);
    turn(kTermTurns);
    exponentiate_any(sum, scale_log2);
    pass(kTermTurns);
    return moved;
  }
  /* s of a tile's first block, just computed, to probabilities; the start of m and l. */
  __forceinline__ __device__ void first_block(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w, int blocks, bool edge) {
    if constexpr (Rule::kActive) apply_rule(a, plan, w, w.begin + blocks - 1);
    if (edge) mask(a, plan, w, w.begin + blocks - 1);
    const float top[2] = {quad_max(lane_max(0)), quad_max(lane_max(1))}, scale_log2 = scale_log2_of(plan, w);
#pragma unroll
    for (int h = 0; h < 2; ++h) m[h] = fmaxf(softmax_reference(top[h], scale_log2) + kHeadroom, FLASHCORE_EMPTY_MAX);
    turn(kTermTurns);
    exponentiate_any(l, scale_log2);
    pass(kTermTurns);
  }
  /* p from s. WHY: the pin keeps the roundings behind the wait before it: ahead of it they need registers beside those that P V still reads. */
  __forceinline__ __device__ void pack_p() {
    wgmma_pin(s);
#pragma unroll
    for (int k = 0; k < kBlockKv / 16; ++k)
#pragma unroll
      for (int x = 0; x < 4; ++x) p[k][x] = pack2<V>(s[2 * k + x / 2][x % 2 * 2], s[2 * k + x / 2][x % 2 * 2 + 1]);
  }

  /* ---- the loop ---- */

  /* The last product of a tile, while the first scores of the next are computed: both in flight together, or one after the other.
   *   ending, starting   whether there is a tile to end, and one to start. WHY: the products are issued in any case, of stale data where there is
   *                      none: a branch around them would make ptxas serialise every wgmma of the kernel */
  __forceinline__ __device__ void change_tiles(const flashcore_attention &a, const wgmma_schedule &plan, bool ending, const wgmma_walk &last,
                                               bool accumulate, bool starting, const wgmma_walk &next, int blocks, int skip, bool edge) {
    /* WHY: a prologue takes as long as a block; the tensor cores have the last product to do meanwhile. */
    constexpr bool kPvFirst = Tile::kOverlapsTiles && Prologue::kActive;
    ring first = at;
    if (starting) skip_turns(skip);
    if (kPvFirst) {
      if (ending) wait_v(at);
      gemm_pv(accumulate);
    }
    if (Tile::kOverlapsTiles) {
      if (starting) first = start_tile(a, next.tile, skip);
      gemm_qk(first);
      /* WHY not sooner: the product waits until the fragments have come. An arrival does not, and TMA would overtake a late ldmatrix. */
      if (Tile::kQHeld && starting) release_q();
    }
    if (!kPvFirst) {
      if (ending) wait_v(at);
      gemm_pv(accumulate);
    }
    if (ending) finish(a, plan, last, Tile::kScaled ? last.scale : 1.f, Tile::kScaled ? last.v_scale : 1.f);
    if (Tile::kOverlapsTiles) {
      wgmma_wait<kPvFirst ? 0 : 1>();
      take_s();
      if (starting) first_block(a, plan, next, blocks, edge);
    }
    wgmma_wait<0>();
    wgmma_pin(o);
    if (ending) {
      release_v(at);
      store(a, plan, last);
    }
    if (!Tile::kOverlapsTiles) {
      if (starting) first = start_tile(a, next.tile, skip);
      gemm_qk(first);
      wgmma_wait<0>();
      take_s();
      if (starting) first_block(a, plan, next, blocks, edge);
    }
    if (starting) {
      release_k(first);
      skip_v(skip);
    }
    at = first;
  }

  /* P V is complete. */
  __forceinline__ __device__ void finish_products() {
    wgmma_wait<0>();
    wgmma_pin(o);
    release_v(at);
  }

  /* All tiles of the block.   callers  all warps of the consumer warpgroups */
  __forceinline__ __device__ void consume(const flashcore_attention &a, const wgmma_schedule &plan) {
    bool accumulate = false;
    start_turns();
    for (int tile = 0;; ++tile) {
      const wgmma_walk &w = block.walks[tile % 2][threadIdx.x / 32 - 4], &before = block.walks[(tile + 1) % 2][threadIdx.x / 32 - 4];
      mbarrier_wait(barriers().work_full(tile), tile / 2 & 1);
      const int blocks = warp_uniform(w.blocks), skip = warp_uniform(w.skip), first_edges = warp_uniform(w.first_edges);
      const int last_edges = warp_uniform(w.last_edges), keys = warp_uniform(w.keys);
      change_tiles(a, plan, tile > 0, before, accumulate, blocks > 0, w, blocks, skip, first_edges > 0 || blocks <= last_edges);
      if (blocks == 0) return;
      __syncwarp();
      if (tile > 0 && lane() == 0) mbarrier_arrive(barriers().work_free(tile + 1));
      if (keys < kBlockKv) zero_tail(keys);
      pack_p();
      const float scale_log2 = scale_log2_of(plan, w);

      wary = max(wary, first_edges - 1); /* a block that some row does not see in full needs a look */
      accumulate = false;
      for (int left = blocks - 1; left > 0; --left) { /* blocks: the next is begin + left - 1 */
        const ring next = at.next();
        wait_k(next);
        gemm_qk(next);
        wait_v(at);
        gemm_pv(accumulate);
        accumulate = true;
        wgmma_wait<1>();
        take_s();
        float sum[2];
        bool moved = false;
        const bool blind = kTrustsSums && wary == 0 && left > last_edges;
        const bool edge = left <= last_edges || blocks - left < first_edges;
        if (blind) exponentiate<false>(sum, scale_log2);
        if (!kTrustsSums) {
          release_k(next);
          moved = look_and_exponentiate(a, plan, w, w.begin + left - 1, edge, sum);
        }
        finish_products();
        if (kTrustsSums) {
          if (!blind || !__all_sync(0xffffffffu, sum[0] < kSumLimit && sum[1] < kSumLimit)) { /* NaN counts as large */
            moved = blind && follow(sum);
            if (!moved) {
              if (blind) gemm_qk_again(next);
              wary = blind ? kWaryBlocks : max(wary - 1, 0);
              moved = look_and_exponentiate(a, plan, w, w.begin + left - 1, edge, sum);
            }
          }
          __syncwarp();
          release_k(next);
        }
        if (moved) rescale();
        l[0] += sum[0];
        l[1] += sum[1];
        pack_p();
        at = next;
      }
      if (!Tile::kQHeld) release_q();
    }
  }
  __forceinline__ __device__ void rescale() {
#pragma unroll
    for (int n = 0; n < kTilesO; ++n) {
      o[n][0] *= factor[0], o[n][1] *= factor[0];
      o[n][2] *= factor[1], o[n][3] *= factor[1];
    }
  }

  /* ---- the end of a tile ---- */

  /* Row sums over the quad, sink, LSE; `inverse`, times V's descale. Rows that see a key become NaN where scale, the one of scores, is; others have an
   * `inverse` of 0, whatever the scales. */
  __forceinline__ __device__ void finish(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w, float scale, float v_scale) {
    float lse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sink = a.sink ? a.sink[w.tile.head + plan.head_of(row_of(w, h))] : 0.f, total = quad_sum(l[h]);
      const bool empty = total == 0.f;
      const softmax_state state = {empty ? FLASHCORE_EMPTY_MAX : m[h], !empty && isnan(scale) ? scale : total};
      inverse[h] = softmax_finish(state, a.sink != nullptr, sink, a.lse_base2 != 0, lse[h]) * (empty ? 0.f : v_scale);
    }
    const int row = lane() / 4;
    float *const dst = a.lse + w.lse + plan.query_of(row) + (int64_t)plan.head_of(row) * a.seq_q;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (a.lse && lane() % 4 == 0 && row_of(w, h) < w.tile.rows) dst[h * plan.lse_step] = lse[h];
  }
  static __forceinline__ __device__ uint32_t pack_o(const flashcore_attention &a, float lo, float hi) {
    if (!Tile::kScaled) return pack2<T>(lo, hi);
    return a.dtype_o == FLASHCORE_F16 ? pack2<__half>(lo, hi) : pack2<__nv_bfloat16>(lo, hi);
  }
  /* O of live rows and dims. The lanes of a quad trade words, so that each has 8 dims in a row: of four column tiles, lane t gets tile t. */
  __forceinline__ __device__ void store(const flashcore_attention &a, const wgmma_schedule &plan, const wgmma_walk &w) {
    const int column = lane() % 4 * 8, row = lane() / 4, rows = w.tile.rows - w.row - row; /* to come, this lane's first included */
    const int64_t first = w.o + plan.query_of(row) * a.o.stride_s + plan.head_of(row) * a.o.stride_h + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t offset = first + h * plan.o_step;
      if constexpr (Epilogue::kActive) {
        float x[kTilesO / 4][8];
#pragma unroll
        for (int i = 0; i < kTilesO / 4; ++i) quad_gather(x[i], 4 * i, h);
        if (8 * h < rows)
          epilogue(a, x, wgmma_output{w.tile.batch, w.tile.head + plan.head_of(row_of(w, h)), plan.query_of(row_of(w, h)), column, offset});
      } else {
        T *const dst = static_cast<T *>(a.o.data) + offset;
        const int dims = 8 * h < rows ? a.dim_v - column : 0;
#pragma unroll
        for (int n = 0; n < kTilesO; n += 4) {
          uint32_t x[4];
#pragma unroll
          for (int t = 0; t < 4; ++t) x[t] = pack_o(a, o[n + t][2 * h] * inverse[h], o[n + t][2 * h + 1] * inverse[h]);
          quad_transpose(x);
          if (n * 8 >= dims) continue;
          const uint4 chunk = make_uint4(x[0], x[1], x[2], x[3]);
          /* WHY __stcs: a plain store of 16 bytes was compiled to four of 4, and O is not read again soon. */
          if (Rule::kActive && plan.copy && plan.copy < 16) store_chunk(reinterpret_cast<char *>(dst + n * 8), chunk, dims - n * 8);
          else __stcs(reinterpret_cast<uint4 *>(dst + n * 8), chunk);
        }
      }
    }
  }
  /* x: the result's 8 dims of column tile n + t, in lane t of a quad. */
  __forceinline__ __device__ void quad_gather(float (&x)[8], int n, int h) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) words[t] = __float_as_uint(o[n + t][2 * h + i] * inverse[h]);
      quad_transpose(words);
#pragma unroll
      for (int t = 0; t < 4; ++t) x[2 * t + i] = __uint_as_float(words[t]);
    }
  }
};

#endif /* FLASHCORE_HAS_SM90A */

/* ================================================================================================================================
 * 7  Kernel
 * ================================================================================================================================ */

/* O = epilogue(softmax(rule(prologue(Q) K^T)) V).
 *   callers  a one-dimensional grid of as many blocks as the plan was made for, at most one per SM; Tile::kThreads threads, Tile::kSharedBytes of
 *            dynamic shared memory. wgmma_launch does it */
template <typename Tile, typename Rule, typename Prologue = no_prologue, typename Epilogue = no_epilogue>
FLASHCORE_KERNEL void __launch_bounds__(Tile::kThreads, 1)
    wgmma_kernel(const __grid_constant__ flashcore_attention a, const __grid_constant__ wgmma_schedule plan, const __grid_constant__ wgmma_maps maps,
                 const Rule rule, const Prologue prologue, const Epilogue epilogue) {
#if FLASHCORE_HAS_SM90A
  extern __shared__ __align__(128) unsigned char flashcore_shared[];
  const uint32_t shared = (shared_address(flashcore_shared) + 1023) & ~1023u;
  __shared__ wgmma_shared<Tile> block;
  if (threadIdx.x == 0) wgmma_barriers<Tile>{shared + Tile::kOffsetBarriers}.init();
  __syncthreads();
  const int warp_index = warp_uniform((int)threadIdx.x / 32); /* WHY: a branch that the compiler sees to be uniform leaves uniform registers usable */
  if (warp_index < 4) {
    setmaxnreg_dec<Tile::kProducerRegisters>();
    if (warp_index == 0 || (Rule::kActive && plan.copy && warp_index != 1)) wgmma_produce<Tile, Rule::kActive>(a, plan, maps, shared, warp_index);
    else if (warp_index == 1) wgmma_plan_tiles<Tile>(a, plan, block, shared);
  } else {
    setmaxnreg_inc<Tile::kConsumerRegisters>();
    wgmma_warp<Tile, Rule, Prologue, Epilogue> warp(block, shared, rule, prologue, epilogue);
    warp.consume(a, plan);
  }
#else
  __trap();
#endif
}

/* ================================================================================================================================
 * 8  Tensor maps, and the launch of a kernel of your own
 * ================================================================================================================================ */
#if !defined(__CUDACC_RTC__)

/* A tensor as TMA sees it: (dim, row, unit, batch), and behind dim the head of those packed, where there are more than one. */
struct wgmma_view {
  const char *field; /* of the descriptor */
  flashcore_tensor tensor;
  int64_t dim, pack, rows, units, batch;
};
struct wgmma_views {
  wgmma_view q, k, v;
};
static inline wgmma_views wgmma_views_of(const flashcore_attention &a, int pack) {
  const flashcore_extents e = flashcore_extents_of(&a);
  return {{"q", a.q, a.dim_qk, pack, e.rows_q, a.heads_q / pack, e.batch_q},
          {"k", a.k, a.dim_qk, 1, e.rows_kv, a.heads_kv, e.batch_kv},
          {"v", a.v, a.dim_v, 1, e.rows_kv, a.heads_kv, e.batch_kv}};
}

/* How a problem (resolved) is loaded: 0, by TMA, which wants 16-byte steps that are not negative and less than 2^40 bytes, and a row to read; else
 * the bytes that lanes copy at a time (see wgmma_schedule). */
static inline int32_t wgmma_copy_of(const flashcore_attention &a) {
  const int32_t align = flashcore_row_align(&a);
  const wgmma_views views = wgmma_views_of(a, 1);
  const wgmma_view *inputs[3] = {&views.q, &views.k, &views.v};
  bool by_tma = align == 16;
  for (const wgmma_view *x : inputs) {
    const int64_t steps[3] = {x->tensor.stride_b, x->tensor.stride_s, x->tensor.stride_h};
    for (const int64_t step : steps) by_tma &= step >= 0 && step < (int64_t)1 << 39;
    by_tma &= x->rows > 0;
  }
  return by_tma ? 0 : align;
}

static inline void *wgmma_find_encoder() {
  cudaDriverEntryPointQueryResult result;
  void *function = nullptr;
#if CUDART_VERSION >= 12050
  const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  return code == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
}
/* cuTensorMapEncodeTiled from the driver that is loaded; NULL where it has none. Looked for once. */
static inline decltype(&cuTensorMapEncodeTiled) wgmma_encoder() {
  static void *const found = wgmma_find_encoder();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

/* The map of a tensor, for boxes of 64 columns and `rows` rows. */
static inline CUresult wgmma_encode(const wgmma_view &x, int32_t dtype, int rows, tensor_map &map) {
  static_assert(sizeof(tensor_map) == sizeof(CUtensorMap), "the driver's type");
  const auto encode = wgmma_encoder();
  if (!encode) return CUDA_ERROR_NOT_FOUND;
  cuuint64_t sizes[5] = {(cuuint64_t)x.dim}, strides[4];
  cuuint32_t box[5] = {64}, rank = 1;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto add = [&](int64_t extent, int64_t stride, int64_t taken) {
    sizes[rank] = (cuuint64_t)extent;
    strides[rank - 1] = (cuuint64_t)(extent > 1 ? 2 * stride : 16);
    box[rank++] = (cuuint32_t)taken;
  };
  if (x.pack > 1) add(x.pack, x.tensor.stride_h, x.pack);
  add(x.rows, x.tensor.stride_s, rows / x.pack);
  add(x.units, x.pack * x.tensor.stride_h, 1);
  add(x.batch, x.tensor.stride_b, 1);
  return encode(reinterpret_cast<CUtensorMap *>(&map), dtype == FLASHCORE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                rank, x.tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

/* The maps of a problem (resolved) for tiles of block_kv keys and so many packed heads.
 *   errors   CUDA_ERROR_NOT_FOUND: the driver does not encode maps; else what its cuTensorMapEncodeTiled says */
static inline CUresult make_wgmma_maps(const flashcore_attention &a, int block_kv, int pack, wgmma_maps &maps) {
  const wgmma_views views = wgmma_views_of(a, pack);
  CUresult code = wgmma_encode(views.q, a.dtype, 64, maps.q);
  if (code == CUDA_SUCCESS) code = wgmma_encode(views.k, a.dtype, block_kv, maps.k);
  if (code == CUDA_SUCCESS) code = wgmma_encode(views.v, a.dtype, block_kv, maps.v);
  return code;
}

/* Query heads to pack into the rows of a tile: as many as save an eighth of the tiles, and no more. A power of two that divides the group. */
static inline int wgmma_pack_of(const flashcore_attention &a, int64_t block_q) {
  const int64_t group = a.heads_q / a.heads_kv;
  int best = 1;
  const auto tiles = [&](int64_t pack) { return (a.seq_q * pack + block_q - 1) / block_q * (group / pack); };
  if (a.q.stride_h >= (int64_t)1 << 33) return 1; /* times 64, TMA would not know it */
  for (int64_t pack = 2; pack <= 64 && group % pack == 0 && a.seq_q * pack <= FLASHCORE_MAX_SEQ; pack *= 2)
    if (8 * tiles(pack) < 7 * tiles(best)) best = (int)pack;
  return best;
}

/* Does this file hold the kernel's body for the current device? Compiled for plain sm_90 it does not, which the list of archs does not tell; but then
 * it has no shared memory of its own. */
static inline cudaError_t wgmma_find_body(const void *kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  return error == cudaSuccess && attributes.sharedSizeBytes == 0 ? cudaErrorNoKernelImageForDevice : error;
}
/* Known to have none? A device that is not current is not asked: the launch will say. */
static inline bool wgmma_lacks_body(const void *kernel, int ordinal) {
  int current;
  return cudaGetDevice(&current) == cudaSuccess && current == ordinal && wgmma_find_body(kernel) == cudaErrorNoKernelImageForDevice;
}

/* Launch a kernel of your own: wgmma_kernel with your rule, prologue and epilogue. Asynchronous, on the current device.
 *   problem  a descriptor; a rule of your own sees its options, nothing else does (softcap, bias and the like are descriptor_rule's)
 *   errors   cudaErrorInvalidValue: another element type or larger dims than the tile's, a page table, key splits, too many tiles, the driver is too
 *            old, or without a rule, what TMA cannot read or 16-byte stores cannot write (wgmma_copy_of: odd addresses, negative strides, no keys);
 *            cudaErrorNoKernelImageForDevice: not compiled for sm_90a; else what CUDA says */
template <typename Tile, typename Rule = no_rule, typename Prologue = no_prologue, typename Epilogue = no_epilogue>
static inline cudaError_t wgmma_launch(const flashcore_attention &problem, cudaStream_t stream, const Rule &rule = {}, const Prologue &prologue = {},
                                       const Epilogue &epilogue = {}) {
  const void *const kernel = reinterpret_cast<const void *>(&wgmma_kernel<Tile, Rule, Prologue, Epilogue>);
  flashcore_attention a, stored;
  flashcore_resolve(&problem, &a);
  stored = a;
  if (Epilogue::kActive) stored.o = a.q; /* where O goes is the epilogue's business */
  const int32_t dtype = element<typename Tile::T>::kDtype, copy = wgmma_copy_of(stored);
  const int64_t tiles = (int64_t)((a.seq_q + Tile::kBlockQ - 1) / Tile::kBlockQ) * a.heads_q * a.batch;
  if (a.dtype != dtype || a.dtype_kv != dtype || (!Epilogue::kActive && a.dtype_o != dtype) || a.dim_qk > Tile::kHeadDimQk ||
      a.dim_v > Tile::kHeadDimV || a.page_table || a.num_splits > 1 || a.split_len > 0 || tiles < 1 || tiles > INT32_MAX / 2 ||
      (copy && !Rule::kActive))
    return cudaErrorInvalidValue;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = wgmma_find_body(kernel);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = tiles < sms ? tiles : sms;
  wgmma_schedule plan = make_wgmma_schedule(a, Tile::kBlockQ, 1, Rule::kActive, blocks);
  wgmma_maps maps = {};
  plan.copy = copy;
  if (!copy && make_wgmma_maps(a, Tile::kBlockKv, 1, maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  Rule own_rule = rule;
  Prologue own_prologue = prologue;
  Epilogue own_epilogue = epilogue;
  void *args[6] = {&a, &plan, &maps, &own_rule, &own_prologue, &own_epilogue};
  return cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3(Tile::kThreads), args, Tile::kSharedBytes, stream);
}
#endif

} // namespace v0_1_0
} // namespace flashcore

/* ================================================================================================================================
 * 9  Plan and launch
 * ================================================================================================================================ */
#if !defined(__CUDACC_RTC__) && (defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION))

enum { FLASHCORE_WGMMA_COPY, FLASHCORE_WGMMA_GENERAL }; /* of flashcore_plan.param */

static flashcore_status flashcore_wgmma_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  flashcore_status status = flashcore_check_tensor_core(a, device, "wgmma", 90, error);
  if (status != FLASHCORE_OK) return status;
  if (device->arch != 90)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_ARCH, "device", device->arch, 90,
                            "the wgmma kernel runs on sm_90 alone, the device is sm_%d", (int)device->arch);
  const int32_t dims[2] = {a->dim_qk, a->dim_v};
  for (int i = 0; i < 2; ++i)
    if (dims[i] > 256)
      return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DIM, i ? "dim_v" : "dim_qk", dims[i], 256, "%s: the wgmma kernel serves up to 256, not %d",
                              i ? "dim_v" : "dim_qk", (int)dims[i]);
  return FLASHCORE_OK;
}

/* The instance a problem gets. */
template <typename Tile, bool kGeneral = false> static void flashcore_wgmma_use(flashcore_plan *plan) {
  if constexpr (kGeneral) plan->kernel = reinterpret_cast<const void *>(&flashcore::wgmma_kernel<Tile, flashcore::descriptor_rule>);
  else plan->kernel = reinterpret_cast<const void *>(&flashcore::wgmma_kernel<Tile, flashcore::no_rule>);
  plan->d.block_q = Tile::kBlockQ;
  plan->d.block_kv = Tile::kBlockKv;
  plan->d.stages = Tile::kStages;
  plan->d.head_dim_qk = Tile::kHeadDimQk;
  plan->d.head_dim_v = Tile::kHeadDimV;
  plan->d.threads = Tile::kThreads;
  plan->d.shared_bytes = Tile::kSharedBytes;
}
/* The tile for head dims (kQk, kV) among those in the table, as measured on the H200. A narrow tile takes 1.13 times as long for the same rows: it pays
 * where its rounds of one tile per SM have less to spare. A long one pays from 2048 keys on, where causal grids are several rounds, and at dim 96. */
template <typename T, int kQk, int kV>
static void flashcore_wgmma_pick(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  using namespace flashcore;
  using wide = wgmma_tile_for<T, kQk, kV, kWideTile>;
  using narrow = wgmma_tile_for<T, kQk, kV, kNarrowTile>;
  using longer = wgmma_tile_for<T, kQk, kV, kLongTile>;
  using exact = wgmma_tile_for<T, kQk, kV, kExactTile>;
  const int64_t units = (int64_t)a->heads_q * a->batch, sms = device->sm_count;
  const auto tiles = [&](int64_t rows) { return (a->seq_q + rows - 1) / rows * units; };
  const auto rows_per_sm = [&](int64_t rows) { return (tiles(rows) + sms - 1) / sms * rows; };
  if (general) return flashcore_wgmma_use<wgmma_tile_for<T, kQk, kV, kGeneralTile>, true>(plan);
  if constexpr (wgmma_has_tile<narrow>::value)
    if (!a->causal && 100 * rows_per_sm(wide::kBlockQ) > 113 * rows_per_sm(narrow::kBlockQ)) return flashcore_wgmma_use<narrow>(plan);
  if constexpr (wgmma_has_tile<longer>::value)
    if (a->seq_kv >= 2048 && (kQk <= 96 || (a->causal && tiles(longer::kBlockQ) >= 6 * sms))) return flashcore_wgmma_use<longer>(plan);
  if constexpr (wgmma_has_tile<exact>::value)
    if (a->lse) return flashcore_wgmma_use<exact>(plan);
  flashcore_wgmma_use<wide>(plan);
}
/* The smallest instance that holds both dims, at most 256. */
template <typename T>
static void flashcore_wgmma_select(const flashcore_attention *a, const flashcore_device *device, bool general, flashcore_plan *plan) {
  const int qk = a->dim_qk, v = a->dim_v, dim = qk > v ? qk : v;
  if (dim <= 64) flashcore_wgmma_pick<T, 64, 64>(a, device, general, plan);
  else if (dim <= 96) flashcore_wgmma_pick<T, 96, 96>(a, device, general, plan);
  else if (dim <= 128) flashcore_wgmma_pick<T, 128, 128>(a, device, general, plan);
  else if (qk <= 192 && v <= 128) flashcore_wgmma_pick<T, 192, 128>(a, device, general, plan);
  else if (dim <= 192) flashcore_wgmma_pick<T, 192, 192>(a, device, general, plan);
  else flashcore_wgmma_pick<T, 256, 256>(a, device, general, plan);
}

static flashcore_status flashcore_wgmma_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                             flashcore_error *error) {
  const flashcore_status status = flashcore_wgmma_check(a, device, error);
  if (status != FLASHCORE_OK) return status;
  const int32_t copy = flashcore::wgmma_copy_of(*a);
  const bool general = copy || flashcore_has_rule(a);
#if !defined(FLASHCORE_NO_F16)
  if (a->dtype == FLASHCORE_F16) flashcore_wgmma_select<__half>(a, device, general, plan);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (a->dtype == FLASHCORE_BF16) flashcore_wgmma_select<__nv_bfloat16>(a, device, general, plan);
#endif
  if (!plan->kernel)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0, "dtype: the wgmma kernel was compiled without type %d",
                            (int)a->dtype);
  if (flashcore::wgmma_lacks_body(plan->kernel, device->ordinal))
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "device", device->arch, 90,
                            "the wgmma kernel was compiled for sm_90: it needs sm_90a (-gencode arch=compute_90a,code=sm_90a)");
  flashcore_description *d = &plan->d;
  d->packed_group = copy ? 1 : flashcore::wgmma_pack_of(*a, d->block_q);
  const int64_t units = (int64_t)a->heads_q / d->packed_group * a->batch, rows = (int64_t)a->seq_q * d->packed_group;
  const int64_t tiles = (rows + d->block_q - 1) / d->block_q, most = INT32_MAX / 2 / tiles;
  if (units > most)
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "batch", units, most,
                            "batch * heads_q / %d is %lld: the wgmma kernel takes %lld of %lld tiles", (int)d->packed_group, (long long)units,
                            (long long)most, (long long)tiles);
  d->backend = FLASHCORE_BACKEND_WGMMA;
  d->splits = 1;
  plan->param[FLASHCORE_WGMMA_COPY] = copy;
  plan->param[FLASHCORE_WGMMA_GENERAL] = general;
  /* Measured on the H200 beside the mma kernel: few keys, or not many for tiles with few rows or for few of the SMs; or copies of small pieces or short
   * rows, which three warps do not make as fast. */
  plan->is_slow = (copy && (copy < 8 || d->head_dim_v <= 64)) || a->seq_kv < 256 ||
                  (a->seq_kv < 2048 && (2 * rows < d->block_q || 4 * units * rows < 3 * (int64_t)device->sm_count * d->block_q));
  d->grid = tiles * units < device->sm_count ? tiles * units : device->sm_count;
  snprintf(d->kernel, sizeof d->kernel, "wgmma %s d%d,%d q%d kv%d%s", a->dtype == FLASHCORE_F16 ? "f16" : "bf16", (int)d->head_dim_qk,
           (int)d->head_dim_v, (int)d->block_q, (int)d->block_kv,
           copy      ? " general, copied"
           : general ? " general"
                     : "");
  return FLASHCORE_OK;
}

static flashcore_status flashcore_wgmma_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                               flashcore_error *error) {
  flashcore_attention args = *a;
  flashcore::wgmma_schedule schedule =
      flashcore::make_wgmma_schedule(*a, plan->d.block_q, plan->d.packed_group, plan->param[FLASHCORE_WGMMA_GENERAL] != 0, plan->d.grid);
  flashcore::wgmma_maps maps = {};
  CUresult code = CUDA_SUCCESS;
  schedule.copy = plan->param[FLASHCORE_WGMMA_COPY];
  if (!schedule.copy) code = flashcore::make_wgmma_maps(*a, plan->d.block_kv, plan->d.packed_group, maps);
  if (code != CUDA_SUCCESS)
    return flashcore_refuse(error, FLASHCORE_CUDA_ERROR, "cuTensorMapEncodeTiled", code, CUDA_SUCCESS, "cuTensorMapEncodeTiled: error %d", (int)code);
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  flashcore::no_prologue prologue;
  flashcore::no_epilogue epilogue;
  void *kernel_args[6] = {&args, &schedule, &maps, &rule, &prologue, &epilogue};
  return flashcore_launch(plan, kernel_args, stream, error);
}

static flashcore_backend_ops flashcore_wgmma_ops = {FLASHCORE_BACKEND_WGMMA, flashcore_wgmma_plan, flashcore_wgmma_launch, nullptr};
static struct flashcore_wgmma_registration {
  __forceinline__ flashcore_wgmma_registration() { flashcore_register_backend(&flashcore_wgmma_ops); }
} flashcore_wgmma_registered;

#endif /* implementation */

#endif /* __CUDACC__ */

/* MIT licence: see LICENSE. Copyright (c) 2026 FlashCore authors. */
#endif /* FLASHCORE_WGMMA_CUH */
