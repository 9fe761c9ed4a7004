/* flashcore.h · FlashCore 0.1.0 · MIT licence · attention for CUDA C and C++: the C API, the building blocks, a kernel for any GPU
 *
 * Use, from C or C++ (link the CUDA runtime and nothing else):
 *
 *   flashcore_attention a;
 *   flashcore_init(&a);
 *   a.dtype = FLASHCORE_F16;
 *   a.batch = 2; a.heads_q = a.heads_kv = 8; a.seq_q = a.seq_kv = 512; a.dim_qk = a.dim_v = 64;
 *   a.q = flashcore_bshd(q, 512, 8, 64);   a.k = flashcore_bshd(k, 512, 8, 64);
 *   a.v = flashcore_bshd(v, 512, 8, 64);   a.o = flashcore_bshd(o, 512, 8, 64);
 *   flashcore_error why;
 *   if (flashcore_forward(&a, stream, &why) != FLASHCORE_OK) puts(why.message);
 *
 * In exactly one file, before the headers that shall be compiled in (a .c file with flashcore.h alone gets validation and the CPU reference):
 *
 *   #define FLASHCORE_IMPLEMENTATION
 *   #include "flashcore_wmma.cuh"
 *
 * To build in parallel, more .cu files may each define FLASHCORE_BACKEND_IMPLEMENTATION and include one more backend header, or the same one with
 * FLASHCORE_NO_BF16 in one file and FLASHCORE_NO_F16 in another: backends register themselves before main. (In a static library, link those
 * objects as a whole: nothing else refers to them.)
 *
 * Contents
 *   1  version, options, feature tests        6  building blocks: reductions, exp2, cp.async, swizzle, matrix fragments
 *   2  C API: types and functions             7  online softmax
 *   3  plain helpers, host and device         8  SIMT kernel
 *   4  element types on the device            9  merge kernel
 *   5  score rules                           10  implementation: validation, CPU reference, dispatch
 */
#if defined(FLASHCORE_H) && defined(FLASHCORE_IMPLEMENTATION) && !defined(FLASHCORE_IMPLEMENTED)
#error "define FLASHCORE_IMPLEMENTATION before flashcore.h is first included in this file"
#endif
#if defined(FLASHCORE_STATIC) && defined(FLASHCORE_BACKEND_IMPLEMENTATION)
#error "with FLASHCORE_STATIC every file is on its own: define FLASHCORE_IMPLEMENTATION in it"
#endif
#ifndef FLASHCORE_H
#define FLASHCORE_H
#if defined(FLASHCORE_IMPLEMENTATION)
#define FLASHCORE_IMPLEMENTED
#endif

/* ================================================================================================================================
 * 1  Version, options, feature tests
 * ================================================================================================================================
 *   option                        where it must be set     what it does
 *   FLASHCORE_IMPLEMENTATION      in the implementing TU   compiles the C functions and the kernels of the headers included
 *   FLASHCORE_BACKEND_IMPLEMENTATION  in further TUs       compiles a backend's kernels only
 *   FLASHCORE_STATIC              in every TU              C functions become static: each TU that uses them implements them
 *   FLASHCORE_PREFIX              in every TU              a prefix for the C symbols, so that two vendored copies can live in one process
 *   FLASHCORE_NO_F32, _NO_F16, _NO_BF16  implementing TUs  leave that element type's kernels out
 *   FLASHCORE_HAS_PTX             implementing TUs         PTX is embedded for the oldest arch of the build: newer GPUs may use it
 */
#define FLASHCORE_VERSION_MAJOR 0
#define FLASHCORE_VERSION_MINOR 1
#define FLASHCORE_VERSION_PATCH 0
#define FLASHCORE_VERSION       (FLASHCORE_VERSION_MAJOR * 10000 + FLASHCORE_VERSION_MINOR * 100 + FLASHCORE_VERSION_PATCH)

#if defined(__CUDACC_RTC__)
typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#else
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#endif

#if defined(__CUDACC__)
#define FLASHCORE_INLINE static __forceinline__ __host__ __device__ /* runs on both sides; never leaves a symbol */
#define FLASHCORE_MEMBER __forceinline__ __host__ __device__
#define FLASHCORE_DEVICE static __forceinline__ __device__
#if defined(__CUDACC_RTC__)
#define FLASHCORE_KERNEL __global__ /* NVRTC: the module must show it */
#else
#define FLASHCORE_KERNEL static __global__
#endif
#else
#define FLASHCORE_INLINE static inline
#endif

#if defined(FLASHCORE_STATIC)
#if defined(__GNUC__)
#define FLASHCORE_API __attribute__((unused)) static
#else
#define FLASHCORE_API static
#endif
#elif defined(__cplusplus)
#define FLASHCORE_API extern "C"
#else
#define FLASHCORE_API extern
#endif

#if defined(FLASHCORE_PREFIX)
#define FLASHCORE_JOIN2(a, b)         a##b
#define FLASHCORE_JOIN(a, b)          FLASHCORE_JOIN2(a, b)
#define flashcore_supported           FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_supported)
#define flashcore_workspace_size      FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_workspace_size)
#define flashcore_forward             FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_forward)
#define flashcore_describe            FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_describe)
#define flashcore_merge               FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_merge)
#define flashcore_reference_forward   FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_reference_forward)
#define flashcore_reference_supported FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_reference_supported)
#define flashcore_status_string       FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_status_string)
#define flashcore_backend_string      FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_backend_string)
#define flashcore_version             FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_version)
#define flashcore_register_backend    FLASHCORE_JOIN(FLASHCORE_PREFIX, flashcore_register_backend)
#endif

/* ================================================================================================================================
 * 2  C API: types and functions
 * ================================================================================================================================ */

typedef struct CUstream_st *flashcore_stream; /* cudaStream_t; NULL is the default stream */

/* Numbers are stable: they never change meaning between versions. */
typedef enum flashcore_status {
  FLASHCORE_OK = 0,
  FLASHCORE_INVALID_STRUCT_SIZE = 1,
  FLASHCORE_NULL_POINTER = 2,
  FLASHCORE_INVALID_DTYPE = 3,
  FLASHCORE_INVALID_SIZE = 4,
  FLASHCORE_INVALID_GROUP = 5,
  FLASHCORE_INVALID_STRIDE = 6,
  FLASHCORE_MISALIGNED = 7,
  FLASHCORE_OFFSET_OVERFLOW = 8,
  FLASHCORE_INVALID_SCALE = 9,
  FLASHCORE_INVALID_MASK = 10,
  FLASHCORE_INVALID_LENGTHS = 11,
  FLASHCORE_INVALID_PAGE_TABLE = 12,
  FLASHCORE_INVALID_SPLIT = 13,
  FLASHCORE_ALIASED_OUTPUT = 14,
  FLASHCORE_INVALID_WORKSPACE = 15,
  FLASHCORE_INVALID_BACKEND = 16,
  FLASHCORE_INVALID_DEVICE = 17,
  FLASHCORE_UNSUPPORTED_DTYPE = 18,
  FLASHCORE_UNSUPPORTED_DIM = 19,
  FLASHCORE_UNSUPPORTED_FEATURE = 20,
  FLASHCORE_UNSUPPORTED_ARCH = 21,
  FLASHCORE_BACKEND_NOT_COMPILED = 22,
  FLASHCORE_CUDA_ERROR = 23
} flashcore_status;

typedef enum flashcore_dtype { /* 0 means "as dtype" where a field allows it */
                               FLASHCORE_F32 = 1,
                               FLASHCORE_F16 = 2,
                               FLASHCORE_BF16 = 3,
                               FLASHCORE_E4M3 = 4,
                               FLASHCORE_E5M2 = 5
} flashcore_dtype;

typedef enum flashcore_causal {
  FLASHCORE_CAUSAL_NONE = 0,
  FLASHCORE_CAUSAL_BOTTOM_RIGHT = 1, /* query i sees keys j <= i + seq_kv - seq_q */
  FLASHCORE_CAUSAL_TOP_LEFT = 2      /* query i sees keys j <= i */
} flashcore_causal;

typedef enum flashcore_backend {
  FLASHCORE_BACKEND_AUTO = 0,
  FLASHCORE_BACKEND_SIMT = 1,  /* plain CUDA, any GPU from sm_75 (this header) */
  FLASHCORE_BACKEND_WMMA = 2,  /* nvcuda::wmma, sm_75+ (flashcore_wmma.cuh) */
  FLASHCORE_BACKEND_MMA = 3,   /* mma.sync and cp.async, sm_80+ (flashcore_wmma.cuh) */
  FLASHCORE_BACKEND_WGMMA = 4, /* TMA and wgmma, sm_90a (flashcore_wgmma.cuh) */
  FLASHCORE_BACKEND_QMMA = 5,  /* fp8 K and V, Q in fp8 or 16 bits: mma.sync, sm_89 on (flashcore_fp8.cuh) */
  FLASHCORE_BACKEND_QGMMA = 6  /* the same: wgmma, sm_90a (flashcore_fp8.cuh) */
} flashcore_backend;

/* A (batch, seq, heads, dim) tensor in any memory order. Strides are in elements; the last dim is contiguous.
 * Strides of inputs may be 0 (broadcast) or negative. Packed sequences (cu_seqlens) ignore stride_b; paged K and V: stride_b is from page to page.
 * A stride along a dim of extent 1 is never looked at. */
typedef struct flashcore_tensor {
  void *data; /* inputs are only read */
  int64_t stride_b, stride_s, stride_h;
} flashcore_tensor;

/* One fp32 factor per (batch, kv head or q head) on the device, x = stored * factor. data NULL: 1.0. Strides 0: one for all.
 * Of O, what is stored is x * (1 / factor), rounded to nearest even; what is too large, infinity included, becomes the largest number; NaN stays NaN.
 * Packed sequences have factors per batch entry too. Device data, not checked: a factor that is negative or NaN gives NaN to rows that see a key. */
typedef struct flashcore_descale {
  const float *data;
  int64_t stride_b, stride_h;
} flashcore_descale;

/* One attention problem: O = softmax(rule(scale * Q K^T)) V. Set up with flashcore_init, then fill by name: a field left 0 is off or default.
 * Pointers are device pointers (host pointers for flashcore_reference_forward). */
typedef struct flashcore_attention {
  size_t struct_size; /* set by flashcore_init */

  int32_t dtype;    /* of Q, and of K, V, O unless said otherwise */
  int32_t dtype_kv; /* of K and V; 0: dtype; fp8 beside fp16 or bf16 Q: an fp8 cache */
  int32_t dtype_o;  /* 0: dtype (fp8: bf16) */

  int32_t batch, heads_q, heads_kv; /* heads_q a multiple of heads_kv; query head h reads KV head h / (heads_q / heads_kv) */
  int32_t seq_q, seq_kv;            /* lengths, or the longest length where lengths come from the device; seq_kv may be 0 */
  int32_t dim_qk, dim_v;            /* 1 .. 512 */

  flashcore_tensor q, k, v, o;
  float *lse;        /* (batch, heads_q, seq_q) fp32, contiguous: log of the row's denominator; NULL: not wanted */
  int32_t lse_base2; /* 1: log2 instead of the natural log */

  float scale;   /* finite, >= 0; 0: 1 / sqrt(dim_qk) */
  float softcap; /* c > 0: logits become c * tanh(logit / c), before bias and masks; 0: off */

  int32_t causal;                    /* flashcore_causal */
  int32_t window;                    /* 1: key j is visible iff i + off - window_left <= j <= i + off + window_right, off = seq_kv - seq_q */
  int32_t window_left, window_right; /* >= 0, or -1: unbounded on that side */

  const float *alibi_slopes; /* heads_q slopes: logit -= slope * |i + seq_kv - seq_q - j| */
  int64_t alibi_stride_b;    /* elements from batch to batch; 0: shared */

  const void *bias;                                                    /* added to the logits (after scale and softcap); may hold -inf */
  int32_t bias_dtype;                                                  /* F32, F16 or BF16; 0: dtype */
  int64_t bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_kv; /* elements; 0: broadcast */

  const uint32_t *mask_bits;                           /* bit j % 32 of word j / 32 of a row: 1 = key j is visible */
  int64_t mask_stride_b, mask_stride_h, mask_stride_q; /* words; 0: broadcast */

  const float *sink; /* heads_q logits (natural units), one more term exp(sink_h) in each row's denominator */

  const int32_t *cu_seqlens_q, *cu_seqlens_kv; /* batch + 1 row offsets into packed (total, heads, dim) tensors */
  int64_t total_q, total_kv;                   /* rows in the packed tensors; needed with cu_seqlens */
  const int32_t *seqlens_q, *seqlens_kv;       /* lengths in use, per batch entry, read on the device; clamped to [0, capacity] */

  const int32_t *page_table;    /* (batch, ceil(seq_kv / page_size)) page numbers; K and V are then (num_pages, page_size, heads_kv, dim) */
  int64_t page_table_stride_b;  /* elements from batch to batch */
  int32_t page_size, num_pages; /* pages outside [0, num_pages) are skipped: their keys are invisible */

  flashcore_descale q_descale, k_descale, v_descale; /* for fp8 inputs */
  flashcore_descale o_descale;                       /* for an fp8 O */
  float *o_amax; /* for an fp8 O: one float on the device, raised to the largest finite |O|, not yet divided by o_descale; the caller sets it to 0
                  * before; part of no other field's memory; NULL: not wanted */

  int32_t num_splits; /* > 1: split the keys in that many parts and merge; 0: automatic, 1: none */
  int32_t split_len;  /* > 0: parts of that many keys instead; results then do not depend on the batch size (multiple of 64) */

  int32_t backend; /* flashcore_backend; AUTO picks the fastest that serves the problem */

  void *workspace; /* flashcore_workspace_size bytes, 256-byte aligned; one per stream in flight */
  size_t workspace_bytes;
} flashcore_attention;

/* Why a call was refused: the field's name, the value found, the limit it broke, and all that in a sentence. */
typedef struct flashcore_error {
  const char *field;
  int64_t value, limit;
  char message[192];
} flashcore_error;

/* What flashcore_forward would launch. */
typedef struct flashcore_description {
  int32_t backend;                 /* flashcore_backend */
  char kernel[64];                 /* name and tile in words, e.g. "mma f16 d64 q128 kv64" */
  int32_t block_q, block_kv;       /* tile: query rows, keys */
  int32_t stages;                  /* K/V stages in shared memory */
  int32_t head_dim_qk, head_dim_v; /* dims of the instance (>= dim_qk, dim_v) */
  int32_t threads;                 /* per block */
  int32_t registers;               /* per thread, as loaded on this device */
  int32_t shared_bytes;            /* per block */
  int32_t blocks_per_sm;           /* resident at once on this device */
  int32_t packed_group;            /* query heads packed into the rows of a tile; 1: none */
  int32_t splits;
  int64_t grid; /* blocks */
} flashcore_description;

/* Combine partial results over disjoint sets of keys: O = sum_p w_p O_p, w_p = exp(lse_p - lse).
 * O_p: fp32 (parts, batch, heads_q, seq_q, dim_v), lse_p: fp32 natural log (parts, batch, heads_q, seq_q), both contiguous. */
typedef struct flashcore_merge_args {
  size_t struct_size; /* sizeof(flashcore_merge_args) */
  const float *o_parts, *lse_parts;
  int32_t parts, batch, heads, seq, dim;
  flashcore_tensor o;
  int32_t dtype_o;
  float *lse; /* (batch, heads, seq); NULL: not wanted */
  int32_t lse_base2;
  const float *sink; /* heads logits, added once; NULL: none */
} flashcore_merge_args;

#if !defined(__CUDACC_RTC__) && (!defined(FLASHCORE_STATIC) || defined(FLASHCORE_IMPLEMENTATION))

/* Every function: any thread, any stream; no allocation, no host synchronisation, no output to a terminal, no exception.
 * `error` may be NULL. A refused call launches nothing, writes nothing but *error and leaves CUDA's error state alone. */

/* Defaults in every field, and the caller's size of the struct, by which the library knows a caller of another version. */
static inline void flashcore_init(flashcore_attention *a) {
  memset(a, 0, sizeof *a);
  a->struct_size = sizeof *a;
}

/* The status that flashcore_forward would return on that device for everything the host can see. device: a CUDA ordinal; -1: the current one. */
FLASHCORE_API flashcore_status flashcore_supported(const flashcore_attention *a, int device, flashcore_error *error);

/* Bytes that a->workspace must have (often 0). */
FLASHCORE_API flashcore_status flashcore_workspace_size(const flashcore_attention *a, int device, size_t *bytes, flashcore_error *error);

/* Compute O (and LSE) on `stream` of the current device. Asynchronous; safe to capture in a CUDA graph. O may not alias an input.
 * First call per kernel and device: the CUDA runtime loads the kernel (about a millisecond). */
