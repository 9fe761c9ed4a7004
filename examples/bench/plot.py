#!/usr/bin/env python3
"""Demonstrates the figures of bench and race.py as a picture: TFLOP/s over sequence length, one panel per head dim and mask.

    pip install matplotlib
    ./bench --csv bench.csv && python3 examples/bench/plot.py bench.csv bench.png
    python3 examples/bench/plot.py race.csv race.png --title "H200, fp16"
"""
import argparse
import collections
import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(paths):
    """(dim, causal) -> contender -> [(seq, tflops)]"""
    panels = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in paths:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                panels[int(row["dim"]), int(row["causal"])][row["contender"]].append((int(row["seq"]), float(row["tflops"])))
    return panels


def draw(panels, title):
    dims = sorted({dim for dim, _ in panels})
    causals = sorted({causal for _, causal in panels})
    figure, axes = plt.subplots(len(causals), len(dims), figsize=(4.2 * len(dims), 3.4 * len(causals)), squeeze=False, sharey=True)
    names = sorted({name for lines in panels.values() for name in lines})
    for y, causal in enumerate(causals):
        for x, dim in enumerate(dims):
            ax = axes[y][x]
            for name, points in panels.get((dim, causal), {}).items():
                ax.plot(*zip(*sorted(points)), marker="o", markersize=4, label=name, color=f"C{names.index(name)}")
            seqs = sorted({seq for points in panels.get((dim, causal), {}).values() for seq, _ in points})
            ax.set_xscale("log", base=2)
            ax.set_xticks(seqs, [str(seq) for seq in seqs], rotation=45)
            ax.grid(alpha=0.3)
            ax.set_title(f"head dim {dim}, {'causal' if causal else 'no mask'}", fontsize=10)
            ax.set_xlabel("sequence length")
        axes[y][0].set_ylabel("TFLOP/s")
    axes[0][0].set_ylim(bottom=0, top=1.08 * max(y for lines in panels.values() for points in lines.values() for _, y in points))  # shared by all
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="one or more CSV files, then the PNG to write")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    *tables, picture = args.files
    if not tables or not picture.endswith(".png"):
        parser.error("give CSV files, then a .png")
    draw(read(tables), args.title).savefig(picture, dpi=150)


if __name__ == "__main__":
    main()
