#!/usr/bin/env python3
"""Puts NVIDIA's CUDA compiler into a folder and prints the path of nvcc: for machines that have none. Standard library only.

    python3 examples/get_nvcc.py build/cuda

NVIDIA publishes the compiler as PyPI packages; they are unpacked into the folder (270 MB) and nothing else on the machine changes.
"""
import pathlib
import subprocess
import sys

# One release for all, the one that FlashCore is tested with; cccl holds nv/target, which cuda_fp16.h includes.
PACKAGES = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl")]


def python_with_pip(folder):
    """This Python, or one in a virtual environment inside the folder where this one has no pip."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return sys.executable
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, stdout=sys.stderr)
    return str(folder / "venv" / "bin" / "python")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1]).resolve()
    root = folder / "nvidia" / "cu13"
    nvcc = root / "bin" / "nvcc"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [python_with_pip(folder), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run(pip + PACKAGES, check=True, stdout=sys.stderr)
        # Some versions of pip drop the execute bits.
        for tool in [*(root / "bin").iterdir(), *(root / "nvvm" / "bin").iterdir()]:
            tool.chmod(tool.stat().st_mode | 0o111)
        if not (root / "lib64").exists():
            (root / "lib64").symlink_to("lib")  # where this nvcc looks for the runtime
        subprocess.run([str(nvcc), "--version"], check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    print(nvcc)  # the one line on stdout: CMakeLists.txt reads it


if __name__ == "__main__":
    main()
