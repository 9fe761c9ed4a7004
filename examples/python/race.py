#!/usr/bin/env python3
"""Demonstrates FlashCore's speed against PyTorch's own attention (SDPA's FlashAttention-2 and cuDNN backends), in one process on one GPU.

    python3 examples/python/race.py                                     prefill: batch * seq = 16384, heads * dim = 2048
    python3 examples/python/race.py --small --csv small.csv             short problems, in microseconds
    python3 examples/python/race.py --grouped                           grouped queries: several query heads share a head of K and V, bf16, causal
    python3 examples/python/race.py --dims 64 --seqs 512,4096 --causal yes --dtype bf16 --backend wmma
    python3 examples/python/race.py --steady                            each contender alone, until the chip is as hot as it gets
    python3 examples/python/race.py --l4                                FlashCore in an L4's shared memory, the peers not limited

Needs PyTorch with CUDA and nvcc. Every contender reads the same (batch, seq, heads, dim) tensors of normal random numbers; SDPA gets them as transposed
views. Each output is compared with fp64 math on sampled rows in the same run. Times are CUDA-graph replays between events, contenders in turn, median of
rounds; with --steady, 0.1 s of replays after 0.3 s of the same. TFLOP/s = 4 batch heads seq^2 dim / time, half of it when causal. A ratio is
FlashCore's speed over the peer's. Exit code 1: a wrong output.

--l4: FlashCore takes the tiles that it takes where an SM has 100 KiB of shared memory, and asks for so much per block that only as many blocks share
an SM as would on an L4; registers, clocks, bandwidth and the number of SMs stay this GPU's. The peers keep all of its shared memory.
"""
import argparse
import csv
import math
import statistics
import sys

