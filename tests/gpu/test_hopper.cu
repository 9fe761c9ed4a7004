/* The primitives of flashcore_wgmma.cuh, asked of the hardware, each alone, in one warp, warpgroup or cluster: that picture, code and instruction agree
 * on where every element lies. */
#include "flashcore_wgmma.cuh"
#include "report.h"

#include <algorithm>
#include <random>
#include <string.h>
#include <vector>

namespace fc = flashcore;

constexpr uint16_t kJunk = 0xeeee; /* what memory holds before it is written */

/* ---- on the host: memory, tensor maps, launches -------------------------------------------------------------------------------- */

template <typename T> struct DeviceArray {
  T *data = nullptr;
  size_t count;
  explicit DeviceArray(size_t count_) : count(count_) {
    CUDA_OK(cudaMalloc(&data, count * sizeof(T)));
    CUDA_OK(cudaMemset(data, kJunk & 0xff, count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T> &values) : DeviceArray(values.size()) {
    CUDA_OK(cudaMemcpy(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray &) = delete;
  DeviceArray &operator=(const DeviceArray &) = delete;
  ~DeviceArray() { cudaFree(data); }

  /* After all that was launched. */
  std::vector<T> host() const {
    std::vector<T> values(count);
    CUDA_OK(cudaGetLastError());
    CUDA_OK(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
};

/* The map of a tensor of 16-bit elements. strides: in bytes, from the second dim on; swizzle: in bytes, or 0. */
static fc::tensor_map encode(void *data, const std::vector<cuuint64_t> &sizes, const std::vector<cuuint64_t> &strides,
                             const std::vector<cuuint32_t> &box, int swizzle) {
  const auto encoder = fc::wgmma_encoder();
  if (!encoder) fatal("encode", "the driver does not encode tensor maps");
  const CUtensorMapSwizzle mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  fc::tensor_map map;
  const CUresult code =
      encoder(reinterpret_cast<CUtensorMap *>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, (cuuint32_t)sizes.size(), data, sizes.data(), strides.data(),
              box.data(), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) fatal("encode", format("a map of %zu dims is refused: %d", sizes.size(), (int)code));
  return map;
}

template <typename... Parameters, typename... Arguments>
static void launch(void (*kernel)(Parameters...), int blocks, int threads, const cudaLaunchAttribute &attribute, Arguments... arguments) {
  cudaLaunchAttribute copy = attribute;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3((unsigned)threads);
  config.attrs = &copy;
  config.numAttrs = 1;
  CUDA_OK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

/* ---- TMA: boxes of 2 to 5 dims ------------------------------------------------------------------------------------------------- */

struct Coordinates {
  int x[5];
};

/* A tensor of up to 5 dims with gaps between its rows, planes and so on, and guards around it; boxes that do not divide it. */
constexpr int kSizes[5] = {20, 5, 4, 3, 3}, kStrides[5] = {1, 24, 24 * 6, 24 * 6 * 5, 24 * 6 * 5 * 4}, kBox[5] = {8, 3, 2, 2, 2};
constexpr int kBoxElements[6] = {0, 8, 24, 48, 96, 192}; /* by rank */
constexpr int kGuard = 128, kTensorElements = 24 * 6 * 5 * 4 * 3, kBoxRoom = 256;

/* Where boxes begin: inside, across the ends, across the starts, here and there, and outside. */
static const std::vector<Coordinates> kPlaces = {{{0, 0, 0, 0, 0}}, {{16, 3, 3, 2, 2}},  {{-8, -1, -1, -1, -1}},
                                                 {{8, 1, 2, 1, 1}}, {{16, 4, -1, 2, 0}}, {{24, 0, 0, 0, 0}}};

static fc::tensor_map encode_boxes(uint16_t *allocation, int rank) {
  std::vector<cuuint64_t> strides;
  for (int d = 1; d < rank; ++d) strides.push_back((cuuint64_t)kStrides[d] * 2);
  return encode(allocation + kGuard, {kSizes, kSizes + rank}, strides, {kBox, kBox + rank}, 0);
}

/* Where element i of a box lies in the allocation; -1: outside the tensor, whose rows have so many elements. */
static int place_of(const Coordinates &at, int rank, int i, int columns = kSizes[0]) {
  int place = kGuard;
  for (int d = 0; d < rank; i /= kBox[d], ++d) {
    const int x = at.x[d] + i % kBox[d];
    if (x < 0 || x >= (d == 0 ? columns : kSizes[d])) return -1;
    place += x * kStrides[d];
  }
  return place;
}

static std::vector<uint16_t> numbered(size_t count) {
  std::vector<uint16_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = (uint16_t)(i + 1);
  return values;
}

template <int kRank, typename Use> static __device__ void with_coordinates(const Coordinates &at, const Use &use) {
  if constexpr (kRank == 2) use(at.x[0], at.x[1]);
  if constexpr (kRank == 3) use(at.x[0], at.x[1], at.x[2]);
  if constexpr (kRank == 4) use(at.x[0], at.x[1], at.x[2], at.x[3]);
  if constexpr (kRank == 5) use(at.x[0], at.x[1], at.x[2], at.x[3], at.x[4]);
}

/* One box after another, prefetched and loaded into junk, and out again. */
template <int kRank, bool kHint>
static __global__ void load_kernel(const __grid_constant__ fc::tensor_map map, const Coordinates *places, int count, uint16_t *out) {
#if FLASHCORE_HAS_SM90A
  constexpr int kBoxBytes = kBoxElements[kRank] * 2;
  __shared__ __align__(128) uint16_t box[kBoxRoom];
  __shared__ uint64_t full;
  const uint32_t dst = fc::shared_address(box), barrier = fc::shared_address(&full);
  if (threadIdx.x == 0) {
    fc::prefetch_tensormap(map);
    fc::mbarrier_init(barrier, 1);
    fc::fence_mbarrier_init();
  }
  for (int i = 0; i < count; ++i) {
    for (int j = threadIdx.x; j < kBoxRoom; j += 32) box[j] = kJunk;
    fc::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0) {
      fc::mbarrier_arrive_expect_tx(barrier, kBoxBytes);
      with_coordinates<kRank>(places[i], [&](auto... x) {
        if constexpr (kHint) {
          fc::tma_prefetch(map, x..., fc::l2_evict_first());
          fc::tma_load(dst, map, barrier, x..., fc::l2_evict_last());
        } else {
          fc::tma_prefetch(map, x...);
          fc::tma_load(dst, map, barrier, x...);
        }
      });
    }
    __syncwarp();
    fc::mbarrier_wait(barrier, i % 2);
    for (int j = threadIdx.x; j < kBoxRoom; j += 32) out[i * kBoxRoom + j] = box[j];
    __syncwarp();
  }
#endif
}

/* "" or what differs: a box in shared memory, and the junk behind it. */
static std::string compare_box(const uint16_t *box, const std::vector<uint16_t> &allocation, const Coordinates &at, int rank) {
  for (int j = 0; j < kBoxRoom; ++j) {
    const int place = j < kBoxElements[rank] ? place_of(at, rank, j) : -1;
    const uint16_t expected = j >= kBoxElements[rank] ? kJunk : place < 0 ? 0 : allocation[(size_t)place];
    if (box[j] != expected)
      return format("box at (%d, %d, %d, %d, %d): element %d is %d, not %d", at.x[0], at.x[1], at.x[2], at.x[3], at.x[4], j, box[j], expected);
  }
  return "";
}

template <int kRank, bool kHint> static void test_load() {
  const std::vector<uint16_t> allocation = numbered(kTensorElements + 2 * kGuard);
  const DeviceArray<uint16_t> in(allocation), out(kPlaces.size() * kBoxRoom);
  const DeviceArray<Coordinates> places(kPlaces);
  load_kernel<kRank, kHint><<<1, 32>>>(encode_boxes(in.data, kRank), places.data, (int)kPlaces.size(), out.data);
  const std::vector<uint16_t> boxes = out.host();
  std::string why;
  for (size_t i = 0; i < kPlaces.size() && why.empty(); ++i) why = compare_box(&boxes[i * kBoxRoom], allocation, kPlaces[i], kRank);
  report().expect(format("tma_load_%dd%s_brings_the_box_and_zeros_for_what_is_outside", kRank, kHint ? "_with_l2_policy" : ""), why.empty(), why);
}

/* Numbers to a box; junk in their place as soon as that is allowed. */
template <int kRank, bool kHint> static __global__ void store_kernel(const __grid_constant__ fc::tensor_map map, Coordinates at) {
#if FLASHCORE_HAS_SM90A
  __shared__ __align__(128) uint16_t box[kBoxRoom];
  for (int j = threadIdx.x; j < kBoxRoom; j += 32) box[j] = (uint16_t)(j + 1);
  fc::fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    with_coordinates<kRank>(at, [&](auto... x) {
      if constexpr (kHint) fc::tma_store(map, fc::shared_address(box), x..., fc::l2_evict_first());
      else fc::tma_store(map, fc::shared_address(box), x...);
    });
    fc::tma_store_commit();
    fc::tma_store_wait_read<0>();
    for (int j = 0; j < kBoxRoom; ++j) *reinterpret_cast<volatile uint16_t *>(&box[j]) = kJunk;
    fc::tma_store_wait<0>();
  }
#endif
}

template <int kRank, bool kHint> static void test_store() {
  std::string why;
  for (const Coordinates &at : kPlaces) {
    if (*std::min_element(at.x, at.x + kRank) < 0) continue;
    const DeviceArray<uint16_t> out(kTensorElements + 2 * kGuard);
    store_kernel<kRank, kHint><<<1, 32>>>(encode_boxes(out.data, kRank), at);
    std::vector<uint16_t> expected(out.count, kJunk);
    for (int j = 0; j < kBoxElements[kRank]; ++j)
      if (const int place = place_of(at, kRank, j, (kSizes[0] + 7) / 8 * 8); place >= 0)
        expected /* whole 16 bytes, see tma_store */[(size_t)place] = (uint16_t)(j + 1);
    const std::vector<uint16_t> got = out.host();
    for (size_t i = 0; i < got.size() && why.empty(); ++i)
      if (got[i] != expected[i])
        why = format("box at (%d, %d, %d, %d, %d): element %d of the allocation is %d, not %d", at.x[0], at.x[1], at.x[2], at.x[3], at.x[4],
                     (int)i - kGuard, got[i], expected[i]);
  }
  report().expect(format("tma_store_%dd%s_writes_the_box_and_nothing_outside_the_tensor", kRank, kHint ? "_with_l2_policy" : ""), why.empty(), why);
}

/* ---- clusters: multicast, arrivals on another block's barrier ------------------------------------------------------------------ */

constexpr int kClusterRounds = 6, kClusterBlocks = 4; /* two clusters of two */

/* In each round either block of a cluster loads one box into the shared memory of both. One of them is late to read: the next boxes must wait. */
template <int kRank>
static __global__ void cluster_kernel(const __grid_constant__ fc::tensor_map map, const Coordinates *places, uint16_t *out, uint32_t *ranks) {
#if FLASHCORE_HAS_SM90A
  constexpr int kBoxBytes = kBoxElements[kRank] * 2;
  __shared__ __align__(128) uint16_t boxes[2][kBoxRoom];
  __shared__ uint64_t full, free;
  const uint32_t rank = fc::cluster_rank(), at_full = fc::shared_address(&full), at_free = fc::shared_address(&free);
  for (int j = threadIdx.x; j < 2 * kBoxRoom; j += 32) boxes[j / kBoxRoom][j % kBoxRoom] = kJunk;
  fc::fence_proxy_async();
  if (threadIdx.x == 0) {
    fc::mbarrier_init(at_full, 1);
    fc::mbarrier_init(at_free, 2);
    fc::fence_mbarrier_init();
    ranks[blockIdx.x] = rank * 16 + fc::cluster_size();
  }
  __syncwarp();
  fc::cluster_arrive();
  fc::cluster_wait();
  for (int round = 0; round < kClusterRounds; ++round) {
    fc::mbarrier_wait_cluster(at_free, (uint32_t)(round & 1) ^ 1u); // both blocks have read the boxes of the round before
    if (threadIdx.x == 0) {
      fc::mbarrier_arrive_expect_tx(at_full, 2 * kBoxBytes);
      with_coordinates<kRank>(places[2 * round + rank], [&](auto... x) {
        const uint32_t dst = fc::shared_address(boxes[rank]);
        if (round % 2) fc::tma_load_multicast(dst, map, at_full, 3, x..., fc::l2_evict_last());
        else fc::tma_load_multicast(dst, map, at_full, 3, x...);
      });
    }
    __syncwarp();
    fc::mbarrier_wait(at_full, round & 1);
    if ((int)rank == round / 2 % 2) __nanosleep(5000);
    for (int j = threadIdx.x; j < 2 * kBoxRoom; j += 32)
      out[(round * kClusterBlocks + blockIdx.x) * 2 * kBoxRoom + j] = boxes[j / kBoxRoom][j % kBoxRoom];
    __syncwarp();
    if (threadIdx.x < 2) fc::mbarrier_arrive_cluster(fc::map_shared(at_free, threadIdx.x));
    __syncwarp();
  }
  fc::cluster_arrive(); // until the last arrivals have come
  fc::cluster_wait();
#endif
}

template <int kRank> static void test_cluster() {
  const std::vector<uint16_t> allocation = numbered(kTensorElements + 2 * kGuard);
  std::vector<Coordinates> where;
  for (size_t i = 0; i < 2 * kClusterRounds; ++i) where.push_back(kPlaces[(i + i / kPlaces.size()) % kPlaces.size()]);
  const DeviceArray<uint16_t> in(allocation), out(kClusterRounds * kClusterBlocks * 2 * kBoxRoom);
  const DeviceArray<Coordinates> places(where);
  const DeviceArray<uint32_t> ranks(kClusterBlocks);
  cudaLaunchAttribute pairs = {};
  pairs.id = cudaLaunchAttributeClusterDimension;
  pairs.val.clusterDim = {2, 1, 1};
  launch(cluster_kernel<kRank>, kClusterBlocks, 32, pairs, encode_boxes(in.data, kRank), places.data, out.data, ranks.data);
  const std::vector<uint16_t> boxes = out.host();
  std::string why;
  for (size_t i = 0; i < kClusterRounds * kClusterBlocks * 2 && why.empty(); ++i) // [round][block][box]
    why = compare_box(&boxes[i * kBoxRoom], allocation, where[i / (2 * kClusterBlocks) * 2 + i % 2], kRank);
  report().expect(format("tma_load_multicast_%dd_fills_both_blocks_when_both_have_arrived_on_each_others_barriers", kRank), why.empty(), why);
  const std::vector<uint32_t> expected = {0 * 16 + 2, 1 * 16 + 2, 0 * 16 + 2, 1 * 16 + 2};
  if (kRank == 2) report().expect("cluster_rank_and_cluster_size_count_the_blocks", ranks.host() == expected, "a block has another rank or size");
}

/* ---- swizzles: as TMA writes them, as swizzled_tile says ----------------------------------------------------------------------- */

constexpr int kSwizzleRows = 64;

template <int kRowBytes> static __global__ void swizzle_kernel(const __grid_constant__ fc::tensor_map map, uint4 *out) {
#if FLASHCORE_HAS_SM90A
  __shared__ __align__(1024) uint4 tile[kSwizzleRows * kRowBytes / 16];
  __shared__ uint64_t full;
  const uint32_t barrier = fc::shared_address(&full);
  if (threadIdx.x == 0) {
    fc::mbarrier_init(barrier, 1);
    fc::fence_mbarrier_init();
    fc::mbarrier_arrive_expect_tx(barrier, sizeof tile);
    fc::tma_load(fc::shared_address(tile), map, barrier, 0, 0);
  }
  __syncwarp();
  fc::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kSwizzleRows * kRowBytes / 16; i += 32) out[i] = tile[i];
#endif
}

template <int kRowBytes> static void test_swizzle() {
  constexpr int kColumns = kRowBytes / 2;
  const std::vector<uint16_t> values = numbered(kSwizzleRows * kColumns);
  const DeviceArray<uint16_t> in(values);
  const DeviceArray<uint4> out(kSwizzleRows * kRowBytes / 16);
  swizzle_kernel<kRowBytes><<<1, 32>>>(encode(in.data, {kColumns, kSwizzleRows}, {kRowBytes}, {kColumns, kSwizzleRows}, kRowBytes), out.data);
  const std::vector<uint4> tile = out.host();
  bool right = true;
  for (int row = 0; row < kSwizzleRows; ++row)
    for (int chunk = 0; chunk < kRowBytes / 16; ++chunk)
      right &= memcmp(&tile[fc::swizzled_tile<kRowBytes>::offset(row, chunk) / 16], &values[(size_t)(row * kColumns + chunk * 8)], 16) == 0;
  report().expect(format("tma_swizzle_of_%d_bytes_puts_chunks_where_swizzled_tile_says", kRowBytes), right, "a chunk lies elsewhere");
}

/* ---- wgmma: accumulator, A in registers, B either way round, every swizzle ------------------------------------------------------ */

enum Operands {
  kShared,     /* A and B from shared memory, both K-major */
  kDrawn,      /* A in registers, element by element as mma_m16n8k16's drawing says */
  kByLdmatrix, /* A in registers by ldmatrix from swizzled_tile */
  kMnMajor,    /* B down the rows of shared memory; A as drawn */
};

constexpr int kProductDepth = 64; /* of the sums: four instructions */

#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)
/* 16 columns of a K-major tile [kProductDepth / c][rows][c]. */
template <int kRowBytes> static __device__ uint64_t k_major(uint32_t tile, int rows, int step) {
  constexpr int kSteps = kRowBytes / 32; // in a row
  return fc::wgmma_descriptor<kRowBytes>(tile + step / kSteps * rows * kRowBytes + step % kSteps * 32, 0);
}
#endif

/* out [64][kN] = A B; A [64][kProductDepth] also in `a`. B as rows of kN columns if kMnMajor, else transposed: kN rows. */
template <typename T, int kN, int kRowBytes, Operands kOperands>
static __global__ void __launch_bounds__(128)
    product_kernel(const __grid_constant__ fc::tensor_map map_a, const __grid_constant__ fc::tensor_map map_b, const T *a, float *out) {
#if FLASHCORE_HAS_SM90A
  constexpr int kColumns = kRowBytes / 2, kChunks = kRowBytes / 16, kSteps = kProductDepth / 16;
  constexpr int kRowsB = kOperands == kMnMajor ? kProductDepth : kN, kBlocksA = kProductDepth / kColumns;
  constexpr int kBlocksB = kOperands == kMnMajor ? (kN + kColumns - 1) / kColumns : kBlocksA;
  constexpr int kBlockBytesA = 64 * kRowBytes, kBlockBytesB = kRowsB * kRowBytes;
  __shared__ __align__(1024) unsigned char tile_a[kBlocksA * kBlockBytesA];
  __shared__ __align__(1024) unsigned char tile_b[kBlocksB * kBlockBytesB];
  __shared__ uint64_t full;
  const uint32_t at_a = fc::shared_address(tile_a), at_b = fc::shared_address(tile_b), barrier = fc::shared_address(&full);
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
  if (threadIdx.x == 0) {
    fc::mbarrier_init(barrier, 1);
    fc::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    fc::mbarrier_arrive_expect_tx(barrier, sizeof tile_a + sizeof tile_b);
    for (int i = 0; i < kBlocksA; ++i) fc::tma_load(at_a + i * kBlockBytesA, map_a, barrier, i * kColumns, 0);
    for (int i = 0; i < kBlocksB; ++i) fc::tma_load(at_b + i * kBlockBytesB, map_b, barrier, i * kColumns, 0);
  }
  __syncwarp();
  fc::mbarrier_wait(barrier, 0);

  uint32_t r[kSteps][4];
  float d[kN / 8][4] = {};
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (kOperands == kByLdmatrix) {
      const int chunk = 2 * k + lane / 16;
      fc::ldmatrix_x4(r[k], at_a + chunk / kChunks * kBlockBytesA + fc::swizzled_tile<kRowBytes>::offset(row0 + lane % 16, chunk % kChunks));
    } else {
      const T *at = a + (row0 + lane / 4) * kProductDepth + 16 * k + 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) r[k][i] = *reinterpret_cast<const uint32_t *>(at + i % 2 * 8 * kProductDepth + i / 2 * 8);
    }
  }
  fc::wgmma_pin(d);
  fc::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (kOperands == kShared) fc::wgmma<T, kN>::ss(d, k_major<kRowBytes>(at_a, 64, k), k_major<kRowBytes>(at_b, kN, k), k > 0);
    else if constexpr (kOperands == kMnMajor)
      fc::wgmma<T, kN>::template rs<1>(d, r[k], fc::wgmma_descriptor<kRowBytes>(at_b + k * 16 * kRowBytes, kBlockBytesB), k > 0);
    else fc::wgmma<T, kN>::template rs<0>(d, r[k], k_major<kRowBytes>(at_b, kN, k), k > 0);
  }
  fc::wgmma_commit();
  fc::wgmma_wait<0>();
  fc::wgmma_pin(d);
  for (int n = 0; n < kN / 8; ++n)
    for (int i = 0; i < 4; ++i) out[(row0 + fc::mma_accumulator::row(lane, i)) * kN + 8 * n + fc::mma_accumulator::col(lane, i)] = d[n][i];
#endif
}

template <typename T, int kN, int kRowBytes, Operands kOperands> static void test_product() {
  constexpr bool kDown = kOperands == kMnMajor;
  std::mt19937 random(11);
  std::vector<float> a(64 * kProductDepth), b(kProductDepth * kN); // both with rows along the sums
  for (float &x : a) x = (float)(random() % 5u) - 2.f;
  for (float &x : b) x = (float)(random() % 5u) - 2.f;
  std::vector<T> stored_a, stored_b(b.size());
  for (float x : a) stored_a.push_back(fc::element<T>::store(x));
  for (size_t n = 0; n < kN; ++n)
    for (size_t k = 0; k < kProductDepth; ++k) stored_b[kDown ? k * kN + n : n * kProductDepth + k] = fc::element<T>::store(b[n * kProductDepth + k]);

  const DeviceArray<T> in_a(stored_a), in_b(stored_b);
  const DeviceArray<float> out(64 * kN);
  const fc::tensor_map map_a = encode(in_a.data, {kProductDepth, 64}, {kProductDepth * 2}, {kRowBytes / 2, 64}, kRowBytes);
  const fc::tensor_map map_b = kDown ? encode(in_b.data, {kN, kProductDepth}, {kN * 2}, {kRowBytes / 2, kProductDepth}, kRowBytes)
                                     : encode(in_b.data, {kProductDepth, kN}, {kProductDepth * 2}, {kRowBytes / 2, kN}, kRowBytes);
  product_kernel<T, kN, kRowBytes, kOperands><<<1, 128>>>(map_a, map_b, in_a.data, out.data);
  const std::vector<float> d = out.host();
  std::string why;
  for (size_t i = 0; i < 64 && why.empty(); ++i) {
    for (size_t n = 0; n < kN && why.empty(); ++n) {
      float sum = 0;
      for (size_t k = 0; k < kProductDepth; ++k) sum += a[i * kProductDepth + k] * b[n * kProductDepth + k];
      if (d[i * kN + n] != sum) why = format("row %zu, column %zu is %g, not %g", i, n, d[i * kN + n], sum);
    }
  }
  const char *const how[] = {"a_and_b_k_major", "a_in_registers_as_drawn", "a_by_ldmatrix", "b_mn_major"};
  report().expect(
      format("wgmma_m64n%dk16_%s_%s_in_swizzle_%d", kN, fc::element<T>::kDtype == FLASHCORE_F16 ? "f16" : "bf16", how[kOperands], kRowBytes),
      why.empty(), why);
}

template <typename T, int kN> static void test_products() {
  test_product<T, kN, 128, kShared>();
  test_product<T, kN, 128, kDrawn>();
  test_product<T, kN, 128, kMnMajor>();
}

template <int kRowBytes> static void test_products_in_swizzle() {
  test_product<__half, 96, kRowBytes, kShared>();
  test_product<__half, 96, kRowBytes, kByLdmatrix>();
  test_product<__half, 96, kRowBytes, kMnMajor>();
  test_product<__nv_bfloat16, 256, kRowBytes, kShared>();
  test_product<__nv_bfloat16, 256, kRowBytes, kMnMajor>();
}

/* ---- stmatrix ------------------------------------------------------------------------------------------------------------------ */

constexpr int kPitch = 24; /* elements between rows */

/* Element (row, col) of matrix j carries the number j * 64 + row * 8 + col. */
template <int kMatrices, bool kTransposed> static __global__ void stmatrix_kernel(uint16_t *out) {
#if FLASHCORE_HAS_SM90A
  __shared__ __align__(16) uint16_t rows[32 * kPitch];
  for (int i = threadIdx.x; i < 32 * kPitch; i += 32) rows[i] = kJunk;
  __syncwarp();
  const uint32_t along = 2 * (threadIdx.x % 4), across = threadIdx.x / 4, address = fc::shared_address(&rows[threadIdx.x * kPitch]);
  uint32_t r[kMatrices];
  for (uint32_t j = 0; j < kMatrices; ++j) {
    const uint32_t low = j * 64 + (kTransposed ? along * 8 + across : across * 8 + along);
    r[j] = low | (low + (kTransposed ? 8 : 1)) << 16;
  }
  if constexpr (kTransposed) fc::stmatrix_trans(address, r);
  else fc::stmatrix(address, r);
  __syncwarp();
  for (int i = threadIdx.x; i < 32 * kPitch; i += 32) out[i] = rows[i];
#endif
}

template <int kMatrices, bool kTransposed> static void test_stmatrix() {
  const DeviceArray<uint16_t> out(32 * kPitch);
  stmatrix_kernel<kMatrices, kTransposed><<<1, 32>>>(out.data);
  const std::vector<uint16_t> rows = out.host();
  bool right = true;
  for (int row = 0; row < 32; ++row)
    for (int col = 0; col < kPitch; ++col)
      right &= rows[(size_t)(row * kPitch + col)] == (row < 8 * kMatrices && col < 8 ? (uint16_t)(row * 8 + col) : kJunk);
  report().expect(format("stmatrix%s_x%d_puts_the_documented_elements_into_rows", kTransposed ? "_trans" : "", kMatrices), right,
                  "an element lies elsewhere, or a neighbour was written");
}

/* Two accumulators side by side, rounded and packed in pairs, become 16 rows of 16. */
static __global__ void fragment_kernel(__half *out) {
#if FLASHCORE_HAS_SM90A
  __shared__ __align__(16) __half tile[16 * kPitch];
  const int lane = threadIdx.x;
  float d[2][4];
  uint32_t r[4];
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) d[n][i] = (float)(16 * fc::mma_accumulator::row(lane, i) + 8 * n + fc::mma_accumulator::col(lane, i));
  for (int i = 0; i < 4; ++i) r[i] = fc::pack2<__half>(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
  fc::stmatrix(fc::shared_address(&tile[lane % 16 * kPitch + lane / 16 * 8]), r);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) out[i] = tile[i / 16 * kPitch + i % 16];
#endif
}

