#!/usr/bin/env python3
"""Demonstrates what hostile logits cost: time on them as a multiple of the time on normal data, at batch 4, seq 4096, heads * dim = 2048.

    python3 examples/python/hostile.py [backend ...]        # the one that flashcore_forward picks, or those named

std16: logits of standard deviation 16; ramp, falling: +10 or -10 nats every 64 keys; last, first: that key is 20 nats above the rest; huge: logits of
+-2.5e5. A kernel goes through the keys upwards (mma) or downwards (wgmma).
CUDA-graph replays timed by events, data kinds in turn, median of rounds."""
import itertools
import math
import sys

import flashcore
import torch
from race import race

KINDS = ["normal", "std16", "ramp", "falling", "last", "first", "huge"]
BATCH, SEQ, WIDTH = 4, 4096, 2048


def make(kind, dim, dtype):
    """q, k, v of shape (batch, seq, heads, dim). Where one dim carries the pattern, its logit is scale * q0 * k0."""
    shape, scale = (BATCH, SEQ, WIDTH // dim, dim), 1 / math.sqrt(dim)
    q, k, v = (torch.randn(shape, device="cuda") for _ in range(3))
    keys = torch.arange(SEQ, device="cuda").float()[None, :, None]
    if kind == "std16":
        q *= 16
    patterns = {"ramp": keys * (10 / 64), "falling": (SEQ - 1 - keys) * (10 / 64), "last": (keys == SEQ - 1) * 20, "first": (keys == 0) * 20}
    if kind in patterns:
        q[..., 0], k[..., 0] = 8, patterns[kind] / (8 * scale)
    if kind == "huge":
        q[..., 0], k[..., 0] = (math.sqrt(2.5e5 / scale) * torch.randn(shape[:3], device="cuda").sign() for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)]


def main():
    torch.manual_seed(1)
    print(f"# {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    print("# type dim causal | " + " ".join(f"{kind:>6}" for kind in KINDS) + " | us on normal data | kernel")
    types = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for backend, name, dim, causal in itertools.product(sys.argv[1:] or ["auto"], types, (64, 128, 256), (False, True)):
        calls = {kind: flashcore.Attention(*make(kind, dim, types[name]), causal=causal, backend=backend) for kind in KINDS}
        times = race(calls, False, 5)
        for kind in KINDS:
            assert torch.isfinite(calls[kind].o).all(), f"{kind}: not finite"
        ratios = " ".join(f"{times[kind] / times['normal']:{max(6, len(kind))}.2f}" for kind in KINDS)
        print(f"  {name} {dim:4d} {'yes' if causal else 'no':>6} | {ratios} | {times['normal']:.1f} | {calls['normal'].describe().kernel.decode()}")


if __name__ == "__main__":
    main()
