/* timing.h · the time of one flashcore_forward on the GPU, from replays of a CUDA graph. C11 and C++17. */
#ifndef FLASHCORE_EXAMPLES_TIMING_H
#define FLASHCORE_EXAMPLES_TIMING_H

#include "../../flashcore.h"
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

/* Leaves the enclosing function, which returns int, with 2 when a CUDA call fails. */
#define CUDA_TRY(call)                                                                                                                               \
  do {                                                                                                                                               \
    const cudaError_t cuda_try_error = (call);                                                                                                       \
    if (cuda_try_error != cudaSuccess) {                                                                                                             \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_try_error));                                             \
      return 2;                                                                                                                                      \
    }                                                                                                                                                \
  } while (0)

static inline int refused(flashcore_status status, const flashcore_error *error) {
  fprintf(stderr, "FlashCore refused: %s (%s)\n", error->message, flashcore_status_string(status));
  return 2;
}

/* A graph of `launches` launches, ready to replay. */
static inline int capture_launches(const flashcore_attention *a, cudaStream_t stream, int launches, cudaGraphExec_t *exec) {
  cudaGraph_t graph;
  flashcore_status status = FLASHCORE_OK;
  flashcore_error error;
  CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches && status == FLASHCORE_OK; ++i) status = flashcore_forward(a, stream, &error);
  CUDA_TRY(cudaStreamEndCapture(stream, &graph));
  if (status != FLASHCORE_OK) return refused(status, &error);
  CUDA_TRY(cudaGraphInstantiate(exec, graph, 0));
  CUDA_TRY(cudaGraphDestroy(graph));
  return 0;
}

static inline int time_replay(cudaGraphExec_t exec, cudaStream_t stream, cudaEvent_t start, cudaEvent_t stop, float *ms) {
  CUDA_TRY(cudaEventRecord(start, stream));
  CUDA_TRY(cudaGraphLaunch(exec, stream));
  CUDA_TRY(cudaEventRecord(stop, stream));
  CUDA_TRY(cudaEventSynchronize(stop));
  CUDA_TRY(cudaEventElapsedTime(ms, start, stop));
  return 0;
}

static inline int compare_floats(const void *x, const void *y) {
  const float a = *(const float *)x, b = *(const float *)y;
  return (a > b) - (a < b);
}

/* Microseconds per launch: the median of 11 replays after a warm-up, each of 1 to 20 launches (about 2 ms). */
static inline int time_forward(const flashcore_attention *a, cudaStream_t stream, double *us) {
  enum { kReplays = 11 };
  float ms[kReplays], once = 0.f;
  cudaGraphExec_t exec;
  cudaEvent_t start, stop;
  CUDA_TRY(cudaEventCreate(&start));
  CUDA_TRY(cudaEventCreate(&stop));
  if (capture_launches(a, stream, 1, &exec)) return 2;
  for (int i = 0; i < 2; ++i)
    if (time_replay(exec, stream, start, stop, &once)) return 2;
  CUDA_TRY(cudaGraphExecDestroy(exec));
  const int launches = once < 0.1f ? 20 : once < 2.f ? (int)(2.f / once) : 1;
  if (capture_launches(a, stream, launches, &exec)) return 2;
  if (time_replay(exec, stream, start, stop, &once)) return 2;
  for (int i = 0; i < kReplays; ++i)
    if (time_replay(exec, stream, start, stop, &ms[i])) return 2;
  qsort(ms, kReplays, sizeof ms[0], compare_floats);
  *us = 1e3 * (double)ms[kReplays / 2] / launches;
  CUDA_TRY(cudaGraphExecDestroy(exec));
  CUDA_TRY(cudaEventDestroy(start));
  CUDA_TRY(cudaEventDestroy(stop));
  return 0;
}

#endif
