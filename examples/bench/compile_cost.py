#!/usr/bin/env python3
"""Demonstrates what FlashCore costs to compile: seconds, kernels and kilobytes of the default set for one architecture.

    python3 examples/bench/compile_cost.py --arch 89
    python3 examples/bench/compile_cost.py --arch 90 --limit 60       exit code 1 when it takes longer than 60 s
"""
import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def find_nvcc():
    for place in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", ROOT / "build/cuda/nvidia/cu13/bin/nvcc"):
        if place and pathlib.Path(place).exists():
            return str(place)
    sys.exit("compile_cost: no nvcc found; python3 examples/get_nvcc.py build/cuda puts one into build/cuda")


def kernels_of(report):
    """(mangled name, registers) of each kernel in ptxas's report."""
    entry = re.compile(r"Compiling entry function '([^']+)'.*?Used (\d+) registers", re.DOTALL)
    return [(name, int(registers)) for name, registers in entry.findall(report)]


def bytes_of_code(cubin):
    """Bytes of machine code in a 64-bit ELF file: the sections named .text.*"""
    data = cubin.read_bytes()

    def number(at, length):
        return int.from_bytes(data[at:at + length], "little")

    table, size, count = number(0x28, 8), number(0x3A, 2), number(0x3C, 2)
    headers = [table + size * i for i in range(count)]
    names = number(headers[number(0x3E, 2)] + 0x18, 8)
    return sum(number(h + 0x20, 8) for h in headers if data.startswith(b".text.", names + number(h, 4)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="89")
    parser.add_argument("--source", type=pathlib.Path, default=ROOT / "examples/common/library.cu")
    parser.add_argument("--limit", type=float, help="seconds allowed")
    args = parser.parse_args()
    nvcc, gencode = find_nvcc(), ["-gencode", f"arch=compute_{args.arch},code=sm_{args.arch}"]
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder)
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "--keep", "--keep-dir", folder, *gencode, "-c", str(args.source), "-o", str(made / "o.o")]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
        kernels = kernels_of(done.stderr)
        code = sum(bytes_of_code(cubin) for cubin in made.glob("*.cubin"))
        size = (made / "o.o").stat().st_size
    if not kernels:
        sys.exit("compile_cost: the compiler's report names no kernel")
    n = len(kernels)
    print(f"sm_{args.arch}: {seconds:.1f} s, {n} kernels, {seconds / n:.2f} s and {code / n / 1024:.1f} KB of code per kernel, "
          f"{code / 1024:.0f} KB of code, {size / 1024:.0f} KB object, most registers {max(r for _, r in kernels)}")
    if args.limit and seconds > args.limit:
        print(f"over the limit of {args.limit:.0f} s")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
