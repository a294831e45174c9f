"""Saving and loading `StackModel`: every getter stays the same, whatever the categories are called."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from cellweave.io import ModelFileError
from cellweave.model import StackModel

AWKWARD = {
    "unicode": ["β-cell", "日本 lab"],
    "slash": ["donor/1", "donor\\2"],
    "newline": ["a\nb", "c\td"],
    "quotes": ['say "hi"', "it's"],
    "empty": ["", " "],
    "int": [7, -3],
    "zero": [0, 1],
    "bool": [True, False],
    "float": [0.5, 1e-9],
}


def _results(model, adata=None) -> dict[str, np.ndarray]:
    observed, expected = model.get_masked_predictions(adata)
    return {
        "latent": model.get_latent_representation(adata),
        "spread": model.get_latent_representation(adata, n_context_repeats=2, return_spread=True)[1],
        "normalized": model.get_normalized_expression(adata, library_size=100).to_numpy(),
        "observed": observed.to_numpy(),
        "expected": expected.to_numpy(),
        "metrics": model.get_reconstruction_metrics(adata).to_numpy(),
        "attention": model.get_attention([4, 8, 15], adata),
    }


def _assert_same_results(first: dict, second: dict, **tolerance) -> None:
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, err_msg=name, **{"rtol": 0, "atol": 0, **tolerance})


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def _load(folder, adata=None) -> StackModel:
    return StackModel.load(folder, adata, accelerator="cpu")


def test_every_getter_is_the_same_after_loading(trained, folder, make_adata):
    """Protects saved models: all results, bit for bit, on the same data."""
    _assert_same_results(_results(trained), _results(_load(folder, make_adata())))


def test_state_of_the_model_is_restored(trained, folder, make_adata):
    """Protects the rest of the model: arguments, history, split, genes, registry."""
    loaded = _load(folder, make_adata())
    assert repr(loaded) == repr(trained)
    assert loaded.is_trained
    for name in ("train_indices", "validation_indices", "test_indices"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trained, name))
    assert loaded.history.keys() == trained.history.keys()
    for name, frame in trained.history.items():
        pd.testing.assert_frame_equal(loaded.history[name], frame, check_index_type=False)
    np.testing.assert_array_equal(loaded.genes, trained.genes)
    assert loaded.summary_stats == trained.summary_stats
    assert loaded.registry["setup_args"] == trained.registry["setup_args"]


def test_load_without_data_then_pass_them(trained, folder, make_adata):
    """Protects registry-only loading: no data needed until a getter is called with `adata=`."""
    loaded = _load(folder)
    assert "no data attached" in repr(loaded)
    with pytest.raises(ValueError, match="loaded without data; pass `adata=`"):
        loaded.get_latent_representation()
    _assert_same_results(_results(trained), _results(loaded, make_adata()))


def test_loading_makes_no_random_draws_the_user_notices(folder, make_adata):
    """Protects the weights: they come from the file, not from the initialisation that precedes loading."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(_load(folder, make_adata()).module.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_untrained_model_stays_untrained(make_adata, tiny, tmp_path):
    """Protects the truth of `is_trained` through a file."""
    adata = make_adata()
    StackModel.setup_anndata(adata)
    StackModel(adata, **tiny).save(tmp_path / "m")
    loaded = _load(tmp_path / "m", adata)
    assert not loaded.is_trained
    assert loaded.history is None
    with pytest.raises(RuntimeError, match="(?i)train"):
        loaded.get_latent_representation()


def test_training_continues_after_loading(folder, make_adata, quick):
    """Protects fine-tuning: a loaded model trains on, and its history goes on."""
    loaded = _load(folder, make_adata())
    before = {k: v.clone() for k, v in loaded.module.state_dict().items()}
    loaded.train(**quick)
    assert list(loaded.history["train_loss"].index) == [0, 1, 2, 3]
    assert any(not torch.equal(before[k], v) for k, v in loaded.module.state_dict().items())


def test_training_without_data_is_refused(folder, quick):
    """Protects against a cryptic error: a model without data says what to do."""
    with pytest.raises(ValueError, match="has no data to train on; load it with `adata=`"):
        _load(folder).train(**quick)


@pytest.mark.parametrize("kind", AWKWARD)
def test_category_names_survive(make_adata, tiny, quick, tmp_path, kind):
    """Protects category names of any kind: same codes, same results, still usable by name after loading."""
    names = AWKWARD[kind]

    def data():
        adata = make_adata()
        for column in ("batch", "donor"):
            codes = adata.obs[column].cat.codes.to_numpy() % 2
            adata.obs[column] = np.array(names, dtype=object if isinstance(names[0], str) else None)[codes]
        return adata

    adata = data()
    StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
    model = StackModel(adata, **tiny, batch_condition="decoder")
    model.train(**quick, lr=0.05)
    model.save(tmp_path / "m")
    loaded = _load(tmp_path / "m", data())
    _assert_same_results(_results(model), _results(loaded))
    for name in names:
        before, after = (m.get_normalized_expression(transform_batch=name) for m in (model, loaded))
        pd.testing.assert_frame_equal(before, after)


@pytest.mark.parametrize("dtype", ["category", "string", "str", object])
def test_kinds_of_columns(make_adata, tiny, tmp_path, dtype):
    """Protects pandas dtypes: text columns of any type register, save and load with the same categories."""
    adata = make_adata()
    adata.obs["batch"] = adata.obs["batch"].astype(str).astype(dtype)
    StackModel.setup_anndata(adata, batch_key="batch")
    StackModel(adata, **tiny).save(tmp_path / "m")
    mapping = _load(tmp_path / "m").registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]
    assert list(mapping) == ["b0", "b1"]


def test_wrong_class_is_named(folder):
    """Protects against loading one family as another: both class names are in the message."""

    class OtherModel(StackModel):
        pass

    with pytest.raises(ModelFileError, match="holds a StackModel, not a OtherModel; load it with that class"):
        OtherModel.load(folder)


def test_damaged_file_is_named_through_the_model(folder, make_adata):
    """Protects `load`: a flipped bit in the weights is reported before anything is registered."""
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    adata = make_adata()
    with pytest.raises(ModelFileError, match="weights.safetensors"):
        _load(folder, adata)
    assert not adata.uns


def test_existing_directory_is_kept(trained, folder):
    """Protects saved models through `save`: no overwrite without asking, one directory afterwards."""
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained.save(folder)
    trained.save(folder, overwrite=True)
    assert os.listdir(folder.parent) == ["model"]


def test_data_are_not_saved_silently(trained, tmp_path):
    """Protects expectations: `save_anndata=True` is an error that names the alternative, not ignored."""
    with pytest.raises(ValueError, match="`save_anndata=True` is not supported; write the data with `adata.write_h5ad"):
        trained.save(tmp_path / "m", save_anndata=True)
    assert not (tmp_path / "m").exists()


def test_saving_changes_nothing(trained, folder, tmp_path):
    """Protects the model in memory: saving twice writes the same weights, arguments and registry."""
    trained.save(tmp_path / "again")
    for name in ("weights.safetensors", "config.json", "registry.json", "history.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_trained_model_can_be_pickled(trained, make_adata):
    """Protects worker processes and caches: a trained model, with its trainer, survives pickle."""
    copy = pickle.loads(pickle.dumps(trained))
    np.testing.assert_array_equal(
        copy.get_latent_representation(make_adata()), trained.get_latent_representation(make_adata())
    )
