"""A small model as its files hold it, and what tests of model directories ask of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cellweave.io import SavedModel, read_model, write_model


def _content(value: float = 1.0) -> SavedModel:
    categories = {
        "text": np.array(["a", "é ü", "slash/back\\", "new\nline", "", "日本"], dtype=object),
        "int": np.array([3, 1, 2]),
        "bool": np.array([False, True]),
        "float": np.array([0.1, 2.5, 1e300]),
    }
    history = {"train_loss": pd.DataFrame({"train_loss": [2.0, value]}, index=pd.RangeIndex(2, name="epoch"))}
    return SavedModel(
        weights={"a.weight": torch.full((3, 2), value), "b": torch.arange(4).double()},
        config={"model": "M", "init_params": {"kwargs": {}, "non_kwargs": {"n": 3, "x": None}}, "is_trained": True},
        registry={"field_registries": categories, "setup_args": {"layer": None}},
        history=history,
        indices={"train_indices": np.array([5, 1, 3]), "test_indices": np.array([], dtype=np.int64)},
    )


def _assert_same(first: SavedModel, second: SavedModel) -> None:
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[k], second.weights[k]) for k in first.weights)
    assert first.config == second.config
    for key, value in first.registry["field_registries"].items():
        other = second.registry["field_registries"][key]
        assert value.dtype == other.dtype
        assert value.tolist() == other.tolist()
    for key, frame in first.history.items():
        pd.testing.assert_frame_equal(frame, second.history[key], check_index_type=False)
    assert first.indices.keys() == second.indices.keys()
    assert all(np.array_equal(first.indices[k], second.indices[k]) for k in first.indices)


@pytest.fixture(scope="session")
def make_content() -> Callable[..., SavedModel]:
    """Function that makes the content of a model: ``make_content(value=1.0)``."""
    return _content


@pytest.fixture(scope="session")
def assert_same() -> Callable[[SavedModel, SavedModel], None]:
    """``assert_same(first, second)``: two models hold the same."""
    return _assert_same


@pytest.fixture(scope="session")
def value_of() -> Callable[[Path], float]:
    """Function from a model directory to the value that its content was made with."""
    return lambda path: read_model(path).weights["a.weight"][0, 0].item()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Directory of a saved model of value 1."""
    write_model(tmp_path / "m", _content())
    return tmp_path / "m"
