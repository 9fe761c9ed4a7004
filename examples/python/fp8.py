#!/usr/bin/env python3
"""Demonstrates FlashCore's fp8 attention: its speed beside cuDNN's fp16, and its error on data of many kinds.

    python3 examples/python/fp8.py                                speed: batch * seq = 16384, heads * dim = 2048
    python3 examples/python/fp8.py --dims 128 --seqs 512,4096 --causal yes
    python3 examples/python/fp8.py --mixed                        speed of a cache in fp8, K and V, beside 16-bit Q: prefill and few queries
    python3 examples/python/fp8.py --quantisers                   speed of the quantisers, beside that of moving their bytes
    python3 examples/python/fp8.py --accuracy                     error against fp64, on the values as stored and as they were before

Needs PyTorch with CUDA and nvcc. Speed: as race.py measures it; V in its ordinary layout, all work counted. "goal" is FlashAttention-3's fp8 in the
same unit, a ratio to cuDNN's fp16, both measured once on one H200 (CUDA 13.0, PyTorch 2.11); "of it" is ours over that. Exit code 1: a wrong output.
"""
import argparse
import math
import pathlib
import statistics
import sys

import flashcore
import torch
from torch.nn.attention import SDPBackend

import race

SEQS = [512, 1024, 2048, 4096, 8192, 16384]
GOAL = {  # (dim, causal): FlashAttention-3's fp8 and cuDNN's fp16, TFLOP/s, for each of SEQS
    (64, False): ([352, 453, 582, 610, 660, 669], [373, 406, 429, 446, 450, 445]),
    (64, True): ([200, 308, 453, 532, 604, 611], [255, 329, 369, 402, 425, 430]),
    (128, False): ([557, 748, 763, 850, 880, 896], [482, 549, 604, 597, 616, 613]),
    (128, True): ([324, 513, 642, 764, 840, 896], [312, 388, 454, 508, 524, 551]),
    (256, False): ([792, 940, 1043, 1100, 1106, 1123], [477, 565, 647, 661, 652, 661]),
    (256, True): ([443, 694, 850, 968, 1056, 1085], [322, 413, 495, 521, 558, 591]),
}


def goal(dim, causal, seq):
    if (dim, causal) not in GOAL or seq not in SEQS:
        return math.nan
    fp8, fp16 = GOAL[dim, causal]
    return fp8[SEQS.index(seq)] / fp16[SEQS.index(seq)]


def speed(args):
    ratios, wrong = [], 0
    print("#  D causal    seq | TFLOP/s  cuDNN fp16 | ratio   goal  of it |  error | kernel")
    for dim in args.dims:
        for causal in {"no": [False], "yes": [True], "both": [False, True]}[args.causal]:
            for seq in args.seqs:
                batch, heads = max(1, 16384 // seq), max(1, 2048 // dim)
                wide = [torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.float16) for _ in range(3)]
                narrow = [x.to(torch.float8_e4m3fn) for x in wide]
                lse = torch.empty(batch, heads, seq, device="cuda") if args.lse else None
                ours = flashcore.Attention(*narrow, lse=lse, causal=causal)
                error = race.sample_error(ours(), *(x.float() for x in narrow), causal)
                us = race.race({"FlashCore": ours, "cuDNN": race.sdpa(*wide, causal, SDPBackend.CUDNN_ATTENTION)}, False, args.rounds, args.steady)
                flop = 4.0 * batch * heads * seq * seq * dim * (0.5 if causal else 1.0)
                ratio, want = us["cuDNN"] / us["FlashCore"], goal(dim, causal, seq)
                ratios.append(ratio / want)
                wrong += not error < 3e-2
                print(f"{dim:4d} {'yes' if causal else 'no':>6s} {seq:6d} | {flop / us['FlashCore'] * 1e-6:7.0f} {flop / us['cuDNN'] * 1e-6:11.0f} |"
                      f" {ratio:5.3f}  {want:5.3f}  {ratio / want:5.3f} | {error:.1e} | {ours.describe().kernel.decode()}"
                      + ("" if error < 3e-2 else "  WRONG"), flush=True)
    known = [r for r in ratios if not math.isnan(r)]
    if known:
        print(f"geometric mean of the goal: {statistics.geometric_mean(known):.3f} (least {min(known):.3f}, {len(known)} shapes)")
    return wrong