FLASHCORE_API flashcore_status flashcore_forward(const flashcore_attention *a, flashcore_stream stream, flashcore_error *error);

/* The kernel, tile, registers, shared memory and grid that flashcore_forward would use. Loads the kernel. */
FLASHCORE_API flashcore_status flashcore_describe(const flashcore_attention *a, int device, flashcore_description *out, flashcore_error *error);

/* Merge partial results by their LSE. Asynchronous on `stream` of the current device. */
FLASHCORE_API flashcore_status flashcore_merge(const flashcore_merge_args *m, flashcore_stream stream, flashcore_error *error);

/* The same problem on the host, in plain C with fp64 inside; host pointers. Covers the whole descriptor; backend, splits and workspace are ignored. */
FLASHCORE_API flashcore_status flashcore_reference_forward(const flashcore_attention *a, flashcore_error *error);
FLASHCORE_API flashcore_status flashcore_reference_supported(const flashcore_attention *a, flashcore_error *error);

FLASHCORE_API const char *flashcore_status_string(flashcore_status status); /* one sentence */
FLASHCORE_API const char *flashcore_backend_string(flashcore_backend backend);
FLASHCORE_API int flashcore_version(void); /* FLASHCORE_VERSION of the compiled implementation */

/* A kernel family that the dispatcher may choose; see section 10. Called once per backend before main, by a static object of its file. */
struct flashcore_backend_ops;
FLASHCORE_API void flashcore_register_backend(struct flashcore_backend_ops *ops);

#endif

/* ================================================================================================================================
 * 3  Plain helpers, host and device: addresses, lengths, visible keys
 * ================================================================================================================================ */

FLASHCORE_INLINE flashcore_tensor flashcore_strided(const void *data, int64_t stride_b, int64_t stride_s, int64_t stride_h) {
  flashcore_tensor t;
  t.data = (void *)(size_t)data;
  t.stride_b = stride_b;
  t.stride_s = stride_s;
  t.stride_h = stride_h;
  return t;
}
/* Contiguous (batch, seq, heads, dim). */
FLASHCORE_INLINE flashcore_tensor flashcore_bshd(const void *data, int64_t seq, int64_t heads, int64_t dim) {
  return flashcore_strided(data, seq * heads * dim, heads * dim, dim);
}
/* Contiguous (batch, heads, seq, dim). */
FLASHCORE_INLINE flashcore_tensor flashcore_bhsd(const void *data, int64_t seq, int64_t heads, int64_t dim) {
  return flashcore_strided(data, heads * seq * dim, dim, seq * dim);
}

#define FLASHCORE_UNBOUNDED (1 << 30) /* a resolved window side without a bound; sequences are at most 1 << 29 */
#define FLASHCORE_MAX_SEQ   (1 << 29)
#define FLASHCORE_MAX_DIM   512
#define FLASHCORE_LOG2E     1.4426950408889634
#define FLASHCORE_LN2       0.6931471805599453

FLASHCORE_INLINE int flashcore_is_fp8(int32_t dtype) { return dtype == FLASHCORE_E4M3 || dtype == FLASHCORE_E5M2; }
FLASHCORE_INLINE int32_t flashcore_kv_dtype(const flashcore_attention *a) { return a->dtype_kv ? a->dtype_kv : a->dtype; }
FLASHCORE_INLINE int32_t flashcore_bias_dtype(const flashcore_attention *a) { return a->bias_dtype ? a->bias_dtype : a->dtype; }
FLASHCORE_INLINE int32_t flashcore_o_dtype(const flashcore_attention *a) {
  return a->dtype_o ? a->dtype_o : flashcore_is_fp8(a->dtype) ? (int32_t)FLASHCORE_BF16 : a->dtype;
}

FLASHCORE_INLINE int32_t flashcore_window_side(const flashcore_attention *a, int32_t side) {
  return !a->window || side < 0 || side > FLASHCORE_UNBOUNDED ? FLASHCORE_UNBOUNDED : side;
}

/* How far the strides reach: packed rows are one batch entry, pages are batch entries of page_size rows. */
typedef struct flashcore_extents {
  int64_t batch_q, rows_q, batch_kv, rows_kv;
} flashcore_extents;

FLASHCORE_INLINE flashcore_extents flashcore_extents_of(const flashcore_attention *a) {
  flashcore_extents e;
  e.batch_q = a->cu_seqlens_q ? 1 : a->batch;
  e.rows_q = a->cu_seqlens_q ? a->total_q : a->seq_q;
  e.batch_kv = a->cu_seqlens_kv ? 1 : a->page_table ? a->num_pages : a->batch;
  e.rows_kv = a->cu_seqlens_kv ? a->total_kv : a->page_table ? a->page_size : a->seq_kv;
  return e;
}

/* WHY: a stride that only ever meets index 0 may be anything, but kernels form addresses of rows past the end too, and even a copy of no bytes wants
 * an aligned one. As 0 it does no harm. */
FLASHCORE_INLINE void flashcore_resolve_strides(flashcore_tensor *t, int64_t batch, int64_t rows, int32_t heads) {
  if (batch <= 1) t->stride_b = 0;
  if (rows <= 1) t->stride_s = 0;
  if (heads <= 1) t->stride_h = 0;
}

/* A valid descriptor with its defaults written out, and 0 for strides that nothing steps along: kernels and the reference see no other. Call it
 * before you launch a kernel of your own. */
FLASHCORE_INLINE void flashcore_resolve(const flashcore_attention *in, flashcore_attention *out) {
  const flashcore_extents e = flashcore_extents_of(in);
  *out = *in;
  out->dtype_kv = flashcore_kv_dtype(in);
  out->dtype_o = flashcore_o_dtype(in);
  out->bias_dtype = flashcore_bias_dtype(in);
  if (in->scale == 0.f) out->scale = (float)(1.0 / sqrt((double)in->dim_qk));
  out->window_left = flashcore_window_side(in, in->window_left);
  out->window_right = flashcore_window_side(in, in->window_right);
  flashcore_resolve_strides(&out->q, e.batch_q, e.rows_q, in->heads_q);
  flashcore_resolve_strides(&out->k, e.batch_kv, e.rows_kv, in->heads_kv);
  flashcore_resolve_strides(&out->v, e.batch_kv, e.rows_kv, in->heads_kv);
  flashcore_resolve_strides(&out->o, e.batch_q, e.rows_q, in->heads_q);
}

/* Bytes, 16 at most, that the addresses and lengths of all rows of 16-bit Q, K, V and O (resolved) are multiples of. */
FLASHCORE_INLINE int32_t flashcore_row_align(const flashcore_attention *a) {
  const flashcore_tensor *tensors[4];
  size_t bits = 16 | 2 * (size_t)(a->dim_qk | a->dim_v);
  int i;
  tensors[0] = &a->q, tensors[1] = &a->k, tensors[2] = &a->v, tensors[3] = &a->o;
  for (i = 0; i < 4; ++i) bits |= (size_t)tensors[i]->data | 2 * (size_t)(tensors[i]->stride_b | tensors[i]->stride_s | tensors[i]->stride_h);
  return (int32_t)(bits & (~bits + 1));
}

/* One batch entry: its lengths and where its rows start, in elements from the tensor's base (heads not included). */
typedef struct flashcore_sequence {
  int32_t len_q, len_kv;
  int64_t q, k, v, o; /* element offsets of row 0 */
} flashcore_sequence;

FLASHCORE_INLINE int32_t flashcore_clamp(int64_t x, int64_t lo, int64_t hi) { return (int32_t)(x < lo ? lo : x > hi ? hi : x); }

/* Lengths and row offsets of batch entry b. Reads cu_seqlens and seqlens where they live; whatever they hold, the result stays inside the tensors. */
FLASHCORE_INLINE flashcore_sequence flashcore_sequence_at(const flashcore_attention *a, int32_t b) {
  flashcore_sequence s;
  s.len_q = a->seq_q;
  s.len_kv = a->seq_kv;
  s.q = a->cu_seqlens_q ? 0 : b * a->q.stride_b;
  s.o = a->cu_seqlens_q ? 0 : b * a->o.stride_b;
  s.k = a->cu_seqlens_kv || a->page_table ? 0 : b * a->k.stride_b;
  s.v = a->cu_seqlens_kv || a->page_table ? 0 : b * a->v.stride_b;
  if (a->cu_seqlens_q) {
    int64_t row = a->cu_seqlens_q[b], end = a->cu_seqlens_q[b + 1];
    row = row < 0 ? 0 : row > a->total_q ? a->total_q : row;
    end = end > a->total_q ? a->total_q : end;
    s.len_q = flashcore_clamp(end - row, 0, a->seq_q);
    s.q = row * a->q.stride_s;
    s.o = row * a->o.stride_s;
  }
  if (a->cu_seqlens_kv) {
    int64_t row = a->cu_seqlens_kv[b], end = a->cu_seqlens_kv[b + 1];
    row = row < 0 ? 0 : row > a->total_kv ? a->total_kv : row;
    end = end > a->total_kv ? a->total_kv : end;
    s.len_kv = flashcore_clamp(end - row, 0, a->seq_kv);
    s.k = row * a->k.stride_s;
    s.v = row * a->v.stride_s;
  }
  if (a->seqlens_q) s.len_q = flashcore_clamp(a->seqlens_q[b], 0, s.len_q);
  if (a->seqlens_kv) s.len_kv = flashcore_clamp(a->seqlens_kv[b], 0, s.len_kv);
  return s;
}

/* Keys [first, last) that a query sees by length, causal rule and window; empty when first >= last. */
typedef struct flashcore_range {
  int32_t first, last;
} flashcore_range;

/* The range of query i. Both ends never fall as i grows, so a tile's range is [first of its first row, last of its last row).
 *   a: resolved (window sides are FLASHCORE_UNBOUNDED when off); i, len_q, len_kv <= FLASHCORE_MAX_SEQ */
FLASHCORE_INLINE flashcore_range flashcore_visible_keys(const flashcore_attention *a, int32_t i, int32_t len_q, int32_t len_kv) {
  const int32_t diagonal = i + len_kv - len_q;
  flashcore_range r;
  r.first = diagonal - a->window_left;
  r.last = diagonal + a->window_right + 1;
  if (a->causal == FLASHCORE_CAUSAL_BOTTOM_RIGHT && r.last > diagonal + 1) r.last = diagonal + 1;
  if (a->causal == FLASHCORE_CAUSAL_TOP_LEFT && r.last > i + 1) r.last = i + 1;
  if (r.first < 0) r.first = 0;
  if (r.last > len_kv) r.last = len_kv;
  return r;
}

/* Element offset of key j of a sequence from the base of K (or V: pass its tensor and row-0 offset), without the head; FLASHCORE_NO_KEY: its page is
 * not there. */
#define FLASHCORE_NO_KEY (-0x7fffffffffffffff - 1)
FLASHCORE_INLINE int64_t flashcore_key_offset(const flashcore_attention *a, const flashcore_tensor *t, int64_t row0, int32_t b, int32_t j) {
  if (!a->page_table) return row0 + j * t->stride_s;
  const int32_t page = a->page_table[b * a->page_table_stride_b + j / a->page_size];
  if (page < 0 || page >= a->num_pages) return FLASHCORE_NO_KEY;
  return page * t->stride_b + (j % a->page_size) * t->stride_s;
}

/* scale * log2(e), a normal number: a subnormal may be flushed to 0, and 0 * -inf would make a masked key NaN. */
FLASHCORE_INLINE float flashcore_scale_log2(float scale) {
  const double x = (double)scale * FLASHCORE_LOG2E;
  return x < 1.1754944e-38 ? 1.1754944e-38f : x > 3.402823466e+38 ? 3.402823466e+38f : (float)x;
}

FLASHCORE_INLINE int flashcore_dtype_bytes(int32_t dtype) {
  return dtype == FLASHCORE_F32 ? 4 : dtype == FLASHCORE_F16 || dtype == FLASHCORE_BF16 ? 2 : 1;
}

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

/* Feature tests on the device, always defined, 0 or 1 (0 in the host pass). */
#if defined(__CUDA_ARCH__)
#define FLASHCORE_HAS_SM80 (__CUDA_ARCH__ >= 800)
#define FLASHCORE_HAS_SM90 (__CUDA_ARCH__ >= 900)
#else
#define FLASHCORE_HAS_SM80 0
#define FLASHCORE_HAS_SM90 0
#endif

namespace flashcore {
inline namespace v0_1_0 {

/* ================================================================================================================================
 * 4  Element types on the device
 * ================================================================================================================================ */

template <typename T> struct element; /* element<T>: dtype, conversions, and a pair packed in 32 bits */

template <> struct element<float> {
  static constexpr int kDtype = FLASHCORE_F32;
  static FLASHCORE_MEMBER float load(float x) { return x; }
  static FLASHCORE_MEMBER float store(float x) { return x; }
};
template <> struct element<__half> {
  static constexpr int kDtype = FLASHCORE_F16;
  static FLASHCORE_MEMBER float load(__half x) { return __half2float(x); }
  static FLASHCORE_MEMBER __half store(float x) { return __float2half_rn(x); }
};
template <> struct element<__nv_bfloat16> {
  static constexpr int kDtype = FLASHCORE_BF16;
  static FLASHCORE_MEMBER float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static FLASHCORE_MEMBER __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
};

/* Element i of an array whose 16- or 32-bit type is known at run time only (bias, output). */
FLASHCORE_DEVICE float load_as_float(const void *p, int32_t dtype, int64_t i) {
  if (dtype == FLASHCORE_F32) return static_cast<const float *>(p)[i];
  if (dtype == FLASHCORE_F16) return __half2float(static_cast<const __half *>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
}
FLASHCORE_DEVICE void store_from_float(void *p, int32_t dtype, int64_t i, float x) {
  if (dtype == FLASHCORE_F32) static_cast<float *>(p)[i] = x;
  else if (dtype == FLASHCORE_F16) static_cast<__half *>(p)[i] = __float2half_rn(x);
  else static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(x);
}

/* ================================================================================================================================
 * 5  Score rules
 * ================================================================================================================================
 * A rule turns a logit (natural units, already scaled) into the logit that is exponentiated; -INFINITY hides the key.
 * Length, causal and window masks are not rules: they are ranges (flashcore_visible_keys) and cost nothing on inner tiles.
 * Your own rule is any copyable type with kActive = true and this operator(); kernels take it as their one functor parameter. */

struct score_position {
  int32_t batch, head, query, key; /* head: query head; query, key: within the sequence */
  int32_t len_q, len_kv;
};

struct no_rule {
  static constexpr bool kActive = false;
  FLASHCORE_MEMBER float operator()(const flashcore_attention &, float x, const score_position &) const { return x; }
};

/* Everything the descriptor can ask for, as run-time branches: softcap, then bias, then ALiBi, then the bit mask. */
struct descriptor_rule {
  static constexpr bool kActive = true;
  __forceinline__ __device__ float operator()(const flashcore_attention &a, float x, const score_position &p) const {
    if (a.softcap > 0.f) x = a.softcap * tanhf(x / a.softcap);
    if (a.bias)
      x += load_as_float(a.bias, a.bias_dtype,
                         p.batch * a.bias_stride_b + p.head * a.bias_stride_h + p.query * a.bias_stride_q + p.key * a.bias_stride_kv);
    if (a.alibi_slopes) x -= a.alibi_slopes[p.batch * a.alibi_stride_b + p.head] * fabsf((float)(p.query + p.len_kv - p.len_q - p.key));
    if (a.mask_bits) {
      const uint32_t word = a.mask_bits[p.batch * a.mask_stride_b + p.head * a.mask_stride_h + p.query * a.mask_stride_q + (p.key >> 5)];
      if (!((word >> (p.key & 31)) & 1u)) x = -INFINITY;
    }
    return x;
  }
};

/* The descriptor's rules, then the user's. */
template <typename User> struct user_rule {
  static constexpr bool kActive = true;
  User user;
  __forceinline__ __device__ float operator()(const flashcore_attention &a, float x, const score_position &p) const {
    return user(a, descriptor_rule{}(a, x, p), p);
  }
};

/* ================================================================================================================================
 * 6  Building blocks
 * ================================================================================================================================ */

/* 2^x, relative error 2^-22; 2^-inf = 0.   ptx  ex2.approx.ftz.f32, sm_75 */
FLASHCORE_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* Division by a run-time constant in two instructions: n / d = (mulhi(n, magic) + n) >> shift for 0 <= n < 2^31, d >= 1. */
struct divisor {
  int32_t d;
  uint32_t magic, shift;
  FLASHCORE_MEMBER int32_t quotient(int32_t n) const {
#if defined(__CUDA_ARCH__)
    return (int32_t)((__umulhi((uint32_t)n, magic) + (uint32_t)n) >> shift);
#else
    return (int32_t)(((uint32_t)(((uint64_t)(uint32_t)n * magic) >> 32) + (uint32_t)n) >> shift);
#endif
  }
};
FLASHCORE_INLINE divisor make_divisor(int32_t d) {
  uint32_t shift = 0;
  while (((uint64_t)1 << shift) < (uint64_t)d) ++shift;
  return {d, (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - (uint64_t)d)) / (uint64_t)d + 1), shift};
}

/* A value that is the same in all lanes, in a form that lets the compiler see it: addresses and branches then use uniform registers.
 *   callers  all 32 lanes, converged */
FLASHCORE_DEVICE int32_t warp_uniform(int32_t x) { return __shfl_sync(0xffffffffu, x, 0); }
FLASHCORE_DEVICE int64_t warp_uniform(int64_t x) { return __shfl_sync(0xffffffffu, (long long)x, 0); }

/* Maximum, sum over the four lanes of a quad (lanes 4g .. 4g+3).   callers  all 32 lanes, converged */
FLASHCORE_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FLASHCORE_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* x[j] of lane t becomes x[t] of lane j, within each quad.   callers  all 32 lanes, converged */
FLASHCORE_DEVICE void quad_transpose(uint32_t (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const bool upper = threadIdx.x & bit;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? x[j] : x[j + bit], bit);
      if (upper) x[j] = other;
      else x[j + bit] = other;
    }
}

