"""Saving, loading and resuming `ScyanModel`: the same results, no data in the files, no step lost."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from cellweave.io import MarkerTable
from cellweave.model import ScyanModel

# 180 training cells in steps of 60: three steps an epoch, six epochs, two temperature cycles
RUN = {"max_epochs": 6, "batch_size": 60, "accelerator": "cpu", "enable_progress_bar": False, "lr": 5e-3}


def _load(folder, adata=None) -> ScyanModel:
    return ScyanModel.load(folder, adata, accelerator="cpu")


# ---------------------------------------------------------------- save and load


def test_predictions_are_the_same_after_loading(scyan, scyan_data, tmp_path):
    """Protects saved models: every getter bit for bit, with data attached, passed, or in another variable order."""
    scyan.save(tmp_path / "m")
    calls = {
        "predict": {},
        "predict_proba": {"level": "lineage"},
        "get_log_density": {},
        "get_latent_representation": {},
        "correct_batch": {"reference": "average"},
        "get_marker_diagnostics": {},
        "get_population_diagnostics": {},
        "refine_table": {},
    }
    attached, shuffled = _load(tmp_path / "m", scyan_data), _load(tmp_path / "m", scyan_data[:, ::-1].copy())
    free = _load(tmp_path / "m")
    for name, options in calls.items():
        expected = pd.DataFrame(getattr(scyan, name)(**options))
        for found in (
            getattr(attached, name)(**options),
            getattr(shuffled, name)(**options),
            getattr(free, name)(scyan_data[:, ::-1].copy(), **options),
        ):
            pd.testing.assert_frame_equal(pd.DataFrame(found), expected)
    pd.testing.assert_series_equal(free.population_weights, scyan.population_weights)
    np.testing.assert_array_equal(attached.sample(5, seed=1).X, scyan.sample(5, seed=1).X)
    assert free.table == scyan.table


def test_no_data_are_in_the_files(make_markers, fit_scyan, tmp_path):
    """Protects patients: nothing in the directory grows with the cells but the numbers of rows of the split."""
    folders = {}
    for n_cells in (100, 400):
        fit_scyan(make_markers(n_cells), n_hidden=4).save(folder := tmp_path / str(n_cells))
        folders[n_cells] = folder
    sizes = {n: {name: (folder / name).stat().st_size for name in os.listdir(folder)} for n, folder in folders.items()}
    assert set(sizes[100]) == {
        "MANIFEST.json",
        "config.json",
        "history.json",
        "indices.npz",
        "registry.json",
        "weights.safetensors",
    }
    for name in set(sizes[100]) - {"indices.npz"}:
        assert abs(sizes[400][name] - sizes[100][name]) < 400, name
    weights = load_file(folders[400] / "weights.safetensors")
    assert max(max(value.shape, default=0) for value in weights.values()) < 20
    with np.load(folders[400] / "indices.npz") as rows:
        assert sum(array.size for array in rows.values()) == 400
    adata = make_markers(400)
    for name in ("config.json", "registry.json", "history.json"):
        text = (folders[400] / name).read_text()
        assert "cell1" not in text, "names of cells"
        assert f"{float(adata.X[0, 0])}"[:7] not in text, "a measured value"


def test_configuration_is_readable(scyan, tmp_path):
    """Protects users who look into the files: table, markers and covariates stand there as plain JSON."""
    scyan.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    arguments = {**config["init_params"]["non_kwargs"]}
    assert MarkerTable.parse(arguments["table"]) == scyan.table
    assert "stim" in (tmp_path / "m" / "registry.json").read_text()


def test_labels_after_loading(make_markers, fit_scyan, scyan_quick, tmp_path):
    """Protects further training with labels: their share is that of the attached data, and unknown labels are refused."""
    few = make_markers(200)
    few.obs["label"] = np.where(np.arange(200) % 10 == 0, few.obs["truth"].astype(str), "unknown")
    fit_scyan(few, setup={"labels_key": "label"}).save(tmp_path / "m")
    more = make_markers(200)
    more.obs["label"] = np.where(np.arange(200) % 2 == 0, more.obs["truth"].astype(str), "unknown")
    loaded = _load(tmp_path / "m", more)
    loaded.train(**scyan_quick)
    assert loaded.module.objectives[-1].share == pytest.approx(0.5)
    refused = {
        "has 1 value.* in 200 cell.* that the model does not know \\('Plasma'\\)": "Plasma",
        "has no label, but the model learns from labels; label some": "unknown",
    }
    for message, label in refused.items():
        other = make_markers(200)
        other.obs["label"] = label
        with pytest.raises(ValueError, match=message):
            _load(tmp_path / "m", other).train(**scyan_quick)
    with pytest.raises(KeyError, match="`labels_key='label'` not found; "):
        _load(tmp_path / "m", make_markers(200)).train(**scyan_quick)
    assert _load(tmp_path / "m", make_markers(200)).predict().notna().any(), "labels are not needed to annotate"


def test_model_without_any_label_loads(make_markers, fit_scyan, tmp_path):
    """Protects `labels_key` of data in which no cell has a label yet: the file fits the model."""
    adata = make_markers(100)
    adata.obs["label"] = "unknown"
    model = fit_scyan(adata, setup={"labels_key": "label"}, training={"max_epochs": 1})
    model.save(tmp_path / "m")
    pd.testing.assert_series_equal(_load(tmp_path / "m", adata.copy()).predict(), model.predict())


def test_training_continues_after_loading(scyan, scyan_data, scyan_quick, tmp_path):
    """Protects fine-tuning: curves go on, and the standardisation of covariates stays that of the first data."""
    scyan.save(tmp_path / "m")
    scyan_data.obs["age"] += 100
    loaded = _load(tmp_path / "m", scyan_data)
    loaded.train(**scyan_quick)
    n_epochs = len(scyan.history["train_loss"])
    assert len(loaded.history["train_loss"]) > n_epochs
    torch.testing.assert_close(loaded.module.covariates.loc, scyan.module.covariates.loc, rtol=0, atol=0)


# ---------------------------------------------------------------- resume


class Send(Callback):
    """Sends SIGTERM to this process at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step, self.n = step, 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.n += 1
        if self.n == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def start(make_markers, marker_table):
    """Function that makes a model with some labels, the same every time."""

    def make() -> ScyanModel:
        scvi.settings.seed = 0
        adata = make_markers(200)
        adata.obs["label"] = np.where(np.arange(200) % 10 == 0, adata.obs["truth"].astype(str), "unknown")
        ScyanModel.setup_anndata(adata, batch_key="batch", labels_key="label", continuous_covariate_keys=["age"])
        return ScyanModel(adata, marker_table, n_hidden=4, n_hidden_layers=1, n_layers=3)

    return make


