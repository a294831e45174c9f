"""Perturbation prediction on real screens: the fixed splits, and how a prediction of each is scored.

Every task gives what a predictor may see (``train``), what it has to predict (``pairs``), and the measured cells
(``truth``). All expression is log-normalised: ``log1p(1e4 * count / size)`` with the library size of the whole
transcriptome where the file has it. ``score(predict(task), task)`` gives the table of
:func:`cellweave.tl.evaluate_perturbation`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

import cellweave as cw

__all__ = ["DATA_SETS", "Task", "load", "score", "tasks"]

DATA_SETS = (
    "kang_ifnb",
    "norman_mcfaline_hvg500",
    "papalexi_thp1_299g",
    "gbm_panobinostat_300g",
    "sim_grn_perturb_800g",
)
KEY, CONTROL = "perturbation", "control"
_STRATA = ("cell_type", "donor", "batch")


@dataclass(frozen=True, eq=False)
class Task:
    """One question to a predictor.

    Parameters
    ----------
    name
        Name of the task.
    train
        Cells that a predictor may see, control cells included.
    truth
        Measured perturbed cells.
    pairs
        (perturbation, context) to predict, contexts named as in the table of scores.
    pairing_keys
        Columns whose combinations are the contexts.
    options
        Further arguments of the evaluation.
    """

    name: str
    train: AnnData
    truth: AnnData
    pairs: tuple[tuple[str, str], ...]
    pairing_keys: tuple[str, ...]
    options: Mapping[str, Any]

    def controls(self, context: str) -> AnnData:
        """Control cells of a context among the training cells."""
        obs = self.train.obs
        chosen = (obs[KEY] == CONTROL).to_numpy() & (_contexts(obs, self.pairing_keys) == context)
        return self.train[chosen].copy()


def load(name: str, folder: str | os.PathLike | None = None) -> AnnData:
    """A screen with log-normalised expression as float32 CSR, and raw counts in ``layers["counts"]``."""
    path = Path(folder or os.environ.get("CELLWEAVE_DATA", "../shared/data")) / f"{name}.h5ad"
    adata = anndata.read_h5ad(path)
    counts = sp.csr_matrix(adata.X, dtype=np.float64)
    full = "total_counts_full" in adata.obs
    size = adata.obs["total_counts_full"].to_numpy(dtype=float) if full else np.asarray(counts.sum(axis=1)).ravel()
    adata.layers["counts"] = counts.astype(np.float32)
    adata.X = sp.csr_matrix(sp.diags(1e4 / size) @ counts).log1p().astype(np.float32)
    return adata


def tasks(name: str, folder: str | os.PathLike | None = None) -> Iterator[Task]:
    """The tasks of a data set; all have the same training cells, so one model can answer them."""
    adata = load(name, folder)
    is_train = (adata.obs["dev_split"] == "train").to_numpy()
    train = adata[is_train].copy()
    for title, chosen, keys, options in _QUESTIONS[name](adata.obs):
        truth = adata[~is_train & chosen & (adata.obs[KEY] != CONTROL).to_numpy()].copy()
        pairs = _pairs(truth, train, keys)
        kept = pd.MultiIndex.from_arrays([truth.obs[KEY].astype(str), _contexts(truth.obs, keys)]).isin(pairs)
        strata = {"stratify_keys": tuple(key for key in _STRATA if key in adata.obs)}
        yield Task(title, train, truth[kept].copy(), pairs, keys, strata | options)


def score(pred: AnnData | Mapping[str, AnnData] | None, task: Task, **options: Any) -> pd.DataFrame:
    """Table of scores of a prediction, or several by name, with a column ``task``; None scores the baselines only."""
    settings = {"perturbation_key": KEY, "pairing_keys": task.pairing_keys, **task.options, **options}
    table = cw.tl.evaluate_perturbation(pred, task.truth, train=task.train, **settings)
    return table.assign(task=task.name)


def _contexts(obs: pd.DataFrame, keys: tuple[str, ...]) -> np.ndarray:
    """Names of the contexts as the evaluation writes them."""
    parts = [obs[key].astype(str) for key in keys]
    name = parts[0] if parts else pd.Series("", index=obs.index)
    for part in parts[1:]:
        name = name + " | " + part
    return name.to_numpy(dtype=object)


def _pairs(truth: AnnData, train: AnnData, keys: tuple[str, ...], min_cells: int = 15) -> tuple[tuple[str, str], ...]:
    """Groups with enough measured and control cells."""
    n_true = pd.Series(1, index=[truth.obs[KEY].astype(str), _contexts(truth.obs, keys)]).groupby(level=[0, 1]).sum()
    control = train.obs[train.obs[KEY] == CONTROL]
    n_control = pd.Series(_contexts(control, keys)).value_counts()
    return tuple(pair for pair, n in n_true.items() if n >= min_cells and n_control.get(pair[1], 0) >= min_cells)


def _everything(obs: pd.DataFrame) -> np.ndarray:
    return np.ones(len(obs), dtype=bool)


def _kang(obs: pd.DataFrame) -> Iterator[tuple]:
    unseen = (obs["cell_type"] == "CD14+ Monocytes").to_numpy()
    few = {"min_train_cells": 40}
    yield "Kang, unseen cell type", unseen, ("cell_type",), few
    donors = ~unseen & obs["donor"].isin(["1039", "1244"]).to_numpy()
    # shifts of a cell type are pooled over donors
    yield "Kang, unseen donor", donors, ("cell_type", "donor"), few | {"shift_keys": ("cell_type",)}


def _norman(obs: pd.DataFrame) -> Iterator[tuple]:
    norman = (obs["cell_type"] == "k562").to_numpy()
    labels = obs.loc[norman & (obs["dev_split"] == "dev").to_numpy(), KEY].astype(str).unique()
    seen = set(obs.loc[norman & (obs["dev_split"] == "train").to_numpy(), KEY].astype(str))
    kinds = obs[KEY].astype(str).map({label: _kind(label, seen) for label in labels})
    for kind in ("double 0/2 seen", "double 1/2 seen", "double 2/2 seen", "unseen single"):
        yield f"Norman, {kind}", norman & (kinds == kind).to_numpy(), ("cell_type",), {}
    # the second study of the file: other cells, knock-downs instead of activation
    yield "McFaline, unseen line x kinase", ~norman, ("cell_type",), {}


def _kind(label: str, seen: set[str]) -> str:
    parts = label.split("+")
    return "unseen single" if len(parts) == 1 else f"double {sum(part in seen for part in parts)}/2 seen"


def _papalexi(obs: pd.DataFrame) -> Iterator[tuple]:
    replicate = (obs[KEY] == "STAT1").to_numpy()
    yield "Papalexi, unseen knock-out", ~replicate, (), {}
    yield "Papalexi, unseen replicate", replicate, ("batch",), {}


def _gbm(obs: pd.DataFrame) -> Iterator[tuple]:
    yield "GBM, unseen patient", _everything(obs), ("donor",), {}


def _sim(obs: pd.DataFrame) -> Iterator[tuple]:
    single = ~obs[KEY].astype(str).str.contains("+", regex=False).to_numpy()
    for kind in ("buffering", "additive", "synergy"):
        yield f"Sim, double ({kind})", ~single & (obs["interaction"] == kind).to_numpy(), (), {}
    yield "Sim, unseen single", single, (), {}


_QUESTIONS = {
    "kang_ifnb": _kang,
    "norman_mcfaline_hvg500": _norman,
    "papalexi_thp1_299g": _papalexi,
    "gbm_panobinostat_300g": _gbm,
    "sim_grn_perturb_800g": _sim,
}