/* Maximum, sum over a warp.   callers  all 32 lanes, converged */
FLASHCORE_DEVICE float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}
FLASHCORE_DEVICE float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

/* 32-bit address of shared memory, as PTX wants it. */
FLASHCORE_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* Copy kBytes (4, 8 or 16) from global to shared memory without registers; `valid` = false writes zeros and reads nothing.
 *   ptx      cp.async.cg (16 bytes), cp.async.ca (4, 8), sm_80; below sm_80 loads and stores
 *   shapes   dst: 32-bit shared address; dst and src aligned to kBytes
 *   callers  any thread on its own
 *   orders   nothing until cp_async_wait_all and a barrier */
template <int kBytes> FLASHCORE_DEVICE void cp_async(uint32_t dst, const void *src, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if FLASHCORE_HAS_SM80
  const int bytes = valid ? kBytes : 0;
  if (kBytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(kBytes), "r"(bytes) : "memory");
#else
  const uint32_t *words = static_cast<const uint32_t *>(src);
  for (int i = 0; i < kBytes / 4; ++i) {
    const uint32_t word = valid ? words[i] : 0u;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst + 4 * i), "r"(word) : "memory");
  }
#endif
}
/* The same for 16 bytes that are known to be there: one register and one instruction less. */
FLASHCORE_DEVICE void cp_async_16(uint32_t dst, const void *src) {
#if FLASHCORE_HAS_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
#else
  cp_async<16>(dst, src, true);
#endif
}

/* 16 bytes whose address is a multiple of `align` = 16, 8, 4 or 2 into shared memory; from byte `live` on (a multiple of align) zeros, not read. */
FLASHCORE_DEVICE void copy_chunk(uint32_t dst, const char *src, int live, int align) {
  if (align >= 16) {
    cp_async<16>(dst, src, live > 0);
  } else if (align >= 8) {
    for (int i = 0; i < 16; i += 8) cp_async<8>(dst + i, src + i, i < live);
  } else if (align >= 4) {
    for (int i = 0; i < 16; i += 4) cp_async<4>(dst + i, src + i, i < live);
  } else {
    for (int i = 0; i < 16; i += 2) {
      const uint16_t x = i < live ? *reinterpret_cast<const uint16_t *>(src + i) : (uint16_t)0;
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(dst + i), "h"(x) : "memory");
    }
  }
}
/* The first `live` of eight 16-bit elements to global memory, one by one. */
FLASHCORE_DEVICE void store_chunk(char *dst, const uint4 &value, int live) {
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < live) reinterpret_cast<uint16_t *>(dst)[i] = (uint16_t)(words[i / 2] >> (i % 2 * 16));
}

/* Wait until all of this thread's copies have landed.
 *   ptx      cp.async.wait_all, sm_80; below sm_80 nothing to do
 *   callers  any thread on its own; a barrier must follow before other threads read */
FLASHCORE_DEVICE void cp_async_wait_all() {
#if FLASHCORE_HAS_SM80
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#if FLASHCORE_HAS_SM80 || !defined(__CUDA_ARCH__)
/* Close the group of the cp.async that this thread has issued; wait until at most kPending of its groups are in flight.
 *   ptx      cp.async.commit_group, cp.async.wait_group, sm_80, PTX 7.0
 *   callers  any thread on its own
 *   orders   what the finished groups have copied is visible to this thread; a barrier must follow before other threads read */
FLASHCORE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> FLASHCORE_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

/* A barrier in shared memory that completes a phase whenever `arrivals` have come; 8 bytes, 8-aligned. Unlike bar.sync it lets those who arrive go on.
 *   ptx      mbarrier, sm_80, PTX 7.0; try_wait sm_90, PTX 7.8
 *   shapes   barrier: 32-bit shared address; parity: 0 for phases 0, 2, 4 ... A wait for parity 1 passes before the first phase has completed
 *   callers  init: one thread, then a barrier of the block; arrive: any thread; wait: whole warps, which return converged
 *   orders   memory accesses before arrive come before those after the wait */
FLASHCORE_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FLASHCORE_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared.b64 state, [%0];\n\t}" ::"r"(barrier) : "memory");
}
FLASHCORE_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if FLASHCORE_HAS_SM90
#define FLASHCORE_MBARRIER_POLL "mbarrier.try_wait" /* sleeps for a while */
#else
#define FLASHCORE_MBARRIER_POLL "mbarrier.test_wait"
#endif
  /* WHY a loop in PTX: all lanes of a warp get the same answer, but of a loop in C++ the compiler must assume that it scatters them, and keeps nothing
   * behind it in uniform registers. */
  asm volatile("{\n\t.reg .pred p;\nPOLL:\n\t" FLASHCORE_MBARRIER_POLL ".parity.shared.b64 p, [%0], %1;\n\t@!p bra POLL;\n\t}" ::"r"(barrier),
               "r"(parity)
               : "memory");
#undef FLASHCORE_MBARRIER_POLL
}
/* Arrives, once all cp.async that this thread has issued are complete.   ptx  cp.async.mbarrier.arrive.noinc, sm_80, PTX 7.0 */
FLASHCORE_DEVICE void cp_async_arrive(uint32_t barrier) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory"); }
#endif

/* A tile of rows in shared memory whose 16-byte chunks are permuted, so that eight consecutive rows of one chunk column lie in distinct
 * banks (ldmatrix reads them so) for every row length that is a multiple of 16 bytes: chunk c of row r is stored at chunk c ^ f(r).
 *
 *   kRowBytes = 128, f(r) = r % 8:      row 0 | 0 1 2 3 4 5 6 7      kRowBytes = 64, f(r) = r / 2 % 4:   rows 0,1 | 0 1 2 3  0 1 2 3
 *                                       row 1 | 1 0 3 2 5 4 7 6                                          rows 2,3 | 1 0 3 2  1 0 3 2  */
template <int kRowBytes> struct swizzled_tile {
  static_assert(kRowBytes % 16 == 0, "rows are whole 16-byte chunks");
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1; /* chunks permuted among themselves */
  static FLASHCORE_MEMBER int mix(int row) { return row / (8 / kSpan) % kSpan; }
  static FLASHCORE_MEMBER uint32_t offset(int row, int chunk) { return (uint32_t)(row * kRowBytes + ((chunk ^ mix(row)) << 4)); }
};

#if FLASHCORE_HAS_SM80 || !defined(__CUDA_ARCH__)

/* Four 8x8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
 *   ptx      ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16, sm_75, PTX 6.5
 *   shapes   r[j]: matrix j, row lane / 4, columns 2 * (lane % 4) + {0, 1} (transposed: column lane / 4, rows ...)
 *   callers  all 32 lanes, converged */
FLASHCORE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FLASHCORE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/* d += a b, f32 accumulators.
 *   ptx      mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}.{f16,bf16}.f32, sm_80, PTX 7.0
 *   callers  all 32 lanes, converged
 *
 * Accumulator f32 d[4]; lane L, g = L / 4, t = L % 4:         A, 16x16, a[4], two elements each:    B, 16x8:
 *              col 2t   2t+1                                           k 2t,2t+1   k 2t+8,+9            n g
 *    row g    [ d0      d1 ]                                   row g   [  a0          a2 ]      k 2t,2t+1   [ b0 ]
 *    row g+8  [ d2      d3 ]                                   row g+8 [  a1          a3 ]      k 2t+8,+9   [ b1 ]
 * Two accumulators side by side, rounded and packed in pairs, are the A operand of the next product: P needs no shuffle. */
template <typename T> FLASHCORE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __forceinline__ __device__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __forceinline__ __device__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two floats rounded to T, `lo` in the low half.   ptx  cvt.rn.{f16x2,bf16x2}.f32, sm_80 */
template <typename T> FLASHCORE_DEVICE uint32_t pack2(float lo, float hi);
template <> __forceinline__ __device__ uint32_t pack2<__half>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <> __forceinline__ __device__ uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

/* What pack2 made of them. */
template <typename T> FLASHCORE_DEVICE void unpack2(uint32_t x, float &lo, float &hi);
template <> __forceinline__ __device__ void unpack2<__half>(uint32_t x, float &lo, float &hi) {
  asm("{\n\t.reg .b16 a, b;\n\tmov.b32 {a, b}, %2;\n\tcvt.f32.f16 %0, a;\n\tcvt.f32.f16 %1, b;\n\t}" : "=f"(lo), "=f"(hi) : "r"(x));
}
template <> __forceinline__ __device__ void unpack2<__nv_bfloat16>(uint32_t x, float &lo, float &hi) {
  lo = __uint_as_float(x << 16);
  hi = __uint_as_float(x & 0xffff0000u);
}

#endif /* FLASHCORE_HAS_SM80 */

/* Row and column of element i of an m16n8 accumulator. */
struct mma_accumulator {
  static FLASHCORE_MEMBER int row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
  static FLASHCORE_MEMBER int col(int lane, int i) { return 2 * (lane % 4) + i % 2; }
};

/* ================================================================================================================================
 * 7  Online softmax
 * ================================================================================================================================
 * A row's state after any set of keys: m, a reference near the largest logit; l = sum exp2(x - m); x in log2 units. O is kept times l.
 * Start: m = kEmptyMax, l = 0. The start value is the lowest finite float: every finite logit replaces it, it never meets -inf - -inf,
 * and masked keys stay IEEE -inf.
 *   source   online normaliser: arXiv 1805.02867, alg. 3; tiled: arXiv 2307.08691, alg. 1 */

#define FLASHCORE_EMPTY_MAX (-3.402823466e+38f)

struct softmax_state {
  float m, l;
};

/* 2^x, log2 x, 1 / x: the hardware's approximations on the device (relative 2^-22, absolute 2^-22, last bit). A true division would be a call. */
FLASHCORE_INLINE float softmax_exp2(float x) {
#if defined(__CUDA_ARCH__)
  return ex2(x);
#else
  return exp2f(x);
#endif
}
FLASHCORE_INLINE float softmax_log2(float x) {
#if defined(__CUDA_ARCH__)
  return __log2f(x);
#else
  return log2f(x);
#endif
}
FLASHCORE_INLINE float softmax_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.f), y); /* one Newton step: fp32 outputs feel the last bit */
#else
  return 1.f / x;
#endif
}

/* A rule's logit in log2 units. What is finite stays so: a bias of the lowest finite float masks without hiding, as it does in fp64. */
FLASHCORE_INLINE float softmax_log2_units(float x) {
  const float y = x * (float)FLASHCORE_LOG2E;
  return y == -INFINITY && x > y ? FLASHCORE_EMPTY_MAX : y;
}

/* A reference and a term for logits x that become log2 units by `unit`. The product is exact in the term but rounded in the reference, whose last
 * bit weighs 2^k when the logit is huge: rounded down, the row's largest term is at least 1; capped at 2^kCap, it cannot overflow. */
FLASHCORE_DEVICE float softmax_reference(float x, float unit) { return __fmul_rd(x, unit); }
template <int kCap> FLASHCORE_DEVICE float softmax_term(float x, float unit, float m) {
  const float y = fmaf(x, unit, -m);
  return ex2(y > (float)kCap ? (float)kCap : y); /* NaN stays */
}

/* Raise the reference to at least `x`; returns the factor that O must be multiplied with. */
FLASHCORE_INLINE float softmax_raise(softmax_state &s, float x) {
  const float m = fmaxf(s.m, x), factor = softmax_exp2(s.m - m);
  s.m = m;
  s.l *= factor;
  return factor;
}

/* State of the union of two disjoint sets of keys; fa, fb: the factors for their O. */
FLASHCORE_INLINE softmax_state softmax_merge(const softmax_state &a, const softmax_state &b, float &fa, float &fb) {
  softmax_state s;
  s.m = fmaxf(a.m, b.m);
  fa = softmax_exp2(a.m - s.m);
  fb = softmax_exp2(b.m - s.m);
  s.l = a.l * fa + b.l * fb;
  return s;
}

/* Add a sink's term (natural units) to the denominator; returns the factor for O. Once per row, after all keys and merges. */
FLASHCORE_INLINE float softmax_add_sink(softmax_state &s, float sink) {
  const float x = sink * (float)FLASHCORE_LOG2E, factor = softmax_raise(s, x);
  s.l += softmax_exp2(x - s.m);
  return factor;
}

/* Log of the denominator, natural or base 2, and its inverse (the factor for O).   edge  no term at all: -inf and 0 */
FLASHCORE_INLINE float softmax_lse(const softmax_state &s, bool base2) {
  if (s.l == 0.f) return -INFINITY;
  return (s.m + softmax_log2(s.l)) * (base2 ? 1.f : (float)FLASHCORE_LN2);
}
FLASHCORE_INLINE float softmax_inverse(const softmax_state &s) { return s.l == 0.f ? 0.f : softmax_reciprocal(s.l); }

/* End of a row: sink, LSE, and the factor for O in one call. */
FLASHCORE_INLINE float softmax_finish(softmax_state s, bool has_sink, float sink, bool base2, float &lse) {
  const float factor = has_sink ? softmax_add_sink(s, sink) : 1.f;
  lse = softmax_lse(s, base2);
  return factor * softmax_inverse(s);
}

/* ================================================================================================================================
 * 8  SIMT kernel
 * ================================================================================================================================
 * Attention in plain CUDA: any GPU, any dims, every mask and option of the descriptor. The fallback, and the algorithm to read first.
 *
 *   a block owns kBlockQ query rows of one head and walks the keys that any of them sees, kBlockKv at a time; a warp owns kWarpRows rows
 *   for each tile of keys:   S = Q K^T            lane j owns key j; K passes through the stage kChunk dims at a time
 *                            S = rule(S), masked  natural units; -inf hides a key
 *                            P = exp2(S - m)      m raised first to the tile's largest logit, O and l scaled with it
 *                            O += P V             lane owns dims 2 lane, 2 lane + 1 of each chunk; V passes through the same stage
 *   at the end:              O / l, LSE           or, with split keys, both as fp32 parts for the merge kernel
 *
 *   barrier         who            what it hands over
 *   __syncthreads   the block      key rows of this tile are known; the stage is free; the stage is full
 *   __syncwarp      32 lanes       P of the warp's rows, between softmax and P V                                                        */
struct simt_tile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 4, kBlockQ = kWarps * kWarpRows; /* four rows share every K and V value that a lane reads */
  static constexpr int kBlockKv = 32;                               /* one key per lane */
  static constexpr int kChunk = 64, kChunks = FLASHCORE_MAX_DIM / kChunk;
  static constexpr int kLd = kChunk + 4; /* rows of the stage in floats: eight lanes with a float4 each then hit distinct banks */
  static constexpr int kStageKeys = kBlockKv / kWarps;
};

/* What one block works on. */
struct simt_block {
  int32_t batch, head, kv_head, row0, split;
  flashcore_sequence sequence;
  flashcore_range keys; /* of the block's split */
};

/* Shared memory; behind it Q, [kBlockQ][simt_stride_q] f32. */
template <typename T> struct simt_memory {
  float stage[simt_tile::kBlockKv][simt_tile::kLd];                 /* one chunk of K or V */
  float4 p[simt_tile::kWarps][simt_tile::kBlockKv];                 /* x, y, z, w: the warp's rows 0 .. 3 */
  const T *k_row[simt_tile::kBlockKv], *v_row[simt_tile::kBlockKv]; /* first elements of the tile's keys; null: not there */
  simt_block block;
  flashcore_range keys[simt_tile::kBlockQ]; /* that each row sees; here rather than in registers, which O needs */
};

