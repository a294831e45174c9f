"""Training of CascadedFlowModel: steps, curves, split, options, encoders."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch

from cellweave.data import PCAFeatures
from cellweave.model import StackModel

sys.path.append(str(Path(__file__).parent))
from ccfm_data import DOUBLES, HELD_OUT, QUICK, SINGLES, create, dense, fit, mean_of, simulate_screen


def _assert_same(first, second) -> None:
    """Weights and curves agree bit for bit."""
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert set(first.history) == set(second.history)
    for name, frame in first.history.items():
        pd.testing.assert_frame_equal(second.history[name], frame, check_exact=True)


# ---------------------------------------------------------------- steps, curves, split


@pytest.mark.parametrize(("steps", "epochs"), [({"max_steps": 7}, 1), ({"max_steps": 120}, 3), ({"max_epochs": 1}, 1)])
def test_number_of_steps(steps, epochs):
    """Protects the length of training: so many steps, in epochs of about fifty."""
    model = create(simulate_screen(10))
    options = {**QUICK, "max_steps": None, **steps}
    model.train(**options)
    assert model.trainer.global_step == steps.get("max_steps", 50)
    assert len(model.history["train_loss"]) == epochs


def test_curves():
    """Protects `history`: every term in training and validation, finite, and the loss falls on an easy screen."""
    model = fit(simulate_screen(), training={"max_steps": 200, "lr": 0.01}, anchor=None, encoder=PCAFeatures(3))
    for name in ("expression_loss", "mmd_loss", "latent_loss"):
        for part in ("train", "validation"):
            assert np.isfinite(model.history[f"{name}_{part}"].to_numpy(dtype=float)).all()
    curve = model.history["expression_loss_train"].to_numpy(dtype=float).ravel()
    assert len(curve) == 4
    assert curve[-1] < 0.9 * curve[0]


def test_validation_loss_stops_training_early():
    """Protects `early_stopping`: without an improvement training ends before the last step."""
    model = create(simulate_screen(10))
    stop = {"early_stopping": True, "early_stopping_patience": 1, "early_stopping_min_delta": 100.0}
    model.train(**{**QUICK, "max_steps": 500}, **stop)
    assert model.trainer.global_step == 100


def test_only_one_length_is_given():
    """Protects from contradicting lengths and from none."""
    model = create(simulate_screen(10))
    with pytest.raises(ValueError, match="Both `max_steps` and `max_epochs`"):
        model.train(max_steps=3, max_epochs=1)
    with pytest.raises(ValueError, match="`max_steps` must be at least 1, got 0"):
        model.train(max_steps=0)


def test_split_keeps_the_share_of_every_group():
    """Protects the split: each condition of each line has validation cells, and every cell is in one part."""
    model = fit(simulate_screen(20), training={"train_size": 0.8, "max_steps": 1})
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    assert sorted(np.concatenate(parts).tolist()) == list(range(model.adata.n_obs))
    obs = model.adata.obs.iloc[model.validation_indices]
    sizes = obs.groupby(["perturbation", "line"], observed=True).size()
    assert len(sizes) == 2 * (len(SINGLES) + len(DOUBLES) + 1)
    assert set(sizes.drop("control")) == {4}


@pytest.mark.parametrize("calibrate", [False, True])
def test_held_out_cells_are_never_seen(calibrate):
    """Protects the test set: whatever cells outside `split_key` hold, weights, anchors and predictions are the same."""
    models = []
    for change in (False, True):
        adata = simulate_screen(20, labels=(*SINGLES, *DOUBLES, HELD_OUT))
        is_test = (adata.obs["perturbation"] == HELD_OUT).to_numpy()
        is_test = is_test | (np.arange(adata.n_obs) % 7 == 0)
        adata.obs["split"] = np.where(is_test, "test", np.where(np.arange(adata.n_obs) % 5 == 0, "valid", "train"))
        if change:
            x = dense(adata)
            x[is_test] = np.random.default_rng(3).permutation(x[is_test], axis=1) + 0.7
            adata.X = sp.csr_matrix(x)
        model = fit(adata, {"split_key": "split"}, training={"calibrate": calibrate}, encoder=PCAFeatures(3))
        assert set(model.test_indices) == set(np.flatnonzero(is_test))
        models.append(model)
    _assert_same(*models)
    control = simulate_screen(5, labels=())
    x = [m.predict_perturbation([HELD_OUT, "drug"], control, n_cells=4).X for m in models]
    np.testing.assert_array_equal(x[0], x[1])


def test_pairs_stay_in_their_context():
    """Protects `pairing_keys`: cells of a line that is far away are predicted from and towards that line only."""
    adata = simulate_screen()
    far = (adata.obs["line"] == "RPE1").to_numpy()
    x = dense(adata)
    x[far] += 4.0
    adata.X = sp.csr_matrix(x)
    model = fit(adata, training={"max_steps": 100})
    pred = model.predict_perturbation("g00", n_cells=None)
    for line in ("K562", "RPE1"):
        gap = mean_of(pred, "g00", line) - mean_of(adata, "g00", line)
        assert np.abs(gap).mean() < 0.5
    drawn = next(iter(model.trainer.train_dataloader))
    assert ((drawn["X"].mean(1) > 3) == (drawn["control"].mean(1) > 3)).all()


def test_without_pairing_keys_there_is_one_context():
    """Protects the default: without `pairing_keys` all cells are of one context."""
    model = fit(simulate_screen(10), {"pairing_keys": None}, training={"max_steps": 2})
    assert model._facts["contexts"] == [""]
    assert np.isfinite(model.predict_perturbation("drug", n_cells=3).X).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"anchor": None, "start": "noise"},
        {"anchor": None, "start": "noise", "noise": "poisson", "encoder": PCAFeatures(3)},
        {"anchor": "additive"},
        {"start_noise": 0.2, "gene_graph": None},
        {"encoder": PCAFeatures(3), "stage1_expression_input": "control", "time_mode": "uniform"},
        {"mmd_weight": 0.0, "condition_dropout": 0.0, "dropout": 0.0},
        {"gene_graph": np.eye(30)},
        {"encoder": PCAFeatures(5), "latent_dim": 2, "adapter_residual": False},
    ],
    ids=lambda a: "-".join(a),
)
def test_options_train_and_predict(arguments):
    """Protects the options of the model, the published ones among them: each trains and gives finite cells."""
    model = fit(simulate_screen(10), training={"max_steps": 5, "pairing": "ot"}, **arguments)
    pred = model.predict_perturbation(["drug", HELD_OUT], n_cells=4)
    assert np.isfinite(pred.X).all()
    assert (pred.X >= 0).all()
    assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()


@pytest.mark.parametrize("option", [{"n_conditions_per_step": 4}, {"n_genes_per_step": 7}, {"control_fraction": 0.0}])
def test_training_options(option):
    """Protects the options of training: several conditions, few genes, or no control cells per step."""
    model = fit(simulate_screen(10), training={"max_steps": 5, **option})
    assert np.isfinite(model.predict_perturbation("drug", n_cells=3).X).all()


# ---------------------------------------------------------------- encoders


def test_features_of_other_methods():
    """Protects encoders: none, PCA, an obsm key and a trained model give features of their own size."""
    scvi.settings.seed = 0
    adata = simulate_screen(20)
    adata.layers["counts"] = sp.csr_matrix(np.rint(np.expm1(dense(adata))))
    adata.obsm["X_other"] = np.random.default_rng(0).normal(size=(adata.n_obs, 4)).astype(np.float32)
    StackModel.setup_anndata(adata, layer="counts")
    stack = StackModel(adata, n_hidden=4, token_dim=4, n_layers=1, n_heads=2, n_cells=16, n_proj=4)
    stack.train(max_epochs=1, batch_size=32, accelerator="cpu", enable_progress_bar=False)
    encoders = {"none": None, "obsm:X_other": 4, "pca": 3, "stack": stack.get_latent_representation().shape[1]}
    for name, dim in encoders.items():
        encoder = {"pca": PCAFeatures(3), "stack": stack}.get(name, name)
        model = fit(adata, encoder=encoder, training={"max_steps": 3})
        assert (None if model._facts["features"] is None else model._facts["features"]["dim"]) == dim
        if dim is not None:
            pred = model.predict_perturbation("drug", n_cells=3, return_latent=True)
            assert pred.obsm["X_ccfm_latent"].shape == (3, dim)
