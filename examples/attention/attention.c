/* Demonstrates the C API from plain C11: attention on .npy files, every option of the descriptor from a flag, checked against the CPU reference.
 *
 *   nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -c examples/common/library.cu -o library.o
 *   gcc -std=c11 -O2 -I/usr/local/cuda/include -c examples/attention/attention.c -o attention.o
 *   nvcc attention.o library.o -o attention
 *   ./attention                                  layers of a small transformer on real text (tests/data), run from the repository's root
 *   ./attention --random --seq 4096 --causal     random data;  ./attention --help lists the options
 *
 * Exit code: 0 right, 1 the output differs from the reference, 2 bad input or a CUDA error. */
#include "../common/check_rows.h"
#include "../common/timing.h"

typedef struct options {
  const char *q, *k, *v, *bias, *seqlens_q, *seqlens_kv, *out_dir, *dtype, *backend;
  int random, batch, heads, heads_kv, seq, seq_kv, dim, dim_v, seed;
  int causal, top_left, alibi, lse_base2, cpu, splits, window_left, window_right, window, has_sink;
  float scale, softcap, sink;
} options;

enum option_kind { kFlag, kInt, kFloat, kText, kWindow };

typedef struct option_row {
  const char *name;
  enum option_kind kind;
  size_t at;
  const char *help;
} option_row;

#define FIELD(member) offsetof(options, member)
static const option_row kOptions[] = {
    {"--q", kText, FIELD(q), "FILE.npy: (batch, seq, heads, dim), fp16, fp32, or bf16 stored as uint16"},
    {"--k", kText, FIELD(k), "FILE.npy: (batch, seq_kv, heads_kv, dim)"},
    {"--v", kText, FIELD(v), "FILE.npy: (batch, seq_kv, heads_kv, dim_v)"},
    {"--random", kFlag, FIELD(random), "standard normal q, k, v of the sizes below instead of files"},
    {"--batch", kInt, FIELD(batch), "N (2)"},
    {"--heads", kInt, FIELD(heads), "N (8)"},
    {"--heads-kv", kInt, FIELD(heads_kv), "N (as --heads)"},
    {"--seq", kInt, FIELD(seq), "N (512)"},
    {"--seq-kv", kInt, FIELD(seq_kv), "N (as --seq)"},
    {"--dim", kInt, FIELD(dim), "N (64)"},
    {"--dim-v", kInt, FIELD(dim_v), "N (as --dim)"},
    {"--seed", kInt, FIELD(seed), "N (1)"},
    {"--dtype", kText, FIELD(dtype), "f16, bf16 or f32: what to compute in (the files' type; f16)"},
    {"--causal", kFlag, FIELD(causal), "query i sees keys up to i + seq_kv - seq_q"},
    {"--top-left", kFlag, FIELD(top_left), "query i sees keys up to i"},
    {"--window", kWindow, FIELD(window), "L,R: and only keys from L before to R after the diagonal; -1: unbounded"},
    {"--softcap", kFloat, FIELD(softcap), "C: logits become C tanh(logit / C)"},
    {"--alibi", kFlag, FIELD(alibi), "slopes 2^(-8 (h + 1) / heads)"},
    {"--bias", kText, FIELD(bias), "FILE.npy: fp32, (batch, heads, seq, seq_kv), each 1 for broadcast"},
    {"--sink", kFloat, FIELD(sink), "X: one more logit in every row's denominator"},
    {"--scale", kFloat, FIELD(scale), "X (1 / sqrt(dim))"},
    {"--seqlens-q", kText, FIELD(seqlens_q), "FILE.npy: int32 lengths in use, one per batch entry"},
    {"--seqlens-kv", kText, FIELD(seqlens_kv), "FILE.npy: the same for keys"},
    {"--lse-base2", kFlag, FIELD(lse_base2), "lse.npy holds log2 instead of the natural log"},
    {"--splits", kInt, FIELD(splits), "N: split the keys in N parts (automatic)"},
    {"--backend", kText, FIELD(backend), "simt, wmma, mma, wgmma, qmma or qgmma (the fastest that fits)"},
    {"--cpu", kFlag, FIELD(cpu), "use the CPU reference even where there is a GPU"},
    {"--out-dir", kText, FIELD(out_dir), "DIR: where o.npy and lse.npy go (.)"},
};
enum { kOptionCount = sizeof kOptions / sizeof kOptions[0], kSampleRows = 64 };