/* Floats from row to row of Q in shared memory: whole float4, the tail is zero. */
FLASHCORE_INLINE int simt_stride_q(int dim_qk) { return (dim_qk + 3) / 4 * 4; }

/* The grid is one-dimensional: query tile fastest, then head, batch, split. splits 0: the keys are not split. */
FLASHCORE_DEVICE simt_block simt_block_of(const flashcore_attention &a, uint32_t index, int splits, int keys_per_split) {
  const uint32_t tiles = ((uint32_t)a.seq_q + simt_tile::kBlockQ - 1) / simt_tile::kBlockQ;
  simt_block w;
  w.row0 = (int32_t)(index % tiles) * simt_tile::kBlockQ;
  index /= tiles;
  w.head = (int32_t)(index % (uint32_t)a.heads_q);
  index /= (uint32_t)a.heads_q;
  w.batch = (int32_t)(index % (uint32_t)a.batch);
  w.split = (int32_t)(index / (uint32_t)a.batch);
  w.kv_head = w.head / (a.heads_q / a.heads_kv);
  w.sequence = flashcore_sequence_at(&a, w.batch);
  const int64_t first = splits ? (int64_t)w.split * keys_per_split : 0;
  w.keys.first = flashcore_clamp(first, 0, w.sequence.len_kv);
  w.keys.last = splits ? flashcore_clamp(first + keys_per_split, 0, w.sequence.len_kv) : w.sequence.len_kv;
  return w;
}

/* The keys that row i sees of the block's split; none when i is past the end. */
FLASHCORE_DEVICE flashcore_range simt_visible(const flashcore_attention &a, const simt_block &w, int32_t i) {
  if (i >= w.sequence.len_q) return flashcore_range{0, 0};
  flashcore_range r = flashcore_visible_keys(&a, i, w.sequence.len_q, w.sequence.len_kv);
  if (r.first < w.keys.first) r.first = w.keys.first;
  if (r.last > w.keys.last) r.last = w.keys.last;
  return r;
}

/* A warp copies its rows of Q; rows past the end and the tail of a row become zero.   callers  a warp; a barrier must follow */
template <typename T> FLASHCORE_DEVICE void simt_load_q(float *q, const flashcore_attention &a, const simt_block &w, int32_t row0) {
  const int stride = simt_stride_q(a.dim_qk);
  for (int r = 0; r < simt_tile::kWarpRows; ++r) {
    const bool live = row0 + r < w.sequence.len_q;
    const T *row = static_cast<const T *>(a.q.data) + w.sequence.q + (row0 + r) * a.q.stride_s + w.head * a.q.stride_h;
    for (int d = threadIdx.x % 32; d < stride; d += 32) q[r * stride + d] = live && d < a.dim_qk ? element<T>::load(row[d]) : 0.f;
  }
}

/* Where key j of K (or V) starts; null past `last` and in a page that is not there. */
template <typename T>
FLASHCORE_DEVICE const T *simt_key_row(const flashcore_attention &a, const flashcore_tensor &t, int64_t row0, const simt_block &w, int32_t j,
                                       int32_t last) {
  if (j >= last) return nullptr;
  const int64_t offset = flashcore_key_offset(&a, &t, row0, w.batch, j);
  if (offset == FLASHCORE_NO_KEY) return nullptr;
  return static_cast<const T *>(t.data) + offset + w.kv_head * t.stride_h;
}

/* Copy dims [dim0, dim0 + kChunk) of a tile's rows to the stage as fp32, zeros where a row or a dim is missing: 0 * NaN would be NaN.
 *   callers  the block; barriers before the stage is written and after */
template <typename T> FLASHCORE_DEVICE void simt_stage(simt_memory<T> &sm, const T *const (&rows)[simt_tile::kBlockKv], int dim0, int dim) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key0 = warp * simt_tile::kStageKeys;
  float x[simt_tile::kStageKeys][2];
#pragma unroll
  for (int i = 0; i < simt_tile::kStageKeys; ++i) {
    const T *row = rows[key0 + i];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int d = dim0 + lane + 32 * c;
      x[i][c] = row && d < dim ? element<T>::load(__ldg(row + d)) : 0.f;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < simt_tile::kStageKeys; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) sm.stage[key0 + i][lane + 32 * c] = x[i][c];
  }
  __syncthreads();
}

/* s += Q K^T over the staged chunk; the lane's key, the warp's rows.   shapes  q: the chunk in row 0; dims: at most kChunk, a multiple of 4 */
FLASHCORE_DEVICE void simt_gemm_qk(float (&s)[simt_tile::kWarpRows], const float (&stage)[simt_tile::kBlockKv][simt_tile::kLd], const float *q,
                                   int stride_q, int dims) {
  const float *k_row = stage[threadIdx.x % 32];
  float part[simt_tile::kWarpRows] = {}; /* of this chunk: sums of few terms lose fewer bits */
#pragma unroll 2
  for (int d = 0; d < dims; d += 4) {
    const float4 k = *reinterpret_cast<const float4 *>(k_row + d);
#pragma unroll
    for (int r = 0; r < simt_tile::kWarpRows; ++r) {
      const float4 x = *reinterpret_cast<const float4 *>(q + r * stride_q + d);
      part[r] += x.x * k.x;
      part[r] += x.y * k.y;
      part[r] += x.z * k.z;
      part[r] += x.w * k.w;
    }
  }
#pragma unroll
  for (int r = 0; r < simt_tile::kWarpRows; ++r) s[r] += part[r];
}

/* o = factor o + P V over the staged chunk; the lane's two dims, the warp's rows. */
FLASHCORE_DEVICE void simt_gemm_pv(float2 (&o)[simt_tile::kWarpRows], const float (&factor)[simt_tile::kWarpRows],
                                   const float (&stage)[simt_tile::kBlockKv][simt_tile::kLd], const float4 (&p)[simt_tile::kBlockKv]) {
  constexpr int kPart = 8; /* keys: sums of few terms lose fewer bits */
  const int lane = threadIdx.x % 32;
  float2 sum[simt_tile::kWarpRows] = {}; /* of this tile */
#pragma unroll 1
  for (int j0 = 0; j0 < simt_tile::kBlockKv; j0 += kPart) {
    float2 part[simt_tile::kWarpRows] = {};
#pragma unroll
    for (int j = j0; j < j0 + kPart; ++j) {
      const float4 w = p[j];
      const float2 v = *reinterpret_cast<const float2 *>(&stage[j][2 * lane]);
      const float weight[simt_tile::kWarpRows] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int r = 0; r < simt_tile::kWarpRows; ++r) part[r] = make_float2(fmaf(weight[r], v.x, part[r].x), fmaf(weight[r], v.y, part[r].y));
    }
#pragma unroll
    for (int r = 0; r < simt_tile::kWarpRows; ++r) sum[r] = make_float2(sum[r].x + part[r].x, sum[r].y + part[r].y);
  }
#pragma unroll
  for (int r = 0; r < simt_tile::kWarpRows; ++r) o[r] = make_float2(fmaf(o[r].x, factor[r], sum[r].x), fmaf(o[r].y, factor[r], sum[r].y));
}

/* One online-softmax step of a row over the lane's key.
 *   units    s enters as Q K^T; returns p = exp2(logit - m) in [0, 1]; factor: what the row's O must be multiplied with
 *   callers  a warp, converged; no shared memory, no barrier
 *   edge     no visible key so far: p = 0, factor = 1 */
template <typename Rule>
FLASHCORE_DEVICE float simt_softmax(softmax_state &state, float s, const flashcore_attention &a, const Rule &rule, const score_position &at,
                                    bool visible, float &factor) {
  const float unit = Rule::kActive ? 1.f : flashcore_scale_log2(a.scale); /* of s, in log2 units */
  if (!visible) s = -INFINITY;
  else if (Rule::kActive) s = softmax_log2_units(rule(a, s * a.scale, at));
  factor = softmax_raise(state, softmax_reference(warp_max(s), unit));
  const float p = softmax_term<60>(s, unit, state.m);
  state.l += p;
  return p;
}

/* Where the parts of split keys lie in the workspace: O, then at the next multiple of 256 bytes the LSE. */
FLASHCORE_INLINE int64_t split_rows(const flashcore_attention &a) { return (int64_t)a.batch * a.heads_q * a.seq_q; }
FLASHCORE_INLINE int64_t split_lse_bytes(const flashcore_attention &a, int splits) {
  return (splits * split_rows(a) * a.dim_v * 4 + 255) & ~(int64_t)255;
}

/* Divide by the row's sum and store O and LSE: the results, or with split keys a part, which knows no sink.   callers  a warp, converged */
FLASHCORE_DEVICE void simt_store(const flashcore_attention &a, const simt_block &w, int splits, int32_t i, softmax_state state,
                                 const float2 (&o)[simt_tile::kChunks][simt_tile::kWarpRows], int r) {
  const int lane = threadIdx.x % 32;
  int64_t row = ((int64_t)w.batch * a.heads_q + w.head) * a.seq_q + i, offset = w.sequence.o + i * a.o.stride_s + w.head * a.o.stride_h;
  void *out = a.o.data;
  float *out_lse = a.lse;
  if (splits) {
    row += w.split * split_rows(a);
    offset = row * a.dim_v;
    out = a.workspace;
    out_lse = reinterpret_cast<float *>(static_cast<char *>(a.workspace) + split_lse_bytes(a, splits));
  }
  const bool has_sink = a.sink && !splits;
  float lse;
  state.l = warp_sum(state.l);
  const float factor = softmax_finish(state, has_sink, has_sink ? a.sink[w.head] : 0.f, a.lse_base2 && !splits, lse);
#pragma unroll
  for (int c = 0; c < simt_tile::kChunks; ++c) {
    const int d = c * simt_tile::kChunk + 2 * lane;
    const int32_t dtype = splits ? FLASHCORE_F32 : a.dtype_o;
    if (d < a.dim_v) store_from_float(out, dtype, offset + d, factor == 0.f ? 0.f : o[c][r].x * factor);
    if (d + 1 < a.dim_v) store_from_float(out, dtype, offset + d + 1, factor == 0.f ? 0.f : o[c][r].y * factor);
  }
  if (out_lse && lane == 0) out_lse[row] = lse;
}

/* O = softmax(rule(scale * Q K^T)) V.
 *   shapes   T: the type of Q, K, V; rule: section 5; splits: parts of keys_per_split keys each that go to the workspace, 0: straight to O
 *   callers  one-dimensional grid, tiles of queries * heads_q * batch * max(splits, 1) blocks of simt_tile::kThreads
 *            dynamic shared memory: sizeof(simt_memory<T>) + kBlockQ * simt_stride_q(dim_qk) * 4 bytes */
template <typename T, typename Rule>
FLASHCORE_KERNEL void __launch_bounds__(simt_tile::kThreads, 3)
    simt_kernel(const __grid_constant__ flashcore_attention a, Rule rule, int splits, int keys_per_split) {
  using tile = simt_tile;
  extern __shared__ float4 simt_shared[];
  simt_memory<T> &sm = *reinterpret_cast<simt_memory<T> *>(simt_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride_q = simt_stride_q(a.dim_qk);
  if (threadIdx.x == 0) sm.block = simt_block_of(a, blockIdx.x, splits, keys_per_split);
  __syncthreads();
  const simt_block &w = sm.block;
  if (w.row0 >= w.sequence.len_q) return;

  const int32_t row0 = w.row0 + warp * tile::kWarpRows, block_end = min(w.row0 + tile::kBlockQ, w.sequence.len_q);
  const bool live = row0 < w.sequence.len_q;                                         /* a warp without rows only helps to load */
  float *q = reinterpret_cast<float *>(&sm + 1) + warp * tile::kWarpRows * stride_q; /* the warp's rows */
  simt_load_q<T>(q, a, w, row0);

  softmax_state state[tile::kWarpRows]; /* m is the same in all lanes, l is the lane's share of the sum */
  float2 o[tile::kChunks][tile::kWarpRows] = {};
#pragma unroll
  for (int r = 0; r < tile::kWarpRows; ++r) state[r] = softmax_state{FLASHCORE_EMPTY_MAX, 0.f};
  if (threadIdx.x < tile::kBlockQ) sm.keys[threadIdx.x] = simt_visible(a, w, w.row0 + (int32_t)threadIdx.x);

  const int32_t last = simt_visible(a, w, block_end - 1).last;
  for (int32_t key0 = simt_visible(a, w, w.row0).first; key0 < last; key0 += tile::kBlockKv) {
    if (warp == 0) sm.k_row[lane] = simt_key_row<T>(a, a.k, w.sequence.k, w, key0 + lane, last);
    if (warp == 1) sm.v_row[lane] = simt_key_row<T>(a, a.v, w.sequence.v, w, key0 + lane, last);
    __syncthreads();

    float s[tile::kWarpRows] = {}; /* s = Q K^T   [kWarpRows], one key per lane */
    for (int d = 0; d < a.dim_qk; d += tile::kChunk) {
      simt_stage<T>(sm, sm.k_row, d, a.dim_qk);
      if (live) simt_gemm_qk(s, sm.stage, q + d, stride_q, min(tile::kChunk, stride_q - d));
    }

    float p[tile::kWarpRows], factor[tile::kWarpRows]; /* s becomes p */
#pragma unroll
    for (int r = 0; r < tile::kWarpRows; ++r) {
      const score_position at = {w.batch, w.head, row0 + r, key0 + lane, w.sequence.len_q, w.sequence.len_kv};
      const flashcore_range keys = sm.keys[warp * tile::kWarpRows + r];
      p[r] = simt_softmax(state[r], s[r], a, rule, at, sm.k_row[lane] && at.key >= keys.first && at.key < keys.last, factor[r]);
    }
    sm.p[warp][lane] = make_float4(p[0], p[1], p[2], p[3]);
    __syncwarp();

#pragma unroll
    for (int c = 0; c < tile::kChunks; ++c) { /* o = factor o + P V */
      if (c * tile::kChunk >= a.dim_v) continue;
      simt_stage<T>(sm, sm.v_row, c * tile::kChunk, a.dim_v);
      if (live) simt_gemm_pv(o[c], factor, sm.stage, sm.p[warp]);
    }
  }

#pragma unroll
  for (int r = 0; r < tile::kWarpRows; ++r)
    if (row0 + r < w.sequence.len_q) simt_store(a, w, splits, row0 + r, state[r], o, r);
}

/* ================================================================================================================================
 * 9  Merge kernel
 * ================================================================================================================================
 * Combines the parts of split keys by their LSE, always in the order of the parts. One warp per row, lanes over dims.
 *   shapes   o_parts, lse_parts as in flashcore_merge_args; of `a` only the outputs, sink and query lengths are read
 *   units    lse_parts natural log: differences are taken before they are scaled to log2, which keeps huge LSE exact
 *   edge     a part with LSE -inf contributes nothing, even when its O is NaN; all parts: O = 0 and LSE = -inf, or the sink
 *   callers  one-dimensional grid of any size, blocks of 32 * kWarps threads; rows past the end of a sequence are not written */
template <int kWarps>
FLASHCORE_KERNEL void __launch_bounds__(32 * kWarps)
    merge_kernel(const __grid_constant__ flashcore_attention a, const float *o_parts, const float *lse_parts, int parts) {
  const int lane = threadIdx.x % 32;
  const int64_t total = split_rows(a), step = (int64_t)gridDim.x * kWarps;
  for (int64_t row = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32; row < total; row += step) {
    const int32_t i = (int32_t)(row % a.seq_q), head = (int32_t)(row / a.seq_q % a.heads_q), batch = (int32_t)(row / a.seq_q / a.heads_q);
    const flashcore_sequence sequence = flashcore_sequence_at(&a, batch);
    if (i >= sequence.len_q) continue;

    const float sink = a.sink ? a.sink[head] : -INFINITY;
    float m = fmaxf(FLASHCORE_EMPTY_MAX, sink); /* the reference, in natural units */
    for (int p = 0; p < parts; ++p) m = fmaxf(m, lse_parts[p * total + row]);
    float l = ex2((sink - m) * (float)FLASHCORE_LOG2E);
    for (int p = 0; p < parts; ++p) l += ex2((lse_parts[p * total + row] - m) * (float)FLASHCORE_LOG2E);
    const float factor = l == 0.f ? 0.f : 1.f / l;

    for (int d = lane; d < a.dim_v; d += 32) {
      float o = 0.f;
      for (int p = 0; p < parts; ++p) {
        const float lse = lse_parts[p * total + row];
        if (lse != -INFINITY) o += ex2((lse - m) * (float)FLASHCORE_LOG2E) * factor * o_parts[(p * total + row) * a.dim_v + d];
      }
      store_from_float(a.o.data, a.dtype_o, sequence.o + i * a.o.stride_s + head * a.o.stride_h + d, o);
    }
    if (a.lse && lane == 0) {
      const float lse = l == 0.f ? -INFINITY : m + log2f(l) * (float)FLASHCORE_LN2;
      a.lse[row] = a.lse_base2 ? lse * (float)FLASHCORE_LOG2E : lse;
    }
  }
}

} // namespace v0_1_0
} // namespace flashcore
#endif // __CUDACC__

