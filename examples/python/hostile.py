#!/usr/bin/env python3
"""Demonstrates what hostile logits cost: time on them as a multiple of the time on normal data, at batch 4, seq 4096, heads * dim = 2048.

    python3 examples/python/hostile.py

std16: logits of standard deviation 16; ramp: +10 nats every 64 keys; last: one key 20 nats above the rest, processed last; huge: logits of +-2.5e5.
CUDA-graph replays timed by events, data kinds in turn, median of rounds."""
import math

import flashcore
import torch
from race import race

KINDS = ["normal", "std16", "ramp", "last", "huge"]
BATCH, SEQ, WIDTH = 4, 4096, 2048


def make(kind, dim, dtype):
    """q, k, v of shape (batch, seq, heads, dim). Where one dim carries the pattern, its logit is scale * q0 * k0."""
    shape, scale = (BATCH, SEQ, WIDTH // dim, dim), 1 / math.sqrt(dim)
    q, k, v = (torch.randn(shape, device="cuda") for _ in range(3))
    keys = torch.arange(SEQ, device="cuda").float()[None, :, None]
    if kind == "std16":
        q *= 16
    if kind in ("ramp", "last"):
        q[..., 0] = 8
        k[..., 0] = keys * (10 / 64) / (8 * scale) if kind == "ramp" else (keys == SEQ - 1) * 20 / (8 * scale)
    if kind == "huge":
        q[..., 0], k[..., 0] = (math.sqrt(2.5e5 / scale) * torch.randn(shape[:3], device="cuda").sign() for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)]


def main():
    torch.manual_seed(1)
    print(f"# {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n# type dim causal | " + " ".join(f"{kind:>6}" for kind in KINDS) + " | us on normal data")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for dim in (64, 128, 256):
            for causal in (False, True):
                calls = {kind: flashcore.Attention(*make(kind, dim, dtype), causal=causal) for kind in KINDS}
                times = race(calls, False, 7)
                for kind in KINDS:
                    assert torch.isfinite(calls[kind].o).all(), f"{kind}: not finite"
                ratios = " ".join(f"{times[kind] / times['normal']:6.2f}" for kind in KINDS)
                print(f"  {name} {dim:4d} {'yes' if causal else 'no':>6} | {ratios} | {times['normal']:.1f}")


if __name__ == "__main__":
    main()
