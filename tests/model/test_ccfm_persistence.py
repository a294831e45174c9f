"""Saving, loading and resuming CascadedFlowModel: the same results, no data in the files, no step lost."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback

from cellweave.data import PCAFeatures, UnseenPerturbationError
from cellweave.model import CascadedFlowModel

sys.path.append(str(Path(__file__).parent))
from ccfm_data import HELD_OUT, QUICK, SETUP, create, fit, simulate_screen

# two epochs of 30 steps, validation after each
RUN = {**QUICK, "max_steps": 60, "lr": 0.01}


def _assert_same(first, second) -> None:
    """Weights and curves agree bit for bit."""
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert set(first.history) == set(second.history)
    for name, frame in first.history.items():
        pd.testing.assert_frame_equal(second.history[name], frame, check_exact=True)


# ---------------------------------------------------------------- saving and resuming


@pytest.mark.parametrize("encoder", ["none", PCAFeatures(3)], ids=["none", "pca"])
def test_predictions_are_the_same_after_loading(tmp_path, encoder):
    """Protects saved models: equal predictions without the training data, and with them attached."""
    adata = simulate_screen(10)
    adata.obs["dose"] = np.where(adata.obs["day"] == "d1", 1.0, 3.0)
    setup = {"dosage_key": "dose", "categorical_covariate_keys": ["day"]}
    model = fit(adata, setup, encoder=encoder, training={"calibrate": True})
    model.save(tmp_path / "m")
    control = adata[adata.obs["perturbation"] == "control"].copy()
    free = CascadedFlowModel.load(tmp_path / "m", accelerator="cpu")
    attached = CascadedFlowModel.load(tmp_path / "m", simulate_screen_with(adata), accelerator="cpu")
    with pytest.raises(ValueError, match="loaded without data"):
        free.predict_perturbation("drug")
    labels = ["drug", HELD_OUT, "control"]
    expected = model.predict_perturbation(labels, control, n_cells=5, dosages={"drug": 2.0})
    for found in (
        free.predict_perturbation(labels, control, n_cells=5, dosages={"drug": 2.0}),
        attached.predict_perturbation(labels, control, n_cells=5, dosages={"drug": 2.0}),
    ):
        np.testing.assert_array_equal(found.X, expected.X)
        pd.testing.assert_frame_equal(found.obs, expected.obs)
    np.testing.assert_array_equal(
        attached.predict_perturbation("g00", n_cells=5).X, model.predict_perturbation("g00", n_cells=5).X
    )
    if encoder == "none":
        np.testing.assert_array_equal(attached.get_latent_representation(), model.get_latent_representation())
        np.testing.assert_array_equal(
            attached.get_perturbation_effect("g00", indices=[1, 2]),
            model.get_perturbation_effect("g00", indices=[1, 2]),
        )
    else:
        with pytest.raises(ValueError, match="encoder 'pca' is not saved with the model"):
            attached.get_latent_representation()
    pd.testing.assert_frame_equal(
        free.get_perturbation_representation(), model.get_perturbation_representation(), check_exact=True
    )
    assert free.perturbations == model.perturbations


def simulate_screen_with(adata):
    """A copy of a screen without what a model wrote to it."""
    plain = adata.copy()
    plain.obs = plain.obs[[c for c in plain.obs if not c.startswith("_scvi")]].copy()
    plain.uns.clear()
    plain.obsm.clear()
    return plain


def test_no_cells_are_in_the_files(tmp_path):
    """Protects patients: a saved model grows with conditions and genes, not with cells, and names none of them."""
    sizes = []
    for n_cells in (10, 40):
        model = fit(simulate_screen(n_cells), training={"max_steps": 2})
        model.save(tmp_path / str(n_cells))
        files = list((tmp_path / str(n_cells)).iterdir())
        sizes.append((tmp_path / str(n_cells) / "weights.safetensors").stat().st_size)
        assert "cell12" not in json.dumps([path.read_text() for path in files if path.suffix == ".json"])
    assert sizes[0] == sizes[1]


def test_a_loaded_model_is_trained_further(tmp_path):
    """Protects further training: without an encoder a loaded model goes on; with one it says what is missing."""
    for encoder in ("none", PCAFeatures(3)):
        adata = simulate_screen(10)
        fit(adata, encoder=encoder, training={"max_steps": 3}).save(tmp_path / "m", overwrite=True)
        loaded = CascadedFlowModel.load(tmp_path / "m", simulate_screen(10), accelerator="cpu")
        if encoder == "none":
            before = loaded.predict_perturbation("drug", n_cells=3).X
            loaded.train(**{**QUICK, "lr": 0.01})
            assert np.abs(loaded.predict_perturbation("drug", n_cells=3).X - before).max() > 0
        else:
            with pytest.raises(ValueError, match="'pca' is not saved with the model and is needed to train it"):
                loaded.train(**QUICK)


def test_other_data_are_attached():
    """Protects `model.adata = other`: what the model learned of its screen stays, and unknown perturbations are refused."""
    model = fit(simulate_screen(10), training={"max_steps": 3})
    expected = model.predict_perturbation("drug", simulate_screen(10), n_cells=3).X
    other = simulate_screen(10)
    CascadedFlowModel.setup_anndata(other, **SETUP)
    model.adata = other
    np.testing.assert_array_equal(model.predict_perturbation("drug", n_cells=3).X, expected)
    model.train(**{**QUICK, "max_steps": 2})
    strange = simulate_screen(10)
    strange.obs["perturbation"] = strange.obs["perturbation"].replace("drug", "aspirin")
    CascadedFlowModel.setup_anndata(strange, **SETUP)
    model.adata = strange
    with pytest.raises(UnseenPerturbationError, match=r"1 perturbation\(s\).*not made for \(first: 'aspirin'\)"):
        model.train(**QUICK)


class Send(Callback):
    """Sends SIGTERM to this process at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step, self.n = step, 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.n += 1
        if self.n == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [4, 31, 45])