static void test_fragment() {
  const DeviceArray<__half> out(256);
  fragment_kernel<<<1, 32>>>(out.data);
  const std::vector<__half> tile = out.host();
  bool right = true;
  for (size_t i = 0; i < 256; ++i) right &= __half2float(tile[i]) == (float)i;
  report().expect("stmatrix_x4_stores_packed_accumulators_as_rows", right, "an element lies elsewhere");
}

/* ---- named barriers ------------------------------------------------------------------------------------------------------------ */

constexpr int kBarrierRounds = 8;

/* Two warps write, two read what they wrote, in turn: writers only arrive on `full`, readers only on `empty`. Then each pair on its own. */
static __global__ void barrier_kernel(int full, int empty, int threads, uint32_t *out) {
#if FLASHCORE_HAS_SM90A
  __shared__ uint32_t data[64], pairs[2][64];
  const int me = threadIdx.x % 64, pair = threadIdx.x / 64;
  for (int round = 0; round < kBarrierRounds; ++round) {
    const bool late = me / 32 == round % 2;
    if (pair == 0) {
      if (round > 0) fc::barrier_sync(empty, threads);
      if (late) __nanosleep(2000);
      data[me] = round * 64 + me;
      fc::barrier_arrive(full, threads);
    } else {
      fc::barrier_sync(full, threads);
      if (late) __nanosleep(2000);
      out[round * 64 + me] = data[63 - me];
      if (round + 1 < kBarrierRounds) fc::barrier_arrive(empty, threads);
    }
  }
  if (me < 32) __nanosleep(2000 + 2000 * pair);
  pairs[pair][me] = 1000 * pair + me;
  fc::barrier_sync(empty + 1 + pair, threads / 2);
  out[kBarrierRounds * 64 + threadIdx.x] = pairs[pair][63 - me];
#endif
}

