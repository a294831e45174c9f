"""Shared fixtures. Number fixtures of the originals are read from ``tests/parity/fixtures``."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from anndata import AnnData
from hypothesis import settings

from cellweave.model import StackModel

HERE = Path(__file__).parent

# the same examples on every run, and no deadline: machines that run tests are shared
settings.register_profile("cellweave", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=200)
settings.load_profile(os.environ.get("CELLWEAVE_HYPOTHESIS", "cellweave"))


_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state.

    Where JAX is installed, scvi-tools lengthens an environment variable whenever a seed is set; after four thousand tests it
    would be too long for any new process to start.
    """
    scvi.settings.seed = 0
    os.environ["XLA_FLAGS"] = _XLA_FLAGS


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell, which makes them ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def stack_tiny() -> tuple[dict, dict[str, np.ndarray]]:
    """Numbers computed by the published Stack implementation: (metadata, arrays)."""
    folder = HERE / "parity" / "fixtures"
    with np.load(folder / "stack_tiny.npz") as arrays:
        return json.loads((folder / "stack_tiny.json").read_text()), dict(arrays)


def shared_data(name: str) -> Path:
    """Path of a real data set that is not part of the repository; skips the test where it is absent."""
    folder = Path(os.environ.get("CELLWEAVE_DATA", HERE.parents[1] / "shared" / "data"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"real data set {name} not found in {folder}; set CELLWEAVE_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Function from the name of a real data set to its path; see :func:`shared_data`."""
    return shared_data


def simulate(n_cells: int = 96, n_genes: int = 20, seed: int = 0) -> AnnData:
    """Counts of three cell types with their own marker genes, two batches, four unequal donors; CSR float32."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n_cells)
    profile = np.ones((3, n_genes))
    for k in range(3):
        profile[k, k::3] = 6.0
    depth = rng.uniform(1.0, 3.0, size=(n_cells, 1))
    counts = rng.poisson(profile[kind] * depth).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(kind, ["B", "NK", "T"]),
            "batch": pd.Categorical.from_codes(rng.integers(2, size=n_cells), ["b0", "b1"]),
            "donor": pd.Categorical.from_codes(np.minimum(rng.geometric(0.4, size=n_cells) - 1, 3), list("wxyz")),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    return AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]))


@pytest.fixture(scope="session")
def make_adata() -> Callable[..., AnnData]:
    """Function that simulates a small AnnData: ``make_adata(n_cells=96, n_genes=20, seed=0)``."""
    return simulate


@pytest.fixture(scope="session")
def tiny() -> dict[str, int | float]:
    """Arguments of a model that trains in a second."""
    return {"n_hidden": 4, "token_dim": 4, "n_layers": 1, "n_cells": 16, "n_heads": 2, "n_proj": 8}


@pytest.fixture(scope="session")
def quick() -> dict[str, object]:
    """Arguments of a short, silent training run."""
    return {"max_epochs": 2, "batch_size": 32, "accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="session")
def trained(tiny, quick) -> StackModel:
    """A trained tiny model with batch, label and context columns. Shared by many tests: never change it."""
    scvi.settings.seed = 0
    adata = simulate()
    StackModel.setup_anndata(adata, batch_key="batch", labels_key="cell_type", context_key="donor")
    model = StackModel(adata, **tiny)
    model.train(**quick)
    return model
