/* Takes the address of every FLASHCORE_DEVICE building block, so that each is compiled on its own and not only where a kernel happens to use it.
 * tests/run.py fails when a name is missing here. */
#include "all_headers.h"

namespace fc = flashcore;

template <typename Function> static __device__ void keep(const void **table, int &count, Function *function) {
  table[count++] = reinterpret_cast<const void *>(function);
}

static __device__ void keep_flashcore(const void **table, int &count) {
  keep(table, count, &fc::load_as_float);
  keep(table, count, &fc::store_from_float);
  keep(table, count, &fc::ex2);
  keep(table, count, static_cast<int32_t (*)(int32_t)>(&fc::warp_uniform));
  keep(table, count, static_cast<int64_t (*)(int64_t)>(&fc::warp_uniform));
  keep(table, count, &fc::softmax_reference);
  keep(table, count, &fc::softmax_term<60>);
  keep(table, count, &fc::quad_max);
  keep(table, count, &fc::quad_sum);
  keep(table, count, &fc::quad_transpose);
  keep(table, count, &fc::warp_max);
  keep(table, count, &fc::warp_sum);
  keep(table, count, &fc::shared_address);
  keep(table, count, &fc::cp_async<4>);
  keep(table, count, &fc::cp_async<8>);
  keep(table, count, &fc::cp_async<16>);
  keep(table, count, &fc::cp_async_16);
  keep(table, count, &fc::cp_async_wait_all);
#if FLASHCORE_HAS_SM80 || !defined(__CUDA_ARCH__)
  keep(table, count, &fc::cp_async_commit);
  keep(table, count, &fc::cp_async_wait<1>);
  keep(table, count, &fc::mbarrier_init);
  keep(table, count, &fc::mbarrier_arrive);
  keep(table, count, &fc::mbarrier_wait);
  keep(table, count, &fc::cp_async_arrive);
  keep(table, count, &fc::ldmatrix_x4);
  keep(table, count, &fc::ldmatrix_x4_trans);
  keep(table, count, &fc::mma_m16n8k16<__half>);
  keep(table, count, &fc::mma_m16n8k16<__nv_bfloat16>);
  keep(table, count, &fc::pack2<__half>);
  keep(table, count, &fc::pack2<__nv_bfloat16>);
  keep(table, count, &fc::unpack2<__half>);
  keep(table, count, &fc::unpack2<__nv_bfloat16>);
#endif
}

#if __has_include("flashcore_wmma.cuh") && (FLASHCORE_HAS_SM80 || !defined(__CUDA_ARCH__))
static __device__ void keep_wmma(const void **table, int &count) {
  keep(table, count, &fc::barrier_sync<fc::kStageBarrier, 128>);
  keep(table, count, &fc::copy_chunk);
  keep(table, count, &fc::store_chunk);
}
#endif

#if __has_include("flashcore_wgmma.cuh") && (FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__))
/* All that TMA does with a tensor of so many dims; At: an int for each. */
template <typename... At> static __device__ void keep_tma(const void **table, int &count) {
  using fc::l2_policy, fc::tensor_map;
  keep(table, count, static_cast<void (*)(uint32_t, const tensor_map &, uint32_t, At...)>(&fc::tma_load));
  keep(table, count, static_cast<void (*)(uint32_t, const tensor_map &, uint32_t, At..., l2_policy)>(&fc::tma_load));
  keep(table, count, static_cast<void (*)(uint32_t, const tensor_map &, uint32_t, uint16_t, At...)>(&fc::tma_load_multicast));
  keep(table, count, static_cast<void (*)(uint32_t, const tensor_map &, uint32_t, uint16_t, At..., l2_policy)>(&fc::tma_load_multicast));
  keep(table, count, static_cast<void (*)(const tensor_map &, At...)>(&fc::tma_prefetch));
  keep(table, count, static_cast<void (*)(const tensor_map &, At..., l2_policy)>(&fc::tma_prefetch));
  keep(table, count, static_cast<void (*)(const tensor_map &, uint32_t, At...)>(&fc::tma_store));
  keep(table, count, static_cast<void (*)(const tensor_map &, uint32_t, At..., l2_policy)>(&fc::tma_store));
}

template <int kMatrices> static __device__ void keep_stmatrix(const void **table, int &count) {
  keep(table, count, static_cast<void (*)(uint32_t, const uint32_t(&)[kMatrices])>(&fc::stmatrix));
  keep(table, count, static_cast<void (*)(uint32_t, const uint32_t(&)[kMatrices])>(&fc::stmatrix_trans));
}

