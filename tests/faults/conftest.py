"""The model families of the package and what every fault test shares. A new family joins by one line in FAMILIES."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

from cellweave.model import CascadedFlowModel, ScyanModel, StackModel


class Family(NamedTuple):
    """How to build, train and ask a model, and what it reads."""

    model: type
    arguments: dict[str, Any]
    training: dict[str, Any]
    reads: str  # "counts", "intensities" or "expression"
    part: str  # setup argument that names the layer in a MuData
    values: dict[str, dict[str, Any]]  # getters whose values must be finite, with their options
    setup: dict[str, Any] = {}  # setup arguments of models that read what clean data have beyond batch and label
    names: dict[str, str] | None = None  # what the family calls the columns that others call batch and label

    def data(self, counts: AnnData) -> AnnData:
        """Clean data of the family, from those of :func:`make_adata`."""
        return {"counts": lambda a: a, "intensities": intensities, "expression": expression}[self.reads](counts)

    def register(self, adata: Any, setup: str = "setup_anndata", **options: Any) -> None:
        """Set data up with the columns that the family reads, whatever it calls them."""
        if self.names is not None:
            columns = {
                self.names[key]: [options.pop(key)] for key in (*COLUMNS,) if key in options and key in self.names
            }
            options = {**self.setup, **columns, **{k: v for k, v in options.items() if k not in COLUMNS}}
        getattr(self.model, setup)(adata, **options)

    def create(self, adata: Any, setup: str = "setup_anndata", arguments: dict | None = None, **options: Any) -> Any:
        scvi.settings.seed = 0
        self.register(adata, setup, **{"batch_key": "batch", "labels_key": "cell_type", **options})
        return self.model(adata, **{**self.arguments, **(arguments or {})})

    def train(self, model: Any, **training: Any) -> Any:
        model.train(accelerator="cpu", enable_progress_bar=False, **{**self.training, **training})
        return model

    def fit(self, adata: Any, setup: str = "setup_anndata", training: dict | None = None, **options: Any) -> Any:
        return self.train(self.create(adata, setup, **options), **(training or {}))

    def results(self, model: Any, adata: Any = None) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(model, name)(adata, **options)) for name, options in self.values.items()}


def intensities(counts: AnnData) -> AnnData:
    """The cells of `make_adata` with scaled intensities near -1 and 1: one marker in three belongs to each cell type.

    Multiples of 1/8, which all types of floating point numbers hold, none of them zero; CSR like the counts.
    """
    rng = np.random.default_rng(counts.n_obs)
    kind = counts.obs["cell_type"].cat.codes.to_numpy()[:, None]
    noise = rng.integers(-3, 4, size=counts.shape) / 8
    x = np.where(np.arange(counts.n_vars) % 3 == kind, 1.0, -1.0) + noise
    counts.X = sp.csr_matrix(x.astype(np.float32))
    return counts


def expression(counts: AnnData) -> AnnData:
    """The cells of `make_adata` as a screen: every third is a control cell, the others had one or two perturbations.

    Values like those of the logarithm, in multiples of 1/8, which all types of floating point numbers hold. Every three
    neighbours are of one batch, so that a few first cells are a screen as well.
    """
    x = counts.X.log1p()
    x.data = np.maximum(np.rint(8 * x.data), 1) / 8
    counts.X = sp.csr_matrix(x.astype(np.float32))
    row = np.arange(counts.n_obs)
    counts.obs["perturbation"] = np.array(["control", "gene0", "gene1+drug", "control", "drug", "gene0"])[row % 6]
    counts.obs["batch"] = pd.Categorical.from_codes(row // 3 % 2, ["b0", "b1"])
    return counts


def table() -> pd.DataFrame:
    """What is known about the cell types of `make_adata` and their first six markers, with a level of groups."""
    rho = np.where(np.arange(6) % 3 == np.arange(3)[:, None], 1.0, -1.0)
    rho[0, 4] = np.nan
    index = pd.MultiIndex.from_arrays([["B", "NK", "T"], ["B", "NK/T", "NK/T"]], names=["population", "lineage"])
    return pd.DataFrame(rho, index=index, columns=[f"gene{j}" for j in range(6)])


# Setup arguments of the other families.
COLUMNS = ("batch_key", "labels_key", "context_key")
TINY = {"n_hidden": 4, "token_dim": 4, "n_layers": 1, "n_heads": 2, "n_cells": 16, "n_proj": 4}
SMALL = {"table": table(), "n_hidden": 4, "n_hidden_layers": 1, "n_layers": 3}
FAMILIES = {
    "stack": Family(
        StackModel,
        TINY,
        {"max_epochs": 1, "batch_size": 32},
        "counts",
        "rna_layer",
        {"get_latent_representation": {}, "get_normalized_expression": {"return_numpy": True}},
        {"context_key": "donor"},
    ),
    "scyan": Family(
        ScyanModel,
        SMALL,
        {"max_epochs": 1, "batch_size": 32},
        "intensities",
        "protein_layer",
        {"get_latent_representation": {}, "predict_proba": {}, "get_log_density": {}, "correct_batch": {}},
    ),
    "ccfm": Family(
        CascadedFlowModel,
        {"n_hidden": 4, "n_layers": 1, "n_heads": 2, "bottleneck_dim": 4, "graph_top_k": 3},
        {"max_steps": 4, "batch_size": 8},
        "expression",
        "layer",
        {"get_latent_representation": {}, "generate": {"perturbation": "gene0", "n_steps": 2}},
        {"perturbation_key": "perturbation"},
        {"batch_key": "pairing_keys"},
    ),
}


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    """All families, by name."""
    return FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    """Each family in turn."""
    return FAMILIES[request.param]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "reads(kind, ...): a fault of models that read counts, intensities or expression only"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the faults that a family cannot have: fractions are none of intensities."""
    foreign = [item for item in items if _is_foreign(item)]
    if foreign:
        config.hook.pytest_deselected(items=foreign)
        items[:] = [item for item in items if item not in set(foreign)]