#if !defined(__CUDACC_RTC__)

/* ================================================================================================================================
 * 10  Implementation: validation, CPU reference, dispatch
 * ================================================================================================================================ */

/* What a backend may know about the device; filled without touching CUDA's error state. */
typedef struct flashcore_device {
  int32_t ordinal, arch; /* arch: 10 * major + minor */
  int32_t sm_count;
  int32_t shared_per_sm; /* bytes */
} flashcore_device;

/* One backend's decision for one problem: pure arithmetic, nothing launched. */
typedef struct flashcore_plan {
  flashcore_description d; /* all but registers and blocks_per_sm, which the dispatcher reads from the loaded kernel */
  const void *kernel;      /* as cudaLaunchKernel takes it */
  size_t workspace_bytes;
  int32_t param[8]; /* the backend's own */
  int32_t is_slow;  /* another backend is faster at this problem (a small one, or an unaligned one), if one serves it */
} flashcore_plan;

typedef struct flashcore_backend_ops {
  int32_t backend; /* flashcore_backend */
  /* FLASHCORE_OK and a plan, or the refusal in words. a: validated and resolved. */
  flashcore_status (*plan)(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan, flashcore_error *error);
  flashcore_status (*launch)(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream, flashcore_error *error);
  struct flashcore_backend_ops *next; /* set by flashcore_register_backend */
} flashcore_backend_ops;

#if defined(FLASHCORE_IMPLEMENTATION) || defined(FLASHCORE_BACKEND_IMPLEMENTATION)
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Fill *error (unless NULL) and return `status`: every refusal goes through here, so *error is written on a refusal and only then. */
#if defined(__GNUC__)
__attribute__((format(printf, 6, 7)))
#endif
static inline flashcore_status
flashcore_refuse(flashcore_error *error, flashcore_status status, const char *field, int64_t value, int64_t limit, const char *format, ...) {
  if (error) {
    va_list args;
    error->field = field;
    error->value = value;
    error->limit = limit;
    va_start(args, format);
    vsnprintf(error->message, sizeof error->message, format, args);
    va_end(args);
  }
  return status;
}

#if defined(__CUDACC__)
/* Whether this file holds code for `device_arch` that was made for at least `min_arch` (both 10 * major + minor): machine code of the same major, or,
 * where FLASHCORE_HAS_PTX says that PTX is embedded, code for any older arch. Then the driver may take the oldest, so it must be new enough too. */
static inline bool flashcore_arch_compiled(int device_arch, int min_arch) {
#if defined(__CUDA_ARCH_LIST__)
  const int compiled[] = {__CUDA_ARCH_LIST__}; /* 100 * major + 10 * minor, ascending */
  for (const int arch : compiled)
    if (arch / 10 >= min_arch && arch / 10 <= device_arch && arch / 100 == device_arch / 10) return true;
#if defined(FLASHCORE_HAS_PTX)
  return compiled[0] / 10 >= min_arch && compiled[0] / 10 <= device_arch;
#else
  return false;
#endif
#else
  return device_arch >= min_arch;
#endif
}

/* Does the device run a kernel that needs min_arch, and does this file hold code for it? `kernel`: its name, for the refusal. */
static inline flashcore_status flashcore_check_arch(const flashcore_device *device, const char *kernel, int min_arch, flashcore_error *error) {
  if (device->arch < min_arch)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_ARCH, "device", device->arch, min_arch,
                            "the %s kernel for this dtype needs sm_%d, the device is sm_%d", kernel, min_arch, (int)device->arch);
  if (!flashcore_arch_compiled(device->arch, min_arch))
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "device", device->arch, min_arch,
                            "the %s kernel was not compiled for sm_%d (from sm_%d on)", kernel, (int)device->arch, min_arch);
  return FLASHCORE_OK;
}

/* What the tensor-core kernels for 16-bit types all ask for: one type, an arch, keys that are neither paged nor split. */
static inline flashcore_status flashcore_check_tensor_core(const flashcore_attention *a, const flashcore_device *device, const char *kernel,
                                                           int min_arch, flashcore_error *error) {
  if (a->dtype != FLASHCORE_F16 && a->dtype != FLASHCORE_BF16)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", a->dtype, 0, "dtype: the %s kernel serves fp16 and bf16, not %d", kernel,
                            (int)a->dtype);
  if (a->dtype_kv != a->dtype)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_kv", a->dtype_kv, a->dtype,
                            "dtype_kv: the %s kernel needs one type for all tensors (%d), not %d", kernel, (int)a->dtype, (int)a->dtype_kv);
  if (a->dtype_o != a->dtype)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", a->dtype_o, a->dtype,
                            "dtype_o: the %s kernel needs one type for all tensors (%d), not %d", kernel, (int)a->dtype, (int)a->dtype_o);
  const flashcore_status status = flashcore_check_arch(device, kernel, min_arch, error);
  if (status != FLASHCORE_OK) return status;
  if (a->page_table)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, "page_table", 1, 0, "page_table: the %s kernel does not read paged K and V",
                            kernel);
  if (a->num_splits > 1)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, "num_splits", a->num_splits, 1,
                            "num_splits: the %s kernel does not split the keys (%d asked)", kernel, (int)a->num_splits);
  if (a->split_len > 0)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_FEATURE, "split_len", a->split_len, 0,
                            "split_len: the %s kernel does not split the keys (%d asked)", kernel, (int)a->split_len);
  return FLASHCORE_OK;
}

/* The plan's grid: so many blocks for each batch entry, at most 2^31 - 1 in all. */
static inline flashcore_status flashcore_set_grid(const flashcore_attention *a, int64_t blocks, const char *kernel, flashcore_plan *plan,
                                                  flashcore_error *error) {
  if (blocks > INT32_MAX / a->batch)
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "batch", a->batch, INT32_MAX / blocks,
                            "batch: %d entries of %lld blocks pass the %s kernel's grid of 2^31 - 1", (int)a->batch, (long long)blocks, kernel);
  plan->d.grid = blocks * a->batch;
  return FLASHCORE_OK;
}

/* Does the descriptor ask for more than ranges of keys? */
static inline bool flashcore_has_rule(const flashcore_attention *a) { return a->softcap > 0.f || a->bias || a->alibi_slopes || a->mask_bits; }

static inline flashcore_status flashcore_cuda_refuse(flashcore_error *error, const char *call, cudaError_t code) {
  return flashcore_refuse(error, FLASHCORE_CUDA_ERROR, call, code, cudaSuccess, "%s: %s", call, cudaGetErrorString(code));
}

/* Let a kernel use as much dynamic shared memory as its plan asks for. Per device; cheap when it is set already. */
static inline cudaError_t flashcore_allow_shared(const flashcore_plan *plan) {
  if (plan->d.shared_bytes <= 40 * 1024) return cudaSuccess; /* 48 KiB need no leave, a kernel's static part included */
  return cudaFuncSetAttribute(plan->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan->d.shared_bytes);
}

/* Launch a plan: d.grid blocks of d.threads with d.shared_bytes of dynamic shared memory. Asynchronous on `stream`. */
static inline flashcore_status flashcore_launch(const flashcore_plan *plan, void **kernel_args, flashcore_stream stream, flashcore_error *error) {
  cudaError_t code = flashcore_allow_shared(plan);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaFuncSetAttribute", code);
  code = cudaLaunchKernel(plan->kernel, dim3((unsigned)plan->d.grid), dim3((unsigned)plan->d.threads), kernel_args, (size_t)plan->d.shared_bytes,
                          stream);
  return code == cudaSuccess ? FLASHCORE_OK : flashcore_cuda_refuse(error, "cudaLaunchKernel", code);
}
#endif
#endif

#if defined(FLASHCORE_IMPLEMENTATION) && defined(__CUDACC__)
/* --------------------------------------------------------------------------------------------------------------------------------
 * SIMT and merge kernels: plan and launch
 * -------------------------------------------------------------------------------------------------------------------------------- */

template <typename T> static const void *flashcore_simt_instance(bool rule) {
  return rule ? reinterpret_cast<const void *>(&flashcore::simt_kernel<T, flashcore::descriptor_rule>)
              : reinterpret_cast<const void *>(&flashcore::simt_kernel<T, flashcore::no_rule>);
}

/* The kernel for the descriptor's element type and options; NULL, and the option in *macro, where it was left out. */
static const void *flashcore_simt_select(const flashcore_attention *a, const char **macro) {
  const bool rule = flashcore_has_rule(a);
  const void *kernel = nullptr;
  *macro = a->dtype == FLASHCORE_F32 ? "FLASHCORE_NO_F32" : a->dtype == FLASHCORE_F16 ? "FLASHCORE_NO_F16" : "FLASHCORE_NO_BF16";
#if !defined(FLASHCORE_NO_F32)
  if (a->dtype == FLASHCORE_F32) kernel = flashcore_simt_instance<float>(rule);
#endif
#if !defined(FLASHCORE_NO_F16)
  if (a->dtype == FLASHCORE_F16) kernel = flashcore_simt_instance<__half>(rule);
#endif
#if !defined(FLASHCORE_NO_BF16)
  if (a->dtype == FLASHCORE_BF16) kernel = flashcore_simt_instance<__nv_bfloat16>(rule);
#endif
  (void)rule;
  return kernel;
}

static flashcore_status flashcore_simt_check(const flashcore_attention *a, const flashcore_device *device, flashcore_error *error) {
  if (a->dtype > FLASHCORE_BF16)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype", a->dtype, FLASHCORE_BF16,
                            "dtype: the simt kernel serves fp32, fp16 and bf16, not %d", (int)a->dtype);
  if (a->dtype_kv != a->dtype)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_kv", a->dtype_kv, a->dtype,
                            "dtype_kv: the simt kernel needs the type of Q (%d), not %d", (int)a->dtype, (int)a->dtype_kv);
  if (a->dtype_o > FLASHCORE_BF16)
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", a->dtype_o, FLASHCORE_BF16,
                            "dtype_o: the simt kernel writes fp32, fp16 and bf16, not %d", (int)a->dtype_o);
  return flashcore_check_arch(device, "simt", 75, error);
}

/* Parts and keys per part into param[0], param[1]; 0 parts: O is written without a merge. A split length always merges, even one part,
 * so that a sequence's result does not depend on how long its neighbours in the batch are. */
static void flashcore_simt_split(const flashcore_attention *a, flashcore_plan *plan) {
  const int32_t block_kv = flashcore::simt_tile::kBlockKv;
  int32_t parts = 0, keys = 0;
  if (a->split_len > 0) {
    keys = a->split_len;
    parts = a->seq_kv > keys ? (a->seq_kv - 1) / keys + 1 : 1;
  } else if (a->num_splits > 1) {
    parts = a->num_splits;
    keys = (int32_t)((((int64_t)a->seq_kv + parts - 1) / parts + block_kv - 1) / block_kv * block_kv);
  }
  plan->param[0] = parts;
  plan->param[1] = keys;
  plan->d.splits = parts ? parts : 1;
}

/* Blocks of the grid, at most 2^31 - 1. */
static flashcore_status flashcore_simt_grid(const flashcore_attention *a, flashcore_plan *plan, flashcore_error *error) {
  const struct {
    const char *field;
    int64_t count;
  } factors[3] = {{"heads_q", a->heads_q}, {"batch", a->batch}, {plan->param[0] && a->split_len ? "split_len" : "num_splits", plan->d.splits}};
  int64_t grid = ((int64_t)a->seq_q + plan->d.block_q - 1) / plan->d.block_q;
  for (const auto &factor : factors) {
    const int64_t limit = INT32_MAX / grid;
    if (factor.count > limit)
      return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, factor.field, factor.count, limit,
                              "%s: %lld times %lld blocks pass the simt kernel's grid of 2^31 - 1", factor.field, (long long)factor.count,
                              (long long)grid);
    grid *= factor.count;
  }
  plan->d.grid = grid;
  return FLASHCORE_OK;
}

static flashcore_status flashcore_simt_plan(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                            flashcore_error *error) {
  using tile = flashcore::simt_tile;
  flashcore_status status = flashcore_simt_check(a, device, error);
  if (status != FLASHCORE_OK) return status;
  *plan = flashcore_plan();
  const char *macro;
  plan->kernel = flashcore_simt_select(a, &macro);
  if (!plan->kernel)
    return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "dtype", a->dtype, 0, "dtype: the simt kernel was compiled with %s", macro);
  flashcore_description *d = &plan->d;
  d->backend = FLASHCORE_BACKEND_SIMT;
  d->block_q = tile::kBlockQ;
  d->block_kv = tile::kBlockKv;
  d->stages = 1;
  d->head_dim_qk = a->dim_qk;
  d->head_dim_v = a->dim_v;
  d->threads = tile::kThreads;
  d->packed_group = 1;
  d->shared_bytes = (int32_t)sizeof(flashcore::simt_memory<float>) + tile::kBlockQ * flashcore::simt_stride_q(a->dim_qk) * 4;
  flashcore_simt_split(a, plan);
  status = flashcore_simt_grid(a, plan, error);
  if (status != FLASHCORE_OK) return status;
  if (plan->param[0]) plan->workspace_bytes = (size_t)(flashcore::split_lse_bytes(*a, d->splits) + d->splits * flashcore::split_rows(*a) * 4);
  snprintf(d->kernel, sizeof d->kernel, "simt %s q%d kv%d",
           a->dtype == FLASHCORE_F32   ? "f32"
           : a->dtype == FLASHCORE_F16 ? "f16"
                                       : "bf16",
           (int)d->block_q, (int)d->block_kv);
  return FLASHCORE_OK;
}

/* Merge parts into the outputs of `a`, of which only those, sink and query lengths are read. */
static flashcore_status flashcore_merge_parts(const flashcore_attention *a, const float *o_parts, const float *lse_parts, int parts,
                                              flashcore_stream stream, flashcore_error *error) {
  const int warps = 4;
  const int64_t blocks = (flashcore::split_rows(*a) + warps - 1) / warps;
  flashcore_attention args = *a;
  void *kernel_args[4] = {&args, &o_parts, &lse_parts, &parts};
  flashcore_plan plan = flashcore_plan();
  plan.kernel = reinterpret_cast<const void *>(&flashcore::merge_kernel<warps>);
  plan.d.threads = 32 * warps;
  plan.d.grid = blocks < INT32_MAX ? blocks : INT32_MAX; /* the kernel walks over the rest */
  return flashcore_launch(&plan, kernel_args, stream, error);
}

static flashcore_status flashcore_simt_launch(const flashcore_attention *a, const flashcore_plan *plan, flashcore_stream stream,
                                              flashcore_error *error) {
  flashcore_attention args = *a;
  flashcore::descriptor_rule rule; /* as empty as no_rule: either kernel takes it */
  int parts = plan->param[0], keys_per_part = plan->param[1];
  void *kernel_args[4] = {&args, &rule, &parts, &keys_per_part};
  const flashcore_status status = flashcore_launch(plan, kernel_args, stream, error);
  if (status != FLASHCORE_OK || !parts) return status;
  const char *base = static_cast<const char *>(a->workspace);
  return flashcore_merge_parts(a, reinterpret_cast<const float *>(base),
                               reinterpret_cast<const float *>(base + flashcore::split_lse_bytes(*a, parts)), parts, stream, error);
}

static flashcore_backend_ops flashcore_simt_ops = {FLASHCORE_BACKEND_SIMT, flashcore_simt_plan, flashcore_simt_launch, nullptr};

/* m: validated. */
static flashcore_status flashcore_merge_launch(const flashcore_merge_args *m, flashcore_stream stream, flashcore_error *error) {
  flashcore_attention a = flashcore_attention();
  a.batch = m->batch;
  a.heads_q = m->heads;
  a.seq_q = m->seq;
  a.dim_v = m->dim;
  a.o = m->o;
  a.dtype_o = m->dtype_o;
  a.lse = m->lse;
  a.lse_base2 = m->lse_base2;
  a.sink = m->sink;
  return flashcore_merge_parts(&a, m->o_parts, m->lse_parts, m->parts, stream, error);
}
#endif

