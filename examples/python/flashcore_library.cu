// Demonstrates FlashCore as a shared library for other languages: the C API, and sizes by which a binding can check that its structs match.
//
//   nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC -gencode arch=compute_90,code=sm_90 examples/python/flashcore_library.cu -o libflashcore.so
#include "../common/library.cu"

extern "C" {
size_t flashcore_sizeof_attention(void) { return sizeof(flashcore_attention); }
size_t flashcore_sizeof_description(void) { return sizeof(flashcore_description); }
size_t flashcore_sizeof_error(void) { return sizeof(flashcore_error); }
size_t flashcore_offsetof_workspace(void) { return offsetof(flashcore_attention, workspace); }
}
