/* The file of the GPU tests that compiles the library itself, but for the wgmma backend (library_wgmma.cu). It also opens a door to tiles of the mma
 * kernel that the dispatcher would not pick on this GPU or for so small a problem: the test_..._on functions plan for a chip of another size, and
 * launch here (harness.cuh). */
#define FLASHCORE_IMPLEMENTATION
#include "flashcore_wmma.cuh"

/* What the dispatcher does for the mma backend, on a chip with so many SMs and bytes of shared memory per SM (negative: as they are). */
static flashcore_status plan_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_attention *resolved, flashcore_plan *plan,
                                flashcore_error *error) {
  flashcore_device device;
  flashcore_status status = flashcore_validate(a, error);
  if (status == FLASHCORE_OK) status = flashcore_query_device(-1, &device, error);
  if (status != FLASHCORE_OK) return status;
  if (sm_count >= 0) device.sm_count = sm_count;
  if (shared_per_sm >= 0) device.shared_per_sm = shared_per_sm;
  flashcore_resolve(a, resolved);
  *plan = flashcore_plan();
  return flashcore_mma_plan(resolved, &device, plan, error);
}

extern "C" flashcore_status test_plan_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_description *d) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_status status = plan_on(a, sm_count, shared_per_sm, &resolved, &plan, nullptr);
  if (status == FLASHCORE_OK) *d = plan.d;
  return status;
}

extern "C" flashcore_status test_workspace_size_on(const flashcore_attention *a, int sm_count, int shared_per_sm, size_t *bytes,
                                                   flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_status status = plan_on(a, sm_count, shared_per_sm, &resolved, &plan, error);
  if (status == FLASHCORE_OK) *bytes = plan.workspace_bytes;
  return status;
}

extern "C" flashcore_status test_supported_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_status status = plan_on(a, sm_count, shared_per_sm, &resolved, &plan, error);
  return status == FLASHCORE_OK ? flashcore_check_workspace(&resolved, plan.workspace_bytes, error) : status;
}

extern "C" flashcore_status test_forward_on(const flashcore_attention *a, int sm_count, int shared_per_sm, flashcore_stream stream,
                                            flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  flashcore_status status = plan_on(a, sm_count, shared_per_sm, &resolved, &plan, error);
  if (status == FLASHCORE_OK) status = flashcore_check_workspace(&resolved, plan.workspace_bytes, error);
  return status == FLASHCORE_OK ? flashcore_mma_launch(&resolved, &plan, stream, error) : status;
}
