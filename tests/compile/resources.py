"""Resource gates: what ptxas reports for each shipped kernel against compile/limits.json.

limits.json holds, per header, one entry for each kernel family. In the name of a family `*` stands for one element type.
    registers     most registers per thread that the compiler was seen to use
    spill_bytes   most bytes of spill stores and loads together; above 0 the entry must carry a "reason"
    stack_bytes   largest stack frame
    static_smem   most static shared memory, bytes
"""

import json
import os
import re
import subprocess

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "limits.json")
FIGURES = ("registers", "spill_bytes", "stack_bytes", "static_smem")


def demangle(names):
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def short_name(demangled):
    """`void flashcore::v0_1_0::kernel<A, B>(args)` becomes `kernel<A, B>`."""
    depth = 0
    for end, c in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            demangled = demangled[:end]
            break
    return re.sub(r"^void |\bflashcore::|\bv\d+_\d+_\d+::", "", demangled)


def family_of(name):
    return re.sub(r"\b(__half|__nv_bfloat16|float|e4m3|e5m2)\b", "*", name)


def matches(family, name):
    return re.fullmatch(re.escape(family).replace(r"\*", r"[\w:]+"), name) is not None


def parse(log):
    """The kernels of a `ptxas -v` log: dicts with name, arch and the four figures."""
    kernels, current = [], None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            current = dict.fromkeys(FIGURES, 0) | {"symbol": m[1], "arch": m[2]}
            kernels.append(current)
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if current:
                current["stack_bytes"] = max(current["stack_bytes"], int(m[1]))
                current["spill_bytes"] += int(m[2]) + int(m[3])
        elif m := re.search(r"Used (\d+) registers", line):
            if current:
                current["registers"] = int(m[1])
                smem = re.search(r"(\d+) bytes smem", line)
                current["static_smem"] = int(smem[1]) if smem else 0
    for kernel, name in zip(kernels, demangle([k["symbol"] for k in kernels])):
        kernel["name"] = short_name(name)
    return kernels


def load():
    if not os.path.exists(PATH):
        return {}
    with open(PATH) as f:
        return json.load(f)


def violations(header, kernels):
    """Sentences, one for each breach of the gates; empty when all is well."""
    entries, found, used = load().get(header, []), [], set()
    for kernel in kernels:
        entry = next((e for e in entries if matches(e["kernel"], kernel["name"])), None)
        where = f'{kernel["name"]} on {kernel["arch"]}'
        if entry is None:
            found.append(f"{where}: no entry in limits.json (tests/run.sh --write-limits makes one)")
            continue
        used.add(entry["kernel"])
        for figure in FIGURES:
            if kernel[figure] > entry[figure]:
                found.append(f"{where}: {figure} is {kernel[figure]}, limit {entry[figure]}")
    for entry in entries:
        if entry["kernel"] not in used:
            found.append(f'{entry["kernel"]}: an entry in limits.json that matches no kernel')
        if entry["spill_bytes"] and not entry.get("reason"):
            found.append(f'{entry["kernel"]}: limits.json allows spills without a "reason"')
    return found


def measured_limits(header, kernels):
    """Entries for these kernels: figures as measured, reasons kept from the file."""
    reasons = {e["kernel"]: e["reason"] for e in load().get(header, []) if e.get("reason")}
    families = {}
    for kernel in kernels:
        entry = families.setdefault(family_of(kernel["name"]), dict.fromkeys(FIGURES, 0))
        for figure in FIGURES:
            entry[figure] = max(entry[figure], kernel[figure])
    entries = []
    for family in sorted(families):
        entry = {"kernel": family} | families[family]
        if entry["spill_bytes"]:
            entry["reason"] = reasons.get(family, "")
        entries.append(entry)
    return entries


def save(limits):
    blocks = []
    for header, entries in limits.items():
        lines = ",\n".join("    " + json.dumps(e) for e in entries)
        blocks.append(f'  "{header}": [\n{lines}\n  ]')
    with open(PATH, "w") as f:
        f.write("{\n" + ",\n".join(blocks) + "\n}\n")
