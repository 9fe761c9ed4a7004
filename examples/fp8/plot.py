#!/usr/bin/env python3
"""Demonstrates the table of this example as a picture: a pair of bars for each way of quantising.

    pip install matplotlib
    ./fp8 | python3 examples/fp8/plot.py errors.png
"""
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    lines = sys.stdin.read().splitlines()
    rows = [m.groups() for m in (re.fullmatch(r"(one .*?) +([\d.e+-]+) +([\d.e+-]+)", line) for line in lines) if m]
    if not rows or len(sys.argv) != 2:
        sys.exit(__doc__)
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.6))
    for offset, column, label in ((-0.2, 1, "against fp64 on the fp8 values"), (0.2, 2, "against fp64 on the fp16 values")):
        bars = axis.barh([i + offset for i in range(len(rows))], [100 * float(row[column]) for row in rows], 0.4, label=label)
        axis.bar_label(bars, fmt="%.1f %%", padding=3)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("relative error of O, %")
    axis.set_title(lines[0], fontsize="medium")
    axis.margins(x=0.15)
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()