#if defined(FLASHCORE_IMPLEMENTATION)

/* Validation ---------------------------------------------------------------------------------------------------------------------
 * Pure arithmetic on the descriptor, in groups that may rely on the groups before them. */

#define FLASHCORE_TRY(call)                                                                                                                          \
  do {                                                                                                                                               \
    const flashcore_status try_status = (call);                                                                                                      \
    if (try_status != FLASHCORE_OK) return try_status;                                                                                               \
  } while (0)
#define FLASHCORE_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

#define FLASHCORE_MAX_ROWS   ((int64_t)1 << 40) /* batch * heads_q * seq_q: LSE and workspace offsets then fit 64 bits with room to spare */
#define FLASHCORE_MAX_OFFSET ((int64_t)1 << 60) /* bytes that one stride may span; the sum over a tensor's strides then fits 62 bits */

typedef struct flashcore_limit { /* low <= value <= high, or the status */
  flashcore_status status;
  const char *field;
  int64_t value, low, high;
} flashcore_limit;

static flashcore_status flashcore_check_limits(const flashcore_limit *limits, int count, flashcore_error *error) {
  for (int i = 0; i < count; ++i) {
    const flashcore_limit *x = &limits[i];
    if (x->value < x->low)
      return flashcore_refuse(error, x->status, x->field, x->value, x->low, "%s is %lld: must be at least %lld", x->field, (long long)x->value,
                              (long long)x->low);
    if (x->value > x->high)
      return flashcore_refuse(error, x->status, x->field, x->value, x->high, "%s is %lld: must be at most %lld", x->field, (long long)x->value,
                              (long long)x->high);
  }
  return FLASHCORE_OK;
}

typedef struct flashcore_pointer { /* NULL (unless required) or aligned to its element */
  const char *field;
  const void *address;
  int32_t alignment, required;
} flashcore_pointer;

static flashcore_status flashcore_check_pointers(const flashcore_pointer *pointers, int count, flashcore_error *error) {
  for (int i = 0; i < count; ++i) {
    const flashcore_pointer *x = &pointers[i];
    if (!x->address && x->required) return flashcore_refuse(error, FLASHCORE_NULL_POINTER, x->field, 0, 0, "%s is null: it is needed here", x->field);
    if ((uintptr_t)x->address % (uintptr_t)x->alignment != 0)
      return flashcore_refuse(error, FLASHCORE_MISALIGNED, x->field, (int64_t)(uintptr_t)x->address, x->alignment,
                              "%s is %p: must be a multiple of its element's %d bytes", x->field, x->address, (int)x->alignment);
  }
  return FLASHCORE_OK;
}

typedef struct flashcore_stride { /* |stride| * (extent - 1) elements of `bytes` stay addressable */
  const char *field;
  int64_t stride, extent;
  int32_t bytes;
} flashcore_stride;

static flashcore_status flashcore_check_strides(const flashcore_stride *strides, int count, flashcore_error *error) {
  for (int i = 0; i < count; ++i) {
    const flashcore_stride *x = &strides[i];
    if (x->extent <= 1) continue; /* never multiplied by anything but 0 */
    const int64_t limit = FLASHCORE_MAX_OFFSET / x->bytes / (x->extent - 1);
    if (x->stride > limit || x->stride < -limit)
      return flashcore_refuse(error, FLASHCORE_OFFSET_OVERFLOW, x->field, x->stride, limit,
                              "%s is %lld: its size must be at most %lld for %lld steps", x->field, (long long)x->stride, (long long)limit,
                              (long long)(x->extent - 1));
  }
  return FLASHCORE_OK;
}

/* Two rows of an output must not share an address (a zero stride is the mistake that happens). */
static flashcore_status flashcore_check_output_strides(const flashcore_stride *strides, int count, flashcore_error *error) {
  for (int i = 0; i < count; ++i)
    if (strides[i].extent > 1 && strides[i].stride == 0)
      return flashcore_refuse(error, FLASHCORE_INVALID_STRIDE, strides[i].field, 0, 1, "%s is 0: %lld results would share an address",
                              strides[i].field, (long long)strides[i].extent);
  return flashcore_check_strides(strides, count, error);
}

/* 0 <= x < infinity; NaN fails both comparisons. */
static flashcore_status flashcore_check_scale(const char *field, float x, flashcore_error *error) {
  if (x >= 0.f && x <= FLT_MAX) return FLASHCORE_OK;
  return flashcore_refuse(error, FLASHCORE_INVALID_SCALE, field, x < 0.f ? -1 : 0, 0, "%s is %g: must be finite and at least 0", field, (double)x);
}

static flashcore_status flashcore_validate_dtypes(const flashcore_attention *a, flashcore_error *error) {
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_DTYPE, "dtype", a->dtype, FLASHCORE_F32, FLASHCORE_E5M2},
      {FLASHCORE_INVALID_DTYPE, "dtype_kv", a->dtype_kv, 0, FLASHCORE_E5M2},
      {FLASHCORE_INVALID_DTYPE, "dtype_o", a->dtype_o, 0, FLASHCORE_E5M2},
      {FLASHCORE_INVALID_DTYPE, "bias_dtype", a->bias ? flashcore_bias_dtype(a) : a->bias_dtype, 0, FLASHCORE_BF16},
  };
  return flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error);
}

static flashcore_status flashcore_validate_sizes(const flashcore_attention *a, flashcore_error *error) {
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_SIZE, "batch", a->batch, 1, INT32_MAX},           {FLASHCORE_INVALID_SIZE, "heads_q", a->heads_q, 1, INT32_MAX},
      {FLASHCORE_INVALID_SIZE, "heads_kv", a->heads_kv, 1, INT32_MAX},     {FLASHCORE_INVALID_SIZE, "seq_q", a->seq_q, 1, FLASHCORE_MAX_SEQ},
      {FLASHCORE_INVALID_SIZE, "seq_kv", a->seq_kv, 0, FLASHCORE_MAX_SEQ}, {FLASHCORE_INVALID_SIZE, "dim_qk", a->dim_qk, 1, FLASHCORE_MAX_DIM},
      {FLASHCORE_INVALID_SIZE, "dim_v", a->dim_v, 1, FLASHCORE_MAX_DIM},
  };
  FLASHCORE_TRY(flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error));
  if (a->heads_q % a->heads_kv != 0)
    return flashcore_refuse(error, FLASHCORE_INVALID_GROUP, "heads_kv", a->heads_kv, a->heads_q, "heads_kv is %d: must divide heads_q = %d",
                            (int)a->heads_kv, (int)a->heads_q);
  const int64_t heads = (int64_t)a->batch * a->heads_q, most = FLASHCORE_MAX_ROWS / a->seq_q;
  if (heads > most)
    return flashcore_refuse(error, FLASHCORE_INVALID_SIZE, "batch", heads, most, "batch * heads_q is %lld: must be at most %lld with seq_q = %d",
                            (long long)heads, (long long)most, (int)a->seq_q);
  return FLASHCORE_OK;
}

static flashcore_status flashcore_validate_lengths(const flashcore_attention *a, flashcore_error *error) {
  const flashcore_pointer pointers[] = {
      {"cu_seqlens_q", a->cu_seqlens_q, 4, 0},
      {"cu_seqlens_kv", a->cu_seqlens_kv, 4, 0},
      {"seqlens_q", a->seqlens_q, 4, 0},
      {"seqlens_kv", a->seqlens_kv, 4, 0},
  };
  FLASHCORE_TRY(flashcore_check_pointers(pointers, FLASHCORE_COUNT(pointers), error));
  const flashcore_limit total_q = {FLASHCORE_INVALID_LENGTHS, "total_q", a->total_q, 1, INT32_MAX};
  const flashcore_limit total_kv = {FLASHCORE_INVALID_LENGTHS, "total_kv", a->total_kv, a->seq_kv > 0, INT32_MAX};
  if (a->cu_seqlens_q) FLASHCORE_TRY(flashcore_check_limits(&total_q, 1, error));
  if (a->cu_seqlens_kv) FLASHCORE_TRY(flashcore_check_limits(&total_kv, 1, error));
  return FLASHCORE_OK;
}

static flashcore_status flashcore_validate_pages(const flashcore_attention *a, flashcore_error *error) {
  if (!a->page_table) return FLASHCORE_OK;
  if (a->cu_seqlens_kv)
    return flashcore_refuse(error, FLASHCORE_INVALID_PAGE_TABLE, "page_table", 1, 0,
                            "page_table is set: must be null with cu_seqlens_kv (use seqlens_kv)");
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_PAGE_TABLE, "page_size", a->page_size, 1, FLASHCORE_MAX_SEQ},
      {FLASHCORE_INVALID_PAGE_TABLE, "num_pages", a->num_pages, 1, INT32_MAX},
      {FLASHCORE_INVALID_PAGE_TABLE, "page_table_stride_b", a->page_table_stride_b, 0, INT64_MAX},
  };
  const flashcore_pointer pointer = {"page_table", a->page_table, 4, 1};
  const flashcore_stride stride = {"page_table_stride_b", a->page_table_stride_b, a->batch, 4};
  FLASHCORE_TRY(flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error));
  FLASHCORE_TRY(flashcore_check_pointers(&pointer, 1, error));
  return flashcore_check_strides(&stride, 1, error);
}

static flashcore_status flashcore_validate_tensors(const flashcore_attention *a, flashcore_error *error) {
  const int32_t q_bytes = flashcore_dtype_bytes(a->dtype), kv_bytes = flashcore_dtype_bytes(flashcore_kv_dtype(a));
  const int32_t o_bytes = flashcore_dtype_bytes(flashcore_o_dtype(a)), has_keys = a->seq_kv > 0;
  const flashcore_extents e = flashcore_extents_of(a);
  const flashcore_pointer pointers[] = {
      {"q.data", a->q.data, q_bytes, 1},
      {"k.data", a->k.data, kv_bytes, has_keys},
      {"v.data", a->v.data, kv_bytes, has_keys},
      {"o.data", a->o.data, o_bytes, 1},
      {"lse", a->lse, 4, 0},
  };
  const flashcore_stride inputs[] = {
      {"q.stride_b", a->q.stride_b, e.batch_q, q_bytes},    {"q.stride_s", a->q.stride_s, e.rows_q, q_bytes},
      {"q.stride_h", a->q.stride_h, a->heads_q, q_bytes},   {"k.stride_b", a->k.stride_b, e.batch_kv, kv_bytes},
      {"k.stride_s", a->k.stride_s, e.rows_kv, kv_bytes},   {"k.stride_h", a->k.stride_h, a->heads_kv, kv_bytes},
      {"v.stride_b", a->v.stride_b, e.batch_kv, kv_bytes},  {"v.stride_s", a->v.stride_s, e.rows_kv, kv_bytes},
      {"v.stride_h", a->v.stride_h, a->heads_kv, kv_bytes},
  };
  const flashcore_stride outputs[] = {
      {"o.stride_b", a->o.stride_b, e.batch_q, o_bytes},
      {"o.stride_s", a->o.stride_s, e.rows_q, o_bytes},
      {"o.stride_h", a->o.stride_h, a->heads_q, o_bytes},
  };
  FLASHCORE_TRY(flashcore_check_pointers(pointers, FLASHCORE_COUNT(pointers), error));
  FLASHCORE_TRY(flashcore_check_strides(inputs, FLASHCORE_COUNT(inputs), error));
  FLASHCORE_TRY(flashcore_check_output_strides(outputs, FLASHCORE_COUNT(outputs), error));
  if (a->o.data == a->q.data || a->o.data == a->k.data || a->o.data == a->v.data)
    return flashcore_refuse(error, FLASHCORE_ALIASED_OUTPUT, "o.data", (int64_t)(uintptr_t)a->o.data, 0,
                            "o.data is also an input's address: O is written while inputs are read");
  return FLASHCORE_OK;
}

static flashcore_status flashcore_validate_masks(const flashcore_attention *a, flashcore_error *error) {
  const flashcore_limit flags[] = {
      {FLASHCORE_INVALID_MASK, "causal", a->causal, FLASHCORE_CAUSAL_NONE, FLASHCORE_CAUSAL_TOP_LEFT},
      {FLASHCORE_INVALID_MASK, "window", a->window, 0, 1},
      {FLASHCORE_INVALID_MASK, "window_left", a->window_left, a->window == 1 ? -1 : INT32_MIN, INT32_MAX},
      {FLASHCORE_INVALID_MASK, "window_right", a->window_right, a->window == 1 ? -1 : INT32_MIN, INT32_MAX},
  };
  const flashcore_pointer pointer = {"mask_bits", a->mask_bits, 4, 0};
  const flashcore_stride strides[] = {
      {"mask_stride_b", a->mask_stride_b, a->batch, 4},
      {"mask_stride_h", a->mask_stride_h, a->heads_q, 4},
      {"mask_stride_q", a->mask_stride_q, a->seq_q, 4},
  };
  FLASHCORE_TRY(flashcore_check_limits(flags, FLASHCORE_COUNT(flags), error));
  FLASHCORE_TRY(flashcore_check_pointers(&pointer, 1, error));
  return a->mask_bits ? flashcore_check_strides(strides, FLASHCORE_COUNT(strides), error) : FLASHCORE_OK;
}

static flashcore_status flashcore_validate_rules(const flashcore_attention *a, flashcore_error *error) {
  const int32_t bias_bytes = flashcore_dtype_bytes(flashcore_bias_dtype(a));
  const flashcore_pointer pointers[] = {{"alibi_slopes", a->alibi_slopes, 4, 0}, {"bias", a->bias, bias_bytes, 0}, {"sink", a->sink, 4, 0}};
  const flashcore_stride alibi = {"alibi_stride_b", a->alibi_stride_b, a->batch, 4};
  const flashcore_stride bias[] = {
      {"bias_stride_b", a->bias_stride_b, a->batch, bias_bytes},
      {"bias_stride_h", a->bias_stride_h, a->heads_q, bias_bytes},
      {"bias_stride_q", a->bias_stride_q, a->seq_q, bias_bytes},
      {"bias_stride_kv", a->bias_stride_kv, a->seq_kv, bias_bytes},
  };
  const flashcore_limit base = {FLASHCORE_INVALID_SCALE, "lse_base2", a->lse_base2, 0, 1};
  FLASHCORE_TRY(flashcore_check_scale("scale", a->scale, error));
  FLASHCORE_TRY(flashcore_check_scale("softcap", a->softcap, error));
  FLASHCORE_TRY(flashcore_check_limits(&base, 1, error));
  FLASHCORE_TRY(flashcore_check_pointers(pointers, FLASHCORE_COUNT(pointers), error));
  if (a->alibi_slopes) FLASHCORE_TRY(flashcore_check_strides(&alibi, 1, error));
  return a->bias ? flashcore_check_strides(bias, FLASHCORE_COUNT(bias), error) : FLASHCORE_OK;
}

/* A factor for a tensor that is not fp8 would be ignored by every kernel, so it is refused. */
static flashcore_status flashcore_validate_descale(const char *field, const flashcore_descale *d, int32_t dtype, int32_t batch, int32_t heads,
                                                   flashcore_error *error) {
  if (!d->data) return FLASHCORE_OK;
  if (!flashcore_is_fp8(dtype))
    return flashcore_refuse(error, FLASHCORE_INVALID_SCALE, field, dtype, FLASHCORE_E4M3,
                            "%s is set for dtype %d: must be null unless the tensor is fp8", field, (int)dtype);
  const flashcore_pointer pointer = {field, d->data, 4, 1};
  const flashcore_stride strides[] = {{field, d->stride_b, batch, 4}, {field, d->stride_h, heads, 4}};
  FLASHCORE_TRY(flashcore_check_pointers(&pointer, 1, error));
  return flashcore_check_strides(strides, FLASHCORE_COUNT(strides), error);
}

static flashcore_status flashcore_validate_descales(const flashcore_attention *a, flashcore_error *error) {
  const int32_t dtype_kv = flashcore_kv_dtype(a);
  FLASHCORE_TRY(flashcore_validate_descale("q_descale", &a->q_descale, a->dtype, a->batch, a->heads_q, error));
  FLASHCORE_TRY(flashcore_validate_descale("k_descale", &a->k_descale, dtype_kv, a->batch, a->heads_kv, error));
  FLASHCORE_TRY(flashcore_validate_descale("v_descale", &a->v_descale, dtype_kv, a->batch, a->heads_kv, error));
  return flashcore_validate_descale("o_descale", &a->o_descale, flashcore_o_dtype(a), a->batch, a->heads_q, error);
}

