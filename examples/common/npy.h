/* npy.h · reads and writes NumPy's .npy files, and converts 16-bit floats; plain C11 and C++17, nothing but the C library. */
#ifndef FLASHCORE_EXAMPLES_NPY_H
#define FLASHCORE_EXAMPLES_NPY_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct npy_array {
  char type[4]; /* as NumPy writes it without the byte order: "f2", "f4", "u2", "i4" ... */
  int item_bytes, dims;
  int64_t shape[8];
  int64_t items;
  void *data; /* freed by the caller */
} npy_array;

/* Value of a key in the header's dictionary, past the colon and blanks; NULL where the key is missing. */
static inline const char *npy_value(const char *header, const char *key) {
  const char *at = strstr(header, key);
  at = at ? strchr(at, ':') : NULL;
  return at ? at + 1 + strspn(at + 1, " ") : NULL;
}

static inline const char *npy_parse_header(const char *header, npy_array *a) {
  const char *descr = npy_value(header, "'descr'"), *order = npy_value(header, "'fortran_order'"), *shape = npy_value(header, "'shape'");
  if (!descr || !order || !shape) return "its header lacks descr, fortran_order or shape";
  if (strncmp(order, "False", 5) != 0) return "it is in Fortran order";
  if (descr[0] != '\'' || !strchr("<|", descr[1]) || !strchr("fiu", descr[2]) || descr[3] < '1' || descr[3] > '8' || descr[4] != '\'')
    return "its element type is not a little-endian number";
  memcpy(a->type, descr + 2, 2);
  a->item_bytes = descr[3] - '0';
  a->items = 1;
  shape += *shape == '(';
  while (*shape >= '0' && *shape <= '9') {
    char *end = NULL;
    if (a->dims == 8) return "it has more than 8 dimensions";
    const int64_t size = strtoll(shape, &end, 10);
    if (size > 0 && a->items > ((int64_t)1 << 40) / size) return "it is too large";
    a->shape[a->dims++] = size;
    a->items *= size;
    shape = end + strspn(end, ", ");
  }
  return NULL;
}

static inline const char *npy_read_stream(FILE *file, npy_array *a) {
  unsigned char start[12];
  char header[4096];
  if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY", 6) != 0) return "it is not an .npy file";
  size_t length = start[8] + 256u * start[9];
  if (start[6] > 1) { /* versions 2 and 3: a 32-bit header length */
    if (fread(start + 10, 1, 2, file) != 2) return "its header is cut short";
    length += 65536u * start[10] + 16777216u * start[11];
  }
  if (length >= sizeof header || fread(header, 1, length, file) != length) return "its header is cut short or too long";
  header[length] = 0;
  const char *why = npy_parse_header(header, a);
  if (why) return why;
  const size_t bytes = (size_t)a->items * (size_t)a->item_bytes;
  a->data = malloc(bytes ? bytes : 1);
  if (!a->data) return "memory is short";
  return fread(a->data, 1, bytes, file) == bytes ? NULL : "its data are cut short";
}

/* NULL, or what is wrong with the file in words. a->data is set on success alone. */
static inline const char *npy_read(const char *path, npy_array *a) {
  memset(a, 0, sizeof *a);
  FILE *file = fopen(path, "rb");
  if (!file) return "it cannot be opened";
  const char *why = npy_read_stream(file, a);
  fclose(file);
  if (why) {
    free(a->data);
    a->data = NULL;
  }
  return why;
}

/* type: "f2", "f4", "u2" ... NULL, or what went wrong in words. */
static inline const char *npy_write(const char *path, const char *type, int dims, const int64_t *shape, const void *data) {
  char header[256];
  int n = snprintf(header, sizeof header, "{'descr': '<%s', 'fortran_order': False, 'shape': (", type);
  size_t bytes = (size_t)(type[1] - '0');
  for (int i = 0; i < dims; ++i) {
    n += snprintf(header + n, sizeof header - (size_t)n, "%lld, ", (long long)shape[i]);
    bytes *= (size_t)shape[i];
  }
  n += snprintf(header + n, sizeof header - (size_t)n, "), }");
  while ((10 + n + 1) % 64 != 0) header[n++] = ' '; /* the data start on a multiple of 64 bytes */
  header[n++] = '\n';
  const unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(n % 256), (unsigned char)(n / 256)};
  FILE *file = fopen(path, "wb");
  if (!file) return "it cannot be created";
  const int ok = fwrite(start, 1, 10, file) == 10 && fwrite(header, 1, (size_t)n, file) == (size_t)n && fwrite(data, 1, bytes, file) == bytes;
  return (fclose(file) == 0) & ok ? NULL : "it cannot be written";
}

/* 16-bit floats, rounded to nearest even. */
static inline float float_from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t bits_from_float(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float float_from_bf16(uint16_t h) { return float_from_bits((uint32_t)h << 16); }
static inline uint16_t bf16_from_float(float f) {
  const uint32_t u = bits_from_float(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static inline float float_from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float f = float_from_bits(magnitude << 13) * float_from_bits(239u << 23); /* times 2^112: the difference of the exponent biases */
  return float_from_bits(sign | bits_from_float(f));
}
static inline uint16_t f16_from_float(float f) {
  const uint32_t u = bits_from_float(f), magnitude = u & 0x7fffffffu;
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* from 65520 on the nearest is infinity */
  if (magnitude < 0x38800000u)                                     /* subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
    return (uint16_t)(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u));
  return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

#endif
