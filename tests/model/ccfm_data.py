"""A small simulated perturbation screen whose effects are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from anndata import AnnData
from numpy.typing import NDArray

from cellweave.model import CascadedFlowModel

N_GENES = 30
GENES = [f"g{j:02d}" for j in range(N_GENES)]
# Genes that are perturbed; "drug" is no gene, and "g05" does nothing.
SINGLES = ("drug", "g00", "g01", "g02", "g03", "g05")
DOUBLES = ("g00+g01", "g02+g03")
HELD_OUT = "g01+g02"
NULL = "g05"
SETUP: dict[str, Any] = {"perturbation_key": "perturbation", "pairing_keys": ["line"]}
SMALL: dict[str, Any] = {
    "n_hidden": 8,
    "n_layers": 1,
    "n_heads": 2,
    "bottleneck_dim": 8,
    "decoder_depth": 1,
    "graph_top_k": 5,
}
QUICK: dict[str, Any] = {
    "max_steps": 20,
    "batch_size": 16,
    "calibrate": False,
    "accelerator": "cpu",
    "enable_progress_bar": False,
}


def effects() -> dict[str, NDArray[np.float64]]:
    """Change of the log rate of every gene by every single perturbation: some genes rise, others fall."""
    rng = np.random.default_rng(11)
    found = {}
    for name in SINGLES:
        change = np.zeros(N_GENES)
        genes = rng.permutation(np.arange(6, N_GENES))[:8]
        change[genes[:4]], change[genes[4:]] = 1.5, -1.5
        found[name] = change * (name != NULL)
    return found


def simulate_screen(n_cells: int = 40, seed: int = 0, labels: tuple[str, ...] = (*SINGLES, *DOUBLES)) -> AnnData:
    """Log-normalised sparse expression of two lines; ``n_cells`` of every condition in each, twice as many controls."""
    rng = np.random.default_rng(seed)
    single = effects()
    base = np.log(np.random.default_rng(5).gamma(2.0, 2.0, size=(2, N_GENES)) + 0.3)
    rows, names, lines = [], [], []
    for i, line in enumerate(("K562", "RPE1")):
        for label in ("control", *labels):
            n = 2 * n_cells if label == "control" else n_cells
            change = sum((single[part] for part in label.split("+") if part in single), np.zeros(N_GENES))
            depth = rng.uniform(0.7, 1.4, size=(n, 1))
            rows.append(rng.poisson(np.exp(base[i] + change) * depth))
            names += [label] * n
            lines += [line] * n
    counts = np.concatenate(rows).astype(np.float64)
    x = np.log1p(100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)).astype(np.float32)
    order = rng.permutation(len(x))
    obs = pd.DataFrame({"perturbation": names, "line": lines}, index=[f"cell{i}" for i in range(len(x))])
    obs["day"] = np.where(rng.random(len(x)) < 0.5, "d1", "d2")
    return AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=GENES))[order].copy()


def create(adata: AnnData, setup: dict[str, Any] | None = None, seed: int = 0, **arguments: Any) -> CascadedFlowModel:
    """A small model of ``adata``."""
    scvi.settings.seed = seed
    CascadedFlowModel.setup_anndata(adata, **{**SETUP, **(setup or {})})
    return CascadedFlowModel(adata, **{**SMALL, **arguments})


def fit(
    adata: AnnData,
    setup: dict[str, Any] | None = None,
    seed: int = 0,
    training: dict[str, Any] | None = None,
    **arguments: Any,
) -> CascadedFlowModel:
    """A small model, trained a few steps."""
    model = create(adata, setup, seed, **arguments)
    model.train(**{**QUICK, **(training or {})})
    return model


def dense(adata: AnnData) -> NDArray[np.float32]:
    """Expression as an array."""
    return adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)


def mean_of(adata: AnnData, label: str, line: str | None = None) -> NDArray[np.float64]:
    """Mean expression of a condition."""
    rows = (adata.obs["perturbation"] == label).to_numpy()
    if line is not None:
        rows = rows & (adata.obs["line"] == line).to_numpy()
    return dense(adata)[rows].mean(0, dtype=np.float64)
