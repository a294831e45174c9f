"""Measure one implementation of Scyan in its own process; prints one JSON line. Started by ``benchmarks/scyan.py``.

Both implementations read the same prepared file and get the same table, widths, batch size, learning rate, temperature
schedule, number of epochs and seed, and run on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

# The defaults of the published model; both implementations get them by name.
SIZES = {"n_hidden": 16, "n_hidden_layers": 6, "n_layers": 7, "prior_std": 0.3, "temperature": 0.5}
BATCH_SIZE, LEARNING_RATE = 8192, 5e-4
_SOUGHT = 100  # values of the first cells are looked for in the model files


class Steps(NamedTuple):
    """What one implementation does, step by step; each takes what the step before returned."""

    build: Callable[[Any, pd.DataFrame], Any]
    train: Callable[[Any, int], None]
    predict: Callable[[Any], pd.Series]
    save: Callable[[Any, Path], None]
    epochs: Callable[[Any], int]


def main() -> None:
    """Measure one implementation on one prepared data set."""
    parser = argparse.ArgumentParser()
    parser.add_argument("implementation", choices=["cellweave", "original"])
    parser.add_argument("--data", type=Path, required=True, help="prepared .h5ad; the table is beside it as .csv")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    steps = {"cellweave": _cellweave, "original": _original}[args.implementation](args.seed)
    print(json.dumps(measure(steps, args.data, args.epochs)))


def measure(steps: Steps, data: Path, epochs: int) -> dict[str, Any]:
    """CPU seconds of every step, memory it adds to the imports and the data, the model file, and the scores."""
    import anndata as ad

    adata, table = ad.read_h5ad(data), pd.read_csv(data.with_suffix(".csv"), index_col=0)
    cells = np.asarray(adata[:_SOUGHT, table.columns].X, dtype=np.float32)
    sought = cells[0].tobytes(), cells[:, 0].tobytes()  # the matrix by rows, or by columns
    loaded = _status("VmRSS")
    _reset_peak()
    clock = [time.process_time()]
    peaks = []

    def lap() -> None:
        clock.append(time.process_time())
        peaks.append(_status("VmHWM") - loaded)

    model = steps.build(adata, table)
    lap()
    steps.train(model, epochs)
    lap()
    predicted = steps.predict(model)
    lap()
    with tempfile.TemporaryDirectory() as folder:
        steps.save(model, Path(folder) / "model")
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        holds_cells = any(values in path.read_bytes() for path in files for values in sought)
    seconds = np.diff(clock)
    return {
        "versions": versions(),
        "cells": adata.n_obs,
        "markers": table.shape[1],
        "epochs": steps.epochs(model),
        "build_cpu_s": seconds[0],
        "train_cpu_s": seconds[1],
        "predict_cpu_s": seconds[2],
        "build_memory_mb": peaks[0],
        "train_memory_mb": peaks[1],
        "memory_mb": peaks[2],
        "matrix_mb": adata.n_obs * table.shape[1] * 4 / 2**20,
        "file_mb": size / 2**20,
        "file_holds_cells": holds_cells,
        **_scores(adata.obs["cell_type"].to_numpy(dtype=str), np.asarray(predicted, dtype=str)),
    }


def _scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    known = np.unique(labels)
    return {
        "accuracy": float((labels == predicted).mean()),
        "f1_macro": float(f1_score(labels, predicted, labels=known, average="macro", zero_division=0)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
    }


# ---------------------------------------------------------------- the implementations


def _original(seed: int) -> Steps:
    import lightning
    import scyan

    lightning.seed_everything(seed, verbose=False)

    def build(adata: Any, table: pd.DataFrame) -> Any:
        renamed = {"hidden_size": SIZES["n_hidden"], **{k: v for k, v in SIZES.items() if k != "n_hidden"}}
        # no limit on the cells of an epoch: one epoch is one pass in both
        options = {"batch_size": BATCH_SIZE, "lr": LEARNING_RATE, "modulo_temp": 3, "max_samples": None}
        return scyan.Scyan(adata, table, warm_up=None, **renamed, **options)

    def train(model: Any, epochs: int) -> None:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        model.fit(max_epochs=epochs, patience=epochs + 1, min_delta=0, **quiet)

    def save(model: Any, path: Path) -> None:
        path.mkdir()
        model.save(str(path / "weights.pth"))

    return Steps(build, train, lambda m: m.predict(log_prob_th=-np.inf), save, lambda m: int(m.trainer.current_epoch))


def _cellweave(seed: int) -> Steps:
    import cellweave as cw

    cw.settings.seed = seed
    model_class = cw.model.ScyanModel

    def build(adata: Any, table: pd.DataFrame) -> Any:
        model_class.setup_anndata(adata)
        # the published start and objective, which are not our defaults
        objective = {"monotone_weight": 0.0, "weight_prior": 0.0, "temperature_period": 3}
        return model_class(adata, table, identity_init=False, covariate_scale=100.0, **objective, **SIZES)

    def train(model: Any, epochs: int) -> None:
        n_cells = model.adata.n_obs
        batch_size = min(BATCH_SIZE, n_cells)
        # the original leaves out the cells of an epoch that do not fill a step
        steps = {"batch_size": batch_size, "max_cells_per_epoch": n_cells // batch_size * batch_size}
        options = {"lr": LEARNING_RATE, "early_stopping": False, "train_size": 1.0, **steps}
        model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, **options)

    return Steps(
        build,
        train,
        lambda m: m.predict(log_density_threshold=-np.inf),
        lambda m, path: m.save(str(path)),
        lambda m: len(m.history["train_loss"]),
    )


# ---------------------------------------------------------------- memory


def _status(name: str) -> float:
    """A field of the status of this process (Linux), in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _reset_peak() -> None:
    """Forget the peak of the memory so far (Linux), which reading the data had set."""
    Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """Versions of what is installed here, for the header of the table."""
    names = ("scyan", "cellweave", "scvi-tools", "torch", "lightning", "anndata", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