PREFILL = [(n, 16384 // n) for n in (8, 4, 1)]  # batch, seq
FEW = [(batch, heads, seq_q, seq_kv) for seq_q in (1, 16) for batch, seq_kv in ((64, 4096), (16, 32768)) for heads in ((32, 8), (64, 8))]


def mixed_shapes(args):
    """(batch, heads of Q, of K and V, queries, keys, dim, causal)"""
    for dim in args.dims:
        for causal in (False, True):
            yield from ((batch, 2048 // dim, 2048 // dim, seq, seq, dim, causal) for batch, seq in PREFILL)
        yield from ((batch, *heads, seq_q, seq_kv, dim, False) for batch, heads, seq_q, seq_kv in FEW)


def mixed(args):
    """Cache: what K and V in fp8 take per second, read once. A 16-bit cache is that of the same values: auto is what flashcore_forward picks."""
    ratios, wrong, dtype = {True: [], False: []}, 0, race.DTYPES[args.dtype]
    print("# batch heads   seq_q seq_kv    D causal |  fp8 us  TFLOP/s  cache GB/s | 16-bit us: auto   wgmma | ratio to auto |  error | kernel")
    for batch, heads, heads_kv, seq_q, seq_kv, dim, causal in mixed_shapes(args):
        q = torch.randn(batch, seq_q, heads, dim, device="cuda", dtype=dtype)
        caches = [flashcore.quantise(torch.randn(batch, seq_kv, heads_kv, dim, device="cuda", dtype=dtype)) for _ in range(2)]
        (k, k_scale), (v, v_scale) = caches
        k16, v16 = ((x.to(dtype) * scale[:, None, :, None]).to(dtype) for x, scale in caches)
        ours = flashcore.Attention(q, k, v, k_descale=k_scale, v_descale=v_scale, causal=causal, backend=args.backend)
        error = race.sample_error(ours(), q, k.float() * k_scale[:, None, :, None], v.float() * v_scale[:, None, :, None], causal)
        small = seq_q < 64
        us = race.race({"fp8": ours, **{name: flashcore.Attention(q, k16, v16, causal=causal, backend=name) for name in ("auto", "wgmma")}}, small,
                       args.rounds)
        flop, right = 4.0 * batch * heads * seq_q * seq_kv * dim * (0.5 if causal else 1.0), error < 3 * race.UNIT[args.dtype]
        ratios[small].append(us["auto"] / us["fp8"])
        wrong += not right
        cache_bytes = 2 * batch * heads_kv * seq_kv * dim
        print(f"{batch:7d} {heads:3d}/{heads_kv:<3d} {seq_q:6d} {seq_kv:6d} {dim:4d} {'yes' if causal else 'no':>6s} | {us['fp8']:7.1f}"
              f" {flop / us['fp8'] * 1e-6:8.0f} {1e-3 * cache_bytes / us['fp8']:11.0f} | {us['auto']:15.1f} {us['wgmma']:7.1f} |"
              f" {us['auto'] / us['fp8']:13.3f} |"
              f" {error:.1e} | {ours.describe().kernel.decode()}" + ("" if right else "  WRONG"), flush=True)
    for small, name in ((False, "prefill"), (True, "few queries")):
        print(f"geometric mean over the 16-bit cache, {name}: {statistics.geometric_mean(ratios[small]):.3f} (least {min(ratios[small]):.3f})")
    return wrong


def quantisers(args):
    """Microseconds of each way, and of what its bytes take: a copy in PyTorch moves 2 bytes in and 2 out."""
    x = torch.randn(8, 2048, 16, 128, device="cuda", dtype=torch.float16) * 2
    y = torch.empty_like(x)
    million = x.numel() / 1e6
    per_byte = race.race({"copy": lambda: y.copy_(x)}, True, args.rounds)["copy"] / (4 * million)
    ways = {"per tensor": (5, dict(granularity="tensor")), "per head": (5, dict(granularity="head")), "per block of 64": (3, dict(granularity="block")),
            "per block, rotated": (3, dict(granularity="block", rotation=128)), "per head, without mean": (7, dict(smooth=True))}
    for name, (bytes_each, options) in ways.items():
        us = race.race({name: lambda: flashcore.quantise(x, **options)}, True, args.rounds)[name]
        print(f"{name:24s} {us:7.1f} us; its {bytes_each} bytes a value take {per_byte * bytes_each * million:6.1f} us")


def exact(q, k, v):
    """Attention of (batch, seq, heads, dim) in fp64, one head at a time."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            s = q[b, :, h].double() @ k[b, :, h].double().T / math.sqrt(q.shape[-1])
            out[b, :, h] = torch.softmax(s, dim=-1) @ v[b, :, h].double()
    return out


def kinds(seq):
    """name -> (q, k, v), fp16."""
    def normal(std=1.0):
        return torch.randn(1, seq, 4, 128, device="cuda") * std

    def heavy():
        channel = torch.rand(1, 1, 4, 128, device="cuda") < 0.01
        return torch.where(channel, 30.0, 1.0)

    data = {"normal": (normal(), normal(), normal()), "logit std 4": (normal(2), normal(2), normal()), "logit std 9": (normal(3), normal(3), normal()),
            "1 % of channels x30": (normal(), normal() * heavy(), normal() * heavy()), "K with a mean": (normal(), normal() + 4 * normal()[:, :1], normal()),
            "V of one sign": (normal(), normal(), normal().abs() + 0.5)}
    folder = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data"
    try:
        import numpy

        data["a real encoder's"] = tuple(torch.from_numpy(numpy.load(folder / f"minilm_{n}.npy")).cuda() for n in "qkv")
    except (ImportError, FileNotFoundError) as why:
        print(f"# no real inputs: {why}", file=sys.stderr)
    return {name: tuple(x.half() for x in tensors) for name, tensors in data.items()}


def accuracy(args):
    print("# relative error (norm) against fp64 on the values as stored | on the fp16 values; scales per tensor, per head;")
    print("# +mean: K without its mean; +rot: Q and K rotated by blocks of the whole dim")
    ways = {"tensor": {}, "head": {}, "tensor +mean": dict(smooth=True), "head +mean": dict(smooth=True), "head +rot": dict(rotate=True),
            "head +mean +rot": dict(smooth=True, rotate=True)}
    for seq in args.seqs:
        for name, (q, k, v) in kinds(seq).items():
            before = exact(q, k, v)
            cells = []
            for way, options in ways.items():
                granularity, rotation = way.split()[0], q.shape[-1] if options.get("rotate") else 0
                q8, q_scale = flashcore.quantise(q, granularity=granularity, rotation=rotation)
                k8, k_scale = flashcore.quantise(k, granularity=granularity, rotation=rotation, smooth=options.get("smooth", False))
                v8, v_scale = flashcore.quantise(v, granularity=granularity)
                o = flashcore.attention(q8, k8, v8, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale).double()
                stored = exact(*(x.float() * (s[:, None, :, None] if s.dim() > 1 else s) for x, s in ((q8, q_scale), (k8, k_scale), (v8, v_scale))))
                cells.append(f"{way} {(o - stored).norm() / stored.norm():.2e} | {(o - before).norm() / before.norm():.2e}")
            print(f"{q.shape[1]:6d} {name:20s} " + "; ".join(cells), flush=True)
    return 0


def main():
    def numbers(text):
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=numbers, default=[64, 128, 256])
    parser.add_argument("--seqs", type=numbers)
    parser.add_argument("--causal", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--lse", action="store_true", help="the LSE too, for which S is added up in f32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steady", action="store_true", help="each contender alone and hot, instead of in turn")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--dtype", choices=race.DTYPES, default="bf16", help="of Q, with --mixed")
    parser.add_argument("--backend", default="auto", help="with --mixed")
    parser.add_argument("--quantisers", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    args = parser.parse_args()
    args.seqs = args.seqs or ([2048, 16384] if args.accuracy else SEQS)
    torch.manual_seed(0)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    run = mixed if args.mixed else quantisers if args.quantisers else accuracy if args.accuracy else speed
    return 1 if run(args) else 0


if __name__ == "__main__":
    sys.exit(main())