static int fail(const char *subject, const char *why) {
  fprintf(stderr, "attention: %s: %s\n", subject, why);
  return 2;
}

static int print_help(void) {
  printf("attention: computes softmax(scale Q K^T) V and its row LSE, on the GPU or with the CPU reference\n");
  for (int i = 0; i < kOptionCount; ++i) printf("  %-13s %s\n", kOptions[i].name, kOptions[i].help);
  return 0;
}

static int parse_value(options *o, const option_row *row, const char *text) {
  char *end = NULL, *field = (char *)o + row->at;
  if (row->kind == kText) *(const char **)(void *)field = text;
  if (row->kind == kInt) {
    const long value = strtol(text, &end, 10);
    if (value < 0 || value > 1 << 30) return fail(row->name, "wants a number from 0 to 2^30");
    *(int *)(void *)field = (int)value;
  }
  if (row->kind == kFloat) *(float *)(void *)field = strtof(text, &end);
  if (row->kind == kWindow) {
    o->window = 1;
    o->window_left = (int)strtol(text, &end, 10);
    if (*end != ',') return fail(row->name, "wants two numbers, as in --window 128,0");
    o->window_right = (int)strtol(end + 1, &end, 10);
  }
  if (end && (end == text || *end)) return fail(row->name, "wants a number");
  if (row->at == FIELD(sink)) o->has_sink = 1;
  return 0;
}

static int parse_options(int argc, char **argv, options *o) {
  for (int i = 1; i < argc; ++i) {
    const option_row *row = kOptions;
    while (row < kOptions + kOptionCount && strcmp(row->name, argv[i]) != 0) ++row;
    if (row == kOptions + kOptionCount) return fail(argv[i], "is not an option; see --help");
    if (row->kind == kFlag) *(int *)(void *)((char *)o + row->at) = 1;
    else if (i + 1 == argc) return fail(row->name, "wants a value");
    else if (parse_value(o, row, argv[++i])) return 2;
  }
  if (!o->q != !o->k || !o->q != !o->v) return fail("--q, --k, --v", "come together");
  if (o->q && o->random) return fail("--random", "excludes --q, --k, --v");
  if (!o->heads_kv) o->heads_kv = o->heads;
  if (!o->seq_kv) o->seq_kv = o->seq;
  if (!o->dim_v) o->dim_v = o->dim;
  return 0;
}

static int dtype_of(const char *name) {
  return !strcmp(name, "f16") ? FLASHCORE_F16 : !strcmp(name, "bf16") ? FLASHCORE_BF16 : !strcmp(name, "f32") ? FLASHCORE_F32 : 0;
}

static const char *npy_type_of(int32_t dtype) { return dtype == FLASHCORE_F32 ? "f4" : dtype == FLASHCORE_F16 ? "f2" : "u2"; }

static void store_float(void *data, int32_t dtype, int64_t i, float x) {
  if (dtype == FLASHCORE_F32) ((float *)data)[i] = x;
  else ((uint16_t *)data)[i] = dtype == FLASHCORE_F16 ? f16_from_float(x) : bf16_from_float(x);
}