static void test_barriers() {
  const DeviceArray<uint32_t> out(kBarrierRounds * 64 + 128);
  barrier_kernel<<<1, 128>>>(1, 2, 128, out.data);
  const std::vector<uint32_t> got = out.host();
  bool handed = true, apart = true;
  for (uint32_t i = 0; i < kBarrierRounds * 64; ++i) handed &= got[i] == i / 64 * 64 + 63 - i % 64;
  for (uint32_t i = 0; i < 128; ++i) apart &= got[kBarrierRounds * 64 + i] == 1000 * (i / 64) + 63 - i % 64;
  report().expect("barrier_arrive_and_barrier_sync_hand_a_buffer_to_and_fro", handed, "a word of another round was read");
  report().expect("barrier_sync_of_half_the_threads_keeps_them_in_step", apart, "a word was read before it was written");
}

/* ---- programmatic dependent launch --------------------------------------------------------------------------------------------- */

constexpr int kDependentBlocks = 32, kDependentThreads = 128, kDependentRuns = 20;

static __global__ void first_kernel(uint32_t seed, uint32_t *data) {
#if FLASHCORE_HAS_SM90A
  fc::griddepcontrol_launch_dependents();
  for (int i = 0; i < 50; ++i) __nanosleep(1000);
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  data[i] = seed + i;
#endif
}

