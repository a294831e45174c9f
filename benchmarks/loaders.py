"""Loaders side by side: cells per CPU second and memory, in memory and from disk, as ratios of one run.

Counts of 200 000 simulated cells and 5 000 genes, one in ten not zero, batches of 1 024 cells in shuffled order, one
thread. Every figure comes from the second pass of a fresh process. Loaders alternate in rounds and a ratio compares
figures of the same round, so that a busy machine shifts both alike. cellarium-ml needs an environment of its own::

    python -m venv cel && cel/bin/pip install torch==2.13.0 cellarium-ml
    python benchmarks/loaders.py --cellarium cel/bin/python --folder /tmp/loaders --output benchmarks/results/loaders.md

The folder takes 5 GB and is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

WORKER = Path(__file__).with_name("_loaders_worker.py")
REFERENCE = "scvi memory dense"
N_CELLS, N_MANY = 200_000, 1_000_000
# loader -> batches of a pass, 0 for all: the slowest are measured on a part
LOADERS = {
    REFERENCE: 0,
    "cellweave memory dense": 0,
    "cellweave memory sparse": 0,
    "scvi memory sparse": 0,
    "cellweave h5ad dense": 0,
    "cellweave h5ad sparse": 0,
    "cellweave zarr dense": 0,
    "cellweave zarr lz4 dense": 0,
    "cellweave zarr zstd dense": 0,
    "cellweave h5ad gzip": 0,
    "cellarium shards": 40,
    "scvi backed gzip": 5,
}


def run(python: str, task: str, folder: Path, cells: int = N_CELLS, limit: int = 0) -> dict:
    """Figures of one fresh process."""
    command = [python, "-W", "ignore", str(WORKER), task, "--folder", str(folder), "--cells", str(cells)]
    result = subprocess.run(
        [*command, "--limit", str(limit)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if result.returncode:
        raise RuntimeError(f"{task} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def rounds(cellarium: str, folder: Path, n: int) -> list[dict[str, dict]]:
    """Figures of every loader, ``n`` times."""
    found = []
    for _ in range(n):
        found.append({})
        for task, limit in LOADERS.items():
            python = cellarium if task.startswith("cellarium") else sys.executable
            found[-1][task] = run(python, task, folder, limit=limit)
            print(task, found[-1][task], flush=True)
    return found


def speed_rows(found: list[dict[str, dict]]) -> list[str]:
    """One row per loader: cells per CPU second, ratios to three references, memory."""
    rows = []
    for task in LOADERS:
        speed = statistics.median(r[task]["cells_per_cpu_s"] for r in found)
        memory = statistics.median(r[task]["memory_mb"] for r in found)
        ratios = [_ratio(found, task, other) for other in (REFERENCE, "cellarium shards", "scvi backed gzip")]
        rows.append(f"| {task} | {speed / 1e3:.1f} k | {' | '.join(ratios)} | {memory:.0f} |")
    return rows


def _ratio(found: list[dict[str, dict]], task: str, other: str) -> str:
    values = [r[task]["cells_per_cpu_s"] / r[other]["cells_per_cpu_s"] for r in found]
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """Prepare the files, measure all loaders and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cellarium", required=True, help="python of the environment with cellarium-ml")
    parser.add_argument("--folder", type=Path, required=True, help="where the simulated files are kept")
    parser.add_argument("--output", type=Path, required=True, help="markdown table")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    files = run(sys.executable, "prepare", args.folder)
    run(sys.executable, "prepare", args.folder, 2 * N_CELLS)
    found = rounds(args.cellarium, args.folder, args.rounds)
    doubled = [run(sys.executable, "cellweave h5ad dense", args.folder, 2 * N_CELLS) for _ in range(args.rounds)]
    written = run(sys.executable, "prepare many", args.folder, N_MANY)
    trained = run(sys.executable, "train", args.folder, N_MANY)
    lines = [
        *_header(args.rounds),
        *speed_rows(found),
        "",
        *_memory(found, doubled, written, trained),
        "",
        *_files(files),
    ]
    args.output.write_text("\n".join(lines) + "\n")


def _header(n: int) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("cellweave", "scvi-tools", "anndata", "zarr", "torch"))
    return [
        "# Loaders",
        "",
        f"`python benchmarks/loaders.py --cellarium <python with cellarium-ml> --folder <folder> --output "
        f"benchmarks/results/loaders.md --rounds {n}`; {versions}, Python {platform.python_version()}, {platform.machine()}. "
        "The docstring of the script states the protocol. Medians of the rounds, ratios with their range; memory is the peak "
        "that the loader adds to the imported packages, in MB. cellweave batches are contexts of 256 cells.",
        "",
        f"| loader | cells per CPU-s | / {REFERENCE} | / cellarium shards | / scvi backed gzip | memory, MB |",
        "|---|---|---|---|---|---|",
    ]


def _memory(found: list[dict[str, dict]], doubled: list[dict], written: dict, trained: dict) -> list[str]:
    once = statistics.median(r["cellweave h5ad dense"]["memory_mb"] for r in found)
    twice = statistics.median(r["memory_mb"] for r in doubled)
    return [
        "## Memory",
        "",
        f"* Streaming {N_CELLS:,} cells from an h5ad adds {once:.0f} MB, twice as many cells {twice:.0f} MB.",
        f"* Writing a store of {N_MANY:,} cells x 1,000 genes ({written['bytes'] / 1e9:.2f} GB), grouped by donor, from 20 "
        f"files: {written['write_store_cpu_s']:.0f} CPU-s, peak memory of the process {written['peak_mb']:.0f} MB.",
        f"* Training StackModel on it for one epoch and embedding all cells: peak memory {trained['train_peak_mb']:.0f} MB in "
        f"training, {trained['peak_mb']:.0f} MB with the embedding ({trained['setup_cpu_s']:.0f} + "
        f"{trained['train_cpu_s']:.0f} + {trained['embed_cpu_s']:.0f} CPU-s for setup with its check of every count, training "
        f"and embedding; all embeddings finite: {trained['finite']}).",
    ]


def _files(files: dict) -> list[str]:
    sizes = "; ".join(f"{name} {size / 1e6:.0f} MB" for name, size in files["bytes"].items() if str(N_CELLS) in name)
    return ["## Files", "", sizes + "."]


if __name__ == "__main__":
    main()
