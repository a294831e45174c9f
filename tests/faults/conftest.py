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

from cellweave.model import StackModel


class Family(NamedTuple):
    """How to build, train and ask a model."""

    model: type
    arguments: dict[str, Any]
    training: dict[str, Any]

    def fit(self, adata: Any, setup: str = "setup_anndata", training: dict | None = None, **options: Any) -> Any:
        scvi.settings.seed = 0
        getattr(self.model, setup)(adata, **{"batch_key": "batch", "labels_key": "cell_type", **options})
        model = self.model(adata, **self.arguments)
        model.train(accelerator="cpu", enable_progress_bar=False, **{**self.training, **(training or {})})
        return model


TINY = {"n_hidden": 4, "token_dim": 4, "n_layers": 1, "n_heads": 2, "n_cells": 16, "n_proj": 4}
FAMILIES = {
    "stack": Family(StackModel, TINY, {"max_epochs": 1, "batch_size": 32}),
}


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    """All families, by name."""
    return FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    """Each family in turn."""
    return FAMILIES[request.param]


class Fitted(NamedTuple):
    """A model of a family trained on clean data, and its embedding of them."""

    family: Family
    model: Any
    z: np.ndarray


@pytest.fixture(scope="module", params=FAMILIES)
def fitted(request, make_adata) -> Fitted:
    """Each family in turn, trained on clean data once per file. Never change the model."""
    family = FAMILIES[request.param]
    model = family.fit(make_adata())
    return Fitted(family, model, model.get_latent_representation())


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
