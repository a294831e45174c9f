"""What one process of a DDP test runs; started by ``test_ddp.py``, alone or twice.

Usage: python train_together.py OUTPUT DEVICES CASE, with the options of the cases below.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from cellweave.model import CascadedFlowModel, ScyanModel, StackModel
from cellweave.train import fsdp_strategy

# Cells per step of all processes together.
GLOBAL_BATCH = 32


def simulate() -> AnnData:
    """Counts of 75 cells of three unequal donors: contexts that are not full, and an odd number of them."""
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 4, size=(75, 1))
    counts = rng.poisson(depth * rng.gamma(1.0, 2.0, size=(1, 12))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(rng.integers(2, size=75), ["b0", "b1"]),
            "donor": pd.Categorical.from_codes(np.repeat([0, 1, 2], [41, 23, 11]), list("xyz")),
        },
        index=[f"cell{i}" for i in range(75)],
    )
    return AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(12)]))


def stack(adata: AnnData) -> StackModel:
    """A tiny StackModel."""
    StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
    torch.manual_seed(3)
    sizes = {"n_hidden": 4, "token_dim": 4, "n_layers": 1, "n_cells": 8, "n_heads": 2, "n_proj": 8}
    return StackModel(adata, **sizes, sw_weight=0.5, batch_condition="both")


def scyan(counts: AnnData) -> ScyanModel:
    """A tiny ScyanModel with a label in every fifth cell; two of three epochs use the temperature.

    Without the monotonicity term: its pairs are made among the cells of a process, so they differ with their number.
    """
    rho = np.array([[1, -1, -1, np.nan], [-1, 1, -1, -1], [-1, -1, 1, 1]])
    kind = np.arange(counts.n_obs) % 3
    noise = np.random.default_rng(1).normal(0, 0.3, size=(counts.n_obs, 4))
    adata = AnnData((np.nan_to_num(rho)[kind] + noise).astype(np.float32), obs=counts.obs[["batch"]].copy())
    adata.var_names = ["m0", "m1", "m2", "m3"]
    adata.obs["label"] = np.where(np.arange(counts.n_obs) % 5 == 0, np.array(["p0", "p1", "p2"])[kind], "unknown")
    ScyanModel.setup_anndata(adata, batch_key="batch", labels_key="label")
    torch.manual_seed(3)
    table = pd.DataFrame(rho, index=["p0", "p1", "p2"], columns=adata.var_names)
    sizes = {"n_hidden": 4, "n_hidden_layers": 1, "n_layers": 3}
    return ScyanModel(adata, table, temperature_period=3, monotone_weight=0.0, **sizes)


def ccfm(counts: AnnData) -> CascadedFlowModel:
    """A tiny CascadedFlowModel of two donors' cells, a third of them control cells."""
    adata = counts[counts.obs["donor"] != "z"].copy()
    adata.X = adata.X.log1p()
    adata.obs["perturbation"] = np.array(["control", "gene0", "gene1+drug"])[np.arange(adata.n_obs) % 3]
    CascadedFlowModel.setup_anndata(adata, "perturbation", pairing_keys=["donor"])
    torch.manual_seed(3)
    return CascadedFlowModel(adata, n_hidden=4, n_layers=1, n_heads=2, bottleneck_dim=4, graph_top_k=3)


class Record(Callback):
    """Rows that this process trained on, by epoch."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
        self.rows.setdefault(trainer.current_epoch, []).extend(batch["row"][batch["valid"]].tolist())


class Kill(Callback):
    """Sends SIGTERM to this process at a step, on one rank only."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank, self.n = step, rank, 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.n += 1
        if self.n == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


class CPUSharded(FSDPStrategy):
    """Lightning refuses its own FSDP strategy, but not a subclass, on CPUs, where torch can shard as well."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def sharded() -> FSDPStrategy:
    """The documented strategy, on CPUs."""
    strategy = fsdp_strategy()
    strategy.__class__ = CPUSharded
    return strategy


CASES = {
    "plain": {},
    "stop": {"early_stopping": True, "early_stopping_patience": 1, "early_stopping_min_delta": 100.0},
    "killed": {"kill": (5, 1)},
    "resumed": {"resume": "auto"},
    "alone": {"resume": "auto"},
    "fsdp": {"strategy": sharded},
    "scyan": {"model": scyan, "early_stopping": False},
    "ccfm": {"model": ccfm, "max_epochs": None, "max_steps": 100, "n_conditions_per_step": 2, "batch_size": 16},
    "scyan_stop": {
        "model": scyan,
        "max_epochs": 12,
        "early_stopping": True,
        "early_stopping_min_delta": 100.0,
        "early_stopping_patience": 1,
    },
}


def main(output: Path, devices: int, case: str) -> None:
    """Train, and write what happened to a file of this process."""
    warnings.simplefilter("ignore")
    options = dict(CASES[case])
    scvi.settings.seed = 0
    model = options.pop("model", stack)(simulate())
    record = Record()
    callbacks = [record]
    if "kill" in options:
        callbacks.append(Kill(*options.pop("kill")))
    if case in ("killed", "resumed", "alone"):
        options["checkpoint_dir"] = output / ("alone" if case == "alone" else "checkpoints")
    if devices > 1:
        strategy = options.pop("strategy", "ddp")
        options |= {"devices": devices, "strategy": strategy if isinstance(strategy, str) else strategy()}
    model.train(
        **{"max_epochs": 3, "lr": 0.01, "validation_size": 0.3, "batch_size": GLOBAL_BATCH // devices, **options},
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    rank = model.trainer.global_rank
    model.save(output / f"model-{case}-{devices}", overwrite=True)
    result = {
        "rows": record.rows,
        "train": model.train_indices.tolist(),
        "steps": model.trainer.global_step,
        "history": {name: frame[name].tolist() for name, frame in model.history.items()},
        "trained": model.is_trained,
    }
    torch.save(model.module.state_dict(), output / f"{case}-{devices}-{rank}.pt")
    (output / f"{case}-{devices}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
