"""Demonstrates FlashCore from Python: a ctypes binding of the C API, and attention on PyTorch CUDA tensors through their own strides.

    import flashcore                                 # with examples/python on sys.path; the first use compiles the library with nvcc
    o = flashcore.attention(q, k, v, causal=True)    # (batch, seq, heads, dim) tensors in any memory order, no copies

    nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC -gencode arch=compute_90a,code=sm_90a examples/python/flashcore_library.cu -o libflashcore.so
    FLASHCORE_LIBRARY=libflashcore.so python3 ...    # or give it the library that you compiled
"""
import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNBOUNDED = -1
DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}
BACKENDS = {"auto": 0, "simt": 1, "wmma": 2, "mma": 3, "wgmma": 4, "qmma": 5, "qgmma": 6}
CAUSAL = {False: 0, True: 1, "bottom-right": 1, "top-left": 2}


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class TensorView(ctypes.Structure):
    _fields_ = [("data", c_void_p)] + _fields(c_int64, "stride_b stride_s stride_h")


class Descale(ctypes.Structure):
    _fields_ = [("data", c_void_p)] + _fields(c_int64, "stride_b stride_h")


class AttentionStruct(ctypes.Structure):  # flashcore_attention, field by field
    _fields_ = (
        [("struct_size", c_size_t)]
        + _fields(c_int32, "dtype dtype_kv dtype_o batch heads_q heads_kv seq_q seq_kv dim_qk dim_v")
        + _fields(TensorView, "q k v o")
        + [("lse", c_void_p), ("lse_base2", c_int32), ("scale", c_float), ("softcap", c_float)]
        + _fields(c_int32, "causal window window_left window_right")
        + [("alibi_slopes", c_void_p), ("alibi_stride_b", c_int64)]
        + [("bias", c_void_p), ("bias_dtype", c_int32)]
        + _fields(c_int64, "bias_stride_b bias_stride_h bias_stride_q bias_stride_kv")
        + [("mask_bits", c_void_p)]
        + _fields(c_int64, "mask_stride_b mask_stride_h mask_stride_q")
        + [("sink", c_void_p), ("cu_seqlens_q", c_void_p), ("cu_seqlens_kv", c_void_p)]
        + _fields(c_int64, "total_q total_kv")
        + [("seqlens_q", c_void_p), ("seqlens_kv", c_void_p)]
        + [("page_table", c_void_p), ("page_table_stride_b", c_int64), ("page_size", c_int32), ("num_pages", c_int32)]
        + _fields(Descale, "q_descale k_descale v_descale o_descale")
        + [("o_amax", c_void_p)]
        + _fields(c_int32, "num_splits split_len backend")
        + [("workspace", c_void_p), ("workspace_bytes", c_size_t)]
    )


class QuantiseStruct(ctypes.Structure):  # flashcore_fp8_quantise_args, field by field
    _fields_ = (
        [("struct_size", c_size_t)]
        + _fields(c_int32, "dtype dtype_out batch rows heads dim")
        + _fields(TensorView, "x out")
        + [("seqlens", c_void_p)]
        + _fields(c_int32, "granularity block_rows")
        + [("scale", c_float), ("descale", c_void_p), ("mean", c_void_p), ("rotation", c_int32), ("transposed", c_int32)]
    )


class ErrorStruct(ctypes.Structure):
    _fields_ = [("field", c_char_p), ("value", c_int64), ("limit", c_int64), ("message", c_char * 192)]


class Description(ctypes.Structure):
    _fields_ = (
        [("backend", c_int32), ("kernel", c_char * 64)]
        + _fields(c_int32, "block_q block_kv stages head_dim_qk head_dim_v threads registers shared_bytes blocks_per_sm packed_group splits")
        + [("grid", c_int64)]
    )


class FlashCoreError(RuntimeError):
    pass


def find_nvcc():
    places = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", ROOT / "build/cuda/nvidia/cu13/bin/nvcc"]
    for place in places:
        if place and pathlib.Path(place).exists():
            return str(place)
    raise FlashCoreError("no nvcc found; python3 examples/get_nvcc.py build/cuda puts one into build/cuda")


