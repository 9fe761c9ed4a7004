/* A C program on the C API, for machines without a GPU: the reference computes, and the launching calls refuse in words.
 *   program no-gpu    linked with a CUDA implementation, no GPU present: FLASHCORE_INVALID_DEVICE
 *   program no-cuda   linked with an implementation compiled as C:       FLASHCORE_BACKEND_NOT_COMPILED
 *   program gpu       linked with a CUDA implementation, GPU present:    the reference only */
#include "flashcore.h"
#if defined(FLASHCORE_TEST_QUANTISERS)
#include "flashcore_fp8.cuh"
#endif

#include <stdalign.h>
#include <stdio.h>
#include <string.h>

#if defined(FLASHCORE_TEST_USER_FILE)
int user_file_works(void);
#endif

static int failures;

static void expect(int ok, const char *what) {
  if (ok) return;
  printf("program.c: %s\n", what);
  failures++;
}

#if defined(FLASHCORE_TEST_QUANTISERS)
/* A row of ones: its scale makes them the largest number. */
static void expect_quantisers(int has_gpu, flashcore_status without) {
  alignas(16) float x[16];
  alignas(16) uint8_t out[16];
  float descale = 0.f;
  flashcore_error error;
  flashcore_fp8_quantise_args q;
  for (int i = 0; i < 16; ++i) x[i] = 1.f;
  flashcore_fp8_quantise_init(&q);
  q.dtype = FLASHCORE_F32;
  q.batch = q.rows = q.heads = 1;
  q.dim = 16;
  q.x = flashcore_bshd(x, 1, 1, 16);
  q.out = flashcore_bshd(out, 1, 1, 16);
  q.descale = &descale;
  expect(flashcore_fp8_quantise_reference(&q, &error) == FLASHCORE_OK && descale == 1.f / 448.f && out[15] == 0x7e,
         "the quantisers' reference fails");
  if (!has_gpu) expect(flashcore_fp8_quantise(&q, NULL, &error) == without, "flashcore_fp8_quantise does not give the status for no GPU");
}
#endif

int main(int argc, char **argv) {
  const char *mode = argc > 1 ? argv[1] : "";
  /* Zero queries make every logit 0, so each output row is the mean of the value rows. */
  float q[2 * 4] = {0}, k[3 * 4] = {0}, o[2 * 4] = {0};
  float v[3 * 4] = {3, 0, 1, 6, 0, 3, 1, 6, 0, 0, 1, 6};
  const float mean[4] = {1, 1, 1, 6};
  flashcore_error error;
  flashcore_attention a;
  flashcore_init(&a);
  a.dtype = FLASHCORE_F32;
  a.batch = a.heads_q = a.heads_kv = 1;
  a.seq_q = 2;
  a.seq_kv = 3;
  a.dim_qk = a.dim_v = 4;
  a.q = flashcore_bshd(q, 2, 1, 4);
  a.k = flashcore_bshd(k, 3, 1, 4);
  a.v = flashcore_bshd(v, 3, 1, 4);
  a.o = flashcore_bshd(o, 2, 1, 4);

  expect(flashcore_version() == FLASHCORE_VERSION, "the header and the implementation differ in version");
  expect(flashcore_reference_forward(&a, &error) == FLASHCORE_OK, "the reference refuses a plain problem");
  for (int i = 0; i < 8; ++i) expect(o[i] > mean[i % 4] - 1e-6f && o[i] < mean[i % 4] + 1e-6f, "the reference is wrong on uniform logits");
#if defined(FLASHCORE_TEST_USER_FILE)
  expect(user_file_works(), "the second file does not work");
#endif
  const flashcore_status expected = strcmp(mode, "no-cuda") == 0 ? FLASHCORE_BACKEND_NOT_COMPILED : FLASHCORE_INVALID_DEVICE;
#if defined(FLASHCORE_TEST_QUANTISERS)
  expect_quantisers(strcmp(mode, "gpu") == 0, expected);
#endif
  if (strcmp(mode, "gpu") != 0) {
    memset(&error, 0, sizeof error);
    expect(flashcore_supported(&a, -1, &error) == expected, "flashcore_supported does not give the status for a machine without a GPU");
    expect(error.message[0] != '\0', "flashcore_supported refuses without a message");
    memset(&error, 0, sizeof error);
    expect(flashcore_forward(&a, NULL, &error) == expected, "flashcore_forward does not give the status for a machine without a GPU");
    expect(error.message[0] != '\0', "flashcore_forward refuses without a message");
  }
  return failures ? 1 : 0;
}