def _assert_same(first: ScyanModel, second: ScyanModel) -> None:
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert set(first.history) == set(second.history)
    for name, frame in first.history.items():
        pd.testing.assert_frame_equal(second.history[name], frame, check_exact=True)


@pytest.mark.parametrize("step", [2, 3, 4, 5, 8, 10, 18])
def test_resume_is_exact_in_every_phase(start, tmp_path, step):
    """Protects resume: stopped inside or between epochs, with temperature or without, the run ends bit for bit the same."""
    whole = start()
    whole.train(**RUN)
    with pytest.raises(SystemExit):
        start().train(**RUN, callbacks=[Send(step)], checkpoint_dir=tmp_path)
    resumed = start()
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.normal_()
    resumed.train(**RUN, checkpoint_dir=tmp_path, resume="auto")
    _assert_same(whole, resumed)


def test_resume_with_another_part_of_the_cells_is_refused(start, tmp_path):
    """Protects exactness: `max_cells_per_epoch` decides what a step sees, so it must be the same."""
    with pytest.raises(SystemExit):
        start().train(**RUN, callbacks=[Send(4)], checkpoint_dir=tmp_path)
    with pytest.raises(Exception, match="belongs to another run, which differs in .*max_cells"):
        start().train(**RUN, checkpoint_dir=tmp_path, resume="auto", max_cells_per_epoch=60)