def build(arch, options=()):
    """Compiles the shared library for one architecture ("89", "90a" ...) into build/python unless a newer one is there; returns its path."""
    source = pathlib.Path(__file__).with_name("flashcore_library.cu")
    name = "libflashcore_sm" + "_".join([arch] + [o.lstrip("-D") for o in options]).replace("=", "") + ".so"
    library = ROOT / "build" / "python" / name
    inputs = [source, ROOT / "examples/common/library.cu", *ROOT.glob("flashcore*.h"), *ROOT.glob("flashcore*.cuh")]
    if not library.exists() or library.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [find_nvcc(), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        subprocess.run([*command, *options, str(source), "-o", str(library)], check=True)
    return library


def load(path):
    """The C API of a compiled library, after a check that the structs above are the library's."""
    lib = ctypes.CDLL(str(path))
    sizes = [("sizeof_attention", ctypes.sizeof(AttentionStruct)), ("sizeof_description", ctypes.sizeof(Description)),
             ("sizeof_error", ctypes.sizeof(ErrorStruct)), ("sizeof_fp8_quantise_args", ctypes.sizeof(QuantiseStruct)),
             ("offsetof_workspace", AttentionStruct.workspace.offset)]
    for name, ours in sizes:
        function = getattr(lib, "flashcore_" + name)
        function.restype = c_size_t
        if function() != ours:
            raise FlashCoreError(f"{path}: {name} is {function()} there and {ours} in this binding: another version of FlashCore")
    a, error = POINTER(AttentionStruct), POINTER(ErrorStruct)
    lib.flashcore_supported.argtypes = [a, c_int, error]
    lib.flashcore_workspace_size.argtypes = [a, c_int, POINTER(c_size_t), error]
    lib.flashcore_forward.argtypes = [a, c_void_p, error]
    lib.flashcore_describe.argtypes = [a, c_int, POINTER(Description), error]
    lib.flashcore_fp8_quantise.argtypes = [POINTER(QuantiseStruct), c_void_p, error]
    lib.flashcore_forward_l4.argtypes = [a, c_void_p, error]
    lib.flashcore_describe_l4.argtypes = [a, POINTER(Description), error]
    return lib


@functools.lru_cache(maxsize=None)
def library():
    """The library named by FLASHCORE_LIBRARY, else one compiled for the current GPU."""
    if "FLASHCORE_LIBRARY" in os.environ:
        return load(os.environ["FLASHCORE_LIBRARY"])
    import torch

    arch = "%d%d" % torch.cuda.get_device_capability()
    return load(build("90a" if arch == "90" else arch))  # plain sm_90 has no wgmma


def _dtype(x):
    name = str(x.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise FlashCoreError(f"{name} is not an element type of FlashCore")
    return DTYPES[name]


def _view(x, name):
    if not x.is_cuda or x.stride(-1) != 1:
        raise FlashCoreError(f"{name} must be on a GPU with a contiguous last dim")
    if x.dim() == 3:  # packed: (total, heads, dim)
        return TensorView(x.data_ptr(), 0, x.stride(0), x.stride(1))
    return TensorView(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class Attention:
    """One prepared problem. Calling it launches on PyTorch's current stream: no allocation, no synchronisation, fit for CUDA graphs.

    q, k, v: (batch, seq, heads, dim), or (total, heads, dim) with cu_seqlens_q, cu_seqlens_kv, max_seq_q, max_seq_kv. o, lse: outputs, made if None.
    q, k, v in fp8 give a bf16 o unless o is of another type; *_descale: (batch, heads) or one-element scales of fp8 tensors; o_amax: of an fp8 o, one
    float32, 0 before.
    causal: False, True (bottom-right) or "top-left"; window: (left, right), -1 for unbounded; bias: (batch, heads, seq_q, seq_kv), sizes 1 broadcast.
    l4: a measurement, see race.py --l4.
    """

    def __init__(self, q, k, v, *, o=None, lse=None, causal=False, window=None, scale=0.0, softcap=0.0, alibi_slopes=None, bias=None, sink=None,
                 lse_base2=False, cu_seqlens_q=None, cu_seqlens_kv=None, max_seq_q=0, max_seq_kv=0, seqlens_q=None, seqlens_kv=None,
                 q_descale=None, k_descale=None, v_descale=None, o_descale=None, o_amax=None, backend="auto", num_splits=0, split_len=0, l4=False,
                 lib=None):
        import torch

        self.lib, self.torch, self.l4 = lib or library(), torch, l4
        dtype_o = torch.bfloat16 if q.element_size() == 1 else q.dtype
        self.o = torch.empty(*q.shape[:-1], v.shape[-1], dtype=dtype_o, device=q.device) if o is None else o
        self.lse, self.kept = lse, [q, k, v, q_descale, k_descale, v_descale, o_descale, o_amax, alibi_slopes, bias, sink, cu_seqlens_q, cu_seqlens_kv,
                                    seqlens_q, seqlens_kv]
        a = self.a = AttentionStruct()
        a.struct_size = ctypes.sizeof(a)
        a.dtype, a.dtype_kv, a.dtype_o = _dtype(q), _dtype(k), _dtype(self.o)
        a.batch = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]
        a.heads_q, a.heads_kv, a.dim_qk, a.dim_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        a.seq_q = max_seq_q if cu_seqlens_q is not None else q.shape[1]
        a.seq_kv = max_seq_kv if cu_seqlens_kv is not None else k.shape[1]
        a.total_q = q.shape[0] if cu_seqlens_q is not None else 0
        a.total_kv = k.shape[0] if cu_seqlens_kv is not None else 0
        a.q, a.k, a.v, a.o = _view(q, "q"), _view(k, "k"), _view(v, "v"), _view(self.o, "o")
        a.scale, a.softcap, a.causal, a.lse_base2 = scale, softcap, CAUSAL[causal], lse_base2
        a.backend, a.num_splits, a.split_len = BACKENDS[backend], num_splits, split_len
        if window is not None:
            a.window, (a.window_left, a.window_right) = 1, window
        self._point(lse=lse, o_amax=o_amax, sink=sink, alibi_slopes=alibi_slopes, dtype=torch.float32)
        self._point(cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, seqlens_q=seqlens_q, seqlens_kv=seqlens_kv, dtype=torch.int32)
        for name, x in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale), ("o_descale", o_descale)):
            if x is not None:
                setattr(a, name, Descale(x.data_ptr(), *(x.stride() if x.numel() > 1 else (0, 0))))
        if bias is not None:
            a.bias, a.bias_dtype = bias.data_ptr(), _dtype(bias)
            a.bias_stride_b, a.bias_stride_h, a.bias_stride_q, a.bias_stride_kv = (0 if n == 1 else s for n, s in zip(bias.shape, bias.stride()))
        size = c_size_t()
        self._call(self.lib.flashcore_workspace_size, -1, byref(size))
        if size.value:
            self.workspace = torch.zeros(size.value, dtype=torch.uint8, device=q.device)
            a.workspace, a.workspace_bytes = self.workspace.data_ptr(), size.value
        self._call(self.lib.flashcore_supported, -1)

    def _point(self, dtype, **tensors):
        for name, x in tensors.items():
            if x is not None:
                if x.dtype != dtype or not x.is_contiguous() or not x.is_cuda:
                    raise FlashCoreError(f"{name} must be a contiguous {dtype} tensor on the GPU")
                setattr(self.a, name, x.data_ptr())

    def _call(self, function, *args):
        error = ErrorStruct()
        if function(byref(self.a), *args, byref(error)) != 0:
            raise FlashCoreError(error.message.decode())

    def __call__(self):
        forward = self.lib.flashcore_forward_l4 if self.l4 else self.lib.flashcore_forward
        self._call(forward, c_void_p(self.torch.cuda.current_stream().cuda_stream))
        return self.o

    def describe(self):
        what = Description()
        if self.l4:
            self._call(self.lib.flashcore_describe_l4, byref(what))
        else:
            self._call(self.lib.flashcore_describe, -1, byref(what))
        return what


