// Demonstrates how FlashCore is timed without Python: random data, the output checked on the same GPU, CUDA-graph replays, the median.
//
//   nvcc -std=c++17 -O2 -gencode arch=compute_90a,code=sm_90a examples/bench/bench.cu examples/common/library.cu -o bench
//   ./bench --csv bench.csv && python3 examples/bench/plot.py bench.csv bench.png
//   ./bench --small --dtype bf16 --backend wmma
//
// Prefill: batch * seq = 16384 and heads * dim = 2048. TFLOP/s = 4 batch heads seq^2 dim / time, half of it when causal.
// Exit code: 0 right, 1 an output differs from the SIMT kernel's, 2 bad input or a CUDA error.
#include "../common/gpu_problem.cuh"

struct bench_options {
  std::vector<int> dims = {64, 128, 256}, seqs = {512, 1024, 2048, 4096, 8192, 16384};
  int dtype = FLASHCORE_F16, backend = FLASHCORE_BACKEND_AUTO;
  bool small = false;
  const char *csv = nullptr;
};

static std::vector<int> parse_list(const char *text) {
  std::vector<int> list;
  for (char *end; *text; text = *end == ',' ? end + 1 : end) {
    list.push_back((int)strtol(text, &end, 10));
    if (end == text || list.back() <= 0) return {};
  }
  return list;
}

static int backend_of(const char *name) {
  for (int n = FLASHCORE_BACKEND_AUTO; n <= FLASHCORE_BACKEND_QGMMA; ++n)
    if (!strcmp(name, flashcore_backend_string((flashcore_backend)n))) return n;
  return -1;
}

static int parse_bench_options(int argc, char **argv, bench_options *o) {
  for (int i = 1; i < argc; ++i) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(argv[i], "--small")) {
      o->small = true;
      continue;
    }
    if (!strcmp(argv[i], "--dims")) o->dims = parse_list(value);
    else if (!strcmp(argv[i], "--seqs")) o->seqs = parse_list(value);
    else if (!strcmp(argv[i], "--dtype")) o->dtype = !strcmp(value, "f16") ? FLASHCORE_F16 : !strcmp(value, "bf16") ? FLASHCORE_BF16 : 0;
    else if (!strcmp(argv[i], "--backend")) o->backend = backend_of(value);
    else if (!strcmp(argv[i], "--csv") && *value) o->csv = value;
    else o->dtype = 0;
    if (o->dims.empty() || o->seqs.empty() || !o->dtype || o->backend < 0) {
      fprintf(stderr,
              "bench: %s %s is not understood\n"
              "usage: bench [--small] [--dims 64,128] [--seqs 512,4096] [--dtype f16|bf16] [--backend auto|simt|wmma|mma|wgmma] [--csv FILE]\n",
              argv[i], value);
      return 2;
    }
    ++i;
  }
  return 0;
}

static std::vector<problem_shape> shapes_of(const bench_options &o) {
  std::vector<problem_shape> shapes;
  const int small[][4] = {{1, 8, 512, 64},    {2, 8, 256, 64},  {2, 8, 512, 64},   {32, 8, 128, 64},  {32, 8, 512, 64},
                          {16, 16, 2048, 64}, {1, 96, 512, 64}, {1, 32, 512, 128}, {1, 32, 2048, 128}};
  const auto add = [&](int batch, int heads, int seq, int dim, int causal) {
    shapes.push_back({o.dtype, batch, heads, heads, seq, seq, dim, dim, causal});
  };
  for (const auto &s : small)
    for (int causal = 0; causal < 2 && o.small; ++causal) add(s[0], s[1], s[2], s[3], causal);
  for (int dim : o.dims)
    for (int causal = 0; causal < 2 && !o.small; ++causal)
      for (int seq : o.seqs) add(seq < 16384 ? 16384 / seq : 1, dim < 2048 ? 2048 / dim : 1, seq, dim, causal);
  return shapes;
}

// *wrong: counts outputs that differ.
static int bench_shape(const problem_shape &s, const bench_options &o, FILE *csv, int *wrong) {
  gpu_problem p;
  flashcore_status status;
  flashcore_error error;
  flashcore_description what;
  double us = 0, relative = 0;
  if (make_problem(s, &p) || run_backend(&p, o.backend, &status, &error)) return 2;
  if (status != FLASHCORE_OK) return refused(status, &error);
  if (compare_with_simt(p, &relative)) return 2;
  const bool right = close_to_simt(relative, s.dtype);
  *wrong += !right;
  cudaStream_t stream;
  CUDA_TRY(cudaStreamCreate(&stream));
  if (time_forward(&p.a, stream, &us)) return 2;
  status = flashcore_describe(&p.a, -1, &what, &error);
  if (status != FLASHCORE_OK) return refused(status, &error);
  const double tflops = problem_flop(s) / us * 1e-6;
  printf("%4s %4d %6s %5d %5d %6d %10.2f %8.1f %10.1e  %s%s\n", dtype_name(s.dtype), s.dim_qk, s.causal ? "yes" : "no", s.batch, s.heads_q, s.seq_q,
         us, tflops, relative, what.kernel, right ? "" : "  WRONG");
  fflush(stdout);
  if (csv)
    fprintf(csv, "%s,%d,%d,%d,%d,%d,flashcore %s,%.3f,%.2f,%.2e\n", dtype_name(s.dtype), s.dim_qk, s.causal, s.batch, s.heads_q, s.seq_q,
            flashcore_backend_string((flashcore_backend)what.backend), us, tflops, relative);
  CUDA_TRY(cudaStreamDestroy(stream));
  CUDA_TRY(cudaFree(p.a.workspace));
  return free_problem(&p);
}

int main(int argc, char **argv) {
  bench_options o;
  cudaDeviceProp device;
  FILE *csv = nullptr;
  int wrong = 0;
  if (parse_bench_options(argc, argv, &o)) return 2;
  CUDA_TRY(cudaGetDeviceProperties(&device, 0));
  if (o.csv && !(csv = fopen(o.csv, "w"))) {
    fprintf(stderr, "bench: %s cannot be created\n", o.csv);
    return 2;
  }
  if (csv) fprintf(csv, "dtype,dim,causal,batch,heads,seq,contender,us,tflops,relative_error\n");
  printf("%s, %d SMs; error: |o - o_simt| / |o_simt|\n", device.name, device.multiProcessorCount);
  printf("type  dim causal batch heads    seq         us  TFLOP/s      error  kernel\n");
  for (const problem_shape &s : shapes_of(o))
    if (bench_shape(s, o, csv, &wrong)) return 2;
  if (csv) fclose(csv);
  return wrong ? 1 : 0;
}
