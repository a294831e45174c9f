"""CPU time, memory and files of ScyanModel beside the published ``scyan`` package, as ratios of one run.

The original stays in an environment of its own; it is run, not read::

    python -m venv original && original/bin/pip install torch==2.13.0 scyan
    python benchmarks/scyan.py --original-python original/bin/python --folder <folder for prepared data> \
        --output benchmarks/results/scyan.md

Both get the same prepared intensities, table, sizes, batch size, learning rate, temperature schedule, seed and number of
epochs; early stopping is off in both. In every round the implementations take turns, each in a fresh process with one
thread. Times are CPU seconds, so that a busy machine shifts both alike; ratios are those of a round. Memory is the peak
that building, training and predicting add to the process with imported packages and loaded data (Linux).

Data: ``bmmc_basal1.h5ad`` and ``levine32_stratified.h5ad`` from ``$CELLWEAVE_DATA/cytometry``, transformed as the notes
beside them say, and a simulated set of a million cells for the memory.
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
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("_scyan_worker.py")
# Epochs after which the published early stopping ended on the real sets; one is enough for the memory.
EPOCHS = {"bmmc": 17, "levine32": 100, "simulated": 1}
TITLES = {"bmmc": "BMMC", "levine32": "Levine-32", "simulated": "simulated"}


# ---------------------------------------------------------------- data


def prepare(name: str, folder: Path) -> Path:
    """Write the transformed cells and, beside them, the table; what is there is kept."""
    path = folder / f"{name}.h5ad"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        adata, table = _simulated() if name == "simulated" else _real(name)
        table.to_csv(path.with_suffix(".csv"))
        adata.write_h5ad(path)
    return path


def _real(name: str) -> tuple[Any, Any]:
    """Labelled cells of the populations of the table, transformed as in the published comparison."""
    import anndata as ad
    import pandas as pd

    source = Path(os.environ.get("CELLWEAVE_DATA", "shared/data")) / "cytometry"
    files = {"bmmc": ("bmmc_basal1.h5ad", "table_bmmc.csv"), "levine32": ("levine32_stratified.h5ad", "table_aml.csv")}
    cells, rows = files[name]
    adata, table = ad.read_h5ad(source / cells), pd.read_csv(source / rows, index_col=0)
    adata = adata[adata.obs["cell_type"].isin(table.index)].copy()
    x = np.arcsinh((np.asarray(adata.X, dtype=np.float64) - 1) / 5)
    if name == "bmmc":
        x = x / x.std(0) - 1
    else:  # a few cells per population: moments of the whole study
        moments = pd.read_csv(source / "aml_marker_mean_std.csv", index_col=0).loc[adata.var_names]
        x = (x - moments["mean"].to_numpy()) / moments["std"].to_numpy()
    obs = adata.obs[["cell_type"]].astype(str)
    return ad.AnnData(x.clip(-10, 10).astype(np.float32), obs=obs, var=pd.DataFrame(index=adata.var_names)), table


def _simulated(n_cells: int = 1_000_000, n_markers: int = 30, n_populations: int = 20) -> tuple[Any, Any]:
    """Two modes per marker, a table that knows two thirds of the entries."""
    import anndata as ad
    import pandas as pd

    rng = np.random.default_rng(0)
    rho = rng.choice([-1.0, 1.0], size=(n_populations, n_markers))
    names = [f"population {i}" for i in range(n_populations)]
    markers = [f"marker {i}" for i in range(n_markers)]
    codes = rng.integers(n_populations, size=n_cells)
    x = rng.standard_normal((n_cells, n_markers), dtype=np.float32)
    x *= 0.4
    x += rho.astype(np.float32)[codes]
    x /= x.std(0)
    table = pd.DataFrame(np.where(rng.random(rho.shape) < 1 / 3, np.nan, rho), index=names, columns=markers)
    obs = pd.DataFrame({"cell_type": pd.Categorical.from_codes(codes, names)}, index=np.arange(n_cells).astype(str))
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=markers)), table


# ---------------------------------------------------------------- measuring


def measure(python: str, implementation: str, data: Path, epochs: int) -> dict[str, Any]:
    """Figures of one fresh process."""
    # -P: without it this file, scyan.py, would be found before the package of the original
    command = [python, "-P", "-W", "ignore", str(WORKER), implementation, "--data", str(data), "--epochs", str(epochs)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one_thread})
    if result.returncode:
        raise RuntimeError(f"{implementation} on {data.stem} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure the data sets round by round, append to the records, and write the table of all records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original-python", help="python of the environment with scyan; without it only ours is run")
    parser.add_argument("--folder", type=Path, required=True, help="prepared data are written here")
    parser.add_argument("--output", type=Path, required=True, help="markdown table; records go beside it as .jsonl")
    parser.add_argument("--only", choices=list(EPOCHS), action="append", help="data set; may be repeated")
    parser.add_argument("--implementations", nargs="+", default=["cellweave", "original"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pythons = {"cellweave": sys.executable, "original": args.original_python}
    store = args.output.with_suffix(".jsonl")
    for name in args.only or EPOCHS:
        data = prepare(name, args.folder)
        for _ in range(args.rounds):
            runs = {i: measure(pythons[i], i, data, EPOCHS[name]) for i in args.implementations if pythons[i]}
            with store.open("a") as file:
                file.write(json.dumps({"data": name, **runs}) + "\n")
            print(name, runs, flush=True)
    records = [json.loads(line) for line in store.read_text().splitlines()]
    args.output.write_text("\n".join(_report(records, args)) + "\n")


# ---------------------------------------------------------------- the tables


def _report(records: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    by_data = {name: [r for r in records if r["data"] == name] for name in EPOCHS}
    by_data = {name: found for name, found in by_data.items() if found}
    versions = {who: run["versions"] for record in records for who, run in record.items() if who != "data"}
    lines = [
        "# ScyanModel beside the published package",
        "",
        "`python benchmarks/scyan.py --original-python <python with scyan> --folder <folder> --output "
        f"benchmarks/results/scyan.md --rounds {args.rounds}`, one thread, {platform.machine()}; the docstring of the "
        "script states the protocol. Medians of the rounds; speed is the original's CPU time divided by ours, round by "
        "round: median (range). Hyper-parameters, seed 0 and the number of epochs are the same in both.",
        "",
        "| data | cells × markers | epochs | training, CPU-s (ours / original) | speed | prediction, CPU-s | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_speed_row(name, found) for name, found in by_data.items()]
    lines += [
        "",
        "| data | data matrix, MB | memory added, MB (ours / original) | goal: 1.2 × matrix + 100 MB | "
        "model file, MB | cells in the file |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_memory_row(name, found) for name, found in by_data.items()]
    lines += ["", "| data | accuracy (ours / original) | macro F1 | balanced accuracy |", "|---|---|---|---|"]
    lines += [_score_row(name, found) for name, found in by_data.items()]
    return [*lines, "", *(f"* {who}: `{json.dumps(found)}`" for who, found in sorted(versions.items()))]


def _middle(records: list[dict[str, Any]], who: str, key: str) -> float:
    values = [record[who][key] for record in records if who in record]
    return statistics.median(values) if values else float("nan")


def _both(records: list[dict[str, Any]], key: str, digits: int) -> str:
    return " / ".join(f"{_middle(records, who, key):.{digits}f}" for who in ("cellweave", "original"))


def _speed(records: list[dict[str, Any]], key: str) -> str:
    ratios = [r["original"][key] / r["cellweave"][key] for r in records if {"original", "cellweave"} <= set(r)]
    return f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f}–{max(ratios):.1f})" if ratios else "–"


def _runs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for record in records for who, run in record.items() if who != "data"]


def _speed_row(name: str, records: list[dict[str, Any]]) -> str:
    first, epochs = _runs(records)[0], sorted({run["epochs"] for run in _runs(records)})
    size = f"{first['cells']:,} × {first['markers']}"
    cells = [TITLES[name], size, ", ".join(map(str, epochs)), _both(records, "train_cpu_s", 2)]
    cells += [_speed(records, "train_cpu_s"), _both(records, "predict_cpu_s", 3), _speed(records, "predict_cpu_s")]
    return "| " + " | ".join(cells) + " |"


def _memory_row(name: str, records: list[dict[str, Any]]) -> str:
    matrix = _runs(records)[0]["matrix_mb"]
    holds = " / ".join(
        "yes" if any(r[who]["file_holds_cells"] for r in records if who in r) else "no"
        for who in ("cellweave", "original")
    )
    cells = [TITLES[name], f"{matrix:.1f}", _both(records, "memory_mb", 0), f"{1.2 * matrix + 100:.0f}"]
    return "| " + " | ".join([*cells, _both(records, "file_mb", 2), holds]) + " |"


def _score_row(name: str, records: list[dict[str, Any]]) -> str:
    scores = [_both(records, key, 3) for key in ("accuracy", "f1_macro", "balanced_accuracy")]
    return "| " + " | ".join([TITLES[name], *scores]) + " |"


if __name__ == "__main__":
    main()