GRANULARITIES = {"head": 0, "tensor": 1, "block": 2}


def quantise(x, *, dtype=None, granularity="head", block_rows=64, smooth=False, rotation=0, lib=None):
    """A (batch, seq, heads, dim) tensor in fp8 (torch.float8_e4m3fn unless dtype says otherwise), and its scales: (batch, heads), one, or, per block of
    rows, (batch, heads, seq / block_rows). smooth: without its mean over seq; rotation: by Hadamard blocks of that size."""
    import torch

    batch, rows, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=dtype or torch.float8_e4m3fn, device=x.device)
    shape = {"head": (batch, heads), "tensor": (1,), "block": (batch, heads, rows // block_rows)}[granularity]
    descale, mean = torch.empty(shape, device=x.device), torch.empty(batch, heads, dim, device=x.device) if smooth else None
    q = QuantiseStruct(ctypes.sizeof(QuantiseStruct), _dtype(x), _dtype(out), batch, rows, heads, dim, _view(x, "x"), _view(out, "out"), None,
                       GRANULARITIES[granularity], block_rows, 0.0, descale.data_ptr(), mean.data_ptr() if smooth else None, rotation)
    error = ErrorStruct()
    if (lib or library()).flashcore_fp8_quantise(byref(q), c_void_p(torch.cuda.current_stream().cuda_stream), byref(error)) != 0:
        raise FlashCoreError(error.message.decode())
    return out, descale


def attention(q, k, v, return_lse=False, **options):
    """softmax(scale Q K^T) V of (batch, seq, heads, dim) CUDA tensors; options as in Attention. With return_lse also the (batch, heads, seq) LSE."""
    if return_lse:
        import torch

        batch = options["cu_seqlens_q"].numel() - 1 if options.get("cu_seqlens_q") is not None else q.shape[0]
        rows = options["max_seq_q"] if options.get("cu_seqlens_q") is not None else q.shape[1]
        options["lse"] = torch.empty(batch, q.shape[-2], rows, dtype=torch.float32, device=q.device)
    o = Attention(q, k, v, **options)()
    return (o, options["lse"]) if return_lse else o
