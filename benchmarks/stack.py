"""Training and embedding throughput of StackModel beside the published implementation, as ratios of one run.

The original (``arc-stack`` on PyPI, non-commercial licence) stays in an environment of its own; it is run, not read::

    python -m venv arc && arc/bin/pip install torch==2.13.0 arc-stack
    python benchmarks/stack.py --original arc/bin/python --output benchmarks/results/stack.md

Implementations alternate (ours, original, ours, ...), each in a fresh single-threaded process with the same weights,
counts and random draws. Figures are CPU seconds, so that a busy machine shifts both alike; ratios are medians of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("_stack_worker.py")


def _config(n_hidden: int, n_cells: int, n_layers: int, n_contexts: int = 4, n_genes: int = 2000) -> dict:
    sizes = {"n_genes": n_genes, "n_hidden": n_hidden, "token_dim": 16, "n_cells": n_cells, "n_layers": n_layers}
    return {"model": {**sizes, "n_heads": 8, "n_proj": 64, "sw_weight": 0.01}, "n_contexts": n_contexts}


CONFIGS = {
    "H=50, N=128, L=4": _config(50, 128, 4),
    "H=50, N=256, L=9": _config(50, 256, 9),
    "H=100, N=256, L=9 (published size)": _config(100, 256, 9),
}
CASES = [
    ("train", "H=50, N=128, L=4", "float32"),
    ("train", "H=50, N=256, L=9", "float32"),
    ("train", "H=100, N=256, L=9 (published size)", "float32"),
    ("train", "H=50, N=256, L=9", "bfloat16"),
    ("embed", "H=50, N=128, L=4", "float32"),
    ("embed", "H=100, N=256, L=9 (published size)", "float32"),
]


def measure(
    python: str, implementation: str, task: str, config: dict, precision: str, repeats: int
) -> dict[str, float]:
    """Figures of one fresh process."""
    # -P: without it this file, stack.py, would be found before the package of the original
    command = [python, "-P", "-W", "ignore", str(WORKER), implementation, task, "--config", json.dumps(config)]
    command += ["--precision", precision, "--repeats", str(repeats)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise RuntimeError(f"{implementation} {task} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def compare(original: str, case: tuple[str, str, str], pairs: int, repeats: int) -> list[dict]:
    """Alternate the two implementations and return the figures of every pair."""
    task, name, precision = case
    records = []
    for _ in range(pairs):
        ours = measure(sys.executable, "cellweave", task, CONFIGS[name], precision, repeats)
        theirs = measure(original, "original", task, CONFIGS[name], precision, repeats)
        records.append({"case": case, "ours": ours, "theirs": theirs})
        print(records[-1], flush=True)
    return records


def row(case: tuple[str, str, str], records: list[dict]) -> str:
    """One row of the table from all recorded pairs of a case."""
    speed = [r["theirs"]["cpu_s"] / r["ours"]["cpu_s"] for r in records]
    memory = [r["theirs"]["memory_mb"] / r["ours"]["memory_mb"] for r in records]
    deviation = max(abs(r["ours"]["loss"] / r["theirs"]["loss"] - 1) for r in records)

    def middle(which: str, key: str) -> float:
        return statistics.median(r[which][key] for r in records)

    cells = [*case]
    cells += [f"{middle(w, 'cpu_s'):.2f} ({middle(w, 'cells_per_cpu_s'):.0f})" for w in ("ours", "theirs")]
    cells += [f"**{statistics.median(speed):.2f}** ({min(speed):.2f}–{max(speed):.2f})"]
    sizes = f"{middle('ours', 'memory_mb'):.0f} / {middle('theirs', 'memory_mb'):.0f}"
    cells += [f"{sizes} ({statistics.median(memory):.2f}x)", f"{deviation:.1e}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure the cases, append them to the records, and write the table of all records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", required=True, help="python of the environment with arc-stack")
    parser.add_argument("--output", type=Path, required=True, help="markdown table; records go beside it as .jsonl")
    parser.add_argument("--only", default="", help="measure only the cases that contain this text")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    store = args.output.with_suffix(".jsonl")
    for case in CASES:
        if args.only in " | ".join(case):
            records = compare(args.original, case, args.pairs, args.repeats)
            with store.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    recorded = [json.loads(line) for line in store.read_text().splitlines()]
    by_case = {case: [r for r in recorded if tuple(r["case"]) == case] for case in CASES}
    rows = [row(case, records) for case, records in by_case.items() if records]
    args.output.write_text("\n".join([*_header(args.pairs, args.repeats), *rows]) + "\n")


def _header(pairs: int, repeats: int) -> list[str]:
    return [
        "# StackModel beside the published implementation",
        "",
        f"`python benchmarks/stack.py --original <python with arc-stack> --output benchmarks/results/stack.md --pairs {pairs}",
        f"--repeats {repeats}`, one thread, {platform.machine()}, Python {platform.python_version()}; 2 000 genes, 4 contexts per step,",
        "token width 16, optimiser as in the training of each (AdamW; ours fused in float32). Speed is the original's CPU",
        "time divided by ours, pair by pair: median (range). Memory is the peak resident memory in MB that the task adds to",
        "the imported package and weights. The last column is the relative difference of the first training loss, or of",
        "the mean absolute embedding. `train` is one optimiser step; `embed` reads an .h5ad and embeds its cells.",
        "",
        "| task | configuration | precision | ours, CPU-s (cells per CPU-s) | original | speed | memory ours / original | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
