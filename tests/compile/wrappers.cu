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
static __device__ void keep_wgmma(const void **table, int &count) {
  keep(table, count, &fc::fence_mbarrier_init);
  keep(table, count, &fc::mbarrier_arrive_expect_tx);
  keep(table, count, &fc::tma_load);
  keep(table, count, &fc::fence_proxy_async);
  keep(table, count, &fc::setmaxnreg_dec<24>);
  keep(table, count, &fc::setmaxnreg_inc<240>);
  keep(table, count, &fc::warpgroup_sync);
  keep(table, count, &fc::wgmma_descriptor);
  keep(table, count, &fc::wgmma_fence);
  keep(table, count, &fc::wgmma_commit);
  keep(table, count, &fc::wgmma_wait<0>);
  keep(table, count, &fc::wgmma_pin<8>);
  keep(table, count, &fc::wgmma<__half, 64>::ss);
  keep(table, count, &fc::wgmma<__nv_bfloat16, 128>::rs<0>);
  keep(table, count, &fc::wgmma<__half, 96>::rs<1>);
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
}
