/* Demonstrates the first call, from plain C: fill the descriptor, run it, read why when it is refused.
 *
 *   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -c examples/common/library.cu -o library.o
 *   gcc -std=c11 -I/usr/local/cuda/include -c examples/first_call/first_call.c -o first_call.o
 *   nvcc first_call.o library.o -o first_call && ./first_call
 *
 * With all logits equal, row i of a causal attention is the mean of the values 0 .. i, which are 0, 1, 2 ... here: i / 2.
 * Exit code: 0 right, or no GPU to try it on; 1 wrong; 2 a CUDA error or a refusal. */
#include "../common/npy.h"
#include <cuda_runtime_api.h>
#include <math.h>

// [readme:call]
#include "../../flashcore.h"

/* o = softmax(q k^T / sqrt(dim)) v, causal, for fp16 tensors (batch, seq, heads, dim) on the device; asynchronous. */
static int attend(const void *q, const void *k, const void *v, void *o, int batch, int seq, int heads, int dim, flashcore_stream stream) {
  flashcore_attention a;
  flashcore_error why;
  flashcore_init(&a);
  a.dtype = FLASHCORE_F16;
  a.batch = batch, a.heads_q = a.heads_kv = heads, a.seq_q = a.seq_kv = seq, a.dim_qk = a.dim_v = dim;
  a.q = flashcore_bshd(q, seq, heads, dim), a.k = flashcore_bshd(k, seq, heads, dim);
  a.v = flashcore_bshd(v, seq, heads, dim), a.o = flashcore_bshd(o, seq, heads, dim);
  a.causal = FLASHCORE_CAUSAL_BOTTOM_RIGHT;
  if (flashcore_forward(&a, stream, &why) == FLASHCORE_OK) return 0;
  fprintf(stderr, "refused: %s\n", why.message);
  return 1;
}
// [readme:end]

enum { kBatch = 1, kSeq = 100, kHeads = 2, kDim = 64, kItems = kBatch * kSeq * kHeads * kDim };

int main(void) {
  static uint16_t host[kItems];
  void *zeros, *v, *o;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("first_call: no GPU here, nothing was run\n");
    return 0;
  }
  for (int i = 0; i < kItems; ++i) host[i] = f16_from_float((float)(i / (kHeads * kDim)));
  if (cudaMalloc(&zeros, sizeof host) || cudaMalloc(&v, sizeof host) || cudaMalloc(&o, sizeof host)) return 2;
  if (cudaMemset(zeros, 0, sizeof host) || cudaMemcpy(v, host, sizeof host, cudaMemcpyHostToDevice)) return 2;
  if (attend(zeros, zeros, v, o, kBatch, kSeq, kHeads, kDim, NULL)) return 2;
  if (cudaMemcpy(host, o, sizeof host, cudaMemcpyDeviceToHost)) return 2;
  double worst = 0;
  for (int i = 0; i < kItems; ++i) {
    const double error = fabs((double)float_from_f16(host[i]) - 0.5 * (i / (kHeads * kDim)));
    if (!(error <= worst)) worst = error;
    if (error != error) break; /* NaN */
  }
  printf("first_call: largest error %.2e\n", worst);
  return worst <= 0.05 ? 0 : 1;
}