/* early: whether the block was there before the data. */
static __global__ void second_kernel(uint32_t seed, const uint32_t *data, uint32_t *out, uint32_t *early) {
#if FLASHCORE_HAS_SM90A
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, other = gridDim.x * blockDim.x - 1 - i;
  if (threadIdx.x == 0) early[blockIdx.x] = *reinterpret_cast<const volatile uint32_t *>(&data[other]) != seed + other;
  fc::griddepcontrol_wait();
  out[i] = *reinterpret_cast<const volatile uint32_t *>(&data[other]);
#endif
}

static void test_dependent_launch() {
  constexpr uint32_t kCount = kDependentBlocks * kDependentThreads;
  const DeviceArray<uint32_t> data(kCount), out(kCount), early(kDependentBlocks);
  cudaLaunchAttribute programmatic = {};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  bool right = true;
  int overlapped = 0;
  for (uint32_t run = 0; run < kDependentRuns; ++run) {
    const uint32_t seed = 1 + run * 2 * kCount;
    first_kernel<<<kDependentBlocks, kDependentThreads>>>(seed, data.data);
    launch(second_kernel, kDependentBlocks, kDependentThreads, programmatic, seed, data.data, out.data, early.data);
    const std::vector<uint32_t> got = out.host(), was_early = early.host();
    for (uint32_t i = 0; i < kCount; ++i) right &= got[i] == seed + kCount - 1 - i;
    overlapped += std::count(was_early.begin(), was_early.end(), 1u) > 0;
  }
  const std::string name = "griddepcontrol_wait_shows_the_memory_of_the_kernel_before";
  report().expect(name, right, "a word is that of an earlier run");
  report().expect("griddepcontrol_launch_dependents_lets_the_next_kernel_begin_early", overlapped > 0, "none did");
}