@pytest.mark.parametrize("encoder", ["none", PCAFeatures(3)], ids=["none", "pca"])
def test_resume_is_exact(tmp_path, step, encoder):
    """Protects long runs: stopped at any step and resumed, with a moving average of weights, is never having stopped."""
    whole = create(simulate_screen(10), encoder=encoder)
    whole.train(**RUN, ema_decay=0.9)
    with pytest.raises(SystemExit):
        create(simulate_screen(10), encoder=encoder).train(
            **RUN, ema_decay=0.9, callbacks=[Send(step)], checkpoint_dir=tmp_path
        )
    resumed = create(simulate_screen(10), encoder=encoder)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.normal_()
    resumed.train(**RUN, ema_decay=0.9, checkpoint_dir=tmp_path, resume="auto")
    _assert_same(whole, resumed)
    np.testing.assert_array_equal(
        whole.predict_perturbation("drug", n_cells=4).X, resumed.predict_perturbation("drug", n_cells=4).X
    )


def test_resume_with_calibration_is_exact(tmp_path):
    """Protects calibrated runs: the shares of trust after a stop and a resume are those of a run without."""
    options = {**RUN, "calibrate": True}
    whole = create(simulate_screen(10))
    whole.train(**options)
    with pytest.raises(SystemExit):
        create(simulate_screen(10)).train(**options, callbacks=[Send(40)], checkpoint_dir=tmp_path)
    resumed = create(simulate_screen(10))
    resumed.train(**options, checkpoint_dir=tmp_path, resume="auto")
    _assert_same(whole, resumed)
    assert whole.trust == resumed.trust


def test_another_run_is_not_continued(tmp_path):
    """Protects resume from options that would make another run: the one that differs is named."""
    run = {**RUN, "pairing": "random"}
    with pytest.raises(SystemExit):
        create(simulate_screen(10)).train(**run, callbacks=[Send(4)], checkpoint_dir=tmp_path)
    for changed in (
        {"n_genes_per_step": 5},
        {"control_fraction": 0.5},
        {"pairing": "ot"},
        {"n_conditions_per_step": 2},
    ):
        with pytest.raises(ValueError, match=r"checkpoint.*(n_genes_per_step|control_fraction|pairing|n_sets)"):
            create(simulate_screen(10)).train(**{**run, **changed}, checkpoint_dir=tmp_path, resume="auto")