import flashcore
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PEERS = {"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
SMALL = [(1, 8, 512, 64), (2, 8, 256, 64), (2, 8, 512, 64), (32, 8, 128, 64), (32, 8, 512, 64), (16, 16, 2048, 64), (1, 96, 512, 64), (1, 32, 512, 128),
         (1, 32, 2048, 128)]
GROUPED = [(1, (64, 8), 8192, 128), (4, (32, 8), 4096, 128), (1, (32, 8), 32768, 128), (1, (32, 8), 512, 128), (1, (28, 4), 3000, 128)]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # of rounding


def shapes(args):
    """(batch, heads, seq, dim, causal), in the order of the tables. heads: of Q, or (of Q, of K and V)."""
    if args.grouped:
        return [(*shape, True) for shape in GROUPED]
    causal = {"no": [False], "yes": [True], "both": [False, True]}[args.causal]
    if args.small:
        return [(*shape, c) for shape in SMALL for c in causal]
    return [(max(1, args.tokens // seq), max(1, args.width // dim), seq, dim, c) for dim in args.dims for c in causal for seq in args.seqs]


def sdpa(q, k, v, causal, backend):
    """A function that runs that backend of PyTorch on (batch, seq, heads, dim) tensors, and returns one."""
    views = [x.transpose(1, 2) for x in (q, k, v)]

    def peer():
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*views, is_causal=causal, enable_gqa=k.shape != q.shape).transpose(1, 2)

    return peer


def contenders(q, k, v, causal, args):
    """name -> function that launches once and returns (batch, seq, heads, dim). A peer that refuses the shape is left out."""
    ours = flashcore.Attention(q, k, v, causal=causal, backend=args.backend, l4=args.l4)
    functions = {"FlashCore": ours, **{name: flashcore.Attention(q, k, v, causal=causal, backend=name) for name in args.also}}
    for name, backend in PEERS.items():
        peer = sdpa(q, k, v, causal, backend)
        try:
            peer()
            functions[name] = peer
        except RuntimeError as why:
            print(f"# {name} does not take this shape: {str(why).splitlines()[0]}", file=sys.stderr)
    return functions, ours.describe()


def sample_error(o, q, k, v, causal):
    """|o - exact| / |exact| over 128 rows of three heads, exact in fp64."""
    batch, seq, heads, dim = q.shape
    rows = torch.linspace(0, seq - 1, min(seq, 128), device=q.device).long().unique()
    difference = size = 0.0
    for n in range(3):
        b, h = n * (batch - 1) // 2, n * (heads - 1) // 2
        h_kv = h * k.shape[2] // heads
        s = q[b, rows, h].double() @ k[b, :, h_kv].double().T / math.sqrt(dim)
        if causal:
            s.masked_fill_(torch.arange(seq, device=q.device)[None, :] > rows[:, None], -math.inf)
        exact = torch.softmax(s, dim=-1) @ v[b, :, h_kv].double()
        difference += (o[b, rows, h].double() - exact).square().sum().item()
        size += exact.square().sum().item()
    return math.sqrt(difference / size)


def elapsed_ms(work, times):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def capture(function, launches):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            function()
    return graph


def race(functions, small, rounds, steady=False):
    """name -> median microseconds per launch. A round is 20 replays of a graph of 20 launches if small, else of 10 ms; if steady, there is one, of 0.1 s,
    after 0.3 s of the same."""
    graphs, replays = {}, {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        once = elapsed_ms(function, 3) / 3
        launches = 20 if small else max(1, min(20, int(2 / once)))
        graphs[name] = (capture(function, launches), launches)
        replays[name] = 20 if small else max(1, round((100 if steady else 10) / (once * launches)))
        elapsed_ms(graphs[name][0].replay, replays[name])
    times = {name: [] for name in functions}
    for _ in range(1 if steady else rounds):
        for name, (graph, launches) in graphs.items():
            if steady:
                elapsed_ms(graph.replay, 3 * replays[name])
            times[name].append(1e3 * elapsed_ms(graph.replay, replays[name]) / (replays[name] * launches))
    return {name: statistics.median(t) for name, t in times.items()}


def run_shape(shape, args):
    """One row: times, errors, the kernel."""
    batch, heads, seq, dim, causal = shape
    heads, heads_kv = heads if isinstance(heads, tuple) else (heads, heads)
    q, k, v = (torch.randn(batch, seq, n, dim, device="cuda", dtype=DTYPES[args.dtype]) for n in (heads, heads_kv, heads_kv))
    functions, what = contenders(q, k, v, causal, args)
    errors = {name: sample_error(f(), q, k, v, causal) for name, f in functions.items()}
    us = race(functions, args.small, args.rounds, args.steady)
    flop = 4.0 * batch * heads * seq * seq * dim * (0.5 if causal else 1.0)
    label = heads if heads == heads_kv else f"{heads}/{heads_kv}"
    return {"shape": (batch, label, seq, dim, causal), "us": us, "tflops": {n: flop / t * 1e-6 for n, t in us.items()}, "errors": errors,
            "ratio": {n: t / us["FlashCore"] for n, t in us.items()}, "kernel": what.kernel.decode() + (f", {what.blocks_per_sm} per SM" if args.l4 else ""),
            "right": max(errors[name] for name in ("FlashCore", *args.also)) <= 3 * UNIT[args.dtype]}


def print_row(row, args):
    batch, heads, seq, dim, causal = row["shape"]
    others = [*PEERS, *args.also]
    ratios = " ".join(f"{row['ratio'][n]:7.3f}" if n in row["ratio"] else "      -" for n in others)
    values, width = (row["us"], 9) if args.small else (row["tflops"], 9)
    figures = " ".join(f"{values[n]:{width}.2f}" if n in values else " " * (width - 1) + "-" for n in ("FlashCore", *others))
    error = f"{row['errors']['FlashCore']:.1e} {max([e for n, e in row['errors'].items() if n != 'FlashCore'], default=math.nan):.1e}"
    print(f"{dim:4d} {'yes' if causal else 'no':>6s} {batch:5d} {heads:>5} {seq:6d} | {ratios} | {figures} | {error} | {row['kernel']}"
          + ("" if row["right"] else "  WRONG"), flush=True)


def print_means(rows, args):
    def line(title, chosen):
        means = []
        for name in [*PEERS, *args.also]:
            ratios = [r["ratio"][name] for r in chosen if name in r["ratio"]]
            if ratios:
                means.append(f"{name} {statistics.geometric_mean(ratios):.3f}x (least {min(ratios):.3f}, {len(ratios)} shapes)")
        print(f"geometric mean, {title}: " + ("; ".join(means) or "no peer ran"))

    dims = sorted({r["shape"][3] for r in rows})
    for dim in dims:
        line(f"D = {dim}", [r for r in rows if r["shape"][3] == dim])
    line("all", rows)


def write_csv(path, rows, args):
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["dtype", "dim", "causal", "batch", "heads", "seq", "contender", "us", "tflops", "relative_error", "flashcore_ratio"])
        for r in rows:
            batch, heads, seq, dim, causal = r["shape"]
            for n in r["us"]:
                out.writerow([args.dtype, dim, int(causal), batch, heads, seq, n, f"{r['us'][n]:.3f}", f"{r['tflops'][n]:.2f}", f"{r['errors'][n]:.2e}",
                              f"{r['ratio'][n]:.4f}"])


def main():
    def numbers(text):
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=numbers, default=[64, 128, 256])
    parser.add_argument("--seqs", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="batch * seq")
    parser.add_argument("--width", type=int, default=2048, help="heads * dim")
    parser.add_argument("--small", action="store_true", help="the table of short problems instead")
    parser.add_argument("--grouped", action="store_true", help="the table of grouped queries instead, in bf16")
    parser.add_argument("--causal", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--backend", choices=flashcore.BACKENDS, default="auto")
    parser.add_argument("--also", nargs="*", choices=flashcore.BACKENDS, default=[], help="other backends of FlashCore, in the same race")
    parser.add_argument("--l4", action="store_true", help="FlashCore in an L4's shared memory, 100 KiB per SM: its tiles and its number of blocks per SM; "
                                                          "the peers are not limited")
    parser.add_argument("--steady", action="store_true", help="each contender alone and hot, instead of in turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv")
    args = parser.parse_args()
    if args.grouped:
        args.dtype = "bf16"

    torch.manual_seed(0)
    unit = "us" if args.small else "TFLOP/s"
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {args.dtype}")
    if args.l4:
        print("# FlashCore in an L4's shared memory: tiles for 100 KiB per SM, only as many blocks per SM as fit there; the peers are not limited")
    others = ", ".join([*PEERS, *args.also])
    print(f"# ratio FlashCore over {others} | {unit} of FlashCore, {others} | relative error of FlashCore, worst peer | kernel")
    print("#  D causal batch heads    seq")
    rows = []
    for shape in shapes(args):
        rows.append(run_shape(shape, args))
        print_row(rows[-1], args)
    print_means(rows, args)
    if args.csv:
        write_csv(args.csv, rows, args)
    wrong = sum(not r["right"] for r in rows)
    if wrong:
        print(f"{wrong} shapes WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
