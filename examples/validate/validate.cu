// Demonstrates FlashCore on your GPU: every backend that takes the chip, over a grid of shapes, first checked, then timed, in one table.
//
//   nvcc -std=c++17 -O2 -gencode arch=compute_89,code=sm_89 examples/validate/validate.cu examples/common/library.cu -o validate
//   ./validate
//
// Checked against the SIMT kernel (whole output) and the CPU reference (16 rows with their LSE). On an L4 the time that the model in the README
// predicts stands beside the measured one. Exit code: 0 all right, 1 something differs or a shape has no backend, 2 a CUDA error.
#include "../common/gpu_problem.cuh"

// Predicted microseconds on an L4 (sm_89, 58 SMs) for the mma kernel, fp16: see README, "A model of the L4". 0: no prediction.
struct prediction {
  int batch, heads, seq, dim, causal;
  double us;
};
static const prediction kL4Predictions[] = {
    {1, 8, 512, 64, 0, 9.8},      {2, 8, 512, 64, 0, 16.5},     {4, 32, 4096, 64, 0, 5610.}, {4, 32, 4096, 64, 1, 2805.},
    {4, 16, 4096, 128, 0, 5340.}, {4, 16, 4096, 128, 1, 2670.}, {4, 8, 4096, 256, 0, 5440.}, {4, 8, 4096, 256, 1, 2720.},
};

enum { kF16 = FLASHCORE_F16, kBf16 = FLASHCORE_BF16, kF32 = FLASHCORE_F32, kTopLeft = FLASHCORE_CAUSAL_TOP_LEFT };

static const problem_shape kShapes[] = {
    // type, batch, heads, kv heads, seq, keys, dim, dim of v, causal
    {kF16, 1, 8, 8, 512, 512, 64, 64, 0},        // one short sequence
    {kF16, 2, 8, 8, 512, 512, 64, 64, 0},        //
    {kF16, 2, 8, 8, 512, 512, 64, 64, 1},        //
    {kF16, 4, 32, 32, 4096, 4096, 64, 64, 0},    // prefill
    {kF16, 4, 32, 32, 4096, 4096, 64, 64, 1},    //
    {kF16, 4, 16, 16, 4096, 4096, 128, 128, 0},  //
    {kF16, 4, 16, 16, 4096, 4096, 128, 128, 1},  //
    {kF16, 4, 8, 8, 4096, 4096, 256, 256, 0},    //
    {kF16, 4, 8, 8, 4096, 4096, 256, 256, 1},    //
    {kBf16, 4, 16, 16, 4096, 4096, 128, 128, 1}, // the other 16-bit type
    {kBf16, 2, 28, 4, 1500, 1500, 128, 128, 1},  // grouped heads, ragged length
    {kF16, 3, 5, 5, 997, 997, 80, 80, 1},        // prime length, a padded dim
    {kF16, 2, 6, 6, 131, 389, 40, 40, 1},        // fewer queries than keys
    {kF16, 2, 6, 6, 389, 131, 64, 64, 1},        // fewer keys than queries: empty rows
    {kF16, 2, 6, 6, 257, 129, 64, 64, kTopLeft}, // the other alignment
    {kF16, 1, 16, 16, 2048, 2048, 192, 128, 1},  // unequal dims
    {kF16, 1, 2, 2, 1024, 1024, 512, 512, 1},    // the largest dim
    {kF16, 16, 32, 8, 1, 4096, 128, 128, 1},     // decode
    {kF32, 1, 4, 2, 515, 515, 64, 64, 1},        // fp32
};

static double predicted_us(const problem_shape &s, int backend) {
  for (const prediction &p : kL4Predictions)
    if (backend == FLASHCORE_BACKEND_MMA && s.dtype == kF16 && s.batch == p.batch && s.heads_q == p.heads && s.heads_kv == p.heads &&
        s.seq_q == p.seq && s.seq_kv == p.seq && s.dim_qk == p.dim && s.dim_v == p.dim && s.causal == p.causal)
      return p.us;
  return 0;
}

struct tally {
  int passed, failed;
};

static int validate_backend(const problem_shape &s, gpu_problem *p, int backend, bool is_l4, cudaStream_t stream, tally *t, int *taken) {
  flashcore_status status;
  flashcore_error error;
  row_check rows;
  double us = 0, relative = 0;
  if (run_backend(p, backend, &status, &error)) return 2;
  if (status == FLASHCORE_BACKEND_NOT_COMPILED) return 0;
  if (status != FLASHCORE_OK) { // not for this chip, type or dim
    printf("%-6s %4s: %s\n", flashcore_backend_string((flashcore_backend)backend), dtype_name(s.dtype), error.message);
    return 0;
  }
  ++*taken;
  if (compare_with_simt(*p, &relative) || compare_with_reference(*p, 16, &rows)) return 2;
  const bool right = close_to_simt(relative, s.dtype) && rows.failed == 0;
  ++(right ? t->passed : t->failed);
  if (time_forward(&p->a, stream, &us)) return 2;
  CUDA_TRY(cudaFree(p->a.workspace));
  char predicted[16] = "-";
  const double us_l4 = is_l4 ? predicted_us(s, backend) : 0;
  if (us_l4 > 0) snprintf(predicted, sizeof predicted, "%.1f", us_l4);
  printf("%-6s %4s %3d %3d/%-3d %5d %5d %4d %4d %-6s %8.1e %8.1e %8.1e %10.2f %8.1f %10s  %s\n", flashcore_backend_string((flashcore_backend)backend),
         dtype_name(s.dtype), s.batch, s.heads_q, s.heads_kv, s.seq_q, s.seq_kv, s.dim_qk, s.dim_v,
         s.causal == 0          ? "no"
         : s.causal == kTopLeft ? "top"
                                : "yes",
         relative, rows.max_error, rows.max_lse_error, us, problem_flop(s) / us * 1e-6, predicted, right ? "ok" : "WRONG");
  fflush(stdout);
  return 0;
}

static int validate_shape(const problem_shape &s, bool is_l4, cudaStream_t stream, tally *t) {
  gpu_problem p;
  int taken = 0;
  if (make_problem(s, &p)) return 2;
  for (int backend = FLASHCORE_BACKEND_SIMT; backend <= FLASHCORE_BACKEND_QGMMA; ++backend)
    if (validate_backend(s, &p, backend, is_l4, stream, t, &taken)) return 2;
  if (taken == 0) {
    printf("no backend takes %s dims %d, %d\n", dtype_name(s.dtype), s.dim_qk, s.dim_v);
    ++t->failed;
  }
  return free_problem(&p);
}

int main() {
  cudaDeviceProp device;
  cudaStream_t stream;
  tally t = {0, 0};
  CUDA_TRY(cudaGetDeviceProperties(&device, 0));
  CUDA_TRY(cudaStreamCreate(&stream));
  const bool is_l4 = device.major == 8 && device.minor == 9 && device.multiProcessorCount == 58;
  printf("%s, sm_%d%d, %d SMs, %zu KiB shared memory per block\n", device.name, device.major, device.minor, device.multiProcessorCount,
         device.sharedMemPerBlockOptin / 1024);
  printf("errors: |o - o_simt| / |o_simt| of the whole output; worst |o - reference| and |lse - reference| of 16 rows\n");
  printf("kernel type bat heads     seq  keys  dim dimv causal  vs simt  o error lse err         us  TFLOP/s    L4 pred\n");
  for (const problem_shape &s : kShapes)
    if (validate_shape(s, is_l4, stream, &t)) return 2;
  printf("%d passed, %d failed\n", t.passed, t.failed);
  return t.failed ? 1 : 0;
}
