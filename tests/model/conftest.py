"""Simulated marker intensities with a known answer, for the tests of `ScyanModel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData

from cellweave.model import ScyanModel

MARKERS = ["CD3", "CD4", "CD8", "CD19", "CD56", "CD14"]
# What a second batch adds to every marker, in the unit in which positive cells are 2 above negative ones.
SHIFT = np.array([1.2, -1.2, 0.65, 0.65, -0.65, 1.2])
# Mean of populations of which the table does not know a marker.
UNKNOWN = 0.3


def table() -> pd.DataFrame:
    """Five populations in two levels of groups; three entries are unknown."""
    n = np.nan
    rho = [
        [-1, -1, -1, 1, -1, -1],
        [1, 1, -1, -1, -1, n],
        [1, -1, 1, -1, n, -1],
        [-1, -1, n, -1, 1, -1],
        [-1, -1, -1, -1, -1, 1],
    ]
    index = pd.MultiIndex.from_arrays(
        [["B", "CD4 T", "CD8 T", "NK", "Mono"], ["B", "T", "T", "NK", "Mono"], ["lymphoid"] * 4 + ["myeloid"]],
        names=["population", "lineage", "origin"],
    )
    return pd.DataFrame(rho, index=index, columns=MARKERS)


def simulate(n_cells: int = 500, seed: int = 0, shift: float = 1.0, effect: float = 0.0) -> AnnData:
    """Scaled intensities of the populations of the table, two batches apart by a shift, and two variables not in the table.

    ``effect`` is what a stimulus, `condition`, and a standard deviation of `age` add to CD4 and CD56.
    """
    rng, rho = np.random.default_rng(seed), table()
    kind = rng.choice(5, size=n_cells, p=[0.15, 0.3, 0.25, 0.1, 0.2])
    batch, condition, age = rng.integers(2, size=n_cells), rng.integers(2, size=n_cells), rng.uniform(20, 80, n_cells)
    x = rho.fillna(UNKNOWN).to_numpy()[kind] + rng.normal(0, 0.3, size=(n_cells, len(MARKERS)))
    x += shift * batch[:, None] * SHIFT
    x[:, 1] += effect * condition
    x[:, 4] += effect * (age - 50) / 17
    x = np.column_stack([x, rng.uniform(0, 5000, size=(n_cells, 2))])
    obs = pd.DataFrame(
        {
            "truth": pd.Categorical.from_codes(kind, list(rho.index.get_level_values(0))),
            "batch": pd.Categorical.from_codes(batch, ["b0", "b1"]),
            "condition": pd.Categorical.from_codes(condition, ["rest", "stim"]),
            "age": age,
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    return AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[*MARKERS, "FSC", "SSC"]))


@pytest.fixture
def marker_table() -> pd.DataFrame:
    """The table of the simulated populations."""
    return table()


@pytest.fixture(scope="session")
def make_markers() -> Callable[..., AnnData]:
    """Function that simulates cells: ``make_markers(n_cells=500, seed=0, shift=1.0, effect=0.0)``."""
    return simulate


@pytest.fixture(scope="session")
def scyan_quick() -> dict[str, Any]:
    """Arguments of a short, silent training run."""
    return {"max_epochs": 6, "accelerator": "cpu", "enable_progress_bar": False, "batch_size": 64, "lr": 2e-3}


@pytest.fixture(scope="session")
def fit_scyan(scyan_quick) -> Callable[..., ScyanModel]:
    """Function that trains a model: ``fit_scyan(adata, table=None, setup={}, training={}, **arguments)``."""

    def fit(
        adata: Any, knowledge: Any = None, setup: dict | None = None, training: dict | None = None, **arguments: Any
    ) -> ScyanModel:
        scvi.settings.seed = 0
        ScyanModel.setup_anndata(adata, **{"batch_key": "batch", **(setup or {})})
        model = ScyanModel(adata, table() if knowledge is None else knowledge, **arguments)
        model.train(**{**scyan_quick, **(training or {})})
        return model

    return fit


COVARIATES = {"categorical_covariate_keys": ["condition"], "continuous_covariate_keys": ["age"]}


@pytest.fixture(scope="session")
def scyan(fit_scyan) -> ScyanModel:
    """A model trained on two batches with two further covariates. Shared by many tests: never change it."""
    return fit_scyan(simulate(effect=0.4), setup=COVARIATES, training={"max_epochs": 30})


@pytest.fixture
def scyan_data() -> AnnData:
    """The data of :func:`scyan`, without anything that a model wrote."""
    return simulate(effect=0.4)