def _is_foreign(item: pytest.Item) -> bool:
    mark, parameters = item.get_closest_marker("reads"), getattr(getattr(item, "callspec", None), "params", {})
    family = FAMILIES.get(parameters.get("family", parameters.get("fitted")))
    return mark is not None and family is not None and family.reads not in mark.args


@pytest.fixture
def make(family, make_adata) -> Callable[..., AnnData]:
    """Function that simulates clean data of the family, with the arguments of :func:`make_adata`."""
    return lambda *args, **kwargs: family.data(make_adata(*args, **kwargs))


class Fitted(NamedTuple):
    """A model of a family trained on clean data, its embedding of them, and what makes such data."""

    family: Family
    model: Any
    z: np.ndarray
    make: Callable[..., AnnData]


@pytest.fixture(scope="module", params=FAMILIES)
def fitted(request, make_adata) -> Fitted:
    """Each family in turn, trained on clean data once per file. Never change the model."""
    family = FAMILIES[request.param]
    model = family.fit(family.data(make_adata()))
    z = np.asarray(model.get_latent_representation())
    return Fitted(family, model, z, lambda *args, **kwargs: family.data(make_adata(*args, **kwargs)))


# ---------------------------------------------------------------- what a refusal must leave alone


def random_state() -> tuple:
    """State of the global generators of numpy, torch and Python."""
    numpy_state = np.random.get_state()
    return numpy_state[1].tobytes(), numpy_state[2:], bytes(torch.get_rng_state().numpy()), random.getstate()


def snapshot(data: Any) -> dict[str, Any]:
    """All that a user could find changed in an AnnData, or in the modalities of a MuData."""
    if not isinstance(data, AnnData):
        parts = {name: snapshot(modality) for name, modality in data.mod.items()}
        return {**parts, "obs": pd.DataFrame(data.obs).to_dict("list"), "uns": sorted(data.uns)}
    x = data.X.toarray() if sp.issparse(data.X) else np.asarray(data.X)
    return {
        "X": (type(data.X), x.dtype, x.tobytes()),
        "obs": (list(data.obs_names), list(data.obs), [str(dtype) for dtype in data.obs.dtypes]),
        "var": (list(data.var_names), list(data.var)),
        "keys": [sorted(map(str, part)) for part in (data.uns, data.obsm, data.layers, data.varm, data.obsp)],
        "is_view": data.is_view,
    }


@pytest.fixture
def refuses(capsys) -> Callable[..., AbstractContextManager]:
    """``with refuses(data, error, pattern): ...``: one good sentence; data and random state as before; no print."""

    @contextmanager
    def check(data: Any, error: type[Exception], pattern: str) -> Iterator[None]:
        before, state = snapshot(data), random_state()
        capsys.readouterr()
        with pytest.raises(error, match=pattern) as caught:
            yield
        # a KeyError shows its message in quotes
        message = str(caught.value.args[0])
        assert "\n" not in message
        assert message.endswith(".")
        assert re.search("`.+`|Modality", message), "names the field"
        assert ";" in message, "says what to do about it, after a semicolon"
        assert snapshot(data) == before
        assert random_state() == state
        assert capsys.readouterr() == ("", "")

    return check


@pytest.fixture
def keeps_random_state() -> Callable[[], AbstractContextManager]:
    """``with keeps_random_state(): ...``: the global generators of numpy, torch and Python stay where they are."""

    @contextmanager
    def check() -> Iterator[None]:
        before = random_state()
        yield
        assert random_state() == before

    return check