/* A (batch, seq, heads, dim) file, converted to *dtype; *dtype 0 becomes the file's own type. */
static int read_tensor(const char *path, int32_t *dtype, npy_array *x) {
  const char *why = npy_read(path, x);
  if (why) return fail(path, why);
  const int32_t found = !strcmp(x->type, "f4") ? FLASHCORE_F32 : !strcmp(x->type, "f2") ? FLASHCORE_F16 : !strcmp(x->type, "u2") ? FLASHCORE_BF16 : 0;
  if (!found || x->dims != 4) return fail(path, "wants a (batch, seq, heads, dim) array of fp16, fp32, or uint16 that holds bf16");
  for (int n = 0; n < 4; ++n)
    if (x->shape[n] > FLASHCORE_MAX_SEQ) return fail(path, "has a size over 2^29");
  if (!*dtype) *dtype = found;
  if (*dtype == found) return 0;
  void *converted = malloc((size_t)x->items * (size_t)flashcore_dtype_bytes(*dtype) + 1);
  if (!converted) return fail(path, "memory is short");
  for (int64_t i = 0; i < x->items; ++i) store_float(converted, *dtype, i, element_as_float(x->data, found, i));
  free(x->data);
  x->data = converted;
  return 0;
}

/* Standard normal numbers by Box and Muller's method from a 64-bit congruential generator. */
static int random_tensor(int32_t dtype, int64_t batch, int64_t seq, int64_t heads, int64_t dim, uint64_t *state, npy_array *x) {
  const int64_t shape[4] = {batch, seq, heads, dim};
  memcpy(x->shape, shape, sizeof shape);
  x->items = batch * seq * heads * dim;
  x->data = malloc((size_t)x->items * (size_t)flashcore_dtype_bytes(dtype) + 1);
  if (!x->data) return fail("--random", "memory is short");
  for (int64_t i = 0; i < x->items; ++i) {
    double u[2];
    for (int n = 0; n < 2; ++n) {
      *state = *state * 6364136223846793005u + 1442695040888963407u;
      u[n] = ((double)(*state >> 40) + 0.5) / 16777216.0;
    }
    store_float(x->data, dtype, i, (float)(sqrt(-2.0 * log(u[0])) * cos(6.283185307179586 * u[1])));
  }
  return 0;
}

static int load_inputs(const options *o, int32_t *dtype, npy_array *q, npy_array *k, npy_array *v) {
  *dtype = o->dtype ? dtype_of(o->dtype) : 0;
  if (o->dtype && !*dtype) return fail("--dtype", "is f16, bf16 or f32");
  if (o->random) {
    uint64_t state = (uint64_t)o->seed * 0x9e3779b97f4a7c15u;
    if (!*dtype) *dtype = FLASHCORE_F16;
    return random_tensor(*dtype, o->batch, o->seq, o->heads, o->dim, &state, q) ||
           random_tensor(*dtype, o->batch, o->seq_kv, o->heads_kv, o->dim, &state, k) ||
           random_tensor(*dtype, o->batch, o->seq_kv, o->heads_kv, o->dim_v, &state, v);
  }
  if (read_tensor(o->q ? o->q : "tests/data/minilm_q.npy", dtype, q) || read_tensor(o->k ? o->k : "tests/data/minilm_k.npy", dtype, k) ||
      read_tensor(o->v ? o->v : "tests/data/minilm_v.npy", dtype, v))
    return 2;
  if (k->shape[0] != q->shape[0] || v->shape[0] != q->shape[0]) return fail("k, v", "have another batch size than q");
  if (k->shape[1] != v->shape[1] || k->shape[2] != v->shape[2]) return fail("k and v", "differ in sequence length or heads");
  return k->shape[3] == q->shape[3] ? 0 : fail("q and k", "differ in head dim");
}