static __device__ void keep_wgmma(const void **table, int &count) {
  keep(table, count, &fc::fence_mbarrier_init);
  keep(table, count, &fc::mbarrier_arrive_expect_tx);
  keep(table, count, &fc::l2_evict_first);
  keep(table, count, &fc::l2_evict_last);
  keep(table, count, &fc::prefetch_tensormap);
  keep_tma<int, int>(table, count);
  keep_tma<int, int, int>(table, count);
  keep_tma<int, int, int, int>(table, count);
  keep_tma<int, int, int, int, int>(table, count);
  keep(table, count, &fc::tma_store_commit);
  keep(table, count, &fc::tma_store_wait<1>);
  keep(table, count, &fc::tma_store_wait_read<0>);
  keep(table, count, &fc::fence_proxy_async);
  keep(table, count, &fc::setmaxnreg_dec<24>);
  keep(table, count, &fc::setmaxnreg_inc<240>);
  keep(table, count, &fc::warpgroup_sync);
  keep(table, count, static_cast<void (*)(int, int)>(&fc::barrier_sync));
  keep(table, count, &fc::barrier_arrive);
  keep(table, count, &fc::cluster_rank);
  keep(table, count, &fc::cluster_size);
  keep(table, count, &fc::cluster_arrive);
  keep(table, count, &fc::cluster_wait);
  keep(table, count, &fc::map_shared);
  keep(table, count, &fc::mbarrier_arrive_cluster);
  keep(table, count, &fc::mbarrier_wait_cluster);
  keep_stmatrix<1>(table, count);
  keep_stmatrix<2>(table, count);
  keep_stmatrix<4>(table, count);
  keep(table, count, &fc::griddepcontrol_wait);
  keep(table, count, &fc::griddepcontrol_launch_dependents);
  keep(table, count, &fc::wgmma_descriptor<128>);
  keep(table, count, &fc::wgmma_descriptor<64>);
  keep(table, count, &fc::wgmma_descriptor<32>);
  keep(table, count, &fc::wgmma_fence);
  keep(table, count, &fc::wgmma_commit);
  keep(table, count, &fc::wgmma_wait<0>);
  keep(table, count, &fc::wgmma_pin<8>);
  keep(table, count, &fc::wgmma<__half, 64>::ss);
  keep(table, count, &fc::wgmma<__nv_bfloat16, 128>::rs<0>);
  keep(table, count, &fc::wgmma<__half, 96>::rs<1>);
}
#endif

#if __has_include("flashcore_fp8.cuh")
static __device__ void keep_fp8(const void **table, int &count) {
  keep(table, count, &fc::pack4<fc::e4m3>);
  keep(table, count, &fc::pack4<fc::e5m2>);
  keep(table, count, &fc::fp8_descale);
  keep(table, count, &fc::fp8_normal);
#if FLASHCORE_HAS_QMMA || !defined(__CUDA_ARCH__)
  keep(table, count, &fc::qmma_m16n8k32<fc::e4m3, fc::e4m3>);
  keep(table, count, &fc::qmma_m16n8k32<fc::e4m3, fc::e5m2>);
  keep(table, count, &fc::qmma_m16n8k32<fc::e5m2, fc::e5m2>);
  keep(table, count, &fc::qmma_min);
  keep(table, count, &fc::qmma_split_dims);
  keep(table, count, &fc::qmma_pack_p);
  keep(table, count, &fc::load_shared_8);
  keep(table, count, &fc::load_shared_16);
  keep(table, count, &fc::store_shared_16);
  keep(table, count, &fc::widen4<fc::e4m3>);
  keep(table, count, &fc::widen4<fc::e5m2>);
#endif
#if FLASHCORE_HAS_SM90A || !defined(__CUDA_ARCH__)
  keep(table, count, &fc::wgmma<fc::e4m3, 64>::ss);
  keep(table, count, &fc::wgmma<fc::e5m2, 96>::rs<0>);
  keep(table, count, &fc::wgmma<fc::e5m2, 256>::p);
  keep(table, count, &fc::mma_m16n8k16<fc::e4m3>);
  keep(table, count, &fc::mma_m16n8k16<fc::e5m2>);
  keep(table, count, &fc::fp8_widen<__half, fc::e5m2>);
  keep(table, count, &fc::fp8_widen<__nv_bfloat16, fc::e4m3>);
#endif
}
#endif

__global__ void keep_all(const void **table, int *count) {
  keep_flashcore(table, *count);
#if __has_include("flashcore_wmma.cuh") && FLASHCORE_HAS_SM80
  keep_wmma(table, *count);
#endif
#if __has_include("flashcore_wgmma.cuh") && FLASHCORE_HAS_SM90A
  keep_wgmma(table, *count);
#endif
#if __has_include("flashcore_fp8.cuh")
  keep_fp8(table, *count);
#endif
}