/* ---- all of them --------------------------------------------------------------------------------------------------------------- */

template <int kRank> static void test_boxes() {
  test_load<kRank, false>();
  test_load<kRank, true>();
  test_store<kRank, false>();
  test_store<kRank, true>();
}

template <typename T> static void test_table_of_products() {
  test_products<T, 64>();
  test_products<T, 96>();
  test_products<T, 128>();
  test_products<T, 192>();
  test_products<T, 256>();
}

int main() {
  int major = 0, minor = 0;
  CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  CUDA_OK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  if (major != 9 || minor != 0) {
    printf("skip test_hopper: these instructions are those of sm_90, the device is sm_%d%d\n", major, minor);
    report().ok("hopper_primitives_are_skipped_on_other_devices");
    return report().finish();
  }
  test_boxes<2>();
  test_boxes<3>();
  test_boxes<4>();
  test_boxes<5>();
  test_swizzle<128>();
  test_swizzle<64>();
  test_swizzle<32>();
  test_table_of_products<__half>();
  test_table_of_products<__nv_bfloat16>();
  test_products_in_swizzle<128>();
  test_products_in_swizzle<64>();
  test_products_in_swizzle<32>();
  test_stmatrix<1, false>();
  test_stmatrix<2, false>();
  test_stmatrix<4, false>();
  test_stmatrix<1, true>();
  test_stmatrix<2, true>();
  test_stmatrix<4, true>();
  test_fragment();
  test_barriers();
  test_dependent_launch();
  test_cluster<2>();
  test_cluster<3>();
  test_cluster<4>();
  test_cluster<5>();
  return report().finish();
}