/* It is raised while everything else is read: o_descale is not its place. */
static flashcore_status flashcore_validate_amax(const flashcore_attention *a, flashcore_error *error) {
  const flashcore_pointer pointer = {"o_amax", a->o_amax, 4, 0};
  const void *others[] = {a->q.data,         a->k.data,         a->v.data,       a->o.data,     a->lse,       a->q_descale.data, a->k_descale.data,
                          a->v_descale.data, a->o_descale.data, a->alibi_slopes, a->bias,       a->mask_bits, a->sink,           a->cu_seqlens_q,
                          a->cu_seqlens_kv,  a->seqlens_q,      a->seqlens_kv,   a->page_table, a->workspace};
  if (!a->o_amax) return FLASHCORE_OK;
  if (!flashcore_is_fp8(flashcore_o_dtype(a)))
    return flashcore_refuse(error, FLASHCORE_INVALID_SCALE, "o_amax", flashcore_o_dtype(a), FLASHCORE_E4M3,
                            "o_amax is set for dtype_o %d: must be null unless O is fp8", (int)flashcore_o_dtype(a));
  FLASHCORE_TRY(flashcore_check_pointers(&pointer, 1, error));
  for (int i = 0; i < FLASHCORE_COUNT(others); ++i)
    if (a->o_amax == others[i])
      return flashcore_refuse(error, FLASHCORE_ALIASED_OUTPUT, "o_amax", (int64_t)(uintptr_t)a->o_amax, 0,
                              "o_amax is also the address of another field: it is raised while others are read and written");
  return FLASHCORE_OK;
}

static flashcore_status flashcore_validate_splits(const flashcore_attention *a, flashcore_error *error) {
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_SPLIT, "num_splits", a->num_splits, 0, INT32_MAX},
      {FLASHCORE_INVALID_SPLIT, "split_len", a->split_len, 0, FLASHCORE_MAX_SEQ},
  };
  FLASHCORE_TRY(flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error));
  if (a->split_len % 64 != 0)
    return flashcore_refuse(error, FLASHCORE_INVALID_SPLIT, "split_len", a->split_len, 64, "split_len is %d: must be a multiple of 64",
                            (int)a->split_len);
  if (a->split_len > 0 && a->num_splits > 1)
    return flashcore_refuse(error, FLASHCORE_INVALID_SPLIT, "num_splits", a->num_splits, 1, "num_splits is %d: must be 0 or 1 when split_len is set",
                            (int)a->num_splits);
  const int64_t parts = a->split_len > 0 ? (a->seq_kv + (int64_t)a->split_len - 1) / a->split_len : a->num_splits;
  const int64_t most = FLASHCORE_MAX_OFFSET / ((int64_t)a->batch * a->heads_q * a->seq_q * (a->dim_v + 1));
  if (parts > most)
    return flashcore_refuse(error, FLASHCORE_INVALID_SPLIT, a->split_len > 0 ? "split_len" : "num_splits", parts, most,
                            "%lld parts: must be at most %lld for the workspace to be addressable", (long long)parts, (long long)most);
  return FLASHCORE_OK;
}

/* Everything that can be said without a device. */
static flashcore_status flashcore_validate(const flashcore_attention *a, flashcore_error *error) {
  if (!a) return flashcore_refuse(error, FLASHCORE_NULL_POINTER, "attention", 0, 0, "attention is null: a descriptor is needed");
  if (a->struct_size != sizeof *a)
    return flashcore_refuse(error, FLASHCORE_INVALID_STRUCT_SIZE, "struct_size", (int64_t)a->struct_size, (int64_t)sizeof *a,
                            "struct_size is %lld: must be %lld (call flashcore_init; caller and library must be of one version)",
                            (long long)a->struct_size, (long long)sizeof *a);
  const flashcore_limit backend = {FLASHCORE_INVALID_BACKEND, "backend", a->backend, FLASHCORE_BACKEND_AUTO, FLASHCORE_BACKEND_QGMMA};
  FLASHCORE_TRY(flashcore_validate_dtypes(a, error));
  FLASHCORE_TRY(flashcore_validate_sizes(a, error));
  FLASHCORE_TRY(flashcore_validate_lengths(a, error));
  FLASHCORE_TRY(flashcore_validate_pages(a, error));
  FLASHCORE_TRY(flashcore_validate_tensors(a, error));
  FLASHCORE_TRY(flashcore_validate_masks(a, error));
  FLASHCORE_TRY(flashcore_validate_rules(a, error));
  FLASHCORE_TRY(flashcore_validate_descales(a, error));
  FLASHCORE_TRY(flashcore_validate_amax(a, error));
  FLASHCORE_TRY(flashcore_validate_splits(a, error));
  return flashcore_check_limits(&backend, 1, error);
}

/* Small public functions --------------------------------------------------------------------------------------------------------- */

FLASHCORE_API int flashcore_version(void) { return FLASHCORE_VERSION; }

FLASHCORE_API const char *flashcore_status_string(flashcore_status status) {
  switch (status) {
  case FLASHCORE_OK: return "The call succeeded.";
  case FLASHCORE_INVALID_STRUCT_SIZE: return "The descriptor's struct_size is not this library's: call flashcore_init.";
  case FLASHCORE_NULL_POINTER: return "A pointer that is needed is null.";
  case FLASHCORE_INVALID_DTYPE: return "An element type is not one of flashcore_dtype, or not allowed for that field.";
  case FLASHCORE_INVALID_SIZE: return "A size is below its least or above its greatest value.";
  case FLASHCORE_INVALID_GROUP: return "heads_kv does not divide heads_q.";
  case FLASHCORE_INVALID_STRIDE: return "A stride is 0 where results would share an address, or a layout is one that the call does not take.";
  case FLASHCORE_MISALIGNED: return "A pointer is not aligned to its element, or something not to the bytes that the call needs.";
  case FLASHCORE_OFFSET_OVERFLOW: return "A stride is so large that offsets would not fit in 64 bits.";
  case FLASHCORE_INVALID_SCALE:
    return "A scale, its granularity, the softcap or the LSE's base is outside its range, or a descale or amax is not of an fp8 tensor.";
  case FLASHCORE_INVALID_MASK: return "The causal rule or the window is outside its range.";
  case FLASHCORE_INVALID_LENGTHS: return "The totals of packed sequences are missing or outside their range.";
  case FLASHCORE_INVALID_PAGE_TABLE: return "The page table lacks its sizes, or is combined with packed keys.";
  case FLASHCORE_INVALID_SPLIT: return "The choice of splits is outside its range.";
  case FLASHCORE_ALIASED_OUTPUT: return "An output has the address of an input or of another output.";
  case FLASHCORE_INVALID_WORKSPACE: return "The workspace is missing, too small or not aligned to 256 bytes.";
  case FLASHCORE_INVALID_BACKEND: return "The backend is not one of flashcore_backend.";
  case FLASHCORE_INVALID_DEVICE: return "There is no such CUDA device.";
  case FLASHCORE_UNSUPPORTED_DTYPE: return "No compiled-in backend serves this combination of element types.";
  case FLASHCORE_UNSUPPORTED_DIM: return "No compiled-in backend serves these head dims.";
  case FLASHCORE_UNSUPPORTED_FEATURE: return "No compiled-in backend serves an option that is set.";
  case FLASHCORE_UNSUPPORTED_ARCH: return "The device cannot run the backend, or its architecture was not compiled in.";
  case FLASHCORE_BACKEND_NOT_COMPILED: return "The backend was not compiled into this program.";
  case FLASHCORE_CUDA_ERROR: return "A CUDA call failed; the error's value is its cudaError_t.";
  }
  return "This is not a flashcore_status.";
}

FLASHCORE_API const char *flashcore_backend_string(flashcore_backend backend) {
  switch (backend) {
  case FLASHCORE_BACKEND_AUTO: return "auto";
  case FLASHCORE_BACKEND_SIMT: return "simt";
  case FLASHCORE_BACKEND_WMMA: return "wmma";
  case FLASHCORE_BACKEND_MMA: return "mma";
  case FLASHCORE_BACKEND_WGMMA: return "wgmma";
  case FLASHCORE_BACKEND_QMMA: return "qmma";
  case FLASHCORE_BACKEND_QGMMA: return "qgmma";
  }
  return "unknown";
}

/* CPU reference: element types ---------------------------------------------------------------------------------------------------- */

/* A 16- or 8-bit float: sign, exponent, `mantissa` bits. Bit patterns are magnitudes, without the sign. */
typedef struct flashcore_float_format {
  int32_t mantissa, min_exponent; /* of the smallest normal number, 2^min_exponent */
  uint32_t sign, max_finite;
  uint32_t infinity; /* 0: the format has none */
  uint32_t overflow; /* what a value that is too large is stored as: infinity, or (fp8) the largest number */
  uint32_t nan;
} flashcore_float_format;

static const flashcore_float_format *flashcore_format(int32_t dtype) {
  static const flashcore_float_format formats[] = {
      {10, -14, 0x8000, 0x7bff, 0x7c00, 0x7c00, 0x7e00}, /* f16 */
      {7, -126, 0x8000, 0x7f7f, 0x7f80, 0x7f80, 0x7fc0}, /* bf16 */
      {3, -6, 0x80, 0x7e, 0, 0x7e, 0x7f},                /* e4m3 */
      {2, -14, 0x80, 0x7b, 0x7c, 0x7b, 0x7f},            /* e5m2 */
  };
  return &formats[dtype - FLASHCORE_F16];
}

/* The value of a pattern; exact, every format is a subset of double. */
static double flashcore_decode(int32_t dtype, uint32_t bits) {
  const flashcore_float_format *f = flashcore_format(dtype);
  const uint32_t magnitude = bits & (f->sign - 1);
  double x;
  if (magnitude > f->max_finite) {
    x = f->infinity && magnitude == f->infinity ? (double)INFINITY : (double)NAN;
  } else if (magnitude >> f->mantissa == 0) {
    x = ldexp((double)magnitude, f->min_exponent - f->mantissa); /* zero and subnormal numbers */
  } else {
    /* The exponent and mantissa fields stand side by side in both formats: align the mantissas and add the difference of the biases. */
    const uint64_t wide = ((uint64_t)magnitude << (52 - f->mantissa)) + ((uint64_t)(1023 + f->min_exponent - 1) << 52);
    memcpy(&x, &wide, sizeof x);
  }
  return bits & f->sign ? -x : x;
}

/* The pattern nearest to x, ties to even. One rounding, straight from double. */
static uint32_t flashcore_encode(int32_t dtype, double x) {
  const flashcore_float_format *f = flashcore_format(dtype);
  const uint32_t sign = signbit(x) ? f->sign : 0;
  const double size = fabs(x);
  if (x != x) return f->nan;
  if (size == 0.0) return sign;
  if (size > 4e38) return sign | f->overflow; /* past every format, and infinity */

  int exponent; /* of the leading bit, but no smaller than that of normal numbers */
  frexp(size, &exponent);
  exponent = exponent - 1 < f->min_exponent ? f->min_exponent : exponent - 1;
  const double steps = ldexp(size, f->mantissa - exponent); /* in units of the last place */
  double whole = floor(steps);
  const double rest = steps - whole;
  if (rest > 0.5 || (rest == 0.5 && fmod(whole, 2.0) != 0.0)) whole += 1.0;
  /* `whole` holds the leading bit, which counts as one exponent step; a carry moves on to the next exponent by itself. */
  const uint32_t bits = ((uint32_t)(exponent - f->min_exponent) << f->mantissa) + (uint32_t)whole;
  return sign | (bits > f->max_finite ? f->overflow : bits);
}

static double flashcore_load(const void *data, int32_t dtype, int64_t i) {
  if (dtype == FLASHCORE_F32) return (double)((const float *)data)[i];
  if (flashcore_dtype_bytes(dtype) == 2) return flashcore_decode(dtype, ((const uint16_t *)data)[i]);
  return flashcore_decode(dtype, ((const uint8_t *)data)[i]);
}

static void flashcore_store(void *data, int32_t dtype, int64_t i, double x) {
  if (dtype == FLASHCORE_F32) ((float *)data)[i] = (float)x;
  else if (flashcore_dtype_bytes(dtype) == 2) ((uint16_t *)data)[i] = (uint16_t)flashcore_encode(dtype, x);
  else ((uint8_t *)data)[i] = (uint8_t)flashcore_encode(dtype, x);
}

/* CPU reference: attention -------------------------------------------------------------------------------------------------------- */

typedef struct flashcore_row { /* one query row */
  const flashcore_attention *a;
  flashcore_sequence seq;
  flashcore_range keys;
  int32_t b, h, h_kv, i;
  double scale, v_scale, o_scale; /* with the descales; o_scale: what O is multiplied with to be stored */
  double q[FLASHCORE_MAX_DIM];
} flashcore_row;

static double flashcore_descale_at(const flashcore_descale *d, int32_t b, int32_t h) {
  const double x = d->data ? (double)d->data[b * d->stride_b + h * d->stride_h] : 1.0;
  return x >= 0.0 ? x : (double)NAN;
}

/* Where key j's row of t starts, in elements; 0 and no offset when its page is not there. */
static int flashcore_reference_key(const flashcore_row *r, const flashcore_tensor *t, int64_t row0, int32_t j, int64_t *offset) {
  const int64_t key = flashcore_key_offset(r->a, t, row0, r->b, j);
  if (key == FLASHCORE_NO_KEY) return 0;
  *offset = key + r->h_kv * t->stride_h;
  return 1;
}

static int flashcore_reference_masked(const flashcore_row *r, int32_t j) {
  const flashcore_attention *a = r->a;
  if (!a->mask_bits) return 0;
  const uint32_t word = a->mask_bits[r->b * a->mask_stride_b + r->h * a->mask_stride_h + r->i * a->mask_stride_q + j / 32];
  return !((word >> (j % 32)) & 1u);
}

/* The logit of key j in natural units; -infinity hides it. A hidden key's K is not read. */
static double flashcore_reference_logit(const flashcore_row *r, int32_t j) {
  const flashcore_attention *a = r->a;
  int64_t k;
  if (flashcore_reference_masked(r, j) || !flashcore_reference_key(r, &a->k, r->seq.k, j, &k)) return -INFINITY;
  double x = 0.0;
  for (int32_t d = 0; d < a->dim_qk; ++d) x += r->q[d] * flashcore_load(a->k.data, a->dtype_kv, k + d);
  x *= r->scale;
  if (a->softcap > 0.f) x = (double)a->softcap * tanh(x / (double)a->softcap);
  if (a->bias)
    x += flashcore_load(a->bias, a->bias_dtype, r->b * a->bias_stride_b + r->h * a->bias_stride_h + r->i * a->bias_stride_q + j * a->bias_stride_kv);
  if (a->alibi_slopes)
    x -= (double)a->alibi_slopes[r->b * a->alibi_stride_b + r->h] * fabs((double)((int64_t)r->i + r->seq.len_kv - r->seq.len_q - j));
  return x;
}

/* Two passes: the largest logit, then the weighted sum. The largest logit is subtracted, so the exponential never overflows. */
static void flashcore_reference_row(const flashcore_row *r) {
  const flashcore_attention *a = r->a;
  const double sink = a->sink ? (double)a->sink[r->h] : -INFINITY;
  double o[FLASHCORE_MAX_DIM] = {0.0};
  double m = sink;
  for (int32_t j = r->keys.first; j < r->keys.last; ++j) {
    const double x = flashcore_reference_logit(r, j);
    if (x > m) m = x;
  }
  double keys = 0.0; /* the keys' share of the denominator */
  for (int32_t j = r->keys.first; j < r->keys.last; ++j) {
    const double x = flashcore_reference_logit(r, j);
    int64_t v;
    if (x == -INFINITY || !flashcore_reference_key(r, &a->v, r->seq.v, j, &v)) continue; /* 0 * NaN would be NaN */
    const double p = exp(x - m);
    keys += p;
    for (int32_t d = 0; d < a->dim_v; ++d) o[d] += p * flashcore_load(a->v.data, a->dtype_kv, v + d);
  }
  const double l = keys + (sink == -INFINITY ? 0.0 : exp(sink - m));
  const int64_t row = r->seq.o + r->i * a->o.stride_s + r->h * a->o.stride_h;
  for (int32_t d = 0; d < a->dim_v; ++d) {
    const double x = keys == 0.0 ? 0.0 : o[d] / l * r->v_scale, size = fabs(x);
    if (a->o_amax && size <= (double)FLT_MAX && (float)size > *a->o_amax) *a->o_amax = (float)size;
    flashcore_store(a->o.data, a->dtype_o, row + d, keys == 0.0 ? 0.0 : x * r->o_scale); /* no scale is felt without a key */
  }
  if (a->lse) {
    const double lse = l == 0.0 ? -INFINITY : m + log(l);
    a->lse[((int64_t)r->b * a->heads_q + r->h) * a->seq_q + r->i] = (float)(a->lse_base2 ? lse * FLASHCORE_LOG2E : lse);
  }
}

