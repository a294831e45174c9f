"""CPU time, memory and equality of CascadedFlowModule beside an unoptimised composition of the same layers.

The reference (``benchmarks/_ccfm_reference.py``) computes what the published layers compute, as they compute it; see there
what it does without. Both share weights, data and random draws::

    python benchmarks/ccfm.py --output benchmarks/results/ccfm.md

Times are CPU seconds of interleaved calls in one process with one thread, so that a busy machine shifts both alike; ratios
are those of a round. A training step includes dropout, backward pass and Adam. Sampling solves both stages by two midpoint
steps each, with everything that we compute once per sample; one evaluation of a stage is measured apart. Memory is the
peak of one task in a fresh process beyond what it held before (Linux). Differences are the largest ones without dropout,
relative to the largest value of the same tensor (of the whole gradient); more than 1e-5 ends the run. What is measured is
appended to the records, of which the last ones count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("_ccfm_worker.py")
# Features of every gene that another model gives; none: scDFM.
ENCODERS = {"512 features per gene": 512, "none": 0}
TASKS = ("training step", "sampling", "evaluation, features", "evaluation, expression")
TOLERANCE = 1e-5
N_CELLS = 2  # the reference needs more than a GB per cell
LARGER = 8
OPTIONS = ("float32", "bfloat16")
GOALS = {"training step": (4, 4), "sampling": (5, 4)}  # speed, memory
Record = dict[str, Any]


def measure(task: str, **arguments: Any) -> Record:
    """Figures of one fresh process."""
    command = [sys.executable, "-W", "ignore", str(WORKER), task, json.dumps(arguments)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one_thread})
    if result.returncode:
        raise RuntimeError(f"{task} with {arguments} failed:\n{result.stderr[-3000:]}")
    record = {"task": task, **arguments, **json.loads(result.stdout.splitlines()[-1])}
    print(record, flush=True)
    return record


def measurements(rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tasks of the worker and their arguments."""
    for n_latent in ENCODERS.values():
        size = {"n_cells": N_CELLS, "n_latent": n_latent}
        yield "differences", size
        for what in TASKS:
            if n_latent or what != "evaluation, features":
                yield "seconds", {**size, "what": what, "rounds": rounds}
        for what in GOALS:
            for who in ("cellweave", "reference"):
                yield "memory", {**size, "what": what, "who": who}
        for option in OPTIONS:
            yield "ours", {"n_cells": LARGER, "n_latent": n_latent, "option": option, "rounds": 2}


def check(record: Record) -> None:
    """Refuse to compare the speed of two functions that differ."""
    for what, difference in record.get("differences", {}).items():
        if not difference <= TOLERANCE:  # also where it is not a number
            raise AssertionError(f"{what} differs by {difference:.1e} with {record['n_latent']} features.")


# ---------------------------------------------------------------- the tables


def report(records: list[Record], rounds: int) -> list[str]:
    """The page with all tables."""
    lines = [
        "# CascadedFlowModel beside an unoptimised composition of the same layers",
        "",
        f"`python benchmarks/ccfm.py --output benchmarks/results/ccfm.md --rounds {rounds}`, one thread, "
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}; 1,000 genes, 5,004 tokens with "
        "a graph of 40 neighbours, width 128, 4 layers, 8 heads. The docstring of the script states the protocol. Speed is "
        "the reference's CPU time divided by ours, round by round: median (range). Memory is the peak in MB that a task adds.",
        "",
        f"| encoder | task, {N_CELLS} cells | ours, CPU-s per cell | reference | speed | goal | "
        "memory, MB (ours / reference) | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {_key(record): record for record in records}  # the last one of a kind counts
    lines += [_speed_row(name, task, found) for name in ENCODERS for task in TASKS if _of(found, "seconds", name, task)]
    lines += ["", f"Largest relative differences, without dropout (goal: {TOLERANCE:.0e}):", ""]
    lines += ["| encoder | result | difference |", "|---|---|---|"]
    for name in ENCODERS:
        values = _of(found, "differences", name)["differences"]
        lines += [f"| {name} | {what} | {value:.1e} |" for what, value in values.items()]
    lines += ["", f"Ours alone with {LARGER} cells, CPU-s per cell; bfloat16 is `torch.autocast`:", ""]
    lines += ["| encoder | task | " + " | ".join(OPTIONS) + " |", "|---|---|" + "---|" * len(OPTIONS)]
    for name in ENCODERS:
        lines += _alone_rows(name, [_of(found, "ours", name, option)["seconds"] for option in OPTIONS])
    return lines


def _key(record: Record) -> tuple[Any, ...]:
    names = ("task", "n_latent", "what", "option", "who")
    return tuple(record[name] for name in names if name in record)


def _of(found: dict[tuple[Any, ...], Record], task: str, encoder: str, *rest: str) -> Record:
    return found.get((task, ENCODERS[encoder], *rest), {})


def _speed_row(name: str, task: str, found: dict[tuple[Any, ...], Record]) -> str:
    pairs = _of(found, "seconds", name, task)["seconds"]
    ours, reference = (statistics.median(values) / N_CELLS for values in zip(*pairs, strict=True))
    ratios = [reference / ours for ours, reference in pairs]
    cells = [name, task, f"{ours:.3f}", f"{reference:.3f}"]
    cells += [f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f}–{max(ratios):.1f})"]
    if task not in GOALS:
        return "| " + " | ".join([*cells, "", "", ""]) + " |"
    speed, memory = GOALS[task]
    mine, other = (_of(found, "memory", name, task, who)["memory_mb"] for who in ("cellweave", "reference"))
    cells += [f"≥ {speed}", f"{mine:.0f} / {other:.0f} (**{other / mine:.1f}x**)", f"≥ {memory}x"]
    return "| " + " | ".join(cells) + " |"


def _alone_rows(name: str, seconds: list[dict[str, list[float]]]) -> list[str]:
    rows = []
    for task in seconds[0]:
        values = (statistics.median(option[task]) / LARGER for option in seconds)
        rows.append("| " + " | ".join([name, task, *(f"{value:.3f}" for value in values)]) + " |")
    return rows


def main() -> None:
    """Measure, append to the records, and write the tables of all records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="markdown tables; records go beside it as .jsonl")
    parser.add_argument("--only", help="measure only what contains this text, such as 'memory'; '' for nothing")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    store = args.output.with_suffix(".jsonl")
    for task, arguments in measurements(args.rounds):
        if args.only is None or (args.only and args.only in json.dumps({"task": task, **arguments})):
            record = measure(task, **arguments)
            check(record)
            with store.open("a") as file:
                file.write(json.dumps(record) + "\n")
    stored = [json.loads(line) for line in store.read_text().splitlines()]
    known = {_key(record) for record in stored}
    missing = [m for m in measurements(args.rounds) if _key({"task": m[0], **m[1]}) not in known]
    if missing:
        print(f"{len(missing)} measurements are missing (first: {missing[0]}); the tables are not written.")
    else:
        args.output.write_text("\n".join(report(stored, args.rounds)) + "\n")


if __name__ == "__main__":
    main()
