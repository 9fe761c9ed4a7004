// Demonstrates FlashCore as a shared library for other languages: the C API, and sizes by which a binding can check that its structs match.
//
//   nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC -gencode arch=compute_90a,code=sm_90a examples/python/flashcore_library.cu -o libflashcore.so
#include "../common/library.cu"

#include "../../flashcore_fp8.cuh"

// For race.py --l4, a measurement device and not an API: the plan for an SM with an L4's shared memory, its blocks padded until only as many fit this
// GPU's SM as would fit the L4's. All else, registers and the number of SMs among it, is this GPU's.
static flashcore_status plan_l4(const flashcore_attention *a, flashcore_attention *resolved, flashcore_plan *plan, const flashcore_backend_ops **ops,
                                flashcore_error *error) {
  const int l4_shared = 100 * 1024, unit = 128; // bytes per SM; per step in which blocks are given them, on the L4 as on Hopper
  flashcore_device device;
  FLASHCORE_TRY(flashcore_validate(a, error));
  FLASHCORE_TRY(flashcore_query_device(-1, &device, error));
  flashcore_resolve(a, resolved);
  const int shared = device.shared_per_sm, backend = a->backend == FLASHCORE_BACKEND_AUTO ? FLASHCORE_BACKEND_MMA : a->backend; // an L4 has no wgmma
  device.shared_per_sm = l4_shared;
  FLASHCORE_TRY(flashcore_plan_backend(resolved, backend, &device, plan, ops, error));

  int reserved = 0, most = 0;
  cudaError_t code = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device.ordinal);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.ordinal);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaDeviceGetAttribute", code);
  cudaFuncAttributes attributes;
  code = cudaFuncGetAttributes(&attributes, plan->kernel);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaFuncGetAttributes", code);
  const int fixed = (int)attributes.sharedSizeBytes, block = (fixed + plan->d.shared_bytes + reserved + unit - 1) / unit * unit;
  const int blocks = l4_shared / block;
  if (blocks == 0 || shared < l4_shared)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_ARCH, "device", shared, l4_shared,
                            "device: %d bytes of shared memory per SM cannot stand for the %d of an L4, nor for blocks of %d", shared, l4_shared,
                            block);
  const int padded = shared / blocks / unit * unit - reserved - fixed;
  plan->d.shared_bytes = padded < most - fixed ? padded : most - fixed; // flashcore_launch asks leave for it
  return FLASHCORE_OK;
}

extern "C" {
size_t flashcore_sizeof_attention(void) { return sizeof(flashcore_attention); }
size_t flashcore_sizeof_description(void) { return sizeof(flashcore_description); }
size_t flashcore_sizeof_error(void) { return sizeof(flashcore_error); }
size_t flashcore_sizeof_fp8_quantise_args(void) { return sizeof(flashcore_fp8_quantise_args); }
size_t flashcore_offsetof_workspace(void) { return offsetof(flashcore_attention, workspace); }

flashcore_status flashcore_forward_l4(const flashcore_attention *a, flashcore_stream stream, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_backend_ops *ops;
  FLASHCORE_TRY(plan_l4(a, &resolved, &plan, &ops, error));
  FLASHCORE_TRY(flashcore_check_workspace(&resolved, plan.workspace_bytes, error));
  return ops->launch(&resolved, &plan, stream, error);
}

flashcore_status flashcore_describe_l4(const flashcore_attention *a, flashcore_description *out, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_backend_ops *ops;
  FLASHCORE_TRY(plan_l4(a, &resolved, &plan, &ops, error));
  return flashcore_describe_kernel(&plan, out, error);
}
}