static int fill_descriptor(const options *o, int32_t dtype, const npy_array *q, const npy_array *k, const npy_array *v, flashcore_attention *a) {
  flashcore_init(a);
  a->dtype = dtype;
  a->batch = (int32_t)q->shape[0];
  a->heads_q = (int32_t)q->shape[2];
  a->heads_kv = (int32_t)k->shape[2];
  a->seq_q = (int32_t)q->shape[1];
  a->seq_kv = (int32_t)k->shape[1];
  a->dim_qk = (int32_t)q->shape[3];
  a->dim_v = (int32_t)v->shape[3];
  a->q = flashcore_bshd(q->data, a->seq_q, a->heads_q, a->dim_qk);
  a->k = flashcore_bshd(k->data, a->seq_kv, a->heads_kv, a->dim_qk);
  a->v = flashcore_bshd(v->data, a->seq_kv, a->heads_kv, a->dim_v);
  a->scale = o->scale;
  a->softcap = o->softcap;
  a->causal = o->top_left ? FLASHCORE_CAUSAL_TOP_LEFT : o->causal ? FLASHCORE_CAUSAL_BOTTOM_RIGHT : FLASHCORE_CAUSAL_NONE;
  a->window = o->window;
  a->window_left = o->window_left;
  a->window_right = o->window_right;
  a->lse_base2 = o->lse_base2;
  a->num_splits = o->splits;
  for (int n = FLASHCORE_BACKEND_SIMT; o->backend && n <= FLASHCORE_BACKEND_QGMMA; ++n)
    if (!strcmp(o->backend, flashcore_backend_string((flashcore_backend)n))) a->backend = n;
  return o->backend && !a->backend ? fail(o->backend, "is not a backend") : 0;
}

static int read_lengths(const char *path, int32_t batch, const int32_t **lengths) {
  npy_array x;
  if (!path) return 0;
  const char *why = npy_read(path, &x);
  if (why) return fail(path, why);
  if (strcmp(x.type, "i4") != 0 || x.items != batch) return fail(path, "wants one int32 per batch entry");
  *lengths = x.data;
  return 0;
}

static int read_bias(const char *path, flashcore_attention *a, int64_t *items) {
  npy_array x;
  if (!path) return 0;
  const char *why = npy_read(path, &x);
  if (why) return fail(path, why);
  const int64_t full[4] = {a->batch, a->heads_q, a->seq_q, a->seq_kv};
  int64_t *strides[4] = {&a->bias_stride_b, &a->bias_stride_h, &a->bias_stride_q, &a->bias_stride_kv}, stride = 1;
  if (strcmp(x.type, "f4") != 0 || x.dims != 4) return fail(path, "wants a (batch, heads, seq, seq_kv) array of fp32");
  for (int n = 3; n >= 0; --n) {
    if (x.shape[n] != 1 && x.shape[n] != full[n]) return fail(path, "has a size that is neither 1 nor the problem's");
    *strides[n] = x.shape[n] == 1 ? 0 : stride; /* 0 broadcasts */
    stride *= x.shape[n];
  }
  a->bias = x.data;
  a->bias_dtype = FLASHCORE_F32;
  *items = x.items;
  return 0;
}

/* Arrays that options add, and the outputs, on the host. */
static int add_arrays(const options *o, flashcore_attention *a, int64_t *bias_items) {
  if (read_lengths(o->seqlens_q, a->batch, &a->seqlens_q) || read_lengths(o->seqlens_kv, a->batch, &a->seqlens_kv)) return 2;
  if (read_bias(o->bias, a, bias_items)) return 2;
  const size_t heads = (size_t)a->heads_q + 1, rows = (size_t)a->batch * (size_t)a->seq_q * (size_t)a->heads_q + 1;
  float *slopes = malloc(heads * sizeof(float)), *sink = malloc(heads * sizeof(float));
  void *out = calloc(rows * (size_t)a->dim_v, (size_t)flashcore_dtype_bytes(a->dtype));
  a->lse = calloc(rows, sizeof(float));
  if (!slopes || !sink || !out || !a->lse) return fail("outputs", "memory is short");
  for (int h = 0; h < a->heads_q; ++h) {
    slopes[h] = exp2f(-8.f * (float)(h + 1) / (float)a->heads_q);
    sink[h] = o->sink;
  }
  if (o->alibi) a->alibi_slopes = slopes;
  if (o->has_sink) a->sink = sink;
  a->o = flashcore_bshd(out, a->seq_q, a->heads_q, a->dim_v);
  return 0;
}

