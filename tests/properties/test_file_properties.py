"""Properties of files: everything comes back as it was, and no change goes unnoticed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cellweave.io import ModelFileError, SavedModel, _json, read_model, write_model
from cellweave.model import StackModel

FINITE = st.floats(allow_nan=False)
ARRAYS = st.one_of(
    *(arrays(dtype, st.integers(0, 4)) for dtype in (np.int64, np.uint16, bool, np.float32)),
    arrays(object, st.integers(0, 4), elements=st.text()),
    arrays(
        "U6", st.integers(0, 4), elements=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
    ),
)
FRAMES = st.lists(FINITE, min_size=1, max_size=4).map(
    lambda values: pd.DataFrame({"loss": values}, index=pd.RangeIndex(len(values), name="epoch"))
)
PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FINITE | st.text()
# names that the encoding itself uses are part of the game
KEYS = st.text() | st.sampled_from(["__array__", "__frame__", "__pairs__", "dtype", "index"])
NESTED = st.recursive(
    PLAIN | ARRAYS | FRAMES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)
TENSORS = st.dictionaries(
    st.text("abc._0", min_size=1),
    st.one_of(
        arrays(np.float32, st.lists(st.integers(0, 3), max_size=3).map(tuple)).map(torch.from_numpy),
        arrays(np.int64, st.integers(0, 5)).map(torch.from_numpy),
        arrays(np.float32, (2, 3)).map(lambda a: torch.from_numpy(a).T),
        arrays(np.float32, 4).map(lambda a: torch.from_numpy(a).bfloat16()),
    ),
    max_size=4,
)


def _same(first, second) -> bool:
    """Equal values and types at every depth."""
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    if isinstance(first, pd.DataFrame):
        pd.testing.assert_frame_equal(first, second, check_index_type=False)
        return first.index.name == second.index.name
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and first == second


@given(NESTED)
def test_json_is_an_identity(value):
    """Protects registries and histories: any nesting of plain values, arrays and frames, with any keys."""
    assert _same(value, _json.loads(_json.dumps(value)))


@given(NESTED)
def test_json_is_a_function_of_the_value(value):
    """Protects checksums of equal models: what was read is written to the same bytes."""
    written = _json.dumps(value)
    assert _json.dumps(_json.loads(written)) == written


def _saved(weights, texts, rows) -> SavedModel:
    categories = np.array(texts, dtype=object)
    return SavedModel(
        weights=weights,
        config={
            "model": "M",
            "init_params": {"non_kwargs": dict.fromkeys(texts, 1.5), "kwargs": {}},
            "is_trained": True,
        },
        registry={"mapping": categories},
        history=None,
        indices={"train_indices": np.array(rows, dtype=np.int64)},
    )


@given(TENSORS, st.lists(st.text(), max_size=4), st.lists(st.integers(0, 2**40), max_size=5))
def test_model_files_are_an_identity(weights, texts, rows):
    """Protects saved models: tensors of any shape, type and layout, bit by bit, and texts of any kind."""
    saved = _saved(weights, texts, rows)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "m", saved)
        back = read_model(Path(folder) / "m")
    assert back.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back.weights[name].dtype == tensor.dtype
        assert back.weights[name].shape == tensor.shape
        torch.testing.assert_close(back.weights[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert _same(dict(saved.config), back.config)
    assert _same(saved.registry, back.registry)
    assert _same(saved.indices, back.indices)


@given(st.data(), st.sampled_from(["flip", "cut", "grow", "remove"]))
def test_no_change_of_a_model_file_goes_unnoticed(data, damage):
    """Protects results from damaged disks: any bit flipped, any length, any file missing is an error that names a file."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "m"
        write_model(target, _saved({"w": torch.arange(6.0)}, ["a", "é"], [1, 2]))
        path = data.draw(st.sampled_from(sorted(target.iterdir())))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if damage == "flip":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif damage == "cut":
            del content[position:]
        else:
            content.insert(position, data.draw(st.integers(0, 255)))
        path.unlink() if damage == "remove" else path.write_bytes(content)
        with pytest.raises(ModelFileError, match="m"):
            read_model(target)


def _tiny(make_adata, **arguments) -> StackModel:
    adata = make_adata(n_cells=24)
    StackModel.setup_anndata(adata, batch_key="batch", labels_key="cell_type", context_key="donor")
    return StackModel(adata, **{"n_hidden": 2, "token_dim": 2, "n_heads": 2, "n_layers": 1, "n_cells": 8, **arguments})


@pytest.fixture(scope="module")
def hashed(make_adata) -> StackModel:
    """A model whose weights a test may change, if it restores them."""
    return _tiny(make_adata)


@given(data=st.data())
def test_provenance_changes_exactly_with_the_weights(hashed, data):
    """Protects provenance: the smallest change of any weight changes the hash, restoring it restores the hash."""
    state = hashed.module.state_dict()
    name = data.draw(st.sampled_from(sorted(state)))
    flat = state[name].view(-1)
    at = data.draw(st.integers(0, flat.numel() - 1))
    before, old = hashed._weights_hash(), flat[at].clone()
    flat[at] = torch.nextafter(old, torch.tensor(torch.inf))
    changed = hashed._weights_hash()
    flat[at] = old
    assert changed != before == hashed._weights_hash()


ARCHITECTURES = st.fixed_dictionaries(
    {
        "n_hidden": st.sampled_from([2, 4]),
        "token_dim": st.sampled_from([2, 3]),
        "n_layers": st.integers(1, 2),
        "n_cells": st.integers(1, 20),
        "batch_condition": st.sampled_from(["none", "decoder", "both"]),
        "normalize_input": st.booleans(),
    }
)


@given(architecture=ARCHITECTURES, seed=st.integers(0, 2**31))
def test_saving_and_loading_is_an_identity_for_every_getter(make_adata, architecture, seed):
    """Protects saved models of any architecture: all results are bit-equal on the data of the model and on others."""
    torch.manual_seed(seed)
    model = _tiny(make_adata, **architecture)
    model.is_trained_ = True
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "m")
        loaded = StackModel.load(Path(folder) / "m", make_adata(n_cells=24), accelerator="cpu")
    for query in (None, make_adata(n_cells=24, seed=1)):
        for first, second in zip(_results(model, query), _results(loaded, query), strict=True):
            np.testing.assert_array_equal(first, second)


def _results(model, adata) -> list[np.ndarray]:
    return [
        model.get_latent_representation(adata),
        model.get_normalized_expression(adata, library_size="observed").to_numpy(),
        *(frame.to_numpy() for frame in model.get_masked_predictions(adata)),
        model.get_reconstruction_metrics(adata, n_masks=1).to_numpy(),
        model.get_attention([3, 1, 2], adata),
    ]
