#!/usr/bin/env python3
"""Warns about each header that no receipt of a GPU run vouches for. Never fails: where this runs there may be no GPU."""
import hashlib
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load_receipts():
    receipts = []
    for path in sorted((ROOT / "tests" / "receipts").glob("*.json")):
        try:
            receipts.append((path.name, json.loads(path.read_text())))
        except ValueError:
            print(f"!!! WARNING: {path.name} is not JSON")
    return receipts


def verdict(header, receipts):
    """The receipts that tested exactly this text and passed, as words; or why there is none."""
    digest = hashlib.sha256(header.read_bytes()).hexdigest()
    same = [(name, r) for name, r in receipts if r.get("headers", {}).get(header.name) == digest]
    passed = [f"{r.get('device')}, {r.get('date')}" for _, r in same if r.get("all_passed")]
    if passed:
        return True, "; ".join(passed)
    if same:
        return False, "tested as it is, and FAILED (" + ", ".join(name for name, _ in same) + ")"
    return False, "CHANGED since its last GPU run" if any(header.name in r.get("headers", {}) for _, r in receipts) else "never ran on a GPU"


def main():
    receipts = load_receipts()
    for header in sorted(list(ROOT.glob("flashcore*.h")) + list(ROOT.glob("flashcore*.cuh"))):
        good, words = verdict(header, receipts)
        if good:
            print(f"receipt for {header.name}: {words}")
        else:
            print("!" * 100 + f"\n!!! WARNING: {header.name}: {words}\n!!! Run python3 tests/gpu/run.py on a machine with a GPU.\n" + "!" * 100)


if __name__ == "__main__":
    main()