static double visible_pairs(const flashcore_attention *a) {
  flashcore_attention bounds = *a;
  double pairs = 0;
  if (!a->window || a->window_left < 0) bounds.window_left = FLASHCORE_UNBOUNDED;
  if (!a->window || a->window_right < 0) bounds.window_right = FLASHCORE_UNBOUNDED;
  for (int32_t b = 0; b < a->batch; ++b) {
    const flashcore_sequence s = flashcore_sequence_at(a, b);
    for (int32_t i = 0; i < s.len_q; ++i) {
      const flashcore_range keys = flashcore_visible_keys(&bounds, i, s.len_q, s.len_kv);
      pairs += keys.last > keys.first ? keys.last - keys.first : 0;
    }
  }
  return pairs;
}

/* *pointer: host memory, or NULL (left so); becomes device memory with the same contents. */
static int upload(const void **pointer, size_t bytes) {
  void *device = NULL;
  if (!*pointer) return 0;
  CUDA_TRY(cudaMalloc(&device, bytes ? bytes : 1));
  CUDA_TRY(cudaMemcpy(device, *pointer, bytes, cudaMemcpyHostToDevice));
  *pointer = device;
  return 0;
}

static int64_t tensor_bytes(const flashcore_attention *a, int64_t seq, int64_t heads, int64_t dim) {
  return a->batch * seq * heads * dim * flashcore_dtype_bytes(a->dtype);
}

/* d: a copy of h with every pointer on the device. Freed by the end of the process. */
static int to_device(const flashcore_attention *h, int64_t bias_items, flashcore_attention *d) {
  const size_t heads = (size_t)h->heads_q, batch = (size_t)h->batch, rows = batch * heads * (size_t)h->seq_q;
  *d = *h;
  return upload((const void **)&d->q.data, (size_t)tensor_bytes(h, h->seq_q, h->heads_q, h->dim_qk)) ||
         upload((const void **)&d->k.data, (size_t)tensor_bytes(h, h->seq_kv, h->heads_kv, h->dim_qk)) ||
         upload((const void **)&d->v.data, (size_t)tensor_bytes(h, h->seq_kv, h->heads_kv, h->dim_v)) ||
         upload((const void **)&d->o.data, (size_t)tensor_bytes(h, h->seq_q, h->heads_q, h->dim_v)) ||
         upload((const void **)&d->lse, rows * sizeof(float)) || upload(&d->bias, (size_t)bias_items * sizeof(float)) ||
         upload((const void **)&d->alibi_slopes, heads * sizeof(float)) || upload((const void **)&d->sink, heads * sizeof(float)) ||
         upload((const void **)&d->seqlens_q, batch * sizeof(int32_t)) || upload((const void **)&d->seqlens_kv, batch * sizeof(int32_t));
}

static int print_kernel(const flashcore_attention *d, double us) {
  flashcore_description what;
  flashcore_error error;
  const flashcore_status status = flashcore_describe(d, -1, &what, &error);
  if (status != FLASHCORE_OK) return refused(status, &error);
  printf("kernel   %s: tile %d x %d, %d stages, %d threads, %d registers, %d bytes shared, %d blocks per SM, %d splits, grid %lld\n", what.kernel,
         what.block_q, what.block_kv, what.stages, what.threads, what.registers, what.shared_bytes, what.blocks_per_sm, what.splits,
         (long long)what.grid);
  printf("time     %.2f us\n", us);
  return 0;
}