FLASHCORE_API flashcore_status flashcore_reference_supported(const flashcore_attention *a, flashcore_error *error) {
  return flashcore_validate(a, error);
}

FLASHCORE_API flashcore_status flashcore_reference_forward(const flashcore_attention *a, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_row r;
  FLASHCORE_TRY(flashcore_validate(a, error));
  flashcore_resolve(a, &resolved);
  r.a = a = &resolved;
  for (r.b = 0; r.b < a->batch; ++r.b) {
    r.seq = flashcore_sequence_at(a, r.b);
    for (r.h = 0; r.h < a->heads_q; ++r.h) {
      r.h_kv = r.h / (a->heads_q / a->heads_kv);
      r.scale = (double)a->scale * flashcore_descale_at(&a->q_descale, r.b, r.h) * flashcore_descale_at(&a->k_descale, r.b, r.h_kv);
      r.v_scale = flashcore_descale_at(&a->v_descale, r.b, r.h_kv);
      r.o_scale = 1.0 / flashcore_descale_at(&a->o_descale, r.b, r.h);
      for (r.i = 0; r.i < r.seq.len_q; ++r.i) {
        const int64_t q = r.seq.q + r.i * a->q.stride_s + r.h * a->q.stride_h;
        for (int32_t d = 0; d < a->dim_qk; ++d) r.q[d] = flashcore_load(a->q.data, a->dtype, q + d);
        r.keys = flashcore_visible_keys(a, r.i, r.seq.len_q, r.seq.len_kv);
        flashcore_reference_row(&r);
      }
    }
  }
  return FLASHCORE_OK;
}

/* Dispatch ------------------------------------------------------------------------------------------------------------------------ */

static flashcore_backend_ops *flashcore_backends; /* all but SIMT; changed before main only */

FLASHCORE_API void flashcore_register_backend(flashcore_backend_ops *ops) {
  ops->next = flashcore_backends;
  flashcore_backends = ops;
}

#if defined(__CUDACC__)

/* WHY: the ordinal is compared with the count first, since asking CUDA about a device that is not there sets CUDA's error state. */
static flashcore_status flashcore_query_device(int ordinal, flashcore_device *device, flashcore_error *error) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0)
    return flashcore_refuse(error, FLASHCORE_INVALID_DEVICE, "device", ordinal, 0, "there is no CUDA device: %s", cudaGetErrorString(code));
  if (ordinal < -1 || ordinal >= count)
    return flashcore_refuse(error, FLASHCORE_INVALID_DEVICE, "device", ordinal, count - 1, "device is %d: must be -1 (current) or 0 to %d", ordinal,
                            count - 1);
  if (ordinal == -1) {
    const cudaError_t current = cudaGetDevice(&ordinal);
    if (current != cudaSuccess) return flashcore_cuda_refuse(error, "cudaGetDevice", current);
  }
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int *value;
  } queries[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                 {cudaDevAttrComputeCapabilityMinor, &minor},
                 {cudaDevAttrMultiProcessorCount, &device->sm_count},
                 {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_per_sm}};
  for (const auto &query : queries) {
    const cudaError_t failed = cudaDeviceGetAttribute(query.value, query.attribute, ordinal);
    if (failed != cudaSuccess) return flashcore_cuda_refuse(error, "cudaDeviceGetAttribute", failed);
  }
  device->ordinal = ordinal;
  device->arch = 10 * major + minor;
  return FLASHCORE_OK;
}

/* The plan of one backend. Several files may hold it, each with other element types (FLASHCORE_NO_...): the first that holds this one answers. */
static flashcore_status flashcore_plan_backend(const flashcore_attention *a, int32_t backend, const flashcore_device *device, flashcore_plan *plan,
                                               const flashcore_backend_ops **ops, flashcore_error *error) {
  bool found = false;
  for (const flashcore_backend_ops *next = backend == FLASHCORE_BACKEND_SIMT ? &flashcore_simt_ops : flashcore_backends; next; next = next->next) {
    if (next->backend != backend) continue;
    found = true;
    *ops = next;
    memset(plan, 0, sizeof *plan);
    const flashcore_status status = next->plan(a, device, plan, error);
    if (status != FLASHCORE_BACKEND_NOT_COMPILED) return status;
  }
  if (found) return FLASHCORE_BACKEND_NOT_COMPILED; /* in the words of the last */
  return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "backend", backend, 0,
                          "backend is %s: its header was not compiled into this program", flashcore_backend_string((flashcore_backend)backend));
}

/* How near a refusal is to serving the problem: types come first (0), then what was compiled, then the device, then the rest of the problem. */
static int flashcore_nearness(flashcore_status refusal) {
  return refusal == FLASHCORE_UNSUPPORTED_DTYPE ? 0 : refusal == FLASHCORE_BACKEND_NOT_COMPILED ? 1 : refusal == FLASHCORE_UNSUPPORTED_ARCH ? 2 : 3;
}

/* The first of the order below that serves the problem and is not slow at it, or the first that serves it, or SIMT. If none does, SIMT's refusal speaks
 * for all; where SIMT does not know the types, that of the nearest, and of several the last, which demands least. a: validated and resolved. */
static flashcore_status flashcore_plan_auto(const flashcore_attention *a, const flashcore_device *device, flashcore_plan *plan,
                                            const flashcore_backend_ops **ops, flashcore_error *error) {
  static const int32_t order[] = {FLASHCORE_BACKEND_WGMMA, FLASHCORE_BACKEND_QGMMA, FLASHCORE_BACKEND_QMMA, FLASHCORE_BACKEND_MMA,
                                  FLASHCORE_BACKEND_WMMA};
  int32_t slow = FLASHCORE_BACKEND_SIMT, nearest = FLASHCORE_BACKEND_SIMT;
  int nearness = 1;
  for (const int32_t backend : order) {
    *ops = nullptr;
    const flashcore_status status = flashcore_plan_backend(a, backend, device, plan, ops, nullptr);
    if (!*ops) continue; /* its header is not in this program */
    if (status == FLASHCORE_OK && !plan->is_slow) return FLASHCORE_OK;
    if (status == FLASHCORE_OK && slow == FLASHCORE_BACKEND_SIMT) slow = backend;
    if (status != FLASHCORE_OK && flashcore_nearness(status) >= nearness) nearest = backend, nearness = flashcore_nearness(status);
  }
  const flashcore_status status = flashcore_plan_backend(a, slow, device, plan, ops, error);
  if (status != FLASHCORE_UNSUPPORTED_DTYPE || nearest == FLASHCORE_BACKEND_SIMT) return status;
  return flashcore_plan_backend(a, nearest, device, plan, ops, error);
}

static flashcore_status flashcore_choose(const flashcore_attention *a, int ordinal, flashcore_attention *resolved, flashcore_plan *plan,
                                         const flashcore_backend_ops **ops, flashcore_error *error) {
  flashcore_device device;
  FLASHCORE_TRY(flashcore_validate(a, error));
  FLASHCORE_TRY(flashcore_query_device(ordinal, &device, error));
  flashcore_resolve(a, resolved);
  if (a->backend == FLASHCORE_BACKEND_AUTO) return flashcore_plan_auto(resolved, &device, plan, ops, error);
  return flashcore_plan_backend(resolved, a->backend, &device, plan, ops, error);
}

static flashcore_status flashcore_check_workspace(const flashcore_attention *a, size_t bytes, flashcore_error *error) {
  const long long need = (long long)bytes, have = (long long)a->workspace_bytes;
  if (need == 0) return FLASHCORE_OK;
  if (!a->workspace)
    return flashcore_refuse(error, FLASHCORE_INVALID_WORKSPACE, "workspace", 0, need, "workspace is null: %lld bytes are needed", need);
  if ((uintptr_t)a->workspace % 256 != 0)
    return flashcore_refuse(error, FLASHCORE_INVALID_WORKSPACE, "workspace", (int64_t)(uintptr_t)a->workspace, 256,
                            "workspace is %p: must be aligned to 256 bytes", a->workspace);
  if (a->workspace_bytes < bytes)
    return flashcore_refuse(error, FLASHCORE_INVALID_WORKSPACE, "workspace_bytes", have, need, "workspace_bytes is %lld: must be at least %lld", have,
                            need);
  return FLASHCORE_OK;
}

FLASHCORE_API flashcore_status flashcore_supported(const flashcore_attention *a, int device, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_backend_ops *ops;
  FLASHCORE_TRY(flashcore_choose(a, device, &resolved, &plan, &ops, error));
  return flashcore_check_workspace(&resolved, plan.workspace_bytes, error);
}

FLASHCORE_API flashcore_status flashcore_workspace_size(const flashcore_attention *a, int device, size_t *bytes, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_backend_ops *ops;
  if (!bytes) return flashcore_refuse(error, FLASHCORE_NULL_POINTER, "bytes", 0, 0, "bytes is null: it receives the size");
  FLASHCORE_TRY(flashcore_choose(a, device, &resolved, &plan, &ops, error));
  *bytes = plan.workspace_bytes;
  return FLASHCORE_OK;
}

FLASHCORE_API flashcore_status flashcore_forward(const flashcore_attention *a, flashcore_stream stream, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_backend_ops *ops;
  FLASHCORE_TRY(flashcore_choose(a, -1, &resolved, &plan, &ops, error));
  FLASHCORE_TRY(flashcore_check_workspace(&resolved, plan.workspace_bytes, error));
  return ops->launch(&resolved, &plan, stream, error);
}

/* What the loaded kernel says of itself, on the current device. */
static flashcore_status flashcore_describe_kernel(const flashcore_plan *plan, flashcore_description *out, flashcore_error *error) {
  cudaFuncAttributes attributes;
  int blocks = 0;
  cudaError_t code = cudaFuncGetAttributes(&attributes, plan->kernel);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaFuncGetAttributes", code);
  code = flashcore_allow_shared(plan);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaFuncSetAttribute", code);
  code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, plan->kernel, plan->d.threads, (size_t)plan->d.shared_bytes);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaOccupancyMaxActiveBlocksPerMultiprocessor", code);
  *out = plan->d;
  out->registers = attributes.numRegs;
  out->shared_bytes = plan->d.shared_bytes + (int32_t)attributes.sharedSizeBytes;
  out->blocks_per_sm = blocks;
  return FLASHCORE_OK;
}

FLASHCORE_API flashcore_status flashcore_describe(const flashcore_attention *a, int device, flashcore_description *out, flashcore_error *error) {
  flashcore_attention resolved;
  flashcore_plan plan;
  const flashcore_backend_ops *ops;
  int current = 0;
  if (!out) return flashcore_refuse(error, FLASHCORE_NULL_POINTER, "out", 0, 0, "out is null: it receives the description");
  FLASHCORE_TRY(flashcore_choose(a, device, &resolved, &plan, &ops, error));
  cudaError_t code = cudaGetDevice(&current);
  if (code == cudaSuccess && device >= 0 && device != current) code = cudaSetDevice(device);
  if (code != cudaSuccess) return flashcore_cuda_refuse(error, "cudaSetDevice", code);
  const flashcore_status status = flashcore_describe_kernel(&plan, out, error);
  if (device >= 0 && device != current) cudaSetDevice(current);
  return status;
}

static flashcore_status flashcore_validate_merge(const flashcore_merge_args *m, flashcore_error *error) {
  if (!m) return flashcore_refuse(error, FLASHCORE_NULL_POINTER, "merge_args", 0, 0, "merge_args is null: a descriptor is needed");
  const flashcore_limit limits[] = {
      {FLASHCORE_INVALID_STRUCT_SIZE, "struct_size", (int64_t)m->struct_size, sizeof *m, sizeof *m},
      {FLASHCORE_INVALID_DTYPE, "dtype_o", m->dtype_o, FLASHCORE_F32, FLASHCORE_E5M2},
      {FLASHCORE_UNSUPPORTED_DTYPE, "dtype_o", m->dtype_o, FLASHCORE_F32, FLASHCORE_BF16},
      {FLASHCORE_INVALID_SIZE, "parts", m->parts, 1, INT32_MAX},
      {FLASHCORE_INVALID_SIZE, "batch", m->batch, 1, INT32_MAX},
      {FLASHCORE_INVALID_SIZE, "heads", m->heads, 1, INT32_MAX},
      {FLASHCORE_INVALID_SIZE, "seq", m->seq, 1, FLASHCORE_MAX_SEQ},
      {FLASHCORE_INVALID_SIZE, "dim", m->dim, 1, FLASHCORE_MAX_DIM},
      {FLASHCORE_INVALID_SCALE, "lse_base2", m->lse_base2, 0, 1},
  };
  FLASHCORE_TRY(flashcore_check_limits(limits, FLASHCORE_COUNT(limits), error));
  const int64_t heads = (int64_t)m->batch * m->heads;
  const int64_t most_heads = FLASHCORE_MAX_ROWS / m->seq;
  const flashcore_limit rows = {FLASHCORE_INVALID_SIZE, "batch", heads, 1, most_heads};
  FLASHCORE_TRY(flashcore_check_limits(&rows, 1, error));
  const flashcore_limit parts = {FLASHCORE_INVALID_SIZE, "parts", m->parts, 1, FLASHCORE_MAX_OFFSET / (heads * m->seq * m->dim)};
  const int32_t bytes = flashcore_dtype_bytes(m->dtype_o);
  const flashcore_pointer pointers[] = {
      {"o_parts", m->o_parts, 4, 1}, {"lse_parts", m->lse_parts, 4, 1}, {"o.data", m->o.data, bytes, 1},
      {"lse", m->lse, 4, 0},         {"sink", m->sink, 4, 0},
  };
  const flashcore_stride strides[] = {
      {"o.stride_b", m->o.stride_b, m->batch, bytes}, {"o.stride_s", m->o.stride_s, m->seq, bytes}, {"o.stride_h", m->o.stride_h, m->heads, bytes}};
  FLASHCORE_TRY(flashcore_check_limits(&parts, 1, error));
  FLASHCORE_TRY(flashcore_check_pointers(pointers, FLASHCORE_COUNT(pointers), error));
  if (m->o.data == (const void *)m->o_parts || m->o.data == (const void *)m->lse_parts)
    return flashcore_refuse(error, FLASHCORE_ALIASED_OUTPUT, "o.data", (int64_t)(uintptr_t)m->o.data, 0, "o.data is also an input's address");
  return flashcore_check_output_strides(strides, FLASHCORE_COUNT(strides), error);
}

FLASHCORE_API flashcore_status flashcore_merge(const flashcore_merge_args *m, flashcore_stream stream, flashcore_error *error) {
  flashcore_device device;
  FLASHCORE_TRY(flashcore_validate_merge(m, error));
  FLASHCORE_TRY(flashcore_query_device(-1, &device, error));
  if (!flashcore_arch_compiled(device.arch, 75))
    return flashcore_refuse(error, FLASHCORE_UNSUPPORTED_ARCH, "device", device.arch, 75, "sm_%d: the merge kernel was not compiled for it",
                            (int)device.arch);
  return flashcore_merge_launch(m, stream, error);
}

#else /* plain C or C++: the reference works, and everything that needs a device says why it does not */

static flashcore_status flashcore_no_cuda(flashcore_error *error) {
  return flashcore_refuse(error, FLASHCORE_BACKEND_NOT_COMPILED, "backend", 0, 0,
                          "no backend: FLASHCORE_IMPLEMENTATION was compiled without nvcc, so only the CPU reference is here");
}

FLASHCORE_API flashcore_status flashcore_supported(const flashcore_attention *a, int device, flashcore_error *error) {
  (void)a, (void)device;
  return flashcore_no_cuda(error);
}

FLASHCORE_API flashcore_status flashcore_workspace_size(const flashcore_attention *a, int device, size_t *bytes, flashcore_error *error) {
  (void)a, (void)device, (void)bytes;
  return flashcore_no_cuda(error);
}

FLASHCORE_API flashcore_status flashcore_forward(const flashcore_attention *a, flashcore_stream stream, flashcore_error *error) {
  (void)a, (void)stream;
  return flashcore_no_cuda(error);
}

FLASHCORE_API flashcore_status flashcore_describe(const flashcore_attention *a, int device, flashcore_description *out, flashcore_error *error) {
  (void)a, (void)device, (void)out;
  return flashcore_no_cuda(error);
}

FLASHCORE_API flashcore_status flashcore_merge(const flashcore_merge_args *m, flashcore_stream stream, flashcore_error *error) {
  (void)m, (void)stream;
  return flashcore_no_cuda(error);
}

#endif
#endif

#endif /* not NVRTC */

/* MIT licence: see LICENSE. Copyright (c) 2026 FlashCore authors. */
#endif /* FLASHCORE_H */