static int run_on_gpu(const flashcore_attention *h, int64_t bias_items) {
  flashcore_attention d;
  flashcore_error error;
  cudaStream_t stream;
  double us = 0;
  if (to_device(h, bias_items, &d)) return 2;
  flashcore_status status = flashcore_workspace_size(&d, -1, &d.workspace_bytes, &error);
  if (status != FLASHCORE_OK) return refused(status, &error);
  if (d.workspace_bytes) {
    CUDA_TRY(cudaMalloc(&d.workspace, d.workspace_bytes));
    CUDA_TRY(cudaMemset(d.workspace, 0, d.workspace_bytes));
  }
  CUDA_TRY(cudaStreamCreate(&stream));
  status = flashcore_forward(&d, stream, &error);
  if (status != FLASHCORE_OK) return refused(status, &error);
  CUDA_TRY(cudaStreamSynchronize(stream));
  if (time_forward(&d, stream, &us) || print_kernel(&d, us)) return 2;
  printf("speed    %.1f TFLOP/s, masked pairs not counted\n", 2.0 * visible_pairs(h) * h->heads_q * (h->dim_qk + h->dim_v) / us * 1e-6);
  CUDA_TRY(cudaMemcpy(h->o.data, d.o.data, (size_t)tensor_bytes(h, h->seq_q, h->heads_q, h->dim_v), cudaMemcpyDeviceToHost));
  CUDA_TRY(cudaMemcpy(h->lse, d.lse, (size_t)h->batch * (size_t)h->heads_q * (size_t)h->seq_q * sizeof(float), cudaMemcpyDeviceToHost));
  return 0;
}

static int run_on_cpu(const flashcore_attention *h) {
  flashcore_error error;
  const flashcore_status status = flashcore_reference_forward(h, &error);
  return status == FLASHCORE_OK ? 0 : refused(status, &error);
}

static int report_rows(const flashcore_attention *h) {
  row_check check;
  flashcore_error error;
  const flashcore_status status = check_rows(h, kSampleRows, &check, &error);
  if (status != FLASHCORE_OK) return refused(status, &error);
  printf("error    %d rows against the CPU reference: o %.2e, lse %.2e: %s\n", check.rows, check.max_error, check.max_lse_error,
         check.failed ? "WRONG" : "right");
  return check.failed ? 1 : 0;
}

static int write_outputs(const options *o, const flashcore_attention *h) {
  char path[2][1024];
  const int64_t shape_o[4] = {h->batch, h->seq_q, h->heads_q, h->dim_v}, shape_lse[3] = {h->batch, h->heads_q, h->seq_q};
  for (int n = 0; n < 2; ++n) snprintf(path[n], sizeof path[n], "%s/%s", o->out_dir, n == 0 ? "o.npy" : "lse.npy");
  const char *why = npy_write(path[0], npy_type_of(h->dtype), 4, shape_o, h->o.data);
  if (why) return fail(path[0], why);
  why = npy_write(path[1], "f4", 3, shape_lse, h->lse);
  if (why) return fail(path[1], why);
  printf("wrote    %s, %s\n", path[0], path[1]);
  return 0;
}

int main(int argc, char **argv) {
  options o = {.batch = 2, .heads = 8, .seq = 512, .dim = 64, .seed = 1, .out_dir = "."};
  npy_array q = {.items = 0}, k = q, v = q;
  flashcore_attention h;
  int64_t bias_items = 0;
  int32_t dtype = 0, gpus = 0;
  if (argc > 1 && !strcmp(argv[1], "--help")) return print_help();
  if (parse_options(argc, argv, &o) || load_inputs(&o, &dtype, &q, &k, &v)) return 2;
  if (fill_descriptor(&o, dtype, &q, &k, &v, &h) || add_arrays(&o, &h, &bias_items)) return 2;
  printf("problem  batch %d, heads %d over %d, seq %d x %d, dims %d and %d, %s%s\n", h.batch, h.heads_q, h.heads_kv, h.seq_q, h.seq_kv, h.dim_qk,
         h.dim_v, dtype_name(dtype), o.q || o.random ? "" : ": the layers of a sentence encoder on a piece of text");
  if (!o.cpu && (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0)) {
    printf("device   no GPU here: the CPU reference computes everything\n");
    o.cpu = 1;
  }
  if (o.cpu ? run_on_cpu(&h) : run_on_gpu(&h, bias_items)) return 2;
  const int wrong = report_rows(&h);
  return write_outputs(&o, &h) ? 2 : wrong;
}
